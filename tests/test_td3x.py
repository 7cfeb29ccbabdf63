"""TD3X: equal to SB3's TD3 with its extras off, the properties of Algorithm 1, and its own arguments."""

from typing import Any

import numpy as np
import pytest
import torch as th
from batches import batches, feed, flat
from environments import BOX, CONTINUOUS, DICT, IMAGE, RandomEnv, ScriptedEnv
from gymnasium import spaces
from stable_baselines3 import TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ContinuousCritic
from torch import nn

from sb3_ac_ext import TD3X

SMALL: dict[str, Any] = {"net_arch": [16, 16]}


def make(cls: type[TD3] = TD3X, env: Any = None, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    kwargs = {"policy_kwargs": SMALL, "seed": 0, "buffer_size": 500, "learning_starts": 20, **kwargs}
    model = cls(policy, env or RandomEnv(BOX, CONTINUOUS), **kwargs)
    model.set_logger(Logger(None, []))
    return model


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(
    ("policy", "space", "policy_kwargs"),
    [
        ("MlpPolicy", BOX, SMALL),
        ("MlpPolicy", BOX, {"net_arch": {"pi": [8], "qf": [16, 8, 4]}, "activation_fn": nn.Tanh}),
        ("CnnPolicy", IMAGE, SMALL),
        ("CnnPolicy", IMAGE, {**SMALL, "share_features_extractor": True}),
    ],
    ids=["mlp", "unequal", "images", "shared extractor"],
)
@pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
def test_equals_td3_with_extras_off(policy: str, space: spaces.Box, policy_kwargs: dict[str, Any], engine: bool) -> None:
    kwargs = {"policy_kwargs": policy_kwargs, "learning_rate": lambda progress: 1e-3 * progress}
    env = RandomEnv(space, CONTINUOUS)
    models = theirs, ours = make(TD3, env, policy, **kwargs), make(TD3X, env, policy, engine=engine, **kwargs)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=0)  # same seed, same initial weights
    for model in models:
        model.policy.double()
        feed(model, batches(6, obs_shape=space.shape))
    for update in range(6):
        for model in models:
            model._current_progress_remaining = 1 - update / 10
            th.manual_seed(update)
            model.train(gradient_steps=1, batch_size=8)
        th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-10)
        for network in ("actor", "critic"):
            moments = [getattr(model, network).optimizer.state_dict()["state"] for model in models]
            th.testing.assert_close(*moments, rtol=0, atol=1e-10)


@pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
def test_learns_the_same_as_td3_from_the_same_seed(engine: bool) -> None:
    theirs, ours = make(TD3, env="Pendulum-v1").learn(120), make(TD3X, env="Pendulum-v1", engine=engine).learn(120)
    np.testing.assert_allclose(ours.replay_buffer.actions[:40], theirs.replay_buffer.actions[:40], atol=1e-6)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=0 if not engine else 1e-4)


def test_streams_are_disjoint() -> None:
    critic = make().critic
    q_a, q_b = critic(th.randn(5, 4), th.randn(5, 2))
    for own, other, q in ((critic.qf0, critic.qf1, q_a), (critic.qf1, critic.qf0, q_b)):
        critic.zero_grad()
        q.sum().backward(retain_graph=True)
        assert all(parameter.grad is not None for parameter in own.parameters())
        assert all(parameter.grad is None for parameter in other.parameters())
    assert not th.equal(q_a, q_b)


def move_by_gradient(**kwargs: Any) -> Any:
    """A model whose networks take each the step -gradient, actor and targets in every update."""
    policy_kwargs = {**SMALL, "optimizer_class": th.optim.SGD}
    return make(policy_kwargs=policy_kwargs, **{"learning_rate": 1.0, "policy_delay": 1, **kwargs})


def assert_moved_by(network: nn.Module, before: th.Tensor, gradients: tuple[th.Tensor, ...]) -> None:
    moved = flat(network) - before
    th.testing.assert_close(moved, -th.cat([gradient.flatten() for gradient in gradients]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
def test_actor_loss_is_the_first_stream_only(engine: bool) -> None:
    model = move_by_gradient(critic_learning_rate=0.0, engine=engine)
    batch = batches(1, dtype=th.float32)[0]
    feed(model, [batch])
    expected = -model.critic.qf0(th.cat([batch.observations, model.actor(batch.observations)], dim=1)).mean()
    gradients = th.autograd.grad(expected, list(model.actor.parameters()))
    before = flat(model.actor)
    model.train(gradient_steps=1, batch_size=8)
    assert model.logger.name_to_value["train/actor_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert_moved_by(model.actor, before, gradients)


@pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
def test_critic_update_by_hand(engine: bool) -> None:
    """Target networks, the smaller stream, clipped noise, termination: each is needed to get this loss."""
    model = move_by_gradient(target_policy_noise=0.4, target_noise_clip=0.3, gamma=0.9, policy_delay=2, engine=engine)
    for network in (model.actor, model.critic):  # online and target networks differ
        for parameter in network.parameters():
            parameter.data.add_(0.1)
    batch = batches(1, rows=64, dtype=th.float32)[0]
    feed(model, [batch])
    th.manual_seed(5)
    noise = th.empty(64, 2).normal_(0, 0.4)
    assert noise.abs().max() > 0.3
    action = (model.actor_target.mu(batch.next_observations) + noise.clip(-0.3, 0.3)).clip(-1, 1)
    inputs = th.cat([batch.next_observations, action], dim=1)
    q_a, q_b = model.critic_target.qf0(inputs), model.critic_target.qf1(inputs)
    target = (batch.rewards + 0.9 * (1 - batch.dones) * th.where(q_a < q_b, q_a, q_b)).detach()
    inputs = th.cat([batch.observations, batch.actions], dim=1)
    expected = ((model.critic.qf0(inputs) - target) ** 2 + (model.critic.qf1(inputs) - target) ** 2).mean()
    gradients = th.autograd.grad(expected, list(model.critic.parameters()))
    others = (model.actor, model.actor_target, model.critic_target)
    before, others_before = flat(model.critic), [*map(flat, others)]
    th.manual_seed(5)
    model.train(gradient_steps=1, batch_size=64)
    assert model.logger.name_to_value["train/critic_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert_moved_by(model.critic, before, gradients)
    assert all(map(th.equal, map(flat, others), others_before))
    assert all(parameter.grad is None for network in others for parameter in network.parameters())


@pytest.mark.parametrize("policy_delay", [1, 2, 3])
def test_actor_and_targets_move_every_policy_delay_updates(policy_delay: int) -> None:
    model = make(policy_delay=policy_delay, tau=0.25)
    feed(model, batches(7, dtype=th.float32))
    for update in range(1, 8):
        critic, critic_target = flat(model.critic), flat(model.critic_target)
        actor, actor_target = flat(model.actor), flat(model.actor_target)
        model.train(gradient_steps=1, batch_size=8)
        assert not th.equal(flat(model.critic), critic)
        if update % policy_delay:
            assert th.equal(flat(model.actor), actor)
            assert th.equal(flat(model.actor_target), actor_target)
            assert th.equal(flat(model.critic_target), critic_target)
        else:
            assert not th.equal(flat(model.actor), actor)
            th.testing.assert_close(flat(model.actor_target), 0.75 * actor_target + 0.25 * flat(model.actor))
            th.testing.assert_close(flat(model.critic_target), 0.75 * critic_target + 0.25 * flat(model.critic))


def test_delay_counts_updates_across_train_calls_and_gradient_steps() -> None:
    models = []
    for calls, gradient_steps in ((6, 1), (2, 3)):
        model = make(policy_delay=2)
        feed(model, batches(6, dtype=th.float32))
        for _ in range(calls):
            model.train(gradient_steps, batch_size=8)
        models.append(model)
    ones, three = models
    assert th.equal(flat(ones.policy), flat(three.policy))


@pytest.mark.parametrize(("truncates", "stored_done"), [(False, 1.0), (True, 0.0)], ids=["terminates", "truncates"])
def test_stored_transition_at_the_end_of_an_episode(truncates: bool, stored_done: float) -> None:
    """The next observation is the episode's last one, not the next episode's first, and only termination is ``done``."""
    model = make(env=ScriptedEnv(length=3, truncates=truncates), learning_starts=100)
    model.learn(6)
    buffer = model.replay_buffer
    np.testing.assert_array_equal(buffer.rewards[:6, 0], [1, 2, 3, 1, 2, 3])
    np.testing.assert_array_equal(buffer.next_observations[[2, 5], 0, 0], [3, 3])
    np.testing.assert_array_equal(buffer.observations[[0, 3], 0, 0], [0, 0])
    done = buffer._get_samples(np.array([2])).dones.item()
    assert done == stored_done


def test_actions_are_scaled_for_the_buffer_and_unscaled_for_the_environment() -> None:
    model = make(env=ScriptedEnv(low=0.0, high=2.0), learning_starts=5)
    model.learn(12)
    stored = model.replay_buffer.actions[:12, 0, 0]
    seen = model.replay_buffer.next_observations[:12, 0, 1]
    assert np.abs(stored).max() <= 1
    np.testing.assert_allclose(seen, stored + 1, atol=1e-6)


def test_rates_of_their_own() -> None:
    model = make(actor_learning_rate="lin_4e-3", critic_learning_rate=2e-3, learning_rate=1e-3)
    feed(model, batches(2, dtype=th.float32))
    model._current_progress_remaining = 0.25
    model.train(gradient_steps=2, batch_size=8)
    assert model.actor.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert model.critic.optimizer.param_groups[0]["lr"] == pytest.approx(2e-3)
    logged = model.logger.name_to_value
    assert logged["train/learning_rate"] == pytest.approx(1e-3)
    assert logged["train/critic_learning_rate"] == pytest.approx(2e-3)
    assert logged["train/actor_learning_rate"] == pytest.approx(1e-3)


@pytest.mark.parametrize("bounds", [1e-3, {"critic": 1e-3}], ids=["all networks", "critic only"])
def test_gradients_are_clipped_per_network(bounds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With plain SGD and rate 1 a network moves by its clipped gradient."""
    kwargs = {"policy_kwargs": {**SMALL, "optimizer_class": th.optim.SGD}, "learning_rate": 1.0, "policy_delay": 1}
    model, free = make(max_grad_norm=bounds, **kwargs), make(**kwargs)
    moved = {}
    for name, candidate in (("clipped", model), ("free", free)):
        feed(candidate, batches(1, dtype=th.float32))
        before = {net: flat(getattr(candidate, net)) for net in ("actor", "critic")}
        th.manual_seed(0)
        candidate.train(gradient_steps=1, batch_size=8)
        moved[name] = {net: (flat(getattr(candidate, net)) - before[net]).norm().item() for net in before}
    assert moved["clipped"]["critic"] == pytest.approx(1e-3, rel=1e-2)
    assert moved["free"]["critic"] > 1e-2
    logged = model.logger.name_to_value["train/critic_grad_norm"]
    assert logged == pytest.approx(free.logger.name_to_value["train/critic_grad_norm"])  # the norm before clipping
    if isinstance(bounds, float):
        assert moved["clipped"]["actor"] == pytest.approx(1e-3, rel=1e-2)
    else:
        assert moved["clipped"]["actor"] > 2e-3


@pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
def test_actor_update_leaves_the_gradients_of_the_critic(engine: bool) -> None:
    gradients = []
    for policy_delay in (1, 2):  # with and without the actor
        model = make(policy_delay=policy_delay, engine=engine)
        feed(model, batches(1, dtype=th.float32))
        model.train(gradient_steps=1, batch_size=8)
        assert all((parameter.grad is None) == (policy_delay == 2) for parameter in model.actor.parameters())
        assert all(parameter.requires_grad for parameter in model.critic.parameters())
        gradients.append([parameter.grad for parameter in model.critic.parameters()])
    assert all(map(th.equal, *gradients))
    assert any(gradient.abs().max() > 0 for gradient in gradients[0])


def test_layer_norm_is_in_both_streams_of_critic_and_target_only() -> None:
    policy = make(policy_kwargs={**SMALL, "critic_layer_norm": True}).policy
    for module, count in ((policy.critic, 4), (policy.critic_target, 4), (policy.actor, 0)):
        assert sum(isinstance(layer, nn.LayerNorm) for layer in module.modules()) == count
    with_norm = policy.critic.qf0
    assert [type(layer) for layer in with_norm[:3]] == [nn.Linear, nn.LayerNorm, nn.ReLU]


def test_shared_extractor_learns_from_the_actor_alone() -> None:
    model = make(
        env=RandomEnv(IMAGE, CONTINUOUS), policy="CnnPolicy", policy_kwargs={**SMALL, "share_features_extractor": True}
    )
    assert model.critic.features_extractor is model.actor.features_extractor
    feed(model, batches(2, dtype=th.float32, obs_shape=IMAGE.shape))
    extractor = flat(model.actor.features_extractor)
    model.train(gradient_steps=1, batch_size=8)  # a critic update
    assert th.equal(flat(model.actor.features_extractor), extractor)
    model.train(gradient_steps=1, batch_size=8)  # critic and actor
    assert not th.equal(flat(model.actor.features_extractor), extractor)


def test_forward_without_gradients_stays_without() -> None:
    critic = make().critic
    with th.no_grad():
        assert not any(q.requires_grad for q in critic(th.zeros(1, 4), th.zeros(1, 2)))


@pytest.mark.parametrize(("policy", "space"), [("MlpPolicy", BOX), ("CnnPolicy", IMAGE), ("MultiInputPolicy", DICT)])
def test_policies_build_the_twin_stream_critic(policy: str, space: spaces.Space) -> None:
    model = make(env=RandomEnv(space, CONTINUOUS), policy=policy)
    assert type(model.critic) is type(model.critic_target) is ContinuousCritic
    assert type(model.policy) is TD3X.policy_aliases[policy]


def test_policy_saves_and_loads_by_itself(tmp_path: Any) -> None:
    policy = make(policy_kwargs={**SMALL, "critic_layer_norm": True}).policy
    policy.save(tmp_path / "policy.pth")
    th.testing.assert_close(flat(type(policy).load(tmp_path / "policy.pth")), flat(policy), rtol=0, atol=0)


def test_logged_quantities() -> None:
    model = make(action_noise=None)
    feed(model, batches(4, dtype=th.float32))
    q = [model.critic(b.observations, b.actions) for b in batches(1, dtype=th.float32)]
    model.train(gradient_steps=1, batch_size=8)
    logged = dict(model.logger.name_to_value)
    assert logged["train/q_a"] == pytest.approx(q[0][0].mean().item(), rel=1e-5)
    assert logged["train/q_b"] == pytest.approx(q[0][1].mean().item(), rel=1e-5)
    assert logged["train/critic_grad_norm"] > 0
    assert "train/actor_loss" not in logged  # not yet updated
    model.train(gradient_steps=1, batch_size=8)
    logged = model.logger.name_to_value
    assert {"train/n_updates", "train/learning_rate", "train/critic_loss", "train/actor_loss", "train/actor_grad_norm"} <= set(
        logged
    )


def test_n_step_returns_reach_the_batch() -> None:
    model = make(env=ScriptedEnv(length=5), n_steps=3, gamma=0.9, learning_starts=100)
    model.learn(5)
    rows = model.replay_buffer._get_samples(np.array([0, 3]))
    np.testing.assert_allclose(rows.rewards[:, 0], [1 + 0.9 * 2 + 0.81 * 3, 4 + 0.9 * 5], rtol=1e-6)
    feed(model, [rows])
    batch = model._sample(2)
    np.testing.assert_allclose(batch.discounts[:, 0], [0.9**3, 0.9**2], rtol=1e-6)
    np.testing.assert_allclose(batch.rewards, rows.rewards)


def test_buffer_is_sb3s() -> None:
    assert type(make().replay_buffer) is ReplayBuffer
