"""Critics that give the distribution of the return."""

import math
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F

from sb3_ac_ext.functional.categorical import expected_value, mixture_mean


class DistributionalCritic(ContinuousCritic):
    """
    A network from features and action to the numbers that a distribution is made of.

    As SB3's critics it gives Q, the distribution's mean, where it is called and from `q1_forward`.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: hidden layers
    :param features_extractor: from observations to features
    :param features_dim: number of features
    :param n_outputs: numbers that the distribution is made of
    :param activation_fn: activation function
    :param normalize_images: whether images are divided by 255
    :param share_features_extractor: whether the extractor is the actor's; then it learns from the actor's loss alone
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        n_outputs: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        share_features_extractor: bool = False,
    ) -> None:
        BaseModel.__init__(
            self, observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.share_features_extractor = share_features_extractor
        self.n_critics = 1
        self.qf0 = nn.Sequential(*create_mlp(features_dim + get_action_dim(action_space), n_outputs, net_arch, activation_fn))
        self.q_networks: list[nn.Module] = [self.qf0]

    def outputs(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param obs: ``(B, ...)`` observations
        :param actions: ``(B, A)`` actions in [-1, 1]
        :return: ``(B, n_outputs)`` what Z(s, a) is made of
        """
        (outputs,) = super().forward(obs, actions)  # type: ignore[arg-type]  # SB3 leaves dicts out
        return outputs

    def mean(self, outputs: th.Tensor) -> th.Tensor:
        """
        :param outputs: ``(B, n_outputs)`` what Z(s, a) is made of
        :return: ``(B, 1)`` Q(s, a), its mean
        """
        raise NotImplementedError

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, ...]:  # type: ignore[override]
        """
        :param obs: ``(B, ...)`` observations
        :param actions: ``(B, A)`` actions in [-1, 1]
        :return: ``(B, 1)`` Q, as the only one of a tuple
        """
        return (self.mean(self.outputs(obs, actions)),)

    def q1_forward(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:  # type: ignore[override]
        """
        :param obs: ``(B, ...)`` observations
        :param actions: ``(B, A)`` actions in [-1, 1]
        :return: ``(B, 1)`` Q, without a gradient to the features
        """
        return self.mean(super().q1_forward(obs, actions))  # type: ignore[arg-type]  # SB3 leaves dicts out


class CategoricalCritic(DistributionalCritic):
    """
    Z(s, a) on fixed atoms (Bellemare et al. 2017, arXiv:1707.06887, section 4); ``outputs`` are logits of probabilities.

    :param args: of `DistributionalCritic`, by name
    :param n_atoms: number of atoms, >= 2
    """

    atoms: th.Tensor
    """``(n_atoms,)`` z, rising by equal steps from v_min to v_max, which the algorithm says; -1 to 1 before."""

    def __init__(self, *, n_atoms: int = 51, **kwargs: Any) -> None:
        super().__init__(**kwargs, n_outputs=n_atoms)
        self.register_buffer("atoms", th.linspace(-1, 1, n_atoms))

    def set_range(self, v_min: float, v_max: float) -> None:
        """
        :param v_min: the first atom, reward units
        :param v_max: the last atom
        """
        self.atoms.copy_(th.linspace(v_min, v_max, len(self.atoms)))

    def mean(self, outputs: th.Tensor) -> th.Tensor:
        """See `DistributionalCritic.mean`."""
        return expected_value(outputs, self.atoms)


class MixtureCritic(DistributionalCritic):
    """
    Z(s, a) as a mixture of Gaussians (Barth-Maron et al. 2018, arXiv:1804.08617, appendix A).

    :param args: of `DistributionalCritic`, by name
    :param n_components: number of Gaussians
    :param init_std: their standard deviation at the start, about, in reward units
    :param min_std: the smallest standard deviation: the likelihood of a terminal reward would be unbounded without
    """

    def __init__(self, *, n_components: int = 5, init_std: float = 1.0, min_std: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs, n_outputs=3 * n_components)
        self.init_std, self.min_std = init_std, min_std

    def mean(self, outputs: th.Tensor) -> th.Tensor:
        """See `DistributionalCritic.mean`."""
        weight_logits, means, _ = self.components(outputs)
        return mixture_mean(weight_logits, means)

    def components(self, outputs: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param outputs: ``(B, 3 n_components)``
        :return: ``(B, n_components)`` each: logits of the weights, means, standard deviations
        """
        weight_logits, means, scales = outputs.chunk(3, dim=1)
        return weight_logits, means, self.init_std * F.softplus(scales) / math.log(2) + self.min_std
