"""Checks of numbers, and the types of errors."""

import re
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import numpy as np
import pytest
import torch as th
from annotated_types import Gt, Interval, Le, Lt

from sb3_ac_ext.base.schedules import as_schedule
from sb3_ac_ext.validation import (
    ArgumentError,
    ArgumentTypeError,
    NonNegative,
    Positive,
    PositiveInt,
    Syntax,
    UnitInterval,
    UnsupportedError,
    check,
    check_number,
    legal,
    plain,
    shown,
)


@pytest.mark.parametrize(
    "value", ["1", b"1", bytearray(b"1"), True, None, [1], 1j, Decimal(1), Fraction(1), np.ones(2), th.ones(2)], ids=repr
)
@pytest.mark.parametrize("integer", [False, True])
def test_what_is_no_number(value: Any, integer: bool) -> None:
    with pytest.raises(ArgumentTypeError, match=r"x must be (a number|an integer), got .* of type"):
        check_number("x", value, integer=integer)


@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf"), -float("inf"), float("nan"), np.float32("inf")], ids=str)
def test_numbers_that_nothing_holds(value: Any) -> None:
    with pytest.raises(ArgumentError, match="x must be a number"):
        check_number("x", value)


@pytest.mark.parametrize("value", [10**400, 2**63, -(2**63) - 1])
def test_integers_that_nothing_holds(value: int) -> None:
    with pytest.raises(ArgumentError, match="x must be an integer"):
        check_number("x", value, integer=True)


@pytest.mark.parametrize("value", [1, 1.0, np.float32(1), np.int64(1), np.array(1.0), th.tensor(1.0)], ids=repr)
def test_numbers_of_any_library(value: Any) -> None:
    check_number("x", value, low=1, high=1)
    with pytest.raises(ArgumentError, match=r"x must be a number in \[2, 3\], got"):
        check_number("x", value, low=2, high=3)


@pytest.mark.parametrize("sb3", [ValueError, AssertionError])
def test_errors_are_caught_as_those_of_sb3(sb3: type[Exception]) -> None:
    for value, ours in ((-1, ArgumentError), ("1", ArgumentTypeError)):
        with pytest.raises(sb3) as caught:
            check_number("x", value, low=0)
        assert caught.type is ours
    assert issubclass(ArgumentTypeError, TypeError)


def test_what_is_unsupported_is_an_assertion_of_sb3() -> None:
    assert issubclass(UnsupportedError, NotImplementedError)
    assert issubclass(UnsupportedError, AssertionError)


# What annotations declare


class Process(TypedDict):
    """A dict with keys of its own."""

    kind: Literal["white", "red"]
    start: NonNegative
    steps: NotRequired[PositiveInt]


def even(name: str, value: Any) -> None:
    if value % 2:
        raise ArgumentError(f"{name} must be even, got {value}")


@pytest.mark.parametrize(
    ("annotation", "words", "right", "wrong", "of_another_type"),
    [
        (PositiveInt, "an integer >= 1", [1, np.int64(7)], [0, -1], [1.0, "1", True, None]),
        (UnitInterval, "a number in [0, 1]", [0, 1, 0.5], [-1e-9, 1.1, float("nan")], ["0.5", False, [0.5]]),
        (Annotated[float, Gt(0), Lt(2)], "a number in (0, 2)", [1e-9, 1.9], [0, 2], [None]),
        (Annotated[float, Interval(ge=0, lt=2)], "a number in [0, 2)", [0, 1.9], [2], [None]),
        (Annotated[float, Le(3)], "a number <= 3", [3, -1e30], [3.1], [None]),
        (NonNegative | None, "a number >= 0 or None", [0, None], [-1], ["0"]),
        (bool, "True or False", [True, False], [], [0, 1, "yes", None, np.True_]),
        (Literal["a", "b"], "one of 'a', 'b'", ["a", "b"], ["c", 1, None, [], np.zeros(2)], []),
        (Literal["a"] | None, "'a' or None", ["a", None], ["b"], []),
        (str | None, "a string or None", ["", "x", None], [], [b"x", 1]),
        (type[dict] | None, "a class derived from dict or None", [dict, None], [], [list, {}, "dict"]),
        (dict[str, Any] | None, "a dict or None", [{}, {"a": 1}, None], [], [[], "a"]),
        (list[int], "a list", [[1], (1,)], [], ["1", 1]),
        (Fraction, "a Fraction", [Fraction(1)], [], [1]),
        (Any, "anything", [1, None, "x"], [], []),
        (Annotated[int, Syntax("an even number", even)] | None, "an even number or None", [2, None], [3], []),
        (
            Positive | dict[str, Positive],
            "a number >= 1e-12 or a dict whose values are a number >= 1e-12",
            *([1, {"a": 1.0}], [0], ["1", None]),
        ),
        (Process, "a dict with the keys kind, start, steps", [{"kind": "red", "start": 0}], [], [1, None]),
    ],
    ids=str,
)
def test_annotations(annotation: Any, words: str, right: list[Any], wrong: list[Any], of_another_type: list[Any]) -> None:
    assert legal(annotation) == words
    for value in right:
        check("x", value, annotation)
    for value in wrong:
        with pytest.raises(ArgumentError, match=r"x must be .*got") as caught:
            check("x", value, annotation)
        assert caught.type is ArgumentError
    for value in of_another_type:
        with pytest.raises(ArgumentTypeError, match=r"x must be .*got .* of type"):
            check("x", value, annotation)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"kind": "red"}, r"x lacks start, got \{'kind': 'red'\}"),
        ({"kind": "blue", "start": 1}, r"x\['kind'\] must be one of 'white', 'red', got 'blue'"),
        ({"kind": "red", "start": -1}, r"x\['start'\] must be a number >= 0, got -1"),
        ({"kind": "red", "start": 1, "steps": 0.5}, r"x\['steps'\] must be an integer >= 1, got 0.5 of type float"),
        ({"kind": "red", "start": 1, "step": 1}, r"x got an unexpected key 'step'; did you mean 'steps'\?"),
        ({"kind": "red", "start": 1, 7: 1}, r"x got an unexpected key 7; legal are kind, start, steps"),
    ],
    ids=str,
)
def test_dicts_with_keys_of_their_own(value: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        check("x", value, Process)


def test_parts_of_a_dict_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"x\['actor'\] must be a number >= 1e-12, got -1"):
        check("x", {"critic": 1.0, "actor": -1}, Positive | dict[str, Positive] | None)


@pytest.mark.parametrize(("value", "largest"), [(1e39, "3.4e+38"), (10**39, "3.4e+38")])
def test_numbers_that_float32_does_not_hold(value: float, largest: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(f"x must be a number >= 0 (and at most {largest}), got")):
        check("x", value, NonNegative)


def test_messages_are_short_and_never_fail() -> None:
    """Python writes no integer of thousands of digits."""
    for value in (10**5000, "x" * 10**6):
        with pytest.raises(ArgumentError) as caught:
            check("x", value, PositiveInt)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.array(3), 3),
        (th.tensor([0.5]), 0.5),
        ((np.int64(2), "episode"), (2, "episode")),
        ({"start": th.tensor(2), "type": "normal"}, {"start": 2, "type": "normal"}),
    ],
    ids=repr,
)
def test_numbers_of_any_library_become_pythons(value: Any, expected: Any) -> None:
    made = plain(value, int)
    assert repr(made) == repr(expected)


@pytest.mark.parametrize("value", [3, "lin_1", None, {"start": 0.1}, np.int64, len], ids=repr)
def test_what_is_pythons_stays_as_it_is(value: Any) -> None:
    assert plain(value, int) is value


def test_dicts_of_anything_stay_as_they_are() -> None:
    value = {"lr": th.tensor(0.1)}
    assert plain(value, dict[str, Any] | None) is value


@pytest.mark.parametrize(("rate", "error"), [("lin_-1", r"got 'lin_-1' \(-1.0 at the start\)"), ("lin_x", "got 'lin_x'")])
def test_a_rate_is_shown_as_it_was_given(rate: str, error: str) -> None:
    with pytest.raises(ArgumentError, match=rf"rate must be .*{error}"):
        as_schedule("rate", rate)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": 1.0}, r"\{'a': 1.0\}"),
        ("x" * 300, r"'x{199}\.\.\."),
        (10**5000, r"<int object at \w+>"),
        ({"a": [1], "b": {"c": 10**5000}}, r"\{'a': \[1\], 'b': \{'c': <int object at \w+>\}\}"),
    ],
    ids=["short", "long", "digits", "digits within"],
)
def test_values_in_messages(value: Any, expected: str) -> None:
    assert re.fullmatch(expected, shown(value))
