"""Checks of SAC's own arguments."""

import math
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.sac.policies import SACPolicy

from sb3_ac_ext.base.arguments import check_policy_class
from sb3_ac_ext.sacx.policies import MlpPolicy
from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError, check_number, check_switch


def check_sacx_arguments(model: Any) -> None:
    """
    :param model: a `SACX` whose arguments and spaces are set; its ``target_entropy`` becomes a number, as with SB3
    :raises TypeError: if an argument has the wrong type
    :raises ValueError: if one is out of range or contradicts another
    """
    check_policy_class(model, MlpPolicy if model.value_network else SACPolicy)
    automatic, _ = parse_ent_coef(model.ent_coef)
    model.target_entropy = parse_target_entropy(model.target_entropy, model.action_space)  # as SB3 does
    for name in ("value_network", "exact_log_prob", "use_sde", "use_sde_at_warmup"):
        check_switch(name, getattr(model, name))
    check_number("sde_sample_freq", model.sde_sample_freq, low=-1, integer=True)
    check_number("target_update_interval", model.target_update_interval, low=1, integer=True)
    if model.target_update_every is not None:
        check_number("target_update_every", model.target_update_every, low=1, integer=True)
        if model.target_update_interval != 1:
            raise ArgumentError(
                "target_update_interval and target_update_every exclude each other, got "
                f"{model.target_update_interval} and {model.target_update_every}"
            )
    if model.value_learning_rate is not None and not model.value_network:
        raise ArgumentError(f"value_learning_rate needs value_network=True, got {model.value_learning_rate!r} without it")
    if model.ent_coef_learning_rate is not None and not automatic:
        raise ArgumentError(
            f'ent_coef_learning_rate needs ent_coef="auto", got {model.ent_coef_learning_rate!r} with {model.ent_coef!r}'
        )
    if model.policy_kwargs.get("value_network", model.value_network) != model.value_network:
        raise ArgumentError(
            f"value_network must be what the policy was made with, {model.policy_kwargs['value_network']}, "
            f"got {model.value_network}"
        )


def parse_ent_coef(ent_coef: Any) -> tuple[bool, float]:
    """
    :param ent_coef: the constructor argument
    :return: whether alpha is learned, and its value, or the value that learning starts from
    :raises TypeError: if it is neither a number nor a string
    :raises ValueError: if the number is not positive or the string cannot be read
    """
    legal = 'ent_coef must be a number > 0, "auto", or "auto_x" with an initial value x > 0 such as "auto_0.1"'
    automatic, value = False, ent_coef
    if isinstance(ent_coef, str):
        kind, separator, initial = ent_coef.partition("_")
        automatic = kind == "auto"
        value = (initial if separator else 1.0) if automatic else ent_coef
    number = _as_number(legal, ent_coef, value)
    if not 0 < number < math.inf:
        raise ArgumentError(f"{legal}, got {ent_coef!r}")
    return automatic, number


def parse_target_entropy(target_entropy: Any, action_space: spaces.Space[Any]) -> float:
    """
    :param target_entropy: the constructor argument
    :param action_space: whose dimensions "auto" counts
    :return: H, in nats
    :raises TypeError: if it is neither a number nor a string
    :raises ValueError: if it is not finite or the string is not "auto"
    """
    if isinstance(target_entropy, str) and target_entropy == "auto":
        return -float(np.prod(action_space.shape or ()))
    legal = 'target_entropy must be a number (of nats) or "auto", minus the number of action dimensions'
    number = _as_number(legal, target_entropy, target_entropy)
    if not math.isfinite(number):
        raise ArgumentError(f"{legal}, got {target_entropy!r}")
    return number


def _as_number(legal: str, given: Any, value: Any) -> float:
    """``value`` as SB3 reads it, strings included; ``given`` is shown in the message."""
    try:
        if not isinstance(value, bool):
            return float(value)
    except ValueError:
        raise ArgumentError(f"{legal}, got {given!r}") from None
    except TypeError:
        pass
    raise ArgumentTypeError(f"{legal}, got {given!r} of type {type(given).__name__}")
