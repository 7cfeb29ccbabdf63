"""Eligibility traces of a network's parameters."""

from collections.abc import Sequence

import torch as th
from torch import nn


class Traces:
    """
    For each of N environments an average of the gradients on its way so far (Sutton and Barto 2018, section 13.6).

        z <- gamma lambda z + gradient,  z = 0 at the start of an episode

    :param parameters: of the network
    :param n_envs: N
    """

    def __init__(self, parameters: Sequence[nn.Parameter], n_envs: int) -> None:
        self.parameters = parameters
        self._sizes = [parameter.numel() for parameter in parameters]
        self.values = parameters[0].detach().new_zeros(n_envs, sum(self._sizes))  # (N, P)

    def gradient(self) -> th.Tensor:
        """``(P,)`` what the last backward pass left in the parameters."""
        return th.cat([(th.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in self.parameters])

    def follow(self, env: int, decay: float, weight: float = 1.0) -> None:
        """
        Take in what the last backward pass left.

        :param env: the environment that it was for
        :param decay: gamma lambda, 0 at the start of an episode
        :param weight: of the gradient
        """
        self.values[env].mul_(decay).add_(self.gradient(), alpha=weight)

    def apply(self, slopes: th.Tensor, more: th.Tensor | float = 0.0) -> None:
        """
        Leave the gradient of a loss in the parameters, as a backward pass would.

        :param slopes: ``(N,)`` weight of each environment's trace
        :param more: ``(P,)`` gradient of what has no traces
        """
        gradient = slopes.to(self.values) @ self.values + more
        for parameter, part in zip(self.parameters, gradient.split(self._sizes), strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(part.view_as(parameter))
