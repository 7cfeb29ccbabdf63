"""SB3's policy for DDPG with networks for several agents."""

from typing import Annotated, Any

import numpy as np
import torch as th
from annotated_types import Ge
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.td3.policies import TD3Policy

from sb3_ac_ext.envs.joint_spaces import Layout, agent_spaces, size
from sb3_ac_ext.maddpg.agent import Agent
from sb3_ac_ext.maddpg.groups import Sharing, parse_groups
from sb3_ac_ext.maddpg.networks import JointActor, JointCritic
from sb3_ac_ext.validation import PositiveInt


class MlpPolicy(TD3Policy):
    """
    An actor and critics for each agent, or for each group that shares them; with one agent they are those of SB3's DDPG.

    :param observation_space: of all agents, see `JointEnv`, or of an ordinary environment, which has one agent
    :param action_space: likewise
    :param lr_schedule: learning rate at the start; the algorithm sets each optimizer's rate before it updates
    :param parameter_sharing: None for networks of each agent's own, "all" for the same for all, or lists of the names of
        agents that share an actor and critics
    :param centralised: whether critics see all agents; the algorithm decides
    :param gumbel_temperature: of the relaxation of Discrete actions
    :param n_critics: critics of each agent, whose actor ascends the first; targets are their smallest value. 2, with
        ``policy_delay=2`` and smoothing noise, is MATD3
    :param kwargs: SB3's other arguments (net_arch, activation_fn, ...)
    :raises ValueError: if no such agents can share parameters, or the features are not flat observations
    :raises UnsupportedError: for spaces that cannot be shared out over agents
    """

    actor: JointActor  # type: ignore[assignment]
    actor_target: JointActor  # type: ignore[assignment]
    critic: JointCritic  # type: ignore[assignment]
    critic_target: JointCritic  # type: ignore[assignment]

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        parameter_sharing: Sharing = None,
        centralised: bool = True,
        gumbel_temperature: Annotated[float, Ge(1e-6)] = 1.0,
        n_critics: PositiveInt = 1,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        **kwargs: Any,
    ) -> None:
        if features_extractor_class is not FlattenExtractor:
            raise ValueError(f"features_extractor_class must be FlattenExtractor, got {features_extractor_class}")
        self.layout = Layout.of(observation_space, action_space)
        self.groups = parse_groups(parameter_sharing, self.layout)
        self.parameter_sharing, self.centralised = parameter_sharing, centralised
        self.gumbel_temperature = gumbel_temperature
        discrete = np.repeat(np.array(self.layout.choices) > 0, [size(columns) for columns in self.layout.actions])
        self.discrete = discrete.reshape(action_space.shape)
        """Which columns of the joint action are one-hots."""
        super().__init__(observation_space, action_space, lr_schedule, n_critics=n_critics, **kwargs)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> JointActor:  # type: ignore[override]
        actor_kwargs = self._update_features_extractor(self.actor_kwargs, features_extractor)
        return JointActor(**actor_kwargs, groups=self.groups, temperature=self.gumbel_temperature).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> JointCritic:  # type: ignore[override]
        critic_kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return JointCritic(**critic_kwargs, groups=self.groups, centralised=self.centralised).to(self.device)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.actor(observation, deterministic)

    def scale_action(self, action: np.ndarray) -> np.ndarray:
        """Box actions from the environment's range to [-1, 1]; one-hots stay what they are."""
        return np.where(self.discrete, action, super().scale_action(action))

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """The way back."""
        return np.where(self.discrete, scaled_action, super().unscale_action(scaled_action))

    def agent(self, agent: str | int) -> Agent:
        """
        :param agent: name or number
        :return: the agent by itself, whose network is this policy's
        """
        index = self.layout.index(agent)
        observation_space, action_space = (agent_spaces(space)[index] for space in (self.observation_space, self.action_space))
        group = next(number for number, members in enumerate(self.groups) if index in members)
        network: Any = self.actor.mu[group]
        name, net_arch, activation_fn = self.layout.names[index], self.actor.net_arch, self.actor.activation_fn
        return Agent(name, observation_space, action_space, net_arch, activation_fn, network)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        names = ("parameter_sharing", "centralised", "gumbel_temperature")
        return {**super()._get_constructor_parameters(), **{name: getattr(self, name) for name in names}}
