"""
Speed against SB3 in the same run: SB3's class and ours take turns, and each pair of neighbours gives one ratio.

    python benchmarks/throughput.py --name throughput                 # every algorithm, 1 and 2 threads
    python benchmarks/throughput.py --algos td3x --tasks predict --repetitions 3
    python benchmarks/throughput.py --sbx sbx/bin/python              # SBX's class of the same name takes turns too

Same hyperparameters (the Zoo's for HopperBulletEnv-v0), same update-to-data ratio, fp32, our extras off and the engine on.
Writes ``benchmarks/results/<name>.json`` unless another job keeps the machine busy; a ratio above 1 means we are faster.

SBX is SB3 in JAX; ``--sbx`` names the interpreter of an environment of its own: ``pip install sbx-rl pybullet
pybullet_envs_gymnasium``. It takes part in ``learn()`` without gSDE.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
ENV = "HopperBulletEnv-v0"
BUSY = 0.6
"""Load average above which nothing is recorded."""

Block = Callable[[], None]


@dataclass(frozen=True)
class Task:
    """Something to time."""

    name: str
    unit: str
    per_block: int
    """Units that one timed block does."""
    prepare: Callable[[Any, dict[str, Any]], Block]
    """(class, its arguments) -> what is timed."""
    sde: bool = False
    """Whether it is for algorithms only whose file in the Zoo has gSDE."""


def model_for(cls: Any, kwargs: dict[str, Any], n_envs: int = 1, steps: int = 1000) -> Any:
    """
    :param cls: an algorithm
    :param kwargs: its arguments
    :param n_envs: environments
    :param steps: environment steps already in the buffer, and after which it learns
    :return: a model past its warm-up
    """
    import pybullet_envs_gymnasium  # noqa: F401 (registers the environments)
    from stable_baselines3.common.env_util import make_vec_env

    env = make_vec_env(ENV, n_envs=n_envs, seed=0)
    model = cls("MlpPolicy", env, **{**kwargs, "learning_starts": steps, "seed": 0})
    return model.learn(steps + 8 * n_envs)


def without_sde(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same hyperparameters with independent noise and nothing but the layers' sizes for the policy."""
    policy_kwargs = kwargs.get("policy_kwargs", {})
    plain = {"policy_kwargs": {key: value for key, value in policy_kwargs.items() if key == "net_arch"}}
    return {**{key: value for key, value in kwargs.items() if key != "use_sde"}, **plain}


def gradient_steps(net_arch: list[int]) -> Callable[[Any, dict[str, Any]], Block]:
    """Updates in a row."""

    def prepare(cls: Any, kwargs: dict[str, Any]) -> Block:
        model = model_for(cls, {**without_sde(kwargs), "policy_kwargs": {"net_arch": net_arch}})
        return lambda: model.train(gradient_steps=20, batch_size=256)

    return prepare


def learning(n_envs: int) -> Callable[[Any, dict[str, Any]], Block]:
    """Whole ``learn()`` in its learning phase: environment, exploration, replay, updates, logging."""

    def prepare(cls: Any, kwargs: dict[str, Any]) -> Block:
        model = model_for(cls, {**without_sde(kwargs), "train_freq": 1, "gradient_steps": n_envs}, n_envs)
        return lambda: model.learn(160, reset_num_timesteps=False)

    return prepare


def learning_as_the_zoo(cls: Any, kwargs: dict[str, Any]) -> Block:
    """Whole ``learn()`` with everything as in the Zoo's file, gSDE included."""
    model = model_for(cls, kwargs)
    return lambda: model.learn(160, reset_num_timesteps=False)


def predictions(net_arch: list[int]) -> Callable[[Any, dict[str, Any]], Block]:
    """``predict()`` of one observation."""

    def prepare(cls: Any, kwargs: dict[str, Any]) -> Block:
        model = model_for(cls, {**without_sde(kwargs), "policy_kwargs": {"net_arch": net_arch}}, steps=100)
        observation = model.observation_space.sample()

        def block() -> None:
            for _ in range(500):
                model.predict(observation, deterministic=True)

        return block

    return prepare


TASKS = (
    Task("gradient step [400, 300]", "ms", 20, gradient_steps([400, 300])),
    Task("gradient step [256, 256]", "ms", 20, gradient_steps([256, 256])),
    Task("learn(), 1 environment", "ms", 160, learning(1)),
    Task("learn(), 8 environments", "ms", 160, learning(8)),
    Task("learn(), gSDE, every 8 steps", "ms", 160, learning_as_the_zoo, sde=True),
    Task("predict() [64, 64]", "us", 500, predictions([64, 64])),
    Task("predict() [400, 300]", "us", 500, predictions([400, 300])),
)
SCALE = {"ms": 1e3, "us": 1e6}


def hyperparameters(algo: str) -> dict[str, Any]:
    """
    :param algo: the Zoo's name of one of ours
    :return: what its file says of `ENV`, as plain values
    """
    import yaml

    from sb3_ac_ext.zoo.registry import data_dir

    values = yaml.safe_load((data_dir("hyperparams") / f"{algo}.yml").read_text())[ENV]
    return {key: value for key, value in values.items() if key not in ("n_timesteps", "policy", "noise_type")}


def arguments(values: dict[str, Any]) -> dict[str, Any]:
    """
    :param values: what `hyperparameters` returned
    :return: arguments of a constructor: noise as an object, a falling learning rate as the constant that it starts from
    """
    from stable_baselines3.common.noise import NormalActionNoise

    kwargs = {key: value for key, value in values.items() if key != "noise_std"}
    kwargs["learning_rate"] = float(str(values["learning_rate"]).removeprefix("lin_"))
    if "noise_std" in values:
        kwargs["action_noise"] = NormalActionNoise(np.zeros(3), values["noise_std"] * np.ones(3))
    return kwargs


class Sbx:
    """
    A task for SBX, in a process of another environment that does one block whenever it is asked.

    :param python: the interpreter of that environment
    :param cls: name of SBX's class
    :param values: what `hyperparameters` returned
    :param task: what to time
    """

    def __init__(self, python: str, cls: str, values: dict[str, Any], task: Task) -> None:
        command = [python, __file__, "--serve", json.dumps([cls, values]), "--tasks", task.name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._wait()

    def __call__(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self._wait()

    def _wait(self) -> None:
        assert self._process.stdout is not None
        while (printed := self._process.stdout.readline()) != "done\n":
            if not printed:
                raise RuntimeError(f"SBX's process ended with status {self._process.wait()}")


def serve_sbx(cls: str, values: dict[str, Any], task: Task) -> None:
    """The other side of `Sbx`: a block for each line of the standard input."""
    import sbx  # type: ignore[import-not-found]  # it is in the other environment

    threads = int(os.environ["OMP_NUM_THREADS"])  # XLA has no such setting, it takes the processors that it may use
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    block = task.prepare(getattr(sbx, cls), arguments(values))
    print("done", flush=True)
    for _ in sys.stdin:
        block()
        print("done", flush=True)


def measure(algo: str, tasks: list[Task], repetitions: int, sbx: str | None) -> list[dict[str, Any]]:
    """
    :param algo: the Zoo's name of one of ours
    :param tasks: what to time
    :param repetitions: pairs of each
    :param sbx: interpreter of an environment with SBX, if it shall take part
    :return: one row of results for each task
    """
    from sb3_ac_ext.zoo.registry import ALGORITHMS

    (ours,) = (spec.cls for spec in ALGORITHMS if spec.name == algo)
    classes = {"sb3": ours.sb3_class, "ours": ours}
    values = hyperparameters(algo)
    rows = []
    for task in tasks:
        if task.sde and "use_sde" not in values:
            continue
        blocks = {name: task.prepare(cls, arguments(values)) for name, cls in classes.items()}
        if sbx is not None and task.name.startswith("learn") and not task.sde:
            blocks["sbx"] = Sbx(sbx, ours.sb3_class.__name__, values, task)
        for block in blocks.values():
            block()  # caches, and what is chosen at the first call
        seconds: dict[str, list[float]] = {name: [] for name in blocks}
        for repetition in range(repetitions):
            for name in list(blocks)[:: 1 if repetition % 2 else -1]:  # none is always the first
                start = time.perf_counter()
                blocks[name]()
                seconds[name].append(time.perf_counter() - start)
        ratios = np.array(seconds["sb3"]) / np.array(seconds["ours"])
        scale = SCALE[task.unit] / task.per_block
        row = {"algo": algo, "task": task.name, "unit": task.unit}
        row |= {name: float(np.median(values) * scale) for name, values in seconds.items()}
        row |= {"ratio": float(np.median(ratios)), "quartiles": np.quantile(ratios, [0.25, 0.75]).tolist()}
        if "sbx" in seconds:
            row |= {"sbx_ratio": float(np.median(np.array(seconds["sb3"]) / np.array(seconds["sbx"])))}
        rows.append(row)
        print(line(row), file=sys.stderr, flush=True)
    return rows


def peak_memory(algo: str, which: str) -> float:
    """
    :param algo: the Zoo's name of one of ours
    :param which: "sb3" or "ours"
    :return: MiB that this process has used at most when it has trained for 3000 steps
    """
    import resource

    from sb3_ac_ext.zoo.registry import ALGORITHMS

    (ours,) = (spec.cls for spec in ALGORITHMS if spec.name == algo)
    model_for({"sb3": ours.sb3_class, "ours": ours}[which], arguments(hyperparameters(algo))).learn(
        3000, reset_num_timesteps=False
    )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    low, high = row["quartiles"]
    times = f"SB3 {row['sb3']:8.2f}  ours {row['ours']:8.2f} {row['unit']}"
    sbx = f"  SBX {row['sbx']:8.2f}, ratio {row['sbx_ratio']:5.2f}" if "sbx" in row else ""
    return f"{row['algo']:8} {row['task']:26} {times}  ratio {row['ratio']:5.2f}  [{low:.2f}, {high:.2f}]{sbx}"


def measure_memory(algo: str) -> dict[str, Any]:
    """Peak memory of training, each class in a process of its own."""
    command = [sys.executable, __file__, "--algos", algo, "--memory"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    used = {}
    for which in ("sb3", "ours"):
        printed = subprocess.run([*command, which], check=True, env=variables, capture_output=True, text=True).stdout
        used[which] = float(printed.split()[-1])
    return {"algo": algo, "unit": "MiB", **used}


def measure_with_threads(threads: int, arguments: list[str]) -> list[dict[str, Any]]:
    """In a process of its own, so that every library has that many threads from its start."""
    variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    print(f"--- {threads} threads", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--rows", str(out), "--name", "rows", *arguments]
        subprocess.run(command, check=True, env={**os.environ, **variables}, stdout=subprocess.DEVNULL)
        return [{"threads": threads, **row} for row in json.loads(out.read_text())]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="throughput", help="of the file in benchmarks/results")
    parser.add_argument("--algos", nargs="+", help="ours (all)")
    parser.add_argument("--tasks", nargs="+", default=[""], help="beginnings of the tasks' names (all)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--sbx", help="interpreter of an environment in which SBX is installed")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--memory", choices=["sb3", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    tasks = [task for task in TASKS if task.name.startswith(tuple(args.tasks))]
    if not tasks:
        parser.error(f"--tasks {' '.join(args.tasks)}: no such task; there are {', '.join(task.name for task in TASKS)}")
    if args.serve:  # in SBX's environment, where this package need not be
        serve_sbx(*args.serve, tasks[0])
        return
    from sb3_ac_ext.zoo.registry import ALGORITHMS

    names = [spec.name for spec in ALGORITHMS]
    args.algos = args.algos or names
    if not set(args.algos) <= set(names):
        parser.error(f"--algos {' '.join(args.algos)}: there are {', '.join(names)}")
    if args.memory:
        print(peak_memory(args.algos[0], args.memory))
    elif args.rows:
        rows = [row for algo in args.algos for row in measure(algo, tasks, args.repetitions, args.sbx)]
        args.rows.write_text(json.dumps(rows))
    else:
        record(args)


def record(args: argparse.Namespace) -> None:
    """
    Everything in processes of its own, printed, and written unless the machine was busy.

    :param args: of the command line
    """
    load = os.getloadavg()[0]
    passed_on = ["--algos", *args.algos, "--tasks", *args.tasks, "--repetitions", str(args.repetitions)]
    passed_on += ["--sbx", args.sbx] if args.sbx else []
    rows = [row for threads in args.threads for row in measure_with_threads(threads, passed_on)]
    print("\n".join(f"{row['threads']} threads  {line(row)}" for row in rows))
    memory = [measure_memory(algo) for algo in args.algos]
    print(
        "\n".join(
            f"{row['algo']}: peak memory of training, SB3 {row['sb3']:.0f}, ours {row['ours']:.0f} MiB" for row in memory
        )
    )
    if load > BUSY:
        print(f"not recorded: the load average was {load:.1f} at the start, more than {BUSY}; run it on an idle machine")
        return
    machine = {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version(), "load": load}
    versions = {name: version(name) for name in ("torch", "stable_baselines3", "numpy", "sb3_ac_ext")}
    path = RESULTS / f"{args.name}.json"
    path.write_text(
        json.dumps({"env": ENV, "machine": machine, "versions": versions, "rows": rows, "memory": memory}, indent=1) + "\n"
    )
    print(f"recorded in {path}")


def processor() -> str:
    """The processor's name and its matrix units, which decide which products are fast."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    fields = dict(entry.split(":", 1) for entry in info.read_text().splitlines() if ":" in entry)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in fields.get("flags", "").split()]
    return f"{fields.get('model name', platform.machine())} ({', '.join(flags)})"


if __name__ == "__main__":
    main()
