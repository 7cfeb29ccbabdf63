"""
Do particles that repel each other find both ends of a corridor? SVPG against the same particles without a kernel.

    python benchmarks/corridor.py                # seeds 0 to 4, writes benchmarks/results/svpg_corridor.json
    python benchmarks/corridor.py --seeds 100    # a trial, which writes nothing

A walker starts between two goals that are worth the same, one near and one far. A random walk meets the near one more often,
and discounting prefers it too, so a policy that only ascends its return goes there. A goal is found by a training if at its
end one particle at least reaches it in more than half of its episodes.
"""

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.env_util import make_vec_env

from sb3_ac_ext import SVPG

RESULTS = Path(__file__).parent / "results"
NEAR, FAR = 4, 10
"""Steps from the start to each goal."""
LIMIT = 80
"""Steps of an episode."""
EPISODES = 100
"""Of each particle, at the end."""
STEPS = 20_000
"""Of each particle."""
VARIANTS = {"svpg": {"kernel": True}, "independent": {"kernel": False}}
SETTINGS: dict[str, Any] = {
    "n_particles": 8,
    "n_steps": 64,
    "gamma": 0.95,
    "gae_lambda": 0.95,
    "learning_rate": 0.01,
    "temperature": 10.0,
    "annealing": "none",
    "policy_kwargs": {"net_arch": {"pi": [], "vf": [64]}},
}
PACKAGES = ("torch", "stable_baselines3", "gymnasium", "numpy", "sb3_ac_ext")


class Corridor(gym.Env[np.ndarray, np.int64]):
    """A step to the left or to the right; reward 1 at either goal, where the episode ends."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1, 1, (1,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.place = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.place = 0
        return self._seen(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.place += 1 if action else -1
        there = self.place in (-NEAR, FAR)
        return self._seen(), float(there), there, False, {}

    def _seen(self) -> np.ndarray:
        return np.array([self.place / FAR], np.float32)


def make() -> gym.Env[Any, Any]:
    """One corridor."""
    return TimeLimit(Corridor(), LIMIT)


def ends(model: SVPG, particle: int) -> dict[str, float]:
    """
    :param model: trained
    :param particle: of it
    :return: in which share of `EPISODES` it reaches each goal, by draws from its policy
    """
    env, reached = make(), {"near": 0, "far": 0}
    for _ in range(EPISODES):
        obs, _ = env.reset()
        over = False
        while not over:
            action, _ = model.predict(obs, particle=particle)
            obs, _, terminated, truncated, _ = env.step(np.int64(action))
            over = terminated or truncated
        if terminated:
            reached["near" if obs[0] < 0 else "far"] += 1
    return {goal: number / EPISODES for goal, number in reached.items()}


def train(seed: int, **options: Any) -> dict[str, Any]:
    """
    :param seed: of the run
    :param options: arguments of SVPG besides `SETTINGS`
    :return: where each particle goes at the end, and which goals are found
    """
    settings = {**SETTINGS, **options}
    env = make_vec_env(make, n_envs=settings["n_particles"])
    model = SVPG("MlpPolicy", env, seed=seed, device="cpu", **settings)
    started = time.time()
    model.learn(settings["n_particles"] * STEPS)
    shares = [ends(model, particle) for particle in range(settings["n_particles"])]
    found = [goal for goal in ("near", "far") if any(share[goal] > 0.5 for share in shares)]
    return {"seed": seed, "found": found, "particles": shares, "seconds": round(time.time() - started)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int)
    args = parser.parse_args()
    runs: dict[str, Any] = {}
    for name, options in VARIANTS.items():
        runs[name] = []
        for seed in args.seeds or range(5):
            runs[name].append(train(seed, **options))
            print(
                name,
                seed,
                runs[name][-1]["found"],
                [list(share.values()) for share in runs[name][-1]["particles"]],
                flush=True,
            )
    if args.seeds:
        return
    result = {
        "settings": SETTINGS,
        "steps of each particle": STEPS,
        "both found": {name: sum(len(run["found"]) == 2 for run in of_variant) for name, of_variant in runs.items()},
        "runs": runs,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "svpg_corridor.json").write_text(json.dumps(result, indent=1) + "\n")
    print(result["both found"])


if __name__ == "__main__":
    main()
