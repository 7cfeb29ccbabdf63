"""What algorithms share that learn from every step as it is taken."""

from typing import Any, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_ac_ext.base.declarations import OnPolicyArguments
from sb3_ac_ext.base.environment_checks import check_rollout, locate_non_finite
from sb3_ac_ext.base.on_policy import OnPolicyMixin, within_bounds

ROLLOUT = 500
"""Steps between two looks at the learning rates, at whether everything is finite, and the log: what costs more than a step."""


class OnlineArguments(OnPolicyArguments):
    """What these algorithms take."""

    rollout: Literal["steps"]


class OnlineMixin(OnPolicyMixin):
    """
    Rollouts in which each step is learned from before the next one; goes before the SB3 class, as `OnPolicyMixin`.

    An algorithm says in `_learn_from` what a step teaches.
    """

    declarations = OnlineArguments

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
        :raises NonFiniteError: if a reward, an action, a loss or a parameter is NaN or infinite
        """
        left = int(-(-(self._total_timesteps - self.num_timesteps) // env.num_envs))
        length = min(n_rollout_steps, left) if left > 0 else n_rollout_steps
        with locate_non_finite(self, rollout_buffer), self._updates():
            return self._interact(env, callback, rollout_buffer, length)

    def train(self) -> None:
        """Nothing: what a step teaches was learned when it was taken."""

    def _interact(self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int) -> bool:
        self._keep(self._last_obs, self._last_episode_starts)
        self._set_training_mode(False)
        rollout_buffer.reset()
        if self.use_sde:
            self._reset_noise()
        callback.on_rollout_start()
        next_actions: np.ndarray | None = None
        values = log_probs = th.zeros(env.num_envs)  # gone as soon as they have been learned from
        for n_steps in range(n_rollout_steps):
            if self._noise_is_due(n_steps):
                self._reset_noise()
            obs_tensor = obs_as_tensor(self._last_obs, self.device)  # type: ignore[arg-type]  # for callbacks, as the others
            actions = self._forward(self._last_obs)[0] if next_actions is None else next_actions
            self._check_actions(actions)
            clipped_actions = within_bounds(self.policy, actions)
            new_obs, rewards, dones, infos = env.step(clipped_actions)
            dones = dones.astype(bool)  # a copy, of flags or numbers
            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
            obs, episode_starts = self._last_obs, self._last_episode_starts
            rollout_buffer.add(obs, actions, rewards, episode_starts, values, log_probs)  # type: ignore[arg-type]  # no tuples
            self._keep(new_obs, dones)
            last = n_steps + 1 == n_rollout_steps
            act = not last and not self._noise_is_due(n_steps + 1)
            next_actions = self._learn_from((obs, episode_starts, actions, rewards, new_obs, dones), infos, act)
        self._rollout_length = n_rollout_steps
        check_rollout(self, rollout_buffer, n_rollout_steps)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _check_actions(self, actions: np.ndarray) -> None:
        if isinstance(self.action_space, spaces.Box) and not np.isfinite(actions).all():
            self._check_finite({})  # which says where it comes from, if it is the parameters
            self._raise_unless_finite("policy", "actions", float("nan"))

    def _noise_is_due(self, n_steps: int) -> bool:
        """Whether gSDE draws its noise anew before a step of the rollout."""
        return self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0

    def _learn_from(self, seen: tuple[Any, ...], infos: list[dict[str, Any]], act: bool) -> np.ndarray | None:
        """
        Updates from a step of N environments.

        :param seen: ``(N, ...)`` each: s, whether an episode began there, a as the distribution gave it, r, what the
            environments show now (first observations of new episodes included), whether the step ended an episode
        :param infos: what the environments say of it
        :param act: whether the next actions may be drawn already
        :return: ``(N, ...)`` the next actions, if they have been drawn
        """
        raise NotImplementedError

    def _record_explained_variance(self) -> None:
        """Not there: a value is gone as soon as it has been learned from."""
