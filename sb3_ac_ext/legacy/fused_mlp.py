"""An MLP as one autograd node: the same modules, parameters and results as ``nn.Sequential``, without its bookkeeping."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch as th
from torch import nn

from sb3_ac_ext.legacy.matmul import addmm, mm
from sb3_ac_ext.legacy.workspace import Workspace, current


@dataclass(frozen=True)
class Activation:
    """An activation whose derivative is a function of its output."""

    forward_: Callable[[th.Tensor], th.Tensor]
    """Applies it in place."""
    backward: Callable[..., th.Tensor]
    """(gradient of the output, output) -> gradient of the input, one operation; in ``grad_input`` if that is given."""

    def backward_(self, grad: th.Tensor, output: th.Tensor) -> th.Tensor:
        """The gradient of the input instead of that of the output, in its place."""
        return self.backward(grad, output, grad_input=grad)


def _elu_(x: th.Tensor) -> th.Tensor:
    return nn.functional.elu(x, inplace=True)


def _either(name: str, *arguments: Any, output_last: bool = False) -> Callable[..., th.Tensor]:
    """The operation called ``name`` that PyTorch's autograd uses, with or without memory for its result."""
    new, into = getattr(th.ops.aten, name).default, getattr(th.ops.aten, name).grad_input

    def backward(grad: th.Tensor, output: th.Tensor, grad_input: th.Tensor | None = None) -> th.Tensor:
        given = (grad, *arguments, output) if output_last else (grad, output, *arguments)
        result: th.Tensor = new(*given) if grad_input is None else into(*given, grad_input=grad_input)
        return result

    return backward


ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.ReLU: Activation(th.relu_, _either("threshold_backward", 0)),
    nn.Tanh: Activation(th.tanh_, _either("tanh_backward")),
    nn.Sigmoid: Activation(th.sigmoid_, _either("sigmoid_backward")),
    # alpha, scale, input_scale, and that it gets the output
    nn.ELU: Activation(_elu_, _either("elu_backward", 1, 1, 1, True, output_last=True)),
}
"""The activations that the node knows, by exact type and with their default arguments."""

Plan = tuple[Activation | None, ...]
"""For each linear layer the activation after it."""


@dataclass(eq=False)
class Places:
    """Memory for the gradients of a module's parameters, instead of returning them to autograd."""

    gradients: Sequence[th.Tensor]
    """Of each parameter, in their order."""
    open: bool = False
    """Whether backward passes shall write here."""
    filled: bool = False
    """Whether one has; further gradients are added."""


class Fused(nn.Module):
    """
    Linear layers and activations that run as one autograd node where they can.

    The results are those of the layers one by one up to rounding, and no gradient is computed that nobody asks for.
    Layers other than linear ones with bias and the activations of `ACTIVATIONS`, hooks, inputs other than
    ``(B, features)`` of the weights' type, or `fused` set to False take the ordinary path. Goes before the PyTorch class.
    """

    fused: bool = True
    """Whether the node may be used."""
    places: "Places | None" = None
    """Where a backward pass writes the parameters' gradients, if they are open."""

    def chain(self) -> list[nn.Module]:
        """The layers in their order."""
        raise NotImplementedError

    @property
    def obstacle(self) -> str | None:
        """Why the layers cannot run as one node; None if they can."""
        if not self.fused:
            return "it is switched off"
        chain = self.chain()
        for module in (self, *chain):
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
                return f"a hook on {type(module).__name__}"
        for before, module in zip([None, *chain], chain, strict=False):
            if type(module) in LINEAR:
                if module.bias is None:
                    return "a linear layer without bias"
            elif type(module) not in ACTIVATIONS or type(before) not in LINEAR or getattr(module, "alpha", 1.0) != 1.0:
                return f"the layer {module}"
        return None if chain else "no layer"

    def layers(self) -> "Layers | None":
        """The layers for the node, looked up again only if modules or hooks have changed; None if there is an obstacle."""
        layers = self.__dict__.get("_known_layers")
        if layers is None or not layers.hold(self):
            layers = Layers(self) if self.obstacle is None else None
            self.__dict__["_known_layers"] = layers
        return layers if self.fused else None

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: ``(B, inputs)``
        :return: ``(B, outputs)``
        """
        # tracers and compilers do better with the layers themselves
        traced = th.jit.is_tracing() or th.compiler.is_compiling()
        layers = None if traced else self.layers()
        parameters = () if layers is None else layers.parameters()
        if layers is None or x.dim() != 2 or x.dtype != parameters[0].dtype:
            output: th.Tensor = super().forward(x)
        elif th.is_grad_enabled():
            output = _Node.apply(self, layers.plan, x, *parameters)  # type: ignore[no-untyped-call]  # torch does not annotate it
        else:
            output = run(layers.plan, x, parameters)[-1]
        return output

    def train(self, mode: bool = True) -> Self:
        """See `torch.nn.Module.train`, in a tenth of its time: algorithms change the mode twice a step."""
        layers = self.layers()
        if layers is None:
            return super().train(mode)
        for module in (self, *layers.modules):
            module.__dict__["training"] = mode
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name[:6] != "_known"}


class FusedMLP(Fused, nn.Sequential):
    """``nn.Sequential`` as one node."""

    def chain(self) -> list[nn.Module]:
        """See `Fused.chain`."""
        return [*self._modules.values()]


class FusedLinear(Fused, nn.Linear):
    """``nn.Linear`` as one node, for an output layer that stands alone."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "FusedLinear":
        """
        :param linear: a layer
        :return: a fused one with its parameters
        """
        fused = cls(linear.in_features, linear.out_features, device="meta")  # draws no random numbers
        fused.weight, fused.bias = linear.weight, linear.bias
        return fused

    def chain(self) -> list[nn.Module]:
        """See `Fused.chain`."""
        return [self]


LINEAR = (nn.Linear, FusedLinear)


class Layers:
    """What a `Fused` module needs to know of its layers, and a quick check whether it still holds."""

    def __init__(self, fused: Fused) -> None:
        self.modules = fused.chain()
        following = [*self.modules, nn.Identity()][1:]
        linear = [(m, after) for m, after in zip(self.modules, following, strict=True) if type(m) in LINEAR]
        self.plan: Plan = tuple(ACTIVATIONS.get(type(after)) for _, after in linear)
        self._places: list[tuple[dict[str, Any], str]] = [
            (module._parameters, name) for module, _ in linear for name in ("weight", "bias")
        ]
        hooked = (fused, *self.modules)
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self._hooks = [getattr(module, kind) for module in hooked for kind in kinds]

    def hold(self, fused: Fused) -> bool:
        """Whether ``fused`` still has these layers and nobody hooked any."""
        return fused.chain() == self.modules and not any(self._hooks)

    def parameters(self) -> tuple[th.Tensor, ...]:
        """Weight and bias of each layer, in turn, as they are now."""
        return tuple(parameters[name] for parameters, name in self._places)


def run(plan: Plan, x: th.Tensor, parameters: Sequence[th.Tensor], keep: bool = False) -> list[th.Tensor]:
    """
    The output of every layer.

    :param plan: the activation after each layer
    :param x: ``(B, inputs)``
    :param parameters: weight ``(out, in)`` and bias ``(out,)`` of each layer, in turn
    :param keep: whether all outputs are needed later; otherwise only the last one is valid
    :return: ``(B, out)`` for each layer, after its activation; in a workspace all but the last belong to it
    """
    workspace = current()
    outputs: list[th.Tensor] = []
    for i, activation in enumerate(plan):
        weight, bias = parameters[2 * i], parameters[2 * i + 1]
        last = i == len(plan) - 1
        out = None if workspace is None or last else workspace.take((len(x), len(bias)), x)
        y = addmm(bias, x, weight.t(), out)
        if activation is not None:
            y = activation.forward_(y)
        if workspace is not None and not keep:
            workspace.give(x)
        outputs.append(y)
        x = y
    return outputs


class Sink:
    """Takes the gradients of one backward pass: to the module's places if they are open, or to be returned to autograd."""

    def __init__(self, module: Fused, size: int) -> None:
        places = module.places
        self.places = places if places is not None and places.open else None
        self.returned: list[th.Tensor | None] = [None] * size

    def weight(self, index: int, grad: th.Tensor, layer_input: th.Tensor) -> None:
        """
        :param index: of the weight among the parameters
        :param grad: ``(B, out)`` gradient of the layer's output
        :param layer_input: ``(B, in)``
        """
        if self.places is None:
            self.returned[index] = mm(grad.t(), layer_input)
        elif self.places.filled:
            self.places.gradients[index].add_(mm(grad.t(), layer_input))
        else:
            mm(grad.t(), layer_input, out=self.places.gradients[index])

    def bias(self, index: int, grad: th.Tensor) -> None:
        """
        :param index: of the bias among the parameters
        :param grad: ``(B, out)`` gradient of the layer's output
        """
        if self.places is None:
            self.returned[index] = grad.sum(dim=0)
        elif self.places.filled:
            self.places.gradients[index].add_(grad.sum(dim=0))
        else:
            th.sum(grad, dim=0, out=self.places.gradients[index])

    def close(self) -> list[th.Tensor | None]:
        """The gradients for autograd: None for those that went to the module's places or that nobody needs."""
        if self.places is not None:
            self.places.filled = True
        return self.returned


class Gradients(Protocol):
    """What takes the gradients of `run`'s parameters, see `Sink`."""

    def weight(self, index: int, grad: th.Tensor, layer_input: th.Tensor) -> None:
        """See `Sink`."""

    def bias(self, index: int, grad: th.Tensor) -> None:
        """See `Sink`."""


@dataclass(frozen=True)
class Pass:
    """What a backward pass needs of the `run` before it."""

    plan: Plan
    workspace: Workspace | None
    inputs: Sequence[th.Tensor]
    """Of each layer: the output of the one before it."""
    outputs: Sequence[th.Tensor]
    weights: Sequence[th.Tensor]

    def backward(self, grad: th.Tensor, x_needed: bool, needed: Sequence[bool], gradients: Gradients) -> th.Tensor | None:
        """
        :param grad: gradient of the last output
        :param x_needed: whether the input's gradient is needed
        :param needed: whether that of each parameter is
        :param gradients: where they go
        :return: the input's gradient, if it is needed
        """
        workspace = self.workspace
        for layer in reversed(range(len(self.plan))):
            activation = self.plan[layer]
            if activation is not None:
                own = workspace is not None and layer < len(self.plan) - 1  # autograd may need the one that comes in again
                grad = (activation.backward_ if own else activation.backward)(grad, self.outputs[layer])
            if needed[2 * layer]:
                gradients.weight(2 * layer, grad, self.inputs[layer])
            if needed[2 * layer + 1]:
                gradients.bias(2 * layer + 1, grad)
            if not (x_needed or any(needed[: 2 * layer])):
                return None
            weight = self.weights[layer]
            out = None if workspace is None or layer == 0 else workspace.take((len(grad), weight.shape[1]), grad)
            incoming, grad = grad, mm(grad, weight, out)
            if workspace is not None:
                workspace.give(incoming)
        return grad


class _Node(th.autograd.Function):
    """`run` with a hand-written backward."""

    @staticmethod
    def forward(ctx: Any, module: Fused, plan: Plan, x: th.Tensor, *parameters: th.Tensor) -> th.Tensor:
        ctx.module, ctx.plan, ctx.workspace = module, plan, current()
        outputs = run(plan, x, parameters, keep=True)
        ctx.save_for_backward(x, *outputs, *parameters)
        return outputs[-1]

    @staticmethod
    def backward(ctx: Any, grad: th.Tensor) -> tuple[Any, ...]:
        n, saved = len(ctx.plan), ctx.saved_tensors
        _, _, x_needed, *needed = ctx.needs_input_grad
        sink = Sink(ctx.module, 2 * n)
        run_before = Pass(ctx.plan, ctx.workspace, saved[:n], saved[1 : n + 1], saved[n + 1 :: 2])
        return None, None, run_before.backward(grad, x_needed, needed, sink), *sink.close()
