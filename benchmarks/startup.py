"""
What the startup hook adds to every start of the interpreter.

    python benchmarks/startup.py

Two fresh virtual environments, one with the startup files; ``python -c pass`` in each by turns, and the paired differences.
Writes ``benchmarks/results/startup.json``.
"""

import json
import os
import platform
import py_compile
import shutil
import statistics
import subprocess
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAIRS = 400


def environment(folder: Path, with_hook: bool) -> Path:
    """
    :param folder: where to make it
    :param with_hook: whether the startup files are installed
    :return: its interpreter
    """
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    for file in (ROOT / "startup").glob("*sb3_ac_ext*") if with_hook else ():
        copied = shutil.copy(file, site_packages)
        if file.suffix == ".py":
            py_compile.compile(copied, doraise=True)  # as pip does
    return folder / "bin" / "python"


def start(python: Path) -> float:
    """
    :param python: an interpreter
    :return: milliseconds of wall time that it takes to start and stop
    """
    begin = time.perf_counter()
    subprocess.run([python, "-c", "pass"], check=True)
    return (time.perf_counter() - begin) * 1e3


def main() -> None:
    """Measure and record."""
    with tempfile.TemporaryDirectory() as folder:
        pythons = [environment(Path(folder) / str(with_hook), with_hook) for with_hook in (False, True)]
        loaded = subprocess.run(
            [pythons[1], "-c", "import sys; print('_sb3_ac_ext_hook' in sys.modules)"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        pairs = [[start(python) for python in pythons] for _ in range(PAIRS)]
    without, with_hook = zip(*pairs, strict=True)
    result = {
        "unit": "ms",
        "pairs": PAIRS,
        "hook_loaded": loaded == "True",
        "without": statistics.median(without),
        "with": statistics.median(with_hook),
        "median_of_paired_differences": statistics.median(b - a for a, b in pairs),
        "difference_of_minima": min(with_hook) - min(without),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }
    (ROOT / "benchmarks" / "results" / "startup.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
