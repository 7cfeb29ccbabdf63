"""What on-policy algorithms ask of SB3's actor-critic policies: whose the parameters are, and what the distributions are."""

from collections.abc import Callable, Sequence
from functools import partial
from operator import mul
from typing import Any

import torch as th
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    BasePolicy,
    MultiInputActorCriticPolicy,
)
from torch import nn
from torch.distributions import Bernoulli, Normal

from sb3_ac_ext.functional.divergences import bernoulli_kl, categorical_kl, gaussian_kl
from sb3_ac_ext.functional.natural_gradient import LOG_STD_FISHER, bernoulli_fisher, categorical_fisher
from sb3_ac_ext.validation import ArgumentError

Head = Callable[[th.Tensor], th.Tensor]
"""Product of the Fisher matrices in a statistic with directions of it."""


class SeparateCnnPolicy(ActorCriticCnnPolicy):
    """SB3's policy for images, with a features extractor each for policy and value, as two optimizers need."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"share_features_extractor": False, **kwargs})


class SeparateMultiInputPolicy(MultiInputActorCriticPolicy):
    """The same for Dict observations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"share_features_extractor": False, **kwargs})


MlpPolicy, CnnPolicy, MultiInputPolicy = ActorCriticPolicy, ActorCriticCnnPolicy, MultiInputActorCriticPolicy
"""SB3's, by the names that they have there too; zips of before look for them here."""
SEPARATE_POLICIES: dict[str, type[BasePolicy]] = {
    "MlpPolicy": ActorCriticPolicy,
    "CnnPolicy": SeparateCnnPolicy,
    "MultiInputPolicy": SeparateMultiInputPolicy,
}
"""By the names that algorithms with an optimizer for each network take."""


def policy_modules(policy: ActorCriticPolicy) -> dict[str, nn.Module]:
    """
    :param policy: any
    :return: what the distribution of actions is computed with, by name; all layers where they are not divided as SB3's are
    """
    layers = getattr(policy.mlp_extractor, "policy_net", None)
    name = "mlp_extractor" if layers is None else "mlp_extractor.policy_net"
    return {
        "pi_features_extractor": policy.pi_features_extractor,
        name: policy.mlp_extractor if layers is None else layers,
        "action_net": policy.action_net,
    }


def value_modules(policy: ActorCriticPolicy) -> dict[str, nn.Module]:
    """
    :param policy: any
    :return: what the value is computed with, by name; see `policy_modules`
    """
    layers = getattr(policy.mlp_extractor, "value_net", None)
    name = "mlp_extractor" if layers is None else "mlp_extractor.value_net"
    return {
        "vf_features_extractor": policy.vf_features_extractor,
        name: policy.mlp_extractor if layers is None else layers,
        "value_net": policy.value_net,
    }


def policy_parameters(policy: ActorCriticPolicy) -> list[nn.Parameter]:
    """
    :param policy: any
    :return: what the distribution of actions depends on
    """
    log_std = getattr(policy, "log_std", None)
    own = [log_std] if isinstance(log_std, nn.Parameter) else []
    return [*own, *(parameter for module in policy_modules(policy).values() for parameter in module.parameters())]


def value_parameters(policy: ActorCriticPolicy) -> list[nn.Parameter]:
    """
    :param policy: any
    :return: what the value depends on; some are `policy_parameters` too if the two share trained layers
    """
    return [parameter for module in value_modules(policy).values() for parameter in module.parameters()]


def separate_optimizers(policy: Any, rate: float, needed_by: str) -> None:
    """
    Give policy and value an optimizer each, its ``optimizer`` and ``value_optimizer``.

    :param policy: an ``ActorCriticPolicy``
    :param rate: learning rate they start with
    :param needed_by: what asks for that, the start of the message
    :raises ArgumentError: if they share parameters
    """
    groups = policy_parameters(policy), value_parameters(policy)
    shared = {*map(id, groups[0])} & {*map(id, groups[1])}
    for name, parameter in policy.named_parameters():
        if id(parameter) in shared:
            extractor = "policy_kwargs=dict(share_features_extractor=False)"
            divided = "a mlp_extractor of a policy_net and a value_net"
            raise ArgumentError(
                f"{needed_by} needs networks of their own for policy and value: give the policy "
                f"{divided if name.startswith('mlp_extractor') else extractor}, got {name} in both"
            )
    policy.optimizer, policy.value_optimizer = (
        policy.optimizer_class(own, lr=rate, **policy.optimizer_kwargs) for own in groups
    )


def _parts_of(distribution: Distribution) -> Sequence[Any]:
    """PyTorch's distributions that SB3's consists of."""
    own = distribution.distribution
    return own if isinstance(own, list) else [own]


def describe(distribution: Distribution) -> th.Tensor:
    """
    :param distribution: of actions in B states
    :return: ``(B, K)`` the numbers that it is a function of: means and standard deviations, or logits
    """
    parts = _parts_of(distribution)
    return th.cat([th.cat([p.loc, p.scale], dim=1) if isinstance(p, Normal) else p.logits for p in parts], dim=1)


def kl_divergence(old: th.Tensor, distribution: Distribution, reverse: bool = False) -> th.Tensor:
    """
    :param old: ``(B, K)`` what `describe` said of another distribution
    :param distribution: of actions in the same states
    :param reverse: whether KL(distribution || old) is wanted
    :return: ``(B,)`` KL(old || distribution), in nats; actions squashed by tanh have that of their Gaussians
    """
    total: Any = 0
    for part in _parts_of(distribution):
        if isinstance(part, Normal):
            (mean, std), new = old.chunk(2, dim=1), (part.loc, part.scale)
            total = total + (gaussian_kl(*new, mean, std) if reverse else gaussian_kl(mean, std, *new))
        else:
            logits, old = old[:, : part.logits.shape[1]], old[:, part.logits.shape[1] :]
            divergence = bernoulli_kl if isinstance(part, Bernoulli) else categorical_kl
            total = total + (divergence(part.logits, logits) if reverse else divergence(logits, part.logits))
    return total  # type: ignore[no-any-return]  # a tensor, as there is a part


def statistics(distribution: Distribution) -> list[tuple[th.Tensor, Head]]:
    """
    :param distribution: of actions in B states
    :return: each ``(B, ...)`` statistic that it is a function of, and products with its Fisher matrix; no element is between
        two of them
    """
    found: list[tuple[th.Tensor, Head]] = []
    for part in _parts_of(distribution):
        if isinstance(part, Normal):
            precision = part.scale.detach() ** -2
            found += [(part.loc, partial(mul, precision)), (part.scale.log(), partial(mul, LOG_STD_FISHER))]
        else:
            fisher = bernoulli_fisher if isinstance(part, Bernoulli) else categorical_fisher
            found.append((part.logits, partial(fisher, probs=part.probs.detach())))
    return found
