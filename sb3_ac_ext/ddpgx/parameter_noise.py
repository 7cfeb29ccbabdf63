"""Exploration by noise on the actor's parameters instead of its actions (Plappert et al. 2018, arXiv:1706.01905)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np
import torch as th
from annotated_types import Ge
from torch import nn
from torch.func import functional_call

from sb3_ac_ext.validation import PositiveInt, check

NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
"""Layers whose parameters stay as they are, as in the authors' program."""


class ParameterNoiseOptions(TypedDict):
    """The argument ``parameter_noise``, see `ParameterNoise`."""

    std: Annotated[float, Ge(1e-9)]
    distance: Annotated[float, Ge(1e-9)]
    coefficient: NotRequired[Annotated[float, Ge(1 + 1e-9)]]
    interval: NotRequired[PositiveInt]


@dataclass(frozen=True)
class ParameterNoise:
    """
    The noise's standard deviation follows from how far the perturbed actor's actions are to be from the actor's.

        theta~ = theta + N(0, sigma^2)                        (a draw for each episode)
        d = sqrt(mean (mu(s) - mu~(s))^2)                     (over a batch from the replay buffer; section 3)
        sigma <- sigma / coefficient if d > distance else sigma * coefficient

    :param std: sigma at the start, in units of the parameters
    :param distance: what d is brought to, in actions scaled to [-1, 1]: action noise of this std explores as much
    :param coefficient: factor of one adaptation, > 1
    :param interval: environment steps (all environments counted together) between adaptations
    """

    std: float
    distance: float
    coefficient: float = 1.01
    interval: int = 50

    @classmethod
    def parse(cls, spec: Any) -> "ParameterNoise":
        """
        :param spec: the constructor argument ``parameter_noise``: a dict with ``std`` and ``distance``, and with
            ``coefficient`` and ``interval`` where they differ from their defaults
        :raises TypeError: if it is not a dict, has an unknown key or a value of the wrong type
        :raises ValueError: if a key is missing or a value is out of range
        """
        check("parameter_noise", spec, ParameterNoiseOptions)
        return cls(**spec)

    def adapted(self, std: float, distance: float) -> float:
        """
        :param std: sigma
        :param distance: d, which it led to
        :return: the next sigma
        """
        return std / self.coefficient if distance > self.distance else std * self.coefficient


def perturbed_parameters(actor: nn.Module, std: float) -> dict[str, th.Tensor]:
    """
    :param actor: the actor
    :param std: sigma
    :return: a draw of its parameters by their names, without those of the normalisations
    """
    kept = {
        id(parameter) for module in actor.modules() if isinstance(module, NORMALISATIONS) for parameter in module.parameters()
    }
    return {
        name: parameter.detach() + std * th.randn_like(parameter)
        for name, parameter in actor.named_parameters()
        if id(parameter) not in kept
    }


def action_distance(actor: nn.Module, observations: Any, std: float) -> float:
    """
    :param actor: the actor
    :param observations: ``(B, ...)`` a batch
    :param std: sigma of a new draw
    :return: d, the root mean square of the difference that the draw makes to an action's component
    """
    with th.no_grad():
        perturbed = functional_call(actor, perturbed_parameters(actor, std), observations)
        return float((actor(observations) - perturbed).square().mean().sqrt())


class PerturbedActors:
    """The actor with other parameters in each environment; they are drawn when an episode starts and kept until it ends."""

    def __init__(self) -> None:
        self._parameters: dict[int, dict[str, th.Tensor]] = {}

    def act(self, actor: nn.Module, observations: Any, starts: Sequence[bool] | np.ndarray, std: float) -> np.ndarray:
        """
        :param actor: the actor, from whose present parameters a draw is made
        :param observations: ``(N, ...)`` one for each environment, tensor or dict of tensors
        :param starts: ``(N,)`` whether it is the first one of an episode
        :param std: sigma of a draw
        :return: ``(N, A)`` actions in [-1, 1]
        """
        actions = []
        with th.no_grad():
            for i, start in enumerate(starts):
                if start or i not in self._parameters:
                    self._parameters[i] = perturbed_parameters(actor, std)
                row: Any = slice(i, i + 1)
                one = {k: v[row] for k, v in observations.items()} if isinstance(observations, dict) else observations[row]
                actions.append(functional_call(actor, self._parameters[i], one))
        return th.cat(actions).cpu().numpy()
