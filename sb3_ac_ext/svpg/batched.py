"""
The networks of several particles evaluated at once: n layers of one kind are one product of stacks of their parameters.

Everything is read from the particles' own modules at every call, and only what is known to be a plain layer is taken together.
What is not (a layer of another kind, a hook, a replaced method) is called as it stands, one particle after the other.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch as th
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy, BaseModel
from stable_baselines3.common.preprocessing import preprocess_obs
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn
from torch.nn.modules import module as module_hooks

from sb3_ac_ext.base.on_policy import Evaluation, evaluation

ELEMENTWISE = (nn.Identity, nn.Tanh, nn.ReLU, nn.ELU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Sigmoid)
"""Layers that do not care how their input is shaped; their options are in their ``repr``."""
LAYERS: dict[type[nn.Module], tuple[str, ...]] = {
    **{kind: ("forward",) for kind in (*ELEMENTWISE, nn.Linear, nn.Sequential, FlattenExtractor)},
    MlpExtractor: ("forward", "forward_actor", "forward_critic"),
}
"""What is known, and the methods that say what it does."""
DISTRIBUTIONS = (
    DiagGaussianDistribution,
    CategoricalDistribution,
    MultiCategoricalDistribution,
    BernoulliDistribution,
)
METHODS = (
    *("forward", "evaluate_actions", "predict_values", "get_distribution", "extract_features"),
    *("_get_action_dist_from_latent", "obs_to_tensor"),
)
"""Of SB3's policies, that say what `act`, `evaluate` and `values_of` compute."""
CLASSES: dict[type[nn.Module], tuple[str, ...]] = {**LAYERS, ActorCriticPolicy: METHODS, BaseModel: ("extract_features",)}
WRITTEN = {(kind, name): getattr(kind, name) for kind, names in CLASSES.items() for name in names}
"""These methods as their libraries have them."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def blocks(observations: Any, n: int) -> list[Any]:
    """
    :param observations: ``(n B, ...)``, or a dict of them
    :param n: number of particles
    :return: of each particle ``(B, ...)``
    """
    if isinstance(observations, dict):
        parts = [value.chunk(n) for value in observations.values()]
        return [dict(zip(observations, part, strict=True)) for part in zip(*parts, strict=True)]
    return list(observations.chunk(n))


def act(particles: Sequence[ActorCriticPolicy], observations: Any) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """
    :param particles: n policies
    :param observations: ``(n B, ...)``, B for each particle
    :return: ``(n B, ...)`` a ~ pi_i(.|s), ``(n B, 1)`` V_i(s), ``(n B,)`` log pi_i(a|s)
    """
    if not are_alike(particles):
        parts = [particle(part) for particle, part in zip(particles, blocks(observations, len(particles)), strict=True)]
        actions, values, log_prob = zip(*parts, strict=True)
        return th.cat(actions), th.cat(values), th.cat(log_prob)
    distribution, values_ = _distribution_and_values(particles, observations)
    drawn = distribution.get_actions()
    log_prob_ = distribution.log_prob(drawn)
    return drawn.reshape(-1, *cast(Any, particles[0].action_space.shape)), values_, log_prob_


def evaluate(particles: Sequence[ActorCriticPolicy], samples: Any) -> Evaluation:
    """
    :param particles: n policies
    :param samples: n B observations and actions, B of each particle
    :return: ``(n, B)`` each: what every particle says of its own
    """
    n = len(particles)
    if not are_alike(particles):
        pairs = zip(particles, blocks(samples.observations, n), samples.actions.chunk(n), strict=True)
        parts = [evaluation(particle, samples._replace(observations=o, actions=a)) for particle, o, a in pairs]
        return Evaluation(*map(th.stack, zip(*parts, strict=True)))
    distribution, values = _distribution_and_values(particles, samples.observations)
    log_prob, entropy = distribution.log_prob(samples.actions), distribution.entropy()
    return Evaluation(*(part.reshape(n, -1) for part in (values, log_prob, -log_prob if entropy is None else entropy)))


def values_of(particles: Sequence[ActorCriticPolicy], observations: Any) -> th.Tensor:
    """
    :param particles: n policies
    :param observations: ``(n B, ...)``, B for each particle
    :return: ``(n B, 1)`` V_i(s)
    """
    if not are_alike(particles):
        pairs = zip(particles, blocks(observations, len(particles)), strict=True)
        return th.cat([particle.predict_values(part) for particle, part in pairs])
    features = _features(particles, [particle.vf_features_extractor for particle in particles], observations)
    return _values(particles, features).flatten(0, 1)


def _distribution_and_values(particles: Sequence[ActorCriticPolicy], observations: Any) -> tuple[Distribution, th.Tensor]:
    """Of SB3's methods what they have in common: n B distributions of actions as one, and ``(n B, 1)`` values."""
    features = _features(particles, [particle.pi_features_extractor for particle in particles], observations)
    latent = together([particle.mlp_extractor.policy_net for particle in particles], features)
    outputs = together([particle.action_net for particle in particles], latent).flatten(0, 1)
    if not particles[0].share_features_extractor:
        features = _features(particles, [particle.vf_features_extractor for particle in particles], observations)
    values = _values(particles, features)
    distribution: Any = particles[0].action_dist
    if isinstance(distribution, DiagGaussianDistribution):
        log_std = th.stack([cast(th.Tensor, particle.log_std) for particle in particles])
        rows = log_std.repeat_interleave(len(outputs) // len(particles), dim=0)
        return distribution.proba_distribution(outputs, rows), values.flatten(0, 1)
    return distribution.proba_distribution(outputs), values.flatten(0, 1)


def _features(particles: Sequence[ActorCriticPolicy], extractors: Sequence[nn.Module], observations: Any) -> th.Tensor:
    """``(n, B, F)``"""
    first = particles[0]
    prepared: Any = preprocess_obs(observations, first.observation_space, normalize_images=first.normalize_images)
    if isinstance(prepared, dict):
        return _one_by_one(extractors, blocks(prepared, len(particles)))
    return together(extractors, prepared.unflatten(0, (len(particles), -1)))


def _values(particles: Sequence[ActorCriticPolicy], features: th.Tensor) -> th.Tensor:
    """``(n, B, 1)``"""
    latent = together([particle.mlp_extractor.value_net for particle in particles], features)
    return together([particle.value_net for particle in particles], latent)


def together(modules: Sequence[nn.Module], inputs: th.Tensor) -> th.Tensor:
    """
    :param modules: n of them
    :param inputs: ``(n, B, ...)``
    :return: ``(n, B, ...)`` what each makes of its own
    """
    first = modules[0]
    kind = type(first)
    if not all(type(module) is kind and _is_plain(module) for module in modules):
        return _one_by_one(modules, inputs.unbind())
    if kind is nn.Sequential and len({len(module) for module in modules}) == 1:  # type: ignore[arg-type]  # they have
        for layers in zip(*modules, strict=True):  # type: ignore[call-overload]  # they are lists of layers
            inputs = together(layers, inputs)
        return inputs
    if kind is nn.Linear and len({(module.weight.shape, module.bias is None) for module in modules}) == 1:
        return _linear(cast(Sequence[nn.Linear], modules), inputs)
    if kind is FlattenExtractor:
        return inputs.flatten(2)
    if issubclass(kind, ELEMENTWISE) and len(set(map(repr, modules))) == 1:
        return first(inputs)  # type: ignore[no-any-return]  # a tensor
    return _one_by_one(modules, inputs.unbind())


def _linear(layers: Sequence[nn.Linear], inputs: th.Tensor) -> th.Tensor:
    """W x + b with columns x, so that gradients lie in memory as W does."""
    weights = th.stack([layer.weight for layer in layers])  # (n, out, in)
    if layers[0].bias is None:
        return th.bmm(weights, inputs.mT).mT
    return th.baddbmm(th.stack([layer.bias for layer in layers]).unsqueeze(2), weights, inputs.mT).mT


def _one_by_one(functions: Sequence[Callable[[Any], th.Tensor]], inputs: Sequence[Any]) -> th.Tensor:
    return th.stack([function(part) for function, part in zip(functions, inputs, strict=True)])


def are_alike(particles: Sequence[ActorCriticPolicy]) -> bool:
    """
    :param particles: n policies
    :return: whether they can be evaluated together: there are several, which are put together as SB3 does it
    """
    first = particles[0]
    return (
        len(particles) > 1
        and len({(particle.share_features_extractor, particle.normalize_images) for particle in particles}) == 1
        and len({type(particle.action_dist) for particle in particles}) == 1
        and len({tuple(parameter.shape for parameter in particle.parameters()) for particle in particles}) == 1
        and type(first.action_dist) in DISTRIBUTIONS
        and all(map(_is_as_written, particles))
    )


def _is_as_written(policy: ActorCriticPolicy) -> bool:
    """Whether a policy, its two networks and its distribution do what SB3's do."""
    kind = type(policy)
    own = vars(policy)
    if any(name in own or getattr(kind, name) is not WRITTEN[ActorCriticPolicy, name] for name in METHODS):
        return False
    if BaseModel.extract_features is not WRITTEN[BaseModel, "extract_features"] or _is_hooked(policy):
        return False
    if type(policy.mlp_extractor) is not MlpExtractor or not _is_plain(policy.mlp_extractor):
        return False
    shared = policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor
    if policy.share_features_extractor and len(set(map(id, shared))) > 1:  # SB3 asks now this one, now that
        return False
    return not any(callable(value) for name, value in vars(policy.action_dist).items() if name != "distribution")


def _is_plain(module: nn.Module) -> bool:
    """Whether calling a module is what its library says."""
    kind = type(module)
    names = LAYERS.get(kind, ())
    return (
        bool(names)
        and not any(name in vars(module) or getattr(kind, name) is not WRITTEN[kind, name] for name in names)
        and not _is_hooked(module)
    )


def _is_hooked(module: nn.Module) -> bool:
    return any(getattr(module, name) or getattr(module_hooks, f"_global{name}", None) for name in HOOKS)
