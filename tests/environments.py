"""Small deterministic environments for the tests."""

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class ScriptedEnv(gym.Env):
    """
    Episodes of ``length`` steps that always start at the same state, reward 1, 2, 3, ...

    The observation is ``(t, action)``. The last step terminates, or truncates if ``truncates``.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self, length: int = 3, truncates: bool = False, low: float = -1.0, high: float = 1.0) -> None:
        self.length = length
        self.truncates = truncates
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space = spaces.Box(low, high, (1,), np.float32)
        self.t = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        over = self.t == self.length
        obs = np.array([self.t, action[0]], np.float32)
        return obs, float(self.t), over and not self.truncates, over and self.truncates, {}


class RandomEnv(gym.Env):
    """Random observations of any space; episodes of `length` steps."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    length = 7

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.observation_space = observation_space
        self.action_space = action_space
        self.t = 0

    def __repr__(self) -> str:  # part of tests' names, so no address
        return f"RandomEnv({self.observation_space}, {self.action_space})"

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), (action, self.action_space)
        self.t += 1
        return self.observation_space.sample(), float(np.sum(action)), self.t % self.length == 0, False, {}


BOX = spaces.Box(-1, 1, (4,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
DICT = spaces.Dict({"vector": BOX, "image": IMAGE})
CONTINUOUS = spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([1.0, 3.0], np.float32))
"""An action space that is not symmetric around zero."""
