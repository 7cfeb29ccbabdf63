"""Checks of spaces, policies and buffers, and of what goes together, beyond what the arguments' declarations say."""

import warnings
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.policies import BasePolicy

from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError, UnsupportedError


def check_environment(model: Any) -> None:
    """
    :raises ArgumentError: if there is none
    """
    if not hasattr(model, "action_space"):
        raise ArgumentError(f"env must be an environment or the id of one, got None for {type(model).__name__}")


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


def check_episodes_of_one(model: Any) -> None:
    """
    :raises ArgumentError: if an algorithm is to be trained after every so many episodes of several environments
    """
    pair = model.train_freq if isinstance(model.train_freq, tuple) else (model.train_freq, "step")
    if getattr(pair[1], "value", pair[1]) == "episode" and model.n_envs > 1:
        raise ArgumentError(f"train_freq={pair!r} counts episodes, which needs one environment, got n_envs={model.n_envs}")


def check_buffer(model: Any) -> None:
    """
    :param model: an off-policy algorithm
    :raises ArgumentError: if its replay buffer cannot tell truncation from termination
    :raises UnsupportedError: if it sums rewards that its replay buffer has not got
    """
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
