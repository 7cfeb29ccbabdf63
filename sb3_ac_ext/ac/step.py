"""What AC's update reads: one step of the environments."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Step(NamedTuple):
    """A step of N environments."""

    observations: Any
    """``(N, ...)`` s, or a dict of them."""
    actions: Any
    """``(N, A)`` a, as the distribution gave it; ``(N,)`` of Discrete ones."""
    rewards: Any
    """``(N,)`` r, in reward units."""
    next_observations: Any
    """``(N, ...)`` s', of a truncated episode the last one; anything where it terminated."""
    continues: Any
    """``(N,)`` 0 where the episode terminated there, 1 elsewhere, truncation included."""
    started: Any
    """``(N,)`` whether the episode began with s."""
    weights: Any
    """``(N,)`` I of the actor's update."""
    new_observations: Any
    """``(N, ...)`` what the environments show now, where the next actions are taken."""


def replaced(values: Any, by: Mapping[int, Any]) -> Any:
    """
    :param values: ``(N, ...)``, or a dict of such arrays
    :param by: new rows by their number; dicts where ``values`` is one
    :return: a copy with these rows
    """
    if isinstance(values, dict):
        return {name: replaced(value, {i: row[name] for i, row in by.items()}) for name, value in values.items()}
    values = np.array(values)
    for i, row in by.items():
        values[i] = row
    return values
