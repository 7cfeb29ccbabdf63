"""Which returns the atoms of a categorical critic should stand for, where the user does not say."""

from typing import Annotated

import numpy as np
from annotated_types import Interval

from sb3_ac_ext.validation import ArgumentError, shown

Return = Annotated[float, Interval(ge=-1e12, le=1e12)]
"""What networks can compute with in float32, gradients included."""
MOST_CLIPPED = 0.05
"""Probability beyond the atoms above which their range is too narrow."""
CLIPPED_UPDATES = 1000
"""Over which that is looked at: a critic that has learned nothing yet puts much there."""
USUAL = (0.05, 0.95)
"""Quantiles of rewards between which those are that come again and again; the others are taken to come once an episode."""


def automatic_range(rewards: np.ndarray, gamma: float) -> tuple[float, float]:
    """
    Bounds of the return of a policy that keeps on getting the best, or the worst, of the usual rewards.

        v_max = max(q95, 0) / (1 - gamma) + max(r_max, 0),  v_min = min(q05, 0) / (1 - gamma) + min(r_min, 0)

    Rewards that are rare, as at the end of an episode, are counted once: with r_max / (1 - gamma) they would make the range
    so wide that a few atoms stand for all returns. 0 is in the range, as episodes end. If all rewards are 0 nothing is known
    of them, and they are taken to be from -1 to 1.

    :param rewards: any shape, as they are learned from
    :param gamma: discount factor, < 1
    :return: v_min and v_max, in reward units
    """
    if not np.any(rewards):
        return -1 / (1 - gamma), 1 / (1 - gamma)
    low, high = np.quantile(rewards, USUAL)
    v_min = min(low, 0) / (1 - gamma) + min(rewards.min(), 0)
    v_max = max(high, 0) / (1 - gamma) + max(rewards.max(), 0)
    return float(v_min), float(v_max)


def least_width(v_min: float, v_max: float, n_atoms: int) -> float:
    """
    :param v_min: the first atom
    :param v_max: the last one
    :param n_atoms: how many there are
    :return: the distance from the first to the last with which float32 can tell one from the next
    """
    return 2.0**-20 * n_atoms * max(abs(v_min), abs(v_max))


def check_range(v_min: float, v_max: float, n_atoms: int) -> None:
    """
    :param v_min: the first atom
    :param v_max: the last one
    :param n_atoms: how many there are
    :raises ArgumentError: if there is no room for returns between them
    """
    given = f"got v_min={shown(v_min)} and v_max={shown(v_max)}"
    if not v_min < v_max:
        raise ArgumentError(f"v_min must be less than v_max, {given}")
    if v_max - v_min < least_width(v_min, v_max, n_atoms):
        raise ArgumentError(f"v_min must be so much less than v_max that float32 has {n_atoms} atoms between them, {given}")
