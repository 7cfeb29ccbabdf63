"""Critics that more than one algorithm uses, beyond SB3's."""

from collections.abc import Sequence
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from torch import nn


class LayerNormCritic(ContinuousCritic):
    """
    SB3's critic with each hidden layer normalised before its activation (Ba et al. 2016, arXiv:1607.06450).

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: hidden layers of each stream
    :param features_extractor: from observations to features
    :param features_dim: number of features
    :param activation_fn: activation function
    :param normalize_images: whether images are divided by 255
    :param n_critics: number of streams, disjoint networks on features and action
    :param share_features_extractor: whether the extractor is the actor's; then it learns from the actor's loss alone
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        n_critics: int = 2,
        share_features_extractor: bool = True,
    ) -> None:
        BaseModel.__init__(
            self, observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.share_features_extractor = share_features_extractor
        self.n_critics = n_critics
        self.q_networks: list[nn.Module] = []
        inputs = features_dim + get_action_dim(action_space)
        for i in range(n_critics):
            stream = layer_norm_mlp(inputs, net_arch, activation_fn)
            self.add_module(f"qf{i}", stream)
            self.q_networks.append(stream)


def layer_norm_mlp(inputs: int, net_arch: Sequence[int], activation_fn: type[nn.Module]) -> nn.Sequential:
    """
    :param inputs: number of inputs
    :param net_arch: hidden layers
    :param activation_fn: activation function
    :return: hidden layers, each normalised before its activation, and one output
    """
    return nn.Sequential(*create_mlp(inputs, 1, list(net_arch), activation_fn, post_linear_modules=[nn.LayerNorm]))
