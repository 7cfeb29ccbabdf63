"""K-FAC: its factors and steps against numbers by hand, dense Fisher matrices, least squares and another program."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch as th
from torch import nn
from torch.distributions import Categorical, Normal

from sb3_ac_ext.acktr.kfac_optimizer import KFAC
from sb3_ac_ext.functional import kfac
from sb3_ac_ext.legacy.fused_mlp import FusedLinear, FusedMLP

X = th.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=th.float64)
A = th.tensor([[2 / 3, 1 / 3, 2 / 3], [1 / 3, 5 / 3, 1.0], [2 / 3, 1.0, 1.0]], dtype=th.float64)
S = th.diag(th.tensor([4.0, 0.25], dtype=th.float64))
G = th.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 1.0]], dtype=th.float64)


def tensor(values: Any) -> th.Tensor:
    return th.tensor(values, dtype=th.float64)


def normal(*shape: int, seed: int = 0) -> th.Tensor:
    return th.randn(*shape, generator=th.Generator().manual_seed(seed), dtype=th.float64)


def spd(size: int, seed: int = 0) -> th.Tensor:
    rows = normal(2 * size, size, seed=seed)
    return rows.t() @ rows / len(rows)


def vec(matrix: th.Tensor) -> th.Tensor:
    """The columns one after another."""
    return matrix.t().reshape(-1)


@pytest.fixture(autouse=True)
def in_double_precision() -> Iterator[None]:
    th.set_default_dtype(th.float64)
    yield
    th.set_default_dtype(th.float32)


# Pure functions


def test_input_factor_has_the_bias_as_a_coordinate() -> None:
    th.testing.assert_close(kfac.input_factor(kfac.with_one(X)[:, None]), A)


def test_output_factor_is_the_mean_outer_product() -> None:
    g = normal(7, 1, 3)
    th.testing.assert_close(kfac.output_factor(g), sum(th.outer(row, row) for row in g[:, 0]) / 7)


def test_positions_are_summed_in_a_and_averaged_in_s() -> None:
    x, g = normal(5, 4, 3), normal(5, 4, 2)
    a = sum(th.outer(x[n, t], x[n, t]) for n in range(5) for t in range(4)) / 5
    s = sum(th.outer(g[n, t], g[n, t]) for n in range(5) for t in range(4)) / (5 * 4)
    th.testing.assert_close(kfac.input_factor(x), a)
    th.testing.assert_close(kfac.output_factor(g), s)


def test_natural_gradient_by_hand() -> None:
    direction = kfac.precondition(G, A.inverse(), S.inverse())
    th.testing.assert_close(direction, tensor([[-6.75, -3.75, 9.0], [-120.0, -72.0, 156.0]]))
    assert (direction * G).sum().item() == pytest.approx(240.75)
    assert kfac.quadratic_form(direction, A, S).item() == pytest.approx(240.75)


def test_trace_ratio() -> None:
    assert kfac.trace_ratio(A, S).item() == pytest.approx(0.72310153, abs=1e-8)
    zero = th.zeros(2, 2)
    assert kfac.trace_ratio(A, zero).item() == kfac.trace_ratio(zero, S).item() == 1


def test_split_damping_by_hand() -> None:
    a_inverse, s_inverse, good = kfac.cholesky_inverses(A, S, 0.1)
    assert good
    expected = [[-0.32596931, -0.15511643, 0.85337585], [-2.63653535, -2.95050889, 5.01611396]]
    th.testing.assert_close(kfac.precondition(G, a_inverse, s_inverse), tensor(expected), rtol=0, atol=1e-8)


def test_exact_damping_by_hand() -> None:
    direction = kfac.precondition_eigen(G, kfac.eigenbasis(A), kfac.eigenbasis(S), 0.1)
    expected = [[-2.89310916, -1.60466940, 4.17893545], [-3.58132594, -5.44873161, 8.45448732]]
    th.testing.assert_close(direction, tensor(expected), rtol=0, atol=1e-8)


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 2), (2, 5), (1, 1), (6, 6)])
def test_exact_damping_is_the_dense_inverse(inputs: int, outputs: int) -> None:
    a, s, gradient = spd(inputs), spd(outputs, seed=1), normal(outputs, inputs, seed=2)
    dense = th.kron(a, s) + 0.1 * th.eye(inputs * outputs)
    direction = kfac.precondition_eigen(gradient, kfac.eigenbasis(a), kfac.eigenbasis(s), 0.1)
    th.testing.assert_close(vec(direction), th.linalg.solve(dense, vec(gradient)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 2), (2, 5)])
def test_inverse_and_quadratic_form_are_those_of_the_kronecker_product(inputs: int, outputs: int) -> None:
    a, s, step = spd(inputs), spd(outputs, seed=1), normal(outputs, inputs, seed=2)
    dense = th.kron(a, s)
    th.testing.assert_close(vec(kfac.precondition(step, a.inverse(), s.inverse())), th.linalg.solve(dense, vec(step)))
    th.testing.assert_close(kfac.quadratic_form(step, a, s), vec(step) @ dense @ vec(step))


def test_split_damping_is_that_of_the_damped_kronecker_product() -> None:
    """(A + pi sqrt(lambda) I) (x) (S + sqrt(lambda) / pi I): the cross terms balance where pi is the ratio of the traces."""
    pi, root = kfac.trace_ratio(A, S), math.sqrt(0.1)
    dense = th.kron(A + pi * root * th.eye(3), S + root / pi * th.eye(2))
    a_inverse, s_inverse, _ = kfac.cholesky_inverses(A, S, 0.1)
    th.testing.assert_close(vec(kfac.precondition(G, a_inverse, s_inverse)), th.linalg.solve(dense, vec(G)))
    cross = [pi * root * S.trace() * 3, root / pi * A.trace() * 2]
    th.testing.assert_close(cross[0], cross[1])


def test_split_damping_by_eigenvalues_and_by_cholesky_agree_for_little_damping() -> None:
    a, s, gradient = spd(3), spd(4, seed=1), normal(4, 3, seed=2)
    a_inverse, s_inverse, _ = kfac.cholesky_inverses(a, s, 1e-20)
    exact = kfac.precondition_eigen(gradient, kfac.eigenbasis(a), kfac.eigenbasis(s), 1e-14)
    th.testing.assert_close(kfac.precondition(gradient, a_inverse, s_inverse), exact, rtol=1e-5, atol=0)


def test_negative_eigenvalues_count_as_zero() -> None:
    values, vectors = kfac.eigenbasis(th.diag(tensor([2.0, -1e-3])))
    th.testing.assert_close(values, tensor([0.0, 2.0]))
    th.testing.assert_close(vectors.abs(), tensor([[0.0, 1.0], [1.0, 0.0]]))
    values, _ = kfac.eigenbasis(th.diag(tensor([2.0, -1e-3])), shift=0.5)
    th.testing.assert_close(values, tensor([0.499, 2.5]))


@pytest.mark.parametrize("bad", [th.diag(tensor([1.0, -1.0])), th.full((2, 2), math.nan)], ids=["indefinite", "nan"])
def test_cholesky_tells_when_it_fails(bad: th.Tensor) -> None:
    assert not kfac.cholesky_inverses(A, bad, 1e-3)[2]
    assert not kfac.cholesky_inverses(bad, S, 1e-3)[2]


def test_step_size_is_bounded_by_the_trust_region_with_a_factor_of_two() -> None:
    assert kfac.step_size(tensor(240.75), 0.25, 0.001).item() == pytest.approx(0.00288225, abs=1e-8)
    eta = kfac.step_size(tensor(240.75), 0.25, 0.001)
    assert 0.5 * eta.item() ** 2 * 240.75 == pytest.approx(0.001)  # delta itself
    for quadratic in (0.0, -1e-12, 1e-3):
        assert kfac.step_size(tensor(quadratic), 0.25, 0.001).item() == 0.25
    assert kfac.step_size(tensor(240.75), 0.0, 0.001).item() == 0


def test_average_starts_at_the_first_value() -> None:
    average = None
    for _ in range(3):
        average = kfac.moving_average(average, A.clone(), 0.9)
    th.testing.assert_close(average, A)  # of a constant, the constant
    th.testing.assert_close(kfac.moving_average(A.clone(), 2 * A, 0.9), 1.1 * A)


def test_log_std_has_fisher_information_two() -> None:
    """By quadrature over the actions, for any mean and std."""
    z = th.linspace(-12, 12, 20001)
    for std in (0.3, 1.0, 2.0):
        log_std = th.full_like(z, math.log(std)).requires_grad_()
        log_density = Normal(0.4, log_std.exp()).log_prob(0.4 + std * z)
        (score,) = th.autograd.grad(log_density.sum(), log_std)
        weights = log_density.detach().exp() * std * (z[1] - z[0])
        assert (weights * score**2).sum().item() == pytest.approx(kfac.LOG_STD_FISHER, rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}], ids=["plain", "options"])
def test_patches_are_in_the_order_of_the_weights(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(3, 4, (3, 2), **options)
    images = normal(2, 3, 8, 9)
    rows = kfac.patches(images, conv.kernel_size, **options)
    expected = conv(images).flatten(2).transpose(1, 2)
    th.testing.assert_close(rows @ conv.weight.flatten(1).t() + conv.bias, expected)


# The optimizer


def optimizer_of(*modules: nn.Module, **kwargs: Any) -> KFAC:
    own: dict[str, Any] = {"max_kl": 1e6, "lr": 1.0, "momentum": 0.0, "cold_iterations": 0, "damping": 1e-12}
    return KFAC({f"net{i}": module for i, module in enumerate(modules)}, **{**own, **kwargs})


def factors(optimizer: KFAC) -> list[tuple[th.Tensor, th.Tensor]]:
    states = [optimizer.state[block.parameters[0]] for block in optimizer.blocks]
    return [(state["input_factor"], state["output_factor"]) for state in states if "input_factor" in state]


def mlp(*sizes: int, activation: type[nn.Module] | None = nn.Tanh, bias: bool = True) -> nn.Sequential:
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
    return [(tensor(1 / len(ends)), Normal(outputs, std).log_prob(outputs.detach() + end).sum(dim=1)) for end in ends]


def categorical(outputs: th.Tensor) -> list[tuple[th.Tensor, th.Tensor]]:
    """Each sample's probability of each action, and its log-probability."""
    log_probs = outputs.log_softmax(dim=1)
    return [(log_probs[:, i].detach().exp(), log_probs[:, i]) for i in range(outputs.shape[1])]


Likelihood = Callable[[th.Tensor], list[tuple[th.Tensor, th.Tensor]]]


def put_exact_factors(optimizer: KFAC, net: nn.Module, inputs: th.Tensor, likelihood: Likelihood) -> None:
    """The factors with the expectation over outputs, by enumerating them as samples of a larger batch."""
    cases = likelihood(net(inputs))
    n = len(inputs)
    with optimizer.recording():
        outputs = net(inputs.repeat(len(cases), *[1] * (inputs.dim() - 1)))
    logs = likelihood(outputs)
    chosen = th.cat([logs[i][1][i * n : (i + 1) * n] for i in range(len(cases))])
    weights = th.cat([case[0].expand(n) for case in cases])
    # a score times sqrt(w * cases) has w times the square, so that the mean over the larger batch is the expectation
    optimizer.update_factors((weights * len(cases)).sqrt() * chosen)


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


def dense_block(fisher: th.Tensor, net: nn.Module, layer: nn.Linear | nn.Conv2d) -> th.Tensor:
    """The block of one layer, with the entries of [W b] in the order of columns."""
    start, places = 0, {}
    for parameter in net.parameters():
        places[id(parameter)] = th.arange(start, start + parameter.numel()).view(len(parameter), -1)
        start += parameter.numel()
    order = vec(th.cat([places[id(p)] for p in layer.parameters()], dim=1))
    return fisher[order][:, order]


def layers_in(net: nn.Module) -> list[Any]:
    return [module for module in net.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def assert_blocks_are_dense(net: nn.Module, inputs: th.Tensor, likelihood: Likelihood) -> None:
    optimizer = optimizer_of(net)
    put_exact_factors(optimizer, net, inputs, likelihood)
    fisher = dense_fisher(net, inputs, likelihood)
    for layer, (a, s) in zip(layers_in(net), factors(optimizer), strict=True):
        th.testing.assert_close(th.kron(a, s), dense_block(fisher, net, layer), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_one_linear_gaussian_layer_is_exact(bias: bool) -> None:
    net, inputs = mlp(3, 2, bias=bias), normal(6, 3)
    assert_blocks_are_dense(net, inputs, gaussian)
    optimizer = optimizer_of(net)
    put_exact_factors(optimizer, net, inputs, gaussian)
    ((a, s),) = factors(optimizer)
    th.testing.assert_close(s, th.eye(2) / 0.5**2)
    joint = kfac.with_one(inputs) if bias else inputs
    th.testing.assert_close(a, joint.t() @ joint / 6)


def test_deep_linear_gaussian_networks_are_exact() -> None:
    """Derivatives by outputs do not depend on the inputs there, which is what the factorisation assumes."""
    assert_blocks_are_dense(mlp(3, 4, 2, 2, activation=None), normal(5, 3), gaussian)


@pytest.mark.parametrize("likelihood", [gaussian, categorical])
def test_deep_networks_are_exact_in_one_state(likelihood: Likelihood) -> None:
    assert_blocks_are_dense(mlp(3, 4, 5, 3), normal(1, 3), likelihood)


@pytest.mark.parametrize("likelihood", [gaussian, categorical])
def test_convolution_with_one_position_is_exact_in_one_state(likelihood: Likelihood) -> None:
    th.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))
    assert_blocks_are_dense(net, normal(1, 2, 3, 3), likelihood)


def test_convolution_with_one_position_is_a_linear_layer() -> None:
    conv, images = nn.Conv2d(2, 4, 3), normal(6, 2, 3, 3)
    linear = nn.Linear(18, 4)
    linear.weight.data, linear.bias.data = conv.weight.data.flatten(1).clone(), conv.bias.data.clone()
    directions = []
    for net, inputs in ((nn.Sequential(conv, nn.Flatten()), images), (linear, images.flatten(1))):
        optimizer = optimizer_of(net, damping=1e-3)
        put_exact_factors(optimizer, net, inputs, categorical)
        (net(inputs) ** 3).mean().backward()
        before = [p.detach().clone() for p in net.parameters()]
        optimizer.step()
        directions.append([(p - old).flatten() for p, old in zip(net.parameters(), before, strict=True)])
        assert all(step.abs().max() > 1e-3 for step in directions[-1])
    th.testing.assert_close(*directions, rtol=1e-10, atol=1e-10)


def test_convolution_of_one_pixel_is_a_linear_layer_at_each_position() -> None:
    """A linear layer may have positions too; their order does not matter to its factors."""
    conv, images = nn.Conv2d(3, 2, 1), normal(4, 3, 2, 5)
    linear = nn.Linear(3, 2)
    linear.weight.data, linear.bias.data = conv.weight.data.flatten(1).clone(), conv.bias.data.clone()
    results = []
    for net, inputs, dims in ((conv, images, (1, 2, 3)), (linear, images.flatten(2).transpose(1, 2), (1, 2))):
        optimizer = optimizer_of(net)
        with optimizer.recording():
            outputs = net(inputs)
        optimizer.update_factors((outputs**2).sum(dim=dims))
        results.append(factors(optimizer)[0])
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
        with optimizer.recording():
            outputs = net(inputs.repeat(n // 8, 1))
        distribution = Categorical(logits=outputs)
        optimizer.update_factors(distribution.log_prob(distribution.sample()))
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
    parameters = [p for p in model.parameters()]
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


def gauss_newton_step(optimizer: KFAC, net: nn.Module, inputs: th.Tensor, targets: th.Tensor, half: float = 0.5) -> None:
    """One step of regression; the model's outputs have the targets' odds of N(V, 1)."""
    with optimizer.recording():
        values = net(inputs)
    signs = (-1.0) ** th.arange(len(inputs))
    optimizer.update_factors(Normal(values, 1.0).log_prob(values.detach() + signs[:, None]).sum(dim=1))
    optimizer.zero_grad()
    (half * (values - targets).square().mean()).backward()
    optimizer.step()


@pytest.mark.parametrize("inversion", ["eigen", "cholesky"])
@pytest.mark.parametrize(("half", "lr"), [(0.5, 1.0), (1.0, 0.5)])
def test_full_step_of_a_linear_critic_is_least_squares(inversion: str, half: float, lr: float) -> None:
    net = nn.Linear(2, 1)
    optimizer = optimizer_of(net, inversion=inversion, lr=lr, damping=1e-12)
    gauss_newton_step(optimizer, net, X, tensor([[1.0], [-1.0], [2.0]]), half)
    atol = 1e-8 if inversion == "eigen" else 1e-3  # the factors take the root of the damping
    th.testing.assert_close(th.cat([net.weight[0], net.bias]), tensor([4.0, 1.0, -3.0]), rtol=0, atol=atol)


def test_damping_of_the_step() -> None:
    """(F + lambda I)^-1 g with the dense matrix of one layer."""
    net, inputs, targets = nn.Linear(3, 1), normal(6, 3), normal(6, 1, seed=1)
    optimizer = optimizer_of(net, damping=0.3)
    rows = kfac.with_one(inputs)
    before = th.cat([net.weight[0], net.bias]).detach()
    gradient = rows.t() @ (rows @ before[:, None] - targets) / 6
    gauss_newton_step(optimizer, net, inputs, targets)
    expected = before - th.linalg.solve(rows.t() @ rows / 6 + 0.3 * th.eye(4), gradient)[:, 0]
    th.testing.assert_close(th.cat([net.weight[0], net.bias]), expected)


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


@pytest.mark.parametrize("inversion", ["eigen", "cholesky"])
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
    log_std = nn.Parameter(tensor([-0.5, 0.2]))
    delta = 1e-8
    optimizer = optimizer_of(net, log_std=log_std, lr=1e6, max_kl=delta, damping=1e-12)
    with optimizer.recording():
        means = net(inputs)
    noise = math.sqrt(2) * th.eye(2).repeat(25, 1)  # mean square 1 in both dimensions and not correlated
    optimizer.update_factors(Normal(means, log_std.exp()).log_prob(means.detach() + noise * log_std.exp().detach()).sum(dim=1))
    th.testing.assert_close(factors(optimizer)[0][1], th.diag((-2 * log_std).exp()).detach())
    old = Normal(means.detach(), log_std.detach().exp())
    (-Normal(means, log_std.exp()).log_prob(targets).sum(dim=1).mean()).backward()
    optimizer.step()
    new = Normal(net(inputs), log_std.exp())
    kl = th.distributions.kl_divergence(old, new).sum(dim=1).mean()
    assert optimizer.measures["predicted_kl"].item() == pytest.approx(delta, rel=1e-6)
    assert kl.item() == pytest.approx(delta, rel=1e-3)


def test_log_std_moves_by_half_of_its_gradient() -> None:
    log_std = nn.Parameter(tensor([0.3, -1.0]))
    optimizer = optimizer_of(nn.Linear(2, 1), log_std=log_std, lr=0.1)
    log_std.grad = tensor([3.0, 1.0])
    optimizer.step()
    th.testing.assert_close(log_std, tensor([0.3 - 0.1 * 3 / 2, -1.0 - 0.1 * 1 / 2]))


def test_likelihoods_of_the_batch_are_not_averaged_away() -> None:
    """A batch that is there twice has the same factors; a mean inside would make S smaller by the square of N."""
    net, inputs = mlp(3, 4, 2), normal(5, 3)
    results = []
    for copies in (1, 3):
        optimizer = optimizer_of(net)
        put_exact_factors(optimizer, net, inputs.repeat(copies, 1), categorical)
        results.append(factors(optimizer))
    th.testing.assert_close(*results)


def test_factors_leave_no_gradients_and_losses_no_factors() -> None:
    net, inputs = mlp(3, 4, 2), normal(5, 3)
    optimizer = optimizer_of(net)
    put_exact_factors(optimizer, net, inputs, categorical)
    assert all(parameter.grad is None for parameter in net.parameters())
    before = copy.deepcopy(factors(optimizer))
    (100 * net(inputs).square().mean()).backward()
    th.testing.assert_close(factors(optimizer), before, rtol=0, atol=0)


def test_averages_of_batches() -> None:
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


@pytest.mark.parametrize("activation", [nn.Tanh, lambda: nn.ReLU(inplace=True)], ids=["fused", "in place"])
def test_fused_layers_and_activations_in_place_have_the_same_factors(activation: Callable[[], nn.Module]) -> None:
    net = mlp(3, 4, 2, activation=activation)  # type: ignore[arg-type]
    plain = copy.deepcopy(net)
    if isinstance(plain[1], nn.ReLU):
        plain[1] = nn.ReLU()
    fused = FusedMLP(*copy.deepcopy(net))
    output = nn.Sequential(copy.deepcopy(net)[:2], FusedLinear.of(copy.deepcopy(net)[2]))
    results = []
    for variant in (plain, net, fused, output):
        optimizer = optimizer_of(variant)
        put_exact_factors(optimizer, variant, normal(5, 3), categorical)
        results.append(factors(optimizer))
    for result in results[1:]:
        th.testing.assert_close(result, results[0])


# Steps one after another


def random_step(optimizer: KFAC, net: nn.Module, seed: int) -> None:
    policy_step(optimizer, net, normal(6, 3, seed=seed), normal(6, 2, seed=seed + 100))


def flat(net: nn.Module) -> th.Tensor:
    return th.cat([parameter.detach().flatten() for parameter in net.parameters()])


def test_momentum_is_an_average() -> None:
    """With constant steps eta D the moves tend to eta D: (1 - momentum) (1 + momentum + ...)."""
    net = nn.Linear(2, 1)
    optimizer = optimizer_of(net, momentum=0.5, lr=0.1, stats_decay=0.0)
    gradient = {"weight": tensor([[1.0, -2.0]]), "bias": tensor([0.5])}
    moves = []
    for _ in range(3):
        put_exact_factors(optimizer, net, X, gaussian)
        net.weight.grad, net.bias.grad = gradient["weight"].clone(), gradient["bias"].clone()
        before = flat(net)
        optimizer.step()
        moves.append(flat(net) - before)
    full = -0.1 * kfac.precondition(tensor([[1.0, -2.0, 0.5]]), A.inverse(), tensor([[0.25]]))[0]
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
    optimizer = optimizer_of(net, momentum=0.9, lr=0.1, cold_iterations=2, damping=1e-2)
    for _ in range(2):
        put_exact_factors(optimizer, net, inputs, categorical)
        optimizer.zero_grad()
        (-(net(inputs).softmax(dim=1) * advantages).sum(dim=1).mean()).backward()
        expected = flat(net) - 0.1 * th.cat([parameter.grad.flatten() for parameter in net.parameters()])
        optimizer.step()
        th.testing.assert_close(flat(net), expected)
        assert "damping" not in optimizer.measures
    before = flat(net)
    policy_step(optimizer, net, inputs, advantages)
    gradient = th.cat([parameter.grad.flatten() for parameter in net.parameters()])
    cosine = th.cosine_similarity(before - flat(net), gradient, dim=0)
    assert cosine < 0.99
    assert optimizer.measures["damping"].item() == 1e-2
    bounded = optimizer_of(mlp(3, 5, 2), lr=1e6, cold_iterations=2, max_kl=1e-4)
    kl, predicted = policy_step(bounded, mlp_of(bounded), inputs, advantages)
    assert predicted <= 1e-4 * (1 + 1e-9)
    assert kl < 2e-4


def mlp_of(optimizer: KFAC) -> nn.Sequential:
    first, second = (block.layer for block in optimizer.blocks)  # type: ignore[union-attr]
    return nn.Sequential(first, nn.Tanh(), second)


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


def test_average_over_the_layers_of_the_trace_ratio() -> None:
    net = mlp(3, 4, 2)
    optimizer = optimizer_of(net, damping=1e-3)
    random_step(optimizer, net, 0)
    expected = sum(kfac.trace_ratio(a, s) for a, s in factors(optimizer)) / 2
    th.testing.assert_close(optimizer.measures["trace_ratio"], expected)


@pytest.mark.parametrize("inversion", ["eigen", "cholesky"])
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


@pytest.mark.parametrize("inversion", ["eigen", "cholesky"])
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


# Copies, files, hooks


def hooks_of(net: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in net.modules() for kind in kinds)


def test_hooks_are_on_only_while_recording() -> None:
    net = mlp(3, 4, 2)
    optimizer = optimizer_of(net)
    assert hooks_of(net) == 0
    with optimizer.recording():
        assert hooks_of(net) == 2
    assert hooks_of(net) == 0
    with pytest.raises(ZeroDivisionError), optimizer.recording():
        _ = 1 / 0
    assert hooks_of(net) == 0
    with th.no_grad(), optimizer.recording():  # acting
        net(normal(2, 3))
    with pytest.raises(RuntimeError, match="recorded no layer"):
        optimizer.update_factors(tensor([0.0]))


@pytest.mark.parametrize("copier", ["deepcopy", "pickle", "state dict"])
@pytest.mark.parametrize("inversion", ["eigen", "cholesky"])
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
        other_optimizer = optimizer_of(other, inversion=inversion, **kwargs)
        other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # nothing doubles
    elif copier == "deepcopy":
        other, other_optimizer = copy.deepcopy((net, optimizer))
    else:
        other, other_optimizer = pickle.loads(pickle.dumps((net, optimizer)))
    assert hooks_of(other) == 0
    start = flat(net)
    for step in range(7, 16):
        random_step(other_optimizer, other, step)
    th.testing.assert_close(flat(net), start, rtol=0, atol=0)
    for step in range(7, 16):
        random_step(optimizer, net, step)
    th.testing.assert_close(flat(other), flat(net), rtol=0, atol=0)
    th.testing.assert_close(factors(other_optimizer), factors(optimizer), rtol=0, atol=0)


def test_a_loaded_state_does_not_bring_its_options() -> None:
    net = mlp(3, 2)
    old, new = optimizer_of(net, damping=0.5), optimizer_of(net, damping=0.1, lr=0.7)
    random_step(old, net, 0)
    new.load_state_dict(old.state_dict())
    assert new.damping == 0.1


# Refusals


def test_layers_without_factors_are_named() -> None:
    net = nn.ModuleDict(
        {
            "memory": nn.LSTM(3, 4),
            "words": nn.Embedding(5, 3),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "circular": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
            "same": nn.Conv2d(4, 4, 3, padding="same"),
            "norm": nn.LayerNorm(3),
            "line": nn.Conv1d(2, 2, 3),
            "up": nn.ConvTranspose2d(2, 2, 3),
            "fine": nn.Linear(3, 4),
        }
    )
    with pytest.raises(NotImplementedError) as info:
        optimizer_of(net)
    message = str(info.value)
    refused = ("memory, LSTM", "words, Embedding", "grouped, Conv2d (groups=2)", "circular, Conv2d", "same, Conv2d")
    for name in (*refused, "norm, LayerNorm", "line, Conv1d", "up, ConvTranspose2d"):
        assert f"net0.{name}" in message
    assert "fine" not in message


class WithParameter(nn.Module):
    """A parameter outside of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(th.ones(1))


def test_parameters_outside_of_layers_are_named() -> None:
    with pytest.raises(NotImplementedError, match=r"net0, WithParameter \(neither linear"):
        optimizer_of(WithParameter())


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


def test_a_layer_that_runs_for_nothing_is_left_alone() -> None:
    used, idle, inputs = nn.Linear(3, 2), nn.Linear(3, 2), normal(6, 3)
    optimizer = optimizer_of(used, idle)
    before = flat(idle)
    with optimizer.recording():
        outputs, _ = used(inputs), idle(inputs)
    optimizer.update_factors(outputs.log_softmax(dim=1)[:, 0])
    outputs.square().mean().backward()
    optimizer.step()
    assert len(factors(optimizer)) == 1
    th.testing.assert_close(flat(idle), before, rtol=0, atol=0)


def test_a_trained_bias_of_a_frozen_weight_is_refused() -> None:
    net = nn.Linear(2, 2)
    net.weight.requires_grad_(False)
    with pytest.raises(NotImplementedError, match="its bias is trained and its weight is not"):
        optimizer_of(net)


def test_a_layer_that_several_networks_share_has_one_block() -> None:
    shared = nn.Linear(2, 2)
    assert len(optimizer_of(nn.Sequential(shared), nn.Sequential(shared, nn.Linear(2, 1))).blocks) == 2


def test_wrong_use() -> None:
    layer = nn.Linear(2, 2)
    optimizer = optimizer_of(layer)
    with pytest.raises(RuntimeError, match="runs twice"), optimizer.recording():
        layer(layer(X))
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
        ({"damping": -1}, ValueError, r"damping must be .*got -1"),
        ({"stats_decay": 1.0}, ValueError, r"stats_decay must be a number in \[0, 0.999999\], got 1.0"),
        ({"momentum": 1.5}, ValueError, r"momentum must be a number in \[0, 0.999999\], got 1.5"),
        ({"inverse_update_interval": 0}, ValueError, r"inverse_update_interval must be an integer >= 1, got 0"),
        ({"inverse_update_interval": 2.5}, TypeError, r"inverse_update_interval must be an integer, got 2.5"),
        ({"cold_iterations": -1}, ValueError, r"cold_iterations must be an integer >= 0, got -1"),
        ({"inversion": "lu"}, ValueError, r"inversion must be one of 'eigen', 'cholesky', got 'lu'"),
    ],
    ids=str,
)
def test_options_out_of_range(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optimizer_of(nn.Linear(2, 2), **kwargs)
