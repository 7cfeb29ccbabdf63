"""Parallel environments as Gymnasium environments: what arrives at whom, the libraries' own checks, ids, refusals."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from conftest import Command
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env as check_gymnasium_env
from models import small_model
from parallel_environments import Crowd, Meadow
from stable_baselines3.common.env_checker import check_env as check_sb3_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import SubprocVecEnv, VecFrameStack, VecNormalize

from sb3_ac_ext import MADDPG
from sb3_ac_ext.envs.joint import MPE_TASKS, mpe_id, register_mpe
from sb3_ac_ext.maddpg import Agent, JointBox, JointEnv, register_parallel_env
from sb3_ac_ext.validation import NonFiniteError, UnsupportedError


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that a test registers are forgotten after it."""
    monkeypatch.setattr(gym.envs.registration, "registry", dict(gym.registry))
    monkeypatch.setattr(gym, "registry", gym.envs.registration.registry)


def crowd(discrete: bool = True) -> Crowd:
    return Crowd(2, discrete=discrete)


# The joint spaces


def test_flat_forms_stand_side_by_side() -> None:
    env = JointEnv(Meadow())
    assert env.observation_space.shape == (4 + 6 + 6,)
    assert env.action_space.shape == (1 + 3 + 2,)
    np.testing.assert_array_equal(env.action_space.low, [0, 0, 0, 0, -1, 0])
    np.testing.assert_array_equal(env.action_space.high, [3, 1, 1, 1, 1, 4])
    assert env.observation_space.dtype == env.action_space.dtype == np.float32


def test_samples_are_the_agents() -> None:
    space = JointBox(
        {"choice": spaces.Discrete(3), "box": spaces.Box(2, 5, (2,)), "bits": spaces.MultiDiscrete([2, 3])}, seed=1
    )
    samples = np.stack([space.sample() for _ in range(300)])
    for columns in (slice(0, 3), slice(5, 7), slice(7, 10)):
        assert (samples[:, columns].sum(axis=1) == 1).all() and samples[:, columns].mean(axis=0).min() > 0.2
    assert 2 <= samples[:, 3:5].min() < 2.1 and 4.9 < samples[:, 3:5].max() <= 5
    assert all(space.contains(sample) for sample in samples)
    again = JointBox(space.parts, seed=1)
    np.testing.assert_array_equal(samples, [again.sample() for _ in range(300)])


def test_spaces_are_equal_with_equal_agents_only() -> None:
    parts = {"a": spaces.Discrete(3), "b": spaces.Box(0, 1, (3,))}
    space = JointBox(parts)
    assert space == JointBox(parts) == pickle.loads(pickle.dumps(space))
    assert space != JointBox(dict(reversed(parts.items())))
    assert space != JointBox({"a": spaces.Box(0, 1, (3,)), "b": spaces.Box(0, 1, (3,))})
    assert space != spaces.Box(0, 1, (6,)) and spaces.Box(0, 1, (6,)) != space
    assert repr(space) == "JointBox(a: Discrete(3), b: Box(0.0, 1.0, (3,), float32))"


def test_split_undoes_join() -> None:
    env = JointEnv(Meadow())
    values = {agent: space.sample() for agent, space in Meadow.actions.items()}
    back = env.action_space.split(env.action_space.join(values))
    for agent, value in values.items():
        np.testing.assert_allclose(back[agent], value)
        assert Meadow.actions[agent].contains(back[agent])


def test_actions_that_rounding_took_out_of_bounds_are_clipped() -> None:
    space = JointBox({"a": spaces.Box(0.1, 0.3, (1,), np.float64)})
    assert space.parts["a"].contains(space.split(np.array([0.3], np.float32) + np.float32(1e-6))["a"])


# The joint environment


def test_a_step() -> None:
    parallel = Meadow(length=2)
    env = JointEnv(parallel)
    observation, info = env.reset(seed=3)
    assert observation.dtype == np.float32 and observation[10] == 1  # the fly's one-hot of 0
    assert info == {"agent_infos": {"cow": {}, "dog": {}, "fly": {}}}
    observation, reward, terminated, truncated, info = env.step(np.array([1.5, 0, 1, 0, 0.5, 4], np.float32))
    assert parallel.seen[0]["dog"] == 2
    assert (reward, terminated, truncated) == (10, False, False)
    np.testing.assert_array_equal(info["agent_rewards"], [1, -1, 10])
    np.testing.assert_array_equal(observation[5:9], [1.5, 2, 0.5, 4])
    assert info["agent_active"].all() and not info["agent_terminated"].any() and "agent_returns" not in info
    assert info["agent_infos"]["dog"] == {"at": 1}
    _, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert (reward, terminated, truncated) == (20, True, False)
    assert info["agent_terminated"].all() and not info["agent_truncated"].any()
    np.testing.assert_array_equal(info["agent_returns"], [3, -3, 30])
    env.reset()
    env.step(env.action_space.sample())
    np.testing.assert_array_equal(env.step(env.action_space.sample())[4]["agent_returns"], [3, -3, 30])


@pytest.mark.parametrize("truncates", [False, True])
@pytest.mark.parametrize("early", ["terminates", "truncates"])
def test_ends_of_agents_and_of_the_episode(truncates: bool, early: str) -> None:
    env = JointEnv(Meadow(length=3, truncates=truncates, ends={"dog": (1, early)}))
    env.reset()
    action = env.action_space.sample()
    observation, reward, *ends, info = env.step(action)
    assert ends == [False, False] and reward == 10 and observation[4] == 1
    assert info["agent_terminated"].tolist() == [False, early == "terminates", False]
    assert info["agent_truncated"].tolist() == [False, early == "truncates", False]
    observation, reward, *ends, info = env.step(action)
    assert reward == 22 and not observation[4:10].any() and info["agent_active"].tolist() == [True, False, True]
    _, _, terminated, truncated, info = env.step(action)
    assert (terminated, truncated) == (not (truncates or early == "truncates"), truncates or early == "truncates")
    assert info["agent_terminated"].tolist() == [not truncates, False, not truncates]


class Sloppy(Crowd):
    """Rewards are arrays of one number, infos None, and one agent has spaces without dimensions."""

    def __init__(self, infos: Any = None) -> None:
        super().__init__(2)
        self.infos = infos

    def observation_space(self, agent: str) -> spaces.Space:
        return spaces.Box(-9, 9, (), np.float32) if agent == "agent_0" else self.space

    def action_space(self, agent: str) -> spaces.Space:
        return spaces.Box(0, 2, (), np.float32) if agent == "agent_0" else self.choice

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, Any]:
        return self._reduced(super().reset(seed)[0]), self.infos

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, Any]:
        assert all(self.action_space(agent).contains(action) for agent, action in actions.items())
        observations, rewards, *ends, _ = super().step(actions)
        return self._reduced(observations), {agent: np.array([r]) for agent, r in rewards.items()}, *ends, self.infos

    @staticmethod
    def _reduced(observations: dict[str, np.ndarray]) -> dict[str, Any]:
        return {**observations, "agent_0": np.array(observations["agent_0"][0])}


@pytest.mark.parametrize("infos", [None, {"agent_0": None, "agent_1": {}}], ids=["no infos", "no info"])
def test_arrays_of_one_number_and_missing_infos(infos: Any, tmp_path: Path) -> None:
    model = small_model("maddpg", env=Sloppy(infos)).learn(30)
    assert model._n_updates > 0 and model.replay_buffer.agent_rewards[:30].any(axis=0).all()
    joint, _ = JointEnv(Sloppy()).reset(seed=0)
    model.save_agent("agent_0", tmp_path / "agent")
    for number in (1, 3):
        observations = joint if number == 1 else np.stack([joint] * number)
        actions = model.agent_actions(model.predict(observations, deterministic=True)[0])
        own = [model.predict_agent("agent_0", observations[..., 0], deterministic=True)]
        own.append(Agent.load(tmp_path / "agent").predict(observations[..., 0], deterministic=True))
        for action in (actions["agent_0"], *own):
            assert isinstance(action, np.ndarray) and action.shape == (() if number == 1 else (3,))
            np.testing.assert_allclose(action, actions["agent_0"], atol=1e-6)


def test_seeds_reach_the_environment() -> None:
    env = JointEnv(Meadow())
    starts = [env.reset(seed=seed)[0][1] for seed in (1, 1, 2)]
    assert starts[0] == starts[1] != starts[2]
    assert env.reset()[0][1] != starts[2]  # goes on with its stream


def test_rendering_and_closing() -> None:
    env = JointEnv(Meadow(render_mode="rgb_array"))
    assert env.metadata["render_modes"] == ["rgb_array"] and env.render_mode == "rgb_array"
    env.reset()
    env.step(env.action_space.sample())
    assert (env.render() == 1).all()
    env.close()
    assert env.parallel_env.closed


@pytest.mark.filterwarnings("ignore:.*A Box observation space (min|max)imum value is", "ignore:.*recommend.* symmetric")
@pytest.mark.filterwarnings("ignore:.*not within the usual", "ignore:.*you use a symmetric and normalized Box action space")
@pytest.mark.parametrize("parallel", [Meadow, crowd])
def test_the_libraries_own_checks(parallel: Callable[[], Any]) -> None:
    check_gymnasium_env(JointEnv(parallel()), skip_render_check=True)
    check_sb3_env(JointEnv(parallel()))


@pytest.mark.filterwarnings("ignore:The old environment creation API:DeprecationWarning")
def test_pettingzoo_finds_the_test_environments_sound() -> None:
    pytest.importorskip("pettingzoo")
    from pettingzoo.test import parallel_api_test

    for parallel in (Meadow(length=5, ends={"fly": (2, "truncates")}), crowd()):
        parallel.unwrapped = parallel  # type: ignore[union-attr]
        parallel_api_test(parallel, num_cycles=20)  # type: ignore[arg-type]


def test_processes_of_their_own() -> None:
    env = make_vec_env(lambda: JointEnv(Meadow(length=3)), n_envs=2, vec_env_cls=SubprocVecEnv)
    try:
        assert env.observation_space == JointEnv(Meadow()).observation_space
        model = small_model("maddpg", env=env).learn(30)
        assert model._n_updates > 0
        batch = model.replay_buffer._get_samples(np.arange(15))
        t = batch.next_observations[:, 0]
        np.testing.assert_allclose(batch.rewards, np.stack([t, -t, 10 * t], axis=1))
    finally:
        env.close()


def test_evaluation() -> None:
    model = small_model("maddpg", env=Meadow(length=3))
    assert evaluate_policy(model, model.get_env(), n_eval_episodes=3)[0] == 60


# Ids


def test_registered_ids_make_joint_environments(registry: None) -> None:
    register_parallel_env("Meadow-v0", Meadow, length=4)
    register_parallel_env("Shadow-v0", "parallel_environments:Meadow", max_episode_steps=2)
    env = gym.make("Meadow-v0")
    assert isinstance(env.unwrapped, JointEnv)
    assert env.unwrapped.parallel_env.ends["cow"] == (4, "terminates")
    assert gym.make("Meadow-v0", length=7).unwrapped.parallel_env.ends["cow"] == (7, "terminates")  # type: ignore[attr-defined]
    assert gym.make("Meadow-v0", render_mode="rgb_array").render_mode == "rgb_array"
    model = small_model("maddpg", env="Shadow-v0").learn(20)
    assert model._n_updates > 0
    assert not model.replay_buffer.agent_terminated.any()  # its limit truncates


def test_mpe_tasks_are_registered_with_the_extra_only(registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {mpe_id(task, continuous) for task in MPE_TASKS for continuous in (False, True)}
    for name in names & set(gym.registry):
        gym.registry.pop(name)
    monkeypatch.setattr("sb3_ac_ext.envs.joint.find_spec", lambda name: None)
    register_mpe()
    assert not names & set(gym.registry)
    monkeypatch.setattr("sb3_ac_ext.envs.joint.find_spec", lambda name: name)
    register_mpe()
    register_mpe()
    assert names <= set(gym.registry)


@pytest.mark.parametrize("task", MPE_TASKS)
@pytest.mark.parametrize("continuous", [False, True])
def test_mpe_tasks(task: str, continuous: bool) -> None:
    pytest.importorskip("mpe2")
    env = gym.make(mpe_id(task, continuous))
    kinds = {isinstance(space, spaces.Discrete) for space in env.action_space.parts.values()}  # type: ignore[attr-defined]
    assert kinds == {not continuous}
    env.reset(seed=0)
    over, steps = False, 0
    while not over:
        _, reward, terminated, truncated, info = env.step(env.action_space.sample())
        over, steps = terminated or truncated, steps + 1
        assert reward == pytest.approx(info["agent_rewards"].sum())
    assert truncated and info["agent_truncated"].all()
    env.close()


MPE = ("--algo", "maddpg", "--env", "MPESimpleSpread-v3", "-f", "logs", "--num-threads", 1)
SOON = ("-params", "learning_starts:100", "batch_size:16", "buffer_size:1000", "policy_kwargs:{'net_arch':[8]}")


def test_zoo_trains_by_name(python: Command, tmp_path: Path) -> None:
    pytest.importorskip("mpe2")
    evaluated = ("-n", 200, "--eval-freq", 150, "--eval-episodes", 1, *SOON, "centralised:False")
    python("-m", "rl_zoo3.train", *MPE, *evaluated, cwd=tmp_path)
    (run,) = (tmp_path / "logs" / "maddpg").glob("MPESimpleSpread-v3_1")
    assert MADDPG.load(run / "best_model.zip").action_space.parts.keys() == {"agent_0", "agent_1", "agent_2"}  # type: ignore[attr-defined]


@pytest.mark.slow
def test_zoo_uses_processes_watches_and_searches_by_name(python: Command, tmp_path: Path) -> None:
    pytest.importorskip("mpe2")
    python("-m", "rl_zoo3.train", *MPE, "-n", 400, "--vec-env", "subproc", *SOON, "n_envs:2", cwd=tmp_path)
    shown = python("-m", "rl_zoo3.enjoy", *MPE, "-n", 50, "--no-render", cwd=tmp_path).stdout
    assert "2 Episodes" in shown and "Mean reward: -" in shown
    search = ("-optimize", "-n", 150, "--n-trials", 2, "--n-evaluations", 1, "--no-optim-plots")
    assert "Best trial:" in python("-m", "rl_zoo3.train", *MPE, *search, *SOON, cwd=tmp_path).stdout


# Refusals


FAULTY_REWARDS = {"two rewards": np.zeros(2), "words": "none", "no number": None}


class Broken(Meadow):
    """An environment that does one thing wrong."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.resets = fault, 0

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        result = super().reset(seed, options)
        self.resets += 1
        if self.fault == "late at the reset" or (self.fault == "another set" and self.resets == 2):
            self.agents = ["cow", "dog"]
        return result

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        observations, rewards, *rest = super().step(actions)
        if self.fault == "late":
            self.agents.append("hen")
        if self.fault == "vanishes":
            self.agents.remove("fly")
        if self.fault in ("nan", "inf"):
            rewards["dog"] = float(self.fault)
        if self.fault == "no reward":
            del rewards["dog"]
        if self.fault == "no observation":
            del observations["dog"]
        if self.fault in FAULTY_REWARDS:
            rewards["dog"] = FAULTY_REWARDS[self.fault]
        if self.fault == "info":
            rest[-1]["dog"] = ["at", 1]
        return observations, rewards, *rest  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("late at the reset", ValueError, r"every agent of possible_agents must be there at each reset, got \['cow', 'dog'\]"),
        ("another set", ValueError, r"every agent .* at each reset, got \['cow', 'dog'\].*change from episode to episode"),
        ("late", ValueError, r"agents must be there from the reset on, got \['hen'\] late"),
        ("vanishes", ValueError, r"must leave by termination or truncation, got \['fly'\]"),
        ("nan", NonFiniteError, r"rewards must be finite, got \{'dog': nan\}"),
        ("inf", NonFiniteError, r"rewards must be finite, got \{'dog': inf\}"),
        ("no number", NonFiniteError, r"rewards must be finite, got \{'dog': nan\}"),
        ("two rewards", ValueError, r"the reward of agent 'dog' must be a number, got array\(\[0\., 0\.\]\)"),
        ("words", ValueError, r"the reward of agent 'dog' must be a number, got 'none'"),
        ("info", ValueError, r"the info of agent 'dog' must be a dict, got \['at', 1\]"),
        ("no reward", ValueError, r"must give agent 'dog' its reward, got one for \['cow', 'fly'\]"),
        ("no observation", ValueError, r"must give agent 'dog' its observation, got one for \['cow', 'fly'\]"),
    ],
)
def test_faults_of_the_environment_are_named(fault: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_model("maddpg", env=Broken(fault)).learn(20)


def test_agents_that_take_turns_are_refused_with_the_way_out() -> None:
    pytest.importorskip("mpe2")
    from mpe2 import simple_spread_v3
    from pettingzoo.utils.conversions import aec_to_parallel

    message = r"must be a PettingZoo ParallelEnv.*\(AEC\).*; convert it with pettingzoo.utils.conversions.aec_to_parallel"
    for make in (JointEnv, lambda env: small_model("maddpg", env=env)):
        with pytest.raises(TypeError, match=message):
            make(simple_spread_v3.env())
    JointEnv(aec_to_parallel(simple_spread_v3.env())).reset(seed=0)


def test_other_things_are_no_environments() -> None:
    with pytest.raises(TypeError, match=r"must be a PettingZoo ParallelEnv, got a dict without possible_agents"):
        JointEnv({})
    with pytest.raises(TypeError, match=r"factory must be callable or a string \"module:function\", got 'Meadow'"):
        register_parallel_env("Meadow-v0", "Meadow")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.MultiDiscrete([2, 3]), r"actions of agent 'fly' must be Discrete or a Box of floats, got MultiDiscrete"),
        (spaces.Box(0, 5, (2,), np.int64), r"actions of agent 'fly' must be Discrete or a Box of floats, got Box"),
        (spaces.Sequence(spaces.Discrete(2)), r"the space of agent 'fly' must have a flat form, got Sequence"),
        (spaces.Box(-np.inf, np.inf, (2,)), r"finite"),
    ],
    ids=["multidiscrete", "integers", "sequence", "unbounded"],
)
def test_action_spaces_that_cannot_be_joint(space: spaces.Space, message: str) -> None:
    env = Meadow()
    env.actions = {**env.actions, "fly": space}  # type: ignore[misc]
    with pytest.raises(UnsupportedError, match=message):
        small_model("maddpg", env=env)


class WithoutInfo(gym.Wrapper):
    """Drops what the joint environment tells beside the observation."""

    def step(self, action: Any) -> Any:
        return (*self.env.step(action)[:4], {})


def test_wrappers_that_break_the_joint_spaces() -> None:
    with pytest.raises(UnsupportedError, match="must be those of a JointEnv: wrap the parallel environment"):
        small_model("maddpg", env=VecFrameStack(make_vec_env(lambda: JointEnv(Meadow())), 2))
    with pytest.raises(ValueError, match=r"must leave 'agent_rewards' in the info of a JointEnv"):
        small_model("maddpg", env=WithoutInfo(JointEnv(Meadow()))).learn(5)


def test_normalised_rewards_are_refused(tmp_path: Path) -> None:
    message = r"norm_reward=False with several agents.*normalize: \{norm_obs: true, norm_reward: false\}.*got norm_reward=True"
    env = VecNormalize(make_vec_env(lambda: JointEnv(Meadow())))
    with pytest.raises(UnsupportedError, match=message):
        small_model("maddpg", env=env)
    model = small_model("maddpg", env=Meadow())
    with pytest.raises(UnsupportedError, match=message):
        model.set_env(env)
    assert model.get_env() is not env
    model.save(tmp_path / "model")
    with pytest.raises(UnsupportedError, match=message):
        MADDPG.load(tmp_path / "model", env=env)
    model.set_env(VecNormalize(make_vec_env(lambda: JointEnv(Meadow())), norm_reward=False))
    small_model("maddpg", env=VecNormalize(make_vec_env("Pendulum-v1")))  # one agent learns from the sum


def test_environment_with_other_agents_is_refused(tmp_path: Path) -> None:
    small_model("maddpg", env=Crowd(2)).save(tmp_path / "model")
    for other in (Crowd(3), Crowd(2, discrete=True)):
        with pytest.raises(ValueError, match="spaces do not match"):
            MADDPG.load(tmp_path / "model", env=other)
