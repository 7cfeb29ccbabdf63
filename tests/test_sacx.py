"""SACX: equal to SB3's SAC with its extras off, both papers' updates by hand, alpha, V, acting, its own arguments."""

import copy
import json
import math
import zipfile
from typing import Any

import numpy as np
import pytest
import torch as th
from batches import batches, feed, flat
from environments import BOX, CONTINUOUS, DICT, IMAGE, RandomEnv
from gymnasium import spaces
from stable_baselines3 import SAC
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.utils import get_parameters_by_name
from stable_baselines3.sac.policies import Actor, CnnPolicy, SACPolicy
from torch import nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

import sb3_ac_ext.sacx
from sb3_ac_ext import SACX
from sb3_ac_ext.base.off_policy import critic_names

SMALL: dict[str, Any] = {"net_arch": [16, 16]}


def make(cls: type[SAC] = SACX, env: Any = None, policy: Any = "MlpPolicy", **kwargs: Any) -> Any:
    kwargs = {"policy_kwargs": SMALL, "seed": 0, "buffer_size": 500, "learning_starts": 20, **kwargs}
    kwargs["policy_kwargs"] = dict(kwargs["policy_kwargs"])  # SB3 writes into it
    model = cls(policy, env or RandomEnv(BOX, CONTINUOUS), **kwargs)
    model.set_logger(Logger(None, []))
    return model


def doubled(model: Any) -> Any:
    """The model in float64, alpha included."""
    model.policy.double()
    for name in ("log_ent_coef", "ent_coef_tensor"):
        if isinstance(getattr(model, name, None), th.Tensor):
            getattr(model, name).data = getattr(model, name).data.double()
    model.batch_norm_stats = get_parameters_by_name(model.critic, ["running_"])
    model.batch_norm_stats_target = get_parameters_by_name(model.critic_target, ["running_"])
    return model


def moments(model: Any) -> dict[str, Any]:
    """The states of the optimizers by SB3's names: one critic optimizer, of features and the Q."""
    states = {"actor": model.actor.optimizer.state_dict()["state"]}
    if model.ent_coef_optimizer is not None:
        states["ent_coef"] = model.ent_coef_optimizer.state_dict()["state"]
    if isinstance(model, SACX):
        streams = (getattr(model.policy, f"{name}_optimizer") for name in critic_names(model.critic.n_critics))
        parts = (model.policy.critic_features_optimizer, *streams)
        entries = [entry for part in parts if part is not None for entry in part.state_dict()["state"].values()]
        states["critic"] = dict(enumerate(entries))
    else:
        states["critic"] = model.critic.optimizer.state_dict()["state"]
    return states


def alpha(model: Any) -> float:
    """As SB3 reads it."""
    value = model.ent_coef_tensor if model.ent_coef_optimizer is None else model.log_ent_coef.exp()
    return value.item()


def numbers(model: Any) -> list[th.Tensor]:
    learned = [] if model.ent_coef_optimizer is None else [model.log_ent_coef.detach()]
    return [flat(model.policy), *learned]


class NormalisedFeatures(BaseFeaturesExtractor):
    """With running statistics and parameters."""

    def __init__(self, observation_space: spaces.Box) -> None:
        super().__init__(observation_space, 4)
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.layers(observations)


# Equal to SB3


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(
    ("policy", "space", "kwargs"),
    [
        ("MlpPolicy", BOX, {}),
        ("MlpPolicy", BOX, {"policy_kwargs": {"net_arch": {"pi": [8], "qf": [16, 8, 4]}, "activation_fn": nn.Tanh}}),
        ("MlpPolicy", BOX, {"ent_coef": "auto_0.3", "target_entropy": -0.7}),
        ("MlpPolicy", BOX, {"ent_coef": 0.2}),
        ("MlpPolicy", BOX, {"use_sde": True}),
        (
            "MlpPolicy",
            BOX,
            {"use_sde": True, "ent_coef": 0.2, "policy_kwargs": {**SMALL, "use_expln": True, "clip_mean": 0.0}},
        ),
        ("MlpPolicy", BOX, {"policy_kwargs": {**SMALL, "features_extractor_class": NormalisedFeatures}}),
        ("CnnPolicy", IMAGE, {}),
        ("CnnPolicy", IMAGE, {"policy_kwargs": {**SMALL, "share_features_extractor": True}}),
    ],
    ids=["mlp", "unequal", "alpha", "fixed alpha", "gsde", "gsde expln", "batch norm", "images", "shared extractor"],
)
@pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
def test_equals_sac_with_extras_off(policy: str, space: spaces.Box, kwargs: dict[str, Any], engine: bool) -> None:
    kwargs = {"learning_rate": lambda progress: 1e-3 * progress, "target_update_interval": 2, **kwargs}
    env = RandomEnv(space, CONTINUOUS)
    models = theirs, ours = make(SAC, env, policy, **kwargs), make(SACX, env, policy, engine=engine, **kwargs)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=0)  # same seed, same initial weights
    for model in models:
        feed(doubled(model), batches(9, obs_shape=space.shape))
    for update in range(3):
        for model in models:
            model._current_progress_remaining = 1 - update / 10
            th.manual_seed(update)
            model.train(gradient_steps=3, batch_size=8)
        th.testing.assert_close(numbers(ours), numbers(theirs), rtol=0, atol=1e-10)
        th.testing.assert_close(moments(ours), moments(theirs), rtol=0, atol=1e-10)
    logged = [model.logger.name_to_value for model in models]
    for key, value in logged[0].items():
        assert logged[1][key] == pytest.approx(value, rel=1e-6), key


@pytest.mark.parametrize("kwargs", [{}, {"use_sde": True}], ids=["gaussian", "gsde"])
@pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
def test_learns_the_same_as_sac_from_the_same_seed(kwargs: dict[str, Any], engine: bool) -> None:
    theirs = make(SAC, env="Pendulum-v1", **kwargs).learn(120)
    ours = make(SACX, env="Pendulum-v1", engine=engine, **kwargs).learn(120)
    np.testing.assert_allclose(ours.replay_buffer.actions[:40], theirs.replay_buffer.actions[:40], atol=1e-5)
    th.testing.assert_close(numbers(ours), numbers(theirs), rtol=0, atol=0 if not engine else 1e-3)


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
        self.optimizers = [th.optim.Adam(network.parameters(), lr=1e-2) for network in networks]
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
@pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
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
    samples = batches(3)
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


@pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
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


@pytest.mark.parametrize("value_network", [False, True], ids=["v2", "v1"])
@pytest.mark.parametrize("use_sde", [False, True], ids=["gaussian", "gsde"])
@pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
def test_no_loss_reaches_another_network(engine: bool, use_sde: bool, value_network: bool) -> None:
    """With rates of 0 all losses are of the first parameters, and an update leaves the gradients of each one's own loss."""
    model = make(value_network=value_network, use_sde=use_sde, learning_rate=0.0, gamma=0.9, engine=engine)
    policy, critic, batch = model.policy, model.critic, batches(1, dtype=th.float32)[0]
    feed(model, [batch])
    th.manual_seed(3)
    model.train(gradient_steps=1, batch_size=8)
    networks = {"critic": critic, "actor": model.actor, **({"value": policy.value} if value_network else {})}
    parameters = {name: list(network.parameters()) for name, network in networks.items()}
    parameters["ent_coef"] = [model.log_ent_coef]
    targets = policy.value_target if value_network else model.critic_target
    assert all(parameter.grad is None for parameter in targets.parameters())

    th.manual_seed(3)
    if use_sde:
        model.actor.reset_noise()
    actions, log_prob = model.actor.action_log_prob(batch.observations)
    log_prob = log_prob[:, None]
    q = th.min(*critic(batch.observations, actions))
    if value_network:
        next_value = policy.value_target(batch.next_observations)
    else:
        next_actions, next_log_prob = model.actor.action_log_prob(batch.next_observations)
        next_value = th.min(*model.critic_target(batch.next_observations, next_actions)) - next_log_prob[:, None]
    y = (batch.rewards + 0.9 * (1 - batch.dones) * next_value).detach()
    losses = {
        "ent_coef": -(model.log_ent_coef * (log_prob.detach() + model.target_entropy)).mean(),
        "critic": 0.5 * sum(nn.functional.mse_loss(value, y) for value in critic(batch.observations, batch.actions)),
        "actor": (log_prob - q).mean(),
    }
    if value_network:
        losses["value"] = 0.5 * nn.functional.mse_loss(policy.value(batch.observations), (q - log_prob).detach())
    for name, loss in losses.items():
        expected = th.autograd.grad(loss, parameters[name], retain_graph=True)
        th.testing.assert_close([parameter.grad for parameter in parameters[name]], [*expected], rtol=1e-4, atol=1e-6)


# Alpha


@pytest.mark.parametrize(("target_entropy", "direction"), [(-50.0, -1), (50.0, 1)], ids=["too random", "too certain"])
def test_alpha_moves_towards_the_target_entropy(target_entropy: float, direction: int) -> None:
    model = make(target_entropy=target_entropy, ent_coef="auto_0.1")
    feed(model, batches(5, dtype=th.float32))
    start = model.log_ent_coef.item()
    assert start == pytest.approx(math.log(0.1))
    model.train(gradient_steps=5, batch_size=8)
    assert direction * (model.log_ent_coef.item() - start) > 0
    assert model.logger.name_to_value["train/ent_coef"] == pytest.approx(0.1, rel=0.01)
    assert "train/ent_coef_loss" in model.logger.name_to_value


def test_target_entropy_is_minus_the_number_of_action_dimensions() -> None:
    assert make().target_entropy == -2.0
    assert make(env=RandomEnv(BOX, spaces.Box(-1, 1, (2, 3)))).target_entropy == -6.0
    assert make(target_entropy=-0.5).target_entropy == -0.5


def test_fixed_alpha_stays() -> None:
    model = make(ent_coef=0.2)
    feed(model, batches(3, dtype=th.float32))
    model.train(gradient_steps=3, batch_size=8)
    logged = model.logger.name_to_value
    assert logged["train/ent_coef"] == pytest.approx(0.2)
    assert "train/ent_coef_loss" not in logged
    assert model.ent_coef_optimizer is None


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
    kwargs = {"use_sde": use_sde, "policy_kwargs": {**SMALL, "clip_mean": 0.0}}
    for exact in (False, True):
        model = make(exact_log_prob=exact, **kwargs)
        for parameter in model.actor.mu.parameters():
            parameter.data.zero_().add_(10.0 if parameter.dim() == 1 else 0.0)
        if use_sde:
            model.actor.reset_noise()
        actions, log_prob = model._action_log_prob(th.zeros(4, 4))
        assert bool((actions > 1 - 1e-6).all())
        assert bool((log_prob > 25).all()) == exact
        assert bool(th.isfinite(log_prob).all())


class Doubled(SquashedDiagGaussianDistribution):
    """Whose density is somebody's."""

    def log_prob_from_params(self, mean_actions: th.Tensor, log_std: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        actions, log_prob = super().log_prob_from_params(mean_actions, log_std)
        return actions, 2 * log_prob


def doubled_log_prob(original: Any) -> Any:
    """The same function but for its second result."""

    def replaced(*args: Any) -> Any:
        actions, log_prob = original(*args)
        return actions, 2 * log_prob

    return replaced


def method_of_actor(model: Any) -> None:
    model.actor.action_log_prob = doubled_log_prob(model.actor.action_log_prob)


def method_of_distribution(model: Any) -> None:
    model.actor.action_dist.log_prob_from_params = doubled_log_prob(model.actor.action_dist.log_prob_from_params)


def other_distribution(model: Any) -> None:
    model.actor.action_dist = Doubled(2)


@pytest.mark.parametrize("change", [method_of_actor, method_of_distribution, other_distribution], ids=lambda f: f.__name__)
def test_changed_actors_are_asked_for_their_density(change: Any) -> None:
    entropies = []
    for engine, changed in ((True, True), (False, True), (True, False)):
        model = make(engine=engine)
        feed(model, batches(8, dtype=th.float32))
        model.train(gradient_steps=6, batch_size=8)
        assert not engine or model.engine_report()["update(True)"] == "replayed"
        if changed:
            change(model)
        model.train(gradient_steps=2, batch_size=8)
        entropies.append(model.logger.name_to_value["train/entropy"])
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-4)
    assert entropies[0] == pytest.approx(2 * entropies[2], rel=1e-4)


# Targets


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
    feed(model, batches(8, dtype=th.float32))
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
def test_v_learns_from_images(share: bool) -> None:
    model = make(
        env=RandomEnv(IMAGE, CONTINUOUS),
        policy="CnnPolicy",
        value_network=True,
        policy_kwargs={**SMALL, "share_features_extractor": share},
    )
    value, target = model.policy.value, model.policy.value_target
    assert (value.features_extractor is model.actor.features_extractor) == share
    assert target.features_extractor is not value.features_extractor
    value(th.zeros(1, *IMAGE.shape)).sum().backward()
    assert all((parameter.grad is None) == share for parameter in value.features_extractor.parameters())
    feed(model, batches(1, dtype=th.float32, obs_shape=IMAGE.shape))
    before, layers = flat(target), flat(value.vf)
    model.train(gradient_steps=1, batch_size=8)
    assert not th.equal(flat(value.vf), layers)
    th.testing.assert_close(flat(target), (1 - model.tau) * before + model.tau * flat(value))


@pytest.mark.parametrize("share", [False, True], ids=["own extractors", "shared extractor"])
@pytest.mark.parametrize("rates", [(0.0, 1e-3), (1e-3, 0.0)], ids=["actor learns", "actor rests"])
def test_whose_loss_the_extractor_of_v_learns_from(share: bool, rates: tuple[float, float]) -> None:
    model = make(
        env=RandomEnv(IMAGE, CONTINUOUS),
        policy="CnnPolicy",
        value_network=True,
        policy_kwargs={**SMALL, "share_features_extractor": share},
        learning_rate=rates[0],
        actor_learning_rate=rates[1],
    )
    feed(model, batches(1, dtype=th.float32, obs_shape=IMAGE.shape))
    extractor = flat(model.policy.value.features_extractor)
    model.train(gradient_steps=1, batch_size=8)
    learns = rates[1] > 0 if share else rates[0] > 0
    assert th.equal(flat(model.policy.value.features_extractor), extractor) != learns


def test_running_statistics_of_v_are_copied() -> None:
    model = make(value_network=True, policy_kwargs={**SMALL, "features_extractor_class": NormalisedFeatures})
    feed(model, batches(1, dtype=th.float32))
    model.train(gradient_steps=1, batch_size=8)
    norms = [network.features_extractor.layers[1] for network in (model.policy.value, model.policy.value_target)]
    assert norms[0].running_mean.abs().max() > 0
    for name in ("running_mean", "running_var"):
        assert th.equal(*(getattr(norm, name) for norm in norms))


# Rates, clipping, logs, policies


def test_rates_of_their_own() -> None:
    rates = {"actor": "lin_4e-3", "q_a": 2e-3, "q_b": 3e-3, "value": 5e-3, "ent_coef": 6e-3}
    given = {f"{name}_learning_rate": rate for name, rate in rates.items()}
    model = make(value_network=True, learning_rate=1e-3, **given)
    feed(model, batches(2, dtype=th.float32))
    model._current_progress_remaining = 0.25
    model.train(gradient_steps=2, batch_size=8)
    used = {name: network.optimizer.param_groups[0]["lr"] for name, network in model._networks().items()}
    assert used == pytest.approx({**rates, "actor": 1e-3})
    logged = model.logger.name_to_value
    assert logged["train/learning_rate"] == pytest.approx(1e-3)
    assert {name: logged[f"train/{name}_learning_rate"] for name in rates} == pytest.approx(used)


def test_rates_decide_how_far_each_network_moves() -> None:
    kwargs = {"policy_kwargs": {**SMALL, "optimizer_class": th.optim.SGD}, "ent_coef": 0.2, "learning_rate": 0.0}
    model = make(q_b_learning_rate=1e-2, **kwargs)
    feed(model, batches(1, dtype=th.float32))
    before = [flat(module) for module in (model.actor, model.critic.qf0, model.critic.qf1)]
    model.train(gradient_steps=1, batch_size=8)
    after = [flat(module) for module in (model.actor, model.critic.qf0, model.critic.qf1)]
    assert [th.equal(*pair) for pair in zip(before, after, strict=True)] == [True, True, False]


@pytest.mark.parametrize("bounds", [1e-3, {"q_a": 1e-3}], ids=["all networks", "Q_a only"])
def test_gradients_are_clipped_per_network(bounds: Any) -> None:
    """With plain SGD and rate 1 a network moves by its clipped gradient: Q_a and Q_b are clipped each by itself."""
    kwargs = {"policy_kwargs": {**SMALL, "optimizer_class": th.optim.SGD}, "learning_rate": 1.0, "ent_coef": 0.2}
    model, free = make(max_grad_norm=bounds, **kwargs), make(**kwargs)
    moved = {}
    for name, candidate in (("clipped", model), ("free", free)):
        feed(candidate, batches(1, dtype=th.float32))
        networks = {"q_a": candidate.critic.qf0, "q_b": candidate.critic.qf1, "actor": candidate.actor}
        before = {network: flat(module) for network, module in networks.items()}
        th.manual_seed(0)
        candidate.train(gradient_steps=1, batch_size=8)
        moved[name] = {network: (flat(module) - before[network]).norm().item() for network, module in networks.items()}
    clipped = {"q_a"} if isinstance(bounds, dict) else {"q_a", "q_b", "actor"}
    for network in ("q_a", "q_b", "actor"):
        assert moved["free"][network] > 1e-2
        assert (moved["clipped"][network] == pytest.approx(1e-3, rel=1e-2)) == (network in clipped)
    for network in ("q_a", "q_b"):  # the norm before clipping
        logged = [candidate.logger.name_to_value[f"train/{network}_grad_norm"] for candidate in (model, free)]
        assert logged[0] == pytest.approx(logged[1]) == pytest.approx(moved["free"][network], rel=1e-4)


def test_logged_quantities() -> None:
    model = make()
    batch = batches(1, dtype=th.float32)[0]
    feed(model, [batch])
    q_a, q_b = model.critic(batch.observations, batch.actions)
    th.manual_seed(0)
    _, log_prob = model.actor.action_log_prob(batch.observations)
    th.manual_seed(0)
    model.train(gradient_steps=1, batch_size=8)
    logged = model.logger.name_to_value
    assert logged["train/q_a"] == pytest.approx(q_a.mean().item(), rel=1e-4)
    assert logged["train/q_b"] == pytest.approx(q_b.mean().item(), rel=1e-4)
    assert logged["train/entropy"] == pytest.approx(-log_prob.mean().item(), rel=1e-5)
    assert logged["train/ent_coef"] == 1.0
    assert logged["train/n_updates"] == 1
    theirs = make(SAC)
    feed(theirs, [batch])
    theirs.train(gradient_steps=1, batch_size=8)
    norms = {f"train/{name}_grad_norm" for name in ("q_a", "q_b", "actor", "ent_coef")}
    assert set(logged) == set(theirs.logger.name_to_value) | norms | {"train/q_a", "train/q_b", "train/entropy"}


@pytest.mark.parametrize(("policy", "space"), [("MlpPolicy", BOX), ("CnnPolicy", IMAGE), ("MultiInputPolicy", DICT)])
def test_policies_build_the_twin_stream_critic(policy: str, space: spaces.Space) -> None:
    model = make(env=RandomEnv(space, CONTINUOUS), policy=policy)
    assert type(model.critic) is type(model.critic_target) is ContinuousCritic
    assert type(model.policy) is SACX.policy_aliases[policy]


@pytest.mark.parametrize("value_network", [False, True], ids=["v2", "v1"])
def test_layer_norm_is_in_the_critics_only(value_network: bool) -> None:
    policy = make(policy_kwargs={**SMALL, "critic_layer_norm": True}, value_network=value_network).policy
    counts = {
        name: sum(isinstance(layer, nn.LayerNorm) for layer in module.modules()) for name, module in policy.named_children()
    }
    expected = {"actor": 0, "critic": 4, **({"value": 2, "value_target": 2} if value_network else {"critic_target": 4})}
    assert {name: count for name, count in counts.items() if name in expected} == expected


def test_policy_saves_and_loads_by_itself(tmp_path: Any) -> None:
    policy = make(policy_kwargs={**SMALL, "critic_layer_norm": True}, value_network=True).policy
    policy.save(tmp_path / "policy.pth")
    th.testing.assert_close(flat(type(policy).load(tmp_path / "policy.pth")), flat(policy), rtol=0, atol=0)


def test_callers_policy_arguments_stay_as_they_were() -> None:
    policy_kwargs = {**SMALL}
    SACX("MlpPolicy", RandomEnv(BOX, CONTINUOUS), policy_kwargs=policy_kwargs, value_network=True)
    assert policy_kwargs == SMALL


# Files


@pytest.mark.parametrize(
    ("env", "policy", "theirs", "kwargs"),
    [
        (RandomEnv(BOX, CONTINUOUS), "MlpPolicy", SACPolicy, {}),
        (RandomEnv(BOX, CONTINUOUS), "MlpPolicy", SACPolicy, {"ent_coef": 0.2}),
        (RandomEnv(BOX, CONTINUOUS), "MlpPolicy", SACPolicy, {"use_sde": True}),
        (RandomEnv(BOX, CONTINUOUS), "MlpPolicy", SACPolicy, {"policy_kwargs": {**SMALL, "n_critics": 1}}),
        (RandomEnv(BOX, CONTINUOUS), "MlpPolicy", SACPolicy, {"policy_kwargs": {**SMALL, "n_critics": 3}}),
        (RandomEnv(IMAGE, CONTINUOUS), "CnnPolicy", CnnPolicy, {}),
        (
            RandomEnv(IMAGE, CONTINUOUS),
            "CnnPolicy",
            CnnPolicy,
            {"policy_kwargs": {**SMALL, "share_features_extractor": True}},
        ),
    ],
    ids=["mlp", "fixed alpha", "gsde", "one critic", "three critics", "cnn", "shared extractor"],
)
def test_sb3_zip_and_buffer_load_and_train_on(
    env: Any, policy: str, theirs: type, kwargs: dict[str, Any], tmp_path: Any
) -> None:
    """One optimizer's state becomes those of the Q and the critic's features."""
    own = {"learning_starts": 10, "batch_size": 4, "buffer_size": 100}
    sb3_model = make(SAC, env, policy, **own, **kwargs).learn(21)
    assert type(sb3_model.policy) is theirs
    sb3_model.save(tmp_path / "sb3")
    sb3_model.save_replay_buffer(tmp_path / "buffer")
    loaded = SACX.load(tmp_path / "sb3", env=env)
    assert type(loaded.policy) is getattr(sb3_ac_ext.sacx, policy)
    th.testing.assert_close(numbers(loaded), numbers(sb3_model), rtol=0, atol=0)
    th.testing.assert_close(moments(loaded), moments(sb3_model), rtol=0, atol=0)
    assert alpha(loaded) == alpha(sb3_model)
    loaded.load_replay_buffer(tmp_path / "buffer")
    for model in (sb3_model, loaded):
        model.set_logger(Logger(None, []))
        np.random.seed(1)
        th.manual_seed(1)
        model.train(gradient_steps=4, batch_size=4)
    th.testing.assert_close(numbers(loaded), numbers(sb3_model), rtol=0, atol=1e-5)
    th.testing.assert_close(moments(loaded), moments(sb3_model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("before", "after"), [("auto", 0.2), (0.2, "auto_0.3"), (0.2, 0.4)], ids=str)
@pytest.mark.parametrize("cls", [SACX, SAC], ids=["ours", "SB3's"])
def test_alpha_given_to_load_takes_effect(cls: Any, before: Any, after: Any, tmp_path: Any) -> None:
    env = RandomEnv(BOX, CONTINUOUS)
    model = make(cls, env, ent_coef=before).learn(30)
    model.save(tmp_path / "model")
    loaded = SACX.load(tmp_path / "model", env=env, ent_coef=after)
    assert alpha(loaded) == pytest.approx(0.3 if isinstance(after, str) else after)
    assert th.equal(flat(loaded.policy), flat(model.policy))
    loaded.learn(30)


def test_stored_arguments_are_json(tmp_path: Any) -> None:
    """SB3 pickles some attributes; ours add none."""
    kwargs = {
        "value_network": True,
        "exact_log_prob": True,
        "ent_coef": "auto_0.5",
        "target_entropy": -1.5,
        "target_update_every": 2,
        **{f"{name}_learning_rate": "lin_1e-4" for name in ("actor", "q_a", "q_b", "value", "ent_coef")},
        "max_grad_norm": {"q_a": 1.0, "value": 2.0},
    }
    make(**kwargs).learn(30).save(tmp_path / "ours")
    make(SAC).learn(30).save(tmp_path / "theirs")
    pickled = []
    for name in ("ours", "theirs"):
        data = json.loads(zipfile.ZipFile(tmp_path / f"{name}.zip").read("data"))
        pickled.append({key for key, value in data.items() if isinstance(value, dict) and ":serialized:" in value})
    assert pickled[0] <= pickled[1]
    loaded = SACX.load(tmp_path / "ours")
    assert {name: getattr(loaded, name) for name in kwargs} == kwargs


def test_automatic_alpha_goes_on_from_the_file(tmp_path: Any) -> None:
    model = make().learn(40)
    model.save(tmp_path / "model")
    loaded = SACX.load(tmp_path / "model", ent_coef="auto", learning_rate=0.0)
    assert loaded.log_ent_coef.item() == model.log_ent_coef.item() != 0
    state = loaded.ent_coef_optimizer.state_dict()["state"]
    th.testing.assert_close(state, model.ent_coef_optimizer.state_dict()["state"], rtol=0, atol=0)


def test_optimizer_of_another_size_is_refused() -> None:
    theirs = make(SAC, policy_kwargs={**SMALL, "n_critics": 3}).learn(30)
    parameters = theirs.get_parameters()
    with pytest.raises(ValueError, match="the optimizer has 18 parameters, the networks have 12"):
        make().set_parameters(parameters)


def test_target_entropy_can_be_auto_again_at_load_without_an_environment(tmp_path: Any) -> None:
    make(target_entropy=-0.5).save(tmp_path / "model")
    assert SACX.load(tmp_path / "model").target_entropy == -0.5
    assert SACX.load(tmp_path / "model", target_entropy="auto").target_entropy == -2.0


# Acting


def replayed(model: Any, observation: np.ndarray, deterministic: bool = False) -> None:
    """Act until it is a replay."""
    for _ in range(6):
        model.predict(observation, deterministic=deterministic)
    assert model.engine_report()[f"act({deterministic})"] == "replayed"


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("observations", "actions"),
    [
        (BOX, CONTINUOUS),
        (spaces.Box(-5, 5, (2, 3), np.float64), spaces.Box(-1, 2, (3, 7), np.float64)),
    ],
    ids=["plain", "float64 matrices"],
)
@pytest.mark.parametrize("deterministic", [True, False], ids=["mode", "sample"])
def test_acts_as_the_policy(
    observations: spaces.Box, actions: spaces.Box, activation: type[nn.Module], deterministic: bool
) -> None:
    """The same actions from the same random numbers, and as many of them."""
    model = make(env=RandomEnv(observations, actions), policy_kwargs={"net_arch": [32, 16], "activation_fn": activation})
    for rows in (None, 1, 3):
        shape = observations.shape if rows is None else (rows, *observations.shape)
        batch = (np.random.random(shape) * 4 - 1).astype(observations.dtype)
        replayed(model, batch, deterministic)
        results = []
        for predict in (model.predict, model.policy.predict):
            th.manual_seed(4)
            results.append([predict(batch, deterministic=deterministic)[0] for _ in range(3)] + [th.rand(1).numpy()])
        for ours, theirs in zip(*results, strict=True):
            assert ours.shape == theirs.shape
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
        assert np.array_equal(results[0][0], results[0][1]) == deterministic


@pytest.mark.parametrize("log_std", [-30.0, 5.0], ids=["below", "above"])
def test_acting_bounds_the_standard_deviation_as_the_policy(log_std: float) -> None:
    model = make()
    model.actor.log_std.bias.data.fill_(log_std)
    replayed(model, BOX.low)
    actions = []
    for predict in (model.predict, model.policy.predict):
        th.manual_seed(4)
        actions.append(predict(BOX.low)[0])
    np.testing.assert_allclose(*actions, rtol=0, atol=1e-5)


def double_head(model: Any) -> None:
    model.actor.mu.weight.data.mul_(2)
    model.actor.mu.bias.data.add_(0.5)


def replace_head(model: Any) -> None:
    model.actor.mu = nn.Linear(16, 2)


def hook_on_head(model: Any) -> None:
    model.actor.mu.register_forward_hook(lambda module, args, output: output + 1)


def hook_on_trunk(model: Any) -> None:
    model.actor.latent_pi[0].register_forward_hook(lambda module, args, output: output * 3)


def replace_method(model: Any) -> None:
    original = model.actor.get_action_dist_params
    model.actor.get_action_dist_params = lambda obs: (original(obs)[0] + 1, *original(obs)[1:])


def replace_method_of_distribution(model: Any) -> None:
    original = model.actor.action_dist.mode
    model.actor.action_dist.mode = lambda: original() * 0.5


def train_on(model: Any) -> None:
    model.learn(60)


@pytest.mark.parametrize(
    "change",
    [
        double_head,
        replace_head,
        hook_on_head,
        hook_on_trunk,
        replace_method,
        replace_method_of_distribution,
        train_on,
    ],
    ids=lambda function: function.__name__,
)
def test_never_acts_on_stale_weights(change: Any) -> None:
    model = make()
    replayed(model, BOX.high, deterministic=True)
    before = model.predict(BOX.high, deterministic=True)[0]
    change(model)
    after = model.predict(BOX.high, deterministic=True)[0]
    np.testing.assert_allclose(after, model.policy.predict(BOX.high, deterministic=True)[0], rtol=0, atol=1e-6)
    assert not np.allclose(after, before)


def test_standard_deviation_is_not_stale() -> None:
    model = make()
    replayed(model, BOX.high)
    model.actor.log_std.bias.data.add_(1)
    actions = []
    for predict in (model.predict, model.policy.predict):
        th.manual_seed(4)
        actions.append(predict(BOX.high)[0])
    np.testing.assert_allclose(*actions, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "report"),
    [
        ({"use_sde": True}, {"act": "ordinary: gSDE draws its noise elsewhere"}),
        ({"engine": False}, {"engine": "engine=False"}),
        ({"policy_kwargs": {"net_arch": []}}, {"act(False)": "replayed"}),
        ({"policy_kwargs": {**SMALL, "activation_fn": nn.SiLU}}, {"act(False)": "replayed"}),
        ({"env": RandomEnv(IMAGE, CONTINUOUS), "policy": "CnnPolicy"}, {"act": f"ordinary: observations are {IMAGE}"}),
        ({"env": RandomEnv(DICT, CONTINUOUS), "policy": "MultiInputPolicy"}, {"act": f"ordinary: observations are {DICT}"}),
    ],
    ids=["gsde", "engine off", "no layers", "SiLU", "images", "dict"],
)
def test_report_of_acting(kwargs: dict[str, Any], report: dict[str, str]) -> None:
    model = make(**kwargs)
    for _ in range(6):
        model.predict(model.observation_space.sample())
    assert {key: how for key, how in model.engine_report().items() if key != "replay"} == report


def test_policies_in_float64_act_as_sb3s() -> None:
    """They do not, as observations are float32."""
    model = make()
    replayed(model, BOX.high)
    model.policy.double()
    for predict in (model.predict, model.policy.predict):
        with pytest.raises(RuntimeError, match="same dtype"):
            predict(BOX.high)


def test_rollouts_act_by_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, called = make(), []
    original = type(model.actor).get_action_dist_params
    monkeypatch.setattr(type(model.actor), "get_action_dist_params", lambda *args: called.append(1) or original(*args))
    model.learn(60)
    assert len(called) <= 12  # the first times, of 40 actions and twice 40 updates
    assert model.engine_report()["act(False)"] == "replayed"


def test_policies_with_a_predict_of_their_own_are_asked() -> None:
    class Constant(sb3_ac_ext.sacx.MlpPolicy):
        def predict(self, observation: Any, *args: Any, **kwargs: Any) -> Any:
            return np.full(2, 0.5, np.float32), None

    model = make(policy=Constant)
    for _ in range(6):
        assert model.predict(BOX.high)[0].tolist() == [0.5, 0.5]
    assert model.engine_report()["act"] == "ordinary: a Constant acts in its own way"


def test_actors_with_a_forward_of_their_own_are_asked() -> None:
    class Halved(Actor):
        def forward(self, obs: Any, deterministic: bool = False) -> th.Tensor:
            return super().forward(obs, deterministic) / 2

    class Policy(sb3_ac_ext.sacx.MlpPolicy):
        def make_actor(self, features_extractor: Any = None) -> Actor:
            return Halved(**self._update_features_extractor(self.actor_kwargs, features_extractor)).to(self.device)

    ours, plain = make(policy=Policy, env=RandomEnv(BOX, BOX)), make(env=RandomEnv(BOX, BOX))
    for model in (ours, plain):
        replayed(model, BOX.high, deterministic=True)
    actions = [model.predict(BOX.high, deterministic=True)[0] for model in (ours, plain)]
    np.testing.assert_allclose(actions[0], actions[1] / 2, rtol=0, atol=1e-6)
