"""The arguments of SAC that are numbers or strings."""

from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Gt
from gymnasium import spaces

from sb3_ac_ext.validation import Acts, ArgumentError, ArgumentTypeError, Syntax, check, shown

ENT_COEFS = 'a number > 0, "auto", or "auto_x" with an initial value x > 0 such as "auto_0.1"'
TARGET_ENTROPIES = 'a number (of nats) or "auto", minus the number of action dimensions'


def parse_ent_coef(name: str, value: Any) -> tuple[bool, float]:
    """
    :param name: the argument's name
    :param value: what was given
    :return: whether alpha is learned, and its value, or the value that learning starts from
    :raises TypeError: if it is neither a number nor a string
    :raises ValueError: if the number is not positive or the string cannot be read
    """
    kind, separator, initial = value.partition("_") if isinstance(value, str) else ("", "", "")
    automatic = kind == "auto"
    number = (initial if separator else 1.0) if automatic else value
    return automatic, _number(name, value, number, Annotated[float, Gt(0)], ENT_COEFS)


def parse_target_entropy(name: str, value: Any) -> float | Literal["auto"]:
    """
    :param name: the argument's name
    :param value: what was given
    :return: H, in nats, where it does not follow from the action space
    :raises TypeError: if it is neither a number nor a string
    :raises ValueError: if it is not finite or the string is not "auto"
    """
    return "auto" if isinstance(value, str) and value == "auto" else _number(name, value, value, float, TARGET_ENTROPIES)


def target_entropy_in(action_space: spaces.Space[Any], value: Any) -> float:
    """
    :param action_space: whose dimensions "auto" counts
    :param value: the constructor argument
    :return: H, in nats
    """
    parsed = parse_target_entropy("target_entropy", value)
    return -float(np.prod(action_space.shape or ())) if parsed == "auto" else parsed


def _number(name: str, given: Any, value: Any, annotation: Any, legal: str) -> float:
    """``value`` as SB3 reads it, strings included; ``given`` is shown in the message."""
    try:
        value = float(value) if isinstance(value, str) else value
        check(name, value, annotation)
    except ArgumentTypeError:
        raise ArgumentTypeError(f"{name} must be {legal}, got {shown(given)} of type {type(given).__name__}") from None
    except ValueError:
        raise ArgumentError(f"{name} must be {legal}, got {shown(given)}") from None
    return float(value)


EntCoef = Annotated[float | str, Syntax(ENT_COEFS, parse_ent_coef), Acts.NEVER]
TargetEntropy = Annotated[float | str, Syntax(TARGET_ENTROPIES, parse_target_entropy)]
