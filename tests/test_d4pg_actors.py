"""D4PG's actors: what becomes of their steps in the replay buffer, how they explore, and how their runs go on."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from batches import engine_on_and_off, flat
from environments import BOX, CONTINUOUS, DICT, RandomEnv
from gymnasium import spaces
from models import small_model
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_ac_ext import D4PG
from sb3_ac_ext.actors.actor import ActorError
from sb3_ac_ext.actors.explorer import Explorer
from sb3_ac_ext.buffers.segments import Segment
from sb3_ac_ext.validation import NonFiniteError, UnsupportedError

N_STEPS, GAMMA = 3, 0.9
Step = tuple[np.ndarray, np.ndarray, float, np.ndarray, bool, bool]
"""Observation, action, reward, next observation, whether it terminated or truncated the episode."""


class Tagged(gym.Env):
    """
    Says in its observations which one it is, in which episode and step; every step is written down.

    Those with an even number terminate after so many steps and 3, the others are truncated.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}
    steps: ClassVar[dict[int, list[Step]]] = defaultdict(list)
    """By the number of the environment, in the order in which they were made."""
    numbers: ClassVar[list[int]] = []
    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def __init__(self) -> None:
        self.number, self.episode, self.t = len(self.numbers), 0, 0
        self.numbers.append(self.number)
        self.action_space = spaces.Box(CONTINUOUS.low, CONTINUOUS.high)

    def _observation(self) -> np.ndarray:
        return np.array([self.number, self.episode, self.t], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        before = self._observation()
        self.t += 1
        ends = [self.t == 3 + self.number and self.number % 2 == kind for kind in (0, 1)]
        reward = 100.0 * self.number + 10 * self.episode + self.t
        self.steps[self.number].append((before, action.copy(), reward, self._observation(), *ends))
        return self._observation(), reward, *ends, {}


@pytest.fixture(autouse=True)
def fresh_tags() -> None:
    number_from_zero()


def number_from_zero() -> None:
    """Forget the environments so far."""
    Tagged.numbers.clear()
    Tagged.steps.clear()


def model_with_actors(make: Callable[[], gym.Env] = Tagged, wrap: Any = None, **changes: Any) -> D4PG:
    """Two environments for each of two actors, which take three steps between updates; no updates."""
    venv = DummyVecEnv([make] * 2)
    arguments = {"n_actors": 2, "n_steps": N_STEPS, "gamma": GAMMA, "train_freq": 3, "gradient_steps": 0, "actor_env_fn": make}
    arguments |= changes
    return small_model("d4pg", env=venv if wrap is None else wrap(venv), **arguments)


def model_segment(model: D4PG, actor: int) -> Segment:
    """The next one of an actor."""
    pool: Any = model._pool
    segment: Any = pool.actors[actor].do(pool.work, model._weights())
    return segment


def silence(model: D4PG) -> None:
    """Let its policy always give the middle of each action's range."""
    for parameter in model.actor.parameters():
        parameter.data.zero_()


def sums(steps: list[Step], start: int) -> tuple[float, float, bool, np.ndarray]:
    """
    The sum of up to `N_STEPS` rewards from a step on, the discount behind it, whether the episode has terminated, and the
    observation there: where the episode ends, and where what the environment did next was something else.
    """
    total = 0.0
    for k, step in enumerate(steps[start : start + N_STEPS]):
        total += GAMMA**k * step[2]
        last = start + k + 1 == len(steps) or not np.array_equal(steps[start + k + 1][0], step[3])
        if step[4] or step[5] or last or k + 1 == N_STEPS:
            return total, GAMMA ** (k + 1), step[4], step[3]
    raise AssertionError


def check_samples(model: D4PG, *columns: list[Step]) -> None:
    """Every sample that can be drawn is what the environments did, a column of the buffer for each."""
    buffer: Any = model.replay_buffer
    assert buffer.pos == len(columns[0])
    samples = buffer._samples(np.arange(buffer.pos * len(columns)), None)
    expected = [sums(column, start) for start in range(buffer.pos) for column in columns]
    steps = [column[start] for start in range(buffer.pos) for column in columns]
    np.testing.assert_array_equal(samples.observations, [step[0] for step in steps])
    np.testing.assert_allclose(samples.actions, model.policy.scale_action(np.array([step[1] for step in steps])), atol=1e-6)
    rewards, discounts, dones, following = zip(*expected, strict=True)
    np.testing.assert_allclose(samples.rewards[:, 0], rewards, rtol=1e-6)
    np.testing.assert_allclose(samples.discounts[:, 0], discounts, rtol=1e-6)
    np.testing.assert_array_equal(samples.dones[:, 0], dones)
    np.testing.assert_array_equal(samples.next_observations, following)


# The replay buffer


def test_sums_are_those_of_each_environment_of_each_actor() -> None:
    model = model_with_actors().learn(4 * 3 * 7)
    assert model.num_timesteps == 4 * 3 * 7
    assert len(Tagged.steps) == 4
    check_samples(model, *(Tagged.steps[number] for number in range(4)))
    model.learn(4 * 3 * 2, reset_num_timesteps=False)
    check_samples(model, *(Tagged.steps[number] for number in range(4)))
    model.learn(4 * 3 * 2)  # resets what the first actor acts in
    check_samples(model, *(Tagged.steps[number] for number in range(4)))


@pytest.mark.parametrize("rounds", [3, 5], ids=["inside episodes", "where one has just terminated"])
def test_replaced_actor_does_not_go_on_from_the_one_before(rounds: int) -> None:
    """Environment 2 has terminated after five steps, so after 15."""
    model = model_with_actors().learn(4 * 3 * rounds)
    pool: Any = model._pool
    pool.actors[1] = Explorer(1, generation=1)
    pool.actors[1].start(model._recipe(), model.actor)
    model.learn(4 * 3 * 4, reset_num_timesteps=False)
    steps = Tagged.steps
    check_samples(model, steps[0], steps[1], steps[2] + steps[4], steps[3] + steps[5])


def test_steps_that_were_lost_are_not_joined_over() -> None:
    """A callback stops in the second actor's segment, so that nothing of the round is stored."""

    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 4

    model = model_with_actors().learn(4 * 3)
    model.learn(4 * 3 * 9, Stop(), reset_num_timesteps=False)
    assert model.num_timesteps == 4 * 3 + 2 * 4
    model.learn(4 * 3 * 2, reset_num_timesteps=False)
    check_samples(model, *(steps[:3] + steps[6:] for steps in Tagged.steps.values()))


def test_buffer_that_is_loaded_is_not_joined_to(tmp_path: Path) -> None:
    model = model_with_actors().learn(4 * 3)
    model.save_replay_buffer(tmp_path / "buffer")
    model.learn(4 * 3, reset_num_timesteps=False)
    model.load_replay_buffer(tmp_path / "buffer")
    model.learn(4 * 3, reset_num_timesteps=False)
    check_samples(model, *(steps[:3] + steps[6:] for steps in Tagged.steps.values()))


def test_fast_actors_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has given a segment is held; one that was begun with another ``train_freq`` is not taken."""
    model = model_with_actors().learn(4 * 3)
    pool: Any = model._pool
    results = [replace(model_segment(model, actor), rewards=np.full((3, 2), number)) for number, actor in enumerate((1, 0))]
    results.insert(1, replace(results[1], dones=np.zeros((4, 2), dtype=bool)))
    held = []

    def take(weights: Any) -> Any:
        held.append(pool.held)
        return results[len(held) - 1]

    monkeypatch.setattr(pool, "take", take)
    assert [segment.rewards[0, 0] for segment in model._one_of_each(3)] == [1, 0]
    assert held == [frozenset(), {1}, {1}]
    assert pool.held == frozenset()


def test_rows_of_dicts() -> None:
    model = model_with_actors(lambda: RandomEnv(DICT, CONTINUOUS), policy="MultiInputPolicy").learn(4 * 3 * 4)
    buffer: Any = model.replay_buffer
    going_on = buffer.dones[:11] == 0
    for name in DICT:
        assert buffer.observations[name].shape[1] == 4
        before, after = buffer.next_observations[name][:11][going_on], buffer.observations[name][1:12][going_on]
        np.testing.assert_array_equal(before, after)


def test_rows_are_not_normalised() -> None:
    model = model_with_actors(wrap=lambda venv: VecNormalize(venv, clip_obs=1e6, clip_reward=1e6)).learn(4 * 3 * 5)
    buffer: Any = model.replay_buffer
    for number, steps in Tagged.steps.items():
        observations, _, rewards, following, *_ = map(np.array, zip(*steps, strict=True))
        np.testing.assert_array_equal(buffer.observations[:15, number], observations)
        np.testing.assert_array_equal(buffer.rewards[:15, number], rewards)
        np.testing.assert_allclose(buffer.next_observations[:15, number], following, atol=1e-4)


def test_one_actor_here_is_sb3s_own_loop() -> None:
    model = model_with_actors(n_actors=1).learn(12)
    assert model._pool is None
    assert model.replay_buffer.n_envs == 2


# Updates


@pytest.mark.parametrize(("gradient_steps", "each"), [(5, 5), (-1, 12)])
def test_updates_are_as_many_as_were_asked_for(gradient_steps: int, each: int) -> None:
    """Rounds are of 12 steps; the first one is not more than ``learning_starts``."""
    model = model_with_actors(gradient_steps=gradient_steps, learning_starts=12).learn(12 * 4)
    assert model._n_updates == each * 3


@engine_on_and_off
def test_training_with_actors_is_the_same_with_the_engine(engine: bool) -> None:
    arguments: dict[str, Any] = {"gradient_steps": 4, "exploration_noise": {"type": "normal", "start": 0.3}}

    def trained(engine: bool) -> th.Tensor:
        number_from_zero()
        return flat(model_with_actors(engine=engine, **arguments).learn(12 * 6).policy)

    model = model_with_actors(engine=not engine, **arguments).learn(12)
    model.engine = engine
    model.learn(12, reset_num_timesteps=False)
    pool: Any = model._pool
    assert [actor._engine.enabled for actor in pool.actors] == [engine, engine]
    reference = trained(False)
    th.testing.assert_close(trained(engine), reference, rtol=1e-5, atol=1e-6)
    assert not th.equal(reference, flat(model_with_actors(**arguments).policy))


def test_policy_of_actors_is_the_actor_network() -> None:
    """Nothing of the critics goes to them."""
    model = model_with_actors()
    assert model._acting is model.actor
    model.actors = "ray"
    weights = model._weights()
    assert weights.parameters is not None
    assert weights.parameters.keys() == model.actor.state_dict().keys()


# Exploration


def test_each_environment_has_noise_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ornstein-Uhlenbeck, by the draws in their order: actor, step, environment; it begins at 0 with each episode."""
    draws: list[np.ndarray] = []
    normal = np.random.normal

    def noted(*args: Any, **kwargs: Any) -> Any:
        draws.append(normal(*args, **kwargs))
        return draws[-1]

    monkeypatch.setattr(np.random, "normal", noted)
    schedule = {"type": "ornstein-uhlenbeck", "start": 0.4, "end": 0.1, "steps": 60, "dt": 0.5}
    model = model_with_actors(exploration_noise=schedule, learning_starts=0)
    silence(model)
    model.learn(4 * 3 * 7)
    assert len({draw.tobytes() for draw in draws}) == len(draws) == 4 * 3 * 7
    stored, queue, states = model.replay_buffer.actions[:21], iter(draws), np.zeros((4, 2))
    for first in range(0, 21, 3):
        factor = 0.4 - 0.3 * min(4 * first / 60, 1.0)
        for actor in (0, 1):
            for row in range(first, first + 3):
                for column in (2 * actor, 2 * actor + 1):
                    states[column] += -0.15 * 0.5 * states[column] + np.sqrt(0.5) * next(queue)
                    np.testing.assert_allclose(stored[row, column], np.clip(factor * states[column], -1, 1), atol=1e-6)
                    if Tagged.steps[column][row][4] or Tagged.steps[column][row][5]:
                        states[column] = 0


def test_noise_object_serves_all_actors() -> None:
    """It is copied, so that the one that was given draws nothing; what is changed of it is taken up."""
    noise = NormalActionNoise(np.zeros(2), np.full(2, 0.1))
    model = model_with_actors(action_noise=noise, learning_starts=0)
    silence(model)
    model.learn(4 * 3)
    first = model.replay_buffer.actions[:3]
    assert np.all(np.std(first, axis=(0, 1)) < 0.3) and len(np.unique(first)) == first.size
    noise._sigma = np.array([0.0, 0.1])
    model.learn(4 * 3, reset_num_timesteps=False)
    assert np.all(model.replay_buffer.actions[3:6, :, 0] == 0)
    assert np.all(model.replay_buffer.actions[3:6, :, 1] != 0)


@pytest.mark.parametrize("warmup", ["uniform", "noise"])
def test_warm_up(warmup: str) -> None:
    """Two rounds begin before the 20th step; there is no noise behind the warm-up."""
    model = model_with_actors(warmup=warmup, exploration_noise={"type": "normal", "start": 0.0}, learning_starts=20)
    if warmup == "uniform":
        model.exploration_noise = None
    silence(model)
    assert model._settings()["uniform"] is (warmup == "uniform")
    model.learn(4 * 3 * 4)
    actions = model.replay_buffer.actions[:12]
    assert len(np.unique(actions[:6].round(6))) > 6 * 4  # those of noise are clipped
    assert np.all(np.abs(actions) <= 1)
    assert np.all(actions[6:] == 0)


# Going on


def test_runs_go_on_as_they_were(tmp_path: Path) -> None:
    """From a file as in the process where environments begin anew, and as if there had been one `learn`."""
    arguments: dict[str, Any] = {
        "gradient_steps": 2,
        "exploration_noise": {"type": "normal", "start": 0.2},
        "replay_buffer_kwargs": {"beta_start": 1.0},
    }

    def environments() -> DummyVecEnv:
        number_from_zero()
        return DummyVecEnv([Tagged] * 2)

    number_from_zero()
    model = model_with_actors(**arguments).learn(60)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    model.set_env(environments())
    model.learn(60, reset_num_timesteps=False)
    for _ in range(2):
        loaded = D4PG.load(tmp_path / "model", env=environments())
        loaded.load_replay_buffer(tmp_path / "buffer")
        loaded.learn(60, reset_num_timesteps=False)
        assert th.equal(flat(loaded.policy), flat(model.policy))
        np.testing.assert_array_equal(loaded.replay_buffer.timeouts, model.replay_buffer.timeouts)
    number_from_zero()
    whole = model_with_actors(**arguments).learn(120)
    number_from_zero()
    parts = model_with_actors(**arguments).learn(60).learn(60, reset_num_timesteps=False)
    assert th.equal(flat(parts.policy), flat(whole.policy))


def test_other_number_of_actors_is_refused(tmp_path: Path) -> None:
    model = model_with_actors().learn(12)
    model.save(tmp_path / "model")
    model.save(tmp_path / "with_buffer", include=["replay_buffer"])
    model.save_replay_buffer(tmp_path / "buffer")
    other = D4PG.load(tmp_path / "model", env=model.env, n_actors=3)
    with pytest.raises(ValueError, match="holds n_envs=4 environments, the model has n_envs=2 times n_actors=3"):
        other.load_replay_buffer(tmp_path / "buffer")
    with pytest.raises(ValueError, match="n_actors must be left out where the file has its replay buffer"):
        D4PG.load(tmp_path / "with_buffer", env=model.env, n_actors=3)


def test_a_callback_closes() -> None:
    class Close(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls == 5:
                self.model.close()
            return True

    model = model_with_actors()
    whole = model_with_actors().learn(60)
    assert model.learn(60, callback=Close()).num_timesteps == whole.num_timesteps == 60
    assert model.replay_buffer.size() == whole.replay_buffer.size()


@pytest.mark.parametrize("n_actors", [1, 3])
def test_number_of_actors_that_is_set_on_a_model_is_refused(n_actors: int) -> None:
    model = model_with_actors().learn(12)
    model.n_actors = n_actors
    for _ in range(2):  # with actors, and with new ones
        with pytest.raises(ValueError, match=f"n_actors must be 2, for which the replay buffer was made, got {n_actors}"):
            model.learn(12)


# Refusals


@pytest.mark.parametrize("what", ["reward", "observation"])
def test_number_that_is_not_finite_is_located(what: str) -> None:
    class Broken(Tagged):
        def step(self, action: np.ndarray) -> Any:
            obs, reward, *rest = super().step(action)
            if self.number == 3 and self.t == 3:  # the last one of a segment, so that nothing acts by it
                obs, reward = (obs, np.nan) if what == "reward" else (obs * np.nan, reward)
            return obs, reward, *rest

    model = model_with_actors(Broken, gradient_steps=1, learning_starts=0)
    with pytest.raises(NonFiniteError, match=rf"actor 1 \(generation 0\): environment 1 gave a non-finite {what}"):
        model.learn(24)
    assert model._pool is None


def test_failure_names_the_actor() -> None:
    class Broken(Tagged):
        def step(self, action: np.ndarray) -> Any:
            if self.number == 2:
                raise RuntimeError("out of order")
            return super().step(action)

    with pytest.raises(ActorError, match=r"actor 1 \(generation 0\) failed: RuntimeError: out of order"):
        model_with_actors(Broken).learn(24)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_freq": (1, "episode")}, "actors send numbers of steps"),
        (
            {"optimize_memory_usage": True, "n_steps": 1, "replay_buffer_kwargs": {"handle_timeout_termination": False}},
            "would be written over",
        ),
    ],
    ids=["episodes", "memory"],
)
def test_refused_with_several_actors(changes: dict[str, Any], message: str) -> None:
    needs = r'needs actors="inline" and n_actors=1, got actors=\'inline\' and n_actors=2: .*'
    with pytest.raises(UnsupportedError, match=needs + message):
        small_model("d4pg", env=RandomEnv(BOX, CONTINUOUS), n_actors=2, **changes)
    small_model("d4pg", env=RandomEnv(BOX, CONTINUOUS), **changes)


def test_hindsight_is_refused_with_several_actors() -> None:
    env = BitFlippingEnv(continuous=True)
    with pytest.raises(UnsupportedError, match=r"replay_buffer_class=HerReplayBuffer needs .* whole episodes"):
        D4PG("MultiInputPolicy", env, replay_buffer_class=HerReplayBuffer, n_actors=2)


def test_buffer_must_have_room_for_all_actors() -> None:
    with pytest.raises(ValueError, match=r"buffer_size must be at least n_steps \* n_envs \* n_actors = 12, got 11"):
        model_with_actors(buffer_size=11)


# Ray


@pytest.mark.ray
def test_actors_on_ray(ray: Any) -> None:
    """Rows have the steps of each actor in their order, whichever came first."""
    model = small_model(
        "d4pg",
        env=DummyVecEnv([lambda: RandomEnv(BOX, CONTINUOUS)] * 2),
        **{"actors": "ray", "n_actors": 2, "n_steps": N_STEPS, "train_freq": 3, "gradient_steps": 2},
    )
    model.learn(12 * 10)
    buffer: Any = model.replay_buffer
    assert model.num_timesteps == 120 and buffer.pos == 30
    assert model._n_updates == 2 * 10
    going_on = buffer.dones[:29] == 0
    np.testing.assert_array_equal(buffer.next_observations[:29][going_on], buffer.observations[1:30][going_on])
    assert len(np.unique(buffer.actions[:3], axis=1).reshape(-1)) == 3 * 4 * 2
    assert sorted(model._pool.consumed) == [(actor, 0, number) for actor in (0, 1) for number in range(10)]
    model.close()
