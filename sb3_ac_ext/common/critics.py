"""Critics that more than one algorithm uses."""

from collections.abc import Sequence
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_ac_ext.common.fused_mlp import FusedMLP
from sb3_ac_ext.common.stacked_mlps import side_by_side


class TwinStreamCritic(BaseModel):
    """
    Two disjoint streams of one network, each an MLP on features and action (Fujimoto et al. 2018, arXiv:1802.09477).

    The streams are named as SB3 names its critics, so that state dicts fit both ways.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: hidden layers of each stream
    :param features_extractor: from observations to features, one for both streams
    :param features_dim: number of features
    :param activation_fn: activation function
    :param normalize_images: whether images are divided by 255
    :param share_features_extractor: whether the extractor is the actor's; then it learns from the actor's loss alone
    :param layer_norm: whether each hidden layer is normalised before its activation (Ba et al. 2016, arXiv:1607.06450)
    """

    features_extractor: BaseFeaturesExtractor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: Sequence[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        share_features_extractor: bool = False,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.share_features_extractor = share_features_extractor
        input_dim = features_dim + get_action_dim(action_space)
        norms: list[type[nn.Module]] = [nn.LayerNorm] if layer_norm else []

        def stream() -> FusedMLP:
            return FusedMLP(*create_mlp(input_dim, 1, list(net_arch), activation_fn, post_linear_modules=norms))

        self.qf0 = stream()
        self.qf1 = stream()

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param obs: ``(B, ...)`` observations
        :param actions: ``(B, A)`` actions in [-1, 1]
        :return: Q_a and Q_b, each ``(B, 1)``
        """
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            features = self.extract_features(obs, self.features_extractor)
        q_a, q_b = side_by_side((self.qf0, self.qf1), th.cat([features, actions], dim=1))
        return q_a, q_b

    def q1_forward(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        Stream a alone, for the actor's loss; the features get no gradient from it.

        :param obs: ``(B, ...)`` observations
        :param actions: ``(B, A)`` actions in [-1, 1]
        :return: ``(B, 1)`` Q_a
        """
        with th.no_grad():
            features = self.extract_features(obs, self.features_extractor)
        q_a: th.Tensor = self.qf0(th.cat([features, actions], dim=1))
        return q_a
