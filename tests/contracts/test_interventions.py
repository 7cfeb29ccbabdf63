"""
Whatever is done to a model, by whom and when: training goes on as without the engine, and as with SB3.

Each of the `interventions` happens after updates enough to be recorded and replayed, at a step drawn by a generator that its
name seeds, so that nobody has picked it. A callback does it, the environment inside its ``step``, or another thread. What is
compared is the parameters at every step, the optimizers, the numbers drawn, the calls of hooks, and `predict`.
"""

import io
import itertools
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch as th
from interventions import INTERVENTIONS, REMEMBERING
from models import BY_SEGMENTS, CRITICS, OFF_POLICY, ON_POLICY, environment, rows, taking
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import CallbackList, EvalCallback, EveryNTimesteps
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.noise import NormalActionNoise
from subjects import ROUNDING, Callback, Intervention, Outcome, Subject, assert_same, assert_sb3s, numbers, observe, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),  # gamma as an array, as SB3 takes it
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),  # global hooks, of first layers
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # the compiler looks at it
]

ATOL = 1e-5
"""For float32 parameters that move by 0.1; nothing done, the engine's rounding is 30 times smaller."""


@cache
def touched(row: str, name: str, kind: bool | str, way: str = "callback") -> Outcome:
    """Without the engine, or by SB3."""
    return train(row, kind, INTERVENTIONS[name], way)


@cache
def untouched(row: str, variant: str, changes: str, turns: int) -> Outcome:
    """Without the engine, and nothing is done."""
    same = next(case for case in INTERVENTIONS.values() if (case.variant, repr(case.changes)) == (variant, changes))
    nothing = Intervention("nothing", lambda _: None, variant=variant, changes=same.changes, turns=turns)
    return train(row, False, nothing)


def expected_of(row: str, name: str, way: str) -> Outcome:
    """
    What must come of it; that it acts, or does not, is as the table says.

    Without the engine it makes no difference who intervenes, unless callbacks see steps later than the environment.
    """
    case = INTERVENTIONS[name]
    other = untouched(row, case.variant, repr(case.changes), case.turns)
    if not (case.acts or case.counts):
        return other
    outcome = touched(row, name, False, way if row in BY_SEGMENTS else "callback")
    assert outcome.error is case.error
    assert bool(outcome.calls) == case.counts
    if case.error is None:
        pair = outcome.trajectory[-1], other.trajectory[-1]
        acted = len(pair[0]) != len(pair[1]) or (pair[0] - pair[1]).abs().max() > 10 * ATOL
        predictions = zip(outcome.predictions, other.predictions, strict=True)
        acted = acted or any(not np.allclose(*actions, rtol=0, atol=10 * ATOL) for actions in predictions)
        rounds = row in taking("n_particles")  # where a hook looks on, particles are evaluated one by one
        assert acted == case.acts if case.acts or rounds else th.equal(*pair)
    return outcome


REPRESENTATIVES = (
    *("new memory", "shared memory", "rate", "max grad norm"),
    *("other layer", "betas", "gradient hook", "own activation"),
)
"""One of each kind."""


def crossed() -> list[Any]:
    """
    Every intervention in each row by everybody.

    By default one of each kind is done by everybody in a row that is drawn, and two in five of the others, drawn too, in one
    row by somebody. All of them take minutes.
    """
    found = []
    for name, case in INTERVENTIONS.items():
        drawn = random.Random(name)
        row_of_it, way_of_it, chosen = drawn.choice(case.rows), drawn.choice(case.ways), drawn.random() < 2 / 5
        for row, way in itertools.product(case.rows, case.ways):
            default = row == row_of_it and (name in REPRESENTATIVES or (way == way_of_it and chosen))
            found.append(pytest.param(row, name, way, id=f"{row}-{name}-{way}", marks=[] if default else pytest.mark.slow))
    return found


def against_sb3() -> list[Any]:
    """Every intervention that acts in each row of SB3's, by default some of them in one row, drawn."""
    found = []
    for name, case in INTERVENTIONS.items():
        known = [row for row in case.rows if row in case.sb3 and case.acts]
        drawn = random.Random(name)
        default = drawn.choice(known) if known and drawn.random() < 1 / 6 else None
        for row in known:
            found.append(pytest.param(row, name, id=f"{row}-{name}", marks=[] if row == default else pytest.mark.slow))
    return found


@pytest.mark.parametrize(("row", "name", "way"), crossed())
def test_training_goes_on_as_without_the_engine(row: str, name: str, way: str) -> None:
    case = INTERVENTIONS[name]
    assert_same(train(row, True, case, way), expected_of(row, name, way), ATOL, case.steps(row))


@pytest.mark.parametrize(("row", "name"), against_sb3())
def test_without_the_engine_training_is_sb3s(row: str, name: str) -> None:
    """
    Off-policy bit for bit, on-policy but for the order of sums.

    SB3 counts hooks on gradients more often: in the actor's update it computes those of the critic too.
    """
    assert_sb3s(touched(row, name, False), touched(row, name, "sb3"), ROUNDING[row])
    assert touched(row, name, "sb3").error is INTERVENTIONS[name].error


# Others whose code runs in between


class Replay(ReplayBuffer):
    """Tells its subject when it is asked."""

    subject: Subject

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        self.subject.intervene_once()
        return super().sample(*args, **kwargs)


class Noise(NormalActionNoise):
    """Tells its subject when it is asked."""

    subject: Subject

    def __call__(self) -> Any:
        self.subject.intervene_once()
        return super().__call__()


class Writer(KVWriter):
    """Tells its subject of every log."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    def write(self, *args: Any, **kwargs: Any) -> None:
        self.subject.intervene_once()

    def close(self) -> None:
        pass


def by_the_schedule(subject: Subject) -> dict[str, Any]:
    def rate(progress: float) -> float:
        subject.intervene_once()
        return 3e-3

    subject.model.lr_schedule = rate
    return {}


def by_the_noise(subject: Subject) -> dict[str, Any]:
    subject.model.action_noise = Noise(np.zeros(2), 0.1 * np.ones(2))
    subject.model.action_noise.subject = subject
    return {}


def by_the_buffer(subject: Subject) -> dict[str, Any]:
    subject.model.replay_buffer = Replay(200, subject.model.observation_space, subject.model.action_space)
    subject.model.replay_buffer.subject = subject
    return {}


def by_the_logger(subject: Subject) -> dict[str, Any]:
    subject.model.set_logger(Logger(None, [Writer(subject)]))
    return {"log_interval": 1}


def evaluation(subject: Subject, **kwargs: Any) -> EvalCallback:
    return EvalCallback(environment(subject.row), n_eval_episodes=1, eval_freq=9, verbose=0, warn=False, **kwargs)


def by_an_environment_for_evaluation(subject: Subject) -> dict[str, Any]:
    """A callback of SB3 that itself leaves the model alone."""
    callback = evaluation(subject)
    env = callback.eval_env.envs[0].unwrapped
    original = env.step

    def step(action: Any) -> Any:
        subject.intervene_once()
        return original(action)

    env.step = step
    return {"callback": callback}


def by_a_function(subject: Subject) -> dict[str, Any]:
    def function(local: dict[str, Any], _: dict[str, Any]) -> bool:
        subject.intervene_once()
        return True

    return {"callback": function}


def by_one_of_a_list(subject: Subject) -> dict[str, Any]:
    return {"callback": [evaluation(subject), CallbackList([Callback(subject)])]}


def now_and_then(subject: Subject) -> dict[str, Any]:
    return {"callback": EveryNTimesteps(7, Once(subject))}


def after_an_evaluation(subject: Subject) -> dict[str, Any]:
    return {"callback": evaluation(subject, callback_after_eval=Once(subject))}


class Once(Callback):
    """Is not asked at every step."""

    def _on_step(self) -> bool:
        self.subject.intervene_once()
        return True


def around_rollouts(moment: str) -> Callable[[Subject], dict[str, Any]]:
    """By a callback where a rollout starts or ends."""

    def prepare(subject: Subject) -> dict[str, Any]:
        callback = Callback(subject)
        callback._on_step = lambda: True
        setattr(callback, moment, subject.intervene_once)
        return {"callback": callback}

    return prepare


OTHERS: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "schedule": by_the_schedule,
    "noise": by_the_noise,
    "buffer": by_the_buffer,
    "logger": by_the_logger,
    "environment for evaluation": by_an_environment_for_evaluation,
    "function": by_a_function,
    "one of a list": by_one_of_a_list,
    "now and then": now_and_then,
    "after an evaluation": after_an_evaluation,
    "start of a rollout": around_rollouts("_on_rollout_start"),
    "end of a rollout": around_rollouts("_on_rollout_end"),
}
KNOWN = {"noise": CRITICS, "buffer": CRITICS, "start of a rollout": REMEMBERING, "end of a rollout": REMEMBERING}
"""The rows that have what not all of them have: AC's rollout is the whole training here."""


def others() -> list[Any]:
    found = []
    for other, (kind, among) in itertools.product(OTHERS, {"off-policy": CRITICS, "on-policy": ON_POLICY}.items()):
        known = tuple(row for row in among if row in KNOWN.get(other, among))
        found += [pytest.param(other, known, id=f"{other} {kind}")] if known else []
    return found


@pytest.mark.parametrize(("other", "among"), others())
def test_it_does_not_matter_whose_code_it_is(other: str, among: tuple[str, ...]) -> None:
    """Memory that moves, and another kind that is drawn."""
    generator = random.Random(other)
    for name in ("new memory", generator.choice(REPRESENTATIVES[1:])):
        row = generator.choice([row for row in among if row in INTERVENTIONS[name].rows])
        outcomes = []
        for engine in (True, False):
            subject = Subject(row, engine, INTERVENTIONS[name], "other")
            outcomes.append(observe(subject, subject.learn(INTERVENTIONS[name].length, **OTHERS[other](subject))))
            assert subject.turn >= 1
        assert_same(*outcomes, ATOL, f"{name} in {row}, {INTERVENTIONS[name].steps(row)}")


@rows()
def test_between_calls_of_train(row: str) -> None:
    """Nobody else's code runs there: the user's own."""
    outcomes = []
    for engine in (True, False):
        subject = Subject(row, engine, INTERVENTIONS["new memory"], "other")
        subject.learn(30)
        possible = [name for name in REPRESENTATIVES if row in INTERVENTIONS[name].rows]
        for name in random.Random(row).sample(possible, 3):
            INTERVENTIONS[name].do(subject)
            subject.model.train(*((12, 8) if row in OFF_POLICY else ()))
            subject.trajectory.append(numbers(subject.model))
        outcomes.append(observe(subject, None))
    assert_same(*outcomes, ATOL)


# One after another, and taken back


def hooks_gone(subject: Subject) -> None:
    while subject.hooks:
        subject.hooks.pop().remove()


def thawed(subject: Subject) -> None:
    for parameter in [*subject.part("actor").parameters(), *subject.part("critic").parameters()]:
        parameter.requires_grad_(True)


def saved_and_loaded(subject: Subject) -> None:
    hooks_gone(subject)
    if not all(isinstance(optimizer, th.optim.Adam) for optimizer in subject.optimizers().values()):
        return  # the file is for another optimizer than the one that a new model has
    file, old = io.BytesIO(), subject.model
    old.save(file)
    file.seek(0)
    subject.model = type(old).load(file, env=old.env, engine=old.engine)
    if subject.row in OFF_POLICY:
        subject.model.replay_buffer = old.replay_buffer
    subject.model.set_logger(Logger(None, []))


def other_gamma(subject: Subject) -> None:
    subject.model.gamma = 0.9


def own_gradients(subject: Subject) -> None:
    layer = subject.layer("critic")
    layer(th.ones(2, layer.in_features)).sum().backward()


TAKEN_BACK = [hooks_gone, hooks_gone, thawed, thawed, saved_and_loaded, other_gamma, own_gradients]
IN_A_ROW = [
    *("forward hook", "gradient hook", "frozen bias", "weights loaded", "everything set", "optimizers loaded", "new memory"),
    *("edited in place", "no gradients", "other layer", "other activation", "own activation", "rate", "betas", "adam w"),
]


@rows(by_default=("td3x", "sacx", "d4pg", "maddpg", "ppox", "acktr", "impala", "svpg"))  # of each kind of update
@pytest.mark.parametrize("sequence", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 5))])
def test_one_after_another(row: str, sequence: int) -> None:
    pool = [*TAKEN_BACK, *(INTERVENTIONS[name].do for name in IN_A_ROW if row in INTERVENTIONS[name].rows)]
    drawn = random.Random(f"{row} {sequence}").sample(pool, 5)
    outcomes = []
    for engine in (True, False):
        subject = Subject(row, engine, Intervention("sequence", drawn[0]))
        subject.learn(32)
        for do in drawn:
            do(subject)
            subject.model.learn(32, reset_num_timesteps=False)
            subject.trajectory.append(numbers(subject.model))
        outcomes.append(observe(subject, None))
    assert_same(*outcomes, ATOL, [do.__name__ for do in drawn])
