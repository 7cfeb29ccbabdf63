"""
How many updates prioritised replay saves where one transition in thousands has a reward: the blind cliffwalk of the paper
(Schaul et al. 2016, arXiv:1511.05952, section 3.1 and appendix B.1).

    python benchmarks/cliffwalk.py --seeds 0 1 2 3 4

In each of n states one of two actions leads on and the other one ends the episode; whoever comes through all of them gets 1.
The buffer holds what all 2^n sequences of actions lead to, in random order. Q-learning with a table, step size 1/4 and
discount 1 - 1/n, each drawn transition an update, until no value is wrong by more than 0.01.

Writes ``benchmarks/results/cliffwalk.json``: the updates it took by seed, and by how much priorities lower their median.
"""

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_ac_ext.buffers.prioritized import PrioritizedReplayBuffer

RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-2
STEP_SIZE = 0.25
UNIFORM: dict[str, Any] = {"alpha": 0.0}
PRIORITISED: dict[str, dict[str, Any]] = {
    "alpha 0.6": {"alpha": 0.6, "beta_start": 0.0},
    "alpha 1": {"alpha": 1.0, "beta_start": 0.0},
    "alpha 0.6, weights of the batch, beta 0.4": {"alpha": 0.6, "beta_start": 0.4},
    "alpha 0.6, weights of the buffer, beta 0.4": {"alpha": 0.6, "beta_start": 0.4, "weight_norm": "buffer"},
}
PACKAGES = ("torch", "stable_baselines3", "numpy", "sb3_ac_ext")


class Cliffwalk:
    """
    :param n: number of states
    :param seed: of the order of the sequences, of the first values, and of the draws
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.gamma = n, seed, 1 - 1 / n
        self.truth = np.zeros((n, 2))
        """``(n, 2)`` the values of the action that ends the episode and of the one that leads on."""
        self.truth[:, 1] = self.gamma ** np.arange(n)[::-1]
        random = np.random.default_rng(seed)
        self.first_values = random.normal(0, 0.1, (n, 2))
        sequences = list(product((0, 1), repeat=n))
        self.transitions = [step for at in random.permutation(len(sequences)) for step in self._played(sequences[at])]

    def _played(self, actions: tuple[int, ...]) -> list[tuple[int, int, bool]]:
        """State, action, and whether it ends the episode, up to the end."""
        length = actions.index(0) + 1 if 0 in actions else self.n
        return [(state, actions[state], state == length - 1) for state in range(length)]

    def buffer(self, **kwargs: Any) -> PrioritizedReplayBuffer:
        """
        :param kwargs: for the buffer
        :return: with all transitions
        """
        buffer = PrioritizedReplayBuffer(
            len(self.transitions), spaces.Discrete(self.n), spaces.Discrete(2), device="cpu", gamma=self.gamma, **kwargs
        )
        for state, action, ends in self.transitions:
            following = np.array([min(state + 1, self.n - 1)])
            reward = np.array([float(action == 1 and state == self.n - 1)])
            buffer.add(np.array([state]), following, np.array([action]), reward, np.array([ends]), [{}])
        return buffer


def updates_until_learned(walk: Cliffwalk, *, batch_size: int = 1, limit: int = 10_000_000, **kwargs: Any) -> int:
    """
    :param walk: the task
    :param batch_size: transitions that are drawn at once, each of which makes an update
    :param limit: updates after which it is given up
    :param kwargs: for the buffer
    :return: number of updates after which no value is wrong by more than `TOLERANCE`
    """
    np.random.seed(walk.seed)  # noqa: NPY002 (SB3's stream)
    buffer, values = walk.buffer(**kwargs), walk.first_values.copy()
    for updates in range(batch_size, limit, batch_size):
        batch = buffer.sample(batch_size)
        fields = (batch.observations, batch.actions, batch.next_observations, batch.dones, batch.rewards, batch.weights)
        errors = np.empty(batch_size)
        rows = zip(*(field.flatten().tolist() for field in fields), strict=True)
        for at, (state, action, following, done, reward, weight) in enumerate(rows):
            target = reward + (1 - done) * walk.gamma * max(values[following])
            errors[at] = target - values[state, action]
            values[state, action] += STEP_SIZE * weight * errors[at]
        buffer.update_priorities(batch.indices, errors, batch.versions)
        if np.abs(values - walk.truth).max() < TOLERANCE:
            return updates
    raise RuntimeError(f"not learned in {limit} updates")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=12, help="states")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16], help="transitions drawn at once")
    args = parser.parse_args()
    th.set_num_threads(1)
    start = time.perf_counter()
    walks = [Cliffwalk(args.n, seed) for seed in args.seeds]
    runs: list[dict[str, Any]] = []
    for batch_size in args.batch_sizes:
        for name, kwargs in {"uniform": UNIFORM, **PRIORITISED}.items():
            updates = [updates_until_learned(walk, batch_size=batch_size, **kwargs) for walk in walks]
            if name == "uniform":
                uniform = median(updates)
            times = round(uniform / median(updates), 1)
            print(f"batch {batch_size:2d}, {name:45s} {times:5.1f} times fewer updates: {updates}", flush=True)
            runs.append({"replay": name, "batch_size": batch_size, "updates": updates, "times_fewer": times})
    result = {
        "n": args.n,
        "transitions": len(walks[0].transitions),
        "seeds": args.seeds,
        "runs": runs,
        "seconds": round(time.perf_counter() - start),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
    }
    (RESULTS / "cliffwalk.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
