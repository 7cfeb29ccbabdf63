"""Targets and losses of the actor-critic family. B is the batch size, A the action dimension."""

from collections.abc import Sequence

import torch as th
from torch.nn import functional as F


def smoothed_action(action: th.Tensor, noise: th.Tensor, clip: float) -> th.Tensor:
    """
    The target policy's action with clipped noise (Fujimoto et al. 2018, arXiv:1802.09477, eq. 14).

        a' = clip(a + clip(noise, -c, c), -1, 1)

    Both live in the action space scaled to [-1, 1], so the clip is symmetric whatever the environment's bounds are.

    :param action: ``(B, A)`` target policy's action, in [-1, 1]
    :param noise: ``(B, A)`` sample of the smoothing noise
    :param clip: c, largest absolute value of the noise, >= 0
    :return: ``(B, A)`` action in [-1, 1]
    """
    return (action + noise.clamp(-clip, clip)).clamp(-1, 1)


def td_target(reward: th.Tensor, done: th.Tensor, discount: th.Tensor | float, next_value: th.Tensor) -> th.Tensor:
    """
    One-step (or n-step) bootstrapped target.

        y = r + (1 - done) * discount * V(s')

    :param reward: ``(B, 1)`` reward, or the discounted sum of n rewards, in reward units
    :param done: ``(B, 1)`` 1 where the episode terminated; 0 elsewhere, truncation included
    :param discount: gamma, or ``(B, 1)`` gamma to the number of summed rewards
    :param next_value: ``(B, 1)`` value of the next state, in reward units
    :return: ``(B, 1)`` target; gradients are not stopped, call under ``torch.no_grad()``
    """
    return reward + (1 - done) * discount * next_value


def squared_error(values: Sequence[th.Tensor], target: th.Tensor, weights: th.Tensor | None = None) -> th.Tensor:
    """
    Sum over critics of the mean squared error (Fujimoto et al. 2018, Algorithm 1; no factor 1/2).

        sum_k mean w (Q_k - y)^2

    :param values: ``(B, 1)`` of each critic
    :param target: ``(B, 1)`` y, shared, without gradient
    :param weights: ``(B, 1)`` w, importance weights of a prioritised replay buffer (Schaul et al. 2016, arXiv:1511.05952,
        section 3.4); None for 1
    :return: ``()`` loss
    """
    if weights is None:
        errors = [F.mse_loss(value, target) for value in values]
    else:
        errors = [(weights * (value - target).square()).mean() for value in values]
    return sum(errors[1:], errors[0])


def td_errors(values: Sequence[th.Tensor], target: th.Tensor) -> th.Tensor:
    """
    What a prioritised replay buffer makes priorities of: the mean over critics of |Q_k - y|.

    :param values: ``(B, 1)`` of each critic
    :param target: ``(B, 1)`` y, shared
    :return: ``(B, 1)``, without gradient
    """
    return (th.stack(list(values)) - target).detach().abs().mean(dim=0)


def soft_value(q: th.Tensor, log_prob: th.Tensor, ent_coef: th.Tensor | float) -> th.Tensor:
    """
    One-sample estimate of the soft state value (Haarnoja et al. 2018, arXiv:1812.05905, eq. 3).

        V(s) = Q(s, a) - alpha log pi(a|s)  with a ~ pi(s)

    The mean of its negative is the policy's loss (eq. 9 there).

    :param q: ``(B, 1)`` value of the sampled action, in reward units
    :param log_prob: ``(B, 1)`` its log-density, in nats
    :param ent_coef: alpha, reward units per nat, > 0
    :return: ``(B, 1)`` in reward units
    """
    return q - ent_coef * log_prob


def ent_coef_loss(log_ent_coef: th.Tensor, log_prob: th.Tensor, target_entropy: float) -> th.Tensor:
    """
    Loss of the entropy coefficient (Haarnoja et al. 2018, arXiv:1812.05905, eq. 18, with log alpha in place of alpha).

        J = -mean log alpha (log pi(a|s) + H)

    Descending it lowers alpha where the policy's entropy is above H and raises it below. Its gradient with respect to log
    alpha is the paper's divided by alpha.

    :param log_ent_coef: ``(1,)`` log alpha
    :param log_prob: ``(B, 1)`` log-density of the policy's actions, without gradient
    :param target_entropy: H, in nats
    :return: scalar
    """
    return -(log_ent_coef * (log_prob + target_entropy)).mean()
