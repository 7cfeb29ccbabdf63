"""
Returns and advantages of rollouts, all on one backward recursion. T is the number of steps, N that of environments.

A step ends its episode if it terminates or truncates it. Both cut every sum; a terminated episode is worth 0 from there on,
a truncated one what its last observation is worth. So ``next_value`` is V of the observation that the step led to: of the
episode's last one where it ended, not of the next episode's first.
"""

import torch as th


def reverse_scan(delta: th.Tensor, decay: th.Tensor, largest: float | None = None) -> th.Tensor:
    """
    x[t] = delta[t] + decay[t] * x[t + 1], with x[T] = 0.

    Each round doubles the number of terms that are in the sums (Hillis and Steele 1986), so that log2 T of them are enough.

    :param delta: ``(T, N)`` what each step adds
    :param decay: ``(T, N)`` what is kept of the sum behind it
    :param largest: bound of the absolute values of the sums and of the products of decays, for decays above 1: what has
        overflowed would be NaN and not 0 before a decay of 0; None where no decay is above 1
    :return: ``(T, N)`` the sums
    """
    total, reach = delta, 1
    while reach < len(delta):
        total = th.cat([total[:-reach] + decay[: len(delta) - reach] * total[reach:], total[-reach:]])
        decay = decay[:-reach] * decay[reach:]  # of as many steps as are in the sums
        if largest is not None:
            total, decay = total.clamp(-largest, largest), decay.clamp(-largest, largest)
        reach *= 2
    return total


def episode_discounts(start: th.Tensor, gamma: float) -> th.Tensor:
    """
    The weight of each step's update in the gradient of the discounted return (Sutton and Barto 2018, section 13.3).

        I_t = gamma^(t - t_start)

    :param start: ``(T, N)`` 1 where the step is its episode's first, as all of the first row are
    :param gamma: discount factor, in [0, 1]
    :return: ``(T, N)``
    """
    steps = th.arange(len(start), dtype=start.dtype, device=start.device)[:, None]
    since = steps - th.cummax(th.where(start > 0, steps, 0), dim=0).values
    return gamma**since


def monte_carlo_returns(
    reward: th.Tensor, next_value: th.Tensor, terminated: th.Tensor, truncated: th.Tensor, gamma: float
) -> th.Tensor:
    """
    Discounted sums of rewards to the end of the episode, bootstrapped where it was truncated or the data end.

        G_t = r_t + gamma G_{t+1};  at a last step r_t + gamma V(s_{t+1}), at a terminated one r_t

    With ``next_value`` 0 nothing is bootstrapped.

    :param reward: ``(T, N)`` r_t, in reward units
    :param next_value: ``(T, N)`` V(s_{t+1}), read only where a sum is cut
    :param terminated: ``(T, N)`` 1 where the step terminated its episode
    :param truncated: ``(T, N)`` 1 where the step truncated it
    :param gamma: discount factor, in [0, 1]
    :return: ``(T, N)`` returns, in reward units
    """
    not_done = _not_done(terminated, truncated)
    cut = 1 - not_done
    cut[-1] = 1
    return reverse_scan(reward + gamma * cut * (1 - terminated) * next_value, gamma * not_done)


def n_step_returns(
    reward: th.Tensor, next_value: th.Tensor, terminated: th.Tensor, truncated: th.Tensor, gamma: float, n: int
) -> th.Tensor:
    """
    Discounted sums of up to n rewards, bootstrapped behind the last of them (Sutton and Barto 2018, eq. 7.1).

        G_t = r_t + gamma r_{t+1} + ... + gamma^{m-1} r_{t+m-1} + gamma^m V(s_{t+m})

    where m is n, or less where the episode or the data end before.

    :param reward: ``(T, N)`` r_t, in reward units
    :param next_value: ``(T, N)`` V(s_{t+1}), in reward units
    :param terminated: ``(T, N)`` 1 where the step terminated its episode
    :param truncated: ``(T, N)`` 1 where the step truncated it
    :param gamma: discount factor, in [0, 1]
    :param n: number of rewards, >= 1
    :return: ``(T, N)`` returns, in reward units
    """
    not_done = _not_done(terminated, truncated)
    not_done[-1] = 0
    one_step = reward + gamma * (1 - terminated) * next_value
    returns = one_step
    for _ in range(n - 1):
        following = th.cat([returns[1:], returns[-1:]])
        returns = th.where(not_done > 0, reward + gamma * following, one_step)
    return returns


def gae(
    reward: th.Tensor,
    value: th.Tensor,
    next_value: th.Tensor,
    terminated: th.Tensor,
    truncated: th.Tensor,
    gamma: float,
    gae_lambda: float,
) -> th.Tensor:
    """
    Generalised advantage estimates (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

        A_t = delta_t + gamma lambda A_{t+1},  delta_t = r_t + gamma V(s_{t+1}) - V(s_t)

    ``A + V`` is the lambda-return; with lambda 1 it is `monte_carlo_returns`, with 0 the one-step return.

    :param reward: ``(T, N)`` r_t, in reward units
    :param value: ``(T, N)`` V(s_t), in reward units
    :param next_value: ``(T, N)`` V(s_{t+1}), in reward units
    :param terminated: ``(T, N)`` 1 where the step terminated its episode
    :param truncated: ``(T, N)`` 1 where the step truncated it
    :param gamma: discount factor, in [0, 1]
    :param gae_lambda: lambda, in [0, 1]
    :return: ``(T, N)`` advantages, in reward units
    """
    delta = reward + gamma * (1 - terminated) * next_value - value
    return reverse_scan(delta, gamma * gae_lambda * _not_done(terminated, truncated))


def _not_done(terminated: th.Tensor, truncated: th.Tensor) -> th.Tensor:
    """``(T, N)`` 1 where the episode goes on behind the step."""
    return (1 - terminated) * (1 - truncated)
