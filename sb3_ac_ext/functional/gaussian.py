"""Diagonal Gaussian policies and their tanh-squashed form. B is the batch size, A the action dimension."""

import math

import torch as th
from torch.nn import functional as F


def gaussian_log_prob(noise: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """
    Log-density of a diagonal Gaussian at ``u = mean + std * noise``.

        log N(u; mean, std^2) = sum_i [ -noise_i^2 / 2 - log std_i - log(2 pi) / 2 ]

    :param noise: ``(B, A)`` distance from the mean in standard deviations
    :param log_std: ``(B, A)`` logarithm of the standard deviation
    :return: ``(B, 1)`` in nats
    """
    return (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(dim=1, keepdim=True)


def log_squash_slope(u: th.Tensor) -> th.Tensor:
    """
    Logarithm of the derivative of tanh, exact where ``1 - tanh(u)^2`` would round to 0.

        log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u))

    :param u: ``(B, A)`` actions before the tanh
    :return: ``(B, A)`` <= 0
    """
    return 2 * (math.log(2) - u - F.softplus(-2 * u))


def squashed_gaussian(
    mean: th.Tensor, log_std: th.Tensor, noise: th.Tensor, epsilon: float = 0.0
) -> tuple[th.Tensor, th.Tensor]:
    """
    Reparametrised action of a squashed Gaussian and its log-density (Haarnoja et al. 2018, arXiv:1801.01290, appendix C).

        u = mean + std * noise;  a = tanh(u);  log pi(a) = log N(u; mean, std^2) - sum_i log(1 - a_i^2)

    :param mean: ``(B, A)`` of the Gaussian
    :param log_std: ``(B, A)`` logarithm of its standard deviation
    :param noise: ``(B, A)`` standard normal draws
    :param epsilon: 0 for the exact density; above, the correction is log(1 - a^2 + epsilon), never below log epsilon
    :return: ``(B, A)`` action in [-1, 1] and ``(B, 1)`` log-density in nats, per unit of the action scaled to [-1, 1]
    """
    u = mean + log_std.exp() * noise
    action = th.tanh(u)
    slope = th.log(1 - action.square() + epsilon) if epsilon else log_squash_slope(u)
    return action, gaussian_log_prob(noise, log_std) - slope.sum(dim=1, keepdim=True)


def squashed_gaussian_log_prob(action: th.Tensor, mean: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """
    Log-density of a given action under the exact squashed Gaussian, see `squashed_gaussian`.

    :param action: ``(B, A)`` in [-1, 1]; at a bound, where the density has none, that of the nearest number inside
    :param mean: ``(B, A)`` of the Gaussian
    :param log_std: ``(B, A)`` logarithm of its standard deviation
    :return: ``(B, 1)`` in nats, per unit of the action scaled to [-1, 1]
    """
    largest = 1 - th.finfo(action.dtype).eps
    u = th.atanh(action.clamp(-largest, largest))
    return gaussian_log_prob((u - mean) / log_std.exp(), log_std) - log_squash_slope(u).sum(dim=1, keepdim=True)
