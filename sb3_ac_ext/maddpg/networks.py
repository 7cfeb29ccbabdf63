"""The agents' actors and critics, each kind as one module."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BaseModel
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, create_mlp
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_ac_ext.envs.joint_spaces import Layout, size
from sb3_ac_ext.functional.gumbel import gumbel_noise, gumbel_one_hot, one_hot_argmax
from sb3_ac_ext.maddpg.groups import Groups, evaluate


@dataclass(frozen=True)
class Head:
    """Neighbouring agents whose outputs become actions in the same way."""

    columns: slice
    """Of the joint action."""
    agents: int
    choices: int
    """Of each one's Discrete actions; 0 for a Box."""


def heads(layout: Layout) -> list[Head]:
    """
    :param layout: the agents
    :return: the heads, in their order
    """
    found = []
    for choices, neighbours in groupby(range(len(layout)), key=lambda agent: layout.choices[agent]):
        agents = list(neighbours)
        found.append(Head(slice(layout.actions[agents[0]].start, layout.actions[agents[-1]].stop), len(agents), choices))
    return found


class JointModel(BaseModel):
    """
    What actors and critics have in common.

    :param observation_space: of all agents
    :param action_space: of all agents
    :param net_arch: hidden layers of each network
    :param features_extractor: flattens, and has no parameters
    :param features_dim: number of features of all agents
    :param activation_fn: activation function
    :param normalize_images: whether images are divided by 255
    :param groups: agents that share parameters
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
        *,
        groups: Groups,
    ) -> None:
        super().__init__(
            observation_space, action_space, features_extractor=features_extractor, normalize_images=normalize_images
        )
        self.layout = Layout.of(observation_space, action_space)
        self.net_arch, self.activation_fn = list(net_arch), activation_fn
        self.features_dim = features_dim
        self.groups = groups

    def networks(self) -> list[nn.ModuleList]:
        """Of each kind one network for each group."""
        raise NotImplementedError

    def network_parameters(self) -> list[list[nn.Parameter]]:
        """The parameters of each group, which no other group has."""
        return [[p for mlp in mlps for p in mlp.parameters()] for mlps in zip(*self.networks(), strict=True)]

    def _mlp(self, inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(*create_mlp(inputs, outputs, self.net_arch, self.activation_fn))


class JointActor(JointModel):
    """
    mu_i(o_i) of every agent.

    :param args: `JointModel`'s
    :param temperature: of the Gumbel-softmax
    :param kwargs: `JointModel`'s
    """

    action_masks: th.Tensor
    """``(N, 1, A)`` whether a column of the joint action is the agent's."""
    continuous: th.Tensor
    """``(A,)`` 1 where a column is a Box action's, 0 where it is of a one-hot."""
    owners: th.Tensor
    """``(A,)`` the agent that a column of the joint action belongs to."""

    def __init__(self, *args: Any, temperature: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.temperature = temperature
        self.heads = heads(self.layout)
        columns = th.arange(self.layout.action_dim)
        masks = [(columns >= part.start) & (columns < part.stop) for part in self.layout.actions]
        self.register_buffer("action_masks", th.stack(masks).unsqueeze(1), persistent=False)
        box = [th.full((size(part),), float(n == 0)) for part, n in zip(self.layout.actions, self.layout.choices, strict=True)]
        self.register_buffer("continuous", th.cat(box), persistent=False)
        owners = [th.full((size(part),), agent) for agent, part in enumerate(self.layout.actions)]
        self.register_buffer("owners", th.cat(owners), persistent=False)
        self.mu = nn.ModuleList(self._network(group[0]) for group in self.groups)

    def _network(self, agent: int) -> nn.Sequential:
        return self._mlp(size(self.layout.observations[agent]), size(self.layout.actions[agent]))

    def networks(self) -> list[nn.ModuleList]:
        """See `JointModel.networks`."""
        return [self.mu]

    def by_agent(self, joint: th.Tensor) -> list[th.Tensor]:
        """
        :param joint: ``(B, A)``
        :return: for each agent ``(B, A_i)``
        """
        return [joint[:, columns] for columns in self.layout.actions]

    def outputs(self, obs: PyTorchObs, agents: Sequence[int] | None = None) -> th.Tensor:
        """
        :param obs: ``(B, ...)`` o of all agents
        :param agents: whose; None for all
        :return: ``(B, A)`` what `act` makes actions of: each agent's depends on its own observation only; 0 for the others
        """
        features = self.extract_features(obs, self.features_extractor)
        if agents is None:
            return th.cat(evaluate(self.mu, self.groups, [features[:, own] for own in self.layout.observations]), dim=1)
        inputs = [features[:, self.layout.observations[agent]] for agent in agents]
        found = dict(zip(agents, evaluate(self.mu, self.groups, inputs, agents), strict=True))
        others = [features.new_zeros(len(features), size(columns)) for columns in self.layout.actions]
        return th.cat([found.get(agent, zeros) for agent, zeros in enumerate(others)], dim=1)

    def act(self, outputs: th.Tensor, deterministic: bool = False) -> th.Tensor:
        """
        :param outputs: ``(B, A)`` of the networks: logits of Discrete actions, Box actions before tanh
        :param deterministic: whether a Discrete action is the most probable one instead of a draw
        :return: ``(B, A)`` a of all agents, as the replay buffer has them; a draw's gradient is the straight-through one
        """
        parts = [self._act(head, outputs[:, head.columns], deterministic) for head in self.heads]
        return parts[0] if len(parts) == 1 else th.cat(parts, dim=1)

    def _act(self, head: Head, outputs: th.Tensor, deterministic: bool) -> th.Tensor:
        if not head.choices:
            return th.tanh(outputs)
        logits = outputs.reshape(len(outputs), head.agents, head.choices)
        actions = one_hot_argmax(logits) if deterministic else gumbel_one_hot(logits, gumbel_noise(logits), self.temperature)
        return actions.reshape(outputs.shape)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        """
        :param obs: ``(B, ...)`` o of all agents
        :param deterministic: as in `act`
        :return: ``(B, A)`` a of all agents
        """
        return self.act(self.outputs(obs), deterministic)


class JointCritic(JointModel):
    """
    Q_i(o_1 .. o_N, a_1 .. a_N) of every agent i, or Q_i(o_i, a_i).

    Agents that share a critic see the joint vectors with their own part in the place of the group's first agent and that one's
    in theirs, so that the critic knows whose value it is asked for.

    :param args: `JointModel`'s
    :param n_critics: K, streams of each agent
    :param centralised: whether each critic sees all agents
    :param share_features_extractor: without meaning, there is nothing to share
    :param kwargs: `JointModel`'s
    """

    def __init__(
        self, *args: Any, n_critics: int, centralised: bool, share_features_extractor: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        views = [self._view(agent, centralised) for agent in range(len(self.layout))]
        everything = list(range(self.features_dim + self.layout.action_dim))
        self.sees_all_in_order = all(view == everything for view in views)
        """Whether all agents' critics have the same input."""
        for agent, view in enumerate([] if self.sees_all_in_order else views):
            self.register_buffer(f"view{agent}", th.tensor(view), persistent=False)
        self.streams = [f"qf{k}" for k in range(n_critics)]
        for name in self.streams:
            self.add_module(name, nn.ModuleList(self._mlp(len(views[group[0]]), 1) for group in self.groups))

    def _view(self, agent: int, centralised: bool) -> list[int]:
        """The columns of joint features and actions that the agent's critic sees, in its order."""
        agents = [agent]
        if centralised:
            first = next(group[0] for group in self.groups if agent in group)
            agents = list(range(len(self.layout)))
            agents[first], agents[agent] = agent, first
        features, actions = np.arange(self.features_dim), self.features_dim + np.arange(self.layout.action_dim)
        parts = [features[self.layout.observations[i]] for i in agents] + [actions[self.layout.actions[i]] for i in agents]
        return [int(column) for part in parts for column in part]

    def networks(self) -> list[nn.ModuleList]:
        """See `JointModel.networks`."""
        return [getattr(self, name) for name in self.streams]

    def _inputs(self, obs: PyTorchObs, actions: th.Tensor, agents: Sequence[int] | None) -> list[th.Tensor]:
        """For each agent's critic what it sees, ``(B, D)``, of actions ``(B, A)`` or, for each of them, ``(N, B, A)``."""
        agents = range(len(self.layout)) if agents is None else agents
        features = self.extract_features(obs, self.features_extractor)
        if actions.dim() == 3:
            features = features.expand(len(actions), *features.shape)
        joint = th.cat([features, actions], dim=-1)
        joints = list(joint.unbind()) if joint.dim() == 3 else [joint] * len(agents)
        if self.sees_all_in_order:
            return joints
        return [part.index_select(1, getattr(self, f"view{agent}")) for agent, part in zip(agents, joints, strict=True)]

    def forward(self, obs: PyTorchObs, actions: th.Tensor, agents: Sequence[int] | None = None) -> tuple[th.Tensor, ...]:
        """
        :param obs: ``(B, ...)`` o of all agents
        :param actions: ``(B, A)`` a of all agents, or ``(N, B, A)`` for each agent's critic others
        :param agents: N of them, whose critics are asked; None for all
        :return: of each stream ``(B, N)`` Q of these agents
        """
        inputs = self._inputs(obs, actions, agents)
        return tuple(th.cat(evaluate(stream, self.groups, inputs, agents), dim=1) for stream in self.networks())

    def q1_forward(self, obs: PyTorchObs, actions: th.Tensor, agents: Sequence[int] | None = None) -> th.Tensor:
        """
        The first stream alone, for the actors' losses.

        :param obs: ``(B, ...)`` o of all agents
        :param actions: ``(N, B, A)`` for each agent's critic a of all agents
        :param agents: N of them, whose critics are asked; None for all
        :return: ``(B, N)`` Q of these agents
        """
        return th.cat(evaluate(self.networks()[0], self.groups, self._inputs(obs, actions, agents), agents), dim=1)
