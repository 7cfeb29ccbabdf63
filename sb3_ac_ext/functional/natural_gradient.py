"""
Natural policy gradients: conjugate gradients, Fisher-vector products, and the line search behind them.

The Fisher matrix of a policy whose network gives the statistics phi of an action distribution (means, logits, ...) is

    F = mean_s [ J^T F_d J ]

with J the Jacobian of phi and F_d the Fisher matrix of the distribution in phi. At the old policy it is the Hessian of
the mean KL divergence, in either direction. A product with it takes J v, one product with F_d and a backward pass: no
second derivatives. B is the batch size, A the action dimension, D the size of phi, P the number of parameters.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch as th

Tensors = tuple[th.Tensor, ...]
Statistic = tuple[th.Tensor, Callable[[th.Tensor], th.Tensor]]
"""``(B, ...)`` numbers that a distribution is a function of, and directions of them -> F_d times these."""
LOG_STD_FISHER = 2.0
"""Fisher information of the log std of a Gaussian, whatever its mean and std; that of the mean is 1 / sigma^2."""


def flatten(tensors: Sequence[th.Tensor]) -> th.Tensor:
    """
    :param tensors: P numbers together
    :return: ``(P,)`` the numbers in their order
    """
    return th.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(vector: th.Tensor, like: Sequence[th.Tensor]) -> Tensors:
    """
    :param vector: ``(P,)``
    :param like: P numbers together, for the shapes
    :return: views of the vector with these shapes
    """
    parts = vector.split([tensor.numel() for tensor in like])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True))


def conjugate_gradient(
    product: Callable[[th.Tensor], th.Tensor], b: th.Tensor, max_iter: int = 10, residual_tol: float = 1e-10
) -> tuple[th.Tensor, th.Tensor]:
    """
    An approximate solution of ``A x = b`` from x = 0 (Hestenes and Stiefel 1952).

    A must be symmetric positive definite. Each iteration is exact in one more direction: with P of them, or as many as A
    has different eigenvalues, x is the solution up to rounding; with fewer it is a regularised one on purpose.

    The result stays where it is once the residual is small enough, or once a direction's curvature is not a positive
    number (A is not positive definite there, or the product is not finite). This is decided on the device, for nothing
    to be read back from it, so there are always ``max_iter`` products.

    :param product: v -> A v for ``(P,)``
    :param b: ``(P,)``; 0 gives 0
    :param max_iter: number of iterations, >= 0
    :param residual_tol: stop once ``|A x - b|^2`` is at most that, >= 0
    :return: ``(P,)`` x, and ``(P,)`` A x, which the iterations give without another product
    """
    x, residual, direction = th.zeros_like(b), b, b
    error = b.dot(b)
    for _ in range(max_iter):
        moved = product(direction)
        curvature = direction.dot(moved)
        running = (error > residual_tol) & (curvature > 0) & th.isfinite(curvature)
        step = error / curvature
        x = th.where(running, x + step * direction, x)
        residual = th.where(running, residual - step * moved, residual)
        previous, error = error, residual.dot(residual)
        direction = th.where(running, residual + error / previous * direction, 0)  # 0: stopped for good
    return x, b - residual


def trust_region_scale(curvature: th.Tensor, delta: float) -> th.Tensor:
    """
    How far a direction x may be followed (Schulman et al. 2015, arXiv:1502.05477, appendix C).

        beta = sqrt(2 delta / x^T A x),  so that the step beta x has 1/2 step^T A step = delta

    :param curvature: scalar x^T A x
    :param delta: radius of the trust region in nats, > 0
    :return: scalar beta; 0 where the curvature is not a positive number or beta not a finite one
    """
    scale = (2 * delta / curvature).sqrt()
    return th.where(th.isfinite(scale), scale, 0)


class NaturalStep(NamedTuple):
    """A step in the natural gradient's direction, to the border of the trust region."""

    step: th.Tensor
    """``(P,)`` to be added to the parameters; 0 where there is no gradient or no finite step."""
    improvement: th.Tensor
    """Scalar, gradient^T step: what the objective gains to first order, >= 0."""
    kl: th.Tensor
    """Scalar, 1/2 step^T F step in nats: the KL divergence to second order; delta but for the damping's share."""


def natural_step(
    fisher_product: Callable[[th.Tensor], th.Tensor],
    gradient: th.Tensor,
    delta: float,
    damping: float,
    max_iter: int = 10,
    residual_tol: float = 1e-10,
) -> NaturalStep:
    """
    The step that ascends an objective in a trust region (Schulman et al. 2015, arXiv:1502.05477, appendix C).

        (F + damping I) x = g;  step = sqrt(2 delta / x^T (F + damping I) x) x

    :param fisher_product: v -> F v for ``(P,)``, without damping
    :param gradient: ``(P,)`` g of the objective, which is to grow
    :param delta: radius of the trust region in nats, > 0
    :param damping: >= 0; above 0 wherever F alone is singular, as it is with fewer samples than parameters
    :param max_iter: iterations of `conjugate_gradient`
    :param residual_tol: its tolerance
    :return: the step and what it promises; all 0 if the gradient is
    """
    x, product = conjugate_gradient(lambda v: fisher_product(v) + damping * v, gradient, max_iter, residual_tol)
    curvature = x.dot(product)
    scale = trust_region_scale(curvature, delta)
    step = scale * x
    step = th.where(th.isfinite(step).all(), step, 0)
    return NaturalStep(step, gradient.dot(step), 0.5 * scale.square() * (curvature - damping * x.dot(x)))


def categorical_fisher(tangent: th.Tensor, probs: th.Tensor) -> th.Tensor:
    """
    Product with the Fisher matrix of a categorical distribution in its logits, diag(p) - p p^T.

    :param tangent: ``(B, D)`` direction of the logits
    :param probs: ``(B, D)`` p
    :return: ``(B, D)``
    """
    weighted = probs * tangent
    return weighted - probs * weighted.sum(dim=-1, keepdim=True)


def bernoulli_fisher(tangent: th.Tensor, probs: th.Tensor) -> th.Tensor:
    """
    Product with the Fisher matrix of independent Bernoulli variables in their logits, diag(p (1 - p)).

    :param tangent: ``(B, D)`` direction of the logits
    :param probs: ``(B, D)`` p of a one
    :return: ``(B, D)``
    """
    return probs * (1 - probs) * tangent


def fisher_product(statistics: Sequence[Statistic], parameters: Sequence[th.Tensor]) -> Callable[[th.Tensor], th.Tensor]:
    """
    Makes v -> F v for a policy from what it has computed for a batch of states.

    PyTorch gives J^T u. That is linear in u, so its derivative by u is J, and differentiating it gives J v: a backward pass
    through the first one's graph, which is made once. So a product costs two backward passes and no second derivative of
    the network, and it is exact for any network whose backward pass can be differentiated.

    :param statistics: phi, each ``(B, ...)`` with its graph, and products with F_d's block in it at the old policy, such as
        `categorical_fisher`; those that depend on no parameter do not matter
    :param parameters: P numbers together
    :return: v -> F v for ``(P,)``, with the mean over the batch, without damping; usable under ``torch.no_grad()``
    """
    phi, heads = zip(*(statistic for statistic in statistics if statistic[0].requires_grad), strict=True)
    weights = [th.zeros_like(part, requires_grad=True) for part in phi]
    # J^T u, for u of any value
    pulled = th.autograd.grad(phi, parameters, weights, create_graph=True, materialize_grads=True)
    used = [i for i, part in enumerate(pulled) if part.requires_grad]

    def product(vector: th.Tensor) -> th.Tensor:
        parts = unflatten(vector, parameters)
        moved = th.autograd.grad([pulled[i] for i in used], weights, [parts[i] for i in used], retain_graph=True)  # J v
        weighted = [head(direction) / len(direction) for head, direction in zip(heads, moved, strict=True)]
        return flatten(th.autograd.grad(phi, parameters, weighted, retain_graph=True, materialize_grads=True))

    return product


class LineSearch(NamedTuple):
    """Where a line search ended."""

    scale: float
    """Of the step that was accepted; 0 if none was, and the parameters must be what they were before it."""
    kl: float
    """The KL divergence there in nats; 0 if no step was accepted."""
    improvement: float
    """What the objective gained there; 0 if no step was accepted."""


def backtracking_line_search(
    evaluate: Callable[[float], tuple[float, float]],
    expected_improvement: float,
    max_kl: float,
    shrinking_factor: float = 0.8,
    max_iter: int = 10,
    accept_ratio: float = 0.0,
) -> LineSearch:
    """
    The largest of the steps 1, c, c^2, ... that keeps to the trust region and improves (Schulman et al. 2015, appendix C).

        accept the first j with  kl_j <= max_kl,  gain_j > 0,  gain_j >= accept_ratio * c^j * expected_improvement

    A KL divergence or gain that is not a number is never accepted.

    :param evaluate: scale of the step -> KL divergence and gain of the objective there
    :param expected_improvement: of the whole step, to first order
    :param max_kl: the trust region's radius in nats, with what slack it is given
    :param shrinking_factor: c, in (0, 1)
    :param max_iter: number of steps tried, >= 1
    :param accept_ratio: least share of the expected improvement, in [0, 1]; 0 accepts any gain
    :return: the accepted scale, and KL divergence and gain there
    :raises ValueError: if ``max_iter`` is below 1
    """
    if max_iter < 1:
        raise ValueError(f"max_iter must be >= 1, got {max_iter}")
    for j in range(max_iter):
        scale = shrinking_factor**j
        kl, improvement = evaluate(scale)
        if kl <= max_kl and improvement > 0 and improvement >= accept_ratio * scale * expected_improvement:
            return LineSearch(scale, kl, improvement)
    return LineSearch(0.0, 0.0, 0.0)
