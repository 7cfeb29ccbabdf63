"""Checks of AC's own arguments, and the policy class that they need."""

from typing import Any

from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy

from sb3_ac_ext.ac.policies import (
    DeterministicCnnPolicy,
    DeterministicMlpPolicy,
    DeterministicMultiInputPolicy,
    QCnnPolicy,
    QMlpPolicy,
    QMultiInputPolicy,
)
from sb3_ac_ext.base.arguments import check_bounded_actions, check_policy_class
from sb3_ac_ext.networks.actor_critic import SEPARATE_POLICIES
from sb3_ac_ext.validation import ArgumentError, UnsupportedError, check_choice, check_number, check_switch

V_POLICIES = tuple(SEPARATE_POLICIES.values())
Q_POLICIES = (QMlpPolicy, QCnnPolicy, QMultiInputPolicy)
DETERMINISTIC_POLICIES = (DeterministicMlpPolicy, DeterministicCnnPolicy, DeterministicMultiInputPolicy)


def fitting_policy(model: Any) -> type[BasePolicy]:
    """
    :param model: an `AC` whose arguments are set
    :return: its policy class; for one of the names, that with the critic and the actor asked for
    """
    q_policies = DETERMINISTIC_POLICIES if model.deterministic_policy else Q_POLICIES
    given: type[BasePolicy] = model.policy_class
    if model.critic == "q" and given in V_POLICIES:
        return q_policies[V_POLICIES.index(given)]  # type: ignore[arg-type]  # it is one of them
    return given


def check_ac_arguments(model: Any) -> None:
    """
    :param model: an `AC` whose arguments and spaces are set
    :raises TypeError: if an argument has the wrong type
    :raises ValueError: if one is out of range or contradicts another
    :raises UnsupportedError: if the action space cannot be served
    """
    for name in ("deterministic_policy", "gamma_t_weight"):
        check_switch(name, getattr(model, name))
    check_choice("critic", model.critic, ("v", "q"))
    for name in ("actor_trace_lambda", "critic_trace_lambda"):
        check_number(name, getattr(model, name), low=0, high=1)
    check_number("exploration_std", model.exploration_std, low=0)
    if model.deterministic_policy:
        _check_deterministic(model)
    elif model.exploration_std:
        raise ArgumentError(f"exploration_std needs deterministic_policy=True, got {model.exploration_std!r} without it")
    if model.critic == "q" and model.actor_trace_lambda:
        raise ArgumentError(f'actor_trace_lambda needs critic="v", got {model.actor_trace_lambda!r} with critic="q"')
    _check_policy(model)


def _check_deterministic(model: Any) -> None:
    if not isinstance(model.action_space, spaces.Box):
        raise UnsupportedError(f"deterministic_policy=True needs a Box of actions, got {model.action_space}")
    check_bounded_actions(model.action_space)
    if model.critic != "q":
        raise ArgumentError(f'deterministic_policy=True needs critic="q" and its gradient by actions, got {model.critic!r}')
    for name in ("critic_trace_lambda", "ent_coef", "use_sde"):
        if getattr(model, name):
            raise ArgumentError(
                f"{name} needs a stochastic policy, got {getattr(model, name)!r} with deterministic_policy=True"
            )


def _check_policy(model: Any) -> None:
    check_policy_class(model, ActorCriticPolicy)
    given = model.policy_class
    has = issubclass(given, QMlpPolicy), issubclass(given, DeterministicMlpPolicy)
    if has != (model.critic == "q", model.deterministic_policy):
        raise ArgumentError(
            f"critic and deterministic_policy must be what the policy was made for, got {model.critic!r} and "
            f"{model.deterministic_policy} with {given}"
        )
