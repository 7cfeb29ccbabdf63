"""Losses of the on-policy algorithms: numbers by hand, and each derivative against autograd; on tensors and numpy arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_ac_ext.legacy.surrogates import (
    Loss,
    adapted_kl_coef,
    clipped_squared_error,
    clipped_surrogate,
    kl_estimate,
    normalized,
    outside,
    policy_gradient,
    squared_error,
    surrogate,
)

Convert = Callable[[th.Tensor], Any]
either_kind = pytest.mark.parametrize(
    "convert", [lambda tensor: tensor, lambda tensor: tensor.numpy()], ids=["torch", "numpy"]
)


def tensor(*values: float) -> th.Tensor:
    return th.tensor(values, dtype=th.float64)


def normal(size: int, seed: int) -> th.Tensor:
    return th.randn(size, generator=th.Generator().manual_seed(seed), dtype=th.float64)


ADVANTAGES = tensor(1, -1, 1, -1)
RATIOS = tensor(1.5, 1.5, 0.5, 0.5)


@either_kind
def test_clipped_surrogate_by_hand(convert: Convert) -> None:
    """min(r A, clip(r, 0.8, 1.2) A) is 1.2, -1.5, 0.5, -0.8, and depends on r where clipping is not the smaller one."""
    loss = clipped_surrogate(convert(RATIOS.log()), convert(ADVANTAGES), 0.2)
    assert float(loss.value) == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)
    np.testing.assert_allclose(loss.slope, [0, 1.5 / 4, -0.5 / 4, 0])
    assert float(outside(convert(RATIOS.log()), 0.2)) == 1
    assert float(outside(convert(tensor(1.21, 1.19, 0.81, 0.79).log()), 0.2)) == 0.5


@either_kind
def test_at_the_old_policy_every_surrogate_has_the_policy_gradient(convert: Convert) -> None:
    log_prob, advantages = convert(normal(8, 1)), convert(normal(8, 2))
    expected = policy_gradient(log_prob, advantages).slope
    np.testing.assert_allclose(expected, -np.asarray(advantages) / 8)
    for loss in (surrogate(0 * log_prob, advantages), clipped_surrogate(0 * log_prob, advantages, 0.2)):
        np.testing.assert_allclose(loss.slope, expected)
        assert float(loss.value) == pytest.approx(-float(advantages.mean()))
    assert float(outside(0 * log_prob, 0.0)) == 0


SLOPES: dict[str, Callable[[Any, Convert], Loss]] = {
    "policy gradient": lambda x, as_: policy_gradient(x, as_(normal(64, 2))),
    "surrogate": lambda x, as_: surrogate(x, as_(normal(64, 2))),
    "clipped surrogate": lambda x, as_: clipped_surrogate(x, as_(normal(64, 2)), 0.3),
    "squared error": lambda x, as_: squared_error(x, as_(normal(64, 2))),
    "clipped error": lambda x, as_: clipped_squared_error(x, as_(normal(64, 3)), as_(normal(64, 2)), 0.4, pessimistic=False),
    "larger error": lambda x, as_: clipped_squared_error(x, as_(normal(64, 3)), as_(normal(64, 2)), 0.4, pessimistic=True),
}


@either_kind
@pytest.mark.parametrize("name", SLOPES)
def test_slopes_are_the_derivatives_of_the_values(name: str, convert: Convert) -> None:
    x = normal(64, 1).requires_grad_()
    SLOPES[name](x, lambda tensor: tensor).value.backward()
    ours = SLOPES[name](convert(x.detach()), convert)
    np.testing.assert_allclose(ours.slope, x.grad, rtol=1e-12, atol=1e-15)
    assert float(ours.value) == pytest.approx(SLOPES[name](x, lambda tensor: tensor).value.item(), rel=1e-12)


@either_kind
def test_value_clipping_by_hand(convert: Convert) -> None:
    """V_old = 1, V = 2, c = 0.2. The published loss has a factor 1/2, which ours leaves to ``vf_coef``."""
    old, new = convert(tensor(1.0)), convert(tensor(2.0))

    def loss(target: float, pessimistic: bool) -> Loss:
        return clipped_squared_error(new, old, convert(tensor(target)), 0.2, pessimistic)

    assert float(loss(1.5, True).value) / 2 == pytest.approx(0.125)
    assert float(loss(3.0, True).value) / 2 == pytest.approx(1.62)
    assert float(loss(3.0, False).value) == pytest.approx(3.24)
    # moved past R: the published loss pulls back, SB3's has no gradient at all
    assert float(loss(1.5, True).slope[0]) == pytest.approx(2 * 0.5)
    assert float(loss(1.5, False).slope[0]) == 0
    # moved towards R further than it may: neither pushes on
    assert float(loss(3.0, True).slope[0]) == float(loss(3.0, False).slope[0]) == 0
    # moved away from R: the published loss pulls back
    assert float(loss(0.0, True).slope[0]) == pytest.approx(2 * 2.0)
    assert float(loss(0.0, False).slope[0]) == 0


@either_kind
def test_within_the_range_value_clipping_changes_nothing(convert: Convert) -> None:
    value, target = convert(normal(8, 1)), convert(normal(8, 2))
    old = value + convert(0.1 * normal(8, 3).tanh())
    expected = squared_error(value, target)
    for pessimistic in (False, True):
        loss = clipped_squared_error(value, old, target, 0.2, pessimistic)
        np.testing.assert_allclose(loss.value, expected.value)
        np.testing.assert_allclose(loss.slope, expected.slope, rtol=1e-9)


@either_kind
def test_kl_estimates_by_hand(convert: Convert) -> None:
    """Probabilities .5, .4 before and .6, .2 after: k1 may have either sign, k3 may not."""
    log_ratio = convert((tensor(0.6, 0.2) / tensor(0.5, 0.4)).log())
    assert float(kl_estimate(log_ratio, "k1")) == pytest.approx(0.25541281, abs=1e-8)
    assert float(kl_estimate(log_ratio, "k3")) == pytest.approx(0.10541281, abs=1e-8)
    assert float(kl_estimate(convert(tensor(0.1, 0.2)), "k1")) == pytest.approx(-0.15)
    assert float(kl_estimate(convert(tensor(0.1, 0.2)), "k3")) > 0


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimates_have_the_divergence_as_their_mean(estimator: str) -> None:
    old, new = th.distributions.Normal(0.0, 1.0), th.distributions.Normal(0.2, 1.1)
    th.manual_seed(0)
    x = old.sample((200_000,))
    estimate = kl_estimate(new.log_prob(x) - old.log_prob(x), estimator).item()
    assert estimate == pytest.approx(th.distributions.kl_divergence(old, new).item(), abs=2e-3)


@either_kind
def test_normalized(convert: Convert) -> None:
    advantages = normal(10, 1)
    np.testing.assert_allclose(normalized(convert(advantages)), (advantages - advantages.mean()) / (advantages.std() + 1e-8))
    np.testing.assert_array_equal(normalized(convert(tensor(3.0))), [3.0])
    np.testing.assert_array_equal(normalized(convert(tensor(2.0, 2.0))), [0.0, 0.0])


@pytest.mark.parametrize(
    ("kl", "coefficient"),
    [(0.0066, 0.5), (0.00667, 1.0), (0.01, 1.0), (0.015, 1.0), (0.0151, 2.0), (0.1, 2.0)],
)
def test_penalty_adapts_outside_of_the_strict_bounds(kl: float, coefficient: float) -> None:
    assert adapted_kl_coef(1.0, kl, 0.01) == coefficient
    assert adapted_kl_coef(3.0, kl, 0.01) == 3 * coefficient


@either_kind
def test_a_ratio_that_overflows_has_no_slope_where_it_is_clipped(convert: Convert) -> None:
    log_ratio = convert(th.tensor([100.0, 0.0], dtype=th.float32))
    with np.errstate(over="ignore"):
        loss = clipped_surrogate(log_ratio, convert(th.tensor([1.0, 1.0])), 0.2)
    assert float(loss.value) == pytest.approx(-1.1)
    np.testing.assert_allclose(loss.slope, [0.0, -0.5])
