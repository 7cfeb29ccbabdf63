"""
What becomes of configurations that are drawn from the declarations of the arguments.

    python benchmarks/fuzz_arguments.py                          # 2,000, over all algorithms
    python benchmarks/fuzz_arguments.py --number 500 --algos ppox acktr --seed 7

Each is a small model with one to four other arguments, legal ones, the ends of ranges, and wrong ones; it is made (or loaded)
and trained for 50 steps. It trains, or is refused before the first step by an error with the argument's name and value, or
ends with a `NonFiniteError`; anything else is a failure and printed. Writes ``benchmarks/results/fuzz_arguments.json``.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch as th

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fuzz import BAD, GOOD, draw_cases, outcome_of
from models import EVERY

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "stable_baselines3", "gymnasium", "numpy", "hypothesis", "sb3_ac_ext")


def try_out(algo: str, number: int, seed: int) -> tuple[Counter[str], list[dict[str, str]]]:
    """
    :param algo: row of the registry
    :param number: of configurations
    :param seed: of the draw
    :return: how often each verdict was given, and the failures
    """
    verdicts: Counter[str] = Counter()
    failures = []
    for case in draw_cases(algo, number, seed):
        with tempfile.TemporaryDirectory() as folder:
            outcome = outcome_of(case, Path(folder))
        verdicts[outcome.verdict] += 1
        if outcome.verdict in BAD:
            failures.append({"configuration": repr(case), "verdict": outcome.verdict, "detail": outcome.detail[:500]})
            print(f"{outcome.verdict}: {case}\n    {outcome.detail[:500]}")
    return verdicts, failures


def table(verdicts: dict[str, Counter[str]]) -> str:
    """
    :param verdicts: by algorithm
    :return: a row for each and their sum, a column for each verdict that was given
    """
    total = sum(verdicts.values(), Counter())
    columns = [one for one in (*GOOD, *BAD) if one in GOOD or total[one]]
    lines = [
        ["", *columns],
        *([name, *(str(row[one]) for one in columns)] for name, row in [*verdicts.items(), ("all", total)]),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) + 1)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=2000, help="of configurations, shared out over the algorithms")
    parser.add_argument("--algos", nargs="+", default=list(EVERY), choices=EVERY)
    parser.add_argument("--seed", type=int, default=None, help="of the draw; any, which is recorded, by default")
    parser.add_argument("--name", default="fuzz_arguments", help="of the file")
    args = parser.parse_args()
    seed = random.randrange(2**32) if args.seed is None else args.seed
    th.set_num_threads(1)
    started, left = time.time(), args.number
    verdicts: dict[str, Counter[str]] = {}
    failures: dict[str, list[dict[str, str]]] = {}
    for i, algo in enumerate(args.algos):
        share = round(left / (len(args.algos) - i))
        left -= share
        verdicts[algo], failures[algo] = try_out(algo, share, seed)
    print(table(verdicts))
    result: dict[str, Any] = {
        "number": args.number,
        "seed": seed,
        "verdicts": {algo: {one: counted[one] for one in (*GOOD, *BAD)} for algo, counted in verdicts.items()},
        "failures": {algo: found for algo, found in failures.items() if found},
        "seconds": round(time.time() - started),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(failures.values()))


if __name__ == "__main__":
    main()
