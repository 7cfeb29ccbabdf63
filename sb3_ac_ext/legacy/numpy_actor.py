"""Acting on a CPU without PyTorch's cost per call: the actor's layers on numpy views of its weights."""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.sac.policies import LOG_STD_MAX, LOG_STD_MIN

from sb3_ac_ext.legacy.fused_mlp import FusedLinear, FusedMLP
from sb3_ac_ext.legacy.numpy_layers import NumpyLayers

GAUSSIAN = ("latent_pi", "mu", "log_std")
"""The networks of an actor with a squashed Gaussian: the hidden layers, mean and logarithm of the standard deviation."""

METHODS = frozenset(
    {"predict", "_predict", "forward", "extract_features", "obs_to_tensor", "unscale_action"}
    | {"get_action_dist_params", "actions_from_params", "proba_distribution", "get_actions", "sample", "mode"}
)
"""What somebody may have replaced on an instance."""


def networks(actor: Any) -> dict[str, Any]:
    """
    :param actor: an actor of SB3's TD3 or SAC
    :return: by their names what it puts features through
    """
    names = GAUSSIAN if hasattr(actor, "latent_pi") else ("mu",)
    return {name: getattr(actor, name) for name in names}


def obstacle(policy: BasePolicy, policies: Collection[type[BasePolicy]], actor_class: type[BasePolicy]) -> str | None:
    """
    :param policy: the policy that would act
    :param policies: classes whose ``predict`` is the actor's action, unscaled
    :param actor_class: class whose ``forward`` puts the features through the MLP ``mu``, or through ``latent_pi`` and a
        squashed Gaussian of ``mu`` and ``log_std``
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
    if getattr(actor, "use_sde", False):
        return "gSDE"
    distribution = getattr(actor, "action_dist", None)
    if type(distribution) not in (SquashedDiagGaussianDistribution, type(None)):
        return f"the distribution is a {type(distribution).__name__}"
    for network in networks(actor).values():
        if (reason := _obstacle_in(network)) is not None:
            return reason
    modules = (policy, actor, extractor, extractor.flatten)
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return "a hook on the policy"
    if any(METHODS & vars(owner).keys() for owner in (*modules[:3], distribution) if owner is not None):
        return "a method of the policy was replaced"
    return None


def _obstacle_in(network: Any) -> str | None:
    if type(network) not in (FusedMLP, FusedLinear) or network.obstacle is not None:
        return f"the actor's layers: {getattr(network, 'obstacle', type(network).__name__)}"
    weight = next(network.parameters())
    if weight.device.type != "cpu" or weight.dtype != th.float32:
        return f"the weights are {weight.dtype} on {weight.device}"
    return None


class NumpyActor:
    """
    An actor on a flat observation, evaluated by numpy: an MLP that ends in the action, or one with a squashed Gaussian.

    :param policy: a policy for which there is no `obstacle`
    """

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self._actor = actor = policy.actor
        self._parts = {name: NumpyLayers(network) for name, network in networks(actor).items()}
        self._distribution = getattr(actor, "action_dist", None)
        modules = (policy, actor, actor.features_extractor, actor.features_extractor.flatten)
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._replaceable = [vars(owner) for owner in (*modules[:3], self._distribution) if owner is not None]
        self._shape = policy.observation_space.shape
        space = policy.action_space
        self._action_shape, self._low, self._range = space.shape, space.low, space.high - space.low

    def is_current(self) -> bool:
        """Whether nothing has happened since that would ask for another `obstacle` check: new memory, hooks, methods."""
        return (
            self.policy._modules["actor"] is self._actor
            and getattr(self._actor, "action_dist", None) is self._distribution
            and all(self._actor._modules[name] is part.fused[0] and part.is_current() for name, part in self._parts.items())
            and not any(self._hooks)
            and all(METHODS.isdisjoint(names) for names in self._replaceable)
        )

    def __call__(self, observation: Any, deterministic: bool = False) -> np.ndarray | None:
        """
        :param observation: one observation, or a batch of one. Larger batches are for PyTorch: numpy's BLAS would start
            threads of its own for them, which go on spinning beside PyTorch's (updates took 2.5 times as long)
        :param deterministic: whether a stochastic actor gives its mode; its noise comes from PyTorch's generator
        :return: its action or a batch of one, in the environment's range; None if this input is for the ordinary path
        """
        if type(observation) is not np.ndarray:
            return None
        single = observation.shape == self._shape
        if not single and observation.shape != (1, *self._shape):
            return None
        x = self._act(observation.astype(np.float32).reshape(1, -1), deterministic)
        actions: np.ndarray = self._low + 0.5 * (x.reshape(1, *self._action_shape) + 1.0) * self._range
        return actions[0] if single else actions

    def _act(self, features: np.ndarray, deterministic: bool) -> np.ndarray:
        """From ``(1, features)`` to ``(1, A)`` action in [-1, 1]."""
        if "latent_pi" not in self._parts:
            return self._parts["mu"](features)
        latent = self._parts["latent_pi"](features)
        u = self._parts["mu"](latent)
        if not deterministic:
            std = np.exp(self._parts["log_std"](latent).clip(LOG_STD_MIN, LOG_STD_MAX))
            u += std * th.empty(u.shape).normal_().numpy()
        squashed: np.ndarray = np.tanh(u, out=u)
        return squashed
