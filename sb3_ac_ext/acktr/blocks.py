"""The blocks of a Fisher matrix that K-FAC inverts: one for each layer, and one for a Gaussian policy's log std."""

from collections.abc import Mapping
from typing import Any

import torch as th
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sb3_ac_ext.functional import kfac
from sb3_ac_ext.functional.natural_gradient import LOG_STD_FISHER
from sb3_ac_ext.validation import UnsupportedError

MORE_DAMPING = 10.0
"""Factor on the damping of a layer whose factors could not be inverted."""
ATTEMPTS = 8
"""How often it is applied before the layer goes on with the inverses that it has."""

State = dict[str, th.Tensor]
INVERSES = {
    "eigen": ("input_values", "input_vectors", "output_values", "output_vectors"),
    "cholesky": ("input_inverse", "output_inverse"),
}
"""What is in the state of a layer's block for each kind of inversion."""


class LayerCalls(TorchFunctionMode):
    """What linear layers and 2D convolutions get and give in this context, see `of`. Nothing is set up in the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[th.Tensor, list[tuple[th.Tensor, GradientEdge]]] = {}
        """By its weight a layer's calls: inputs ``(N, ...)``, and the place of the output in the graph."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """See PyTorch's ``TorchFunctionMode``."""
        output = func(*args, **(kwargs or {}))
        if func in (F.linear, F.conv2d) and len(args) > 1 and output.requires_grad:
            inputs, weight = args[:2]
            # the place holds if what follows works in place
            self.of.setdefault(weight, []).append((inputs, get_gradient_edge(output)))
        return output


def put(state: State, **values: th.Tensor) -> None:
    """
    :param state: of a block, changed
    :param values: what is written to the memory that is there under these names, or becomes it
    """
    for name, value in values.items():
        if name in state:
            state[name].copy_(value)
        else:
            state[name] = value


class LayerBlock:
    """
    The block of the Fisher matrix that belongs to one layer, whose weight and bias are one matrix ``W`` ``(O, I)``.

    :param layer: linear, or a 2D convolution; see `obstacle`
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        self.layer = layer
        self.parameters = [layer.weight]
        if layer.bias is not None and layer.bias.requires_grad:
            self.parameters.append(layer.bias)
        self._columns = [parameter.numel() // len(parameter) for parameter in self.parameters]

    def zeros(self) -> th.Tensor:
        """``(O, I)``"""
        return self.layer.weight.new_zeros(len(self.layer.weight), sum(self._columns))

    @staticmethod
    def obstacle(module: nn.Module) -> str | None:
        """
        :param module: with trained parameters of its own
        :return: why there are no factors for it; None if there are
        """
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            return "neither linear nor a 2D convolution"
        if {name for name, _ in module.named_parameters(recurse=False)} - {"weight", "bias"}:
            return "parameters besides weight and bias"
        if not module.weight.requires_grad:
            return "its bias is trained and its weight is not"
        if isinstance(module, nn.Conv2d) and module.groups != 1:
            return f"groups={module.groups}"
        if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
            return f"padding={module.padding!r}, padding_mode={module.padding_mode!r}"
        return None

    def factors(self, inputs: th.Tensor, gradient: th.Tensor) -> State:
        """
        :param inputs: ``(N, ...)`` what the layer got
        :param gradient: ``(N, ...)`` derivatives of the log-likelihoods by its output
        :return: ``input_factor`` A ``(I, I)`` and ``output_factor`` S ``(O, O)``
        """
        if isinstance(self.layer, nn.Conv2d):
            conv = self.layer
            inputs = kfac.patches(inputs, conv.kernel_size, conv.stride, conv.padding, conv.dilation)  # type: ignore[arg-type]
            gradient = gradient.flatten(2).transpose(1, 2)
        else:
            inputs, gradient = (x.reshape(len(x), -1, x.shape[-1]) for x in (inputs, gradient))
        inputs = kfac.with_one(inputs) if len(self.parameters) == 2 else inputs
        return {"input_factor": kfac.input_factor(inputs), "output_factor": kfac.output_factor(gradient)}

    def gradient(self) -> th.Tensor:
        """``(O, I)`` derivatives of the loss by W, 0 where there are none."""
        columns = [th.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        return th.cat([column.reshape(len(column), -1) for column in columns], dim=1)

    def parts(self, step: th.Tensor) -> list[th.Tensor]:
        """
        :param step: ``(O, I)`` for W
        :return: the same for each of the parameters
        """
        columns = step.split(self._columns, dim=1)
        return [part.reshape(parameter.shape) for part, parameter in zip(columns, self.parameters, strict=True)]

    def invert(self, state: State, inversion: str, damping: float) -> None:
        """
        Put inverses of the factors into the state. A factor that cannot be factorised gets more damping.

        This looks at values on the device, which the other methods do not.

        :param state: of the block
        :param inversion: "eigen" or "cholesky"
        :param damping: lambda
        """
        a, s = state["input_factor"], state["output_factor"]
        more = damping
        for _ in range(ATTEMPTS):
            inverses = _eigenbases(a, s, more - damping) if inversion == "eigen" else _inverses(a, s, more)
            if inverses is not None:
                put(state, **dict(zip(INVERSES[inversion], inverses, strict=True)))
                break
            more *= MORE_DAMPING
        put(state, trace_ratio=kfac.trace_ratio(a, s), damping=a.new_tensor(more))

    def direction(self, state: State, gradient: th.Tensor, inversion: str) -> th.Tensor:
        """
        :param state: of the block
        :param gradient: ``(O, I)``
        :param inversion: "eigen" or "cholesky"
        :return: ``(O, I)`` the natural gradient; the gradient itself as long as no inversion has succeeded
        """
        if any(name not in state for name in INVERSES[inversion]):
            return gradient
        inverses = [state[name] for name in INVERSES[inversion]]
        if inversion == "cholesky":
            return kfac.precondition(gradient, *inverses)
        a, u_a, s, u_s = inverses
        return kfac.precondition_eigen(gradient, (a, u_a), (s, u_s), state["damping"])

    def quadratic(self, state: State, step: th.Tensor) -> th.Tensor:
        """
        :param state: of the block
        :param step: ``(O, I)``
        :return: ``()`` D^T F D
        """
        return kfac.quadratic_form(step, state["input_factor"], state["output_factor"])


def _eigenbases(a: th.Tensor, s: th.Tensor, shift: float) -> tuple[th.Tensor, ...] | None:
    try:
        return *kfac.eigenbasis(a, shift), *kfac.eigenbasis(s, shift)
    except th.linalg.LinAlgError:
        return None


def _inverses(a: th.Tensor, s: th.Tensor, damping: float) -> tuple[th.Tensor, ...] | None:
    *inverses, good = kfac.cholesky_inverses(a, s, damping)
    return tuple(inverses) if good else None


class LogStdBlock:
    """
    The exact block of the log standard deviation of a Gaussian policy, the same in every state.

    :param log_std: ``(A,)``
    """

    def __init__(self, log_std: nn.Parameter) -> None:
        self.parameters = [log_std]

    def zeros(self) -> th.Tensor:
        """``(A,)``"""
        return th.zeros_like(self.parameters[0]).detach()

    def gradient(self) -> th.Tensor:
        """``(A,)`` derivatives of the loss, which there are."""
        assert self.parameters[0].grad is not None
        return self.parameters[0].grad

    def parts(self, step: th.Tensor) -> list[th.Tensor]:
        """See `LayerBlock.parts`."""
        return [step]

    def invert(self, state: State, inversion: str, damping: float) -> None:
        """See `LayerBlock.invert`."""
        put(state, damping=self.parameters[0].new_tensor(damping))

    def direction(self, state: State, gradient: th.Tensor, inversion: str) -> th.Tensor:
        """See `LayerBlock.direction`."""
        return gradient / (LOG_STD_FISHER + state["damping"])

    def quadratic(self, state: State, step: th.Tensor) -> th.Tensor:
        """See `LayerBlock.quadratic`."""
        return LOG_STD_FISHER * step.square().sum()


Block = LayerBlock | LogStdBlock


def blocks_of(modules: Mapping[str, nn.Module], log_std: nn.Parameter | None = None) -> list[Block]:
    """
    :param modules: networks by the names that messages give them
    :param log_std: ``(A,)`` log standard deviation of a Gaussian policy
    :return: a block for each layer with trained parameters, in their order, and for ``log_std``; a layer that several
        networks share has one
    :raises UnsupportedError: if a module has other trained parameters and there are no factors for it
    """
    found: dict[nn.Module, str] = {}
    for name, network in modules.items():
        for path, module in network.named_modules(prefix=name):
            if any(p.requires_grad and p is not log_std for p in module.parameters(recurse=False)):
                found.setdefault(module, path)
    reasons = {module: LayerBlock.obstacle(module) for module in found}
    refused = [f"{found[m]}, {type(m).__name__} ({reason})" for m, reason in reasons.items() if reason is not None]
    if refused:
        raise UnsupportedError(
            f"K-FAC has factors for linear layers and 2D convolutions of one group with zero padding, got {'; '.join(refused)}"
        )
    layers = [LayerBlock(module) for module in found if isinstance(module, (nn.Linear, nn.Conv2d))]
    return [*layers, *([] if log_std is None else [LogStdBlock(log_std)])]
