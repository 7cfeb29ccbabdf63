"""ACER's trust region against numbers worked out by hand, derivatives by autograd and by differences, and a general solver."""

import math
from typing import Any

import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st

from sb3_ac_ext.functional.divergences import categorical_kl, gaussian_kl
from sb3_ac_ext.functional.importance import bias_correction, truncated_importance_coefficients
from sb3_ac_ext.functional.retrace import retrace, retrace_coefficient
from sb3_ac_ext.functional.trust_region import (
    categorical_gradient,
    entropy_coefficients,
    gaussian_mean_gradient,
    trust_region_projection,
)

SPACES = ["probs", "logits", "log_probs"]


def tensor(values: Any) -> th.Tensor:
    return th.tensor(values, dtype=th.float64)


def row(*values: float) -> th.Tensor:
    return tensor(values)[None]


def check(result: th.Tensor, expected: th.Tensor) -> None:
    th.testing.assert_close(result, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("sign", "delta", "expected"),
    [
        (1, 1.0, (0.55555556, -1.11111111, -0.38888889)),
        (1, 3.0, (1, -2, 0.5)),
        (1, 10.0, (1, -2, 0.5)),
        (-1, 1.0, (-1, 2, -0.5)),
        (1, 0.0, (0.33333333, -0.66666667, -0.83333333)),
    ],
    ids=["active", "on the bound", "inactive", "divergence falls", "bound of 0"],
)
def test_projection_by_hand(sign: int, delta: float, expected: tuple[float, ...]) -> None:
    for given_as in (float, tensor):
        check(trust_region_projection(sign * row(1, -2, 0.5), row(0.5, -1, 1), given_as(delta)), row(*expected))


@given(seed=st.integers(0, 1000), delta=st.floats(0, 3))
def test_projection_is_the_nearest_point_of_the_half_space(seed: int, delta: float) -> None:
    """In each state alone: k . z <= delta, and what is taken away is a multiple of k, 0 or more."""
    gradient, k = th.randn(2, 7, 4, generator=th.Generator().manual_seed(seed), dtype=th.float64)
    z = trust_region_projection(gradient, k, delta)
    reached, before = (k * z).sum(dim=1), (k * gradient).sum(dim=1)
    check(reached, before.clamp(max=delta))
    multiple = ((gradient - z) * k).sum(dim=1) / k.square().sum(dim=1)
    assert (multiple >= -1e-15).all()
    check(gradient - z, multiple[:, None] * k)
    one_by_one = [trust_region_projection(gradient[i : i + 1], k[i : i + 1], delta) for i in range(7)]
    assert th.equal(z, th.cat(one_by_one))


@pytest.mark.parametrize("delta", [0.0, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1e-25])
def test_no_divergence_to_bound(delta: float, scale: float) -> None:
    """Where k is 0, or its square is in fp32."""
    gradient = th.tensor([[1.0, -2.0, 3.0]])
    th.testing.assert_close(trust_region_projection(gradient, th.full((1, 3), scale), delta), gradient)


def test_divergence_by_hand() -> None:
    average, pi = row(0.5, 0.3, 0.2), row(0.6, 0.3, 0.1)
    assert categorical_kl(average.log(), pi.log()).item() == pytest.approx(0.04746866)
    check(categorical_gradient(-average, pi, "probs"), row(-0.83333333, -1, -2))
    check(categorical_gradient(-average, pi, "logits"), row(0.1, 0, -0.1))
    check(categorical_gradient(-average, pi, "log_probs"), row(-0.5, -0.3, -0.2))


def test_at_the_average_policy_probabilities_are_moved_without_effect() -> None:
    pi, coefficients = row(0.6, 0.3, 0.1), row(-3 * 0.6, 0, 0)
    gradient = categorical_gradient(coefficients, pi, "probs")
    z = trust_region_projection(gradient, categorical_gradient(-pi, pi, "probs"), 1.0)
    check(z, row(-2.33333333, 0.66666667, 0.66666667))
    for by_probs in (gradient, z):
        check(categorical_gradient(by_probs * pi, pi, "logits"), row(-0.72, 0.54, 0.18))


def test_entropy_by_hand() -> None:
    pi = row(0.6, 0.3, 0.1)
    coefficients = 0.01 * entropy_coefficients(pi)
    check(categorical_gradient(coefficients, pi, "probs"), row(-0.00489174, 0.00203973, 0.01302585))
    check(categorical_gradient(coefficients, pi, "logits"), row(-0.00232272, 0.00091808, 0.00140464))


LOGITS = tensor([[0.2, -0.4, 0.1], [1.2, -0.3, 0.1], [0, 0, 0]])
AVERAGE = tensor([[0.1, -0.2, 0.1], [0.2, 0.1, 0], [0, 0, 0]]).softmax(dim=1)
MU, Q = tensor([[0.3, 0.4, 0.3], [0.05, 0.5, 0.45], [0.2, 0.3, 0.5]]), tensor([[1, 0, 3], [2, -1, 0.5], [0.3, -0.2, 0.1]])
ACTIONS = th.tensor([[1], [0], [2]])
PI = LOGITS.softmax(dim=1)
RHO, V = PI / MU, (PI * Q).sum(dim=1, keepdim=True)


def step_target() -> th.Tensor:
    """Q_ret of three steps in one environment, rewards (1, -1, 0.5), the state behind them worth 0.25."""
    trace, zeros = retrace_coefficient(RHO.gather(1, ACTIONS).log()), th.zeros(3, 1, dtype=th.float64)
    next_value = th.cat([V[1:], tensor([[0.25]])])
    return retrace(tensor([[1], [-1], [0.5]]), Q.gather(1, ACTIONS), next_value, trace, zeros, zeros, gamma=0.9)


def step_coefficients() -> th.Tensor:
    return truncated_importance_coefficients(ACTIONS, PI, RHO, step_target() - V, Q - V, 2.0)


def test_parts_of_a_whole_step_by_hand() -> None:
    check(RHO.gather(1, ACTIONS), tensor([[0.55917903], [12.85346016], [0.66666667]]))
    check(V, tensor([[1.51387267], [1.24890992], [0.06666667]]))
    check(step_target(), tensor([[-0.18448108], [-0.565], [0.725]]))
    truncated = RHO.gather(1, ACTIONS).clamp(max=2) * (step_target() - V)
    check(truncated, tensor([[-0.9496838], [-3.62781983], [0.43888889]]))
    check((bias_correction(RHO, 2.0) * (Q - V))[1], tensor([0.63422037, 0, 0]))
    q = Q.gather(1, ACTIONS).requires_grad_()
    (gradient,) = th.autograd.grad(((step_target() - q).square() / 2).sum(), q)
    check(gradient, tensor([[0.18448108], [2.565], [-0.625]]))


@pytest.mark.parametrize(
    ("t", "space", "gradient", "k", "z", "by_logits"),
    [
        (
            0,
            "probs",
            (0, -4.24588437, 0),
            (-0.89522502, -1.20842738, -0.98937666),
            (1.27928726, -2.5190272, 1.41383108),
            (0.32602833, -0.67064697, 0.34461864),
        ),
        (
            0,
            "logits",
            (0.38704956, -0.73726649, 0.35021693),
            (0.0427017, -0.04661929, 0.00391759),
            None,
            (0.38704956, -0.73726649, 0.35021693),
        ),
        (
            0,
            "log_probs",
            (0, -0.9496838, 0),
            (-0.36485455, -0.2702909, -0.36485455),
            None,
            (0.38704956, -0.73726649, 0.35021693),
        ),
        (
            1,
            "probs",
            (-5.01067179, 0, 0),
            (-0.57130982, -2.31677557, -1.40519541),
            (-4.83465076, 0.71380048, 0.43294188),
            (-1.23555691, 0.51995641, 0.7156005),
        ),
        (
            1,
            "logits",
            (-1.15067278, 0.46177919, 0.6888936),
            (0.27550761, -0.18882526, -0.08668234),
            None,
            (-1.15067278, 0.46177919, 0.6888936),
        ),
        (
            1,
            "log_probs",
            (-3.22022352, 0, 0),
            (-0.3671654, -0.33222499, -0.30060961),
            (-2.47357767, 0.6755931, 0.61130191),
            (-1.71092876, 0.84576307, 0.86516568),
        ),
        (2, "probs", (0, 0, 1.31666667), (-1, -1, -1), None, (-0.1462963, -0.1462963, 0.29259259)),
        (2, "logits", (-0.1462963, -0.1462963, 0.29259259), (0, 0, 0), None, (-0.1462963, -0.1462963, 0.29259259)),
        (
            2,
            "log_probs",
            (0, 0, 0.43888889),
            (-0.33333333, -0.33333333, -0.33333333),
            None,
            (-0.1462963, -0.1462963, 0.29259259),
        ),
    ],
)
def test_whole_step_by_hand(t: int, space: str, gradient: Any, k: Any, z: Any, by_logits: Any) -> None:
    """With a bound of 0.5; None where it is not reached."""
    by_phi, of_divergence = (categorical_gradient(c, PI, space) for c in (step_coefficients(), -AVERAGE))
    check(by_phi[t], tensor(gradient))
    check(of_divergence[t], tensor(k))
    projected = trust_region_projection(by_phi, of_divergence, 0.5)
    check(projected[t], tensor(gradient if z is None else z))
    logits = LOGITS.clone().requires_grad_()
    phi = {"probs": logits.softmax(dim=1), "logits": logits, "log_probs": logits.log_softmax(dim=1)}[space]
    (through,) = th.autograd.grad((projected * phi).sum(), logits)
    check(through[t], tensor(by_logits))


def of_free_statistics(phi: th.Tensor, space: str) -> th.Tensor:
    """``(B, A)`` log-probabilities from statistics that are moved one at a time."""
    return {"probs": phi.log(), "logits": phi.log_softmax(dim=1), "log_probs": phi}[space]


@pytest.mark.parametrize("space", SPACES)
def test_gradients_are_derivatives(space: str) -> None:
    """Of ACER's gain with everything but log pi constant, of the divergence and of the entropy."""
    coefficients = step_coefficients()
    phi = {"probs": PI, "logits": LOGITS, "log_probs": PI.log()}[space].clone().requires_grad_()

    def gain(phi: th.Tensor) -> th.Tensor:
        log_pi = of_free_statistics(phi, space)
        taken = RHO.gather(1, ACTIONS).clamp(max=2) * (step_target() - V) * log_pi.gather(1, ACTIONS)
        return taken.sum() + ((1 - 2 / RHO).clamp(min=0) * PI * (Q - V) * log_pi).sum()

    def divergence(phi: th.Tensor) -> th.Tensor:
        return (AVERAGE * (AVERAGE.log() - of_free_statistics(phi, space))).sum()

    def entropy(phi: th.Tensor) -> th.Tensor:
        log_pi = of_free_statistics(phi, space)
        return -(log_pi.exp() * log_pi).sum()

    pairs = ((gain, coefficients), (divergence, -AVERAGE), (entropy, entropy_coefficients(PI)))
    for function, its_coefficients in pairs:
        result = categorical_gradient(its_coefficients, PI, space)
        assert not result.requires_grad
        th.testing.assert_close(result, th.autograd.grad(function(phi), phi)[0], rtol=0, atol=1e-12)
        for index in range(phi.numel()):
            step = th.zeros_like(phi).view(-1).index_fill(0, th.tensor([index]), 1e-6).view_as(phi)
            slope = (function(phi + step) - function(phi - step)) / 2e-6
            assert slope.item() == pytest.approx(result.view(-1)[index].item(), abs=1e-6)


def test_probabilities_of_0_are_no_infinities() -> None:
    pi = th.tensor([[1.0, 0.0, 1e-30]])
    average = th.tensor([[0.2, 0.3, 0.5]])
    k = categorical_gradient(-average, pi, "probs")
    z = trust_region_projection(categorical_gradient(entropy_coefficients(pi) + average, pi, "probs"), k, 1.0)
    assert z.isfinite().all()


MEAN, STD, AVERAGE_MEAN = row(0.1, -0.2), row(0.3, 0.3), row(-0.05, -0.4)
ACTION, DRAWN = row(0.3, 0.1), row(0.25, -0.45)


def log_ratio(action: th.Tensor) -> th.Tensor:
    """To a behaviour of mean 0."""
    return (action.square() - (action - MEAN).square()).sum(dim=1, keepdim=True) / (2 * 0.09)


@pytest.mark.parametrize(
    ("largest", "delta", "expected"),
    [
        (5.0, 1.0, (0.03541723, 0.42343708)),
        (5.0, 20.0, (2.2572846, 3.3859269)),
        (1.0, 1.0, (1.09737977, -0.37303483)),
        (1.0, 20.0, (2.99475859, 2.15680359)),
    ],
)
def test_gaussian_step_by_hand(largest: float, delta: float, expected: tuple[float, ...]) -> None:
    """Q_opc 1.9, V 0.7, Q~ of the drawn action 1.4."""
    rho, rho_drawn = log_ratio(ACTION).exp(), log_ratio(DRAWN).exp()
    assert [rho.item(), rho.sqrt().item(), rho_drawn.item()] == pytest.approx([0.84648172, 0.92004441, math.e])
    assert retrace_coefficient(log_ratio(ACTION), 2).item() == pytest.approx(0.92004441)
    taken = rho.clamp(max=largest) * (1.9 - 0.7) * gaussian_mean_gradient(ACTION, MEAN, STD)
    check(taken, row(2.2572846, 3.3859269))
    correction = bias_correction(rho_drawn, largest) * (1.4 - 0.7) * gaussian_mean_gradient(DRAWN, MEAN, STD)
    check(correction, row(0, 0) if largest == 5 else row(0.73747399, -1.22912331))
    k = -gaussian_mean_gradient(AVERAGE_MEAN, MEAN, STD)
    check(k, row(1.66666667, 2.22222222))
    reached = (k * (taken + correction)).sum().item()
    assert reached == pytest.approx(11.286423 if largest == 5 else 9.78416118)
    check(trust_region_projection(taken + correction, k, delta), row(*expected))


def test_gaussian_gradients_are_derivatives() -> None:
    """Of the log-density and of the divergence from an average policy of another standard deviation."""
    mean, std = MEAN.clone().requires_grad_(), row(0.3, 0.7)
    log_density = th.distributions.Normal(mean, std).log_prob(ACTION).sum()
    check(gaussian_mean_gradient(ACTION, MEAN, std), th.autograd.grad(log_density, mean)[0])
    divergence = gaussian_kl(AVERAGE_MEAN, row(0.5, 0.2), mean, std).sum()
    check(-gaussian_mean_gradient(AVERAGE_MEAN, MEAN, std), th.autograd.grad(divergence, mean)[0])
