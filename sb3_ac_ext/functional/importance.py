"""
Importance sampling: what weighs the actions of a behaviour policy mu (or b) as if the policy pi had chosen them.

Elementwise unless shapes are given. B is the batch size, A the number of actions.
"""

import math
from collections.abc import Sequence

import torch as th

LARGEST_LOG_RATIO = 20.0  # e^20 is 5e8; the exponential of float32 overflows at 88


def bounded_ratio(log_ratio: th.Tensor) -> th.Tensor:
    """
    exp(clip(log rho, -20, 20)), which is finite whatever the policies have become.

    :param log_ratio: log rho, in nats
    :return: rho
    """
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


@th.no_grad()
def importance_ratio(log_prob: th.Tensor, behaviour_log_prob: th.Tensor, largest: float | th.Tensor = math.inf) -> th.Tensor:
    """
    min(c, pi(a|s) / b(a|s)), the logarithm of the quotient within [-20, 20].

    :param log_prob: log pi(a|s), in nats
    :param behaviour_log_prob: log b(a|s), of what really acted and in the same unit of the action
    :param largest: c, > 0; infinite for a weight without bias
    :return: without gradient
    """
    return bounded_ratio(log_prob - behaviour_log_prob).clamp(max=largest)


def bias_correction(ratio: th.Tensor, largest: float | th.Tensor) -> th.Tensor:
    """
    The share of pi(a|s) that the truncated ratio leaves out (Wang et al. 2017, arXiv:1611.01224, section 3.2).

        [1 - c / rho]_+,  so that min(c, rho) mu + [1 - c / rho]_+ pi = pi

    :param ratio: rho = pi(a|s) / mu(a|s), >= 0
    :param largest: c, >= 0, may be infinite
    :return: in [0, 1]
    """
    return (1 - largest / ratio.clamp(min=th.finfo(ratio.dtype).tiny)).clamp(min=0)


@th.no_grad()
def truncated_importance_coefficients(
    actions: th.Tensor,
    probs: th.Tensor,
    ratios: th.Tensor,
    advantages: th.Tensor,
    action_advantages: th.Tensor,
    largest: float | th.Tensor,
) -> th.Tensor:
    """
    The policy gradient as factors of each grad log pi(a|s) (Wang et al. 2017, arXiv:1611.01224, section 3.2).

        min(c, rho(a_t)) A_t at the taken action, and at each action [1 - c / rho(a)]_+ pi(a) (Q(s, a) - V(s))

    Its expectation under mu has the same gradient for all c, that of the policy's expected value, where A_t is an unbiased
    estimate of Q(s, a_t) - V(s).

    :param actions: ``(B, 1)`` a_t, as indices
    :param probs: ``(B, A)`` pi(.|s)
    :param ratios: ``(B, A)`` rho = pi(.|s) / mu(.|s)
    :param advantages: ``(B, 1)`` A_t of the taken action, from the data, in reward units
    :param action_advantages: ``(B, A)`` Q(s, .) - V(s) of the critic, in reward units
    :param largest: c, >= 0, may be infinite
    :return: ``(B, A)`` without gradient
    """
    taken = ratios.gather(1, actions).clamp(max=largest) * advantages
    return (bias_correction(ratios, largest) * probs * action_advantages).scatter_add(1, actions, taken)


def uniform_choice_log_prob(choices: Sequence[int]) -> float:
    """
    -sum_i log n_i

    :param choices: n_i of each of the action's parts
    :return: log-probability of every action where all are equally probable, in nats
    """
    return -sum(math.log(n) for n in choices)


def uniform_box_log_prob(dimension: int) -> float:
    """
    -d log 2

    :param dimension: d
    :return: log-density of every action in [-1, 1]^d where all are equally probable, in nats
    """
    return -dimension * math.log(2)


def epsilon_mixture_log_prob(log_prob: th.Tensor, uniform_log_prob: float, epsilon: float | th.Tensor) -> th.Tensor:
    """
    Of a behaviour that acts by the policy, but at random with probability epsilon.

        log b(a|s) = log [(1 - epsilon) pi(a|s) + epsilon u(a)]

    :param log_prob: log pi(a|s), whoever chose the action, in nats
    :param uniform_log_prob: log u(a), of a random action
    :param epsilon: in [0, 1]
    :return: log b(a|s), in nats
    """
    share = th.as_tensor(epsilon, dtype=log_prob.dtype, device=log_prob.device)
    return th.logaddexp(th.log1p(-share) + log_prob, share.log() + uniform_log_prob)
