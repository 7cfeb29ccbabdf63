"""The linear variant in its algorithm: what a step of the environments teaches, with which rates."""

from typing import Any

import numpy as np
import torch as th

from sb3_ac_ext.base.environment_checks import check_finite
from sb3_ac_ext.base.on_policy import truncated
from sb3_ac_ext.opac.behaviour import BehaviourMixin
from sb3_ac_ext.opac.linear import LinearPolicy, Settings, Step, Traces, learn, traces_of

CORRECTION_RATE = 1e-4
"""Where ``correction_learning_rate`` is None: that of the author's program."""


class OnlineMixin(BehaviourMixin):
    """Goes before SB3's class: `_learn_from` a step, by traces that are saved with the model."""

    gamma: float
    trace_lambda: float
    actor_trace_gamma: bool
    actor_learning_rate: Any
    critic_learning_rate: Any
    correction_learning_rate: Any
    _traces: Traces | None = None

    def _learn_from(self, obs: Any, actions: Any, new_obs: Any, rewards: Any, dones: Any, infos: Any) -> None:
        """ "degris": the update from a step."""
        policy: LinearPolicy = self.policy
        next_obs, terminated = np.array(new_obs), np.array(dones, np.float32)
        for i, last in truncated(dones, infos):
            next_obs[i], terminated[i] = last, 0
        check_finite("observation", next_obs, np.arange(self.n_envs))
        numbers = rewards, terminated, self._last_episode_starts, self._log_probs
        r, d, started, log_probs = (th.as_tensor(values, device=self.device).to(policy.v) for values in numbers)
        s, a, next_s = (th.as_tensor(values, device=self.device) for values in (obs, actions, next_obs))
        step = Step(s, a.reshape(-1, 1), r, next_s, d, started, log_probs.reshape(-1, 1))
        self._traces = traces_of(policy, self.n_envs, self._traces)
        errors = learn(policy, self._traces, step, self._settings())
        self._n_updates += 1
        error = float(errors.abs().mean())
        self.logger.record_mean("train/critic_error", error)
        self._raise_unless_finite("critic", "error", error)

    def _settings(self) -> Settings:
        progress = self._current_progress_remaining
        given = {
            "actor": (self.actor_learning_rate, self.learning_rate),
            "critic": (self.critic_learning_rate, self.learning_rate),
            "correction": (self.correction_learning_rate, CORRECTION_RATE),
        }
        rates = {
            f"{name}_rate": self._schedule(name, default if rate is None else rate)(progress)
            for name, (rate, default) in given.items()
        }
        return Settings(self.gamma, self.trace_lambda, self.actor_trace_gamma, **rates)
