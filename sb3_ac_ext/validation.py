"""Errors and argument checks, in one place so that every message names argument, value and legal range."""

import math
import operator
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from difflib import get_close_matches
from fractions import Fraction
from typing import Any

NO_NUMBERS = (bool, str, bytes, bytearray, Decimal, Fraction)
"""What ``float`` takes, and arithmetic with tensors does not take or takes for something else."""


class ArgumentError(ValueError, AssertionError):
    """An argument that is out of range or contradicts another; SB3 raises the one error for some and the other for others."""


class ArgumentTypeError(TypeError, ArgumentError):
    """An argument of the wrong type, for which SB3 may raise any of the three."""


class UnsupportedError(NotImplementedError, AssertionError):
    """A space or combination that the algorithm cannot take; an ``AssertionError`` too, as SB3 raises for spaces."""


class NonFiniteError(ValueError):
    """Training produced NaN or infinity. A ``ValueError``, so that a hyperparameter search prunes the trial."""


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, integer: bool = False) -> None:
    """
    :param name: the argument's name
    :param value: what was given
    :param low: smallest legal value
    :param high: largest legal value
    :param integer: whether only whole numbers are legal
    :raises ArgumentTypeError: if ``value`` is not a number (or not an integer)
    :raises ArgumentError: if ``value`` is outside [low, high] or not finite
    """
    kind = "an integer" if integer else "a number"
    try:
        number = operator.index(value) if integer else float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError, RuntimeError):  # the last for tensors of several numbers
        number = None
    if number is None or isinstance(value, NO_NUMBERS):
        raise ArgumentTypeError(f"{name} must be {kind}, got {value!r} of type {type(value).__name__}")
    largest = sys.maxsize if integer else sys.float_info.max
    if not max(low, -largest) <= number <= min(high, largest):
        legal = f">= {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ArgumentError(f"{name} must be {kind} {legal}, got {value!r}")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """
    :raises ArgumentError: if ``value`` is not one of ``choices``
    """
    if value not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_switch(name: str, value: Any) -> None:
    """
    :raises ArgumentTypeError: if ``value`` is neither True nor False
    """
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")


def check_keys(owner: str, keys: Iterable[str], allowed: Collection[str], kind: str = "argument") -> None:
    """
    :param owner: whose keys they are, the start of the message
    :param keys: what was given
    :param allowed: what is legal
    :param kind: what a key is called in the message
    :raises TypeError: if a key is not allowed
    """
    for key in keys:
        if key not in allowed:
            close = get_close_matches(key, allowed, n=1, cutoff=0.7)  # not "q_a" for "q_c"
            hint = (
                f"; did you mean {close[0]!r}?"
                if close
                else f"; legal are {', '.join(sorted(name for name in allowed if name[0] != '_'))}"
            )
            raise TypeError(f"{owner} got an unexpected {kind} {key!r}{hint}")


def check_mapping(name: str, value: Any, required: Collection[str], optional: Collection[str] = ()) -> Mapping[str, Any]:
    """
    :raises TypeError: if ``value`` is not a mapping or has a key that is neither required nor optional
    :raises ArgumentError: if a required key is missing
    """
    if not isinstance(value, Mapping):
        raise ArgumentTypeError(f"{name} must be a dict with the keys {', '.join([*required, *optional])}, got {value!r}")
    check_keys(name, value, {*required, *optional}, kind="key")
    missing = [key for key in required if key not in value]
    if missing:
        raise ArgumentError(f"{name} lacks {', '.join(missing)}, got {dict(value)!r}")
    return value


@contextmanager
def translated_assertions(model: Any) -> Iterator[None]:
    """
    Turn the ``AssertionError`` that SB3 raises for a user's input into an `UnsupportedError` that also shows the spaces.

    :param model: the algorithm that is being made
    """
    try:
        yield
    except (UnsupportedError, ArgumentError):
        raise
    except AssertionError as error:
        shown = [f"{name}={getattr(model, name)}" for name in ("observation_space", "action_space") if hasattr(model, name)]
        raise UnsupportedError(f"{type(model).__name__}: {error}; got {', '.join(shown)}") from error
