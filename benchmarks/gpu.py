"""
Updates on a GPU: SB3's class, ours with CUDA graphs, and ours as it stands, by turns.

    python benchmarks/gpu.py --name gpu

Needs a CUDA device. Off-policy: networks of [400, 300], batches of 256 of Pendulum-v1. On-policy: ``CnnPolicy`` on images
of 3 x 84 x 84 of 8 environments, minibatches of 128. Writes ``benchmarks/results/<name>.json``.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv
from tasks import images

from sb3_ac_ext import PPOX, SACX, TD3X

UPDATES = 100
"""In a turn."""
ROLLOUT: dict[str, Any] = {"n_steps": 64, "batch_size": 128, "n_epochs": 4}


def off_policy(cls: Any, **engine: bool) -> tuple[Any, Callable[[], None]]:
    """A model that has learned a little, and ``UPDATES`` updates of it."""
    arguments: dict[str, Any] = {"batch_size": 256, "learning_starts": 300, "policy_kwargs": {"net_arch": [400, 300]}}
    model = cls("MlpPolicy", "Pendulum-v1", device="cuda", seed=0, **arguments, **engine).learn(400)
    return model, lambda: model.train(gradient_steps=UPDATES, batch_size=256)


def on_policy(cls: Any, **engine: bool) -> tuple[Any, Callable[[], None]]:
    """A model that has learned a little, and its updates on a rollout."""
    model = cls("CnnPolicy", DummyVecEnv([images] * 8), device="cuda", seed=0, **ROLLOUT, **engine).learn(1024)
    return model, model.train


CASES = {"td3x": (TD3X, off_policy), "sacx": (SACX, off_policy), "ppox, images": (PPOX, on_policy)}


def measure(case: str, repetitions: int) -> dict[str, Any]:
    """
    :param case: key of `CASES`
    :param repetitions: turns
    :return: milliseconds of a turn of each (medians), how many times ours SB3 takes (median of the turns), what is replayed
    """
    cls, prepare = CASES[case]
    kinds = {"sb3": prepare(cls.sb3_class), "ours": prepare(cls), "engine=False": prepare(cls, engine=False)}
    turns: list[dict[str, float]] = []
    for _ in range(repetitions):
        turn = {}
        for name, (_, block) in kinds.items():
            th.cuda.synchronize()
            start = time.perf_counter()
            block()
            th.cuda.synchronize()
            turn[name] = (time.perf_counter() - start) * 1e3
        turns.append(turn)
    return {
        "case": case,
        "ms": {name: float(np.median([turn[name] for turn in turns])) for name in kinds},
        "sb3 / ours": float(np.median([turn["sb3"] / turn["ours"] for turn in turns])),
        "report": kinds["ours"][0].engine_report(),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="of the file in benchmarks/results")
    parser.add_argument("--repetitions", type=int, default=9)
    args = parser.parse_args()
    rows = [measure(case, args.repetitions) for case in CASES]
    for row in rows:
        print(row)
    if args.name:
        result = {"device": th.cuda.get_device_name(), "torch": th.__version__, "rows": rows}
        (Path(__file__).parent / "results" / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
