"""Updates by `Engine`: a replay is the function, whenever it was recorded, and everything that users see is PyTorch's."""

import copy
import gc
import inspect
import io
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch as th
import torch.nn.functional as F
from owners import Batch, Learner, Tied, Values, assert_same, numbers
from torch import nn

from sb3_ac_ext.engine import Engine, Network

Optimizers = th.optim


def frozen(net: Any) -> None:
    net[0].weight.requires_grad_(False)


def clipped_apart(net: Any) -> dict[str, Any]:
    return {"max_grad_norm": 0.05, "clipped": [list(net[0].parameters()), list(net[2].parameters())]}


def groups_apart(parameters: Iterable[nn.Parameter]) -> th.optim.Optimizer:
    """With options of their own, as those of Adam may be."""
    first, *others = parameters
    return Optimizers.Adam([{"params": [first], "betas": (0.5, 0.9), "weight_decay": 0.1}, {"params": others}])


def by(cls: Any, **options: Any) -> Callable[[Any], th.optim.Optimizer]:
    return lambda parameters: cls(parameters, lr=1e-2, **options)


CASES: dict[str, dict[str, Any]] = {
    "adam": {},
    "adam, weight decay of its own": {"optimizer": by(Optimizers.Adam, weight_decay=0.1)},
    "adam, maximize": {"optimizer": by(Optimizers.Adam, maximize=True)},
    "adam, amsgrad": {"optimizer": by(Optimizers.Adam, amsgrad=True)},
    "adam, groups": {"optimizer": groups_apart},
    "adamw": {"optimizer": by(Optimizers.AdamW)},
    "adamw, amsgrad": {"optimizer": by(Optimizers.AdamW, amsgrad=True, weight_decay=0.1)},
    "adam, rate in a tensor": {"optimizer": lambda parameters: Optimizers.Adam(parameters, lr=th.tensor(1e-2))},
    "sgd": {"optimizer": by(Optimizers.SGD)},
    "sgd, momentum": {"optimizer": by(Optimizers.SGD, momentum=0.9)},
    "rmsprop": {"optimizer": by(Optimizers.RMSprop)},
    "frozen part": {"prepare": frozen},
    "all frozen": {"prepare": lambda net: net.requires_grad_(False)},
    "tied and unused": {"net": Tied},
    "tied and unused, clipped": {"net": Tied, "settings": lambda _: {"max_grad_norm": 0.05}},
    "tied and unused, rmsprop": {"net": Tied, "optimizer": by(Optimizers.RMSprop)},
    "clipped": {"settings": lambda _: {"max_grad_norm": 0.05}},
    "clipped apart": {"settings": clipped_apart},
    "clipped, sgd": {"settings": lambda _: {"max_grad_norm": 0.05}, "optimizer": by(Optimizers.SGD, momentum=0.9)},
    "decayed": {"settings": lambda _: {"weight_decay": 0.1}},
    "decayed and clipped": {"settings": lambda _: {"weight_decay": 0.1, "max_grad_norm": 0.05}},
    "layer norm": {"net": lambda: nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))},
    "batch norm": {"net": lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))},
    "dropout": {"net": lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2))},
}
cases = pytest.mark.parametrize("case", CASES)
dtypes = pytest.mark.parametrize("dtype", [th.float32, th.float64], ids=["float32", "float64"])


def learner(case: str, **changes: Any) -> Learner:
    return Learner(**{**CASES[case], **changes})


def replays(learner: Learner) -> bool:
    return set(learner.engine.report().values()) == {"replayed"}


# What a replay comes to


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, th.float32) for case in CASES), *((case, th.float64) for case in ("adam", "sgd, momentum", "clipped apart"))],
)
def test_a_fresh_engine_continues_exactly(case: str, dtype: th.dtype) -> None:
    """An update gives the same bits whether it is recorded, verified or replayed, so that it does not matter who goes on."""
    whole = learner(case, dtype=dtype)
    logged = whole.train(range(5))
    random = th.get_rng_state()
    assert replays(whole)
    for first in (1, 3):
        divided = learner(case, dtype=dtype)
        parts = [divided.train(range(first))]
        divided.renew()
        parts.append(divided.train(range(first, 5)))
        assert_same(divided.state(), whole.state())
        assert th.equal(th.get_rng_state(), random)
        mean = {name: (first * parts[0][name] + (5 - first) * parts[1][name]) / 5 for name in logged}
        assert mean == pytest.approx(logged, rel=1e-14)


@pytest.mark.parametrize(
    "case", ["adam", "adam, groups", "adamw, amsgrad", "sgd, momentum", "frozen part", "tied and unused", "dropout"]
)
def test_a_loaded_optimizer_continues_exactly(case: str) -> None:
    whole = learner(case)
    whole.train(range(6))
    first = learner(case)
    first.train(range(3))
    random = th.get_rng_state()
    second = learner(case)
    second.copy_from(first)
    th.set_rng_state(random)
    second.train(range(3, 6))
    assert_same(second.state(), whole.state())


@dtypes
@cases
def test_each_step_is_that_of_the_engine_switched_off(case: str, dtype: th.dtype) -> None:
    """What it logs, parameters and targets, gradients, and the state of the optimizer, which is PyTorch's."""
    ours, theirs = learner(case, dtype=dtype), learner(case, dtype=dtype, enabled=False)
    atol = 1e-6 if dtype is th.float32 else 1e-10
    for step in range(4):
        logged = []
        for one in (ours, theirs):
            th.manual_seed(step)
            logged.append(one.train([step]))
        assert logged[0] == pytest.approx(logged[1], rel=10 * atol, abs=atol)
        assert logged[0].keys() == {"loss", "net_grad_norm"}
        assert_same(ours.state(), theirs.state(), atol)
        for own, expected in zip(ours.net.parameters(), theirs.net.parameters(), strict=True):
            assert (own.grad is None) == (expected.grad is None)
            if own.grad is not None:
                th.testing.assert_close(own.grad, expected.grad, rtol=0, atol=atol)
            own.grad = None  # whoever wants to
        assert form(ours.optimizer) == form(theirs.optimizer)
        theirs.copy_from(ours)
    assert replays(ours)


def form(optimizer: th.optim.Optimizer) -> tuple[Any, ...]:
    """All of its state but for the numbers."""
    found = optimizer.state_dict()
    states = {
        (i, name): (value.shape, value.dtype) if isinstance(value, th.Tensor) else value
        for i, state in found["state"].items()
        for name, value in state.items()
    }
    return found["param_groups"], list(states), states


# What users see of the optimizer


@pytest.mark.parametrize("handed", ["as it is", "saved and loaded", "copied"])
def test_pytorchs_step_counts_each_parameter_once(handed: str) -> None:
    """The counters share memory, which no step may count several times."""
    own = learner("adam")
    own.train(range(3))
    optimizer = own.optimizer
    if handed == "copied":
        optimizer = copy.deepcopy(own.optimizer)
    elif handed == "saved and loaded":
        file = io.BytesIO()
        th.save(optimizer.state_dict(), file)
        file.seek(0)
        optimizer = Optimizers.Adam(own.net.parameters())
        optimizer.load_state_dict(th.load(file))
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = th.ones_like(parameter)
    optimizer.step()
    assert [state["step"].item() for state in optimizer.state.values()] == [4.0] * 4
    assert len({state["step"].data_ptr() for state in optimizer.state.values()}) == 4


def test_steps_of_the_user_between_updates_count() -> None:
    ours, theirs = learner("adam"), learner("adam", enabled=False)
    for one in (ours, theirs):
        for step in range(4):
            one.train([step])
            one.optimizer.zero_grad()
            one.loss(one, one.batch(step)).backward()
            one.optimizer.step()
    assert_same(ours.state(), theirs.state(), 1e-6)
    assert replays(ours)


def test_a_parameter_that_is_used_later_has_a_counter_of_its_own() -> None:
    def loss(learner: Learner, batch: Batch) -> th.Tensor:
        net: Any = learner.net
        return net[0](batch[0]).square().mean() + (net(batch[0]).square().mean() if learner.scale > 1 else 0)

    ours, theirs = Learner(loss=loss), Learner(loss=loss, enabled=False)
    for one in (ours, theirs):
        one.train(range(3))
        one.scale = 2.0
        one.train(range(3, 6))
        one.scale = 1.0
        one.train(range(6, 8))
        assert [own["step"].item() for own in one.optimizer.state_dict()["state"].values()] == [8.0, 8.0, 3.0, 3.0]
    assert_same(ours.state(), theirs.state(), 1e-6)


def refused_unless_five(learner: Learner, batch: Batch) -> th.Tensor:
    loss = F.mse_loss(learner.net(batch[0]), batch[1])
    return loss if len(batch[0]) == 5 else loss * float(batch[1].abs().mean())


def test_gradients_are_those_of_the_last_update() -> None:
    """Whichever of the updates are replayed."""
    ours, theirs = Learner(loss=refused_unless_five), Learner(loss=refused_unless_five, enabled=False)
    for order in ("ab", "ab", "ba", "aba", "bab", "abb", "a", "b"):
        for one in (ours, theirs):
            one.engine.begin()
            for step, which in enumerate(order):
                x, y = one.batch(step)
                one.engine.run(one.update, (x, y) if which == "a" else (x[:3], y[:3]))
            one.engine.end()
        for own, expected in zip(ours.net.parameters(), theirs.net.parameters(), strict=True):
            assert own.grad is not None and expected.grad is not None
            th.testing.assert_close(own.grad, expected.grad, rtol=0, atol=1e-5, msg=order)


def test_users_gradients_do_not_enter_an_update() -> None:
    """Neither stale ones nor those of parameters that it does not train."""
    for case in ("tied and unused", "sgd, momentum", "frozen part"):
        ours, theirs = learner(case), learner(case, enabled=False)
        for step in range(5):
            for one in (ours, theirs):
                for parameter in one.net.parameters():
                    parameter.grad = th.full_like(parameter, 7.0)
                one.train([step])
        assert_same(ours.state(), theirs.state(), 1e-6)
        for own, expected in zip(ours.net.parameters(), theirs.net.parameters(), strict=True):
            assert (own.grad is None) == (expected.grad is None), case


class InTwo(Learner):
    """Looks at the gradients before it steps, with a loss that cannot be recorded for batches of another size than five."""

    def gradients(self, batch: Batch) -> Values:
        loss = refused_unless_five(self, batch)
        self.engine.differentiate(loss, "net")
        return {"loss": loss}

    def step(self, batch: tuple[()]) -> None:
        self.engine.step("net")


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0.05}, {"weight_decay": 0.1}], ids=["", "clipped", "decayed"])
def test_steps_by_another_function_than_the_gradients(settings: dict[str, Any]) -> None:
    """Whichever of the two are replayed; what the step does to the gradients is done once."""
    kwargs: dict[str, Any] = {"settings": lambda _: settings, "dtype": th.float64}
    ours, theirs = InTwo(**kwargs), InTwo(**kwargs, enabled=False)
    for order in ("a", "a", "ab", "ba", "aba", "bab", "abb", "b", "a"):
        for one in (ours, theirs):
            one.engine.begin()
            for step, which in enumerate(order):
                x, y = one.batch(step)
                one.engine.run(one.gradients, (x, y) if which == "a" else (x[:3], y[:3]))
                one.engine.run(one.step, ())
            one.engine.end()
        assert_same(ours.state(), theirs.state(), 1e-12)
    assert ours.engine.report()["step"] == "replayed"


# The log and the outputs


class Reporter(Learner):
    """Returns whatever it is asked for."""

    def ask(self, batch: tuple[th.Tensor, ...], what: str = "values") -> Values | None:
        x = batch[0]
        values = {
            "values": {"mean": x.mean(), "per_sample": x.sum(dim=1), "count": (x > 0).sum(), "any": (x > 0).any()},
            "nothing": None,
            "one": {"one": x.sum()},
            "by size": {"mean": x.mean()} if len(x) > 3 else {"mean": x.mean(), "largest": x.amax()},
            "the input": {"itself": x, "view": x[1:]},
            "a parameter": {"weight": next(self.net.parameters())},
        }
        return values[what]


@pytest.mark.parametrize("enabled", [True, False])
def test_scalars_are_averaged_for_the_log(enabled: bool) -> None:
    own = Reporter(enabled=enabled)
    for start in (0, 10, 20):
        batches = [numbers(start + i, 5, 3) for i in range(6)]
        own.engine.begin()
        for batch in batches:
            own.engine.run(own.ask, (batch,))
            own.engine.run(own.ask, (batch,), "nothing")
        expected = {
            "mean": sum(batch.mean().item() for batch in batches) / 6,
            "count": sum(int((batch > 0).sum()) for batch in batches) / 6,
            "any": 1.0,
        }
        assert own.engine.end() == pytest.approx(expected, rel=1e-6)
        assert own.engine.end() == {}
    assert not enabled or replays(own)


@pytest.mark.parametrize("enabled", [True, False])
def test_functions_may_log_the_same_name(enabled: bool) -> None:
    """With options and shapes of all kinds, in any order, also where the names depend on the shape."""
    own, batches = Reporter(enabled=enabled), [numbers(i, 3 + i % 2, 3) for i in range(8)]
    for _ in range(3):
        own.engine.begin()
        for batch in batches:
            own.engine.run(own.ask, (batch,), "by size")
        logged = own.engine.end()
        small = [batch.amax().item() for batch in batches if len(batch) == 3]
        mean = sum(batch.mean().item() for batch in batches) / 8
        assert logged == pytest.approx({"mean": mean, "largest": sum(small) / 4}, rel=1e-6)
        for batch in batches:
            own.engine.run(own.ask, (batch,), "one")
            own.engine.run(own.ask, (batch,), "values")
        assert own.engine.end()["mean"] == pytest.approx(mean, rel=1e-6)


def test_outputs_are_the_callers() -> None:
    own = Reporter()
    seen = []
    for i in range(5):
        batch = numbers(i, 5, 3)
        outputs = own.engine.run(own.ask, (batch,))
        assert list(outputs) == ["mean", "per_sample", "count", "any"] and len(outputs) == 4
        seen.append((outputs["per_sample"], batch.sum(dim=1)))
        outputs["per_sample"].fill_(7)  # nobody else's
        th.testing.assert_close(outputs["mean"], batch.mean())
        assert not outputs["mean"].requires_grad
        assert outputs["count"] == (batch > 0).sum() and outputs["count"].dtype == th.int64
        assert outputs["any"] and outputs["any"].dtype == th.bool
    for value, expected in seen:
        th.testing.assert_close(value, expected)
    assert replays(own)


def test_outputs_that_are_an_input_or_a_parameter() -> None:
    """They are read where they are, and do not follow what is done there later."""
    own = Reporter()
    for i in range(4):
        batch = numbers(i, 5, 3)
        outputs = own.engine.run(own.ask, (batch,), "the input")
        assert th.equal(outputs["itself"], batch) and th.equal(outputs["view"], batch[1:])
        before = next(own.net.parameters()).detach().clone()
        outputs = own.engine.run(own.ask, (batch,), "a parameter")
        weight = outputs["weight"]
        assert th.equal(weight, before)
        if i:  # a copy, where it is replayed
            next(own.net.parameters()).data.add_(1)
            assert th.equal(weight, before)
    assert replays(own)


# Options, shapes and what they take


@dtypes
def test_recordings_for_several_options_share_everything(dtype: th.dtype) -> None:
    ours, theirs = learner("adam", dtype=dtype), learner("adam", dtype=dtype, enabled=False)
    for one in (ours, theirs):
        for steps in (range(4), range(4, 8)):
            one.engine.begin()
            for step in steps:
                one.engine.run(one.update, one.batch(step), step % 2 == 0)
                one.engine.run(one.update, tuple(part[:2] for part in one.batch(step)), False)
            one.engine.end()
    assert_same(ours.state(), theirs.state(), 1e-6 if dtype is th.float32 else 1e-10)
    assert replays(ours) and len(ours.engine.report()) == 2


class Filler(Learner):
    def fill(self, batch: tuple[th.Tensor], number: Any) -> Values:
        return {"filled": th.full((2,), number), "batch": batch[0] + number}


def test_kinds_that_differ_in_type_alone() -> None:
    """Options that are equal otherwise, and batches."""
    own = Filler()
    for _ in range(3):
        for number, dtype in ((1, th.int64), (1.0, th.float32), (True, th.bool)):
            for given in (numbers(0, 2), numbers(0, 2).double(), numbers(0, 2).half()):
                outputs = own.engine.run(own.fill, (given,), number)
                assert outputs["filled"].dtype == dtype and outputs["batch"].dtype == given.dtype


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(one), th.Tensor) for one in gc.get_objects())


def test_more_shapes_than_are_remembered_take_bounded_memory() -> None:
    own = Reporter()
    sizes, alive = [], []
    for rows in range(1, 141):
        outputs = own.engine.run(own.ask, (th.ones(rows, 3),), "one")
        assert outputs["one"] == 3 * rows
        if rows in (80, 140):
            sizes.append(own.engine.memory() / rows)
            alive.append(tensors_alive())
    assert sizes[1] <= sizes[0]  # for each row
    assert alive[1] <= alive[0] + 10
    for _ in range(3):  # and those that go on are replayed
        own.engine.run(own.ask, (th.ones(140, 3),), "one")
    assert own.engine.report() == {"ask(one)": "replayed"}


def test_replays_do_not_grow() -> None:
    """Whatever changes between them that may change."""
    own = learner("tied and unused, clipped")
    counts = []
    for step in range(25):
        own.rate = 1e-3 / (step + 1)
        own.train([step])
        if step in (8, 24):
            counts.append((own.engine.memory(), tensors_alive()))
    assert counts[0] == counts[1]
    assert replays(own)


def test_rates_are_followed_without_another_recording() -> None:
    ours, theirs = learner("adam"), learner("adam", enabled=False)
    recordings = set()
    for step in range(8):
        for one in (ours, theirs):
            one.rate = 0.1 / (step + 1)
            one.train([step])
        recordings.add(next(iter(ours.engine._kinds.values())).recording)
        assert ours.optimizer.param_groups[0]["lr"] == theirs.optimizer.param_groups[0]["lr"] == 0.1 / (step + 1)
    assert len(recordings) == 1
    assert_same(ours.state(), theirs.state(), 1e-6)


# What it wants


@pytest.mark.parametrize("enabled", [True, False])
def test_functions_must_be_the_owners_methods(enabled: bool) -> None:
    own, other = Reporter(enabled=enabled), Reporter()
    batch = (numbers(0, 5, 3),)
    for function in (lambda batch: {}, F.relu, other.ask, Reporter.ask):
        with pytest.raises(TypeError, match="function must be a bound method of the Reporter, got"):
            own.engine.run(function, batch)  # type: ignore[arg-type]
    own.engine.run(own.ask, batch)


class Careless(Learner):
    def update(self, batch: Batch, delayed: bool = True) -> Values:
        return {**super().update(batch), "norm": 3.0}  # type: ignore[dict-item]


@pytest.mark.parametrize("enabled", [True, False])
def test_outputs_must_be_tensors(enabled: bool) -> None:
    own, expected = Careless(enabled=enabled), Learner(enabled=False)
    for step in range(4):
        with pytest.raises(TypeError, match=r"the output .norm. of update must be a tensor, got 3\.0"):
            own.train([step])
        own.engine.end()
        expected.train([step])
    assert_same(own.state(), expected.state())  # as the update was done


@pytest.mark.parametrize("enabled", [True, False])
def test_unknown_networks(enabled: bool) -> None:
    class Wrong(Learner):
        def update(self, batch: Batch, delayed: bool = True) -> Values:
            self.engine.minimise(self.loss(self, batch), "nett")
            return {}

    with pytest.raises(KeyError, match="nett"):
        Wrong(enabled=enabled).train([0])


# The documentation


def test_the_example_of_the_documentation() -> None:
    """It runs as it is written there, and is replayed."""
    text = inspect.getdoc(Engine)
    assert text is not None
    example = textwrap.dedent(text[text.index("    class Regression:") : text.index(":param owner:")])
    names: dict[str, Any] = {"nn": nn, "th": th, "F": F, "Engine": Engine, "Network": Network, "Iterable": Iterable}
    exec(example, names)
    weight = th.tensor([[1.0], [-2.0], [0.5]])
    losses: dict[bool, list[float]] = {True: [], False: []}
    for enabled, seen in losses.items():
        th.manual_seed(0)
        regression = names["Regression"]()
        regression.engine.enabled = enabled
        for i in range(20):
            inputs = [numbers(10 * i + j, 32, 3) for j in range(10)]
            seen.append(regression.fit([(x, x @ weight + 3) for x in inputs])["loss"])
        assert not enabled or regression.engine.report() == {"update": "replayed"}
    assert losses[True][-1] < losses[True][0]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
