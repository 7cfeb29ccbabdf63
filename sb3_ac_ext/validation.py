"""
Errors, and the check of a value against what an annotation declares, so that every message has name, value and legal range.

An argument is declared once, in the signature of a constructor: its type, and behind it in ``Annotated`` its range (in the
terms of the `annotated_types` package) and what else there is to know of it. `check` reads that, `legal` says it in words, and
hypothesis draws from it.
"""

import math
import operator
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from difflib import get_close_matches
from enum import StrEnum
from fractions import Fraction
from functools import cache, partial
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NotRequired, Required, Union, get_args, get_origin, get_type_hints, is_typeddict

from annotated_types import Ge, GroupedMetadata, Gt, Interval, Le, Lt

NO_NUMBERS = (bool, str, bytes, bytearray, Decimal, Fraction)
"""What ``float`` takes, and arithmetic with tensors does not take or takes for something else."""
LARGEST = {int: sys.maxsize, float: (2 - 2**-23) * 2.0**127}
"""Legal numbers: what an index may be, and what networks can compute with (float32)."""

LONGEST = 200
"""Letters of a value in a message."""
COMPARISONS = {Ge: (">=", operator.ge), Gt: (">", operator.gt), Le: ("<=", operator.le), Lt: ("<", operator.lt)}


class ArgumentError(ValueError, AssertionError):
    """An argument that is out of range or contradicts another; SB3 raises the one error for some and the other for others."""


class ArgumentTypeError(TypeError, ArgumentError):
    """An argument of the wrong type, for which SB3 may raise any of the three."""


class UnsupportedError(NotImplementedError, AssertionError):
    """A space or combination that the algorithm cannot take; an ``AssertionError`` too, as SB3 raises for spaces."""


class NonFiniteError(ValueError):
    """Training produced NaN or infinity. A ``ValueError``, so that a hyperparameter search prunes the trial."""


# What annotations are made of

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Ge(1e-12)]
"""Far enough from 0 to divide by."""
UnitInterval = Annotated[float, Interval(ge=0, le=1)]


class Acts(StrEnum):
    """When another value of the argument acts that is set on a model which is there; without any of these it is an update."""

    STEP = "next step"
    UPDATE = "next update"
    ROLLOUT = "next rollout"
    LEARN = "next `learn()`"
    NEVER = "in a new model"


@dataclass(frozen=True)
class Syntax:
    """An argument with a syntax of its own."""

    legal: str
    """What is legal, in words."""
    check: Callable[[str, Any], Any] = field(repr=False)
    """Of the argument's name and its value; raises for what is not legal."""


@dataclass(frozen=True)
class Needs:
    """Another value than the default goes with some values of another argument only; without any, with all but its default."""

    name: str
    values: tuple[Any, ...]

    def __init__(self, name: str, *values: Any) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "values", values)

    def __str__(self) -> str:
        return " or ".join(f"{self.name}={value!r}" for value in self.values) or self.name


@dataclass(frozen=True)
class Excludes:
    """Of this argument and another one only one may differ from its default."""

    name: str


# Checks


def check(name: str, value: Any, annotation: Any) -> None:
    """
    :param name: the argument's name
    :param value: what was given
    :param annotation: a type, union, ``Literal``, ``dict[str, ...]``, ``TypedDict``, or one of these ``Annotated`` with its
        range or its `Syntax`
    :raises ArgumentTypeError: if ``value`` is of no type that is declared
    :raises ArgumentError: if it is out of the range of its type
    """
    found: type[ArgumentError] = ArgumentTypeError
    for error_of in _checks(annotation):
        error = error_of(name, value)
        if error is None:
            return
        found = ArgumentError if error is ArgumentError else found
    of_type = f" of type {type(value).__name__}" if found is ArgumentTypeError else ""
    raise found(f"{name} must be {legal(annotation)}{_largest_in_words(value, annotation)}, got {shown(value)}{of_type}")


Check = Callable[[str, Any], type[ArgumentError] | None]
"""From a name and a value to what is wrong with it; None if it is legal."""


@cache
def _checks(annotation: Any) -> tuple[Check, ...]:
    return tuple(_check_of(kind, constraints) for kind, constraints in alternatives(annotation))


def _check_of(kind: Any, constraints: tuple[Any, ...]) -> Check:
    if (syntax := syntax_in(constraints)) is not None:
        return partial(_syntax_error, syntax)
    if kind is int or kind is float:
        return partial(_number_error, kind, _bounds(constraints))
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        types = tuple(map(type, choices))
        return lambda name, value: None if isinstance(value, types) and value in choices else ArgumentError
    if get_origin(kind) is dict and get_args(kind)[1] is not Any:
        return partial(_dict_error, get_args(kind)[1])
    if is_typeddict(kind):
        return partial(_typed_dict_error, kind)
    is_one = _type_check(kind)
    return lambda name, value: None if is_one(value) else ArgumentTypeError


def _type_check(kind: Any) -> Callable[[Any], bool]:
    origin = get_origin(kind)
    if kind is Any:
        return lambda value: True
    if origin is type:
        base = get_args(kind)[0]
        return lambda value: isinstance(value, type) and issubclass(value, base)
    types = {dict: Mapping, list: list | tuple}.get(origin, origin or kind)
    return lambda value: isinstance(value, types)


def _syntax_error(syntax: Syntax, name: str, value: Any) -> None:
    syntax.check(name, value)  # which raises by itself


def _number_error(kind: type, bounds: Any, name: str, value: Any) -> type[ArgumentError] | None:
    number = _number(value, kind)
    if number is None:
        return ArgumentTypeError
    return None if abs(number) <= LARGEST[kind] and _within(number, bounds) else ArgumentError


def _dict_error(values: Any, name: str, value: Any) -> type[ArgumentError] | None:
    if not isinstance(value, Mapping):
        return ArgumentTypeError
    for key, part in value.items():
        check(f"{name}[{key!r}]", part, values)
    return None


def _typed_dict_error(kind: Any, name: str, value: Any) -> type[ArgumentError] | None:
    if not isinstance(value, Mapping):
        return ArgumentTypeError
    check_mapping(name, value, kind.__required_keys__, kind.__optional_keys__)
    hints = _hints(kind)
    for key, part in value.items():
        check(f"{name}[{key!r}]", part, hints[key])
    return None


def plain(value: Any, annotation: Any) -> Any:
    """
    :param value: what `check` took
    :param annotation: as for `check`
    :return: with numbers of other libraries as Python's, as random generators, queues and slices take no others
    """
    if hasattr(value, "item") and not isinstance(value, type):
        return value if any(kind is Any for kind, _ in alternatives(annotation)) else value.item()
    if type(value) in (tuple, list):
        return type(value)(plain(part, None) for part in value)
    if isinstance(value, dict) and all(kind != dict[str, Any] for kind, _ in alternatives(annotation)):
        parts = {key: plain(part, None) for key, part in value.items()}
        return value if all(parts[key] is value[key] for key in parts) else parts  # the user's, who may change it
    return value


def shown(value: Any) -> str:
    """A value in a message: not longer than a line or two, and without an error of its own."""
    try:
        text = repr(value)
    except Exception:  # as of an integer with thousands of digits
        if type(value) is not dict:
            return object.__repr__(value)
        text = f"{{{', '.join(f'{key!r}: {shown(part)}' for key, part in value.items())}}}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def legal(annotation: Any) -> str:
    """
    :param annotation: as for `check`
    :return: what it declares, in words: "an integer >= 1 or None"
    """
    words = dict.fromkeys(_in_words(kind, constraints) for kind, constraints in alternatives(annotation))
    words |= {"None": words.pop("None")} if "None" in words else {}  # last
    *others, last = words
    comma = "," * (len(others) > 1 or any("," in word.partition(" in ")[0] for word in others))  # not of a range
    return f"{', '.join(others)}{comma} or {last}" if others else last


@cache
def alternatives(annotation: Any) -> tuple[tuple[Any, tuple[Any, ...]], ...]:
    """
    :param annotation: as for `check`
    :return: what a union is made of, each with all that stands behind it in ``Annotated``
    """
    kind: Any = annotation
    constraints: tuple[Any, ...] = ()
    if get_origin(annotation) is Annotated:
        kind, *behind = get_args(annotation)
        constraints = tuple(part for one in behind for part in (one if isinstance(one, GroupedMetadata) else [one]))
    if get_origin(kind) in (Union, UnionType) and syntax_in(constraints) is None:
        parts = [(part, (*own, *constraints)) for one in get_args(kind) for part, own in alternatives(one)]
        return tuple(sorted(parts, key=lambda part: part[0] is not NoneType))  # None first, for a syntax would refuse it
    return ((kind, constraints),)


def syntax_in(constraints: Iterable[Any]) -> Syntax | None:
    """The `Syntax` among what stands in ``Annotated``."""
    return next((one for one in constraints if isinstance(one, Syntax)), None)


def _number(value: Any, kind: type) -> float | None:
    """A number of any library, arrays and tensors of a single one included; None for what is none."""
    try:
        value = value.item() if hasattr(value, "item") else value
        if isinstance(value, NO_NUMBERS):
            return None
        return operator.index(value) if kind is int else float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):  # the last for tensors of several numbers
        return None


def _bounds(constraints: tuple[Any, ...]) -> list[tuple[str, Callable[[Any, Any], bool], Any]]:
    """Of each bound of a range the sign, the comparison and the number."""
    bounds = [one for one in constraints if type(one) in COMPARISONS]
    return [(*COMPARISONS[type(bound)], getattr(bound, type(bound).__name__.lower())) for bound in bounds]


def _within(number: float, bounds: list[tuple[str, Callable[[Any, Any], bool], Any]]) -> bool:
    return all(compare(number, bound) for _, compare, bound in bounds)


def _in_words(kind: Any, constraints: tuple[Any, ...]) -> str:
    if (syntax := syntax_in(constraints)) is not None:
        return syntax.legal
    if kind is int or kind is float:
        return f"{'an integer' if kind is int else 'a number'}{_range_in_words(constraints)}"
    if get_origin(kind) is Literal:
        choices = ", ".join(map(repr, get_args(kind)))
        return f"one of {choices}" if len(get_args(kind)) > 1 else choices
    if get_origin(kind) is type:
        return f"a class derived from {get_args(kind)[0].__name__}"
    if is_typeddict(kind):
        return f"a dict with the keys {', '.join(kind.__annotations__)}"
    if get_origin(kind) is dict:
        values = get_args(kind)[1]
        return "a dict" if values is Any else f"a dict whose values are {legal(values)}"
    names = {Any: "anything", NoneType: "None", bool: "True or False", str: "a string", list: "a list"}
    plain = get_origin(kind) or kind
    name = getattr(plain, "__name__", str(plain))
    return names.get(plain, f"{'an' if name[0] in 'AEIOU' else 'a'} {name}")


def _largest_in_words(value: Any, annotation: Any) -> str:
    """What is to be said where a number is legal but for its size."""
    for kind, constraints in alternatives(annotation):
        number = _number(value, kind) if kind in LARGEST else None
        if number is not None and LARGEST[kind] < abs(number) and _within(number, _bounds(constraints)):
            return f" (and at most {LARGEST[kind]:.3g})"
    return ""


def _range_in_words(constraints: tuple[Any, ...]) -> str:
    bounds = sorted(_bounds(constraints), key=lambda bound: bound[0] in ("<", "<="))
    if len(bounds) == 2:
        (low, _, least), (high, _, most) = bounds
        return f" in {'[' if low == '>=' else '('}{least}, {most}{']' if high == '<=' else ')'}"
    return "".join(f" {sign} {bound}" for sign, _, bound in bounds)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {key: get_args(hint)[0] if get_origin(hint) in (Required, NotRequired) else hint for key, hint in hints.items()}


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, integer: bool = False) -> None:
    """
    `check` of a number whose range is known only when the program runs.

    :param name: the argument's name
    :param value: what was given
    :param low: smallest legal value
    :param high: largest legal value
    :param integer: whether only whole numbers are legal
    :raises ArgumentTypeError: if ``value`` is not a number (or not an integer)
    :raises ArgumentError: if ``value`` is outside [low, high] or not finite
    """
    bounds = [Ge(low)] * (low > -math.inf), [Le(high)] * (high < math.inf)
    check(name, value, Annotated[(int if integer else float, *bounds[0], *bounds[1], None)])


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """
    `check` of a choice from what is known only when the program runs.

    :raises ArgumentError: if ``value`` is not one of ``choices``
    """
    check(name, value, Literal[tuple(choices)])


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
            close = get_close_matches(str(key), allowed, n=1, cutoff=0.7)  # not "q_a" for "q_c"
            names = ", ".join(sorted(name for name in allowed if name[0] != "_"))
            hint = f"did you mean {close[0]!r}?" if close else f"legal are {names}" if names else "there is none"
            raise ArgumentTypeError(f"{owner} got an unexpected {kind} {key!r}; {hint}")


def check_mapping(name: str, value: Any, required: Collection[str], optional: Collection[str] = ()) -> Mapping[str, Any]:
    """
    :raises TypeError: if ``value`` is not a mapping or has a key that is neither required nor optional
    :raises ArgumentError: if a required key is missing
    """
    if not isinstance(value, Mapping):
        raise ArgumentTypeError(f"{name} must be a dict with the keys {', '.join([*required, *optional])}, got {value!r}")
    check_keys(name, value, {*required, *optional}, kind="key")
    missing = sorted(key for key in required if key not in value)
    if missing:
        raise ArgumentError(f"{name} lacks {', '.join(missing)}, got {dict(value)!r}")
    return value


@contextmanager
def translated_assertions(model: Any) -> Iterator[None]:
    """
    Turn the ``AssertionError`` that SB3 raises for a user's input into an `UnsupportedError` that also shows the spaces, and
    name ``use_sde`` where SB3 speaks of gSDE.

    :param model: the algorithm that is being made
    """
    try:
        yield
    except (UnsupportedError, ArgumentError):
        raise
    except AssertionError as error:
        names = ("observation_space", "action_space", "policy_kwargs")
        given = ", ".join(f"{name}={shown(getattr(model, name))}" for name in names if getattr(model, name, None))
        raise UnsupportedError(f"{type(model).__name__}: {error}; got {given}") from error
    except ValueError as error:
        if "gSDE" not in str(error):
            raise
        raise ArgumentError(f"use_sde must be False for action_space={model.action_space}, got True: {error}") from error
