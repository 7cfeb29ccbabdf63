"""
The files of Monitors while actors run: the actors write none, and the learner writes the rows of all their episodes.
"""

import csv
import io
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecMonitor


@dataclass(frozen=True)
class _File:
    """Where rows go."""

    started: float
    """The time of the file's 0, in seconds since the epoch."""
    columns: tuple[str, ...]
    write: Callable[[dict[str, Any]], None]


class EpisodeWriter:
    """
    Writes the rows of episodes that actors have played where the training environment's Monitors would have written them.

    The Monitors of a ``SubprocVecEnv`` are in other processes, which cannot be asked to write, and which write over what
    others append to their files. Those are found by what these processes have open, which Linux tells; the rows go beside
    them, from ``0.monitor.csv`` to ``0.actors.monitor.csv``, which SB3's ``load_results`` reads too.

    :param venv: the training environment
    """

    def __init__(self, venv: VecEnv) -> None:
        self._files = _files(venv)

    def write(self, env_index: int, episode: Mapping[str, Any]) -> None:
        """
        :param env_index: which environment of the training environment it corresponds to
        :param episode: ``info["episode"]``: return ``r``, length ``l`` and more; its time ``t`` is replaced by the seconds
            from the start of the file's Monitor until now
        """
        if (file := self._files[env_index]) is not None:
            row = {name: episode[name] for name in file.columns if name in episode}
            file.write({**row, "t": round(time.time() - file.started, 6)})


def _files(venv: VecEnv) -> list[_File | None]:
    while isinstance(venv, VecEnvWrapper):
        if isinstance(venv, VecMonitor) and (file := _of_monitor(venv)) is not None:
            return [file] * venv.num_envs
        venv = venv.venv
    if isinstance(venv, SubprocVecEnv):
        return _of_processes(venv)
    return [_of_environment(env) for env in venv.envs] if isinstance(venv, DummyVecEnv) else [None] * venv.num_envs


def _of_environment(env: gym.Env[Any, Any]) -> _File | None:
    while isinstance(env, gym.Wrapper):
        if isinstance(env, Monitor) and (file := _of_monitor(env)) is not None:
            return file
        env = env.env
    return None


def _of_monitor(monitor: Monitor[Any, Any] | VecMonitor) -> _File | None:
    writer = monitor.results_writer
    return _File(monitor.t_start, tuple(writer.logger.fieldnames), writer.write_row) if writer and writer.logger else None


def _of_processes(venv: SubprocVecEnv) -> list[_File | None]:
    ours = set(_open_files("self"))
    found = [list(dict.fromkeys(path for path in _open_files(process.pid) if path not in ours)) for process in venv.processes]
    is_monitored = any(venv.env_is_wrapped(Monitor))
    is_known = Path("/proc/self/fd").is_dir() and all(len(paths) < 2 for paths in found)
    if is_monitored and not is_known:
        warnings.warn(
            "it cannot be found out into which files the Monitors of the SubprocVecEnv write, so actors' episodes get no rows "
            "there; with a DummyVecEnv they do",
            stacklevel=4,
        )
    return [_of_path(paths[0]) if len(paths) == 1 else None for paths in found]


def _open_files(process: object) -> Iterator[str]:
    """Monitor files that a process has open."""
    for descriptor in Path(f"/proc/{process}/fd").glob("*"):
        try:
            path = os.readlink(descriptor)
        except OSError:  # closed meanwhile, as that of the folder itself
            continue
        if path.endswith(Monitor.EXT):
            yield path


def _of_path(path: str) -> _File | None:
    with open(path) as file:
        first, second = file.readline(), file.readline()
    if not first.startswith("#"):  # Monitors that append write no header
        return None
    started, columns = json.loads(first[1:])["t_start"], tuple(second.strip().split(","))
    beside = Path(path.removesuffix(Monitor.EXT) + "actors." + Monitor.EXT)
    if beside.exists() and not beside.read_text().startswith(first):  # of other Monitors that were here before
        beside.unlink()

    def write(row: dict[str, Any]) -> None:
        is_new = not beside.exists()
        with open(beside, "a", newline="\n") as file:
            if is_new:
                file.write(first + second)
            csv.DictWriter(file, columns).writerow(row)

    return _File(started, columns, write)


# No files for actors

_one_at_a_time = threading.RLock()


@contextmanager
def no_monitor_files() -> Iterator[None]:
    """Monitors that are made within this context write no file, now and later: two writers would ruin it."""
    with _one_at_a_time:
        original = ResultsWriter.__init__
        ResultsWriter.__init__ = _write_nothing  # type: ignore[assignment, method-assign]  # Monitors take no writer
        try:
            yield
        finally:
            ResultsWriter.__init__ = original  # type: ignore[method-assign]  # see above


def _write_nothing(writer: ResultsWriter, *args: Any, **kwargs: Any) -> None:
    writer.file_handler, writer.logger = io.StringIO(), None  # type: ignore[assignment]


def silent_writer() -> ResultsWriter:
    """
    :return: what takes rows and writes nothing
    """
    writer = ResultsWriter.__new__(ResultsWriter)
    _write_nothing(writer)
    return writer
