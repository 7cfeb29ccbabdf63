"""
What holds for every algorithm with actors, whose pool opens in `learn` and outlives it: copies and files of a model leave it
behind, and a model whose environments are changed, or fail, has none.
"""

import copy
import itertools
import os
import pickle
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch as th
from environments import BOX, CONTINUOUS, RandomEnv
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from models import BY_SEGMENTS, OFF_POLICY, algorithm_class, rows, small_model, taking
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv
from subjects import numbers

from sb3_ac_ext.actors.actor import ActorError
from sb3_ac_ext.actors.learner import ActorsMixin

WITH_ACTORS = taking("n_actors")
LAGGING = taking("simulated_lag")
T = 6


class Closing(RandomEnv):
    """Fails with what it is told, in its step of some number, and says when it is closed."""

    closed = 0
    fails: tuple[int, Exception] | None = None

    def __init__(self) -> None:
        super().__init__(*copy.deepcopy((BOX, CONTINUOUS)))
        self.steps = 0

    def step(self, action: Any) -> Any:
        self.steps += 1
        if Closing.fails is not None and self.steps == Closing.fails[0]:
            raise Closing.fails[1]
        return super().step(action)

    def close(self) -> None:
        Closing.closed += 1


@pytest.fixture(autouse=True)
def reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Closing, "closed", 0)
    monkeypatch.setattr(Closing, "fails", None)


def environments() -> VecEnv:
    return make_vec_env(lambda: TimeLimit(Closing(), 9), n_envs=2)


def make(row: str, **changes: Any) -> Any:
    sizes = {} if row in OFF_POLICY else {"n_steps": T}
    return small_model(row, env=environments(), **{"n_actors": 2, **sizes, **changes})


@rows(WITH_ACTORS)
def test_what_does_not_learn_has_no_pool(row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ActorsMixin, "_open", lambda self: pytest.fail("a pool was opened"))
    monkeypatch.setitem(sys.modules, "ray", None)
    model = make(row)
    model.save(tmp_path / "model")
    loaded = algorithm_class(row).load(tmp_path / "model", env=environments())
    assert loaded.predict(BOX.sample())[0].shape == CONTINUOUS.shape
    copy.deepcopy(loaded).set_env(environments())
    assert Closing.closed == 0


@rows(WITH_ACTORS)
def test_a_pool_serves_one_learn_after_the_other(row: str) -> None:
    model = make(row).learn(8 * T)
    pool = model._pool
    model.learn(8 * T, reset_num_timesteps=False)
    assert model._pool is pool is not None
    model.close()
    model.close()
    assert model._pool is None and Closing.closed == 2  # those of the other actor
    model.learn(8 * T, reset_num_timesteps=False)
    assert model._pool is not None and model.num_timesteps == 24 * T


@rows(WITH_ACTORS)
def test_other_environments_have_other_actors(row: str) -> None:
    model = make(row).learn(8 * T)
    model.set_env(environments())
    assert model._pool is None and Closing.closed == 2
    model.learn(8 * T, reset_num_timesteps=False)
    assert model.num_timesteps == 16 * T
    assert [actor.env is model.env for actor in model._pool.actors] == [True, False]


@rows(WITH_ACTORS)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(cloudpickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_leave_the_pool_behind(row: str, copied: Any) -> None:
    model = make(row, **({"simulated_lag": 2} if row in LAGGING else {})).learn(8 * T)
    other = copied(model)
    assert other._pool is None and model._pool is not None
    before, updates = numbers(model), model._n_updates
    assert th.equal(numbers(other), before)
    other.learn(8 * T, reset_num_timesteps=False)
    assert other._pool.actors[1] is not model._pool.actors[1]
    assert th.equal(numbers(model), before)
    model.learn(8 * T, reset_num_timesteps=False)
    assert other.num_timesteps == model.num_timesteps
    assert min(other._n_updates, model._n_updates) > updates > 0
    assert not th.equal(numbers(model), before) and not th.equal(numbers(other), before)


@rows(WITH_ACTORS)
def test_checkpoints_in_the_middle_go_on(row: str, tmp_path: Path) -> None:
    model = make(row)
    model.learn(12 * T, callback=CheckpointCallback(T + 1, str(tmp_path)))
    loaded = algorithm_class(row).load(tmp_path / f"rl_model_{2 * (T + 1)}_steps", env=environments())
    assert loaded.num_timesteps == 2 * (T + 1)
    loaded.learn(8 * T, reset_num_timesteps=False)
    assert th.isfinite(numbers(loaded)).all() and loaded._n_updates > 0


@pytest.mark.parametrize(
    ("row", "kwargs"),
    [
        *itertools.product(WITH_ACTORS, [{"n_actors": 1}, {"n_actors": 2}]),
        *((row, {"n_actors": 2, "simulated_lag": 2}) for row in LAGGING),
    ],
    ids=str,
)
def test_learning_in_parts_is_learning_at_once(row: str, kwargs: dict[str, Any]) -> None:
    """But for what follows the remaining progress, as a prioritised buffer's beta does."""
    kwargs = {**kwargs, **({"prioritized": False} if row in taking("prioritized") else {})}
    models = []
    for steps in ([12 * T], [4 * T] * 3):
        models.append(make(row, **kwargs))
        for part in steps:
            models[-1].learn(part, reset_num_timesteps=False)
            models[-1].predict(BOX.low, deterministic=True)
        assert models[-1].num_timesteps == 12 * T
    assert th.equal(*map(numbers, models))


class Switching(BaseCallback):
    """Switches the engine off, and on again."""

    def _on_step(self) -> bool:
        if self.n_calls in (9 * T, 12 * T):
            self.model.engine = not self.model.engine
        return True


@rows(BY_SEGMENTS)
def test_the_engine_of_actors_is_switched_with_the_models(row: str) -> None:
    model = make(row).learn(40 * T, callback=Switching())
    assert all(actor._engine.enabled for actor in model._pool.actors)
    plain = make(row, engine=False).learn(40 * T)
    th.testing.assert_close(numbers(model), numbers(plain), rtol=0, atol=1e-5)
    model.engine = False
    model.learn(4 * T, reset_num_timesteps=False)
    assert not any(actor._engine.enabled for actor in model._pool.actors)
    assert model.engine_report() == {"engine": "engine=False"}


@rows(WITH_ACTORS)
@pytest.mark.parametrize("error", [ValueError("hot"), AssertionError("hot"), KeyError("hot")], ids=repr)
def test_errors_of_environments_name_the_actor_and_let_a_search_go_on(row: str, error: Exception) -> None:
    """RL Zoo gives up a trial, and not the search, for a ValueError or an AssertionError."""
    Closing.fails = 5, error
    model = make(row)
    with pytest.raises(ActorError, match=rf"actor 0 \(generation 0\) failed: {type(error).__name__}: .*hot") as raised:
        model.learn(100)
    assert isinstance(raised.value, ValueError) is isinstance(error, ValueError | AssertionError)
    assert raised.value.__cause__ is error
    assert model._pool is None and Closing.closed == 2
    Closing.fails = None
    model.learn(8 * T)
    assert model._n_updates > 0


class Interrupt(BaseCallback):
    """As if somebody pressed Ctrl+C."""

    def _on_step(self) -> bool:
        raise KeyboardInterrupt


@rows(WITH_ACTORS)
def test_an_interrupted_model_has_no_pool(row: str) -> None:
    model = make(row)
    with pytest.raises(KeyboardInterrupt):
        model.learn(100, callback=Interrupt())
    assert model._pool is None and Closing.closed == 2


class Short(RandomEnv):
    """With Pendulum's spaces."""

    def __init__(self) -> None:
        high = np.array([1.0, 1.0, 8.0], np.float32)
        super().__init__(spaces.Box(-high, high), spaces.Box(-2, 2, (1,), np.float32))


@rows(WITH_ACTORS)
def test_environments_that_are_given_to_load_are_those_of_actors(row: str, tmp_path: Path) -> None:
    """Whatever those were that the model was made with."""
    small_model(row, env="Pendulum-v1", n_actors=2).save(tmp_path / "model")
    env = make_vec_env(lambda: TimeLimit(Short(), 3))
    loaded = algorithm_class(row).load(tmp_path / "model", env=env).learn(8 * T)
    assert [type(actor.env.unwrapped.envs[0].unwrapped) for actor in loaded._pool.actors] == [Short, Short]


def test_actors_that_begin_later_do_not_see_the_same_again() -> None:
    model = small_model("impala", env=make_vec_env("CartPole-v1", 2), n_actors=2)
    seen = []
    for _ in range(2):
        model._open()
        seen.append(model._pool.actors[1].observations.copy())
        model.learn(24, reset_num_timesteps=False)
        model.close()
    assert not np.array_equal(*seen)


# On Ray


class Telling(RandomEnv):
    """Says in which process it is."""

    def __init__(self) -> None:
        super().__init__(*copy.deepcopy((BOX, CONTINUOUS)))

    def step(self, action: Any) -> Any:
        *rest, info = super().step(action)
        return *rest, {**info, "pid": os.getpid()}


class Killing(BaseCallback):
    """Kills the process that a step comes from, once there were some, and gives another one the time to begin."""

    killed = False

    def _on_step(self) -> bool:
        if not self.killed and self.num_timesteps > 100:
            self.killed = True
            os.kill(self.locals["infos"][0]["pid"], signal.SIGKILL)
        if self.killed:
            time.sleep(0.06)
        return True


@pytest.mark.ray
@rows(tuple(row for row in WITH_ACTORS if row not in OFF_POLICY))
def test_a_killed_actor_costs_one_result_at_most(row: str, ray: Any) -> None:
    """The run ends with its budget, and what was taken of each process goes on without a gap."""
    model = small_model(row, env=make_vec_env(Telling, 2), actors="ray", n_actors=2)
    model.learn(600, callback=Killing())
    pool = model._pool
    taken = defaultdict(list)
    for actor, generation, sequence in pool.consumed:
        taken[actor, generation].append(sequence)
    model.close()
    assert model.num_timesteps == 2 * model.n_steps * len(pool.consumed) >= 600
    assert pool.restarts == 1 and pool.lost <= 1
    assert len(taken) == 3 and all(sequences == [*range(len(sequences))] for sequences in taken.values())
