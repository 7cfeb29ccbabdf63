"""Which returns the atoms of a categorical critic should stand for, where the user does not say."""

import numpy as np

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
