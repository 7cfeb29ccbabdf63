"""
Losses of a policy whose actions are judged by a critic, and of the critic. B is the batch size, K the number of actions that
are judged in each state, A the number of all actions.
"""

import torch as th


def score_function_loss(log_prob: th.Tensor, advantage: th.Tensor, ratio: th.Tensor | None = None) -> th.Tensor:
    """
    The likelihood-ratio gradient's loss (Williams 1992; with the ratio Degris et al. 2012, arXiv:1205.4839).

        -mean sg(rho A) log pi(a|s)

    Its gradient is that of the policy's expected value in the states at hand, if the actions are the policy's own, or another
    policy's with rho.

    :param log_prob: ``(B, K)`` log pi(a|s), in nats
    :param advantage: ``(B, K)`` A = Q(s, a) minus what does not depend on the action: 0, V(s), `leave_one_out`
    :param ratio: ``(B, K)`` rho = pi(a|s) / b(a|s); None for 1
    :return: ``()``, with gradient in ``log_prob`` alone
    """
    weight = advantage if ratio is None else ratio * advantage
    return -(weight.detach() * log_prob).mean()


def leave_one_out(q: th.Tensor) -> th.Tensor:
    """
    For each of several actions of a state the mean value of the others, a baseline that leaves the gradient unbiased.

        b_k = 1/(K - 1) sum_{j != k} Q(s, a_j)

    :param q: ``(B, K)`` Q(s, a_k), K >= 2
    :return: ``(B, K)`` in reward units
    """
    return (q.sum(dim=1, keepdim=True) - q) / (q.shape[1] - 1)


def policy_value(logits: th.Tensor, q: th.Tensor) -> th.Tensor:
    """
    V(s) = sum_a pi(a|s) Q(s, a),  pi = softmax(logits)

    :param logits: ``(B, A)``
    :param q: ``(B, A)`` Q(s, .), in reward units
    :return: ``(B, 1)`` in reward units
    """
    return (logits.softmax(dim=1) * q).sum(dim=1, keepdim=True)


def exact_policy_loss(logits: th.Tensor, q: th.Tensor) -> th.Tensor:
    """
    What `score_function_loss` estimates, by all actions.

        -mean sum_a pi(a|s) sg(Q(s, a))

    :param logits: ``(B, A)``
    :param q: ``(B, A)`` Q(s, .), in reward units
    :return: ``()``, with gradient in ``logits`` alone
    """
    return -policy_value(logits, q.detach()).mean()


def weighted_value_loss(value: th.Tensor, target: th.Tensor, ratio: th.Tensor) -> th.Tensor:
    """
    Of V, from actions of another policy.

        mean 1/2 rho (y - V(s))^2

    The weight stands before the square, not in it, so that V goes to the expectation of y over the policy.

    :param value: ``(B, 1)`` V(s), in reward units
    :param target: ``(B, 1)`` y, without gradient
    :param ratio: ``(B, 1)`` rho = pi(a|s) / b(a|s), without gradient
    :return: ``()``
    """
    return (ratio * (target - value).square()).mean() / 2
