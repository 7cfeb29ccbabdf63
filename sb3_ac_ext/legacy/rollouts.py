"""What an on-policy update reads: a rollout as flat arrays, and minibatches of it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.buffers import BaseBuffer, RolloutBuffer

from sb3_ac_ext.legacy.actor_critic import ActorCritic
from sb3_ac_ext.legacy.returns import gae


class Samples(NamedTuple):
    """B samples of a rollout; arrays or tensors, as their `ActorCritic` takes them."""

    observations: Any
    """``(B, ...)`` s, or a dict of them."""
    actions: Any
    """``(B, A)`` a, as the distribution gave it."""
    values: Any
    """``(B,)`` V(s) when it was collected, in reward units."""
    log_probs: Any
    """``(B,)`` log pi(a|s) then, in nats."""
    advantages: Any
    """``(B,)`` A, in reward units."""
    returns: Any
    """``(B,)`` what V(s) shall be, in reward units."""
    described: Any = None
    """``(B, K)`` pi(.|s) then, see `ActorCritic.describe`; only where a divergence needs it."""

    def at(self, rows: Any) -> "Samples":
        """
        :param rows: indices, or a slice
        :return: these samples
        """
        return Samples(*(_rows(field, rows) for field in self))

    @property
    def size(self) -> int:
        """B"""
        return len(self.advantages)


def _rows(field: Any, rows: Any) -> Any:
    if isinstance(field, dict):
        return {name: value[rows] for name, value in field.items()}
    return None if field is None else field[rows]


def flattened(buffer: RolloutBuffer, length: int, kept: np.ndarray | None, actor_critic: ActorCritic) -> Samples:
    """
    :param buffer: full of T steps of N environments
    :param length: how many of the T steps count
    :param kept: ``(length, N)`` which samples count; None for all
    :param actor_critic: what they are for
    :return: the samples, those of one environment one after another, as SB3 has them
    """
    rows = _rows_of(kept)

    def flat(array: Any) -> Any:
        if isinstance(array, dict):
            return {name: flat(value) for name, value in array.items()}
        if not buffer.generator_ready:  # else get() was called, which does the same to the arrays
            array = BaseBuffer.swap_and_flatten(array[:length])
        return actor_critic.array(array[rows])

    actions = buffer.actions.astype(buffer.values.dtype, copy=False)  # PyTorch has no Bernoulli density of integers
    columns = (buffer.values, buffer.log_probs, buffer.advantages, buffer.returns)
    return Samples(flat(buffer.observations), flat(actions), *(flat(column).reshape(-1) for column in columns))


def column(values: np.ndarray, kept: np.ndarray | None) -> np.ndarray:
    """
    :param values: ``(T, N)`` a number for each step
    :param kept: ``(T, N)`` which samples count; None for all
    :return: ``(B,)`` in the order of `flattened`
    """
    flat: np.ndarray = values.swapaxes(0, 1).reshape(-1)[_rows_of(kept)]
    return flat


def _rows_of(kept: np.ndarray | None) -> Any:
    return slice(None) if kept is None else np.flatnonzero(kept.swapaxes(0, 1))


def minibatches(samples: Samples, size: int) -> Iterator[Samples]:
    """
    :param samples: of a rollout
    :param size: samples in a minibatch; the last one may have fewer
    :return: the samples in random order (numpy's generator, as with SB3)
    """
    order = np.random.permutation(samples.size)  # noqa: NPY002 (SB3 draws from the global one)
    for start in range(0, samples.size, size):
        yield samples.at(order[start : start + size])


def fill_estimates(buffer: RolloutBuffer, length: int, last_values: np.ndarray, dones: np.ndarray) -> None:
    """
    Advantages and returns of a buffer whose rewards hold the values behind truncated episodes.

    :param buffer: with rewards, values and episode starts; gets the estimates
    :param length: how many of its steps count
    :param last_values: ``(N,)`` V of the observations after the last step
    :param dones: ``(N,)`` whether the last step ended an episode
    """
    values = buffer.values[:length]
    next_values = np.concatenate([values[1:], last_values[None].astype(values.dtype)])
    ends = np.concatenate([buffer.episode_starts[1:length], dones[None].astype(values.dtype)])
    advantages = gae(buffer.rewards[:length], values, next_values, ends, np.zeros_like(ends), buffer.gamma, buffer.gae_lambda)
    buffer.advantages[:length] = advantages
    buffer.returns[:length] = advantages + values
