"""Several MLPs of one shape, on one input or each on its own, as one: a batched product in place of one for each."""

from collections.abc import Sequence
from typing import Any

import torch as th

from sb3_ac_ext.legacy.fused_mlp import FusedMLP, Layers, Pass, Sink, run
from sb3_ac_ext.legacy.workspace import current


def side_by_side(mlps: Sequence[FusedMLP], x: th.Tensor) -> tuple[th.Tensor, ...]:
    """
    The outputs of several MLPs.

    They run as one node with batched products if they are alike and their parameters lie at equal distances in memory,
    as those of one flat optimizer do; one after another otherwise. Results and gradients are the same up to rounding.

    :param mlps: K of them
    :param x: ``(B, inputs)`` for all, or ``(K, B, inputs)`` one for each
    :return: ``(B, outputs)`` of each
    """
    traced = th.jit.is_tracing() or th.compiler.is_compiling()
    stack = None if traced or len(mlps) == 1 else Stack.of(mlps)
    if stack is None or x.dim() not in (2, 3) or x.dtype != stack.parameters[0].dtype:
        return tuple(mlp(own) for mlp, own in zip(mlps, x if x.dim() == 3 else [x] * len(mlps), strict=True))
    if th.is_grad_enabled():
        every = [parameter for layers in stack.layers for parameter in layers.parameters()]
        outputs: tuple[th.Tensor, ...] = _StackNode.apply(stack, x, *every)  # type: ignore[no-untyped-call]  # torch's
        return outputs
    return run(stack.layers[0].plan, stack.repeat(x), stack.parameters)[-1].unbind()


class Stack:
    """MLPs that can run as one, with views of their parameters: weights ``(K, out, in)``, biases ``(K, 1, out)``."""

    def __init__(self, mlps: Sequence[FusedMLP], layers: list[Layers], parameters: list[th.Tensor]) -> None:
        self.mlps = mlps
        self.layers = layers
        self.parameters = parameters
        self._pointers = _pointers(layers)

    @staticmethod
    def of(mlps: Sequence[FusedMLP]) -> "Stack | None":
        """
        :param mlps: the MLPs
        :return: their stack, looked for again only if a module or the memory of a parameter has changed; None if they
            cannot run as one
        """
        layers = [mlp.layers() for mlp in mlps]
        name = f"_known_stack_of_{len(mlps)}"
        known: Stack | None = mlps[0].__dict__.get(name)
        if known is not None and known.layers == layers and known._pointers == _pointers(known.layers):
            return known
        stack = None
        found = [one for one in layers if one is not None]
        if len(found) == len(layers) and all(one.plan == found[0].plan for one in found):
            views = [stacked(tensors) for tensors in zip(*(one.parameters() for one in found), strict=True)]
            parameters = [view if view.dim() == 3 else view.unsqueeze(1) for view in views if view is not None]
            if len(parameters) == len(views):
                stack = Stack(mlps, found, parameters)
        mlps[0].__dict__[name] = stack
        return stack

    def repeat(self, x: th.Tensor) -> th.Tensor:
        """``x`` for each of the MLPs, ``(K, B, inputs)``, without a copy."""
        return x if x.dim() == 3 else x.expand(len(self.mlps), *x.shape)


def _pointers(layers: Sequence[Layers]) -> list[int]:
    return [parameter.data_ptr() for one in layers for parameter in one.parameters()]


def stacked(tensors: Sequence[th.Tensor]) -> th.Tensor | None:
    """
    :param tensors: K of them
    :return: ``(K, ...)`` one view of all; None if they do not lie at equal distances in one piece of memory
    """
    first, distance = tensors[0], tensors[1].storage_offset() - tensors[0].storage_offset()
    storage = first.untyped_storage().data_ptr()
    for k, tensor in enumerate(tensors):
        alike = tensor.shape == first.shape and tensor.dtype == first.dtype and tensor.is_contiguous()
        placed = tensor.untyped_storage().data_ptr() == storage
        if not (alike and placed and distance > 0 and tensor.storage_offset() == first.storage_offset() + k * distance):
            return None
    return first.detach().as_strided((len(tensors), *first.shape), (distance, *first.stride()), first.storage_offset())


class _Sinks:
    """The gradients of a stack, each to its MLP's sink."""

    def __init__(self, sinks: list[Sink]) -> None:
        self.sinks = sinks

    def weight(self, index: int, grad: th.Tensor, layer_input: th.Tensor) -> None:
        for k, sink in enumerate(self.sinks):
            sink.weight(index, grad[k], layer_input[k])

    def bias(self, index: int, grad: th.Tensor) -> None:
        for k, sink in enumerate(self.sinks):
            sink.bias(index, grad[k])


class _StackNode(th.autograd.Function):
    """`run` of a stack with a hand-written backward."""

    @staticmethod
    def forward(ctx: Any, stack: Stack, x: th.Tensor, *parameters: th.Tensor) -> tuple[th.Tensor, ...]:
        ctx.stack, ctx.workspace = stack, current()
        ctx.set_materialize_grads(False)
        outputs = run(stack.layers[0].plan, stack.repeat(x), stack.parameters, keep=True)
        ctx.save_for_backward(x, *outputs)
        return outputs[-1].unbind()

    @staticmethod
    def backward(ctx: Any, *grads: th.Tensor | None) -> tuple[Any, ...]:
        stack, (x, *outputs) = ctx.stack, ctx.saved_tensors
        plan, weights = stack.layers[0].plan, stack.parameters[::2]
        size = len(stack.parameters)
        _, x_needed, *every = ctx.needs_input_grad
        needed = [every[k * size : (k + 1) * size] for k in range(len(grads))]
        sinks = [Sink(mlp, size) for mlp in stack.mlps]
        given = [grad for grad in grads if grad is not None]
        if len(given) == len(grads) and all(own == needed[0] for own in needed):
            run_before = Pass(plan, ctx.workspace, [stack.repeat(x), *outputs[:-1]], outputs, weights)
            x_grad = run_before.backward(th.stack(given), x_needed, needed[0], _Sinks(sinks))
            x_grad = x_grad if x_grad is None or x.dim() == 3 else x_grad.sum(dim=0)
        else:  # a loss that does not depend on all of them leaves the others without gradients
            x_grad = th.zeros_like(x) if x_needed else None
            for k, grad in enumerate(grads):
                if grad is not None:
                    own = [output[k] for output in outputs]
                    run_before = Pass(plan, None, [stack.repeat(x)[k], *own[:-1]], own, [weight[k] for weight in weights])
                    part = run_before.backward(grad, x_needed, needed[k], sinks[k])
                    if x_grad is not None and part is not None:
                        (x_grad[k] if x.dim() == 3 else x_grad).add_(part)
        returned = [sink.close() if grad is not None else sink.returned for sink, grad in zip(sinks, grads, strict=True)]
        return None, x_grad, *(gradient for own in returned for gradient in own)
