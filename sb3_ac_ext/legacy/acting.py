"""`predict` by numpy where that gives the same as the policy."""

from typing import Any

import numpy as np

from sb3_ac_ext.legacy.updates import UpdateMixin


class ActingMixin(UpdateMixin):
    """An `UpdateMixin` that acts by numpy."""

    _numpy_actor: Any = None

    def _acting_obstacle(self) -> str | None:
        """Why numpy cannot act for the policy; None if it can."""
        raise NotImplementedError

    def _make_numpy_actor(self) -> Any:
        """What acts for a policy without obstacle: a function of observation and ``deterministic`` with an `is_current`."""
        raise NotImplementedError

    def _choose_actor(self) -> Any:
        """The numpy actor, or None; looks again only if something about the policy has changed."""
        if self._numpy_actor is None or self._numpy_actor.policy is not self.policy or not self._numpy_actor.is_current():
            obstacle = self._acting_obstacle() if self.engine else "engine=False"
            self._numpy_actor = self._make_numpy_actor() if obstacle is None else None
        return self._numpy_actor

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        The policy's action, see SB3's ``BaseAlgorithm.predict``; by numpy where that gives the same (`engine_report`).

        :param observation: ``(...)`` one observation or ``(N, ...)`` of them
        :param state: passed through
        :param episode_start: not used, policies are not recurrent
        :param deterministic: whether a stochastic policy gives its mode
        :return: action or ``(N, ...)`` actions in the environment's range, and ``state``
        """
        actor = self._choose_actor()
        action = None if actor is None else actor(observation, deterministic)
        return super().predict(observation, state, episode_start, deterministic) if action is None else (action, state)

    def engine_report(self) -> dict[str, str]:
        """See `UpdateMixin.engine_report`."""
        obstacle = self._acting_obstacle() if self.engine else "engine=False"
        report = super().engine_report()
        return {**report, "acting": "numpy" if obstacle is None else f"PyTorch: {obstacle}"}

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_numpy_actor"]
