"""SAC's networks: SB3's actor and critic, and V if asked for."""

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac import policies as sb3
from stable_baselines3.sac.policies import SACPolicy
from torch import nn

from sb3_ac_ext.networks.critics import layer_norm_mlp
from sb3_ac_ext.networks.policies import CriticPolicy, ForDicts, ForImages


class ValueNetwork(BaseModel):
    """
    V(s), an MLP on features (Haarnoja et al. 2018, arXiv:1801.01290).

    :param observation_space: Observation space
    :param action_space: Action space
    :param net_arch: hidden layers
    :param features_extractor: from observations to features
    :param features_dim: number of features
    :param activation_fn: activation function
    :param normalize_images: whether images are divided by 255
    :param share_features_extractor: whether the extractor is the actor's; then it learns from the actor's loss alone
    :param layer_norm: whether each hidden layer is normalised
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
        *,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.share_features_extractor = share_features_extractor
        if layer_norm:
            self.vf = layer_norm_mlp(features_dim, net_arch, activation_fn)
        else:
            self.vf = nn.Sequential(*create_mlp(features_dim, 1, list(net_arch), activation_fn))

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: ``(B, ...)`` observations
        :return: ``(B, 1)`` V
        """
        with th.set_grad_enabled(th.is_grad_enabled() and not self.share_features_extractor):
            features = self.extract_features(obs, self.features_extractor)
        value: th.Tensor = self.vf(features)
        return value


class Actor(sb3.Actor):
    """SB3's actor, which can be copied and pickled at any time: the graph of its last actions stays behind."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "action_dist": _detached(self.action_dist)}


def _detached(value: Any) -> Any:
    """A tensor without its graph, or a distribution with such tensors."""
    if isinstance(value, th.Tensor):
        return value.detach()
    if isinstance(value, (Distribution, th.distributions.Distribution)):
        copied = copy.copy(value)
        vars(copied).update({name: _detached(part) for name, part in vars(value).items()})
        return copied
    return value


def divided(optimizer: th.optim.Optimizer, modules: Sequence[nn.Module]) -> list[th.optim.Optimizer | None]:
    """
    Optimizers of one kind, with the same options and states, in place of one.

    :param optimizer: not to be used afterwards
    :param modules: each gets an optimizer for those of its parameters that none before it has
    :return: theirs, and one for the rest; None where there is nothing to train
    """
    left = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parts = []
    for share in [*({id(parameter) for parameter in module.parameters()} for module in modules), left.copy()]:
        parts.append(_part(optimizer, share & left))
        left -= share
    return parts


def _part(optimizer: th.optim.Optimizer, share: set[int]) -> th.optim.Optimizer | None:
    groups = [{**group, "params": [p for p in group["params"] if id(p) in share]} for group in optimizer.param_groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not parameters:
        return None
    part = copy.copy(optimizer)
    vars(part).update(vars(optimizer))  # what a class of the user's has besides
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        setattr(part, name, getattr(optimizer, name).copy())
    part.param_groups = [group for group in groups if group["params"]]
    part.state = defaultdict(dict, {p: optimizer.state[p] for p in parameters if p in optimizer.state})
    return part


class MlpPolicy(CriticPolicy, SACPolicy):
    """
    SB3's SAC policy, and V if asked for.

    :param args: SB3's, see `CriticPolicy` for the others
    :param critic_layer_norm: whether the hidden layers of Q and V are normalised
    :param n_critics: critics, with an optimizer for each; targets are their smallest value, which the actor ascends
    :param value_network: whether there is a V with a target, in place of the critic's target; the algorithm decides
    """

    value: ValueNetwork
    value_target: ValueNetwork

    def __init__(self, *args: Any, value_network: bool = False, **kwargs: Any) -> None:
        self.value_network = value_network
        super().__init__(*args, **kwargs)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        return Actor(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(self.device)

    def make_value(self, features_extractor: BaseFeaturesExtractor | None = None) -> ValueNetwork:
        """
        :param features_extractor: of the network; None makes one of its own
        :return: V with the critic's architecture
        """
        value_kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        del value_kwargs["n_critics"]
        return ValueNetwork(**value_kwargs, layer_norm=self.critic_layer_norm).to(self.device)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        if self.value_network:
            self.critic_target = nn.Identity()  # type: ignore[assignment]  # SB3 looks for running statistics in it
            self.value = self.make_value(self.actor.features_extractor if self.share_features_extractor else None)
            self.value_target = self.make_value()
            self.value_target.load_state_dict(self.value.state_dict())
            self.value_target.set_training_mode(False)
            trained = self.value.vf if self.share_features_extractor else self.value  # the actor's loss trains its features
            optimizer = self.optimizer_class(trained.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]
            self.value_optimizer, self.value_features_optimizer = divided(optimizer, [self.value.vf])

    def set_training_mode(self, mode: bool) -> None:
        super().set_training_mode(mode)
        if self.value_network:
            self.value.set_training_mode(mode)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "value_network": self.value_network}


class CnnPolicy(ForImages, MlpPolicy):
    """The policy for images."""


class MultiInputPolicy(ForDicts, MlpPolicy):
    """The policy for Dict observations."""
