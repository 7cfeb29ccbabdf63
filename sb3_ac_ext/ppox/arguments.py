"""Checks of PPO's own arguments."""

from typing import Any

from sb3_ac_ext.base.schedules import as_schedule
from sb3_ac_ext.validation import ArgumentError, check_choice, check_number, check_switch

PENALTY_ONLY = ("kl_target", "kl_coef")
SEPARATE_ONLY = (
    *("policy_epochs", "value_epochs", "policy_sample_ratio", "value_sample_ratio"),
    *("policy_learning_rate", "value_learning_rate", "value_stop_mse"),
)
LEAST_RATIO = 1e-9


def check_sizes(n_steps: Any, batch_size: Any, normalize_advantage: bool) -> None:
    """
    :param n_steps: argument of PPOX
    :param batch_size: argument of PPOX
    :param normalize_advantage: argument of PPOX; a single advantage has no standard deviation
    :raises TypeError: if a number is not an integer
    :raises ValueError: if it is too small
    """
    check_number("n_steps", n_steps, low=1, integer=True)
    note = "batch_size with normalize_advantage=True" if normalize_advantage else "batch_size"
    check_number(note, batch_size, low=2 if normalize_advantage else 1, integer=True)


def check_clip_range_is_default(clip_range: Any) -> None:
    """
    :param clip_range: argument of PPOX, or what RL Zoo makes of it
    :raises ValueError: if it is not 0.2
    """
    schedule = as_schedule("clip_range", clip_range)
    if {schedule(1.0), schedule(0.0)} != {0.2}:
        raise ArgumentError(f'clip_range is an option of surrogate="clip", got {clip_range!r} with surrogate="penalty"')


def check_ppox_arguments(model: Any) -> None:
    """
    :param model: a `PPOX` whose arguments and spaces are set
    :raises TypeError: if an argument has the wrong type
    :raises ValueError: if one is out of range or contradicts another
    """
    for name in ("normalize_advantage", "separate_phases"):
        check_switch(name, getattr(model, name))
    check_sizes(model.n_steps, model.batch_size, model.normalize_advantage)
    check_number("n_epochs", model.n_epochs, low=1, integer=True)
    check_choice("surrogate", model.surrogate, ("clip", "penalty"))
    check_choice("clip_range_vf_mode", model.clip_range_vf_mode, ("clipped", "max"))
    check_choice("normalize_advantage_over", model.normalize_advantage_over, ("minibatch", "buffer"))
    check_choice("kl_stop_estimator", model.kl_stop_estimator, ("k1", "k3"))
    check_choice("kl_stop_every", model.kl_stop_every, ("minibatch", "epoch"))
    check_choice("kl_stop_scope", model.kl_stop_scope, ("both", "policy"))
    _check_optional(model, 0.0, float("inf"), "target_kl", "kl_stop", "kl_coef", "value_stop_mse")
    _check_optional(model, 1e-12, float("inf"), "kl_target")
    _check_optional(model, LEAST_RATIO, 1.0, "policy_sample_ratio", "value_sample_ratio")
    for name in ("policy_epochs", "value_epochs"):
        if getattr(model, name) is not None:
            check_number(name, getattr(model, name), low=1, integer=True)
    _check_value_clipping(model)
    _check_combinations(model)


def _check_optional(model: Any, low: float, high: float, *names: str) -> None:
    for name in names:
        if getattr(model, name) is not None:
            check_number(name, getattr(model, name), low=low, high=high)


def _check_value_clipping(model: Any) -> None:
    if model.clip_range_vf is None and model.clip_range_vf_mode != "clipped":
        raise ArgumentError(f"clip_range_vf_mode={model.clip_range_vf_mode!r} needs clip_range_vf, got None")
    if model.clip_range_vf is not None and model.clip_range_vf(1.0) == 0:
        raise ArgumentError("clip_range_vf must be > 0, or None for no clipping, got 0")


def _check_combinations(model: Any) -> None:
    for name in PENALTY_ONLY:
        if model.surrogate == "clip" and getattr(model, name) is not None:
            raise ArgumentError(
                f'{name} is an option of surrogate="penalty", got {getattr(model, name)!r} with surrogate="clip"'
            )
    if model.target_kl is not None and model.kl_stop is not None:
        raise ArgumentError(f"target_kl and kl_stop exclude each other, got {model.target_kl} and {model.kl_stop}")
    if model.separate_phases:
        return
    for name in SEPARATE_ONLY:
        if getattr(model, name) is not None:
            raise ArgumentError(f"{name} needs separate_phases=True, got {getattr(model, name)!r} without it")
    if model.kl_stop_scope == "policy":
        raise ArgumentError('kl_stop_scope="policy" needs separate_phases=True, got it without')
