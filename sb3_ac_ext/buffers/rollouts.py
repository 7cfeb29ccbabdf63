"""What an on-policy update reads: a rollout as flat tensors, and minibatches of it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, RolloutBuffer

from sb3_ac_ext.functional.returns import gae


class Samples(NamedTuple):
    """B samples of a rollout."""

    observations: Any
    """``(B, ...)`` s, or a dict of them."""
    actions: th.Tensor
    """``(B, A)`` a, as the distribution gave it; ``(B,)`` of Discrete ones."""
    values: th.Tensor
    """``(B,)`` V(s) when it was collected, in reward units."""
    log_probs: th.Tensor
    """``(B,)`` log pi(a|s) then, in nats."""
    advantages: th.Tensor
    """``(B,)`` A, in reward units."""
    returns: th.Tensor
    """``(B,)`` what V(s) shall be, in reward units."""
    described: Any = None
    """``(B, K)`` pi(.|s) then, see `describe`; only where a divergence needs it."""

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


def copied(observations: Any) -> Any:
    """
    :param observations: an array, or a dict of them
    :return: the same in memory of its own
    """
    if isinstance(observations, dict):
        return {name: value.copy() for name, value in observations.items()}
    return observations.copy()


def flattened(buffer: RolloutBuffer, length: int, kept: np.ndarray | None = None) -> Samples:
    """
    :param buffer: full of T steps of N environments
    :param length: how many of the T steps count
    :param kept: ``(length, N)`` which samples count; None for all
    :return: the samples, those of one environment one after another, as SB3 has them
    """
    rows = slice(None) if kept is None else np.flatnonzero(kept.swapaxes(0, 1))

    def flat(array: Any) -> Any:
        if isinstance(array, dict):
            return {name: flat(value) for name, value in array.items()}
        if not buffer.generator_ready:  # else get() was called, which does the same to the arrays
            array = BaseBuffer.swap_and_flatten(array[:length])
        return buffer.to_torch(array[rows])

    actions = buffer.actions.astype(buffer.values.dtype, copy=False)  # PyTorch has no Bernoulli density of integers
    columns = (buffer.values, buffer.log_probs, buffer.advantages, buffer.returns)
    samples = Samples(flat(buffer.observations), flat(actions), *(flat(column).flatten() for column in columns))
    if isinstance(buffer.action_space, spaces.Discrete):
        return samples._replace(actions=samples.actions.long().flatten())
    return samples


def minibatches(samples: Samples, size: int) -> Iterator[Samples]:
    """
    :param samples: of a rollout
    :param size: samples in a minibatch; the last one may have fewer
    :return: the samples in random order (numpy's generator, as with SB3)
    """
    order = th.from_numpy(np.random.permutation(samples.size))  # noqa: NPY002 (SB3 draws from the global one)
    for start in range(0, samples.size, size):
        yield samples.at(order[start : start + size].to(samples.advantages.device))


def fill_estimates(buffer: RolloutBuffer, length: int, last_values: np.ndarray, dones: np.ndarray) -> None:
    """
    Advantages and returns of a buffer whose rewards hold the values behind truncated episodes.

    :param buffer: with rewards, values and episode starts; gets the estimates
    :param length: how many of its steps count
    :param last_values: ``(N,)`` V of the observations after the last step
    :param dones: ``(N,)`` whether the last step ended an episode
    """
    rewards, values = (th.from_numpy(array[:length]) for array in (buffer.rewards, buffer.values))
    following = (
        np.append(array[1:length], last[None], axis=0)
        for array, last in ((buffer.values, last_values), (buffer.episode_starts, dones))
    )
    next_values, ends = (th.from_numpy(array.astype(buffer.values.dtype)) for array in following)
    advantages = gae(rewards, values, next_values, ends, th.zeros_like(ends), buffer.gamma, buffer.gae_lambda)
    buffer.advantages[:length] = advantages.numpy()
    buffer.returns[:length] = (advantages + values).numpy()
