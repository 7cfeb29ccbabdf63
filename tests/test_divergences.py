"""Closed forms of Kullback-Leibler divergences against PyTorch's, and their derivatives against differences."""

from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from torch.distributions import Bernoulli, Categorical, Independent, Normal, kl_divergence

from sb3_ac_ext.functional.divergences import bernoulli_kl, categorical_kl, gaussian_kl

B = 6
Numbers = tuple[th.Tensor, ...]


def normal(seed: int, columns: int = 3) -> th.Tensor:
    return 2 * th.randn(B, columns, generator=th.Generator().manual_seed(seed), dtype=th.float64)


def gaussian(seed: int) -> Numbers:
    return normal(seed), (0.3 * normal(seed + 10)).exp()


def logits(seed: int) -> Numbers:
    return (normal(seed, 4),)


CASES: dict[str, tuple[Callable[..., th.Tensor], Callable[[int], Numbers], Callable[..., Any]]] = {
    "gaussian": (gaussian_kl, gaussian, lambda mean, std: Independent(Normal(mean, std), 1)),
    "categorical": (categorical_kl, logits, lambda logits: Categorical(logits=logits)),
    "bernoulli": (bernoulli_kl, logits, lambda logits: Independent(Bernoulli(logits=logits), 1)),
}
"""Ours, numbers from a seed, and PyTorch's distribution of them."""
every_case = pytest.mark.parametrize("name", CASES)


@every_case
@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_values_are_pytorchs(name: str, dtype: th.dtype) -> None:
    ours, draw, theirs = CASES[name]
    p, q = ([number.to(dtype) for number in draw(seed)] for seed in (1, 2))
    tolerance = 1e-5 if dtype == th.float32 else 1e-12
    th.testing.assert_close(ours(*p, *q), kl_divergence(theirs(*p), theirs(*q)), rtol=tolerance, atol=tolerance)
    th.testing.assert_close(ours(*p, *p), th.zeros(B, dtype=dtype), rtol=0, atol=tolerance)


@every_case
def test_derivatives_are_difference_quotients(name: str) -> None:
    """By all numbers of both; the second ones are what surrogates and Fisher products need."""
    ours, draw, _ = CASES[name]
    numbers = [number[:2].requires_grad_() for seed in (1, 2) for number in draw(seed)]
    assert th.autograd.gradcheck(ours, numbers)
    assert th.autograd.gradgradcheck(ours, numbers)


def test_divergence_is_from_the_first_to_the_second() -> None:
    standard, other = ((th.tensor([[mean]]), th.tensor([[std]])) for mean, std in ((0.0, 1.0), (0.5, 2.0)))
    assert gaussian_kl(*standard, *other).item() == pytest.approx(0.34939718, abs=1e-7)
    assert gaussian_kl(*other, *standard).item() == pytest.approx(0.93185282, abs=1e-7)


@pytest.mark.parametrize(
    ("ours", "p", "q", "expected"),
    [
        (categorical_kl, [1000.0, -1000.0], [-1000.0, 1000.0], 2000.0),
        (categorical_kl, [1000.0, -1000.0], [0.0, 0.0], 0.6931472),
        (categorical_kl, [0.0, 0.0], [200.0, 0.0], 99.3068528),
        (bernoulli_kl, [1000.0, -1000.0], [-1000.0, 1000.0], 2000.0),
        (bernoulli_kl, [1000.0, -1000.0], [0.0, 0.0], 1.3862944),  # where differences of logits would round
        (bernoulli_kl, [0.0, 0.0], [200.0, -200.0], 198.6137056),
    ],
)
def test_extreme_logits(ours: Callable[..., th.Tensor], p: list[float], q: list[float], expected: float) -> None:
    numbers = [th.tensor([values], requires_grad=True) for values in (p, q)]
    divergence = ours(*numbers)
    assert divergence.item() == pytest.approx(expected, rel=1e-6)
    assert all(gradient.isfinite().all() for gradient in th.autograd.grad(divergence, numbers))


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_extreme_standard_deviations(scale: float) -> None:
    """Their squares are not float32 numbers; the divergence does not depend on the unit."""
    numbers = [th.tensor([[value]]) for value in (0.0, 1.0, 0.5, 2.0)]
    scaled = [(scale * number).requires_grad_() for number in numbers]
    divergence = gaussian_kl(*scaled)
    assert divergence.item() == pytest.approx(0.34939718, abs=1e-6)
    assert all(gradient.isfinite().all() for gradient in th.autograd.grad(divergence, scaled))
