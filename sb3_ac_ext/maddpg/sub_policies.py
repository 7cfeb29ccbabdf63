"""Several complete policies side by side, and agents of which each acts by one of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import PyTorchObs
from torch import nn

from sb3_ac_ext.maddpg.networks import JointActor, JointCritic

_acting_by: ContextVar[np.ndarray | None] = ContextVar("acting_by", default=None)


class ActorCritic(Protocol):
    """A policy, or one of its sub-policies."""

    actor: JointActor
    actor_target: JointActor
    critic: JointCritic
    critic_target: JointCritic


class SubPolicy(nn.Module):
    """
    Actors and critics of all agents with their targets, which begin as copies.

    :param actor: mu
    :param actor_target: what follows it
    :param critic: Q
    :param critic_target: what follows it
    """

    def __init__(self, actor: JointActor, actor_target: JointActor, critic: JointCritic, critic_target: JointCritic) -> None:
        super().__init__()
        self.actor, self.actor_target, self.critic, self.critic_target = actor, actor_target, critic, critic_target
        for online, target in ((actor, actor_target), (critic, critic_target)):
            target.load_state_dict(online.state_dict())
            target.set_training_mode(False)

    def set_training_mode(self, mode: bool) -> None:
        """
        :param mode: True for training; targets are never trained
        """
        self.actor.set_training_mode(mode)
        self.critic.set_training_mode(mode)
        self.training = mode


@contextmanager
def acting_by(sub_policies: np.ndarray) -> Iterator[None]:
    """
    :param sub_policies: ``(B, N)`` by which the agents act that this thread asks for actions
    """
    token = _acting_by.set(sub_policies)
    try:
        yield
    finally:
        _acting_by.reset(token)


def acts_by() -> np.ndarray | None:
    """``(B, N)`` what `acting_by` says; None outside of it."""
    return _acting_by.get()


def mixed_actions(
    actors: Sequence[JointActor], sub_policies: th.Tensor, obs: PyTorchObs, deterministic: bool = False
) -> th.Tensor:
    """
    :param actors: K of them, for the same agents
    :param sub_policies: ``(B, N)`` of each agent, in [0, K)
    :param obs: ``(B, ...)`` o of all agents
    :param deterministic: whether a Discrete action is the most probable one instead of a draw
    :return: ``(B, A)`` a of all agents, each by its actor of this number
    """
    outputs = th.stack([actor.outputs(obs) for actor in actors])  # (K, B, A)
    of_columns = sub_policies.index_select(1, actors[0].owners)  # (B, A)
    return actors[0].act(outputs.gather(0, of_columns.unsqueeze(0)).squeeze(0), deterministic)


def follow(online: JointActor | JointCritic, target: JointActor | JointCritic, agents: Sequence[int], tau: float) -> None:
    """
    theta_target <- tau theta + (1 - tau) theta_target of some agents, and nobody else's.

    :param online: networks of all agents
    :param target: what follows them
    :param agents: whose move
    :param tau: share of the online networks, in [0, 1]
    """
    own = [number for number, group in enumerate(online.groups) if group[0] in agents]
    pairs = (online.network_parameters(), target.network_parameters())
    theta, theta_target = (tuple(parameter for number in own for parameter in of[number]) for of in pairs)
    with th.no_grad():
        th._foreach_lerp_(theta_target, theta, tau)
