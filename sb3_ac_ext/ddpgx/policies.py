"""SB3's policies for DDPG with the paper's architecture as options."""

from typing import Any

from gymnasium import spaces
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.td3.policies import Actor, TD3Policy
from torch import nn

from sb3_ac_ext.ddpgx.networks import LateActionCritic
from sb3_ac_ext.networks.policies import ForDicts, ForImages
from sb3_ac_ext.validation import NonNegative, NonNegativeInt, PositiveInt, check_number


class MlpPolicy(TD3Policy):
    """
    SB3's policy for DDPG, with the paper's architecture as options; their defaults give SB3's networks.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: learning rate at the start; the algorithm sets each optimizer's rate before it updates
    :param action_layer: the critic's hidden layer that the action enters, from 0: 0 beside the features as in SB3, 1 the
        paper's second layer
    :param batch_norm: whether the features and the hidden layers of the actor, and of the critic before the action, are
        normalised over the batch (Ioffe and Szegedy 2015, arXiv:1502.03167)
    :param final_layer_init: x, for final layers of actor and critic drawn from U(-x, x), the paper's 0.003; None draws them
        as the others, from U(-1 / sqrt(fan_in), 1 / sqrt(fan_in))
    :param n_critics: critics; targets are their smallest value, and the actor ascends the first
    :param kwargs: SB3's other arguments (net_arch, activation_fn, share_features_extractor, ...)
    :raises ValueError: if the critic has no such layer
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        action_layer: NonNegativeInt = 0,
        batch_norm: bool = False,
        final_layer_init: NonNegative | None = None,
        n_critics: PositiveInt = 1,
        **kwargs: Any,
    ) -> None:
        self.action_layer = action_layer
        self.batch_norm = batch_norm
        self.final_layer_init = final_layer_init
        super().__init__(observation_space, action_space, lr_schedule, n_critics=n_critics, **kwargs)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        actor = super().make_actor(features_extractor)
        if self.batch_norm:
            dim, actions = actor.features_dim, get_action_dim(self.action_space)
            norms: list[type[nn.Module]] = [nn.BatchNorm1d]
            layers = create_mlp(dim, actions, actor.net_arch, actor.activation_fn, True, post_linear_modules=norms)
            actor.mu = nn.Sequential(nn.BatchNorm1d(dim), *layers).to(self.device)
        self._draw_final_layer(actor.mu)
        return actor

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> ContinuousCritic:
        critic_kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        hidden = critic_kwargs["net_arch"]
        name = f"action_layer (of the critic's hidden layers {hidden}, from 0)"
        check_number(name, self.action_layer, low=0, high=max(len(hidden) - 1, 0), integer=True)
        if self.action_layer or self.batch_norm:
            critic: ContinuousCritic = LateActionCritic(
                **critic_kwargs, action_layer=self.action_layer, batch_norm=self.batch_norm
            )
        else:
            critic = ContinuousCritic(**critic_kwargs)
        for layers in critic.q_networks:
            self._draw_final_layer(layers)
        return critic.to(self.device)

    def _draw_final_layer(self, layers: nn.Module) -> None:
        if self.final_layer_init is not None:
            final = [layer for layer in layers.modules() if isinstance(layer, nn.Linear)][-1]
            for parameter in final.parameters():
                nn.init.uniform_(parameter, -self.final_layer_init, self.final_layer_init)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in ("action_layer", "batch_norm", "final_layer_init")}
        return {**super()._get_constructor_parameters(), **options}


class CnnPolicy(ForImages, MlpPolicy):
    """The policy for images."""


class MultiInputPolicy(ForDicts, MlpPolicy):
    """The policy for Dict observations."""
