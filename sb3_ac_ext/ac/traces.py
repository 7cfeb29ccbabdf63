"""
Eligibility traces (Sutton and Barto 2018, section 13.6): for each of N environments an average of gradients.

    z <- gamma lambda z + gradient,  z = 0 at the start of an episode
"""

from collections.abc import Sequence

import torch as th
from torch import nn

Traces = list[th.Tensor]
"""``(N, ...)`` z of each parameter."""


def traces_of(parameters: Sequence[nn.Parameter], n_envs: int, before: Traces | None) -> Traces:
    """
    :param parameters: of a network
    :param n_envs: N
    :param before: its traces, if there are any
    :return: these if they still fit the parameters, and zeros otherwise
    """
    kinds = [((n_envs, *p.shape), p.dtype, p.device) for p in parameters]
    if before is not None and [(z.shape, z.dtype, z.device) for z in before] == kinds:
        return before
    return [th.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in kinds]


def follow(traces: Traces, parameters: Sequence[nn.Parameter], values: th.Tensor, decay: th.Tensor) -> None:
    """
    Take in the gradients of a step.

        z_i <- decay_i z_i + gradient of value_i

    :param traces: z, which are changed
    :param parameters: that they are of; frozen ones have no gradient
    :param values: ``(N,)`` what is differentiated, one number of each environment
    :param decay: ``(N,)`` gamma lambda, 0 at the start of an episode
    """
    trained = [(z, parameter) for z, parameter in zip(traces, parameters, strict=True) if parameter.requires_grad]
    for i, value in enumerate(values):
        gradients = th.autograd.grad(value, [p for _, p in trained], retain_graph=True, allow_unused=True)
        for (z, _), gradient in zip(trained, gradients, strict=True):
            z[i].mul_(decay[i])
            if gradient is not None:
                z[i].add_(gradient)


def along(traces: Traces, parameters: Sequence[nn.Parameter], weights: th.Tensor) -> th.Tensor:
    """
    A function whose gradient is the mean of weighted traces.

        mean w_i z_i . parameters

    :param traces: z
    :param parameters: that they are of
    :param weights: ``(N,)`` w
    :return: ``()``
    """
    means = [th.tensordot(weights / len(weights), z, 1) for z in traces]
    return th.stack([(mean * parameter).sum() for mean, parameter in zip(means, parameters, strict=True)]).sum()
