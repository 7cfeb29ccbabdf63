"""Joint transitions, and which sub-policy each agent acted by: the replay of every sub-policy in one piece of memory."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ac_ext.maddpg.buffer import JointReplayBuffer, JointTransitions

SUB_POLICIES = "agent_sub_policies"
"""Where a step's info has the number of each agent's sub-policy."""
Places = tuple[np.ndarray, np.ndarray]
"""``(B,)`` rows and ``(B,)`` environments."""


class EnsembleReplayBuffer(JointReplayBuffer):
    """
    `JointReplayBuffer` with a number of each agent in each row.

    D_i^(k) are the rows in which agent i acted by k. All share the ``buffer_size`` rows; a buffer for each would need K times
    the memory and, as a row is in one D_i^(k) for each i, hold K times as much.

    :param args: SB3's
    :param kwargs: SB3's
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sub_policies = np.full(self.agent_rewards.shape, -1, np.int32)
        """``(buffer_size, n_envs, N)``; -1 where nothing is yet."""
        self._counts: dict[tuple[int, int], int] = {}
        """Rows by agent and sub-policy."""

    def reset(self) -> None:
        """See SB3's ``BaseBuffer.reset``."""
        super().reset()
        self.sub_policies.fill(-1)
        self._counts.clear()

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
        See `JointReplayBuffer.add`.

        :raises ValueError: if infos do not say who acted
        """
        row = self.sub_policies[self.pos]
        try:
            now = np.stack([info[SUB_POLICIES] for info in infos])
        except KeyError as error:
            raise ValueError(f"infos must have {error} in an ensemble's replay buffer, got {list(infos[0])}") from None
        super().add(obs, next_obs, action, reward, done, infos)
        self._count(row, -1)
        row[:] = now
        self._count(row, 1)

    def _count(self, row: np.ndarray, step: int) -> None:
        for numbers in row.tolist():
            for place in enumerate(numbers):
                if place[1] >= 0:  # there was something
                    self._counts[place] = self._counts.get(place, 0) + step

    def number(self, agent: int, sub_policy: int) -> int:
        """
        :param agent: i
        :param sub_policy: k
        :return: rows of D_i^(k) that may be sampled
        """
        hidden = self.sub_policies[self.pos, :, agent] == sub_policy if self._lacks_a_row() else np.zeros(0)
        return self._counts.get((agent, sub_policy), 0) - int(hidden.sum())

    def _lacks_a_row(self) -> bool:
        """Whether the oldest row's observation is overwritten, which is the next one of the row before it."""
        return bool(self.optimize_memory_usage and self.full)

    def places(self, agent: int, sub_policy: int, batch_size: int) -> Places:
        """
        Uniform draws from D_i^(k), by numpy's global random numbers as SB3's.

        Rows of the whole buffer are drawn, and those of others left out: in the mean B times the buffer's rows over those of
        D_i^(k), which is K B where the numbers are even, and not more than the buffer's rows where D_i^(k) has B.

        :param agent: i
        :param sub_policy: k
        :param batch_size: B
        :return: the places
        :raises ValueError: if there is none
        """
        number = self.number(agent, sub_policy)
        if number == 0:
            raise ValueError(f"agent {agent} must have acted by sub-policy {sub_policy}, got no such transition")
        rarity = self.size() * self.n_envs / number
        rows, envs = np.zeros(0, int), np.zeros(0, int)
        while len(rows) < batch_size:
            more = self._any_places(math.ceil(1.1 * rarity * (batch_size - len(rows))) + 8)
            own = self.sub_policies[(*more, agent)] == sub_policy
            rows, envs = np.concatenate([rows, more[0][own]]), np.concatenate([envs, more[1][own]])
        return rows[:batch_size], envs[:batch_size]

    def _any_places(self, number: int) -> Places:
        if self._lacks_a_row():
            rows = (np.random.randint(1, self.buffer_size, number) + self.pos) % self.buffer_size  # noqa: NPY002 (SB3's stream)
        else:
            rows = np.random.randint(0, self.size(), number)  # noqa: NPY002 (the same)
        return rows, np.random.randint(0, self.n_envs, number)  # noqa: NPY002 (the same)

    def transitions(self, places: Places, sub_policies: np.ndarray, env: VecNormalize | None) -> JointTransitions:
        """
        :param places: B of them
        :param sub_policies: ``(B, N)`` which act in o' in the critics' targets
        :param env: normalises observations
        :return: the transitions that are there
        """
        return self._joint_samples(places, env)._replace(sub_policies=self.to_torch(sub_policies.astype(np.int64)))


def parts_of(batch: JointTransitions, teams: Sequence[Sequence[int]]) -> list[JointTransitions]:
    """
    :param batch: M B transitions
    :param teams: M of them
    :return: for each team its B transitions; of what belongs to single agents only theirs
    """

    def share(values: Any) -> Sequence[Any]:
        return values.chunk(len(teams)) if isinstance(values, th.Tensor) and values.dim() else [values] * len(teams)

    rows = [JointTransitions(*fields) for fields in zip(*map(share, batch), strict=True)]
    return [_of_agents(part, agents) for part, agents in zip(rows, teams, strict=True)]


def _of_agents(part: JointTransitions, agents: Sequence[int]) -> JointTransitions:
    def columns(values: th.Tensor) -> th.Tensor:
        return th.stack([values[:, agent] for agent in agents], dim=1)

    return part._replace(dones=columns(part.dones), rewards=columns(part.rewards), active=columns(part.active))
