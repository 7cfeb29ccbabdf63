"""Adam on parameters that lie in one memory, and the memory of the hand-written passes."""

import pytest
import torch as th
from torch import nn

from sb3_ac_ext.legacy.descent import Descent, FlatAdam, backward
from sb3_ac_ext.legacy.flat_tensor import bind
from sb3_ac_ext.legacy.fused_mlp import FusedLinear, FusedMLP
from sb3_ac_ext.legacy.workspace import Workspace


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)], ids=str)
def test_moments_of_dead_weights_never_become_subnormal(betas: tuple[float, float]) -> None:
    """A weight whose gradient is 0 from some step on; unsettled, its moments stay subnormal for ever."""
    th.manual_seed(0)
    networks = [FusedMLP(nn.Linear(2, 3)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [th.optim.Adam(network.parameters(), lr=1e-2, betas=betas) for network in networks]
    descents = [FlatAdam(optimizer, [network]) for optimizer, network in zip(optimizers, networks, strict=True)]
    smallest = th.finfo(th.float32).smallest_normal
    subnormal = [0, 0]
    for step in range(1100):
        x = th.tensor([[1.0, 1e-3 * (step < 5)]])
        for i, (network, descent) in enumerate(zip(networks, descents, strict=True)):
            backward(network(x).pow(2).sum(), [descent])
            descent.step()
            if i == 0:
                descent.settle()
            for state in optimizers[i].state.values():
                for moment in (state["exp_avg"], state["exp_avg_sq"]):
                    subnormal[i] += int(((moment != 0) & (moment.abs() < smallest)).sum())
    assert subnormal[0] == 0
    assert subnormal[1] > 0
    for value, expected in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert th.equal(value, expected)


def test_moments_are_kept_where_eps_could_show_them() -> None:
    network = FusedMLP(nn.Linear(2, 3))
    for eps, kept in ((1e-20, True), (1e-8, False)):
        descent = FlatAdam(th.optim.Adam(network.parameters(), eps=eps), [network])
        descent.moments[0].values.fill_(1e-33)
        for _ in range(200):
            descent.settle()
        assert bool((descent.moments[0].values > 0).all()) is kept


@pytest.mark.parametrize("offsets", [(0, 6), (6, 0), (0, 7)], ids=["one after another", "other order", "gap"])
def test_binding_moves_only_what_does_not_lie_in_order(offsets: tuple[int, int]) -> None:
    memory = th.arange(20.0)
    parameters = [nn.Parameter(memory[offset : offset + 6].view(2, 3)) for offset in offsets]
    expected = th.cat([parameter.detach().flatten() for parameter in parameters])
    flat = bind(parameters)
    assert th.equal(flat.values, expected)
    assert (flat.values.data_ptr() == memory.data_ptr()) == (offsets == (0, 6))
    flat.values += 1
    assert th.equal(th.cat([parameter.detach().flatten() for parameter in parameters]), expected + 1)


class Mixed(nn.Module):
    """Fused layers with a layer of another kind and a parameter of its own between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = FusedMLP(nn.Linear(4, 16), nn.Tanh())
        self.norm = nn.LayerNorm(16)
        self.head = FusedLinear(16, 2)
        self.scale = nn.Parameter(th.ones(2))

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.head(self.norm(self.first(x))) * self.scale


@pytest.mark.parametrize("skipped", [False, True], ids=["whole", "scale not used"])
def test_parameters_outside_of_fused_layers_join_the_flat_step(skipped: bool) -> None:
    th.manual_seed(0)
    ours, theirs = Mixed(), Mixed()
    theirs.load_state_dict(ours.state_dict())
    optimizers = [th.optim.Adam(network.parameters(), lr=1e-2) for network in (ours, theirs)]
    fused = [ours.first, ours.head]
    assert FlatAdam.obstacle(optimizers[0], fused) is None
    descents = [FlatAdam(optimizers[0], fused), Descent(optimizers[1])]
    for step in range(4):
        x = th.randn(8, 4)
        norms = []
        for network, descent in zip((ours, theirs), descents, strict=True):
            output = network.head(network.first(x)) if skipped and step == 2 else network(x)
            backward(output.pow(2).sum(), [descent])
            norms.append(descent.gradient_norm())
            descent.clip(0.5, norms[-1])
            descent.step()
        th.testing.assert_close(*norms, rtol=1e-5, atol=0)
    for value, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        th.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_a_context_within_another_gives_back_its_own_alone() -> None:
    workspace, like = Workspace(), th.zeros(1)
    with workspace.lend():
        outer = workspace.take((2, 3), like)
        with workspace.lend():
            inner = workspace.take((2, 3), like)
            workspace.give(outer)  # belongs to the other context
        again = workspace.take((2, 3), like)
        assert again is inner
        assert again is not outer
    with workspace.lend():
        assert {id(workspace.take((2, 3), like)) for _ in range(2)} == {id(outer), id(inner)}
