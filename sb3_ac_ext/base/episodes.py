"""Rollouts of whole episodes, as many of each environment."""

from typing import Any

import numpy as np
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_ac_ext.base.on_policy import OnPolicyMixin
from sb3_ac_ext.validation import ArgumentError


class EpisodesMixin(OnPolicyMixin):
    """
    With ``rollout="episodes"`` a rollout has the same number of whole episodes of each environment, whichever are short.

    Environments that have theirs go on unseen until the last one is done, and then all start anew. So no length of episode is
    favoured, at the price of steps that nothing is learned from.
    """

    rollout_limit = "max_rollout_steps"
    max_rollout_steps: int | None
    bootstrap_truncated: bool = False
    """Whether truncated episodes end with the value of their last observation."""

    @property
    def _share(self) -> int:
        """Episodes of each environment in a rollout."""
        return -(-int(self.rollout_episodes) // self.n_envs)

    @property
    def _whole_episodes(self) -> bool:
        return self.rollout == "episodes"

    def _check_time_limit(self) -> None:
        """Without a bound there may be no end to the first rollout; the buffer has room for the longest one."""
        assert self.env is not None
        limit = time_limit(self.env)
        if self.max_rollout_steps is None and limit is None:
            raise ArgumentError(
                "max_rollout_steps must be an integer >= 1 for an environment without a time limit, whose episodes may never "
                "end, got None; give it, or wrap the environment in gymnasium.wrappers.TimeLimit"
            )
        self.n_steps = self.max_rollout_steps or self._share * limit  # type: ignore[operator]  # one is there

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """See `OnPolicyMixin.collect_rollouts`; of episodes as many steps as the arguments ask for now."""
        if self._whole_episodes:
            self._check_time_limit()
            n_rollout_steps = self.n_steps
        return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)

    def _has_enough(self, finished: np.ndarray) -> bool:
        return bool(finished.min() >= self._share)

    def _finished(self, buffer: RolloutBuffer) -> np.ndarray:
        episode = np.cumsum(buffer.episode_starts[: self._rollout_length], axis=0)  # (T, N), from 1
        return super()._finished(buffer) & (episode <= self._share)

    def _bootstrapped(self, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        bootstraps = self.bootstrap_truncated or not self._whole_episodes
        return super()._bootstrapped(rewards, dones, infos) if bootstraps else rewards


def time_limit(env: VecEnv) -> int | None:
    """
    :param env: environments
    :return: the most steps of an episode; None if one of them has no ``gymnasium.wrappers.TimeLimit``
    """
    return max(env.get_attr("_max_episode_steps")) if env.has_attr("_max_episode_steps") else None
