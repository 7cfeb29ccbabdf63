"""SB3's policy for DDPG with networks for several agents."""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch as th
from annotated_types import Ge
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.td3.policies import TD3Policy
from torch import nn

from sb3_ac_ext.envs.joint_spaces import Layout, agent_spaces, size
from sb3_ac_ext.maddpg.agent import Agent
from sb3_ac_ext.maddpg.groups import Sharing, parse_groups
from sb3_ac_ext.maddpg.inferred import InferredPolicies
from sb3_ac_ext.maddpg.networks import JointActor, JointCritic
from sb3_ac_ext.maddpg.sub_policies import ActorCritic, SubPolicy, acts_by, mixed_actions
from sb3_ac_ext.validation import ArgumentError, PositiveInt


class MlpPolicy(TD3Policy):
    """
    An actor and critics for each agent, or for each group that shares them; with one agent they are those of SB3's DDPG.

    :param observation_space: of all agents, see `JointEnv`, or of an ordinary environment, which has one agent
    :param action_space: likewise
    :param lr_schedule: learning rate at the start; the algorithm sets each optimizer's rate before it updates
    :param parameter_sharing: None for networks of each agent's own, "all" for the same for all, or lists of the names of
        agents that share an actor and critics
    :param centralised: whether critics see all agents; the algorithm decides
    :param n_sub_policies: actors and critics of each agent, with their targets, in one optimizer, whose state is each
        parameter's own; the algorithm decides. By itself (without the model's `predict`) the policy draws one for each agent
        at each call
    :param gumbel_temperature: of the relaxation of Discrete actions
    :param n_critics: critics of each agent, whose actor ascends the first; targets are their smallest value. 2, with
        ``policy_delay=2`` and smoothing noise, is MATD3
    :param inferred_policies: whether each agent has models of the others' policies, with layers like an actor's; the
        algorithm decides
    :param kwargs: SB3's other arguments (net_arch, activation_fn, ...)
    :raises ValueError: if no such agents can share parameters, or the features are not flat observations
    :raises UnsupportedError: for spaces that cannot be shared out over agents
    """

    actor: JointActor  # type: ignore[assignment]
    actor_target: JointActor  # type: ignore[assignment]
    critic: JointCritic  # type: ignore[assignment]
    critic_target: JointCritic  # type: ignore[assignment]
    inferred: InferredPolicies
    inferred_target: InferredPolicies
    further: Sequence[SubPolicy]
    """The sub-policies but for the first, whose networks are ``actor``, ``critic`` and their targets."""

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Box,
        lr_schedule: Schedule,
        *,
        parameter_sharing: Sharing = None,
        centralised: bool = True,
        n_sub_policies: PositiveInt = 1,
        gumbel_temperature: Annotated[float, Ge(1e-6)] = 1.0,
        n_critics: PositiveInt = 1,
        inferred_policies: bool = False,
        features_extractor_class: type[BaseFeaturesExtractor] = FlattenExtractor,
        **kwargs: Any,
    ) -> None:
        if features_extractor_class is not FlattenExtractor:
            raise ValueError(f"features_extractor_class must be FlattenExtractor, got {features_extractor_class}")
        self.layout = Layout.of(observation_space, action_space)
        self.groups = parse_groups(parameter_sharing, self.layout)
        self.parameter_sharing, self.centralised = parameter_sharing, centralised
        self.gumbel_temperature, self.inferred_policies = gumbel_temperature, inferred_policies
        self.n_sub_policies, self.further = n_sub_policies, ()
        discrete = np.repeat(np.array(self.layout.choices) > 0, [size(columns) for columns in self.layout.actions])
        self.discrete = discrete.reshape(action_space.shape)
        """Which columns of the joint action are one-hots."""
        super().__init__(observation_space, action_space, lr_schedule, n_critics=n_critics, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        if self.inferred_policies:
            self.inferred, self.inferred_target = self.make_inferred(), self.make_inferred()
            self.inferred_target.load_state_dict(self.inferred.state_dict())
            optimizer: Any = self.optimizer_class
            self.inferred.optimizer = optimizer(self.inferred.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)
            self.inferred_target.set_training_mode(False)
        if self.n_sub_policies > 1:
            self._make_further(lr_schedule)

    def _make_further(self, lr_schedule: Schedule) -> None:
        """The sub-policies but for the first, and optimizers for the parameters of all."""
        makers = (self.make_actor, self.make_actor, self.make_critic, self.make_critic)
        made = [SubPolicy(*(make() for make in makers)) for _ in range(1, self.n_sub_policies)]  # type: ignore[arg-type]
        self.further = nn.ModuleList(made)  # type: ignore[assignment]  # is one, but for its type
        for name in ("actor", "critic"):
            networks = [getattr(one, name) for one in self.sub_policies]
            parameters = [parameter for network in networks for parameter in network.parameters()]
            networks[0].optimizer = self.optimizer_class(parameters, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    @property
    def sub_policies(self) -> list[ActorCritic]:
        """All of them; the policy itself is the first."""
        return [self, *self.further]

    def set_training_mode(self, mode: bool) -> None:
        """See SB3's ``TD3Policy.set_training_mode``."""
        super().set_training_mode(mode)
        for one in self.further:
            one.set_training_mode(mode)
        if self.inferred_policies:
            self.inferred.set_training_mode(mode)

    def make_actor(self, features_extractor: BaseFeaturesExtractor | None = None) -> JointActor:  # type: ignore[override]
        actor_kwargs = self._update_features_extractor(self.actor_kwargs, features_extractor)
        return JointActor(**actor_kwargs, groups=self.groups, temperature=self.gumbel_temperature).to(self.device)

    def make_critic(self, features_extractor: BaseFeaturesExtractor | None = None) -> JointCritic:  # type: ignore[override]
        critic_kwargs = self._update_features_extractor(self.critic_kwargs, features_extractor)
        return JointCritic(**critic_kwargs, groups=self.groups, centralised=self.centralised).to(self.device)

    def make_inferred(self) -> InferredPolicies:
        """What each agent thinks of the others' policies."""
        return InferredPolicies(**self._update_features_extractor(self.actor_kwargs)).to(self.device)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        if self.n_sub_policies == 1:
            return self.actor(observation, deterministic)
        numbers = acts_by()
        if numbers is None:
            numbers = np.random.default_rng().integers(self.n_sub_policies, size=(len(observation), len(self.layout)))
        actors = [one.actor for one in self.sub_policies]
        return mixed_actions(actors, th.as_tensor(numbers, device=self.device), observation, deterministic)

    def scale_action(self, action: np.ndarray) -> np.ndarray:
        """Box actions from the environment's range to [-1, 1]; one-hots stay what they are."""
        return np.where(self.discrete, action, super().scale_action(action))

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """The way back."""
        return np.where(self.discrete, scaled_action, super().unscale_action(scaled_action))

    def agent(self, agent: str | int, ensemble_index: int | None = None) -> Agent:
        """
        :param agent: name or number
        :param ensemble_index: which of its sub-policies; to be given where there are several
        :return: the agent by itself, whose network is this policy's
        :raises ValueError: if there is no such agent or sub-policy
        """
        index = self.layout.index(agent)
        actor = self._sub_policy(ensemble_index).actor
        observation_space, action_space = (agent_spaces(space)[index] for space in (self.observation_space, self.action_space))
        group = next(number for number, members in enumerate(self.groups) if index in members)
        network: Any = actor.mu[group]
        name, net_arch, activation_fn = self.layout.names[index], actor.net_arch, actor.activation_fn
        return Agent(name, observation_space, action_space, net_arch, activation_fn, network)

    def _sub_policy(self, ensemble_index: int | None) -> ActorCritic:
        number = 0 if ensemble_index is None and self.n_sub_policies == 1 else ensemble_index
        known = isinstance(number, (int, np.integer)) and not isinstance(number, bool) and 0 <= number < self.n_sub_policies
        if not known:
            last = self.n_sub_policies - 1
            raise ArgumentError(f"ensemble_index must be an integer in [0, {last}], one of the sub-policies, got {number!r}")
        return self.sub_policies[int(number)]  # type: ignore[arg-type]  # it is one

    def _get_constructor_parameters(self) -> dict[str, Any]:
        names = ("parameter_sharing", "centralised", "n_sub_policies", "gumbel_temperature", "inferred_policies")
        return {**super()._get_constructor_parameters(), **{name: getattr(self, name) for name in names}}
