"""From the outputs of a small policy to distributions of actions and back, by numpy; one class for each of SB3's."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
    StateDependentNoiseDistribution,
)

from sb3_ac_ext.legacy.action_distributions import (
    ActionDistribution,
    Bernoullis,
    Categoricals,
    DiagonalGaussian,
    Parameters,
)
from sb3_ac_ext.legacy.numpy_layers import product


class Head:
    """
    A kind of distribution.

    :param policy: whose parameters and action space it uses
    """

    distribution: ActionDistribution

    def is_current(self) -> bool:
        """Whether the memory of its parameter is still the one that there was."""
        return True

    def parameters(self, latent: np.ndarray, outputs: np.ndarray) -> Parameters:
        """
        :param latent: ``(B, L)`` outputs of the hidden layers
        :param outputs: ``(B, P)`` of the last one
        :return: of the distribution
        """
        return Parameters(outputs)

    def act(self, latent: np.ndarray, outputs: np.ndarray, deterministic: bool) -> np.ndarray:
        """
        :param deterministic: whether the mode is taken; noise comes from PyTorch's generator, drawn as SB3 does
        :return: ``(B, ...)`` actions
        """
        raise NotImplementedError

    def log_std_gradient(self, latent: np.ndarray, parameters: Parameters, slope: np.ndarray, out: np.ndarray) -> None:
        """
        :param slope: ``(B, A)`` derivative by the logarithm of the standard deviation in each sample
        :param out: where the gradient of the policy's ``log_std`` goes
        """

    def log_std_tangent(self, latent: np.ndarray, parameters: Parameters, direction: np.ndarray) -> np.ndarray:
        """
        :param direction: of the policy's ``log_std``
        :return: ``(B, A)`` that of the logarithm of the standard deviation in each sample
        """
        raise NotImplementedError


class GaussianHead(Head):
    """Independent Gaussians with one standard deviation for all states."""

    def __init__(self, policy: Any) -> None:
        self.distribution = DiagonalGaussian()
        self.policy = policy
        self._shape = policy.action_space.shape
        self._log_std: np.ndarray = policy.log_std.detach().numpy()
        self._pointer = policy.log_std.data_ptr()

    def is_current(self) -> bool:
        return bool(self.policy.log_std.data_ptr() == self._pointer)

    def parameters(self, latent: np.ndarray, outputs: np.ndarray) -> Parameters:
        return Parameters(outputs, self._log_std)

    def act(self, latent: np.ndarray, outputs: np.ndarray, deterministic: bool) -> np.ndarray:
        if not deterministic:
            outputs = outputs + self.noise(latent, outputs)
        actions: np.ndarray = outputs.reshape(-1, *self._shape)
        return actions

    def noise(self, latent: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """``(B, A)`` what a sample adds to the mean."""
        noise: np.ndarray = th.empty(outputs.shape, dtype=self.policy.log_std.dtype).normal_().numpy()
        return np.asarray(np.exp(self._log_std) * noise)

    def log_std_gradient(self, latent: np.ndarray, parameters: Parameters, slope: np.ndarray, out: np.ndarray) -> None:
        np.add.reduce(slope, axis=0, out=out)

    def log_std_tangent(self, latent: np.ndarray, parameters: Parameters, direction: np.ndarray) -> np.ndarray:
        return np.broadcast_to(direction, parameters.outputs.shape)


class StateDependentHead(GaussianHead):
    """gSDE (Raffin et al. 2021, arXiv:2005.05719): the variance is ``latent^2 @ sigma^2 + epsilon``."""

    def parameters(self, latent: np.ndarray, outputs: np.ndarray) -> Parameters:
        std = np.broadcast_to(np.exp(self._log_std), (latent.shape[1], outputs.shape[1]))
        variance = product(latent * latent, std * std) + self.policy.action_dist.epsilon
        return Parameters(outputs, 0.5 * np.log(variance))

    def noise(self, latent: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        distribution = self.policy.action_dist
        if len(latent) == 1 or len(latent) != len(distribution.exploration_matrices):
            return product(latent, distribution.exploration_mat.detach().numpy())
        return np.asarray(np.matmul(latent[:, None], distribution.exploration_matrices.detach().numpy())[:, 0])

    def log_std_gradient(self, latent: np.ndarray, parameters: Parameters, slope: np.ndarray, out: np.ndarray) -> None:
        variance_slope = slope * (0.5 * np.exp(-2 * parameters.log_std))
        gradient = 2 * np.exp(2 * self._log_std) * product((latent * latent).T, variance_slope)
        out[...] = gradient if out.shape == gradient.shape else gradient.sum(axis=1, keepdims=True)

    def log_std_tangent(self, latent: np.ndarray, parameters: Parameters, direction: np.ndarray) -> np.ndarray:
        directions = np.broadcast_to(direction, (latent.shape[1], parameters.outputs.shape[1]))
        variance_tangent = product(latent * latent, directions * (2 * np.exp(2 * self._log_std)))
        return np.asarray(variance_tangent * (0.5 * np.exp(-2 * parameters.log_std)))


class CategoricalHead(Head):
    """One or more choices."""

    def __init__(self, policy: Any) -> None:
        space = policy.action_space
        self._single = isinstance(space, spaces.Discrete)
        self.distribution: Categoricals = Categoricals([int(space.n)] if self._single else [int(n) for n in space.nvec])

    def act(self, latent: np.ndarray, outputs: np.ndarray, deterministic: bool) -> np.ndarray:
        choices = []
        for block in self.distribution.blocks:
            logits = outputs[:, block]
            if deterministic:
                choices.append(logits.argmax(axis=1))
            else:
                weights = np.exp(logits - logits.max(axis=1, keepdims=True))
                probs = th.from_numpy(weights / weights.sum(axis=1, keepdims=True))
                choices.append(th.multinomial(probs, 1, True).numpy()[:, 0])
        return choices[0] if self._single else np.stack(choices, axis=1)


class BernoulliHead(Head):
    """Coins."""

    def __init__(self, policy: Any) -> None:
        self.distribution = Bernoullis()
        self._shape = policy.action_space.shape

    def act(self, latent: np.ndarray, outputs: np.ndarray, deterministic: bool) -> np.ndarray:
        probs = 1 / (1 + np.exp(-outputs))
        actions: np.ndarray = np.round(probs) if deterministic else th.bernoulli(th.from_numpy(probs)).numpy()
        return actions.reshape(-1, *self._shape)


HEADS: dict[type[Distribution], Any] = {
    DiagGaussianDistribution: GaussianHead,
    StateDependentNoiseDistribution: StateDependentHead,
    CategoricalDistribution: CategoricalHead,
    MultiCategoricalDistribution: CategoricalHead,
    BernoulliDistribution: BernoulliHead,
}
"""By SB3's distribution, exactly that class."""
