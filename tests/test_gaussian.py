"""Gaussian densities against torch.distributions, quadrature and values worked out by hand."""

import math

import pytest
import torch as th
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from sb3_ac_ext.functional.gaussian import (
    gaussian_log_prob,
    log_squash_slope,
    squashed_gaussian,
    squashed_gaussian_log_prob,
)


def parameters(rows: int = 50, dim: int = 3, scale: float = 1.0) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """Mean, log std and noise in float64."""
    generator = th.Generator().manual_seed(3)
    mean, log_std, noise = (th.randn(rows, dim, generator=generator, dtype=th.float64) for _ in range(3))
    return scale * mean, 0.5 * log_std - 1, noise


def test_density_of_a_gaussian_is_pytorchs() -> None:
    mean, log_std, noise = parameters()
    expected = Independent(Normal(mean, log_std.exp()), 1).log_prob(mean + log_std.exp() * noise)
    th.testing.assert_close(gaussian_log_prob(noise, log_std), expected[:, None], rtol=0, atol=1e-12)


def test_density_of_the_squashed_gaussian_by_hand() -> None:
    """One dimension, u = 0.5 from N(0, 1); in an action space [-2, 2] the density is half as high."""
    zero = th.zeros(1, 1, dtype=th.float64)
    action, log_prob = squashed_gaussian(zero, zero, zero + 0.5)
    assert action.item() == pytest.approx(math.tanh(0.5))
    assert log_prob.item() == pytest.approx(-0.80370952, abs=1e-8)
    assert log_prob.item() - math.log(2) == pytest.approx(-1.49685670, abs=1e-8)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_exact_density_is_that_of_the_transformed_distribution(scale: float) -> None:
    mean, log_std, noise = parameters(scale=scale)
    action, log_prob = squashed_gaussian(mean, log_std, noise)
    u = mean + log_std.exp() * noise
    transform = TanhTransform(cache_size=1)
    assert th.equal(action, transform(u))
    distribution = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), transform)
    th.testing.assert_close(log_prob, distribution.log_prob(transform(u))[:, None], rtol=0, atol=1e-8)


def test_density_with_epsilon_is_sb3s() -> None:
    mean, log_std, noise = parameters(scale=4.0)  # some actions are within 1e-6 of their limits
    mean.requires_grad_()
    log_std.requires_grad_()
    distribution = SquashedDiagGaussianDistribution(3).proba_distribution(mean, log_std)
    u = mean + log_std.exp() * noise
    expected = distribution.log_prob(u.tanh(), u)[:, None]
    action, log_prob = squashed_gaussian(mean, log_std, noise, epsilon=1e-6)
    th.testing.assert_close(log_prob, expected, rtol=0, atol=1e-9)
    gradients = [th.autograd.grad(value.sum(), (mean, log_std), retain_graph=True) for value in (log_prob, expected)]
    th.testing.assert_close(*gradients, rtol=0, atol=1e-6)
    assert (log_prob - squashed_gaussian(mean, log_std, noise)[1]).abs().max() > 0.1  # the exact one differs there
    assert action.requires_grad


def test_density_integrates_to_one() -> None:
    mean, log_std = 0.4, math.log(0.7)
    action = th.linspace(-1, 1, 20_003, dtype=th.float64)[1:-1, None]
    noise = (action.atanh() - mean) / math.exp(log_std)
    sampled, log_prob = squashed_gaussian(th.full_like(noise, mean), th.full_like(noise, log_std), noise)
    th.testing.assert_close(sampled, action)
    assert th.trapezoid(log_prob.exp()[:, 0], action[:, 0]).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_slope_of_tanh_stays_finite_where_it_rounds_to_zero(dtype: th.dtype) -> None:
    u = th.tensor([[-20.0, -100.0, 0.0, 0.5, 20.0, 100.0]], dtype=dtype, requires_grad=True)
    slope = log_squash_slope(u)
    expected = [2 * math.log(2) - 2 * abs(x) - 2 * math.log1p(math.exp(-2 * abs(x))) for x in u[0].tolist()]
    assert slope[0].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    slope.sum().backward()
    assert u.grad is not None
    assert u.grad[0].tolist() == pytest.approx([-2 * math.tanh(x) for x in u[0].tolist()], abs=1e-6)


def test_density_of_a_given_action() -> None:
    """By hand, of a drawn one, and by PyTorch."""
    by_hand = squashed_gaussian_log_prob(*(th.tensor([[x]], dtype=th.float64) for x in (0.5, 0.3, math.log(0.5))))
    assert by_hand.item() == pytest.approx(-0.06241639, abs=1e-8)
    mean, log_std, noise = parameters()
    action, log_prob = squashed_gaussian(mean, log_std, noise)
    th.testing.assert_close(squashed_gaussian_log_prob(action, mean, log_std), log_prob, rtol=0, atol=1e-8)
    distribution = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), TanhTransform())
    expected = distribution.log_prob(action)[:, None]
    th.testing.assert_close(squashed_gaussian_log_prob(action, mean, log_std), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_density_at_the_bounds_is_that_of_the_nearest_action_inside(dtype: th.dtype) -> None:
    mean = th.tensor([[0.5, -0.2]], dtype=dtype, requires_grad=True)
    bounds, inside = th.tensor([[1.0, -1.0]], dtype=dtype), 1 - th.finfo(dtype).eps
    log_prob = squashed_gaussian_log_prob(bounds, mean, 0 * mean)
    assert log_prob.isfinite() and th.equal(log_prob, squashed_gaussian_log_prob(inside * bounds, mean, 0 * mean))
    assert th.autograd.grad(log_prob, mean)[0].isfinite().all()
