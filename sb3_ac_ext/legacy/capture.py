"""
Updates that are recorded once and replayed.

An update of small networks spends much of its time between the operations, in Python, autograd and the dispatcher. Recorded
it is one launch of a CUDA graph, or on a CPU a list of operations with their memory. A recording holds addresses: batches
are copied into memory of its own unless theirs lasts, and whatever it has read from Python (rates apart, see
`sb3_ac_ext.legacy.descent.FlatAdam`) is part of its key.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch as th

from sb3_ac_ext.legacy.means import TensorMeans

Batch = tuple[Any, ...]
"""A named tuple of tensors, dicts of them, and values that are no tensors."""

WARM_UP = 3
"""Updates before the recording, in which libraries choose algorithms and memory is allocated that lasts."""


class Lasting:
    """Goes behind a named tuple of tensors and numbers; the batch lasts, and its tensors are filled anew for each update."""

    __slots__ = ()


class Recording(Protocol):
    """Something that runs a function again without Python."""

    obstacle: str | None
    """Why it cannot; None if it can."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run ``function`` as it will be recorded."""

    def record(self, function: Callable[[], None]) -> None:
        """Do what ``function`` does and take note of it, or of the obstacle. A function that fails may be run twice."""

    def replay(self) -> None:
        """Do it again."""


class CudaRecording:
    """A CUDA graph. Draws from the default generator advance its state as ever."""

    obstacle: str | None = None

    def __init__(self) -> None:
        self._graph = th.cuda.CUDAGraph()
        self._stream = th.cuda.Stream()

    def warm_up(self, function: Callable[[], None]) -> None:
        """See `Recording`; on another stream than the default one, which cannot be recorded."""
        self._stream.wait_stream(th.cuda.current_stream())
        with th.cuda.stream(self._stream):
            function()
        th.cuda.current_stream().wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> None:
        """See `Recording`."""
        try:
            with th.cuda.graph(self._graph, stream=self._stream):
                function()
        except RuntimeError as error:
            self.obstacle = str(error)
            self.warm_up(function)
        else:
            self.replay()

    def replay(self) -> None:
        """See `Recording`."""
        self._graph.replay()


class _Update:
    """One recorded update and the memory that its batches are in."""

    def __init__(self, batch: Batch, recording: Recording) -> None:
        self.batch = batch if isinstance(batch, Lasting) else _map(th.clone, batch)
        self.recording = recording
        self.runs = 0
        self.recorded = False
        self.logged: dict[str, int] = {}


class Capture:
    """
    Recorded updates by their key.

    :param means: where the updates put what is logged
    :param recording: makes a recording
    """

    def __init__(self, means: TensorMeans, recording: Callable[[], Recording]) -> None:
        self._means = means
        self._recording = recording
        self._fixed: Hashable = None
        self._updates: dict[Hashable, _Update] = {}
        self.obstacle: str | None = None
        """Why recording failed; None if it has not."""
        self.settled = False
        """Whether nothing had changed when `fix` was last called, and every update since then was a replay."""

    def fix(self, fixed: Hashable) -> None:
        """
        Forget everything if something has changed that a recording holds.

        :param fixed: addresses and Python values that the updates read
        """
        self.settled = fixed == self._fixed
        if not self.settled:
            self._updates.clear()
            self._fixed = fixed

    def run(self, key: Hashable, function: Callable[[Batch], None], batch: Batch) -> None:
        """
        :param key: equal for calls that do the same with another batch
        :param function: the update
        :param batch: its batch
        """
        lasting = isinstance(batch, Lasting)
        key = key, batch if lasting else _signature(batch)
        if key not in self._updates:
            self._updates[key] = _Update(batch, self._recording())
        update = self._updates[key]
        if not lasting:
            _map(lambda ours, theirs: ours.copy_(theirs), update.batch, batch)
        update.runs += 1
        if update.recorded:
            update.recording.replay()
            self._means.count(update.logged)
            return
        self.settled = False
        if update.runs > WARM_UP and self.obstacle is None:
            self._record(update, function)
        else:
            update.recording.warm_up(lambda: function(update.batch))

    def _record(self, update: _Update, function: Callable[[Batch], None]) -> None:
        before = self._means.counts()

        def once() -> None:
            self._means.set_counts(before)
            function(update.batch)

        with _without_validation():
            update.recording.record(once)
        self.obstacle = update.recording.obstacle
        update.recorded = self.obstacle is None
        update.logged = {name: count - before.get(name, 0) for name, count in self._means.counts().items()}


@contextmanager
def _without_validation() -> Iterator[None]:
    """PyTorch's distributions look whether their parameters are finite, which `UpdateMixin` does after the updates."""
    validates = th.distributions.Distribution._validate_args
    th.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        th.distributions.Distribution.set_default_validate_args(validates)


def _map(function: Callable[..., Any], *batches: Batch) -> Batch:
    """``function`` of corresponding tensors; anything else stays as it is in the first batch."""

    def apply(*values: Any) -> Any:
        if isinstance(values[0], dict):
            return {name: apply(*(value[name] for value in values)) for name in values[0]}
        return function(*values) if isinstance(values[0], th.Tensor) else values[0]

    return type(batches[0])(*(apply(*values) for values in zip(*batches, strict=True)))


def _signature(batch: Batch) -> Hashable:
    """Shapes and types of a batch, and the values that are no tensors."""

    def of(value: Any) -> Hashable:
        if isinstance(value, dict):
            return tuple((name, of(part)) for name, part in value.items())
        return (value.shape, value.dtype) if isinstance(value, th.Tensor) else value

    return tuple(map(of, batch))
