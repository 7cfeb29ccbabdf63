"""
Configurations drawn from what is declared of the arguments, and what becomes of them.

Of every argument of every row there are values that are declared to be legal (ends of ranges, numbers of other libraries too)
and values that are not. A new row or argument is drawn from by being there.
"""

import ast
import contextlib
import inspect
import io
import math
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NotRequired, Required, get_args, get_origin, get_type_hints, is_typeddict

import gymnasium as gym
import numpy as np
import torch as th
from annotated_types import Ge, Gt, Le, Lt
from environments import BOX, CONTINUOUS, RandomEnv
from gymnasium import spaces
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from models import APART, OFF_POLICY, OFF_POLICY_SIZES, ON_POLICY_SIZES, Pair, algorithm_class, taken
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.noise import ActionNoise, NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_ac_ext.acktr import ACKTR
from sb3_ac_ext.buffers.prioritized import PrioritizedReplayBuffer
from sb3_ac_ext.maddpg import MADDPG
from sb3_ac_ext.signatures import Argument, arguments_of
from sb3_ac_ext.validation import LARGEST, Needs, NonFiniteError, Syntax, alternatives, shown, syntax_in

Values = st.SearchStrategy[Any]

STEPS = 50
"""Of a training."""
SECONDS = 20
"""After which a training hangs."""
WORK = {
    "advantage_samples": 5,
    "batch_segments": 3,
    "batch_size": 64,
    "cg_max_steps": 8,
    "cold_iterations": 8,
    "gradient_steps": 4,
    "gradients_per_update": 3,
    "line_search_max_iter": 12,
    "n_actors": 3,
    "n_critic_updates": 4,
    "n_critics": 3,
    "n_epochs": 4,
    "n_steps": 64,
    "n_sub_policies": 3,
    "policy_epochs": 4,
    "replay_ratio": 4,
    "replayed_segments": 3,
    "simulated_lag": 4,
    "train_freq": 64,
    "value_epochs": 4,
}
"""
The largest value that is drawn of an argument that multiplies the time of a training.

Of an argument that is not here anything up to the largest legal number is drawn.
"""
MEMORY = frozenset({"batch_size", "n_steps"})
"""Of these the largest legal number is drawn all the same: it needs memory, which must be said or not asked for."""
WIDTH = 16
"""Of a layer, and the largest integer in a list."""

# Values of no argument, or of few


def constant(progress: float) -> float:
    return 1e-3


def falling(progress: float) -> float:
    return 1e-2 * progress


def not_a_number(progress: float) -> float:
    return float("nan")


def nothing(progress: float) -> None:
    return None


def without_arguments() -> float:
    return 1e-3


class OwnReplayBuffer(ReplayBuffer):
    """A user's."""


class OwnRolloutBuffer(RolloutBuffer):
    """A user's."""


HUGE = [10**400, -(10**400), 10**5000, 1e39, -1e39, math.inf, -math.inf, math.nan, np.float32("nan"), 2**63, -(2**63) - 1]
NO_NUMBERS = [
    *("", "1", "0.5", "nan", b"1", bytearray(b"1"), Decimal(1), Decimal("NaN"), Fraction(1, 2), 1j, True, False),
    *(np.True_, [1], (1,), [], {}, {"a": 1}, np.ones(2), np.zeros(0), th.ones(2), th.tensor(True), int, object, constant),
]
ANYTHING = [None, *HUGE, *NO_NUMBERS, 0, 1, -1, 0.5, "x", {"x": None}, nn.ReLU, nn.ReLU(), np.array("x"), {1: 2}, th.float32]
FUNCTIONS = {True: [constant, falling], False: [not_a_number, nothing, without_arguments, int, "constant"]}
ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.ELU, nn.LeakyReLU, nn.Sigmoid]
OPTIMIZERS = [th.optim.Adam, th.optim.AdamW, th.optim.SGD, th.optim.RMSprop]
EXAMPLES: dict[type, list[Any]] = {
    nn.Module: ACTIVATIONS,
    th.optim.Optimizer: OPTIMIZERS,
    ReplayBuffer: [ReplayBuffer, OwnReplayBuffer, PrioritizedReplayBuffer],
    RolloutBuffer: [RolloutBuffer, OwnRolloutBuffer],
    ActionNoise: [
        NormalActionNoise(np.zeros(2), 0.1 * np.ones(2)),
        NormalActionNoise(np.zeros(1), np.ones(1)),
        NormalActionNoise(np.zeros(3), np.ones(3)),
        NormalActionNoise(np.zeros(2), np.full(2, 1e30)),
        OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(2)),
        OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(2), dt=100),
        VectorizedActionNoise(NormalActionNoise(np.zeros(2), np.ones(2)), 1),
    ],
}
"""Of a class those that are derived from it or, where it is no type that is asked for, instances."""
NAMES = ("actor", "critic", "policy", "value", "q", "q_a", "")
"""Keys where any string is declared."""


def legal(annotation: Any, name: str = "") -> Values:
    """
    :param annotation: see `sb3_ac_ext.validation.check`
    :param name: of the argument, which may be one of `WORK`
    :return: values that are declared to be legal
    """
    return st.one_of(*(_legal(kind, constraints, name) for kind, constraints in alternatives(annotation)))


def wrong(annotation: Any, name: str = "") -> Values:
    """
    :param annotation: as for `legal`
    :param name: as for `legal`
    :return: values most of which are not declared to be legal
    """
    parts = [_wrong(kind, constraints, name) for kind, constraints in alternatives(annotation) if kind is not NoneType]
    return st.one_of(*parts, st.sampled_from(ANYTHING))


def _legal(kind: Any, constraints: tuple[Any, ...], name: str) -> Values:
    origin, parts = get_origin(kind), get_args(kind)
    if (syntax := syntax_in(constraints)) is not None:
        values = st.one_of(st.sampled_from(_examples(syntax.legal)), *(legal(one, name) for one, _ in alternatives(kind)))
        return values.filter(lambda value: _takes(syntax, value))
    if kind is int or kind is float:
        return _numbers(kind, constraints, name)
    if origin is Literal:
        return st.sampled_from(parts)
    if is_typeddict(kind):
        return _typed_dict(kind, legal)
    if origin is dict or origin is Mapping:
        return st.dictionaries(st.sampled_from(NAMES), legal(parts[1]), max_size=2)
    if origin is list:
        return st.lists(legal(parts[0], "of a list"), max_size=2)
    if origin is tuple:
        return st.tuples(*(legal(part, "of a list") for part in parts if part is not ...))
    if origin is Callable:
        return st.sampled_from(FUNCTIONS[True])
    if origin is type:
        return st.sampled_from(_classes(parts[0]))
    plain = {
        NoneType: [None],
        bool: [False, True],
        str: ["MlpPolicy", "runs", "x", "", "auto"],
        os.PathLike: [Path("runs"), Path("x/y")],
        th.device: [th.device("cpu")],
        ActionNoise: EXAMPLES[ActionNoise],
    }
    return st.sampled_from(plain.get(kind, ANYTHING))


def _wrong(kind: Any, constraints: tuple[Any, ...], name: str) -> Values:
    origin, parts = get_origin(kind), get_args(kind)
    if (syntax := syntax_in(constraints)) is not None:
        changed = [f"{one}x" if isinstance(one, str) else (*one, 1) for one in _examples(syntax.legal)]
        changed += ["lin_nan", "lin_-1", "lin_", "auto_0", "auto_nan", -1, 0]
        return st.one_of(st.sampled_from(changed), wrong(kind, name))
    if kind is int or kind is float:
        low, high = _range(constraints, kind)
        step = 1 if kind is int else 1e-6 + 1e-6 * abs(low)
        beside = [low - step] * (abs(low) < LARGEST[kind]) + [high + step] * (high < LARGEST[kind])
        return st.sampled_from([*beside, *HUGE, *NO_NUMBERS, *([0.5, 2.0, np.float64(3)] * (kind is int))])
    if origin is Literal:
        return st.sampled_from([f"{parts[0]}s", str(parts[-1]).upper(), [parts[0]], "", 0, b"x"])
    if is_typeddict(kind):
        lacking = [dict.fromkeys(sorted(kind.__required_keys__)[1:], 1.0), {}, {"unknown": 1}]
        return st.one_of(_typed_dict(kind, wrong), st.sampled_from(lacking))
    if origin is dict or origin is Mapping:
        return st.one_of(st.dictionaries(st.sampled_from(["actor", "value", "unknown", 1]), wrong(parts[1]), max_size=2))
    if origin is list:
        return st.lists(wrong(parts[0]), min_size=1, max_size=2)
    if origin is Callable:
        return st.sampled_from(FUNCTIONS[False])
    if origin is type:
        examples = _classes(parts[0])
        return st.sampled_from([examples[0].__name__, int, dict, nn.Linear, object()])
    if kind is bool:
        return st.sampled_from([0, 1, 1.0, "no", "True", b"", np.False_, th.tensor(True)])
    return st.sampled_from(ANYTHING)


def _takes(syntax: Syntax, value: Any) -> bool:
    try:
        syntax.check("value", value)
    except REFUSALS:
        return False
    return True


def _range(constraints: tuple[Any, ...], kind: type) -> tuple[Any, Any]:
    low, high = -LARGEST[kind], LARGEST[kind]
    for one in constraints:
        match one:
            case Ge(bound):
                low = bound
            case Gt(bound):
                low = bound + (1 if kind is int else 1e-9)
            case Le(bound):
                high = bound
            case Lt(bound):
                high = bound - (1 if kind is int else 1e-9)
    return low, high


def _numbers(kind: type, constraints: tuple[Any, ...], name: str) -> Values:
    """The ends of the range, small numbers and any, as Python's numbers and those of other libraries."""
    low, high = _range(constraints, kind)
    largest = min(high, WIDTH if name == "of a list" else WORK.get(name, high))
    ends = {low, largest, *(high for _ in range(name in MEMORY)), *(one for one in (0, 1, 2, 3) if low <= one <= largest)}
    if kind is int:
        numbers = st.sampled_from(sorted(ends)) | st.integers(max(low, -2), min(largest, 12))
        forms: list[Callable[[Any], Any]] = [np.int64, np.array, th.tensor]
    else:
        tiny = [one for one in (1e-300, 1e-12, 1e-6, 1e-3, 0.1, 0.5, 10.0, 1e8, 1e30) if low <= one <= largest]
        numbers = st.sampled_from(sorted(ends | set(tiny))) | st.floats(max(low, -2.0), min(largest, 2.0))
        forms = [float, np.float64, np.float32, np.array, th.tensor]
    return numbers | st.builds(lambda form, number: form(number), st.sampled_from(forms), numbers)


def _examples(words: str) -> list[Any]:
    """Strings and tuples that stand in what is said to be legal."""
    strings = re.findall(r'"([^"]*)"', re.sub(r"\(.*?\)", "", words))
    return [*strings, *(ast.literal_eval(one) for one in re.findall(r"\(\d.*?\)", words))] or ["x"]


def _classes(base: type) -> list[Any]:
    return EXAMPLES.get(base) or [base, *(one for one in base.__subclasses__() if not inspect.isabstract(one))]


def _typed_dict(kind: Any, values: Callable[[Any], Values]) -> Values:
    """All that is required, and some of the rest; with `wrong` at least one value is that."""
    hints = _hints(kind)
    required = {key: hints[key] for key in sorted(kind.__required_keys__)}
    if values is legal:
        optional = {key: legal(hints[key]) for key in sorted(kind.__optional_keys__)}
        return st.fixed_dictionaries({key: legal(hint) for key, hint in required.items()}, optional=optional)
    several = [
        st.fixed_dictionaries({**{key: legal(hint) for key, hint in required.items()}, name: wrong(hints[name])})
        for name in sorted(hints)
    ]
    return st.one_of(*several)


def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {key: get_args(hint)[0] if get_origin(hint) in (Required, NotRequired) else hint for key, hint in hints.items()}


# Arguments


def values_of(cls: type, argument: Argument) -> tuple[Values, Values]:
    """
    :param cls: an algorithm, or another class that has arguments
    :param argument: one of them
    :return: legal values and wrong ones
    """
    if argument.name == "actors":  # Ray takes seconds to start
        return st.just("inline"), wrong(argument.annotation)
    if argument.name == "policy":
        aliases: dict[str, type] = cls.policy_aliases  # type: ignore[attr-defined]  # of an algorithm
        return st.sampled_from([*aliases, *aliases.values()]), wrong(argument.annotation)
    taker = _taker(cls, argument)
    good, bad = legal(argument.annotation, argument.name), wrong(argument.annotation, argument.name)
    if taker is None:
        return good, bad
    takes = arguments_of(taker)
    free = {name: one for name, one in takes.items() if one.default is not inspect.Parameter.empty}
    if not free:
        return st.just({}), bad
    one_good = st.sampled_from(sorted(free)).flatmap(lambda name: _entry(name, values_of(taker, takes[name])[0]))
    one_bad = st.sampled_from(sorted(takes)).flatmap(lambda name: _entry(name, values_of(taker, takes[name])[1]))
    unknown = st.sampled_from([{"unknown": 1}, {1: 2}, {"net_arc": [8]}, {"": None}])
    return _joined(one_good), st.one_of(one_bad, one_bad, unknown, bad, st.builds(lambda a, b: {**a, **b}, one_good, unknown))


def _entry(name: str, values: Values) -> Values:
    return values.map(lambda value: {name: value})


def _joined(entry: Values) -> Values:
    return entry | st.builds(lambda one, other: {**one, **other}, entry, entry)


def _taker(cls: Any, argument: Argument) -> type | None:
    """Who takes what stands in an argument whose name ends in "_kwargs"."""
    name = argument.name.removesuffix("_kwargs")
    if name == argument.name:
        return None
    if name == "policy":
        return cls.policy_aliases["MlpPolicy"]
    chosen = arguments_of(cls).get(f"{name}_class")
    if chosen is None:
        return None
    if isinstance(chosen.default, type) and chosen.default is not inspect.Parameter.empty:
        return chosen.default
    return next((get_args(kind)[0] for kind, _ in alternatives(chosen.annotation) if get_origin(kind) is type), None)


# Configurations


@dataclass(frozen=True)
class Case:
    """A model that is made or loaded with some arguments, and trained."""

    row: str
    changed: Mapping[str, Any]
    wrong: frozenset[str] = frozenset()
    """Which of them are not legal, as they are declared."""
    discrete: bool = False
    """Whether actions are choices."""
    loaded: bool = False
    """Whether a model with other arguments is saved, and loaded with these."""

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={shown(value)}" for name, value in self.changed.items())
        notes = [*(["loaded"] * self.loaded), *(["discrete actions"] * self.discrete)]
        return f"{self.row}({given}){' ' if notes else ''}{', '.join(notes)}"


@st.composite
def cases(draw: Any, row: str) -> Case:
    """
    :param row: of the registry
    :return: with one to four arguments, about half of the time all legal as they are declared
    """
    cls = algorithm_class(row)
    arguments = arguments_of(cls)
    loaded = draw(st.integers(0, 9)) == 9
    names = draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=4, unique=True))
    sound = draw(st.booleans())
    if sound:
        names = [name for name in names if name != "env"] or ["gamma"]  # of which there is one that is right
    changed: dict[str, Any] = {}
    not_legal = set()
    for name in names:
        good, bad = values_of(cls, arguments[name])
        if sound or draw(st.booleans()):
            _with_companions(draw, cls, name, draw(good), changed)
        else:
            changed[name] = draw(bad)
            if _is_wrong(changed[name], arguments[name].annotation):
                not_legal.add(name)
    if loaded:
        for name in ("policy", "env"):
            changed.pop(name, None)
    discrete = row not in OFF_POLICY and draw(st.integers(0, 3)) == 3
    return Case(row, changed, frozenset(not_legal & changed.keys()), discrete, loaded)


def _with_companions(draw: Any, cls: type, name: str, value: Any, changed: dict[str, Any]) -> None:
    """Most of the time what an argument needs comes with it."""
    arguments = arguments_of(cls)
    changed[name] = value
    for needed in arguments[name].of_kind(Needs):
        if needed.name not in changed and needed.values != ("ray",) and draw(st.integers(0, 4)) > 0:
            good, _ = values_of(cls, arguments[needed.name])
            _with_companions(draw, cls, needed.name, draw(st.sampled_from(needed.values) if needed.values else good), changed)


def _is_wrong(value: Any, annotation: Any) -> bool:
    """Whether it is surely not what is declared, by a plainer rule than that of `check`."""
    kinds = [(kind, constraints) for kind, constraints in alternatives(annotation) if kind is not NoneType]
    if value is None or len(kinds) != 1 or syntax_in(kinds[0][1]) is not None:
        return False
    kind, constraints = kinds[0]
    if kind is int or kind is float:
        if isinstance(value, (str, bytes, bool, Decimal, Fraction, np.bool_, complex, list, dict, type)):
            return True
        low, high = _range(constraints, kind)
        return type(value) in (int, float) and not (low <= value <= high and (kind is float or value == int(value)))
    if kind is bool:
        return not isinstance(value, bool | np.bool_)
    return get_origin(kind) is Literal and not (isinstance(value, str) and value in get_args(kind))


def draw_cases(row: str, number: int, seed_: int) -> list[Case]:
    """
    :param row: of the registry
    :param number: of configurations
    :param seed_: of the draw
    :return: the configurations, no two of them alike
    """
    found: dict[str, Case] = {}

    @seed(seed_)
    @settings(
        max_examples=2 * number, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(cases(row))
    def collect(case: Case) -> None:
        found.setdefault(repr(case), case)

    collect()
    return list(found.values())[:number]


# What becomes of them

GOOD = ("trains", "refused", "diverged")
BAD = ("taken", "nameless error", "late error", "other error", "silent NaN", "warned", "hang")
REFUSALS = (ValueError, TypeError, AssertionError, NotImplementedError, gym.error.Error)
"""The last for an environment that there is none of."""
SHOWN_BY_ENVIRONMENT = ("no episode ended within",)
"""What cannot be known before a step is taken."""


class Hang(BaseException):
    """A training took longer than `SECONDS`."""


@dataclass(frozen=True)
class Outcome:
    """What became of a configuration."""

    verdict: str
    """One of `GOOD` or `BAD`."""
    detail: str = ""
    """The error's type and message."""


def outcome_of(case: Case, folder: Path) -> Outcome:
    """
    Make a model, train it, and let it act.

    :param case: the configuration
    :param folder: where it may write
    """
    env, others = environments(case)
    actions_of, steps, step = env.action_space, 0, env.step

    def counted(action: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(action)

    env.step = counted
    small, changed = arguments(case, DummyVecEnv([lambda own=own: own for own in (env, *others)]) if others else env)
    if callable(changed.get("actor_env_fn")) and "actor_env_fn" not in case.wrong:
        changed["actor_env_fn"] = lambda: RandomEnv(BOX, actions_of)
    th.manual_seed(0)
    try:
        with watched(folder) as warned:
            model = made(case, small, changed, folder)
            model.learn(STEPS)
            verdict = Outcome("trains") if is_finite(model) else Outcome("silent NaN")
            actions, _ = model.predict(model.observation_space.sample())
            assert model.action_space.contains(actions), (actions, model.action_space)
    except Hang:
        return Outcome("hang")
    except NonFiniteError as error:
        return Outcome("diverged", said_by(error))
    except REFUSALS as error:
        detail = said_by(error)
        if steps > 0 and not any(words in detail for words in SHOWN_BY_ENVIRONMENT):
            return Outcome("late error", detail)
        return Outcome("refused" if names_what_is_wrong({**small, **changed}, detail) else "nameless error", detail)
    except Exception as error:
        return Outcome("other error", said_by(error))
    computed = [one for one in warned if issubclass(one.category, (RuntimeWarning, DeprecationWarning))]
    if verdict.verdict == "trains" and computed:
        return Outcome("warned", f"{computed[0].category.__name__}: {computed[0].message}")
    if verdict.verdict == "trains" and case.wrong:
        return Outcome("taken", f"legal by no declaration: {', '.join(sorted(case.wrong))}")
    return verdict


def environments(case: Case) -> tuple[Any, list[Any]]:
    """One, and those of other particles."""
    cls = algorithm_class(case.row)
    if cls is MADDPG:
        return Pair(), []
    several = [RandomEnv(BOX, spaces.Discrete(3) if case.discrete else CONTINUOUS) for _ in range(4)]
    return several[0], several[1:] if "n_particles" in arguments_of(cls) else []


def said_by(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception as another:
        return f"{type(error).__name__} without a message: {another}"


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[warnings.WarningMessage]]:
    """In a folder, without output, and not for ever."""

    def ring(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(record=True) as warned,
        ):
            warnings.simplefilter("always")
            yield warned
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def arguments(case: Case, env: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    :param case: a configuration
    :param env: an environment for it
    :return: the arguments of a small model, and those of the configuration, whose policy is small too
    """
    cls = algorithm_class(case.row)
    sizes = OFF_POLICY_SIZES if case.row in OFF_POLICY else ON_POLICY_SIZES
    sizes = taken(cls, sizes)
    policy_kwargs: dict[str, Any] = {"net_arch": [8]}
    if issubclass(cls, ACKTR):  # whose rate is the largest step of an optimizer of its own
        del sizes["learning_rate"]
    policy_kwargs |= {"share_features_extractor": False} if case.row in APART else {}
    small = {"policy": "MlpPolicy", "env": env, "seed": 0, "device": "cpu", "policy_kwargs": policy_kwargs, **sizes}
    changed = dict(case.changed)
    if isinstance(changed.get("policy_kwargs", {}), Mapping) and not case.loaded:
        changed["policy_kwargs"] = {**policy_kwargs, **changed.get("policy_kwargs", {})}
    return small, changed


def made(case: Case, small: Mapping[str, Any], changed: Mapping[str, Any], folder: Path) -> Any:
    """
    :param case: a configuration
    :param small: see `arguments`
    :param changed: see `arguments`
    :param folder: where it may write
    :return: the model
    """
    cls = algorithm_class(case.row)
    if not case.loaded:
        return cls(**{**small, **changed})
    path = folder / "model.zip"
    cls(**small).save(path)
    return cls.load(path, **{"env": small["env"], "device": "cpu", **changed})


def is_finite(model: Any) -> bool:
    """Whether all parameters are numbers."""
    parameters = [*model.policy.state_dict().values()]
    parameters += [model.log_ent_coef] if getattr(model, "ent_coef_optimizer", None) is not None else []
    return all(bool(one.isfinite().all()) for one in parameters)


def names_what_is_wrong(changed: Mapping[Any, Any], message: str) -> bool:
    """Whether a message has the name of an argument and the value that was given, or of a part of it."""
    for name, value in changed.items():
        spelled = re.escape(str(name)).replace("_", "[_ ]").replace("env", "env(ironment)?")
        named = re.search(rf"(?<!\w){spelled}(?!\w)", message, re.IGNORECASE) is not None
        if named and shows(value, message):
            return True
        if isinstance(value, Mapping) and names_what_is_wrong(value, message):
            return True
    return False


def shows(value: Any, message: str) -> bool:
    """Whether a value is in a message: by itself, as an equal number, by a part or, if it is long, by its beginning."""
    if isinstance(value, int | float) or hasattr(value, "item"):
        with contextlib.suppress(ValueError, TypeError, OverflowError, RuntimeError):  # what is several numbers, or too large
            if any(float(number) == float(value) for number in re.findall(r"-?\b\d[\d.]*(?:e[+-]?\d+)?", message)):
                return True
    texts = {shown(value)[:50], f"of type {type(value).__name__}", str(type(value))}
    with contextlib.suppress(ValueError):  # as of an integer with thousands of digits
        texts |= {str(value)[:50], repr(getattr(value, "value", value))[:50]}
    if isinstance(value, type):
        texts.add(value.__name__)
    parts = [*value.values(), *value] if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else []
    return any(text in message for text in texts) or any(shows(part, message) for part in parts)
