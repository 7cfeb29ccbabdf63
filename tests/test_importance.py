"""Ratios and their truncation, by hand and by enumeration of all actions; and behaviours by their definitions."""

import itertools
import math
from typing import Any

import pytest
import torch as th

from sb3_ac_ext.functional.importance import (
    bias_correction,
    bounded_ratio,
    epsilon_mixture_log_prob,
    importance_ratio,
    truncated_importance_coefficients,
    uniform_box_log_prob,
    uniform_choice_log_prob,
)
from sb3_ac_ext.functional.trust_region import categorical_gradient


def tensor(values: Any) -> th.Tensor:
    return th.tensor(values, dtype=th.float64)


def test_ratio_is_finite_in_fp32() -> None:
    """And what is not a number stays none, so that a check finds it."""
    ratio = bounded_ratio(th.tensor([-1e4, 0, 1e4, math.nan]))
    assert ratio[:3].tolist() == pytest.approx([math.exp(-20), 1, math.exp(20)]) and ratio[3].isnan()


def test_ratio_is_1_where_the_policies_agree_and_at_most_its_bound() -> None:
    log_prob = th.tensor([0.3, -1.7, -40.0], requires_grad=True)
    assert importance_ratio(log_prob, log_prob).tolist() == [1, 1, 1]
    ratio = importance_ratio(log_prob, th.tensor([0.3, -2.7, -39.0]))
    assert ratio.tolist() == pytest.approx([1, math.e, 1 / math.e]) and not ratio.requires_grad
    bounded = importance_ratio(log_prob, th.tensor([0.3, -2.7, -39.0]), largest=0.5)
    assert bounded.tolist() == pytest.approx([0.5, 0.5, 1 / math.e])


@pytest.mark.parametrize("largest", [0.0, 0.5, 1.0, 10.0, math.inf])
def test_truncated_ratio_and_correction_make_up_the_policy(largest: float) -> None:
    pi, mu = tensor([0.73, 0.16, 0.11, 0.0, 0.0]), tensor([0.05, 0.5, 0.45, 0.1, 1.0])
    correction = bias_correction(pi / mu, largest)
    assert ((correction >= 0) & (correction <= 1)).all()
    th.testing.assert_close((pi / mu).clamp(max=largest) * mu + correction * pi, pi, rtol=0, atol=1e-15)
    assert bias_correction(th.tensor([math.exp(1)]), 1.0).item() == pytest.approx(1 - 1 / math.e)


LOGITS, MU, Q = tensor([1.2, -0.3, 0.1]), tensor([0.05, 0.5, 0.45]), tensor([2, -1, 0.5])
EXACT = (0.48270532, -0.32249308, -0.16021225)


def expected_gradient(largest: float, corrected: bool = True) -> th.Tensor:
    """By the logits, over all actions of mu, with the critic's advantage for the taken action."""
    pi = LOGITS.softmax(dim=0)
    advantages = Q - (pi * Q).sum()
    coefficients = truncated_importance_coefficients(
        th.arange(3)[:, None],
        pi.expand(3, 3),
        (pi / MU).expand(3, 3),
        advantages[:, None],
        advantages.expand(3, 3) if corrected else th.zeros(3, 3, dtype=th.float64),
        largest,
    )
    return MU @ categorical_gradient(coefficients, pi.expand(3, 3), "logits")


@pytest.mark.parametrize("largest", [0.0, 0.5, 1.0, 10.0, math.inf])
def test_gradient_is_the_exact_one_for_every_bound(largest: float) -> None:
    """With an infinite one it is plain importance sampling."""
    th.testing.assert_close(expected_gradient(largest), tensor(EXACT), rtol=0, atol=1e-8)
    logits = LOGITS.clone().requires_grad_()
    (gradient,) = th.autograd.grad(logits.softmax(dim=0) @ Q, logits)
    th.testing.assert_close(expected_gradient(largest), gradient, rtol=0, atol=1e-12)
    if largest == math.inf:
        th.testing.assert_close(expected_gradient(largest, corrected=False), gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("largest", "truncated", "correction"),
    [
        (10.0, (0.44441406, -0.30712632, -0.13728774), (0.03829126, -0.01536676, -0.02292451)),
        (1.0, (0.32364092, -0.25865857, -0.06498235), (0.1590644, -0.06383451, -0.0952299)),
        (0.5, (0.3169313, -0.25596592, -0.06096539), (0.16577402, -0.06652716, -0.09924686)),
    ],
)
def test_parts_of_the_gradient_by_hand(largest: float, truncated: tuple[float, ...], correction: tuple[float, ...]) -> None:
    alone = expected_gradient(largest, corrected=False)
    th.testing.assert_close(alone, tensor(truncated), rtol=0, atol=1e-8)
    th.testing.assert_close(expected_gradient(largest) - alone, tensor(correction), rtol=0, atol=1e-8)


def test_bound_of_0_is_the_exact_gradient_whatever_acted() -> None:
    """Nothing is left of the ratios, the taken action and its advantage."""
    pi = LOGITS.softmax(dim=0).expand(3, 3)
    ratios, advantages = tensor([[3, 1, 0.2], [0.1, 7, 5], [1, 1, 1]]), tensor([[5], [-3], [math.pi]])
    action_advantages = (Q - (pi[0] * Q).sum()).expand(3, 3)
    coefficients = truncated_importance_coefficients(th.arange(3)[:, None], pi, ratios, advantages, action_advantages, 0.0)
    th.testing.assert_close(coefficients, pi * action_advantages, rtol=0, atol=0)


def test_coefficients_do_not_take_part_in_the_gradient() -> None:
    probs = th.full((1, 2), 0.5, requires_grad=True)
    coefficients = truncated_importance_coefficients(th.tensor([[0]]), probs, probs, probs[:, :1], probs, 1.0)
    assert not coefficients.requires_grad


def test_random_actions_by_hand() -> None:
    assert uniform_choice_log_prob([3]) == pytest.approx(-1.09861229)
    assert uniform_choice_log_prob([3, 4]) == pytest.approx(-math.log(12))
    assert uniform_box_log_prob(2) == pytest.approx(-1.38629436)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
def test_mixture_is_that_of_the_probabilities(epsilon: float) -> None:
    """Over all actions of a space of two choices; a probability of 0 is none of the mixture's; its sum is 1."""
    first, second = tensor([0.7, 0.3, 0.0]), tensor([0.25, 0.75])
    pi = tensor([a.item() * b.item() for a, b in itertools.product(first, second)])
    for given_as in (float, th.tensor):
        mixture = epsilon_mixture_log_prob(pi.log(), uniform_choice_log_prob([3, 2]), given_as(epsilon)).exp()
        th.testing.assert_close(mixture, (1 - epsilon) * pi + epsilon / 6, rtol=0, atol=1e-8)
    assert mixture.sum().item() == pytest.approx(1)


def test_mixture_of_densities() -> None:
    """At an action in [-1, 1]^2 whose density under the policy is 3."""
    mixture = epsilon_mixture_log_prob(th.tensor(3.0).log(), uniform_box_log_prob(2), 0.2)
    assert mixture.item() == pytest.approx(math.log(0.8 * 3 + 0.2 / 4))
