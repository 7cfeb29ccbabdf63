"""Rollouts: the fast ones are SB3's, the ends of episodes, whole episodes, callbacks, broken environments."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from environments import BOX, CONTINUOUS, DICT, IMAGE, RandomEnv, ScriptedEnv
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from torch import nn

from sb3_ac_ext import PPOX
from sb3_ac_ext.legacy.rollouts import minibatches
from sb3_ac_ext.validation import NonFiniteError, UnsupportedError

SMALL: dict[str, Any] = {"net_arch": [16, 16]}
STORED = ("observations", "actions", "rewards", "episode_starts", "values", "log_probs", "advantages", "returns")


class Untrained:
    """Rollouts alone, of which nothing is used up."""

    def train(self) -> None:
        """Nothing."""


class Ours(Untrained, PPOX):
    """PPOX that never learns."""


class Theirs(Untrained, PPO):
    """PPO that never learns."""


def make(cls: type[PPO], env: Any, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    own = {"policy_kwargs": SMALL, "seed": 0, "n_steps": 12, "batch_size": 12, "gamma": 0.9, "gae_lambda": 0.8}
    return cls(policy, env, **{**own, **kwargs})


def collected(cls: type[PPO], steps: int, env: VecEnv, *args: Any, **kwargs: Any) -> Any:
    """A model after its rollouts; one at a time, for the generators are everybody's."""
    return make(cls, env, *args, **kwargs).learn(steps)


def random_envs(observations: spaces.Space, actions: spaces.Space, n_envs: int = 1, limit: int = 100) -> VecEnv:
    """Episodes that end after 7 steps, or are truncated before."""
    return make_vec_env(lambda: TimeLimit(RandomEnv(observations, actions), limit), n_envs=n_envs)


MATRIX = spaces.Box(-2, 2, (2, 3), np.float64)
KINDS: dict[str, tuple[spaces.Space, spaces.Space, dict[str, Any]]] = {
    "box": (BOX, CONTINUOUS, {}),
    "matrices": (MATRIX, MATRIX, {}),
    "integers": (spaces.Box(0, 9, (3,), np.int64), CONTINUOUS, {}),
    "discrete": (BOX, spaces.Discrete(3), {}),
    "multidiscrete": (BOX, spaces.MultiDiscrete([3, 2]), {}),
    "multibinary": (BOX, spaces.MultiBinary(3), {}),
    "gSDE": (BOX, CONTINUOUS, {"use_sde": True}),
    "gSDE every 4": (BOX, CONTINUOUS, {"use_sde": True, "sde_sample_freq": 4}),
    "gSDE narrow": (BOX, CONTINUOUS, {"use_sde": True, "policy_kwargs": {**SMALL, "full_std": False, "log_std_init": -1}}),
}


@pytest.mark.parametrize("limit", [100, 5], ids=["terminates", "truncates"])
@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_fast_rollouts_are_sb3s(kind: str, n_envs: int, limit: int) -> None:
    """The second of two, which begins within an episode."""
    observations, actions, kwargs = KINDS[kind]
    ours, theirs = (
        collected(cls, 24 * n_envs, random_envs(observations, actions, n_envs, limit), **kwargs) for cls in (Ours, Theirs)
    )
    assert ours.engine_report()["rollout"] == "fast"
    assert theirs.rollout_buffer.episode_starts[0].sum() == 0
    for name in STORED:
        stored, expected = (getattr(model.rollout_buffer, name) for model in (ours, theirs))
        assert stored.dtype == expected.dtype, name
        np.testing.assert_allclose(stored, expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert ours.rollout_buffer.full and ours.rollout_buffer.pos == 12
    for buffer in (ours.ep_info_buffer, theirs.ep_info_buffer):
        assert len(buffer) > 0
    np.testing.assert_allclose(*([info["r"] for info in model.ep_info_buffer] for model in (ours, theirs)), atol=1e-5)


class Seen(BaseCallback):
    """Keeps what the environments were given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[np.ndarray] = []

    def _on_step(self) -> bool:
        self.given.append(self.locals["clipped_actions"])
        return True


def test_the_environment_gets_clipped_actions_and_the_buffer_those_of_the_distribution() -> None:
    model, seen = make(Ours, random_envs(BOX, CONTINUOUS), policy_kwargs={**SMALL, "log_std_init": 1.0}), Seen()
    model.learn(12, callback=seen)
    stored = model.rollout_buffer.actions[:, 0]
    np.testing.assert_array_equal(np.concatenate(seen.given), np.clip(stored, CONTINUOUS.low, CONTINUOUS.high))
    assert ((stored < CONTINUOUS.low) | (stored > CONTINUOUS.high)).any()


@pytest.mark.parametrize(
    ("policy", "space", "kwargs"),
    [
        ("CnnPolicy", IMAGE, {}),
        ("MultiInputPolicy", DICT, {}),
        ("MlpPolicy", spaces.Discrete(5), {}),
        ("MlpPolicy", BOX, {"engine": False}),
        ("MlpPolicy", BOX, {"use_sde": True, "policy_kwargs": {**SMALL, "squash_output": True}}),
    ],
    ids=["images", "dict", "discrete", "engine off", "squashed"],
)
def test_everything_else_takes_sb3s_rollout(policy: str, space: spaces.Space, kwargs: dict[str, Any]) -> None:
    model = collected(Ours, 24, random_envs(space, CONTINUOUS, 2), policy, **kwargs)
    assert model.engine_report()["rollout"] == "SB3's"
    kwargs.pop("engine", None)
    theirs = collected(Theirs, 24, random_envs(space, CONTINUOUS, 2), policy, **kwargs)
    for name in STORED[1:]:
        np.testing.assert_array_equal(getattr(model.rollout_buffer, name), getattr(theirs.rollout_buffer, name))


class OwnBuffer(RolloutBuffer):
    """Counts what is added."""

    added = 0

    def add(self, *args: Any, **kwargs: Any) -> None:
        self.added += 1
        super().add(*args, **kwargs)


def test_a_buffer_of_the_user_is_filled_by_its_own_methods() -> None:
    model = make(PPOX, random_envs(BOX, CONTINUOUS), rollout_buffer_class=OwnBuffer).learn(24)
    assert model.rollout_buffer.added == 24
    assert (model.engine_report()["acting"], model.engine_report()["rollout"]) == ("numpy", "SB3's")
    with pytest.raises(
        UnsupportedError, match=r"rollout='episodes' fills SB3's own buffers, got rollout_buffer_class=.*OwnBuffer"
    ):
        make(PPOX, "Pendulum-v1", rollout="episodes", rollout_buffer_class=OwnBuffer)


# Values at the ends of episodes


class Script(gym.Env):
    """
    Observations that are their own values: 0.5, 1, 1.5, 2, with rewards 1, 2, 3.

    With an ``end`` the second step truncates or terminates the episode at the observation 4, and the next begins at 1.5.
    """

    observation_space = spaces.Box(-10, 10, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, end: str | None) -> None:
        self.end, self.t = end, 0

    def _at(self, value: float) -> np.ndarray:
        return np.array([value], np.float32)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return self._at(1.5 if self.t == 2 else 0.5), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        over = self.end is not None and self.t == 2
        obs = self._at(4.0 if over else 0.5 + 0.5 * self.t)
        return obs, float(self.t), over and self.end == "terminated", over and self.end == "truncated", {}


def values_are_observations(model: PPO) -> None:
    """V(s) = s for s > 0."""
    layers = (model.policy.mlp_extractor.value_net[0], model.policy.value_net)
    for layer in layers:
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)


@pytest.mark.parametrize("engine", [True, False], ids=["fast", "ordinary"])
@pytest.mark.parametrize("rollout", ["steps", "episodes"])
@pytest.mark.filterwarnings("ignore:rollout='episodes'")
def test_advantages_and_returns_at_the_ends_of_episodes(engine: bool, rollout: str) -> None:
    ends = (None, "truncated", "terminated")
    env = DummyVecEnv([lambda end=end: Monitor(Script(end)) for end in ends])
    kwargs = {"policy_kwargs": {"net_arch": {"pi": [4], "vf": [1]}, "activation_fn": nn.ReLU}, "n_steps": 3, "batch_size": 9}
    model = make(Ours, env, engine=engine, rollout=rollout, **kwargs)
    values_are_observations(model)
    model.learn(9)
    buffer = model.rollout_buffer
    np.testing.assert_allclose(buffer.values.T, 3 * [[0.5, 1.0, 1.5]])
    np.testing.assert_allclose(buffer.rewards.T, [[1, 2, 3], [1, 2 + 0.9 * 4, 3], [1, 2, 3]], rtol=1e-6)
    expected = np.array([[4.80272, 4.726, 3.3], [4.712, 4.6, 3.3], [2.12, 1.0, 3.3]])
    np.testing.assert_allclose(buffer.advantages.T, expected, rtol=1e-6)
    np.testing.assert_allclose(buffer.returns.T, expected + np.array([0.5, 1.0, 1.5]), rtol=1e-6)


# Whole episodes


def scripted(*lengths: int, truncates: bool = False) -> VecEnv:
    return DummyVecEnv([lambda n=n: Monitor(TimeLimit(ScriptedEnv(n, truncates), 1000)) for n in lengths])


def times(model: Any) -> list[int]:
    """The steps within their episodes that an update gets, environment by environment."""
    return [int(row[0]) for row in np.asarray(model._samples().observations)]


class Steps(BaseCallback):
    """Counts the steps of each rollout, and what an update would get of it."""

    def __init__(self) -> None:
        super().__init__()
        self.rollouts: list[int] = []
        self.samples: list[list[int]] = []

    def _on_step(self) -> bool:
        self.rollouts[-1] += 1
        return True

    def _on_rollout_start(self) -> None:
        self.rollouts.append(0)

    def _on_rollout_end(self) -> None:
        self.samples.append(times(self.model))


either_engine = pytest.mark.parametrize("engine", [True, False], ids=["fast", "ordinary"])


@either_engine
def test_episodes_in_flight_are_kept_and_go_on(engine: bool) -> None:
    """Lengths 3 and 5: the second episode ends in step 5, when the first environment is at step 2 of its second."""
    steps = Steps()
    model = make(Ours, scripted(3, 5), rollout="episodes", rollout_episodes=2, engine=engine)
    model.learn(17, callback=steps)  # 10 samples, then 8
    assert steps.rollouts == [5, 4]
    assert model.num_timesteps == 18
    assert steps.samples == [[0, 1, 2, 0, 1, 0, 1, 2, 3, 4], [2, 0, 1, 2, 0, 1, 2, 3]]
    # the environment that is in flight is worth what its next observation is, the other nothing
    buffer, gamma = model.rollout_buffer, 0.9
    assert model._last_obs[:, 0].tolist() == [0, 4]
    last = model.policy.predict_values(th.as_tensor(model._last_obs)).detach().numpy()[1, 0]
    np.testing.assert_allclose(buffer.advantages[3, 1], 4 + gamma * last - buffer.values[3, 1], rtol=1e-5)
    np.testing.assert_allclose(buffer.advantages[3, 0], 3 - buffer.values[3, 0], rtol=1e-5)


@either_engine
def test_unfinished_episodes_can_be_dropped(engine: bool) -> None:
    steps = Steps()
    kwargs = {"rollout": "episodes", "rollout_episodes": 2, "drop_unfinished_episodes": True}
    model = make(Ours, scripted(3, 5), engine=engine, **kwargs)
    model.learn(20, callback=steps)
    assert steps.rollouts == [5, 5]  # and the second begins at a reset
    assert steps.samples == 2 * [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert model.num_timesteps == 20  # steps that were taken count
    returns = model._samples().returns
    last_ones = np.asarray(returns)[[2, 7]]
    np.testing.assert_allclose(last_ones, [3, 5], rtol=1e-6)


def test_explained_variance_is_that_of_the_samples_that_count() -> None:
    kwargs = {"rollout": "episodes", "rollout_episodes": 2, "drop_unfinished_episodes": True, "n_epochs": 1}
    model = make(PPOX, scripted(3, 5), **kwargs)
    seen: dict[str, Any] = {}
    train = model.train

    def watched() -> None:
        samples = model._samples()
        seen["expected"] = 1 - np.var(samples.returns - samples.values) / np.var(samples.returns)
        train()
        seen["logged"] = model.logger.name_to_value["train/explained_variance"]

    model.train = watched
    model.learn(10)
    assert seen["logged"] == pytest.approx(seen["expected"], rel=1e-5)


@either_engine
def test_a_rollout_of_episodes_ends_after_n_steps_in_any_case(engine: bool) -> None:
    steps = Steps()
    model = make(Ours, scripted(50, 50), rollout="episodes", engine=engine)
    model.learn(48, callback=steps)
    assert steps.rollouts == [12, 12]
    dropping = make(PPOX, scripted(50, 50), rollout="episodes", drop_unfinished_episodes=True, engine=engine)
    with pytest.raises(ValueError, match=r"no episode ended within n_steps=12 .*raise n_steps, or .*TimeLimit"):
        dropping.learn(24)


@pytest.mark.parametrize(
    ("policy", "space"), [("MlpPolicy", BOX), ("CnnPolicy", IMAGE), ("MultiInputPolicy", DICT)], ids=["box", "images", "dict"]
)
@pytest.mark.parametrize("limit", [100, 5], ids=["terminates", "truncates"])
def test_rollouts_of_episodes_are_those_of_steps_of_the_same_length(policy: str, space: spaces.Space, limit: int) -> None:
    """10 steps hold two episodes that are truncated after 5; 7 hold one that is not."""
    length = 10 if limit == 5 else 7
    fixed = collected(Theirs, 2 * length, random_envs(space, CONTINUOUS, 2, limit), policy, n_steps=length, batch_size=2)
    kwargs = {"rollout": "episodes", "rollout_episodes": 2 * length // 5}
    model = collected(Ours, 2 * length, random_envs(space, CONTINUOUS, 2, limit), policy, **kwargs)
    assert model._rollout_length == length
    for name in STORED[1:]:
        stored = getattr(model.rollout_buffer, name)[:length]
        np.testing.assert_allclose(stored, getattr(fixed.rollout_buffer, name), rtol=1e-5, atol=1e-6, err_msg=name)
    stored, expected = model.rollout_buffer.observations, fixed.rollout_buffer.observations
    for own, other in zip(stored.values(), expected.values(), strict=True) if policy == "MultiInputPolicy" else ():
        np.testing.assert_array_equal(own[:length], other)


def test_endless_episodes_are_warned_of_before_a_step_is_taken() -> None:
    with pytest.warns(UserWarning, match=r"no time limit.*gymnasium.wrappers.TimeLimit.*n_steps=12"):
        make(PPOX, DummyVecEnv([ScriptedEnv]), rollout="episodes")
    make(PPOX, "Pendulum-v1", rollout="episodes")


# Samples


def test_samples_are_in_sb3s_order_and_minibatches_from_its_stream() -> None:
    model = make(Ours, random_envs(BOX, CONTINUOUS, 3)).learn(36)
    np.random.seed(1)
    ours = list(minibatches(model._samples(), 10))
    np.random.seed(1)
    theirs = list(model.rollout_buffer.get(10))
    assert [batch.size for batch in ours] == [10, 10, 10, 6]
    for own, other in zip(ours, theirs, strict=True):
        pairs = zip((*own[:4], *own[4:6]), other[:6], strict=True)
        for value, expected in pairs:
            np.testing.assert_array_equal(value, expected)
    # and once SB3's buffer has rearranged its arrays they are still the same
    again = model._samples()
    np.testing.assert_array_equal(np.sort(again.returns), np.sort(np.concatenate([batch.returns for batch in ours])))
    np.random.seed(1)
    np.testing.assert_array_equal(next(minibatches(again, 10)).actions, ours[0].actions)


# Callbacks


class Names(BaseCallback):
    """What a callback finds."""

    def __init__(self) -> None:
        super().__init__()
        self.step: dict[str, Any] = {}
        self.end: dict[str, Any] = {}

    def _on_step(self) -> bool:
        if self.n_calls == 1:
            self.step = dict(self.locals)
        return True

    def _on_rollout_end(self) -> None:
        self.end = dict(self.locals)


def test_callbacks_find_sb3s_names() -> None:
    found = []
    for cls in (Ours, Theirs):
        names = Names()
        make(cls, random_envs(BOX, CONTINUOUS, 2)).learn(24, callback=names)
        found.append(names)
    ours, theirs = found
    assert set(theirs.step) <= set(ours.step)
    assert ours.step["values"] is ours.step["log_probs"] is None
    for name in ("actions", "clipped_actions", "new_obs", "rewards", "dones"):
        np.testing.assert_allclose(ours.step[name], theirs.step[name], atol=1e-6)
    for name in ("values", "log_probs"):
        np.testing.assert_allclose(ours.end[name], theirs.end[name].detach(), rtol=1e-5, atol=1e-6)
        assert ours.end[name].shape == theirs.end[name].shape
    assert ours.end["rollout_buffer"].full


class Stop(BaseCallback):
    """Stops in the middle of a rollout."""

    def _on_step(self) -> bool:
        return self.n_calls < 17


@either_engine
@pytest.mark.parametrize("rollout", ["steps", "episodes"])
def test_a_rollout_that_was_stopped_is_not_trained_on(engine: bool, rollout: str) -> None:
    model = make(PPOX, scripted(12), engine=engine, rollout=rollout, rollout_episodes=1, n_epochs=3)
    model.learn(100, callback=Stop())
    assert (model.num_timesteps, model._n_updates) == (17, 3)


# Environments that break


class Broken(gym.Wrapper):
    """Gives a number that is none at some step."""

    def __init__(self, env: gym.Env, what: str, at: int) -> None:
        super().__init__(env)
        self.what, self.at, self.steps = what, at, 0

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(**kwargs)
        return self._spoilt("first observation", obs), info

    def step(self, action: Any) -> Any:
        self.steps += 1
        obs, reward, terminated, truncated, info = self.env.step(action)
        obs = self._spoilt("observation" if not truncated else "last observation of an episode", obs)
        if self._now("observation that the policy can take"):
            obs[0] = np.inf  # tanh makes 1 of it
        return obs, float("nan") if self._now("reward") else reward, terminated, truncated, info

    def _now(self, what: str) -> bool:
        return self.what == what and self.steps == self.at

    def _spoilt(self, what: str, obs: np.ndarray) -> np.ndarray:
        return np.full_like(obs, np.inf) if self._now(what) else obs


@pytest.mark.parametrize("rollout", ["steps", "episodes"])
@either_engine
@pytest.mark.parametrize("actions", [CONTINUOUS, spaces.Discrete(3)], ids=["box", "discrete"])
@pytest.mark.parametrize(
    ("what", "at"),
    [
        ("reward", 3),
        ("first observation", 0),
        ("observation", 3),
        ("observation that the policy can take", 3),
        ("observation", 12),
        ("last observation of an episode", 5),
    ],
    ids=lambda value: str(value),
)
def test_broken_environments_are_named(what: str, at: int, actions: spaces.Space, engine: bool, rollout: str) -> None:
    def make_env(index: int) -> Callable[[], gym.Env]:
        env = TimeLimit(RandomEnv(BOX, actions), 5)
        return lambda: Monitor(Broken(env, what, at if index == 1 else -1))

    env = DummyVecEnv([make_env(index) for index in range(3)])
    model = make(PPOX, env, engine=engine, rollout=rollout, rollout_episodes=100)
    # V of the last observation is in the reward when SB3's rollout is over
    message = what if what in ("reward", "last observation of an episode") else "observation"
    message = "reward" if what.startswith("last") and not engine and rollout == "steps" else message
    with pytest.raises(NonFiniteError, match=f"environment 1 gave a non-finite {message}"):
        model.learn(100)
    assert model._n_updates == 0


@either_engine
def test_other_errors_of_environments_stay_theirs(engine: bool) -> None:
    class Failing(RandomEnv):
        def step(self, action: Any) -> Any:
            raise ValueError("out of order")

    with pytest.raises(ValueError, match="out of order"):
        make(PPOX, DummyVecEnv([lambda: Failing(BOX, CONTINUOUS)]), engine=engine).learn(20)
