"""Losses of the on-policy algorithms: numbers by hand, and each derivative against differences."""

from collections.abc import Callable

import pytest
import torch as th

from sb3_ac_ext.functional.surrogates import (
    adapted_kl_coef,
    clipped_squared_error,
    clipped_surrogate,
    kl_estimate,
    normalized,
    squared_error,
    surrogate,
)

close = th.testing.assert_close


def tensor(*values: float) -> th.Tensor:
    return th.tensor(values, dtype=th.float64)


def normal(seed: int, size: int = 64) -> th.Tensor:
    return th.randn(size, generator=th.Generator().manual_seed(seed), dtype=th.float64)


def slope(function: Callable[[th.Tensor], th.Tensor], x: th.Tensor) -> th.Tensor:
    """``(B,)`` derivative of each value by its own argument."""
    x = x.clone().requires_grad_()
    return th.autograd.grad(function(x).sum(), x)[0]


RATIOS, ADVANTAGES = tensor(1.5, 1.5, 0.5, 0.5), tensor(1, -1, 1, -1)


def test_clipped_surrogate_by_hand() -> None:
    """min(r A, clip(r, 0.8, 1.2) A) depends on r where clipping is not the smaller one; the derivative is by log r."""

    def objective(log_ratio: th.Tensor) -> th.Tensor:
        return clipped_surrogate(log_ratio, ADVANTAGES, 0.2)

    close(objective(RATIOS.log()), tensor(1.2, -1.5, 0.5, -0.8))
    close(slope(objective, RATIOS.log()), tensor(0, -1.5, 0.5, 0))
    close(clipped_surrogate(RATIOS.log(), ADVANTAGES, th.tensor(0.2, dtype=th.float64)), objective(RATIOS.log()))


def test_at_the_old_policy_every_surrogate_has_the_policy_gradient() -> None:
    advantages = normal(2)
    for objective in (surrogate, lambda *args: clipped_surrogate(*args, 0.2)):
        close(objective(th.zeros_like(advantages), advantages), advantages)
        close(slope(lambda x, f=objective: f(x, advantages), th.zeros_like(advantages)), advantages)


FUNCTIONS: dict[str, Callable[[th.Tensor], th.Tensor]] = {
    "surrogate": lambda x: surrogate(x, normal(2)),
    "clipped surrogate": lambda x: clipped_surrogate(x, normal(2), 0.3),
    "squared error": lambda x: squared_error(x, normal(2)),
    "clipped error": lambda x: clipped_squared_error(x, normal(3), normal(2), 0.4, pessimistic=False),
    "larger error": lambda x: clipped_squared_error(x, normal(3), normal(2), 0.4, pessimistic=True),
    "k1": lambda x: kl_estimate(x, "k1"),
    "k3": lambda x: kl_estimate(x, "k3"),
    "normalized": normalized,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_are_difference_quotients(name: str) -> None:
    assert th.autograd.gradcheck(FUNCTIONS[name], normal(1).requires_grad_())


@pytest.mark.parametrize(
    ("target", "pessimistic", "error", "derivative"),
    [
        (3.0, True, 3.24, 0),  # moved towards R further than it may: neither pushes on
        (3.0, False, 3.24, 0),
        (1.5, True, 0.25, 1.0),  # moved past R: the published loss pulls back, SB3's has no gradient at all
        (1.5, False, 0.09, 0),
        (0.0, True, 4.0, 4.0),  # moved away from R
        (0.0, False, 1.44, 0),
    ],
)
def test_value_clipping_by_hand(target: float, pessimistic: bool, error: float, derivative: float) -> None:
    """V_old = 1, V = 2, c = 0.2. The published loss has a factor 1/2, which ours leaves to ``vf_coef``."""

    def loss(values: th.Tensor) -> th.Tensor:
        return clipped_squared_error(values, tensor(1.0), tensor(target), 0.2, pessimistic)

    close(loss(tensor(2.0)), tensor(error))
    close(slope(loss, tensor(2.0)), tensor(derivative))


@pytest.mark.parametrize("pessimistic", [False, True])
def test_within_the_range_value_clipping_changes_nothing(pessimistic: bool) -> None:
    values, target = normal(1), normal(2)
    old = values + 0.1 * normal(3).tanh()
    close(clipped_squared_error(values, old, target, 0.2, pessimistic), squared_error(values, target))
    close(slope(lambda x: clipped_squared_error(x, old, target, 0.2, pessimistic), values), 2 * (values - target))


def test_kl_estimates_by_hand() -> None:
    """Probabilities .5, .4 before and .6, .2 after: k1 may have either sign, k3 may not."""
    log_ratio = (tensor(0.6, 0.2) / tensor(0.5, 0.4)).log()
    assert kl_estimate(log_ratio, "k1").item() == pytest.approx(0.25541281, abs=1e-8)
    assert kl_estimate(log_ratio, "k3").item() == pytest.approx(0.10541281, abs=1e-8)
    assert kl_estimate(tensor(0.1, 0.2), "k1").item() == pytest.approx(-0.15)
    assert kl_estimate(tensor(0.1, 0.2), "k3").item() > 0


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimates_have_the_divergence_as_their_mean(estimator: str) -> None:
    old, new = th.distributions.Normal(0.0, 1.0), th.distributions.Normal(0.2, 1.1)
    th.manual_seed(0)
    x = old.sample((200_000,))
    estimate = kl_estimate(new.log_prob(x) - old.log_prob(x), estimator).item()
    assert estimate == pytest.approx(th.distributions.kl_divergence(old, new).item(), abs=2e-3)


def test_normalized() -> None:
    advantages = normal(1, 10)
    result = normalized(advantages)
    assert result.mean().item() == pytest.approx(0, abs=1e-12)
    assert result.std().item() == pytest.approx(1, abs=1e-7)
    close(result * advantages.std() + advantages.mean(), advantages, rtol=0, atol=1e-7)
    close(normalized(tensor(3.0)), tensor(3.0))
    close(normalized(tensor(2.0, 2.0)), tensor(0.0, 0.0))


@pytest.mark.parametrize(
    ("kl", "coefficient"),
    [(0.0066, 0.5), (0.00667, 1.0), (0.01, 1.0), (0.015, 1.0), (0.0151, 2.0), (0.1, 2.0)],
)
def test_penalty_adapts_outside_of_the_strict_bounds(kl: float, coefficient: float) -> None:
    assert adapted_kl_coef(1.0, kl, 0.01) == coefficient
    assert adapted_kl_coef(3.0, kl, 0.01) == 3 * coefficient
