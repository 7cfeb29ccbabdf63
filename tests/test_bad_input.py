"""Bad input is refused before an environment step is taken, with argument, value and what is legal."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from environments import BOX, CONTINUOUS, DICT, RandomEnv
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise

from sb3_ac_ext import TD3X
from sb3_ac_ext.common.schedules import as_schedule
from sb3_ac_ext.common.validation import NonFiniteError

NOISE = {"type": "normal", "start": 0.5, "end": 0.1, "steps": 100}


class NoSteps(gym.Wrapper):
    """Fails the test if a step is taken."""

    def step(self, action: Any) -> Any:
        pytest.fail("an environment step was taken")


def env(observation_space: spaces.Space = BOX, action_space: spaces.Space = CONTINUOUS) -> gym.Env:
    return NoSteps(RandomEnv(observation_space, action_space))


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"learning_rate": -1e-3}, ValueError, r"learning_rate must be a number >= 0.*got -0.001"),
        ({"learning_rate": float("nan")}, ValueError, r"learning_rate.*nan"),
        ({"learning_rate": "lin"}, ValueError, r"learning_rate.*\"lin_7e-4\".*got 'lin'"),
        ({"learning_rate": "exp_1e-3"}, ValueError, r"learning_rate.*got 'exp_1e-3'"),
        ({"learning_rate": "lin_-1e-3"}, ValueError, r"learning_rate.*-0.001 at the start"),
        ({"learning_rate": [1e-3]}, TypeError, r"learning_rate.*got \[0.001\] of type list"),
        ({"learning_rate": True}, TypeError, r"learning_rate.*got True"),
        ({"actor_learning_rate": -1.0}, ValueError, r"actor_learning_rate must be .*got -1.0"),
        ({"critic_learning_rate": "lin_x"}, ValueError, r"critic_learning_rate must be .*got 'lin_x'"),
        ({"max_grad_norm": 0.0}, ValueError, r"max_grad_norm\['critic'\] must be .*got 0.0"),
        (
            {"max_grad_norm": {"value": 1.0}},
            TypeError,
            r"max_grad_norm got an unexpected key 'value'; legal are actor, critic",
        ),
        ({"max_grad_norm": "big"}, TypeError, r"max_grad_norm.*got 'big'"),
        ({"policy_delay": 0}, ValueError, r"policy_delay must be an integer >= 1, got 0"),
        ({"policy_delay": 1.5}, TypeError, r"policy_delay must be an integer, got 1.5 of type float"),
        ({"target_policy_noise": -0.1}, ValueError, r"target_policy_noise must be a number >= 0, got -0.1"),
        ({"target_noise_clip": -0.1}, ValueError, r"target_noise_clip must be a number >= 0, got -0.1"),
        ({"gamma": 1.5}, ValueError, r"gamma must be a number in \[0, 1\], got 1.5"),
        ({"tau": -0.1}, ValueError, r"tau must be a number in \[0, 1\], got -0.1"),
        ({"tau": "fast"}, TypeError, r"tau must be a number, got 'fast' of type str"),
        ({"batch_size": 0}, ValueError, r"batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 256.0}, TypeError, r"batch_size must be an integer, got 256.0"),
        ({"buffer_size": 0}, ValueError, r"buffer_size must be an integer >= 1, got 0"),
        ({"learning_starts": -1}, ValueError, r"learning_starts must be a number >= 0, got -1"),
        ({"gradient_steps": -2}, ValueError, r"gradient_steps must be an integer >= -1, got -2"),
        ({"n_steps": 0}, ValueError, r"n_steps must be an integer >= 1, got 0"),
        ({"train_freq": 0}, ValueError, r"train_freq must be an integer >= 1, got 0"),
        ({"train_freq": (1, "epoch")}, ValueError, r"unit of train_freq must be one of 'step', 'episode', got 'epoch'"),
        ({"train_freq": (1, 2, 3)}, ValueError, r"train_freq must be .*got \(1, 2, 3\)"),
        ({"warmup": "none"}, ValueError, r"warmup must be one of 'uniform', 'noise', got 'none'"),
        ({"warmup": "noise"}, ValueError, r"warmup='noise' needs exploration_noise"),
        ({"exploration_noise": 0.1}, TypeError, r"exploration_noise must be a dict with the keys type, start.*got 0.1"),
        ({"exploration_noise": {"type": "normal"}}, ValueError, r"exploration_noise lacks start"),
        (
            {"exploration_noise": {"type": "pink", "start": 1}},
            ValueError,
            r"exploration_noise\['type'\] must be one of.*got 'pink'",
        ),
        ({"exploration_noise": {**NOISE, "begin": 1}}, TypeError, r"exploration_noise got an unexpected key 'begin'"),
        (
            {"exploration_noise": {**NOISE, "start": -1}},
            ValueError,
            r"exploration_noise\['start'\] must be a number >= 0, got -1",
        ),
        (
            {"exploration_noise": {**NOISE, "steps": 0}},
            ValueError,
            r"exploration_noise\['steps'\] must be a number >= 1, got 0",
        ),
        ({"exploration_noise": {**NOISE, "dt": 1}}, ValueError, r"exploration_noise\['dt'\] belongs to 'ornstein-uhlenbeck'"),
        ({"exploration_noise": {"type": "normal", "start": 1, "end": 0}}, ValueError, r"needs both end and steps"),
        (
            {"exploration_noise": NOISE, "action_noise": NormalActionNoise(np.zeros(2), np.ones(2))},
            ValueError,
            r"exploration_noise and action_noise \(noise_type in RL Zoo\) exclude each other",
        ),
        ({"action_noise": 0.1}, TypeError, r"action_noise must be an ActionNoise, got 0.1"),
        (
            {"action_noise": NormalActionNoise(np.zeros(3), np.ones(3))},
            ValueError,
            r"action_noise must have the shape .*\(2,\)",
        ),
        (
            {"action_noise": NormalActionNoise(np.zeros(1), np.ones(1))},
            ValueError,
            r"action_noise must have the shape .*\(2,\)",
        ),
        (
            {"action_noise": OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(3))},
            ValueError,
            r"action_noise must have the shape",
        ),
        ({"optimize_memory_usage": True}, ValueError, r"optimize_memory_usage.*handle_timeout_termination"),
        ({"optimize_memory_usage": True, "n_steps": 2}, NotImplementedError, r"n_steps must be 1 with optimize_memory_usage"),
        ({"policy_kwargs": {"n_critics": 1}}, ValueError, r"n_critics must be 2.*got 1"),
        ({"policy_kwargs": {"net_arc": [8]}}, TypeError, r"net_arc"),
        ({"polcy_delay": 2}, TypeError, r"TD3X\(\) got an unexpected argument 'polcy_delay'; did you mean 'policy_delay'\?"),
        ({"foo": 2}, TypeError, r"TD3X\(\) got an unexpected argument 'foo'; legal are action_noise, .*, warmup$"),
        ({"replay_buffer_kwargs": {"n_sampled_goals": 2}}, TypeError, r"n_sampled_goals"),
    ],
    ids=str,
)
def test_arguments(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TD3X("MlpPolicy", env(), **kwargs).learn(10)


@pytest.mark.parametrize(
    ("make_env", "message"),
    [
        (lambda: env(action_space=spaces.Discrete(3)), r"Box.*Discrete\(3\)"),
        (lambda: env(action_space=spaces.Box(-np.inf, np.inf, (2,))), r"finite.*Box\(-inf"),
        (lambda: env(action_space=spaces.Box(0.0, np.array([0.0, 1.0], np.float32))), r"low < high"),
    ],
    ids=["discrete", "unbounded", "empty range"],
)
@pytest.mark.parametrize("error", [NotImplementedError, AssertionError])
def test_action_spaces(make_env: Callable[[], gym.Env], message: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=message):
        TD3X("MlpPolicy", make_env())


@pytest.mark.parametrize("error", [NotImplementedError, AssertionError])
def test_spaces_and_policies_that_do_not_fit(error: type[Exception]) -> None:
    with pytest.raises(error, match="only with images"):
        TD3X("CnnPolicy", env())
    with pytest.raises(error, match=r"n_steps must be 1 for Dict observations.*got 3"):
        TD3X("MultiInputPolicy", env(DICT), n_steps=3)


def test_other_refusals() -> None:
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        TD3X("MlpPolicy", env(DICT))
    with pytest.raises(ValueError, match=r"env must be an environment .* got None"):
        TD3X("MlpPolicy", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="MlpPolcy"):
        TD3X("MlpPolcy", env())
    with pytest.raises(ValueError, match="n_envs=2"):
        TD3X("MlpPolicy", make_vec_env(env, n_envs=2), train_freq=(1, "episode"))


def test_checks_leave_the_random_streams_alone() -> None:
    np.random.seed(0)
    expected = np.random.random()
    np.random.seed(0)
    TD3X("MlpPolicy", env(), action_noise=NormalActionNoise(np.zeros(2), np.ones(2)))
    assert np.random.random() == expected


@pytest.mark.parametrize(("progress", "rate"), [(1.0, 7e-4), (0.5, 3.5e-4), (0.0, 0.0)])
def test_linear_schedule_string(progress: float, rate: float) -> None:
    assert as_schedule("learning_rate", "lin_7e-4")(progress) == pytest.approx(rate)


def model_that_learns(**kwargs: Any) -> TD3X:
    return TD3X("MlpPolicy", RandomEnv(BOX, CONTINUOUS), policy_kwargs={"net_arch": [8]}, learning_starts=10, seed=0, **kwargs)


class Break(BaseCallback):
    """Writes a value into one parameter of a network at step 20."""

    def __init__(self, network: str, value: float) -> None:
        super().__init__()
        self.network, self.value = network, value

    def _on_step(self) -> bool:
        if self.n_calls == 20:
            next(getattr(self.model, self.network).parameters()).data[0, 0] = self.value
        return True


@pytest.mark.parametrize("network", ["actor", "critic"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_training_stops_and_names_the_network(network: str, value: float) -> None:
    model = model_that_learns()
    with pytest.raises(NonFiniteError, match=rf"TD3X: the parameters of the {network} became non-finite .* by update 10"):
        model.learn(100, callback=Break(network, value))
    assert model.num_timesteps == 20
    assert issubclass(NonFiniteError, ValueError)  # what a search prunes on


def test_a_rate_that_overflows_stops_at_the_update_that_did_it(tmp_path: Any) -> None:
    model = model_that_learns(policy_delay=1)
    model.save(tmp_path / "model")
    model.learning_rate = 1e37
    model._setup_lr_schedule()
    with pytest.raises(NonFiniteError, match="by update 1"):
        model.learn(100)
    assert all(bool(th.isfinite(p).all()) for p in TD3X.load(tmp_path / "model").policy.parameters())
