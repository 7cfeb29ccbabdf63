"""Losses of the on-policy algorithms, for each sample of a batch. B is the batch size."""

import torch as th


def normalized(advantages: th.Tensor, epsilon: float = 1e-8) -> th.Tensor:
    """
    Advantages with mean 0 and standard deviation 1 (of a sample: divided by B - 1).

    :param advantages: ``(B,)`` in reward units, or ``(n, B)``, each row for itself; a single one is returned as it is
    :param epsilon: added to the standard deviation
    :return: the same number of them
    """
    if advantages.shape[-1] < 2:
        return advantages
    centred = advantages - advantages.mean(dim=-1, keepdim=True)
    return centred / (advantages.std(dim=-1, keepdim=True) + epsilon)


def surrogate(log_ratio: th.Tensor, advantages: th.Tensor) -> th.Tensor:
    """
    The importance-weighted objective (Schulman et al. 2015, arXiv:1502.05477, eq. 14).

        r A,  r = pi(a|s) / pi_old(a|s)

    :param log_ratio: ``(B,)`` log r
    :param advantages: ``(B,)`` A
    :return: ``(B,)``
    """
    return log_ratio.exp() * advantages


def clipped_surrogate(log_ratio: th.Tensor, advantages: th.Tensor, clip_range: th.Tensor | float) -> th.Tensor:
    """
    PPO's objective (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

        min(r A, clip(r, 1 - c, 1 + c) A),  r = pi(a|s) / pi_old(a|s)

    :param log_ratio: ``(B,)`` log r
    :param advantages: ``(B,)`` A
    :param clip_range: c, > 0
    :return: ``(B,)``
    """
    ratio = log_ratio.exp()
    clipped = th.clamp(ratio, 1 - clip_range, 1 + clip_range)  # type: ignore[arg-type]  # takes both kinds
    return th.min(ratio * advantages, clipped * advantages)


def reduced(terms: th.Tensor, reduction: str) -> th.Tensor:
    """
    :param terms: ``(T, N)`` of a loss
    :param reduction: "sum" or "mean"
    :return: ``()`` that of all
    """
    return terms.sum() if reduction == "sum" else terms.mean()


def squared_error(values: th.Tensor, returns: th.Tensor) -> th.Tensor:
    """
    (V - R)^2

    :param values: ``(B,)`` V(s), in reward units
    :param returns: ``(B,)`` R
    :return: ``(B,)``
    """
    return (values - returns).square()


def clipped_squared_error(
    values: th.Tensor, old_values: th.Tensor, returns: th.Tensor, clip_range: th.Tensor | float, pessimistic: bool
) -> th.Tensor:
    """
    The error of a value that may not leave the neighbourhood of the old one (Schulman et al. 2017; Engstrom et al. 2020,
    arXiv:2005.12729).

        V_c = V_old + clip(V - V_old, -c, c)
        max((V - R)^2, (V_c - R)^2), or (V_c - R)^2 alone

    The second, SB3's, has no gradient at all where the value has left the neighbourhood, even if it moved away from R.

    :param values: ``(B,)`` V(s), in reward units
    :param old_values: ``(B,)`` V when the data were collected
    :param returns: ``(B,)`` R
    :param clip_range: c, in reward units, > 0
    :param pessimistic: whether the larger of the two errors counts, as published
    :return: ``(B,)``
    """
    step = th.clamp(values - old_values, -clip_range, clip_range)  # type: ignore[arg-type]  # takes both kinds
    clipped = old_values + step
    error = squared_error(clipped, returns)
    return th.max(squared_error(values, returns), error) if pessimistic else error


def kl_estimate(log_ratio: th.Tensor, estimator: str) -> th.Tensor:
    """
    KL(pi_old || pi) from samples of pi_old (J. Schulman, "Approximating KL divergence", 2020).

        k1 = -log r, unbiased, of either sign;  k3 = (r - 1) - log r, unbiased, never negative

    :param log_ratio: ``(B,)`` log r, r = pi(a|s) / pi_old(a|s)
    :param estimator: "k1" or "k3"
    :return: ``()`` mean, in nats
    """
    return -log_ratio.mean() if estimator == "k1" else (log_ratio.exp() - 1 - log_ratio).mean()


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
