"""See `Engine`."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch as th

from sb3_ac_ext.engine import network as steps_of_networks
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
from sb3_ac_ext.engine.network import Network, Steps
from sb3_ac_ext.engine.recording import TOLERANCE, Graph, Inputs, Recording, Replay, Snapshot, Values, difference, leaves
from sb3_ac_ext.engine.tape import RefusedError, Tape, memory, tensors, whole

WARM_UP = 3
"""Times that a function that changes nothing runs for batches of one kind before it is recorded."""
PATIENCE = 2
"""Changes of what a recording depends on after which the function is recorded again at once."""
LONGEST_WAIT = 100
"""Runs after which it is tried again at the latest, where recordings were of no use."""
MOST_KINDS = 64
"""Kinds of batches (function, options, shapes) that are remembered."""
MOST_RECORDINGS = 16
"""Recordings that are kept; the one that was used longest ago goes."""
Function = Callable[..., Values | None]


class Outputs(Mapping[str, th.Tensor]):
    """
    What an update function returned, by its names.

    The values of a replay lie in memory that the next replay writes over: whoever asks for one gets a copy, so it has to be
    asked for before the function runs again.
    """

    def __init__(self, values: Values, shared: bool) -> None:
        self._values, self._shared = values, shared

    def __getitem__(self, name: str) -> th.Tensor:
        value = self._values[name].detach()
        return value.clone() if self._shared else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class _Kind:
    """A function with batches and options of one kind, which one recording serves."""

    def __init__(self, function: Function, options: tuple[Hashable, ...], wait: int) -> None:
        self.name = function.__name__.lstrip("_") + (f"({', '.join(map(str, options))})" if options else "")
        self.wait = wait
        """Ordinary runs before it is recorded."""
        self.reason = "it has not run often enough"
        """Why it is not replayed."""
        self.recording: Recording | None = None
        self.guard: Guard | None = None
        self.means: _Means | None = None
        """What the recording adds to."""
        self.verified = False
        """Whether a replay came to the same as the function for another batch than the recorded one."""
        self.look = -1
        """The number of the look at which nothing had changed."""
        self._changes = 0

    def forget(self, reason: str, wait: int | None = None) -> None:
        """
        :param reason: why the recording is of no use
        :param wait: ordinary runs before the next one; None for more and more of them
        """
        self._changes += 1
        self.recording, self.guard, self.verified, self.reason = None, None, False, reason
        again = 0 if self._changes <= PATIENCE else min(2**self._changes, LONGEST_WAIT)
        self.wait = again if wait is None else wait


class _Means:
    """Sums of scalars where they are, read all together."""

    def __init__(self, names: tuple[str, ...], device: th.device) -> None:
        self.names = names
        self.sums = th.zeros(len(names), dtype=th.float64 if device.type == "cpu" else th.float32, device=device)
        self.count = 0


class Engine(Closed):
    """
    Runs functions of tensors, and replays what they did where it can.

    A function is a bound method of the owner. It takes a batch (a tuple or named tuple of tensors, arrays, dicts of them)
    and hashable options, is written in plain PyTorch, and returns a dict of tensors or None. It trains networks by `minimise`
    (or `differentiate` and `step`) and moves targets by `follow`. Its effects are those on tensors alone, as a replay runs no
    Python. Whatever it reads from its owner may change at any time: the engine looks before it replays, and takes the
    ordinary path where it does not understand something; `report` says where, and why. ::

        class Regression:
            def __init__(self) -> None:
                self.net = nn.Linear(3, 1)
                self.optimizer = th.optim.Adam(self.net.parameters())
                self.engine = Engine(self, lambda: {"net": Network(self.net, self.optimizer, rate=1e-3)})

            def fit(self, batches: Iterable[tuple[th.Tensor, th.Tensor]]) -> dict[str, float]:
                self.engine.begin()
                for batch in batches:
                    self.engine.run(self._update, batch)
                return self.engine.end()

            def _update(self, batch: tuple[th.Tensor, th.Tensor]) -> dict[str, th.Tensor]:
                loss = F.mse_loss(self.net(batch[0]), batch[1])
                self.engine.minimise(loss, "net")
                return {"loss": loss}

    :param owner: whose methods it runs
    :param networks: gives those that the functions train, by their names; asked at each `begin`
    :param enabled: whether functions are recorded; otherwise they run as they stand, with PyTorch's optimizers and SB3's
        ``polyak_update``
    :param device: where the functions compute
    :param rounding: whether rewrites that round differently are used
    """

    def __init__(
        self,
        owner: Any,
        networks: Callable[[], Mapping[str, Network]],
        *,
        enabled: bool = True,
        device: th.device | str = "cpu",
        rounding: bool = True,
    ) -> None:
        self._owner, self._make_networks = owner, networks
        self.enabled, self.device, self._rounding = enabled, th.device(device), rounding
        self.networks: Mapping[str, Network] = {}
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self._means: dict[Hashable, _Means] = {}
        self._steps: WeakKeyDictionary[th.optim.Optimizer, Steps] = WeakKeyDictionary()
        self._tape: Tape | None = None
        self._used: dict[str, Network] = {}
        self._norms: Values | None = None
        self._called: _Means | None = None
        self._look = self._updates = self._flushed = 0
        self._replayed: dict[Recording, None] = {}
        self._lock = threading.RLock()

    # What functions call

    def minimise(self, loss: th.Tensor, *names: str) -> None:
        """
        One gradient step of one network, or of several that share a loss; nothing else is differentiated.

        :param loss: ``()``
        :param names: of the networks
        """
        self.differentiate(loss, *names)
        for name in names:
            self.step(name)

    def differentiate(self, loss: th.Tensor, *names: str) -> None:
        """
        Gradients of the networks' parameters, and of nothing else, as their ``.grad``.

        :param loss: ``()``
        :param names: of the networks
        """
        own = [self._network(name) for name in names]
        if self._tape is None:
            steps_of_networks.differentiate(loss, own)
        else:
            steps_of_networks.recorded_differentiate(loss, [(network, self._steps_of(network)) for network in own])

    def step(self, name: str) -> None:
        """
        Clip, decay and apply the gradients of a network. Their 2-norm before that is logged as ``<name>_grad_norm``.

        :param name: of the network
        """
        network = self._network(name)
        if self._tape is None:
            norm = steps_of_networks.step(network)
        else:
            norm = steps_of_networks.recorded_step(network, self._steps_of(network), self._tape)
        if self._norms is not None:
            self._norms[f"{name}_grad_norm"] = norm

    def follow(self, name: str, tau: float) -> None:
        """
        theta_target <- tau theta + (1 - tau) theta_target

        :param name: of a network with a target
        :param tau: share of the online network, in [0, 1]
        """
        network = self._network(name)
        if self._tape is None:
            steps_of_networks.follow(network, tau)
        else:
            steps_of_networks.recorded_follow(network, tau)

    def _network(self, name: str) -> Network:
        network = self._used[name] = self.networks[name]
        return network

    # What an algorithm calls

    def begin(self) -> None:
        """Foreign code ran: look at the networks, set their rates, and look at everything else before the next replay."""
        self.networks = self._make_networks()
        for network in self.networks.values():
            steps_of_networks.set_rate(network)
            steps = self._steps.get(network.optimizer)
            if steps is not None:
                steps.rate.fill_(network.rate)
        self._look += 1

    def end(self) -> dict[str, float]:
        """
        :return: means of the scalar outputs of the updates since the last call, by their names
        """
        self._publish()
        if self.enabled:
            steps_of_networks.flush_subnormals(self.networks, self._flushed, self._updates)
        self._flushed = self._updates
        totals: dict[str, tuple[float, int]] = {}
        for means in self._means.values():
            if means.count:
                for name, value in zip(means.names, means.sums.tolist(), strict=True):
                    total, count = totals.get(name, (0.0, 0))
                    totals[name] = total + value, count + means.count
                means.sums.zero_()
                means.count = 0
        return {name: total / count for name, (total, count) in totals.items()}

    def _publish(self) -> None:
        for recording in self._replayed:
            recording.publish()
        self._replayed.clear()

    def run(self, function: Function, batch: tuple[Any, ...], *options: Hashable) -> Outputs:
        """
        ``function(batch, *options)``, recorded once for batches and options of one kind and replayed from then on.

        Outputs without dimensions are logged: `end` returns their means. Networks are looked at once, by `begin`.

        :param function: a bound method of the owner
        :param batch: tensors or arrays; arrays become tensors
        :param options: further arguments, which a recording belongs to
        :return: what the function returned
        :raises TypeError: if ``function`` is no bound method of the owner, or an output is no tensor
        """
        if self._norms is not None:  # a function of a function
            return Outputs(function(batch, *options) or {}, shared=False)
        self._updates += 1
        kind = self._kind(function, batch, options, wait=0)
        if kind.recording is not None and kind.look != self._look:
            self._look_at(kind, self._look)
        with self._lock if not kind.verified else nullcontext():
            outputs = self._replay(kind, function, batch, options) if self.enabled else None
            means = kind.means
            if outputs is None:
                self._publish()
                outputs = Outputs(self._call(function, _as_tensors(batch, self.device), options), shared=False)
                means = self._called
        if means is not None:
            means.count += 1
        return outputs

    def evaluate(self, function: Function, batch: tuple[np.ndarray, ...], *options: Hashable) -> dict[str, np.ndarray] | None:
        """
        `run` for functions that change nothing, as a policy's action: from any thread, at any time, without gradients and to
        the same bits.

        :param function: a bound method of the owner
        :param batch: arrays
        :param options: further arguments, which a recording belongs to
        :return: copies of what the function returned; None if it has not run, as it is not replayed
        """
        if not self.enabled:
            return None
        kind = self._kind(function, batch, options, WARM_UP)
        recording = kind.recording
        if recording is None or not kind.verified:
            return self._first_evaluations(kind, function, batch, options)
        with recording.lock:
            if self._look_at(kind, -1) and recording.run(batch):
                return recording.copies()
        return None

    def _first_evaluations(
        self, kind: _Kind, function: Function, batch: tuple[np.ndarray, ...], options: tuple[Hashable, ...]
    ) -> dict[str, np.ndarray] | None:
        if kind.wait > 0:
            kind.wait -= 1
            return None
        if not self._lock.acquire(blocking=False):
            return None  # another thread is recording
        try:
            with th.no_grad():
                if kind.recording is None:
                    return self._record_evaluation(kind, function, batch, options)
                expected = function(_as_tensors(batch, self.device), *options) or {}
                if self._look_at(kind, -1) and self._agrees_with(kind, batch, expected):
                    kind.verified = True
                return {name: value.cpu().numpy().copy() for name, value in expected.items()}
        finally:
            self._lock.release()

    def _record_evaluation(
        self, kind: _Kind, function: Function, batch: tuple[np.ndarray, ...], options: tuple[Hashable, ...]
    ) -> dict[str, np.ndarray] | None:
        """As `_record`, but nothing is put back, as others may draw random numbers and train at the same time."""
        reason = self._obstacle({})
        if reason is not None:
            kind.forget(reason)
            return None
        try:
            recording, kind.guard = self._recorded(function, batch, options, self._state({}), {})
        except RefusedError as error:
            kind.forget(str(error), LONGEST_WAIT)
            return None
        kind.recording, kind.reason = recording, "it has run once"
        outputs = recording.copies()
        self._agrees_with(kind, batch, {name: value.clone() for name, value in recording.outputs.items()})
        self._limit_recordings()
        return outputs

    def _agrees_with(self, kind: _Kind, batch: tuple[np.ndarray, ...], expected: Values) -> bool:
        """Whether a replay without random numbers gives what the function gave; without that it is forgotten."""
        assert kind.recording is not None
        if kind.recording.replay.draws:
            return True
        return kind.recording.run(batch) and self._agrees(kind, [[*expected.values()], [], []], [])

    def parameter_norms(self) -> dict[str, float]:
        """
        :return: 2-norms of the networks' parameters, by their names; nothing if all of them are finite
        """
        parameters = [parameter.detach() for network in self.networks.values() for parameter in network.parameters]
        if not parameters or th.stack(th._foreach_norm(parameters)).sum().isfinite():
            return {}
        return {name: float(steps_of_networks.parameter_norm(network)) for name, network in self.networks.items()}

    def report(self) -> dict[str, str]:
        """
        :return: for every function that has run, by its name: "replayed", or why it is not
        """
        found: dict[str, str] = {}
        for kind in self._kinds.values():
            found[kind.name] = "replayed" if kind.verified else f"ordinary: {kind.reason}"
        return found

    def memory(self) -> int:
        """Bytes that the recordings hold besides networks and optimizers."""
        return sum(kind.recording.replay.bytes for kind in self._kinds.values() if kind.recording is not None)

    # How it does that

    def _kind(self, function: Any, batch: tuple[Any, ...], options: tuple[Hashable, ...], wait: int) -> _Kind:
        if getattr(function, "__self__", None) is not self._owner:
            raise TypeError(f"function must be a bound method of the {type(self._owner).__name__}, got {function!r}")
        key = function.__func__, options, *map(type, options), *map(_signature, leaves(batch))
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind(function, options, wait)
            while len(self._kinds) > MOST_KINDS:
                self._kinds.popitem(last=False)
        self._kinds.move_to_end(key)
        return kind

    def _look_at(self, kind: _Kind, look: int) -> bool:
        """Whether the kind's recording may be replayed, as everything is now."""
        assert kind.guard is not None
        change = kind.guard.change(self.networks)
        if change is not None:
            kind.forget(f"{change} changed")
            return False
        kind.look = look
        return True

    def _replay(
        self, kind: _Kind, function: Function, batch: tuple[Any, ...], options: tuple[Hashable, ...]
    ) -> Outputs | None:
        """What the function returns, by a replay; None if it is to run as it stands."""
        if kind.recording is None:
            if kind.wait > 0:
                kind.wait -= 1
                return None
            self._record(kind, function, batch, options, self.networks)
        elif not kind.verified:
            self._verify(kind, function, batch, options, self.networks)
        elif not kind.recording.run(_filled(batch)):
            return None  # PyTorch's distributions have something to say
        if kind.recording is None:
            return None
        self._replayed.pop(kind.recording, None)
        self._replayed[kind.recording] = None  # the last one comes last
        if len(self._replayed) > MOST_RECORDINGS:
            self._publish()
        return Outputs(kind.recording.outputs, shared=True)

    def _call(self, function: Function, batch: tuple[Any, ...], options: tuple[Hashable, ...]) -> Values:
        """The function, and what is logged of it."""
        self._norms, self._called = {}, None
        try:
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

    def _add(self, key: Hashable, logged: Values) -> _Means:
        with nullcontext() if self._tape is None else self._tape.pause():
            means = self._means.get(key)
            if means is None:
                means = self._means[key] = _Means(tuple(logged), self.device)
        if self._tape is not None:
            self._tape.watch(means.sums)
        with th.no_grad():
            means.sums.add_(th.stack([*logged.values()]))
        return means

    def _steps_of(self, network: Network) -> Steps:
        steps = self._steps.get(network.optimizer)
        if steps is None or not steps.serve(network):
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

    def _obstacle(self, networks: Mapping[str, Network]) -> str | None:
        """Why nothing can be recorded now."""
        if self.device.type not in ("cpu", "cuda"):
            return f"the device is {self.device}"
        return Guard(self._owner, vars(self._owner), networks).obstacle()

    def _record(
        self,
        kind: _Kind,
        function: Function,
        batch: tuple[Any, ...],
        options: tuple[Hashable, ...],
        networks: Mapping[str, Network],
    ) -> None:
        """
        Run the function, note what it does, replay that from the same state, and keep it if both come to the same.

        Without that everything is as it was before.
        """
        reason = self._obstacle(networks)
        if reason is not None:
            kind.forget(reason)
            return
        for network in networks.values():
            self._steps_of(network).bind(network)
        before = Snapshot(self._state(networks), self.device, [network.optimizer for network in networks.values()])
        known = set(self._means)
        try:
            kind.recording, kind.guard = self._recorded(function, batch, options, before.tensors, networks)
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
            before.restore(keep_adam=True)
            old = {*map(memory, before.tensors)}
            for tensor in self._state(networks):
                if memory(tensor) not in old:  # the state of an optimizer before its first step, or a new sum
                    tensor.zero_()
            if not self._again(kind) or not self._agrees(kind, expected, before.tensors):
                self._put_back(before, known)
        else:
            kind.recording.replay()  # capturing does not execute
        self._limit_recordings()

    def _put_back(self, before: Snapshot, known: set[Hashable]) -> None:
        before.restore()
        for key in self._means.keys() - known:
            del self._means[key]

    def _recorded(
        self,
        function: Function,
        batch: tuple[Any, ...],
        options: tuple[Hashable, ...],
        state: Sequence[th.Tensor],
        networks: Mapping[str, Network],
    ) -> tuple[Recording, Guard]:
        steps = [tensor for network in networks.values() for tensor in self._steps_of(network).tensors()]
        inputs = Inputs(_as_tensors(batch, self.device), self.device)
        modules = modules_in(vars(self._owner).values())
        helpers = [(helper, dict(vars(helper))) for module in modules for helper in helpers_of(module)]
        others = tensors_of_helpers(modules)
        tape = Tape([*state, *others, *steps], inputs.tensors)
        reads: dict[str, Any] = {}
        self._used = {}
        if networks:
            self._tape = tape
        run = self._function(function, bool(networks))
        try:
            with noted_reads(self._owner, reads.setdefault):
                if self.device.type == "cuda":
                    graph = Graph(lambda: run(inputs.batch, *options))
                    replay: Replay | Graph = graph
                    outputs = graph.outputs
                    if tape.operations:
                        raise RefusedError("an optimizer that is not Adam")
                else:
                    with tape.recording():
                        outputs = run(inputs.batch, *options)
                    outputs = {name: value.detach() for name, value in outputs.items()}
                    replay = Replay(tape, outputs, self._rounding and bool(networks))
        finally:
            if networks:
                self._tape = None
        attributes = []
        for helper, held in helpers:
            for name, value in vars(helper).items():
                if isinstance(value, th.Tensor) and value is not held.get(name) and tape.has_made(value):
                    attributes.append((vars(helper), name, value.detach()))
        gradients = [(p, p.grad) for network in self._used.values() for p in network.parameters]
        used = {memory(tensor) for operation in tape.operations for tensor in tensors(operation[1:])}
        guard = Guard(self._owner, reads, self._used, None if isinstance(replay, Graph) else used)
        return Recording(replay, inputs, outputs, gradients, attributes), guard

    def _verify(
        self,
        kind: _Kind,
        function: Function,
        batch: tuple[Any, ...],
        options: tuple[Hashable, ...],
        networks: Mapping[str, Network],
    ) -> None:
        """Run the function and replay it from the same state, for another batch than the recorded one."""
        assert kind.recording is not None
        recording = kind.recording
        before = Snapshot(self._state(networks), self.device, [network.optimizer for network in networks.values()])
        outputs = self._function(function, bool(networks))(_as_tensors(batch, self.device), *options)
        gradients = [th.zeros_like(p) if p.grad is None else p.grad for p, place in recording.gradients if place is not None]
        parts = [*outputs.values()], gradients, before.tensors
        expected = [[tensor.detach().clone() for tensor in part] for part in parts]
        before.restore(keep_adam=True)
        recording.inputs.fill(_filled(batch))
        if self._again(kind) and self._agrees(kind, expected, before.tensors):
            kind.verified = True
        else:
            before.restore(keep_adam=True)

    @staticmethod
    def _again(kind: _Kind) -> bool:
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

    def _function(self, function: Function, trains: bool) -> Callable[..., Values]:
        """The function, with what is logged of it if it trains networks."""
        if trains:
            return lambda batch, *options: self._call(function, batch, options)
        return lambda batch, *options: function(batch, *options) or {}

    @staticmethod
    def _results(recording: Recording, state: Sequence[th.Tensor]) -> list[list[th.Tensor]]:
        gradients = [gradient for _, gradient in recording.gradients if gradient is not None]
        return [[tensor.detach().clone() for tensor in part] for part in ([*recording.outputs.values()], gradients, state)]

    def _agrees(self, kind: _Kind, expected: Sequence[Sequence[th.Tensor]], state: Sequence[th.Tensor]) -> bool:
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


def _tensors_in_value(value: Any) -> list[th.Tensor]:
    """The tensors of an attribute that is a tensor, or a list or dict of some, and of the objects in it."""
    inside = [part for found in objects_in(value) for part in vars(found).values()]
    return [
        tensor for part in (value, *inside) if isinstance(part, (th.Tensor, list, tuple, dict)) for tensor in tensors(part)
    ]


def _signature(value: Any) -> Hashable:
    if isinstance(value, (th.Tensor, np.ndarray)):
        return value.shape, value.dtype
    return value  # type: ignore[no-any-return]


def _filled(batch: tuple[Any, ...]) -> Sequence[Any]:
    """The parts of a batch that are copied to a recording's inputs."""
    return [value for value in leaves(batch) if isinstance(value, (th.Tensor, np.ndarray))]


def _as_tensors(batch: tuple[Any, ...], device: th.device) -> tuple[Any, ...]:
    def converted(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: converted(part) for key, part in value.items()}
        return th.as_tensor(value, device=device) if isinstance(value, np.ndarray) else value

    parts = [converted(value) for value in batch]
    return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
