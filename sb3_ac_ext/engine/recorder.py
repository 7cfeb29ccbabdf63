"""How functions are recorded, and when a recording is trusted: the half of an `Engine` that nobody calls from outside."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch as th
from torch import nn

from sb3_ac_ext.engine.guard import (
    Closed,
    Guard,
    helpers_of,
    modules_in,
    noted_reads,
    objects_in,
    tensors_in,
    tensors_of_helpers,
)
from sb3_ac_ext.engine.kinds import LONGEST_WAIT, WARM_UP, Function, Kind, Means
from sb3_ac_ext.engine.network import Network, Steps, identical
from sb3_ac_ext.engine.recording import (
    TOLERANCE,
    Attribute,
    Graph,
    Inputs,
    Recording,
    Replay,
    Snapshot,
    Values,
    as_tensors,
    difference,
    filled,
)
from sb3_ac_ext.engine.tape import Key, RefusedError, Tape, memory, tensors, whole

MOST_RECORDINGS = 16
"""Recordings that are kept; the one that was used longest ago goes."""


class Recorder(Closed):
    """
    Makes recordings of functions, and trusts one when its replay has come to what the function did, for two batches.

    Its arguments are those of `Engine`.
    """

    def __init__(
        self,
        owner: Any,
        networks: Callable[[], Mapping[str, Network]],
        *,
        enabled: bool = True,
        device: th.device | str = "cpu",
    ) -> None:
        self._owner, self._make_networks = owner, networks
        self.enabled, self.device = enabled, th.device(device)
        self._stream = stream_of(self.device)
        self.networks: Mapping[str, Network] = {}
        self._kinds: OrderedDict[Hashable, Kind] = OrderedDict()
        self._plain: dict[str, str] = {}
        """Functions that were run plainly, and why."""
        self._means: dict[Hashable, Means] = {}
        self._steps: WeakKeyDictionary[th.optim.Optimizer, Steps] = WeakKeyDictionary()
        self._tape: Tape | None = None
        self._used: dict[str, Network] = {}
        self._differentiated: set[str] = set()
        self._given: list[tuple[nn.Parameter, th.Tensor | None]] = []
        """Gradients that another function has computed, of the parameters that this one steps."""
        self._norms: Values | None = None
        self._called: Means | None = None
        self._look = self._updates = self._flushed = 0
        self._replayed: dict[Recording, None] = {}
        self.lock = threading.RLock()  # of whoever records; an owner with locks of its own takes this one first

    def _call(self, function: Function, batch: tuple[Any, ...], options: tuple[Hashable, ...]) -> Values:
        """The function, and what is logged of it; on a GPU in a stream of its own, as graphs are recorded in one."""
        self._norms, self._called = {}, None
        try:
            with side_stream(self._stream):
                outputs = function(batch, *options) or {}
            for name, value in outputs.items():
                if not isinstance(value, th.Tensor):
                    raise TypeError(f"the output {name!r} of {function.__name__} must be a tensor, got {value!r}")
            logged = {name: value.detach() for name, value in (outputs | self._norms).items() if value.dim() == 0}
            if logged:
                self._called = self._add((function.__func__, options, *logged), logged)  # type: ignore[attr-defined]
        finally:
            self._norms = None
        return outputs

    def _add(self, key: Hashable, logged: Values) -> Means:
        with nullcontext() if self._tape is None else self._tape.pause():
            means = self._means.get(key)
            if means is None:
                means = self._means[key] = Means(tuple(logged), self.device)
        if self._tape is not None:
            self._tape.watch(means.sums)
        with th.no_grad():
            means.sums.add_(th.stack([*logged.values()]))
        return means

    def _steps_of(self, network: Network) -> Steps:
        steps = self._steps.get(network.optimizer)
        if steps is None or not identical(steps.parameters, network.parameters):
            steps = self._steps[network.optimizer] = Steps(network)
            steps.rate.fill_(network.rate)
        return steps

    def _state(self, networks: Mapping[str, Network]) -> list[th.Tensor]:
        """Tensors that a function may read and change."""
        modules = [module for network in networks.values() for module in (network.module, network.target)]
        found = tensors_in(modules_in([*vars(self._owner).values(), *modules]))
        found += [tensor for value in vars(self._owner).values() for tensor in _tensors_in_value(value)]
        for network in networks.values():
            found += network.parameters + tensors(list(network.optimizer.state.values()))
        found += [means.sums for means in self._means.values()]
        return list({memory(tensor): whole(tensor) for tensor in found}.values())

    def _record_evaluation(self, kind: Kind, batch: tuple[np.ndarray, ...]) -> dict[str, np.ndarray] | None:
        """As `_record`, but nothing is put back, as others may draw random numbers and train at the same time."""
        reason = self._obstacle({})
        if reason is not None:
            kind.forget(reason)
            return None
        try:
            kind.recording, kind.guard = self._recorded(kind, batch, self._state({}), evaluates=True)
        except RefusedError as error:
            kind.forget(str(error), LONGEST_WAIT)
            return None
        kind.reason = "it has run once"
        recording = kind.recording
        outputs = recording.copies()
        self._agrees_with(kind, batch, {name: value.clone() for name, value in recording.outputs.items()})
        self._limit_recordings()
        return outputs

    def _agrees_with(self, kind: Kind, batch: tuple[np.ndarray, ...], expected: Values) -> bool:
        """Whether a replay without random numbers gives what the function gave; without that it is forgotten."""
        assert kind.recording is not None
        if kind.recording.replay.draws:
            return True
        return kind.recording.run(filled(batch)) and self._agrees(kind, [[*expected.values()], [], []], [])

    def _obstacle(self, networks: Mapping[str, Network]) -> str | None:
        """Why nothing can be recorded now."""
        if self.device.type not in ("cpu", "cuda"):
            return f"the device is {self.device}"
        return Guard(self._owner, vars(self._owner), networks).obstacle()

    def _record(self, kind: Kind, batch: tuple[Any, ...]) -> None:
        """
        Run the function, note what it does, replay that from the same state, and keep it if both come to the same.

        Without that everything is as it was before.
        """
        reason = self._obstacle(self.networks)
        if reason is not None:
            kind.forget(reason)
            return
        for network in self.networks.values():
            self._steps_of(network).bind(network)
        before = self._snapshot()
        known = set(self._means)
        try:
            kind.recording, kind.guard = self._recorded(kind, batch, before.tensors, evaluates=False)
            if before.has_drawn():
                raise RefusedError("it draws random numbers of Python or numpy")
        except Exception as error:
            self._put_back(before, known)
            refused = isinstance(error, RefusedError)  # anything else is the function's fault; it will say so where it runs
            kind.forget(str(error) if refused else f"a {type(error).__name__} while it was recorded", LONGEST_WAIT)
            return
        kind.verified, kind.look, kind.reason, kind.means = False, self._look, "it has run once", self._called
        if isinstance(kind.recording.replay, Replay):
            expected = self._results(kind.recording, before.tensors)
            before.restore(keep_adam=True, undo=False)
            old = {*map(memory, before.tensors)}
            for tensor in self._state(self.networks):
                if memory(tensor) not in old:  # the state of an optimizer before its first step, or a new sum
                    tensor.zero_()
            if not self._again(kind) or not self._agrees(kind, expected, before.tensors):
                self._put_back(before, known)
        else:
            kind.recording.replay()  # capturing does not execute
        self._limit_recordings()

    def _snapshot(self) -> Snapshot:
        modules = modules_in(vars(self._owner).values())
        optimizers = [network.optimizer for network in self.networks.values()]
        gradients = [place for optimizer in optimizers for place in getattr(self._steps.get(optimizer), "gradients", ())]
        return Snapshot(self._state(self.networks), self.device, optimizers, modules, gradients)

    def _put_back(self, before: Snapshot, known: set[Hashable]) -> None:
        before.restore()
        for key in self._means.keys() - known:
            del self._means[key]

    def _recorded(
        self, kind: Kind, batch: tuple[Any, ...], state: Sequence[th.Tensor], evaluates: bool
    ) -> tuple[Recording, Guard]:
        """Run the function and note what it does; one that evaluates trains no networks, and nothing of it is logged."""
        steps = [] if evaluates else [t for network in self.networks.values() for t in self._steps_of(network).tensors()]
        inputs = Inputs(batch, self.device)
        modules = modules_in(vars(self._owner).values())
        helpers = [(helper, dict(vars(helper))) for module in modules for helper in helpers_of(module)]
        tape = Tape([*state, *tensors_of_helpers(modules), *steps], inputs.tensors)
        reads: dict[str, Any] = {}
        if not evaluates:
            self._used, self._given = {}, []
            self._differentiated.clear()

        def run() -> Values:
            if evaluates:
                return kind.function(inputs.batch, *kind.options) or {}
            return self._call(kind.function, inputs.batch, kind.options)

        if not evaluates:
            self._tape = tape
        try:
            with noted_reads(self._owner, reads.setdefault):
                if self.device.type == "cuda":
                    graph = Graph(run, self._stream)
                    replay: Replay | Graph = graph
                    outputs = graph.outputs
                    if tape.operations:
                        raise RefusedError("an optimizer that is not Adam")
                else:
                    with tape.recording():
                        outputs = run()
                    outputs = {name: value.detach() for name, value in outputs.items()}
                    replay = Replay(tape, outputs, rounding=not evaluates)
        finally:
            if not evaluates:
                self._tape = None
        used = {memory(tensor) for operation in tape.operations for tensor in tensors(operation[1:])}
        looked_at = None if isinstance(replay, Graph) else used
        made, read = _made_and_read(helpers, tape, looked_at)
        trained, given = ({}, []) if evaluates else (self._used, self._given)  # another thread's, which may train now
        gradients = [(p, p.grad) for network in trained.values() for p in network.parameters]
        guard = Guard(self._owner, reads, trained, looked_at, read, not evaluates)
        return Recording(replay, inputs, outputs, gradients, given, made), guard

    def _verify(self, kind: Kind, batch: tuple[Any, ...]) -> None:
        """Run the function and replay it from the same state, for another batch than the recorded one."""
        assert kind.recording is not None
        recording = kind.recording
        before = self._snapshot()
        outputs = self._call(kind.function, as_tensors(batch, self.device), kind.options)
        gradients = [th.zeros_like(p) if p.grad is None else p.grad for p, place in recording.gradients if place is not None]
        expected = _copies([*outputs.values()], gradients, before.tensors)
        before.restore(keep_adam=True, undo=False)
        recording.inputs.fill(filled(batch))
        if self._again(kind) and self._agrees(kind, expected, before.tensors):
            kind.verified = True
        else:
            before.restore(keep_adam=True)

    @staticmethod
    def _again(kind: Kind) -> bool:
        """Replay; without success the recording is forgotten."""
        assert kind.recording is not None
        try:
            done = kind.recording.again()
        except Exception as error:  # an operation that does something else without gradients
            kind.forget(f"a {type(error).__name__} in a replay", LONGEST_WAIT)
            return False
        if not done:
            kind.forget("PyTorch's distributions refuse what they are given", 0)
        return done

    @staticmethod
    def _results(recording: Recording, state: Sequence[th.Tensor]) -> list[list[th.Tensor]]:
        gradients = [gradient for _, gradient in recording.gradients if gradient is not None]
        return _copies([*recording.outputs.values()], gradients, state)

    def _agrees(self, kind: Kind, expected: Sequence[Sequence[th.Tensor]], state: Sequence[th.Tensor]) -> bool:
        """Whether a replay came to what the function did; without that it is forgotten."""
        assert kind.recording is not None
        apart = max(map(difference, self._results(kind.recording, state), expected))
        if apart > TOLERANCE:
            kind.forget(f"a replay differs from the function by {apart:.1e} of a result's norm", LONGEST_WAIT)
        return apart <= TOLERANCE

    def _limit_recordings(self) -> None:
        recorded = [kind for kind in self._kinds.values() if kind.recording is not None]
        for kind in recorded[:-MOST_RECORDINGS]:
            kind.forget("others were used later", WARM_UP)


@cache
def stream_of(device: th.device) -> Any:
    """
    :param device: any
    :return: the stream of all engines there, as networks may have several; None if it is no GPU
    """
    return th.cuda.Stream(device) if device.type == "cuda" else None


@contextmanager
def side_stream(stream: Any) -> Iterator[None]:
    """
    :param stream: that waits for what was begun before, and is waited for; None for none
    """
    if stream is None or th.cuda.current_stream() == stream:
        yield
        return
    outside = th.cuda.current_stream()
    stream.wait_stream(outside)
    with th.cuda.stream(stream):
        yield
    outside.wait_stream(stream)


def _copies(*parts: Sequence[th.Tensor]) -> list[list[th.Tensor]]:
    return [[tensor.detach().clone() for tensor in part] for part in parts]


def _made_and_read(
    helpers: Sequence[tuple[Any, dict[str, Any]]], tape: Tape, used: Collection[Key] | None
) -> tuple[list[Attribute], list[Attribute]]:
    """Tensors that a function has put into objects, and those that it has read there, or may have."""
    made: list[Attribute] = []
    read: list[Attribute] = []
    for helper, before in helpers:
        for name, value in vars(helper).items():
            if isinstance(value, th.Tensor):
                stayed = value is before.get(name)
                if not stayed and tape.has_made(value):
                    made.append((vars(helper), name, value.detach()))
                if stayed and (used is None or memory(value) in used):
                    read.append((vars(helper), name, value))
    return made, read


def _tensors_in_value(value: Any) -> list[th.Tensor]:
    """The tensors of an attribute that is a tensor, or a list or dict of some, and of the objects in it."""
    inside = [part for found in objects_in(value) for part in vars(found).values()]
    return [
        tensor for part in (value, *inside) if isinstance(part, (th.Tensor, list, tuple, dict)) for tensor in tensors(part)
    ]
