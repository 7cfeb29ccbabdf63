"""Groups of agents that share parameters, and their networks evaluated."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import torch as th
from torch import nn

from sb3_ac_ext.envs.joint_spaces import Layout
from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError, Syntax, shown

Groups = tuple[tuple[int, ...], ...]
"""The numbers of the agents that share parameters; every agent is in one group."""
SHARING = 'None, "all", or lists of names of agents'


def lists_of_agents(name: str, value: Any, everyone: Sequence[str] = ()) -> Sequence[Sequence[str]]:
    """
    :param name: the argument's name
    :param value: what was given
    :param everyone: the names of all agents
    :return: which agents share parameters, as they are named
    :raises TypeError: if it is neither None nor "all" nor lists
    """
    if isinstance(value, str) and value == "all":
        return [everyone]
    lists: Any = [] if value is None else value
    if not isinstance(lists, (list, tuple)) or not all(isinstance(group, (list, tuple)) and group for group in lists):
        raise ArgumentTypeError(f"{name} must be {SHARING}, got {shown(value)}")
    return lists


Sharing = Annotated[str | list[list[str]] | None, Syntax(SHARING, lists_of_agents)]


def parse_groups(parameter_sharing: Any, layout: Layout) -> Groups:
    """
    :param parameter_sharing: None for networks of each agent's own, "all" for the same for all, or lists of the names of
        agents that share theirs
    :param layout: the agents
    :return: the groups
    :raises TypeError: if it is none of these
    :raises ValueError: if a name is unknown or given twice, or agents of a group differ in their spaces
    """
    lists = lists_of_agents("parameter_sharing", parameter_sharing, layout.names)
    shared = [tuple(sorted(layout.index(name) for name in group)) for group in lists]
    members = [agent for group in shared for agent in group]
    if len(set(members)) != len(members):
        raise ArgumentError(f"parameter_sharing must be {SHARING}, each in one list, got {parameter_sharing!r}")
    for group in shared:
        if not layout.alike(group):
            names = ", ".join(layout.names[agent] for agent in group)
            raise ArgumentError(
                f"agents in one list of parameter_sharing must have spaces of one size and kind, got {parameter_sharing!r} "
                f"with {names}"
            )
    return tuple(sorted([*shared, *((agent,) for agent in range(len(layout)) if agent not in members)]))


def evaluate(networks: Iterable[nn.Module], groups: Groups, inputs: Sequence[th.Tensor]) -> list[th.Tensor]:
    """
    The network of each group on the inputs of its agents, all of them at once.

    :param networks: one for each group
    :param groups: the agents of each
    :param inputs: for each agent what it sees, ``(B, D_i)``
    :return: for each agent ``(B, outputs)``
    """
    found: dict[int, th.Tensor] = {}
    for network, group in zip(networks, groups, strict=True):
        if len(group) == 1:
            found[group[0]] = network(inputs[group[0]])
        else:
            outputs = network(th.cat([inputs[agent] for agent in group]))
            found.update(zip(group, outputs.chunk(len(group)), strict=True))
    return [found[agent] for agent in range(len(inputs))]
