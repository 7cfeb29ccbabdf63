"""What algorithms share that learn from every step as it is taken."""

from typing import Any

import numpy as np
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from sb3_ac_ext.legacy.actor_critic import TorchActorCritic
from sb3_ac_ext.legacy.environment_checks import check_rollout, locate_non_finite
from sb3_ac_ext.legacy.on_policy import OnPolicyMixin
from sb3_ac_ext.validation import NonFiniteError

ROLLOUT = 500
"""Steps between two looks at the learning rates, at whether everything is finite, and the log: what costs more than a step."""


class OnlineMixin(OnPolicyMixin):
    """
    Rollouts in which each step is learned from before the next one; goes before the SB3 class, as `OnPolicyMixin`.

    An algorithm says in `_learn_from` what a step teaches.
    """

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """
        Steps with an update after each, not more than `learn` was asked for.

        :param env: the training environments
        :param callback: asked after every step, before the update
        :param rollout_buffer: gets observations, actions and rewards
        :param n_rollout_steps: steps of each environment
        :return: False if the callback stopped the training
        :raises NonFiniteError: if an environment gave NaN or infinite numbers, or a loss or a parameter became so
        """
        left = -(-(self._total_timesteps - self.num_timesteps) // env.num_envs)
        length = min(n_rollout_steps, left) if left > 0 else n_rollout_steps
        self._begin_updates()
        try:
            with locate_non_finite(self, rollout_buffer):
                continue_training = self._interact(env, callback, rollout_buffer, length)
        except NonFiniteError:
            raise
        except Exception:
            self._end_updates()  # if a network has become non-finite, this says so
            raise
        check_rollout(self, rollout_buffer)
        self._end_updates()
        return continue_training

    def train(self) -> None:
        """Nothing: what a step teaches was learned when it was taken."""

    def _interact(self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int) -> bool:
        rollout_buffer.reset()
        if self.use_sde:
            self.policy.reset_noise(env.num_envs)
        callback.on_rollout_start()
        next_actions = obs_tensor = values = log_probs = None  # the last three are SB3's names, where callbacks look
        for n_steps in range(n_rollout_steps):
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self.policy.reset_noise(env.num_envs)
            if self._actor_critic() is not self._learner:  # a callback has changed the policy
                self._begin_updates()
            actions = self._act(self._last_obs) if next_actions is None else next_actions
            clipped_actions = self._within_bounds(actions)
            new_obs, rewards, dones, infos = env.step(clipped_actions)
            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
            self._store(rollout_buffer, n_steps, actions, rewards)
            next_actions = self._learn_from(actions, rewards, new_obs, dones, infos)
            self._last_obs, self._last_episode_starts = new_obs, dones  # type: ignore[assignment]  # no tuples
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    @np.errstate(over="ignore", invalid="ignore")  # the check says more
    def _act(self, obs: Any) -> np.ndarray:
        """``(N, ...)`` actions as the distribution gives them."""
        self._set_training(False)
        actions = self._learner.act(obs)
        if not np.isfinite(actions).all():
            raise FloatingPointError("an action is NaN or infinite")
        return actions

    def _set_training(self, mode: bool) -> None:
        """Layers may differ between acting and training, but numpy knows none of that kind."""
        if isinstance(self._learner, TorchActorCritic):
            self.policy.set_training_mode(mode)

    def _learn_from(
        self, actions: np.ndarray, rewards: np.ndarray, new_obs: Any, dones: np.ndarray, infos: list[dict[str, Any]]
    ) -> np.ndarray | None:
        """
        Updates from the step that began at ``_last_obs``.

        :param actions: ``(N, ...)`` as `_act` gave them
        :param rewards: ``(N,)`` r
        :param new_obs: ``(N, ...)`` what the environments show now, new episodes' first observations included
        :param dones: ``(N,)`` whether the step ended the episode
        :param infos: what the environments say of it
        :return: ``(N, ...)`` the next actions, if the update has drawn them
        """
        raise NotImplementedError

    def engine_report(self) -> dict[str, str]:
        """See `UpdateMixin.engine_report`."""
        return {**super().engine_report(), "rollout": "a step at a time"}

    def _record_explained_variance(self) -> None:
        """Not there: a value is gone as soon as it has been learned from."""
