"""Environments and a rollout buffer in float64, for what must equal SB3 to the last digits."""

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from rollout_data import InDouble
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper


class Walk(gym.Env):
    """Observations in float64, rewards that float32 has exactly, episodes of 4 steps that terminate and truncate in turn."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}

    def __init__(self, action_space: spaces.Space, seed: int = 0, truncates: bool = True) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = action_space
        self.numbers = np.random.default_rng(seed)
        self.truncates = truncates
        self.t = 0

    def observe(self) -> np.ndarray:
        return self.numbers.normal(size=3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.t += 1
        over, cut = self.t % 4 == 0, self.truncates and self.t % 8 == 0
        return self.observe(), float(self.numbers.integers(-2, 3)), over and not cut, over and cut, {}


class RewardsInDouble(VecEnvWrapper):
    """So that SB3's bootstrap of truncated episodes is not rounded."""

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = self.venv.step_wait()
        return obs, rewards.astype(np.float64), dones, infos


class AllInDouble(InDouble):
    """SB3's buffer in float64."""

    def reset(self) -> None:
        super().reset()
        for name in ("actions", "rewards", "returns", "values", "log_probs", "advantages", "episode_starts"):
            setattr(self, name, getattr(self, name).astype(np.float64))


def walks(action_space: spaces.Space, n_envs: int = 2, truncates: bool = True) -> VecEnvWrapper:
    return RewardsInDouble(DummyVecEnv([lambda seed=i: Walk(action_space, seed, truncates) for i in range(n_envs)]))
