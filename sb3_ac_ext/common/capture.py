"""
Updates that are recorded once and replayed, on CUDA.

There an update of small networks costs what it costs to launch its kernels. Recorded as one CUDA graph it is one launch.
A recording holds addresses: batches are copied into memory of its own, and whatever it has read from Python (rates apart,
see `sb3_ac_ext.common.descent.FlatAdam`) is part of its key.
"""

import warnings
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch as th

from sb3_ac_ext.common.means import TensorMeans

Batch = tuple[Any, ...]
"""A named tuple of tensors, dicts of them, and values that are no tensors."""

WARM_UP = 3
"""Updates that run one kernel at a time before the recording, in which libraries choose algorithms and allocate."""


class Recording(Protocol):
    """Something that runs a function again without Python."""

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run ``function`` as it will be recorded."""

    def record(self, function: Callable[[], None]) -> None:
        """Take note of what ``function`` does, without doing it."""

    def replay(self) -> None:
        """Do it."""


class CudaRecording:
    """A CUDA graph. Draws from the default generator advance its state as ever."""

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
        with th.cuda.graph(self._graph, stream=self._stream):
            function()

    def replay(self) -> None:
        """See `Recording`."""
        self._graph.replay()


class _Update:
    """One recorded update and the memory that its batches are copied to."""

    def __init__(self, batch: Batch, recording: Recording) -> None:
        self.batch = _map(th.clone, batch)
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

    def __init__(self, means: TensorMeans, recording: Callable[[], Recording] = CudaRecording) -> None:
        self._means = means
        self._recording = recording
        self._fixed: Hashable = None
        self._updates: dict[Hashable, _Update] = {}
        self.obstacle: str | None = None
        """Why recording failed; None if it has not."""

    def fix(self, fixed: Hashable) -> None:
        """
        Forget everything if something has changed that a recording holds.

        :param fixed: addresses and Python values that the updates read
        """
        if fixed != self._fixed:
            self._updates.clear()
            self._fixed = fixed

    def run(self, key: Hashable, function: Callable[[Batch], None], batch: Batch) -> None:
        """
        :param key: equal for calls that do the same with another batch
        :param function: the update
        :param batch: its batch
        """
        key = key, _signature(batch)
        if key not in self._updates:
            self._updates[key] = _Update(batch, self._recording())
        update = self._updates[key]
        _map(lambda ours, theirs: ours.copy_(theirs), update.batch, batch)
        update.runs += 1
        if update.runs > WARM_UP and not update.recorded and self.obstacle is None:
            self._record(update, function)
        if update.recorded:
            update.recording.replay()
            self._means.count(update.logged)
        else:
            update.recording.warm_up(lambda: function(update.batch))

    def _record(self, update: _Update, function: Callable[[Batch], None]) -> None:
        before = self._means.counts()
        try:
            update.recording.record(lambda: function(update.batch))
        except RuntimeError as error:
            self.obstacle = f"recording failed: {error}"
            warnings.warn(f"updates go on kernel by kernel, {self.obstacle}", stacklevel=2)
        else:
            update.recorded = True
        after = self._means.counts()
        update.logged = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
        self._means.count({name: -number for name, number in update.logged.items()})  # nothing has happened yet


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
