"""What AC's update reads: one step of the environments."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Step(NamedTuple):
    """A step of N environments; arrays or tensors, as their `ActorCritic` takes them."""

    observations: Any
    """``(N, ...)`` s, or a dict of them."""
    actions: Any
    """``(N, A)`` a, as the distribution gave it."""
    targets: Any
    """``(N,)`` y, what the critic's value shall be, in reward units."""
    weights: Any
    """``(N,)`` I of the actor's update."""

    def of(self, env: int) -> "Step":
        """The step of one environment."""
        return Step(*(_rows(field, slice(env, env + 1)) for field in self))


def _rows(field: Any, rows: slice) -> Any:
    return {name: value[rows] for name, value in field.items()} if isinstance(field, dict) else field[rows]


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
