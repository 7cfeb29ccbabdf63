"""
A cooperative game of two agents with private information, learned with central critics, with such and inferred policies, and
without central critics.

    python benchmarks/matrix_game.py --seeds 0 1 2

Each agent sees a number of its own, both act once, and both get -(a_1 + a_2 - (o_1 + o_2) / 2)^2, at most 0. Writes
``benchmarks/results/matrix_game.json``: the mean reward of the greedy agents over the same games during training and after it.

A game is one step, so targets have no next action in them, and inferred policies have to change nothing: the first two have to
be the same to the last digit.
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
STEPS = 10_000
GAMES = 1000
"""Of an evaluation."""
HYPERPARAMS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "policy_kwargs": {"net_arch": [64, 64]},
    "batch_size": 256,
    "tau": 0.01,
    "learning_starts": 1000,
    "exploration_noise": {"type": "normal", "start": 0.3, "end": 0.05, "steps": STEPS},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "central critics": {},
    "central critics, inferred policies": {"inferred_policies": True},
    "independent": {"centralised": False},
}
"""What else the algorithm is given."""
PACKAGES = ("torch", "stable_baselines3", "gymnasium", "numpy", "sb3_ac_ext")


class MatrixGame:
    """The game with PettingZoo's interface; an episode is one step."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "name": "matrix_game_v0"}
    possible_agents: ClassVar[list[str]] = ["row", "column"]

    def __init__(self) -> None:
        self.agents: list[str] = []
        self.random = np.random.default_rng(0)

    def observation_space(self, agent: str) -> spaces.Box:
        return spaces.Box(-1, 1, (1,), np.float32)

    def action_space(self, agent: str) -> spaces.Box:
        return spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.agents = list(self.possible_agents)
        self.numbers = {agent: self.random.uniform(-1, 1, 1).astype(np.float32) for agent in self.agents}
        return dict(self.numbers), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, Any]) -> tuple[dict[str, Any], ...]:
        reward = payoff(*(np.concatenate([part[agent] for agent in self.possible_agents]) for part in (self.numbers, actions)))
        self.agents = []

        def everyone(value: Any) -> dict[str, Any]:
            return dict.fromkeys(self.possible_agents, value)

        return (
            dict(self.numbers),
            everyone(float(reward)),
            everyone(True),
            everyone(False),
            {a: {} for a in self.possible_agents},
        )

    def close(self) -> None:
        """Nothing to close."""


def payoff(numbers: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """
    :param numbers: ``(..., 2)`` what the agents see
    :param actions: ``(..., 2)`` what they do
    :return: ``(...)`` what each gets
    """
    difference: np.ndarray = actions.sum(axis=-1) - numbers.sum(axis=-1) / 2
    return -(difference**2)


def evaluate(model: Any) -> float:
    """
    :param model: trained on the game, or None for uniform actions
    :return: mean reward of `GAMES` games, always the same ones
    """
    numbers, uniform = np.random.default_rng(10_000).uniform(-1, 1, (2, GAMES, 2)).astype(np.float32)
    actions = uniform if model is None else model.predict(numbers, deterministic=True)[0]
    return float(payoff(numbers, actions).mean())


def train(seed: int, variant: str, steps: int = STEPS) -> dict[str, Any]:
    """
    :param seed: of the run
    :param variant: one of `VARIANTS`
    :param steps: games
    :return: the curve and the result
    """
    from stable_baselines3.common.callbacks import BaseCallback

    from sb3_ac_ext import MADDPG

    curve: dict[str, list[float]] = {"timesteps": [], "rewards": []}

    class Curve(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps % 500 == 0:
                curve["timesteps"].append(self.num_timesteps)
                curve["rewards"].append(evaluate(self.model))
            return True

    started = time.time()
    model = MADDPG("MlpPolicy", MatrixGame(), seed=seed, device="cpu", **HYPERPARAMS, **VARIANTS[variant])
    model.learn(steps, callback=Curve())
    return {"seed": seed, "final": evaluate(model), "seconds": round(time.time() - started), **curve}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    runs: dict[str, Any] = {}
    for name in VARIANTS:
        runs[name] = [train(seed, name) for seed in args.seeds]
        print(name, [round(run["final"], 4) for run in runs[name]])
    result = {
        "steps": STEPS,
        "hyperparams": HYPERPARAMS,
        "random": evaluate(None),
        "runs": runs,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "matrix_game.json").write_text(json.dumps(result, indent=1) + "\n")
    print("random", round(result["random"], 3))


if __name__ == "__main__":
    main()
