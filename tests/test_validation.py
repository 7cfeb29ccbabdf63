"""Checks of numbers, and the types of errors."""

from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError, UnsupportedError, check_number


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
