"""
Values of actions from the steps of another policy: Retrace (Munos et al. 2016, arXiv:1606.02647) and what ACER makes of it
(Wang et al. 2017, arXiv:1611.01224).

T is the number of steps, N that of environments; ends and ``next_value`` are those of `returns`.
"""

import torch as th

from sb3_ac_ext.functional.returns import reverse_scan


def retrace_coefficient(log_ratio: th.Tensor, dimension: int = 1) -> th.Tensor:
    """
    min(1, rho^(1/d)): with d = 1 Retrace's (Munos et al. 2016, section 3), with more what ACER takes for continuous actions
    (Wang et al. 2017, section 5).

    :param log_ratio: log rho = log pi(a|s) - log mu(a|s), in nats
    :param dimension: d, that of the action if it is continuous
    :return: of its shape, in [0, 1]
    """
    return (log_ratio / dimension).clamp(max=0).exp()


@th.no_grad()
def retrace(
    reward: th.Tensor,
    action_value: th.Tensor,
    next_value: th.Tensor,
    trace: th.Tensor,
    terminated: th.Tensor,
    truncated: th.Tensor,
    gamma: float | th.Tensor,
) -> th.Tensor:
    """
    Targets of an action-value function (Wang et al. 2017, section 3.1).

        Q_ret_t = r_t + gamma [V(s_{t+1}) + c_{t+1} (Q_ret_{t+1} - Q(s_{t+1}, a_{t+1}))]

    the second term only where the episode and the data go on. With c = 1 it is Q_opc of ACER's policy gradient, with c = 0 the
    one-step target. That of a step does not depend on the ratio of its own action. For V the expectation of Q over the policy,
    the fixed point is the policy's Q for every c in [0, min(1, rho)].

    :param reward: ``(T, N)`` r_t, in reward units
    :param action_value: ``(T, N)`` Q(s_t, a_t), in reward units
    :param next_value: ``(T, N)`` V(s_{t+1}), in reward units
    :param trace: ``(T, N)`` c_t, in [0, 1], see `retrace_coefficient`
    :param terminated: ``(T, N)`` 1 where the step terminated its episode
    :param truncated: ``(T, N)`` 1 where the step truncated it
    :param gamma: discount factor, in [0, 1]
    :return: ``(T, N)`` Q_ret, in reward units, without gradient
    """
    discount = gamma * (1 - terminated)
    following = th.cat([trace[1:], th.zeros_like(trace[:1])])
    errors = reward + discount * next_value - action_value
    return action_value + reverse_scan(errors, discount * (1 - truncated) * following)


def stochastic_duelling(value: th.Tensor, advantage: th.Tensor, sampled_advantages: th.Tensor) -> th.Tensor:
    """
    An action-value whose expectation over the policy is V(s) (Wang et al. 2017, section 5).

        Q~(s, a) = V(s) + A(s, a) - 1/n sum_i A(s, u_i),  u_i ~ pi(.|s)

    :param value: ``(...)`` V(s), in reward units
    :param advantage: ``(...)`` A(s, a), in reward units
    :param sampled_advantages: ``(..., n)`` A(s, u_i) of n actions drawn anew, in reward units
    :return: ``(...)`` in reward units
    """
    return value + advantage - sampled_advantages.mean(dim=-1)


@th.no_grad()
def duelling_value_target(ratio: th.Tensor, target: th.Tensor, action_value: th.Tensor, value: th.Tensor) -> th.Tensor:
    """
    What V of a stochastic duelling network is moved to besides, elementwise (Wang et al. 2017, section 5).

        V_target = min(1, rho) (Q_ret - Q~(s, a)) + V(s)

    :param ratio: rho of the taken action
    :param target: Q_ret, in reward units
    :param action_value: Q~(s, a) of the taken action, in reward units
    :param value: V(s), in reward units
    :return: in reward units, without gradient
    """
    return ratio.clamp(max=1) * (target - action_value) + value
