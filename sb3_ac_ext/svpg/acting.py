"""Which particle acts, or all of them together."""

from typing import Any, ClassVar, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy

from sb3_ac_ext.base.on_policy import OnPolicyMixin
from sb3_ac_ext.svpg.policies import Particles
from sb3_ac_ext.validation import ArgumentError, UnsupportedError, check

Ensemble = Literal["vote", "mean"]


class ActingMixin(OnPolicyMixin):
    """`predict` by one of the particles of ``self.policy``, or by all."""

    policy: Particles  # type: ignore[assignment]  # which is no actor-critic policy itself
    ensembles: ClassVar[dict[str, type[spaces.Space[Any]] | tuple[type[spaces.Space[Any]], ...]]] = {
        "vote": (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        "mean": spaces.Box,
    }
    """How actions are put together, and of which kind they must be."""

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        *,
        particle: int | None = None,
        ensemble: Ensemble | None = None,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Actions of one particle, or of all of them; see SB3's ``BaseAlgorithm.predict``.

        :param observation: ``(...)`` one observation or ``(N, ...)`` of them
        :param state: passed through
        :param episode_start: not used, policies are not recurrent
        :param deterministic: whether a policy gives its mode
        :param particle: which one acts, from 0; None for the best by the returns of its last training episodes
        :param ensemble: "vote" for the choice that most particles make (of equals that of the lowest number), "mean" for the
            mean of their actions in a Box
        :return: action or ``(N, ...)`` actions in the environment's range, and ``state``
        :raises TypeError: if ``particle`` is no integer
        :raises ValueError: if there is no such particle, for both a particle and an ensemble, and where SB3 raises it
        :raises UnsupportedError: for a vote on numbers or a mean of choices
        """
        if ensemble is None:
            return self._actions_of(self._number(particle), observation, state, episode_start, deterministic), state
        self._check_ensemble(particle, ensemble)
        every = range(len(self.policy))
        actions = np.stack([self._actions_of(i, observation, state, episode_start, deterministic) for i in every])
        together = actions.mean(axis=0) if ensemble == "mean" else most_frequent(actions)
        return np.asarray(together, actions.dtype), state  # of one number NumPy's mean is no array

    def _number(self, particle: Any) -> int:
        if particle is None:
            return int(self.policy.best)
        check("particle", particle, int)
        if not 0 <= particle < len(self.policy):
            raise ArgumentError(f"particle must be an integer in [0, {len(self.policy) - 1}], got {particle}")
        return int(particle)

    def _check_ensemble(self, particle: Any, ensemble: Any) -> None:
        check("ensemble", ensemble, Ensemble)
        if particle is not None:
            raise ArgumentError(f"particle and ensemble exclude each other, got {particle} and {ensemble!r}")
        if not isinstance(self.action_space, self.ensembles[ensemble]):
            other = next(name for name in self.ensembles if name != ensemble)
            raise UnsupportedError(f"ensemble must be {other!r} for actions in {self.action_space}, got {ensemble!r}")

    def _actions_of(self, particle: int, observation: Any, state: Any, episode_start: Any, deterministic: bool) -> np.ndarray:
        policy = self.policy.particles[particle]
        actions = self._replayed_actions(policy, observation, deterministic, particle)
        if actions is None:
            with self._acting_lock:
                actions, _ = policy.predict(observation, state, episode_start, deterministic)
        return actions

    def _act(self, batch: tuple[th.Tensor], deterministic: bool, particle: int) -> dict[str, th.Tensor]:  # type: ignore[override]
        with self._acting_lock:
            return {"actions": self.policy.particles[particle]._predict(batch[0], deterministic)}

    def _acting_obstacle(self, policy: BasePolicy) -> str | None:
        return super()._acting_obstacle(policy.best_particle if isinstance(policy, Particles) else policy)


def most_frequent(choices: np.ndarray) -> np.ndarray:
    """
    :param choices: ``(n, ...)`` integers of n voters
    :return: ``(...)`` at each place the one that most have given, of equals that of the lowest number
    """
    votes = np.stack([(choices == choice).sum(axis=0) for choice in np.unique(choices)])
    winners: np.ndarray = np.unique(choices)[votes.argmax(axis=0)]
    return winners
