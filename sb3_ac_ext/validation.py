"""Errors and argument checks, in one place so that every message names argument, value and legal range."""

import math
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any


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
    :raises TypeError: if ``value`` is not a number (or not an integer)
    :raises ValueError: if ``value`` is outside [low, high] or not finite
    """
    kind = "an integer" if integer else "a number"
    try:
        number = operator.index(value) if integer else float(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, (bool, str)):
        raise TypeError(f"{name} must be {kind}, got {value!r} of type {type(value).__name__}")
    if not (math.isfinite(number) and low <= number <= high):
        legal = f">= {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {kind} {legal}, got {value!r}")


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """
    :raises ValueError: if ``value`` is not one of ``choices``
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_switch(name: str, value: Any) -> None:
    """
    :raises TypeError: if ``value`` is neither True nor False
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")


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
            close = get_close_matches(key, allowed, n=1)
            hint = (
                f"; did you mean {close[0]!r}?"
                if close
                else f"; legal are {', '.join(sorted(name for name in allowed if name[0] != '_'))}"
            )
            raise TypeError(f"{owner} got an unexpected {kind} {key!r}{hint}")


def check_mapping(name: str, value: Any, required: Collection[str], optional: Collection[str] = ()) -> Mapping[str, Any]:
    """
    :raises TypeError: if ``value`` is not a mapping or has a key that is neither required nor optional
    :raises ValueError: if a required key is missing
    """
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict with the keys {', '.join([*required, *optional])}, got {value!r}")
    check_keys(name, value, {*required, *optional}, kind="key")
    missing = [key for key in required if key not in value]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}, got {dict(value)!r}")
    return value


@contextmanager
def translated_assertions(model: Any) -> Iterator[None]:
    """
    Turn the ``AssertionError`` that SB3 raises for a user's input into an `UnsupportedError` that also shows the spaces.

    :param model: the algorithm that is being made
    """
    try:
        yield
    except UnsupportedError:
        raise
    except AssertionError as error:
        shown = [f"{name}={getattr(model, name)}" for name in ("observation_space", "action_space") if hasattr(model, name)]
        raise UnsupportedError(f"{type(model).__name__}: {error}; got {', '.join(shown)}") from error
