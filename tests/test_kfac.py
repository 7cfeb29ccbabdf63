"""K-FAC: its factors and steps against numbers by hand, dense Fisher matrices, least squares and another program."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch as th
from batches import flat
from torch import nn
from torch.distributions import Categorical, Normal

from sb3_ac_ext.acktr import KFAC, LayerCalls
from sb3_ac_ext.functional import kfac
from sb3_ac_ext.functional.natural_gradient import LOG_STD_FISHER

X = th.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=th.float64)
A = th.tensor([[2 / 3, 1 / 3, 2 / 3], [1 / 3, 5 / 3, 1.0], [2 / 3, 1.0, 1.0]], dtype=th.float64)
S = th.diag(th.tensor([4.0, 0.25], dtype=th.float64))
G = th.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 1.0]], dtype=th.float64)
either_inversion = pytest.mark.parametrize("inversion", ["eigen", "cholesky"])


@pytest.fixture(autouse=True)
def in_double_precision() -> Iterator[None]:
    th.set_default_dtype(th.float64)
    yield
    th.set_default_dtype(th.float32)


def normal(*shape: int, seed: int = 0) -> th.Tensor:
    return th.randn(*shape, generator=th.Generator().manual_seed(seed), dtype=th.float64)


def spd(size: int, seed: int = 0) -> th.Tensor:
    rows = normal(2 * size, size, seed=seed)
    return rows.t() @ rows / len(rows)


def vec(matrix: th.Tensor) -> th.Tensor:
    """The columns one after another."""
    return matrix.t().reshape(-1)


# Pure functions


def test_positions_are_summed_in_a_and_averaged_in_s() -> None:
    x, g = normal(5, 4, 3), normal(5, 4, 2)
    a = sum(th.outer(x[n, t], x[n, t]) for n in range(5) for t in range(4)) / 5
    s = sum(th.outer(g[n, t], g[n, t]) for n in range(5) for t in range(4)) / (5 * 4)
    th.testing.assert_close(kfac.input_factor(x), a)
    th.testing.assert_close(kfac.output_factor(g), s)
    th.testing.assert_close(kfac.input_factor(kfac.with_one(X)[:, None]), A)  # the bias is the last coordinate


def test_natural_gradients_by_hand() -> None:
    direction = kfac.precondition(G, A.inverse(), S.inverse())
    th.testing.assert_close(direction, th.tensor([[-6.75, -3.75, 9.0], [-120.0, -72.0, 156.0]]))
    assert (direction * G).sum().item() == pytest.approx(240.75)
    assert kfac.quadratic_form(direction, A, S).item() == pytest.approx(240.75)
    assert kfac.trace_ratio(A, S).item() == pytest.approx(0.72310153, abs=1e-8)
    a_inverse, s_inverse, good = kfac.cholesky_inverses(A, S, 0.1)
    shared = [[-0.32596931, -0.15511643, 0.85337585], [-2.63653535, -2.95050889, 5.01611396]]
    exact = [[-2.89310916, -1.60466940, 4.17893545], [-3.58132594, -5.44873161, 8.45448732]]
    assert good
    th.testing.assert_close(kfac.precondition(G, a_inverse, s_inverse), th.tensor(shared), rtol=0, atol=1e-8)
    direction = kfac.precondition_eigen(G, kfac.eigenbasis(A), kfac.eigenbasis(S), 0.1)
    th.testing.assert_close(direction, th.tensor(exact), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 2), (2, 5), (1, 1), (6, 6)])
def test_damped_inverses_are_those_of_the_dense_kronecker_product(inputs: int, outputs: int) -> None:
    """Exactly, or with (A + pi sqrt(lambda) I) (x) (S + sqrt(lambda) / pi I)."""
    a, s, gradient = spd(inputs), spd(outputs, seed=1), normal(outputs, inputs, seed=2)
    dense, identity = th.kron(a, s), th.eye(inputs * outputs)
    exact = kfac.precondition_eigen(gradient, kfac.eigenbasis(a), kfac.eigenbasis(s), 0.1)
    th.testing.assert_close(vec(exact), th.linalg.solve(dense + 0.1 * identity, vec(gradient)), rtol=1e-10, atol=1e-10)
    th.testing.assert_close(kfac.quadratic_form(gradient, a, s), vec(gradient) @ dense @ vec(gradient))
    pi, root = kfac.trace_ratio(a, s), math.sqrt(0.1)
    shared = th.kron(a + pi * root * th.eye(inputs), s + root / pi * th.eye(outputs))
    a_inverse, s_inverse, _ = kfac.cholesky_inverses(a, s, 0.1)
    th.testing.assert_close(vec(kfac.precondition(gradient, a_inverse, s_inverse)), th.linalg.solve(shared, vec(gradient)))
    cross = [pi * root * s.trace() * inputs, root / pi * a.trace() * outputs]  # what pi balances
    th.testing.assert_close(cross[0], cross[1])


def test_factors_that_are_not_positive() -> None:
    indefinite = th.diag(th.tensor([2.0, -1e-3]))
    values, vectors = kfac.eigenbasis(indefinite)
    th.testing.assert_close(values, th.tensor([0.0, 2.0]))
    th.testing.assert_close(vectors.abs(), th.tensor([[0.0, 1.0], [1.0, 0.0]]))
    th.testing.assert_close(kfac.eigenbasis(indefinite, shift=0.5)[0], th.tensor([0.499, 2.5]))
    for bad in (th.diag(th.tensor([1.0, -1.0])), th.full((2, 2), math.nan)):
        assert not kfac.cholesky_inverses(A, bad, 1e-3)[2]
        assert not kfac.cholesky_inverses(bad, S, 1e-3)[2]
    zero = th.zeros(2, 2)
    assert kfac.trace_ratio(A, zero).item() == kfac.trace_ratio(zero, S).item() == 1


def test_step_size_is_bounded_by_the_trust_region_with_a_factor_of_two() -> None:
    eta = kfac.step_size(th.tensor(240.75), 0.25, 0.001)
    assert eta.item() == pytest.approx(0.00288225, abs=1e-8)
    assert 0.5 * eta.item() ** 2 * 240.75 == pytest.approx(0.001)  # delta itself
    for quadratic in (0.0, -1e-12, 1e-3):
        assert kfac.step_size(th.tensor(quadratic), th.tensor(0.25), 0.001).item() == 0.25
    assert kfac.step_size(th.tensor(240.75), 0.0, 0.001).item() == 0


@pytest.mark.parametrize(
    ("kl", "scale"), [(0.0041, 1 / 1.5), (0.0039, 1.0), (0.0011, 1.0), (0.0009, 1.5), (1.0, 1 / 1.5)], ids=str
)
def test_adapted_step_scale_by_hand(kl: float, scale: float) -> None:
    assert kfac.adapted_step_scale(0.5, kl, 0.002) == pytest.approx(0.5 * scale)
    assert kfac.adapted_step_scale(0.9, 0.0, 0.002) == 1.0
    assert kfac.adapted_step_scale(1.2e-6, 1.0, 0.002) == 1e-6


def test_log_std_has_fisher_information_two() -> None:
    """By quadrature over the actions, for any mean and std."""
    z = th.linspace(-12, 12, 20001)
    for std in (0.3, 1.0, 2.0):
        log_std = th.full_like(z, math.log(std)).requires_grad_()
        log_density = Normal(0.4, log_std.exp()).log_prob(0.4 + std * z)
        (score,) = th.autograd.grad(log_density.sum(), log_std)
        weights = log_density.detach().exp() * std * (z[1] - z[0])
        assert (weights * score**2).sum().item() == pytest.approx(LOG_STD_FISHER, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}], ids=["plain", "options"])
def test_patches_are_in_the_order_of_the_weights(options: dict[str, Any]) -> None:
    conv, images = nn.Conv2d(3, 4, (3, 2), **options), normal(2, 3, 8, 9)
    rows = kfac.patches(images, conv.kernel_size, **options)
    expected = conv(images).flatten(2).transpose(1, 2)
    th.testing.assert_close(rows @ conv.weight.flatten(1).t() + conv.bias, expected)


# The optimizer's factors


def optimizer_of(*modules: nn.Module, **kwargs: Any) -> KFAC:
    own: dict[str, Any] = {"max_kl": 1e6, "lr": 1.0, "momentum": 0.0, "cold_iterations": 0, "damping": 1e-12}
    return KFAC({f"net{i}": module for i, module in enumerate(modules)}, **{**own, **kwargs})


def factors(optimizer: KFAC) -> list[tuple[th.Tensor, th.Tensor]]:
    states = [optimizer.state[block.parameters[0]] for block in optimizer.blocks]
    return [(state["input_factor"], state["output_factor"]) for state in states if "input_factor" in state]


def mlp(*sizes: int, activation: Callable[[], nn.Module] | None = nn.Tanh, bias: bool = True) -> nn.Sequential:
    th.manual_seed(0)
    layers: list[nn.Module] = []
    for i, (size, following) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(size, following, bias=bias)]
        layers += [activation()] if activation is not None and i < len(sizes) - 2 else []
    return nn.Sequential(*layers)


def gaussian(outputs: th.Tensor, std: float = 0.5) -> list[tuple[th.Tensor, th.Tensor]]:
    """Equally likely outputs with the Gaussian's mean and covariance, hence with the Fisher matrix of its mean."""
    size = outputs.shape[1]
    ends = std * math.sqrt(size) * th.cat([th.eye(size), -th.eye(size)])
    return [(th.tensor(1 / len(ends)), Normal(outputs, std).log_prob(outputs.detach() + end).sum(dim=1)) for end in ends]


def categorical(outputs: th.Tensor) -> list[tuple[th.Tensor, th.Tensor]]:
    """Each sample's probability of each action, and its log-probability."""
    log_probs = outputs.log_softmax(dim=1)
    return [(log_probs[:, i].detach().exp(), log_probs[:, i]) for i in range(outputs.shape[1])]


Likelihood = Callable[[th.Tensor], list[tuple[th.Tensor, th.Tensor]]]


def put_exact_factors(optimizer: KFAC, net: nn.Module, inputs: th.Tensor, likelihood: Likelihood) -> None:
    """The factors with the expectation over outputs, by enumerating them as samples of a larger batch."""
    cases = likelihood(net(inputs))
    n = len(inputs)
    with LayerCalls() as calls:
        outputs = net(inputs.repeat(len(cases), *[1] * (inputs.dim() - 1)))
    logs = likelihood(outputs)
    chosen = th.cat([logs[i][1][i * n : (i + 1) * n] for i in range(len(cases))])
    weights = th.cat([case[0].expand(n) for case in cases])
    # a score times sqrt(w * cases) has w times the square, so that the mean over the larger batch is the expectation
    optimizer.update_factors((weights * len(cases)).sqrt() * chosen, calls)


def dense_fisher(net: nn.Module, inputs: th.Tensor, likelihood: Likelihood) -> th.Tensor:
    """E_s E_a [grad log p grad log p^T] by autograd, in the order of the network's parameters."""
    parameters = list(net.parameters())
    size = sum(parameter.numel() for parameter in parameters)
    fisher = th.zeros(size, size)
    for row in inputs:
        for weight, log_prob in likelihood(net(row[None])):
            score = th.cat([g.flatten() for g in th.autograd.grad(log_prob.sum(), parameters, retain_graph=True)])
            fisher += weight * th.outer(score, score) / len(inputs)
    return fisher


def dense_block(fisher: th.Tensor, net: nn.Module, layer: nn.Module) -> th.Tensor:
    """The block of one layer, with the entries of [W b] in the order of columns."""
    start, places = 0, {}
    for parameter in net.parameters():
        places[id(parameter)] = th.arange(start, start + parameter.numel()).view(len(parameter), -1)
        start += parameter.numel()
    order = vec(th.cat([places[id(p)] for p in layer.parameters()], dim=1))
    return fisher[order][:, order]


def small_cnn() -> nn.Sequential:
    th.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("make", "shape", "likelihood"),
    [
        (lambda: mlp(3, 2), (6, 3), gaussian),
        (lambda: mlp(3, 2, bias=False), (6, 3), gaussian),
        (lambda: mlp(3, 4, 2, 2, activation=None), (5, 3), gaussian),
        (lambda: mlp(3, 4, 5, 3), (1, 3), gaussian),
        (lambda: mlp(3, 4, 5, 3), (1, 3), categorical),
        (lambda: mlp(3, 4, 3, activation=lambda: nn.ReLU(inplace=True)), (1, 3), categorical),
        (small_cnn, (1, 2, 3, 3), gaussian),
        (small_cnn, (1, 2, 3, 3), categorical),
    ],
    ids=["linear", "no bias", "deep linear", "Gaussian", "categorical", "in place", "convolution", "convolution categorical"],
)
def test_blocks_are_those_of_the_dense_fisher_matrix(
    make: Callable[[], nn.Module], shape: tuple[int, ...], likelihood: Likelihood
) -> None:
    """Where the factorisation holds: linear networks with a Gaussian, or one state at one position."""
    net, inputs = make(), normal(*shape)
    optimizer = optimizer_of(net)
    put_exact_factors(optimizer, net, inputs, likelihood)
    fisher = dense_fisher(net, inputs, likelihood)
    layers = [module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    for layer, (a, s) in zip(layers, factors(optimizer), strict=True):
        th.testing.assert_close(th.kron(a, s), dense_block(fisher, net, layer), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [1, 3])
def test_convolutions_are_linear_layers_at_each_position(size: int) -> None:
    """A linear layer may have positions too; their order does not matter to its factors and its step."""
    conv, images = nn.Conv2d(3, 2, size), normal(4, 3, size, 5 * size)
    conv.stride = (size, size)
    linear = nn.Linear(3 * size**2, 2)
    linear.weight.data, linear.bias.data = conv.weight.data.flatten(1).clone(), conv.bias.data.clone()
    rows = kfac.patches(images, (size, size), (size, size))
    results = []
    for net, inputs, dims in ((conv, images, (1, 2, 3)), (linear, rows, (1, 2))):
        optimizer = optimizer_of(net, damping=1e-3)
        with LayerCalls() as calls:
            outputs = net(inputs)
        optimizer.update_factors((outputs**2).sum(dim=dims), calls)
        before = flat(net)
        (outputs**3).mean().backward()
        optimizer.step()
        results.append((*factors(optimizer)[0], flat(net) - before))
        assert results[-1][-1].abs().max() > 1e-3
    th.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_factors_converge_to_the_expectation() -> None:
    """Sampled actions: S of the last layer becomes E[diag(p) - p p^T]; the error falls with the root of the number."""
    net, inputs = mlp(3, 5, 4), normal(8, 3)
    exact = optimizer_of(net)
    put_exact_factors(exact, net, inputs, categorical)
    p = net(inputs).softmax(dim=1).detach()
    th.testing.assert_close(factors(exact)[1][1], (th.diag_embed(p) - p[:, :, None] * p[:, None]).mean(dim=0))
    for n in (400, 40_000):
        optimizer = optimizer_of(net)
        with LayerCalls() as calls:
            distribution = Categorical(logits=net(inputs.repeat(n // 8, 1)))
        optimizer.update_factors(distribution.log_prob(distribution.sample()), calls)
        for (a, s), (a_exact, s_exact) in zip(factors(optimizer), factors(exact), strict=True):
            th.testing.assert_close(a, a_exact)
            error = (s - s_exact).norm() / s_exact.norm()
            assert 0 < error < 4 / math.sqrt(n)


@pytest.mark.parametrize("net", ["mlp", "cnn"])
def test_factors_are_those_of_curvlinops(net: str) -> None:
    """Dangel et al.'s K-FAC: its expectation over labels is exact ("type-2"); convolutions by KFC ("expand")."""
    curvlinops = pytest.importorskip("curvlinops")
    th.manual_seed(0)
    if net == "mlp":
        model, inputs = mlp(3, 5, 4, 3), normal(6, 3)
    else:
        layers = [nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Tanh(), nn.Flatten()]
        model, inputs = nn.Sequential(*layers, nn.Linear(8, 3)), normal(6, 2, 6, 6)
    optimizer = optimizer_of(model)
    put_exact_factors(optimizer, model, inputs, categorical)
    parameters = list(model.parameters())
    operator = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        parameters,
        [(inputs, th.zeros(6, dtype=th.long))],
        fisher_type="type-2",
        kfac_approx="expand",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    steps = [normal(*p.shape, seed=i) for i, p in enumerate(parameters)]
    products = operator @ steps
    for i, (a, s) in enumerate(factors(optimizer)):
        weight, bias = steps[2 * i], steps[2 * i + 1]
        product = s @ th.cat([weight.flatten(1), bias[:, None]], dim=1) @ a
        th.testing.assert_close(product[:, :-1].view_as(weight), products[2 * i], rtol=1e-8, atol=1e-12)
        th.testing.assert_close(product[:, -1], products[2 * i + 1], rtol=1e-8, atol=1e-12)


def test_factors_are_of_samples_and_leave_no_gradients() -> None:
    """A batch that is there twice has the same factors; a mean inside would make S smaller by the square of N."""
    net, inputs = mlp(3, 4, 2), normal(5, 3)
    once, thrice = optimizer_of(net), optimizer_of(net)
    put_exact_factors(once, net, inputs, categorical)
    put_exact_factors(thrice, net, inputs.repeat(3, 1), categorical)
    th.testing.assert_close(factors(once), factors(thrice))
    assert all(parameter.grad is None for parameter in net.parameters())
    before = copy.deepcopy(factors(once))
    (100 * net(inputs).square().mean()).backward()
    th.testing.assert_close(factors(once), before, rtol=0, atol=0)


def test_averages_start_at_the_first_value() -> None:
    net = nn.Linear(2, 2)
    optimizer = optimizer_of(net, stats_decay=0.75)
    singles = []
    for seed in (1, 2):
        single = optimizer_of(net)
        for each in (single, optimizer):
            put_exact_factors(each, net, normal(4, 2, seed=seed), categorical)
        singles.append(factors(single)[0])
    expected = [0.75 * first + 0.25 * second for first, second in zip(*singles, strict=True)]
    th.testing.assert_close(list(factors(optimizer)[0]), expected)


# Its steps


@either_inversion
@pytest.mark.parametrize(("half", "lr"), [(0.5, 1.0), (1.0, 0.5)])
def test_full_step_of_a_linear_critic_is_least_squares(inversion: str, half: float, lr: float) -> None:
    """The model's outputs have the targets' odds of N(V, 1)."""
    net, targets = nn.Linear(2, 1), th.tensor([[1.0], [-1.0], [2.0]])
    optimizer = optimizer_of(net, inversion=inversion, lr=lr)
    with LayerCalls() as calls:
        values = net(X)
    signs = th.tensor([[1.0], [-1.0], [1.0]])
    optimizer.update_factors(Normal(values, 1.0).log_prob(values.detach() + signs).sum(dim=1), calls)
    (half * (values - targets).square().mean()).backward()
    optimizer.step()
    atol = 1e-8 if inversion == "eigen" else 1e-3  # the factors take the root of the damping
    th.testing.assert_close(th.cat([net.weight[0], net.bias]), th.tensor([4.0, 1.0, -3.0]), rtol=0, atol=atol)


def policy_step(optimizer: KFAC, net: nn.Module, inputs: th.Tensor, advantages: th.Tensor) -> tuple[float, float]:
    """
    A step of the policy gradient with the expectation over actions taken exactly.

    :return: KL divergence from the old to the new policy, and the predicted one
    """
    put_exact_factors(optimizer, net, inputs, categorical)
    old = net(inputs).log_softmax(dim=1)
    optimizer.zero_grad()
    (-(old.exp() * advantages).sum(dim=1).mean()).backward()
    optimizer.step()
    new = net(inputs).log_softmax(dim=1)
    kl = (old.exp() * (old - new)).sum(dim=1).mean()
    return kl.item(), optimizer.measures["predicted_kl"].item()


def random_step(optimizer: KFAC, net: nn.Module, seed: int) -> None:
    policy_step(optimizer, net, normal(6, 3, seed=seed), normal(6, 2, seed=seed + 100))


@either_inversion
@pytest.mark.parametrize(("sizes", "near"), [((3, 4), 2), ((3, 8, 4), 4)], ids=["one layer", "two layers"])
def test_predicted_kl_is_the_bound_and_the_actual_one_is_near(sizes: tuple[int, ...], near: float, inversion: str) -> None:
    """Blocks leave out what layers do together, so that two layers may do more than they are predicted to."""
    net, inputs, advantages = mlp(*sizes), normal(16, 3), normal(16, 4, seed=1)
    delta = 1e-4
    optimizer = optimizer_of(net, lr=1e6, max_kl=delta, damping=1e-3, inversion=inversion)
    kl, predicted = policy_step(optimizer, net, inputs, advantages)
    assert 0.5 * delta < predicted <= delta * (1 + 1e-9)
    assert delta / near < kl < delta * near


def test_actual_kl_is_the_bound_where_the_fisher_matrix_is_exact() -> None:
    """One Gaussian layer with its log std: both blocks are exact, and so is the second order for small steps."""
    net, inputs, targets = nn.Linear(3, 2), normal(50, 3), normal(50, 2, seed=1)
    log_std = nn.Parameter(th.tensor([-0.5, 0.2]))
    delta = 1e-8
    optimizer = optimizer_of(net, log_std=log_std, lr=1e6, max_kl=delta)
    with LayerCalls() as calls:
        means = net(inputs)
    noise = math.sqrt(2) * th.eye(2).repeat(25, 1) * log_std.exp().detach()  # mean square 1 in sigmas, not correlated
    optimizer.update_factors(Normal(means, log_std.exp()).log_prob(means.detach() + noise).sum(dim=1), calls)
    th.testing.assert_close(factors(optimizer)[0][1], th.diag((-2 * log_std).exp()).detach())
    old = Normal(means.detach(), log_std.detach().exp())
    (-Normal(means, log_std.exp()).log_prob(targets).sum(dim=1).mean()).backward()
    optimizer.step()
    kl = th.distributions.kl_divergence(old, Normal(net(inputs), log_std.exp())).sum(dim=1).mean()
    assert optimizer.measures["predicted_kl"].item() == pytest.approx(delta, rel=1e-6)
    assert kl.item() == pytest.approx(delta, rel=1e-3)


def test_momentum_is_an_average() -> None:
    """With constant steps eta D the moves tend to eta D: (1 - momentum) (1 + momentum + ...)."""
    net = nn.Linear(2, 1)
    optimizer = optimizer_of(net, momentum=0.5, lr=0.1, stats_decay=0.0)
    moves = []
    for _ in range(3):
        put_exact_factors(optimizer, net, X, gaussian)
        net.weight.grad, net.bias.grad = th.tensor([[1.0, -2.0]]), th.tensor([0.5])
        before = flat(net)
        optimizer.step()
        moves.append(flat(net) - before)
    full = -0.1 * kfac.precondition(th.tensor([[1.0, -2.0, 0.5]]), A.inverse(), th.tensor([[0.25]]))[0]
    for move, share in zip(moves, (0.5, 0.75, 0.875), strict=True):
        th.testing.assert_close(move, share * full, rtol=1e-6, atol=1e-8)


def test_predicted_kl_is_that_of_the_move_with_momentum() -> None:
    net = mlp(3, 2)
    optimizer = optimizer_of(net, momentum=0.9, lr=1e6, max_kl=1e-4, damping=1e-3)
    predictions = [policy_step(optimizer, net, normal(16, 3), normal(16, 2, seed=1))[1] for _ in range(60)]
    assert predictions[0] == pytest.approx(0.01 * 1e-4, rel=0.05)  # (1 - momentum)^2
    assert max(predictions) <= 1e-4 * 1.01
    assert predictions[-1] > 0.5e-4


def test_cold_steps_are_plain_gradient_steps_within_the_trust_region() -> None:
    net, inputs, advantages = mlp(3, 5, 2), normal(6, 3), normal(6, 2, seed=1)
    optimizer = optimizer_of(net, momentum=0.9, lr=0.1, cold_iterations=3, damping=1e-2)
    for bounded in (False, False, True):
        if bounded:
            optimizer.param_groups[0].update(lr=1e6, max_kl=1e-4)
        before = flat(net)
        kl, predicted = policy_step(optimizer, net, inputs, advantages)
        gradient = th.cat([parameter.grad.flatten() for parameter in net.parameters()])
        eta = optimizer.measures["step_size"]
        th.testing.assert_close(flat(net), before - eta * gradient)
        assert (eta.item() == 0.1) is not bounded
        assert "damping" not in optimizer.measures
    assert predicted <= 1e-4 * (1 + 1e-9)
    assert kl < 2e-4
    before = flat(net)
    policy_step(optimizer, net, inputs, advantages)
    gradient = th.cat([parameter.grad.flatten() for parameter in net.parameters()])
    assert th.cosine_similarity(before - flat(net), gradient, dim=0) < 0.99
    assert optimizer.measures["damping"].item() == 1e-2
    ratios = [kfac.trace_ratio(a, s) for a, s in factors(optimizer)]
    th.testing.assert_close(optimizer.measures["trace_ratio"], sum(ratios) / 2)


def test_inverses_are_made_anew_in_intervals() -> None:
    net = mlp(3, 4, 2)
    optimizer = optimizer_of(net, inverse_update_interval=3, cold_iterations=2, damping=1e-3)
    state = optimizer.state[net[0].weight]
    seen = []
    for step in range(9):
        random_step(optimizer, net, step)
        seen.append(state["input_values"].clone() if "input_values" in state else None)
    changes = [first is None or not th.equal(first, second) for first, second in pairwise(seen[1:])]
    assert seen[0] is seen[1] is None
    assert changes == [True, False, False, True, False, False, True]
    th.testing.assert_close(seen[-1], kfac.eigenbasis(state["input_factor"])[0])


@either_inversion
def test_a_factor_that_cannot_be_inverted_gets_more_damping(inversion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = mlp(3, 4, 2)
    optimizer = optimizer_of(net, damping=1e-3, lr=1e6, max_kl=1e-3, inversion=inversion, stats_decay=0.999)
    put_exact_factors(optimizer, net, normal(6, 3), categorical)
    if inversion == "cholesky":
        expected = 1.0
        optimizer.state[net[0].weight]["output_factor"] -= 0.5 * th.eye(4)  # no longer positive
    else:
        expected = 0.1
        original, calls = th.linalg.eigh, []

        def fail_twice(matrix: th.Tensor) -> Any:
            calls.append(matrix)
            if len(calls) <= 2:
                raise th.linalg.LinAlgError("the algorithm failed to converge")
            return original(matrix)

        monkeypatch.setattr(th.linalg, "eigh", fail_twice)
    policy_step(optimizer, net, normal(6, 3), normal(6, 2, seed=1))
    assert optimizer.measures["damping"].item() == pytest.approx(expected)
    assert th.isfinite(flat(net)).all()


@either_inversion
def test_a_factor_that_is_not_finite_does_not_replace_inverses(inversion: str) -> None:
    net = mlp(3, 4, 2)
    optimizer = optimizer_of(net, damping=1e-3, inversion=inversion, inverse_update_interval=1)
    random_step(optimizer, net, 0)
    state = optimizer.state[net[0].weight]
    names = [name for name in state if name.startswith("input_") and name != "input_factor"]
    before = {name: state[name].clone() for name in names}
    state["input_factor"].fill_(math.nan)
    random_step(optimizer, net, 1)
    th.testing.assert_close({name: state[name] for name in names}, before, rtol=0, atol=0)
    assert optimizer.measures["damping"].item() > 1e3


# Copies and files


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "state dict"])
@either_inversion
def test_copies_go_on_exactly(copier: str, inversion: str) -> None:
    """Seven steps: between two inversions, in momentum, after the cold start."""
    kwargs = {"momentum": 0.9, "cold_iterations": 2, "inverse_update_interval": 4, "damping": 1e-3, "max_kl": 1e-3}
    net = mlp(3, 4, 2)
    optimizer = optimizer_of(net, inversion=inversion, **kwargs)
    for step in range(7):
        random_step(optimizer, net, step)
    if copier == "state dict":
        other = mlp(3, 4, 2)
        other.load_state_dict(net.state_dict())
        other_optimizer = optimizer_of(other)  # the options are in the state
        other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # nothing doubles
    elif copier == "deepcopy":
        other, other_optimizer = copy.deepcopy((net, optimizer))
    else:
        other, other_optimizer = pickle.loads(pickle.dumps((net, optimizer)))
    start = flat(net)
    for step in range(7, 16):
        random_step(other_optimizer, other, step)
    th.testing.assert_close(flat(net), start, rtol=0, atol=0)
    for step in range(7, 16):
        random_step(optimizer, net, step)
    th.testing.assert_close(flat(other), flat(net), rtol=0, atol=0)
    th.testing.assert_close(factors(other_optimizer), factors(optimizer), rtol=0, atol=0)


def test_a_state_of_an_earlier_version_has_no_options() -> None:
    optimizer = optimizer_of(nn.Linear(3, 2), damping=0.1)
    state = optimizer.state_dict()
    state["param_groups"] = [{"lr": 0.5, "iterations": 4, "params": [0, 1]}]
    optimizer.load_state_dict(state)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["iterations"], group["damping"]) == (0.5, 4, 0.1)


# Layers that it takes, and others


def test_layers_without_factors_are_named() -> None:
    class WithParameter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(th.ones(1))

    half_frozen = nn.Linear(2, 2)
    half_frozen.weight.requires_grad_(False)
    refused = {
        "memory, LSTM": nn.LSTM(3, 4),
        "words, Embedding": nn.Embedding(5, 3),
        "grouped, Conv2d (groups=2)": nn.Conv2d(4, 4, 3, groups=2),
        "circular, Conv2d": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        "same, Conv2d": nn.Conv2d(4, 4, 3, padding="same"),
        "norm, LayerNorm": nn.LayerNorm(3),
        "line, Conv1d": nn.Conv1d(2, 2, 3),
        "up, ConvTranspose2d": nn.ConvTranspose2d(2, 2, 3),
        "scaled, WithParameter (neither linear": WithParameter(),
        "half frozen, Linear (its bias is trained and its weight is not)": half_frozen,
    }
    net = nn.ModuleDict({name.partition(",")[0]: module for name, module in refused.items()})
    net["fine"] = nn.Linear(3, 4)
    with pytest.raises(NotImplementedError) as info:
        optimizer_of(net)
    assert all(f"net0.{name}" in str(info.value) for name in refused)
    assert "fine" not in str(info.value)


def test_frozen_and_unused_layers_are_left_alone() -> None:
    net = mlp(3, 4, 2)
    net.add_module("unused", nn.Linear(2, 2))
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    net.add_module("frozen", nn.LayerNorm(2).requires_grad_(False))
    running = nn.Sequential(net[0], nn.Tanh(), net[2])
    optimizer = optimizer_of(net, damping=1e-3)
    assert [block.layer for block in optimizer.blocks] == [net[2], net.unused]  # type: ignore[union-attr]
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    random_step(optimizer, running, 0)
    moved = {name for name, parameter in net.named_parameters() if not th.equal(parameter, before[name])}
    assert moved == {"2.weight"}
    assert factors(optimizer)[0][0].shape == (4, 4)  # no coordinate for a bias that stays


@pytest.mark.parametrize(
    ("frozen", "moving"),
    [
        (("0.bias",), {"0.weight", "2.weight", "2.bias"}),
        (("0.weight", "0.bias"), {"2.weight", "2.bias"}),
        (("0.weight", "0.bias", "2.weight", "2.bias"), set()),
    ],
    ids=["bias", "layer", "all"],
)
def test_what_is_frozen_later_stays(frozen: tuple[str, ...], moving: set[str]) -> None:
    net = mlp(3, 4, 2)
    optimizer = optimizer_of(net, damping=1e-3, momentum=0.5)
    random_step(optimizer, net, 0)
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    with LayerCalls() as calls:
        log_likelihood = net(normal(6, 3)).log_softmax(dim=1)[:, 0]
    optimizer.update_factors(log_likelihood, calls)
    optimizer.zero_grad()
    if log_likelihood.requires_grad:
        log_likelihood.mean().backward()
    optimizer.step()
    assert {name for name, parameter in net.named_parameters() if not th.equal(parameter, before[name])} == moving


def test_a_layer_that_runs_for_nothing_is_left_alone() -> None:
    used, idle, inputs = nn.Linear(3, 2), nn.Linear(3, 2), normal(6, 3)
    optimizer = optimizer_of(used, idle)
    before = flat(idle)
    with LayerCalls() as calls:
        outputs, _ = used(inputs), idle(inputs)
    optimizer.update_factors(outputs.log_softmax(dim=1)[:, 0], calls)
    outputs.square().mean().backward()
    optimizer.step()
    assert len(factors(optimizer)) == 1
    th.testing.assert_close(flat(idle), before, rtol=0, atol=0)


def test_shared_layers() -> None:
    """One that several networks share has one block, and the factors of all that its output does."""
    shared, first, second = nn.Linear(2, 3), nn.Linear(3, 1), nn.Linear(3, 1)
    results = []
    for calls_of_shared in (1, 2):
        optimizer = optimizer_of(nn.Sequential(shared, first), nn.Sequential(shared, second))
        assert len(optimizer.blocks) == 3
        with LayerCalls() as calls:
            features = [shared(X) for _ in range(calls_of_shared)]
            outputs = first(features[0]) * second(features[-1])
        optimizer.update_factors(outputs[:, 0], calls)
        results.append(factors(optimizer))
    th.testing.assert_close(*results)


def test_wrong_use() -> None:
    layer = nn.Linear(2, 2)
    optimizer = optimizer_of(layer)
    with LayerCalls() as calls:
        outputs = layer(layer(X))
    with pytest.raises(RuntimeError, match="runs twice, for two inputs: Linear"):
        optimizer.update_factors(outputs.sum(dim=1), calls)
    with th.no_grad(), LayerCalls() as calls:
        outputs = layer(X)
    with pytest.raises(RuntimeError, match=r"seen no layer.*with gradients enabled"):
        optimizer.update_factors(outputs.sum(dim=1), calls)
    layer(X).sum().backward()
    with pytest.raises(RuntimeError, match=r"no factors for Linear.*update_factors\(\) first"):
        optimizer.step()
    with pytest.raises(ValueError, match="closure must be None"):
        optimizer.step(lambda: 0.0)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, r"lr must be a number >= 0, got -0.1"),
        ({"max_kl": 0}, ValueError, r"max_kl must be a number >= 1e-12, got 0"),
        ({"damping": 0.0}, ValueError, r"damping must be a number >= 1e-12, got 0.0"),
        ({"stats_decay": 1.0}, ValueError, r"stats_decay must be a number in \[0, 0.999999\], got 1.0"),
        ({"momentum": -0.1}, ValueError, r"momentum must be a number in \[0, 0.999999\], got -0.1"),
        ({"inverse_update_interval": 0}, ValueError, r"inverse_update_interval must be an integer >= 1, got 0"),
        ({"cold_iterations": 1.5}, TypeError, r"cold_iterations must be an integer >= 0, got 1.5"),
        ({"inversion": "lu"}, ValueError, r"inversion must be one of 'eigen', 'cholesky', got 'lu'"),
    ],
    ids=str,
)
def test_options_out_of_range(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optimizer_of(nn.Linear(2, 2), **kwargs)
