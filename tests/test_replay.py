"""Batches that are taken from a replay buffer's arrays, against those of the buffer."""

from typing import Any

import numpy as np
import pytest
import torch as th
from environments import BOX, CONTINUOUS, DICT, IMAGE, RandomEnv
from gymnasium import spaces
from models import small_model
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_ac_ext import TD3X
from sb3_ac_ext.buffers import replay


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize(
    "space",
    [BOX, spaces.Box(-1, 1, (2, 3), np.float64), spaces.Discrete(4), IMAGE],
    ids=["box", "matrix", "discrete", "image"],
)
def test_direct_batches_are_those_of_the_buffer(space: spaces.Space, n_envs: int) -> None:
    buffer = ReplayBuffer(30 * n_envs, space, CONTINUOUS, n_envs=n_envs)
    shape = buffer.obs_shape
    sample, discount = replay.Sampler(buffer, 16), th.tensor(0.9)
    for step in range(47):  # past the end, so that the buffer is full
        obs = [np.stack([space.sample() for _ in range(n_envs)]).reshape(n_envs, *shape) for _ in range(2)]
        actions = np.stack([CONTINUOUS.sample() for _ in range(n_envs)])
        dones = np.arange(n_envs) % 2 == step % 2
        infos = [{"TimeLimit.truncated": step % 3 == 0}] * n_envs
        buffer.add(*obs, actions, np.random.normal(size=n_envs), dones, infos)
        if step in (10, 46):
            np.random.seed(step)
            theirs = buffer.sample(16)
            following = np.random.random()
            np.random.seed(step)
            ours = sample(buffer, discount)
            assert np.random.random() == following
            assert ours.discounts is discount and ours.weights is None
            for value, expected in zip(ours[:5], theirs[:5], strict=True):
                th.testing.assert_close(value, expected, rtol=0, atol=0)


def test_report_makes_no_buffer() -> None:
    model = small_model("td3x")
    model.engine_report()
    assert model._replay_buffer is None


@pytest.mark.parametrize(
    ("env", "policy", "kwargs", "reason"),
    [
        (lambda: VecNormalize(make_vec_env(lambda: RandomEnv(BOX, CONTINUOUS))), "MlpPolicy", {}, "VecNormalize"),
        (lambda: RandomEnv(DICT, CONTINUOUS), "MultiInputPolicy", {}, "DictReplayBuffer"),
        (lambda: RandomEnv(BOX, CONTINUOUS), "MlpPolicy", {"n_steps": 2}, "NStepReplayBuffer"),
        (lambda: RandomEnv(BOX, CONTINUOUS), "MlpPolicy", {"engine": False}, "engine=False"),
        (lambda: RandomEnv(BOX, CONTINUOUS), "MlpPolicy", {}, "direct"),
    ],
    ids=["normalised", "dict", "n steps", "engine off", "direct"],
)
def test_report_names_what_stands_in_the_way(env: Any, policy: str, kwargs: dict[str, Any], reason: str) -> None:
    model = TD3X(policy, env(), policy_kwargs={"net_arch": [8]}, learning_starts=10, batch_size=8, buffer_size=100, **kwargs)
    model.learn(15)
    assert reason in (model.engine_report().get("replay") or model.engine_report()["engine"])


def test_replaced_methods_take_the_buffers_own_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model("td3x")
    buffer = model.replay_buffer
    monkeypatch.setattr(buffer, "sample", lambda *args, **kwargs: pytest.fail("asked"))
    with pytest.raises(pytest.fail.Exception, match="asked"):
        model._sample(4)
