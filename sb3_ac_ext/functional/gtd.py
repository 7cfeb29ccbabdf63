"""
The linear off-policy actor-critic (Degris et al. 2012, "Off-Policy Actor-Critic", arXiv:1205.4839): GTD(lambda) and an actor
with a trace. N is the number of environments, each with traces of its own, F that of features.
"""

from typing import NamedTuple

import torch as th


class GTDStep(NamedTuple):
    """
    :param delta: ``(N,)`` temporal-difference errors, in reward units
    :param trace: ``(N, F)`` the critic's new traces e
    :param v: ``(N, F)`` what each environment adds to v, the values' weights, for each unit of its step size
    :param w: ``(N, F)`` what it adds to w, the correction's weights
    """

    delta: th.Tensor
    trace: th.Tensor
    v: th.Tensor
    w: th.Tensor


def eligibility_trace(trace: th.Tensor, gradient: th.Tensor, ratio: th.Tensor, decay: th.Tensor) -> th.Tensor:
    """
    e <- rho (x + d e)

    Of the critic x is the features, of the actor psi = grad log pi(a|s), whose update is delta e_u.

    :param trace: ``(N, ...)`` e of the step before
    :param gradient: ``(N, ...)`` x
    :param ratio: ``(N,)`` rho = pi(a|s) / b(a|s)
    :param decay: ``(N,)`` d, gamma lambda; 0 at the first step of an episode
    :return: ``(N, ...)`` e
    """
    per_env = (-1, *(1,) * (trace.dim() - 1))
    return ratio.view(per_env) * (gradient + decay.view(per_env) * trace)


def gtd_step(
    v: th.Tensor,
    w: th.Tensor,
    trace: th.Tensor,
    features: th.Tensor,
    next_features: th.Tensor,
    reward: th.Tensor,
    ratio: th.Tensor,
    decay: th.Tensor,
    discount: th.Tensor,
    gtd_lambda: float,
) -> GTDStep:
    """
    A step of GTD(lambda) (Maei 2011, "Gradient Temporal-Difference Learning Algorithms"; Degris et al. 2012, algorithm 1).

        delta = r + gamma v . x' - v . x
        v: delta e - gamma (1 - lambda) (w . e) x';  w: delta e - (w . x) x

    With w = 0 the first is TD(lambda)'s.

    :param v: ``(F,)`` weights of the values
    :param w: ``(F,)`` weights of the correction
    :param trace: ``(N, F)`` e of the step before
    :param features: ``(N, F)`` x of the observations
    :param next_features: ``(N, F)`` x' of those that the steps led to; of the episode's last one where it was truncated
    :param reward: ``(N,)`` r, in reward units
    :param ratio: ``(N,)`` rho = pi(a|s) / b(a|s)
    :param decay: ``(N,)`` lambda times the discount of the step before; 0 at the first step of an episode
    :param discount: ``(N,)`` gamma; 0 where the step terminated its episode
    :param gtd_lambda: lambda, in [0, 1]
    :return: directions, not yet multiplied by step sizes
    """
    delta = reward + discount * (next_features @ v) - features @ v
    trace = eligibility_trace(trace, features, ratio, decay)
    update, correction = delta[:, None] * trace, discount * (1 - gtd_lambda) * (trace @ w)
    return GTDStep(delta, trace, update - correction[:, None] * next_features, update - (features @ w)[:, None] * features)
