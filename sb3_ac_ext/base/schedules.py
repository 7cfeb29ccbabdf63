"""Schedules: functions of the remaining progress (1 at the start of training, 0 at its end)."""

from typing import Annotated, Any

from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule, LinearSchedule

from sb3_ac_ext.validation import LARGEST, ArgumentError, ArgumentTypeError, Syntax, check, shown

LEGAL = 'a number >= 0, a string "lin_x" such as "lin_7e-4", or a function of the remaining progress'


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
    legal, given = f"{name} must be {LEGAL}", value
    if isinstance(value, str):
        kind, _, initial = value.partition("_")
        try:
            value = LinearSchedule(float(initial), 0.0, 1.0) if kind == "lin" else None
        except ValueError:
            value = None
        if value is None:
            raise ArgumentError(f"{legal}, got {given!r}")
    if not callable(value):
        try:
            check(name, value, float)
        except ArgumentTypeError:
            raise ArgumentTypeError(f"{legal}, got {shown(value)} of type {type(value).__name__}") from None
    schedule = FloatSchedule(value if callable(value) else float(value))
    try:
        rate = schedule(1.0)
    except Exception as error:  # of the user's function
        raise ArgumentTypeError(f"{legal}, got {shown(given)}, which fails at the start: {error}") from error
    if not 0 <= rate <= LARGEST[float]:
        raise ArgumentError(f"{legal}, got {shown(given)} ({rate} at the start)")
    return schedule


def check_default(name: str, value: Any, default: float, needs: str) -> None:
    """
    :param name: the argument's name
    :param value: as for `as_schedule`, or what RL Zoo makes of it
    :param default: the argument's
    :param needs: what another value needs, and what there is, the end of the message
    :raises ValueError: if it is another value
    """
    schedule = as_schedule(name, value)
    if {schedule(1.0), schedule(0.0)} != {default}:
        raise ArgumentError(f"{name}={shown(value)} needs {needs}")


Rate = Annotated[float | str | Schedule, Syntax(LEGAL, as_schedule)]
"""A learning rate, or another quantity that may follow the remaining progress."""
