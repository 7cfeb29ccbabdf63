"""What every algorithm of the registry must do; a new row gets these tests."""

import inspect
import re
from typing import Any

import numpy as np
import pytest
import torch as th
from environments import BOX, CONTINUOUS, DICT, IMAGE, RandomEnv, ScriptedEnv
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import FloatSchedule
from stable_baselines3.common.vec_env import SubprocVecEnv, VecNormalize, VecTransposeImage

from sb3_ac_ext.base.typing import CommonKwargs, OffPolicyArguments, constructor_keys
from sb3_ac_ext.zoo.registry import ALGORITHMS, AlgoSpec

SMALL = {"net_arch": [8, 8]}
OFF_POLICY = {"learning_starts": 10, "batch_size": 4, "buffer_size": 200}
ON_POLICY = {"n_steps": 4, "batch_size": 4, "n_epochs": 2, "rollout_episodes": 1, "max_rollout_steps": 200}
"""So far as an algorithm has them; what is learned in total below are multiples of these rollouts."""

every_algorithm = pytest.mark.parametrize("spec", ALGORITHMS, ids=lambda spec: spec.name)
every_off_policy_algorithm = pytest.mark.parametrize(
    "spec", [spec for spec in ALGORITHMS if issubclass(spec.cls, OffPolicyAlgorithm)], ids=lambda spec: spec.name
)

every_on_policy_algorithm = pytest.mark.parametrize(
    "spec", [spec for spec in ALGORITHMS if issubclass(spec.cls, OnPolicyAlgorithm)], ids=lambda spec: spec.name
)


@pytest.fixture(autouse=True)
def short_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the rollouts, for those that are whole episodes."""
    monkeypatch.setattr(RandomEnv, "length", ON_POLICY["n_steps"])


def with_policy(policy: str) -> Any:
    """The off-policy algorithms that have a policy of this name, for a parametrisation."""
    specs = [spec for spec in ALGORITHMS if issubclass(spec.cls, OffPolicyAlgorithm) and policy in spec.cls.policy_aliases]
    return pytest.mark.parametrize("spec", specs, ids=lambda spec: spec.name)


def need(spec: AlgoSpec, policy: str) -> None:
    """Skip an algorithm that has no policy of this name."""
    if policy not in spec.cls.policy_aliases:
        pytest.skip(f"{spec.name} has no {policy}")


def make(spec: AlgoSpec, env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    small = OFF_POLICY if issubclass(spec.cls, OffPolicyAlgorithm) else ON_POLICY
    own = {name: value for name, value in small.items() if name in constructor_keys(spec.cls)}
    return spec.cls(policy, env, **{"policy_kwargs": SMALL, "seed": 0, **own, **kwargs})


def parameters(model: Any) -> th.Tensor:
    return th.cat([value.flatten().float() for value in model.policy.state_dict().values()])


@every_algorithm
def test_policies(spec: AlgoSpec) -> None:
    """The joint observations of several agents are neither images nor dicts."""
    missing = {"CnnPolicy", "MultiInputPolicy"} if spec.name == "maddpg" else set()
    assert set(spec.cls.policy_aliases) == {"MlpPolicy", "CnnPolicy", "MultiInputPolicy"} - missing


@every_algorithm
@pytest.mark.parametrize(
    ("policy", "space"),
    [
        ("MlpPolicy", BOX),
        ("MlpPolicy", spaces.Box(-1, 1, (2, 3), np.float64)),
        ("MlpPolicy", spaces.Discrete(5)),
        ("MlpPolicy", spaces.MultiDiscrete([3, 2])),
        ("MlpPolicy", spaces.MultiBinary(3)),
        ("CnnPolicy", IMAGE),
        ("MultiInputPolicy", DICT),
    ],
    ids=["box", "matrix", "discrete", "multidiscrete", "multibinary", "image", "dict"],
)
@pytest.mark.parametrize("n_envs", [1, 2])
def test_observation_spaces(spec: AlgoSpec, policy: str, space: spaces.Space, n_envs: int) -> None:
    need(spec, policy)
    env = make_vec_env(lambda: RandomEnv(space, CONTINUOUS), n_envs=n_envs)
    model = make(spec, env, policy)
    before = parameters(model)
    model.learn(16)
    after = parameters(model)
    assert model._n_updates > 0
    assert not th.equal(after, before)
    assert th.isfinite(after).all()


@every_algorithm
@pytest.mark.parametrize(
    "space",
    [
        CONTINUOUS,
        spaces.Box(-1, 1, (2, 3), np.float32),
        spaces.Box(-3, 1, (1,), np.float64),
    ],
    ids=["asymmetric", "matrix", "float64"],
)
def test_action_spaces(spec: AlgoSpec, space: spaces.Box) -> None:
    model = make(spec, RandomEnv(BOX, space))
    model.learn(20)
    action, _ = model.predict(BOX.sample())
    assert action.shape == space.shape
    assert (action >= space.low).all()
    assert (action <= space.high).all()


@every_algorithm
def test_hooks_on_gradients_are_called(spec: AlgoSpec) -> None:
    """Those that are there when training goes on; without them the fast paths are back."""
    model = make(spec, RandomEnv(BOX, CONTINUOUS)).learn(20)
    report, seen = model.engine_report(), set()
    names = {id(parameter): name for name, parameter in model.policy.named_parameters()}
    if issubclass(spec.cls, OffPolicyAlgorithm):
        optimizers = [network.optimizer for network in model._networks().values()]
    else:
        optimizers = list(model._optimizers().values())
    trained = {id(p): p for optimizer in optimizers for p in optimizer.param_groups[0]["params"]}
    hooks = [p.register_hook(lambda grad, key=key: seen.add(key) or grad) for key, p in trained.items() if key in names]
    model.learn(20, reset_num_timesteps=False)
    assert {names[key] for key in seen} == {names[key] for key in trained if key in names}
    for hook in hooks:
        hook.remove()
    model.learn(20, reset_num_timesteps=False)
    assert len(hooks) > 4
    assert model.engine_report() == report


@every_on_policy_algorithm
@pytest.mark.parametrize(
    "space",
    [spaces.Discrete(3), spaces.MultiDiscrete([3, 2]), spaces.MultiBinary(3)],
    ids=["discrete", "multidiscrete", "multibinary"],
)
@pytest.mark.parametrize(("policy", "observations"), [("MlpPolicy", BOX), ("CnnPolicy", IMAGE)], ids=["mlp", "cnn"])
def test_actions_that_are_choices(spec: AlgoSpec, space: spaces.Space, policy: str, observations: spaces.Space) -> None:
    model = make(spec, RandomEnv(observations, space), policy)
    before = parameters(model)
    model.learn(20)
    assert not th.equal(parameters(model), before)
    action, _ = model.predict(observations.sample())
    assert space.contains(action.astype(space.dtype) if isinstance(space, spaces.MultiBinary) else action)


@every_algorithm
def test_same_seed_same_parameters(spec: AlgoSpec) -> None:
    first, second, other = (parameters(make(spec, "Pendulum-v1", seed=seed).learn(60)) for seed in (1, 1, 2))
    assert th.equal(first, second)
    assert not th.equal(first, other)


@every_algorithm
def test_save_load_predict_continue(spec: AlgoSpec, tmp_path: Any) -> None:
    env = RandomEnv(BOX, CONTINUOUS)
    model = make(spec, env).learn(20)
    observations = np.stack([BOX.sample() for _ in range(5)])
    model.save(tmp_path / "model.zip")
    loaded = spec.cls.load(tmp_path / "model.zip", env=env)
    assert th.equal(parameters(loaded), parameters(model))
    actions = [candidate.predict(observations, deterministic=True)[0] for candidate in (loaded, model)]
    np.testing.assert_array_equal(*actions)
    assert loaded.num_timesteps == model.num_timesteps
    loaded.learn(20, reset_num_timesteps=False)
    assert loaded.num_timesteps == 40
    assert not th.equal(parameters(loaded), parameters(model))


@every_algorithm
def test_set_parameters_and_get_parameters(spec: AlgoSpec) -> None:
    trained, fresh = make(spec, RandomEnv(BOX, CONTINUOUS)).learn(20), make(spec, RandomEnv(BOX, CONTINUOUS), seed=5)
    fresh.set_parameters(trained.get_parameters())
    assert th.equal(parameters(fresh), parameters(trained))


@every_algorithm
def test_predict_shapes_and_errors(spec: AlgoSpec) -> None:
    model = make(spec, RandomEnv(BOX, CONTINUOUS))
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


@every_algorithm
def test_predict_takes_images_in_either_channel_order(spec: AlgoSpec) -> None:
    need(spec, "CnnPolicy")
    last = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    model = make(spec, RandomEnv(last, CONTINUOUS), "CnnPolicy")
    assert isinstance(model.env, VecTransposeImage)
    image = last.sample()
    actions = [model.predict(channels, deterministic=True)[0] for channels in (image, image.transpose(2, 0, 1))]
    np.testing.assert_array_equal(*actions)


@every_algorithm
def test_vec_normalize(spec: AlgoSpec) -> None:
    env = VecNormalize(make_vec_env(lambda: RandomEnv(BOX, CONTINUOUS), n_envs=2))
    model = make(spec, env).learn(40)
    assert model.get_vec_normalize_env() is env
    assert env.obs_rms.count > 20


@every_algorithm
def test_subprocess_environments(spec: AlgoSpec) -> None:
    env = make_vec_env("Pendulum-v1", n_envs=2, vec_env_cls=SubprocVecEnv)
    try:
        assert make(spec, env).learn(30).num_timesteps >= 30
    finally:
        env.close()


class Watcher(BaseCallback):
    """Sees SB3's local names and stops after some steps."""

    def __init__(self, stop_at: int) -> None:
        super().__init__()
        self.stop_at = stop_at

    def _on_step(self) -> bool:
        assert {"new_obs", "rewards", "dones", "infos", "actions"} <= set(self.locals)
        return self.n_calls < self.stop_at


@every_algorithm
def test_callbacks_and_early_stop(spec: AlgoSpec, tmp_path: Any) -> None:
    model = make(spec, RandomEnv(BOX, CONTINUOUS))
    evaluation = EvalCallback(
        make_vec_env(lambda: RandomEnv(BOX, CONTINUOUS)),
        eval_freq=5,
        n_eval_episodes=1,
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    model.learn(100, callback=CallbackList([Watcher(stop_at=12), evaluation]))
    assert model.num_timesteps == 12
    assert (tmp_path / "best_model.zip").is_file()


@every_algorithm
def test_tensorboard_run_is_named_after_the_class(spec: AlgoSpec, tmp_path: Any) -> None:
    make(spec, RandomEnv(BOX, CONTINUOUS), tensorboard_log=str(tmp_path)).learn(15)
    assert [path.name for path in tmp_path.iterdir()] == [f"{spec.cls.__name__}_1"]


@every_algorithm
def test_set_env(spec: AlgoSpec) -> None:
    model = make(spec, RandomEnv(BOX, CONTINUOUS)).learn(15)
    model.set_env(RandomEnv(BOX, CONTINUOUS))
    model.learn(5, reset_num_timesteps=False)
    with pytest.raises(ValueError, match="spaces do not match"):
        model.set_env(ScriptedEnv())


@with_policy("MultiInputPolicy")
def test_her(spec: AlgoSpec) -> None:
    env = BitFlippingEnv(n_bits=3, continuous=True)
    model = make(
        spec, env, "MultiInputPolicy", replay_buffer_class=HerReplayBuffer, replay_buffer_kwargs={"n_sampled_goal": 2}
    )
    model.learn(30)
    assert isinstance(model.replay_buffer, HerReplayBuffer)
    assert model._n_updates > 0


@every_off_policy_algorithm
def test_memory_optimised_buffer(spec: AlgoSpec) -> None:
    kwargs = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
    model = make(spec, RandomEnv(BOX, CONTINUOUS), **kwargs).learn(20)
    assert not hasattr(model.replay_buffer, "next_observations")


@every_off_policy_algorithm
@pytest.mark.parametrize("train_freq", [4, (2, "step"), (1, "episode"), [2, "step"]], ids=str)
def test_train_freq(spec: AlgoSpec, train_freq: Any) -> None:
    model = make(spec, RandomEnv(BOX, CONTINUOUS), train_freq=train_freq, gradient_steps=-1, learning_starts=0)
    model.learn(28)
    assert model._n_updates == 28


SET_BY_SUBCLASSES = {"support_multi_env", "monitor_wrapper", "sde_support", "supported_action_spaces"}
"""What SB3's base class is told by the algorithms, and users do not choose."""
ONLY_SDE = {"use_sde", "sde_sample_freq", "use_sde_at_warmup"}


def arguments_of_sb3(spec: AlgoSpec) -> frozenset[str]:
    """What the SB3 class lets users choose; its base class knows gSDE, which it is for the subclass to take up."""
    keys = constructor_keys(spec.cls.sb3_class)  # type: ignore[attr-defined]
    if spec.cls.sb3_class is OnPolicyAlgorithm:  # type: ignore[attr-defined]  # which has no defaults
        return frozenset()
    return keys - SET_BY_SUBCLASSES - ONLY_SDE if spec.cls.sb3_class is OffPolicyAlgorithm else keys  # type: ignore[attr-defined]


def shared_arguments(spec: AlgoSpec) -> frozenset[str]:
    """Those that are documented in a TypedDict, with others of the class's kind."""
    *_, kwargs = inspect.signature(spec.cls.__init__).parameters.values()
    named = OffPolicyArguments.__optional_keys__ if issubclass(spec.cls, OffPolicyAlgorithm) else frozenset()
    return frozenset(kwargs.annotation.__args__[0].__optional_keys__ | named)


OUR_OWN = {
    OffPolicyAlgorithm: {"max_grad_norm", "exploration_noise", "warmup", "engine"},
    OnPolicyAlgorithm: {"rollout", "rollout_episodes", "drop_unfinished_episodes", "engine"},
}
"""Of the arguments that the algorithms of a kind share."""


@every_algorithm
def test_documented_arguments_are_sb3s_and_our_own(spec: AlgoSpec) -> None:
    theirs = arguments_of_sb3(spec)
    ours = constructor_keys(spec.cls)
    assert theirs <= ours
    shared = shared_arguments(spec)
    kind = OffPolicyAlgorithm if issubclass(spec.cls, OffPolicyAlgorithm) else OnPolicyAlgorithm
    theirs |= constructor_keys(kind)  # SB3's DDPG does not pass on stats_window_size
    assert shared <= ours
    assert shared - theirs == OUR_OWN[kind] & shared
    if kind is OffPolicyAlgorithm or spec.cls.sb3_class is not kind:  # type: ignore[attr-defined]
        assert OUR_OWN[kind] <= shared
    assert frozenset(CommonKwargs.__optional_keys__) <= theirs


@every_algorithm
def test_every_argument_is_documented_once(spec: AlgoSpec) -> None:
    assert spec.cls.__doc__ is not None
    documented = re.findall(r"^ *:param (\w+):", spec.cls.__doc__, re.MULTILINE)
    assert sorted([*documented, *shared_arguments(spec)]) == sorted([*constructor_keys(spec.cls), "kwargs"])


@every_algorithm
def test_subclasses_that_hand_arguments_on(spec: AlgoSpec) -> None:
    class Own(spec.cls):  # type: ignore[name-defined, misc]
        def __init__(self, *args: Any, own: int = 1, **kwargs: Any) -> None:
            self.own = own
            super().__init__(*args, **kwargs)

    assert constructor_keys(Own) == constructor_keys(spec.cls) | {"own"}
    env = TimeLimit(RandomEnv(BOX, CONTINUOUS), 9)
    assert Own("MlpPolicy", env, own=2, gamma=0.5).gamma == 0.5
    with pytest.raises(TypeError, match="did you mean 'gamma'"):
        Own("MlpPolicy", env, gama=0.5)


@every_algorithm
def test_arguments_keep_sb3s_defaults(spec: AlgoSpec) -> None:
    env = TimeLimit(RandomEnv(BOX, CONTINUOUS), 9)
    ours = spec.cls("MlpPolicy", env)
    names = arguments_of_sb3(spec) - {"policy", "env"}
    if spec.cls.sb3_class is OffPolicyAlgorithm:  # type: ignore[attr-defined]  # no algorithm by itself: no rate, no buffer yet
        theirs = OffPolicyAlgorithm(type(ours.policy), env, 0.0, sde_support=False)
        theirs._convert_train_freq()
        names -= {"learning_rate", "replay_buffer_class"}
    elif names:
        theirs = spec.cls.sb3_class("MlpPolicy", env)  # type: ignore[attr-defined]
    for name in names:
        name = {"stats_window_size": "_stats_window_size"}.get(name, name)
        values = (getattr(model, name) for model in (ours, theirs))
        own, other = (value(1.0) if isinstance(value, FloatSchedule) else value for value in values)
        assert own == other, name
