"""Actors in processes of their own, on this machine or on others, by Ray."""

import pickle
import sys
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import cloudpickle
import numpy as np

from sb3_ac_ext.actors.actor import ActorError, Recipe, Weights, Work
from sb3_ac_ext.actors.pool import Pool
from sb3_ac_ext.actors.process import Failure, Process, unpacked
from sb3_ac_ext.actors.ray_connection import Connection, connected
from sb3_ac_ext.buffers.segments import Result
from sb3_ac_ext.validation import ArgumentError

OPTIONS = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
"""What actors ask for by these names, and what Ray calls it; other resources are those that nodes were started with."""
FEW = 65_536
"""Bytes of weights that are sent with a task, which is faster than Ray's shared memory for so few."""
PATIENCE = 2.0
"""Seconds for actors to close their environments."""


class RayPool(Pool):
    """
    Actors in processes of their own, each of which works while the learner computes. Results come in the order in which they
    are done, so runs cannot be reproduced.

    A process that dies is replaced, by one of the next generation; what it was working on is lost, what was taken is not.
    An exception in an actor is not tried again.

    :param work: see `Pool`; a function that can be pickled
    :param recipe: what each actor is made of
    :param n_actors: how many there are
    :param address: of a running cluster; None for a Ray of our own on this machine. A process that is connected to a Ray stays
        connected to that one
    :param resources: what each actor needs: "num_cpus", "num_gpus", "memory" in bytes, and those that nodes were started with.
        Without "num_cpus" it is 1, by which Ray spreads actors over a cluster, and 0 in a Ray of our own, where there may be
        more actors than cores
    :param timeout: seconds to wait while Ray has no place for any actor
    :param most_restarts: how often in a row an actor is replaced that gives no result
    :raises UnsupportedError: if Ray is not installed, or the machine has no shared memory
    :raises ArgumentError: if there is no cluster at ``address``; if this machine does not have the resources
    """

    def __init__(
        self,
        work: Work,
        recipe: Recipe,
        n_actors: int,
        address: str | None = None,
        resources: Mapping[str, float] | None = None,
        timeout: float = 300.0,
        most_restarts: int = 3,
    ) -> None:
        super().__init__(work)
        self.timeout, self.most_restarts = timeout, most_restarts
        self._connection = connected(address, n_actors * (resources or {}).get("num_cpus", 0))
        self.resources = {"num_cpus": 0 if self._connection.private else 1, **(resources or {})}
        self._ray = self._connection.ray
        self._process = self._ray.remote(Process)
        self._published: _Published | None = None
        self._seats: list[_Seat] = []
        self._finalizer = weakref.finalize(self, _leave, self._connection, self._seats)
        try:
            self._check_resources(n_actors)
            self._start = self._ray.put((sys.path, cloudpickle.dumps((recipe, work))))
            for index in range(n_actors):
                seat = _Seat(index)
                self._seats.append(seat)
                self._occupy(seat)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """See `Pool.close`; Ray is shut down too if it was started here and no other pool uses it."""
        self._finalizer()

    # Results

    def take(self, weights: Weights) -> Result:
        """See `Pool.take`. Of several results it is that of the actor of which the fewest have been taken."""
        if not self._seats:
            raise ActorError("the pool of actors is closed")
        while True:
            self.begin(weights)
            with self._closed_by_failures():
                working = [seat for seat in self._finished(wait=True) if seat.state is State.WORKING]
                for seat in sorted(working, key=lambda seat: self.delivered[seat.index]):
                    if (result := self._value(seat)) is not None:
                        seat.state, seat.deaths = State.IDLE, 0
                        return self._taken(result)

    def begin(self, weights: Weights) -> None:
        """See `Pool.begin`."""
        with self._closed_by_failures():
            self._prepare()
        idle = [seat for seat in self._seats if seat.state is State.IDLE and seat.index not in self.held]
        if idle:
            sent = self._sent(weights)
            for seat in idle:
                seat.tasks, seat.state = [seat.handle.do.remote(sent)], State.WORKING

    @contextmanager
    def _closed_by_failures(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.close()
            raise

    def _prepare(self) -> None:
        """See which actors are ready for work."""
        if any(seat.state in BEFORE_WORK for seat in self._seats):
            for seat in self._finished():
                if seat.state in BEFORE_WORK and self._value(seat) is not None:
                    seat.state = State.STARTING if seat.state is State.WAITING else State.IDLE

    def _sent(self, weights: Weights) -> Any:
        """What an actor is given of them: few are a part of its task, many are put once where all actors find them."""
        if sum(array.nbytes for array in (weights.parameters or {}).values()) < FEW:
            return pickle.dumps(weights, 5)
        rest = pickle.dumps(weights._replace(parameters=None))
        if self._published is None or not self._published.equals(weights.parameters, rest):
            reference = self._ray.put(weights)
            self._published = _Published(reference, self._ray.get(reference).parameters, rest)
        return self._published.reference

    # Tasks

    def _occupy(self, seat: "_Seat") -> None:
        """Begin to make the next generation of an actor."""
        options = {name: value for name, value in self.resources.items() if name in OPTIONS}
        custom = {name: value for name, value in self.resources.items() if name not in OPTIONS}
        seat.handle = self._process.options(**options, resources=custom).remote(seat.index, seat.generation)
        seat.tasks, seat.state = [seat.handle.arrive.remote(), seat.handle.start.remote(self._start)], State.WAITING

    def _finished(self, wait: bool = False) -> list["_Seat"]:
        """
        :param wait: until there is one
        :return: the actors whose first task is done, or has failed
        :raises ActorError: if none has a place, and gets none
        """
        seats = {seat.tasks[0]: seat for seat in self._seats if seat.tasks}
        tasks = list(seats)
        if wait:
            waiting = all(seat.state is State.WAITING for seat in self._seats)
            until = time.monotonic() + (self.timeout if waiting else float("inf"))
            while not self._ray.wait(tasks, timeout=min(1.0, max(0.0, until - time.monotonic())))[0]:
                if time.monotonic() >= until:
                    raise ActorError(self._nowhere())
        return [seats[task] for task in self._ray.wait(tasks, num_returns=len(tasks), timeout=0)[0]]

    def _asked(self) -> dict[str, float]:
        """What each actor needs, by Ray's names."""
        return {OPTIONS.get(name, name): number for name, number in self.resources.items() if number}

    def _check_resources(self, n_actors: int) -> None:
        """Nobody adds a node to a Ray of our own."""
        there = self._ray.cluster_resources()
        for name, number in self._asked().items() if self._connection.private else ():
            if n_actors * number > there.get(name, 0):
                raise ArgumentError(
                    f"actor_resources of {n_actors} actors must not be more than this machine has, {there.get(name, 0):g} "
                    f"{name}, got {number:g} for each; those of a cluster need ray_address"
                )

    def _nowhere(self) -> str:
        there, free = self._ray.cluster_resources(), self._ray.available_resources()
        needs = ", ".join(
            f"{number:g} {name} ({there.get(name, 0):g} there, {free.get(name, 0):g} free)"
            for name, number in self._asked().items()
        )
        actors = ", ".join(str(seat.index) for seat in self._seats)
        return (
            f"for {self.timeout:g} s Ray has had no place for any of actors {actors}; each needs "
            f"{needs or 'no more than a process'}; ask for less by actor_resources, let there be fewer actors by n_actors, or "
            "add nodes"
        )

    def _value(self, seat: "_Seat") -> Any:
        """
        :param seat: whose first task is done
        :return: what has become of it; None if the process has died and is replaced
        :raises ActorError: if there was an exception, or it has died too often
        :raises NonFiniteError: if it was one
        """
        errors = self._ray.exceptions
        try:
            value = unpacked(*self._ray.get(seat.tasks[0]))
        except errors.RayTaskError as error:  # of what Ray does around our code
            cause = error.cause
            raise ActorError(f"{seat} failed: {type(cause).__name__}: {cause}") from error
        except tuple(getattr(errors, name) for name in DEATHS) as error:
            self._replace(seat, error)
            return None
        except errors.RayError as error:
            raise ActorError(f"{seat} failed: {type(error).__name__}: {error}") from error
        if isinstance(value, Failure):
            raise value.error from value.cause
        seat.tasks = seat.tasks[1:]
        return value

    def _replace(self, seat: "_Seat", error: Exception) -> None:
        self.lost += seat.state is State.WORKING
        if seat.deaths == self.most_restarts:
            raise ActorError(
                f"the process of {seat} has died, after actor {seat.index} was replaced {seat.deaths} times in a row without "
                f"giving a result: {type(error).__name__}: {error}"
            ) from error
        _kill(self._ray, seat)
        self.restarts += 1
        seat.deaths += 1
        seat.generation += 1
        self._occupy(seat)


DEATHS = ("RayActorError", "NodeDiedError", "ObjectLostError", "WorkerCrashedError", "OutOfMemoryError")
"""Ray's errors by which a process is known to be gone, or out of reach, or what it has sent."""


class State(Enum):
    """What an actor's process is doing."""

    WAITING = "has no place"
    STARTING = "makes its environments"
    IDLE = "has nothing to do"
    WORKING = "works"


BEFORE_WORK = (State.WAITING, State.STARTING)


@dataclass(eq=False)
class _Seat:
    """One of the actors, whichever process it is in."""

    index: int
    generation: int = 0
    deaths: int = 0
    """Since its last result."""
    state: State = State.WAITING
    handle: Any = None
    tasks: list[Any] = field(default_factory=list)
    """References to what its process is to return next."""

    def __str__(self) -> str:
        return f"actor {self.index} (generation {self.generation})"


class _Published(NamedTuple):
    """The last weights in Ray's memory."""

    reference: Any
    parameters: Mapping[str, np.ndarray] | None
    rest: bytes

    def equals(self, parameters: Mapping[str, np.ndarray] | None, rest: bytes) -> bool:
        if rest != self.rest or parameters is None or self.parameters is None:
            return rest == self.rest and parameters is self.parameters
        return parameters.keys() == self.parameters.keys() and all(
            array.dtype == self.parameters[name].dtype and np.array_equal(array, self.parameters[name])
            for name, array in parameters.items()
        )


def _leave(connection: Connection, seats: list[_Seat]) -> None:
    """Let the actors go, and Ray with the last pool of those that started it."""
    ray = connection.ray
    connection.pools -= 1
    if connection.holds():
        closing = [seat.handle.close.remote() for seat in seats if seat.handle is not None and seat.state is not State.WAITING]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=PATIENCE)
        for seat in seats:
            _kill(ray, seat)
        if connection.ours and connection.pools == 0:
            ray.shutdown()
    seats.clear()


def _kill(ray: Any, seat: _Seat) -> None:
    if seat.handle is not None:
        ray.kill(seat.handle)
    seat.handle, seat.tasks = None, []
