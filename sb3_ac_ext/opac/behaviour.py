"""What acts in training, b(a|s), and how likely it does what it does."""

import math
from typing import Any, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import PyTorchObs

from sb3_ac_ext.base.off_policy import OffPolicyMixin
from sb3_ac_ext.functional.importance import epsilon_mixture_log_prob, uniform_box_log_prob, uniform_choice_log_prob
from sb3_ac_ext.opac.networks import INSIDE, BoxActor
from sb3_ac_ext.validation import ArgumentError

Behaviour = Literal["policy", "uniform", "epsilon", "policy_noise"]


class BehaviourMixin(OffPolicyMixin, OffPolicyAlgorithm):
    """Goes before SB3's class: actions by ``behaviour``, and their log-probabilities where updates ask for them."""

    behaviour: Behaviour
    epsilon: float
    behaviour_noise: float
    policy: Any
    _log_probs: np.ndarray | None = None
    """``(N,)`` log b(a|s) of the actions taken last, if updates need it."""

    def _needs_log_probs(self) -> bool:
        raise NotImplementedError

    def _sample_action(self, learning_starts: int, action_noise: Any = None, n_envs: int = 1) -> tuple[np.ndarray, np.ndarray]:
        always_uniform = self.behaviour == "uniform"
        uniform = always_uniform or (self.warmup == "uniform" and self.num_timesteps < learning_starts)
        steps: Any = math.inf if always_uniform else learning_starts
        actions, stored = super()._sample_action(steps, action_noise, n_envs)
        if not uniform and self.behaviour in ("epsilon", "policy_noise"):
            stored = self._mixed(stored) if self.behaviour == "epsilon" else self._widened(stored)
            actions = self.policy.unscale_action(stored) if isinstance(self.action_space, spaces.Box) else stored
        self._log_probs = self._log_probs_of(stored, uniform) if self._needs_log_probs() else None
        return actions, stored

    def _mixed(self, actions: np.ndarray) -> np.ndarray:
        """``(N, ...)`` with probability epsilon uniform ones in their place."""
        uniform = np.array([self.action_space.sample() for _ in actions])
        if isinstance(self.action_space, spaces.Box):
            uniform = self.policy.scale_action(uniform)
        chosen = np.random.random(len(actions)) < self.epsilon  # noqa: NPY002 (SB3's stream)
        return np.where(chosen.reshape(-1, *[1] * (actions.ndim - 1)), uniform, actions).astype(actions.dtype)

    def _widened(self, actions: np.ndarray) -> np.ndarray:
        """``(N, ...)`` actions in [-1, 1] with more noise before their tanh."""
        noise = np.random.normal(0, self.behaviour_noise, actions.shape)  # noqa: NPY002 (SB3's stream)
        return np.tanh(np.arctanh(np.clip(actions, -INSIDE, INSIDE)) + noise).astype(actions.dtype)

    def _log_probs_of(self, actions: np.ndarray, uniform: bool) -> np.ndarray:
        """
        :param actions: ``(N, ...)`` that are about to be taken, Box actions scaled to [-1, 1]
        :param uniform: whether they are uniform draws
        :return: ``(N,)`` log b(a|s)
        :raises ArgumentError: if noise has moved them
        """
        if self.action_noise is not None:  # set on a model that was made without
            raise ArgumentError(f"action_noise must be None where log b(a|s) is needed, got {self.action_noise}")
        if uniform:
            return np.full(len(actions), self._uniform_log_prob(), np.float32)
        assert self._last_obs is not None
        flat = actions.reshape(len(actions), -1).astype(np.float32 if isinstance(self.action_space, spaces.Box) else np.int64)
        outputs = None
        if isinstance(self._last_obs, np.ndarray) and self.engine and self._acting_obstacle(self.policy) is None:
            outputs = self._engine.evaluate(self._behaviour_log_prob, (self._last_obs, flat))
        if outputs is not None:
            return outputs["log_probs"].flatten()
        obs, _ = self.policy.obs_to_tensor(self._last_obs)
        with th.no_grad():
            log_probs = self._behaviour_log_prob((obs, th.as_tensor(flat, device=self.device)))["log_probs"]
        return log_probs.flatten().cpu().numpy()

    def _behaviour_log_prob(self, batch: tuple[PyTorchObs, th.Tensor]) -> dict[str, th.Tensor]:
        observations, actions = batch
        if self.behaviour == "policy_noise":
            actor: BoxActor = self.policy.actor
            return {"log_probs": actor.widened_log_prob(actor(observations), actions, self.behaviour_noise)}
        log_probs = self.policy.log_prob(observations, actions)
        if self.behaviour == "epsilon":
            log_probs = epsilon_mixture_log_prob(log_probs, self._uniform_log_prob(), self.epsilon)
        return {"log_probs": log_probs}

    def _uniform_log_prob(self) -> float:
        space = self.action_space
        if isinstance(space, spaces.Discrete):
            return uniform_choice_log_prob([int(space.n)])
        return uniform_box_log_prob(math.prod(space.shape or ()))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_log_probs"]
