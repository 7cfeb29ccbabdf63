"""Checks of ACKTR's own arguments."""

from typing import Any

from sb3_ac_ext.acktr.kfac_optimizer import check_options
from sb3_ac_ext.validation import ArgumentError, UnsupportedError, check_number, check_switch


def check_acktr_arguments(model: Any) -> None:
    """
    :param model: an `ACKTR` whose arguments and spaces are set
    :raises TypeError: if an argument has the wrong type
    :raises ValueError: if one is out of range or contradicts another
    :raises UnsupportedError: for gSDE
    """
    check_options(vars(model))
    check_switch("normalize_advantage", model.normalize_advantage)
    for name in ("value_max_kl", "kl_target"):
        if getattr(model, name) is not None:
            check_number(name, getattr(model, name), low=1e-12)
    check_number("vf_fisher_coef", model.vf_fisher_coef, low=1e-12)
    if model.use_sde:
        raise UnsupportedError("use_sde must be False: K-FAC has no block for gSDE's noise matrix, got True")
    for name in ("optimizer_class", "optimizer_kwargs"):
        if (model.policy_kwargs or {}).get(name) is not None:
            raise ArgumentError(
                f"policy_kwargs[{name!r}] must be left out: ACKTR's optimizer is K-FAC, whose options are arguments of ACKTR; "
                f"got {model.policy_kwargs[name]!r}"
            )


def check_shared_arguments(model: Any) -> None:
    """
    :param model: an `ACKTR` whose policy and value share layers
    :raises ValueError: if an argument is there that would be the value's own
    """
    for name in ("value_max_kl", "value_learning_rate"):
        if getattr(model, name) is not None:
            raise ArgumentError(
                f"{name} needs networks of their own for policy and value, whose steps are bounded together otherwise: set "
                f"policy_kwargs=dict(share_features_extractor=False), or leave it out; got {getattr(model, name)!r}"
            )
