"""
IMPALA with actors on Ray: environment steps per second against actors in the learner's process, and against RLlib.

    python benchmarks/actors.py                                   # 3 minutes
    python benchmarks/actors.py --rllib rllib/bin/python          # RLlib's IMPALA takes part, 7 minutes for each shape

The first command lets pools take turns that are open already: on an environment that sleeps 1 ms in each step, and on
CartPole. Speed of a turn by that of the inline one next to it is the ratio.

The second one trains CartPole for the same time with RLlib's IMPALA, with ours on Ray and with ours inline, one after another:
2 actors (1 inline), networks of [64, 64], and the same shape of segments, which is that of RLlib's example ("theirs") or of
``hyperparams/impala.yml`` ("ours"). Everything else is as in those two files; our learning rate falls with the time that is
left, as there with the steps. The clock starts behind the first updates. ``--rllib`` names the interpreter of an
environment of its own, as RLlib's pins are not ours: ``pip install "ray[rllib]" torch``.

All have one thread in each process. Writes ``benchmarks/results/<name>.json`` unless another job keeps the machine busy.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from tasks import arguments, hyperparameters
from throughput import BUSY, RESULTS, processor

from sb3_ac_ext import IMPALA

PAUSE = 0.3
"""Seconds before a turn, in which the actors of the one before finish what they have begun."""
INLINE = ("inline", 1)
PACKAGES = ("torch", "ray", "stable_baselines3", "gymnasium", "numpy", "sb3_ac_ext")
SHAPES = {"theirs": (16, 50), "ours": (8, 8)}
"""Environments of each actor, steps of each in a segment; a batch is one segment."""


class Sleeping(gym.Wrapper):
    """Waits 1 ms in each step."""

    def step(self, action: Any) -> Any:
        time.sleep(1e-3)
        return super().step(action)


def sleeping_cartpole() -> gym.Env:
    """An environment that is slow, but needs no processor."""
    return Sleeping(gym.make("CartPole-v1"))


TASKS: dict[str, tuple[Any, int, dict[tuple[str, int], float]]] = {
    "1 ms of sleep": (sleeping_cartpole, 3_200, {INLINE: 1.0, ("ray", 1): 0.85, ("ray", 2): 1.6, ("ray", 4): 2.8}),
    "CartPole": ("CartPole-v1", 24_000, {INLINE: 1.0, ("ray", 2): 0.8}),
}
"""Environment, steps of a turn, and for each pool the least ratio that we want."""


class Watch(BaseCallback):
    """
    Whose segments updates are made of, and how many updates behind they are.

    :param marks: seconds at which the state is noted; the training stops at the last one
    """

    def __init__(self, marks: list[float] | None = None) -> None:
        super().__init__()
        self.marks, self.points = marks, list[dict[str, Any]]()
        self.lags, self.segments = list[int](), Counter[int]()
        self.start = time.perf_counter()

    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self.start

    def _on_step(self) -> bool:
        return self.marks is None or len(self.points) < len(self.marks)

    def _on_rollout_end(self) -> None:
        result = self.locals["result"]
        self.lags.append(self.model._n_updates - result.version)
        self.segments[result.actor] += 1
        if self.marks and self._on_step() and self.seconds() >= self.marks[len(self.points)]:
            returns = [episode["r"] for episode in self.model.ep_info_buffer]
            mean = float(np.mean(returns)) if returns else None
            self.points.append({"seconds": self.seconds(), "steps": self.model.num_timesteps, "return": mean})

    def summary(self) -> dict[str, Any]:
        """Share of each actor's segments, and the mean lag in updates."""
        total = sum(self.segments.values())
        shares = [self.segments[actor] / total for actor in sorted(self.segments)]
        return {"shares": shares, "policy_lag": float(np.mean(self.lags))}


def opened(env: Any, n_envs: int, actors: str, n_actors: int, seed: int = 0, **kwargs: Any) -> IMPALA:
    """
    :param env: id of the environment, or what makes it
    :param n_envs: of each actor
    :param actors: where they act
    :param n_actors: how many there are
    :param seed: of everything
    :param kwargs: further arguments of IMPALA
    :return: a model from each of whose actors something has been learned
    """
    vec_env = make_vec_env(env, n_envs=n_envs, seed=seed)
    model = IMPALA("MlpPolicy", vec_env, actors=actors, n_actors=n_actors, seed=seed, device="cpu", **kwargs)
    watch = Watch()
    while len(watch.segments) < n_actors:
        model.learn(1, watch, reset_num_timesteps=False)
    return model


# Against inline


def turn(model: IMPALA, steps: int, watch: Watch) -> float:
    """
    :param model: opened
    :param steps: at least so many
    :param watch: gets what is timed
    :return: environment steps per second
    """
    time.sleep(PAUSE)
    model.learn(2 * model.n_actors * model.n_envs * model.n_steps, reset_num_timesteps=False)  # segments that were waiting
    before, start = model.num_timesteps, time.perf_counter()
    model.learn(steps, watch, reset_num_timesteps=False)
    return (model.num_timesteps - before) / (time.perf_counter() - start)


def measure(task: str, repetitions: int, scale: float) -> list[dict[str, Any]]:
    """
    :param task: one of `TASKS`
    :param repetitions: turns of each pool
    :param scale: factor of their lengths
    :return: a row for each pool
    """
    env, steps, wanted = TASKS[task]
    models = {pool: opened(env, 4, *pool, n_steps=20) for pool in wanted}
    watches = {pool: Watch() for pool in wanted}
    turns: list[dict[tuple[str, int], float]] = []
    for repetition in range(repetitions + 1):
        order = list(models)[:: 1 if repetition % 2 else -1]  # none is always the first
        if repetition == 1:  # behind the warm-up
            turns, watches = [], {pool: Watch() for pool in wanted}
        turns.append({pool: turn(models[pool], int(scale * steps), watches[pool]) for pool in order})
    rows = []
    for pool, model in models.items():
        ratios = [one[pool] / one[INLINE] for one in turns]
        row = {"task": task, "actors": pool[0], "n_actors": pool[1]}
        row |= {"steps_per_second": float(np.median([one[pool] for one in turns])), "ratio": float(np.median(ratios))}
        row |= {"quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(), "wanted": wanted[pool]}
        rows.append(row | watches[pool].summary() | {"engine": model.engine_report()})
        model.close()
    return rows


def against_inline(args: argparse.Namespace) -> dict[str, Any]:
    """
    :param args: of the command line
    :return: what is recorded
    """
    rows = []
    for task in TASKS:
        for row in measure(task, args.repetitions, args.scale):
            rows.append(row)
            low, high = row["quartiles"]
            shares = ", ".join(f"{share:.2f}" for share in row["shares"])
            print(
                f"{task:13}  {row['n_actors']} {row['actors']:6}  {row['steps_per_second']:7.0f} steps/s  ratio "
                f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}], at least {row['wanted']}  lag {row['policy_lag']:.2f}  "
                f"shares {shares}  engine {row['engine']}",
                flush=True,
            )
    return {"repetitions": args.repetitions, "rows": rows}


# Against RLlib


def our_values() -> dict[str, Any]:
    """Of ``hyperparams/impala.yml`` for CartPole, but for the shape; the learning rate is where it starts from."""
    values = arguments(hyperparameters("impala", "CartPole-v1"))
    return {name: value for name, value in values.items() if name not in ("n_envs", "n_steps")}


def ours(n_envs: int, n_steps: int, actors: str, marks: list[float], seed: int) -> dict[str, Any]:
    """
    :param n_envs: of each actor
    :param n_steps: of each in a segment
    :param actors: "ray" for 2 of them, or "inline" for one
    :param marks: seconds
    :param seed: of everything
    :return: "points", and what `Watch.summary` says
    """
    values = our_values()
    clock = Watch()

    def rate(_: float) -> float:
        return values["learning_rate"] * max(0.0, 1 - clock.seconds() / marks[-1])

    n_actors = 2 if actors == "ray" else 1
    own = {**values, "learning_rate": rate, "n_steps": n_steps}
    model = opened("CartPole-v1", n_envs, actors, n_actors, seed, **own)
    steps, watch = model.num_timesteps, Watch(marks)
    clock.start = watch.start
    model.learn(10**12, watch, reset_num_timesteps=False)
    model.close()
    points = [{**point, "steps": point["steps"] - steps} for point in watch.points]
    return {"points": points, **watch.summary(), "engine": model.engine_report()}


def theirs(python: str, **given: Any) -> dict[str, Any]:
    """
    :param python: the interpreter
    :param given: for ``rllib_impala.py``
    :return: what it printed
    """
    command = [python, str(Path(__file__).with_name("rllib_impala.py")), json.dumps(given)]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env={**environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{command[1]} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


def against_rllib(args: argparse.Namespace) -> dict[str, Any]:
    """
    :param args: of the command line
    :return: what is recorded; "steps_per_second" are those behind the first mark
    """
    marks = np.linspace(0, args.seconds, 13)[1:].tolist()
    rows, about = [], dict[str, Any]()
    for shape in args.shapes:
        n_envs, n_steps = SHAPES[shape]
        for seed in args.seeds:
            for who in ("RLlib", "ray", "inline"):
                if who == "RLlib":
                    row = theirs(args.rllib, n_envs=n_envs, n_steps=n_steps, n_actors=2, marks=marks, seed=seed)
                    about = {"RLlib's": {name: row.pop(name) for name in ("example", "versions")}}
                else:
                    row = ours(n_envs, n_steps, who, marks, seed)
                first, last = row["points"][0], row["points"][-1]
                speed = (last["steps"] - first["steps"]) / (last["seconds"] - first["seconds"])
                rows.append({"shape": shape, "who": who, "seed": seed, "steps_per_second": speed, **row})
                returns = ", ".join(f"{point['return'] or 0:.0f} at {point['seconds']:.0f} s" for point in row["points"][2::3])
                print(f"{shape:6}  seed {seed}  {who:6}  {speed:7.0f} steps/s  return {returns}", flush=True)
    return {"shapes": SHAPES, "ours": our_values(), **about, "rows": rows}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="of the file in benchmarks/results (actors_throughput, or impala_rllib)")
    parser.add_argument("--repetitions", type=int, default=7, help="turns of each pool")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the turns' lengths")
    parser.add_argument("--rllib", help="interpreter of an environment in which RLlib is installed")
    parser.add_argument("--seconds", type=float, default=120, help="that each trains beside RLlib")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    load = os.getloadavg()[0]
    th.set_num_threads(1)
    result = against_rllib(args) if args.rllib else against_inline(args)
    if load > BUSY:
        print(f"not recorded: the load average was {load:.1f} at the start, more than {BUSY}; run it on an idle machine")
        return
    machine = {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version(), "load": load}
    versions = {name: version(name) for name in PACKAGES}
    path = RESULTS / f"{args.name or ('impala_rllib' if args.rllib else 'actors_throughput')}.json"
    path.write_text(json.dumps({"machine": machine, "versions": versions, **result}, indent=1) + "\n")
    print(f"recorded in {path}")


if __name__ == "__main__":
    main()
