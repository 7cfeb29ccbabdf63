"""Groups of agents that share parameters, and their networks evaluated."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch as th
from torch import nn

from sb3_ac_ext.envs.joint_spaces import Layout

Groups = tuple[tuple[int, ...], ...]
"""The numbers of the agents that share parameters; every agent is in one group."""


def parse_groups(parameter_sharing: Any, layout: Layout) -> Groups:
    """
    :param parameter_sharing: None for networks of each agent's own, "all" for the same for all, or lists of the names of
        agents that share theirs
    :param layout: the agents
    :return: the groups
    :raises TypeError: if it is none of these
    :raises ValueError: if a name is unknown or given twice, or agents of a group differ in their spaces
    """
    legal = 'parameter_sharing must be None, "all", or lists of names of agents'
    lists = {None: [], "all": [layout.names]}.get(parameter_sharing) if _is_word(parameter_sharing) else parameter_sharing
    if not isinstance(lists, (list, tuple)) or not all(isinstance(group, (list, tuple)) and group for group in lists):
        raise TypeError(f"{legal}, got {parameter_sharing!r}")
    shared = [tuple(sorted(layout.index(name) for name in group)) for group in lists]
    members = [agent for group in shared for agent in group]
    if len(set(members)) != len(members):
        raise ValueError(f"{legal}, each in one list, got {parameter_sharing!r}")
    for group in shared:
        if not layout.alike(group):
            names = ", ".join(layout.names[agent] for agent in group)
            raise ValueError(f"agents in one list of parameter_sharing must have spaces of one size and kind, got {names}")
    return tuple(sorted([*shared, *((agent,) for agent in range(len(layout)) if agent not in members)]))


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, str)


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
