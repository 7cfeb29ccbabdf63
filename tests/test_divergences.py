"""Densities, entropies, divergences against PyTorch's, their derivatives against autograd; on tensors and numpy arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch as th
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal, kl_divergence

from sb3_ac_ext.legacy.action_distributions import (
    ActionDistribution,
    Bernoullis,
    Categoricals,
    DiagonalGaussian,
    Parameters,
)

B = 6


def normal(*shape: int, seed: int) -> th.Tensor:
    return 2 * th.randn(*shape, generator=th.Generator().manual_seed(seed), dtype=th.float64)


@dataclass(frozen=True)
class Case:
    """A distribution of ours and PyTorch's way to the same numbers: independent parts with an action each."""

    name: str
    ours: ActionDistribution
    parameters: Callable[[int], Parameters]
    """From a seed."""
    actions: th.Tensor
    parts: Callable[[Parameters], list[Distribution]]
    split: Callable[[th.Tensor], list[th.Tensor]] = lambda actions: [actions]

    def log_prob(self, parameters: Parameters) -> th.Tensor:
        pairs = zip(self.parts(parameters), self.split(self.actions), strict=True)
        return th.stack([part.log_prob(action) for part, action in pairs]).sum(dim=0)

    def entropy(self, parameters: Parameters) -> th.Tensor:
        return th.stack([part.entropy() for part in self.parts(parameters)]).sum(dim=0)

    def kl(self, old: Parameters, new: Parameters) -> th.Tensor:
        pairs = zip(self.parts(old), self.parts(new), strict=True)
        return th.stack([kl_divergence(p, q) for p, q in pairs]).sum(dim=0)


def gaussian(*log_std_shape: int) -> Case:
    return Case(
        f"gaussian {len(log_std_shape)}",
        DiagonalGaussian(),
        lambda seed: Parameters(normal(B, 2, seed=seed), 0.3 * normal(*log_std_shape, seed=seed + 10)),
        normal(B, 2, seed=7),
        lambda p: [Independent(Normal(p.outputs, p.log_std.exp().expand_as(p.outputs)), 1)],
    )


def categoricals(*sizes: int) -> Case:
    generator = th.Generator().manual_seed(3)
    return Case(
        f"categoricals {sizes}",
        Categoricals(sizes),
        lambda seed: Parameters(normal(B, sum(sizes), seed=seed)),
        th.stack([th.randint(size, (B,), generator=generator) for size in sizes], dim=1).float(),  # as a buffer has them
        lambda p: [Categorical(logits=logits) for logits in p.outputs.split(sizes, dim=1)],
        lambda actions: list(actions.unbind(dim=1)),
    )


CASES = [
    gaussian(2),
    gaussian(B, 2),
    categoricals(4),
    categoricals(3, 1, 4),
    Case(
        "bernoullis",
        Bernoullis(),
        lambda seed: Parameters(normal(B, 3, seed=seed)),
        (normal(B, 3, seed=7) > 0).double(),
        lambda p: [Independent(Bernoulli(logits=p.outputs), 1)],
    ),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
either_kind = pytest.mark.parametrize(
    "convert", [lambda tensor: tensor, lambda tensor: tensor.numpy()], ids=["torch", "numpy"]
)


def converted(parameters: Parameters, convert: Any) -> Parameters:
    return Parameters(*(None if field is None else convert(field) for field in parameters))


def close(ours: Any, theirs: th.Tensor) -> None:
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), rtol=1e-12, atol=1e-12)


@every_case
@either_kind
def test_values_are_pytorchs(case: Case, convert: Any) -> None:
    old, new = case.parameters(1), case.parameters(2)
    ours_old, ours_new = converted(old, convert), converted(new, convert)
    close(case.ours.log_prob(ours_new, convert(case.actions)), case.log_prob(new))
    close(case.ours.entropy(ours_new), case.entropy(new))
    close(case.ours.kl(ours_old, ours_new), case.kl(old, new))
    close(case.ours.kl(ours_new, ours_new), th.zeros(B))


@every_case
@either_kind
@pytest.mark.parametrize("quantity", ["log_prob", "entropy", "kl"])
def test_slopes_are_the_derivatives_of_the_weighted_sum(case: Case, quantity: str, convert: Any) -> None:
    old, new = case.parameters(1), case.parameters(2)
    weight = normal(B, seed=5)
    outputs = new.outputs.clone().requires_grad_()
    # one of its own for each sample, so that autograd keeps them apart
    log_std = None if new.log_std is None else (new.log_std + 0 * new.outputs).requires_grad_()
    free = Parameters(outputs, log_std)
    value = {"log_prob": lambda: case.log_prob(free), "entropy": lambda: case.entropy(free), "kl": lambda: case.kl(old, free)}
    (weight * value[quantity]()).sum().backward()

    ours_old, ours_new = converted(old, convert), converted(new, convert)
    slope = {
        "log_prob": lambda: case.ours.log_prob_slope(ours_new, convert(case.actions), convert(weight)),
        "entropy": lambda: case.ours.entropy_slope(ours_new, convert(weight)),
        "kl": lambda: case.ours.kl_slope(ours_old, ours_new, convert(weight)),
    }[quantity]()
    close(slope.outputs, th.zeros(B, outputs.shape[1]) if outputs.grad is None else outputs.grad)
    if log_std is not None:
        close(slope.log_std, log_std.grad)


def test_divergence_is_from_the_old_to_the_new() -> None:
    standard = Parameters(th.tensor([[0.0]]), th.tensor([0.0]))
    other = Parameters(th.tensor([[0.5]]), th.tensor([2.0]).log())
    assert DiagonalGaussian().kl(standard, other).item() == pytest.approx(0.34939718, abs=1e-7)
    assert DiagonalGaussian().kl(other, standard).item() == pytest.approx(0.93185282, abs=1e-7)


@either_kind
def test_large_logits_overflow_nowhere(convert: Any) -> None:
    logits = convert(th.tensor([[1000.0, -1000.0]]))
    choice, coins = convert(th.tensor([[1.0]])), convert(th.tensor([[1.0, 0.0]]))
    weight = convert(th.ones(1))
    for ours, action, log_prob in ((Categoricals([2]), choice, -2000.0), (Bernoullis(), coins, 0.0)):
        parameters = Parameters(logits)
        assert float(ours.log_prob(parameters, action)[0]) == log_prob
        assert float(ours.entropy(parameters)[0]) == 0
        assert float(ours.kl(parameters, parameters)[0]) == 0
        for slope in (
            ours.log_prob_slope(parameters, action, weight),
            ours.entropy_slope(parameters, weight),
            ours.kl_slope(parameters, parameters, weight),
        ):
            assert np.isfinite(np.asarray(slope.outputs)).all()


@either_kind
@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_the_type_of_numbers_is_kept(convert: Any, dtype: th.dtype) -> None:
    for case in CASES:
        old, new = (converted(case.parameters(seed), lambda tensor: convert(tensor.to(dtype))) for seed in (1, 2))
        actions, weight = convert(case.actions.to(dtype)), convert(th.ones(B, dtype=dtype))
        results = [case.ours.log_prob(new, actions), case.ours.entropy(new), case.ours.kl(old, new)]
        slopes = (
            case.ours.log_prob_slope(new, actions, weight),
            case.ours.entropy_slope(new, weight),
            case.ours.kl_slope(old, new, weight),
        )
        assert {result.dtype for result in (*results, *(slope.outputs for slope in slopes))} == {new.outputs.dtype}
