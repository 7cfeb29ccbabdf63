"""Groups of agents: those that share parameters, whose networks are evaluated together, and teams."""

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import torch as th
from torch import nn

from sb3_ac_ext.envs.joint_spaces import Layout
from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError, Syntax, shown

Groups = tuple[tuple[int, ...], ...]
"""The numbers of the agents that share parameters, or are a team; every agent is in one group."""
SHARING = 'None, "all", or lists of names of agents'


def lists_of_agents(name: str, value: Any, everyone: Sequence[str] = ()) -> Sequence[Sequence[str]]:
    """
    :param name: the argument's name
    :param value: what was given
    :param everyone: the names of all agents
    :return: which agents belong together, as they are named
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
    groups = _disjoint("parameter_sharing", parameter_sharing, layout)
    for group in groups:
        if not layout.alike(group):
            names = ", ".join(layout.names[agent] for agent in group)
            raise ArgumentError(
                f"agents in one list of parameter_sharing must have spaces of one size and kind, got {parameter_sharing!r} "
                f"with {names}"
            )
    return groups


def parse_teams(teams: Any, layout: Layout) -> Groups:
    """
    :param teams: "all" for one team, or lists of the names of agents that are one; None for agents whose names differ only by
        the number at the end, as ``agent_0`` and ``agent_1``
    :param layout: the agents
    :return: the teams
    :raises TypeError: if it is none of these
    :raises ValueError: if a name is unknown or given twice
    """
    if teams is not None:
        return _disjoint("teams", teams, layout)
    kinds: dict[str, list[int]] = {}
    for agent, name in enumerate(layout.names):
        kinds.setdefault(re.sub(r"_?\d+$", "", name), []).append(agent)
    return tuple(sorted(map(tuple, kinds.values())))


def _disjoint(name: str, value: Any, layout: Layout) -> Groups:
    """The lists' agents by their numbers, and who is in none of them alone."""
    try:
        lists = [tuple(sorted(layout.index(one) for one in group)) for group in lists_of_agents(name, value, layout.names)]
    except ArgumentError:
        raise
    except ValueError as error:
        raise ArgumentError(f"{name} must be {SHARING}, got {shown(value)}: {error}") from None
    members = [agent for group in lists for agent in group]
    if len(set(members)) != len(members):
        raise ArgumentError(f"{name} must be {SHARING}, each in one list, got {value!r}")
    return tuple(sorted([*lists, *((agent,) for agent in range(len(layout)) if agent not in members)]))


def evaluate(
    networks: Iterable[nn.Module], groups: Groups, inputs: Sequence[th.Tensor], agents: Sequence[int] | None = None
) -> list[th.Tensor]:
    """
    The network of each group on the inputs of its agents, all of them at once.

    :param networks: one for each group
    :param groups: the agents of each
    :param inputs: for each agent what it sees, ``(B, D_i)``
    :param agents: whose networks, whole groups; None for all agents
    :return: for each agent ``(B, outputs)``
    """
    agents = range(len(inputs)) if agents is None else agents
    seen = dict(zip(agents, inputs, strict=True))
    found: dict[int, th.Tensor] = {}
    for network, group in zip(networks, groups, strict=True):
        if group[0] not in seen:
            continue
        if len(group) == 1:
            found[group[0]] = network(seen[group[0]])
        else:
            outputs = network(th.cat([seen[agent] for agent in group]))
            found.update(zip(group, outputs.chunk(len(group)), strict=True))
    return [found[agent] for agent in agents]
