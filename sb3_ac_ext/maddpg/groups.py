"""Groups of agents that share parameters, and their networks evaluated together."""

from collections.abc import Sequence
from typing import Any

import torch as th

from sb3_ac_ext.envs.joint_spaces import Layout
from sb3_ac_ext.legacy.fused_mlp import FusedMLP
from sb3_ac_ext.legacy.stacked_mlps import side_by_side

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


def evaluate(
    networks: Sequence[Sequence[FusedMLP]], groups: Groups, inputs: th.Tensor | Sequence[th.Tensor]
) -> list[list[th.Tensor]]:
    """
    Several networks of each group on the inputs of its agents, as one batched product where their shapes allow it.

    :param networks: K times one for each group
    :param groups: the agents of each
    :param inputs: for each agent what it sees, ``(B, D_i)``; where each group is one agent also a tensor, ``(B, D)`` if all
        see the same, or ``(N, B, D)`` for K = 1
    :return: K times for each agent ``(B, outputs)``
    """
    every = [mlp for one in networks for mlp in one]
    if isinstance(inputs, th.Tensor):
        outputs = side_by_side(every, inputs)
    else:
        rows = [inputs[group[0]] if len(group) == 1 else th.cat([inputs[agent] for agent in group]) for group in groups]
        rows *= len(networks)
        alike = len({x.shape for x in rows}) == 1
        outputs = side_by_side(every, th.stack(rows)) if alike else tuple(mlp(x) for mlp, x in zip(every, rows, strict=True))
    size = len(groups)
    return [_by_agent(outputs[start : start + size], groups) for start in range(0, len(outputs), size)]


def _by_agent(outputs: Sequence[th.Tensor], groups: Groups) -> list[th.Tensor]:
    """From each group's outputs, one agent's rows after another's, to each agent's."""
    found: dict[int, th.Tensor] = {}
    for group, output in zip(groups, outputs, strict=True):
        found.update(zip(group, output.chunk(len(group)) if len(group) > 1 else (output,), strict=True))
    return [found[agent] for agent in sorted(found)]
