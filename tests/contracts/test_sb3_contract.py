"""
What holds for SB3's classes holds for ours: numbers, arguments, errors, files, pickles, `predict`.

Where SB3 has the algorithm, the same call of SB3's class is the oracle.
"""

import copy
import gc
import inspect
import io
import itertools
import pickle
import random
import re
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch as th
from environments import BOX, CONTINUOUS, RandomEnv, ScriptedEnv
from gymnasium import spaces
from interventions import REMEMBERING
from models import (
    CRITICS,
    EVERY,
    OFF_POLICY,
    ON_POLICY,
    SB3,
    SB3_OFF_POLICY,
    SB3_ON_POLICY,
    VARIANTS,
    WITH_ALPHA,
    algorithm_class,
    environment,
    rows,
    small_model,
)
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer, RolloutBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import TD3Policy
from subjects import ROUNDING, Intervention, Outcome, Subject, assert_same, assert_sb3s, numbers, observations, observe
from torch import nn

ATOL = 1e-5

sb3_rows = pytest.mark.parametrize("row", SB3)
engine_on_and_off = pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])


# The same numbers


@cache
def trained(row: str, variant: str, kind: bool | str) -> Outcome:
    subject = Subject(row, kind, Intervention("nothing", lambda _: None, variant=variant))
    return observe(subject, subject.learn(18 if "images" in variant else 28))


@pytest.mark.parametrize(
    ("row", "variant"),
    [(row, name) for name, variant in VARIANTS.items() for row in variant.rows if variant.sb3 and row in SB3],
)
@engine_on_and_off
def test_training_is_sb3s(row: str, variant: str, engine: bool) -> None:
    """Off-policy bit for bit without the engine, with one, two and three critics too."""
    assert_sb3s(trained(row, variant, engine), trained(row, variant, "sb3"), ATOL if engine else ROUNDING[row])
    assert trained(row, variant, "sb3").error is None


def without_sb3() -> list[Any]:
    """A third of them by default, drawn."""
    found = []
    for name, variant in VARIANTS.items():
        for row in variant.rows if not variant.sb3 else [row for row in variant.rows if row not in SB3]:
            default = name == "mlp" or random.Random(f"{row} {name}").random() < 1 / 3
            found.append(pytest.param(row, name, marks=[] if default else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("row", "variant"), without_sb3())
def test_what_sb3_does_not_have_trains_as_without_the_engine(row: str, variant: str) -> None:
    assert_same(trained(row, variant, True), trained(row, variant, False), ATOL)


NUMBERS = ["one critic", "two critics", "three critics"]


@pytest.mark.parametrize(("row", "variant"), [*itertools.product(CRITICS, NUMBERS)])
def test_there_are_as_many_critics_as_asked_for(row: str, variant: str) -> None:
    n = VARIANTS[variant].policy_kwargs["n_critics"]
    model = small_model(row, variant)
    obs, actions = th.zeros(5, 4), th.zeros(5, 2)
    values = model.critic(obs, actions)
    assert [value.shape for value in values] == [(5, 1)] * n
    assert len(model.critic_target(obs, actions)) == n
    assert len({tuple(value.flatten().tolist()) for value in values}) == n
    model.learn(20)
    keys = {key for key in model.logger.name_to_value if re.fullmatch(r"train/q(_[a-z])?", key)}
    if n > 1:
        assert keys == {f"train/q_{'abc'[i]}" for i in range(n)}
    else:
        assert len(keys) == 1


@rows(CRITICS)
def test_number_of_critics_is_sb3s_by_default(row: str) -> None:
    assert len(small_model(row).critic(th.zeros(1, 4), th.zeros(1, 2))) == {"td3x": 2, "ddpgx": 1, "sacx": 2}[row]


@rows(CRITICS)
@pytest.mark.parametrize("n_critics", [0, -1, 1.5, "2", None])
def test_numbers_of_critics_that_there_are_not(row: str, n_critics: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="n_critics"):
        small_model(row, policy_kwargs={"n_critics": n_critics})


SAVED = [
    *((row, variant) for row in CRITICS for variant in ("mlp", "one critic", "three critics", "batch norm")),
    *(("sacx", "gsde"), ("sacx", "fixed alpha"), ("sacx", "value network"), ("maddpg", "mlp"), ("maddpg", "two critics")),
    *((row, variant) for row in ON_POLICY if row in REMEMBERING for variant in ("mlp", "extractor", "discrete")),
    *(("ppox", "gsde"), ("ppox", "phases"), ("ppox", "penalty"), ("trpox", "batch norm")),
]
"""AC is not among them, which learns from no memory."""


def saved_and_loaded(model: Any, cls: Any = None, **kwargs: Any) -> Any:
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    loaded = (cls or type(model)).load(file, env=model.env, device="cpu", **kwargs)
    loaded.set_logger(model.logger)
    return loaded


def seed() -> None:
    """Files of ours go on with the numbers that would have been drawn next, so this is called before they are written too."""
    th.manual_seed(1)
    np.random.seed(1)


def train_from_here(model: Any, updates: int = 12) -> th.Tensor:
    seed()
    model.train(*((updates, 8) if isinstance(model, OffPolicyAlgorithm) else ()))
    return numbers(model)


def share_memory(model: Any, other: Any) -> None:
    """Let a model learn from what another one has experienced."""
    if isinstance(other, OffPolicyAlgorithm):
        model.replay_buffer = other.replay_buffer
    elif hasattr(other, "_results"):
        model._results = other._results
        if hasattr(other, "replay_buffer"):
            model.replay_buffer = copy.deepcopy(other.replay_buffer)
    else:
        model.rollout_buffer = copy.deepcopy(other.rollout_buffer)
        model._rollout_length = getattr(other, "_rollout_length", other.n_steps)
        model._kept = getattr(other, "_kept", None)


@pytest.mark.parametrize(("row", "variant"), SAVED)
def test_saved_models_predict_and_go_on(row: str, variant: str) -> None:
    model = small_model(row, variant).learn(30)
    seed()
    loaded = saved_and_loaded(model)
    assert th.equal(numbers(loaded), numbers(model))
    batch = observations(model.observation_space, 4)
    actions = [candidate.predict(batch, deterministic=True)[0] for candidate in (loaded, model)]
    np.testing.assert_allclose(*actions, rtol=0, atol=1e-6)
    share_memory(loaded, model)
    th.testing.assert_close(train_from_here(loaded), train_from_here(model), rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("row", "variant"),
    [*itertools.product(CRITICS, NUMBERS), *itertools.product(SB3_ON_POLICY, ("mlp", "extractor", "gsde", "coins"))],
)
@engine_on_and_off
def test_files_of_sb3_go_on(row: str, variant: str, engine: bool) -> None:
    theirs = small_model(SB3[row], variant).learn(30)
    ours = saved_and_loaded(theirs, algorithm_class(row), engine=engine)
    assert th.equal(numbers(ours), numbers(theirs))
    share_memory(ours, theirs)
    ours._n_updates = theirs._n_updates
    assert_close = th.testing.assert_close
    assert_close(train_from_here(ours), train_from_here(theirs), rtol=0, atol=ATOL if engine else ROUNDING[row])


def pairs() -> list[Any]:
    """By default some two in three, drawn, of those that are both on-policy or both not."""
    found = []
    for saved, loads in itertools.permutations(EVERY, 2):
        chosen = (saved in OFF_POLICY) == (loads in OFF_POLICY) and random.Random(f"{saved} {loads}").random() < 2 / 3
        found.append(pytest.param(saved, loads, marks=[] if chosen else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("saved", "loads"), pairs())
@pytest.mark.filterwarnings("ignore:rollout='episodes' waits for:UserWarning")  # REINFORCE's rollouts in others
def test_a_file_of_another_class_is_refused_or_works(saved: str, loads: str) -> None:
    """At once and by a message, not at the first update."""
    model = small_model(saved).learn(15)
    file = io.BytesIO()
    model.save(file)
    file.seek(0)
    env, steps, seen = environment(saved), [], []
    original = env.step
    env.step = lambda action: steps.append(action) or original(action)
    try:
        seen.append(algorithm_class(loads).load(file, env=env))
        seen[0].learn(15, reset_num_timesteps=False)
    except (ValueError, TypeError) as error:
        assert str(error)
        assert not steps
        return
    assert seen[0]._n_updates > model._n_updates


@sb3_rows
@engine_on_and_off
def test_logged_keys_are_sb3s_and_more(row: str, engine: bool) -> None:
    ours, theirs = small_model(row, engine=engine).learn(28), small_model(SB3[row]).learn(28)
    for name, value in theirs.logger.name_to_value.items():
        assert name in ours.logger.name_to_value
        if not name.startswith("time/") and name != "train/loss":  # which is PPO's last one, ours the mean
            assert ours.logger.name_to_value[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@rows()
def test_logged_values_do_not_depend_on_the_engine(row: str) -> None:
    own = {"gradient_steps": 3} if row in OFF_POLICY else {}
    fast, plain = (small_model(row, engine=engine, **own).learn(30) for engine in (True, False))
    own, expected = fast.logger.name_to_value, plain.logger.name_to_value
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        if not name.startswith("time/"):
            assert own[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


# Arguments


def positional(cls: Any, until: str | None = None) -> dict[str, Any]:
    """Values by SB3's order, none of them a default."""
    values = {
        "policy": "MlpPolicy",
        "env": environment(cls),
        "learning_rate": 2e-3,
        "buffer_size": 123,
        "learning_starts": 7,
        "batch_size": 5,
        "tau": 0.3,
        "gamma": 0.8,
        "train_freq": 3,
        "gradient_steps": 2,
        "action_noise": NormalActionNoise(np.zeros(2), np.ones(2)),
        "replay_buffer_class": type("Own", (ReplayBuffer,), {}),
        "replay_buffer_kwargs": {"handle_timeout_termination": False},
        "optimize_memory_usage": True,
        "n_steps": 1,
        "policy_delay": 3,
        "target_policy_noise": 0.4,
        "target_noise_clip": 0.6,
        "ent_coef": 0.2,
        "target_update_interval": 3,
        "target_entropy": -0.7,
        "use_sde": True,
        "sde_sample_freq": 4,
        "use_sde_at_warmup": True,
        "stats_window_size": 50,
        "tensorboard_log": "folder",
        "policy_kwargs": {"net_arch": [8]},
        "verbose": 0,
        "seed": 3,
        "device": "cpu",
    }
    if issubclass(cls, OnPolicyAlgorithm):
        values |= {
            **{"n_steps": 10, "n_epochs": 3, "gae_lambda": 0.7, "clip_range": 0.1, "clip_range_vf": 0.3, "vf_coef": 0.4},
            **{"normalize_advantage": False, "max_grad_norm": 0.6, "target_kl": 0.9, "rollout_buffer_kwargs": {}},
            "rollout_buffer_class": type("Own", (RolloutBuffer,), {}),
        }
    names = [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "_init_setup_model")]
    return {name: values[name] for name in names[: None if until is None else names.index(until) + 1]}


NOT_COMPARED = {"policy", "env", "policy_kwargs", "replay_buffer_kwargs", "device", "learning_rate"}
SCHEDULES = {"clip_range", "clip_range_vf"}


@pytest.mark.parametrize(
    ("row", "until"),
    [
        *itertools.product(
            SB3_OFF_POLICY, ["learning_rate", "learning_starts", "train_freq", "optimize_memory_usage", "n_steps", None]
        ),
        *itertools.product(SB3_ON_POLICY, ["learning_rate", "batch_size", "n_epochs", None]),
    ],
)
def test_positional_arguments_in_sb3s_order(row: str, until: str | None) -> None:
    values = positional(SB3[row], until)
    ours, theirs = algorithm_class(row)(*values.values()), SB3[row](*values.values())
    for name in values.keys() & SCHEDULES:
        assert getattr(ours, name)(1.0) == getattr(theirs, name)(1.0) == values[name]
    for name in values.keys() - NOT_COMPARED - SCHEDULES:
        name = {"stats_window_size": "_stats_window_size"}.get(name, name)
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.lr_schedule(1.0) == theirs.lr_schedule(1.0) == 2e-3
    if row in OFF_POLICY:
        assert type(ours.replay_buffer) is type(theirs.replay_buffer)


@pytest.mark.parametrize("row", [*SB3, "trpox"])
def test_signatures_begin_with_sb3s(row: str) -> None:
    """In its order and with its defaults; what is ours is given by name."""
    cls: Any = algorithm_class(row)
    ours, theirs = (inspect.signature(kind).parameters for kind in (cls, cls.sb3_class))
    assert [name for name, one in ours.items() if one.kind is one.POSITIONAL_OR_KEYWORD] == list(theirs)
    assert {name: ours[name].default for name in theirs} == {name: one.default for name, one in theirs.items()}
    assert all(one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY) for one in ours.values())


def test_positional_arguments_of_several_agents_are_ddpgs() -> None:
    values = positional(SB3["ddpgx"], "gradient_steps")
    ours, theirs = algorithm_class("maddpg")(*values.values()), SB3["ddpgx"](*values.values())
    for name in values.keys() - NOT_COMPARED:
        assert getattr(ours, name) == getattr(theirs, name), name


@rows(SB3_OFF_POLICY)
@engine_on_and_off
@pytest.mark.parametrize(("process", "n_envs"), [(NormalActionNoise, 1), (OrnsteinUhlenbeckActionNoise, 3)])
def test_noise_that_broadcasts(row: str, process: Any, n_envs: int, engine: bool) -> None:
    space = spaces.Box(-1, 1, (10,), np.float32)
    models = []
    for cls, own in ((row, {"engine": engine}), (SB3[row], {})):
        env = make_vec_env(lambda: RandomEnv(copy.deepcopy(BOX), copy.deepcopy(space)), n_envs=n_envs, seed=0)
        model = small_model(cls, env=env, action_noise=process(np.zeros(1), 0.3 * np.ones(1)), **own)
        models.append(model.learn(30))
    ours, theirs = models
    np.testing.assert_allclose(ours.replay_buffer.actions, theirs.replay_buffer.actions, rtol=0, atol=ATOL if engine else 0)


@rows(SB3_OFF_POLICY)
def test_noise_of_another_shape_is_refused(row: str) -> None:
    with pytest.raises(ValueError, match="action_noise"):
        small_model(row, action_noise=NormalActionNoise(np.zeros(3), np.ones(3)))


def no_episodes() -> Any:
    return make_vec_env(lambda: RandomEnv(BOX, CONTINUOUS), n_envs=2)


def with_actions(space: spaces.Space) -> Any:
    return RandomEnv(copy.deepcopy(BOX), space)


DICT = spaces.Dict({"vector": BOX, "choice": spaces.Discrete(3)})

FRUGAL: dict[str, Any] = {"optimize_memory_usage": True, "replay_buffer_kwargs": {"handle_timeout_termination": False}}
"""To be copied: SB3 writes into it."""

REFUSED: dict[str, Callable[[Any], Any]] = {
    **{
        f"learning_rate={value!r}": lambda cls, value=value: small_model(cls, learning_rate=value).learn(14)
        for value in ("x", None, [1e-3])
    },
    "unknown policy": lambda cls: small_model(cls, policy="NoPolicy"),
    "no policy for dicts": lambda cls: small_model(cls, env=RandomEnv(DICT, CONTINUOUS)),
    "images for a vector": lambda cls: small_model(cls, policy="CnnPolicy"),
    "other spaces": lambda cls: small_model(cls).set_env(ScriptedEnv()),
    "other number of environments": lambda cls: small_model(cls).set_env(no_episodes()),
    "no environment": lambda cls: cls.load(file_of(cls)).learn(10),
    "unknown object": lambda cls: small_model(cls).set_parameters({"nothing": {}}),
    "unknown object among others": lambda cls: small_model(cls).set_parameters({**parameters_of(cls), "nothing": {}}),
    "shape of an observation": lambda cls: small_model(cls).predict(np.zeros(5, np.float32)),
    "shape of observations": lambda cls: small_model(cls).predict(np.zeros((3, 5), np.float32)),
    "what reset returns": lambda cls: small_model(cls).predict((np.zeros(4, np.float32), {})),
    "dict observation": lambda cls: small_model(cls).predict({"vector": np.zeros(4)}),
    "no file": lambda cls: cls.load("/no/such/file.zip"),
    "policy_kwargs": lambda cls: small_model(cls, policy_kwargs={"net_arc": [8]}),
    "other policy_kwargs": lambda cls: cls.load(file_of(cls), policy_kwargs={"net_arch": [9]}),
}
REFUSED_OFF_POLICY: dict[str, Callable[[Any], Any]] = {
    **{
        f"train_freq={value!r}": lambda cls, value=value: small_model(cls, train_freq=value).learn(14)
        for value in ("4", None, 1.5, 0, -1, {}, b"1", ("a", "step"), (1, "steps"), (0, "step"), (1.5, "step"))
    },
    "episodes of two": lambda cls: small_model(cls, env=no_episodes(), train_freq=(1, "episode")).learn(14),
    "discrete actions": lambda cls: small_model(cls, env=with_actions(spaces.Discrete(3))),
    "unbounded actions": lambda cls: small_model(cls, env=with_actions(spaces.Box(-np.inf, np.inf, (2,)))),
    "n-step dicts": lambda cls: small_model(cls, "dict", n_steps=3),
    "memory of n steps": lambda cls: small_model(cls, n_steps=3, **copy.deepcopy(FRUGAL)).learn(14),
    "memory and time limits": lambda cls: small_model(cls, optimize_memory_usage=True).learn(14),
    "memory of dicts": lambda cls: small_model(cls, "dict", **copy.deepcopy(FRUGAL)).learn(14),
    "dict buffer": lambda cls: small_model(cls, replay_buffer_class=DictReplayBuffer).learn(14),
    "dimension of noise": lambda cls: small_model(cls, action_noise=NormalActionNoise(np.zeros(3), np.ones(3))).learn(14),
}
REFUSED_BY_SAC: dict[str, Callable[[Any], Any]] = {
    **{
        f"ent_coef={value!r}": lambda cls, value=value: small_model(cls, ent_coef=value).learn(14)
        for value in ("x", "auto_-1", "auto_x", "auto_0")
    },
    "target_entropy": lambda cls: small_model(cls, target_entropy="x"),
}
REFUSED_BY_PPO: dict[str, Callable[[Any], Any]] = {
    **{
        f"clip_range_vf={value!r}": lambda cls, value=value: small_model(cls, clip_range_vf=value).learn(6)
        for value in (-1.0, 0)
    },
    **{f"{name}=0": lambda cls, name=name: small_model(cls, **{name: 0}).learn(6) for name in ("n_steps", "batch_size")},
    **{
        f"{name}={value!r}": lambda cls, name=name, value=value: small_model(cls, **{name: value}).learn(6)
        for name, value in itertools.product(
            ("n_steps", "batch_size", "n_epochs", "clip_range", "gae_lambda", "ent_coef", "vf_coef"), ("x", {})
        )
    },
    "dict buffer": lambda cls: small_model(cls, "dict", rollout_buffer_class=RolloutBuffer).learn(6),
    "no number for gamma": lambda cls: small_model(cls, gamma={}).learn(6),
    "no number for max_grad_norm": lambda cls: small_model(cls, max_grad_norm="x").learn(6),
    "a single sample": lambda cls: small_model(cls, n_steps=1, batch_size=1),
    "infinite bounds and squashing": lambda cls: small_model(
        cls, env=with_actions(spaces.Box(-np.inf, np.inf, (2,))), policy_kwargs={"squash_output": True}
    ),
}
ALL_REFUSED = [
    *itertools.product(SB3, [REFUSED]),
    *itertools.product(SB3_OFF_POLICY, [REFUSED_OFF_POLICY]),
    *itertools.product(WITH_ALPHA, [REFUSED_BY_SAC]),
    *itertools.product(SB3_ON_POLICY, [REFUSED_BY_PPO]),
]


def file_of(cls: Any) -> io.BytesIO:
    file = io.BytesIO()
    small_model(cls).save(file)
    file.seek(0)
    return file


def parameters_of(cls: Any) -> dict[str, Any]:
    return small_model(cls).get_parameters()


@pytest.mark.filterwarnings("ignore")  # SB3 warns of some of them too
@pytest.mark.parametrize(
    ("row", "attempt"),
    [pytest.param(row, refused[what], id=f"{row}-{what}") for row, refused in ALL_REFUSED for what in refused],
)
def test_what_sb3_refuses_is_refused_as_it_does(row: str, attempt: Callable[[Any], Any]) -> None:
    """By an exception of the same type or of a subclass of it, so that what catches SB3's catches ours."""
    with pytest.raises(Exception) as theirs:  # whatever it is
        attempt(SB3[row])
    with pytest.raises(theirs.type):
        attempt(algorithm_class(row))


# Objects of a model


@rows()
def test_set_parameters_wants_every_object(row: str) -> None:
    model = small_model(row).learn(15)
    everything = model.get_parameters()
    assert len(everything) >= 2
    for missing in everything:
        some = {name: value for name, value in everything.items() if name != missing}
        with pytest.raises(ValueError, match=re.escape(missing)):
            model.set_parameters(some, exact_match=True)
        model.set_parameters(some, exact_match=False)
    model.set_parameters(everything, exact_match=True)


@rows(OFF_POLICY)
def test_deleting_the_buffer_frees_it(row: str) -> None:
    model = small_model(row).learn(20)
    buffer = weakref.ref(model.replay_buffer)
    before = numbers(model)
    del model.replay_buffer
    gc.collect()
    assert buffer() is None
    assert model.predict(observations(model.observation_space))[0].shape == model.action_space.shape
    assert th.equal(numbers(saved_and_loaded(model)), before)


@rows()
@pytest.mark.parametrize(
    ("pickler", "environment_too"), [(pickle, False), (cloudpickle, True)], ids=["pickle", "cloudpickle with its environment"]
)
def test_trained_models_can_be_pickled(row: str, pickler: Any, environment_too: bool) -> None:
    model = small_model(row).learn(30)
    env = model.env
    if not environment_too:
        model.env = None
    seed()
    other = pickle.loads(pickler.dumps(model))
    model.env = other.env = env
    assert th.equal(numbers(other), numbers(model))
    batch = observations(model.observation_space, 3)
    np.testing.assert_allclose(
        *(candidate.predict(batch, deterministic=True)[0] for candidate in (other, model)), rtol=0, atol=1e-6
    )
    th.testing.assert_close(train_from_here(other), train_from_here(model), rtol=0, atol=ATOL)
    before = numbers(other)
    train_from_here(model)
    assert th.equal(numbers(other), before)


@rows()
def test_copied_models_go_on_by_themselves(row: str) -> None:
    model = small_model(row).learn(30)
    seed()
    other = copy.deepcopy(model)
    before = numbers(other)
    trained_one = train_from_here(model)
    assert th.equal(numbers(other), before)
    th.testing.assert_close(train_from_here(other), trained_one, rtol=0, atol=ATOL)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.deepcopy,
    "pickle": lambda policy: pickle.loads(pickle.dumps(policy)),
}


@pytest.mark.parametrize(("row", "variant"), [(row, variant) for variant in ("mlp", "gsde") for row in VARIANTS[variant].rows])
def test_policies_can_be_copied_at_any_time(row: str, variant: str) -> None:
    model = small_model(row, variant)
    batch = observations(model.observation_space, 3)
    copies = []
    for updates in (0, 1, 1, 5, 9):
        if updates:
            model.learn(10 if model.num_timesteps == 0 else updates, reset_num_timesteps=False)
        for how, copied in COPIES.items():
            copies.append((how, copied(model.policy), model.policy.predict(batch, deterministic=True)[0]))
        model.predict(batch, deterministic=True)
    for how, other, expected in copies:
        np.testing.assert_allclose(other.predict(batch, deterministic=True)[0], expected, rtol=0, atol=1e-6, err_msg=how)
        with th.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
    assert numbers(model).abs().max() > 0


@sb3_rows
@pytest.mark.parametrize("steps", [0, 40])
@engine_on_and_off
def test_pickles_are_as_small_as_sb3s(row: str, steps: int, engine: bool) -> None:
    sizes = []
    for cls, own in ((row, {"engine": engine}), (SB3[row], {})):
        model = small_model(cls, policy_kwargs={"net_arch": [64, 64]}, **own)
        if steps:
            model.learn(steps)
        model.predict(np.zeros((3, 4), np.float32))
        memory = io.BytesIO()
        th.save(model.policy.state_dict(), memory)
        sizes.append(
            {
                "state_dict": len(pickle.dumps(model.policy.state_dict())),
                "policy": len(pickle.dumps(model.policy)),
                "one parameter": len(pickle.dumps(next(model.policy.parameters()))),
                "th.save": len(memory.getvalue()),
            }
        )
    ours, theirs = sizes
    for name, size in theirs.items():
        assert ours[name] <= 1.1 * size, name


# Predict


def outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return type(error)


def assert_same_prediction(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, type):
        assert isinstance(ours, type)
        assert issubclass(ours, theirs)
    else:
        (own, _), (action, _) = ours, theirs
        assert type(own) is type(action)
        assert (own.shape, own.dtype) == (action.shape, action.dtype)
        np.testing.assert_allclose(own, action, rtol=0, atol=ATOL)


@sb3_rows
@engine_on_and_off
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(
    "batch",
    [
        np.full(4, np.nan, np.float32),
        np.full((2, 4), np.inf, np.float32),
        np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]], np.float32),
        np.array([0, -np.inf, 0, 0], np.float32),
        np.zeros((0, 4), np.float32),
        np.zeros((0, 4), np.float64),
        np.ones(4, np.float64),
        np.ones((3, 4), np.int64),
        [0.5, 0.5, 0.5, 0.5],
    ],
    ids=["nan", "inf", "one nan", "-inf", "none", "none in float64", "float64", "int64", "list"],
)
def test_unusual_observations(row: str, batch: Any, deterministic: bool, engine: bool) -> None:
    """Before and after others that are as usual."""
    ours, theirs = small_model(row, engine=engine), small_model(SB3[row])
    for _ in range(2):
        found = []
        for model in (ours, theirs):
            th.manual_seed(0)
            with np.errstate(all="ignore"):
                found.append(outcome(lambda model=model: model.predict(batch, deterministic=deterministic)))
        assert_same_prediction(*found)
        for size in range(1, 6):
            for _ in range(8):
                ours.predict(np.zeros((size, 4), np.float32), deterministic=deterministic)
        ours.predict(np.zeros(4, np.float32), deterministic=deterministic)


@rows()
@pytest.mark.parametrize("n", [0, 1, 2])
def test_empty_batches_of_any_row(row: str, n: int) -> None:
    model = small_model(row).learn(20)
    action, _ = model.predict(np.zeros((n, *model.observation_space.shape), np.float32))
    assert action.shape == (n, *model.action_space.shape)


CHOICES = ("discrete", "several choices", "coins")


@pytest.mark.parametrize(
    ("row", "variant"), [*itertools.product(EVERY, ["mlp"]), *((row, name) for name in CHOICES for row in VARIANTS[name].rows)]
)
@engine_on_and_off
def test_predict_raises_no_floating_point_error(row: str, variant: str, engine: bool) -> None:
    """With NumPy told to raise, and outputs that saturate tanh and exp."""
    model = small_model(row, variant, engine=engine)
    for parameter in (model.actor if row in OFF_POLICY else model.policy).parameters():
        parameter.data.mul_(300)
    with np.errstate(all="raise"):
        for batch, deterministic in itertools.product((None, 3), (True, False)):
            action, _ = model.predict(observations(model.observation_space, batch), deterministic=deterministic)
            assert np.isfinite(action).all()


class Echo(RandomEnv):
    """Keeps the actions that it was given."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seen: list[Any] = []

    def step(self, action: Any) -> Any:
        self.seen.append(action)
        self.t += 1
        return self.observation_space.sample(), float(np.sum(action)), self.t % self.length == 0, False, {}


def act(cls: Any, space: spaces.Space, **kwargs: Any) -> tuple[Any, Any, Any]:
    env = Echo(copy.deepcopy(BOX), copy.deepcopy(space))
    model = small_model(cls, env=env, **kwargs).learn(25)
    found = [model.predict(observations(BOX, n), deterministic=True) for n in (None, 3)]
    return model, env.seen, found


@sb3_rows
@engine_on_and_off
@pytest.mark.parametrize(
    "space",
    [spaces.Box(-1, 1, (), np.float32), spaces.Box(0, 3, (2,), np.float16), spaces.Box(-1, 2, (2, 2), np.float64)],
    ids=["scalar", "float16", "float64 matrix"],
)
def test_boxes_of_unusual_shape_and_type(row: str, space: Any, engine: bool) -> None:
    ours, theirs = act(row, space, engine=engine), act(SB3[row], space)
    for own, expected in zip(ours[1], theirs[1], strict=True):
        assert type(own) is type(expected)
        assert own.dtype == expected.dtype
        np.testing.assert_allclose(own, expected, rtol=0, atol=1e-3 if space.dtype == np.float16 else ATOL)
    for own, expected in zip(ours[2], theirs[2], strict=True):
        assert_same_prediction(own, expected)


@sb3_rows
@engine_on_and_off
@pytest.mark.parametrize("space", [spaces.Box(-2, 5, (2,), np.int64), spaces.Box(0, 9, (3,), np.uint8)], ids=str)
def test_boxes_of_integers(row: str, space: spaces.Box, engine: bool) -> None:
    """SB3's TD3 cannot draw noise of their type and raises at the first update, its SAC takes them."""
    theirs = outcome(lambda: act(SB3[row], space))
    ours = outcome(lambda: act(row, space, engine=engine))
    if isinstance(ours, type):
        assert isinstance(theirs, type)
        assert issubclass(ours, theirs)
    elif not isinstance(theirs, type):
        for own, expected in zip(ours[1], theirs[1], strict=True):
            assert own.dtype == expected.dtype
            np.testing.assert_allclose(own, expected, rtol=0, atol=ATOL)


def test_scalar_boxes_of_one_agent() -> None:
    model, seen, predicted = act("maddpg", spaces.Box(-1, 1, (), np.float32))
    assert model._n_updates > 0
    assert all(np.shape(action) == () for action in seen)
    assert [type(action) for action, _ in predicted] == [np.ndarray, np.ndarray]
    assert [action.shape for action, _ in predicted] == [(), (3,)]


# Classes that users bring


class OwnTD3Policy(TD3Policy):
    """A stranger's, with an actor of its own making."""

    def make_actor(self, features_extractor: Any = None) -> Any:
        actor = super().make_actor(features_extractor)
        actor.mu.append(nn.Linear(2, 2))
        actor.mu.append(nn.Tanh())
        return actor


class OwnActorCriticPolicy(ActorCriticPolicy):
    """A stranger's, with another head."""

    def _build(self, lr_schedule: Any) -> None:
        self.bend = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        super()._build(lr_schedule)

    def _get_action_dist_from_latent(self, latent_pi: th.Tensor) -> Any:
        return super()._get_action_dist_from_latent(self.bend(latent_pi))


class OwnSACPolicy(SACPolicy):
    """A stranger's, with another range of noise."""

    def make_actor(self, features_extractor: Any = None) -> Any:
        actor = super().make_actor(features_extractor)
        actor.latent_pi.append(nn.Tanh())
        return actor


OWN = {"td3x": OwnTD3Policy, "ddpgx": OwnTD3Policy, "sacx": OwnSACPolicy, "ppox": OwnActorCriticPolicy}


@sb3_rows
@engine_on_and_off
def test_policies_derived_from_sb3s(row: str, engine: bool) -> None:
    ours, theirs = small_model(row, policy=OWN[row], engine=engine), small_model(SB3[row], policy=OWN[row])
    results = []
    for model in (ours, theirs):
        model.set_random_seed(0)
        results.append(numbers(model.learn(40)))
    assert isinstance(ours.policy, OWN[row])
    th.testing.assert_close(*results, rtol=0, atol=ATOL if engine else ROUNDING[row])
    th.testing.assert_close(numbers(saved_and_loaded(ours)), results[0], rtol=0, atol=0)


class Relabelled(ReplayBuffer):
    """Returns other rewards than it was given."""

    def _get_samples(self, *args: Any, **kwargs: Any) -> Any:
        batch = super()._get_samples(*args, **kwargs)
        return batch._replace(rewards=-batch.rewards)


@rows(SB3_OFF_POLICY)
@engine_on_and_off
@pytest.mark.parametrize(
    ("buffer", "kwargs"),
    [
        (NStepReplayBuffer, {"n_steps": 3, "gamma": 0.5}),
        (NStepReplayBuffer, None),
        (Relabelled, None),
        (ReplayBuffer, {"handle_timeout_termination": False}),
    ],
    ids=["three steps", "n steps of SB3's default", "own", "plain"],
)
def test_the_buffer_that_is_asked_for_is_used(row: str, buffer: Any, kwargs: Any, engine: bool) -> None:
    results = []
    for cls, own in ((row, {"engine": engine}), (SB3[row], {})):
        model = small_model(cls, replay_buffer_class=buffer, replay_buffer_kwargs=kwargs, **own)
        assert type(model.replay_buffer) is buffer
        results.append(numbers(model.learn(30)))
    th.testing.assert_close(*results, rtol=0, atol=ATOL if engine else 0)
    assert type(saved_and_loaded(model).replay_buffer or model.replay_buffer) is buffer


@pytest.mark.parametrize("buffer", [NStepReplayBuffer, DictReplayBuffer, HerReplayBuffer, ReplayBuffer])
def test_buffers_without_agents_are_refused(buffer: Any) -> None:
    with pytest.raises((NotImplementedError, ValueError), match="replay_buffer_class"):
        small_model("maddpg", replay_buffer_class=buffer)


@pytest.mark.parametrize("sloppy", ["arrays", "no infos"])
def test_several_agents_with_rewards_in_arrays(sloppy: str) -> None:
    """They work, or the error names the agent and what is wrong."""
    env = environment("maddpg")
    original = env.step

    def step(actions: Any) -> Any:
        obs, rewards, terminated, truncated, infos = original(actions)
        if sloppy == "arrays":
            rewards = {name: np.array([value]) for name, value in rewards.items()}
        return obs, rewards, terminated, truncated, None if sloppy == "no infos" else infos

    env.step = step
    try:
        model = small_model("maddpg", env=env).learn(20)
    except (ValueError, TypeError) as error:
        assert re.search("agent_0|infos", str(error))
    else:
        assert model._n_updates > 0


@rows(ON_POLICY)
def test_step_counts_of_any_type(row: str) -> None:
    expected = small_model(row).learn(20).num_timesteps
    for steps in (2e1, np.int64(20), np.float32(20)):
        assert small_model(row).learn(steps).num_timesteps == expected
