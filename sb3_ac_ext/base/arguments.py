"""Checks of spaces, policies and buffers, and of what goes together, beyond what the arguments' declarations say."""

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.policies import BasePolicy

from sb3_ac_ext.buffers.prioritized import PrioritizedReplayBuffer
from sb3_ac_ext.signatures import arguments_of, takes_anything
from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError, UnsupportedError, check, check_keys, shown

MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
"""Bytes that this machine has, where it says so."""
PACKAGE = __name__.partition(".")[0]
POLICY_GETS = frozenset({"observation_space", "action_space", "lr_schedule"})
BUFFER_GETS = frozenset(
    {"buffer_size", "observation_space", "action_space", "device", "n_envs", "optimize_memory_usage", "env"}
)
ROLLOUTS_GET = BUFFER_GETS | {"gamma", "gae_lambda"}
"""What an algorithm hands on to a policy or buffer itself."""


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
    if not issubclass(model.policy_class, needed):
        name = f"{needed.__module__}.{needed.__qualname__}"
        raise ArgumentTypeError(f"policy must be derived from {name}, got {model.policy_class}")


def check_kwargs(name: str, kwargs: Mapping[str, Any] | None, cls: type, given: frozenset[str]) -> None:
    """
    :param name: the argument that holds them
    :param kwargs: keyword arguments for another constructor
    :param cls: whose; what ours declare of their values is checked too
    :param given: what it gets from the algorithm
    :raises TypeError: for a key that it does not take, or a value of the wrong type
    :raises ValueError: if a value is out of range
    """
    arguments = arguments_of(cls)
    if not takes_anything(cls):
        check_keys(name, kwargs or {}, arguments.keys() - given, kind="key")
    for key, value in (kwargs or {}).items():
        if key in arguments and arguments[key].owner.__module__.partition(".")[0] == PACKAGE:
            check(f"{name}[{key!r}]", value, arguments[key].annotation)


def check_batch_fits(model: Any) -> None:
    """
    :raises ArgumentError: if a batch of transitions is larger than this machine's memory
    """
    numbers = 2 * spaces.flatdim(model.observation_space) + spaces.flatdim(model.action_space)
    if 4 * numbers * int(model.batch_size) > MEMORY:
        raise ArgumentError(f"batch_size must be an integer >= 1 whose batch fits into memory, got {model.batch_size}")
    if 8 * int(model.batch_size) * int(model.n_steps) > MEMORY:  # where each of its rewards is in the buffer
        raise ArgumentError(
            f"n_steps must be an integer >= 1 whose batch fits into memory, got n_steps={model.n_steps} with "
            f"batch_size={model.batch_size}"
        )


@contextmanager
def made_with(what: str, **arguments: Any) -> Iterator[None]:
    """
    Name the arguments that something of SB3's is made with where it cannot be made.

    :param what: is made
    :param arguments: by their names
    :raises ArgumentError: for whatever error there was, but for ours and for assertions
    """
    try:
        yield
    except (ArgumentError, AssertionError):
        raise
    except Exception as error:
        given = ", ".join(f"{name}={shown(value)}" for name, value in arguments.items())
        kind = ArgumentTypeError if isinstance(error, TypeError | AttributeError) else ArgumentError
        raise kind(f"{what} cannot be made, got {given}: {type(error).__name__}: {error}") from error


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


def check_buffer(model: Any, kind: type[ReplayBuffer]) -> None:
    """
    :param model: an off-policy algorithm
    :param kind: the class of its replay buffer
    :raises ArgumentError: if its replay buffer cannot tell truncation from termination, or is too small
    :raises UnsupportedError: if it sums rewards that its replay buffer has not got, or the buffer is not for its observations
    """
    if model.n_steps > 1 and model.optimize_memory_usage:
        raise UnsupportedError(f"n_steps must be 1 with optimize_memory_usage=True, got {model.n_steps}")
    if model.optimize_memory_usage and (model.replay_buffer_kwargs or {}).get("handle_timeout_termination", True):
        raise ArgumentError(
            "optimize_memory_usage=True cannot tell truncation from termination: add "
            f"replay_buffer_kwargs={{'handle_timeout_termination': False}}, got {model.replay_buffer_kwargs!r}"
        )
    if model.buffer_size < model.n_steps * model.stored_envs:
        product = "n_steps * n_envs" + ("" if model.stored_envs == model.n_envs else " * n_actors")
        raise ArgumentError(
            f"buffer_size must be at least {product} = {model.n_steps * model.stored_envs}, got {model.buffer_size}"
        )
    of_dicts = isinstance(model.observation_space, spaces.Dict)
    if issubclass(kind, DictReplayBuffer) and not of_dicts:
        raise UnsupportedError(f"replay_buffer_class={kind.__name__} is for Dict observations, got {model.observation_space}")
    if kind in (ReplayBuffer, NStepReplayBuffer, PrioritizedReplayBuffer) and of_dicts:
        raise UnsupportedError(
            f"replay_buffer_class={kind.__name__} is not for Dict observations, got {model.observation_space}: take "
            f"{kind.__name__.replace('NStep', '').replace('Replay', 'DictReplay')}"
        )
    steps = arguments_of(kind).get("n_steps")
    if steps is None and model.n_steps > 1 and kind is DictReplayBuffer:
        raise UnsupportedError(
            f"n_steps must be 1 for Dict observations (SB3 has no n-step buffer for them), got {model.n_steps}"
        )
    if steps is None and model.n_steps > 1:
        raise UnsupportedError(f"replay_buffer_class={kind.__name__} sums no rewards: n_steps must be 1, got {model.n_steps}")
