"""
Losses of the on-policy algorithms, each with its derivative. B is the batch size.

A loss depends on the networks through few numbers a sample: the action's log-probability, the value. With the derivative by
these at hand the networks' backward passes start from there, without a graph of the loss. All functions take tensors or
numpy arrays.
"""

from typing import Any, NamedTuple

from sb3_ac_ext.legacy.arrays import Array, namespace


class Loss(NamedTuple):
    """A mean over a batch and its derivative."""

    value: Any
    """``()`` the mean."""
    slope: Any
    """``(B,)`` its derivative by what the loss is a function of, in each sample."""


def normalized(advantage: Array, epsilon: float = 1e-8) -> Array:
    """
    Advantages with mean 0 and standard deviation 1 (of a sample: divided by B - 1).

    :param advantage: ``(B,)`` in reward units; a single one is returned as it is
    :param epsilon: added to the standard deviation
    :return: ``(B,)``
    """
    if len(advantage) < 2:
        return advantage
    centred = advantage - advantage.mean()
    variance = (centred * centred).sum() / (len(advantage) - 1)
    return centred / (variance**0.5 + epsilon)


def policy_gradient(log_prob: Array, advantage: Array) -> Loss:
    """
    The score-function loss (Williams 1992; Mnih et al. 2016, arXiv:1602.01783).

        L = -mean log pi(a|s) A

    :param log_prob: ``(B,)`` log pi(a|s), in nats
    :param advantage: ``(B,)`` A
    :return: loss and derivative by the log-probability
    """
    return Loss(-(log_prob * advantage).mean(), -advantage / len(advantage))


def surrogate(log_ratio: Array, advantage: Array) -> Loss:
    """
    The importance-weighted loss (Schulman et al. 2015, arXiv:1502.05477, eq. 14).

        L = -mean r A,  r = pi(a|s) / pi_old(a|s)

    :param log_ratio: ``(B,)`` log r
    :param advantage: ``(B,)`` A
    :return: loss and derivative by the log-probability under pi
    """
    weighted = namespace(log_ratio).exp(log_ratio) * advantage
    return Loss(-weighted.mean(), weighted * (-1 / len(advantage)))


def clipped_surrogate(log_ratio: Array, advantage: Array, clip_range: float) -> Loss:
    """
    PPO's loss (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

        L = -mean min(r A, clip(r, 1 - c, 1 + c) A),  r = pi(a|s) / pi_old(a|s)

    :param log_ratio: ``(B,)`` log r
    :param advantage: ``(B,)`` A
    :param clip_range: c, > 0
    :return: loss and derivative by the log-probability under pi: 0 where the clipped term is the smaller one
    """
    xp = namespace(log_ratio)
    ratio = xp.exp(log_ratio)
    free = ratio * advantage
    clipped = xp.clip(ratio, 1 - clip_range, 1 + clip_range) * advantage
    slope = xp.where(free <= clipped, free, xp.zeros_like(free)) * (-1 / len(advantage))
    return Loss(-xp.minimum(free, clipped).mean(), slope)


def outside(log_ratio: Array, clip_range: float) -> Any:
    """
    :param log_ratio: ``(B,)`` log r
    :param clip_range: c
    :return: ``()`` share of the samples with r outside of [1 - c, 1 + c]
    """
    xp = namespace(log_ratio)
    return (xp.abs(xp.exp(log_ratio) - 1) > clip_range).sum() / len(log_ratio)


def squared_error(value: Array, target: Array) -> Loss:
    """
    L = mean (V - R)^2

    :param value: ``(B,)`` V(s), in reward units
    :param target: ``(B,)`` R
    :return: loss and derivative by V
    """
    error = value - target
    return Loss((error * error).mean(), error * (2 / len(error)))


def clipped_squared_error(value: Array, old_value: Array, target: Array, clip_range: float, pessimistic: bool) -> Loss:
    """
    The error of a value that may not leave the neighbourhood of the old one (Schulman et al. 2017; Engstrom et al. 2020,
    arXiv:2005.12729).

        V_c = V_old + clip(V - V_old, -c, c)
        L = mean max((V - R)^2, (V_c - R)^2), or mean (V_c - R)^2 alone

    The second, SB3's, has no gradient at all where the value has left the neighbourhood, even if it moved away from R.

    :param value: ``(B,)`` V(s), in reward units
    :param old_value: ``(B,)`` V when the data were collected
    :param target: ``(B,)`` R
    :param clip_range: c, in reward units, > 0
    :param pessimistic: whether the larger of the two errors counts, as published
    :return: loss and derivative by V
    """
    xp = namespace(value)
    step = value - old_value
    clipped_step = xp.clip(step, -clip_range, clip_range)
    error, clipped_error = value - target, old_value + clipped_step - target
    free = step == clipped_step
    slope = xp.where(free, clipped_error, xp.zeros_like(error))
    square = clipped_error * clipped_error
    if pessimistic:
        larger = error * error > square
        slope = xp.where(larger, error, slope)
        square = xp.where(larger, error * error, square)
    return Loss(square.mean(), slope * (2 / len(error)))


def kl_estimate(log_ratio: Array, estimator: str) -> Array:
    """
    KL(pi_old || pi) from samples of pi_old (J. Schulman, "Approximating KL divergence", 2020).

        k1 = -log r, unbiased, of either sign;  k3 = (r - 1) - log r, unbiased, never negative

    :param log_ratio: ``(B,)`` log r, r = pi(a|s) / pi_old(a|s)
    :param estimator: "k1" or "k3"
    :return: ``()`` mean, in nats
    """
    if estimator == "k1":
        return -log_ratio.mean()
    return (namespace(log_ratio).exp(log_ratio) - 1 - log_ratio).mean()


def adapted_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """
    The penalty's coefficient for the next iteration (Schulman et al. 2017, arXiv:1707.06347, section 4).

        beta / 2 if d < d_targ / 1.5;  2 beta if d > 1.5 d_targ;  beta otherwise

    :param kl_coef: beta, >= 0
    :param kl: d, mean KL(pi_old || pi) after the update, in nats
    :param target: d_targ, in nats, > 0
    :return: the new beta
    """
    if kl < target / 1.5:
        return kl_coef / 2
    return kl_coef * 2 if kl > target * 1.5 else kl_coef
