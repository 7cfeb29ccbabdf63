"""What runs in a process that is an actor's alone, and how its results and its failures come out of it."""

import pickle
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import cloudpickle
import numpy as np

from sb3_ac_ext.actors.actor import Actor, ActorError, ActorValueError, Weights
from sb3_ac_ext.validation import ArgumentError, NonFiniteError

KINDS = NonFiniteError, ArgumentError, ActorValueError, ActorError
"""What `Actor.failures_named` lets out."""
Packed = tuple[bytes, list[np.ndarray]]
"""A pickle, and the memory of its arrays, which need not be copied on its way."""


class Process:
    """
    An actor where Ray runs it. Exceptions are values here: one that Ray sees loses its cause, and in a constructor it looks
    like a death.

    :param index: see `Actor`
    :param generation: see `Actor`
    """

    def __init__(self, index: int, generation: int) -> None:
        self._label = index, generation
        self._failures_named = Actor(*self._label).failures_named
        self._actor: Any = None

    def arrive(self) -> Packed:
        """Say that there is a process."""
        return packed(True)

    def start(self, given: tuple[list[str], bytes]) -> Packed:
        """
        :param given: where the learner finds modules, and the pickled `Recipe` and work
        :return: packed, True or a `Failure`
        """
        paths, pickled = given
        sys.path.extend(path for path in paths if path not in sys.path)

        def start() -> bool:
            with self._failures_named():
                recipe, self._work = cloudpickle.loads(pickled)
                self._actor = recipe.actor(*self._label)
                self._actor.start(recipe)
            return True

        return self._attempt(start)

    def do(self, sent: Weights | bytes) -> Packed:
        """
        :param sent: weights for the work, or a pickle of them
        :return: packed, its result or a `Failure`
        """
        weights = pickle.loads(sent) if isinstance(sent, bytes) else sent
        return self._attempt(lambda: self._actor.do(self._work, weights))

    def close(self) -> None:
        """Close the environments."""
        if self._actor is not None:
            self._actor.close()

    def _attempt(self, function: Callable[[], Any]) -> Packed:
        try:
            value = function()
            with self._failures_named():
                return packed(value)
        except Exception as error:
            return packed_failure(error)


class Failure(NamedTuple):
    """An exception that has left an actor."""

    error: Exception
    cause: BaseException | None


def packed(value: Any) -> Packed:
    """
    :param value: what can be pickled
    :return: for `unpacked`
    """
    try:
        return _packed(value, pickle.dumps)
    except Exception:  # of what only the slower one knows how to pickle
        return _packed(value, cloudpickle.dumps)


def _packed(value: Any, dumps: Callable[..., bytes]) -> Packed:
    buffers: list[np.ndarray] = []
    pickled = dumps(value, protocol=5, buffer_callback=lambda buffer: buffers.append(np.frombuffer(buffer.raw(), np.uint8)))
    return pickled, buffers


def unpacked(pickled: bytes, buffers: Iterable[np.ndarray]) -> Any:
    """
    :param pickled: of `packed`
    :param buffers: of `packed`, or as Ray returns them, which cannot be written to
    :return: what it was given, in memory of its own
    """
    return pickle.loads(pickled, buffers=[bytearray(buffer) for buffer in buffers])


def packed_failure(error: Exception) -> Packed:
    """
    :param error: as `Actor.failures_named` raises it
    :return: packed, a `Failure` that can be unpacked wherever this module is
    """
    text = "".join(traceback.format_exception(error))
    (error.__cause__ or error).add_note(f"In the actor's process:\n{text}")
    try:
        result = packed(Failure(error, error.__cause__))
        unpacked(*result)
        return result
    except Exception:  # of an exception that cannot be pickled
        kind = next(kind for kind in KINDS if isinstance(error, kind))
        return packed(Failure(kind(str(error)), RuntimeError(text)))
