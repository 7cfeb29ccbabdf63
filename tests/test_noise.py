"""Exploration noise: the decay, the processes, and how the algorithm applies them."""

from typing import Any

import numpy as np
import pytest
from environments import BOX, CONTINUOUS, RandomEnv, ScriptedEnv
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise

from sb3_ac_ext import TD3X
from sb3_ac_ext.base.noise import NoiseSchedule, ScaledNoise

DECAY: dict[str, Any] = {"type": "normal", "start": 0.5, "end": 0.1, "steps": 100}


def make(env: Any = None, **kwargs: Any) -> TD3X:
    kwargs = {"seed": 0, "policy_kwargs": {"net_arch": [8]}, "buffer_size": 1000, "learning_starts": 10, **kwargs}
    return TD3X("MlpPolicy", env or RandomEnv(BOX, CONTINUOUS), **kwargs)


@pytest.mark.parametrize(("step", "std"), [(0, 0.5), (25, 0.4), (100, 0.1), (10_000, 0.1)])
def test_std_falls_linearly_and_stays(step: int, std: float) -> None:
    assert NoiseSchedule.parse(DECAY).std(step) == pytest.approx(std)


def test_std_is_constant_without_end_and_steps() -> None:
    schedule = NoiseSchedule.parse({"type": "normal", "start": 0.3})
    assert schedule.std(0) == schedule.std(10**6) == 0.3


def test_processes_have_unit_scale_and_the_given_dt(monkeypatch: pytest.MonkeyPatch) -> None:
    normals = iter([np.array([1.0]), np.array([0.0]), np.array([-1.0])])
    monkeypatch.setattr(np.random, "normal", lambda *args, **kwargs: next(normals))
    process = NoiseSchedule.parse({"type": "ornstein-uhlenbeck", "start": 0.2, "dt": 0.01}).unit_process((1,))
    noise = ScaledNoise(process, 0.2)
    values = [noise().item() for _ in range(3)]
    np.testing.assert_allclose(values, [0.02, 0.01997, -0.000059955], rtol=1e-5)


@pytest.mark.parametrize(("dt", "stationary"), [(0.01, 0.365285), (1.0, 0.379663)])
def test_stationary_std_of_ornstein_uhlenbeck(dt: float, stationary: float) -> None:
    """x <- (1 - theta dt) x + sigma sqrt(dt) n has the variance sigma^2 dt / (1 - (1 - theta dt)^2)."""
    np.random.seed(0)
    process = NoiseSchedule.parse({"type": "ornstein-uhlenbeck", "start": 0.2, "dt": dt}).unit_process((2000,))
    for _ in range(int(40 / dt)):
        sample = process()
    assert 0.2 * sample.std() == pytest.approx(stationary, rel=0.06)


def test_decay_counts_the_steps_of_all_environments_and_survives_episodes_learn_and_load(tmp_path: Any) -> None:
    model = make(make_vec_env(ScriptedEnv, n_envs=2), exploration_noise=DECAY)
    assert isinstance(model.action_noise, NormalActionNoise)
    model.learn(40)
    assert isinstance(model.action_noise, VectorizedActionNoise)
    assert model._exploration_std() == pytest.approx(0.5 - 0.4 * 0.4)
    assert model.logger.name_to_value["train/exploration_std"] == pytest.approx(0.5 - 0.4 * 0.4)
    model.learn(20)
    assert model._exploration_std() == pytest.approx(0.5 - 0.4 * 0.6)
    model.save(tmp_path / "model")
    loaded = TD3X.load(tmp_path / "model", env=model.env)
    assert loaded._exploration_std() == pytest.approx(0.5 - 0.4 * 0.6)
    loaded.learn(10)
    assert loaded._exploration_std() == pytest.approx(0.5 - 0.4 * 0.7)


def test_actions_get_the_scheduled_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(exploration_noise={**DECAY, "end": 0.0}, learning_starts=0)
    model._last_obs = np.zeros((1, 4), np.float32)
    greedy = model.policy.scale_action(model.predict(model._last_obs)[0])
    monkeypatch.setattr(np.random, "normal", lambda *args, **kwargs: np.array([0.25, -0.5]))
    model._noise_steps = 50
    _, scaled = model._sample_action(0, model.action_noise)
    np.testing.assert_allclose(scaled - greedy, [[0.25 * 0.25, -0.5 * 0.25]], atol=1e-6)
    model._noise_steps = 100
    _, scaled = model._sample_action(0, model.action_noise)
    np.testing.assert_allclose(scaled, greedy, atol=1e-6)


def test_warmup_with_noise_acts_around_the_policy_with_std_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(exploration_noise=DECAY, warmup="noise")
    model._last_obs = np.zeros((1, 4), np.float32)
    greedy = model.policy.scale_action(model.predict(model._last_obs)[0])
    monkeypatch.setattr(np.random, "normal", lambda *args, **kwargs: np.array([0.25, -0.125]))
    _, scaled = model._sample_action(model.learning_starts, model.action_noise)
    np.testing.assert_allclose(scaled - greedy, [[0.25, -0.125]], atol=1e-6)
    model.num_timesteps = model.learning_starts
    _, scaled = model._sample_action(model.learning_starts, model.action_noise)
    np.testing.assert_allclose(scaled - greedy, [[0.125, -0.0625]], atol=1e-6)


def test_warmup_uniform_does_not_ask_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(exploration_noise={**DECAY, "start": 0.0, "end": 0.0})
    monkeypatch.setattr(model, "predict", lambda *args, **kwargs: pytest.fail("asked the policy"))
    actions = np.array([model._sample_action(10, model.action_noise)[1][0] for _ in range(400)])
    assert np.abs(actions.mean(axis=0)).max() < 0.15
    assert actions.std(axis=0) == pytest.approx(1 / 3**0.5, rel=0.1)


def test_predict_never_adds_noise() -> None:
    model = make(exploration_noise={"type": "normal", "start": 1.0})
    obs = np.ones(4, np.float32)
    actions = {tuple(model.predict(obs, deterministic=flag)[0]) for flag in (True, False) for _ in range(3)}
    assert len(actions) == 1


def test_each_environment_has_an_ornstein_uhlenbeck_state_that_ends_with_its_episode() -> None:
    spec = {"type": "ornstein-uhlenbeck", "start": 0.2, "dt": 1.0}
    env = make_vec_env(lambda: ScriptedEnv(length=5), n_envs=2)
    model = make(env, exploration_noise=spec, learning_starts=100)
    model.learn(8)  # 4 steps in each environment
    states = [noise.noise_prev.copy() for noise in model.action_noise.noises]
    assert not np.allclose(*states)
    assert np.abs(states).min() > 0
    model.learn(2, reset_num_timesteps=False)
    assert isinstance(model.action_noise.noises[0], OrnsteinUhlenbeckActionNoise)
    np.testing.assert_array_equal([noise.noise_prev for noise in model.action_noise.noises], 0)
