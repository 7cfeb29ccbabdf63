"""The parts of a recording: inputs, snapshots of what may change, and how far apart results are."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch as th
from owners import Learner, assert_same, numbers, random_state
from torch import nn

from sb3_ac_ext.engine.recording import TOLERANCE, Inputs, Snapshot, difference

CPU = th.device("cpu")


class Batch(NamedTuple):
    observations: Any
    actions: Any
    weights: Any = None


def test_inputs_keep_the_kind_of_a_batch() -> None:
    given = Batch({"image": np.zeros((2, 3), np.uint8), "vector": th.zeros(2)}, th.ones(2, dtype=th.float64))
    inputs = Inputs(given, CPU)
    assert type(inputs.batch) is Batch and inputs.batch.weights is None
    assert inputs.batch.observations["image"].dtype is th.uint8 and inputs.batch.actions.dtype is th.float64
    assert len(inputs.tensors) == 3
    assert type(Inputs((th.zeros(1), 3), CPU).batch) is tuple


def test_inputs_are_memory_of_their_own() -> None:
    x, y = numbers(0, 2, 3), numbers(1, 3).numpy()
    inputs = Inputs((x, {"y": y}), CPU)
    places = [tensor.data_ptr() for tensor in inputs.tensors]
    x.fill_(7)
    y.fill(7)
    assert not any(bool((tensor == 7).any()) for tensor in inputs.tensors)
    inputs.fill([x, y])
    assert th.equal(inputs.batch[0], x) and inputs.batch[1]["y"].tolist() == [7, 7, 7]
    assert [tensor.data_ptr() for tensor in inputs.tensors] == places


@pytest.mark.parametrize(
    "value",
    [
        lambda: numbers(5, 3, 2).t(),
        lambda: numbers(5, 2, 3).numpy(),
        lambda: np.asfortranarray(numbers(5, 2, 3).numpy()),
        lambda: numbers(5, 1, 3).expand(2, 3),
        lambda: numbers(5, 4, 3)[::2],
        lambda: numbers(5, 2, 3).numpy()[::-1],
        lambda: nn.Parameter(numbers(5, 2, 3)),
        lambda: numbers(5, 2, 3, dtype=th.float64),
    ],
    ids=["transposed", "array", "columns", "expanded", "every other", "reversed", "parameter", "double"],
)
@pytest.mark.parametrize("array_first", [False, True])
def test_inputs_are_filled_with_whatever_has_their_shape(value: Any, array_first: bool) -> None:
    inputs = Inputs((np.zeros((2, 3), np.float32) if array_first else th.zeros(2, 3),), CPU)
    with th.no_grad():
        inputs.fill([value()])
    expected = th.from_numpy(value().copy()) if isinstance(value(), np.ndarray) else value().detach()
    assert th.equal(inputs.tensors[0], expected.float()) and not inputs.tensors[0].requires_grad


def test_inputs_made_in_inference_mode_can_be_differentiated() -> None:
    with th.inference_mode():
        inputs = Inputs((th.ones(2), np.ones(2, np.float32)), CPU)
    assert not any(tensor.is_inference() for tensor in inputs.tensors)
    w = nn.Parameter(th.ones(2))
    (inputs.tensors[0] * w).sum().backward()
    assert w.grad is not None


def test_inputs_of_types_that_numpy_does_not_know() -> None:
    inputs = Inputs((th.zeros(2, dtype=th.bfloat16), th.zeros(2, dtype=th.bool)), CPU)
    inputs.fill([th.ones(2, dtype=th.bfloat16), np.array([True, False])])
    assert inputs.tensors[0].tolist() == [1, 1] and inputs.tensors[1].tolist() == [True, False]


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("optimizer", [th.optim.Adam, lambda p: th.optim.SGD(p, momentum=0.9)], ids=["adam", "sgd"])
def test_a_snapshot_puts_everything_back(optimizer: Any, before: int) -> None:
    """Tensors, all random numbers and optimizers, also those that had no state yet."""
    own = Learner(optimizer=optimizer, enabled=False)
    own.train(range(before))
    state, random = own.state(), random_state()
    tensors = [*own.net.state_dict().values(), *own.target.state_dict().values()]
    tensors += [v for each in own.optimizer.state.values() for v in each.values() if isinstance(v, th.Tensor)]
    snapshot = Snapshot(tensors, CPU, [own.optimizer])
    own.train(range(2))
    th.rand(3)
    np.random.rand(3)
    snapshot.restore()
    assert_same(own.state(), state)
    assert random_state() == random
    assert len(own.optimizer.state) == (4 if before else 0)


def test_a_snapshot_knows_who_has_drawn() -> None:
    snapshot = Snapshot([], CPU)
    assert not snapshot.has_drawn()
    th.rand(3)  # a replay draws these
    assert not snapshot.has_drawn()
    np.random.rand()
    assert snapshot.has_drawn()
    snapshot.restore()
    assert not snapshot.has_drawn()


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "expected", "agrees"),
    [
        ([1.0, 2.0], [1.0, 2.0], True),
        ([1.0, 2.0], [1.0, 2.0 + 1e-6], True),
        ([1.0, 2.0], [1.0, 2.01], False),
        ([1.0, NAN], [1.0, NAN], True),
        ([1.0, NAN], [1.0, 2.0], False),
        ([1.0, 2.0], [1.0, NAN], False),
        ([1.0, INF], [1.0, INF], True),
        ([1.0, INF], [1.0, -INF], False),
        ([1.0, 3e38], [1.0, INF], False),
        ([1.0, INF], [1.0, 2.0], False),
        ([], [], True),
        ([0.0], [-0.0], True),
        ([0.0, 0.0], [0.0, 1.0], False),
        ([0.0, 0.0], [0.0, 1e-3], False),
    ],
)
def test_differences(values: list[float], expected: list[float], agrees: bool) -> None:
    assert (difference([th.tensor(values)], [th.tensor(expected)]) <= TOLERANCE) is agrees


def test_differences_of_whole_numbers() -> None:
    x = th.tensor([1, 2, 3])
    assert difference([x, x > 1], [x.clone(), x > 1]) == 0
    assert difference([x], [x + th.tensor([0, 0, 1])]) == INF
    assert difference([x > 1], [x > 2]) == INF
    assert difference([], []) == 0


def test_differences_of_nothing_but_rounding() -> None:
    """The gradient of a bias before a normalisation is 0 but for rounding, beside others that are not."""
    large = numbers(0, 100)
    assert difference([large, th.tensor([3e-8])], [large, th.tensor([-2e-8])]) <= TOLERANCE
    assert difference([large, th.tensor([0.1])], [large, th.tensor([0.2])]) > TOLERANCE
    assert difference([th.tensor([3e-8])], [th.tensor([-2e-8])]) > TOLERANCE
    many = [numbers(i, 10) for i in range(50)]
    assert difference([*many[:-1], many[-1] * 1.01], many) > TOLERANCE
