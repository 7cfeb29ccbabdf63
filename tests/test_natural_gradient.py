"""Natural gradients against dense matrices, second derivatives, numpy, and sb3_contrib's TRPO; in float64."""

from collections.abc import Callable, Sequence
from copy import copy

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib.common.utils
import torch as th
from gymnasium import spaces
from sb3_contrib import TRPO
from stable_baselines3.common.distributions import Distribution, StateDependentNoiseDistribution, kl_divergence
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal
from torch.distributions import Distribution as TorchDistribution
from torch.distributions import kl_divergence as torch_kl

from sb3_ac_ext.functional.natural_gradient import (
    Tensors,
    backtracking_line_search,
    bernoulli_fisher,
    categorical_fisher,
    conjugate_gradient,
    fisher_product,
    flatten,
    gaussian_fisher,
    natural_step,
    trust_region_scale,
    unflatten,
)
from sb3_ac_ext.legacy.action_distributions import Categoricals, Parameters
from sb3_ac_ext.legacy.fused_mlp import FusedMLP

SIZES = (2, 3)
"""Of the categorical distributions of a MultiDiscrete policy."""

A = th.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=th.float64)
B = th.tensor([1.0, 2.0], dtype=th.float64)


def exact(actual: th.Tensor, expected: th.Tensor | list[float], tolerance: float = 1e-8) -> None:
    expected = th.as_tensor(expected, dtype=actual.dtype)
    th.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def positive_definite(size: int, condition: float, seed: int = 0) -> tuple[th.Tensor, th.Tensor]:
    """A matrix with eigenvalues from 1 down to 1 / condition, and a right-hand side."""
    generator = th.Generator().manual_seed(seed)
    basis, _ = th.linalg.qr(th.randn(size, size, generator=generator, dtype=th.float64))
    eigenvalues = th.logspace(0, -np.log10(condition), size, dtype=th.float64)
    return (basis * eigenvalues) @ basis.t(), th.randn(size, generator=generator, dtype=th.float64)


# Conjugate gradients


def test_two_iterations_solve_two_equations() -> None:
    """The first goes 1/4 along b."""
    x, product = conjugate_gradient(A.mv, B, max_iter=1)
    exact(x, [0.25, 0.5])
    exact(product, A @ x)
    x, product = conjugate_gradient(A.mv, B, max_iter=2)
    exact(x, [0.0909090909, 0.6363636364])
    exact(product, B)
    exact(conjugate_gradient(A.mv, B, max_iter=0)[0], [0, 0])


def test_solution_is_numpys() -> None:
    matrix, b = positive_definite(30, condition=10)
    x, product = conjugate_gradient(matrix.mv, b, max_iter=60, residual_tol=0)
    exact(x, th.from_numpy(np.linalg.solve(matrix.numpy(), b.numpy())), 1e-12)
    exact(product, b, 1e-12)


def test_few_iterations_on_an_ill_conditioned_matrix_are_a_truncated_solve() -> None:
    matrix, b = positive_definite(50, condition=1e3)
    errors = []
    for max_iter in (10, 50, 150):
        x, product = conjugate_gradient(matrix.mv, b, max_iter=max_iter, residual_tol=0)
        errors.append(((matrix @ x - b).norm() / b.norm()).item())
        exact(product, matrix @ x, 1e-12)
    assert errors[0] > 0.1 and errors[1] < 0.1 and errors[2] < 1e-12


@pytest.mark.parametrize(("max_iter", "residual_tol"), [(5, 1e-10), (15, 1e-10), (60, 1e-10), (60, 0.1)])
def test_equals_sb3_contribs_solver_from_zero(max_iter: int, residual_tol: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """sb3_contrib starts from a random vector; without it both stop at the same iteration and the same result."""
    monkeypatch.setattr(th, "randn_like", th.zeros_like)
    matrix, b = positive_definite(30, condition=30)
    theirs = sb3_contrib.common.utils.conjugate_gradient_solver(matrix.mv, b, max_iter, residual_tol)
    exact(conjugate_gradient(matrix.mv, b, max_iter, residual_tol)[0], theirs, 1e-12)


def test_no_random_number_is_drawn() -> None:
    state = th.get_rng_state()
    conjugate_gradient(A.mv, B)
    assert th.equal(state, th.get_rng_state())


def test_stays_at_the_first_result_whose_residual_is_small_enough() -> None:
    """The residual's square is 5 at the start, 0.3125 after one iteration."""
    exact(conjugate_gradient(A.mv, B, residual_tol=5.1)[0], [0, 0])
    exact(conjugate_gradient(A.mv, B, residual_tol=5.0)[0], [0, 0])
    exact(conjugate_gradient(A.mv, B, residual_tol=4.9)[0], [0.25, 0.5])
    exact(conjugate_gradient(A.mv, B, residual_tol=0.32)[0], [0.25, 0.5])
    exact(conjugate_gradient(A.mv, B, residual_tol=0.31)[0], [0.0909090909, 0.6363636364])
    # nothing is divided by a residual of 0, however many iterations follow
    exact(conjugate_gradient(A.mv, B, max_iter=50, residual_tol=0)[0], [0.0909090909, 0.6363636364])


def test_no_gradient_no_step() -> None:
    for damping in (0.0, 0.1):
        step, improvement, kl = natural_step(A.mv, th.zeros_like(B), delta=0.01, damping=damping)
        exact(step, [0, 0], 0)
        assert improvement == 0 and kl == 0


def test_stops_where_the_matrix_is_not_positive_definite() -> None:
    """Eigenvalues 1 and -1: the first direction, b itself, has curvature 0."""
    indefinite = th.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=th.float64)
    exact(conjugate_gradient(indefinite.mv, th.tensor([1.0, 0.0], dtype=th.float64))[0], [0, 0])
    exact(conjugate_gradient(lambda v: -v, B)[0], [0, 0])
    exact(conjugate_gradient(th.zeros_like, B)[0], [0, 0])


@pytest.mark.parametrize("broken", [th.nan, th.inf])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_product_that_is_not_finite_leaves_the_last_result(broken: float, at: int) -> None:
    matrix, b = positive_definite(10, condition=10)
    calls: list[th.Tensor] = []

    def product(v: th.Tensor) -> th.Tensor:
        assert v.isfinite().all()
        calls.append(v)
        return matrix @ v * (broken if len(calls) == at else 1)

    x, moved = conjugate_gradient(product, b, max_iter=6)
    assert len(calls) == 6
    exact(x, conjugate_gradient(matrix.mv, b, max_iter=at - 1)[0], 0)
    exact(moved, matrix @ x, 1e-12)


# The trust region


def test_step_to_the_border_of_the_trust_region() -> None:
    x, product = conjugate_gradient(A.mv, B)
    scale = trust_region_scale(x.dot(product), 0.01)
    assert scale.item() == pytest.approx(0.12110601, abs=1e-8)
    exact(scale * x, [0.01100964, 0.07706746])
    exact(0.5 * (scale * x) @ A @ (scale * x), th.tensor(0.01), 1e-9)


@pytest.mark.parametrize("curvature", [0.0, -1.0, th.nan, th.inf, -th.inf, 1e-320])
def test_no_step_along_a_direction_without_a_curvature(curvature: float) -> None:
    assert trust_region_scale(th.tensor(curvature, dtype=th.float64), 0.01) == 0


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_step_promises_what_the_quadratic_model_gives(damping: float) -> None:
    fisher, gradient = positive_definite(12, condition=20)
    damped = fisher + damping * th.eye(12, dtype=th.float64)
    step, improvement, kl = natural_step(fisher.mv, gradient, delta=0.02, damping=damping, max_iter=40, residual_tol=0)
    direction = th.linalg.solve(damped, gradient)
    exact(step, direction * (0.04 / (direction @ damped @ direction)).sqrt(), 1e-10)
    exact(0.5 * step @ damped @ step, th.tensor(0.02), 1e-9)
    exact(kl, 0.5 * step @ fisher @ step, 1e-10)
    exact(improvement, gradient @ step, 1e-12)
    assert improvement > 0  # uphill
    assert (kl < 0.0199) == (damping > 0)  # the damping's share is not spent on the policy


def test_step_that_is_not_finite_is_none() -> None:
    gradient = th.tensor([1.0, th.nan], dtype=th.float64)
    step, improvement, _ = natural_step(A.mv, gradient, delta=0.01, damping=0.1)
    exact(step, [0, 0], 0)
    assert not improvement > 0  # a line search refuses it


# Fisher matrices of the distributions


def hessian_of_kl(distribution: Callable[[th.Tensor], TorchDistribution], at: th.Tensor, old_first: bool) -> th.Tensor:
    def divergence(x: th.Tensor) -> th.Tensor:
        pair = distribution(at), distribution(x)
        return torch_kl(*(pair if old_first else pair[::-1])).sum()

    return th.autograd.functional.hessian(divergence, at)


LOGITS = th.tensor([[0.3, -1.2, 2.0, 0.1, -0.4]], dtype=th.float64)


def several_categoricals(logits: th.Tensor) -> list[Categorical]:
    return [Categorical(logits=part) for part in logits.split(SIZES, dim=1)]


@pytest.mark.parametrize("old_first", [True, False], ids=["KL(old, new)", "KL(new, old)"])
def test_products_with_the_fisher_matrix_of_each_distribution(old_first: bool) -> None:
    """The Hessian of either KL divergence, column by column, is the product with the unit vectors."""
    unit = th.eye(5, dtype=th.float64)
    probs = LOGITS.softmax(dim=1)

    def hessian(distribution: Callable[[th.Tensor], TorchDistribution], at: th.Tensor = LOGITS[0]) -> th.Tensor:
        return hessian_of_kl(distribution, at, old_first)

    exact(categorical_fisher(unit, probs.expand(5, 5)), hessian(lambda x: Categorical(logits=x)), 1e-12)
    exact(categorical_fisher(unit, probs.expand(5, 5)), probs.diag_embed()[0] - probs.t() @ probs, 1e-12)
    exact(bernoulli_fisher(unit, LOGITS.sigmoid()), hessian(lambda x: Independent(Bernoulli(logits=x), 1)), 1e-12)

    parts = th.cat([distribution.probs for distribution in several_categoricals(LOGITS)], dim=1)
    blocks = [hessian_of_kl(lambda x: Categorical(logits=x), part, old_first) for part in LOGITS[0].split(SIZES)]
    several = Categoricals(SIZES).fisher(Parameters(parts.log().expand(5, 5)), Parameters(unit))
    exact(several.outputs, th.block_diag(*blocks), 1e-12)

    log_std = th.tensor([-0.7, 0.4], dtype=th.float64)
    statistics = th.cat([LOGITS[0, :2], log_std])
    dense = hessian(lambda x: Independent(Normal(x[:2], x[2:].exp()), 1), statistics)
    columns = gaussian_fisher(th.eye(4, dtype=th.float64)[:, :2], th.eye(4, dtype=th.float64)[:, 2:], log_std)
    exact(th.cat(columns, dim=1), dense, 1e-12)
    exact(dense, th.diag(th.cat([(-2 * log_std).exp(), th.full((2,), 2.0, dtype=th.float64)])), 1e-12)


@pytest.mark.parametrize("size", [1e100, th.inf, th.nan])
def test_no_step_where_the_direction_is_not_finite(size: float) -> None:
    """With a curvature of 1e-300 the solution for 1e100 is more than a number can be."""
    step, _, _ = natural_step(lambda v: 1e-300 * v, th.full((3,), size, dtype=th.float64), delta=0.01, damping=0.0)
    exact(step, th.zeros(3), 0)


# Fisher matrices of policies

Head = Callable[[th.Tensor], th.Tensor]


def mlp(activation: type[nn.Module], outputs: int) -> nn.Sequential:
    th.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, outputs)).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.8)
    return net


OBSERVATIONS = th.randn(7, 3, generator=th.Generator().manual_seed(5), dtype=th.float64)

POLICIES: dict[str, tuple[int, Callable[[th.Tensor], list[TorchDistribution]], Callable[[th.Tensor], Head]]] = {
    "Gaussian": (
        2,
        lambda out: [Independent(Normal(out, 0.6), 1)],
        lambda out: lambda t: gaussian_fisher(t, t, th.full((2,), np.log(0.6), dtype=th.float64))[0],
    ),
    "categorical": (
        3,
        lambda out: [Categorical(logits=out)],
        lambda out: lambda t: categorical_fisher(t, out.softmax(dim=1)),
    ),
    "several categoricals": (
        5,
        several_categoricals,
        lambda out: lambda t: Categoricals(SIZES).fisher(Parameters(out), Parameters(t)).outputs,
    ),
    "Bernoulli": (
        2,
        lambda out: [Independent(Bernoulli(logits=out), 1)],
        lambda out: lambda t: bernoulli_fisher(t, out.sigmoid()),
    ),
}


def columns(product: Callable[[th.Tensor], th.Tensor], size: int) -> th.Tensor:
    return th.stack([product(unit) for unit in th.eye(size, dtype=th.float64)], dim=1)


def second_derivatives(kl: th.Tensor, parameters: list[nn.Parameter]) -> th.Tensor:
    gradient = flatten(th.autograd.grad(kl, parameters, create_graph=True))
    return th.stack([flatten(th.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True)) for g in gradient])


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("name", POLICIES)
def test_product_for_an_mlp_is_the_dense_fisher_matrix(name: str, activation: type[nn.Module]) -> None:
    """Against mean_s J^T F_d J, and against the second derivatives of both KL divergences at the old policy."""
    outputs, distributions, head_at = POLICIES[name]
    net = mlp(activation, outputs)
    parameters = list(net.parameters())
    size = sum(parameter.numel() for parameter in parameters)
    head = head_at(net(OBSERVATIONS).detach())
    fisher = columns(fisher_product([net(OBSERVATIONS)], parameters, lambda moved: [head(*moved)]), size)

    old = distributions(net(OBSERVATIONS).detach())
    new = distributions(net(OBSERVATIONS))
    for pairs in (zip(old, new, strict=True), zip(new, old, strict=True)):
        kl = sum(torch_kl(*pair) for pair in pairs).mean()
        exact(fisher, second_derivatives(kl, parameters), 1e-10)

    rows = net(OBSERVATIONS)
    jacobians = th.stack(
        [
            th.stack([flatten(th.autograd.grad(y, parameters, retain_graph=True, materialize_grads=True)) for y in row])
            for row in rows
        ]
    )  # (B, D, P)
    blocks = columns(lambda v: head(v.expand(len(rows), -1)).flatten(), outputs).view(len(rows), outputs, outputs)
    exact(fisher, th.einsum("bdp,bde,beq->pq", jacobians, blocks, jacobians) / len(rows), 1e-10)
    exact(fisher, fisher.t(), 1e-12)
    assert th.linalg.eigvalsh(fisher).min() > -1e-12


def test_fisher_matrix_is_the_covariance_of_the_score() -> None:
    """Its definition, exact for a categorical policy: the mean over states and actions of grad log pi grad log pi^T."""
    outputs, _, head_at = POLICIES["categorical"]
    net = mlp(nn.Tanh, outputs)
    parameters = list(net.parameters())
    log_probs = net(OBSERVATIONS).log_softmax(dim=1)
    expected: th.Tensor | float = 0.0
    for log_prob in log_probs.flatten():
        score = flatten(th.autograd.grad(log_prob, parameters, retain_graph=True))
        expected = expected + log_prob.detach().exp() * score.outer(score) / len(OBSERVATIONS)
    head = head_at(net(OBSERVATIONS).detach())
    product = fisher_product([net(OBSERVATIONS)], parameters, lambda moved: [head(*moved)])
    fisher = columns(product, len(score))
    exact(fisher, expected, 1e-10)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_product_for_a_fused_network_is_that_for_its_layers(activation: type[nn.Module]) -> None:
    net = mlp(activation, 3)
    fused = FusedMLP(*net)
    assert fused.obstacle is None
    parameters = list(net.parameters())
    vector = th.randn(sum(parameter.numel() for parameter in parameters), dtype=th.float64)
    ours, expected = (fisher_product([n(OBSERVATIONS)], parameters, lambda moved: moved)(vector) for n in (fused, net))
    exact(ours, expected, 1e-12)


def test_arguments_are_left_alone() -> None:
    net = mlp(nn.Tanh, 3)
    parameters = list(net.parameters())
    vector = th.ones(sum(parameter.numel() for parameter in parameters), dtype=th.float64)
    before = flatten(parameters).clone()
    product = fisher_product([net(OBSERVATIONS)], parameters, lambda moved: moved)
    with th.no_grad():
        first = product(vector)
        exact(product(vector), first, 0)  # the graph is kept
        exact(product(2 * vector), 2 * first, 1e-12)
    conjugate_gradient(A.mv, B)
    assert not first.requires_grad
    assert all(parameter.grad is None for parameter in parameters)
    exact(flatten(parameters), before, 0)
    exact(vector, th.ones_like(vector), 0)
    exact(B, [1, 2], 0)


@pytest.mark.parametrize("of_the_state", [False, True], ids=["log std a parameter", "log std of the state"])
def test_product_for_a_gaussian_whose_spread_is_learned(of_the_state: bool) -> None:
    """Dense, against the second derivatives of both divergences; with a parameter, its block is 2 I."""
    net, noise = mlp(nn.Tanh, 2), nn.Parameter(th.tensor([-0.7, 0.2], dtype=th.float64))
    parameters = [*net.parameters(), noise]
    mean = net(OBSERVATIONS)
    # of the state as in generalised state-dependent exploration: squared features weigh the variances
    log_std = 0.5 * (mean.detach() ** 2 @ (2 * noise).exp().diag()).log() if of_the_state else noise.expand_as(mean)
    size = sum(parameter.numel() for parameter in parameters)
    product = fisher_product([mean, log_std], parameters, lambda moved: gaussian_fisher(*moved, log_std.detach()))
    fisher = columns(product, size)

    old, new = (Independent(Normal(m, s.exp()), 1) for m, s in ((mean.detach(), log_std.detach()), (mean, log_std)))
    for pair in ((old, new), (new, old)):
        exact(fisher, second_derivatives(torch_kl(*pair).mean(), parameters), 1e-10)
    if not of_the_state:
        exact(fisher[-2:, -2:], 2 * th.eye(2, dtype=th.float64), 1e-12)
        exact(fisher[:-2, -2:], th.zeros(size - 2, 2), 0)


@pytest.mark.parametrize("name", ["Gaussian", "categorical"])
def test_a_small_step_moves_the_policy_as_far_as_predicted(name: str) -> None:
    outputs, distributions, head_at = POLICIES[name]
    net = mlp(nn.Tanh, outputs)
    parameters = list(net.parameters())
    old = distributions(net(OBSERVATIONS).detach())[0]
    head = head_at(net(OBSERVATIONS).detach())
    product = fisher_product([net(OBSERVATIONS)], parameters, lambda moved: [head(*moved)])
    weights = th.randn(len(OBSERVATIONS), outputs, generator=th.Generator().manual_seed(2), dtype=th.float64)
    gradient = flatten(th.autograd.grad((net(OBSERVATIONS) * weights).mean(), parameters))
    delta = 1e-4
    step, improvement, kl = natural_step(product, gradient, delta, damping=0.1)
    before = (net(OBSERVATIONS) * weights).mean().item()
    with th.no_grad():
        for parameter, part in zip(parameters, unflatten(step, parameters), strict=True):
            parameter.add_(part)
        moved = net(OBSERVATIONS)
    assert 0 < kl < delta
    assert torch_kl(old, distributions(moved)[0]).mean().item() == pytest.approx(kl.item(), rel=0.2)
    assert (moved * weights).mean().item() - before == pytest.approx(improvement.item(), rel=0.2)


# sb3_contrib's TRPO


class Spaces(gym.Env):
    """An environment that is only there for its spaces."""

    def __init__(self, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = spaces.Box(-np.ones(3), np.ones(3), dtype=np.float64), action_space


def statistics_of(distribution: Distribution) -> list[th.Tensor]:
    inner = distribution.distribution
    return [inner.mean, inner.stddev.log()] if isinstance(inner, Normal) else [inner.logits]


@pytest.mark.parametrize("kind", ["Gaussian", "gSDE", "categorical"])
def test_direction_is_that_of_sb3_contribs_trpo(kind: str, double_precision: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Products and conjugate gradients on the same policy, states, actions and advantages.

    For Gaussians its divergence is the mean over the action's dimensions, where the policy's is the sum: as if radius and
    damping were so many times as large.
    """
    monkeypatch.setattr(th, "randn_like", th.zeros_like)  # its solver starts there
    action_space = spaces.Discrete(3) if kind == "categorical" else spaces.Box(-1, 1, (2,))
    trpo = TRPO("MlpPolicy", Spaces(action_space), use_sde=kind == "gSDE", seed=3, device="cpu", cg_damping=0.05)
    policy = trpo.policy.double()
    observations = th.randn(40, 3, generator=th.Generator().manual_seed(4), dtype=th.float64)
    advantages = th.randn(40, generator=th.Generator().manual_seed(6), dtype=th.float64)
    if kind == "gSDE":
        assert isinstance(policy.action_dist, StateDependentNoiseDistribution)
        policy.log_std.data.fill_(-0.5)
        policy.reset_noise()
    with th.no_grad():
        old = copy(policy.get_distribution(observations))  # as it does itself
        actions = old.get_actions()
        old_log_prob = old.log_prob(actions)
    distribution = policy.get_distribution(observations)
    objective = (advantages * (distribution.log_prob(actions) - old_log_prob).exp()).mean()
    divergence = kl_divergence(distribution, old).mean()
    actor, gradient, grad_kl, _ = trpo._compute_actor_grad(divergence, objective)

    def theirs(v: th.Tensor) -> th.Tensor:
        return trpo.hessian_vector_product(actor, grad_kl, v).detach()

    def head(moved: Tensors) -> Sequence[th.Tensor]:
        old_statistics = statistics_of(old)
        if kind == "categorical":
            return [categorical_fisher(*moved, old_statistics[0].softmax(dim=1))]
        return gaussian_fisher(*moved, old_statistics[1])

    ours = fisher_product(statistics_of(policy.get_distribution(observations)), actor, head)
    probe = th.randn(gradient.shape, generator=th.Generator().manual_seed(7), dtype=th.float64)
    dimensions = 1 if kind == "categorical" else 2
    exact(ours(probe) / dimensions + 0.05 * probe, theirs(probe), 1e-10)
    expected = sb3_contrib.common.utils.conjugate_gradient_solver(theirs, gradient, max_iter=15)
    expected = expected * (2 * 0.01 / (expected @ theirs(expected))).sqrt()
    step, *_ = natural_step(ours, gradient, delta=0.01 * dimensions, damping=0.05 * dimensions, max_iter=15)
    assert (step - expected).norm() < 1e-8 * step.norm()


# The line search


def search(
    kls: list[float], gains: list[float], expected: float = 1.0, **options: float
) -> tuple[tuple[float, float, float], list[float]]:
    """Its result, and the scales it tried."""
    tried: list[float] = []

    def evaluate(scale: float) -> tuple[th.Tensor, th.Tensor]:
        tried.append(scale)
        return th.tensor(kls[len(tried) - 1]), th.tensor(gains[len(tried) - 1])

    found = backtracking_line_search(evaluate, th.tensor(expected), 0.5, 0.5, max_iter=len(kls), **options)
    return (found.scale, found.kl.item(), found.improvement.item()), tried


@pytest.mark.parametrize(
    ("kls", "gains", "accepted"),
    [
        ([0.5, 0.1, 0.1], [1.0, 2.0, 3.0], 0),  # on the border, and not the best
        ([0.6, 0.5, 0.1], [9.0, 0.1, 3.0], 1),
        ([0.1, 0.1, 0.1], [-1.0, 0.0, 0.1], 2),  # no gain is not enough
        ([th.nan, 0.1, 0.1], [1.0, 0.1, 0.1], 1),
        ([0.1, 0.1, 0.1], [th.nan, 0.1, 0.1], 1),
        ([th.inf, 0.1, 0.1], [th.inf, th.inf, 0.1], 1),
    ],
)
def test_first_step_inside_the_region_that_improves(kls: list[float], gains: list[float], accepted: int) -> None:
    found, tried = search(kls, gains)
    assert found == pytest.approx((0.5**accepted, kls[accepted], gains[accepted]))
    assert tried == [0.5**j for j in range(accepted + 1)]


@pytest.mark.parametrize(
    ("kls", "gains"), [([0.6, 0.6], [1.0, 1.0]), ([0.1, 0.1], [-1.0, -0.1]), ([th.nan] * 2, [th.nan] * 2)]
)
def test_no_step_where_none_is_good(kls: list[float], gains: list[float]) -> None:
    found, tried = search(kls, gains)
    assert found == (0, 0, 0)
    assert tried == [1, 0.5]


def test_share_of_the_expected_improvement_that_a_step_must_keep() -> None:
    """A whole step promises 2, half a step 1, a quarter 0.5."""
    gains = [0.9, 0.49, 0.25]
    for ratio, accepted in ((0.0, 0), (0.44, 0), (0.46, 1), (0.495, 2)):
        found, _ = search([0.1] * 3, gains, expected=2.0, accept_ratio=ratio)
        assert found[0] == 0.5**accepted, ratio
    assert search([0.1] * 3, gains, expected=2.0, accept_ratio=0.6)[0][0] == 0


def test_line_search_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_iter must be >= 1, got 0"):
        backtracking_line_search(lambda scale: (th.zeros(()), th.ones(())), 1.0, 0.5, max_iter=0)


# Flat vectors


def test_flat_vectors_keep_order_and_shapes() -> None:
    tensors = [th.arange(6.0).view(2, 3), th.tensor(6.0), th.arange(7.0, 9.0).view(1, 2).t()]
    flat = flatten(tensors)
    assert flat.tolist() == list(range(9))
    parts = unflatten(flat, tensors)
    assert all(th.equal(part, tensor) for part, tensor in zip(parts, tensors, strict=True))
    assert parts[0].data_ptr() == flat.data_ptr()
    with pytest.raises(RuntimeError):
        unflatten(flat[:-1], tensors)
