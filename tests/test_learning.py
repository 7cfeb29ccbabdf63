"""
Learning on real tasks at the Zoo's budget, against a published threshold and against SB3 on the same evaluation seeds.

"Learns" means: the median over seeds reaches the threshold, and no seed stays below 60 % of the way from the random
policy's return to it.
"""

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learning import curve, study, train


@dataclass(frozen=True)
class Check:
    """One algorithm on one task."""

    algo: str
    env: str
    threshold: float
    """RL Zoo's benchmark: TD3 and DDPG reach -152 on Pendulum, SAC -157; the margin is for seeds that fail now and then."""
    reference: str | None = None
    """SB3's algorithm, with the same hyperparameters."""
    margin: float = 30
    """How much less than the reference is still equal."""
    options: tuple[str, ...] = ()
    """Of ``rl_zoo3.train``."""
    logged: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Bounds on what training logs last."""
    seeds: tuple[int, ...] = (0, 1, 2)
    eval_freq: int = -1
    """Steps between evaluations during training. If positive, the median of a run's last two counts, not the final one."""
    particles: float | None = None
    """What the mean over particles, each by itself, must be with every seed."""

    def score(self, run: dict[str, Any]) -> float:
        """
        :param run: of `study`
        :return: the mean return that counts for it
        """
        return run["mean"] if self.eval_freq < 0 else float(np.median(run["returns"][-2:]))


CHECKS = (
    Check("td3x", "Pendulum-v1", threshold=-200, reference="td3"),
    Check("ddpgx", "Pendulum-v1", threshold=-250, reference="ddpg"),
    # recorded at -122, -122 and -121 first, then set
    Check("d4pg", "Pendulum-v1", -250, options=("-n", "15000"), logged={"clipped_mass": (0, 0.05)}),
    Check("d4pg", "Pendulum-v1", -250, options=("-n", "15000", "-params", "prioritized:False")),
    Check("d4pg", "Pendulum-v1", -400, options=("-n", "15000", "-params", "distribution:'mixture'")),
    # the entropy meets its target, -1, and alpha has fallen from 1
    Check("sacx", "Pendulum-v1", -200, reference="sac", logged={"entropy": (-1.3, -0.7), "ent_coef": (0, 0.2)}),
    # recorded at -119 first, then set
    Check("sacx", "Pendulum-v1", -200, options=("-n", "15000", "-params", "value_network:True")),
    # recorded at -122 first, then set
    Check("opac", "Pendulum-v1", -250),
    Check("opac", "CartPole-v1", 400),
    Check("opac", "CartPole-v1", 200, options=("-n", "200000", "-params", "variant:'is'", "rho_max:2.0")),
    Check("reinforce", "CartPole-v1", 450),
    # recorded at 495 first, then set
    Check("reinforce", "CartPole-v1", 400, options=("-params", "use_baseline:False")),
    # recorded at 500 first, then set; an algorithm without replay goes up and down
    Check("ac", "CartPole-v1", 450, eval_freq=20000, options=("--eval-episodes", "20")),
    Check("ppox", "CartPole-v1", 475, reference="ppo"),
    Check("ppox", "Pendulum-v1", -250, reference="ppo"),
    # recorded at 500 first, then set
    Check("ppox", "CartPole-v1", 450, options=("-conf", "zoo_configs/ppox_penalty_cartpole.yml")),
    Check("acktr", "CartPole-v1", 450, seeds=(0, 1, 2, 3, 4)),
    Check("acktr", "Acrobot-v1", -100),
    # recorded at 500, 500 and about -85 first, then set
    Check("impala", "CartPole-v1", 400),
    Check("impala", "CartPole-v1", 400, options=("-params", "learning_rate:1e-3", "simulated_lag:5")),
    Check("impala", "CartPole-v1", 300, options=("-n", "120000", "-params", "actors:'ray'", "n_actors:2")),
    Check("impala", "Acrobot-v1", -120),
    # recorded at 500 first, all seeds of both; the threshold is a guess made before that
    Check("a3c", "CartPole-v1", 350),
    Check("a3c", "CartPole-v1", 350, options=("-params", "simulated_lag:3")),
    # recorded at 500 and -152 first, then set
    Check("acer", "CartPole-v1", 400, options=("-n", "100000")),
    Check("acer", "CartPole-v1", 450),
    Check("acer", "Pendulum-v1", -250),
    # the thresholds are guesses made before: recorded at 500, and the worst mean at 400
    Check("svpg", "CartPole-v1", 450, particles=300),
    Check("trpox", "CartPole-v1", 475, reference="trpo", options=("-n", "60000")),
    Check("trpox", "Pendulum-v1", -250, reference="trpo"),
)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: f"{check.algo} {check.env} {' '.join(check.options)}")
def test_learns(check: Check, tmp_path: Path) -> None:
    algos = [check.algo] if check.reference is None else [check.algo, check.reference]
    options = ["--eval-freq", str(check.eval_freq), *check.options]
    result = study(check.env, algos, list(check.seeds), tmp_path, options, jobs=2)
    medians, random = result["medians"], result["random"]
    own = [run for run in result["runs"] if run["algo"] == check.algo]
    scores = [check.score(run) for run in own]
    floor = random + 0.6 * (check.threshold - random)
    assert random < check.threshold
    assert np.median(scores) >= check.threshold
    assert min(scores) >= floor
    if check.reference is not None:
        assert np.median(scores) >= medians[check.reference] - check.margin
    if check.particles is not None:
        assert all(np.mean(run["particles"]) >= check.particles for run in own)
    for key, (low, high) in check.logged.items():
        assert all(low <= run["logged"][key] <= high for run in own), key


def test_parts_of_a_run_go_on_from_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def trained(command: list[str], **kwargs: Any) -> None:
        run = tmp_path / "seed7" / "td3x" / f"Pendulum-v1_{len(commands) + 1}"
        commands.append(command)
        assert not run.exists()
        run.mkdir(parents=True)
        np.savez(run / "evaluations.npz", timesteps=[50, 100], results=[[len(commands)], [3]])
        with zipfile.ZipFile(run / "Pendulum-v1.zip", "w") as file:
            file.writestr("data", '{"num_timesteps": 104}')

    monkeypatch.setattr("learning.subprocess.run", trained)
    (tmp_path / "seed7" / "td3x" / "Pendulum-v1_2").mkdir(parents=True)  # of an attempt that was interrupted
    runs = train("td3x", "Pendulum-v1", 7, tmp_path, ["-n", "100"], parts=2)
    assert train("td3x", "Pendulum-v1", 7, tmp_path, ["-n", "100"], parts=2) == runs  # nothing is done again
    first, second = (" ".join(command) for command in commands)
    assert "--seed 7 --save-replay-buffer" in first and " -i " not in first
    assert f"--seed 1007 -i {runs[0] / 'Pendulum-v1.zip'} -params learning_starts:0" in second
    assert "--save-replay-buffer" not in second
    assert curve("Pendulum-v1", runs) == {"timesteps": [50, 100, 154, 204], "returns": [1, 3, 2, 3]}
