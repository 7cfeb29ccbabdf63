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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tasks import ENV, TASKS, Task, arguments, hyperparameters, model_for, reference

RESULTS = Path(__file__).parent / "results"
BUSY = 0.6
"""Load average above which nothing is recorded."""
SCALE = {"ms": 1e3, "us": 1e6}


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
    classes = {"sb3": reference(ours), "ours": ours}
    rows: list[dict[str, Any]] = []
    if classes["sb3"] is None:
        print(f"{algo}: SB3 has nothing to compare it with", file=sys.stderr, flush=True)
        return rows
    values = hyperparameters(algo)
    for task in tasks:
        if not task.applies(ours, values):
            continue
        blocks = {name: task.prepare(cls, arguments(values)) for name, cls in classes.items()}
        if sbx is not None and task.sbx:
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


def has_sb3_class(algo: str) -> bool:
    """Whether SB3 has a class with the same arguments."""
    from sb3_ac_ext.zoo.registry import ALGORITHMS

    (ours,) = (spec.cls for spec in ALGORITHMS if spec.name == algo)
    return reference(ours) is ours.sb3_class


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
    memory = [measure_memory(algo) for algo in args.algos if has_sb3_class(algo)]
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
