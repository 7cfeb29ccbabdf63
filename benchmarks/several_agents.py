"""
MADDPG with central critics, with such and inferred policies, without, and random actions, on a task of several agents: returns
of each agent and of all.

    python benchmarks/several_agents.py --name maddpg_spread --env MPESimpleSpread-v3 --seeds 0 1 2
    python benchmarks/several_agents.py --name maddpg_inferred --env MPESimpleSpeakerListener-v4 --seeds 0 1 2 \
        --variants "central critics" "inferred policies"

Trains through RL Zoo with ``zoo_configs/maddpg_mpe.yml``, one run after another on one thread; runs that are already in
``--folder`` are not repeated, so an interrupted study goes on where it stopped. Writes ``benchmarks/results/<name>.json``
(every number, with the curves) and ``<name>.png``.
"""

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from learning import RESULTS, curve, plot, train

from sb3_ac_ext import MADDPG

RECIPE = Path(__file__).parents[1] / "zoo_configs" / "maddpg_mpe.yml"
VARIANTS = {
    "central critics": [],
    "independent": ["centralised:False"],
    "inferred policies": ["inferred_policies:True"],
}
"""Hyperparameters besides the recipe's."""
EPISODES = range(10_000, 10_100)
"""Reset seeds of the evaluation."""
POINTS = 100
"""Of a training curve."""
PACKAGES = ("torch", "stable_baselines3", "rl_zoo3", "gymnasium", "pettingzoo", "mpe2", "numpy", "sb3_ac_ext")


def evaluate(env_id: str, model: MADDPG | None, seed: int = 0) -> dict[str, Any]:
    """
    :param env_id: task
    :param model: trained on it, or None for random actions
    :param seed: of random actions
    :return: mean of the summed return over `EPISODES`, its standard error, and the mean return of each agent
    """
    env = gym.make(env_id)
    env.action_space.seed(seed)
    returns = []
    for seed in EPISODES:
        obs, _ = env.reset(seed=seed)
        over = False
        while not over:
            action = env.action_space.sample() if model is None else model.predict(obs, deterministic=True)[0]
            obs, _, terminated, truncated, info = env.step(action)
            over = terminated or truncated
        returns.append(info["agent_returns"])
    sums = np.sum(returns, axis=1)
    names = list(env.observation_space.parts)
    error = float(sums.std() / np.sqrt(len(sums)))
    return {
        "mean": float(sums.mean()),
        "standard_error": error,
        "agents": dict(zip(names, np.mean(returns, axis=0), strict=True)),
    }


def agent_curves(log: Path) -> dict[str, list[float]]:
    """
    :param log: what a run printed
    :return: environment steps and each agent's mean return at that time of the training, `POINTS` of them at most
    """
    rows: list[dict[str, float]] = [{}]
    for line in log.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 2 and (cells[0] == "total_timesteps" or cells[0].endswith("_return")):
            rows[-1][cells[0]] = float(cells[1])
        elif line.startswith("---") and rows[-1]:
            rows.append({})
    whole = [row for row in rows if "total_timesteps" in row and len(row) > 1]
    kept = whole[:: max(1, -(-len(whole) // POINTS))]
    return {name: [row[name] for row in kept] for name in (whole[0] if whole else ())}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--name", required=True, help="of the files in benchmarks/results")
    parser.add_argument("--env", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["central critics", "independent"])
    parser.add_argument("-params", nargs="+", default=[], help="hyperparameters of all variants besides, as for the Zoo")
    parser.add_argument("--folder", type=Path, help="of the runs (logs/<name>)")
    args, options = parser.parse_known_args()
    folder = args.folder or Path("logs") / args.name
    every = [
        "-conf",
        str(RECIPE),
        "--eval-freq",
        "25000",
        "--eval-episodes",
        "20",
        "--save-freq",
        "100000",
        "--log-interval",
        "100",
    ]
    random = [{"seed": seed, **evaluate(args.env, None, seed)} for seed in args.seeds]
    print("random", random)
    runs = []
    for seed in args.seeds:
        for variant in args.variants:
            place = folder / variant.replace(" ", "_")
            own = [*VARIANTS[variant], *args.params]
            (run,) = train("maddpg", args.env, seed, place, [*every, *(["-params", *own] if own else []), *options])
            result = evaluate(args.env, MADDPG.load(run / f"{args.env}.zip", device="cpu"))
            log = agent_curves(place / f"seed{seed}" / "maddpg.log")
            seconds = int((run / "seconds").read_text())
            runs.append(
                {"algo": variant, "seed": seed, **result, "seconds": seconds, **curve(args.env, [run]), "training": log}
            )
            print(variant, seed, result, flush=True)
    medians = {name: float(np.median([run["mean"] for run in runs if run["algo"] == name])) for name in args.variants}
    study = {
        "env": args.env,
        "options": options + (["-params", *args.params] if args.params else []),
        "evaluation_seeds": [EPISODES.start, EPISODES.stop],
        "random_runs": random,
        "random": float(np.median([run["mean"] for run in random])),
        "medians": medians,
        "runs": runs,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(study, indent=1) + "\n")
    plot(study, RESULTS / f"{args.name}.png")
    print(medians, "random", study["random"])


if __name__ == "__main__":
    main()
