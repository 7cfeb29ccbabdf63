"""
Learning studies: train through RL Zoo, several algorithms and seeds, evaluate all on the same reset seeds, record.

    python benchmarks/learning.py --name pendulum --env Pendulum-v1 --algos td3x td3 --seeds 0 1 2

Writes ``benchmarks/results/<name>.json`` (every number) and ``<name>.png`` (the curves). Runs that are already in
``--folder`` are not repeated, so an interrupted study goes on where it stopped; what is left of an unfinished run is deleted.
With ``--parts K`` each run is made of K runs of ``-n`` steps, each of which goes on from the files of the one before:
networks, optimizers, replay buffer, but not the schedules of learning rates, which begin anew.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import rl_zoo3.import_envs  # noqa: F401 (registers the environments)
from rl_zoo3 import ALGOS, create_test_env, get_saved_hyperparams

RESULTS = Path(__file__).parent / "results"
EVALUATION_SEEDS = range(10_000, 10_020)
PACKAGES = ("torch", "stable_baselines3", "sb3_contrib", "rl_zoo3", "gymnasium", "numpy", "sb3_ac_ext")


def train(algo: str, env_id: str, seed: int, folder: Path, options: list[str], parts: int = 1) -> list[Path]:
    """
    One run of ``rl_zoo3.train`` on one thread, or several that go on from one another, unless they are there already.

    :param algo: the Zoo's name of the algorithm
    :param env_id: environment
    :param seed: seed of the run; each part has another
    :param folder: where the study's runs are
    :param options: further options of ``rl_zoo3.train``
    :param parts: number of runs
    :return: the folder of each part
    """
    logs = folder / f"seed{seed}"
    runs = [logs / algo / f"{env_id}_{part + 1}" for part in range(parts)]
    for part, run in enumerate(runs):
        if (run / f"{env_id}.zip").is_file():
            continue
        shutil.rmtree(run, ignore_errors=True)  # was interrupted
        command = ["-m", "rl_zoo3.train", "--algo", algo, "--env", env_id, "--num-threads", "1", "-f", str(logs), *options]
        command += ["--seed", str(seed + 1000 * part)]
        if part > 0:  # the Zoo counts steps anew, so random actions would come again
            command += ["-i", str(runs[part - 1] / f"{env_id}.zip"), "-params", "learning_starts:0"]
        if part < parts - 1:
            command.append("--save-replay-buffer")
        logs.mkdir(parents=True, exist_ok=True)
        started = time.time()
        with (logs / f"{algo}.log").open("a" if part else "w") as log:
            environ = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, *command], check=True, stdout=log, stderr=subprocess.STDOUT, env=environ)
        (run / "seconds").write_text(f"{time.time() - started:.0f}")
    return runs


def evaluate(algo: str, env_id: str, run: Path, **asked: Any) -> list[float]:
    """
    :param algo: the Zoo's name of the algorithm, or "random"
    :param env_id: environment
    :param run: folder of the run
    :param asked: further arguments of ``predict``
    :return: return of one deterministic episode for each of `EVALUATION_SEEDS`, in reward units
    """
    hyperparams, stats_path = get_saved_hyperparams(str(run / env_id), test_mode=True)
    env = create_test_env(env_id, stats_path=stats_path, should_render=False, hyperparams=hyperparams)
    model = None if algo == "random" else ALGOS[algo].load(run / f"{env_id}.zip", device="cpu")
    env.action_space.seed(0)
    returns = []
    for seed in EVALUATION_SEEDS:
        env.seed(seed)
        obs, total, over = env.reset(), 0.0, False
        while not over:
            action = (
                np.array([env.action_space.sample()]) if model is None else model.predict(obs, deterministic=True, **asked)[0]
            )
            obs, reward, done, _ = env.step(action)
            total, over = total + float(reward[0]), bool(done[0])
        returns.append(total)
    env.close()
    return returns


def curve(env_id: str, runs: list[Path]) -> dict[str, list[float]]:
    """
    :param env_id: environment
    :param runs: folders of a run's parts
    :return: environment steps and mean return of its evaluations during training, empty if it had none
    """
    timesteps: list[float] = []
    returns: list[float] = []
    before = 0
    for run in runs:
        if (run / "evaluations.npz").is_file():
            data = np.load(run / "evaluations.npz")
            timesteps += (before + data["timesteps"]).tolist()
            returns += data["results"].mean(axis=1).tolist()
        before += saved(env_id, run)["num_timesteps"]
    return {"timesteps": timesteps, "returns": returns}


def saved(env_id: str, run: Path) -> dict[str, Any]:
    """
    :param env_id: environment
    :param run: folder of the run
    :return: what its zip has besides parameters
    """
    with zipfile.ZipFile(run / f"{env_id}.zip") as model:
        data: dict[str, Any] = json.loads(model.read("data"))
    return data


def last_logged(log: Path) -> dict[str, float]:
    """
    :param log: what a run printed
    :return: the last value of everything that it logged under ``train/``
    """
    values: dict[str, float] = {}
    section = ""
    for line in log.read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) != 2:
            continue
        section = cells[0] if cells[0].endswith("/") else section
        if section == "train/" and cells[1]:
            values[cells[0]] = float(cells[1])
    return values


def interquartile_mean(values: list[float]) -> float:
    """
    :param values: returns
    :return: mean of their middle half (Agarwal et al. 2021, arXiv:2108.13264), what falls on its borders in part
    """
    ordered = np.sort(values)
    edges = np.arange(len(ordered) + 1) / len(ordered)
    inside = np.clip(edges[1:], 0.25, 0.75) - np.clip(edges[:-1], 0.25, 0.75)
    return float(np.average(ordered, weights=inside))


def reached(run: dict[str, Any], goal: float) -> float | None:
    """
    :param run: with its curve
    :param goal: a return
    :return: environment steps of the first evaluation with that mean return; None if there was none
    """
    steps = (step for step, value in zip(run["timesteps"], run["returns"], strict=True) if value >= goal)
    return next(steps, None)


def summary(runs: list[dict[str, Any]], algos: list[str], goal: float | None) -> dict[str, Any]:
    """
    :param runs: of a study
    :param algos: the algorithms in it
    :param goal: a return, or None
    :return: for each algorithm the median over seeds, the interquartile mean over all final episodes, steps to the goal
    """
    by_algo = {algo: [run for run in runs if run["algo"] == algo] for algo in algos}
    medians = {algo: float(np.median([run["mean"] for run in own])) for algo, own in by_algo.items()}
    means = {algo: interquartile_mean([r for run in own for r in run["final"]]) for algo, own in by_algo.items()}
    result: dict[str, Any] = {"medians": medians, "interquartile_means": means}
    if goal is not None:
        result |= {"goal": goal, "steps_to_goal": {algo: [reached(run, goal) for run in own] for algo, own in by_algo.items()}}
    return result


def study(
    env_id: str,
    algos: list[str],
    seeds: list[int],
    folder: Path,
    options: list[str],
    jobs: int,
    goal: float | None = None,
    parts: int = 1,
) -> dict[str, Any]:
    """
    :param env_id: environment
    :param algos: the Zoo's names
    :param seeds: seeds of the runs
    :param folder: where the runs are, or will be
    :param options: further options of ``rl_zoo3.train``
    :param jobs: runs at the same time, one thread each
    :param goal: a return whose first evaluation is noted
    :param parts: of each run, see `train`
    :return: everything that is recorded
    """
    plan = [(algo, seed) for seed in seeds for algo in algos]
    with ThreadPoolExecutor(jobs) as pool:
        folders = list(pool.map(lambda run: train(run[0], env_id, run[1], folder, options, parts), plan))
    runs = []
    for (algo, seed), own in zip(plan, folders, strict=True):
        returns = evaluate(algo, env_id, own[-1])
        seconds = [run / "seconds" for run in own]
        wall = sum(int(file.read_text()) for file in seconds) if all(file.is_file() for file in seconds) else None
        logged = last_logged(folder / f"seed{seed}" / f"{algo}.log")
        mean = float(np.mean(returns))
        runs.append(
            {
                "algo": algo,
                "seed": seed,
                "final": returns,
                "mean": mean,
                "seconds": wall,
                "logged": logged,
                **curve(env_id, own),
            }
        )
        if "n_particles" in (data := saved(env_id, own[-1])):
            every = [evaluate(algo, env_id, own[-1], particle=i) for i in range(data["n_particles"])]
            runs[-1]["particles"] = np.mean(every, axis=1).tolist()
            print("particles", runs[-1]["particles"])
        print(f"{algo} seed {seed}: {np.mean(returns):.1f} +- {np.std(returns):.1f}")
    return {
        "env": env_id,
        "options": options,
        "jobs": jobs,
        "parts": parts,
        "evaluation_seeds": list(EVALUATION_SEEDS),
        "random": float(np.mean(evaluate("random", env_id, folder))),
        **summary(runs, algos, goal),
        "runs": runs,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """
    :param result: what `study` returned
    :param path: the picture's file
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    colours = dict(zip(result["medians"], plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for run in result["runs"]:
        label = f"{run['algo']} seed {run['seed']}: {run['mean']:.0f} at the end"
        style = "-" if run["algo"] == next(iter(colours)) else "--"  # equal curves stay visible
        axes.plot(run["timesteps"], run["returns"], style, color=colours[run["algo"]], alpha=0.8, label=label)
    axes.axhline(result["random"], color="grey", linestyle=":", label=f"random policy: {result['random']:.0f}")
    axes.set(title=result["env"], xlabel="environment steps", ylabel="mean return of an evaluation")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--name", required=True, help="of the files in benchmarks/results")
    parser.add_argument("--env", required=True)
    parser.add_argument("--algos", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    parser.add_argument("--folder", type=Path, help="of the runs (logs/<name>)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--goal", type=float, help="a return; the steps to the first evaluation with it are recorded")
    parser.add_argument("--parts", type=int, default=1, help="of each run, of -n steps each")
    args, options = parser.parse_known_args()
    if args.env not in gym.registry:
        parser.error(f"--env {args.env} is not registered with Gymnasium")
    if args.parts < 1 or (args.parts > 1 and "-params" in options):
        parser.error(f"--parts {args.parts} must be at least 1, and 1 with -params, which each further part is given itself")
    folder = args.folder or Path("logs") / args.name
    result = study(args.env, args.algos, args.seeds, folder, options, args.jobs, args.goal, args.parts)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, RESULTS / f"{args.name}.png")
    shown = ("medians", "interquartile_means", "steps_to_goal", "random")
    print("\n".join(f"{key}: {result[key]}" for key in shown if key in result))


if __name__ == "__main__":
    main()
