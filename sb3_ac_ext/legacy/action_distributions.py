"""
Distributions of actions as functions of a network's outputs, with the derivatives that a backward pass starts from.

B is the batch size, A the action dimension. Every function takes tensors or numpy arrays. A distribution's parameters are
what the policy's last layer gives, ``outputs`` ``(B, P)``, and for Gaussians ``log_std``: ``(A,)``, or ``(B, A)`` where it
depends on the state.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from sb3_ac_ext.legacy.arrays import Array, namespace
from sb3_ac_ext.legacy.natural_gradient import bernoulli_fisher, categorical_fisher, gaussian_fisher

LOG_2_PI = math.log(2 * math.pi)


class Parameters(NamedTuple):
    """What a distribution depends on, or derivatives by it."""

    outputs: Any
    """``(B, P)`` of the policy's last layer: means, or logits."""
    log_std: Any = None
    """``(A,)`` or ``(B, A)``, for Gaussians."""


class ActionDistribution(Protocol):
    """Densities, entropies, divergences in nats, and their derivatives weighted by a number for each sample."""

    def log_prob(self, parameters: Parameters, actions: Any) -> Any:
        """``(B,)`` log pi(a|s)."""

    def log_prob_slope(self, parameters: Parameters, actions: Any, weight: Any) -> Parameters:
        """Derivative of ``sum weight * log_prob``; for log_std of each sample, ``(B, A)``."""

    def entropy(self, parameters: Parameters) -> Any:
        """``(B,)`` H[pi(.|s)]."""

    def entropy_slope(self, parameters: Parameters, weight: Any) -> Parameters:
        """Derivative of ``sum weight * entropy``."""

    def kl(self, old: Parameters, new: Parameters) -> Any:
        """``(B,)`` KL(old || new)."""

    def kl_slope(self, old: Parameters, new: Parameters, weight: Any) -> Parameters:
        """Derivative of ``sum weight * kl`` by the new parameters."""

    def fisher(self, parameters: Parameters, tangent: Parameters) -> Parameters:
        """Product of each sample's Fisher matrix in the parameters with a direction of them; of log_std ``(B, A)``."""


class DiagonalGaussian:
    """Independent Gaussians: the outputs are their means."""

    def log_prob(self, parameters: Parameters, actions: Array) -> Array:
        """
        log N(a; mu, sigma^2) = sum_i [ -(a_i - mu_i)^2 / (2 sigma_i^2) - log sigma_i - log(2 pi) / 2 ]

        :param parameters: mu and log sigma
        :param actions: ``(B, A)``
        :return: ``(B,)``
        """
        z = self._z(parameters, actions)
        return (-0.5 * (z * z) - parameters.log_std).sum(-1) - 0.5 * LOG_2_PI * actions.shape[-1]

    def log_prob_slope(self, parameters: Parameters, actions: Array, weight: Array) -> Parameters:
        """d/dmu = z / sigma, d/dlog sigma = z^2 - 1, with z = (a - mu) / sigma; see `ActionDistribution`."""
        z = self._z(parameters, actions)
        weight = weight[:, None]
        inverse = namespace(z).exp(-parameters.log_std)
        return Parameters(z * inverse * weight, (z * z - 1) * weight)

    def entropy(self, parameters: Parameters) -> Any:
        """H = sum_i log sigma_i + A (1 + log(2 pi)) / 2; ``(B,)``."""
        outputs, log_std = parameters
        return (log_std + 0 * outputs).sum(-1) + 0.5 * (1 + LOG_2_PI) * outputs.shape[-1]

    def entropy_slope(self, parameters: Parameters, weight: Array) -> Parameters:
        """d/dmu = 0, d/dlog sigma = 1; see `ActionDistribution`."""
        zero = 0 * parameters.outputs
        return Parameters(zero, zero + weight[:, None])

    def kl(self, old: Parameters, new: Parameters) -> Any:
        """
        KL(old || new) = sum_i [ log sigma_i - log sigma_old_i + (sigma_old_i^2 + (mu_old_i - mu_i)^2) / (2 sigma_i^2) - 1/2 ]

        :return: ``(B,)``
        """
        return (new.log_std - old.log_std + 0.5 * self._spread(old, new) - 0.5).sum(-1)

    def kl_slope(self, old: Parameters, new: Parameters, weight: Array) -> Parameters:
        """d/dmu = (mu - mu_old) / sigma^2, d/dlog sigma = 1 - (sigma_old^2 + (mu_old - mu)^2) / sigma^2."""
        weight = weight[:, None]
        precision = namespace(new.outputs).exp(-2 * new.log_std)
        return Parameters((new.outputs - old.outputs) * precision * weight, (1 - self._spread(old, new)) * weight)

    def fisher(self, parameters: Parameters, tangent: Parameters) -> Parameters:
        """diag(1 / sigma^2, 2), see `gaussian_fisher`."""
        return Parameters(*gaussian_fisher(tangent.outputs, tangent.log_std, parameters.log_std))

    @staticmethod
    def _z(parameters: Parameters, actions: Array) -> Array:
        return (actions - parameters.outputs) * namespace(actions).exp(-parameters.log_std)

    @staticmethod
    def _spread(old: Parameters, new: Parameters) -> Any:
        """``(B, A)`` (sigma_old^2 + (mu_old - mu)^2) / sigma^2"""
        xp, distance = namespace(new.outputs), old.outputs - new.outputs
        return (xp.exp(2 * old.log_std) + distance * distance) * xp.exp(-2 * new.log_std)


class Categoricals:
    """
    Independent categorical distributions: the outputs are their logits, one after another.

    :param sizes: number of choices of each; one for a Discrete space, several for MultiDiscrete
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        self.blocks = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def log_prob(self, parameters: Parameters, actions: Array) -> Array:
        """
        log pi(a|s) = sum_i log softmax(logits_i)[a_i]

        :param parameters: logits
        :param actions: ``(B, len(sizes))`` choices, as floats or integers
        :return: ``(B,)``
        """
        total: Any = 0
        for i, block in enumerate(self.blocks):
            log_probs = self._log_probs(parameters.outputs[:, block])
            total = total + (log_probs * self._chosen(log_probs, actions[:, i])).sum(-1)
        return total

    def log_prob_slope(self, parameters: Parameters, actions: Array, weight: Array) -> Parameters:
        """d/dlogits = onehot(a) - p; see `ActionDistribution`."""
        parts = []
        for i, block in enumerate(self.blocks):
            log_probs = self._log_probs(parameters.outputs[:, block])
            parts.append(self._chosen(log_probs, actions[:, i]) - namespace(log_probs).exp(log_probs))
        return Parameters(self._joined(parts) * weight[:, None])

    def entropy(self, parameters: Parameters) -> Any:
        """H = -sum_i sum_k p_ik log p_ik; ``(B,)``."""
        total: Any = 0
        for block in self.blocks:
            log_probs = self._log_probs(parameters.outputs[:, block])
            total = total - (namespace(log_probs).exp(log_probs) * log_probs).sum(-1)
        return total

    def entropy_slope(self, parameters: Parameters, weight: Array) -> Parameters:
        """d/dlogits = -p (log p + H) in each block; see `ActionDistribution`."""
        parts = []
        for block in self.blocks:
            log_probs = self._log_probs(parameters.outputs[:, block])
            probs = namespace(log_probs).exp(log_probs)
            entropy = -(probs * log_probs).sum(-1)[:, None]
            parts.append(-probs * (log_probs + entropy))
        return Parameters(self._joined(parts) * weight[:, None])

    def kl(self, old: Parameters, new: Parameters) -> Any:
        """KL(old || new) = sum_i sum_k p_old_ik (log p_old_ik - log p_ik); ``(B,)``."""
        total: Any = 0
        for block in self.blocks:
            old_log, new_log = self._log_probs(old.outputs[:, block]), self._log_probs(new.outputs[:, block])
            total = total + (namespace(old_log).exp(old_log) * (old_log - new_log)).sum(-1)
        return total

    def kl_slope(self, old: Parameters, new: Parameters, weight: Array) -> Parameters:
        """d/dlogits = p - p_old; see `ActionDistribution`."""
        xp, parts = namespace(new.outputs), []
        for block in self.blocks:
            old_log, new_log = self._log_probs(old.outputs[:, block]), self._log_probs(new.outputs[:, block])
            parts.append(xp.exp(new_log) - xp.exp(old_log))
        return Parameters(self._joined(parts) * weight[:, None])

    def fisher(self, parameters: Parameters, tangent: Parameters) -> Parameters:
        """diag(p) - p p^T in each block, see `categorical_fisher`."""
        xp, parts = namespace(parameters.outputs), []
        for block in self.blocks:
            probs = xp.exp(self._log_probs(parameters.outputs[:, block]))
            parts.append(categorical_fisher(tangent.outputs[:, block], probs))
        return Parameters(self._joined(parts))

    @staticmethod
    def _log_probs(logits: Array) -> Array:
        xp = namespace(logits)
        shifted = logits - xp.amax(logits, -1)[:, None]
        return shifted - xp.log(xp.exp(shifted).sum(-1))[:, None]

    @staticmethod
    def _chosen(log_probs: Array, choices: Array) -> Array:
        """``(B, n)`` 1 at the choice, 0 elsewhere."""
        xp = namespace(log_probs)
        numbers = xp.ones_like(log_probs[0]).cumsum(0) - 1
        return (choices[:, None] == numbers) * xp.ones_like(log_probs)

    @staticmethod
    def _joined(parts: list[Array]) -> Array:
        return parts[0] if len(parts) == 1 else namespace(parts[0]).concatenate(parts, -1)


class Bernoullis:
    """Independent coins: the outputs are the logits of their 1."""

    def log_prob(self, parameters: Parameters, actions: Array) -> Array:
        """
        log pi(a|s) = sum_i [ a_i l_i - log(1 + exp l_i) ]

        :param parameters: logits l
        :param actions: ``(B, A)`` of 0 and 1
        :return: ``(B,)``
        """
        logits = parameters.outputs
        return (actions * logits - _softplus(logits)).sum(-1)

    def log_prob_slope(self, parameters: Parameters, actions: Array, weight: Array) -> Parameters:
        """d/dlogits = a - p; see `ActionDistribution`."""
        return Parameters((actions - _sigmoid(parameters.outputs)) * weight[:, None])

    def entropy(self, parameters: Parameters) -> Any:
        """H = sum_i [ log(1 + exp l_i) - p_i l_i ]; ``(B,)``."""
        logits = parameters.outputs
        return (_softplus(logits) - _sigmoid(logits) * logits).sum(-1)

    def entropy_slope(self, parameters: Parameters, weight: Array) -> Parameters:
        """d/dlogits = -l p (1 - p); see `ActionDistribution`."""
        logits = parameters.outputs
        probs = _sigmoid(logits)
        return Parameters(-logits * probs * (1 - probs) * weight[:, None])

    def kl(self, old: Parameters, new: Parameters) -> Any:
        """KL(old || new) = sum_i [ p_old_i (l_old_i - l_i) + log(1 + exp l_i) - log(1 + exp l_old_i) ]; ``(B,)``."""
        logits, old_logits = new.outputs, old.outputs
        return (_sigmoid(old_logits) * (old_logits - logits) + _softplus(logits) - _softplus(old_logits)).sum(-1)

    def kl_slope(self, old: Parameters, new: Parameters, weight: Array) -> Parameters:
        """d/dlogits = p - p_old; see `ActionDistribution`."""
        return Parameters((_sigmoid(new.outputs) - _sigmoid(old.outputs)) * weight[:, None])

    def fisher(self, parameters: Parameters, tangent: Parameters) -> Parameters:
        """diag(p (1 - p)), see `bernoulli_fisher`."""
        return Parameters(bernoulli_fisher(tangent.outputs, _sigmoid(parameters.outputs)))


def _softplus(x: Array) -> Array:
    """log(1 + exp x), without overflow."""
    xp = namespace(x)
    return xp.clip(x, 0, None) + xp.log1p(xp.exp(-xp.abs(x)))


def _sigmoid(x: Array) -> Array:
    """1 / (1 + exp -x), without overflow."""
    return namespace(x).exp(-_softplus(-x))
