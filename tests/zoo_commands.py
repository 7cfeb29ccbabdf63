"""RL Zoo's commands in forks of a process that has imported what they import, which is most of what a short one takes."""

import os
import runpy
import subprocess
import sys
from multiprocessing import forkserver, get_context
from pathlib import Path

IMPORTED = [
    *("rl_zoo3.import_envs", "rl_zoo3.exp_manager", "rl_zoo3.load_from_hub"),
    *("torch._dynamo", "gymnasium.envs.classic_control"),  # which are imported by the first step of an optimizer and of a task
]
"""Not the commands themselves, which are executed. The startup hook adds our algorithms to the Zoo there too."""


def start() -> None:
    """Start the process that is forked, with the environment's variables as they are now."""
    get_context("forkserver").set_forkserver_preload(IMPORTED)
    forkserver.ensure_running()


def _execute(module: str, args: list[str], folder: Path, printed: Path, warned: Path) -> None:
    os.chdir(folder)
    for path, descriptor in ((printed, 1), (warned, 2)):
        with path.open("w") as file:
            os.dup2(file.fileno(), descriptor)
    sys.argv = [module, *args]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run(module: str, *args: object, cwd: Path, output: Path) -> str:
    """
    :param module: as behind ``python -m``
    :param args: its arguments
    :param cwd: where it is executed
    :param output: a folder for what it prints
    :return: what it has printed
    """
    printed, warned = output / "stdout", output / "stderr"
    process = get_context("forkserver").Process(target=_execute, args=(module, [*map(str, args)], cwd, printed, warned))
    process.start()
    process.join(timeout=300)
    if process.is_alive():
        process.kill()
        raise subprocess.TimeoutExpired([module, *args], 300)
    assert process.exitcode == 0, f"{module} {' '.join(map(str, args))}\n{printed.read_text()}\n{warned.read_text()}"
    return printed.read_text()
