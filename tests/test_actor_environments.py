"""Where actors' environments come from, and what the learner keeps for them: statistics and the rows of episodes."""

import gc
import importlib
import inspect
import pickle
import threading
import weakref
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pybullet_envs_gymnasium  # noqa: F401, registers ids
import pytest
from environments import BOX, CONTINUOUS, DICT, RandomEnv, ScriptedEnv
from gymnasium.wrappers import TimeLimit, TransformReward
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import (
    DummyVecEnv,
    SubprocVecEnv,
    VecCheckNan,
    VecEnv,
    VecEnvWrapper,
    VecFrameStack,
    VecMonitor,
    VecNormalize,
    VecTransposeImage,
    unwrap_vec_normalize,
)

from sb3_ac_ext.actors import episodes, remembering
from sb3_ac_ext.actors.environments import EnvironmentSource, environment_source, kinds
from sb3_ac_ext.actors.episodes import EpisodeWriter, no_monitor_files
from sb3_ac_ext.actors.normalization import set_statistics, statistics, update_statistics
from sb3_ac_ext.actors.remembering import install, remembered
from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError


def doubled(env: gym.Env) -> gym.Env:
    """A ``wrapper_class``."""
    return TransformReward(env, lambda reward: 2 * reward)


def trajectory(venv: VecEnv, steps: int = 12) -> list[Any]:
    """What the environments show and give for the same actions from the same seeds."""
    shown = [venv.reset()]
    rng = np.random.default_rng(0)
    for _ in range(steps):
        space = venv.action_space
        if isinstance(space, gym.spaces.Discrete):
            actions = rng.integers(0, space.n, venv.num_envs)
        else:
            actions = rng.uniform(space.low, space.high, (venv.num_envs, *space.shape)).astype(space.dtype)
        shown += venv.step(actions)[:3]
    return shown


def same(venv: VecEnv, seed: int = 3, **kwargs: Any) -> VecEnv:
    """Assert that an actor's environments are the training environment's, by what they do; return them."""
    source = cloudpickle.loads(cloudpickle.dumps(environment_source(venv, **kwargs)))
    made = source.make(seed)
    assert made.num_envs == venv.num_envs
    assert made.observation_space == venv.observation_space
    assert made.action_space == venv.action_space
    venv.seed(seed)
    np.testing.assert_equal(trajectory(made), trajectory(venv))
    assert kinds(made.unwrapped) == kinds(venv.unwrapped)
    return made


def of_zoo(folder: Path, **kwargs: Any) -> VecEnv:
    """As RL Zoo makes its training environments."""
    spec = gym.spec("CartPole-v1")

    def make_env(**kwargs: Any) -> gym.Env:
        return spec.make(**kwargs)

    return make_vec_env(make_env, n_envs=2, seed=1, env_kwargs={}, monitor_dir=str(folder), monitor_kwargs={}, **kwargs)


# The constructors that remember


def test_what_a_vec_env_was_made_of_is_remembered() -> None:
    env_fns = [ScriptedEnv, ScriptedEnv]
    assert remembered(DummyVecEnv(env_fns)) == env_fns
    assert remembered(DummyVecEnv(env_fns=env_fns)) == env_fns


def test_installing_twice_wraps_once() -> None:
    before = DummyVecEnv.__init__
    install()
    importlib.reload(remembering).install()
    assert DummyVecEnv.__init__ is before
    assert len(remembering.remembered(DummyVecEnv([ScriptedEnv]))) == 1


@pytest.mark.parametrize("cls", [DummyVecEnv, SubprocVecEnv])
def test_the_constructors_look_as_before(cls: type[VecEnv]) -> None:
    assert next(iter(inspect.signature(cls).parameters)) == "env_fns"
    assert "env_fns: list" in inspect.getsource(cls.__init__)
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert pickle.loads(pickle.dumps(cls.__init__)) is cls.__init__
    assert cls.__init__.__qualname__ == f"{cls.__name__}.__init__"


def test_subclasses_remember() -> None:
    class Mine(DummyVecEnv):
        def __init__(self, n_envs: int) -> None:
            super().__init__([ScriptedEnv] * n_envs)

    assert remembered(Mine(3)) == [ScriptedEnv] * 3


@pytest.mark.parametrize("copy", [deepcopy, lambda venv: pickle.loads(pickle.dumps(venv))], ids=["deepcopy", "pickle"])
def test_copies_of_a_vec_env_forget(copy: Callable[[VecEnv], VecEnv]) -> None:
    venv = DummyVecEnv([lambda: ScriptedEnv(length=4)])  # a function that could not be pickled
    copied = copy(venv)
    assert len(remembered(venv)) == 1
    assert remembered(copied) == []


def test_a_function_that_refers_to_its_vec_env_does_not_keep_it() -> None:
    env: Any = ScriptedEnv()
    env = DummyVecEnv([lambda: env])
    dead = weakref.ref(env)
    env = None
    gc.collect()
    assert dead() is None


# Copies of the training environment


def test_of_an_id() -> None:
    same(make_vec_env("CartPole-v1", 2, seed=1))


@pytest.mark.parametrize("wrapper_class", [None, doubled, VecCheckNan], ids=["plain", "wrapper_class", "vec_wrapper"])
def test_of_the_zoo(tmp_path: Path, wrapper_class: Any) -> None:
    """With Monitor files, which the actor neither opens nor truncates."""
    if wrapper_class is VecCheckNan:
        venv: VecEnv = VecCheckNan(of_zoo(tmp_path))
    else:
        venv = of_zoo(tmp_path, wrapper_class=wrapper_class)
    trajectory(venv, 60)
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    assert len(before) == 2 and all(text.count("\n") > 2 for text in before.values())
    made = environment_source(venv).make(5)
    trajectory(made, 60)
    made.close()
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before
    same(venv)
    venv.close()


def test_actors_make_no_folder(tmp_path: Path) -> None:
    venv = of_zoo(tmp_path / "logs")
    source = environment_source(venv)
    venv.close()
    for path in (tmp_path / "logs").iterdir():
        path.unlink()
    (tmp_path / "logs").rmdir()
    trajectory(source.make(0))
    assert list(tmp_path.iterdir()) == []


def test_of_a_users_own_monitor(tmp_path: Path) -> None:
    """Nobody knows its file's name, so it is kept from opening one."""
    file = str(tmp_path / "mine")
    venv = DummyVecEnv([lambda: Monitor(gym.make("CartPole-v1"), file, info_keywords=())])
    trajectory(venv, 60)
    before = (tmp_path / "mine.monitor.csv").read_text()
    same(venv).close()
    text = (tmp_path / "mine.monitor.csv").read_text()
    assert text.startswith(before) and text.count("\n") > 2
    venv.close()
    Monitor(gym.make("CartPole-v1"), str(tmp_path / "after")).close()
    assert (tmp_path / "after.monitor.csv").read_text()  # Monitors outside actors write as before


def test_different_environments_keep_their_order() -> None:
    venv = DummyVecEnv([partial(ScriptedEnv, length=length) for length in (2, 5, 3)])
    made = same(venv)
    assert made.get_attr("length") == [2, 5, 3]


def test_of_an_object() -> None:
    """As it is: SB3's function would give the VecEnv that was made of it."""
    env = ScriptedEnv()
    env.length = 6
    model = A2C("MlpPolicy", env)
    made = environment_source(model.get_env()).make(0)
    assert made.get_attr("length") == [6]
    assert made.env_is_wrapped(Monitor) == [True]
    assert made.envs[0].unwrapped is not env
    same(model.get_env())


def test_of_an_object_with_a_monitor_file(tmp_path: Path) -> None:
    env = Monitor(ScriptedEnv(), str(tmp_path / "one"))
    venv = A2C("MlpPolicy", env).get_env()
    trajectory(venv)
    before = (tmp_path / "one.monitor.csv").read_text()
    made = environment_source(venv).make(0)
    trajectory(made)
    made.close()
    assert (tmp_path / "one.monitor.csv").read_text() == before
    trajectory(venv)
    assert (tmp_path / "one.monitor.csv").read_text().startswith(before)
    venv.close()


def test_of_a_name_that_becomes_the_vec_env() -> None:
    env: Any = ScriptedEnv(length=4)
    env = DummyVecEnv([lambda: env])
    assert same(env).get_attr("length") == [4]


def test_actors_share_nothing() -> None:
    """Not even what the functions hold."""
    env = ScriptedEnv()
    source = environment_source(DummyVecEnv([lambda: env]))
    one, two = source.make(0), source.make(1)
    assert len({id(venv.envs[0]) for venv in (one, two)} | {id(env)}) == 3
    one.reset()
    one.step(np.zeros((1, 1), np.float32))
    assert (one.envs[0].t, two.envs[0].t, env.t) == (1, 0, 0)


ONLY = ScriptedEnv()


def only() -> gym.Env:
    """Not a new one."""
    return ONLY


def test_environments_in_use_are_refused() -> None:
    """In the same process a function by name may give the training environment itself."""
    source = environment_source(DummyVecEnv([only]))
    with pytest.raises(ArgumentError, match="gave <ScriptedEnv instance>, which is in use, instead of a new environment"):
        source.make(0)
    source = environment_source(DummyVecEnv([ScriptedEnv]), only)
    with pytest.raises(ArgumentError, match="which is in use"):
        source.make(0)


def test_seeds() -> None:
    source = environment_source(make_vec_env("CartPole-v1", 2))
    first, again, other = source.make(7).reset(), source.make(7).reset(), source.make(8).reset()
    np.testing.assert_equal(first, again)
    np.testing.assert_equal(first[1], other[0])  # seeds 8
    assert (first[0] != other[0]).all()
    assert (source.make().reset() != source.make().reset()).all()


class Locked(ScriptedEnv):
    """Cannot be pickled, can be made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_environments_that_cannot_be_pickled_are_made_anew() -> None:
    same(DummyVecEnv([lambda: Locked()]))


def test_an_object_that_cannot_be_pickled_is_refused() -> None:
    venv = A2C("MlpPolicy", Locked()).get_env()
    with pytest.raises(ArgumentError, match=r"(?s)cannot copy .*lock.*give actor_env_fn, a function") as caught:
        environment_source(venv)
    assert "CartPole-v1" in str(caught.value)
    same(venv, actor_env_fn=Locked)


def test_physics_servers_are_not_shared() -> None:
    """Pickling PyBullet's environments succeeds, and the death of a copy would disconnect the original."""
    env = gym.make("HopperBulletEnv-v0")
    env.reset(seed=0)
    with pytest.raises(ArgumentError, match="a BulletClient owns something outside Python"):
        environment_source(A2C("MlpPolicy", env).get_env())
    gc.collect()
    env.step(env.action_space.sample())
    env.close()


def test_other_vec_envs_are_refused() -> None:
    class Mine(DummyVecEnv):
        def step_wait(self) -> Any:
            return super().step_wait()

    venv = Mine([ScriptedEnv])
    with pytest.raises(ArgumentError, match="nobody knows how a Mine was made: give actor_env_fn"):
        environment_source(venv)
    assert environment_source(venv, ScriptedEnv).make(0).num_envs == 1


def test_functions_that_make_something_else_now_are_refused() -> None:
    name = "CartPole-v1"
    venv = DummyVecEnv([lambda: gym.make(name)])
    name = "Acrobot-v1"
    source = environment_source(venv)
    with pytest.raises(ArgumentError, match=r"make .*AcrobotEnv<Acrobot-v1 now, and made .*CartPoleEnv<CartPole-v1 then"):
        source.make(0)
    assert name == "Acrobot-v1"


def test_of_a_subproc_vec_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Monitor files in the other processes: rows get beside them, or it is said once that they do not."""
    venv = VecNormalize(of_zoo(tmp_path, vec_env_cls=SubprocVecEnv))
    try:
        made = environment_source(venv).make(3)
        made.training = venv.training = False
        venv.seed(3)
        np.testing.assert_equal(trajectory(made, 5), trajectory(venv, 5))
        assert isinstance(made.unwrapped, DummyVecEnv)
        writer = EpisodeWriter(venv)
        writer.write(1, {"r": 3.5, "l": 7, "t": 1e9, "extra": 1})
        infos = [info for _ in range(40) for info in venv.step(np.array([0, 0]))[3]]
        own = [info["episode"]["r"] for info in infos if "episode" in info]  # by the processes themselves
        found = episodes._open_files
        monkeypatch.setattr(episodes, "_open_files", lambda process: [*found(process), "inherited"])  # as by a fork
        EpisodeWriter(venv).write(1, {"r": 4.5, "l": 8, "t": 1e9})
        monkeypatch.setattr(episodes, "_open_files", lambda process: [] if process == "self" else ["two", "files"])
        with pytest.warns(UserWarning, match="into which files the Monitors of the SubprocVecEnv write"):
            writer = EpisodeWriter(venv)
        writer.write(1, {"r": 3.5, "l": 7, "t": 1e9})
    finally:
        venv.close()
    assert len(own) > 2 and sorted(load_results(str(tmp_path))["r"]) == sorted([3.5, 4.5, *own])
    row = (tmp_path / "1.actors.monitor.csv").read_text().splitlines()[2].split(",")
    assert row[:2] == ["3.5", "7"] and 0 <= float(row[2]) < 60


# actor_env_fn


def test_actor_env_fn_makes_them_all() -> None:
    venv = make_vec_env("CartPole-v1", 2)
    made = environment_source(venv, lambda: gym.make("CartPole-v1", sutton_barto_reward=True)).make(0)
    assert made.env_is_wrapped(Monitor) == [True, True]
    made.reset()
    assert made.step(np.array([0, 1]))[1].tolist() == [0, 0]  # of that variant


def test_actor_env_fn_keeps_its_monitor() -> None:
    made = environment_source(make_vec_env("CartPole-v1", 1), lambda: TimeLimit(Monitor(gym.make("CartPole-v1")), 9)).make(0)
    assert kinds(made)[0][:2] == ("TimeLimit", "Monitor") and kinds(made)[0].count("Monitor") == 1
    assert environment_source(DummyVecEnv([ScriptedEnv]), ScriptedEnv).make(0).env_is_wrapped(Monitor) == [False]


def test_actor_env_fn_gets_the_index_if_it_needs_one() -> None:
    venv = DummyVecEnv([ScriptedEnv] * 3)
    assert environment_source(venv, lambda i: ScriptedEnv(length=i + 2)).make(0).get_attr("length") == [2, 3, 4]
    assert environment_source(venv, ScriptedEnv).make(0).get_attr("length") == [3, 3, 3]  # whose first parameter has a default


def test_actor_env_fn_keeps_the_vec_env_wrappers() -> None:
    venv = VecFrameStack(VecNormalize(DummyVecEnv([ScriptedEnv]), gamma=0.5), 3)
    made = environment_source(venv, ScriptedEnv).make(0)
    assert isinstance(made, VecFrameStack) and made.observation_space == venv.observation_space
    assert made.venv.gamma == 0.5


def test_wrong_values_of_actor_env_fn() -> None:
    venv = DummyVecEnv([ScriptedEnv])
    lock = threading.Lock()
    with pytest.raises(ArgumentTypeError, match=r"actor_env_fn must be a function .* got 'CartPole-v1'"):
        environment_source(venv, "CartPole-v1")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"actor_env_fn must be picklable .*: cannot pickle '_thread.lock'"):
        environment_source(venv, lambda: ScriptedEnv(length=bool(lock)))
    with pytest.raises(ArgumentTypeError, match=r"actor_env_fn must make a gymnasium.Env, got .*, which made <.*DummyVecEnv"):
        environment_source(venv, lambda: DummyVecEnv([ScriptedEnv])).make(0)
    with pytest.raises(ArgumentError, match=r"actor_env_fn must make environments .*\(4,\).*Discrete\(2\)"):
        environment_source(venv, lambda: gym.make("CartPole-v1")).make(0)


# Wrappers


class Counting(VecEnvWrapper):
    """Refers to itself and to the VecEnv inside, holds what a user has set."""

    def __init__(self, venv: VecEnv, bonus: float) -> None:
        super().__init__(venv)
        self.bonus, self.me, self.inside, self.base = bonus, self, venv, venv.unwrapped

    def reset(self) -> Any:
        return self.inside.reset()

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = self.venv.step_wait()
        return obs, rewards + self.bonus, dones, infos


def test_wrappers_of_all_kinds(tmp_path: Path) -> None:
    base = DummyVecEnv([lambda: RandomEnv(DICT, CONTINUOUS)] * 2)
    venv = Counting(VecMonitor(VecNormalize(base, norm_obs_keys=["vector"]), str(tmp_path / "vec")), bonus=3)
    venv.bonus = 4
    unwrap_vec_normalize(venv).training = False
    made = same(venv)
    assert made.me is made and made.inside is made.venv and made.base is made.unwrapped
    assert isinstance(made.venv, VecMonitor) and isinstance(made.venv.venv, VecNormalize)
    before = (tmp_path / "vec.monitor.csv").read_text()
    trajectory(made)
    made.close()
    assert (tmp_path / "vec.monitor.csv").read_text() == before
    trajectory(venv)
    assert (tmp_path / "vec.monitor.csv").read_text() > before
    venv.close()


def test_images() -> None:
    space = gym.spaces.Box(0, 255, (36, 36, 1), np.uint8)
    same(VecTransposeImage(VecFrameStack(DummyVecEnv([lambda: RandomEnv(space, CONTINUOUS)]), 4)))


def test_normalised_images_of_a_dict() -> None:
    """``VecNormalize`` changes the space of the VecEnv that it wraps."""
    venv = VecNormalize(DummyVecEnv([lambda: RandomEnv(deepcopy(DICT), CONTINUOUS)]))
    made = environment_source(venv).make(0)
    assert made.observation_space == venv.observation_space != DICT
    assert made.reset()["image"].dtype == np.float32


def test_wrappers_that_cannot_be_copied_are_named() -> None:
    venv = Counting(DummyVecEnv([ScriptedEnv]), bonus=1)
    venv.lock = threading.Lock()
    with pytest.raises(ArgumentError, match="cannot copy the VecEnv wrapper Counting of the training environment: TypeError"):
        environment_source(venv)
    venv.lock = venv.unwrapped.envs[0]  # a copy of which would be no part of the copied VecEnv
    with pytest.raises(ArgumentError, match="PicklingError: a ScriptedEnv cannot be copied with it"):
        environment_source(venv)
    with pytest.raises(ArgumentError, match="env must have at most one VecNormalize"):
        environment_source(VecNormalize(VecNormalize(DummyVecEnv([ScriptedEnv]))))


# In another process


def test_another_process_builds_the_same(tmp_path: Path, python: Callable[..., Any]) -> None:
    """With the id that this one has registered, and the time limit that RL Zoo puts in the place of Gymnasium's."""
    code = (
        "import sys, cloudpickle\n"
        "source = cloudpickle.load(open(sys.argv[1], 'rb'))\n"
        "venv = source.make(3)\n"
        "print(venv.reset().tolist(), venv.env_method('__str__')[0])\n"
    )
    importlib.import_module("rl_zoo3")
    gym.register("OnlyHere-v0", entry_point=gym.spec("CartPole-v1").entry_point, max_episode_steps=9)
    try:
        venv = VecFrameStack(make_vec_env("OnlyHere-v0", 2, monitor_dir=str(tmp_path / "logs")), 2)
        source = environment_source(venv)
    finally:
        del gym.registry["OnlyHere-v0"]
    (tmp_path / "source").write_bytes(cloudpickle.dumps(source))
    package = Path(inspect.getfile(EnvironmentSource)).parents[2]
    shown = python("-c", code, tmp_path / "source", cwd=tmp_path, PYTHONPATH=str(package))
    venv.seed(3)
    limited = "<Monitor<PatchedTimeLimit<OrderEnforcing<PassiveEnvChecker<CartPoleEnv<OnlyHere-v0>>>>>>"
    assert shown.stdout.strip() == f"{venv.reset().tolist()} {limited}"
    venv.close()


# VecNormalize


@pytest.mark.parametrize("norm_obs", [True, False])
@pytest.mark.parametrize("space", [BOX, gym.spaces.Dict({"vector": BOX, "other": BOX})], ids=["box", "dict"])
def test_statistics_are_those_of_vec_normalize(space: gym.Space, norm_obs: bool) -> None:
    """To the bit, over several segments."""

    def made(venv: VecEnv) -> VecNormalize:
        return VecNormalize(venv, norm_obs=norm_obs, norm_obs_keys=["vector"] if isinstance(space, gym.spaces.Dict) else None)

    def fns() -> list[Callable[[], gym.Env]]:
        return [lambda: RandomEnv(deepcopy(space), CONTINUOUS)] * 3

    expected, learner = made(DummyVecEnv(fns())), made(DummyVecEnv(fns()))
    actor = environment_source(learner).make(5)
    expected.seed(5)
    expected.reset()
    actor.reset()
    raw, returns = actor.get_original_obs(), None
    for length in (4, 1, 9):
        observations, rewards, dones = [raw], [], []
        for step in range(length):
            actions = np.full((3, 2), 0.1 * step, np.float32)
            expected.step(actions)
            _, _, done, _ = actor.step(actions)
            raw = actor.get_original_obs()
            observations.append(raw)
            rewards.append(actor.get_original_reward())
            dones.append(done)
        names = raw if isinstance(raw, dict) else [None]
        stacked = {name: np.stack([obs[name] if name else obs for obs in observations]) for name in names}
        segment = stacked if isinstance(raw, dict) else stacked[None]
        returns = update_statistics(learner, segment, np.stack(rewards), np.stack(dones), returns)
    for mine, theirs in zip(statistics(learner), statistics(expected), strict=True):
        np.testing.assert_equal(_numbers(mine), _numbers(theirs))
    np.testing.assert_array_equal(returns, expected.returns)
    assert learner.ret_rms.count > 40


def _numbers(rms: Any) -> Any:
    if isinstance(rms, dict):
        return {name: vars(one) for name, one in rms.items()}
    return rms and vars(rms)


def test_an_actor_normalises_as_it_is_told() -> None:
    learner = VecNormalize(DummyVecEnv([ScriptedEnv]), norm_reward=False)
    actor = environment_source(learner).make(0)
    assert not actor.training and not actor.norm_reward and learner.training
    actor.reset()
    learner.reset()
    learner.step(np.ones((1, 1), np.float32))
    sent = statistics(learner)
    set_statistics(actor, pickle.loads(pickle.dumps(sent)))
    np.testing.assert_equal(_numbers(actor.obs_rms), _numbers(learner.obs_rms))
    set_statistics(actor, sent)
    shown, rewards, _, _ = actor.step(np.ones((1, 1), np.float32))
    np.testing.assert_array_equal(shown, learner.normalize_obs(np.array([[1, 1]], np.float32)))
    assert rewards.tolist() == [1] and actor.get_original_obs().tolist() == [[1, 1]]
    learner.step(np.ones((1, 1), np.float32))
    assert actor.obs_rms.count < learner.obs_rms.count  # nothing is shared


def test_statistics_that_do_not_train_stay() -> None:
    learner = VecNormalize(DummyVecEnv([ScriptedEnv]), training=False)
    before = statistics(learner)
    returns = update_statistics(learner, np.ones((3, 1, 2)), np.ones((2, 1)), np.zeros((2, 1), bool), None)
    assert returns.tolist() == [0]
    np.testing.assert_equal([_numbers(one) for one in statistics(learner)], [_numbers(one) for one in before])


def test_no_statistics_without_vec_normalize() -> None:
    venv = DummyVecEnv([ScriptedEnv])
    assert statistics(venv) is None
    set_statistics(venv, None)


# Rows of episodes


def test_rows_go_to_the_monitor_of_the_environment(tmp_path: Path) -> None:
    venv = VecNormalize(of_zoo(tmp_path))
    writer = EpisodeWriter(venv)
    venv.unwrapped.envs[1].t_start -= 100
    writer = EpisodeWriter(venv)
    writer.write(0, {"r": 1.5, "l": 2, "t": 5e9})
    writer.write(1, {"r": 2.5, "l": 3, "t": 5e9, "extra": "x"})
    venv.close()
    rows = [(tmp_path / f"{i}.monitor.csv").read_text().splitlines()[2:] for i in range(2)]
    assert [len(row) for row in rows] == [1, 1]
    (r0, l0, t0), (r1, l1, t1) = (row[0].split(",") for row in rows)
    assert (r0, l0, r1, l1) == ("1.5", "2", "2.5", "3")
    assert 0 <= float(t0) < 60 and 100 <= float(t1) < 160


def test_rows_have_the_files_keywords(tmp_path: Path) -> None:
    env = Monitor(ScriptedEnv(), str(tmp_path / "one"), info_keywords=("is_success",))
    writer = EpisodeWriter(DummyVecEnv([lambda: TimeLimit(env, 9)]))
    writer.write(0, {"r": 1.0, "l": 2, "t": 0, "is_success": True, "more": 3})
    writer.write(0, {"r": 1.5, "l": 2, "t": 0})
    env.close()
    _, header, row, without = (tmp_path / "one.monitor.csv").read_text().splitlines()
    assert header == "r,l,t,is_success" and row.startswith("1.0,2,") and row.endswith(",True")
    assert without.startswith("1.5,2,") and without.endswith(",")


def test_rows_go_to_a_vec_monitor(tmp_path: Path) -> None:
    venv = VecMonitor(DummyVecEnv([ScriptedEnv] * 2), str(tmp_path / "vec"))
    writer = EpisodeWriter(VecCheckNan(venv))
    writer.write(1, {"r": np.float32(1.5), "l": 2, "t": 0})
    venv.close()
    assert load_results(str(tmp_path))["r"].tolist() == [1.5]


def test_no_rows_without_files() -> None:
    for venv in (make_vec_env("CartPole-v1", 1), DummyVecEnv([ScriptedEnv])):
        EpisodeWriter(venv).write(0, {"r": 1.0, "l": 1, "t": 0})
        EpisodeWriter(environment_source(venv).make(0)).write(0, {"r": 1.0, "l": 1, "t": 0})


def test_monitors_write_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), no_monitor_files():
        raise ZeroDivisionError
    Monitor(ScriptedEnv(), str(tmp_path / "one")).close()
    assert (tmp_path / "one.monitor.csv").is_file()
