"""
A function of tensors as the list of its operations, with the memory that they read and write.

What is noted is done again without Python, so whatever a function takes from Python is frozen. Here everything is refused
that could be frozen without anybody noticing: values of tensors read as numbers, and tensors that nobody watches.
"""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch as th
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Key = int
"""Identifies a piece of memory while somebody holds a tensor in it."""
VALUE_READERS = frozenset(
    {"item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__", "__complex__", "__contains__"}
    | {"__repr__", "__str__", "__format__", "__deepcopy__", "__reduce_ex__", "__dlpack__", "new_tensor"}
)
"""Methods of a tensor that hand its values, or its memory, to Python."""
FROM_PYTHON = (th.tensor, th.as_tensor, th.asarray)
"""Functions that make tensors of Python's numbers."""


class RefusedError(Exception):
    """The function does something that a list of operations cannot do again."""


class UnmetError(Exception):
    """Something that the function took to be true is not."""


def require(tensor: th.Tensor) -> None:
    """Raise an `UnmetError` if a boolean ``()`` is false."""
    if not tensor:
        raise UnmetError


def require_equal(x: th.Tensor, y: th.Tensor) -> None:
    """``require((x == y).all())`` at once, of two tensors of one shape and type."""
    if not th.equal(x, y):
        raise UnmetError


def tensors(values: Any) -> list[th.Tensor]:
    """The tensors in lists, tuples and dicts, in a tenth of the time that PyTorch's trees take."""
    if isinstance(values, th.Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in tensors(value)]
    return tensors(list(values.values())) if isinstance(values, dict) else []


def memory(tensor: th.Tensor) -> Key:
    """The key of a tensor's storage, the same for all of its views."""
    key: Key = tensor.untyped_storage()._cdata
    return key


def whole(tensor: th.Tensor) -> th.Tensor:
    """Everything that is in a tensor's memory, ``(n,)``."""
    numbers = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.detach().as_strided((numbers,), (1,), 0)


class Operation(NamedTuple):
    """One operation that was done."""

    function: Any
    """An ``OpOverload``, or a Python function that is called again as it is."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    """What it returned in new memory; None if it wrote to the memory of its arguments alone."""

    @property
    def name(self) -> str:
        """The operation's name without its overload: ``"addmm"``."""
        schema = getattr(self.function, "_schema", None)
        return "" if schema is None else schema.name.removeprefix("aten::")


class Tape:
    """
    Notes the operations of a function, see `recording`.

    :param watched: tensors that may be read and written: parameters, buffers, optimizer states
    :param inputs: tensors that may be read
    """

    def __init__(self, watched: Iterable[th.Tensor], inputs: Sequence[th.Tensor] = ()) -> None:
        self.operations: list[Operation] = []
        self.external: dict[Key, th.Tensor] = {memory(tensor): tensor.detach() for tensor in (*watched, *inputs)}
        self._inputs = {*map(memory, inputs)}
        """By its key memory that is not the tape's own."""
        self._constants: dict[Key, tuple[th.Tensor, th.Tensor]] = {}
        """Tensors that were made of Python's numbers, each with a copy."""
        self._made: dict[Key, list[weakref.ref[th.Tensor]]] = {}
        self.paused = False

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Operations of this thread are noted in this context. A function that is refused raises a `RefusedError`."""
        with _Values(self), _Operations(self):
            yield

    def call(self, function: Callable[[], None]) -> None:
        """Call a function that reads and writes external memory alone and is not looked into, now and at every replay."""
        with self.pause():
            function()
        self.operations.append(Operation(function, (), {}, None))

    def require(self, tensor: th.Tensor) -> None:
        """Note a boolean that the function asked for; it goes on as if it were true."""
        with self.pause():  # what the tape holds has not escaped
            self.operations.append(Operation(require, (tensor.detach(),), {}, None))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done in this context is not looked at."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def watch(self, tensor: th.Tensor) -> None:
        """A tensor may be read and written from now on."""
        with self.pause():
            self.external[memory(tensor)] = tensor.detach()

    def has_made(self, tensor: th.Tensor) -> bool:
        """Whether a tensor is in memory of a result."""
        return memory(tensor) in self._made

    def escaped(self) -> set[Key]:
        """The memory of results that somebody still holds when the function has returned."""
        return {key for key, references in self._made.items() if any(one() is not None for one in references)}

    def check(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse an operation that depends on values that a replay would not look at, or on memory that nobody watches."""
        given = tensors((args, kwargs))
        if kwargs.get("generator") is not None:
            raise RefusedError(f"{function} draws from a generator of its own")
        written = [value for argument, value in zip(function._schema.arguments, args, strict=False) if argument.is_write]
        written += [kwargs[a.name] for a in function._schema.arguments if a.is_write and a.name in kwargs]
        for key in map(memory, tensors(written)):
            if key in self._inputs:
                raise RefusedError(f"{function} changes the batch")
            if key in self._constants:  # it starts from its numbers at every replay
                self.operations.insert(0, Operation(th.ops.aten.copy_.default, self._constants.pop(key), {}, None))
        tags = {th.Tag.data_dependent_output, th.Tag.dynamic_output_shape}.intersection(function.tags)
        if tags and not (function.overloadpacket is th.ops.aten.index and not any(_is_mask(t) for t in given[1:])):
            raise RefusedError(f"{function} depends on the values of a tensor")
        for tensor in given:
            if tensor.layout is not th.strided or type(tensor) not in (th.Tensor, th.nn.Parameter):
                raise RefusedError(f"{function} is given a {type(tensor).__name__} of layout {tensor.layout}")
            if memory(tensor) not in self._made and memory(tensor) not in self.external:
                if function.overloadpacket is not th.ops.aten.lift_fresh:  # a constant: th.tensor(3.0)
                    raise RefusedError(f"{function} is given a tensor of shape {tuple(tensor.shape)} that nobody watches")
                self.watch(tensor)
                with self.pause():
                    self._constants[memory(tensor)] = tensor.detach(), tensor.detach().clone()

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note an operation that was done, and what it returned."""
        given = {memory(tensor) for tensor in tensors((args, kwargs))}
        if any(tensor.layout is not th.strided for tensor in tensors(result)):
            raise RefusedError(f"{function} returns a tensor of another layout")
        new = [tensor for tensor in tensors(result) if memory(tensor) not in given]
        for tensor in tensors(result):
            if memory(tensor) not in self.external:
                self._made.setdefault(memory(tensor), []).append(weakref.ref(tensor))
        if new or function._schema.is_mutable:  # anything else is a view
            # without the graph; as views share memory, what is noted here is not freed
            plain = tree_map_only(th.Tensor, th.Tensor.detach, (args, kwargs, result))
            self.operations.append(Operation(function, plain[0], plain[1], plain[2] if new else None))


def _is_mask(tensor: th.Tensor) -> bool:
    return tensor.dtype in (th.bool, th.uint8)


class _Operations(TorchDispatchMode):
    """The part of a tape that sees operations."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self._tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._tape.paused:
            return func(*args, **kwargs)
        self._tape.check(func, args, kwargs)
        result = func(*args, **kwargs)
        self._tape.note(func, args, kwargs, result)
        return result


class _Values(TorchFunctionMode):
    """The part of a tape that sees Python functions: those that read values never become operations."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._tape.paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__bool__" and _asked_by("torch.distributions"):
            self._tape.require(args[0])
            return True
        reads_tensors = func in FROM_PYTHON and not isinstance(args[0] if args else None, th.Tensor) and tensors(args)
        if name in VALUE_READERS or reads_tensors:
            raise RefusedError(f"{name} reads the values of a tensor")
        if func is th.nn.functional.one_hot:
            return _one_hot(*args, **kwargs)
        return func(*args, **kwargs)


def _asked_by(package: str) -> bool:
    """Whether the function that is running was called from a module of ``package``, through modes or not."""
    frame: Any = sys._getframe(2)
    while frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).startswith(package)


def _one_hot(tensor: th.Tensor, num_classes: int = -1) -> th.Tensor:
    """``F.one_hot`` without a look at the values."""
    if num_classes < 0:
        raise RefusedError("one_hot counts the classes")
    return (tensor.unsqueeze(-1) == th.arange(num_classes, device=tensor.device)).long()
