"""
Steps that are recorded once and replayed.

A step of small networks spends much of its time between the operations, in Python and the dispatcher. Recorded it is one
launch of a CUDA graph, or on a CPU a list of operations with their memory. A recording holds addresses, and whatever it has
read from Python (rates apart, see `sb3_ac_ext.legacy.descent.FlatAdam`).
"""

from collections.abc import Callable, Hashable
from typing import Protocol

import torch as th

from sb3_ac_ext.legacy.means import TensorMeans

WARM_UP = 3
"""Runs before the recording, in which libraries choose algorithms and memory is allocated that lasts."""


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


class _Step:
    """One recorded function."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.runs = 0
        self.recorded = False
        self.logged: dict[str, int] = {}


class Capture:
    """
    Recorded functions by their key.

    :param means: where the functions put what is logged
    :param recording: makes a recording
    """

    def __init__(self, means: TensorMeans, recording: Callable[[], Recording]) -> None:
        self._means = means
        self._recording = recording
        self._fixed: Hashable = None
        self._steps: dict[Hashable, _Step] = {}
        self.obstacle: str | None = None
        """Why recording failed; None if it has not."""

    def fix(self, fixed: Hashable) -> None:
        """
        Forget everything if something has changed that a recording holds.

        :param fixed: addresses and Python values that the functions read
        """
        if fixed != self._fixed:
            self._steps.clear()
            self._fixed = fixed

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """
        :param key: equal for calls that do the same
        :param function: the function
        """
        if key not in self._steps:
            self._steps[key] = _Step(self._recording())
        step = self._steps[key]
        step.runs += 1
        if step.recorded:
            step.recording.replay()
            self._means.count(step.logged)
        elif step.runs > WARM_UP and self.obstacle is None:
            self._record(step, function)
        else:
            step.recording.warm_up(function)

    def _record(self, step: _Step, function: Callable[[], None]) -> None:
        before = self._means.counts()

        def once() -> None:
            self._means.set_counts(before)
            function()

        step.recording.record(once)
        self.obstacle = step.recording.obstacle
        step.recorded = self.obstacle is None
        step.logged = {name: count - before.get(name, 0) for name, count in self._means.counts().items()}
