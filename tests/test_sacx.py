"""SACX: both papers' updates by hand, densities, V, alpha in files; what is as in SB3's SAC is tested in test_off_policy."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from batches import batches, engine_on_and_off, feed, flat
from environments import BOX, RandomEnv
from gymnasium import spaces
from models import EPS, small_model
from stable_baselines3 import SAC
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.sac.policies import Actor
from torch import nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

import sb3_ac_ext.sacx
from sb3_ac_ext import SACX


def make(variant: str = "mlp", **changes: Any) -> Any:
    return small_model("sacx", variant, **changes)


def doubled(model: Any) -> Any:
    """The model in float64, alpha included."""
    model.policy.double()
    for name in ("log_ent_coef", "ent_coef_tensor"):
        getattr(model, name).data = getattr(model, name).data.double()
    return model


def alpha(model: Any) -> float:
    """As SB3 reads it."""
    value = model.ent_coef_tensor if model.ent_coef_optimizer is None else model.log_ent_coef.exp()
    return value.item()


# The updates by hand


def sample_with(actor: Any, observations: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    """a ~ pi(s) and its density by PyTorch's distributions."""
    latent = actor.latent_pi(observations)
    base = Independent(Normal(actor.mu(latent), actor.log_std(latent).clamp(-20, 2).exp()), 1)
    policy = TransformedDistribution(base, TanhTransform(cache_size=1))
    actions = policy.rsample()
    return actions, policy.log_prob(actions)[:, None]


def q_of(critic: Any, observations: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    inputs = th.cat([observations, actions], dim=1)
    return critic.qf0(inputs), critic.qf1(inputs)


class Reference:
    """One update after another of either paper, with autograd and an Adam for each network."""

    def __init__(self, model: SACX) -> None:
        self.actor, self.critic = copy.deepcopy(model.actor), copy.deepcopy(model.critic)
        self.v1 = model.value_network
        source = model.policy.value if self.v1 else model.critic
        self.followed = copy.deepcopy(source) if self.v1 else self.critic
        self.target = copy.deepcopy(source)
        for parameter in self.target.parameters():
            parameter.data.mul_(1.1)  # online and target differ
        self.log_alpha = model.log_ent_coef.detach().clone().requires_grad_()  # type: ignore[union-attr]
        self.automatic = model.ent_coef_optimizer is not None
        self.target_entropy, self.gamma, self.tau = model.target_entropy, model.gamma, model.tau
        networks = [self.actor, self.critic, *([self.followed] if self.v1 else [])]
        self.optimizers = [th.optim.Adam(network.parameters(), lr=1e-2, eps=EPS) for network in networks]
        self.alpha_optimizer = th.optim.Adam([self.log_alpha], lr=1e-2)

    def descend(self, optimizer: th.optim.Optimizer, loss: th.Tensor) -> None:
        for each in (*self.optimizers, self.alpha_optimizer):
            each.zero_grad()
        loss.backward()
        optimizer.step()

    def update(self, batch: Any) -> float:
        """
        :return: the policy's entropy at the batch
        """
        alpha = self.log_alpha.detach().exp()
        actions, log_prob = sample_with(self.actor, batch.observations)
        entropy = -log_prob.mean().item()
        if self.automatic:
            self.descend(self.alpha_optimizer, self.log_alpha * (entropy - self.target_entropy))
        if self.v1:
            v_target = (th.min(*q_of(self.critic, batch.observations, actions)) - alpha * log_prob).detach()
            self.descend(self.optimizers[2], 0.5 * (self.followed.vf(batch.observations) - v_target).square().mean())
            next_value = self.target.vf(batch.next_observations)
        else:
            next_actions, next_log_prob = sample_with(self.actor, batch.next_observations)
            next_value = th.min(*q_of(self.target, batch.next_observations, next_actions)) - alpha * next_log_prob
        discounts = self.gamma if batch.discounts is None else batch.discounts
        y = (batch.rewards + discounts * (1 - batch.dones) * next_value).detach()
        q_a, q_b = q_of(self.critic, batch.observations, batch.actions)
        self.descend(self.optimizers[1], 0.5 * ((q_a - y).square().mean() + (q_b - y).square().mean()))
        q = th.min(*q_of(self.critic, batch.observations, actions))
        self.descend(self.optimizers[0], (alpha * log_prob - q).mean())
        for mine, online in zip(self.target.parameters(), self.followed.parameters(), strict=True):
            mine.data.lerp_(online.data, self.tau)
        return entropy


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("ent_coef", ["auto_0.5", 0.3], ids=["automatic", "fixed"])
@pytest.mark.parametrize("value_network", [False, True], ids=["v2", "v1"])
@engine_on_and_off
def test_updates_by_hand(value_network: bool, ent_coef: Any, engine: bool) -> None:
    """Three updates with the exact density: every network, target and alpha."""
    extras = {"exact_log_prob": True, "value_network": value_network, "engine": engine}
    model = doubled(make(ent_coef=ent_coef, learning_rate=1e-2, gamma=0.9, tau=0.2, **extras))
    if model.ent_coef_optimizer is None:
        model.log_ent_coef.data = model.ent_coef_tensor.log().reshape(1)  # the same in float64
    reference = Reference(model)
    target = model.policy.value_target if value_network else model.critic_target
    for parameter in target.parameters():
        parameter.data.mul_(1.1)
    samples = batches(3, dtype=th.float64)
    feed(model, samples)
    for update, batch in enumerate(samples):
        th.manual_seed(update)
        model.train(gradient_steps=1, batch_size=8)
        th.manual_seed(update)
        entropy = reference.update(batch)
        pairs = [(model.actor, reference.actor), (model.critic, reference.critic), (target, reference.target)]
        pairs += [(model.policy.value, reference.followed)] if value_network else []
        for ours, expected in pairs:
            th.testing.assert_close(flat(ours), flat(expected), rtol=0, atol=1e-7)
        th.testing.assert_close(model.log_ent_coef.detach(), reference.log_alpha.detach(), rtol=0, atol=1e-7)
        assert model.logger.name_to_value["train/entropy"] == pytest.approx(entropy, rel=1e-6)


class Parabola(nn.Module):
    """Q(a) = -(a - 0.3)^2 of the last input."""

    def forward(self, inputs: th.Tensor) -> th.Tensor:
        return -(inputs[:, -1:] - 0.3).square()


@engine_on_and_off
def test_policy_of_a_bandit_is_the_boltzmann_density(engine: bool) -> None:
    """
    One state, Q(a) = -(a - 0.3)^2, alpha 0.1: the best density is proportional to exp(Q / alpha).

    The squashed Gaussian comes close to its moments, which are computed by quadrature.
    """
    grid = np.linspace(-1, 1, 20_001)
    density = np.exp(-((grid - 0.3) ** 2) / 0.1)
    density /= density.sum()
    mean = float(density @ grid)
    std = math.sqrt(float(density @ (grid - mean) ** 2))

    rates = {"learning_rate": 0.0, "actor_learning_rate": 1e-2}
    env = RandomEnv(BOX, spaces.Box(-1, 1, (1,)))
    model = make(env=env, ent_coef=0.1, target_update_every=1000, engine=engine, **rates)
    model.critic.q_networks = [Parabola(), Parabola()]
    state, zero = th.zeros(256, 4), th.zeros(256, 1)
    feed(model, [ReplayBufferSamples(state, zero, state, zero, zero)] * 300)
    model.train(gradient_steps=300, batch_size=256)
    assert not engine or model.engine_report()["update(False)"] == "replayed"
    actions, _ = model.predict(np.zeros((20_000, 4), np.float32))
    assert actions.mean() == pytest.approx(mean, abs=0.03)
    assert actions.std() == pytest.approx(std, rel=0.1)


# The density


@pytest.mark.usefixtures("double_precision")
def test_exact_density_with_gsde_is_sb3s_where_that_is_accurate() -> None:
    model = doubled(make(use_sde=True, exact_log_prob=True))
    observations = th.randn(20, 4, dtype=th.float64)
    model.actor.reset_noise()
    actions, log_prob = model._action_log_prob(observations)
    theirs = model.actor.action_log_prob(observations)
    th.testing.assert_close(actions, theirs[0], rtol=0, atol=1e-12)
    th.testing.assert_close(log_prob, theirs[1][:, None], rtol=0, atol=1e-4)
    for ours, expected in zip((actions, log_prob), theirs, strict=True):
        gradients = [
            th.autograd.grad(value.sum(), list(model.actor.parameters()), retain_graph=True, allow_unused=True)
            for value in (ours, expected)
        ]
        th.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("use_sde", [False, True], ids=["gaussian", "gsde"])
def test_exact_density_of_saturated_actions(use_sde: bool) -> None:
    """Where an action is 1 within rounding SB3's density stops at that of 1 - 1e-6."""
    kwargs = {"use_sde": use_sde, "policy_kwargs": {"clip_mean": 0.0}}
    for exact in (False, True):
        model = make(exact_log_prob=exact, **kwargs)
        for parameter in model.actor.mu.parameters():
            parameter.data.zero_().add_(20.0 if parameter.dim() == 1 else 0.0)
        if use_sde:
            model.actor.reset_noise()
        actions, log_prob = model._action_log_prob(th.zeros(4, 4))
        assert bool((actions > 1 - 1e-6).all())
        assert bool((log_prob > 25).all()) == exact
        assert bool(th.isfinite(log_prob).all())


# Targets, V


@pytest.mark.parametrize(
    ("kwargs", "moves"),
    [
        ({}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"target_update_interval": 2}, [1, 1, 1, 0, 1, 0, 1, 0]),
        ({"target_update_every": 2}, [0, 1, 0, 1, 0, 1, 0, 1]),
        ({"target_update_every": 3}, [0, 0, 1, 0, 0, 1, 0, 0]),
    ],
    ids=str,
)
@pytest.mark.parametrize("value_network", [False, True], ids=["v2", "v1"])
def test_when_targets_move(kwargs: dict[str, Any], moves: list[int], value_network: bool) -> None:
    """Two calls with one gradient step, then one with six: SB3's interval begins anew with each, ours goes on."""
    model = make(tau=0.25, value_network=value_network, **kwargs)
    feed(model, batches(8))
    online, target = model.critic, model.critic_target
    if value_network:
        online, target = model.policy.value, model.policy.value_target
    looks: list[tuple[th.Tensor, th.Tensor]] = []
    sample = model.replay_buffer.sample

    def sample_and_look(*args: Any, **kwargs: Any) -> Any:
        looks.append((flat(online), flat(target)))
        return sample(*args, **kwargs)

    model.replay_buffer.sample = sample_and_look
    for gradient_steps in (1, 1, 6):
        model.train(gradient_steps, batch_size=8)
    looks.append((flat(online), flat(target)))
    for moved, (_, before), (now, after) in zip(moves, looks[:-1], looks[1:], strict=True):
        th.testing.assert_close(after, 0.75 * before + 0.25 * now if moved else before, rtol=0, atol=1e-6 if moved else 0)
    assert model._n_updates == 8


def test_with_v_only_v_has_a_target() -> None:
    model = make(value_network=True)
    names = {name.split(".")[0] for name in model.policy.state_dict()}
    assert names == {"actor", "critic", "value", "value_target"}
    assert th.equal(flat(model.policy.value), flat(model.policy.value_target))
    assert not model.policy.value_target.training
    assert set(model._networks()) == {"q_a", "q_b", "value", "actor", "ent_coef"}


@pytest.mark.parametrize("share", [False, True], ids=["own extractors", "shared extractor"])
@pytest.mark.parametrize("actor_learns", [True, False], ids=["actor learns", "actor rests"])
def test_whose_loss_the_extractor_of_v_learns_from(actor_learns: bool, share: bool) -> None:
    rates = {"learning_rate": 1e-3 * (not actor_learns), "actor_learning_rate": 1e-3 * actor_learns}
    model = make("images", value_network=True, policy_kwargs={"share_features_extractor": share}, **rates)
    value = model.policy.value
    assert (value.features_extractor is model.actor.features_extractor) == share
    before = flat(value.features_extractor)
    model.learn(12)
    assert th.equal(flat(value.features_extractor), before) != (actor_learns == share)


def test_running_statistics_of_v_are_copied() -> None:
    model = make("batch norm", value_network=True).learn(12)
    online, target = (
        [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm1d)]
        for network in (model.policy.value, model.policy.value_target)
    )
    assert online[0].running_mean.abs().max() > 0
    for name in ("running_mean", "running_var"):
        assert th.equal(getattr(online[0], name), getattr(target[0], name))


# Alpha in files


def test_alpha_can_be_set_up_again() -> None:
    model = make()
    model.ent_coef = 0.3
    model._setup_model()
    assert alpha(model) == pytest.approx(0.3)
    assert model.ent_coef_optimizer is None
    model.ent_coef = "auto_0.4"
    model._setup_model()
    assert alpha(model) == pytest.approx(0.4)
    assert model.ent_coef_optimizer is not None


@pytest.mark.parametrize(("before", "after"), [("auto", 0.2), (0.2, "auto_0.3"), (0.2, 0.4)], ids=str)
@pytest.mark.parametrize("cls", [SACX, SAC], ids=["ours", "SB3's"])
def test_alpha_given_to_load_takes_effect(cls: Any, before: Any, after: Any, tmp_path: Any) -> None:
    model = small_model(cls, ent_coef=before).learn(30)
    model.save(tmp_path / "model")
    loaded = SACX.load(tmp_path / "model", env=model.env, ent_coef=after)
    assert alpha(loaded) == pytest.approx(0.3 if isinstance(after, str) else after)
    assert th.equal(flat(loaded.policy), flat(model.policy))
    loaded.learn(30)


def test_automatic_alpha_goes_on_from_the_file(tmp_path: Any) -> None:
    model = make().learn(40)
    model.save(tmp_path / "model")
    loaded = SACX.load(tmp_path / "model", ent_coef="auto", learning_rate=0.0)
    assert loaded.log_ent_coef.item() == model.log_ent_coef.item() != 0
    state = loaded.ent_coef_optimizer.state_dict()["state"]
    th.testing.assert_close(state, model.ent_coef_optimizer.state_dict()["state"], rtol=0, atol=0)


def test_optimizer_of_another_size_is_refused() -> None:
    parameters = small_model(SAC, "three critics").learn(30).get_parameters()
    with pytest.raises(ValueError, match="the optimizer has 12 parameters, the networks have 8"):
        make().set_parameters(parameters)


def test_target_entropy_can_be_auto_again_at_load_without_an_environment(tmp_path: Any) -> None:
    make(target_entropy=-0.5).save(tmp_path / "model")
    assert SACX.load(tmp_path / "model").target_entropy == -0.5
    assert SACX.load(tmp_path / "model", target_entropy="auto").target_entropy == -2.0


# Acting


@pytest.mark.parametrize("log_std", [-30.0, 5.0], ids=["below", "above"])
def test_acting_bounds_the_standard_deviation_as_the_policy(log_std: float) -> None:
    model = make()
    model.actor.log_std.bias.data.fill_(log_std)
    for _ in range(6):
        model.predict(BOX.low)
    actions = []
    for predict in (model.predict, model.policy.predict):
        th.manual_seed(4)
        actions.append(predict(BOX.low)[0])
    np.testing.assert_allclose(*actions, rtol=0, atol=1e-5)


def method_of_the_actor(model: Any) -> None:
    original = model.actor.get_action_dist_params
    model.actor.get_action_dist_params = lambda obs: (original(obs)[0] + 1, *original(obs)[1:])


def method_of_the_distribution(model: Any) -> None:
    original = model.actor.action_dist.mode
    model.actor.action_dist.mode = lambda: original() / 2


class HalvedDistribution(SquashedDiagGaussianDistribution):
    """Gives half of the most likely action."""

    def mode(self) -> th.Tensor:
        return super().mode() / 2


def other_distribution(model: Any) -> None:
    model.actor.action_dist = HalvedDistribution(2)


class HalvedActor(Actor):
    """Acts half as far."""

    def forward(self, obs: Any, deterministic: bool = False) -> th.Tensor:
        return super().forward(obs, deterministic) / 2


def class_of_the_actor(model: Any) -> None:
    model.actor.__class__ = HalvedActor


class Constant(sb3_ac_ext.sacx.MlpPolicy):
    """Does always the same."""

    def predict(self, observation: Any, *args: Any, **kwargs: Any) -> Any:
        return np.full(2, 0.5, np.float32), None


def class_of_the_policy(model: Any) -> None:
    model.policy.__class__ = Constant


@pytest.mark.parametrize(
    "change",
    [method_of_the_actor, method_of_the_distribution, other_distribution, class_of_the_actor, class_of_the_policy],
    ids=lambda function: function.__name__,
)
def test_changed_ways_of_acting_are_asked(change: Callable[[Any], None]) -> None:
    """Our shorter way, which a distribution of somebody's need not agree with, is left."""
    model = make()
    for _ in range(6):
        before = model.predict(BOX.high, deterministic=True)[0]
    assert model.engine_report()["act(True)"] == "replayed"
    change(model)
    for _ in range(6):
        after = model.predict(BOX.high, deterministic=True)[0]
        np.testing.assert_allclose(after, model.policy.predict(BOX.high, deterministic=True)[0], rtol=0, atol=1e-6)
    assert not np.allclose(after, before)
