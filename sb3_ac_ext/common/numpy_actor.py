"""Acting on a CPU without PyTorch's cost per call: the actor's layers on numpy views of its weights."""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_ac_ext.common.fused_mlp import FusedMLP

Function = Callable[[np.ndarray], np.ndarray]


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


ACTIVATIONS: dict[type[nn.Module], Function] = {nn.ReLU: _relu, nn.Tanh: _tanh, nn.Sigmoid: _sigmoid, nn.ELU: _elu}
"""The activations that `FusedMLP` knows; in place where numpy can."""

METHODS = frozenset({"predict", "_predict", "forward", "extract_features", "obs_to_tensor", "unscale_action"})
"""What somebody may have replaced on an instance."""


def obstacle(policy: BasePolicy, policies: Collection[type[BasePolicy]], actor_class: type[BasePolicy]) -> str | None:
    """
    :param policy: the policy that would act
    :param policies: classes whose ``predict`` is the actor's action, unscaled
    :param actor_class: class whose ``forward`` is the MLP ``mu`` on the features
    :return: why numpy cannot act for the policy; None if it can
    """
    if type(policy) not in policies:
        return f"the policy is a {type(policy).__name__}"
    actor: Any = policy.actor
    extractor = actor.features_extractor
    if type(actor) is not actor_class or type(extractor) is not FlattenExtractor:
        return f"the actor is a {type(actor).__name__} with a {type(extractor).__name__}"
    space = policy.observation_space
    if not isinstance(space, spaces.Box) or is_image_space(space):
        return f"observations are {space}"
    if type(actor.mu) is not FusedMLP or actor.mu.obstacle is not None:
        return f"the actor's layers: {getattr(actor.mu, 'obstacle', type(actor.mu).__name__)}"
    weight = next(actor.mu.parameters())
    if weight.device.type != "cpu" or weight.dtype != th.float32:
        return f"the weights are {weight.dtype} on {weight.device}"
    if any(module._forward_hooks or module._forward_pre_hooks for module in (policy, actor, extractor, extractor.flatten)):
        return "a hook on the policy"
    if any(METHODS & vars(module).keys() for module in (policy, actor, extractor)):
        return "a method of the policy was replaced"
    return None


class NumpyActor:
    """
    A deterministic actor, an MLP on a flat observation, evaluated by numpy.

    The weights are views of the parameters' memory, so an update is seen at once.

    :param policy: a policy for which there is no `obstacle`
    """

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self._actor, self._mlp = policy.actor, policy.actor.mu
        self._layer_modules = list(self._mlp)
        modules = [policy, self._actor, self._actor.features_extractor, self._actor.features_extractor.flatten, self._mlp]
        self._hooks = [h for m in (*modules, *self._mlp) for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._replaceable = [vars(module) for module in modules[:3]]
        places = [(module._parameters, name) for module in self._mlp for name in module._parameters]
        self._places = [(parameters, name, parameters[name].data_ptr()) for parameters, name in places]
        views = [parameter.detach().numpy() for parameter in self._mlp.parameters()]
        mlp = self._layer_modules
        linear = zip(views[::2], views[1::2], strict=True)
        following = [type(after) for layer, after in zip(mlp, [*mlp, None][1:], strict=True) if type(layer) is nn.Linear]
        self._layers = [(w.T, b, ACTIVATIONS.get(after)) for (w, b), after in zip(linear, following, strict=True)]
        self._shape = policy.observation_space.shape
        space = policy.action_space
        self._action_shape, self._low, self._range = space.shape, space.low, space.high - space.low

    def is_current(self) -> bool:
        """Whether nothing has happened since that would ask for another `obstacle` check: new memory, hooks, methods."""
        return (
            self.policy._modules["actor"] is self._actor
            and self._actor._modules["mu"] is self._mlp
            and list(self._mlp._modules.values()) == self._layer_modules
            and all(parameters[name].data_ptr() == pointer for parameters, name, pointer in self._places)
            and not any(self._hooks)
            and all(METHODS.isdisjoint(names) for names in self._replaceable)
        )

    def __call__(self, observation: Any) -> np.ndarray | None:
        """
        :param observation: one observation, or a batch of one. Larger batches are for PyTorch: numpy's BLAS would start
            threads of its own for them, which go on spinning beside PyTorch's (updates took 2.5 times as long)
        :return: its action or a batch of one, in the environment's range; None if this input is for the ordinary path
        """
        if type(observation) is not np.ndarray:
            return None
        single = observation.shape == self._shape
        if not single and observation.shape != (1, *self._shape):
            return None
        x = observation.astype(np.float32).reshape(1, -1)
        for weight, bias, activation in self._layers:
            x = x @ weight
            x += bias
            if activation is not None:
                x = activation(x)
        actions: np.ndarray = self._low + 0.5 * (x.reshape(1, *self._action_shape) + 1.0) * self._range
        return actions[0] if single else actions
