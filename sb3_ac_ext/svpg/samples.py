"""What an update reads: the rollout, shared out to the particles."""

from typing import Any, NamedTuple

import numpy as np
import torch as th

from sb3_ac_ext.functional.surrogates import normalized


class ParticleSamples(NamedTuple):
    """B samples of each of n particles."""

    observations: Any
    """``(n B, ...)`` those of one particle after another"""
    actions: th.Tensor
    """``(n B, A)`` as the distributions gave them; ``(n B,)`` of Discrete ones"""
    log_probs: th.Tensor
    """``(n, B)`` log pi_i(a|s) when they were collected, in nats"""
    advantages: th.Tensor
    """``(n, B)`` A, in reward units, or standardised"""
    returns: th.Tensor
    """``(n, B)`` R, in reward units"""
    weights: th.Tensor | None
    """``(n, B)`` 1 where there is a sample, 0 where a particle has fewer than another; None for ones"""
    temperature: th.Tensor
    """``()`` T"""
    clip_range: th.Tensor | None
    """``()`` c of PPO's ratios; None without"""

    def mean(self, values: th.Tensor) -> th.Tensor:
        """``(n,)`` each particle's mean of ``(n, B)``."""
        if self.weights is None:
            return values.mean(dim=1)
        return (self.weights * values).sum(dim=1) / self.weights.sum(dim=1)


def whose(kept: np.ndarray | None, length: int, n_envs: int, n: int) -> tuple[np.ndarray, np.ndarray | None]:
    """
    :param kept: ``(T, N)`` which samples of a rollout count; None for all
    :param length: T, its steps
    :param n_envs: N, its environments, those of one particle after another
    :param n: number of particles
    :return: ``(n, B)`` the places of each particle's samples among those that count, and whether it has so many; None if all
        have as many
    :raises ValueError: if a particle has none
    """
    if kept is None:
        return np.arange(length * n_envs).reshape(n, -1), None
    counts = kept.sum(axis=0).reshape(n, -1).sum(axis=1)
    if not counts.all():
        raise ValueError(
            f"no episode of particle {int(counts.argmin())} ended within max_rollout_steps={length} steps of each "
            "environment, and unfinished ones are dropped: raise max_rollout_steps, or limit the episodes with "
            "gymnasium.wrappers.TimeLimit"
        )
    column, starts = np.arange(counts.max()), np.cumsum(counts) - counts
    there = column < counts[:, None]
    return starts[:, None] + np.where(there, column, 0), None if there.all() else there


def normalized_parts(advantages: th.Tensor, lengths: np.ndarray) -> th.Tensor:
    """
    :param advantages: ``(n, B)``
    :param lengths: ``(n,)`` how many of each particle's count
    :return: ``(n, B)`` those that count with mean 0 and standard deviation 1 in each row, 0 behind them
    """
    parts = [normalized(own[:length]) for own, length in zip(advantages, lengths.tolist(), strict=True)]
    return th.nn.utils.rnn.pad_sequence(parts, batch_first=True)
