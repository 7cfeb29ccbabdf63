"""DDPGX: its losses by hand, the paper's architecture, exploration; what is as in SB3's DDPG is tested in test_off_policy."""

from typing import Any

import numpy as np
import pytest
import torch as th
from batches import SGD, batches, engine_on_and_off, feed, flat
from environments import BOX, CONTINUOUS, DICT, IMAGE, RandomEnv, ScriptedEnv
from gymnasium import spaces
from models import small_model
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.vec_env import DummyVecEnv
from subjects import Intervention, assert_same, train
from torch import nn
from torch.nn import functional as F

from sb3_ac_ext import DDPGX
from sb3_ac_ext.buffers.replay import Transitions
from sb3_ac_ext.ddpgx.networks import LateActionCritic
from sb3_ac_ext.ddpgx.parameter_noise import ParameterNoise, action_distance, perturbed_parameters
from sb3_ac_ext.validation import NonFiniteError

SMALL: dict[str, Any] = {"net_arch": [16, 12]}
LATE = {**SMALL, "action_layer": 1}
NORMED = {**LATE, "batch_norm": True}
PARAMETER_NOISE = {"std": 0.1, "distance": 0.2}


def make(**kwargs: Any) -> Any:
    return small_model("ddpgx", **{"policy_kwargs": SMALL, **kwargs})


def norms(module: nn.Module) -> list[nn.BatchNorm1d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm1d)]


def single(rows: int = 8) -> Any:
    """One batch with discounts of its own."""
    return batches(2, rows=rows)[1]


def scatter(model: Any) -> None:
    """Let online and target networks differ, and the critics among each other."""
    for network in (model.actor, model.critic):
        for parameter in network.parameters():
            parameter.data.add_(0.05 * th.randn_like(parameter))


def update(model: Any, *samples: Any) -> None:
    feed(model, list(samples))
    for sample in samples:
        model.train(gradient_steps=1, batch_size=len(sample.actions))


def outputs_of_update(model: Any, batch: Any, weights: th.Tensor | None = None) -> dict[str, th.Tensor]:
    """What one update with a batch that has its own discounts returns."""
    with model._updates() as engine:
        return dict(engine.run(model._update, Transitions(*batch, weights)))


# The update


@pytest.mark.parametrize(
    "policy_kwargs",
    [SMALL, LATE, {**SMALL, "n_critics": 2}, {**LATE, "n_critics": 3}],
    ids=["action first", "action late", "two critics", "three with late action"],
)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_losses_by_hand(policy_kwargs: dict[str, Any], weighted: bool) -> None:
    """
    Target actor, least target critic, termination, discounts: each is needed to get the critic's loss and its gradient.

    Weights and errors are what a prioritised replay buffer gives and gets. The actor ascends the first critic, which rests.
    """
    model = make(policy_kwargs=policy_kwargs, critic_learning_rate=0.0)
    scatter(model)
    batch = single(rows=32)
    assert 0 < batch.dones.sum() < 32
    with th.no_grad():
        next_q = model.critic_target(batch.next_observations, model.actor_target(batch.next_observations))
        least = next_q[0]
        for q in next_q[1:]:
            least = th.where(q < least, q, least)
        target = th.where(batch.dones.bool(), batch.rewards, batch.rewards + batch.discounts * least)
    weights = th.rand(32, 1) if weighted else th.ones(32, 1)
    errors = [q - target for q in model.critic(batch.observations, batch.actions)]
    critic_loss = sum((weights * error**2).sum() / 32 for error in errors)
    actor_loss = -model.critic(batch.observations, model.actor(batch.observations))[0].mean()
    expected = [
        *zip(model.critic.parameters(), th.autograd.grad(critic_loss, [*model.critic.parameters()]), strict=True),
        *zip(model.actor.parameters(), th.autograd.grad(actor_loss, [*model.actor.parameters()]), strict=True),
    ]

    outputs = outputs_of_update(model, batch, weights if weighted else None)
    th.testing.assert_close(outputs["critic_loss"], critic_loss.detach())
    th.testing.assert_close(outputs["actor_loss"], actor_loss.detach())
    assert ("td_errors" in outputs) == weighted
    if weighted:
        th.testing.assert_close(outputs["td_errors"], sum(error.detach().abs() for error in errors) / len(errors))
    for parameter, gradient in expected:
        th.testing.assert_close(parameter.grad, gradient)
    constants = [*model.actor_target.parameters(), *model.critic_target.parameters()]
    assert all(parameter.grad is None for parameter in constants)


@engine_on_and_off
def test_frozen_actor_stays_and_the_critic_learns(engine: bool) -> None:
    model = make(engine=engine)
    model.actor.requires_grad_(False)
    actor, critic = flat(model.actor), flat(model.critic)
    update(model, *[single() for _ in range(8)])
    assert th.equal(flat(model.actor), actor)
    assert not th.equal(flat(model.critic), critic)
    assert np.isfinite(model.logger.name_to_value["train/actor_loss"])
    assert "train/action_gradient" not in model.logger.name_to_value


def test_action_gradient_is_logged() -> None:
    model = make(policy_kwargs=LATE, learning_rate=0.0)
    samples, slopes = batches(2), []
    for batch in samples:
        actions = model.actor(batch.observations).detach().requires_grad_()
        value = model.critic(batch.observations, actions)[0]
        slopes.append(th.autograd.grad(value.sum(), actions)[0].abs().mean().item())
    feed(model, samples)
    model.train(gradient_steps=2, batch_size=8)
    assert model.logger.name_to_value["train/action_gradient"] == pytest.approx(np.mean(slopes), rel=1e-5)


ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "action late": ("mlp", {"policy_kwargs": LATE}),
    "batch norm": ("mlp", {"policy_kwargs": {**SMALL, "batch_norm": True}}),
    "batch norm, action late": ("mlp", {"policy_kwargs": NORMED}),
    "two critics": ("mlp", {"policy_kwargs": {**NORMED, "n_critics": 2}}),
    "weight decay": ("mlp", {"critic_weight_decay": 0.1, "max_grad_norm": 0.01}),
    "images": ("images", {"policy_kwargs": LATE}),
    "dict": ("dict", {"policy_kwargs": {**NORMED, "final_layer_init": 3e-3}}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_engine_changes_nothing(name: str) -> None:
    variant, changes = ARCHITECTURES[name]
    case = Intervention("nothing", lambda _: None, variant=variant, changes=tuple(changes.items()))
    assert_same(train("ddpgx", True, case), train("ddpgx", False, case), 1e-5)
    report = small_model("ddpgx", variant, **case.arguments()).learn(20).engine_report()
    assert report["update"] == "replayed"


# The action's layer


def test_late_action_by_hand() -> None:
    """The paper's network written out."""
    critic = make(policy_kwargs=LATE).critic
    w1, b1, w2, b2, w3, b3 = critic.parameters()
    batch = single()
    h1 = F.relu(F.linear(batch.observations, w1, b1))
    h2 = F.relu(F.linear(h1, w2[:, :16], b2) + F.linear(batch.actions, w2[:, 16:]))
    th.testing.assert_close(critic(batch.observations, batch.actions)[0], F.linear(h2, w3, b3))
    th.testing.assert_close(critic.q1_forward(batch.observations, batch.actions), F.linear(h2, w3, b3))


@pytest.mark.parametrize(("action_layer", "sizes"), [(0, [6, 16, 12, 8]), (1, [4, 18, 12, 8]), (2, [4, 16, 14, 8])])
def test_action_enters_at_its_layer(action_layer: int, sizes: list[int]) -> None:
    model = make(policy_kwargs={"net_arch": [16, 12, 8], "action_layer": action_layer})
    for critic in (model.critic, model.critic_target):
        assert type(critic) is (LateActionCritic if action_layer else ContinuousCritic)
        assert [layer.in_features for layer in critic.modules() if isinstance(layer, nn.Linear)] == sizes


def test_the_first_of_several_late_critics_has_the_names_of_a_single_one() -> None:
    """So that a file of a single critic fits."""
    alone, critic = make(policy_kwargs=NORMED).critic, make(policy_kwargs={**NORMED, "n_critics": 2}).critic
    single_names, names = list(alone.state_dict()), list(critic.state_dict())
    assert single_names[0] == "state_layers.0.weight" and single_names[-1] == "qf0.2.bias"
    assert names[: len(single_names)] == single_names
    assert all(name.startswith(("state_layers1.", "qf1.")) for name in names[len(single_names) :])
    assert len(names) == 2 * len(single_names)


@pytest.mark.parametrize("share", [True, False], ids=["shared extractor", "own extractors"])
@pytest.mark.parametrize("network", ["actor", "critic"])
def test_whose_loss_the_critics_extractor_learns_from(network: str, share: bool) -> None:
    rates = {"learning_rate": 0.0, f"{network}_learning_rate": 1e-3}
    policy_kwargs = {**LATE, "share_features_extractor": share, "features_extractor_kwargs": {"features_dim": 20}}
    model = small_model("ddpgx", "images", policy_kwargs=policy_kwargs, **rates)
    assert model.critic.qf0[0].in_features == 16 + 2
    extractor, layers = flat(model.critic.features_extractor), flat(getattr(model, network))
    model.learn(12)
    assert th.equal(flat(model.critic.features_extractor), extractor) == (network == ("critic" if share else "actor"))
    assert not th.equal(flat(getattr(model, network)), layers)


def test_actors_loss_reaches_a_shared_extractor_by_the_actions_alone() -> None:
    model = small_model("ddpgx", "shared images", policy_kwargs=LATE)
    extractor, observations = [*model.actor.features_extractor.parameters()], th.rand(3, *IMAGE.shape)
    actions = model.actor(observations)
    found = th.autograd.grad(model.critic.q1_forward(observations, actions).sum(), extractor, retain_graph=True)
    (slopes,) = th.autograd.grad(model.critic(observations, actions)[0].sum(), actions, retain_graph=True)
    th.testing.assert_close(found, th.autograd.grad((slopes * actions).sum(), extractor))


# Initialisation, weight decay


def test_initial_ranges() -> None:
    policy = make(policy_kwargs={"net_arch": [200, 100], "action_layer": 1, "final_layer_init": 3e-3}).policy
    for network in (policy.actor, policy.critic):
        layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        bounds = [layer.in_features**-0.5 for layer in layers[:-1]] + [3e-3]
        assert len(bounds) == 3
        for layer, bound in zip(layers, bounds, strict=True):
            assert 0.9 * bound < layer.weight.abs().max() <= bound
            assert layer.bias.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
    assert th.equal(flat(policy.actor_target), flat(policy.actor))
    assert th.equal(flat(policy.critic_target), flat(policy.critic))


@pytest.mark.parametrize("policy_kwargs", [LATE, NORMED], ids=["plain", "batch norm"])
def test_weight_decay_is_the_critics_weights_alone(policy_kwargs: dict[str, Any]) -> None:
    """With plain SGD and rate 1 the difference that the decay makes is the decay times the weight, whatever the clipping."""
    kwargs = {"policy_kwargs": {**policy_kwargs, **SGD}, "max_grad_norm": 1e-2, "learning_rate": 1.0, "tau": 0.0}
    decayed, free = make(critic_weight_decay=0.1, **kwargs), make(**kwargs)
    before = {name: value.clone() for name, value in free.critic.named_parameters()}
    for model in (decayed, free):
        update(model, single())
    after = dict(decayed.critic.named_parameters())
    for name, value in free.critic.named_parameters():
        decay = 0.1 * before[name] if value.dim() == 2 else th.zeros_like(value)
        th.testing.assert_close(value - after[name], decay, rtol=1e-4, atol=1e-6)
    logged = [model.logger.name_to_value["train/critic_grad_norm"] for model in (decayed, free)]
    assert logged[0] == logged[1] > 1e-2  # the loss's, before clipping


def test_layers_that_the_critics_loss_does_not_train_do_not_decay() -> None:
    model = small_model("ddpgx", "shared images", actor_learning_rate=0.0, critic_weight_decay=0.1)
    extractor, layers = flat(model.critic.features_extractor), flat(model.critic.qf0)
    model.learn(12)
    assert th.equal(flat(model.critic.features_extractor), extractor)
    assert not th.equal(flat(model.critic.qf0), layers)


# Batch normalisation


@pytest.mark.parametrize(("action_layer", "sizes"), [(0, [4]), (1, [4, 16]), (2, [4, 16, 12])])
def test_what_is_normalised(action_layer: int, sizes: list[int]) -> None:
    model = make(policy_kwargs={"net_arch": [16, 12, 8], "action_layer": action_layer, "batch_norm": True})
    for actor in (model.actor, model.actor_target):
        assert [norm.num_features for norm in norms(actor)] == [4, 16, 12, 8]
        kinds = [nn.BatchNorm1d, *[nn.Linear, nn.BatchNorm1d, nn.ReLU] * 3, nn.Linear, nn.Tanh]
        assert [type(layer) for layer in actor.mu] == kinds
    for critic in (model.critic, model.critic_target):
        assert [norm.num_features for norm in norms(critic)] == sizes
        assert [norm.num_features for norm in norms(critic.state_layers)] == sizes
    assert not norms(make(policy_kwargs=LATE).policy)


def test_normalised_networks_by_hand() -> None:
    """The actor on the statistics of its batch, critic and targets on the running ones, which the critic's loss updates."""
    model = make(policy_kwargs=NORMED)
    update(model, *[single() for _ in range(3)])
    model.learning_rate, model.tau = 0.0, 0.0
    model._setup_lr_schedule()
    scatter(model)
    batch = single(rows=16)

    def norm(x: th.Tensor, layer: nn.BatchNorm1d, of_batch: bool) -> th.Tensor:
        mean = x.mean(0) if of_batch else layer.running_mean
        variance = x.var(0, unbiased=False) if of_batch else layer.running_var
        return (x - mean) / (variance + layer.eps).sqrt() * layer.weight + layer.bias

    def hidden(layers: nn.Sequential, x: th.Tensor, of_batch: bool) -> th.Tensor:
        x = norm(x, layers[0], of_batch)
        return F.relu(norm(layers[1](x), layers[2], of_batch))

    def mu(actor: Any, x: th.Tensor, of_batch: bool) -> th.Tensor:
        x = hidden(actor.mu[:4], x, of_batch)
        x = F.relu(norm(actor.mu[4](x), actor.mu[5], of_batch))
        return actor.mu[7](x).tanh()

    def q(critic: Any, x: th.Tensor, a: th.Tensor, of_batch: bool) -> th.Tensor:
        return critic.qf0[2](F.relu(critic.qf0[0](th.cat([hidden(critic.state_layers, x, of_batch), a], dim=1))))

    with th.no_grad():
        next_a = mu(model.actor_target, batch.next_observations, False)
        target = batch.rewards + batch.discounts * (1 - batch.dones) * q(
            model.critic_target, batch.next_observations, next_a, False
        )
        before = model.critic.state_layers[0].running_mean.clone()
    outputs = outputs_of_update(model, batch)
    with th.no_grad():
        taken_in = 0.9 * before + 0.1 * batch.observations.mean(0)
        th.testing.assert_close(model.critic.state_layers[0].running_mean, taken_in)
        expected = F.mse_loss(q(model.critic, batch.observations, batch.actions, False), target)
        th.testing.assert_close(outputs["critic_loss"], expected)
        actions = mu(model.actor, batch.observations, True)
        th.testing.assert_close(outputs["actor_loss"], -q(model.critic, batch.observations, actions, False).mean())


def test_statistics_are_updated_once_and_copied_to_the_targets() -> None:
    model = make(policy_kwargs=NORMED, tau=0.0)
    batch = single(rows=64)
    update(model, batch)
    for network in ("actor", "critic"):
        online, target = norms(getattr(model, network)), norms(getattr(model, f"{network}_target"))
        first = online[0]
        assert first.num_batches_tracked == 1
        th.testing.assert_close(first.running_mean, 0.1 * batch.observations.mean(0))
        th.testing.assert_close(first.running_var, 0.9 + 0.1 * batch.observations.var(0))
        for ours, theirs in zip(online, target, strict=True):
            assert th.equal(ours.running_mean, theirs.running_mean)
            assert th.equal(ours.running_var, theirs.running_var)
            assert theirs.num_batches_tracked == 0


def test_action_does_not_depend_on_the_other_observations() -> None:
    model = make(policy_kwargs=NORMED)
    update(model, single())
    observations = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    together = model.predict(observations)[0]
    np.testing.assert_allclose(together, [model.predict(observation)[0] for observation in observations], atol=1e-6)


@pytest.mark.parametrize("kwargs", [{}, {"parameter_noise": {**PARAMETER_NOISE, "interval": 1}}], ids=["plain", "noise"])
def test_acting_changes_no_statistics(kwargs: dict[str, Any]) -> None:
    """Steps of two environments, a batch of two, after an update has left the policy in training mode."""
    env = make_vec_env(lambda: RandomEnv(BOX, CONTINUOUS), n_envs=2)
    model = make(env=env, policy_kwargs=NORMED, learning_starts=4, batch_size=4, gradient_steps=0, **kwargs).learn(8)
    model.train(gradient_steps=1, batch_size=4)
    assert model.actor.training
    before = flat(model.policy)
    model.learn(12, reset_num_timesteps=False)
    assert th.equal(flat(model.policy), before)


# Exploration


def acting(env: Any = None, **kwargs: Any) -> Any:
    """A model in front of its first observation."""
    model = make(env=env, learning_starts=0, **kwargs)
    model._setup_learn(100)
    return model


def greedy(model: Any) -> np.ndarray:
    return model.policy.scale_action(model.predict(model._last_obs)[0])


def test_ornstein_uhlenbeck_reaches_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    model = acting(exploration_noise={"type": "ornstein-uhlenbeck", "start": 0.2, "dt": 0.01})
    normals = iter([1.0, 0.0, -1.0])
    monkeypatch.setattr(np.random, "normal", lambda *args, size, **kwargs: np.full(size, next(normals)))
    for expected in (0.02, 0.01997, -0.000059955):
        action, scaled = model._sample_action(0, model.action_noise)
        np.testing.assert_allclose(scaled - greedy(model), np.full((1, 2), expected), atol=1e-6)
        np.testing.assert_allclose(action, model.policy.unscale_action(scaled))


def test_warm_up_with_noise_acts_around_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(exploration_noise={"type": "normal", "start": 0.5}, warmup="noise")
    model._setup_learn(100)
    monkeypatch.setattr(np.random, "normal", lambda *args, **kwargs: np.array([0.25, -0.125]))
    for steps, factor in ((0, 1.0), (20, 0.5)):
        model.num_timesteps = steps
        _, scaled = model._sample_action(20, model.action_noise)
        np.testing.assert_allclose(scaled - greedy(model), [[0.25 * factor, -0.125 * factor]], atol=1e-6)
    share = model.logger.name_to_value["train/exploration_share"]
    assert share == pytest.approx((0.25 + 0.125) / 4 * (1.0 + 0.5) / 2, rel=1e-5)


def test_exploration_share_is_the_executed_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is clipped is not executed; a whole range of 2 is a share of 1."""
    model = acting(exploration_noise={"type": "normal", "start": 1.0})
    draws = iter([np.array([0.25, -0.125]), np.array([-9.0, 9.0])])
    monkeypatch.setattr(np.random, "normal", lambda *args, **kwargs: next(draws))
    model._sample_action(0, model.action_noise)
    assert model.logger.name_to_value["train/exploration_share"] == pytest.approx((0.25 + 0.125) / 4, rel=1e-5)
    model._sample_action(0, model.action_noise)
    executed = np.abs(np.array([-1, 1]) - greedy(model)).mean() / 2
    expected = ((0.25 + 0.125) / 4 + executed) / 2
    assert model.logger.name_to_value["train/exploration_share"] == pytest.approx(expected, rel=1e-5)


def test_exploration_share_is_silent_while_actions_are_uniform() -> None:
    model = make(learning_starts=30).learn(30)
    assert "train/exploration_share" not in model.logger.name_to_value
    assert make(learning_starts=5).learn(30).logger.name_to_value["train/exploration_share"] == 0  # no noise


# Noise on parameters


@pytest.mark.parametrize(("distance", "expected"), [(0.3, 0.1 / 1.5), (0.1, 0.15), (0.2, 0.15)])
def test_std_adapts_towards_the_distance(distance: float, expected: float) -> None:
    noise = ParameterNoise.parse({**PARAMETER_NOISE, "coefficient": 1.5})
    assert noise.adapted(0.1, distance) == pytest.approx(expected)


@pytest.mark.parametrize("noise", [{"std": 3e38, "distance": 1e-9}, {**PARAMETER_NOISE, "coefficient": 3e38, "interval": 1}])
def test_noise_that_overflows_stops_before_the_action(noise: dict[str, Any]) -> None:
    """By an error that a search prunes on."""
    with pytest.raises(NonFiniteError, match=r"actions became non-finite with parameter_noise=.* whose std is \S+ by now"):
        make(parameter_noise=noise, learning_starts=4, learning_rate=0.0).learn(50)


def test_distance_is_the_root_mean_square_over_observations_and_components() -> None:
    actor, perturbed = make().actor, make().actor
    observations = single(rows=16).observations
    th.manual_seed(1)
    distance = action_distance(actor, observations, 0.2)
    th.manual_seed(1)
    perturbed.load_state_dict({name: p + 0.2 * th.randn_like(p) for name, p in actor.named_parameters()})
    with th.no_grad():
        expected = (actor(observations) - perturbed(observations)).square().mean() ** 0.5
    assert distance == pytest.approx(expected.item(), rel=1e-5)
    assert distance > 0.05


@pytest.mark.parametrize("std", [1e-3, 3.0])
def test_distance_is_reached_from_either_side(std: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sigma goes up or down with equal chances where half of the draws are too far."""
    distances: list[float] = []

    def measured(*args: Any) -> float:
        distances.append(action_distance(*args))
        return distances[-1]

    monkeypatch.setattr("sb3_ac_ext.ddpgx.ddpgx.action_distance", measured)
    spec = {"std": std, "distance": 0.2, "coefficient": 1.1, "interval": 1}
    model = make(parameter_noise=spec, learning_rate=0.0, batch_size=32).learn(270)
    assert abs(distances[0] - 0.2) > 0.15
    assert np.median(distances[-200:]) == pytest.approx(0.2, rel=0.15)
    assert model.logger.name_to_value["train/parameter_noise_std"] == model._parameter_noise_std
    assert 0 < model.logger.name_to_value["train/parameter_noise_distance"] < 1


def test_std_adapts_once_an_interval_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_vec_env(lambda: RandomEnv(BOX, CONTINUOUS), n_envs=2)
    monkeypatch.setattr("sb3_ac_ext.ddpgx.ddpgx.action_distance", lambda *args: 0.0)
    model = make(env=env, parameter_noise={**PARAMETER_NOISE, "interval": 5}, learning_starts=10, batch_size=4)
    model.learn(40)  # at 16, 20, 26, 30, 36, 40: the first steps at or beyond a multiple of 5
    assert model._parameter_noise_std == pytest.approx(0.1 * 1.01**6)


def test_normalisations_are_not_perturbed() -> None:
    actor = make(policy_kwargs=NORMED).actor
    names = {name for name, _ in actor.named_parameters()} - {
        f"mu.{i}.{kind}" for i in (0, 2, 5) for kind in ("weight", "bias")
    }
    perturbed = perturbed_parameters(actor, 0.5)
    assert set(perturbed) == names and len(names) == 6
    difference = th.cat([(value - actor.get_parameter(name)).flatten() for name, value in perturbed.items()])
    assert difference.std().item() == pytest.approx(0.5, rel=0.1)
    assert not any(value.requires_grad for value in perturbed.values())


class Watcher(BaseCallback):
    """Notes the parameters that each environment acts with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[float]] = []

    def _on_step(self) -> bool:
        perturbed = self.model._perturbed._parameters
        self.seen.append([perturbed[i]["mu.0.bias"][0].item() for i in range(len(perturbed))])
        return True


def test_each_environment_keeps_its_actor_for_an_episode() -> None:
    """Also while the actor learns."""
    watcher = Watcher()
    env = DummyVecEnv([lambda: ScriptedEnv(length=3), lambda: ScriptedEnv(length=5)])
    model = make(env=env, parameter_noise=PARAMETER_NOISE, learning_starts=0, batch_size=4, learning_rate=0.1)
    model.learn(20, callback=watcher)
    first, second = zip(*watcher.seen, strict=True)
    assert [first[i] == first[i - 1] for i in range(1, 10)] == [True, True, False, True, True, False, True, True, False]
    assert [second[i] == second[i - 1] for i in range(1, 10)] == [True, True, True, True, False, True, True, True, True]
    assert not set(first) & set(second)
    model.learn(1, callback=watcher)  # the environments are reset
    assert watcher.seen[-1][0] not in first and watcher.seen[-1][1] not in second


def test_each_environment_has_its_own_actor_with_action_noise_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = {"parameter_noise": {"std": 0.3, "distance": 0.2}, "exploration_noise": {"type": "normal", "start": 1.0}}
    env = make_vec_env(lambda: RandomEnv(BOX, CONTINUOUS), n_envs=2)
    model = acting(env=env, policy_kwargs={"net_arch": [64, 64]}, **noise)
    monkeypatch.setattr(np.random, "normal", lambda *args, **kwargs: np.zeros(2))
    _, plain = model._sample_action(0, model.action_noise, 2)
    observations = th.as_tensor(model._last_obs)
    for i, own in model._perturbed._parameters.items():
        difference = th.cat([(own[name] - value).flatten() for name, value in model.actor.named_parameters()])
        assert difference.std().item() == pytest.approx(0.3, rel=0.05)
        with th.no_grad():
            expected = th.func.functional_call(model.actor, own, observations[i : i + 1])
        np.testing.assert_allclose(plain[i : i + 1], expected.numpy(), atol=1e-6)
    assert np.abs(plain - greedy(model)).max(axis=1).min() > 1e-3
    model._last_episode_starts = np.array([False, False])
    monkeypatch.setattr(np.random, "normal", lambda *args, **kwargs: np.array([0.01, -0.02]))
    _, noisy = model._sample_action(0, model.action_noise, 2)
    np.testing.assert_allclose(noisy - plain, [[0.01, -0.02]] * 2, atol=1e-6)


@pytest.mark.parametrize(("policy", "space"), [("CnnPolicy", IMAGE), ("MultiInputPolicy", DICT)])
def test_parameter_noise_with_images_and_dicts(policy: str, space: spaces.Space) -> None:
    env = make_vec_env(lambda: RandomEnv(space, spaces.Box(-1, 1, (2, 1))), n_envs=2)
    model = make(env=env, policy=policy, parameter_noise=PARAMETER_NOISE, learning_starts=4, batch_size=4)
    assert model.learn(16)._n_updates > 0


def test_adapted_std_is_saved(tmp_path: Any) -> None:
    env = RandomEnv(BOX, CONTINUOUS)
    model = make(env=env, parameter_noise={**PARAMETER_NOISE, "interval": 1}).learn(40)
    assert model._parameter_noise_std != 0.1
    model.save(tmp_path / "model")
    assert DDPGX.load(tmp_path / "model")._parameter_noise_std == model._parameter_noise_std
    without = DDPGX.load(tmp_path / "model", env=env, parameter_noise=None)
    assert without._parameter_noise_std is None
    without.learn(10)


def test_stats_window_size_which_sb3s_ddpg_does_not_take() -> None:
    assert make(stats_window_size=7).learn(8).ep_info_buffer.maxlen == 7
