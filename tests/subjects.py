"""Models that something happens to while they are trained, and what is seen of it."""

import contextlib
import copy
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from models import EVERY, OFF_POLICY, ON_POLICY, SB3, environment, policies_of, small_model
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.save_util import recursive_getattr
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_ac_ext.acktr.blocks import INVERSES

WARM_UP, BEFORE, DRAWN, AFTER = 10, 10, 6, 14
"""
Steps without updates, with them before an intervention, those that its step is drawn from, and with updates after it.

A rollout has six steps, so on-policy three of them lie before an intervention, which happens within the fourth or at its end.
"""
TURN = 7
"""Steps between the turns of an intervention that has several."""
ROUNDING = {row: 0.0 if row in OFF_POLICY else 1e-6 for row in EVERY}
"""How far parameters may be from SB3's without the engine."""
WAYS = ("callback", "thread", "environment")
"""Who intervenes: a callback, the environment by another thread that it waits for, the environment itself."""


class Subject:
    """
    A model, what happens to it, and what is seen of it.

    :param kind: whether the engine is on, or "sb3" for SB3's class
    :param way: who intervenes, of `WAYS`
    """

    def __init__(self, row: str, kind: bool | str, intervention: "Intervention", way: str = "callback") -> None:
        self.row, self.kind, self.intervention, self.way = row, kind, intervention, way
        env = environment(row, intervention.variant)
        first = env.envs[0].unwrapped if isinstance(env, DummyVecEnv) else env
        first.step = self.watched(first.step)
        cls, own = (SB3[row], {}) if kind == "sb3" else (row, {"engine": kind})
        self.model = small_model(cls, intervention.variant, env=env, **own, **intervention.arguments())
        self.step = self.turn = 0
        self.particle = -1
        self.trajectory: list[th.Tensor] = []
        self.calls: Counter[str] = Counter()
        self.hooks: list[Any] = []
        self.undo = contextlib.ExitStack()
        if intervention.before is not None:
            intervention.before(self)

    # Who does it

    def watched(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The environment's ``step``; in the parameters the updates that followed the step before are seen."""

        def step(action: Any) -> Any:
            result = original(action)
            self.step += 1
            self.trajectory.append(th.cat([numbers(self.model), stored(self.model)]))
            if self.way == "environment":
                self.intervene_if_due(self.step)
            elif self.way == "thread":
                in_another_thread(lambda: self.intervene_if_due(self.step))
            return result

        return step

    def intervene_if_due(self, step: int) -> None:
        if step in self.intervention.steps(self.row):
            self.intervention.do(self)
            self.turn += 1

    def intervene_once(self) -> None:
        """For those that are not asked at every step."""
        if self.turn == 0 and self.step >= self.intervention.steps(self.row)[0]:
            self.turn = -1  # whoever does it can be asked again while it is being done
            self.intervention.do(self)
            self.turn = 1

    def learn(self, steps: int, **kwargs: Any) -> type[Exception] | None:
        """Train, as many steps of each environment; what is left set in the process is undone."""
        with self.undo:
            try:
                self.model.learn(steps * self.model.n_envs, **kwargs)
            except Exception as error:
                return type(error)
        return None

    # What it is done to

    @property
    def policy(self) -> Any:
        """The policy, of particles that of the last one, or see `each`."""
        return policies_of(self.model)[self.particle]

    def each(self) -> Iterator["Subject"]:
        """This subject with the policy of every particle in turn."""
        for number in range(-len(policies_of(self.model)), 0):
            self.particle = number
            yield self

    def roots(self, name: str) -> list[tuple[nn.Module, str]]:
        """The actor's or the critic's parts: the module that has each, and its name there."""
        policy = self.policy
        if self.row not in ON_POLICY:
            return [(policy, name)]
        layers, head = {"actor": ("policy_net", "action_net"), "critic": ("value_net", "value_net")}[name]
        return [(policy.mlp_extractor, layers), (policy, head)]

    def part(self, name: str) -> nn.ModuleList:
        """The actor or the critic."""
        return nn.ModuleList([getattr(parent, key) for parent, key in self.roots(name)])

    def places(self, name: str, kinds: Any) -> list[tuple[nn.Module, str]]:
        """Where its modules of some classes are: the module that has each, and its name there."""
        found = []
        for parent, key in self.roots(name):
            inside = [(module, child) for module in getattr(parent, key).modules() for child, _ in module.named_children()]
            found += [(parent, key), *inside]
        return [(parent, key) for parent, key in found if isinstance(getattr(parent, key), kinds)]

    def linear(self, name: str, which: int = 0) -> tuple[nn.Module, str]:
        """The module that has the first or last linear layer of a network, and its name there."""
        return self.places(name, nn.Linear)[which]

    def layer(self, name: str, which: int = 0) -> Any:
        parent, key = self.linear(name, which)
        return getattr(parent, key)

    def activation(self, name: str) -> tuple[nn.Module, str]:
        """The module that has the first activation of a network, and its name there."""
        return self.places(name, (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU))[0]

    def optimizers(self) -> dict[str, th.optim.Optimizer]:
        """By the names that SB3 saves them under."""
        found = {name: recursive_getattr(self.model, name) for name in self.model.get_parameters()}
        return {name: one for name, one in found.items() if isinstance(one, th.optim.Optimizer)}

    def trains(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Let the optimizers have another parameter in place of one."""
        for optimizer in self.optimizers().values():
            for group in optimizer.param_groups:
                group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
            optimizer.state.pop(old, None)

    def count(self, name: str, result: Any = None) -> Callable[..., Any]:
        """A hook that is counted."""

        def hook(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return result(*args, **kwargs) if callable(result) else result

        return hook


def numbers(model: Any) -> th.Tensor:
    """All parameters, buffers and the entropy coefficient."""
    learned = getattr(model, "ent_coef_optimizer", None) is not None
    values = [*model.policy.state_dict().values(), *([model.log_ent_coef] if learned else [])]
    return th.cat([value.detach().flatten().float() for value in values])


def stored(model: Any) -> th.Tensor:
    """On-policy: value and log-probability of the last action in the rollout."""
    buffer = getattr(model, "rollout_buffer", None)
    if buffer is None or not 0 < buffer.pos <= buffer.buffer_size:
        return th.zeros(0)
    return th.from_numpy(np.stack([buffer.values, buffer.log_probs])[:, buffer.pos - 1].flatten())


def in_another_thread(function: Callable[[], None]) -> None:
    """Run it there, wait, and raise what it raised."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


@dataclass(frozen=True)
class Intervention:
    """What is done to a subject."""

    name: str
    do: Callable[[Subject], None]
    acts: bool = True
    """Whether it changes what is learned."""
    counts: bool = False
    """Whether it counts calls of hooks."""
    rows: tuple[str, ...] = EVERY
    variant: str = "mlp"
    changes: tuple[tuple[str, Any], ...] = ()
    """Constructor arguments."""
    sb3: tuple[str, ...] = tuple(SB3)
    """The rows whose class of SB3's does the same."""
    before: Callable[[Subject], None] | None = None
    """What is done before training."""
    draws: bool = False
    """Whether it depends on what PyTorch's generator gives."""
    turns: int = 1
    ways: tuple[str, ...] = WAYS
    error: type[Exception] | None = None
    """What training raises then."""

    def arguments(self) -> dict[str, Any]:
        return copy.deepcopy(dict(self.changes))

    def steps(self, row: str) -> list[int]:
        """When it happens."""
        first = WARM_UP + BEFORE + random.Random(f"{row} {self.name}").randrange(DRAWN)
        return [first + TURN * turn for turn in range(self.turns)]

    @property
    def length(self) -> int:
        """Steps of the whole training."""
        return WARM_UP + BEFORE + DRAWN + TURN * (self.turns - 1) + AFTER


@dataclass(repr=False)
class Outcome:
    """What was seen."""

    trajectory: list[th.Tensor] = field(default_factory=list)
    parameters: dict[str, Any] = field(default_factory=dict)
    predictions: list[np.ndarray] = field(default_factory=list)
    drawn: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    error: type[Exception] | None = None


class Callback(BaseCallback):
    """Intervenes when it is due."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject

    def _on_step(self) -> bool:
        self.subject.intervene_if_due(self.n_calls)
        return True


def observations(space: spaces.Space[Any], n: int | None = None) -> Any:
    """
    Always the same ones.

    :param space: whose samples they are
    :param n: how many, in a batch; None for one alone
    """
    space = copy.deepcopy(space)
    space.seed(3)
    if n is None:
        return space.sample()
    samples = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {name: np.stack([sample[name] for sample in samples]) for name in space.spaces}
    return np.stack(samples)


def observe(subject: Subject, error: type[Exception] | None) -> Outcome:
    """Read everything, hooks being counted no more."""
    model, calls = subject.model, dict(subject.calls)
    outcome = Outcome(subject.trajectory, calls=calls, error=error)
    if error is not None:
        return outcome
    outcome.trajectory.append(numbers(model))
    outcome.drawn = {"torch": th.rand(1).item(), "numpy": float(np.random.random()), "python": random.random()}
    outcome.parameters = copy.deepcopy({name: value for name, value in model.get_parameters().items() if name != "policy"})
    batches = (observations(model.observation_space), observations(model.observation_space, 3))
    for batch, deterministic in itertools.product(batches, (True, False)):
        th.manual_seed(1)
        outcome.predictions.append(model.predict(batch, deterministic=deterministic)[0])
    return outcome


def train(row: str, kind: bool | str, case: Intervention, way: str = "callback") -> Outcome:
    subject = Subject(row, kind, case, way)
    callback = Callback(subject) if way == "callback" else None
    return observe(subject, subject.learn(case.length, callback=callback))


DERIVED = frozenset(name for names in INVERSES.values() for name in names)
"""What K-FAC makes of its factors, by which it enlarges their rounding errors; parameters show what it does with it."""


def assert_same_state(actual: Any, expected: Any, atol: float) -> None:
    """Of optimizers: nested dicts and lists of tensors and anything else."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for name in expected.keys() - DERIVED:
            assert_same_state(actual[name], expected[name], atol)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same_state(one, other, atol)
    elif isinstance(expected, th.Tensor):
        th.testing.assert_close(actual, expected, rtol=atol, atol=atol)
    else:
        assert actual == expected


def assert_sb3s(actual: Outcome, theirs: Outcome, atol: float = 0.0) -> None:
    """The parameters at every step, the numbers drawn next, and predictions."""
    assert actual.error is theirs.error
    for step, (one, other) in enumerate(zip(actual.trajectory, theirs.trajectory, strict=True)):
        departure = (one - other).abs().max().item()
        assert departure <= atol, f"departs by {departure:.1e} with the updates of step {step}"
    for generator in theirs.drawn:
        assert actual.drawn[generator] == theirs.drawn[generator], generator
    for prediction, wanted in zip(actual.predictions, theirs.predictions, strict=True):
        np.testing.assert_allclose(prediction, wanted, rtol=0, atol=atol)


def assert_same(actual: Outcome, expected: Outcome, atol: float, when: Any = "never") -> None:
    """Relative to 1 or to the number, whichever is larger."""
    assert actual.error is expected.error
    for step, (one, other) in enumerate(zip(actual.trajectory, expected.trajectory, strict=True)):
        departure = ((one - other) / (1 + other.abs())).abs().max().item() if len(one) == len(other) else float("inf")
        assert departure <= atol, f"departs by {departure:.1e} with the updates of step {step}; intervention: {when}"
    assert actual.calls == expected.calls
    assert actual.drawn == expected.drawn
    assert_same_state(actual.parameters, expected.parameters, atol)
    for prediction, wanted in zip(actual.predictions, expected.predictions, strict=True):
        np.testing.assert_allclose(prediction, wanted, rtol=0, atol=atol)
