"""Replay buffers that know how likely the actions were when they were taken."""

from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.vec_env import VecNormalize

LOG_PROB = "behaviour_log_prob"
"""Where a step's info has it."""


class BehaviourSamples(NamedTuple):
    """A batch of B transitions, as SB3's replay buffers sample it, with log b(a|s)."""

    observations: PyTorchObs
    actions: th.Tensor
    next_observations: PyTorchObs
    dones: th.Tensor
    rewards: th.Tensor
    discounts: th.Tensor | None
    log_probs: th.Tensor
    """``(B, 1)`` log b(a|s) of what really acted, in nats; Box actions are scaled to [-1, 1]."""


class StoresLogProbs(ReplayBuffer):
    """
    Goes before a replay buffer of SB3's; takes log b(a|s) from the infos.

    :param args: SB3's
    :param kwargs: SB3's
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log_probs = np.zeros((self.buffer_size, self.n_envs), np.float32)

    def add(self, obs: Any, next_obs: Any, action: Any, reward: Any, done: Any, infos: list[dict[str, Any]]) -> None:
        """
        See SB3's ``ReplayBuffer.add``.

        :raises ValueError: if the infos lack the log-probability
        """
        if not all(LOG_PROB in info for info in infos):
            raise ValueError(f"infos must have {LOG_PROB}, the logarithm of b(a|s), got {infos}")
        self.log_probs[self.pos] = [info[LOG_PROB] for info in infos]
        super().add(obs, next_obs, action, reward, done, infos)

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> BehaviourSamples:  # type: ignore[override]
        places = batch_inds, np.random.randint(0, high=self.n_envs, size=len(batch_inds))  # noqa: NPY002 (SB3's stream)
        if self.optimize_memory_usage:
            next_observations: Any = self.observations[(batch_inds + 1) % self.buffer_size, places[1]]
        else:
            next_observations = _at(places, self.next_observations)
        dones = self.dones[places] * (1 - self.timeouts[places])
        return BehaviourSamples(
            self._tensors(self._normalize_obs(_at(places, self.observations), env)),
            self.to_torch(self.actions[places]),
            self._tensors(self._normalize_obs(next_observations, env)),
            self.to_torch(dones[:, None]),
            self.to_torch(self._normalize_reward(self.rewards[places][:, None], env)),
            None,
            self.to_torch(self.log_probs[places][:, None]),
        )

    def _tensors(self, values: Any) -> Any:
        if isinstance(values, dict):
            return {name: self.to_torch(value) for name, value in values.items()}
        return self.to_torch(values)


def _at(places: tuple[np.ndarray, np.ndarray], values: Any) -> Any:
    """Of arrays, or a dict of them, what is there."""
    return {name: value[places] for name, value in values.items()} if isinstance(values, dict) else values[places]


class BehaviourReplayBuffer(StoresLogProbs, ReplayBuffer):
    """SB3's replay buffer with log b(a|s)."""


class DictBehaviourReplayBuffer(StoresLogProbs, DictReplayBuffer):  # type: ignore[misc]  # what is sampled
    """SB3's replay buffer for Dict observations with log b(a|s)."""
