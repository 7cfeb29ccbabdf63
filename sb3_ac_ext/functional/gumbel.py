"""Discrete actions that a gradient passes through. B is the batch size, n the number of choices."""

import torch as th


def gumbel_noise(like: th.Tensor) -> th.Tensor:
    """
    Standard Gumbel draws, -log E with E ~ Exp(1).

    :param like: whose shape, type and device they have
    :return: the draws
    """
    return -th.empty_like(like).exponential_().log()


def one_hot_argmax(logits: th.Tensor) -> th.Tensor:
    """
    :param logits: ``(..., n)``
    :return: ``(..., n)`` 1 at the largest one (the first of equals), 0 elsewhere
    """
    return th.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)


def gumbel_one_hot(logits: th.Tensor, noise: th.Tensor, temperature: float) -> th.Tensor:
    """
    A sample of the categorical distribution with the gradient of its relaxation (Jang et al. 2017, arXiv:1611.01144,
    section 2.2, straight-through).

        y = softmax((logits + noise) / temperature);  z = one_hot(argmax y);  dz / dlogits := dy / dlogits

    With standard Gumbel noise z is choice i with probability softmax(logits)_i, whatever the temperature is.

    :param logits: ``(..., n)``
    :param noise: ``(..., n)`` standard Gumbel draws
    :param temperature: > 0; the smaller, the closer is the relaxation to a one-hot and the larger the gradient's variance
    :return: ``(..., n)`` one-hots
    """
    relaxed = th.softmax((logits + noise) / temperature, dim=-1)
    return one_hot_argmax(relaxed.detach()) + (relaxed - relaxed.detach())
