"""Checks of the arguments that the algorithms of a kind share."""

import warnings
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.policies import BasePolicy

from sb3_ac_ext.base.noise import NoiseSchedule, check_action_noise
from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError, UnsupportedError, check_choice, check_number, check_switch


def check_off_policy_arguments(model: Any) -> None:
    """
    :param model: an algorithm whose arguments and spaces are set; a ``train_freq`` list becomes a tuple
    :raises TypeError: if an argument has the wrong type
    :raises ValueError: if one is out of range or contradicts another
    :raises UnsupportedError: if the spaces or a combination of arguments cannot be served
    """
    if not hasattr(model, "action_space"):
        raise ArgumentError(f"env must be an environment or the id of one, got None for {type(model).__name__}")
    check_bounded_actions(model.action_space)
    for name in ("buffer_size", "batch_size", "n_steps"):
        check_number(name, getattr(model, name), low=1, integer=True)
    check_number("learning_starts", model.learning_starts, low=0)
    check_number("gradient_steps", model.gradient_steps, low=-1, integer=True)
    for name in ("tau", "gamma"):
        check_number(name, getattr(model, name), low=0, high=1)
    _check_train_freq(model)
    _check_buffer(model)
    _check_noise(model)


def check_on_policy_arguments(model: Any) -> None:
    """
    :param model: an algorithm whose arguments and spaces are set
    :raises TypeError: if an argument has the wrong type
    :raises ValueError: if one is out of range or contradicts another
    :raises UnsupportedError: if the action space or a combination of arguments cannot be served
    """
    if not hasattr(model, "action_space"):
        raise ArgumentError(f"env must be an environment or the id of one, got None for {type(model).__name__}")
    check_choices_from_zero(model.action_space)
    for name in ("n_steps", "rollout_episodes"):
        check_number(name, getattr(model, name), low=1, integer=True)
    for name in ("gamma", "gae_lambda"):
        check_number(name, getattr(model, name), low=0, high=1)
    check_number("ent_coef", model.ent_coef, low=0)
    check_number("vf_coef", model.vf_coef, low=0)
    check_number("sde_sample_freq", model.sde_sample_freq, low=-1, integer=True)
    for name in ("use_sde", "drop_unfinished_episodes"):
        check_switch(name, getattr(model, name))
    check_choice("rollout", model.rollout, ("steps", "episodes"))
    if model.rollout == "steps" and model.drop_unfinished_episodes:
        raise ArgumentError("drop_unfinished_episodes=True needs rollout='episodes', got rollout='steps'")
    if model.rollout == "episodes" and model.rollout_buffer_class not in (None, RolloutBuffer, DictRolloutBuffer):
        raise UnsupportedError(
            f"rollout='episodes' fills SB3's own buffers, got rollout_buffer_class={model.rollout_buffer_class}"
        )


def check_policy_class(model: Any, needed: type[BasePolicy]) -> None:
    """
    :param model: an algorithm whose policy class is set
    :param needed: the policy class that has what its updates need
    :raises TypeError: if the policy is not derived from it
    """
    given = model._translated_policy_class(model.policy_class)
    if not issubclass(given, needed):
        raise ArgumentTypeError(f"policy must be derived from {needed.__module__}.{needed.__qualname__}, got {given}")


def warn_of_endless_episodes(model: Any) -> None:
    """
    Where Gymnasium knows of no time limit nothing says that episodes end.

    :param model: an algorithm whose rollouts are of episodes, with an environment
    """
    if not all(model.env.env_is_wrapped(TimeLimit)):
        warnings.warn(
            f"rollout='episodes' waits for {model.rollout_episodes} episodes to end, and the environment has no time limit: "
            f"if its episodes can go on for ever, wrap it in gymnasium.wrappers.TimeLimit. A rollout ends after "
            f"n_steps={model.n_steps} steps of each environment in any case",
            stacklevel=2,
        )


def check_bounded_actions(space: spaces.Space[Any]) -> None:
    """
    :raises UnsupportedError: if actions in a Box cannot be scaled to [-1, 1]
    """
    if isinstance(space, spaces.Box):
        finite = np.all(np.isfinite([space.low, space.high]))
        if not (finite and np.all(space.low < space.high)):
            raise UnsupportedError(f"action_space must have finite bounds with low < high in every dimension, got {space}")


def check_choices_from_zero(space: spaces.Space[Any]) -> None:
    """
    :raises UnsupportedError: if choices are not counted from 0, as policies give them, or do not stand in one row
    """
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)) and np.any(space.start):
        raise UnsupportedError(
            f"action_space must count its choices from 0, got {space}; shift them with gymnasium.wrappers.TransformAction"
        )
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim > 1:
        raise UnsupportedError(f"action_space must have its choices in one row, got {space}; flatten it")


def check_float_actions(space: spaces.Space[Any]) -> None:
    """
    :raises UnsupportedError: if actions are integers, which a deterministic policy gradient cannot do with
    """
    if isinstance(space, spaces.Box) and not np.issubdtype(space.dtype, np.floating):
        raise UnsupportedError(f"action_space must be a Box of floats, got {space}")


def _check_train_freq(model: Any) -> None:
    if isinstance(model.train_freq, list):  # as YAML has it; SB3 wants tuples
        model.train_freq = tuple(model.train_freq)
    pair = model.train_freq if isinstance(model.train_freq, tuple) else (model.train_freq, "step")
    if len(pair) != 2:
        raise ArgumentError(f'train_freq must be a number of steps or a pair such as (2, "episode"), got {model.train_freq!r}')
    frequency, unit = pair[0], getattr(pair[1], "value", pair[1])
    check_number("train_freq", frequency, low=1, integer=True)
    check_choice("the unit of train_freq", unit, ("step", "episode"))
    if unit == "episode" and model.n_envs > 1:
        raise ArgumentError(f"train_freq={pair!r} counts episodes, which needs one environment, got n_envs={model.n_envs}")


def _check_buffer(model: Any) -> None:
    if model.n_steps > 1 and isinstance(model.observation_space, spaces.Dict):
        raise UnsupportedError(
            f"n_steps must be 1 for Dict observations (SB3 has no n-step buffer for them), got {model.n_steps}"
        )
    if model.n_steps > 1 and model.optimize_memory_usage:
        raise UnsupportedError(f"n_steps must be 1 with optimize_memory_usage=True, got {model.n_steps}")
    if model.optimize_memory_usage and (model.replay_buffer_kwargs or {}).get("handle_timeout_termination", True):
        raise ArgumentError(
            "optimize_memory_usage=True cannot tell truncation from termination: add "
            f"replay_buffer_kwargs={{'handle_timeout_termination': False}}, got {model.replay_buffer_kwargs!r}"
        )


def _check_noise(model: Any) -> None:
    check_choice("warmup", model.warmup, ("uniform", "noise"))
    if model.exploration_noise is not None:
        NoiseSchedule.parse(model.exploration_noise)
        return
    if model.warmup == "noise":
        raise ArgumentError("warmup='noise' needs exploration_noise, got exploration_noise=None")
    if model.action_noise is not None:
        check_action_noise(model.action_noise, model.action_space.shape)
