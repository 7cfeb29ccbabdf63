"""Rollouts: SB3's to the bit, ends of episodes, whole episodes, callbacks that change things, environments that break."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from environments import BOX, CONTINUOUS, DICT, IMAGE, RandomEnv, ScriptedEnv
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from models import BY_SEGMENTS, ON_POLICY, algorithm_class, policies_of, skip_unless_taken, small_model, taken, taking
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper, VecNormalize
from torch import nn

from sb3_ac_ext import PPOX
from sb3_ac_ext.buffers.rollouts import minibatches
from sb3_ac_ext.validation import NonFiniteError, UnsupportedError

T = 12
STORED = ("observations", "actions", "rewards", "episode_starts", "values", "log_probs", "advantages", "returns")
WITH_ROLLOUTS = taking("rollout")
"""Rows that learn from all that happened in a number of steps; the others have rollouts of another kind, or none."""

every_row = pytest.mark.parametrize("row", ON_POLICY)
every_row_with_rollouts = pytest.mark.parametrize("row", WITH_ROLLOUTS)
either_engine = pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])


def make(row: Any, env: Any, **kwargs: Any) -> Any:
    sizes = {"n_steps": T, "batch_size": kwargs.get("n_steps", T), "gamma": 0.9, "gae_lambda": 0.8}
    return small_model(row, env=env, **{**taken(row, sizes), **kwargs})


class Collecting:
    """Nothing of its rollouts is used up."""

    def train(self) -> None:
        """Nothing."""


def untrained(row: Any, env: Any, **kwargs: Any) -> Any:
    cls = algorithm_class(row)
    return make(type(cls.__name__, (Collecting, cls), {}), env, **kwargs)


def random_envs(observations: spaces.Space, actions: spaces.Space, n_envs: int = 1, limit: int = 100) -> VecEnv:
    """Episodes that end after 7 steps, or are truncated before."""
    return make_vec_env(lambda: TimeLimit(Lenient(observations, actions), limit), n_envs=n_envs)


class Lenient(RandomEnv):
    """Takes actions of another type than its own, which SB3 gives where the Box is one of integers."""

    def step(self, action: Any) -> Any:
        self.t += 1
        return self.observation_space.sample(), float(np.sum(action)), self.t % self.length == 0, False, {}


def parts(observations: Any) -> list[np.ndarray]:
    return [*observations.values()] if isinstance(observations, dict) else [observations]


# Equal to SB3


MATRIX = spaces.Box(-2, 2, (2, 3), np.float64)
KINDS: dict[str, tuple[spaces.Space, spaces.Space, dict[str, Any]]] = {
    "box": (BOX, CONTINUOUS, {}),
    "matrices": (MATRIX, MATRIX, {}),
    "observations of integers": (spaces.Box(0, 9, (3,), np.int64), CONTINUOUS, {}),
    "a choice observed": (spaces.Discrete(5), CONTINUOUS, {}),
    "images": (IMAGE, CONTINUOUS, {"policy": "CnnPolicy"}),
    "dict": (DICT, CONTINUOUS, {"policy": "MultiInputPolicy"}),
    "discrete": (BOX, spaces.Discrete(3), {}),
    "multidiscrete": (BOX, spaces.MultiDiscrete([3, 2]), {}),
    "multibinary": (BOX, spaces.MultiBinary(3), {}),
    "actions of integers": (BOX, spaces.Box(-2, 5, (2,), np.int64), {}),
    "actions of bytes": (BOX, spaces.Box(0, 9, (2,), np.uint8), {}),
    "actions in float16": (BOX, spaces.Box(0, 3, (2,), np.float16), {}),
    "gsde": (BOX, CONTINUOUS, {"use_sde": True}),
    "gsde every 4": (BOX, CONTINUOUS, {"use_sde": True, "sde_sample_freq": 4}),
    "gsde narrow": (BOX, CONTINUOUS, {"use_sde": True, "policy_kwargs": {"full_std": False, "log_std_init": -1}}),
    "gsde squashed": (BOX, CONTINUOUS, {"use_sde": True, "policy_kwargs": {"squash_output": True}}),
}


@pytest.mark.parametrize(("n_envs", "limit"), [(1, 100), (3, 100), (3, 5)], ids=["one", "three", "truncated"])
@pytest.mark.parametrize("kind", [*KINDS, "box, normalized", "dict, normalized"])
@either_engine
def test_rollouts_are_sb3s_to_the_bit(kind: str, n_envs: int, limit: int, engine: bool) -> None:
    """The second of two, which begins within an episode."""
    observations, actions, kwargs = KINDS[kind.removesuffix(", normalized")]
    models = []
    for cls, own in ((PPOX, {"engine": engine}), (PPO, {})):  # one at a time, for the generators are everybody's
        env = random_envs(observations, actions, n_envs, limit)
        if kind.endswith("normalized"):
            env = VecNormalize(env, norm_obs_keys=["vector"] if observations is DICT else None)
        models.append(untrained(cls, env, **kwargs, **own).learn(2 * T * n_envs))
    ours, theirs = models
    if engine:
        assert ours.engine_report()["sample_actions"] == "replayed"
    assert theirs.rollout_buffer.episode_starts[0].sum() == 0
    for name in STORED:
        stored, expected = (parts(getattr(model.rollout_buffer, name)) for model in models)
        for own, other in zip(stored, expected, strict=True):
            assert own.dtype == other.dtype, name
            tolerance = 1e-6 if name in ("advantages", "returns") else 0
            np.testing.assert_allclose(own, other, rtol=tolerance, atol=tolerance, err_msg=name)
    assert len(theirs.ep_info_buffer) > 0
    for name in ("r", "l"):
        assert [info[name] for info in ours.ep_info_buffer] == [info[name] for info in theirs.ep_info_buffer]


class Watching(BaseCallback):
    """
    What a callback finds at each step, and what it does at one of them.

    :param at: after how many steps it does it
    """

    def __init__(self, at: int = 0, do: Callable[[Any], Any] = lambda model: None) -> None:
        super().__init__()
        self.at, self.do = at, do
        self.found: list[dict[str, Any]] = []
        self.filled: list[tuple[int, int, bool]] = []

    def _look(self) -> None:
        self.found.append(dict(self.locals))
        buffer = self.model.rollout_buffer
        self.filled.append((buffer.pos, buffer.size(), buffer.full))

    def _on_step(self) -> bool:
        self._look()
        if self.n_calls == self.at:
            self.do(self.model)
        return True

    def _on_rollout_end(self) -> None:
        self._look()


def test_callbacks_find_what_they_find_with_sb3() -> None:
    ours, theirs = Watching(), Watching()
    for cls, callback in ((PPOX, ours), (PPO, theirs)):
        untrained(cls, random_envs(BOX, CONTINUOUS, 2)).learn(2 * T, callback)
    assert ours.filled == theirs.filled == [(t, t, False) for t in range(T)] + [(T, T, True)]
    for found, expected in zip(ours.found, theirs.found, strict=True):
        assert set(expected) - {"idx", "done", "terminal_obs", "terminal_value"} <= set(found)
        for name in ("obs_tensor", "actions", "clipped_actions", "new_obs", "rewards", "dones", "values", "log_probs"):
            assert type(found[name]) is type(expected[name]), name
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    stored = ours.found[-1]["rollout_buffer"].actions
    given = np.stack([found["clipped_actions"] for found in ours.found[:-1]])
    np.testing.assert_array_equal(given, np.clip(stored, CONTINUOUS.low, CONTINUOUS.high))
    assert ((stored < CONTINUOUS.low) | (stored > CONTINUOUS.high)).any()


class OwnBuffer(RolloutBuffer):
    """Counts what is added, and has advantages of its own."""

    added = 0

    def add(self, *args: Any, **kwargs: Any) -> None:
        self.added += 1
        super().add(*args, **kwargs)

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        self.advantages[:] = np.arange(self.buffer_size)[:, None]
        self.returns[:] = self.rewards


@every_row_with_rollouts
@either_engine
def test_a_buffer_of_the_user_is_filled_by_its_own_methods(row: str, engine: bool) -> None:
    model = make(row, random_envs(BOX, CONTINUOUS), rollout_buffer_class=OwnBuffer, engine=engine)
    model.learn(2 * T)
    assert model.rollout_buffer.added == 2 * T
    assert model._samples().advantages.tolist() == [*range(T)]
    with pytest.raises(
        UnsupportedError, match=r"rollout='episodes' fills SB3's own buffers, got rollout_buffer_class=.*OwnBuffer"
    ):
        make(row, "Pendulum-v1", rollout="episodes", rollout_buffer_class=OwnBuffer)


def test_samples_are_in_sb3s_order_and_minibatches_from_its_stream() -> None:
    for actions in (CONTINUOUS, spaces.Discrete(3)):
        model = untrained(PPOX, random_envs(BOX, actions, 3)).learn(3 * T)
        np.random.seed(1)
        ours = list(minibatches(model._samples(), 10))
        np.random.seed(1)
        theirs = list(model.rollout_buffer.get(10))
        assert [batch.size for batch in ours] == [10, 10, 10, 6]
        for own, other in zip(ours, theirs, strict=True):
            for value, expected in zip(own[:6], other[:6], strict=True):
                np.testing.assert_array_equal(value, expected.reshape(value.shape))
        # and once SB3's buffer has rearranged its arrays they are still the same
        np.random.seed(1)
        np.testing.assert_array_equal(next(minibatches(model._samples(), 10)).actions, ours[0].actions)


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


@every_row_with_rollouts
@pytest.mark.parametrize("rollout", ["steps", "episodes"])
@either_engine
@pytest.mark.filterwarnings("ignore:rollout='episodes'")
def test_advantages_and_returns_at_the_ends_of_episodes(row: str, engine: bool, rollout: str) -> None:
    env = DummyVecEnv([lambda end=end: Monitor(Script(end)) for end in (None, "truncated", "terminated")])
    kwargs = {"policy_kwargs": {"net_arch": {"pi": [4], "vf": [1]}, "activation_fn": nn.ReLU}, "n_steps": 3}
    model = untrained(row, env, engine=engine, rollout=rollout, rollout_episodes=100, **kwargs)
    for layer in (model.policy.mlp_extractor.value_net[0], model.policy.value_net):  # V(s) = s for s > 0
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    buffer = model.learn(9).rollout_buffer
    np.testing.assert_allclose(buffer.values.T, 3 * [[0.5, 1.0, 1.5]])
    np.testing.assert_allclose(buffer.rewards.T, [[1, 2, 3], [1, 2 + 0.9 * 4, 3], [1, 2, 3]], rtol=1e-6)
    expected = np.array([[4.80272, 4.726, 3.3], [4.712, 4.6, 3.3], [2.12, 1.0, 3.3]])
    np.testing.assert_allclose(buffer.advantages.T, expected, rtol=1e-6)
    np.testing.assert_allclose(buffer.returns.T, expected + np.array([0.5, 1.0, 1.5]), rtol=1e-6)


class Refilling(VecEnvWrapper):
    """Gives last observations in memory that it fills again at the next end of an episode, as simulators do."""

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.memory = np.zeros((self.num_envs, *self.observation_space.shape), np.float32)
        self.rewards: list[np.ndarray] = []
        self.ends: list[tuple[int, int, np.ndarray]] = []

    def reset(self) -> Any:
        return self.venv.reset()

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = self.venv.step_wait()
        for i in np.flatnonzero(dones):
            self.memory[i] = infos[i]["terminal_observation"]
            infos[i]["terminal_observation"] = self.memory[i]
            self.ends.append((len(self.rewards), i, self.memory[i].copy()))
        self.rewards.append(rewards.copy())
        return obs, rewards, dones, infos


@every_row_with_rollouts
@either_engine
def test_last_observations_in_memory_that_is_used_again(row: str, engine: bool) -> None:
    env = Refilling(random_envs(BOX, CONTINUOUS, 2, limit=3))
    model = untrained(row, env, engine=engine).learn(2 * T)
    expected = np.stack(env.rewards)
    for t, i, obs in env.ends:
        expected[t, i] += 0.9 * model.policy.predict_values(th.as_tensor(obs[None])).item()
    assert len(env.ends) == 8 and len({obs.tobytes() for _, _, obs in env.ends}) == 8
    np.testing.assert_allclose(model.rollout_buffer.rewards, expected, rtol=1e-5)


@pytest.mark.parametrize("row", BY_SEGMENTS)
@either_engine
def test_actors_keep_last_observations_in_memory_that_is_used_again(row: str, engine: bool) -> None:
    def trained(wrap: Callable[[VecEnv], VecEnv]) -> dict[str, th.Tensor]:
        env = make_vec_env(lambda: TimeLimit(Lenient(BOX, CONTINUOUS), 3), n_envs=2, seed=0)
        return make(row, wrap(env), engine=engine).learn(4 * T).policy.state_dict()

    expected = trained(lambda env: env)
    assert all(th.equal(value, expected[name]) for name, value in trained(Refilling).items())


# Policies that somebody changes in the middle of a rollout


@every_row_with_rollouts
@either_engine
def test_what_was_stored_belongs_to_the_policy_that_acted(row: str, engine: bool) -> None:
    def widen(model: Any) -> None:
        model.policy.log_std.data.fill_(3.0)

    model = untrained(row, random_envs(BOX, CONTINUOUS), n_steps=64, engine=engine)
    buffer = model.learn(64, Watching(32, widen)).rollout_buffer
    for rows, log_std in ((slice(0, 32), 0.0), (slice(32, 64), 3.0)):
        model.policy.log_std.data.fill_(log_std)
        observations, actions = (th.as_tensor(array[rows, 0]) for array in (buffer.observations, buffer.actions))
        values, log_probs, _ = model.policy.evaluate_actions(observations, actions)
        np.testing.assert_allclose(buffer.log_probs[rows, 0], log_probs.detach(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(buffer.values[rows], values.detach(), rtol=1e-5, atol=1e-5)
    assert np.abs(buffer.actions[32:]).max() > 10 > np.abs(buffer.actions[:32]).max()


class Remembering(Lenient):
    """Keeps the actions that it was given."""

    def __init__(self) -> None:
        super().__init__(BOX, CONTINUOUS)
        self.given: list[np.ndarray] = []

    def step(self, action: Any) -> Any:
        self.given.append(np.array(action))
        return super().step(action)


@every_row
@either_engine
def test_a_layer_that_was_replaced_acts_at_the_next_step(row: str, engine: bool) -> None:
    """Of actors, who were done with the segment, at the next one's first."""
    first = 3 * T if row in BY_SEGMENTS else 32

    def replace(model: Any) -> None:
        for policy in policies_of(model):
            layer = policy.action_net = nn.Linear(8, 2)
            nn.init.zeros_(layer.weight)
            layer.bias.data = th.tensor([-1.5, 2.5])
            policy.log_std.data.fill_(-12.0)

    env = Remembering()
    model = untrained(row, TimeLimit(env, 100), engine=engine, learning_rate=0.0)
    model.learn(64 * model.n_envs, Watching(32, replace))
    given = np.stack(env.given)
    np.testing.assert_allclose(given[first:], np.tile([-1.5, 2.5], (len(given) - first, 1)), atol=1e-3)
    assert (np.abs(given[:first] - [-1.5, 2.5]) > 1e-3).any(axis=1).all()


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


# Whole episodes


def scripted(*lengths: int, truncates: bool = False) -> VecEnv:
    return DummyVecEnv([lambda n=n: Monitor(TimeLimit(ScriptedEnv(n, truncates), 1000)) for n in lengths])


class Steps(BaseCallback):
    """Counts the steps of each rollout, and what an update would get of it: the steps within their episodes."""

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
        self.samples.append([int(row[0]) for row in np.asarray(self.model._samples().observations)])


@every_row_with_rollouts
@either_engine
def test_episodes_in_flight_are_kept_and_go_on(row: str, engine: bool) -> None:
    """Lengths 3 and 5: the second episode ends in step 5, when the first environment is at step 2 of its second."""
    steps = Steps()
    model = untrained(row, scripted(3, 5), rollout="episodes", rollout_episodes=2, engine=engine)
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


@every_row_with_rollouts
@either_engine
def test_unfinished_episodes_can_be_dropped(row: str, engine: bool) -> None:
    steps = Steps()
    kwargs = {"rollout": "episodes", "rollout_episodes": 2, "drop_unfinished_episodes": True}
    model = untrained(row, scripted(3, 5), engine=engine, **kwargs)
    model.learn(20, callback=steps)
    assert steps.rollouts == [5, 5]  # and the second begins at a reset
    assert steps.samples == 2 * [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert model.num_timesteps == 20  # steps that were taken count
    np.testing.assert_allclose(model._samples().returns[[2, 7]], [3, 5], rtol=1e-6)


def test_explained_variance_is_that_of_the_samples_that_count() -> None:
    kwargs = {"rollout": "episodes", "rollout_episodes": 2, "drop_unfinished_episodes": True, "n_epochs": 1}
    model = make(PPOX, scripted(3, 5), **kwargs)
    samples = model.learn(10, log_interval=None)._samples()
    values, returns = samples.values.numpy(), samples.returns.numpy()
    expected = 1 - np.var(returns - values) / np.var(returns)
    assert model.logger.name_to_value["train/explained_variance"] == pytest.approx(expected, rel=1e-5)


@every_row_with_rollouts
@either_engine
def test_a_rollout_of_episodes_ends_after_n_steps_in_any_case(row: str, engine: bool) -> None:
    steps = Steps()
    model = untrained(row, scripted(50, 50), rollout="episodes", rollout_episodes=9, engine=engine)
    model.learn(4 * T, callback=steps)
    assert steps.rollouts == [T, T]
    dropping = make(row, scripted(50, 50), rollout="episodes", drop_unfinished_episodes=True, engine=engine)
    with pytest.raises(ValueError, match=r"no episode ended within n_steps=12 .*raise n_steps, or .*TimeLimit"):
        dropping.learn(2 * T)


@pytest.mark.parametrize("kind", ["box", "images", "dict"])
@pytest.mark.parametrize(("limit", "length"), [(100, 7), (5, 10)], ids=["terminates", "truncates"])
def test_rollouts_of_episodes_are_those_of_steps_of_the_same_length(kind: str, limit: int, length: int) -> None:
    """10 steps hold two episodes that are truncated after 5; 7 hold one that is not."""
    observations, actions, kwargs = KINDS[kind]
    episodes = {"rollout": "episodes", "rollout_episodes": 2 * length // 5, "n_steps": 20}
    models = []
    for own in ({"n_steps": length}, episodes):
        model = untrained(PPOX, random_envs(observations, actions, 2, limit), batch_size=2, **own, **kwargs)
        models.append(model.learn(2 * length))
        assert model._rollout_length == length
    for name in STORED:
        fixed, stored = (parts(getattr(model.rollout_buffer, name)) for model in models)
        for own, other in zip(stored, fixed, strict=True):
            np.testing.assert_array_equal(own[:length], other, err_msg=name)


def test_endless_episodes_are_warned_of_before_a_step_is_taken() -> None:
    with pytest.warns(UserWarning, match=r"no time limit.*gymnasium.wrappers.TimeLimit.*n_steps=12"):
        make(PPOX, DummyVecEnv([ScriptedEnv]), rollout="episodes")
    make(PPOX, "Pendulum-v1", rollout="episodes")


# Numbers that are extreme, or none


@every_row
@either_engine
@pytest.mark.parametrize("actions", [spaces.Discrete(2), spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(2)], ids=str)
def test_extreme_logits_raise_nothing(row: str, actions: spaces.Space, engine: bool) -> None:
    """200 apart, where exp overflows in float32, and NumPy told to raise."""
    skip_unless_taken(row, actions)
    model = make(row, random_envs(BOX, actions, 2, limit=5), engine=engine)
    with th.no_grad():
        for policy in policies_of(model):
            policy.action_net.weight.zero_()
            policy.action_net.bias.copy_(200.0 * th.arange(len(policy.action_net.bias)).remainder(2) - 100)
    with np.errstate(all="raise"):
        model.learn(40)
        for deterministic in (True, False):
            for batch in [BOX.sample()] * 8 + [np.stack([BOX.sample()] * 3)] * 8:
                model.predict(batch, deterministic=deterministic)


@every_row
@either_engine
@pytest.mark.parametrize("actions", [CONTINUOUS, spaces.Discrete(2), spaces.MultiBinary(2)], ids=str)
def test_prediction_of_nan_is_refused(row: str, actions: spaces.Space, engine: bool) -> None:
    """Before and after the policy was recorded; no observations have no actions, where PyTorch's distributions allow it."""
    skip_unless_taken(row, actions)
    model = make(row, random_envs(BOX, actions), engine=engine)
    for _ in range(8):
        with pytest.raises(ValueError, match=r"NaN|nan|constraint"):
            model.predict(np.full(4, np.nan, np.float32))
        if not isinstance(actions, spaces.Discrete):
            assert model.predict(np.zeros((0, 4), np.float32))[0].shape == (0, *actions.shape)
        model.predict(BOX.sample())


class Forgiving(FlattenExtractor):
    """Knows what to do with numbers that are missing."""

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return super().forward(observations).nan_to_num(0.0)


class Vector(BaseFeaturesExtractor):
    """Looks at one entry alone."""

    def __init__(self, space: spaces.Dict) -> None:
        super().__init__(space, 4)

    def forward(self, observations: dict[str, th.Tensor]) -> th.Tensor:
        return observations["vector"]


class Missing(Lenient):
    """Every other observation, or an entry of all, is NaN."""

    def reset(self, **kwargs: Any) -> Any:
        obs, info = super().reset(**kwargs)
        return self._spoilt(obs), info

    def step(self, action: Any) -> Any:
        obs, *others = super().step(action)
        return self._spoilt(obs), *others

    def _spoilt(self, obs: Any) -> Any:
        if isinstance(obs, dict):
            return {**obs, "other": np.full_like(obs["other"], np.nan)}
        obs[self.t % 4] = np.nan
        return obs


TWO = spaces.Dict({"vector": BOX, "other": BOX})


@every_row
@either_engine
@pytest.mark.parametrize(
    ("space", "policy", "extractor"),
    [(BOX, "MlpPolicy", Forgiving), (TWO, "MultiInputPolicy", Vector)],
    ids=["an extractor that replaces it", "an entry that nobody looks at"],
)
def test_nan_that_the_policy_can_take(row: str, space: spaces.Space, policy: str, extractor: Any, engine: bool) -> None:
    env = make_vec_env(lambda: TimeLimit(Missing(space, CONTINUOUS), 5), n_envs=2)
    model = make(row, env, policy=policy, engine=engine, policy_kwargs={"features_extractor_class": extractor})
    before = [parameter.clone() for parameter in model.policy.parameters()]
    model.learn(48)
    changed = [not th.equal(new, old) for new, old in zip(model.policy.parameters(), before, strict=True)]
    assert all(changed) and all(parameter.isfinite().all() for parameter in model.policy.parameters())


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


BROKEN = [
    ("reward", 3),
    ("first observation", 0),
    ("observation", 3),
    ("observation that the policy can take", 3),
    ("observation", 12),
    ("last observation of an episode", 5),
]
"""What is broken, and after how many steps."""


def broken_env(what: str, at: int, actions: spaces.Space) -> Callable[[], gym.Env]:
    env = TimeLimit(RandomEnv(BOX, actions), 5)
    return lambda: Monitor(Broken(env, what, at))


@pytest.mark.parametrize("rollout", ["steps", "episodes"])
@either_engine
@pytest.mark.parametrize("actions", [CONTINUOUS, spaces.Discrete(3)], ids=["box", "discrete"])
@pytest.mark.parametrize(("what", "at"), BROKEN, ids=str)
@every_row_with_rollouts
def test_broken_environments_are_named(
    row: str, what: str, at: int, actions: spaces.Space, engine: bool, rollout: str
) -> None:
    env = DummyVecEnv([broken_env(what, at if index == 1 else -1, actions) for index in range(3)])
    model = make(row, env, engine=engine, rollout=rollout, rollout_episodes=100)
    message = what if what in ("reward", "last observation of an episode") else "observation"
    with pytest.raises(NonFiniteError, match=f"environment 1 gave a non-finite {message}"):
        model.learn(100)
    assert model._n_updates == 0 or "can take" in what


@either_engine
@pytest.mark.parametrize("actions", [CONTINUOUS, spaces.Discrete(3)], ids=["box", "discrete"])
@pytest.mark.parametrize(("what", "at"), BROKEN, ids=str)
@pytest.mark.parametrize("row", BY_SEGMENTS)
def test_broken_environments_of_actors_are_named(row: str, what: str, at: int, actions: spaces.Space, engine: bool) -> None:
    env = DummyVecEnv([broken_env(what, at if index == 1 else -1, actions) for index in range(3)])
    model = make(row, env, engine=engine)
    message = what if what in ("reward", "last observation of an episode") else "observation"
    with pytest.raises(NonFiniteError, match=f"environment 1 gave a non-finite {message}"):
        model.learn(100)
    assert model._n_updates == 0 or "can take" in what


@every_row
@either_engine
def test_other_errors_of_environments_stay_theirs(row: str, engine: bool) -> None:
    class Failing(RandomEnv):
        def step(self, action: Any) -> Any:
            raise ValueError("out of order")

    with pytest.raises(ValueError, match="out of order"):
        make(row, TimeLimit(Failing(BOX, CONTINUOUS), 5), engine=engine).learn(20)


class UsedAgain(VecEnvWrapper):
    """Writes all it says into the same memory at every step, whether episodes have ended as numbers."""

    held: dict[str, np.ndarray]

    def __init__(self, venv: VecEnv) -> None:
        super().__init__(venv)
        self.held = {}

    def _within(self, name: str, value: np.ndarray) -> np.ndarray:
        place = self.held.setdefault(name, value.copy())
        place[...] = value
        return place[:]

    def reset(self) -> np.ndarray:
        return self._within("obs", self.venv.reset())  # type: ignore[arg-type]  # an array

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = self.venv.step_wait()
        return self._within("obs", obs), self._within("rewards", rewards), self._within("dones", dones * 1.0), infos  # type: ignore[arg-type]


@either_engine
@every_row
def test_environments_may_write_into_the_same_memory_at_every_step(row: str, engine: bool) -> None:
    def trained(wrap: Callable[[VecEnv], VecEnv]) -> dict[str, th.Tensor]:
        envs = make_vec_env(lambda: TimeLimit(Lenient(BOX, spaces.Discrete(3)), 5), n_envs=2, seed=0)
        model = make(row, wrap(envs), engine=engine, seed=0)
        model.learn(40)
        return model.policy.state_dict()

    expected = trained(lambda envs: envs)
    assert all(th.equal(value, expected[name]) for name, value in trained(UsedAgain).items())


@every_row
def test_predictions_in_threads_disturb_no_training(row: str) -> None:
    """Two threads predict all the time, in batches that come to be replayed and in one that never does."""

    def trained(threads: int) -> dict[str, th.Tensor]:
        envs = make_vec_env(lambda: TimeLimit(Lenient(BOX, spaces.Discrete(3)), 5), n_envs=2, seed=0)
        model = make(row, envs, seed=0)
        over = threading.Event()

        def predict(first: int) -> None:
            size = first
            while not over.is_set():
                model.predict(np.zeros((size, *BOX.shape), np.float32), deterministic=True)
                size = first + (size + 1) % 40

        with ThreadPoolExecutor(max(threads, 1)) as pool:
            running = [pool.submit(predict, 1 + 50 * i) for i in range(threads)]
            try:
                model.learn(200)
            finally:
                over.set()
            for one in running:
                one.result()
        return model.policy.state_dict()

    expected = trained(0)
    for name, value in trained(2).items():
        th.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@every_row
@pytest.mark.parametrize(
    "actions",
    [spaces.Discrete(3, start=-1), spaces.MultiDiscrete([2, 3], start=[5, 0]), spaces.MultiDiscrete([[2, 3], [4, 5]])],
    ids=str,
)
def test_choices_that_policies_cannot_give_are_refused(row: str, actions: spaces.Space) -> None:
    with pytest.raises(UnsupportedError, match="action_space must"):
        make(row, TimeLimit(RandomEnv(BOX, actions), 7))


class SetOnce(BaseCallback):
    """Does something to the model in the second rollout."""

    def __init__(self, do: Callable[[Any], None]) -> None:
        super().__init__()
        self.do = do

    def _on_step(self) -> bool:
        if self.n_calls == 20:
            self.do(self.model)
        return True


def nothing(model: Any) -> None:
    """Nothing."""


def rate_of_a_hundredth(model: Any) -> None:
    model.learning_rate = 0.01


@cache
def trained_with(row: str, do: Callable[[Any], None], engine: bool) -> dict[str, th.Tensor]:
    model = small_model(row, seed=0, engine=engine)
    model.learn(80, callback=SetOnce(do))
    return model.policy.state_dict()


@pytest.mark.parametrize("number", [np.float32(0.01), np.array(0.01), th.tensor(0.01)], ids=["numpy", "array", "tensor"])
@every_row
def test_learning_rates_may_be_numbers_of_any_kind(row: str, number: Any) -> None:
    expected = trained_with(row, rate_of_a_hundredth, engine=True)
    found = trained_with(row, lambda model: setattr(model, "learning_rate", number), engine=True)
    untouched = trained_with(row, nothing, engine=True)
    th.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert any(not th.allclose(value, expected[name], atol=1e-4) for name, value in untouched.items())


@every_row
def test_parameters_of_another_layout(row: str) -> None:
    def transpose(model: Any) -> None:
        for parameter in model.policy.parameters():
            parameter.data = parameter.data.T.contiguous().T if parameter.dim() == 2 else parameter.data

    on, off = (trained_with(row, transpose, engine) for engine in (True, False))
    th.testing.assert_close(on, off, rtol=1e-4, atol=1e-5)


@either_engine
@pytest.mark.parametrize("row", ["ppox", "ac", "reinforce"])
def test_gradients_that_are_switched_off_are_missed(row: str, engine: bool) -> None:
    try:
        with pytest.raises(RuntimeError, match="does not require grad"):
            trained_with(row, lambda _: th.set_grad_enabled(False), engine)
    finally:
        th.set_grad_enabled(True)
