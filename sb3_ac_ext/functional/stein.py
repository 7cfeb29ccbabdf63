"""
Stein variational gradients (Liu & Wang 2016, arXiv:1608.04471; Liu et al. 2017, "Stein Variational Policy Gradient",
arXiv:1704.02399). n is the number of particles, d the number of parameters of each.
"""

import math
from typing import Literal, get_args

import torch as th

BandwidthRule = Literal["offdiag", "liu", "author"]
ROUNDING = 1e-12
"""Share of the squares' sum below which a squared distance is none."""
LEAST_BANDWIDTH = 1e-12
"""Where more than half of the particles' distances are 0."""


def squared_distances(particles: th.Tensor) -> th.Tensor:
    """
    By one product of the particles around their mean; a distance that is lost in its rounding is 0.

    :param particles: ``(n, d)`` theta
    :return: ``(n, n)`` ||theta_i - theta_j||^2, in float64
    """
    centred = particles.double()
    centred = centred - centred.mean(dim=0)
    products = centred @ centred.T
    squares = products.diagonal()
    sums = squares + squares.unsqueeze(1)
    distances = sums - 2 * products
    return th.where(distances > ROUNDING * sums, 0.5 * (distances + distances.T), 0.0).fill_diagonal_(0)


def median_bandwidth(distances: th.Tensor, rule: BandwidthRule = "offdiag") -> th.Tensor:
    """
    The bandwidth at which a particle's kernels with the others add up to about 1, as exp(-median / h) = 1 / (n + 1).

        "offdiag": h = median of the squares of all pairs / log(n + 1)
        "liu":     h = median of the full matrix, its zeros included, / log(n + 1)     (Liu & Wang's program)
        "author":  half of that                                                       (the program of SVPG's authors)

    A median of an even number of squares is the mean of the two in the middle.

    :param distances: ``(n, n)`` from `squared_distances`
    :param rule: which of these
    :return: ``()`` h, in the distances' unit, at least `LEAST_BANDWIDTH`
    :raises ValueError: for another rule
    """
    if rule not in get_args(BandwidthRule):
        raise ValueError(
            f"bandwidth must be one of {', '.join(map(repr, get_args(BandwidthRule)))}, or a number, got {rule!r}"
        )
    n = len(distances)
    ordered = distances.flatten().sort()[0]
    if rule == "offdiag":
        ordered = ordered[n::2]  # behind the diagonal's zeros every pair is there twice
    if len(ordered) == 0:
        return distances.new_full((), LEAST_BANDWIDTH)
    middle = 0.5 * (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2])
    scale = math.log(n + 1) * (2 if rule == "author" else 1)
    return (middle / scale).clamp(min=LEAST_BANDWIDTH)


def phi(
    particles: th.Tensor,
    gradients: th.Tensor,
    temperature: th.Tensor | float = 1.0,
    bandwidth: BandwidthRule | th.Tensor | float = "offdiag",
    prior_gradients: th.Tensor | None = None,
    distances: th.Tensor | None = None,
) -> th.Tensor:
    """
    The direction in which all particles move at once, uphill (Liu et al. 2017, algorithm 1, with the kernel's gradient written
    out).

        k_ij  = exp(-||theta_i - theta_j||^2 / h)
        phi_i = 1/n sum_j [ k_ji (1/T grad J_j + grad log q0_j) + 2/h k_ji (theta_i - theta_j) ]

    The first term goes where the objective and the prior grow for similar particles, the second away from these. The prior is
    outside of 1/T, as the maximum-entropy solution q ~ q0 exp(J / T) has it.

    :param particles: ``(n, d)`` theta, of any float type
    :param gradients: ``(n, d)`` grad J_j, of what is to become large
    :param temperature: T > 0, in the unit of J
    :param bandwidth: h > 0 in squared units of theta, or a rule of `median_bandwidth`
    :param prior_gradients: ``(n, d)`` grad log q0_j; None for a flat prior
    :param distances: ``(n, n)`` what `squared_distances` says of theta, where that is known
    :return: ``(n, d)`` of the particles' type; computed in float64, as kernels of many parameters are differences of large
        numbers
    """
    n, theta = len(particles), particles.double()
    distances = squared_distances(theta) if distances is None else distances
    h = median_bandwidth(distances, bandwidth) if isinstance(bandwidth, str) else bandwidth
    kernel = th.exp(-distances / h)
    uphill = driving_force(theta, gradients.double(), temperature, prior_gradients)
    away = th.where(distances > 0, 2 / h * kernel, 0.0)  # coincident particles do not repel each other
    repulsion = away.sum(dim=1).diag() - away  # of theta: sum_j away_ij (theta_i - theta_j)
    return ((kernel @ uphill + repulsion @ theta) / n).to(particles.dtype)


def driving_force(
    particles: th.Tensor, gradients: th.Tensor, temperature: th.Tensor | float, prior_gradients: th.Tensor | None = None
) -> th.Tensor:
    """
    What moves a particle that does not know of the others.

        1/T grad J + grad log q0

    :param particles: ``(n, d)`` theta
    :param gradients: ``(n, d)`` grad J
    :param temperature: T > 0, in the unit of J
    :param prior_gradients: ``(n, d)`` grad log q0; None for a flat prior
    :return: ``(n, d)`` uphill, of the particles' type
    """
    uphill = gradients / temperature
    return (uphill if prior_gradients is None else uphill + prior_gradients).to(particles.dtype)


def linear_annealing(temperature: float, iterations: int, step: float, least: float) -> float:
    """
    max(T_min, T - s k)

    :param temperature: T at the start, > 0
    :param iterations: k, since the annealing began, >= 0
    :param step: s, what is taken off after each
    :param least: T_min, > 0
    :return: T after these iterations
    """
    return max(least, temperature - step * iterations)


def exponential_annealing(temperature: float, iterations: int, factor: float, least: float) -> float:
    """
    max(T_min, T f^k)

    :param temperature: T at the start, > 0
    :param iterations: k, since the annealing began, >= 0
    :param factor: f in (0, 1]
    :param least: T_min, > 0
    :return: T after these iterations
    """
    return max(least, temperature * factor**iterations)


def tanh_weight(progress: float, slope: float, power: float = 1.0) -> float:
    """
    tanh((c x)^p), the weight of the objective that grows from 0 to 1 (D'Angelo & Fortuin 2021, arXiv:2101.09815).

    :param progress: x, the share of the training that is over, in [0, 1]
    :param slope: c > 0
    :param power: p > 0
    :return: the weight of 1/T grad J, in [0, 1)
    """
    return math.tanh((slope * progress) ** power)
