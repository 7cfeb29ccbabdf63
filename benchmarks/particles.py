"""
What SVPG costs with 16 particles and with one, and SB3's A2C, on CartPole-v1 with networks of [64, 64] and one thread.

    python benchmarks/particles.py

They take turns; the best of several blocks counts. An update is a ``train()`` on a rollout of `N_STEPS` steps of each
environment, one for each particle; a step is one of one environment in ``learn()``, updates included. Writes
``benchmarks/results/svpg_speed.json`` unless another job keeps the machine busy.
"""

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env

from sb3_ac_ext import SVPG

RESULTS = Path(__file__).parent / "results"
BUSY = 0.6
"""Load average above which nothing is recorded."""
N_STEPS = (16, 64)
BLOCKS = 10
UPDATES, ROLLOUTS = 30, 20
"""In a block."""
PACKAGES = ("torch", "stable_baselines3", "gymnasium", "numpy", "sb3_ac_ext")


def made(name: str, n_steps: int) -> Any:
    """
    :param name: of what is measured
    :param n_steps: steps of each environment in a rollout
    :return: a model that has learned for a while
    """
    n = 16 if name == "16 particles" else 1
    env, arguments = make_vec_env("CartPole-v1", n_envs=n), {"n_steps": n_steps, "seed": 0, "device": "cpu"}
    model: Any
    if name == "A2C":
        model = A2C("MlpPolicy", env, use_rms_prop=False, normalize_advantage=True, **arguments)
    else:
        model = SVPG("MlpPolicy", env, n_particles=n, **arguments)
    return model.learn(20 * n * n_steps)


def main() -> None:
    """The command line."""
    torch.set_num_threads(1)
    busy = os.getloadavg()[0]
    rows = []
    for n_steps in N_STEPS:
        models = {name: made(name, n_steps) for name in ("16 particles", "one particle", "A2C")}
        best = {name: {"update [ms]": float("inf"), "step [us]": float("inf")} for name in models}
        for _ in range(BLOCKS):
            for name, model in models.items():
                started = time.perf_counter()
                for _ in range(UPDATES):
                    model.train()
                update = 1e3 * (time.perf_counter() - started) / UPDATES
                steps = ROLLOUTS * n_steps * model.n_envs
                started = time.perf_counter()
                model.learn(steps, reset_num_timesteps=False)
                step = 1e6 * (time.perf_counter() - started) / steps
                times = zip(best[name], (update, step), strict=True)
                best[name] = {key: min(best[name][key], value) for key, value in times}
        row: dict[str, Any] = {"n_steps": n_steps, **best, "ratios": {}}
        for other in ("one particle", "A2C"):
            row["ratios"][other] = {key: best["16 particles"][key] / best[other][key] for key in best[other]}
        rows.append(row)
        print(json.dumps(row), flush=True)
    if busy > BUSY:
        print(f"not recorded: the load average was {busy} at the start")
        return
    result = {
        "rows": rows,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "svpg_speed.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
