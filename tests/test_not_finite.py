"""Observations that are not finite are refused before they are stored, wherever they are shown."""

import copy
from typing import Any

import numpy as np
import pytest
from environments import BOX, CONTINUOUS, RandomEnv
from gymnasium import spaces
from models import EVERY, rows, small_model
from parallel_environments import Crowd

from sb3_ac_ext import MADDPG, OPAC
from sb3_ac_ext.validation import NonFiniteError


class Blind(Crowd):
    """Two agents, of which the second one's observation is NaN once; rewards are 1."""

    def __init__(self, discrete: bool, at: int) -> None:
        super().__init__(n=2, discrete=discrete)
        self.at = at

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        observations, rewards, *rest = super().step(actions)
        if self.t == self.at:
            observations["agent_1"] *= np.nan
        return observations, dict.fromkeys(rewards, 1.0), *rest  # type: ignore[return-value]


@pytest.mark.parametrize("arguments", [{}, {"inferred_policies": True}, {"n_sub_policies": 2}], ids=str)
@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("at", [3, 7], ids=["within", "last"])  # of 7 steps
def test_no_agents_nan_is_stored(arguments: dict[str, Any], discrete: bool, at: int) -> None:
    model = MADDPG("MlpPolicy", Blind(discrete, at), learning_starts=100, buffer_size=600, **arguments)
    with pytest.raises(ValueError, match=r"environment 0 gave a non-finite .*observation"):
        model.learn(20)
    assert model.replay_buffer.pos == at - 1


def test_no_nan_of_a_choice_is_stored() -> None:
    env = RandomEnv(BOX, spaces.Discrete(3))
    model = OPAC("MlpPolicy", env, learning_starts=100, buffer_size=600)
    model.learn(3)
    env.step = lambda _: (np.full(BOX.shape, np.nan, np.float32), 1.0, False, False, {})
    with pytest.raises(ValueError, match="environment 0 gave a non-finite observation"):
        model.learn(20, reset_num_timesteps=False)
    assert model.replay_buffer.pos == 3


class BlindAtLast(RandomEnv):
    """Its episodes are truncated after five steps, at an observation of NaN."""

    steps = 0

    def reset(self, **kwargs: Any) -> Any:
        self.steps = 0
        return super().reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, _, _, _, info = super().step(action)
        self.steps += 1
        over = self.steps == 5
        return observation * np.nan if over else observation, 1.0, False, over, info


def blind_at_last() -> BlindAtLast:
    return BlindAtLast(*copy.deepcopy((BOX, CONTINUOUS)))


@rows(row for row in EVERY if row != "reinforce")  # which makes nothing of them
def test_last_observations_are_named(row: str) -> None:
    with pytest.raises(NonFiniteError, match=r"environment 0 gave a non-finite last observation"):
        small_model(row, env=blind_at_last()).learn(60)


def test_last_observations_of_actors_are_not_stored() -> None:
    model = small_model("d4pg", env=blind_at_last(), n_actors=2, actor_env_fn=blind_at_last, learning_starts=100)
    with pytest.raises(NonFiniteError, match=r"actor 0 .*environment 0 gave a non-finite last observation"):
        model.learn(60)
    assert np.isfinite(model.replay_buffer.next_observations).all()
