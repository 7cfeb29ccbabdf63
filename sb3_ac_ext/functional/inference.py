"""
How well a model of somebody's policy explains what that one did (Lowe et al. 2017, arXiv:1706.02275, section 4.2).

    L(phi) = -E [ log mu_hat(a|o) + lambda H(mu_hat(.|o)) ]                                                          (eq. 7)

B is the batch size, n the number of choices, A the action dimension.
"""

import math
from typing import NamedTuple

import torch as th

from sb3_ac_ext.functional.gaussian import gaussian_log_prob, log_squash_slope

LARGEST_ACTION = 0.999999
"""Nearer to a bound an action counts as this one: at the bound itself there is no inverse of tanh."""


class Fit(NamedTuple):
    """What the loss of a model is made of."""

    surprise: th.Tensor
    """``(B,)`` -log mu_hat(a|o), in nats."""
    entropy: th.Tensor
    """``(B,)`` H(mu_hat(.|o)), in nats; of a squashed Gaussian that before its tanh."""

    def loss(self, ent_coef: float) -> th.Tensor:
        """
        :param ent_coef: lambda, >= 0; the larger, the nearer the best model is to the uniform one
        :return: ``(B,)``
        """
        return self.surprise - ent_coef * self.entropy


def categorical_fit(logits: th.Tensor, actions: th.Tensor) -> Fit:
    """
    Of choices; a relaxed one counts by its shares.

        -log mu_hat(a) := -sum_k a_k log softmax(logits)_k

    :param logits: ``(B, n)``
    :param actions: ``(B, n)`` one-hots, or relaxed ones whose entries sum to 1
    :return: the two terms
    """
    log_probs = logits.log_softmax(dim=1)
    return Fit(-(actions * log_probs).sum(dim=1), -(log_probs.exp() * log_probs).sum(dim=1))


def gaussian_entropy(log_std: th.Tensor) -> th.Tensor:
    """
    Of a diagonal Gaussian.

        H = sum_i [ log std_i + log(2 pi e) / 2 ]

    :param log_std: ``(B, A)`` logarithm of the standard deviation
    :return: ``(B,)`` in nats
    """
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(dim=1)


def gaussian_fit(mean: th.Tensor, log_std: th.Tensor, actions: th.Tensor) -> Fit:
    """
    Of actions without bounds, by a diagonal Gaussian.

    :param mean: ``(B, A)``
    :param log_std: ``(B, A)`` logarithm of the standard deviation
    :param actions: ``(B, A)``
    :return: the two terms
    """
    return Fit(-gaussian_log_prob((actions - mean) / log_std.exp(), log_std).squeeze(1), gaussian_entropy(log_std))


def squashed_gaussian_fit(mean: th.Tensor, log_std: th.Tensor, actions: th.Tensor) -> Fit:
    """
    Of actions in a box, by a Gaussian behind a tanh.

        -log mu_hat(a) = -log N(atanh a; mean, std^2) + sum_i log(1 - a_i^2)

    :param mean: ``(B, A)`` of the Gaussian
    :param log_std: ``(B, A)`` logarithm of its standard deviation
    :param actions: ``(B, A)`` in [-1, 1], at most `LARGEST_ACTION` from 0
    :return: the two terms; the entropy is the Gaussian's, as that of its tanh has no closed form
    """
    u = actions.clamp(-LARGEST_ACTION, LARGEST_ACTION).atanh()
    surprise, entropy = gaussian_fit(mean, log_std, u)
    return Fit(surprise + log_squash_slope(u).sum(dim=1), entropy)
