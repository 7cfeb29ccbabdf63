"""Schedules: functions of the remaining progress (1 at the start of training, 0 at its end)."""

import math
from typing import Any

from stable_baselines3.common.utils import FloatSchedule, LinearSchedule

from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError, check_number


def as_schedule(name: str, value: Any) -> FloatSchedule:
    """
    A learning rate as the user or a YAML file gives it, as a schedule.

    :param name: the argument's name, for the messages
    :param value: a number >= 0 (0 is legal: the Zoo's enjoy loads with it), ``"lin_x"`` for a rate that falls linearly
        from x to 0, or a function of the remaining progress
    :return: the schedule
    :raises ArgumentTypeError: if ``value`` is none of these
    :raises ArgumentError: if the string cannot be read, or the rate at the start is negative or not finite
    """
    legal = f'{name} must be a number >= 0, a string "lin_x" such as "lin_7e-4", or a function of the remaining progress'
    if isinstance(value, str):
        kind, _, initial = value.partition("_")
        try:
            value = LinearSchedule(float(initial), 0.0, 1.0) if kind == "lin" else None
        except ValueError:
            value = None
        if value is None:
            raise ArgumentError(f"{legal}, got {kind + _ + initial!r}")
    if not callable(value):
        try:
            check_number(name, value)
        except ArgumentTypeError:
            raise ArgumentTypeError(f"{legal}, got {value!r} of type {type(value).__name__}") from None
    schedule = FloatSchedule(value if callable(value) else float(value))
    rate = schedule(1.0)
    if not (math.isfinite(rate) and rate >= 0):
        raise ArgumentError(f"{legal}, got {value!r} ({rate} at the start)")
    return schedule
