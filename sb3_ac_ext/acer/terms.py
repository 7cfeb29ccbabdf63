"""What an update of ACER is made of, in B states: see `sb3_ac_ext.acer.acer`."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch as th

from sb3_ac_ext.acer.policies import Judgement, MlpPolicy
from sb3_ac_ext.functional.divergences import categorical_kl, gaussian_kl
from sb3_ac_ext.functional.gaussian import gaussian_log_prob
from sb3_ac_ext.functional.importance import bias_correction, bounded_ratio, truncated_importance_coefficients
from sb3_ac_ext.functional.retrace import duelling_value_target, retrace_coefficient, stochastic_duelling
from sb3_ac_ext.functional.surrogates import squared_error
from sb3_ac_ext.functional.trust_region import (
    Space,
    categorical_gradient,
    entropy_coefficients,
    gaussian_mean_gradient,
)

Retraced = Callable[[th.Tensor, th.Tensor], th.Tensor]
"""From ``(B,)`` Q(s, a) and coefficients of the trace to targets."""


class Terms(NamedTuple):
    """P is the number of statistics of pi. Only phi, the errors and the entropy have gradients that count."""

    phi: th.Tensor
    """``(B, P)`` the statistics."""
    gain: th.Tensor
    """``(B, P)`` g"""
    kl_gradient: th.Tensor
    """``(B, P)`` k"""
    errors: th.Tensor
    """``(B,)`` the critic's loss."""
    entropy: th.Tensor
    """``(B,)`` in nats."""
    kl: th.Tensor
    """``(B,)`` KL(average pi || pi), in nats."""
    rhos: th.Tensor
    """``(B,)`` of the taken actions, before any bound."""
    values: th.Tensor
    """``(B,)`` Q(s, a) of these, in reward units."""
    targets: th.Tensor
    """``(B,)`` Q_ret, in reward units."""


def of_choices(
    judgement: Judgement,
    average: Any,
    mu: Mapping[str, th.Tensor],
    actions: th.Tensor,
    retraced: Retraced,
    *,
    rho_bar: float,
    space: Space,
    ent_coef: float,
) -> Terms:
    """
    Of Discrete actions (sections 3.1 to 3.3).

    :param judgement: pi and Q, with gradient
    :param average: the average policy's distribution
    :param mu: "logits" ``(B, A)``, log mu(.|s)
    :param actions: ``(B,)``
    :param retraced: Retrace along the data
    :param rho_bar: c
    :param space: which statistics
    :param ent_coef: weight of the entropy in g
    :return: the terms
    """
    pi, q, chosen = judgement.distribution, judgement.values, actions[:, None]
    taken = q.gather(1, chosen).flatten()
    with th.no_grad():
        log_rhos = pi.logits - mu["logits"]
        rhos = bounded_ratio(log_rhos)
        q_ret = retraced(taken, retrace_coefficient(log_rhos.gather(1, chosen).flatten()))
        v = judgement.state_values
        coefficients = truncated_importance_coefficients(chosen, pi.probs, rhos, q_ret[:, None] - v, q - v, rho_bar)
        coefficients = coefficients + ent_coef * entropy_coefficients(pi.probs)
    return Terms(
        phi=pi.probs if space == "probs" else pi.logits,  # log-probabilities, with the gradient of any logits if z sums to 0
        gain=categorical_gradient(coefficients, pi.probs, space),
        kl_gradient=categorical_gradient(-average.probs, pi.probs, space),
        errors=0.5 * squared_error(taken, q_ret),
        entropy=pi.entropy(),
        kl=categorical_kl(average.logits, pi.logits.detach()),
        rhos=rhos.gather(1, chosen).flatten(),
        values=taken,
        targets=q_ret,
    )


def of_box(
    policy: MlpPolicy,
    judgement: Judgement,
    average: Any,
    mu: Mapping[str, th.Tensor],
    actions: th.Tensor,
    retraced: Retraced,
    *,
    rho_bar: float,
    n: int,
) -> Terms:
    """
    Of actions in a Box, by the mean (section 5).

    :param policy: that has advantages
    :param judgement: pi and V, with gradient
    :param average: the average policy's distribution
    :param mu: "mean" and "std" ``(B, D)``
    :param actions: ``(B, D)``
    :param retraced: Retrace along the data
    :param rho_bar: c
    :param n: actions that advantages are centred by
    :return: the terms
    """
    pi, v = judgement.distribution, judgement.values.flatten()
    q = duelling(policy, judgement, actions, n)
    with th.no_grad():
        other = drawn(pi, 1)[0]
        log_rho, log_other_rho = (log_ratio(pi, mu, action) for action in (actions, other))
        rho, other_rho = bounded_ratio(log_rho), bounded_ratio(log_other_rho)
        q_ret = retraced(q, retrace_coefficient(log_rho, dimension=actions.shape[1]))
        q_opc = retraced(q, th.ones_like(q))
        of_taken = rho.clamp(max=rho_bar) * (q_opc - v)
        of_other = bias_correction(other_rho, rho_bar) * (duelling(policy, judgement, other, n) - v)
        gain = of_taken[:, None] * gaussian_mean_gradient(actions, pi.loc, pi.scale)
        gain = gain + of_other[:, None] * gaussian_mean_gradient(other, pi.loc, pi.scale)
    return Terms(
        phi=pi.loc,
        gain=gain,
        kl_gradient=-gaussian_mean_gradient(average.loc, pi.loc, pi.scale),
        errors=0.5 * squared_error(q, q_ret) + 0.5 * squared_error(v, duelling_value_target(rho, q_ret, q, v)),
        entropy=pi.entropy().sum(dim=1),
        kl=gaussian_kl(average.loc, average.scale, pi.loc.detach(), pi.scale),
        rhos=rho,
        values=q,
        targets=q_ret,
    )


def duelling(policy: MlpPolicy, judgement: Judgement, actions: th.Tensor, n: int) -> th.Tensor:
    """
    :param policy: that has advantages
    :param judgement: of B states
    :param actions: ``(B, D)``
    :param n: how many others are drawn
    :return: ``(B,)`` Q~(s, a), in reward units
    """
    advantages, others = (policy.advantages(judgement.latent, of) for of in (actions, drawn(judgement.distribution, n)))
    return stochastic_duelling(judgement.values.flatten(), advantages, others.T)


@th.no_grad()
def drawn(pi: Any, n: int) -> th.Tensor:
    """
    :param pi: a Gaussian in B states
    :param n: of actions in each
    :return: ``(n, B, D)``
    """
    return pi.loc + pi.scale * pi.loc.new_empty((n, *pi.loc.shape)).normal_()


def log_ratio(pi: Any, mu: Mapping[str, th.Tensor], actions: th.Tensor) -> th.Tensor:
    """
    :param pi: a Gaussian in B states
    :param mu: "mean" and "std" ``(B, D)`` of another
    :param actions: ``(B, D)``
    :return: ``(B,)`` log pi(a|s) - log mu(a|s), in nats
    """
    both = (pi.loc, pi.scale), (mu["mean"], mu["std"])
    of_pi, of_mu = (gaussian_log_prob((actions - mean) / std, std.log()).flatten() for mean, std in both)
    return of_pi - of_mu
