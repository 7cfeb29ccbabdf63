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

from sb3_ac_ext.legacy.flat_tensor import bind
from sb3_ac_ext.legacy.fused_mlp import FusedMLP
from sb3_ac_ext.legacy.stacked_mlps import side_by_side
from sb3_ac_ext.validation import check_number


class FeaturesModel(BaseModel):
    """
    A value function on features of the observation.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: hidden layers
    :param features_extractor: from observations to features
    :param features_dim: number of features
    :param activation_fn: activation function
    :param normalize_images: whether images are divided by 255
    :param share_features_extractor: whether the extractor is the actor's; then it learns from the actor's loss alone
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
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.share_features_extractor = share_features_extractor
        self.net_arch = list(net_arch)
        self.features_dim = features_dim
        self.activation_fn = activation_fn

    def features(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: ``(B, ...)`` observations
        :return: ``(B, F)`` features, without gradient if the extractor is the actor's
        """
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            return self.extract_features(obs, self.features_extractor)

    def mlp(self, inputs: int, layer_norm: bool) -> FusedMLP:
        """
        :param inputs: number of inputs
        :param layer_norm: whether each hidden layer is normalised before its activation (Ba et al. 2016, arXiv:1607.06450)
        :return: hidden layers and one output
        """
        norms: list[type[nn.Module]] = [nn.LayerNorm] if layer_norm else []
        return FusedMLP(*create_mlp(inputs, 1, self.net_arch, self.activation_fn, post_linear_modules=norms))


class TwinStreamCritic(FeaturesModel):
    """
    Two disjoint streams of one network, each an MLP on features and action (Fujimoto et al. 2018, arXiv:1802.09477).

    The streams are named as SB3 names its critics, so that state dicts fit both ways.

    :param layer_norm: whether each hidden layer is normalised
    :param kwargs: `FeaturesModel`'s arguments
    """

    def __init__(self, *, layer_norm: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        inputs = self.features_dim + get_action_dim(self.action_space)
        self.qf0 = self.mlp(inputs, layer_norm)
        self.qf1 = self.mlp(inputs, layer_norm)

    def lay_out(self) -> None:
        """Put the streams' parameters one after another in memory, where they can run as one."""
        bind([*self.qf0.parameters(), *self.qf1.parameters()])

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param obs: ``(B, ...)`` observations
        :param actions: ``(B, A)`` actions in [-1, 1]
        :return: Q_a and Q_b, each ``(B, 1)``
        """
        q_a, q_b = side_by_side((self.qf0, self.qf1), th.cat([self.features(obs), actions], dim=1))
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


class SingleStreamCritic(FeaturesModel):
    """
    One Q network, whose action may enter at a later hidden layer (Lillicrap et al. 2016, arXiv:1509.02971, section 7).

        h = state_layers(features),  Q = qf0([h; a])

    Without state layers the names are those of SB3's critic, so that state dicts fit both ways. Batch normalisation uses its
    running statistics, which training updates first, in training too: Q fitted on the statistics of its batch, and
    bootstrapped from a target on the running ones, does not learn even Pendulum.

    :param action_layer: the hidden layer that the action enters, from 0, the first one: beside the features
    :param batch_norm: whether the features and the hidden layers before the action are normalised over the batch
        (Ioffe and Szegedy 2015, arXiv:1502.03167)
    :param kwargs: `FeaturesModel`'s arguments
    :raises TypeError: if ``action_layer`` is not an integer
    :raises ValueError: if the network has no such hidden layer
    """

    def __init__(self, *, action_layer: int = 0, batch_norm: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        name = f"action_layer (of the critic's hidden layers {self.net_arch}, from 0)"
        check_number(name, action_layer, low=0, high=max(len(self.net_arch) - 1, 0), integer=True)
        self.batch_norm = batch_norm
        norms: list[type[nn.Module]] = [nn.BatchNorm1d] if batch_norm else []
        sequence = nn.Sequential if batch_norm else FusedMLP
        before, after = self.net_arch[:action_layer], self.net_arch[action_layer:]
        state_layers = [norm(self.features_dim) for norm in norms]
        state_layers += create_mlp(self.features_dim, 0, before, self.activation_fn, post_linear_modules=norms)
        self.state_layers = sequence(*state_layers) if state_layers else nn.Identity()
        state_dim = before[-1] if before else self.features_dim
        self.qf0 = FusedMLP(*create_mlp(state_dim + get_action_dim(self.action_space), 1, after, self.activation_fn))

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor]:
        """
        :param obs: ``(B, ...)`` observations
        :param actions: ``(B, A)`` actions in [-1, 1]
        :return: Q, ``(B, 1)``, alone in a tuple as SB3's critics return it
        """
        features = self.features(obs)
        if self.batch_norm and self.training:
            with th.no_grad():
                self.state_layers(features)  # the running statistics take the batch in
        return (self.qf0(th.cat([self._on_running_statistics(features), actions], dim=1)),)

    def _on_running_statistics(self, features: th.Tensor) -> th.Tensor:
        training = self.state_layers.training
        self.state_layers.eval()
        hidden: th.Tensor = self.state_layers(features)
        self.state_layers.train(training)
        return hidden

    def q1_forward(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        Q for the actor's loss: its gradient goes to the actions and the layers after them alone, and the running statistics
        of batch normalisation stay as they are.

        :param obs: ``(B, ...)`` observations
        :param actions: ``(B, A)`` actions in [-1, 1]
        :return: ``(B, 1)`` Q
        """
        with th.no_grad():
            hidden = self._on_running_statistics(self.extract_features(obs, self.features_extractor))
        q: th.Tensor = self.qf0(th.cat([hidden, actions], dim=1))
        return q
