"""
A zero-sum game of two agents on a circle, learned by single policies and by policy ensembles: how far both can be exploited.

    python benchmarks/circle_game.py --seeds 0 1 2 3 4

Each agent names a point of the circle, by the direction of an action in [-1, 1]^2, once. With the angles x and y

    r_seeker = cos(x - y),    r_hider = -r_seeker

Value: against a uniform y any x has E cos(x - y) = 0 and against a uniform x any y too, so both are optimal: it is 0.

Best responses: of a mixture of K points with the mean vector m = 1/K sum_k (cos y_k, sin y_k) any x gets |m| cos(x - arg m).
The seeker's best response has |m|, the hider's likewise |m| of the seeker's points. So the exploitability, what both could
gain by their best responses, is |m_seeker| + |m_hider|: 2 of any pair of points, which is what two deterministic policies are
whatever they have learned, and 0 of K >= 2 evenly spread points each. No sub-policy has a reason to be elsewhere than the
others of its ensemble, which all play against the same mixture; whether they are is what is measured, and untrained ensembles
are the comparison for that.

Writes ``benchmarks/results/circle_game.json``: the exploitability, by best responses on a grid, and the points of all
sub-policies before and after training.
"""

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

RESULTS = Path(__file__).parent / "results"
STEPS = 4000
EVERY = 100
"""Steps from one look to the next."""
GRID = np.linspace(-np.pi, np.pi, 720, endpoint=False)
"""Of best responses."""
HYPERPARAMS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "policy_kwargs": {"net_arch": [32, 32]},
    "batch_size": 64,
    "buffer_size": 1000,
    "tau": 0.05,
    "learning_starts": 500,
    "exploration_noise": {"type": "normal", "start": 0.3},
}
PACKAGES = ("torch", "stable_baselines3", "gymnasium", "numpy", "sb3_ac_ext")


class CircleGame:
    """The game with PettingZoo's interface; an episode is one step, and there is nothing to be seen."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "name": "circle_game_v0"}
    possible_agents: ClassVar[list[str]] = ["seeker", "hider"]

    def __init__(self) -> None:
        self.agents: list[str] = []

    def observation_space(self, agent: str) -> spaces.Box:
        return spaces.Box(0, 1, (1,), np.float32)

    def action_space(self, agent: str) -> spaces.Box:
        return spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        self.agents = list(self.possible_agents)
        return self._nothing(), {agent: {} for agent in self.agents}

    def _nothing(self) -> dict[str, Any]:
        return {agent: np.ones(1, np.float32) for agent in self.possible_agents}

    def step(self, actions: dict[str, Any]) -> tuple[dict[str, Any], ...]:
        x, y = (angle(actions[agent]) for agent in self.possible_agents)
        reward = float(np.cos(x - y))
        self.agents = []
        over = dict.fromkeys(self.possible_agents, True)
        rewards = {"seeker": reward, "hider": -reward}
        return self._nothing(), rewards, over, dict.fromkeys(over, False), {agent: {} for agent in over}

    def close(self) -> None:
        """Nothing to close."""


def angle(actions: np.ndarray) -> np.ndarray:
    """
    :param actions: ``(..., 2)``
    :return: ``(...)`` where on the circle
    """
    return np.arctan2(actions[..., 1], actions[..., 0])


def exploitability(seeker: np.ndarray, hider: np.ndarray) -> float:
    """
    :param seeker: ``(K,)`` angles that one agent draws from
    :param hider: ``(K,)`` those of the other
    :return: what both best responses on `GRID` have, less the value, which is 0
    """
    seeks = np.cos(GRID[:, None] - hider).mean(axis=1).max()
    hides = -np.cos(seeker - GRID[:, None]).mean(axis=1).min()
    return float(seeks + hides)


def points(model: Any) -> np.ndarray:
    """
    :param model: trained on the game
    :return: ``(2, K)`` the angles of the seeker's and the hider's sub-policies
    """
    seen = np.ones(2, np.float32)
    actions = [model.predict(seen, deterministic=True, ensemble_index=k)[0] for k in range(model.n_sub_policies)]
    return angle(np.stack(actions).reshape(-1, 2, 2)).T


def train(seed: int, n_sub_policies: int, steps: int = STEPS) -> dict[str, Any]:
    """
    :param seed: of the run
    :param n_sub_policies: K
    :param steps: games
    :return: the curve, and its mean over the second half of the training
    """
    from stable_baselines3.common.callbacks import BaseCallback

    from sb3_ac_ext import MADDPG

    curve: dict[str, list[Any]] = {"timesteps": [], "exploitability": [], "points": []}

    def look(model: Any) -> None:
        now = points(model)
        curve["timesteps"].append(model.num_timesteps)
        curve["exploitability"].append(exploitability(*now))
        curve["points"].append(now.round(4).tolist())

    class Curve(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps % EVERY == 0:
                look(self.model)
            return True

    started = time.time()
    model = MADDPG("MlpPolicy", CircleGame(), n_sub_policies=n_sub_policies, seed=seed, device="cpu", **HYPERPARAMS)
    look(model)
    model.learn(steps, callback=Curve())
    values = curve["exploitability"]
    result = {"seed": seed, "untrained": values[0], "final": values[-1], "mean": float(np.mean(values[len(values) // 2 :]))}
    curve["points"] = [curve["points"][0], curve["points"][-1]]  # enough to see who has spread
    return {**result, "seconds": round(time.time() - started), **curve}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--sub-policies", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--name", default="circle_game", help="of the file in benchmarks/results")
    args = parser.parse_args()
    runs: dict[str, Any] = {}
    for number in args.sub_policies:
        runs[f"K = {number}"] = [train(seed, number, args.steps) for seed in args.seeds]
    keys = ("untrained", "mean", "final")
    medians = {name: {key: float(np.median([run[key] for run in of])) for key in keys} for name, of in runs.items()}
    result = {
        "steps": args.steps,
        "hyperparams": HYPERPARAMS,
        "medians": medians,
        "runs": runs,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, values in medians.items():
        print(name, {key: round(value, 3) for key, value in values.items()})


if __name__ == "__main__":
    main()
