"""Policies whose critic is Q(s, a), stochastic and deterministic."""

from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, preprocess_obs
from stable_baselines3.common.torch_layers import create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_ac_ext.networks.actor_critic import SEPARATE_POLICIES, SeparateCnnPolicy, SeparateMultiInputPolicy


class QMlpPolicy(ActorCriticPolicy):
    """The value network takes the action beside the features: one-hot where it is a choice, as it is otherwise."""

    def _build_mlp_extractor(self) -> None:
        super()._build_mlp_extractor()
        hidden = self.net_arch.get("vf", []) if isinstance(self.net_arch, dict) else list(self.net_arch)
        inputs = self.features_dim + get_flattened_obs_dim(self.action_space)
        layers = create_mlp(inputs, -1, hidden, self.activation_fn)
        self.mlp_extractor.value_net = nn.Sequential(*layers).to(self.device)
        self.mlp_extractor.latent_dim_vf = hidden[-1] if hidden else inputs

    def action_values(self, obs: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """
        :param obs: ``(B, ...)`` s
        :param actions: ``(B, ...)`` a, as the distribution gives them
        :return: ``(B, 1)`` Q(s, a), in reward units
        """
        features = BasePolicy.extract_features(self, obs, self.vf_features_extractor)
        if not isinstance(self.action_space, spaces.Box):
            actions = preprocess_obs(actions, self.action_space)  # type: ignore[assignment]  # no dict
        inputs = th.cat([features, actions.reshape(len(actions), -1).to(features.dtype)], dim=1)
        values: th.Tensor = self.value_net(self.mlp_extractor.forward_critic(inputs))
        return values

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:  # type: ignore[override]
        """See SB3's ``ActorCriticPolicy.forward``; the value is that of the action."""
        distribution = self.get_distribution(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        shaped = actions.reshape(-1, *(self.action_space.shape or ()))
        return shaped, self.action_values(obs, actions), distribution.log_prob(actions)

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """See SB3's ``ActorCriticPolicy.evaluate_actions``; the value is that of the action."""
        distribution = self.get_distribution(obs)
        return self.action_values(obs, actions), distribution.log_prob(actions), distribution.entropy()

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """See SB3's ``ActorCriticPolicy.predict_values``; the value is that of the most likely action."""
        return self.action_values(obs, self._predict(obs, deterministic=True))


class DeterministicMlpPolicy(QMlpPolicy):
    """mu(s) in the action space scaled to [-1, 1], and Q(s, a) of such actions."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._squash_output = True  # who acts scales to the environment's range

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        del self.log_std

    def action(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: ``(B, ...)`` s
        :return: ``(B, A)`` mu(s)
        """
        features = BasePolicy.extract_features(self, obs, self.pi_features_extractor)
        return th.tanh(self.action_net(self.mlp_extractor.forward_actor(features)))

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:  # type: ignore[override]
        """See SB3's ``ActorCriticPolicy.forward``; there is no density, so the log-probability is 0."""
        actions = self._predict(obs)
        values = self.action_values(obs, actions)
        return actions, values, th.zeros_like(values[:, 0])

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.action(observation).reshape(-1, *self.action_space.shape)  # type: ignore[misc]  # a Box has one


class QCnnPolicy(SeparateCnnPolicy, QMlpPolicy):
    """`QMlpPolicy` for images."""


class QMultiInputPolicy(SeparateMultiInputPolicy, QMlpPolicy):
    """`QMlpPolicy` for Dict observations."""


class DeterministicCnnPolicy(SeparateCnnPolicy, DeterministicMlpPolicy):
    """`DeterministicMlpPolicy` for images."""


class DeterministicMultiInputPolicy(SeparateMultiInputPolicy, DeterministicMlpPolicy):
    """`DeterministicMlpPolicy` for Dict observations."""


V_POLICIES = tuple(SEPARATE_POLICIES.values())
Q_POLICIES = (QMlpPolicy, QCnnPolicy, QMultiInputPolicy)
DETERMINISTIC_POLICIES = (DeterministicMlpPolicy, DeterministicCnnPolicy, DeterministicMultiInputPolicy)


def fitting_policy(given: type[BasePolicy], critic: str, deterministic: bool) -> type[BasePolicy]:
    """
    :param given: a policy class
    :param critic: argument of `AC`
    :param deterministic: argument of `AC`
    :return: for the class of one of the names, the one with the critic and the actor asked for; others as they are
    """
    if critic != "q" or given not in V_POLICIES:
        return given
    return (DETERMINISTIC_POLICIES if deterministic else Q_POLICIES)[V_POLICIES.index(given)]  # type: ignore[arg-type]  # in it
