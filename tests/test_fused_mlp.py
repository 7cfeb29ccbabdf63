"""The fused MLP against plain autograd and finite differences, in float64."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch as th
from torch import nn

from sb3_ac_ext.legacy import fused_mlp
from sb3_ac_ext.legacy.fused_mlp import ACTIVATIONS, FusedLinear, FusedMLP
from sb3_ac_ext.legacy.workspace import Workspace


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    th.manual_seed(0)
    th.set_default_dtype(th.float64)
    yield
    th.set_default_dtype(th.float32)


def layers(activation: type[nn.Module], depth: int, squash: bool) -> list[nn.Module]:
    sizes = [5, *[7] * depth, 3]
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        modules += nn.Linear(inputs, outputs), activation()
    return modules if squash else modules[:-1]


every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda cls: cls.__name__)


@every_activation
@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("squash", [False, True], ids=["open end", "activation last"])
@pytest.mark.parametrize("rows", [1, 6])
def test_equals_plain_autograd(activation: type[nn.Module], depth: int, squash: bool, rows: int) -> None:
    modules = layers(activation, depth, squash)
    plain, fused = nn.Sequential(*modules), FusedMLP(*modules)
    assert fused.obstacle is None
    x, weight = th.randn(rows, 5, requires_grad=True), th.randn(rows, 3)
    results = []
    for network in (plain, fused):
        output = network(x)
        inputs = [x, *network.parameters()]
        results.append([output, *th.autograd.grad((output.sin() * weight).sum(), inputs)])
    assert type(results[1][0].grad_fn).__name__ == "_NodeBackward"
    for expected, value in zip(*results, strict=True):
        th.testing.assert_close(value, expected, rtol=0, atol=1e-10)
    with th.no_grad():
        th.testing.assert_close(fused(x), plain(x), rtol=0, atol=1e-10)


@every_activation
def test_gradcheck(activation: type[nn.Module]) -> None:
    network = FusedMLP(*layers(activation, 2, True))
    inputs = (th.randn(4, 5, requires_grad=True), *network.parameters())

    def function(x: th.Tensor, *parameters: th.Tensor) -> Any:
        return th.func.functional_call(network, dict(zip(dict(network.named_parameters()), parameters, strict=True)), x)

    assert th.autograd.gradcheck(function, inputs)


def test_inputs_that_are_not_contiguous() -> None:
    modules = layers(nn.ReLU, 2, False)
    plain, fused = nn.Sequential(*modules), FusedMLP(*modules)
    wide = th.randn(6, 11, requires_grad=True)
    for view in (wide[:, 3:8], wide[::2, :5], wide.t()[:5].t()):
        grads = [th.autograd.grad(network(view).pow(2).sum(), [wide, *fused.parameters()]) for network in (plain, fused)]
        for expected, value in zip(*grads, strict=True):
            th.testing.assert_close(value, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("wanted", ["x", "parameters", "last layer"])
def test_only_the_gradients_asked_for(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = FusedMLP(*layers(nn.Tanh, 2, False))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(wanted == "parameters" or (wanted == "last layer" and name.startswith("4.")))
    x = th.randn(6, 5, requires_grad=wanted == "x")
    products = []
    original = fused_mlp.mm
    monkeypatch.setattr(fused_mlp, "mm", lambda *args, **kwargs: products.append(1) or original(*args, **kwargs))
    network(x).sum().backward()
    assert len(products) == {"x": 3, "parameters": 5, "last layer": 1}[wanted]
    assert (x.grad is not None) == (wanted == "x")


@pytest.mark.parametrize(
    "modules",
    [
        [nn.Linear(5, 3, bias=False)],
        [nn.Linear(5, 3), nn.LayerNorm(3)],
        [nn.Linear(5, 3), nn.GELU()],
        [nn.Linear(5, 3), nn.ELU(alpha=0.5)],
        [nn.ReLU(), nn.Linear(5, 3)],
        [nn.Linear(5, 3), nn.ReLU(), nn.Tanh()],
        [nn.Flatten()],
        [],
    ],
    ids=str,
)
def test_other_layers_take_the_ordinary_path(modules: list[nn.Module]) -> None:
    plain, fused = nn.Sequential(*modules).double(), FusedMLP(*modules)  # the modules are made before the fixture runs
    assert fused.obstacle is not None
    x = th.randn(6, 5)
    assert th.equal(fused(x), plain(x))


def test_hooks_are_called() -> None:
    fused = FusedMLP(*layers(nn.ReLU, 1, False))
    seen: list[Any] = []
    handle = fused[0].register_forward_hook(lambda module, args, output: seen.append(output))
    fused(th.randn(2, 5))
    assert len(seen) == 1
    handle.remove()
    assert fused.obstacle is None


def test_other_shapes_and_types_take_the_ordinary_path() -> None:
    modules = layers(nn.ReLU, 1, False)
    plain, fused = nn.Sequential(*modules), FusedMLP(*modules)
    x = th.randn(2, 4, 5)
    assert th.equal(fused(x), plain(x))
    assert th.equal(fused(x[0, 0]), plain(x[0, 0]))
    with pytest.raises(RuntimeError, match="dtype"):
        fused(x[0].float())


def test_names_are_those_of_a_sequential() -> None:
    modules = layers(nn.ReLU, 2, True)
    assert list(FusedMLP(*modules).state_dict()) == list(nn.Sequential(*modules).state_dict())


def test_can_be_switched_off() -> None:
    fused = FusedMLP(*layers(nn.ReLU, 1, False))
    assert type(fused(th.randn(2, 5)).grad_fn).__name__ == "_NodeBackward"
    fused.fused = False
    assert type(fused(th.randn(2, 5)).grad_fn).__name__ == "AddmmBackward0"


def test_exporters_see_the_layers() -> None:
    fused, x = FusedMLP(*layers(nn.ReLU, 1, False)), th.randn(2, 5)
    exported = th.export.export(fused, (x,))
    assert any("linear" in str(node.target) for node in exported.graph.nodes)
    th.testing.assert_close(exported.module()(x), fused(x))


def test_a_layer_that_stands_alone() -> None:
    plain = nn.Linear(5, 3)
    state = th.get_rng_state()
    fused = FusedLinear.of(plain)
    assert th.equal(th.get_rng_state(), state)
    assert fused.weight is plain.weight
    assert list(fused.state_dict()) == ["weight", "bias"]
    x = th.randn(4, 5, requires_grad=True)
    outputs = [layer(x) for layer in (plain, fused)]
    assert type(outputs[1].grad_fn).__name__ == "_NodeBackward"
    grads = [th.autograd.grad(output.sin().sum(), [x, plain.weight, plain.bias]) for output in outputs]
    for expected, value in zip(*grads, strict=True):
        th.testing.assert_close(value, expected, rtol=0, atol=1e-10)
    fused.register_forward_hook(lambda module, args, output: output * 2)
    th.testing.assert_close(fused(x), 2 * plain(x), rtol=0, atol=1e-10)


class Counting(nn.ReLU):
    """A layer with a mode of its own."""

    def train(self, mode: bool = True) -> "Counting":
        self.modes = [*getattr(self, "modes", []), mode]
        return super().train(mode)


@pytest.mark.parametrize("layer", [nn.ReLU, nn.Dropout, Counting])
def test_modes_reach_every_layer(layer: type[nn.Module]) -> None:
    fused = FusedMLP(nn.Linear(3, 4), layer(), nn.Linear(4, 2))
    outer = nn.Sequential(fused, FusedLinear(2, 2))
    for mode in (False, True, False):
        assert outer.train(mode) is outer
        assert fused.train(mode) is fused
        assert all(module.training is mode for module in outer.modules())
    assert getattr(fused[1], "modes", None) == ([False, False, True, True, False, False] if layer is Counting else None)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda kind: kind.__name__)
def test_gradients_that_come_in_are_left_alone(activation: type[nn.Module]) -> None:
    """The gradient of a sum is one number for all outputs, and others may hold it."""
    th.manual_seed(0)
    fused = FusedMLP(nn.Linear(3, 4), activation())
    incoming, expected = th.ones(1).expand(5, 4), th.nn.Sequential(*fused.children())
    x = th.randn(5, 3)
    with Workspace().lend():
        fused(x).backward(incoming)
    ours = [parameter.grad.clone() for parameter in fused.parameters() if parameter.grad is not None]
    fused.zero_grad()
    expected(x).backward(incoming)
    assert (incoming == 1).all()
    for value, parameter in zip(ours, expected.parameters(), strict=True):
        th.testing.assert_close(value, parameter.grad)
