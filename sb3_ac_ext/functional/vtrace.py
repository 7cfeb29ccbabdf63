"""
V-trace (Espeholt et al. 2018, arXiv:1802.01561): values and advantages of a policy from the steps of a slightly older one.

T is the number of steps, N that of environments; ends and ``next_value`` are those of `returns`.
"""

from typing import NamedTuple

import torch as th

from sb3_ac_ext.functional.importance import bounded_ratio
from sb3_ac_ext.functional.returns import reverse_scan


class VTrace(NamedTuple):
    """
    :param values: ``(T, N)`` v_t, targets of the value function, in reward units
    :param advantages: ``(T, N)`` factors of grad log pi(a_t|s_t), rho_t of the policy gradient included, in reward units
    :param rhos: ``(T, N)`` importance ratios before any bound
    """

    values: th.Tensor
    advantages: th.Tensor
    rhos: th.Tensor


@th.no_grad()
def vtrace(
    reward: th.Tensor,
    value: th.Tensor,
    next_value: th.Tensor,
    log_ratio: th.Tensor,
    terminated: th.Tensor,
    truncated: th.Tensor,
    gamma: float | th.Tensor,
    *,
    rho_bar: float | th.Tensor = 1.0,
    c_bar: float | th.Tensor = 1.0,
    pg_rho_bar: float | th.Tensor = 1.0,
    vtrace_lambda: float | th.Tensor = 1.0,
) -> VTrace:
    """
    The paper's eq. 1 by its remark 1, lambda by its remark 2, and the factor of the policy gradient of its section 4.2.

        delta_t = min(rho_bar, rho_t) (r_t + gamma V(s_{t+1}) - V(s_t))
        v_t - V(s_t) = delta_t + gamma lambda min(c_bar, rho_t) (v_{t+1} - V(s_{t+1}))
        A_t = min(pg_rho_bar, rho_t) (r_t + gamma v_{t+1} - V(s_t)),  with V(s_{t+1}) for v_{t+1} where a sum is cut

    The values of the fixed point are those of the policy proportional to min(rho_bar mu, pi); c_bar and lambda change how fast
    they are reached. On the policy, with lambda 1 and no bar below 1, v_t is `returns.monte_carlo_returns` and A_t is
    v_t - V(s_t).

    :param reward: ``(T, N)`` r_t, in reward units
    :param value: ``(T, N)`` V(s_t) of the learner, in reward units
    :param next_value: ``(T, N)`` V(s_{t+1}) of the learner, in reward units
    :param log_ratio: ``(T, N)`` log rho_t = log pi(a_t|s_t) - log mu(a_t|s_t), pi the learner's policy, mu the one that acted;
        clipped to [-20, 20]
    :param terminated: ``(T, N)`` 1 where the step terminated its episode
    :param truncated: ``(T, N)`` 1 where the step truncated it
    :param gamma: discount factor, in [0, 1]
    :param rho_bar: bound of the ratios that weigh the errors, > 0, may be infinite
    :param c_bar: bound of the ratios in the trace, in (0, rho_bar], may be infinite
    :param pg_rho_bar: bound of the ratios of the policy gradient, > 0, may be infinite
    :param vtrace_lambda: lambda, in [0, 1]
    :return: without gradient
    """
    rhos = bounded_ratio(log_ratio)
    discount, cut = gamma * (1 - terminated), (terminated + truncated) > 0
    errors = rhos.clamp(max=rho_bar) * (reward + discount * next_value - value)
    decay = th.where(cut, 0.0, discount * vtrace_lambda * rhos.clamp(max=c_bar))
    values = value + reverse_scan(errors, decay, largest=th.finfo(errors.dtype).max)
    following = th.cat([th.where(cut[:-1], next_value[:-1], values[1:]), next_value[-1:]])
    return VTrace(values, rhos.clamp(max=pg_rho_bar) * (reward + discount * following - value), rhos)
