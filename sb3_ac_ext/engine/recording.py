"""A function that is recorded for batches of one kind, and replayed without Python, autograd and dispatcher in between."""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch as th
from torch import nn
from torch.distributions import Distribution

from sb3_ac_ext.engine.memory import bytes_used, plan
from sb3_ac_ext.engine.network import is_adam
from sb3_ac_ext.engine.rewrites import rewritten
from sb3_ac_ext.engine.tape import RefusedError, Tape, UnmetError, memory

Values = dict[str, th.Tensor]
Attribute = tuple[dict[str, Any], str, th.Tensor]
"""A dict of attributes, the name of one, and the tensor that it is."""
TOLERANCE = 1e-4
"""Largest difference between a replay and the function itself, relative to the 2-norm, in fp32."""


def leaves(batch: tuple[Any, ...]) -> Iterator[Any]:
    """The parts of a batch, those of dicts one by one."""
    for value in batch:
        if isinstance(value, dict):
            yield from value.values()
        else:
            yield value


def filled(batch: tuple[Any, ...]) -> Sequence[Any]:
    """The parts of a batch that are copied to a recording's inputs: its tensors and arrays."""
    return [value for value in leaves(batch) if isinstance(value, (th.Tensor, np.ndarray))]


def mapped(batch: tuple[Any, ...], function: Callable[[Any], Any]) -> Any:
    """A batch of the same kind with other parts."""

    def other(value: Any) -> Any:
        return {key: other(part) for key, part in value.items()} if isinstance(value, dict) else function(value)

    parts = [*map(other, batch)]
    return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)


def as_tensors(batch: tuple[Any, ...], device: th.device) -> Any:
    """A batch with its arrays as tensors."""
    return mapped(batch, lambda value: th.as_tensor(value, device=device) if isinstance(value, np.ndarray) else value)


class Inputs:
    """
    The memory that batches are copied to.

    :param batch: a tuple, or named tuple, of tensors, arrays, dicts of these, and values of other kinds
    :param device: where the function computes
    """

    def __init__(self, batch: tuple[Any, ...], device: th.device) -> None:
        with th.inference_mode(False), th.no_grad():
            self.batch = mapped(
                as_tensors(batch, device), lambda value: value.detach().clone() if isinstance(value, th.Tensor) else value
            )
        self.tensors = filled(self.batch)
        self._arrays = [*map(_array, self.tensors)]

    def fill(self, values: Sequence[Any]) -> None:
        """Copy another batch here, as it is `filled`."""
        for place, array, value in zip(self.tensors, self._arrays, values, strict=True):
            if array is not None and isinstance(value, np.ndarray):
                array[...] = value
            elif value is not place:
                place.copy_(th.as_tensor(value))


def _array(tensor: th.Tensor) -> np.ndarray | None:
    """A tensor's memory for numpy, which knows neither other devices nor bfloat16."""
    return tensor.detach().numpy() if tensor.device.type == "cpu" and tensor.dtype != th.bfloat16 else None


class Replay:
    """
    What a function did on a CPU, as a list of calls.

    :param tape: that was recorded
    :param outputs: of the function
    :param rounding: whether rewrites that round differently may be used
    """

    def __init__(self, tape: Tape, outputs: Values, rounding: bool = True) -> None:
        kept = {*tape.external, *tape.escaped(), *map(memory, outputs.values())}
        calls = plan(rewritten(tape.operations, rounding), kept)
        self.bytes = bytes_used(calls, tape.external)
        self.draws = any(call.lasting for call in calls)
        self._calls = [(call.function, call.args, call.kwargs) for call in calls]

    def __len__(self) -> int:
        return len(self._calls)

    def __call__(self) -> None:
        """Do it again."""
        with th.inference_mode():
            for function, args, kwargs in self._calls:
                function(*args, **kwargs)


class Graph:
    """
    What a function did on a GPU, as a CUDA graph.

    PyTorch's distributions do not look at their arguments meanwhile, as nothing can be read from the GPU then.

    :param function: without arguments; it has run a few times
    :param stream: that it has run in, as what autograd keeps of that belongs there
    :raises RefusedError: if it waits for the GPU, or does something else that no graph can have
    """

    def __init__(self, function: Callable[[], Values], stream: th.cuda.Stream) -> None:
        self._graph = th.cuda.CUDAGraph()
        self.bytes, self.draws = 0, True
        validates = Distribution._validate_args
        Distribution.set_default_validate_args(False)
        try:
            with th.cuda.graph(self._graph, stream=stream):
                self.outputs = {name: value.detach() for name, value in function().items()}
        except RuntimeError as error:
            _end_capture(stream)
            raise RefusedError(str(error).partition("\n")[0]) from error
        finally:
            Distribution.set_default_validate_args(validates)

    def __call__(self) -> None:
        """Do it again."""
        self._graph.replay()


def _end_capture(stream: th.cuda.Stream) -> None:
    """Random generators go on capturing after a capture has failed, until the end of one that has not."""
    with th.cuda.graph(th.cuda.CUDAGraph(), stream=stream):
        th.zeros(1, device="cuda").normal_()


class Recording:
    """
    A replay with its inputs and outputs.

    :param replay: that does it again
    :param inputs: that it reads
    :param outputs: that it writes, by their names
    :param gradients: parameters of the networks that the function trains, and where their gradients are, or None
    :param given: the same of those whose gradients it takes from another function
    :param attributes: tensors that it has put into objects
    """

    def __init__(
        self,
        replay: Replay | Graph,
        inputs: Inputs,
        outputs: Values,
        gradients: Sequence[tuple[nn.Parameter, th.Tensor | None]],
        given: Sequence[tuple[nn.Parameter, th.Tensor | None]] = (),
        attributes: Sequence[Attribute] = (),
    ) -> None:
        self.replay, self.inputs = replay, inputs
        self.outputs, self.gradients, self._given, self._attributes = outputs, gradients, given, attributes
        self._arrays = {name: _array(value) for name, value in outputs.items()}
        self.lock = threading.Lock()

    def run(self, values: Sequence[Any]) -> bool:
        """
        :param values: of a batch, as it is `filled`
        :return: whether everything that was asked for on the way was true
        """
        self.inputs.fill(values)
        return self.again()

    def again(self) -> bool:
        """`run` for the batch that is there; where something is not true the replay has stopped."""
        try:
            self.replay()
        except UnmetError:
            return False
        return True

    def has_gradients(self) -> bool:
        """Whether the gradients that it takes from another function are where a replay reads them."""
        return all(parameter.grad is gradient for parameter, gradient in self._given)

    def copies(self) -> dict[str, np.ndarray]:
        """Copies of the outputs of the last replay, by their names."""
        arrays = self._arrays.items()
        return {name: self.outputs[name].cpu().numpy() if array is None else array.copy() for name, array in arrays}

    def publish(self) -> None:
        """Put gradients and other tensors of the last replay where the function puts them, as others may have done since."""
        for parameter, gradient in self.gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient
        for place, name, tensor in self._attributes:
            place[name] = tensor


def _random_states() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state()  # noqa: NPY002 (the one that SB3 seeds)


class Snapshot:
    """
    What a function may change, as it is now.

    :param tensors: that it may change
    :param device: whose random state it may advance
    :param optimizers: that may step
    :param modules: that may count something in an attribute
    :param gradients: that it may change as well, where it clips those of another function
    """

    def __init__(
        self,
        tensors: Sequence[th.Tensor],
        device: th.device,
        optimizers: Sequence[th.optim.Optimizer] = (),
        modules: Sequence[nn.Module] = (),
        gradients: Sequence[th.Tensor] = (),
    ) -> None:
        self.tensors, self._places, self._device = tensors, [*tensors, *gradients], device
        with th.no_grad():
            self._values = [tensor.detach().clone() for tensor in self._places]
        self._random = th.get_rng_state(), th.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._others = _random_states()
        places = [*map(vars, modules)]
        self._numbers = [(place, {name: v for name, v in place.items() if isinstance(v, (int, float))}) for place in places]
        self._states = [(o, {p: dict(state) for p, state in o.state.items()}) for o in optimizers]

    def has_drawn(self) -> bool:
        """Whether random numbers were drawn since that a replay does not draw: of Python or of numpy's global generator."""
        (ours, numpys), (now, numpys_now) = self._others, _random_states()
        return bool(ours != now or numpys[2:] != numpys_now[2:] or (numpys[1] != numpys_now[1]).any())

    def restore(self, *, keep_adam: bool = False, undo: bool = True) -> None:
        """
        Put everything back.

        :param keep_adam: whether the state that Adam has made since stays, with its numbers as they are
        :param undo: whether the function counts as not having run, for modules that count its runs
        """
        with th.no_grad():
            for tensor, value in zip(self._places, self._values, strict=True):
                tensor.detach().copy_(value)
        th.set_rng_state(self._random[0])
        if self._random[1] is not None:
            th.cuda.set_rng_state(self._random[1], self._device)
        for place, numbers in self._numbers if undo else ():
            place.update(numbers)
        random.setstate(self._others[0])
        np.random.set_state(self._others[1])  # noqa: NPY002 (the one that SB3 seeds)
        for optimizer, states in self._states:
            if not (keep_adam and is_adam(optimizer)):
                optimizer.state.clear()
                optimizer.state.update({p: dict(state) for p, state in states.items()})


def difference(values: Sequence[th.Tensor], expected: Sequence[th.Tensor]) -> float:
    """
    How far tensors are apart that should be the same, say all gradients.

    What is nothing but rounding, as the gradient of a bias before a normalisation, is measured against all of them.

    :param values: of a replay
    :param expected: of the function itself
    :return: the largest difference of a tensor, relative to its 2-norm, or to a tenth of the 2-norm of all if that is less
    """
    relative, absolute, total = [0.0], [0.0], 1e-12
    for value, wanted in zip(values, expected, strict=True):
        if not (wanted.is_floating_point() and th.equal(value.isnan(), wanted.isnan())):
            if not th.equal(value, wanted):
                return float("inf")
            continue
        finite = value.isfinite() & wanted.isfinite()
        if not th.equal(value[~finite].nan_to_num(0.0), wanted[~finite].nan_to_num(0.0)):
            return float("inf")
        value, wanted = value[finite].double(), wanted[finite].double()
        scale, apart = wanted.norm().item(), (value - wanted).norm().item()
        relative.append(apart / (scale + 1e-12))
        absolute.append(apart)
        total += scale**2
    return max(min(one, float(10 * apart / total**0.5)) for one, apart in zip(relative, absolute, strict=True))
