"""This process's connection to Ray, which several pools share."""

import logging
import os
import sys
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from sb3_ac_ext.validation import ArgumentError, UnsupportedError

SHARED_MEMORY = Path("/dev/shm")
"""Where Ray keeps what its processes share, on Linux."""


@dataclass
class Connection:
    """Of this process to a Ray."""

    ray: Any
    ours: bool
    """Whether it ends with the last pool."""
    private: bool
    """Whether nobody else uses that Ray."""
    pools: int = 0
    identity: tuple[str, str] = ("", "")
    """Of the Ray and of its users."""

    def __post_init__(self) -> None:
        self.identity = self._now()

    def _now(self) -> tuple[str, str]:
        context = self.ray.get_runtime_context()
        return context.gcs_address, context.get_job_id()

    def holds(self) -> bool:
        """Whether the process is still connected, by this one."""
        return self.ray.is_initialized() and self._now() == self.identity


_connection: Connection | None = None


def connected(address: str | None, cpus: float) -> Connection:
    """
    :param address: of a running cluster; None for a Ray of our own on this machine, where there is no connection yet
    :param cpus: that actors ask of a Ray of our own, which has at least as many
    :return: the connection, with one pool more
    :raises UnsupportedError: if Ray is not installed, or the machine has no shared memory
    :raises ArgumentError: if there is no cluster at ``address``
    """
    global _connection
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError(
            f'actors="ray" needs Ray, which cannot be imported ({error}): pip install "sb3_ac_ext[distributed]"'
        ) from error
    if not ray.is_initialized():
        _initialise(ray, address, max(os.cpu_count() or 1, ceil(cpus)))
        _connection = Connection(ray, ours=True, private=address is None)
    elif _connection is None or not _connection.holds():
        _connection = Connection(ray, ours=False, private=False)
    elif address is not None and _connection.private:
        raise ArgumentError(
            f"ray_address must be left out where this process has a Ray of its own, for another model, got {address!r}: "
            "call that model's close() first"
        )
    _connection.pools += 1
    return _connection


def _initialise(ray: Any, address: str | None, cpus: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        if address.startswith("ray://"):
            raise ArgumentError(f"ray_address must be that of a cluster that this machine has joined, got {address!r}")
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError) as error:
            raise ArgumentError(f"ray_address must be that of a running Ray cluster, got {address!r}: {error}") from error
        return
    if sys.platform == "linux" and not SHARED_MEMORY.is_dir():
        raise UnsupportedError(
            f'actors="ray" needs shared memory at {SHARED_MEMORY}, and there is none: give a container some, as by '
            f"docker run --shm-size=1g, or mount it (mount -t tmpfs shm {SHARED_MEMORY}); "
            'actors="inline" needs none'
        )
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
