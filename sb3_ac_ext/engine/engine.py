"""See `Engine`."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch as th

from sb3_ac_ext.engine import network as steps_of_networks
from sb3_ac_ext.engine.guard import Guard, modules_in, noted_reads, tensors_in
from sb3_ac_ext.engine.network import Network, Steps
from sb3_ac_ext.engine.recording import TOLERANCE, Graph, Inputs, Recording, Replay, Values, difference, leaves, restored
from sb3_ac_ext.engine.tape import RefusedError, Tape, memory, tensors, whole

WARM_UP = 3
"""Times that a function has run for batches of one kind before it is recorded."""
LONGEST_WARM_UP = 100
"""The same where what it depends on changes again and again."""
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

    def __init__(self, function: Function, options: tuple[Hashable, ...]) -> None:
        self.name = function.__name__.lstrip("_") + (f"({', '.join(map(str, options))})" if options else "")
        self.runs, self.warm_up = 0, WARM_UP
        self.reason = "it has not run often enough"
        """Why it is not replayed."""
        self.reads: dict[str, Any] = {}
        """What the function has read from its owner when it ran last before it was recorded."""
        self.used: dict[str, Network] = {}
        """The networks that it trained then."""
        self.recording: Recording | None = None
        self.guard: Guard | None = None
        self.verified = False
        self.look = -1
        """The number of the look at which nothing had changed."""

    def forget(self, reason: str) -> None:
        """Wait twice as long as before the last recording."""
        self.recording, self.guard, self.verified, self.runs = None, None, False, 0
        self.warm_up, self.reason = min(2 * self.warm_up, LONGEST_WARM_UP), reason


class _Means:
    """Sums of scalars where they are, read all together."""

    def __init__(self, names: tuple[str, ...], device: th.device) -> None:
        self.names = names
        self.sums = th.zeros(len(names), dtype=th.float64 if device.type == "cpu" else th.float32, device=device)
        self.count = 0


class Engine:
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
        self._look = self._updates = self._flushed = 0
        self._replayed: list[Recording] = []
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
        for recording in self._replayed:
            recording.publish_gradients()
        self._replayed.clear()
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
        kind = self._kind(function, batch, options)
        recording = self._current(kind, self._look)
        if recording is None:
            with self._lock:
                outputs = self._run_or_record(kind, function, batch, options)
        elif recording.run(_filled(batch)):
            outputs = Outputs(recording.outputs, shared=True)
            if recording not in self._replayed:
                self._replayed.append(recording)
        else:  # something that PyTorch's distributions would have refused: let them say what
            outputs = Outputs(self._ordinary(function, batch, options), shared=False)
        means = self._means.get((function.__func__, options))  # type: ignore[attr-defined]
        if means is not None:
            means.count += 1
        return outputs

    def evaluate(self, function: Function, batch: tuple[np.ndarray, ...], *options: Hashable) -> dict[str, np.ndarray] | None:
        """
        `run` for functions that change nothing, as a policy's action; from any thread, at any time, without gradients.

        :param function: a bound method of the owner
        :param batch: arrays
        :param options: further arguments, which a recording belongs to
        :return: copies of what the function returned; None if it has not run, as another thread is recording
        """
        if not self.enabled:
            return None
        kind = self._kind(function, batch, options)
        recording = self._current(kind, None)
        if recording is not None:
            with recording.lock:
                if recording.run(batch):
                    return {name: value.copy() for name, value in recording.arrays.items()}
            return None
        if self._lock.acquire(blocking=False):
            try:
                with th.no_grad():
                    outputs = self._run_or_record(kind, function, batch, options)
                return {name: value.cpu().numpy().copy() for name, value in outputs.items()}
            finally:
                self._lock.release()
        return None

    def parameter_norms(self) -> dict[str, float]:
        """
        :return: 2-norms of the networks' parameters, by their names
        """
        norms = {name: steps_of_networks.parameter_norm(network) for name, network in self.networks.items()}
        return dict(zip(norms, th.stack([*norms.values()]).tolist(), strict=True)) if norms else {}

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

    def _kind(self, function: Any, batch: tuple[Any, ...], options: tuple[Hashable, ...]) -> _Kind:
        if getattr(function, "__self__", None) is not self._owner:
            raise TypeError(f"function must be a bound method of the {type(self._owner).__name__}, got {function!r}")
        key = function.__func__, options, *map(_signature, leaves(batch))
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind(function, options)
            while len(self._kinds) > MOST_KINDS:
                self._kinds.popitem(last=False)
        self._kinds.move_to_end(key)
        return kind

    def _current(self, kind: _Kind, look: int | None) -> Recording | None:
        """The kind's recording if it may be replayed; ``look`` is the number of the last look at everything, None for now."""
        if not kind.verified or kind.guard is None:
            return None
        if kind.look != look or look is None:
            change = kind.guard.change(self.networks)
            if change is not None:
                kind.forget(f"{change} changed")
                return None
            kind.look = -1 if look is None else look
        return kind.recording

    def _run_or_record(
        self, kind: _Kind, function: Function, batch: tuple[Any, ...], options: tuple[Hashable, ...]
    ) -> Outputs:
        kind.runs += 1
        self._used = kind.used
        self._used.update((name, network) for name, network in self.networks.items() if name in self._used)  # as they are now
        if self.enabled and kind.recording is not None:
            return self._verify(kind, function, batch, options)
        if not self.enabled or kind.runs < kind.warm_up:
            return Outputs(self._ordinary(function, batch, options), shared=False)
        if kind.runs == kind.warm_up:
            kind.reads.clear()
            kind.used.clear()
            with noted_reads(self._owner, kind.reads.setdefault):
                return Outputs(self._ordinary(function, batch, options), shared=False)
        reason = self._obstacle(kind)
        if reason is None:
            return self._record(kind, function, batch, options)
        kind.forget(reason)
        return Outputs(self._ordinary(function, batch, options), shared=False)

    def _ordinary(self, function: Function, batch: tuple[Any, ...], options: tuple[Hashable, ...]) -> Values:
        """The function as it stands."""
        return self._call(function, _as_tensors(batch, self.device), options)

    def _call(self, function: Function, batch: tuple[Any, ...], options: tuple[Hashable, ...]) -> Values:
        """The function, and what is logged of it."""
        self._norms = {}
        try:
            outputs = function(batch, *options) or {}
            for name, value in outputs.items():
                if not isinstance(value, th.Tensor):
                    raise TypeError(f"the output {name!r} of {function.__name__} must be a tensor, got {value!r}")
            logged = {name: value.detach() for name, value in (outputs | self._norms).items() if value.dim() == 0}
            if logged:
                self._add((function.__func__, options), logged)  # type: ignore[attr-defined]
        finally:
            self._norms = None
        return outputs

    def _add(self, key: Hashable, logged: Values) -> None:
        means = self._means.get(key)
        if means is None or means.names != tuple(logged):
            if means is not None and means.count:
                self._means[key, means.names] = means  # it is read with the others
            means = self._means[key] = _Means(tuple(logged), self.device)
            if self._tape is not None:
                self._tape.watch(means.sums)
        with th.no_grad():
            means.sums.add_(th.stack([*logged.values()]))

    def _obstacle(self, kind: _Kind) -> str | None:
        """Why the function cannot be recorded now."""
        if self.device.type not in ("cpu", "cuda"):
            return f"the device is {self.device}"
        return Guard(self._owner, kind.reads, kind.used).obstacle()

    def _steps_of(self, network: Network) -> Steps:
        steps = self._steps.get(network.optimizer)
        if steps is None or not steps.serve(network):
            steps = self._steps[network.optimizer] = Steps(network)
            steps.rate.fill_(network.rate)
        return steps

    def _state(self, reads: Mapping[str, Any]) -> list[th.Tensor]:
        """Tensors that a function may read and change."""
        found = tensors_in(modules_in(reads.values())) + [tensor for value in reads.values() for tensor in tensors(value)]
        for network in self._used.values():
            found += tensors_in(modules_in([network.module, network.target]))
            found += network.parameters + tensors(list(network.optimizer.state.values()))
        found += [means.sums for means in self._means.values()]
        return list({memory(tensor): whole(tensor) for tensor in found}.values())

    def _record(self, kind: _Kind, function: Function, batch: tuple[Any, ...], options: tuple[Hashable, ...]) -> Outputs:
        """Run the function, note what it does, and keep that if it can be replayed."""
        own = []
        for network in self._used.values():
            steps = self._steps_of(network)
            steps.bind(network)
            own += steps.tensors()
        inputs = Inputs(_as_tensors(batch, self.device), self.device)
        state = self._state(kind.reads)
        restore = restored(state, self.device)
        reads: dict[str, Any] = {}
        self._tape = tape = Tape([*state, *own, *inputs.tensors])
        try:
            with noted_reads(self._owner, reads.setdefault):
                if self.device.type == "cuda":
                    replay: Replay | Graph = Graph(lambda: self._call(function, inputs.batch, options))
                    outputs, checks = replay.outputs, None
                    if tape.operations:
                        raise RefusedError("an optimizer that is not Adam")
                else:
                    with tape.recording():
                        outputs = self._call(function, inputs.batch, options)
                        checks = th.stack(tape.checks).all() if tape.checks else None
                    lasting = outputs if checks is None else {**outputs, "": checks}
                    outputs = {name: value.detach() for name, value in outputs.items()}
                    replay = Replay(tape, lasting, self._rounding)
        except Exception as error:
            restore()
            self._tape = None
            kind.forget(str(error) if isinstance(error, RefusedError) else f"{type(error).__name__} while it was recorded")
            kind.warm_up = LONGEST_WARM_UP
            return Outputs(self._ordinary(function, batch, options), shared=False)  # if it is at fault, it says so here
        finally:
            self._tape = None
        gradients = [(p, p.grad) for network in self._used.values() for p in network.parameters if p.grad is not None]
        kind.recording = Recording(replay, inputs, outputs, checks, gradients)
        used = {memory(tensor) for operation in tape.operations for tensor in tensors(operation[1:])}
        kind.guard = Guard(self._owner, reads, kind.used, None if isinstance(replay, Graph) else used)
        kind.reason = "it has not been compared yet"
        self._limit_recordings()
        if isinstance(replay, Graph):
            replay()  # capturing does not execute
        return Outputs(kind.recording.outputs, shared=True)

    def _limit_recordings(self) -> None:
        recorded = [kind for kind in self._kinds.values() if kind.recording is not None]
        for kind in recorded[:-MOST_RECORDINGS]:
            kind.forget("others were used later")

    def _verify(self, kind: _Kind, function: Function, batch: tuple[Any, ...], options: tuple[Hashable, ...]) -> Outputs:
        """Replay and run the function from the same state, and trust the replay if both come to the same."""
        assert kind.guard is not None and kind.recording is not None
        change = kind.guard.change(self.networks)
        if change is not None:
            kind.forget(f"{change} changed")
            return Outputs(self._ordinary(function, batch, options), shared=False)
        recording, state = kind.recording, self._state(kind.reads)
        restore = restored(state, self.device)
        recording.run(_filled(batch))
        trained = [parameter for parameter, _ in recording.gradients]
        results = [*recording.outputs.values()], [gradient for _, gradient in recording.gradients], state
        replayed = [[tensor.detach().clone() for tensor in part] for part in results]
        restore()
        outputs = self._ordinary(function, batch, options)
        gradients = [th.zeros_like(p) if p.grad is None else p.grad for p in trained]
        apart = max(map(difference, replayed, ([*outputs.values()], gradients, state)))
        if apart <= TOLERANCE:
            kind.verified, kind.look = True, -1
        else:
            kind.forget(f"a replay differs from the function by {apart:.1e} of a result's norm")
            kind.warm_up = LONGEST_WARM_UP
        return Outputs(outputs, shared=False)


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
