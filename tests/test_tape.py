"""Operations done again by `Tape` against the function that they were noted from."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch as th
import torch.nn.functional as F
from torch import nn

from sb3_ac_ext.legacy import matmul
from sb3_ac_ext.legacy.fused_mlp import FusedMLP
from sb3_ac_ext.legacy.tape import Tape
from sb3_ac_ext.legacy.workspace import Workspace

State = dict[str, th.Tensor]
ADAM = {"beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8, "amsgrad": False, "maximize": False}


def fresh(seed: int = 0) -> State:
    generator = th.Generator().manual_seed(seed)
    shapes = {"x": (6, 4), "y": (6, 4), "w": (3, 4), "b": (3,), "k": (2, 6, 4), "v": (2, 4, 5), "out": (6, 4)}
    return {name: th.randn(*shape, generator=generator) for name, shape in shapes.items()}


def products(s: State) -> None:
    hidden = th.addmm(s["b"], s["x"], s["w"].t())
    s["out"].copy_(hidden @ s["w"] + th.bmm(s["k"], s["v"])[0, :, :4])
    th.mm(s["x"], s["w"].t(), out=hidden)
    s["y"].add_(hidden.sum(dim=1, keepdim=True))


def views(s: State) -> None:
    rows = s["x"].view(2, 3, 4).transpose(0, 1).reshape(6, 4)  # a copy
    flat = s["x"].flatten()  # none
    flat[:4] *= 2
    s["out"].copy_(rows + s["x"].unsqueeze(0).expand(3, 6, 4).sum(0) + th.cat([s["y"][:, 2:], s["y"][:, :2]], dim=1))


def elementwise(s: State) -> None:
    x = F.softplus(s["x"]) * F.elu(s["y"]) - th.where(s["x"] > 0, s["y"].exp(), s["x"].clamp(-0.5, 0.5))
    s["out"].copy_(
        x / (1 + s["y"].square())
        + th.rsub(x, 1, alpha=3)
        + (0.3 - x)
        + (0.7 - (s["x"] > 0).int())
        + th.rsub(x, s["y"])
        + x.sum()
        + th.add(x, s["y"], alpha=2)
        + th.minimum(x, s["y"])
        + F.layer_norm(x, (4,))
    )


def several_results(s: State) -> None:
    values, indices = s["x"].max(dim=1, keepdim=True)
    parts = th.split(s["y"], 2, dim=1)
    s["out"].copy_(values + indices + th.stack([parts[0], parts[1]]).sum(0).repeat(1, 2))
    s["b"].copy_(th.stack(th._foreach_norm([s["x"], s["y"], s["w"]])))


def in_place(s: State) -> None:
    s["x"].relu_().lerp_(s["y"], 0.25).masked_fill_(s["y"] < 0, 0.5)
    within = (s["x"] >= 0.1).logical_and_(s["x"] <= 1)
    s["y"].mul_(2).div_(s["x"] + 3).clamp_(-1, 1).tanh_()
    s["out"].copy_(th.where(within, s["y"], 0.75)).add_(th.dot(s["b"], s["b"]).sqrt(), alpha=-1)


def made_anew(s: State) -> None:
    total = th.zeros_like(s["x"])
    total += s["x"]
    counts = th.ones(6, 4)
    counts[:, 0] = th.arange(6.0)
    s["out"].copy_(total + counts + th.full((6, 4), 0.5))


def statistics(s: State) -> None:
    """Batch normalisation writes to its running statistics and returns something new; one of its schemas does not say so."""
    variances = s["w"][1].abs()
    new = F.batch_norm(s["x"], s["w"][0], variances, training=True)
    means = s["y"][0]
    s["out"].copy_(new + th.ops.aten._native_batch_norm_legit(s["y"], None, None, means, variances, True, 0.1, 1e-5)[0])


def gradients(s: State) -> None:
    w, b = s["w"].detach().requires_grad_(), s["b"].detach().requires_grad_()
    hidden = th.tanh(F.linear(s["x"], w, b))
    loss = F.mse_loss(hidden @ w, s["y"]) + F.huber_loss(hidden, hidden.detach().roll(1, 0)) + (w * w).sum()
    loss.backward()
    assert w.grad is not None and b.grad is not None
    s["w"].sub_(w.grad, alpha=0.1)
    s["b"].sub_(b.grad, alpha=0.1)


def random(s: State) -> None:
    s["out"].normal_(0, 2)
    s["y"].copy_(th.randn_like(s["y"]) + th.normal(s["x"], 0.1) + th.bernoulli(th.full_like(s["x"], 0.5)))


FUNCTIONS = [products, views, elementwise, several_results, in_place, made_anew, statistics, gradients, random]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_replays_do_what_the_function_does(function: Callable[[State], None]) -> None:
    ours, expected = fresh(), fresh()
    tape = Tape()
    for step in range(4):
        for state in (ours, expected):
            state["x"].copy_(fresh(step)["x"])  # in place: what is recorded has addresses
        th.manual_seed(step)
        (tape.replay if step else lambda: tape.record(lambda: function(ours)))()
        th.manual_seed(step)
        function(expected)
        for name, value in ours.items():
            assert th.equal(value, expected[name]), (name, step)
    assert tape.obstacle is None
    assert not th.equal(ours["out"], fresh()["out"]) or not th.equal(ours["w"], fresh()["w"])


def test_fused_layers_in_a_workspace() -> None:
    """Memory that is used for several results in turn."""
    th.manual_seed(0)
    network, twin = (FusedMLP(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)) for _ in range(2))
    twin.load_state_dict(network.state_dict())
    workspace, x = Workspace(), th.randn(6, 4)

    def step(network: FusedMLP) -> None:
        network.zero_grad()
        with workspace.lend():
            network(x).square().mean().backward()
        with th.no_grad():
            for parameter in network.parameters():
                assert parameter.grad is not None
                parameter.sub_(parameter.grad)

    tape = Tape()
    for i in range(3):
        x.normal_()
        (tape.replay if i else lambda: tape.record(lambda: step(network)))()
        step(twin)
        for value, expected in zip(network.parameters(), twin.parameters(), strict=True):
            th.testing.assert_close(value, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: th.equal(x, x + 1),
    ],
    ids=["item", "bool", "mask", "nonzero", "equal"],
)
def test_what_depends_on_values_is_an_obstacle(function: Callable[[th.Tensor], Any]) -> None:
    tape, total = Tape(), th.zeros(3)
    tape.record(lambda: (function(th.ones(3)), total.add_(1)))
    assert "looks at the values of a tensor" in str(tape.obstacle)
    assert total.tolist() == [1, 1, 1]  # it was done all the same


def test_products_through_onednn_stay_there(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[bool] = []
    original = matmul.onednn

    @contextmanager
    def noting() -> Any:
        with original():
            inside.append(True)
            yield

    monkeypatch.setattr(matmul, "onednn", noting)
    monkeypatch.setattr(matmul, "_through_onednn", lambda a, b: True)
    a, b, out = th.randn(4, 4), th.randn(4, 4), th.empty(4, 4)
    tape = Tape()
    tape.record(lambda: matmul.mm(a, b, out))
    a.normal_()
    tape.replay()
    assert inside == [True, True]
    assert not matmul.inside_onednn()
    th.testing.assert_close(out, a @ b)


def test_onednn_within_onednn() -> None:
    assert not matmul.inside_onednn()
    with matmul.onednn():
        with matmul.onednn():
            assert matmul.inside_onednn()
        assert matmul.inside_onednn()
    assert not matmul.inside_onednn()


def test_views_are_not_made_again() -> None:
    tape, state = Tape(), fresh()
    tape.record(lambda: views(state))
    schemas = [function._schema for function, _, _ in tape._calls if hasattr(function, "_schema")]
    assert schemas and all(schema.is_mutable for schema in schemas)


def test_functions_are_called_in_place_of_operations() -> None:
    tape, s = Tape(), fresh()

    def function() -> None:
        s["out"].copy_(th.ones_like(s["x"]) + s["x"])
        s["out"].normal_()
        s["b"].copy_((s["x"] @ s["w"].t()).sum(dim=0))
        s["out"].mul_((1 - s["x"]).sum())
        th._fused_adam_([x], [g], [m], [v], [], [count], lr=rate, **ADAM)

    x, g, m, v, count, rate = *(th.ones(3) for _ in range(4)), th.ones(()), th.tensor(0.1)
    tape.record(function)
    called = [getattr(function, "_schema", function) for function, _, _ in tape._calls]
    ours = [name for name in called if not hasattr(name, "name")]
    sums = [th.Tensor.fill_, th.add, th.Tensor.copy_, th.mm, th.sum, th.Tensor.copy_]
    assert ours == [*sums, th.sub, th.sum, th.Tensor.mul_, th._fused_adam_]
    assert [str(name.name) for name in called if hasattr(name, "name")] == ["aten::normal_"]  # a trial would draw numbers


def test_nothing_of_a_graph_is_kept() -> None:
    weight = th.ones(3, requires_grad=True)
    tape, seen = Tape(), []

    def function() -> None:
        loss = (weight * 2).sum()
        seen.append(loss)
        loss.backward()

    tape.record(function)
    tensors = [value for _, args, kwargs in tape._calls for value in (*args, *kwargs.values()) if isinstance(value, th.Tensor)]
    assert tensors and not any(tensor.requires_grad for tensor in tensors)
    tape.replay()
    assert seen[0].item() == 6
