"""Kullback-Leibler divergences between action distributions, in closed form. B is the batch size, A the action dimension."""

import torch as th
from torch.nn import functional as F


def gaussian_kl(mean: th.Tensor, std: th.Tensor, other_mean: th.Tensor, other_std: th.Tensor) -> th.Tensor:
    """
    Of diagonal Gaussians.

        KL(p || q) = sum_i [ (r_i^2 - 1 + ((mu_p_i - mu_q_i) / sigma_q_i)^2) / 2 - log r_i ],  r_i = sigma_p_i / sigma_q_i

    :param mean: ``(B, A)`` mu_p
    :param std: ``(B, A)`` sigma_p, > 0
    :param other_mean: ``(B, A)`` mu_q
    :param other_std: ``(B, A)`` sigma_q, > 0
    :return: ``(B,)`` in nats
    """
    ratio, distance = std / other_std, (mean - other_mean) / other_std
    return ((ratio.square() - 1 + distance.square()) / 2 - ratio.log()).sum(dim=1)


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

        KL(p || q) = sum_i [ p_i log(p_i / q_i) + (1 - p_i) log((1 - p_i) / (1 - q_i)) ],  -log p = log(1 + exp(-l))

    :param logits: ``(B, A)`` l_p
    :param other_logits: ``(B, A)`` l_q
    :return: ``(B,)`` in nats
    """
    of_one = F.softplus(-other_logits) - F.softplus(-logits)
    of_zero = F.softplus(other_logits) - F.softplus(logits)
    return (logits.sigmoid() * of_one + (-logits).sigmoid() * of_zero).sum(dim=1)
