"""Means of what updates log, without asking the device for numbers one by one."""

from collections.abc import Mapping
from types import MappingProxyType

import torch as th


class TensorMeans:
    """Means of scalar tensors, summed where they are and read together: one device synchronisation however many there are."""

    def __init__(self) -> None:
        self._sums: dict[str, th.Tensor] = {}  # kept when read, so that a recorded update may go on adding to them
        self._host_sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: th.Tensor | float) -> None:
        """
        :param name: of the quantity
        :param value: some values of it, in a tensor of any shape, or a number that is on the host already
        """
        if not isinstance(value, th.Tensor):
            self._host_sums[name] = self._host_sums.get(name, 0.0) + float(value)
            self._counts[name] = self._counts.get(name, 0) + 1
            return
        value = value.detach()
        total = self._sums.get(name)
        if total is None or total.device != value.device:
            self._sums[name] = total = value.new_zeros(())
        total.add_(value if value.dim() == 0 else value.sum())
        self._counts[name] = self._counts.get(name, 0) + value.numel()

    def counts(self) -> dict[str, int]:
        """How many values of each quantity were added since they were read."""
        return dict(self._counts)

    def set_counts(self, counts: Mapping[str, int]) -> None:
        """
        :param counts: what `counts` returned before something was added that is not to count
        """
        self._counts = dict(counts)

    def count(self, numbers: Mapping[str, int]) -> None:
        """
        :param numbers: of values by quantity that were added to the sums by a replay, which does not count them
        """
        for name, number in numbers.items():
            self._counts[name] = self._counts.get(name, 0) + number

    def read(self, others: Mapping[str, th.Tensor] = MappingProxyType({})) -> dict[str, float]:
        """
        :param others: scalar tensors, which are read together with the sums
        :return: the mean of each quantity and the others; everything added so far is forgotten
        """
        counts = {name: count for name, count in self._counts.items() if count}
        self._counts = {}
        totals, self._host_sums = self._host_sums, {}
        sums = {name: self._sums[name] for name in counts if name not in totals}
        scalars = {**sums, **others}
        if scalars:
            totals.update(zip(scalars, th.stack(list(scalars.values())).tolist(), strict=True))
        if sums:
            th._foreach_zero_(list(sums.values()))
        return {name: totals[name] / counts.get(name, 1) for name in (*counts, *others)}
