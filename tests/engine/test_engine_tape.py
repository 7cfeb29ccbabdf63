"""A function's list of operations, done again without rewrites that round, gives the bits of the function."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from gymnasium import spaces
from owners import numbers
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
)
from stable_baselines3.sac.policies import MultiInputPolicy as SACMultiInput
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import CnnPolicy, MultiInputPolicy, TD3Policy
from torch import nn

from sb3_ac_ext.engine.guard import tensors_in, tensors_of_helpers
from sb3_ac_ext.engine.recording import Replay
from sb3_ac_ext.engine.tape import RefusedError, Tape, UnmetError, require, tensors

State = dict[str, th.Tensor]
SHAPES = {"x": (6, 4), "y": (6, 4), "w": (3, 4), "b": (3,), "k": (2, 6, 4), "v": (2, 4, 5), "out": (6, 4)}


def fresh(seed: int = 0) -> State:
    state = {name: numbers(seed + i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}
    state["index"] = th.randint(6, (5,), generator=th.Generator().manual_seed(seed))
    state["double"] = numbers(seed + 100, 4, 4, dtype=th.float64)
    return state


def recorded(function: Callable[[], dict[str, th.Tensor]], watched: Any, rounding: bool = False) -> tuple[Replay, State, Tape]:
    """Run a function, and what does it again."""
    tape = Tape(watched)
    with tape.recording():
        outputs = function()
    outputs = {name: value.detach() for name, value in outputs.items()}
    return Replay(tape, outputs, rounding), outputs, tape


def checks(tape: Tape) -> list[th.Tensor]:
    """The booleans that the function took to be true."""
    return [operation.args[0] for operation in tape.operations if operation.function is require]


# Operations


def products(s: State) -> Any:
    hidden = th.addmm(s["b"], s["x"], s["w"].t())
    s["out"].copy_(hidden @ s["w"] + th.bmm(s["k"], s["v"])[0, :, :4])
    th.mm(s["x"], s["w"].t(), out=hidden)
    s["y"].add_(hidden.sum(dim=1, keepdim=True))
    batched = th.baddbmm(s["v"], s["k"].transpose(1, 2), s["k"] @ s["v"])
    vectors = th.outer(s["b"], s["b"]), th.dot(s["b"], s["b"]), s["w"] @ s["x"][0]
    return th.einsum("bij,bjk->ik", s["k"], s["v"]), batched, *vectors


def views(s: State) -> Any:
    rows = s["x"].view(2, 3, 4).transpose(0, 1).reshape(6, 4)  # a copy
    flat = s["x"].flatten()  # none
    flat[:4] *= 2
    s["out"].copy_(rows + s["x"].unsqueeze(0).expand(3, 6, 4).sum(0) + th.cat([s["y"][:, 2:], s["y"][:, :2]], dim=1))
    first, *_, last = s["x"].unbind()
    parts = s["y"].chunk(4, dim=0)
    sums = th.stack([part.sum() for part in parts])
    return first + last, sums, s["x"].movedim(0, 1).contiguous(), s["x"].diagonal() + s["x"][::2, 0].sum()


def views_in_place(s: State) -> Any:
    """Of inputs and of what the function makes."""
    made = s["x"] * 2
    column, rows = made[:, 1], made[2:4]
    column.add_(1)
    rows[:] = s["y"][:2]
    made.t()[0].zero_()
    made.view(3, 8)[1, ::2] -= 5
    made.diagonal().mul_(3)
    empty = th.empty(6, 4)
    empty[:3] = made[:3]
    empty[3:] = s["y"][3:]
    s["y"][:, 0].exp_()
    s["out"].view(-1)[3:9].copy_(made.flatten()[:6])
    part = th.zeros(8)
    part[2:5] = s["b"]
    part[::3] += 1
    return made, empty, part, column, made.clone().unfold(0, 2, 2).sum(-1)


def elementwise(s: State) -> Any:
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
    activations = [F.gelu, F.silu, F.mish, F.hardtanh, F.leaky_relu, F.relu6, F.softsign, F.logsigmoid, F.tanhshrink, F.relu]
    roots = [x.abs().sqrt(), x.abs().log1p(), x.expm1(), x.reciprocal(), x.sign(), x.floor(), x.round(), x.atan(), x.erf()]
    powers = x.abs() ** 1.5, 2**x, x.fmod(0.7), x % 0.3, x.atan2(s["y"])
    return th.stack([f(x) for f in activations]), th.stack(roots), *powers


def broadcast(s: State) -> Any:
    row, column, number = s["y"][0], s["x"][:, :1], s["x"][0, 0]
    total = s["x"] + row - column * number + 3 / (2 + number.abs())
    total += row
    total *= column
    largest = th.where(column > 0, row, number), th.maximum(row, column)
    return total, *largest, (s["k"] * s["x"]).sum(dim=(0, 2)), row.expand(5, 4) + row


def several_results(s: State) -> Any:
    values, indices = s["x"].max(dim=1, keepdim=True)
    parts = th.split(s["y"], 2, dim=1)
    s["out"].copy_(values + indices + th.stack([parts[0], parts[1]]).sum(0).repeat(1, 2))
    s["b"].copy_(th.stack(th._foreach_norm([s["x"], s["y"], s["w"]])))
    ordered, order = s["x"].sort(dim=0)
    largest = s["x"].topk(2, dim=1)
    variance, mean = th.var_mean(s["x"], dim=0)
    return ordered, order, largest.values, largest.indices, variance, mean, *s["y"].aminmax(), *th.frexp(s["x"])


def in_place(s: State) -> Any:
    s["x"].relu_().lerp_(s["y"], 0.25).masked_fill_(s["y"] < 0, 0.5)
    within = (s["x"] >= 0.1).logical_and_(s["x"] <= 1)
    s["y"].mul_(2).div_(s["x"] + 3).clamp_(-1, 1).tanh_()
    s["out"].copy_(th.where(within, s["y"], 0.75)).add_(th.dot(s["b"], s["b"]).sqrt(), alpha=-1)
    s["w"].addcmul_(s["w"], s["w"], value=0.1).addcdiv_(s["w"], s["w"].abs() + 1)
    th._foreach_mul_([s["k"], s["v"]], 0.5)
    th._foreach_add_([s["k"], s["v"]], 1)


def made_anew(s: State) -> Any:
    total = th.zeros_like(s["x"])
    total += s["x"]
    counts = th.ones(6, 4)
    counts[:, 0] = th.arange(6.0)
    s["out"].copy_(total + counts + th.full((6, 4), 0.5))
    made = [th.tensor([1.0, 2.0]), th.eye(2)[0], s["x"].new_zeros(2), s["x"].new_full((2,), 3), th.linspace(0, 1, 2)]
    made[0] += 1  # a constant that is written to starts anew at each replay
    return th.stack([one + s["b"][:2] for one in made]), th.full((2,), True), th.tensor(3), th.arange(2), th.empty(0)


def indices(s: State) -> Any:
    x, i = s["x"], s["index"]
    x.index_add_(0, i, s["y"][:5])
    s["y"][i] = 2.0
    s["out"].index_copy_(0, th.tensor([0, 2]), x[i[:2]])
    s["out"].scatter_(1, i[:4].unsqueeze(0) % 4, 7.0)
    by_rows = x[i], x[i, i % 4], x[:, i % 4], x.index_select(0, i), x[th.arange(5), i % 4], x[None, ..., -1], x.take(i)
    chosen = x.gather(0, i[:4].unsqueeze(0)), x.take_along_dim(x.argsort(dim=1), dim=1), x.argmax(dim=1), F.one_hot(i, 6)
    added = x.scatter_add(0, i[:4].unsqueeze(0), s["y"][:1]), x.clone().index_put((i,), s["y"][:5], accumulate=True)
    found = th.searchsorted(x[:, 0].sort().values, x[:, 1].contiguous())
    return *by_rows, *chosen, *added, found, F.embedding(i % 3, s["w"])


def masks(s: State) -> Any:
    mask = s["x"] > 0
    clone = s["x"].clone()
    clone[mask] = 0.5  # a number where it is true: the shape does not depend on it
    both = (~mask & (s["y"] < 0)).float().mean()
    return clone, s["x"].masked_fill(mask, -1), mask.sum(dim=1), mask.any(), mask.all(dim=0), both


def reductions(s: State) -> Any:
    x = s["x"]
    sums = x.sum(), x.mean(), x.std(), x.var(dim=0), x.prod(dim=1), x.norm(), x.logsumexp(1), x.cumsum(0), x.median()
    doubles = x.mean(dim=0, dtype=th.float64), x.sum(dtype=th.float64)
    counts = x.count_nonzero(), x.argmin(), x.amax(dim=(0, 1)), th.linalg.vector_norm(x, 1)
    distances = F.normalize(x, dim=1), F.cosine_similarity(x, s["y"]), th.cdist(x, s["y"])
    return *sums, *doubles, *counts, *distances, x.softmax(1), x.log_softmax(0)


def types(s: State) -> Any:
    x = s["x"]
    whole_numbers = (x * 3).long()
    floats = x.double() @ s["double"], x.half() + 1, x.bfloat16() * 2, th.add(x, s["double"][0]), x.type_as(s["double"])
    whole = whole_numbers // 2, whole_numbers % 3, whole_numbers / 2, (whole_numbers + 1.5).float(), x.to(th.int8)
    complexes = th.complex(x, s["y"]).abs(), th.fft.rfft(x, dim=0).real
    return *floats, *whole, *complexes, x.bool(), (x > 0) * x, x.float(), x.to("cpu"), (x.double() * 2).mean()


def linear_algebra(s: State) -> Any:
    square = s["x"].t() @ s["x"] + th.eye(4)
    factor = th.linalg.cholesky(square)
    values, vectors = th.linalg.eigh(square)
    solved = th.linalg.solve(square, s["x"][0]), th.cholesky_inverse(factor), square.inverse()
    return factor, values, vectors, *solved, th.linalg.det(square)


def statistics(s: State) -> Any:
    """Batch normalisation writes to its running statistics and returns something new; one of its schemas does not say so."""
    variances = s["w"][1].abs()
    new = F.batch_norm(s["x"], s["w"][0], variances, training=True)
    means = s["y"][0]
    s["out"].copy_(new + th.ops.aten._native_batch_norm_legit(s["y"], None, None, means, variances, True, 0.1, 1e-5)[0])
    F.batch_norm(s["y"], s["w"][2], th.ones(4), training=True)  # for its statistics alone
    return variances


def random(s: State) -> Any:
    s["out"].normal_(0, 2)
    s["y"].copy_(th.randn_like(s["y"]) + th.normal(s["x"], 0.1) + th.bernoulli(th.full_like(s["x"], 0.5)))
    th.rand(3)  # for nobody, but the next one is another for it
    drawn = th.rand(3), th.randint(5, (4,)), th.randperm(5), th.empty(2).exponential_()
    return *drawn, F.dropout(s["x"], 0.3), s["x"].softmax(1).multinomial(2)


def gradients(s: State) -> Any:
    w, b = s["w"].detach().requires_grad_(), s["b"].detach().requires_grad_()
    hidden = th.tanh(F.linear(s["x"], w, b))
    loss = F.mse_loss(hidden @ w, s["y"]) + F.huber_loss(hidden, hidden.detach().roll(1, 0)) + (w * w).sum()
    loss.backward()
    assert w.grad is not None and b.grad is not None
    s["w"].sub_(w.grad, alpha=0.1)
    s["b"].sub_(b.grad, alpha=0.1)
    return loss, w.grad, b.grad


def losses(s: State) -> Any:
    x = s["x"].detach().requires_grad_()
    given, labels = s["y"], s["y"].argmax(dim=1)
    found = [F.mse_loss(x, given), F.l1_loss(x, given), F.smooth_l1_loss(x, given, beta=0.3)]
    found += [F.cross_entropy(x, labels), F.nll_loss(x, labels), F.binary_cross_entropy_with_logits(x, given.sigmoid())]
    found += [F.kl_div(x, given.softmax(1), reduction="batchmean"), F.mse_loss(x, given, reduction="none").mean(1).sum()]
    found += [F.huber_loss(x, given, delta=0.3), F.soft_margin_loss(x, given.sign())]
    return th.stack(found), *(th.autograd.grad(loss, x)[0] for loss in found)


def conjugate_gradient(s: State) -> Any:
    """Of Fisher-vector products, by double backward."""
    w = s["w"].detach().requires_grad_()
    (slope,) = th.autograd.grad((s["x"] @ w.t()).square().mean(), w, create_graph=True)

    def product(v: th.Tensor) -> th.Tensor:
        return th.autograd.grad((slope * v).sum(), w, retain_graph=True)[0] + 0.1 * v

    solution, residual = th.zeros_like(w), s["w"].clone()
    direction, before = residual.clone(), residual.square().sum()
    for _ in range(4):
        along = product(direction)
        step = before / (direction * along).sum()
        solution = solution + step * direction
        residual = residual - step * along
        after = residual.square().sum()
        direction, before = residual + after / before * direction, after
    return solution


def vectorised(s: State) -> Any:
    def loss(w: th.Tensor, x: th.Tensor) -> th.Tensor:
        return th.tanh(w @ x).square().sum()

    per_sample = th.func.vmap(th.func.grad(loss), in_dims=(None, 0))(s["w"], s["x"])
    return per_sample, th.func.jacrev(loss)(s["w"], s["x"][0]), th.func.vmap(th.dot)(s["x"], s["y"])


def hooks(s: State) -> Any:
    w = s["w"].detach().requires_grad_()
    hidden = s["x"] @ w.t()
    hidden.register_hook(lambda gradient: gradient * 2 + hidden.detach())
    hidden.register_hook(lambda gradient: gradient.clamp(-1, 1))
    loss = hidden.square().mean()
    return th.autograd.grad(loss, [w, hidden])


class Scaled(th.autograd.Function):
    """Its backward pass is its own."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor, scale: float) -> th.Tensor:
        ctx.save_for_backward(x)
        ctx.scale = scale
        return x * scale

    @staticmethod
    def backward(ctx: Any, *gradients: th.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradients[0] * ctx.scale + x, None


def own_function(s: State) -> Any:
    x = s["x"].detach().requires_grad_()
    loss = Scaled.apply(x.tanh(), 3.0).square().sum()
    return loss, *th.autograd.grad(loss, x)


def accumulated(s: State) -> Any:
    """Gradients that are added up, in ``.grad`` and along two ways."""
    w = s["w"].detach().requires_grad_()
    for part in s["x"].chunk(3):
        (part @ w.t()).square().mean().backward()
    ((s["y"] @ w.t()).tanh() @ w).sum().backward()
    return w.grad


def saved(s: State) -> Any:
    """An in-place operation on what was saved for the backward pass by another one."""
    x = s["x"].detach().requires_grad_()
    y = x.exp()
    z = y * 2
    z.add_(1).relu_()
    z = z.clone()
    z[0] = 0
    return th.autograd.grad((z * y).sum(), x)


def empty_tensors(s: State) -> Any:
    nothing = s["x"][:0]
    return nothing.sum(), nothing * 2, th.cat([nothing, s["x"]]), nothing @ s["w"].t(), nothing.t()


PROGRAMS: list[Callable[[State], Any]] = [
    *(products, views, views_in_place, elementwise, broadcast, several_results, in_place, made_anew, indices, masks),
    *(reductions, types, linear_algebra, statistics, random, gradients, losses),
    *(conjugate_gradient, vectorised, hooks, own_function, accumulated, saved, empty_tensors),
]


def as_outputs(result: Any) -> State:
    return {str(i): value for i, value in enumerate(tensors(result))}


@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda function: function.__name__)
def test_operations(program: Callable[[State], Any], rounding: bool) -> None:
    """The results, and what is left of the inputs; with rewrites that round, within their bound."""
    ours, theirs = fresh(), fresh()
    th.manual_seed(0)
    replay, outputs, _ = recorded(lambda: as_outputs(program(ours)), ours.values(), rounding)
    th.manual_seed(0)
    expected = as_outputs(program(theirs))
    for step in range(4):
        if step:
            for name, value in fresh(step).items():
                ours[name].copy_(value)
                theirs[name].copy_(value)
            th.manual_seed(step)
            replay()
            state = th.get_rng_state()
            th.manual_seed(step)
            expected = as_outputs(program(theirs))
            assert th.equal(th.get_rng_state(), state)
        for found, wanted in ((outputs, expected), (ours, theirs)):
            assert found.keys() == wanted.keys()
            for name, value in found.items():
                assert value.dtype is wanted[name].dtype and value.shape == wanted[name].shape
                if rounding:
                    th.testing.assert_close(value, wanted[name].detach(), rtol=1e-5, atol=1e-5, equal_nan=True)
                else:
                    assert th.equal(value.nan_to_num(), wanted[name].nan_to_num()), (program.__name__, name, step)


# Modules


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(4, 5, num_layers=2, batch_first=True)

    def forward(self, x: th.Tensor) -> th.Tensor:
        result: th.Tensor = self.layer(x)[0]
        return result


def image_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 2, 2, stride=2), nn.Flatten(), nn.LazyLinear(3)
    )


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 1)), (6, 4)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)), (6, 4)),
    "group norm": (image_net, (2, 3, 8, 8)),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 8), nn.AlphaDropout(0.3), nn.Linear(8, 1)),
        (6, 4),
    ),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Linear(5, 1)),
        (6, 4),
    ),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True), (3, 5, 4)),
    "gru": (Recurrent, (3, 5, 4)),
    "lstm cell": (lambda: nn.LSTMCell(4, 5), (6, 4)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.MaxPool1d(2), nn.ELU(), nn.Flatten(), nn.Linear(12, 1)),
        (5, 3, 8),
    ),
}


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, mode: str) -> None:
    """Outputs, gradients and buffers."""
    make, shape = MODULES[name]
    th.manual_seed(0)
    net = make().train(mode == "training")
    net(numbers(0, *shape))  # lazy layers
    assert_replays(net, lambda module, x: tensors(module(x))[0].square().sum(), [shape])


def assert_replays(
    net: nn.Module,
    loss: Callable[[Any, Any], th.Tensor],
    shapes: list[tuple[int, ...]],
    copied: nn.Module | None = None,
) -> Tape:
    """A loss and its gradients, recorded for a module and done as they stand for its copy."""
    copied = copy.deepcopy(net) if copied is None else copied
    inputs = [numbers(i, *shape) for i, shape in enumerate(shapes)]

    def run(module: nn.Module, given: list[th.Tensor]) -> State:
        parameters = [p for p in module.parameters() if p.requires_grad]
        value = loss(module, given[0] if len(given) == 1 else given)
        found = th.autograd.grad(value, parameters, allow_unused=True)
        with th.no_grad():
            for parameter, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    parameter.sub_(gradient, alpha=1e-3)
        return {"loss": value, **{str(i): g for i, g in enumerate(found) if g is not None}}

    watched = [t for t in [*tensors_in(net.modules()), *tensors_of_helpers(net.modules()), *inputs]]
    th.manual_seed(0)
    replay, outputs, tape = recorded(lambda: run(net, inputs), watched)
    th.manual_seed(0)
    expected = run(copied, [x.clone() for x in inputs])
    for step in range(4):
        if step:
            for i, x in enumerate(inputs):
                x.copy_(numbers(10 * step + i, *x.shape))
            th.manual_seed(step)
            replay()
            th.manual_seed(step)
            expected = run(copied, [x.clone() for x in inputs])
        assert outputs.keys() == expected.keys()
        for name, value in outputs.items():
            assert th.equal(value, expected[name].detach()), (name, step)
        for (key, value), wanted in zip(net.state_dict().items(), copied.state_dict().values(), strict=True):
            assert th.equal(value, wanted), (key, step)
    assert all(bool(check) for check in checks(tape))
    return tape


# SB3's policies

BOX = spaces.Box(-1, 1, (4,))
ACTIONS = spaces.Box(-1, 1, (2,))
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
DICT = spaces.Dict({"vector": BOX, "choice": spaces.Discrete(3), "matrix": spaces.Box(-1, 1, (2, 2))})


def sac_loss(policy: Any, given: Any) -> th.Tensor:
    observations, actions = given
    own, density = policy.actor.action_log_prob(observations)
    target = th.cat(policy.critic_target(observations, own), dim=1).min(dim=1, keepdim=True).values - density.reshape(-1, 1)
    values = policy.critic(observations, actions)
    critic_loss = 0.5 * th.stack([F.mse_loss(value, target.detach()) for value in values]).sum()
    return critic_loss + (0.2 * density.mean() - th.cat(policy.critic(observations, own), dim=1).min(dim=1).values.mean())


def td3_loss(policy: Any, given: Any) -> th.Tensor:
    observations, actions = given
    noise = actions.clone().normal_(0, 0.2).clamp(-0.5, 0.5)
    next_actions = (policy.actor_target(observations) + noise).clamp(-1, 1)
    target = th.cat(policy.critic_target(observations, next_actions), dim=1).min(dim=1, keepdim=True).values.detach()
    loss: th.Tensor = sum(F.mse_loss(value, target) for value in policy.critic(observations, actions))  # type: ignore[assignment]
    return loss - policy.critic.q1_forward(observations, policy.actor(observations)).mean()


@pytest.mark.parametrize("n_critics", [1, 2, 3])
@pytest.mark.parametrize("use_sde", [False, True], ids=["", "gsde"])
def test_sac(n_critics: int, use_sde: bool) -> None:
    """With gSDE its noise is drawn in the function, as SB3's ``train`` does, and holds a graph."""

    def make() -> SACPolicy:
        th.manual_seed(0)
        return SACPolicy(BOX, ACTIONS, lambda _: 1e-3, net_arch=[16, 16], n_critics=n_critics, use_sde=use_sde)

    def loss(policy: Any, given: Any) -> th.Tensor:
        if use_sde:
            policy.actor.reset_noise()
        return sac_loss(policy, given)

    tape = assert_replays(make(), loss, [(8, 4), (8, 2)], copied=make())
    assert checks(tape)  # of the actor's distribution


def test_noise_that_is_drawn_outside() -> None:
    """By SB3's ``reset_noise``: watched it is followed; in memory that nobody watches it is refused."""
    policy = SACPolicy(BOX, ACTIONS, lambda _: 1e-3, net_arch=[16], use_sde=True)
    policy.reset_noise(8)
    x = numbers(0, 8, 4)

    def act() -> State:
        with th.no_grad():
            return {"actions": policy.actor(x)}

    watched = [x, *tensors_in(policy.modules())]
    with pytest.raises(RefusedError, match="nobody watches"):
        recorded(act, watched)
    replay, outputs, _ = recorded(act, [*watched, *tensors_of_helpers(policy.modules())])
    distribution: Any = policy.actor.action_dist
    for step in range(3):
        with th.no_grad():
            distribution.exploration_matrices.copy_(numbers(step, *distribution.exploration_matrices.shape))
        replay()
        assert th.equal(outputs["actions"], act()["actions"])


def test_td3_with_images() -> None:
    policy = CnnPolicy(IMAGE, ACTIONS, lambda _: 1e-3, net_arch=[8])
    assert_replays(policy, td3_loss, [(3, 3, 36, 36), (3, 2)])


@pytest.mark.parametrize("cls", [MultiInputPolicy, SACMultiInput])
@pytest.mark.parametrize("shared", [False, True])
def test_dict_observations(cls: Any, shared: bool) -> None:
    policy = cls(DICT, ACTIONS, lambda _: 1e-3, net_arch=[8], share_features_extractor=shared)

    def loss(module: Any, given: Any) -> th.Tensor:
        vector, matrix, choice, actions = given
        observations = {"vector": vector, "matrix": matrix, "choice": choice.abs().long().clamp(max=2)}
        return (td3_loss if isinstance(module, TD3Policy) else sac_loss)(module, (observations, actions))

    assert_replays(policy, loss, [(5, 4), (5, 2, 2), (5,), (5, 2)])


# Distributions, which look at what they are given


DISTRIBUTIONS: dict[str, Callable[[th.Tensor], Any]] = {
    "gaussian": lambda x: DiagGaussianDistribution(3).proba_distribution(x, th.zeros(3) - 0.5),
    "squashed": lambda x: SquashedDiagGaussianDistribution(3).proba_distribution(x, th.zeros(3) - 0.5),
    "categorical": lambda x: CategoricalDistribution(3).proba_distribution(x),
    "multi discrete": lambda x: MultiCategoricalDistribution([2, 1]).proba_distribution(x),
    "multi binary": lambda x: BernoulliDistribution(3).proba_distribution(x),
}


@pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_distributions(make: Callable[[th.Tensor], Any]) -> None:
    """Samples, modes, densities and divergences, with their checks."""

    def loss(net: Any, x: th.Tensor) -> th.Tensor:
        distribution = make(net(x))
        sample = distribution.get_actions()
        density = distribution.log_prob(sample.detach()).mean() + distribution.log_prob(distribution.mode().detach()).mean()
        entropy = distribution.entropy()
        other = make(net(x).detach() + 0.1)
        pairs = zip(*(np.atleast_1d(np.array(d.distribution, object)).tolist() for d in (distribution, other)), strict=True)
        divergence = sum(th.distributions.kl_divergence(a, b).mean() for a, b in pairs)
        result: th.Tensor = density + divergence + sample.float().mean() + (0 if entropy is None else entropy.mean())
        return result

    tape = assert_replays(nn.Linear(4, 3), loss, [(6, 4)])
    assert checks(tape)


@pytest.mark.parametrize("make", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_checks_of_distributions(make: Callable[[th.Tensor], Any]) -> None:
    """They are looked at in every replay, which stops there; they are not taken as true for good."""
    x, done = numbers(0, 6, 3), th.zeros(())

    def function() -> State:
        value = make(x).log_prob(make(x).mode())
        done.add_(1)
        return {"value": value}

    replay, outputs, tape = recorded(function, [x, done])
    assert checks(tape)
    for step in range(4):
        x.copy_(numbers(step, 6, 3))
        if step == 2:
            x[2, 1] = float("nan")
            with pytest.raises(UnmetError):
                replay()
        else:
            replay()
            assert th.equal(outputs["value"], make(x).log_prob(make(x).mode()))
    assert done == 4  # once by the function


def test_only_distributions_are_believed() -> None:
    class Own(th.distributions.Normal):
        def log_prob(self, value: th.Tensor) -> th.Tensor:
            if (value > 0).any():
                return value
            return super().log_prob(value)

    x = numbers(0, 3)
    with pytest.raises(RefusedError, match="__bool__ reads the values"), Tape([x]).recording():
        Own(x, 1.0).log_prob(x)


def test_one_hot_is_pytorchs() -> None:
    for indices, n in ((th.tensor([[0, 2], [1, 1]]), 3), (th.tensor(2), 4), (th.zeros(0, dtype=th.long), 2)):
        replay, outputs, _ = recorded(lambda indices=indices, n=n: {"one": F.one_hot(indices, n)}, [indices])
        expected = F.one_hot(indices, n)
        assert outputs["one"].dtype is expected.dtype and th.equal(outputs["one"], expected)
        if indices.numel():
            indices.zero_()
            replay()
            assert th.equal(outputs["one"], F.one_hot(indices, n))


# What is refused


class Named(th.Tensor):
    """A tensor of somebody's own class."""


def test_tensors_of_other_classes_are_refused() -> None:
    x = numbers(0, 3).as_subclass(Named)
    with pytest.raises(RefusedError, match="is given a Named"), Tape([x]).recording():
        th.ops.aten.mul(x, 2)


def test_operations_of_other_threads_are_not_noted() -> None:
    x, y = numbers(0, 3), numbers(1, 3)
    inside, done = threading.Event(), threading.Event()
    values: list[float] = []

    def other() -> None:
        inside.wait(10)
        y.mul_(2)
        values.append(y.sum().item())  # nor refused
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    tape = Tape([x])
    with tape.recording():
        x.add_(1)
        inside.set()
        assert done.wait(10)
        x.add_(1)
    thread.join()
    assert [operation.name for operation in tape.operations] == ["add_", "add_"]
    assert values == [y.sum().item()]


# Calls, memory


def test_pauses_within_pauses() -> None:
    x, y = numbers(0, 3), numbers(1, 3)
    tape = Tape([x])
    with tape.recording():
        with tape.pause():
            with tape.pause():
                y.add_(1)
            y.sum().item()
        x.add_(1)
        with pytest.raises(RefusedError):
            y.add_(1)
    assert [operation.name for operation in tape.operations] == ["add_"]


def test_what_is_watched_later() -> None:
    x, y = numbers(0, 3), numbers(1, 3)
    tape = Tape([x])
    with tape.recording():
        tape.watch(y)
        result = x + y
    replay = Replay(tape, {"result": result})
    y.fill_(3)
    replay()
    assert th.equal(result, x + 3)


def test_nothing_of_a_graph_is_kept() -> None:
    weight = th.ones(3, requires_grad=True)
    x = numbers(0, 3)

    def function() -> State:
        loss = (weight * x).sum()
        return {"loss": loss, "gradient": th.autograd.grad(loss, weight)[0]}

    replay, outputs, tape = recorded(function, [weight, x])
    found = [tensor for operation in tape.operations for tensor in tensors(operation[1:])]
    assert found and not any(tensor.requires_grad or tensor.grad_fn is not None for tensor in found)
    x.fill_(2)
    replay()
    assert outputs["loss"] == 6 and outputs["gradient"].tolist() == [2, 2, 2]
    assert weight.requires_grad and weight.is_leaf


def test_views_are_not_made_again() -> None:
    state = fresh()
    _, _, tape = recorded(lambda: as_outputs(views(state)), state.values())
    names = {operation.name for operation in tape.operations}
    assert names.isdisjoint(
        {"view", "transpose", "t", "expand", "slice", "select", "unsqueeze", "detach", "alias", "unbind", "split"}
    )


def test_replays_can_be_differentiated_after() -> None:
    """What is made in a replay's inference mode are no tensors that the user ever sees."""
    x, w = numbers(0, 3), nn.Parameter(numbers(1, 3))
    replay, outputs, _ = recorded(lambda: {"y": (x * w).tanh()}, [x, w])
    replay()
    (outputs["y"] * w).sum().backward()
    assert w.grad is not None and not outputs["y"].is_inference()
    with th.inference_mode():
        replay()
    assert w.requires_grad and not w.is_inference()
