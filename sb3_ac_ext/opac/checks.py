"""What goes together in OPAC, beyond what its arguments declare."""

from typing import Any

from gymnasium import spaces

from sb3_ac_ext.base.arguments import check_choices_from_zero, check_float_actions, check_policy_class
from sb3_ac_ext.opac.linear import LinearPolicy
from sb3_ac_ext.opac.policies import MlpPolicy
from sb3_ac_ext.validation import ArgumentError, UnsupportedError


def check_made_for(model: Any) -> None:
    """
    :param model: an OPAC whose policy class is set
    :raises TypeError: if the policy is not for the variant
    :raises ArgumentError: if it was made for other arguments, or there is noise of which the density is not known
    :raises UnsupportedError: if there is noise on choices
    """
    linear, discrete = model.variant == "degris", isinstance(model.action_space, spaces.Discrete)
    check_policy_class(model, LinearPolicy if linear else MlpPolicy)
    _check_noise(model, discrete)
    if linear:
        return
    made, asked = model.policy_kwargs.get("critic_type", "q"), model.critic_type if model.variant == "is" else "q"
    if made != asked:
        raise ArgumentError(
            f"critic_type must be what the policy was made with, {made!r}, got {asked!r} with variant={model.variant!r}"
        )


def check_choices(model: Any) -> None:
    """
    :param model: an OPAC whose arguments are legal each by itself
    :raises ArgumentError: for a contradiction
    :raises UnsupportedError: for spaces or a combination that its variant cannot take
    """
    check_float_actions(model.action_space)
    check_choices_from_zero(model.action_space)
    discrete = isinstance(model.action_space, spaces.Discrete)
    if model.variant == "degris":
        _check_linear(model, discrete)
    _check_actions(model, discrete)
    if model.target is not None and model.variant == "is" and model.critic_type == "v":
        raise ArgumentError(f"target={model.target!r} needs critic_type='q' with variant='is', got critic_type='v'")
    if model.baseline == "leave-one-out" and model.n_actor_samples < 2:
        raise ArgumentError(
            f"n_actor_samples must be an integer >= 2 with baseline='leave-one-out', got {model.n_actor_samples}"
        )


def _check_linear(model: Any, discrete: bool) -> None:
    if not discrete:
        raise UnsupportedError(f"variant='degris' needs Discrete actions, got {model.action_space}")
    if isinstance(model.observation_space, spaces.Dict):
        raise UnsupportedError(f"variant='degris' needs observations in one array, got {model.observation_space}")
    if model.max_grad_norm is not None:
        raise ArgumentError(f"max_grad_norm must be None with variant='degris', got {model.max_grad_norm!r}")


def _check_actions(model: Any, discrete: bool) -> None:
    """What the actions have to be for some choices."""
    needs = {
        "actor_gradient": {"exact": True, "reparam": False},
        "target": {"exact": True},
        "baseline": {"v": True},
        "behaviour": {"policy_noise": False},
    }
    for name, choices in needs.items():
        needed = choices.get(getattr(model, name))
        if needed is not None and needed != discrete:
            kind = "Discrete actions" if needed else "a Box of actions"
            raise UnsupportedError(f"{name}={getattr(model, name)!r} needs {kind}, got {model.action_space}")


def _check_noise(model: Any, discrete: bool) -> None:
    for name in ("action_noise", "exploration_noise"):
        if model._arguments()[name] is None:
            continue
        if discrete:
            raise UnsupportedError(f"{name} needs a Box of actions, got {model.action_space}")
        if model.variant != "q" or model.behaviour != "policy":
            raise ArgumentError(
                f"{name} needs variant='q' and behaviour='policy', as the density of what it makes is not known, got "
                f"variant={model.variant!r} and behaviour={model.behaviour!r}"
            )
