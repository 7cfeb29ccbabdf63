"""What an off-policy update reads: a batch of transitions, straight from the arrays of SB3's replay buffer."""

from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import PyTorchObs


class Transitions(NamedTuple):
    """A batch of B transitions, as SB3's replay buffers sample it but with the discounts always there."""

    observations: PyTorchObs
    """``(B, ...)`` s, or a dict of them."""
    actions: th.Tensor
    """``(B, A)`` a, in the space scaled to [-1, 1]."""
    next_observations: PyTorchObs
    """``(B, ...)`` s' (with n-step returns n steps later), the episode's last observation where it ended."""
    dones: th.Tensor
    """``(B, 1)`` 1 where the episode terminated, 0 where it goes on or was truncated."""
    rewards: th.Tensor
    """``(B, 1)`` r, or the discounted sum of n of them."""
    discounts: th.Tensor
    """``()`` gamma, or ``(B, 1)`` gamma to the number of summed rewards."""
    weights: th.Tensor | None = None
    """``(B, 1)`` of the critic's errors, if a prioritised buffer gives some."""
    indices: np.ndarray | None = None
    """``(B,)`` where the transitions are in that buffer."""
    versions: np.ndarray | None = None
    """``(B,)`` how often these places had been written to."""
    log_probs: th.Tensor | None = None
    """``(B, 1)`` of the actions when they were taken, if the buffer stores them."""


def obstacle(buffer: ReplayBuffer | type[ReplayBuffer] | None, normalizer: Any) -> str | None:
    """
    :param buffer: the buffer, or the class that it will have
    :param normalizer: the environment that normalises what is sampled, or None
    :return: why batches have to come from the buffer's own ``sample``; None if a `Sampler` may read its arrays
    """
    kind = buffer if isinstance(buffer, type) else type(buffer)
    if kind is not ReplayBuffer:
        return f"the buffer is a {kind.__name__}"
    if not isinstance(buffer, type) and not {"sample", "_get_samples", "to_torch"}.isdisjoint(vars(buffer)):
        return "a method of the buffer was replaced"
    if normalizer is not None:
        return "VecNormalize normalises each batch"
    return "optimize_memory_usage=True" if getattr(buffer, "optimize_memory_usage", False) else None


class Sampler:
    """
    What ``ReplayBuffer.sample`` returns, from the same random numbers, in a fifth of the time: one gather an array.

    :param buffer: SB3's own buffer, with a next observation for each
    :param batch_size: B
    """

    def __init__(self, buffer: ReplayBuffer, batch_size: int) -> None:
        def memory(array: np.ndarray, shape: tuple[int, ...]) -> th.Tensor:
            return th.from_numpy(np.empty((batch_size, *shape), array.dtype))

        self._tensors = (
            memory(buffer.observations, buffer.obs_shape),
            memory(buffer.actions, (buffer.action_dim,)),
            memory(buffer.next_observations, buffer.obs_shape),
            memory(buffer.dones, (1,)),
            memory(buffer.rewards, (1,)),
        )
        self._truncated = memory(buffer.timeouts, (1,))

    def __call__(self, buffer: ReplayBuffer, discounts: th.Tensor) -> Transitions:
        """
        :param buffer: a buffer for the same spaces
        :param discounts: ``()`` gamma
        :return: transitions from it, dones without truncations; on a CPU always in the same memory
        """
        size = len(self._truncated)
        rows = np.random.randint(0, buffer.size(), size=size)  # noqa: NPY002 (SB3's stream)
        rows = rows * buffer.n_envs + np.random.randint(0, high=buffer.n_envs, size=size)  # noqa: NPY002 (the same)

        def gather(array: np.ndarray, memory: th.Tensor) -> np.ndarray:
            # from a view, as (steps, environments, ...) is contiguous; "raise" would go through other memory
            return array.reshape(-1, *memory.shape[1:]).take(rows, axis=0, out=memory.numpy(), mode="clip")

        observations, actions, next_observations, dones, rewards = self._tensors
        gather(buffer.observations, observations)
        gather(buffer.actions, actions)
        gather(buffer.next_observations, next_observations)
        terminated = gather(buffer.dones, dones)
        terminated *= 1 - gather(buffer.timeouts, self._truncated)
        gather(buffer.rewards, rewards)
        if buffer.device.type != "cpu":
            observations, actions, next_observations, dones, rewards = (part.to(buffer.device) for part in self._tensors)
        return Transitions(observations, actions, next_observations, dones, rewards, discounts)
