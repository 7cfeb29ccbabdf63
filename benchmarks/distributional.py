"""
What a distributional critic costs: updates of D4PG and of TD3X by turns, in one process.

    python benchmarks/distributional.py --name d4pg_update

Networks of [400, 300], batches of 256 of HopperBulletEnv-v0, 51 atoms, D4PG with prioritised replay (priorities written back)
and without. Both as they are otherwise: TD3X has two critics and moves its actor in every second update, D4PG has one and
moves it in each. Writes ``benchmarks/results/<name>.json`` unless another job keeps the machine busy.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from tasks import gradient_steps
from throughput import BUSY, processor

from sb3_ac_ext import D4PG, TD3X

UPDATES = 20
"""In a turn."""
ARGUMENTS: dict[str, Any] = {"buffer_size": 100_000, "policy_kwargs": {"net_arch": [400, 300]}}
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "td3x": (TD3X, {}),
    "d4pg": (D4PG, {"n_steps": 5}),
    "d4pg, uniform replay": (D4PG, {"n_steps": 5, "prioritized": False}),
    "d4pg, mixture": (D4PG, {"n_steps": 5, "distribution": "mixture"}),
}


def measure(threads: int, repetitions: int) -> dict[str, Any]:
    """
    :param threads: of PyTorch
    :param repetitions: turns
    :return: milliseconds of an update of each (medians), and the medians of its ratio to TD3X's in the same turn
    """
    th.set_num_threads(threads)
    blocks = {
        name: gradient_steps(UPDATES, net_arch=[400, 300])(cls, {**ARGUMENTS, **own}) for name, (cls, own) in KINDS.items()
    }
    turns: list[dict[str, float]] = []
    for repetition in range(repetitions + 1):
        turn = {}
        for name in list(blocks)[:: 1 if repetition % 2 else -1]:
            start = time.perf_counter()
            blocks[name]()
            turn[name] = (time.perf_counter() - start) / UPDATES * 1e3
        turns.append(turn)
    turns = turns[1:]  # the first makes the recordings
    return {
        "threads": threads,
        "ms": {name: float(np.median([turn[name] for turn in turns])) for name in blocks},
        "ratio": {name: float(np.median([turn[name] / turn["td3x"] for turn in turns])) for name in blocks},
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="of the file in benchmarks/results")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=15)
    args = parser.parse_args()
    busy = os.getloadavg()[0] > BUSY
    rows = [measure(threads, args.repetitions) for threads in args.threads]
    for row in rows:
        print(row)
    if args.name and busy:
        parser.error(f"the load average was above {BUSY}: nothing is recorded")
    if args.name:
        result = {"processor": processor(), "torch": th.__version__, "rows": rows}
        (Path(__file__).parent / "results" / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
