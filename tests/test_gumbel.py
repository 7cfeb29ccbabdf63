"""Draws of discrete actions: their frequencies, their one-hots, and the gradient that passes through them."""

import pytest
import torch as th

from sb3_ac_ext.functional.gumbel import gumbel_noise, gumbel_one_hot, one_hot_argmax


@pytest.fixture(autouse=True)
def seed() -> None:
    th.manual_seed(0)


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise(th.empty(200_000, dtype=th.float64))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(th.pi**2 / 6, abs=0.03)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_draws_have_the_softmax_as_frequencies(temperature: float) -> None:
    logits = th.tensor([[1.0, 0.0, -1.0, 0.5]]).expand(50_000, 4)
    draws = gumbel_one_hot(logits, gumbel_noise(logits), temperature)
    assert set(draws.unique().tolist()) == {0.0, 1.0} and (draws.sum(dim=1) == 1).all()
    th.testing.assert_close(draws.mean(dim=0), logits[0].softmax(dim=0), rtol=0, atol=0.01)


def test_one_hot_is_exact_in_fp32() -> None:
    """No rounding is left of the relaxation that carries the gradient."""
    logits = 30 * th.randn(5000, 7)
    draws = gumbel_one_hot(logits, gumbel_noise(logits), 0.3)
    assert ((draws == 0) | (draws == 1)).all()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_gradient_is_that_of_the_relaxation(temperature: float) -> None:
    logits = th.randn(6, 3, 4, dtype=th.float64, requires_grad=True)
    noise, weights = gumbel_noise(logits.detach()), th.randn(6, 3, 4, dtype=th.float64)
    (gradient,) = th.autograd.grad((weights * gumbel_one_hot(logits, noise, temperature)).sum(), logits)
    p = ((logits + noise) / temperature).softmax(dim=-1).detach()
    expected = p * (weights - (p * weights).sum(dim=-1, keepdim=True)) / temperature
    assert gradient.abs().min() > 0
    th.testing.assert_close(gradient, expected)


def test_mode() -> None:
    logits = th.tensor([[[0.0, 2.0, 1.0], [3.0, 3.0, -1.0]]])
    assert one_hot_argmax(logits).tolist() == [[[0, 1, 0], [1, 0, 0]]]
