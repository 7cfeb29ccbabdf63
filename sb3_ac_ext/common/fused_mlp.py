"""An MLP as one autograd node: the same modules, parameters and results as ``nn.Sequential``, without its bookkeeping."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch as th
from torch import nn

from sb3_ac_ext.common.matmul import addmm, mm


@dataclass(frozen=True)
class Activation:
    """An activation whose derivative is a function of its output."""

    forward_: Callable[[th.Tensor], th.Tensor]
    """Applies it in place."""
    backward: Callable[[th.Tensor, th.Tensor], th.Tensor]
    """(gradient of the output, output) -> gradient of the input."""


def _elu_backward(grad: th.Tensor, out: th.Tensor) -> th.Tensor:
    return grad * (out.clamp(max=0) + 1)  # exp(x) = elu(x) + 1 below zero


def _tanh_backward(grad: th.Tensor, out: th.Tensor) -> th.Tensor:
    return th.addcmul(grad, grad * out, out, value=-1)


def _sigmoid_backward(grad: th.Tensor, out: th.Tensor) -> th.Tensor:
    return grad * (out * (1 - out))


def _relu_backward(grad: th.Tensor, out: th.Tensor) -> th.Tensor:
    return grad * out.sign()  # a fifth of the time of a boolean mask


def _elu_(x: th.Tensor) -> th.Tensor:
    return nn.functional.elu(x, inplace=True)


ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.ReLU: Activation(th.relu_, _relu_backward),
    nn.Tanh: Activation(th.tanh_, _tanh_backward),
    nn.Sigmoid: Activation(th.sigmoid_, _sigmoid_backward),
    nn.ELU: Activation(_elu_, _elu_backward),
}
"""The activations that the node knows, by exact type and with their default arguments."""

Plan = tuple[Activation | None, ...]
"""For each linear layer the activation after it."""


class FusedMLP(nn.Sequential):
    """
    Linear layers and activations that run as one autograd node where they can.

    The results are those of ``nn.Sequential`` up to rounding, and no gradient is computed that nobody asks for. Layers
    other than linear ones with bias and the activations of `ACTIVATIONS`, hooks, inputs other than ``(B, features)`` of
    the weights' type, or `fused` set to False take the ordinary path.
    """

    fused: bool = True
    """Whether the node may be used."""
    sink: Sequence[th.Tensor] | None = None
    """Where a backward pass writes the parameters' gradients, instead of returning them to autograd."""
    sink_filled: bool = False
    """Whether the sink holds gradients, to which further ones are added."""

    @property
    def obstacle(self) -> str | None:
        """Why the layers cannot run as one node; None if they can."""
        if not self.fused:
            return "it is switched off"
        for i, module in enumerate((self, *self)):
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
                return f"a hook on {type(module).__name__}"
            if i == 0:
                continue
            after_linear = i > 1 and type(self[i - 2]) is nn.Linear
            if type(module) is nn.Linear:
                if module.bias is None:
                    return "a linear layer without bias"
            elif type(module) not in ACTIVATIONS or not after_linear or getattr(module, "alpha", 1.0) != 1.0:
                return f"the layer {module}"
        return None if len(self) else "no layer"

    def plan(self) -> Plan:
        """The activation after each linear layer."""
        following = [*self, None][1:]
        return tuple(
            ACTIVATIONS.get(type(after)) for layer, after in zip(self, following, strict=True) if type(layer) is nn.Linear
        )

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: ``(B, inputs)``
        :return: ``(B, outputs)``
        """
        if self.obstacle is not None or x.dim() != 2 or x.dtype != next(self.parameters()).dtype:
            output: th.Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        elif th.is_grad_enabled():
            output = _Node.apply(self, x, *self.parameters())  # type: ignore[no-untyped-call]
        else:
            output = run(self.plan(), x, tuple(self.parameters()))[-1]
        return output


def run(plan: Plan, x: th.Tensor, parameters: Sequence[th.Tensor]) -> list[th.Tensor]:
    """
    The output of every layer.

    :param plan: the activation after each layer
    :param x: ``(B, inputs)``
    :param parameters: weight ``(out, in)`` and bias ``(out,)`` of each layer, in turn
    :return: ``(B, out)`` for each layer, after its activation
    """
    outputs = []
    for activation, weight, bias in zip(plan, parameters[::2], parameters[1::2], strict=True):
        x = addmm(bias, x, weight.t())
        if activation is not None:
            x = activation.forward_(x)
        outputs.append(x)
    return outputs


class _Node(th.autograd.Function):
    """`run` with a hand-written backward."""

    @staticmethod
    def forward(ctx: Any, module: FusedMLP, x: th.Tensor, *parameters: th.Tensor) -> th.Tensor:
        ctx.module, ctx.plan = module, module.plan()
        outputs = run(ctx.plan, x, parameters)
        ctx.save_for_backward(x, *outputs, *parameters)
        return outputs[-1]

    @staticmethod
    def backward(ctx: Any, grad: th.Tensor) -> tuple[Any, ...]:
        n, saved = len(ctx.plan), ctx.saved_tensors
        inputs, outputs, weights = saved[:n], saved[1 : n + 1], saved[n + 1 :: 2]  # a layer's input is the output before it
        _, x_needed, *needed = ctx.needs_input_grad
        sink = _Sink(ctx.module, 2 * n)
        for layer in reversed(range(n)):
            activation = ctx.plan[layer]
            if activation is not None:
                grad = activation.backward(grad, outputs[layer])
            if needed[2 * layer]:
                sink.weight(2 * layer, grad, inputs[layer])
            if needed[2 * layer + 1]:
                sink.bias(2 * layer + 1, grad)
            if not (x_needed or any(needed[: 2 * layer])):
                return None, None, *sink.close()
            grad = mm(grad, weights[layer])
        return None, grad, *sink.close()


class _Sink:
    """Takes the gradients of one backward pass: into the module's sink, or to be returned to autograd."""

    def __init__(self, module: FusedMLP, size: int) -> None:
        self.module = module
        self.places = module.sink
        self.returned: list[th.Tensor | None] = [None] * size

    def weight(self, index: int, grad: th.Tensor, layer_input: th.Tensor) -> None:
        if self.places is None:
            self.returned[index] = mm(grad.t(), layer_input)
        elif self.module.sink_filled:
            self.places[index].add_(mm(grad.t(), layer_input))
        else:
            mm(grad.t(), layer_input, out=self.places[index])

    def bias(self, index: int, grad: th.Tensor) -> None:
        if self.places is None:
            self.returned[index] = grad.sum(dim=0)
        elif self.module.sink_filled:
            self.places[index].add_(grad.sum(dim=0))
        else:
            th.sum(grad, dim=0, out=self.places[index])

    def close(self) -> list[th.Tensor | None]:
        self.module.sink_filled = self.places is not None
        return self.returned
