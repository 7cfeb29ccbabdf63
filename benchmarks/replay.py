"""
What priorities cost: sampling 256 of a million transitions, and updating their priorities, against SB3's uniform sampling.

    python benchmarks/replay.py --name prioritized_replay

By turns in one process, one thread. Writes ``benchmarks/results/<name>.json`` unless another job keeps the machine busy.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer
from throughput import BUSY, processor

from sb3_ac_ext.buffers.prioritized import PrioritizedReplayBuffer

SIZE, BATCH, CALLS, TURNS = 1_000_000, 256, 100, 15
SPACES = spaces.Box(-1, 1, (15,)), spaces.Box(-1, 1, (3,))


def filled(cls: Any, **kwargs: Any) -> Any:
    """A full buffer of ones, so that all of its memory is there; each priority is another one."""
    buffer = cls(SIZE, *SPACES, device="cpu", **kwargs)
    for stored in (buffer.observations, buffer.next_observations, buffer.actions, buffer.rewards):
        stored[:] = 1
    buffer.pos, buffer.full = 0, True
    if isinstance(buffer, PrioritizedReplayBuffer):
        buffer._assign(np.arange(SIZE), 1.0)
        buffer.update_priorities(np.arange(SIZE), np.random.default_rng(0).random(SIZE))
    return buffer


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="of the file in benchmarks/results")
    args = parser.parse_args()
    busy = os.getloadavg()[0] > BUSY
    th.set_num_threads(1)
    uniform, several = filled(ReplayBuffer), filled(NStepReplayBuffer, n_steps=3)
    ours = {norm: filled(PrioritizedReplayBuffer, weight_norm=norm) for norm in ("batch", "buffer")}
    ours["n = 3"] = filled(PrioritizedReplayBuffer, n_steps=3)
    rng = np.random.default_rng(0)
    drawn, errors = rng.integers(SIZE, size=BATCH), rng.random(BATCH)
    calls: dict[str, Callable[[], Any]] = {
        "SB3's uniform sampling": lambda: uniform.sample(BATCH),
        "SB3's sampling, n = 3": lambda: several.sample(BATCH),
        **{f"sampling, {name}": lambda buffer=buffer: buffer.sample(BATCH) for name, buffer in ours.items()},
        **{
            f"updating, {name}": lambda buffer=buffer: buffer.update_priorities(drawn, errors) for name, buffer in ours.items()
        },
    }
    turns: list[dict[str, float]] = []
    for turn in range(TURNS + 1):
        times = {}
        for name in list(calls)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            for _ in range(CALLS):
                calls[name]()
            times[name] = (time.perf_counter() - start) / CALLS * 1e6
        turns.append(times)
    turns = turns[1:]
    reference = "SB3's uniform sampling"
    result = {
        "processor": processor(),
        "us": {name: float(np.median([turn[name] for turn in turns])) for name in calls},
        "ratio": {name: float(np.median([turn[name] / turn[reference] for turn in turns])) for name in calls},
    }
    print(json.dumps(result, indent=1))
    if args.name and busy:
        parser.error(f"the load average was above {BUSY}: nothing is recorded")
    if args.name:
        (Path(__file__).parent / "results" / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
