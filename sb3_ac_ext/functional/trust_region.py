"""
ACER's trust region: each state's policy gradient by the distribution's statistics phi, changed as little as keeps the policy
near the average policy (Wang et al. 2017, arXiv:1611.01224, section 3.3).

B is the batch size, A the number of actions, D the action dimension. What is returned is constant: the policy's loss is
``-(z * phi).sum(dim=1).mean()``, with gradient in phi alone.
"""

from typing import Literal

import torch as th

Space = Literal["probs", "logits", "log_probs"]

SMALLEST_PROB = 1e-6  # below it, derivatives by probabilities are those at it, so that their squares stay in float32's range


@th.no_grad()
def trust_region_projection(gradient: th.Tensor, kl_gradient: th.Tensor, delta: float | th.Tensor) -> th.Tensor:
    """
    The nearest z to g that, to first order, lets the divergence grow by no more than delta (Wang et al. 2017, section 3.3).

        z = g - max(0, (k . g - delta) / ||k||^2) k,  in each state;  g where k = 0

    :param gradient: ``(B, P)`` g, gradient of the gain by phi (ascent)
    :param kl_gradient: ``(B, P)`` k, gradient of KL(average || pi) by phi
    :param delta: bound, >= 0
    :return: ``(B, P)`` z
    """
    excess = (kl_gradient * gradient).sum(dim=1, keepdim=True) - delta
    squared_norm = kl_gradient.square().sum(dim=1, keepdim=True).clamp(min=th.finfo(gradient.dtype).tiny)
    return gradient - (excess / squared_norm).clamp(min=0) * kl_gradient


@th.no_grad()
def categorical_gradient(coefficients: th.Tensor, probs: th.Tensor, space: Space) -> th.Tensor:
    """
    sum_a C_a grad log pi(a|s), by the statistics that are called phi.

        probabilities: C / pi;  logits: C - pi sum_a C_a;  log-probabilities: C

    With the coefficients ``-average_probs`` it is k, the gradient of KL(average || pi). The trust region acts on other states
    in other spaces: by logits k is 0 where pi is the average policy, by probabilities each of its components is -1 there.

    :param coefficients: ``(B, A)`` C
    :param probs: ``(B, A)`` pi
    :param space: which phi is; "probs" as published
    :return: ``(B, A)``
    """
    if space == "probs":
        return coefficients / probs.clamp(min=SMALLEST_PROB)
    return coefficients - probs * coefficients.sum(dim=1, keepdim=True) if space == "logits" else coefficients


@th.no_grad()
def entropy_coefficients(probs: th.Tensor) -> th.Tensor:
    """
    Those of `categorical_gradient` that give the gradient of the entropy.

        C = -pi (log pi + 1)

    :param probs: ``(B, A)`` pi
    :return: ``(B, A)``
    """
    return -(th.xlogy(probs, probs) + probs)


@th.no_grad()
def gaussian_mean_gradient(action: th.Tensor, mean: th.Tensor, std: th.Tensor) -> th.Tensor:
    """
    grad log N(a; m, sigma^2) by phi = m.

        (a - m) / sigma^2

    Minus that of the average policy's mean in place of the action is k, the gradient of KL(average || pi), whatever the
    average policy's standard deviation is.

    :param action: ``(B, D)`` a
    :param mean: ``(B, D)`` m
    :param std: ``(B, D)`` sigma, > 0
    :return: ``(B, D)``
    """
    return (action - mean) / std.square()
