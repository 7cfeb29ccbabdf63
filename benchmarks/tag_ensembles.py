"""
Predators and prey, each team trained as an ensemble or as single policies: who gets what against whom.

    python benchmarks/tag_ensembles.py --seeds 0 1 2 --steps 500000

Trains MADDPG on mpe2's simple_tag (three predators, one prey) with K = 1 and K = 2 (the paper's number for predator and prey)
by ``hyperparams/maddpg.yml``, one run after another on one thread; models that are in ``--folder`` are not trained again.
Then the predators of every run play against the prey of every run, on the same resets. Ensembles draw for each episode. Writes
``benchmarks/results/<name>.json``: the mean return of each agent in each pairing, and of each pair of sub-policies of a run
with itself. The higher the predators' returns the better they hunt: 10 for each of them and each touch; compare predators
against the same prey, prey against the same predators.
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
import torch as th
import yaml

from sb3_ac_ext import MADDPG
from sb3_ac_ext.maddpg.evaluation import returns_of_pairs

ENV = "MPESimpleTag-v3"
RESULTS = Path(__file__).parent / "results"
FILE = Path(__file__).parents[1] / "hyperparams" / "maddpg.yml"
NOT_OURS = ("n_timesteps", "noise_type", "noise_std")
"""The Zoo's; choices of the task are drawn from the policy."""
PREDATORS = 3
"""The first agents."""
RESETS = 10_000
"""The first seed of an evaluation."""
PACKAGES = ("torch", "stable_baselines3", "gymnasium", "pettingzoo", "mpe2", "numpy", "sb3_ac_ext")


def trained(seed: int, n_sub_policies: int, steps: int, folder: Path) -> tuple[MADDPG, float]:
    """
    :param seed: of the run
    :param n_sub_policies: K
    :param steps: of the environment
    :param folder: where the model is or will be
    :return: the model, and the seconds that its training took (nan if it was there)
    """
    path = folder / f"k{n_sub_policies}_seed{seed}_steps{steps}.zip"
    if path.exists():
        return MADDPG.load(path, device="cpu"), float("nan")
    hyperparams = {k: v for k, v in yaml.safe_load(FILE.read_text())[ENV].items() if k not in NOT_OURS}
    hyperparams["learning_starts"] = min(hyperparams["learning_starts"], steps // 4)
    model = MADDPG(env=ENV, n_sub_policies=n_sub_policies, seed=seed, device="cpu", **hyperparams)
    started = time.time()
    model.learn(steps)
    seconds = time.time() - started
    model.save(path)
    return model, seconds


def play(predators: MADDPG, prey: MADDPG, episodes: int) -> list[float]:
    """
    :param predators: acts for the first agents
    :param prey: acts for the last one
    :param episodes: each from a reset seed of its own, the same in all calls
    :return: mean return of each agent
    """
    env: Any = gym.make(ENV)
    start = env.action_space.columns[list(env.action_space.parts)[PREDATORS]].start
    returns = []
    for reset in range(RESETS, RESETS + episodes):
        obs, _ = env.reset(seed=reset)
        states: list[Any] = [None, None]
        over = False
        while not over:
            actions = []
            for i, model in enumerate((predators, prey)):
                action, states[i] = model.predict(obs, states[i], deterministic=True)
                actions.append(action)
            joint = np.concatenate([actions[0][:start], actions[1][start:]])
            obs, _, terminated, truncated, info = env.step(joint)
            over = terminated or truncated
        returns.append(info["agent_returns"])
    return [float(value) for value in np.mean(returns, axis=0)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="tag_ensembles", help="of the file in benchmarks/results")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sub-policies", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=500_000)
    parser.add_argument("--episodes", type=int, default=100, help="of each pairing")
    parser.add_argument("--folder", type=Path, help="of the models (logs/<name>)")
    args = parser.parse_args()
    th.set_num_threads(1)
    folder = args.folder or Path("logs") / args.name
    folder.mkdir(parents=True, exist_ok=True)
    models, runs = {}, []
    for seed in args.seeds:
        for number in args.sub_policies:
            model, seconds = trained(seed, number, args.steps, folder)
            models[number, seed] = model
            pairs = returns_of_pairs(model, gym.make(ENV), max(1, args.episodes // number**2), seed=RESETS)
            runs.append({"k": number, "seed": seed, "seconds": None if np.isnan(seconds) else round(seconds)})
            runs[-1]["pairs"] = pairs.tolist()
            print(runs[-1], flush=True)
    matches = []
    for (k_predators, seed_predators), predators in models.items():
        for (k_prey, seed_prey), prey in models.items():
            returns = play(predators, prey, args.episodes)
            ids = {"predators": [k_predators, seed_predators], "prey": [k_prey, seed_prey]}
            matches.append({**ids, "returns": returns, "same_run": (k_predators, seed_predators) == (k_prey, seed_prey)})
    against: dict[str, list[float]] = {}
    for match in matches:
        if not match["same_run"]:
            name = f"predators of K = {match['predators'][0]}, prey of K = {match['prey'][0]}"
            against.setdefault(name, []).append(float(np.mean(match["returns"][:PREDATORS])))
    medians = {name: float(np.median(values)) for name, values in against.items()}
    result = {
        "env": ENV,
        "steps": args.steps,
        "episodes": args.episodes,
        "reset_seeds": [RESETS, RESETS + args.episodes],
        "median_return_of_a_predator_against_prey_of_other_runs": medians,
        "matches": matches,
        "runs": runs,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, value in medians.items():
        print(name, round(value, 2))


if __name__ == "__main__":
    main()
