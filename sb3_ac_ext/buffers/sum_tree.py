"""Sums of many numbers that change a few at a time, and the search for where a running sum passes a value."""

from itertools import pairwise

import numpy as np

ROOTS = 1024
"""Most numbers at the top, which are cheaper to run through than ten more levels of pairs."""


class Tree:
    """
    Numbers, the leaves, and above them level by level the combination of each two; the top has up to `ROOTS` of them.

    A level is computed from the one below and never from its own old values, so rounding does not add up over time.

    :param size: number of leaves, >= 1
    :param combine: commutative and associative
    :param empty: the value of a leaf that was not set, neutral to ``combine``
    """

    def __init__(self, size: int, combine: np.ufunc = np.minimum, empty: float = np.inf) -> None:
        height = 0
        while size > ROOTS << height:
            height += 1
        length = -(-size >> height)  # rounded up
        self.size, self.combine, self.empty = size, combine, empty
        self.levels = [np.full(length << height - level, empty) for level in range(height + 1)]

    @property
    def leaves(self) -> np.ndarray:
        """``(size,)`` a view, not to be written to."""
        return self.levels[0][: self.size]

    @property
    def result(self) -> float:
        """The combination of all leaves."""
        return float(self.combine.reduce(self.levels[-1]))

    def fill(self, start: int, stop: int, value: float) -> None:
        """
        :param start: first leaf to be set
        :param stop: the one behind the last
        :param value: of all of them
        """
        self.levels[0][start:stop] = value
        for lower, upper in pairwise(self.levels):
            start, stop = start >> 1, (stop + 1) >> 1
            self.combine(lower[2 * start : 2 * stop : 2], lower[2 * start + 1 : 2 * stop : 2], out=upper[start:stop])

    def assign(self, indices: np.ndarray, values: np.ndarray | float) -> None:
        """
        :param indices: ``(B,)`` of leaves
        :param values: ``(B,)`` of them, or one of all; of an index that is there twice, the last one counts
        """
        self.levels[0][indices] = values
        for lower, upper in pairwise(self.levels):
            indices = indices >> 1
            pairs = lower.reshape(-1, 2).take(indices, axis=0)
            upper[indices] = self.combine(pairs[:, 0], pairs[:, 1])


class SumTree(Tree):
    """
    Sums of numbers that are 0 at first and never negative, in float64.

    :param size: number of leaves, >= 1
    """

    def __init__(self, size: int) -> None:
        super().__init__(size, np.add, 0.0)

    def find(self, masses: np.ndarray) -> np.ndarray:
        """
        :param masses: ``(B,)`` in [0, result); what is above counts as the largest number below
        :return: ``(B,)`` for each the first leaf with which the sum of the leaves up to it exceeds the mass
        :raises ValueError: if all leaves are 0
        """
        sums = np.zeros(len(self.levels[-1]) + 1)
        self.levels[-1].cumsum(out=sums[1:])
        if sums[-1] <= 0:
            raise ValueError("there is no leaf above 0")
        masses = np.minimum(masses, np.nextafter(sums[-1], 0))
        nodes = sums[1:].searchsorted(masses, side="right")
        masses -= sums.take(nodes)
        for level in reversed(self.levels[:-1]):
            nodes <<= 1
            left = level.take(nodes)
            right = masses >= left
            masses -= left * right
            nodes += right
        if not self.levels[0].take(nodes).all():  # rounding led behind the last leaf above 0 of a subtree
            above = np.flatnonzero(self.levels[0])
            nodes = above[np.maximum(above.searchsorted(nodes, side="right") - 1, 0)]
        return nodes
