"""Joint transitions: what all agents saw and did, and what each got."""

from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ac_ext.buffers.prioritized import PrioritizedReplayBuffer
from sb3_ac_ext.envs.joint_spaces import JointBox

REWARDS, TERMINATED, ACTIVE = "agent_rewards", "agent_terminated", "agent_active"
"""Where a step's info has them, see `JointEnv`."""


class JointTransitions(NamedTuple):
    """A batch of B transitions of N agents; each row is one step of one environment for all of them."""

    observations: th.Tensor
    """``(B, ...)`` o of all agents."""
    actions: th.Tensor
    """``(B, A)`` a of all agents: Box actions scaled to [-1, 1], Discrete ones as one-hots."""
    next_observations: th.Tensor
    """``(B, ...)`` o' of all agents, the episode's last one where it ended."""
    dones: th.Tensor
    """``(B, N)`` 1 where the step terminated the agent's episode, 0 where it goes on or was truncated."""
    rewards: th.Tensor
    """``(B, N)`` r of each agent."""
    active: th.Tensor
    """``(B, N)`` 1 where the agent acted, 0 where its episode was over already."""
    discounts: th.Tensor | None = None
    """``()`` gamma, which the algorithm adds to what the buffer samples."""
    weights: th.Tensor | None = None
    """``(B, 1)`` of the squared errors, if a prioritised buffer gives some."""
    indices: np.ndarray | None = None
    """``(B,)`` where the transitions are in that buffer."""
    versions: np.ndarray | None = None
    """``(B,)`` how often these places had been written to."""
    sub_policies: th.Tensor | None = None
    """``(B, N)`` of an ensemble: which sub-policy of each agent acts in o' in the critics' targets."""


class JointReplayBuffer(ReplayBuffer):
    """
    SB3's replay buffer with rewards and ends of each agent, which it takes from the infos of a `JointEnv`.

    Of an ordinary environment, the environment's are those of the only agent.

    :param args: SB3's
    :param kwargs: SB3's
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.joint = isinstance(self.action_space, JointBox)
        agents = len(self.action_space.parts) if isinstance(self.action_space, JointBox) else 1
        shape = (self.buffer_size, self.n_envs, agents)
        self.agent_rewards, self.agent_terminated = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.agent_active = np.zeros(shape, np.float32)

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """
        See SB3's ``ReplayBuffer.add``.

        :raises ValueError: if infos of a joint environment lack what belongs to single agents
        """
        row = self.pos
        super().add(obs, next_obs, action, reward, done, infos)
        if self.joint:
            try:
                self.agent_rewards[row] = [info[REWARDS] for info in infos]
                self.agent_terminated[row] = [info[TERMINATED] for info in infos]
                self.agent_active[row] = [info[ACTIVE] for info in infos]
            except KeyError as error:
                raise ValueError(f"a wrapper must leave {error} in the info of a JointEnv, got {list(infos[0])}") from None
        else:
            self.agent_rewards[row, :, 0] = self.rewards[row]
            self.agent_terminated[row, :, 0] = self.dones[row] * (1 - self.timeouts[row])
            self.agent_active[row] = 1

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> JointTransitions:  # type: ignore[override]
        envs = np.random.randint(0, high=self.n_envs, size=(len(batch_inds),))  # noqa: NPY002 (SB3's stream)
        return self._joint_samples((batch_inds, envs), env)

    def latest(self, transitions: int, env: VecNormalize | None = None) -> JointTransitions:
        """
        The newest transitions of all environments, in the order of time, in batches of one size: while there are fewer, the
        first ones are of no agent.

        :param transitions: how many, rounded up to those of whole steps, and not more than there is room for
        :param env: normalises observations and rewards
        :return: them, those of one step one after another
        """
        room = self.buffer_size - self.optimize_memory_usage  # where the next observation is, an older one was
        steps = min(-(-transitions // self.n_envs), room)
        ages, envs = np.arange(steps)[::-1].repeat(self.n_envs), np.tile(np.arange(self.n_envs), steps)
        batch = self._joint_samples(((self.pos - 1 - ages) % self.buffer_size, envs), env)
        stored = ages < (self.buffer_size if self.full else self.pos)
        return batch._replace(active=batch.active * self.to_torch(stored[:, None].astype(np.float32)))

    def _joint_samples(self, places: tuple[np.ndarray, np.ndarray], env: VecNormalize | None) -> JointTransitions:
        """
        :param places: ``(B,)`` rows and ``(B,)`` environments
        :param env: normalises observations and rewards
        :return: the transitions that are there
        """
        if self.optimize_memory_usage:
            next_observations = self.observations[(places[0] + 1) % self.buffer_size, places[1]]
        else:
            next_observations = self.next_observations[places]
        rewards = self.agent_rewards[places]
        data = (
            self._normalize_obs(self.observations[places], env),
            self.actions[places],
            self._normalize_obs(next_observations, env),
            self.agent_terminated[places],
            rewards if self.joint else self._normalize_reward(rewards, env),
            self.agent_active[places],
        )
        return JointTransitions(*map(self.to_torch, data))  # type: ignore[arg-type]  # the first ones


class PrioritizedJointReplayBuffer(PrioritizedReplayBuffer, JointReplayBuffer):  # type: ignore[misc]  # what is sampled
    """`JointReplayBuffer` with priorities, which all agents share: the mean of their errors; for ``n_steps=1``."""

    def _samples(self, indices: np.ndarray, env: VecNormalize | None) -> JointTransitions:  # type: ignore[override]
        weights, indices, versions = self._origin(indices)
        batch = self._joint_samples(np.divmod(indices, self.n_envs), env)
        return batch._replace(weights=weights, indices=indices, versions=versions)
