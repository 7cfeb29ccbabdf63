"""Tensors that lie one after another in memory."""

from collections.abc import Iterable, Sequence

import torch as th
from torch import nn


class FlatTensor:
    """
    One tensor that several others are views of, in their order.

    :param tensors: of one type and device; `bind` gives them their place
    :param values: where they lie one after another already, if they do
    """

    def __init__(self, tensors: Sequence[th.Tensor], values: th.Tensor | None = None) -> None:
        self.values = th.cat([tensor.detach().reshape(-1) for tensor in tensors]) if values is None else values
        sizes = [tensor.numel() for tensor in tensors]
        parts = th.split(self.values, sizes)
        self.views = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
        self._pointers = [view.data_ptr() for view in self.views]

    def holds(self, tensors: Iterable[th.Tensor]) -> bool:
        """Whether ``tensors`` are still the views: nobody has given them memory of their own."""
        return all(t.data_ptr() == pointer for t, pointer in zip(tensors, self._pointers, strict=True))


def _adjacent(tensors: Sequence[th.Tensor]) -> th.Tensor | None:
    """One flat view of tensors that lie one after another in one piece of memory; None if they do not."""
    first = tensors[0]
    storage, end = first.untyped_storage().data_ptr(), first.storage_offset()
    for tensor in tensors:
        if tensor.untyped_storage().data_ptr() != storage or tensor.storage_offset() != end or not tensor.is_contiguous():
            return None
        end += tensor.numel()
    return first.detach().as_strided((end - first.storage_offset(),), (1,), first.storage_offset())


def bind(parameters: Sequence[nn.Parameter]) -> FlatTensor:
    """
    Move parameters into one flat tensor, unless they lie in one already; they stay the objects they are.

    :param parameters: of one network
    :return: what they are views of
    """
    flat = FlatTensor(parameters, _adjacent(parameters))
    for parameter, view in zip(parameters, flat.views, strict=True):
        parameter.data = view
    return flat
