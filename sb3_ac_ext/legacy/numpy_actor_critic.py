"""An actor-critic of small networks on flat observations, evaluated, differentiated and sampled by numpy."""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import StateDependentNoiseDistribution
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn

from sb3_ac_ext.legacy.action_distributions import Parameters
from sb3_ac_ext.legacy.actor_critic import PARTS, MlpPolicy, pieces_of
from sb3_ac_ext.legacy.descent import Descent, FlatAdam, hooked
from sb3_ac_ext.legacy.flat_tensor import FlatTensor
from sb3_ac_ext.legacy.fused_mlp import FusedLinear, FusedMLP
from sb3_ac_ext.legacy.natural_gradient import unflatten
from sb3_ac_ext.legacy.numpy_heads import HEADS
from sb3_ac_ext.legacy.numpy_layers import NumpyLayers


def obstacle(policy: Any) -> str | None:
    """
    :param policy: the policy of an on-policy algorithm
    :return: why numpy cannot evaluate it; None if it can
    """
    if type(policy) is not MlpPolicy:
        return f"the policy is a {type(policy).__name__}"
    reasons = (_obstacle_in_front(policy), _obstacle_in_layers(policy), _obstacle_in_distribution(policy.action_dist))
    return next((reason for reason in reasons if reason is not None), None)


def _obstacle_in_front(policy: Any) -> str | None:
    """Of observations, features, and whatever somebody has hooked or replaced."""
    for extractor in _extractors(policy):
        if type(extractor) is not FlattenExtractor:
            return f"the features extractor is a {type(extractor).__name__}"
    space = policy.observation_space
    if not isinstance(space, spaces.Box) or is_image_space(space):
        return f"observations are {space}"
    modules = _modules(policy)
    if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
        return "a hook on the policy"
    if hooked(policy.parameters()):
        return "a hook on a parameter"
    if any(METHODS & vars(owner).keys() for owner in (*modules, policy.action_dist)):
        return "a method of the policy was replaced"
    return None


def _obstacle_in_layers(policy: Any) -> str | None:
    if type(policy.mlp_extractor) is not MlpExtractor:
        return f"the layers are in a {type(policy.mlp_extractor).__name__}"
    for network in _networks(policy):
        if type(network) not in (FusedMLP, FusedLinear) or network.obstacle is not None:
            return f"the layers: {getattr(network, 'obstacle', type(network).__name__)}"
        if next(network.parameters()).device.type != "cpu":
            return f"the weights are on {next(network.parameters()).device}"
    return None


def _obstacle_in_distribution(distribution: Any) -> str | None:
    if type(distribution) not in HEADS:
        return f"the distribution is a {type(distribution).__name__}"
    if type(distribution) is StateDependentNoiseDistribution:
        options = [name for name in ("bijector", "use_expln", "learn_features") if getattr(distribution, name)]
        if options:
            return f"gSDE with {', '.join(options)}"
    return None


def _extractors(policy: Any) -> tuple[Any, ...]:
    return policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor


def _modules(policy: Any) -> tuple[Any, ...]:
    """What computes something besides the layers."""
    extractors = _extractors(policy)
    return policy, policy.mlp_extractor, *extractors, *(extractor.flatten for extractor in extractors)


METHODS = frozenset(
    {"predict", "_predict", "forward", "extract_features", "obs_to_tensor", "unscale_action", "evaluate_actions"}
    | {"get_distribution", "predict_values", "_get_action_dist_from_latent", "forward_actor", "forward_critic"}
    | {"proba_distribution", "log_prob", "entropy", "sample", "mode", "get_actions", "get_noise", "get_std"}
)
"""What somebody may have replaced on an instance."""


def _networks(policy: Any) -> tuple[Any, Any, Any, Any]:
    return policy.mlp_extractor.policy_net, policy.action_net, policy.mlp_extractor.value_net, policy.value_net


class NumpyActorCritic:
    """
    A policy of small networks on flat observations, by numpy.

    :param policy: a policy for which there is no `obstacle`
    """

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.dtype = policy.action_net.weight.detach().numpy().dtype
        self._networks = _networks(policy)
        self.policy_layers = NumpyLayers(*self._networks[:2])
        self.value_layers = NumpyLayers(*self._networks[2:])
        self.head = HEADS[type(policy.action_dist)](policy)
        self._distribution = policy.action_dist
        modules = _modules(policy)
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._replaceable = [vars(owner) for owner in (*modules, policy.action_dist)]
        self.gradients: dict[int, np.ndarray] = {}

    def is_current(self) -> bool:
        """Whether nothing has happened since that would ask for another `obstacle` check: new memory, hooks, methods."""
        policy = self.policy
        return (
            policy.action_dist is self._distribution
            and all(own is now for own, now in zip(self._networks, _networks(policy), strict=True))
            and self.policy_layers.is_current()
            and self.value_layers.is_current()
            and self.head.is_current()
            and not any(self._hooks)
            and all(METHODS.isdisjoint(names) for names in self._replaceable)
        )

    def __call__(self, observation: Any, deterministic: bool = False) -> np.ndarray | None:
        """
        :param observation: one observation or a batch
        :param deterministic: whether the mode is taken
        :return: action or actions as the environment takes them; None if this input is for the ordinary path
        """
        shape = self.policy.observation_space.shape
        if type(observation) is not np.ndarray or observation.shape[-len(shape) :] != shape:
            return None
        if observation.ndim not in (len(shape), len(shape) + 1):
            return None
        single = observation.ndim == len(shape)
        actions = self.act(observation[None] if single else observation, deterministic)
        space = self.policy.action_space
        if isinstance(space, spaces.Box):
            actions = np.clip(actions, space.low, space.high)
        return actions.squeeze(axis=0) if single else actions

    def array(self, values: Any) -> np.ndarray:
        return np.ascontiguousarray(values)

    def features(self, obs: np.ndarray) -> np.ndarray:
        """``(B, features)`` what the first layers take."""
        return obs.reshape(len(obs), -1).astype(self.dtype, copy=False)

    def act(self, obs: np.ndarray, deterministic: bool = False) -> np.ndarray:
        *_, latent, outputs = self.policy_layers.outputs(self.features(obs))
        actions: np.ndarray = self.head.act(latent, outputs, deterministic)
        return actions

    def values(self, obs: np.ndarray) -> np.ndarray:
        return np.concatenate([self.value_layers(self.features(part))[:, 0] for part in pieces_of(obs)])

    def evaluate(self, obs: np.ndarray, actions: np.ndarray, parts: Collection[str] = PARTS) -> "NumpyEvaluation":
        return NumpyEvaluation(self, self.features(obs), actions.reshape(len(actions), -1), parts)

    def describe(self, obs: np.ndarray) -> np.ndarray:
        parts = []
        for part in pieces_of(obs):
            *_, latent, outputs = self.policy_layers.outputs(self.features(part))
            outputs, log_std = self.head.parameters(latent, outputs)
            parts.append(outputs if log_std is None else np.concatenate([outputs, log_std + 0 * outputs], axis=1))
        return np.concatenate(parts)

    def receive(self, descents: Iterable[Descent]) -> None:
        self.gradients = {}
        for descent in descents:
            flat = isinstance(descent, FlatAdam)
            views = descent.gradient.views if flat else [th.zeros_like(parameter) for parameter in descent.parameters]  # type: ignore[attr-defined]
            for parameter, view in zip(descent.parameters, views, strict=True):
                parameter.grad = view if parameter.requires_grad else None
                self.gradients[id(parameter)] = view.numpy()

    def places(self, parameters: Sequence[nn.Parameter]) -> list[np.ndarray]:
        """Where the gradients of ``parameters`` go; to nobody where no optimizer has one."""
        own = self.gradients
        return [own[id(p)] if id(p) in own else np.empty_like(p.detach().numpy()) for p in parameters]


Places = Callable[[Sequence[nn.Parameter]], list[np.ndarray]]
"""Where numbers that belong to parameters are."""


def _places_in(tensors: Sequence[th.Tensor], parameters: Sequence[nn.Parameter]) -> Places:
    """The places in ``tensors``, one for each of ``parameters``; for all others some that nobody else sees."""
    own = {id(parameter): tensor for parameter, tensor in zip(parameters, tensors, strict=True)}
    return lambda wanted: [own[id(p)].numpy() if id(p) in own else th.zeros_like(p).numpy() for p in wanted]


class NumpyEvaluation:
    """See `Evaluation`."""

    log_prob: Any = None
    entropy: Any = None
    values: Any = None

    def __init__(self, owner: NumpyActorCritic, x: np.ndarray, actions: np.ndarray, parts: Collection[str]) -> None:
        self._owner, self._x, self._actions = owner, x, actions
        if "policy" in parts:
            head = owner.head
            self._policy = owner.policy_layers.outputs(x)
            self._parameters = head.parameters(*self._policy[-2:])
            self.log_prob = head.distribution.log_prob(self._parameters, actions)
            self.entropy = head.distribution.entropy(self._parameters)
        if "value" in parts:
            self._value = owner.value_layers.outputs(x)
            self.values = self._value[-1][:, 0]

    def _old(self, rows: np.ndarray) -> Parameters:
        size = self._parameters.outputs.shape[1]
        return Parameters(rows[:, :size], rows[:, size:])

    def kl(self, old: np.ndarray, reverse: bool = False) -> np.ndarray:
        pair = (self._old(old), self._parameters)
        result: np.ndarray = self._owner.head.distribution.kl(*pair[:: -1 if reverse else 1])
        return result

    def backward(
        self, log_prob: Any = None, entropy: Any = None, values: Any = None, kl: tuple[Any, Any] | None = None
    ) -> None:
        owner = self._owner
        slopes = self._slopes(log_prob, entropy, kl)
        if slopes:
            self._into_policy(slopes, owner.places)
        if values is not None:
            layers = owner.value_layers
            layers.backward(self._x, self._value, values[:, None], owner.places(layers.parameters()))

    def gradient(self, parameters: Sequence[nn.Parameter], log_prob: Any, entropy: Any = None) -> th.Tensor:
        result = FlatTensor([th.zeros_like(parameter) for parameter in parameters])
        self._into_policy(self._slopes(log_prob, entropy), _places_in(result.views, parameters))
        return result.values

    def fisher_product(self, parameters: Sequence[nn.Parameter]) -> Callable[[th.Tensor], th.Tensor]:
        layers, head, latent = self._owner.policy_layers, self._owner.head, self._policy[-2]

        def product(vector: th.Tensor) -> th.Tensor:
            directions = _places_in(unflatten(vector / len(self._x), parameters), parameters)
            outputs = layers.tangent(self._x, self._policy, directions(layers.parameters()))
            log_std = None
            if self._parameters.log_std is not None:
                log_std = head.log_std_tangent(latent, self._parameters, *directions([self._owner.policy.log_std]))
            result = FlatTensor([th.zeros_like(parameter) for parameter in parameters])
            weighted = head.distribution.fisher(self._parameters, Parameters(outputs, log_std))
            self._into_policy([weighted], _places_in(result.views, parameters))
            return result.values

        return product

    def _slopes(self, log_prob: Any, entropy: Any, kl: tuple[Any, Any] | None = None) -> list[Parameters]:
        """Derivatives of a loss by the distribution's parameters."""
        distribution, slopes = self._owner.head.distribution, []
        if log_prob is not None:
            slopes.append(distribution.log_prob_slope(self._parameters, self._actions, log_prob))
        if entropy is not None:
            slopes.append(distribution.entropy_slope(self._parameters, entropy))
        if kl is not None:
            slopes.append(distribution.kl_slope(self._old(kl[0]), self._parameters, kl[1]))
        return slopes

    def _into_policy(self, slopes: list[Parameters], places: Places) -> None:
        """Gradients of the policy's parameters."""
        layers, head = self._owner.policy_layers, self._owner.head
        outputs = sum((slope.outputs for slope in slopes[1:]), slopes[0].outputs)
        if slopes[0].log_std is not None:
            log_std = sum((slope.log_std for slope in slopes[1:]), slopes[0].log_std)
            head.log_std_gradient(self._policy[-2], self._parameters, log_std, *places([self._owner.policy.log_std]))
        layers.backward(self._x, self._policy, outputs, places(layers.parameters()))
