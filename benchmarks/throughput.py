"""
Speed against SB3, and against another version of this package, in the same run.

    python benchmarks/throughput.py --name throughput                 # every algorithm, 1 and 2 threads
    python benchmarks/throughput.py --algos td3x --tasks predict --repetitions 3
    python benchmarks/throughput.py --against ../before               # another checkout's class takes turns too
    python benchmarks/throughput.py --sbx sbx/bin/python              # SBX's class of the same name takes turns too

Each class has a process of its own; they do the same work by turns, one at a time, and each pair of neighbours gives a ratio.
Same hyperparameters (the Zoo's for HopperBulletEnv-v0), same update-to-data ratio, fp32, our extras off and the engine on.
Writes ``benchmarks/results/<name>.json`` unless another job keeps the machine busy; ``ratio`` (SB3's time by ours) and
``against_ratio`` (the other version's by ours) above 1 mean that we are faster. Peak memory is that of each process.

SBX is SB3 in JAX; ``--sbx`` names the interpreter of an environment of its own: ``pip install sbx-rl pybullet
pybullet_envs_gymnasium``. It takes part in ``learn()`` without gSDE.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tasks import TASKS, Task, arguments, hyperparameters, reference

CHECKOUT = Path(__file__).resolve().parents[1]
RESULTS = CHECKOUT / "benchmarks" / "results"
BUSY = 0.6
"""Load average above which nothing is recorded."""
PAUSE = 0.1
"""Seconds before a turn, in which the threads of the one before stop spinning."""
SCALE = {"ms": 1e3, "us": 1e6}
RATIOS = {"ratio": ("sb3", "ours"), "against_ratio": ("against", "ours"), "sbx_ratio": ("sb3", "sbx")}
"""Whose time is divided by whose."""
ANSWER = "answer: "
"""Begins what a participant says, as libraries print too."""


class Participant:
    """
    A class at a task, in a process of its own that does one block whenever it is asked.

    :param cls: module and name of the class, such as "stable_baselines3:TD3"
    :param values: what `hyperparameters` returned
    :param task: what to time
    :param threads: of every library, from its start
    :param checkout: where the module must come from; None for any installed one
    :param python: the interpreter
    """

    def __init__(
        self,
        cls: str,
        values: dict[str, Any],
        task: Task,
        threads: int,
        checkout: Path | None = None,
        python: str = sys.executable,
    ) -> None:
        variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        if checkout is not None:
            variables["PYTHONPATH"] = str(checkout)  # goes before an editable installation
        command = [python, __file__, "--serve", json.dumps([cls, values, task.name, str(checkout or "")])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables}
        )
        self.refusal: str | None = self._answer().get("refused")
        """Why the class cannot do the task, if it cannot."""
        self.memory = 0.0
        """MiB that the process has used at most."""

    def __call__(self) -> float:
        """
        :return: seconds that a block took
        """
        time.sleep(PAUSE)
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.memory = answer["memory"]
        return answer["seconds"]

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise RuntimeError(f"{' '.join(self._process.args)} ended with status {self._process.wait()}")  # type: ignore[arg-type]


def serve(cls: str, values: dict[str, Any], task_name: str, checkout: str) -> None:
    """The other side of `Participant`: a block for each line of the standard input. SBX's environment lacks this package."""
    module, name = cls.split(":")
    package = import_module(module)
    if checkout and not Path(str(package.__file__)).resolve().is_relative_to(checkout):
        raise ImportError(f"{module} was imported from {package.__file__}, not from {checkout}")
    if module == "sbx":  # XLA has no setting for its threads, it takes the processors that it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(os.environ["OMP_NUM_THREADS"])])
    (task,) = (task for task in TASKS if task.name == task_name)
    try:
        block = task.prepare(getattr(package, name), arguments(values))
    except Exception as error:  # an earlier version lacks what came later
        answer(refused=f"{type(error).__name__}: {error}")
        return
    answer()
    for _ in sys.stdin:
        start = time.perf_counter()
        block()
        answer(seconds=time.perf_counter() - start, memory=peak_memory())


def answer(**content: Any) -> None:
    """Tell it to the `Participant`."""
    print(ANSWER + json.dumps(content), flush=True)


def peak_memory() -> float:
    """
    :return: MiB that this process has used at most; ``getrusage`` would count its parent's too
    """
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) / 1024


def candidates(ours: Any, task: Task, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """
    :param ours: one of our classes
    :param task: what to time
    :param args: of the command line
    :return: who takes part, as arguments of `Participant`; neighbours are compared, so ours is between the two others
    """
    sb3, own = reference(ours), f"sb3_ac_ext:{ours.__name__}"
    found: dict[str, dict[str, Any]] = {}
    if sb3 is not None and task.sb3:
        found["sb3"] = {"cls": f"{sb3.__module__.partition('.')[0]}:{sb3.__name__}"}
    found["ours"] = {"cls": own, "checkout": CHECKOUT}
    if args.against is not None:
        found["against"] = {"cls": own, "checkout": args.against}
    if args.sbx is not None and task.sbx:
        found["sbx"] = {"cls": f"sbx:{ours.sb3_class.__name__}", "python": args.sbx}
    return found


def measure(algo: str, task: Task, threads: int, args: argparse.Namespace) -> dict[str, Any] | None:
    """
    :param algo: the Zoo's name of one of ours
    :param task: what to time
    :param threads: of every library
    :param args: of the command line
    :return: a row of results; None where there is nothing to compare
    """
    ours = class_of(algo)
    if ours.__name__ not in task.classes:
        return None
    values = hyperparameters(algo, task.env)
    who = candidates(ours, task, args)
    if len(who) == 1 or (task.sde and "use_sde" not in values):
        return None
    participants = {name: Participant(**how, values=values, task=task, threads=threads) for name, how in who.items()}
    refused = {name: one.refusal for name, one in participants.items() if one.refusal is not None}
    blocks = {name: one for name, one in participants.items() if one.refusal is None}
    for block in blocks.values():
        block()  # caches, and what is chosen at the first call
    turns: list[dict[str, float]] = []
    for repetition in range(args.repetitions):
        order = list(blocks)[:: 1 if repetition % 2 else -1]  # none is always the first
        turns.append({name: blocks[name]() for name in order})
    for one in participants.values():
        one.close()
    scale = SCALE[task.unit] / task.per_block
    row: dict[str, Any] = {"threads": threads, "algo": algo, "task": task.name, "unit": task.unit}
    row |= {name: float(np.median([turn[name] for turn in turns]) * scale) for name in blocks}
    for name, (slow, fast) in RATIOS.items():
        if {slow, fast} <= blocks.keys():
            ratios = np.array([turn[slow] / turn[fast] for turn in turns])
            quartiles = np.quantile(ratios, [0.25, 0.75]).tolist()
            row |= {name: float(np.median(ratios)), name.replace("ratio", "quartiles"): quartiles}
    row["memory"] = {name: one.memory for name, one in blocks.items()}
    return row | ({"refused": refused} if refused else {})


def class_of(algo: str) -> Any:
    """
    :param algo: the Zoo's name of one of ours
    :return: the class
    """
    from sb3_ac_ext.zoo.registry import ALGORITHMS

    (cls,) = (spec.cls for spec in ALGORITHMS if spec.name == algo)
    return cls


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    names = [name for name in ("sb3", "ours", "against", "sbx") if name in row]
    cells = [f"{row['threads']} threads  {row['algo']:8} {row['task']:34}"]
    cells += ["  ".join(f"{name} {row[name]:8.2f}" for name in names) + f" {row['unit']}"]
    for name in [name for name in RATIOS if name in row]:
        low, high = row[name.replace("ratio", "quartiles")]
        cells.append(f"{name} {row[name]:5.2f} [{low:.2f}, {high:.2f}]")
    cells.append("  ".join(f"{name} {row['memory'][name]:.0f}" for name in names) + " MiB")
    cells += [f"{name} cannot: {why}" for name, why in row.get("refused", {}).items()]
    return "  ".join(cells)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="throughput", help="of the file in benchmarks/results")
    parser.add_argument("--algos", nargs="+", help="ours (all)")
    parser.add_argument("--tasks", nargs="+", default=[""], help="beginnings of the tasks' names (all)")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--against", type=Path, help="another checkout of this repository")
    parser.add_argument("--sbx", help="interpreter of an environment in which SBX is installed")
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(*args.serve)
        return
    from sb3_ac_ext.zoo.registry import ALGORITHMS

    names = [spec.name for spec in ALGORITHMS]
    args.algos = args.algos or names
    if not set(args.algos) <= set(names):
        parser.error(f"--algos {' '.join(args.algos)}: there are {', '.join(names)}")
    if not any(task.name.startswith(tuple(args.tasks)) for task in TASKS):
        parser.error(f"--tasks {' '.join(args.tasks)}: no such task; there are {', '.join(task.name for task in TASKS)}")
    if args.against is not None and not (args.against / "sb3_ac_ext").is_dir():
        parser.error(f"--against {args.against}: no checkout of this repository")
    args.against = args.against and args.against.resolve()
    record(args)


def record(args: argparse.Namespace) -> None:
    """
    Every row, printed, and written unless the machine was busy.

    :param args: of the command line
    """
    load = os.getloadavg()[0]
    tasks = [task for task in TASKS if task.name.startswith(tuple(args.tasks))]
    rows = []
    for threads in args.threads:
        for algo in args.algos:
            for task in tasks:
                if (row := measure(algo, task, threads, args)) is not None:
                    rows.append(row)
                    print(line(row), flush=True)
    if load > BUSY:
        print(f"not recorded: the load average was {load:.1f} at the start, more than {BUSY}; run it on an idle machine")
        return
    machine = {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version(), "load": load}
    versions = {name: version(name) for name in ("torch", "stable_baselines3", "numpy", "sb3_ac_ext")}
    versions |= {"against": commit(args.against)} if args.against else {}
    path = RESULTS / f"{args.name}.json"
    path.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=1) + "\n")
    print(f"recorded in {path}")


def commit(checkout: Path) -> str:
    """
    :param checkout: of this repository
    :return: what is checked out there, and whether it was changed
    """
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


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
