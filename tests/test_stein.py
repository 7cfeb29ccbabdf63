"""Stein variational gradients: numbers by hand, a double loop, finite differences of the kernel, limits."""

import math
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_ac_ext.functional.stein import (
    LEAST_BANDWIDTH,
    driving_force,
    exponential_annealing,
    linear_annealing,
    median_bandwidth,
    phi,
    squared_distances,
    tanh_weight,
)

THETA = th.tensor([[0.0, 0], [1, 0], [0, 2]], dtype=th.float64)
G = th.tensor([[1.0, 0], [0, 1], [-1, 1]], dtype=th.float64)
BY_RULE: dict[str, dict[str, Any]] = {
    "offdiag": {
        "h": 2.88539008,
        "kernel": (0.70710678, 0.25, 0.1767767),
        "repulsion": ((-0.16337636, -0.11552453), (0.20422045, -0.08168818), (-0.04084409, 0.19721271)),
        10.0: ((-0.13837636, -0.08362097), (0.22189812, -0.04246229), (-0.06584409, 0.2364386)),
        1.0: ((0.08662364, 0.20351106), (0.38099714, 0.31057072), (-0.29084409, 0.58947161)),
    },
    "liu": {
        "h": 0.72134752,
        "kernel": (0.25, 0.00390625, 0.00097656),
        "repulsion": ((-0.23104906, -0.00722028), (0.2319516, -0.00180507), (-0.00090254, 0.00902535)),
        10.0: ((-0.19784594, 0.00124326), (0.24025238, 0.03156081), (-0.03410566, 0.04239124)),
        1.0: ((0.10098219, 0.07741513), (0.31495941, 0.33185378), (-0.33293379, 0.34268421)),
    },
    "author": {
        "h": 0.36067376,
        "kernel": (0.0625, 1.526e-5, 9.5e-7),
        "repulsion": ((-0.11552453, -0.00005641), (0.11552629, -0.00000353), (-0.00000176, 0.00005993)),
        10.0: ((-0.08219171, 0.00202743), (0.11760959, 0.03332984), (-0.03333459, 0.0333933)),
        1.0: ((0.21780372, 0.02078201), (0.13635931, 0.33333013), (-0.33333001, 0.33339359)),
    },
}
"""Three particles in a plane: h, K01, K02, K12, what T -> inf leaves of phi, phi by temperature."""
rules = pytest.mark.parametrize("rule", BY_RULE)
dtypes = pytest.mark.parametrize("dtype", [th.float32, th.float64], ids=str)


def close(actual: Any, expected: Any, atol: float = 1e-8) -> None:
    numbers = (th.as_tensor(part, dtype=th.float64) for part in (actual, expected))
    th.testing.assert_close(*numbers, rtol=0, atol=atol)


def drawn(n: int = 5, d: int = 7, seed: int = 0) -> tuple[th.Tensor, th.Tensor]:
    """``(n, d)`` particles and gradients."""
    generator = th.Generator().manual_seed(seed)
    return tuple(th.randn(n, d, generator=generator, dtype=th.float64) for _ in range(2))  # type: ignore[return-value]


def kernel(one: th.Tensor, other: th.Tensor, h: float) -> th.Tensor:
    return th.exp(-((one - other) ** 2).sum() / h)


def looped(theta: th.Tensor, g: th.Tensor, temperature: float, h: float, prior: th.Tensor | None = None) -> th.Tensor:
    """phi as the paper has it, the kernel's gradient by autograd."""
    n, moved = len(theta), []
    for i in range(n):
        total = th.zeros_like(theta[0])
        for j in range(n):
            source = theta[j].clone().requires_grad_()
            k = kernel(source, theta[i], h)
            (slope,) = th.autograd.grad(k, source)
            uphill = g[j] / temperature if prior is None else g[j] / temperature + prior[j]
            total = total + k.detach() * uphill + slope
        moved.append(total / n)
    return th.stack(moved)


# Numbers


@rules
def test_bandwidth_and_kernel_by_hand(rule: Any) -> None:
    distances = squared_distances(THETA)
    close(distances, [[0.0, 1, 4], [1, 0, 5], [4, 5, 0]])
    h = median_bandwidth(distances, rule)
    close(h, BY_RULE[rule]["h"])
    k = th.exp(-distances / h)
    close(th.stack([k[0, 1], k[0, 2], k[1, 2]]), BY_RULE[rule]["kernel"])


@rules
@dtypes
@pytest.mark.parametrize("temperature", [10.0, 1.0])
def test_phi_by_hand(rule: Any, temperature: float, dtype: th.dtype) -> None:
    theta, g = THETA.to(dtype), G.to(dtype)
    direction = phi(theta, g, temperature, rule)
    assert direction.dtype == dtype
    close(direction, BY_RULE[rule][temperature], atol=1e-8 if dtype == th.float64 else 5e-8)
    h = median_bandwidth(squared_distances(theta), rule)
    for given in (h, h.item()):
        th.testing.assert_close(phi(theta, g, th.tensor(temperature), given), direction, rtol=0, atol=0)


@rules
def test_repulsion_by_hand(rule: Any) -> None:
    close(phi(THETA, th.zeros_like(G), 10.0, rule), BY_RULE[rule]["repulsion"])
    close(phi(THETA, G, math.inf, rule), BY_RULE[rule]["repulsion"])


def test_particles_are_not_attracted() -> None:
    """What comes out where the kernel's gradient has the other sign, as in several programs."""
    attracted = th.tensor([[0.18837636, 0.14742809], [-0.18654278, 0.12091407], [0.01584409, -0.15798682]])
    assert ((phi(THETA, G, 10.0) - attracted).abs() > 0.04).all()
    for h in (0.3, 1.0, 30.0):
        moved = THETA + 1e-3 * phi(THETA, th.zeros_like(G), 1.0, h)
        assert (squared_distances(moved) >= squared_distances(THETA)).all()


def test_one_step_of_an_optimizer() -> None:
    """Of Adam by the signs of phi, of SGD by phi itself."""
    for kind, rate, wanted in (
        (th.optim.Adam, 0.005, THETA + 0.005 * th.tensor([[-1.0, -1], [1, -1], [-1, 1]], dtype=th.float64)),
        (th.optim.SGD, 0.1, [[-0.01383764, -0.0083621], [1.02218981, -0.00424623], [-0.00658441, 2.02364386]]),
    ):
        theta = THETA.clone().requires_grad_()
        theta.grad = -phi(theta.detach(), G, 10.0)
        kind([theta], lr=rate).step()
        close(theta.detach(), wanted, atol=1e-8)


@pytest.mark.parametrize(
    ("h", "expected"),
    [
        (1.0, (-0.23575888, -0.44818084)),
        (1 / math.log(3), (-0.19953743, -0.46712924)),
        ("offdiag", (-0.19953743, -0.46712924)),
        (0.5 / math.log(3), (0.14475282, -0.70030838)),
        ("liu", (0.14475282, -0.70030838)),
        (1 / math.log(2), (-0.34657359, -0.40342641)),
    ],
)
def test_two_particles_on_a_line(h: Any, expected: tuple[float, float]) -> None:
    theta, g = th.tensor([[0.0], [1.0]], dtype=th.float64), th.tensor([[1.0], [-2.0]], dtype=th.float64)
    close(phi(theta, g, 1.0, h).flatten(), expected)
    close(phi(theta, 0 * g, 1.0, 1.0).flatten(), (-0.36787944, 0.36787944))
    close(phi(theta, g, 10.0, 1.0).flatten(), (-0.35466739, 0.28627341))


def test_medians() -> None:
    """Of the squares 1, 4, 9, 16, 36, 49 of six pairs: the mean of the two in the middle."""
    distances = squared_distances(th.tensor([[0.0], [1], [3], [7]]))
    assert sorted(distances.flatten().tolist()) == pytest.approx([0] * 4 + [1, 1, 4, 4, 9, 9, 16, 16, 36, 36, 49, 49])
    close(median_bandwidth(distances, "offdiag") * math.log(5), 12.5)
    close(median_bandwidth(distances, "liu") * math.log(5), 6.5)
    close(median_bandwidth(distances, "author") * 2 * math.log(5), 6.5)
    assert th.median(distances[distances > 0]) == pytest.approx(9)  # which is the lower one


@pytest.mark.parametrize("n", range(2, 8))
def test_medians_are_numpys(n: int) -> None:
    theta, _ = drawn(n)
    distances = squared_distances(theta)
    pairs = [((theta[i] - theta[j]) ** 2).sum().item() for i in range(n) for j in range(n)]
    close(distances.flatten(), pairs, atol=1e-12)
    off_diagonal = [pairs[i * n + j] for i in range(n) for j in range(i)]
    close(median_bandwidth(distances, "offdiag"), np.median(off_diagonal) / math.log(n + 1), atol=1e-12)
    close(median_bandwidth(distances, "liu"), np.median(pairs) / math.log(n + 1), atol=1e-12)


def test_annealing() -> None:
    linear = [linear_annealing(10.0, k, 0.02, 0.01) for k in (0, 100, 499, 500, 501)]
    assert linear == pytest.approx([10, 8, 0.02, 0.01, 0.01])
    exponential = [exponential_annealing(10.0, k, 0.99, 0.01) for k in (0, 100, 700)]
    assert exponential == pytest.approx([10, 3.660323, 0.01], rel=1e-6)
    tanh = [tanh_weight(x, 5.0) for x in (0.0, 0.1, 0.5, 1.0)]
    assert tanh == pytest.approx([0, 0.462117, 0.986614, 0.999909], abs=1e-6)
    assert tanh_weight(0.1, 5.0, 2.0) == pytest.approx(math.tanh(0.25))


# Independent computations


@pytest.mark.parametrize("temperature", [0.3, 10.0])
@pytest.mark.parametrize("n", [2, 3, 6])
def test_phi_is_the_papers_double_sum(n: int, temperature: float) -> None:
    theta, g = drawn(n)
    prior = -0.3 * theta
    for h in (0.7, 9.0):
        close(phi(theta, g, temperature, h), looped(theta, g, temperature, h), atol=1e-12)
        close(phi(theta, g, temperature, h, prior), looped(theta, g, temperature, h, prior), atol=1e-12)
        known = squared_distances(theta)
        close(phi(theta, g, temperature, h, prior, known), looped(theta, g, temperature, h, prior), atol=1e-12)


def test_repulsion_is_the_kernels_slope() -> None:
    """By differences, moving the other particle of each pair."""
    theta, _ = drawn(3, 2)
    wanted, h, eps = th.zeros_like(theta), 2.0, 1e-5
    for i in range(3):
        for j in range(3):
            for axis in range(2):
                step = th.zeros(2, dtype=th.float64)
                step[axis] = eps
                rise = kernel(theta[j] + step, theta[i], h) - kernel(theta[j] - step, theta[i], h)
                wanted[i, axis] += rise / (2 * eps) / 3
    close(phi(theta, th.zeros_like(theta), 1.0, h), wanted, atol=1e-9)


def test_normal_distribution() -> None:
    """N(1, 4) by fifty particles: the mean is right, the variance a little small."""
    theta = th.linspace(-3, -1, 50, dtype=th.float64).unsqueeze(1)
    for _ in range(400):
        theta = theta + 1.0 * phi(theta, -(theta - 1) / 4, 1.0, "liu")
    assert theta.mean().item() == pytest.approx(1, abs=0.01)
    assert theta.var(unbiased=False).item() == pytest.approx(3.75, abs=0.1)


# Properties


@rules
def test_symmetries(rule: Any) -> None:
    theta, g = drawn()
    direction = phi(theta, g, 10.0, rule)
    close(phi(theta, th.zeros_like(g), 10.0, rule).sum(dim=0), th.zeros(7), atol=1e-12)  # action is reaction
    close(phi(theta + 100.0, g, 10.0, rule), direction, atol=1e-10)
    order = th.tensor([3, 0, 4, 1, 2])
    close(phi(theta[order], g[order], 10.0, rule), direction[order], atol=1e-12)


def test_limits() -> None:
    theta, g = drawn()
    close(phi(theta, g, 2.0, 1e15), g.mean(dim=0).expand_as(g) / 2, atol=1e-12)  # all are one
    close(phi(theta, g, 2.0, 1e-3), g / 2 / len(g), atol=1e-12)  # none knows of another
    close(phi(theta, g, 1e15, 3.0), phi(theta, 0 * g, 1.0, 3.0), atol=1e-12)


@rules
@dtypes
def test_one_particle_is_alone(rule: Any, dtype: th.dtype) -> None:
    theta, g = (part[:1].to(dtype) for part in drawn())
    th.testing.assert_close(phi(theta, g, 4.0, rule), g / 4, rtol=0, atol=0)
    close(median_bandwidth(squared_distances(theta), rule), LEAST_BANDWIDTH, atol=0)


@rules
@dtypes
def test_coincident_particles_do_not_repel_each_other(rule: Any, dtype: th.dtype) -> None:
    theta, g = (part.to(dtype) for part in drawn(2))
    theta = theta[:1].expand(2, -1)
    close(phi(theta, g, 4.0, rule), (g.mean(dim=0) / 4).expand_as(g), atol=1e-7)
    pair = th.cat([theta, theta[:1] + 1])  # and one that is elsewhere
    direction = phi(pair, th.zeros_like(pair), 1.0, 5.0)
    close(direction[0], direction[1], atol=0)
    assert (direction[2] > 0).all()


def test_the_prior_does_not_care_for_the_temperature() -> None:
    theta, g = drawn()
    prior = -2.0 * theta
    close(driving_force(theta, g, 10.0, prior), g / 10 - 2 * theta, atol=1e-15)
    close(driving_force(theta, g, 10.0), g / 10, atol=0)
    of_prior = [phi(theta, g, t, 3.0, prior) - phi(theta, g, t, 3.0) for t in (1.0, 10.0)]
    close(of_prior[0], of_prior[1], atol=1e-14)


def test_many_parameters() -> None:
    """Of small networks: a fixed bandwidth would separate them, with the median all are neighbours."""
    theta = 0.1 * th.randn(4, 5000, generator=th.Generator().manual_seed(0))
    distances = squared_distances(theta)
    apart = distances[~th.eye(4, dtype=th.bool)]
    assert apart.min() > 90
    assert apart.max() < 110
    assert (th.exp(-apart) < 1e-30).all()
    k = th.exp(-apart / median_bandwidth(distances))
    assert k.min() > 0.17
    assert k.max() < 0.23
    assert k.mean() == pytest.approx(1 / 5, abs=0.01)


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_distances_of_near_particles_in_float32(shift: float) -> None:
    """They are not lost in the squares of the parameters."""
    theta = th.full((3, 50), shift)
    theta[1, 0] += 2.0**-10
    theta[2, 1] += 2.0**-9
    close(squared_distances(theta), [[0, 2**-20, 2**-18], [2**-20, 0, 2**-20 + 2**-18], [2**-18, 2**-20 + 2**-18, 0]], 1e-18)
