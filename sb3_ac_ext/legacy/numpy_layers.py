"""Fused layers evaluated and differentiated by numpy, for networks so small that PyTorch's calls cost more than the work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch as th
from torch import nn

from sb3_ac_ext.legacy import fused_mlp
from sb3_ac_ext.legacy.fused_mlp import Fused
from sb3_ac_ext.legacy.matmul import mm
from sb3_ac_ext.legacy.workspace import current

LARGEST_PRODUCT = 2**18
"""
Multiplications in a product that numpy does. For larger ones its BLAS would start threads of its own, which go on spinning
beside PyTorch's (updates took 2.5 times as long): they are for PyTorch, on the same memory.
"""


@dataclass(frozen=True)
class Activation:
    """An activation whose derivative is a function of its output."""

    forward: Callable[[np.ndarray], np.ndarray]
    """Applies it, in place where numpy can."""
    derivative: Callable[[np.ndarray], np.ndarray]
    """The derivative where the output is this; a new array."""


def _relu(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.maximum(x, 0, out=x)
    return result


def _tanh(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.tanh(x, out=x)
    return result


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)))


def _elu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.ReLU: Activation(_relu, np.sign),
    nn.Tanh: Activation(_tanh, lambda y: 1 - y * y),
    nn.Sigmoid: Activation(_sigmoid, lambda y: y - y * y),
    nn.ELU: Activation(_elu, lambda y: np.minimum(y, 0) + 1),
}
"""The activations that `FusedMLP` knows."""


def product(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """
    ``a @ b`` of matrices, by numpy or by PyTorch, whoever is faster.

    :param a: ``(m, k)``
    :param b: ``(k, n)``
    :param out: ``(m, n)`` where it goes, if somewhere
    :return: ``(m, n)``
    """
    if len(a) * b.size <= LARGEST_PRODUCT:
        return np.matmul(a, b, out=out)
    result = mm(th.from_numpy(a), th.from_numpy(b), None if out is None else th.from_numpy(out))
    return result.numpy() if out is None else out


class NumpyLayers:
    """
    Fused modules one after another, evaluated by numpy on views of the parameters' memory, so that an update is seen at once.

    Batches that are large enough for PyTorch to be faster go through its fused layers, on the same memory.

    :param fused: modules without an obstacle, on a CPU
    """

    def __init__(self, *fused: Fused) -> None:
        self.fused = fused
        self._chains = [module.chain() for module in fused]
        modules = [module for chain in self._chains for module in chain]
        self._hooks = [hooks for m in (*fused, *modules) for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        linear = [module for module in modules if isinstance(module, nn.Linear)]
        self._places = [(m._parameters, name, _pointer(m._parameters[name])) for m in linear for name in ("weight", "bias")]
        following = [type(after) for after in [*modules, nn.Identity()][1:]]
        kinds = [after for module, after in zip(modules, following, strict=True) if isinstance(module, nn.Linear)]
        self._layers = [
            (m.weight.detach().numpy().T, m.bias.detach().numpy(), ACTIVATIONS.get(kind))
            for m, kind in zip(linear, kinds, strict=True)
        ]
        self._largest = max(module.weight.numel() for module in linear)
        self._plan = tuple(fused_mlp.ACTIVATIONS.get(kind) for kind in kinds)
        self._tensors = [parameter.detach() for parameter in self.parameters()]

    def is_current(self) -> bool:
        """Whether modules, memory and hooks are still those that there were."""
        for parameters, name, pointer in self._places:
            parameter = parameters[name]
            if parameter is None or parameter.data_ptr() != pointer:
                return False
        same = all(module.chain() == chain for module, chain in zip(self.fused, self._chains, strict=True))
        return same and not any(self._hooks)

    def parameters(self) -> list[nn.Parameter]:
        """Weight and bias of each layer, in turn."""
        return [parameters[name] for parameters, name, _ in self._places]  # type: ignore[misc]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """
        :param x: ``(B, inputs)``
        :return: ``(B, outputs)``
        """
        return self.outputs(x)[-1]

    def outputs(self, x: np.ndarray) -> list[np.ndarray]:
        """
        :param x: ``(B, inputs)``
        :return: ``(B, out)`` of each layer, after its activation
        """
        if self._by_torch(x):
            with th.no_grad():
                return [y.numpy() for y in fused_mlp.run(self._plan, th.from_numpy(x), self._tensors, keep=True)]
        results = []
        for weight, bias, activation in self._layers:
            x = np.matmul(x, weight)
            x += bias
            if activation is not None:
                x = activation.forward(x)
            results.append(x)
        return results

    def tangent(self, x: np.ndarray, outputs: Sequence[np.ndarray], directions: Sequence[np.ndarray]) -> np.ndarray:
        """
        How the last output moves with the parameters, to first order (forward-mode differentiation).

        :param x: ``(B, inputs)``
        :param outputs: of `outputs`
        :param directions: of the parameters, see `parameters`
        :return: ``(B, outputs)`` direction of the last of them
        """
        moved = None
        for layer, (weight, _, activation) in enumerate(self._layers):
            before, moved = moved, product(outputs[layer - 1] if layer else x, directions[2 * layer].T)
            moved += directions[2 * layer + 1]
            if before is not None:
                moved += product(before, weight)
            if activation is not None:
                moved *= activation.derivative(outputs[layer])
        assert moved is not None  # there is a layer
        return moved

    def backward(
        self, x: np.ndarray, outputs: Sequence[np.ndarray], grad: np.ndarray, gradients: Sequence[np.ndarray]
    ) -> None:
        """
        :param x: ``(B, inputs)``
        :param outputs: of `outputs`; not valid any more afterwards
        :param grad: ``(B, outputs)`` gradient of the last of them
        :param gradients: where the parameters' gradients go, see `parameters`
        """
        if self._by_torch(x):
            tensors = [th.from_numpy(array) for array in (x, *outputs)]
            run_before = fused_mlp.Pass(self._plan, current(), tensors[:-1], tensors[1:], self._tensors[::2])
            needed = [True] * len(self._tensors)
            with th.no_grad():
                run_before.backward(th.from_numpy(grad), False, needed, _Places([th.from_numpy(g) for g in gradients]))
            return
        inputs = [x, *outputs[:-1]]
        for layer in reversed(range(len(self._layers))):
            weight, _, activation = self._layers[layer]
            if activation is not None:
                grad = grad * activation.derivative(outputs[layer])
            np.matmul(grad.T, inputs[layer], out=gradients[2 * layer])
            np.add.reduce(grad, axis=0, out=gradients[2 * layer + 1])
            if layer > 0:
                grad = np.matmul(grad, weight.T)

    def _by_torch(self, x: np.ndarray) -> bool:
        return len(x) * self._largest > LARGEST_PRODUCT


class _Places:
    """Takes the gradients of a backward pass, see `fused_mlp.Gradients`."""

    def __init__(self, gradients: list[th.Tensor]) -> None:
        self._gradients = gradients

    def weight(self, index: int, grad: th.Tensor, layer_input: th.Tensor) -> None:
        mm(grad.t(), layer_input, out=self._gradients[index])

    def bias(self, index: int, grad: th.Tensor) -> None:
        th.sum(grad, dim=0, out=self._gradients[index])


def _pointer(parameter: th.Tensor | None) -> int:
    return 0 if parameter is None else parameter.data_ptr()
