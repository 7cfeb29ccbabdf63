"""Recorded steps of the on-policy family do what the steps do."""

from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from environments import BOX, CONTINUOUS, RandomEnv

from sb3_ac_ext import AC, PPOX
from sb3_ac_ext.legacy.capture import WARM_UP, Capture
from sb3_ac_ext.legacy.descent import FlatAdam
from sb3_ac_ext.legacy.means import TensorMeans
from sb3_ac_ext.legacy.tape import Tape


def parameters(model: Any) -> th.Tensor:
    return th.cat([value.flatten() for value in model.policy.state_dict().values()]).clone()


def test_a_function_is_replayed_until_something_changes() -> None:
    means, seen, x = TensorMeans(), [], th.zeros(())
    capture = Capture(means, Tape)

    def step() -> None:
        seen.append(1)
        means.add("x", x * 2)

    for value in range(WARM_UP + 3):
        capture.fix("address")
        x.fill_(value)
        capture.run("step", step)
    assert len(seen) == WARM_UP + 1
    assert means.read() == {"x": pytest.approx(WARM_UP + 2)}
    assert means.read() == {}
    capture.fix("another")
    capture.run("step", step)
    assert len(seen) == WARM_UP + 2


class Hesitant(Tape):
    """Begins twice, as a CUDA graph that could not be recorded."""

    def record(self, function: Callable[[], None]) -> None:
        function()
        super().record(function)


def test_a_second_beginning_counts_once() -> None:
    means, x = TensorMeans(), th.ones(2)
    capture = Capture(means, Hesitant)
    for _ in range(WARM_UP + 3):
        capture.run("step", lambda: means.add("a", x.sum()))
    assert means.counts() == {"a": WARM_UP + 3}


def test_means_are_read_with_others() -> None:
    means = TensorMeans()
    means.add("a", th.tensor(4.0))
    means.add("a", th.tensor(2.0))
    means.add("b", 7)
    assert means.read({"c": th.tensor(5.0)}) == {"a": 3.0, "b": 7.0, "c": 5.0}
    assert means.read({"c": th.tensor(5.0)}) == {"c": 5.0}


def test_means_of_tensors_are_those_of_their_elements() -> None:
    means = TensorMeans()
    for rows in (2, 4):
        means.add("a", th.full((rows, 1), float(rows), requires_grad=True))
    means.add("a", th.tensor(6.0))
    assert means.read() == {"a": pytest.approx((2 * 2 + 4 * 4 + 6) / 7)}


def test_means_start_again_when_they_are_read() -> None:
    means = TensorMeans()
    for values in ((1.0, 2.0, 6.0), (10.0,)):
        for value in values:
            means.add("a", th.tensor(value))
        means.add("b", th.tensor(-1.0))
        assert means.read() == {"a": sum(values) / len(values), "b": -1.0}
    assert means.read() == {}


@pytest.mark.parametrize(
    ("cls", "kwargs", "keys"),
    [
        (PPOX, {"n_steps": 32, "batch_size": 8, "learning_rate": "lin_0.01"}, {"policy"}),
        (PPOX, {"n_steps": 32, "batch_size": 8, "separate_phases": True, "max_grad_norm": 0.1}, {"policy", "value"}),
        (AC, {}, {"actor", "critic"}),
    ],
    ids=["one", "two", "online"],
)
def test_steps_of_on_policy_updates_are_recorded(cls: Any, kwargs: dict[str, Any], keys: set[str]) -> None:
    results = []
    for recorded in (True, False):
        model = cls("MlpPolicy", RandomEnv(BOX, CONTINUOUS), seed=0, **kwargs)
        if not recorded:
            model._capture_obstacle = lambda ordinary: "switched off"
        model.learn(96)
        recordings = {key: step.recorded for key, step in model._capture._steps.items()}
        assert recordings == (dict.fromkeys(keys, True) if recorded else {})
        results.append((parameters(model), model.logger.name_to_value))
    th.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-6)
    for key, value in results[0][1].items():
        assert value == pytest.approx(results[1][1][key], rel=1e-3, abs=1e-5) or key.startswith("time/"), key


def test_steps_of_a_part_are_not_replayed() -> None:
    """Adam leaves parameters alone that the loss has left without a gradient; a recorded step would not."""
    model = PPOX("MlpPolicy", RandomEnv(BOX, CONTINUOUS), seed=0, n_steps=32, batch_size=8).learn(96)
    assert all(step.recorded for step in model._capture._steps.values())
    descent, before = model._descents["policy"], parameters(model)
    assert isinstance(descent, FlatAdam)
    for parameter in descent.parameters[1:]:
        parameter.grad = None
    descent.whole = False
    descent.parameters[0].grad = th.ones_like(descent.parameters[0])
    model._step("policy")
    assert (parameters(model) != before).sum() == descent.parameters[0].numel()


@pytest.mark.parametrize(("recorded", "steps"), [(True, 200), (False, 200)], ids=["recorded", "not"])
def test_moments_that_vanish_while_steps_are_replayed(recorded: bool, steps: int) -> None:
    model = PPOX("MlpPolicy", RandomEnv(BOX, CONTINUOUS), seed=0, n_steps=32, batch_size=8).learn(96)
    if not recorded:
        model._records = False
    descent = model._descents["policy"]
    assert isinstance(descent, FlatAdam)
    for gradient in descent.gradient.views:
        gradient.zero_()
    descent.moments[0].values.fill_(1e-31)
    before = descent.steps
    for _ in range(steps):
        model._step("policy")
    assert descent.steps - before == steps
    assert not descent.moments[0].values.any()


def test_recording_leaves_the_process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's distributions go on validating what they are given, in other threads too."""
    called: list[bool] = []
    monkeypatch.setattr(th.distributions.Distribution, "set_default_validate_args", called.append)
    PPOX("MlpPolicy", RandomEnv(BOX, CONTINUOUS), seed=0, n_steps=32, batch_size=8).learn(96)
    assert called == []
