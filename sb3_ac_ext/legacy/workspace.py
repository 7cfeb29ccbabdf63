"""
Memory for the intermediate results of updates, used again and again.

A fresh tensor of some hundred kilobytes costs more than the arithmetic on it, because the operating system hands out its
pages one fault at a time. Within `Workspace.lend` the fused layers take their intermediate results from here.
"""

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch as th

_lending = threading.local()


def current() -> "Workspace | None":
    """The workspace that this thread computes in; None outside of `Workspace.lend`."""
    workspace: Workspace | None = getattr(_lending, "workspace", None)
    return workspace


class Workspace:
    """Tensors by shape, type and device. What was taken is given back at the end of `lend` at the latest."""

    def __init__(self) -> None:
        self._free: defaultdict[Any, list[th.Tensor]] = defaultdict(list)
        self._taken: dict[int, th.Tensor] = {}

    @contextmanager
    def lend(self) -> Iterator[None]:
        """
        The fused layers of this thread compute in the workspace until the context ends.

        A graph that is made here must be run backward here, once; nothing of it may be kept but its scalars. A context within
        another gives back what was taken in it.
        """
        previous, outer = current(), self._taken
        _lending.workspace, self._taken = self, {}
        try:
            yield
        finally:
            _lending.workspace = previous
            for tensor in list(self._taken.values()):
                self.give(tensor)
            self._taken = outer

    def take(self, shape: tuple[int, ...], like: th.Tensor) -> th.Tensor:
        """
        :param shape: of the tensor
        :param like: whose type and device it has
        :return: a tensor of that shape with any content
        """
        free = self._free[shape, like.dtype, like.device]
        tensor = free.pop() if free else like.new_empty(shape)
        self._taken[id(tensor)] = tensor
        return tensor

    def give(self, tensor: th.Tensor) -> None:
        """
        :param tensor: that nobody reads any more; what was not taken from here is left alone
        """
        if self._taken.pop(id(tensor), None) is not None:
            self._free[tuple(tensor.shape), tensor.dtype, tensor.device].append(tensor)
