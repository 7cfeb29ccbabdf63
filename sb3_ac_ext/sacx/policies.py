"""SAC's networks: SB3's actor, the twin-stream critic, and V if asked for."""

from typing import Any

import torch as th
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.sac.policies import Actor, SACPolicy
from torch import nn

from sb3_ac_ext.functional.gaussian import squashed_gaussian
from sb3_ac_ext.legacy.fused_mlp import FusedLinear, FusedMLP
from sb3_ac_ext.networks.critics import FeaturesModel, TwinStreamCritic
from sb3_ac_ext.networks.policies import ForDicts, ForImages, TwinStreamPolicy


class ValueNetwork(FeaturesModel):
    """
    V(s), an MLP on features (Haarnoja et al. 2018, arXiv:1801.01290).

    :param layer_norm: whether each hidden layer is normalised
    :param kwargs: `FeaturesModel`'s arguments
    """

    def __init__(self, *, layer_norm: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vf = self.mlp(self.features_dim, layer_norm)

    def forward(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: ``(B, ...)`` observations
        :return: ``(B, 1)`` V
        """
        value: th.Tensor = self.vf(self.features(obs))
        return value


class MlpPolicy(TwinStreamPolicy, SACPolicy):
    """
    SB3's SAC policy with the twin-stream critic, an optimizer for each network, and V if asked for.

    :param args: SB3's, see `TwinStreamPolicy` for the others
    :param value_network: whether there is a V with a target, in place of the critic's target; the algorithm decides
    """

    critic: TwinStreamCritic  # type: ignore[assignment]
    critic_target: TwinStreamCritic  # type: ignore[assignment]
    value: ValueNetwork
    value_target: ValueNetwork

    def __init__(self, *args: Any, value_network: bool = False, **kwargs: Any) -> None:
        self.value_network = value_network
        super().__init__(*args, **kwargs)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> Actor:
        actor = super().make_actor(features_extractor)
        actor.latent_pi = FusedMLP(*actor.latent_pi)
        if not actor.use_sde:
            actor.mu = FusedLinear.of(actor.mu)  # type: ignore[arg-type]  # linear without gSDE
            actor.log_std = FusedLinear.of(actor.log_std)  # type: ignore[arg-type,assignment]
        return actor

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
        del self.critic.optimizer  # one for both streams
        self.q_a_optimizer = self._optimizer_of(self.critic.qf0, lr_schedule)
        self.q_b_optimizer = self._optimizer_of(self.critic.qf1, lr_schedule)
        self.critic_features_optimizer = self._optimizer_of_features(self.critic, lr_schedule)
        if self.value_network:
            self.critic_target = nn.Identity()  # type: ignore[assignment]  # SB3 looks for running statistics in it
            self.value = self.make_value(self.actor.features_extractor if self.share_features_extractor else None)
            self.value_target = self.make_value()
            self.value_target.load_state_dict(self.value.state_dict())
            self.value_target.set_training_mode(False)
            self.value_optimizer = self._optimizer_of(self.value.vf, lr_schedule)
            self.value_features_optimizer = self._optimizer_of_features(self.value, lr_schedule)

    def _optimizer_of(self, module: nn.Module, lr_schedule: Schedule) -> th.optim.Optimizer:
        return self.optimizer_class(module.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _optimizer_of_features(
        self, network: TwinStreamCritic | ValueNetwork, lr_schedule: Schedule
    ) -> th.optim.Optimizer | None:
        """None where there is nothing to learn, or the actor's loss does it."""
        extractor = network.features_extractor
        learns = not self.share_features_extractor and any(True for _ in extractor.parameters())
        return self._optimizer_of(extractor, lr_schedule) if learns else None

    def action_log_prob(self, observations: PyTorchObs, *, exact: bool, by_sb3: bool) -> tuple[th.Tensor, th.Tensor]:
        """
        :param observations: ``(B, ...)``
        :param exact: whether the correction for tanh is exact, or bounded as SB3's
        :param by_sb3: whether SB3's actor computes them, which knows no exact correction; otherwise they take a formula and
            the same random numbers
        :return: ``(B, A)`` actions of the actor and ``(B, 1)`` their log-density in nats, both with gradient
        """
        if by_sb3:
            actions, log_prob = self.actor.action_log_prob(observations)
            return actions, log_prob.reshape(-1, 1)
        mean, log_std, sde = self.actor.get_action_dist_params(observations)
        distribution = self.actor.action_dist
        if sde:  # state-dependent noise, relative to its standard deviation
            std = distribution.proba_distribution(mean, log_std, **sde).distribution.stddev
            noise, log_std = distribution.get_noise(sde["latent_sde"]) / std, std.log()
        else:
            noise = th.empty_like(mean).normal_()
        return squashed_gaussian(mean, log_std, noise, 0.0 if exact else distribution.epsilon)

    def density_obstacle(self) -> str | None:
        """Why densities have to come from SB3's actor; None if the formula gives the same."""
        actor, distribution = self.actor, self.actor.action_dist
        if type(actor) is not Actor or type(distribution) is not SquashedDiagGaussianDistribution:
            return f"the actor is a {type(actor).__name__} with a {type(distribution).__name__}"
        replaced = {"action_log_prob"} & vars(actor).keys() or {"log_prob_from_params"} & vars(distribution).keys()
        return "a method of the actor was replaced" if replaced else None

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
