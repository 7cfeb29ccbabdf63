"""The engine: what functions and algorithms call, and where replays take the place of functions."""

from collections.abc import Hashable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.utils import polyak_update, update_learning_rate
from torch.nn.utils import get_total_norm

from sb3_ac_ext.engine import network as steps_of_networks
from sb3_ac_ext.engine.kinds import WARM_UP, Function, Kind, Outputs, named
from sb3_ac_ext.engine.network import Network
from sb3_ac_ext.engine.recorder import MOST_RECORDINGS, Recorder
from sb3_ac_ext.engine.recording import Recording, as_tensors, filled, leaves

MOST_KINDS = 64
"""Kinds of batches (function, options, shapes) that are remembered."""


class Engine(Recorder):
    """
    Runs functions of tensors, and replays what they did where it can.

    A function is a bound method of the owner. It takes a batch (a tuple or named tuple of tensors, arrays, dicts of them)
    and hashable options, is written in plain PyTorch, and returns a dict of tensors or None. It trains networks by `minimise`
    (or `differentiate` and `step`) and moves targets by `follow`. Its effects are those on tensors alone, as a replay runs no
    Python. Whatever it reads from its owner may change at any time: the engine looks before it replays, and takes the
    ordinary path where it does not understand something; `report` says where, and why. Numbers in globals and closures are
    taken as constants. ::

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
    """

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
            self._differentiated.update(names)
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
            if name not in self._differentiated:
                self._given += [(parameter, parameter.grad) for parameter in network.parameters]
            norm = steps_of_networks.step(network, self._steps_of(network), self._tape)
        if self._norms is not None:
            self._norms[f"{name}_grad_norm"] = norm

    def follow(self, name: str, tau: float) -> None:
        """
        theta_target <- tau theta + (1 - tau) theta_target

        :param name: of a network with a target
        :param tau: share of the online network, in [0, 1]
        """
        network = self._network(name)
        assert network.module is not None and network.target is not None
        online, target = tuple(network.module.parameters()), tuple(network.target.parameters())
        if self._tape is None:
            polyak_update(online, target, tau)
        else:  # as one operation on lists
            with th.no_grad():
                th._foreach_lerp_(target, online, tau)

    def _network(self, name: str) -> Network:
        network = self._used[name] = self.networks[name]
        return network

    # What an algorithm calls

    def begin(self) -> None:
        """Foreign code ran: look at the networks, set their rates, and look at everything else before the next replay."""
        self.networks = self._make_networks()
        for network in self.networks.values():
            update_learning_rate(network.optimizer, network.rate)
            steps = self._steps.get(network.optimizer)
            if steps is not None:
                steps.rate.fill_(network.rate)
        self._look += 1

    def end(self) -> dict[str, float]:
        """Means of the scalar outputs of the updates since the last call, by their names."""
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
        kind = self._kind(function, batch, options, wait=WARM_UP if self.device.type == "cuda" else 0)
        if kind.recording is not None and kind.look != self._look:
            self._look_at(kind)
        with self.lock if not kind.verified else nullcontext():
            outputs = self._replay(kind, batch) if self.enabled else None
            if outputs is None:
                return self._plainly(function, batch, options)
            if kind.means is not None:
                kind.means.count += 1
        return outputs

    def run_plainly(self, function: Function, batch: tuple[Any, ...], *options: Hashable) -> Outputs:
        """
        `run` without a recording, for batches of which hardly two have the same size.

        :param function: a bound method of the owner
        :param batch: tensors or arrays; arrays become tensors
        :param options: further arguments
        :return: what the function returned
        :raises TypeError: if an output is no tensor
        """
        if self._norms is not None:  # a function of a function
            return Outputs(function(batch, *options) or {}, shared=False)
        self._updates += 1
        self._plain[named(function, options)] = "ordinary: the size of its batches varies"
        return self._plainly(function, batch, options)

    def _plainly(self, function: Function, batch: tuple[Any, ...], options: tuple[Hashable, ...]) -> Outputs:
        self._publish()
        outputs = Outputs(self._call(function, as_tensors(batch, self.device), options), shared=False)
        if self._called is not None:
            self._called.count += 1
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
            return self._first_evaluations(kind, batch)
        with recording.lock:
            unchanged = kind.recording is recording  # in another thread
            if unchanged and self._look_at(kind) and recording.run(filled(batch)):
                return recording.copies()
        return None

    def _first_evaluations(self, kind: Kind, batch: tuple[np.ndarray, ...]) -> dict[str, np.ndarray] | None:
        if kind.wait > 0:
            kind.wait -= 1
            return None
        if not self.lock.acquire(blocking=False):
            return None  # another thread is recording
        try:
            with th.no_grad():
                if kind.recording is None:
                    return self._record_evaluation(kind, batch)
                expected = kind.function(as_tensors(batch, self.device), *kind.options) or {}
                if self._look_at(kind) and self._agrees_with(kind, batch, expected):
                    kind.verified = True
                return {name: value.cpu().numpy().copy() for name, value in expected.items()}
        finally:
            self.lock.release()

    def parameter_norms(self) -> dict[str, float]:
        """2-norms of the networks' parameters, by their names; nothing if all of them are finite."""
        parameters = [parameter.detach() for network in self.networks.values() for parameter in network.parameters]
        if not parameters or th.stack(th._foreach_norm(parameters)).sum().isfinite():
            return {}
        with th.no_grad():
            return {name: float(get_total_norm(network.parameters)) for name, network in self.networks.items()}

    def report(self) -> dict[str, str]:
        """For every function that has run, by its name: "replayed", or why it is not."""
        found = dict(self._plain)
        for kind in self._kinds.values():
            found[kind.name] = "replayed" if kind.verified else f"ordinary: {kind.reason}"
        return found

    def memory(self) -> int:
        """Bytes that the recordings hold besides networks and optimizers."""
        return sum(kind.recording.replay.bytes for kind in self._kinds.values() if kind.recording is not None)

    # How it does that

    def _kind(self, function: Any, batch: tuple[Any, ...], options: tuple[Hashable, ...], wait: int) -> Kind:
        if getattr(function, "__self__", None) is not self._owner:
            raise TypeError(f"function must be a bound method of the {type(self._owner).__name__}, got {function!r}")
        key = function.__func__, options, *map(type, options), *map(_signature, leaves(batch))
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = Kind(function, options, wait)
            while len(self._kinds) > MOST_KINDS:
                self._kinds.popitem(last=False)
        self._kinds.move_to_end(key)
        return kind

    def _look_at(self, kind: Kind) -> bool:
        """Whether the kind's recording may be replayed, as everything is now."""
        assert kind.guard is not None
        change = kind.guard.change(self.networks)
        if change is not None:
            kind.forget(f"{change} changed")
            return False
        kind.look = self._look
        return True

    def _has_gradients(self, recording: Recording) -> bool:
        if not recording.has_gradients():
            self._publish()
        return recording.has_gradients()

    def _replay(self, kind: Kind, batch: tuple[Any, ...]) -> Outputs | None:
        """What the function returns, by a replay; None if it is to run as it stands."""
        if kind.recording is None:
            if kind.wait > 0:
                kind.wait -= 1
                return None
            self._publish()
            self._record(kind, batch)
        elif not self._has_gradients(kind.recording):
            return None  # the function that computed them was not replayed
        elif not kind.verified:
            self._verify(kind, batch)
        elif not kind.recording.run(filled(batch)):
            return None  # PyTorch's distributions have something to say
        if kind.recording is None:
            return None
        self._replayed.pop(kind.recording, None)
        self._replayed[kind.recording] = None  # the last one comes last
        if len(self._replayed) > MOST_RECORDINGS:
            self._publish()
        return Outputs(kind.recording.outputs, shared=True)


def _signature(value: Any) -> Hashable:
    if isinstance(value, (th.Tensor, np.ndarray)):
        return value.shape, value.dtype
    return value  # type: ignore[no-any-return]  # what an option is, hashable
