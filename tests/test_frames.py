"""What a policy sees of Pong, on screens drawn here."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from sb3_ac_ext.envs.frames import PongDifference
from sb3_ac_ext.validation import UnsupportedError

BALL = 236
PADDLE = 92


class Screens(gym.Env):
    """A ball of one kept pixel that goes right by two pixels a step, with a score above the field."""

    observation_space = spaces.Box(0, 255, (210, 160, 3), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self.screen(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        return self.screen(), 0.0, False, False, {}

    def screen(self) -> np.ndarray:
        screen = np.full((210, 160, 3), (144, 72, 17), np.uint8)
        screen[100:] = (109, 118, 43)
        screen[35:45, :] = 0
        screen[:35] = self.t % 256  # the score
        screen[195:] = self.t % 256
        screen[60:80, 140:144, 0] = PADDLE
        screen[55, 10 + 2 * self.t, 0] = BALL
        return screen


def test_only_what_has_moved_is_seen() -> None:
    env = PongDifference(Screens())
    first, _ = env.reset(seed=0)
    assert not first.any()
    for t in (1, 2):
        seen = env.step(0)[0].reshape(80, 80)
        row, column = (55 - 35) // 2, (10 + 2 * t) // 2
        assert np.argwhere(seen).tolist() == [[row, column - 1], [row, column]]
        assert seen[row, column - 1 : column + 1].tolist() == [-1, 1]


def test_a_new_episode_has_no_last_screen() -> None:
    env = PongDifference(Screens())
    env.reset(seed=0)
    env.step(0)
    assert not env.reset()[0].any()
    assert np.count_nonzero(env.step(0)[0]) == 2


def test_observations_are_in_their_space() -> None:
    env = PongDifference(Screens())
    assert env.observation_space == spaces.Box(-1, 1, (6400,), np.int8)
    assert env.reset(seed=0)[0] in env.observation_space
    assert env.step(0)[0] in env.observation_space


def test_other_observations_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"needs observations of shape \(210, 160, 3\) .*, got Box\("):
        PongDifference(gym.make("CartPole-v1"))
