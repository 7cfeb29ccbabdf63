"""What is asked of SB3's actor-critic policies, against autograd and PyTorch's distributions."""

from typing import Any

import numpy as np
import pytest
import torch as th
from models import VARIANTS, small_model
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal

from sb3_ac_ext.networks.actor_critic import (
    SEPARATE_POLICIES,
    describe,
    kl_divergence,
    policy_parameters,
    separate_optimizers,
    statistics,
    value_parameters,
)

B = 6


class Undivided(ActorCriticPolicy):
    """A user's, whose layers are for both, and give both the same."""

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = Both(self.features_dim)


class Both(nn.Module):
    latent_dim_pi = latent_dim_vf = 5

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, 5)

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return self.layer(features).tanh()

    forward_critic = forward_actor


CASES: dict[str, dict[str, Any]] = {
    **{name: {"variant": name} for name in ("mlp", "gsde", "discrete", "several choices", "coins", "dict", "images")},
    **{name: {"variant": name} for name in ("extractor", "shared extractor", "extractors apart")},
    "gsde narrow": {"variant": "gsde", "policy_kwargs": {"full_std": False}},
    "gsde squashed": {"variant": "gsde", "policy_kwargs": {"squash_output": True}},
    "undivided": {"policy": Undivided},
}
KINDS = ("mlp", "gsde", "gsde narrow", "gsde squashed", "discrete", "several choices", "coins")
"""Of distributions."""


def case(name: str) -> tuple[Any, Any]:
    """A policy whose parameters are random numbers, and observations."""
    changes = {**CASES[name]}
    model = small_model(PPO, changes.pop("variant", "mlp"), **changes)
    generator = th.Generator().manual_seed(0)
    with th.no_grad():
        for parameter in model.policy.parameters():
            parameter.copy_(0.3 * th.randn(parameter.shape, generator=generator))
    space = model.observation_space
    space.seed(0)
    return model.policy, model.policy.obs_to_tensor(stacked([space.sample() for _ in range(B)]))[0]


def stacked(samples: list[Any]) -> Any:
    if isinstance(samples[0], dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
    return np.stack(samples)


# Whose the parameters are


def used(policy: Any, output: th.Tensor) -> set[str]:
    """The names of the parameters that a result depends on."""
    named = dict(policy.named_parameters())
    gradients = th.autograd.grad(output.sum(), named.values(), allow_unused=True)
    return {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_that_the_outputs_depend_on(name: str) -> None:
    policy, observations = case(name)
    names = {id(parameter): key for key, parameter in policy.named_parameters()}
    policys, values = ([names[id(parameter)] for parameter in own(policy)] for own in (policy_parameters, value_parameters))
    actions = policy.get_distribution(observations).mode().detach()
    _, log_prob, _ = policy.evaluate_actions(observations, actions)
    assert set(policys) == used(policy, log_prob)
    assert set(values) == used(policy, policy.predict_values(observations))
    assert len(policys) == len(set(policys)) and len(values) == len(set(values))
    assert {*policys, *values} == {*names.values()}
    shared = {key.split(".")[0] for key in {*policys} & {*values}}
    expected = {"undivided": {"mlp_extractor"}, "images": {"features_extractor"}}
    assert shared == expected.get(name, {"features_extractor"} if name in ("extractor", "shared extractor") else set())


@pytest.mark.parametrize("name", ["mlp", "gsde", "discrete", "dict", "extractors apart"])
def test_separate_optimizers(name: str) -> None:
    policy, _ = case(name)
    policy.optimizer_class, policy.optimizer_kwargs = th.optim.RMSprop, {"alpha": 0.5}
    separate_optimizers(policy, 0.1, "separate_phases=True")
    for optimizer, own in ((policy.optimizer, policy_parameters), (policy.value_optimizer, value_parameters)):
        (group,) = optimizer.param_groups
        assert type(optimizer) is th.optim.RMSprop and (group["lr"], group["alpha"]) == (0.1, 0.5)
        assert [*map(id, group["params"])] == [*map(id, own(policy))]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("images", r"share_features_extractor=False.*got features_extractor\.cnn\.0\.weight in both"),
        ("shared extractor", r"share_features_extractor=False.*got features_extractor\.layers\.1\.weight in both"),
        ("undivided", r"a mlp_extractor of a policy_net and a value_net, got mlp_extractor\.layer\.weight in both"),
    ],
)
def test_shared_parameters_have_no_separate_optimizers(name: str, message: str) -> None:
    policy, _ = case(name)
    before = policy.optimizer
    with pytest.raises(ValueError, match=f"AC needs networks of their own for policy and value.*{message}"):
        separate_optimizers(policy, 0.1, "AC")
    assert policy.optimizer is before and not hasattr(policy, "value_optimizer")


@pytest.mark.parametrize("variant", ["mlp", "images", "dict"])
def test_separate_policies_share_nothing_unless_asked(variant: str) -> None:
    cls: Any = SEPARATE_POLICIES[VARIANTS[variant].policy]
    policy = small_model(PPO, variant, policy=cls).policy
    assert not {*map(id, policy_parameters(policy))} & {*map(id, value_parameters(policy))}
    if variant == "images":
        shared = small_model(PPO, variant, policy=cls, policy_kwargs={"share_features_extractor": True}).policy
        assert {*map(id, policy_parameters(shared))} & {*map(id, value_parameters(shared))}


# What the distributions are


def torchs(distribution: Any) -> list[Distribution]:
    """PyTorch's distributions that SB3's consists of, each with a ``(B,)`` divergence."""
    own = distribution.distribution
    parts = own if isinstance(own, list) else [own]
    return [part if isinstance(part, Categorical) else Independent(part, 1) for part in parts]


def torchs_kl(old: list[Distribution], new: list[Distribution]) -> th.Tensor:
    return sum(th.distributions.kl_divergence(p, q) for p, q in zip(old, new, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("name", KINDS)
@th.no_grad()
def test_divergences_are_pytorchs(name: str) -> None:
    """Of what was described before the policy changed."""
    policy, observations = case(name)
    distribution = policy.get_distribution(observations)
    old, before = torchs(distribution), describe(distribution)
    kept = before.clone()
    for parameter in policy.parameters():
        parameter.mul_(1.5)
    distribution = policy.get_distribution(observations)
    new = torchs(distribution)
    assert th.equal(before, kept)
    for reverse, expected in ((False, torchs_kl(old, new)), (True, torchs_kl(new, old))):
        assert expected.shape == (B,) and (expected > 1e-4).all()
        th.testing.assert_close(kl_divergence(before, distribution, reverse), expected, rtol=1e-4, atol=1e-6)
    th.testing.assert_close(kl_divergence(describe(distribution), distribution), th.zeros(B), rtol=0, atol=1e-6)


def test_divergence_of_several_choices_leaves_what_was_described_as_it_is() -> None:
    policy, observations = case("several choices")
    distribution = policy.get_distribution(observations)
    described = describe(distribution)
    assert described.shape == (B, 5)
    first, second = (kl_divergence(described, distribution) for _ in range(2))
    assert th.equal(first, second)


def rebuilt(name: str, statistics: list[th.Tensor]) -> list[Distribution]:
    """PyTorch's distributions with these statistics."""
    if name == "coins":
        return [Independent(Bernoulli(logits=statistics[0]), 1)]
    if name in ("discrete", "several choices"):
        return [Categorical(logits=logits) for logits in statistics]
    return [Independent(Normal(statistics[0], statistics[1].exp()), 1)]


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("name", KINDS)
def test_fisher_products_are_those_with_the_hessian_of_the_divergence(name: str) -> None:
    """In both directions, and with nothing between two statistics."""
    policy, observations = case(name)
    pairs = statistics(policy.double().get_distribution(observations))
    phi = [statistic.detach() for statistic, _ in pairs]
    free = [part.clone().requires_grad_() for part in phi]
    generator = th.Generator().manual_seed(1)
    directions = [th.randn(part.shape, generator=generator, dtype=part.dtype) for part in phi]
    expected = [head(direction) for (_, head), direction in zip(pairs, directions, strict=True)]
    for order in (1, -1):
        divergence = torchs_kl(*[rebuilt(name, phi), rebuilt(name, free)][::order]).sum()
        gradients = th.autograd.grad(divergence, free, create_graph=True)
        products = th.autograd.grad(gradients, free, directions)
        th.testing.assert_close([*products], expected, rtol=1e-8, atol=1e-10)
