"""Natural gradients against dense matrices, second derivatives, numpy, and sb3_contrib's TRPO; in float64."""

from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np
import pytest
import sb3_contrib.common.utils
import torch as th
from environments import BOX, CONTINUOUS, RandomEnv
from gymnasium import spaces
from sb3_contrib import TRPO
from stable_baselines3.common.distributions import kl_divergence as sb3_kl
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from sb3_ac_ext.functional.natural_gradient import (
    backtracking_line_search,
    bernoulli_fisher,
    categorical_fisher,
    conjugate_gradient,
    fisher_product,
    flatten,
    natural_step,
    trust_region_scale,
    unflatten,
)
from sb3_ac_ext.networks.actor_critic import describe, kl_divergence, policy_parameters, statistics

A = th.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=th.float64)
B = th.tensor([1.0, 2.0], dtype=th.float64)


def exact(actual: th.Tensor, expected: th.Tensor | list[float], tolerance: float = 1e-8) -> None:
    th.testing.assert_close(actual, th.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=tolerance)


def positive_definite(size: int, condition: float) -> tuple[th.Tensor, th.Tensor]:
    """A matrix with eigenvalues from 1 down to 1 / condition, and a right-hand side."""
    generator = th.Generator().manual_seed(0)
    basis, _ = th.linalg.qr(th.randn(size, size, generator=generator, dtype=th.float64))
    eigenvalues = th.logspace(0, -np.log10(condition), size, dtype=th.float64)
    return (basis * eigenvalues) @ basis.t(), th.randn(size, generator=generator, dtype=th.float64)


def columns(product: Callable[[th.Tensor], th.Tensor], size: int) -> th.Tensor:
    return th.stack([product(unit) for unit in th.eye(size, dtype=th.float64)], dim=1)


# Conjugate gradients


def test_two_iterations_solve_two_equations() -> None:
    """The first goes 1/4 along b."""
    for iterations, expected in enumerate(([0, 0], [0.25, 0.5], [0.0909090909, 0.6363636364])):
        x, product = conjugate_gradient(A.mv, B, max_iter=iterations)
        exact(x, expected)
        exact(product, A @ x)


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
    matrix, b = positive_definite(30, condition=30)
    state = th.get_rng_state()
    ours, _ = conjugate_gradient(matrix.mv, b, max_iter, residual_tol)
    assert th.equal(state, th.get_rng_state())
    monkeypatch.setattr(th, "randn_like", th.zeros_like)
    exact(ours, sb3_contrib.common.utils.conjugate_gradient_solver(matrix.mv, b, max_iter, residual_tol), 1e-12)


def test_stays_at_the_first_result_whose_residual_is_small_enough() -> None:
    """The residual's square is 5 at the start, 0.3125 after one iteration."""
    one, two = [0.25, 0.5], [0.0909090909, 0.6363636364]
    for tolerance, expected in ((5.1, [0, 0]), (5.0, [0, 0]), (4.9, one), (0.32, one), (0.31, two)):
        exact(conjugate_gradient(A.mv, B, residual_tol=tolerance)[0], expected)
    # nothing is divided by a residual of 0, however many iterations follow
    exact(conjugate_gradient(A.mv, B, max_iter=50, residual_tol=0)[0], two)


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


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_no_gradient_no_step(damping: float) -> None:
    step, improvement, kl = natural_step(A.mv, th.zeros_like(B), delta=0.01, damping=damping)
    exact(step, [0, 0], 0)
    assert improvement == 0 and kl == 0


def test_step_that_is_not_finite_is_none() -> None:
    step, improvement, _ = natural_step(A.mv, th.tensor([1.0, th.nan], dtype=th.float64), delta=0.01, damping=0.1)
    exact(step, [0, 0], 0)
    assert not improvement > 0  # a line search refuses it
    for size in (1e100, th.inf, th.nan):  # the solution for 1e100 is more than a number can be
        step, _, _ = natural_step(lambda v: 1e-300 * v, th.full((3,), size, dtype=th.float64), delta=0.01, damping=0.0)
        exact(step, th.zeros(3), 0)


# Policies: divergences and Fisher matrices

HEADS: dict[str, tuple[spaces.Space, dict[str, Any]]] = {
    "box": (CONTINUOUS, {}),
    "discrete": (spaces.Discrete(3), {}),
    "several": (spaces.MultiDiscrete([2, 3]), {}),
    "coins": (spaces.MultiBinary(3), {}),
    "gSDE": (CONTINUOUS, {"use_sde": True}),
    "gSDE narrow": (CONTINUOUS, {"use_sde": True, "full_std": False}),
}
every_head = pytest.mark.parametrize("head", HEADS)
OBSERVATIONS = th.randn(7, 4, generator=th.Generator().manual_seed(5), dtype=th.float64)


def policy(head: str, activation: type[nn.Module] = nn.Tanh) -> ActorCriticPolicy:
    """With parameters that are nowhere special."""
    actions, kwargs = HEADS[head]
    th.manual_seed(1)
    made = ActorCriticPolicy(BOX, actions, lambda _: 1e-3, net_arch=[4, 3], activation_fn=activation, **kwargs).double()
    for parameter in made.parameters():
        parameter.data.add_(0.4 * th.randn_like(parameter))
    if made.use_sde:
        made.reset_noise()  # in the policy's type
    return made


def parts(made: ActorCriticPolicy) -> list[Any]:
    """PyTorch's distributions, whose values stay when the policy moves."""
    own = made.get_distribution(OBSERVATIONS).distribution
    return own if isinstance(own, list) else [own]


def pytorchs_kl(first: list[Any], second: list[Any]) -> th.Tensor:
    """``(B,)``"""
    return sum(torch_kl(*pair).reshape(len(OBSERVATIONS), -1).sum(1) for pair in zip(first, second, strict=True))


def detached(distributions: list[Any]) -> list[Any]:
    return [
        Normal(own.loc.detach(), own.scale.detach()) if isinstance(own, Normal) else type(own)(logits=own.logits.detach())
        for own in distributions
    ]


def derivative(of: th.Tensor, by: list[nn.Parameter], create_graph: bool = False) -> th.Tensor:
    return flatten(th.autograd.grad(of, by, materialize_grads=True, retain_graph=True, create_graph=create_graph))


def second_derivatives(of: th.Tensor, by: list[nn.Parameter]) -> th.Tensor:
    return th.stack([derivative(one, by) for one in derivative(of, by, create_graph=True)])


@pytest.mark.usefixtures("double_precision")
@every_head
@pytest.mark.parametrize(
    ("activation", "frozen"),
    [(nn.Tanh, ()), (nn.ReLU, ()), (nn.ELU, ("log_std", "action_net.bias", "mlp_extractor.policy_net.0.weight"))],
    ids=["tanh", "relu", "some frozen"],
)
def test_products_are_with_the_hessian_of_either_divergence(
    head: str, activation: type[nn.Module], frozen: tuple[str, ...]
) -> None:
    made = policy(head, activation)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name not in frozen)
    free = [parameter for parameter in policy_parameters(made) if parameter.requires_grad]
    own = [*free, *made.value_net.parameters()]  # on which nothing depends
    size = sum(parameter.numel() for parameter in own)
    product = fisher_product(statistics(made.get_distribution(OBSERVATIONS)), own)
    fisher = columns(product, size)
    old, new = detached(parts(made)), parts(made)
    largest = fisher.abs().max().item()
    for pair in ((old, new), (new, old)):
        exact(fisher, second_derivatives(pytorchs_kl(*pair).mean(), own), 1e-11 * largest)
    exact(fisher, fisher.t(), 1e-14 * largest)
    assert th.linalg.eigvalsh(fisher).min() > -1e-14 * largest
    if head == "box" and not frozen:
        exact(fisher[:2, :2], 2 * th.eye(2), 1e-12)  # of the log std


@pytest.mark.usefixtures("double_precision")
def test_fisher_matrix_is_the_covariance_of_the_score() -> None:
    """Its definition, exact for a categorical policy: the mean over states and actions of grad log pi grad log pi^T."""
    made = policy("discrete")
    own = policy_parameters(made)
    expected: Any = 0
    for log_prob in parts(made)[0].logits.flatten():
        score = derivative(log_prob, own)
        expected = expected + log_prob.detach().exp() * score.outer(score) / len(OBSERVATIONS)
    exact(columns(fisher_product(statistics(made.get_distribution(OBSERVATIONS)), own), len(score)), expected, 1e-10)


def test_products_by_hand() -> None:
    """diag(p) - p p^T, and diag(p (1 - p))."""
    probs, unit = th.tensor([0.2, 0.3, 0.5], dtype=th.float64), th.eye(3, dtype=th.float64)
    exact(categorical_fisher(unit, probs.expand(3, 3)), probs.diag() - probs.outer(probs), 1e-15)
    exact(bernoulli_fisher(unit, probs), th.tensor([0.16, 0.21, 0.25]).diag(), 1e-7)


@pytest.mark.usefixtures("double_precision")
@every_head
def test_divergences_are_pytorchs(head: str) -> None:
    made = policy(head)
    with th.no_grad():
        described, old = describe(made.get_distribution(OBSERVATIONS)).clone(), detached(parts(made))
        for parameter in policy_parameters(made):
            parameter.add_(0.3)
        new = parts(made)
        pairs = pytorchs_kl(old, new), pytorchs_kl(new, old)
        for reverse, expected in enumerate(pairs):
            exact(kl_divergence(described, made.get_distribution(OBSERVATIONS), reverse=bool(reverse)), expected, 1e-10)
    assert not th.allclose(*pairs)


@pytest.mark.usefixtures("double_precision")
def test_arguments_are_left_alone() -> None:
    made = policy("box")
    own = policy_parameters(made)
    before = flatten(own).clone()
    vector = th.ones_like(before)
    product = fisher_product(statistics(made.get_distribution(OBSERVATIONS)), own)
    with th.no_grad():
        first = product(vector)
        exact(product(vector), first, 0)  # the graph is kept
        exact(product(2 * vector), 2 * first, 1e-12)
    conjugate_gradient(A.mv, B)
    assert not first.requires_grad
    assert all(parameter.grad is None for parameter in own)
    exact(flatten(own), before, 0)
    exact(vector, th.ones_like(vector), 0)
    exact(B, [1, 2], 0)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("head", ["box", "gSDE", "discrete"])
def test_direction_is_that_of_sb3_contribs_trpo(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Products and conjugate gradients on the same policy, states, actions and advantages.

    For Gaussians its divergence is the mean over the action's dimensions, where the policy's is the sum: as if radius and
    damping were so many times as large.
    """
    monkeypatch.setattr(th, "randn_like", th.zeros_like)  # its solver starts there
    actions, kwargs = HEADS[head]
    trpo = TRPO("MlpPolicy", RandomEnv(BOX, actions), seed=3, device="cpu", cg_damping=0.05, **kwargs)
    made = trpo.policy.double()
    if made.use_sde:
        made.reset_noise()
    with th.no_grad():
        old = copy(made.get_distribution(OBSERVATIONS))  # as it does itself
        chosen = old.get_actions()
        old_log_prob = old.log_prob(chosen)
    distribution = made.get_distribution(OBSERVATIONS)
    advantages = th.randn(len(OBSERVATIONS), generator=th.Generator().manual_seed(6), dtype=th.float64)
    objective = (advantages * (distribution.log_prob(chosen) - old_log_prob).exp()).mean()
    actor, gradient, grad_kl, _ = trpo._compute_actor_grad(sb3_kl(distribution, old).mean(), objective)

    def theirs(v: th.Tensor) -> th.Tensor:
        return trpo.hessian_vector_product(actor, grad_kl, v).detach()

    ours = fisher_product(statistics(made.get_distribution(OBSERVATIONS)), actor)
    probe = th.randn(gradient.shape, generator=th.Generator().manual_seed(7), dtype=th.float64)
    dimensions = 1 if head == "discrete" else 2
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

    def evaluate(scale: float) -> tuple[float, float]:
        tried.append(scale)
        return kls[len(tried) - 1], gains[len(tried) - 1]

    return backtracking_line_search(evaluate, expected, 0.5, 0.5, max_iter=len(kls), **options), tried


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
    assert found == (0.5**accepted, kls[accepted], gains[accepted])
    assert tried == [0.5**j for j in range(accepted + 1)]


@pytest.mark.parametrize(
    ("kls", "gains"), [([0.6, 0.6], [1.0, 1.0]), ([0.1, 0.1], [-1.0, -0.1]), ([th.nan] * 2, [th.nan] * 2)]
)
def test_no_step_where_none_is_good(kls: list[float], gains: list[float]) -> None:
    assert search(kls, gains) == ((0, 0, 0), [1, 0.5])


def test_share_of_the_expected_improvement_that_a_step_must_keep() -> None:
    """A whole step promises 2, half a step 1, a quarter 0.5."""
    gains = [0.9, 0.49, 0.25]
    for ratio, accepted in ((0.0, 0), (0.44, 0), (0.46, 1), (0.495, 2)):
        found, _ = search([0.1] * 3, gains, expected=2.0, accept_ratio=ratio)
        assert found[0] == 0.5**accepted, ratio
    assert search([0.1] * 3, gains, expected=2.0, accept_ratio=0.6)[0][0] == 0


def test_line_search_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_iter must be >= 1, got 0"):
        backtracking_line_search(lambda scale: (0.0, 1.0), 1.0, 0.5, max_iter=0)


# Flat vectors


def test_flat_vectors_keep_order_and_shapes() -> None:
    tensors = [th.arange(6.0).view(2, 3), th.tensor(6.0), th.arange(7.0, 9.0).view(1, 2).t()]
    flat = flatten(tensors)
    assert flat.tolist() == list(range(9))
    views = unflatten(flat, tensors)
    assert all(th.equal(view, tensor) for view, tensor in zip(views, tensors, strict=True))
    assert views[0].data_ptr() == flat.data_ptr()
    with pytest.raises(RuntimeError):
        unflatten(flat[:-1], tensors)
