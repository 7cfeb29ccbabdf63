"""MLPs that run as one give the results of each by itself, in float64."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch as th
from environments import BOX, CONTINUOUS, RandomEnv
from torch import nn

from sb3_ac_ext import SACX, TD3X
from sb3_ac_ext.legacy import matmul
from sb3_ac_ext.legacy.flat_tensor import bind
from sb3_ac_ext.legacy.fused_mlp import FusedMLP
from sb3_ac_ext.legacy.stacked_mlps import Stack, side_by_side, stacked


@pytest.fixture
def double_precision() -> Iterator[None]:
    th.manual_seed(0)
    th.set_default_dtype(th.float64)
    yield
    th.set_default_dtype(th.float32)


def mlps(number: int = 2, hidden: int = 9, activation: type[nn.Module] = nn.ReLU, squash: bool = False) -> list[FusedMLP]:
    last: list[nn.Module] = [nn.Tanh()] if squash else []
    made = [
        FusedMLP(nn.Linear(5, hidden), activation(), nn.Linear(hidden, 10), activation(), nn.Linear(10, 1), *last)
        for _ in range(number)
    ]
    bind([parameter for mlp in made for parameter in mlp.parameters()])
    return made


def names(outputs: tuple[th.Tensor, ...]) -> set[str]:
    return {type(output.grad_fn).__name__ for output in outputs}


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("squash", [False, True], ids=["open end", "activation last"])
@pytest.mark.parametrize(("number", "rows"), [(2, 6), (2, 1), (4, 12)])
@pytest.mark.parametrize("used", ["all", "first", "last", "every third"])
@pytest.mark.parametrize("own", [False, True], ids=["one input", "an input for each"])
def test_equal_each_by_itself(activation: type[nn.Module], squash: bool, number: int, rows: int, used: str, own: bool) -> None:
    networks = mlps(number, activation=activation, squash=squash)
    x = th.randn(*([number] if own else []), rows, 5, requires_grad=True)
    everything = [x, *(parameter for mlp in networks for parameter in mlp.parameters())]
    chosen = {"all": slice(None), "first": slice(1), "last": slice(-1, None), "every third": slice(None, None, 3)}[used]
    results = []
    one_by_one = tuple(mlp(x[k] if own else x) for k, mlp in enumerate(networks))
    for outputs in (side_by_side(networks, x), one_by_one):
        loss = sum(((k + 1) * output.sin()).sum() for k, output in enumerate(outputs[chosen]))
        assert isinstance(loss, th.Tensor)
        results.append([*outputs, *th.autograd.grad(loss, everything, allow_unused=True)])
    assert names(tuple(results[0][:number])) == {"_StackNodeBackward"}
    for value, expected in zip(*results, strict=True):
        assert (value is None) == (expected is None)  # what the loss does not depend on has no gradient
        if value is not None:
            th.testing.assert_close(value, expected, rtol=0, atol=1e-10)
    with th.no_grad():
        for value, expected in zip(side_by_side(networks, x), results[1], strict=False):
            th.testing.assert_close(value, expected, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("trained", [[0], [1], [0, 1], []], ids=str)
def test_only_the_gradients_asked_for(trained: list[int]) -> None:
    networks = mlps()
    for k, mlp in enumerate(networks):
        mlp.requires_grad_(k in trained)
    x = th.randn(12, 5, requires_grad=True)
    everything = [x, *(parameter for mlp in networks for parameter in mlp.parameters())]
    results = []
    for together in (True, False):
        outputs = side_by_side(networks, x) if together else tuple(mlp(x) for mlp in networks)
        th.min(outputs[0], outputs[1]).sum().backward()
        results.append([tensor.grad for tensor in everything])
        for tensor in everything:
            tensor.grad = None
    for value, expected in zip(*results, strict=True):
        assert (value is None) == (expected is None)
        if value is not None:
            th.testing.assert_close(value, expected, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("double_precision")
def test_products_one_by_one_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    networks, x = mlps(), th.randn(12, 5)
    expected = side_by_side(networks, x)
    monkeypatch.setattr(matmul, "_one_by_one", lambda a, b: True)
    for value, other in zip(side_by_side(networks, x), expected, strict=True):
        th.testing.assert_close(value, other, rtol=0, atol=1e-10)


def test_large_products_go_through_onednn_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "faster_through_onednn", lambda *size: True)
    a, b, c = th.zeros(2, 200, 150), th.zeros(2, 150, 160), th.zeros(2, 200, 16)
    assert matmul._one_by_one(a, b)
    assert not matmul._one_by_one(b.mT, c[:, :150])


def other_activation(networks: list[FusedMLP]) -> None:
    networks[1][1] = nn.Tanh()


def other_size(networks: list[FusedMLP]) -> None:
    networks[1] = mlps(hidden=7)[0]


def other_memory(networks: list[FusedMLP]) -> None:
    networks[1] = copy.deepcopy(networks[1])


def other_distance(networks: list[FusedMLP]) -> None:
    networks[1][0].bias.data = networks[1][0].bias.data.clone()


def hook(networks: list[FusedMLP]) -> None:
    networks[1][0].register_forward_hook(lambda module, args, output: output * 2)


def switched_off(networks: list[FusedMLP]) -> None:
    networks[0].fused = False


@pytest.mark.parametrize(
    "change", [other_activation, other_size, other_memory, other_distance, hook, switched_off], ids=lambda f: f.__name__
)
def test_unlike_or_scattered_networks_run_one_after_another(change: Any) -> None:
    networks = mlps()
    x = th.randn(12, 5)
    assert names(side_by_side(networks, x)) == {"_StackNodeBackward"}
    change(networks)
    outputs = side_by_side(networks, x)
    assert "_StackNodeBackward" not in names(outputs)
    for mlp, output in zip(networks, outputs, strict=True):
        th.testing.assert_close(output, mlp(x), rtol=0, atol=0)


def test_stale_views_are_not_used() -> None:
    networks = mlps()
    x = th.randn(12, 5)
    side_by_side(networks, x)
    for mlp in networks:
        for parameter in mlp.parameters():
            parameter.data = parameter.data * 2
    bind([parameter for mlp in networks for parameter in mlp.parameters()])
    for mlp, output in zip(networks, side_by_side(networks, x), strict=True):
        th.testing.assert_close(output, mlp(x))


def test_one_view_of_several_tensors() -> None:
    memory = th.arange(40.0)

    def parts(*offsets: int) -> list[th.Tensor]:
        return [memory[offset : offset + 6].view(2, 3) for offset in offsets]

    view = stacked(parts(0, 10, 20))
    assert view is not None
    assert th.equal(view, th.stack(parts(0, 10, 20)))
    assert stacked(parts(0, 10, 19)) is None  # not at equal distances
    assert stacked(parts(10, 0)) is None  # views cannot go backward
    assert stacked([parts(0)[0], memory.clone()[10:16].view(2, 3)]) is None  # in another piece of memory
    assert stacked([parts(0)[0], memory[10:16].view(3, 2).t()]) is None  # not in the same order
    assert stacked([parts(0)[0], memory[10:14].view(2, 2)]) is None


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("cls", [TD3X, SACX])
def test_streams_of_a_critic_run_as_one(cls: Any, engine: bool) -> None:
    own = {"policy_kwargs": {"net_arch": [16, 16]}, "learning_starts": 10, "batch_size": 8, "engine": engine}
    model = cls("MlpPolicy", RandomEnv(BOX, CONTINUOUS), **own)
    assert (Stack.of((model.critic.qf0, model.critic.qf1)) is not None) == engine
    model.learn(20)
    for critic in (model.critic, model.critic_target):
        assert (Stack.of((critic.qf0, critic.qf1)) is not None) == engine
    copied = copy.deepcopy(model.critic)
    assert not {name for name in vars(copied.qf0) if name.startswith("_known")}
    x = th.randn(8, 4), th.zeros(8, 2)
    for value, expected in zip(copied(*x), model.critic(*x), strict=True):
        th.testing.assert_close(value, expected)
