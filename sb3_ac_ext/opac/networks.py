"""Actors of Discrete and of Box actions, and critics: Q(s, a), Q(s, .) of all choices, or V(s)."""

from collections.abc import Sequence
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_ac_ext.functional.gaussian import squashed_gaussian, squashed_gaussian_log_prob
from sb3_ac_ext.functional.gumbel import gumbel_noise

LARGEST_LOG_STD = 2.0
INSIDE = 1 - 1e-6
"""
Of an action in [-1, 1] the largest absolute value whose density is asked for: that of the limits has none. Far enough from
them that neighbouring numbers of float32 have about the same.
"""


class Actor(BaseModel):
    """
    pi(.|s) by an MLP on features. What ``forward`` gives determines it, and is what the other functions take.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: hidden layers
    :param features_extractor: from observations to features
    :param features_dim: number of features
    :param activation_fn: activation function
    :param normalize_images: whether images are divided by 255
    """

    features_extractor: BaseFeaturesExtractor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        net_arch: Sequence[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.latent_pi = nn.Sequential(*create_mlp(features_dim, -1, list(net_arch), activation_fn))
        self.latent_dim = net_arch[-1] if len(net_arch) > 0 else features_dim

    def latent(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: ``(B, ...)``
        :return: ``(B, latent_dim)`` what the last hidden layer gives
        """
        latent: th.Tensor = self.latent_pi(self.extract_features(obs, self.features_extractor))
        return latent

    def mode(self, outputs: Any) -> th.Tensor:
        """
        :param outputs: of ``forward``
        :return: ``(B, A)`` the action without exploration
        """
        raise NotImplementedError

    def sample(self, outputs: Any) -> tuple[th.Tensor, th.Tensor]:
        """
        :param outputs: of ``forward``
        :return: ``(B, A)`` a ~ pi(.|s), Box actions with gradient, and ``(B, 1)`` log pi(a|s)
        """
        raise NotImplementedError

    def log_prob(self, outputs: Any, actions: th.Tensor) -> th.Tensor:
        """
        :param outputs: of ``forward``
        :param actions: ``(B, A)``
        :return: ``(B, 1)`` log pi(a|s)
        """
        raise NotImplementedError

    def entropy(self, outputs: Any) -> th.Tensor:
        """
        :param outputs: of ``forward``
        :return: ``(B, 1)`` of pi(.|s) in nats; of Box actions an estimate from one draw
        """
        raise NotImplementedError


class ChoiceActor(Actor):
    """Softmax of logits, for Discrete actions; see `Actor` for the arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.action_space, spaces.Discrete)
        self.logits = nn.Linear(self.latent_dim, int(self.action_space.n))

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: ``(B, ...)``
        :return: ``(B, n)`` logits
        """
        logits: th.Tensor = self.logits(self.latent(obs))
        return logits

    def mode(self, outputs: th.Tensor) -> th.Tensor:
        return outputs.argmax(dim=1, keepdim=True)

    def sample(self, outputs: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        actions = self.mode(outputs.detach() + gumbel_noise(outputs))
        return actions, self.log_prob(outputs, actions)

    def log_prob(self, outputs: th.Tensor, actions: th.Tensor) -> th.Tensor:
        return outputs.log_softmax(dim=1).gather(1, actions)

    def entropy(self, outputs: th.Tensor) -> th.Tensor:
        return -(outputs.softmax(dim=1) * outputs.log_softmax(dim=1)).sum(dim=1, keepdim=True)


class BoxActor(Actor):
    """
    tanh of a diagonal Gaussian, for actions scaled to [-1, 1]; see `Actor` for the other arguments.

    :param min_std: added to the exponential of what the network gives, so that exploration never ends
    """

    def __init__(self, *args: Any, min_std: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.min_std = min_std
        actions = get_action_dim(self.action_space)
        self.mu = nn.Linear(self.latent_dim, actions)
        self.log_std = nn.Linear(self.latent_dim, actions)

    def forward(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """
        :param obs: ``(B, ...)``
        :return: ``(B, A)`` mean and ``(B, A)`` logarithm of the standard deviation, before the tanh
        """
        latent = self.latent(obs)
        log_std = self.log_std(latent).clamp(-20.0, LARGEST_LOG_STD)
        return self.mu(latent), (log_std.exp() + self.min_std).log()

    def mode(self, outputs: tuple[th.Tensor, th.Tensor]) -> th.Tensor:
        return th.tanh(outputs[0])

    def sample(self, outputs: tuple[th.Tensor, th.Tensor]) -> tuple[th.Tensor, th.Tensor]:
        mean, log_std = outputs
        return squashed_gaussian(mean, log_std, th.empty_like(mean).normal_())

    def log_prob(self, outputs: tuple[th.Tensor, th.Tensor], actions: th.Tensor) -> th.Tensor:
        return squashed_gaussian_log_prob(actions.clamp(-INSIDE, INSIDE), *outputs)

    def widened_log_prob(self, outputs: tuple[th.Tensor, th.Tensor], actions: th.Tensor, std: float) -> th.Tensor:
        """
        :param outputs: of ``forward``
        :param actions: ``(B, A)``
        :param std: of more noise before the tanh
        :return: ``(B, 1)`` the log-density of actions with that noise
        """
        mean, log_std = outputs
        return self.log_prob((mean, 0.5 * (log_std.exp().square() + std**2).log()), actions)

    def entropy(self, outputs: tuple[th.Tensor, th.Tensor]) -> th.Tensor:
        return -self.sample(outputs)[1]


class Critic(BaseModel):
    """
    Streams of MLPs on features: V(s), Q(s, .) of all Discrete actions, or Q(s, a) of Box actions.

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: hidden layers of each stream
    :param features_extractor: from observations to features
    :param features_dim: number of features
    :param activation_fn: activation function
    :param normalize_images: whether images are divided by 255
    :param kind: "v" or "q"
    :param n_critics: number of streams
    :param share_features_extractor: whether the extractor is the actor's; then it learns from the actor's loss alone
    """

    features_extractor: BaseFeaturesExtractor

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        net_arch: Sequence[int],
        features_extractor: BaseFeaturesExtractor,
        features_dim: int,
        activation_fn: type[nn.Module] = nn.ReLU,
        normalize_images: bool = True,
        *,
        kind: str,
        n_critics: int,
        share_features_extractor: bool,
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.kind, self.share_features_extractor = kind, share_features_extractor
        choices = isinstance(action_space, spaces.Discrete)
        inputs = features_dim + (0 if kind == "v" or choices else get_action_dim(action_space))
        outputs = int(action_space.n) if kind == "q" and isinstance(action_space, spaces.Discrete) else 1
        self.q_networks: list[nn.Module] = []
        for i in range(n_critics):
            stream = nn.Sequential(*create_mlp(inputs, outputs, list(net_arch), activation_fn))
            self.add_module(f"{kind}f{i}", stream)
            self.q_networks.append(stream)

    def forward(self, obs: PyTorchObs, actions: th.Tensor | None = None) -> tuple[th.Tensor, ...]:
        """
        :param obs: ``(B, ...)``
        :param actions: ``(B, A)``, for Q
        :return: of each stream ``(B, 1)`` V(s) or Q(s, a); without actions ``(B, n)`` Q of all Discrete ones
        """
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            features = self.extract_features(obs, self.features_extractor)
        if self.kind == "v" or actions is None:
            return tuple(stream(features) for stream in self.q_networks)
        if isinstance(self.action_space, spaces.Discrete):
            return tuple(stream(features).gather(1, actions) for stream in self.q_networks)
        inputs = th.cat([features, actions], dim=1)
        return tuple(stream(inputs) for stream in self.q_networks)
