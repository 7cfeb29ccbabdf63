"""DDPGX: equal to SB3's DDPG with its extras off, the paper's architecture, its exploration, what it logs."""

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from batches import batches, feed, flat
from environments import BOX, CONTINUOUS, DICT, IMAGE, RandomEnv, ScriptedEnv
from gymnasium import spaces
from stable_baselines3 import DDPG
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.policies import ContinuousCritic
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn
from torch.nn import functional as F

from sb3_ac_ext import DDPGX
from sb3_ac_ext.buffers.replay import Transitions
from sb3_ac_ext.ddpgx.networks import LateActionCritic
from sb3_ac_ext.ddpgx.parameter_noise import ParameterNoise, action_distance, perturbed_parameters

SMALL: dict[str, Any] = {"net_arch": [16, 12]}
LATE = {**SMALL, "action_layer": 1}
NORMED = {**LATE, "batch_norm": True}
PARAMETER_NOISE = {"std": 0.1, "distance": 0.2}


def make(cls: type[DDPG] = DDPGX, env: Any = None, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    kwargs = {"policy_kwargs": SMALL, "seed": 0, "buffer_size": 500, "learning_starts": 20, **kwargs}
    kwargs["policy_kwargs"] = {**kwargs["policy_kwargs"]}  # SB3 writes into it
    model = cls(policy, env or RandomEnv(BOX, CONTINUOUS), **kwargs)
    model.set_logger(Logger(None, []))
    return model


def parameters_of(module: nn.Module) -> th.Tensor:
    """All parameters, without buffers."""
    return nn.utils.parameters_to_vector(module.parameters()).detach().clone()


def norms(module: nn.Module) -> list[nn.BatchNorm1d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm1d)]


def single(rows: int = 8, **kwargs: Any) -> Any:
    """One batch in single precision with discounts of its own."""
    return batches(2, rows=rows, dtype=th.float32, **kwargs)[1]


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


def critic_target(model: Any, batch: Any) -> th.Tensor:
    """y, written out."""
    with th.no_grad():
        next_q = model.critic_target(batch.next_observations, model.actor_target(batch.next_observations))
        least = next_q[0]
        for q in next_q[1:]:
            least = th.where(q < least, q, least)
        return th.where(batch.dones.bool(), batch.rewards, batch.rewards + batch.discounts * least)


NETWORKS = [SMALL, LATE, {**SMALL, "n_critics": 2}, {**LATE, "n_critics": 3}]
NETWORK_IDS = ["action first", "action late", "two critics", "three with late action"]


# --- SB3's DDPG -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(
    ("policy", "space", "policy_kwargs"),
    [
        ("MlpPolicy", BOX, SMALL),
        ("MlpPolicy", BOX, {"net_arch": {"pi": [8], "qf": [16, 8, 4]}, "activation_fn": nn.Tanh}),
        ("MlpPolicy", BOX, {**SMALL, "n_critics": 2}),
        ("MlpPolicy", BOX, {**SMALL, "n_critics": 3}),
        ("CnnPolicy", IMAGE, SMALL),
        ("CnnPolicy", IMAGE, {**SMALL, "share_features_extractor": True}),
    ],
    ids=["mlp", "unequal", "two critics", "three critics", "images", "shared extractor"],
)
@pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
def test_equals_ddpg_with_extras_off(policy: str, space: spaces.Box, policy_kwargs: dict[str, Any], engine: bool) -> None:
    kwargs = {"policy_kwargs": policy_kwargs, "learning_rate": lambda progress: 1e-3 * progress}
    env = RandomEnv(space, CONTINUOUS)
    models = theirs, ours = make(DDPG, env, policy, **kwargs), make(DDPGX, env, policy, engine=engine, **kwargs)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=0)  # same seed, same initial weights
    assert list(ours.policy.state_dict()) == list(theirs.policy.state_dict())
    samples = batches(18, obs_shape=space.shape)
    for model in models:
        model.policy.double()
        feed(model, samples)
    for step in range(18):
        for model in models:
            model._current_progress_remaining = 1 - step / 20
            model.train(gradient_steps=1, batch_size=8)
        atol = 1e-10 if engine else 0
        th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=atol)
        for network in ("actor", "critic"):
            moments = [getattr(model, network).optimizer.state_dict()["state"] for model in models]
            th.testing.assert_close(*moments, rtol=0, atol=atol)
    assert ours.engine_report().get("update") == ("replayed" if engine else None)


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
def test_learns_the_same_as_ddpg_from_the_same_seed(engine: bool, n_envs: int) -> None:
    """Acting is our own: uniform at first, then the policy's actions with the same noise."""
    runs = []
    for cls, own in ((DDPG, {}), (DDPGX, {"engine": engine})):
        noise = NormalActionNoise(np.zeros(1), 0.3 * np.ones(1))
        runs.append(make(cls, make_vec_env("Pendulum-v1", n_envs=n_envs), action_noise=noise, **own).learn(120))
    theirs, ours = runs
    np.testing.assert_allclose(ours.replay_buffer.actions[:20], theirs.replay_buffer.actions[:20], atol=1e-6)
    np.testing.assert_allclose(ours.replay_buffer.actions[:60], theirs.replay_buffer.actions[:60], atol=1e-4)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-4 if engine else 0)


def test_one_dict_makes_several_models() -> None:
    """SB3's DDPG writes the number of critics into the ``policy_kwargs`` that it is given."""
    policy_kwargs = {"net_arch": [4]}
    DDPGX("MlpPolicy", RandomEnv(BOX, CONTINUOUS), policy_kwargs=policy_kwargs)
    assert policy_kwargs == {"net_arch": [4]}


def test_stats_window_size_which_sb3s_ddpg_does_not_take() -> None:
    assert make(stats_window_size=7).learn(8).ep_info_buffer.maxlen == 7
    assert make().learn(8).ep_info_buffer.maxlen == 100


# --- The update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy_kwargs", NETWORKS, ids=NETWORK_IDS)
def test_critic_loss_by_hand(policy_kwargs: dict[str, Any]) -> None:
    """Target actor, least target critic, termination, discounts: each is needed to get this loss and its gradient."""
    model = make(policy_kwargs=policy_kwargs)
    scatter(model)
    batch = single(rows=32)
    assert 0 < batch.dones.sum() < 32
    target = critic_target(model, batch)
    values = model.critic(batch.observations, batch.actions)
    expected = sum(((q - target) ** 2).sum() / 32 for q in values)
    gradients = th.autograd.grad(expected, [*model.critic.parameters()])
    outputs = outputs_of_update(model, batch)
    th.testing.assert_close(outputs["critic_loss"], expected.detach())
    assert "td_errors" not in outputs
    for parameter, gradient in zip(model.critic.parameters(), gradients, strict=True):
        th.testing.assert_close(parameter.grad, gradient)
    constants = [*model.actor_target.parameters(), *model.critic_target.parameters()]
    assert all(parameter.grad is None for parameter in constants)


@pytest.mark.parametrize("policy_kwargs", NETWORKS, ids=NETWORK_IDS)
def test_weighted_critic_loss_by_hand(policy_kwargs: dict[str, Any]) -> None:
    """What a prioritised replay buffer gives and gets."""
    model = make(policy_kwargs=policy_kwargs)
    scatter(model)
    batch, weights = single(rows=32), th.rand(32, 1)
    target = critic_target(model, batch)
    with th.no_grad():
        errors = [q - target for q in model.critic(batch.observations, batch.actions)]
    outputs = outputs_of_update(model, batch, weights)
    th.testing.assert_close(outputs["critic_loss"], sum((weights * error**2).sum() / 32 for error in errors))
    th.testing.assert_close(outputs["td_errors"], sum(error.abs() for error in errors) / len(errors))


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("policy_kwargs", [*NETWORKS, NORMED], ids=[*NETWORK_IDS, "batch norm"])
def test_actor_update_leaves_the_critic_alone(policy_kwargs: dict[str, Any], engine: bool) -> None:
    """Of an update in which the critic's rate is 0 nothing is left in the critic but what its own loss does."""
    model = make(engine=engine, policy_kwargs=policy_kwargs, critic_learning_rate=0.0)
    for count in range(1, 9):
        critic, actor = parameters_of(model.critic), parameters_of(model.actor)
        batch = single()
        with th.no_grad():
            target = critic_target(model, batch)
        update(model, batch)
        assert th.equal(parameters_of(model.critic), critic)
        assert not th.equal(parameters_of(model.actor), actor)
        assert all(norm.num_batches_tracked == count for norm in norms(model.critic))
        model.critic.train(False)  # on the running statistics, which its own loss has updated
        loss = sum(F.mse_loss(q, target) for q in model.critic(batch.observations, batch.actions))
        for parameter, gradient in zip(
            model.critic.parameters(), th.autograd.grad(loss, [*model.critic.parameters()]), strict=True
        ):
            assert parameter.requires_grad
            th.testing.assert_close(parameter.grad, gradient)
    assert model.engine_report().get("update") == ("replayed" if engine else None)


@pytest.mark.parametrize("engine", [True, False])
def test_frozen_actor_stays_and_the_critic_learns(engine: bool) -> None:
    model = make(engine=engine)
    model.actor.requires_grad_(False)
    actor, critic = flat(model.actor), flat(model.critic)
    update(model, *[single() for _ in range(8)])
    assert th.equal(flat(model.actor), actor)
    assert not th.equal(flat(model.critic), critic)
    logged = model.logger.name_to_value
    assert np.isfinite(logged["train/actor_loss"])
    assert "train/action_gradient" not in logged


@pytest.mark.parametrize("policy_kwargs", NETWORKS[2:], ids=NETWORK_IDS[2:])
def test_actor_ascends_the_first_of_several_critics(policy_kwargs: dict[str, Any]) -> None:
    model = make(policy_kwargs=policy_kwargs, critic_learning_rate=0.0)
    batch = single()
    loss = -model.critic(batch.observations, model.actor(batch.observations))[0].mean()
    gradients = th.autograd.grad(loss, [*model.actor.parameters()])
    th.testing.assert_close(outputs_of_update(model, batch)["actor_loss"], loss.detach())
    for parameter, gradient in zip(model.actor.parameters(), gradients, strict=True):
        th.testing.assert_close(parameter.grad, gradient)


def test_actor_ascends_q() -> None:
    """With plain SGD and a small rate the mean of Q at the actor's actions grows by the rate times the squared gradient."""
    kwargs = {"policy_kwargs": {**LATE, "optimizer_class": th.optim.SGD}}
    model = make(learning_rate=1e-2, critic_learning_rate=0.0, tau=0.0, **kwargs)
    batch = single(rows=64)

    def value() -> float:
        with th.no_grad():
            return model.critic(batch.observations, model.actor(batch.observations))[0].mean().item()

    before = value()
    update(model, batch)
    norm = model.logger.name_to_value["train/actor_grad_norm"]
    assert value() - before == pytest.approx(1e-2 * norm**2, rel=0.05)
    assert norm > 1e-3


@pytest.mark.parametrize("engine", [True, False])
def test_targets_follow_every_update(engine: bool) -> None:
    model = make(tau=0.25, engine=engine, policy_kwargs=LATE)
    feed(model, [single() for _ in range(3)])
    for _ in range(3):
        before = {network: flat(getattr(model, network)) for network in ("critic_target", "actor_target")}
        model.train(gradient_steps=1, batch_size=8)
        for network in ("critic", "actor"):
            online, target = flat(getattr(model, network)), flat(getattr(model, f"{network}_target"))
            th.testing.assert_close(target, 0.75 * before[f"{network}_target"] + 0.25 * online)
            assert not th.equal(target, before[f"{network}_target"])


@pytest.mark.parametrize(("truncates", "stored_done"), [(False, 1.0), (True, 0.0)], ids=["terminates", "truncates"])
def test_stored_transition_at_the_end_of_an_episode(truncates: bool, stored_done: float) -> None:
    model = make(env=ScriptedEnv(length=3, truncates=truncates), learning_starts=0, batch_size=4)
    model.learn(4)
    rows = model.replay_buffer._get_samples(np.array([2]))
    assert rows.dones.item() == stored_done
    assert rows.next_observations[0, 0] == 3  # the last observation, not the next episode's first


def test_rates_of_their_own() -> None:
    model = make(actor_learning_rate="lin_4e-3", critic_learning_rate=2e-3)
    model._current_progress_remaining = 0.25
    update(model, single())
    assert model.actor.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    assert model.critic.optimizer.param_groups[0]["lr"] == pytest.approx(2e-3)


# --- The action's layer -----------------------------------------------------------------------------------------------


def test_shapes_of_the_papers_critic() -> None:
    critic = make(policy_kwargs={"net_arch": [400, 300], "action_layer": 1}).critic
    assert [tuple(parameter.shape) for parameter in critic.parameters()] == [
        *[(400, 4), (400,)],
        *[(300, 400 + 2), (300,)],
        *[(1, 300), (1,)],
    ]


def test_late_action_by_hand() -> None:
    """The paper's network written out."""
    critic = make(policy_kwargs=LATE).critic
    w1, b1, w2, b2, w3, b3 = critic.parameters()
    batch = single()
    h1 = F.relu(F.linear(batch.observations, w1, b1))
    h2 = F.relu(F.linear(h1, w2[:, :16], b2) + F.linear(batch.actions, w2[:, 16:]))
    th.testing.assert_close(critic(batch.observations, batch.actions)[0], F.linear(h2, w3, b3))
    th.testing.assert_close(critic.q1_forward(batch.observations, batch.actions), F.linear(h2, w3, b3))


def test_first_layer_does_not_see_the_action() -> None:
    critic = make(policy_kwargs=LATE).critic
    inputs: list[th.Tensor] = []
    critic.state_layers.register_forward_hook(lambda module, args, output: inputs.append(output))
    batch = single()
    actions = batch.actions.clone().requires_grad_()
    (q,) = critic(batch.observations, actions)
    assert th.autograd.grad(inputs[0].sum(), actions, allow_unused=True, retain_graph=True) == (None,)
    assert th.autograd.grad(q.sum(), actions)[0].abs().min() > 0


@pytest.mark.parametrize(("action_layer", "sizes"), [(0, [6, 16, 12, 8]), (1, [4, 18, 12, 8]), (2, [4, 16, 14, 8])])
def test_action_enters_at_its_layer(action_layer: int, sizes: list[int]) -> None:
    model = make(policy_kwargs={"net_arch": [16, 12, 8], "action_layer": action_layer})
    for critic in (model.critic, model.critic_target):
        assert type(critic) is (LateActionCritic if action_layer else ContinuousCritic)
        assert [layer.in_features for layer in critic.modules() if isinstance(layer, nn.Linear)] == sizes


def test_late_critics_are_disjoint_and_the_first_has_the_names_of_a_single_one() -> None:
    """So that a file of a single critic fits."""
    alone, critic = make(policy_kwargs=NORMED).critic, make(policy_kwargs={**NORMED, "n_critics": 2}).critic
    single_names, names = list(alone.state_dict()), list(critic.state_dict())
    assert single_names[0] == "state_layers.0.weight" and single_names[-1] == "qf0.2.bias"
    assert names[: len(single_names)] == single_names
    assert all(name.startswith(("state_layers1.", "qf1.")) for name in names[len(single_names) :])
    assert len(names) == 2 * len(single_names)
    parts = [critic.state_layers, critic.qf0], [critic.state_layers1, critic.qf1]
    batch = single()
    values = critic(batch.observations, batch.actions)
    assert not th.equal(*values)
    for k, q in enumerate(values):
        critic.zero_grad()
        q.sum().backward()
        gradients = [[p.grad is None for module in modules for p in module.parameters()] for modules in parts]
        assert not any(gradients[k])
        assert all(gradients[1 - k])


def test_images_enter_before_the_action() -> None:
    policy_kwargs = {**LATE, "features_extractor_kwargs": {"features_dim": 20}}
    model = make(env=RandomEnv(IMAGE, CONTINUOUS), policy="CnnPolicy", policy_kwargs=policy_kwargs)
    assert model.critic.state_layers[0].in_features == 20
    assert model.critic.qf0[0].in_features == 16 + 2
    before = flat(model.critic.features_extractor)
    update(model, single(obs_shape=IMAGE.shape))
    assert not th.equal(flat(model.critic.features_extractor), before)


def test_shared_extractor_learns_from_the_actor_alone() -> None:
    policy_kwargs = {**LATE, "share_features_extractor": True}
    model = make(env=RandomEnv(IMAGE, CONTINUOUS), policy="CnnPolicy", policy_kwargs=policy_kwargs)
    assert model.critic.features_extractor is model.actor.features_extractor
    for network, learns in (("critic", False), ("actor", True)):
        rates = {f"{name}_learning_rate": 1e-3 * (name == network) for name in ("critic", "actor")}
        model = make(env=RandomEnv(IMAGE, CONTINUOUS), policy="CnnPolicy", policy_kwargs=policy_kwargs, **rates)
        extractor, layers = model.actor.features_extractor, flat(getattr(model, network))
        before = flat(extractor)
        update(model, single(obs_shape=IMAGE.shape))
        assert th.equal(flat(extractor), before) is not learns
        assert not th.equal(flat(getattr(model, network)), layers)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "action late": {"policy_kwargs": LATE},
    "batch norm": {"policy_kwargs": {**SMALL, "batch_norm": True}},
    "batch norm, action late": {"policy_kwargs": NORMED},
    "two critics": {"policy_kwargs": {**NORMED, "n_critics": 2}},
    "weight decay": {"critic_weight_decay": 0.1, "max_grad_norm": 0.01},
    "images": {"policy": "CnnPolicy", "policy_kwargs": LATE},
    "dict": {"policy": "MultiInputPolicy", "policy_kwargs": LATE},
}


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ("images", "dict")])
def test_engine_changes_nothing(variant: str) -> None:
    kwargs = VARIANTS[variant]
    models = on, off = make(**kwargs), make(engine=False, **kwargs)
    samples = batches(12)
    for model in models:
        model.policy.double()
        feed(model, samples)
    for _ in samples:
        for model in models:
            model.train(gradient_steps=1, batch_size=8)
        th.testing.assert_close(flat(on.policy), flat(off.policy), rtol=0, atol=1e-10)
    values = [{key: value for key, value in model.logger.name_to_value.items() if "time" not in key} for model in models]
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    assert on.engine_report()["update"] == "replayed"


@pytest.mark.parametrize("variant", VARIANTS)
def test_engine_replays_and_learns_the_same(variant: str) -> None:
    """
    In single precision.

    With Adam's usual eps rounding errors alone would move the biases before a normalisation, whose gradient is 0.
    """
    kwargs = {"policy_kwargs": SMALL, **VARIANTS[variant]}
    kwargs["policy_kwargs"] = {**kwargs["policy_kwargs"], "optimizer_kwargs": {"eps": 1e-2}}
    space = {"images": IMAGE, "dict": DICT}.get(variant, BOX)
    environments = [RandomEnv(copy.deepcopy(space), CONTINUOUS) for _ in range(2)]  # spaces draw observations
    on, off = (
        make(env=env, engine=engine, batch_size=8, **kwargs).learn(40)
        for env, engine in zip(environments, (True, False), strict=True)
    )
    assert on.engine_report()["update"] == "replayed"
    if variant not in ("images", "dict"):
        assert on.engine_report()["act(False)"] == "replayed"
    th.testing.assert_close(flat(on.policy), flat(off.policy), rtol=0, atol=2e-5)  # 1e-6 an update


# --- Initialisation, weight decay -------------------------------------------------------------------------------------


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
    kwargs = {"policy_kwargs": {**policy_kwargs, "optimizer_class": th.optim.SGD}, "max_grad_norm": 1e-2}
    kwargs |= {"learning_rate": 1.0, "tau": 0.0}
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
    decayed, free = (make(critic_weight_decay=decay, critic_learning_rate=0.0, **kwargs) for decay in (0.1, 0.0))
    before = flat(free.actor)
    for model in (decayed, free):
        update(model, single())
    assert th.equal(flat(decayed.actor), flat(free.actor))
    assert not th.equal(flat(free.actor), before)


@pytest.mark.parametrize("engine", [True, False])
def test_weight_decay_can_change_while_training(engine: bool) -> None:
    """It acts at the next update."""
    kwargs = {"policy_kwargs": {**LATE, "optimizer_class": th.optim.SGD}, "tau": 0.0, "engine": engine}
    models = changed, free = [make(critic_learning_rate=0.1, actor_learning_rate=0.0, **kwargs) for _ in range(2)]
    for decay in (0.0,) * 8 + (0.2,) + (0.0,) * 8 + (0.5, 0.1):
        free.critic.load_state_dict(changed.critic.state_dict())
        before = {name: value.clone() for name, value in free.critic.named_parameters()}
        changed.critic_weight_decay = decay
        for model in models:
            update(model, single())
        after = dict(changed.critic.named_parameters())
        for name, value in free.critic.named_parameters():
            difference = 0.1 * decay * before[name] if value.dim() == 2 else th.zeros_like(value)
            th.testing.assert_close(value - after[name], difference, rtol=1e-4, atol=1e-6)


def test_weight_decay_is_adams() -> None:
    """On the weights the steps are those of Adam with its own ``weight_decay``; no decay of what the loss does not train."""
    models = ours, adams = make(critic_weight_decay=0.1), make()
    adams.critic.optimizer.param_groups[0]["weight_decay"] = 0.1
    for model in models:
        for layer in model.critic.modules():
            if isinstance(layer, nn.Linear):
                layer.bias.data.zero_()
        update(model, single())
    for name, value in ours.critic.named_parameters():
        if value.dim() == 2:
            th.testing.assert_close(value, dict(adams.critic.named_parameters())[name])
    shared = {**SMALL, "share_features_extractor": True}
    rates = {"actor_learning_rate": 0.0, "critic_weight_decay": 0.1}
    image = make(env=RandomEnv(IMAGE, CONTINUOUS), policy="CnnPolicy", policy_kwargs=shared, **rates)
    extractor, layers = flat(image.critic.features_extractor), flat(image.critic.qf0)
    update(image, single(obs_shape=IMAGE.shape))
    assert th.equal(flat(image.critic.features_extractor), extractor)
    assert not th.equal(flat(image.critic.qf0), layers)


# --- Batch normalisation ----------------------------------------------------------------------------------------------


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


# --- Exploration ------------------------------------------------------------------------------------------------------

ORNSTEIN_UHLENBECK = {"type": "ornstein-uhlenbeck", "start": 0.2, "dt": 0.01}


def acting(env: Any = None, **kwargs: Any) -> Any:
    """A model in front of its first observation."""
    model = make(env=env, learning_starts=0, **kwargs)
    model._setup_learn(100)
    return model


def greedy(model: Any) -> np.ndarray:
    return model.policy.scale_action(model.predict(model._last_obs)[0])


def test_ornstein_uhlenbeck_reaches_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    model = acting(exploration_noise=ORNSTEIN_UHLENBECK)
    normals = iter([1.0, 0.0, -1.0])
    monkeypatch.setattr(np.random, "normal", lambda *args, size, **kwargs: np.full(size, next(normals)))
    for expected in (0.02, 0.01997, -0.000059955):
        action, scaled = model._sample_action(0, model.action_noise)
        np.testing.assert_allclose(scaled - greedy(model), np.full((1, 2), expected), atol=1e-6)
        np.testing.assert_allclose(action, model.policy.unscale_action(scaled))


def test_lag_one_autocorrelation_of_ornstein_uhlenbeck() -> None:
    np.random.seed(0)
    for dt in (0.1, 1.0):
        noise = acting(exploration_noise={**ORNSTEIN_UHLENBECK, "dt": dt}).action_noise
        x = np.array([noise() for _ in range(20000)])
        assert np.mean(x[1:] * x[:-1]) / np.mean(x * x) == pytest.approx(1 - 0.15 * dt, abs=0.01)


def unequal_episodes() -> DummyVecEnv:
    return DummyVecEnv([lambda: ScriptedEnv(length=3), lambda: ScriptedEnv(length=5)])


def test_noise_starts_again_with_its_own_environments_episode() -> None:
    model = make(env=unequal_episodes(), exploration_noise=ORNSTEIN_UHLENBECK, learning_starts=100)
    model.learn(6)
    first, second = (noise.noise_prev for noise in model.action_noise.noises)
    assert np.all(first == 0) and np.all(second != 0)
    model.learn(4, reset_num_timesteps=False)
    first, second = (noise.noise_prev for noise in model.action_noise.noises)
    assert np.all(first != 0) and np.all(second == 0)


def test_decay_goes_on_over_episodes() -> None:
    model = make(exploration_noise={"type": "normal", "start": 1.0, "end": 0.0, "steps": 40}).learn(21)  # three episodes
    assert model._exploration_std() == pytest.approx(1 - 21 / 40)
    assert model.logger.name_to_value["train/exploration_std"] == pytest.approx(1 - 21 / 40)


@pytest.mark.parametrize("deterministic", [True, False])
def test_predict_has_no_noise(deterministic: bool) -> None:
    model = make(exploration_noise={"type": "normal", "start": 1.0}, parameter_noise=PARAMETER_NOISE).learn(30)
    obs = np.ones((1, 4), np.float32)
    with th.no_grad():
        expected = model.policy.unscale_action(model.actor(th.as_tensor(obs)).numpy())
    for _ in range(2):
        np.testing.assert_allclose(model.predict(obs, deterministic=deterministic)[0], expected, atol=1e-6)


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


# --- Noise on parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("distance", "expected"), [(0.3, 0.1 / 1.5), (0.1, 0.15), (0.2, 0.15)])
def test_std_adapts_towards_the_distance(distance: float, expected: float) -> None:
    noise = ParameterNoise.parse({**PARAMETER_NOISE, "coefficient": 1.5})
    assert noise.adapted(0.1, distance) == pytest.approx(expected)


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
    model = make(env=unequal_episodes(), parameter_noise=PARAMETER_NOISE, learning_starts=0, batch_size=4, learning_rate=0.1)
    model.learn(20, callback=watcher)
    first, second = zip(*watcher.seen, strict=True)
    assert [first[i] == first[i - 1] for i in range(1, 10)] == [True, True, False, True, True, False, True, True, False]
    assert [second[i] == second[i - 1] for i in range(1, 10)] == [True, True, True, True, False, True, True, True, True]
    assert not set(first) & set(second)
    model.learn(1, callback=watcher)  # the environments are reset
    assert watcher.seen[-1][0] not in first and watcher.seen[-1][1] not in second


def test_perturbed_actor_acts_with_action_noise_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    model = acting(parameter_noise=PARAMETER_NOISE, exploration_noise={"type": "normal", "start": 1.0})
    monkeypatch.setattr(np.random, "normal", lambda *args, **kwargs: np.zeros(2))
    _, plain = model._sample_action(0, model.action_noise)
    parameters = model._perturbed._parameters[0]
    with th.no_grad():
        expected = th.func.functional_call(model.actor, parameters, th.as_tensor(model._last_obs))
    np.testing.assert_allclose(plain, expected.numpy(), atol=1e-6)
    assert np.abs(plain - greedy(model)).max() > 1e-3
    model._last_episode_starts = np.array([False])
    monkeypatch.setattr(np.random, "normal", lambda *args, **kwargs: np.array([0.1, -0.2]))
    _, noisy = model._sample_action(0, model.action_noise)
    np.testing.assert_allclose(noisy - plain, [[0.1, -0.2]], atol=1e-6)


def test_each_actor_sees_its_own_environment() -> None:
    model = acting(env=make_vec_env(lambda: RandomEnv(BOX, CONTINUOUS), n_envs=2), parameter_noise=PARAMETER_NOISE)
    observations = th.as_tensor(model._last_obs)
    assert not th.equal(observations[0], observations[1])
    _, scaled = model._sample_action(0, None, 2)
    for i in range(2):
        with th.no_grad():
            own = th.func.functional_call(model.actor, model._perturbed._parameters[i], observations[i : i + 1])
        np.testing.assert_allclose(scaled[i], own[0].numpy(), atol=1e-6)


def test_first_perturbation_has_the_given_std() -> None:
    model = acting(parameter_noise={"std": 0.3, "distance": 0.2}, policy_kwargs={"net_arch": [64, 64]})
    model._sample_action(0)
    perturbed = model._perturbed._parameters[0]
    difference = th.cat([(perturbed[name] - value).flatten() for name, value in model.actor.named_parameters()])
    assert difference.std().item() == pytest.approx(0.3, rel=0.05)


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


# --- Logged, saved ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [True, False])
def test_logged_quantities(engine: bool) -> None:
    model = make(policy_kwargs=LATE, engine=engine, learning_rate=0.0)
    samples = batches(2, dtype=th.float32)
    q, gradients, losses = [], [], []
    for batch in samples:
        actions = model.actor(batch.observations).detach().requires_grad_()
        value = model.critic(batch.observations, actions)[0]
        gradients.append(th.autograd.grad(value.sum(), actions)[0].abs().mean().item())
        losses.append(-value.mean().item())
        q.append(model.critic(batch.observations, batch.actions)[0].mean().item())
    feed(model, samples)
    model.train(gradient_steps=2, batch_size=8)
    logged = model.logger.name_to_value
    assert logged["train/q"] == pytest.approx(np.mean(q), rel=1e-5)
    assert logged["train/action_gradient"] == pytest.approx(np.mean(gradients), rel=1e-5)
    assert logged["train/actor_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert {"critic_loss", "actor_grad_norm", "critic_grad_norm", "learning_rate", "n_updates"} <= {
        key.removeprefix("train/") for key in logged
    }
    assert "train/exploration_std" not in logged  # there is no noise


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


def test_policy_saves_and_loads_by_itself(tmp_path: Any) -> None:
    policy = make(policy_kwargs={**NORMED, "final_layer_init": 1e-2}).policy
    policy.save(tmp_path / "policy.pth")
    loaded = type(policy).load(tmp_path / "policy.pth")
    th.testing.assert_close(flat(loaded), flat(policy), rtol=0, atol=0)
    assert (loaded.action_layer, loaded.batch_norm, loaded.final_layer_init) == (1, True, 1e-2)


@pytest.mark.parametrize(("policy", "space"), [("MlpPolicy", BOX), ("CnnPolicy", IMAGE), ("MultiInputPolicy", DICT)])
@pytest.mark.parametrize("policy_kwargs", [SMALL, {**NORMED, "final_layer_init": 3e-3}], ids=["plain", "paper"])
def test_policies(policy: str, space: gym.Space, policy_kwargs: dict[str, Any]) -> None:
    model = make(env=RandomEnv(space, CONTINUOUS), policy=policy, policy_kwargs=policy_kwargs, batch_size=4)
    assert type(model.policy) is DDPGX.policy_aliases[policy]
    model.learn(24)
    assert th.isfinite(flat(model.policy)).all()
