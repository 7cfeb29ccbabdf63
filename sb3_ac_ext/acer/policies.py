"""Policies with action-values: one for each of Discrete actions, and for a Box V and advantages."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch as th
from annotated_types import Interval
from gymnasium import spaces
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn
from torch.distributions import Categorical, Normal

from sb3_ac_ext.base.on_policy import LOG_STD


class Judgement(NamedTuple):
    """What a policy says of B states."""

    distribution: Any
    """PyTorch's, of actions: Categorical, or Normal."""
    values: th.Tensor
    """``(B, A)`` Q(s, .) of Discrete actions, ``(B, 1)`` V(s) in a Box, in reward units."""
    latent: th.Tensor
    """``(B, L)`` what the last layer of the values was given."""

    @property
    def state_values(self) -> th.Tensor:
        """``(B, 1)`` V(s), which is sum_a pi(a|s) Q(s, a) of Discrete actions."""
        if isinstance(self.distribution, Categorical):
            return (self.distribution.probs * self.values).sum(dim=1, keepdim=True)
        return self.values


class MlpPolicy(ActorCriticPolicy):
    """
    SB3's policy, whose value network has Q of each Discrete action; in a Box it has V, there is a network for A(s, a) besides,
    and the standard deviation is not trained.

    :param observation_space: of the environment
    :param action_space: Discrete or Box
    :param lr_schedule: learning rate at the start; the algorithm sets the optimizer's rate before it updates
    :param log_std_init: logarithm of the standard deviation in a Box, which stays
    :param advantage_net_arch: hidden layers of A(s, a), which gets the action and what V's last layer gets
    :param kwargs: SB3's other arguments (net_arch, activation_fn, ...)
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *,
        log_std_init: Annotated[float, Interval(ge=LOG_STD[0], le=LOG_STD[1])] = math.log(0.3),
        advantage_net_arch: Sequence[int] = (64,),
        **kwargs: Any,
    ) -> None:
        self.advantage_net_arch = list(advantage_net_arch)
        super().__init__(observation_space, action_space, lr_schedule, log_std_init=log_std_init, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        space, width = self.action_space, self.mlp_extractor.latent_dim_vf
        if isinstance(space, spaces.Discrete):
            self.value_net = nn.Linear(width, int(space.n))
        else:
            log_std = self.log_std.detach()
            del self.log_std
            self.register_buffer("log_std", log_std)
            widths = [width + spaces.flatdim(space), *self.advantage_net_arch]
            layers = create_mlp(widths[0], -1, widths[1:], self.activation_fn)
            self.advantage_net = nn.Sequential(*layers, nn.Linear(widths[-1], 1, bias=False))  # a bias has no advantage
        if self.ortho_init:
            getattr(self, "advantage_net", self.value_net).apply(partial(self.init_weights, gain=1))
        options: dict[str, Any] = self.optimizer_kwargs
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **options)  # type: ignore[call-arg]  # SB3's annotation has no lr

    def judge(self, obs: PyTorchObs) -> Judgement:
        """
        :param obs: ``(B, ...)`` observations
        :return: the distribution of actions, and values
        """
        of_policy, latent = self._latents(obs)
        distribution: Any = self._get_action_dist_from_latent(of_policy)
        return Judgement(distribution.distribution, self.value_net(latent), latent)

    def _latents(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """What the last layers of policy and values get."""
        features = self.extract_features(obs)
        of_policy, of_values = features if isinstance(features, tuple) else (features, features)
        return self.mlp_extractor.forward_actor(of_policy), self.mlp_extractor.forward_critic(of_values)

    def advantages(self, latent: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param latent: ``(B, L)`` of a `Judgement`
        :param actions: ``(..., B, D)``
        :return: ``(..., B)`` A(s, a), in reward units
        """
        latents = latent.expand(*actions.shape[:-1], latent.shape[-1])
        advantages: th.Tensor = self.advantage_net(th.cat([latents, actions], dim=-1))
        return advantages.squeeze(-1)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """See SB3's; values are V."""
        values = self.judge(obs).state_values
        actions = self.action_dist.get_actions(deterministic=deterministic)
        log_prob = self.action_dist.log_prob(actions)
        return actions.reshape((-1, *(self.action_space.shape or ()))), values, log_prob

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """See SB3's; values are V."""
        values = self.judge(obs).state_values
        return values, self.action_dist.log_prob(actions), self.action_dist.entropy()

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """See SB3's; values are V. The policy's distribution, which is one for all threads, stays as it is."""
        if not isinstance(self.action_space, spaces.Discrete):
            return super().predict_values(obs)
        of_policy, latent = self._latents(obs)
        return (self.action_net(of_policy).softmax(dim=1) * self.value_net(latent)).sum(dim=1, keepdim=True)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "advantage_net_arch": self.advantage_net_arch}


class CnnPolicy(MlpPolicy, ActorCriticCnnPolicy):
    """`MlpPolicy` for images."""


class MultiInputPolicy(MlpPolicy, MultiInputActorCriticPolicy):
    """`MlpPolicy` for Dict observations."""


def behaviour(distribution: Any) -> dict[str, th.Tensor]:
    """
    :param distribution: PyTorch's, of actions in B states
    :return: ``(B, ...)`` each, all that it is a function of: "logits", which are log-probabilities in nats; or "mean", "std"
    """
    if isinstance(distribution, Normal):
        return {"mean": distribution.loc, "std": distribution.scale}
    return {"logits": distribution.logits}
