"""Operations on tensors that are noted once and then done again and again, on the same memory and without autograd."""

from collections.abc import Callable, Iterator
from functools import cache
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch as th
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sb3_ac_ext.legacy import matmul

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]

WITHOUT_CONTENT = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
"""Operations whose results are memory only."""
IN_PLACE_OF_NEW = frozenset(
    {"addmm", "baddbmm", "bmm", "mm", "cat", "stack", "clone", "sum", "mean", "add", "sub", "rsub", "mul", "div", "neg", "pow"}
    | {"exp", "log", "tanh", "clamp", "minimum", "maximum", "linalg_vector_norm", "_foreach_norm", "dot", "sqrt"}
    | {"threshold_backward", "tanh_backward", "softplus", "softplus_backward", "sigmoid", "where", "abs", "reciprocal"}
    | {"mse_loss_backward", "eq", "ne", "lt", "le", "gt", "ge"}
)
"""Operations that are given the memory of their first result; the results of others are copied there."""
FILLED: dict[str, Callable[..., Any]] = {
    "zeros_like": lambda like: 0,
    "ones_like": lambda like: 1,
    "scalar_tensor": lambda value: value,
}
"""Operations whose results are filled with a number, and the number from their arguments."""
SAME: dict[str, Callable[..., tuple[Any, ...]]] = {
    "aten.sum.out": lambda x: (th.sum, x, ()),
    "aten.rsub.Scalar_out": lambda x, number: (th.sub, th.tensor(number, dtype=th.result_type(x, number), device=x.device), x),
}
"""Functions that do what an operation without one of its own does, and their arguments from the operation's."""


class Tape(TorchDispatchMode):
    """
    What a CUDA graph is to a GPU: an update without the Python around its operations, see `Recording`.

    Whatever the update read from tensors it reads again, from where they were; random numbers are drawn anew.
    """

    obstacle: str | None = None
    """What cannot be done again without Python; None if all can."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._calls: list[Call] = []

    def warm_up(self, function: Callable[[], None]) -> None:
        """See `Recording`."""
        function()

    def record(self, function: Callable[[], None]) -> None:
        """See `Recording`."""
        with self:
            function()

    def replay(self) -> None:
        """See `Recording`."""
        with th.inference_mode():
            for function, args, kwargs in self._calls:
                function(*args, **kwargs)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if {th.Tag.data_dependent_output, th.Tag.dynamic_output_shape}.intersection(func.tags):
            self.obstacle = f"{func} looks at the values of a tensor"
        # without the graph; views share memory, so that nothing noted here is freed
        self._note(func, *tree_map_only(th.Tensor, th.Tensor.detach, (args, kwargs, result)))
        return result

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """
        :param func: an operation that was done
        :param result: what it returned
        """
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        new = [tensor for tensor in _tensors(result) if tensor.untyped_storage().data_ptr() not in given]
        name = func._schema.name.removeprefix("aten::")
        if name in FILLED:
            self._calls.append((th.Tensor.fill_, (result, FILLED[name](*args)), {}))
        elif new and name not in WITHOUT_CONTENT:
            out = _out_variant(func) if name in IN_PLACE_OF_NEW else None
            if out is None:
                self._calls.append((_copying(func, result), args, kwargs))
            else:
                overload, argument, kept = out
                kwargs = {**{key: value for key, value in kwargs.items() if key in kept}, argument: result}
                self._calls.append(_as_noted(*_quick(overload, args, kwargs)))
        elif not new and func._schema.is_mutable:
            self._calls.append(_as_noted(*_quick(func, args, kwargs)))


def _tensors(values: Any) -> Iterator[th.Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, th.Tensor))


def _as_noted(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The call with the setting of matrix products that there is now."""
    return _through_onednn(func) if matmul.inside_onednn() else func, args, kwargs


def _through_onednn(func: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> None:
        with matmul.onednn():
            func(*args, **kwargs)

    return call


def _quick(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """
    :param func: an operation that writes to memory
    :return: the call of PyTorch's own function or method for it, in a third of the time; its own if there is none
    """
    operation, name = (func, args, kwargs), func._schema.name.removeprefix("aten::")
    direct = [getattr(th.Tensor, name, None), getattr(th, name, None)] if name.endswith("_") else [getattr(th, name, None)]
    direct = [one for one in direct if isinstance(one, (MethodDescriptorType, BuiltinFunctionType))]
    if not direct or th.Tag.nondeterministic_seeded in func.tags:
        return operation
    try:  # on copies: some of these take other arguments than the operation
        function, *own = SAME[str(func)](*args) if str(func) in SAME else (direct[0], *args)
        function(*tree_map_only(th.Tensor, th.clone, own), **tree_map_only(th.Tensor, th.clone, kwargs))
    except TypeError:
        return operation
    return function, tuple(own), kwargs


def _copying(func: Any, result: Any) -> Callable[..., Any]:
    """``func``, whose new results are copied to those in ``result``."""
    if isinstance(result, th.Tensor):
        return lambda *args, **kwargs: result.copy_(func(*args, **kwargs))
    places = list(_tensors(result))

    def call(*args: Any, **kwargs: Any) -> None:
        for place, value in zip(places, _tensors(func(*args, **kwargs)), strict=True):
            place.copy_(value)

    return call


@cache
def _out_variant(func: Any) -> tuple[Any, str, frozenset[str]] | None:
    """
    :param func: an operation with one result, or with a list
    :return: the same with memory for its result, the name of that argument and those of all others; None if there is none
    """
    types = {argument.name: str(argument.type) for argument in func._schema.arguments}
    for name in func.overloadpacket.overloads():
        overload = getattr(func.overloadpacket, name)
        out = [argument.name for argument in overload._schema.arguments if argument.is_out]
        own = {argument.name: str(argument.type) for argument in overload._schema.arguments if not argument.is_out}
        ignored = {"dtype", "layout", "device", "pin_memory"} - own.keys()  # which the memory has
        if len(out) == 1 and own == {key: value for key, value in types.items() if key not in ignored}:
            return overload, out[0], frozenset(own)
    return None
