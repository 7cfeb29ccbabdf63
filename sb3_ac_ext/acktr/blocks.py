"""The blocks of a Fisher matrix that K-FAC inverts: one for each layer, and one for a Gaussian policy's log std."""

from collections.abc import Mapping
from typing import Any

import torch as th
from torch import nn

from sb3_ac_ext.functional import kfac
from sb3_ac_ext.validation import UnsupportedError

MORE_DAMPING = 10.0
"""Factor on the damping of a layer whose factors could not be inverted."""
ATTEMPTS = 8
"""How often it is applied before the layer goes on with the inverses that it has."""

State = dict[str, Any]


class LayerBlock:
    """
    The block of the Fisher matrix that belongs to one layer, whose weight and bias are one matrix ``W`` ``(O, I)``.

    :param layer: linear, or a 2D convolution; see `obstacle`
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        self.layer = layer
        self.parameters = [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]
        if not self.parameters[-1].requires_grad:
            del self.parameters[-1]

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

    def by_position(self, inputs: th.Tensor, gradient: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param inputs: ``(N, ...)`` what the layer got
        :param gradient: ``(N, ...)`` derivatives by its output
        :return: ``(N, T, I)`` and ``(N, T, O)``
        """
        if isinstance(self.layer, nn.Conv2d):
            conv = self.layer
            inputs = kfac.patches(inputs, conv.kernel_size, conv.stride, conv.padding, conv.dilation)  # type: ignore[arg-type]
            gradient = gradient.flatten(2).transpose(1, 2)
        else:
            inputs, gradient = (x.reshape(len(x), -1, x.shape[-1]) for x in (inputs, gradient))
        return kfac.with_one(inputs) if len(self.parameters) == 2 else inputs, gradient

    def gradient(self) -> th.Tensor | None:
        """``(O, I)`` derivatives of the loss by W; None if the loss does not depend on it."""
        if self.parameters[0].grad is None:
            return None
        columns = [
            th.zeros_like(parameter).view(len(parameter), -1)
            if parameter.grad is None
            else parameter.grad.reshape(len(parameter), -1)
            for parameter in self.parameters
        ]
        return th.cat(columns, dim=1)

    def move(self, step: th.Tensor) -> None:
        """
        :param step: ``(O, I)`` what is added to W
        """
        weight = self.parameters[0]
        if len(self.parameters) == 2:
            self.parameters[1].add_(step[:, -1])
            step = step[:, :-1]
        weight.add_(step.reshape(weight.shape))

    def invert(self, state: State, inversion: str, damping: float) -> None:
        """
        Put inverses of the factors into the state. A factor that cannot be factorised gets more damping.

        This looks at values on the device, which the other methods do not.

        :param state: of the block
        :param inversion: "eigen" or "cholesky"
        :param damping: lambda
        """
        a, s = state["input_factor"], state["output_factor"]
        state["trace_ratio"] = kfac.trace_ratio(a, s)
        more = damping
        for _ in range(ATTEMPTS):
            inverses = self._eigenbases(a, s, more - damping) if inversion == "eigen" else self._inverses(a, s, more)
            if inverses is not None:
                state.update(inverses)
                break
            more *= MORE_DAMPING
        state["damping"] = a.new_tensor(more)

    @staticmethod
    def _eigenbases(a: th.Tensor, s: th.Tensor, shift: float) -> State | None:
        names = ("input_values", "input_vectors", "output_values", "output_vectors")
        try:
            return dict(zip(names, (*kfac.eigenbasis(a, shift), *kfac.eigenbasis(s, shift)), strict=True))
        except th.linalg.LinAlgError:
            return None

    @staticmethod
    def _inverses(a: th.Tensor, s: th.Tensor, damping: float) -> State | None:
        a_inverse, s_inverse, good = kfac.cholesky_inverses(a, s, damping)
        return {"input_inverse": a_inverse, "output_inverse": s_inverse} if bool(good) else None

    def direction(self, state: State, gradient: th.Tensor, inversion: str) -> th.Tensor:
        """
        :param state: of the block
        :param gradient: ``(O, I)``
        :param inversion: "eigen" or "cholesky"
        :return: ``(O, I)`` the natural gradient; the gradient itself as long as no inversion has succeeded
        """
        if inversion == "cholesky" and "input_inverse" in state:
            return kfac.precondition(gradient, state["input_inverse"], state["output_inverse"])
        if inversion == "eigen" and "input_values" in state:
            a_basis = state["input_values"], state["input_vectors"]
            s_basis = state["output_values"], state["output_vectors"]
            return kfac.precondition_eigen(gradient, a_basis, s_basis, state["damping"])
        return gradient

    def quadratic(self, state: State, step: th.Tensor) -> th.Tensor:
        """
        :param state: of the block
        :param step: ``(O, I)``
        :return: ``()`` D^T F D
        """
        return kfac.quadratic_form(step, state["input_factor"], state["output_factor"])


class LogStdBlock:
    """
    The exact block of the log standard deviation of a Gaussian policy, the same in every state.

    :param log_std: ``(A,)``
    """

    def __init__(self, log_std: nn.Parameter) -> None:
        self.parameters = [log_std]

    def gradient(self) -> th.Tensor | None:
        """``(A,)`` derivatives of the loss; None if it does not depend on the parameter."""
        return self.parameters[0].grad

    def move(self, step: th.Tensor) -> None:
        """
        :param step: ``(A,)`` what is added
        """
        self.parameters[0].add_(step)

    def invert(self, state: State, inversion: str, damping: float) -> None:
        """See `LayerBlock.invert`."""
        state["damping"] = self.parameters[0].new_tensor(damping)

    def direction(self, state: State, gradient: th.Tensor, inversion: str) -> th.Tensor:
        """See `LayerBlock.direction`."""
        return gradient / (kfac.LOG_STD_FISHER + state["damping"])

    def quadratic(self, state: State, step: th.Tensor) -> th.Tensor:
        """See `LayerBlock.quadratic`."""
        return kfac.LOG_STD_FISHER * step.square().sum()


Block = LayerBlock | LogStdBlock


def blocks_of(modules: Mapping[str, nn.Module]) -> list[LayerBlock]:
    """
    :param modules: networks by the names that messages give them
    :return: a block for each layer with trained parameters, in their order; a layer that several share has one
    :raises UnsupportedError: if a module has trained parameters and there are no factors for it
    """
    found: dict[nn.Module, str] = {}
    for name, network in modules.items():
        for path, module in network.named_modules(prefix=name):
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                found.setdefault(module, path)
    reasons = {module: LayerBlock.obstacle(module) for module in found}
    refused = [f"{found[m]}, {type(m).__name__} ({reason})" for m, reason in reasons.items() if reason is not None]
    if refused:
        raise UnsupportedError(
            f"K-FAC has factors for linear layers and 2D convolutions of one group with zero padding, got {'; '.join(refused)}"
        )
    return [LayerBlock(module) for module in found if isinstance(module, (nn.Linear, nn.Conv2d))]
