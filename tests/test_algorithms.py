"""What every algorithm of the registry must do; a new row gets these tests, and the contracts."""

import re
from typing import Any

import numpy as np
import pytest
import torch as th
from environments import BOX, CONTINUOUS, DICT, IMAGE, RandomEnv, ScriptedEnv
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from models import BY_SEGMENTS, CHOOSING, CRITICS, OFF_POLICY, ON_POLICY, ONE_AGENT, enough, environment, rows, small_model
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import VecNormalize, VecTransposeImage
from subjects import numbers

from sb3_ac_ext import A3C
from sb3_ac_ext.signatures import arguments_of
from sb3_ac_ext.zoo.registry import AlgoSpec

# Spaces


@pytest.mark.parametrize(
    ("row", "policy", "space"),
    [
        *((row, policy, space) for row in ONE_AGENT for policy, space in (("CnnPolicy", IMAGE), ("MultiInputPolicy", DICT))),
        *(
            pytest.param(row, "MlpPolicy", space, id=f"{row}-{name}")
            for row in (*ONE_AGENT, "maddpg")
            for name, space in {
                "matrix": spaces.Box(-1, 1, (2, 3), np.float64),
                "discrete": spaces.Discrete(5),
                "multidiscrete": spaces.MultiDiscrete([3, 2]),
                "multibinary": spaces.MultiBinary(3),
            }.items()
        ),
    ],
)
def test_observation_spaces(row: str, policy: str, space: spaces.Space) -> None:
    model = small_model(row, policy=policy, env=make_vec_env(lambda: RandomEnv(space, CONTINUOUS), n_envs=2))
    before = numbers(model)
    model.learn(24)
    after = numbers(model)
    assert model._n_updates > 0
    assert not th.equal(after, before)
    assert th.isfinite(after).all()


@rows()
@pytest.mark.parametrize(
    "space",
    [CONTINUOUS, spaces.Box(-1, 1, (2, 3), np.float32), spaces.Box(-3, 1, (1,), np.float64)],
    ids=["asymmetric", "matrix", "float64"],
)
def test_action_spaces(row: str, space: spaces.Box) -> None:
    model = small_model(row, env=RandomEnv(BOX, space)).learn(20)
    action, _ = model.predict(BOX.sample())
    assert action.shape == space.shape
    assert (action >= space.low).all()
    assert (action <= space.high).all()


CHOICES = {"discrete": spaces.Discrete(3), "multidiscrete": spaces.MultiDiscrete([3, 2]), "multibinary": spaces.MultiBinary(3)}


@pytest.mark.parametrize(
    ("row", "space"),
    [
        pytest.param(row, space, id=f"{row}-{name}", marks=pytest.mark.slow if row in BY_SEGMENTS and i != j % 3 else [])
        for j, row in enumerate(ON_POLICY)
        for i, (name, space) in enumerate(CHOICES.items())
        if row in CHOOSING or name == "discrete"
    ],
)
def test_actions_that_are_choices_by_images(row: str, space: spaces.Space) -> None:
    model = small_model(row, policy="CnnPolicy", env=RandomEnv(IMAGE, space))
    before = numbers(model)
    model.learn(20)
    assert not th.equal(numbers(model), before)
    action, _ = model.predict(IMAGE.sample())
    assert space.contains(action.astype(space.dtype) if isinstance(space, spaces.MultiBinary) else action)


@rows()
def test_predict_shapes_and_errors(row: str) -> None:
    model = small_model(row, env=RandomEnv(BOX, CONTINUOUS))
    single, state = model.predict(BOX.sample(), deterministic=True)
    assert single.shape == (2,)
    assert state is None
    several, _ = model.predict(np.zeros((3, 4), np.float32), state=None, episode_start=np.ones(3, bool))
    assert several.shape == (3, 2)
    for wrong in (np.zeros(5, np.float32), np.zeros((3, 5), np.float32)):
        with pytest.raises(ValueError, match="shape"):
            model.predict(wrong)
    with pytest.raises(ValueError, match="tuple"):
        model.predict((np.zeros(4, np.float32), {}))


@rows(ONE_AGENT)
def test_predict_takes_images_in_either_channel_order(row: str) -> None:
    last = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    model = small_model(row, policy="CnnPolicy", env=RandomEnv(last, CONTINUOUS))
    assert isinstance(model.env, VecTransposeImage)
    image = last.sample()
    actions = [model.predict(channels, deterministic=True)[0] for channels in (image, image.transpose(2, 0, 1))]
    np.testing.assert_array_equal(*actions)


# Training


@rows()
def test_same_seed_same_parameters(row: str) -> None:
    first, second, other = (numbers(small_model(row, seed=seed).learn(40)) for seed in (1, 1, 2))
    assert th.equal(first, second)
    assert not th.equal(first, other)


@rows()
def test_numbers_of_any_library(row: str, tmp_path: Any) -> None:
    """As arguments, and in dicts: the same parameters as by Python's numbers."""

    def arguments(integer: Any, number: Any) -> dict[str, Any]:
        noise = {"exploration_noise": {"type": "normal", "start": number(0.5), "end": number(0.25), "steps": integer(20)}}
        common = {"seed": integer(3), "stats_window_size": integer(2), "gamma": number(0.5), "learning_rate": number(0.125)}
        return {**common, **({"buffer_size": integer(100), "batch_size": integer(4), **noise} if row in OFF_POLICY else {})}

    expected = small_model(row, **arguments(int, float))
    expected.learn(30)
    for library in ((np.int64, np.float32), (np.array, np.array), (th.tensor, th.tensor)):
        actual = small_model(row, **arguments(*library))
        actual.learn(30)
        assert th.equal(numbers(actual), numbers(expected))
        assert (type(actual.gamma), type(actual.seed)) == (float, int)
    expected.save(tmp_path / "model")
    loaded = type(expected).load(tmp_path / "model", environment(row), gamma=th.tensor(0.5), seed=np.int64(3))
    assert type(loaded.gamma) is float
    assert type(loaded.seed) is int
    loaded.learn(30)


@rows()
def test_vec_normalize(row: str) -> None:
    env = VecNormalize(make_vec_env(lambda: RandomEnv(BOX, CONTINUOUS), n_envs=2))
    model = small_model(row, env=env).learn(40)
    assert model.get_vec_normalize_env() is env
    assert env.obs_rms.count > 20


class Watcher(BaseCallback):
    """Sees SB3's local names, but for what stays with A3C's workers, and stops after some steps."""

    def __init__(self, stop_at: int) -> None:
        super().__init__()
        self.stop_at = stop_at

    def _on_step(self) -> bool:
        seen = {"new_obs", "rewards", "dones", "infos", "actions"}
        assert (seen - {"new_obs", "actions"} if isinstance(self.model, A3C) else seen) <= set(self.locals)
        return self.n_calls < self.stop_at


@rows()
def test_callbacks_early_stop_and_logs(row: str, tmp_path: Any) -> None:
    """The run in TensorBoard is named after the class."""
    model = small_model(row, env=RandomEnv(BOX, CONTINUOUS), tensorboard_log=str(tmp_path / "runs"))
    model._custom_logger = False  # `learn` makes one
    other = make_vec_env(lambda: RandomEnv(BOX, CONTINUOUS))
    evaluation = EvalCallback(other, eval_freq=5, n_eval_episodes=1, best_model_save_path=str(tmp_path / "best"), verbose=0)
    model.learn(100, callback=CallbackList([Watcher(stop_at=12), evaluation]))
    assert model.num_timesteps == 12 * model.n_envs
    assert (tmp_path / "best" / "best_model.zip").is_file()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [f"{type(model).__name__}_1"]


@rows()
def test_set_env(row: str) -> None:
    model = small_model(row).learn(15)
    model.set_env(environment(row))
    model.learn(5, reset_num_timesteps=False)
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(enough(row, ScriptedEnv()))


@rows((*CRITICS, "d4pg"))
def test_her(row: str) -> None:
    env = BitFlippingEnv(n_bits=3, continuous=True)
    her = {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": {"n_sampled_goal": 2}}
    model = small_model(row, policy="MultiInputPolicy", env=env, **her).learn(30)
    assert isinstance(model.replay_buffer, HerReplayBuffer)
    assert model._n_updates > 0


@rows(OFF_POLICY)
def test_memory_optimised_buffer(row: str) -> None:
    kwargs = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    assert not hasattr(small_model(row, **kwargs).learn(20).replay_buffer, "next_observations")


@rows(OFF_POLICY)
@pytest.mark.parametrize("train_freq", [4, (2, "step"), (1, "episode"), [2, "step"]], ids=str)
def test_train_freq(row: str, train_freq: Any) -> None:
    """Episodes have seven steps."""
    assert small_model(row, train_freq=train_freq, gradient_steps=-1, learning_starts=0).learn(28)._n_updates == 28


# Arguments


SET_BY_SUBCLASSES = {"support_multi_env", "monitor_wrapper", "sde_support", "supported_action_spaces"}
"""What SB3's base class is told by the algorithms, and users do not choose."""
ONLY_SDE = {"use_sde", "sde_sample_freq", "use_sde_at_warmup"}


def arguments_of_sb3(spec: AlgoSpec) -> frozenset[str]:
    """What the SB3 class lets users choose; its base class knows gSDE, which it is for the subclass to take up."""
    keys = frozenset(arguments_of(spec.cls.sb3_class))  # type: ignore[attr-defined]
    if spec.cls.sb3_class is OnPolicyAlgorithm:  # type: ignore[attr-defined]  # which has no defaults
        return frozenset()
    return keys - SET_BY_SUBCLASSES - ONLY_SDE if spec.cls.sb3_class is OffPolicyAlgorithm else keys  # type: ignore[attr-defined]


def test_arguments_of_sb3_are_all_taken(spec: AlgoSpec) -> None:
    assert arguments_of_sb3(spec) <= arguments_of(spec.cls).keys()


def test_every_argument_is_documented_once(spec: AlgoSpec) -> None:
    assert spec.cls.__doc__ is not None
    documented = re.findall(r"^ *:param (\w+):", spec.cls.__doc__, re.MULTILINE)
    assert documented == [*arguments_of(spec.cls)]


def test_subclasses_that_hand_arguments_on(spec: AlgoSpec) -> None:
    class Own(spec.cls):  # type: ignore[name-defined, misc]
        def __init__(self, *args: Any, own: int = 1, **kwargs: Any) -> None:
            self.own = own
            super().__init__(*args, **kwargs)

    assert arguments_of(Own).keys() == arguments_of(spec.cls).keys() | {"own"}
    env = enough(spec, TimeLimit(RandomEnv(BOX, CONTINUOUS), 9), 4)
    assert Own("MlpPolicy", env, own=2, gamma=0.5).gamma == 0.5
    with pytest.raises(TypeError, match="did you mean 'gamma'"):
        Own("MlpPolicy", env, gama=0.5)


PUBLISHED = {"d4pg": {"learning_starts", "tau", "n_steps", "policy_kwargs"}}
"""Defaults of the published program, where SB3 has no algorithm of the kind; in ``policy_kwargs`` its DDPG writes."""


def test_arguments_keep_sb3s_defaults(spec: AlgoSpec) -> None:
    env = enough(spec, TimeLimit(RandomEnv(BOX, CONTINUOUS), 9), 4)
    ours = spec.cls("MlpPolicy", env)
    names = arguments_of_sb3(spec) - {"policy", "env"}
    if spec.cls.sb3_class is OffPolicyAlgorithm:  # type: ignore[attr-defined]  # no algorithm by itself: no rate, no buffer yet
        theirs = OffPolicyAlgorithm(type(ours.policy), env, 0.0, sde_support=False)
        theirs._convert_train_freq()
        names -= {"learning_rate", "replay_buffer_class", *PUBLISHED.get(spec.name, ())}
    elif names:
        theirs = spec.cls.sb3_class("MlpPolicy", env)  # type: ignore[attr-defined]
    for name in names:
        name = {"stats_window_size": "_stats_window_size"}.get(name, name)
        values = (getattr(model, name) for model in (ours, theirs))
        own, other = (value(1.0) if isinstance(value, FloatSchedule) else value for value in values)
        assert own == other, name
