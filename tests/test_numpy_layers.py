"""Layers by numpy against the modules themselves and autograd, in float64."""

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch as th
from torch import nn

from sb3_ac_ext.legacy import numpy_layers
from sb3_ac_ext.legacy.fused_mlp import FusedLinear, FusedMLP
from sb3_ac_ext.legacy.numpy_layers import NumpyLayers, product

ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU]
LARGEST = [0, numpy_layers.LARGEST_PRODUCT]
either_library = pytest.mark.parametrize("largest", LARGEST, ids=["torch", "numpy"])


def network(*sizes: int, activation: type[nn.Module] = nn.Tanh, activated: bool = True) -> FusedMLP:
    th.manual_seed(0)
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        modules += [nn.Linear(inputs, outputs), activation()]
    return FusedMLP(*(modules if activated else modules[:-1])).double()


def normal(*shape: int, seed: int = 1) -> th.Tensor:
    return th.randn(*shape, generator=th.Generator().manual_seed(seed), dtype=th.float64)


def plain(*modules: nn.Module) -> nn.Sequential:
    """The same layers with PyTorch's own forward."""
    copies = copy.deepcopy(modules)
    return nn.Sequential(*(nn.Sequential(*m.children()) if isinstance(m, FusedMLP) else _linear(m) for m in copies))


def _linear(module: Any) -> nn.Linear:
    linear = nn.Linear(module.in_features, module.out_features).double()
    linear.load_state_dict(module.state_dict())
    return linear


def check(x: th.Tensor, *modules: Any) -> None:
    """Outputs, gradients of the parameters, and the tangent."""
    layers, reference = NumpyLayers(*modules), plain(*modules)
    expected = reference(x)
    grad = normal(*expected.shape, seed=2)
    expected.backward(grad)
    outputs = layers.outputs(x.numpy())
    for output in (outputs[-1], layers(x.numpy())):
        np.testing.assert_allclose(output, expected.detach(), rtol=0, atol=1e-10)

    names = [name for name, _ in reference.named_parameters()]
    values = tuple(parameter.detach() for parameter in reference.parameters())
    directions = tuple(normal(*value.shape, seed=3 + i) for i, value in enumerate(values))

    def of_parameters(*values: th.Tensor) -> th.Tensor:
        return th.func.functional_call(reference, dict(zip(names, values, strict=True)), x)

    _, moved = th.autograd.functional.jvp(of_parameters, values, directions)
    tangent = layers.tangent(x.numpy(), outputs, [direction.numpy() for direction in directions])
    np.testing.assert_allclose(tangent, moved, rtol=0, atol=1e-10)

    gradients = [np.full(tuple(parameter.shape), np.nan) for parameter in layers.parameters()]
    layers.backward(x.numpy(), outputs, grad.numpy(), gradients)
    for gradient, parameter in zip(gradients, reference.parameters(), strict=True):
        np.testing.assert_allclose(gradient, parameter.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("activated", [True, False], ids=["activated output", "linear output"])
@either_library
def test_forward_tangent_backward(
    activation: type[nn.Module], activated: bool, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numpy_layers, "LARGEST_PRODUCT", largest)
    check(normal(5, 4), network(4, 8, 6, activation=activation, activated=activated))


@pytest.mark.parametrize("sizes", [(3, 2), (3, 1, 5), (3, 4, 5, 6, 2)], ids=str)
@pytest.mark.parametrize("rows", [1, 7])
@either_library
def test_depths_widths_and_one_row(sizes: tuple[int, ...], rows: int, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_layers, "LARGEST_PRODUCT", largest)
    check(normal(rows, 3), network(*sizes))


@either_library
def test_modules_one_after_another(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden layers and the last one: the activation between them is the first module's."""
    monkeypatch.setattr(numpy_layers, "LARGEST_PRODUCT", largest)
    check(normal(4, 3), network(3, 5), FusedLinear(5, 2).double())
    check(normal(4, 3), network(3, 5, activated=False), FusedLinear(5, 2).double())


def test_the_size_of_the_batch_decides_who_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 rows times 64 by 64 are the most for numpy, not one row more."""
    batches = []
    original = numpy_layers.fused_mlp.run
    monkeypatch.setattr(
        numpy_layers.fused_mlp, "run", lambda plan, x, *args, **kw: batches.append(len(x)) or original(plan, x, *args, **kw)
    )
    module = network(10, 64, 64, 4)
    for rows in (64, 65):
        check(normal(rows, 10), module)
    assert batches == [65, 65]


@pytest.mark.parametrize("columns", [64, 65])
def test_product(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = numpy_layers.mm
    monkeypatch.setattr(numpy_layers, "mm", lambda *args: asked.append(args) or original(*args))
    a, b, place = normal(64, 64).numpy(), normal(64, columns, seed=2).numpy(), np.empty((64, columns))
    np.testing.assert_allclose(product(a, b), a @ b)
    assert product(a, b, place) is place
    np.testing.assert_allclose(place, a @ b)
    assert len(asked) == (2 if columns == 65 else 0)


@either_library
def test_what_was_given_and_other_evaluations_stay_as_they_are(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_layers, "LARGEST_PRODUCT", largest)
    for activation in ACTIVATIONS:
        layers, x = NumpyLayers(network(4, 8, 6, activation=activation)), normal(5, 4).numpy()
        kept = x.copy()
        first = layers.outputs(x)
        kept_outputs = [output.copy() for output in first]
        second = layers.outputs(2 * x)
        grad = np.ones_like(second[-1])
        gradients = [np.empty(tuple(parameter.shape)) for parameter in layers.parameters()]
        layers.backward(2 * x, second, grad, gradients)
        np.testing.assert_array_equal(x, kept)
        np.testing.assert_array_equal(grad, np.ones_like(grad))
        for output, before in zip(first, kept_outputs, strict=True):
            np.testing.assert_array_equal(output, before)


@either_library
def test_updates_in_place_are_seen_and_new_memory_is_noticed(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_layers, "LARGEST_PRODUCT", largest)
    module = network(3, 4)
    layers, x = NumpyLayers(module), normal(2, 3).numpy()
    before = layers(x)
    with th.no_grad():
        module[0].weight.mul_(2)
    assert layers.is_current()
    np.testing.assert_allclose(layers(x), module(th.from_numpy(x)).detach(), atol=1e-12)
    assert not np.allclose(layers(x), before)
    module[0].bias.data = module[0].bias.data.clone()
    assert not layers.is_current()
    layers = NumpyLayers(module)
    handle = module[0].register_forward_hook(lambda *args: None)
    assert not layers.is_current()
    handle.remove()
    assert layers.is_current()
    module[1] = nn.ReLU()
    assert not layers.is_current()
