"""An actor that explores by noise, as off-policy algorithms do."""

from typing import Any, ClassVar

import cloudpickle
import numpy as np
import torch as th
from stable_baselines3.common.noise import VectorizedActionNoise
from stable_baselines3.common.vec_env import unwrap_vec_normalize

from sb3_ac_ext.actors.actor import Actor, Weights
from sb3_ac_ext.base.environment_checks import check_finite, check_transition
from sb3_ac_ext.buffers.segments import ORIGINAL_END, Segment
from sb3_ac_ext.validation import NonFiniteError


class Explorer(Actor):
    """
    Acts as SB3's off-policy algorithms do: uniformly at first, then by a deterministic policy with noise.

    Its segments have actions scaled to [-1, 1], as replay buffers do. The weights' settings say whether actions are "uniform",
    which "noise" is added (pickled, for one environment; None for none) and how it is scaled ("noise_factor"). Each
    environment has a noise process of its own, which is reset where an episode ends.
    """

    keeps_original: ClassVar[bool] = True
    _noise: tuple[bytes, VectorizedActionNoise] | None = None
    """As it was sent, and what was made of it."""

    def forget_noise(self) -> None:
        """Begin the noise anew, as after a reset."""
        self._noise = None

    def _act(self, weights: Weights) -> dict[str, np.ndarray]:
        if weights.settings["uniform"]:
            space = self.env.action_space if self.own else self.policy.action_space  # of which each actor has its own seed
            actions = self.policy.scale_action(np.stack([space.sample() for _ in range(self.env.num_envs)]))
        else:
            actions = self._policy_actions()
        if (noise := self._process(weights.settings["noise"])) is not None:
            actions = np.clip(actions + weights.settings["noise_factor"] * noise(), -1, 1)
        return {"actions": actions.astype(np.float32)}

    def _policy_actions(self) -> np.ndarray:
        actions = self._outputs()["actions"]
        if not np.isfinite(actions).all():
            check_finite("observation", self.observations, np.arange(self.env.num_envs))
            raise NonFiniteError("the policy's actions became non-finite; lower the learning rate, or set max_grad_norm")
        return actions

    def _sample(self, batch: tuple[Any]) -> dict[str, th.Tensor]:
        with self._lock:
            return {"actions": self.policy._predict(batch[0])}

    def _process(self, pickled: bytes | None) -> VectorizedActionNoise | None:
        if pickled is None:
            return None
        if self._noise is None or self._noise[0] != pickled:
            self._noise = pickled, VectorizedActionNoise(cloudpickle.loads(pickled), self.env.num_envs)
        return self._noise[1]

    def _environment_actions(self, actions: np.ndarray) -> np.ndarray:
        unscaled: np.ndarray = self.policy.unscale_action(actions)
        return unscaled

    def _step(self, actions: np.ndarray) -> Any:
        observations, rewards, dones, infos = super()._step(actions)
        ended = np.flatnonzero(dones)
        if self._noise is not None and len(ended):
            self._noise[1].reset(ended)
        if (normalizer := unwrap_vec_normalize(self.env)) is not None:
            for info in [infos[i] for i in ended if "terminal_observation" in infos[i]]:
                info[ORIGINAL_END] = normalizer.unnormalize_obs(info["terminal_observation"])  # by the statistics of this step
        return observations, rewards, dones, infos

    def _check(self, segment: Segment) -> None:
        """See `check_transition`: what is shown last, of a segment and of an episode, is stored before anything acts by it."""
        super()._check(segment)
        for rewards, dones, infos in zip(segment.rewards, segment.dones, segment.infos, strict=True):
            check_transition(self._acts_finitely, self.observations, rewards, dones, infos)

    def _acts_finitely(self, observations: Any) -> bool:
        with self._lock, th.no_grad():
            return bool(self.policy._predict(self.policy.obs_to_tensor(observations)[0]).isfinite().all())
