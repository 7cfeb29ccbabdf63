"""The critic of DDPG's paper."""

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel, ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn
from torch.nn import functional as F


class LateActionCritic(ContinuousCritic):
    """
    Q networks whose action may enter at a later hidden layer (Lillicrap et al. 2016, arXiv:1509.02971, section 7).

        h = state_layers(features),  Q = qf0([h; a])

    Further critics are disjoint: ``state_layers1`` and ``qf1``, and so on. Batch normalisation uses its running statistics,
    which training updates first, in training too: Q fitted on the statistics of its batch, and bootstrapped from a target on
    the running ones, does not learn even Pendulum.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: hidden layers
    :param features_extractor: from observations to features
    :param features_dim: number of features
    :param activation_fn: activation function
    :param normalize_images: whether images are divided by 255
    :param n_critics: number of critics
    :param share_features_extractor: whether the extractor is the actor's; then it learns from the actor's loss alone
    :param action_layer: the hidden layer that the action enters, from 0, the first one: beside the features
    :param batch_norm: whether the features and the hidden layers before the action are normalised over the batch
        (Ioffe and Szegedy 2015, arXiv:1502.03167)
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        net_arch: list[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        n_critics: int = 1,
        share_features_extractor: bool = False,
        *,
        action_layer: int = 0,
        batch_norm: bool = False,
    ) -> None:
        BaseModel.__init__(
            self, observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.share_features_extractor = share_features_extractor
        self.n_critics = n_critics
        self.batch_norm = batch_norm
        self.state_networks: list[nn.Sequential] = []
        self.q_networks: list[nn.Module] = []
        norms: list[type[nn.Module]] = [nn.BatchNorm1d] if batch_norm else []
        before, after = net_arch[:action_layer], net_arch[action_layer:]
        inputs = (before[-1] if before else features_dim) + get_action_dim(action_space)
        for k in range(n_critics):
            state_layers = [norm(features_dim) for norm in norms]
            state_layers += create_mlp(features_dim, 0, before, activation_fn, post_linear_modules=norms)
            self.state_networks.append(nn.Sequential(*state_layers))
            self.q_networks.append(nn.Sequential(*create_mlp(inputs, 1, after, activation_fn)))
            self.add_module(f"state_layers{k or ''}", self.state_networks[k])
            self.add_module(f"qf{k}", self.q_networks[k])

    def forward(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        """
        :param obs: ``(B, ...)`` observations
        :param actions: ``(B, A)`` actions in [-1, 1]
        :return: ``(B, 1)`` Q of each critic
        """
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            features = self.extract_features(obs, self.features_extractor)
        if self.batch_norm and self.training:
            with th.no_grad():
                for state_layers in self.state_networks:
                    state_layers(features)  # the running statistics take the batch in
        hidden = [self._hidden(state_layers, features) for state_layers in self.state_networks]
        return tuple(q(th.cat([h, actions], dim=1)) for q, h in zip(self.q_networks, hidden, strict=True))

    def q1_forward(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        Q for the actor's loss: its gradient goes to the actions and the layers after them alone, and the running statistics
        of batch normalisation stay as they are.

        :param obs: ``(B, ...)`` observations
        :param actions: ``(B, A)`` actions in [-1, 1]
        :return: ``(B, 1)`` Q of the first critic
        """
        with th.no_grad():
            features = self.extract_features(obs, self.features_extractor)
            hidden = self._hidden(self.state_networks[0], features)
        q: th.Tensor = self.q_networks[0](th.cat([hidden, actions], dim=1))
        return q

    def _hidden(self, state_layers: nn.Sequential, features: th.Tensor) -> th.Tensor:
        """What the state layers make of the features, on the running statistics in training too."""
        if not (self.batch_norm and self.training):
            return state_layers(features)  # type: ignore[no-any-return]  # of a Sequential
        hidden = features
        for layer in state_layers:
            if isinstance(layer, nn.BatchNorm1d):
                statistics = layer.running_mean, layer.running_var
                hidden = F.batch_norm(hidden, *statistics, layer.weight, layer.bias, training=False, eps=layer.eps)
            else:
                hidden = layer(hidden)
        return hidden
