"""Kullback-Leibler divergences between action distributions, in closed form. B is the batch size, A the action dimension."""

import torch as th
from torch.nn import functional as F


def gaussian_kl(mean: th.Tensor, std: th.Tensor, other_mean: th.Tensor, other_std: th.Tensor) -> th.Tensor:
    """
    Of diagonal Gaussians.

        KL(p || q) = sum_i [ log(sigma_q_i / sigma_p_i) + (sigma_p_i^2 + (mu_p_i - mu_q_i)^2) / (2 sigma_q_i^2) - 1/2 ]

    :param mean: ``(B, A)`` mu_p
    :param std: ``(B, A)`` sigma_p, > 0
    :param other_mean: ``(B, A)`` mu_q
    :param other_std: ``(B, A)`` sigma_q, > 0
    :return: ``(B,)`` in nats
    """
    spread = (std.square() + (mean - other_mean).square()) / (2 * other_std.square())
    return ((other_std / std).log() + spread - 0.5).sum(dim=1)


def categorical_kl(logits: th.Tensor, other_logits: th.Tensor) -> th.Tensor:
    """
    Of categorical distributions.

        KL(p || q) = sum_k p_k (log p_k - log q_k)

    :param logits: ``(B, D)`` of p, normalised or not
    :param other_logits: ``(B, D)`` of q
    :return: ``(B,)`` in nats
    """
    log_p, log_q = logits.log_softmax(dim=1), other_logits.log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def bernoulli_kl(logits: th.Tensor, other_logits: th.Tensor) -> th.Tensor:
    """
    Of independent Bernoulli variables, with l the logit of a one.

        KL(p || q) = sum_i [ p_i (l_p_i - l_q_i) + log(1 + exp l_q_i) - log(1 + exp l_p_i) ]

    :param logits: ``(B, A)`` l_p
    :param other_logits: ``(B, A)`` l_q
    :return: ``(B,)`` in nats
    """
    partition = F.softplus(other_logits) - F.softplus(logits)
    return (logits.sigmoid() * (logits - other_logits) + partition).sum(dim=1)
