"""What a policy sees of a screen."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from sb3_ac_ext.validation import UnsupportedError

SCREEN = (210, 160, 3)
"""Of an Atari game: rows, columns, colours."""
FIELD = slice(35, 195)
"""The rows of Pong that the ball can be in."""
BACKGROUND = (144, 109)
"""Red of Pong's two backgrounds; paddles and ball have others."""


class PongDifference(gym.ObservationWrapper[np.ndarray[Any, Any], Any, np.ndarray[Any, Any]]):
    """
    What has moved on Pong's screen since the last step (A. Karpathy, "Pong from Pixels", 2016).

    Every second pixel of the playing field, 1 where a paddle or the ball has come, -1 where it has left, 0 elsewhere and in
    an episode's first observation: ``(6400,)``.

    :param env: Pong, with screens as observations
    :raises UnsupportedError: if they have another shape
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        if env.observation_space.shape != SCREEN:
            raise UnsupportedError(
                f"PongDifference needs observations of shape {SCREEN} (obs_type='rgb'), got {env.observation_space}"
            )
        self.observation_space = spaces.Box(-1, 1, (6400,), dtype=np.int8)
        self._previous: np.ndarray[Any, Any] | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """See `gymnasium.Env.reset`."""
        self._previous = None
        return super().reset(seed=seed, options=options)

    def observation(self, observation: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """
        :param observation: ``(210, 160, 3)`` the screen, in [0, 255]
        :return: ``(6400,)`` in {-1, 0, 1}
        """
        red = observation[FIELD, :, 0][::2, ::2]
        current = (~np.isin(red, (0, *BACKGROUND))).astype(np.int8).reshape(-1)
        difference = np.zeros_like(current) if self._previous is None else current - self._previous
        self._previous = current
        return difference
