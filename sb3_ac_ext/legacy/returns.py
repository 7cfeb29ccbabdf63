"""
Returns and advantages of rollouts, all on one backward recursion. T is the number of steps, N that of environments.

A step ends its episode if it terminates or truncates it. Both cut every sum; a terminated episode is worth 0 from there on,
a truncated one what its last observation is worth. So ``next_value`` is V of the observation that the step led to: of the
episode's last one where it ended, not of the next episode's first. Tensors and numpy arrays are taken alike.
"""

from sb3_ac_ext.legacy.arrays import Array, namespace


def reverse_scan(delta: Array, decay: Array) -> Array:
    """
    x[t] = delta[t] + decay[t] * x[t + 1], with x[T] = 0.

    :param delta: ``(T, N)`` what each step adds
    :param decay: ``(T, N)`` what is kept of the sum behind it
    :return: ``(T, N)`` the sums
    """
    total = 0 * delta[0]
    rows = []
    for term, factor in zip(reversed(list(delta)), reversed(list(decay)), strict=True):
        total = term + factor * total
        rows.append(total)
    return namespace(delta).stack(rows[::-1])


def episode_discounts(start: Array, gamma: float) -> Array:
    """
    The weight of each step's update in the gradient of the discounted return (Sutton and Barto 2018, section 13.3).

        I_t = gamma^(t - t_start)

    :param start: ``(T, N)`` 1 where the step is its episode's first, as all of the first row are
    :param gamma: discount factor, in [0, 1]
    :return: ``(T, N)``
    """
    weight = 0 * start[0] + 1
    rows = [weight]
    for first in list(start)[1:]:
        weight = first + (1 - first) * gamma * weight
        rows.append(weight)
    return namespace(start).stack(rows)


def monte_carlo_returns(reward: Array, next_value: Array, terminated: Array, truncated: Array, gamma: float) -> Array:
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


def n_step_returns(reward: Array, next_value: Array, terminated: Array, truncated: Array, gamma: float, n: int) -> Array:
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
    xp, not_done = namespace(reward), _not_done(terminated, truncated)
    not_done[-1] = 0
    one_step = reward + gamma * (1 - terminated) * next_value
    returns = one_step
    for _ in range(n - 1):
        following = xp.concatenate([returns[1:], returns[-1:]])
        returns = xp.where(not_done > 0, reward + gamma * following, one_step)
    return returns


def gae(
    reward: Array,
    value: Array,
    next_value: Array,
    terminated: Array,
    truncated: Array,
    gamma: float,
    gae_lambda: float,
) -> Array:
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


def _not_done(terminated: Array, truncated: Array) -> Array:
    """``(T, N)`` 1 where the episode goes on behind the step."""
    return (1 - terminated) * (1 - truncated)
