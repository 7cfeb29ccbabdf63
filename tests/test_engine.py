"""The fast paths give the ordinary paths' results, are taken where they apply, and never act on stale weights."""

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from environments import BOX, CONTINUOUS, DICT, IMAGE, RandomEnv
from gymnasium import spaces
from stable_baselines3 import DDPG, SAC, TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_ac_ext import DDPGX, SACX, TD3X
from sb3_ac_ext.buffers import replay
from sb3_ac_ext.legacy import matmul
from sb3_ac_ext.legacy.descent import Descent, FlatAdam, backward
from sb3_ac_ext.legacy.flat_tensor import bind
from sb3_ac_ext.legacy.fused_mlp import FusedLinear, FusedMLP
from sb3_ac_ext.legacy.workspace import Workspace

SMALL: dict[str, Any] = {"net_arch": [16, 16]}


def make(env: Any = None, policy: str = "MlpPolicy", **kwargs: Any) -> TD3X:
    own = {"policy_kwargs": SMALL, "seed": 0, "learning_starts": 10, "batch_size": 8, "buffer_size": 200}
    model = TD3X(policy, env or RandomEnv(BOX, CONTINUOUS), **{**own, **kwargs})
    model.set_logger(Logger(None, []))
    return model


def parameters(model: TD3X) -> th.Tensor:
    return th.cat([value.flatten() for value in model.policy.state_dict().values()]).clone()


def torch_predict(model: TD3X, observation: np.ndarray) -> np.ndarray:
    return model.policy.predict(observation)[0]


@pytest.mark.parametrize(
    "kwargs", [{}, {"max_grad_norm": 0.1}, {"policy_kwargs": {**SMALL, "activation_fn": nn.Tanh}}], ids=str
)
def test_update_is_that_of_the_engine_switched_off(kwargs: dict[str, Any]) -> None:
    models = [make(engine=engine, **kwargs).learn(60) for engine in (True, False)]
    assert all(isinstance(descent, FlatAdam) for descent in models[0]._descents.values())
    assert not any(isinstance(descent, FlatAdam) for descent in models[1]._descents.values())
    th.testing.assert_close(parameters(models[0]), parameters(models[1]), rtol=0, atol=2e-5)
    logged = [model.logger.name_to_value for model in models]
    assert logged[0].keys() == logged[1].keys()
    for key, value in logged[0].items():
        assert value == pytest.approx(logged[1][key], rel=1e-3, abs=1e-5), key


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(
    ("ours", "theirs", "kwargs"),
    [
        (TD3X, TD3, {}),
        (DDPGX, DDPG, {}),
        (SACX, SAC, {}),
        (SACX, SAC, {"use_sde": True, "train_freq": 8, "gradient_steps": 8}),
    ],
    ids=["td3x", "ddpgx", "sacx", "sacx with gsde"],
)
def test_whole_training_is_sb3s(ours: Any, theirs: Any, kwargs: dict[str, Any]) -> None:
    """
    Hundreds of replayed updates in float64, on what the policies themselves experienced.

    The buffer goes round once. Rounding errors of 1e-16 grow, in training as in the environment, but not to 1e-9 by then.
    """
    exact = 0.984375  # a discount that float32, in which batches are stored, has too
    own = {"seed": 0, "learning_starts": 100, "batch_size": 16, "buffer_size": 500, "gamma": exact, **kwargs}
    models = []
    for cls in (theirs, ours):
        model = cls("MlpPolicy", "Pendulum-v1", policy_kwargs=dict(SMALL), **own)
        model.set_logger(Logger(None, []))
        model.policy.double()
        if getattr(model, "log_ent_coef", None) is not None:
            model.log_ent_coef.data = model.log_ent_coef.data.double()
        models.append(model.learn(700))
    assert models[1].engine_report()["operations"] == "recorded and replayed"
    np.testing.assert_allclose(models[1].replay_buffer.actions, models[0].replay_buffer.actions, rtol=0, atol=1e-6)
    th.testing.assert_close(parameters(models[1]), parameters(models[0]), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("kwargs", "part", "reason"),
    [
        ({"engine": False}, "critic update", "engine=False"),
        ({"policy_kwargs": {**SMALL, "critic_layer_norm": True}}, "critic update", "LayerNorm"),
        ({"policy_kwargs": {**SMALL, "activation_fn": nn.SiLU}}, "actor update", "SiLU"),
        ({"policy_kwargs": {**SMALL, "optimizer_class": th.optim.RMSprop}}, "actor update", "RMSprop"),
        ({"policy_kwargs": {**SMALL, "optimizer_kwargs": {"amsgrad": True}}}, "critic update", "amsgrad"),
        ({"env": RandomEnv(IMAGE, CONTINUOUS), "policy": "CnnPolicy"}, "actor update", "outside of fused layers"),
        ({"env": RandomEnv(IMAGE, CONTINUOUS), "policy": "CnnPolicy"}, "acting", "NatureCNN"),
        ({"env": RandomEnv(DICT, CONTINUOUS), "policy": "MultiInputPolicy"}, "replay", "DictReplayBuffer"),
        ({"n_steps": 2}, "replay", "NStepReplayBuffer"),
    ],
    ids=str,
)
def test_report_names_what_stands_in_the_way(kwargs: dict[str, Any], part: str, reason: str) -> None:
    model = make(**kwargs).learn(15)
    assert reason in model.engine_report()[part]


def test_report_of_the_fast_paths() -> None:
    assert make().engine_report() == {
        "critic update": "fused layers, flat Adam",
        "actor update": "fused layers, flat Adam",
        "operations": "recorded and replayed",
        "acting": "numpy",
        "replay": "direct",
    }


# Flat parameters


def test_optimizer_state_looks_like_pytorchs() -> None:
    assert make().actor.optimizer.state_dict()["state"] == {}
    states = [make(engine=engine).learn(30).critic.optimizer.state_dict() for engine in (True, False)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    th.testing.assert_close(states[0]["state"], states[1]["state"], rtol=0, atol=1e-4)
    counters = [state["step"].data_ptr() for state in states[0]["state"].values()]
    assert len(set(counters)) == len(counters) == 12  # an optimizer that loads them counts each by itself


@pytest.mark.parametrize("what", ["load_state_dict", "new memory", "float64 and back", "loaded policy", "copied model"])
def test_changes_from_outside_are_taken_over(what: str) -> None:
    models = [make(engine=engine).learn(30) for engine in (True, False)]
    start = models[0].get_parameters()
    start = copy.deepcopy(start)
    for i, model in enumerate(models):
        model.set_parameters(start)
        if what == "load_state_dict":
            model.critic.optimizer.load_state_dict(model.critic.optimizer.state_dict())
        elif what == "new memory":
            for parameter in model.policy.parameters():
                parameter.data = parameter.data.clone()
        elif what == "float64 and back":
            model.policy.double().float()
        elif what == "loaded policy":
            model.policy.load_state_dict({name: value * 0.5 for name, value in start["policy"].items()})
        else:
            environment, model.env = model.env, None
            models[i] = copy.deepcopy(model)
            models[i].env = environment
            models[i].set_logger(Logger(None, []))
    for model in models:
        np.random.seed(0)
        th.manual_seed(0)
        model.train(gradient_steps=6, batch_size=8)
    assert isinstance(models[0]._descents["critic"], FlatAdam)
    th.testing.assert_close(parameters(models[0]), parameters(models[1]), rtol=0, atol=1e-5)
    states = [model.critic.optimizer.state_dict()["state"] for model in models]
    th.testing.assert_close(states[0], states[1], rtol=0, atol=1e-4)


def train_from(model: TD3X, steps: int = 6) -> th.Tensor:
    np.random.seed(0)
    th.manual_seed(0)
    model.train(gradient_steps=steps, batch_size=8)
    return parameters(model)


@pytest.mark.parametrize("network", ["critic", "actor", "critic_target", "actor_target"])
def test_parameters_with_new_memory_are_followed(network: str) -> None:
    results = []
    for engine in (True, False):
        model = make(engine=engine).learn(30)
        train_from(model)
        for parameter in getattr(model, network).parameters():
            parameter.data = parameter.data * 0.5
        results.append(train_from(model))
    th.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_weight_decay_and_betas_are_adams() -> None:
    policy_kwargs = {**SMALL, "optimizer_kwargs": {"weight_decay": 0.1, "betas": (0.5, 0.9), "eps": 1e-3}}
    results = [parameters(make(engine=engine, policy_kwargs=policy_kwargs).learn(40)) for engine in (True, False)]
    th.testing.assert_close(*results, rtol=0, atol=1e-5)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)], ids=str)
def test_moments_of_dead_weights_never_become_subnormal(betas: tuple[float, float]) -> None:
    """A weight whose gradient is 0 from some step on; unsettled, its moments stay subnormal for ever."""
    th.manual_seed(0)
    networks = [FusedMLP(nn.Linear(2, 3)) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [th.optim.Adam(network.parameters(), lr=1e-2, betas=betas) for network in networks]
    descents = [FlatAdam(optimizer, [network]) for optimizer, network in zip(optimizers, networks, strict=True)]
    smallest = th.finfo(th.float32).smallest_normal
    subnormal = [0, 0]
    for step in range(1100):
        x = th.tensor([[1.0, 1e-3 * (step < 5)]])
        for i, (network, descent) in enumerate(zip(networks, descents, strict=True)):
            backward(network(x).pow(2).sum(), [descent])
            descent.step()
            if i == 0:
                descent.settle()
            for state in optimizers[i].state.values():
                for moment in (state["exp_avg"], state["exp_avg_sq"]):
                    subnormal[i] += int(((moment != 0) & (moment.abs() < smallest)).sum())
    assert subnormal[0] == 0
    assert subnormal[1] > 0
    for value, expected in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert th.equal(value, expected)


def test_moments_are_kept_where_eps_could_show_them() -> None:
    network = FusedMLP(nn.Linear(2, 3))
    for eps, kept in ((1e-20, True), (1e-8, False)):
        descent = FlatAdam(th.optim.Adam(network.parameters(), eps=eps), [network])
        descent.moments[0].values.fill_(1e-33)
        for _ in range(200):
            descent.settle()
        assert bool((descent.moments[0].values > 0).all()) is kept


@pytest.mark.parametrize("uses", ["both streams twice", "one stream"])
def test_losses_that_use_a_network_twice_or_in_part(uses: str) -> None:
    results = []
    for engine in (True, False):
        model = make(engine=engine).learn(30)
        model._begin_updates()

        def loss_of(batch: th.Tensor, model: TD3X = model) -> th.Tensor:
            actions = th.zeros(len(batch), 2)
            if uses == "one stream":
                return model.critic.q1_forward(batch, actions).pow(2).sum()
            first, second = (model.critic(observations, actions) for observations in (batch, batch.cos()))
            return (first[0] * second[1]).sum() + (first[1] - second[0]).pow(2).sum()

        model._descend("critic", loss_of, th.linspace(-1, 1, 20).reshape(5, 4))
        results.append((parameters(model), model.critic.optimizer.state_dict()["state"][0]["exp_avg"]))
    for value, expected in zip(*results, strict=True):
        th.testing.assert_close(value, expected, rtol=0, atol=1e-5)


def test_parameters_that_were_not_updated_together_keep_their_own_counters() -> None:
    """Adam corrects each moment by the number of its own updates."""
    models = [make(engine=engine).learn(30) for engine in (True, False)]
    start = copy.deepcopy(models[0].get_parameters())
    start["critic.optimizer"]["state"][3]["step"] += 5
    for model in models:
        model.set_parameters(copy.deepcopy(start))
        np.random.seed(0)
        th.manual_seed(0)
        model.train(gradient_steps=4, batch_size=8)
    assert not isinstance(models[0]._descents["critic"], FlatAdam)
    th.testing.assert_close(parameters(models[0]), parameters(models[1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("offsets", [(0, 6), (6, 0), (0, 7)], ids=["one after another", "other order", "gap"])
def test_binding_moves_only_what_does_not_lie_in_order(offsets: tuple[int, int]) -> None:
    memory = th.arange(20.0)
    parameters = [nn.Parameter(memory[offset : offset + 6].view(2, 3)) for offset in offsets]
    expected = th.cat([parameter.detach().flatten() for parameter in parameters])
    flat = bind(parameters)
    assert th.equal(flat.values, expected)
    assert (flat.values.data_ptr() == memory.data_ptr()) == (offsets == (0, 6))
    flat.values += 1
    assert th.equal(th.cat([parameter.detach().flatten() for parameter in parameters]), expected + 1)


class Mixed(nn.Module):
    """Fused layers with a layer of another kind and a parameter of its own between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = FusedMLP(nn.Linear(4, 16), nn.Tanh())
        self.norm = nn.LayerNorm(16)
        self.head = FusedLinear(16, 2)
        self.scale = nn.Parameter(th.ones(2))

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.head(self.norm(self.first(x))) * self.scale


@pytest.mark.parametrize("skipped", [False, True], ids=["whole", "scale not used"])
def test_parameters_outside_of_fused_layers_join_the_flat_step(skipped: bool) -> None:
    th.manual_seed(0)
    ours, theirs = Mixed(), Mixed()
    theirs.load_state_dict(ours.state_dict())
    optimizers = [th.optim.Adam(network.parameters(), lr=1e-2) for network in (ours, theirs)]
    fused = [ours.first, ours.head]
    assert FlatAdam.obstacle(optimizers[0], fused) is None
    descents = [FlatAdam(optimizers[0], fused), Descent(optimizers[1])]
    for step in range(4):
        x = th.randn(8, 4)
        norms = []
        for network, descent in zip((ours, theirs), descents, strict=True):
            output = network.head(network.first(x)) if skipped and step == 2 else network(x)
            backward(output.pow(2).sum(), [descent])
            norms.append(descent.gradient_norm())
            descent.clip(0.5, norms[-1])
            descent.step()
        th.testing.assert_close(*norms, rtol=1e-5, atol=0)
    for value, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        th.testing.assert_close(value, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", [True, False])
def test_networks_that_share_a_loss_step_with_their_own_optimizers(engine: bool) -> None:
    """One backward pass for both; the other networks are constants of it, and each is clipped by itself."""
    model, alone = (make(engine=engine, max_grad_norm={"critic": 1e-2}).learn(30) for _ in range(2))
    x = th.linspace(-1, 1, 20).reshape(5, 4)

    def loss_of(batch: th.Tensor, model: TD3X = model) -> th.Tensor:
        return model.critic.q1_forward(batch, model.actor(batch)).pow(2).sum()

    for candidate in (model, alone):
        candidate._begin_updates()
    model._descend(("critic", "actor"), loss_of, x, name="joint")
    actor = copy.deepcopy(alone.actor)
    alone._descend("critic", lambda batch: loss_of(batch, alone), x)
    after, alone.critic = alone.critic, copy.deepcopy(model.critic)
    th.testing.assert_close(after.state_dict(), model.critic.state_dict(), rtol=0, atol=1e-6)
    th.testing.assert_close(alone.actor.state_dict(), actor.state_dict(), rtol=0, atol=0)
    assert not th.equal(model.actor.mu[0].weight, actor.mu[0].weight)
    assert {"joint_loss", "critic_grad_norm", "actor_grad_norm"} <= model._means.read().keys()


def test_a_hook_added_later_is_honoured() -> None:
    model = make().learn(30)
    calls: list[str] = []
    handle = model.critic.qf0[0].register_forward_hook(lambda *args: calls.append("layer"))
    optimizer_handle = model.actor.optimizer.register_step_post_hook(lambda *args: calls.append("step"))
    model.train(gradient_steps=2, batch_size=8)
    assert set(calls) == {"layer", "step"}
    handle.remove()
    optimizer_handle.remove()
    calls.clear()
    model.train(gradient_steps=2, batch_size=8)
    assert calls == []
    assert isinstance(model._descents["critic"], FlatAdam)


def test_a_hook_may_change_a_gradient() -> None:
    trained = []
    for engine in (True, False):
        model = make(engine=engine)  # which seeds everything
        weight = model.critic.qf0[0].weight
        weight.register_hook(lambda grad: 0 * grad)
        before = weight.clone()
        trained.append(train_from(model.learn(30)))
        assert th.equal(weight, before)  # Adam does not move what has no gradient
        assert not engine or model.engine_report()["critic update"] == "PyTorch: a hook on a parameter"
    th.testing.assert_close(*trained, rtol=0, atol=1e-5)


def layer(model: TD3X) -> None:
    for critic in (model.critic, model.critic_target):
        critic.qf0[0] = nn.Linear(critic.qf0[0].in_features, 16)


def weight(model: TD3X) -> None:
    for critic in (model.critic, model.critic_target):
        critic.qf0[0].weight = nn.Parameter(critic.qf0[0].weight.detach().clone())


def one_more(model: TD3X) -> None:
    for critic in (model.critic, model.critic_target):
        critic.more = nn.Parameter(th.ones(2))


def weight_of_the_target(model: TD3X) -> None:
    first = model.critic_target.qf0[0]
    first.weight = nn.Parameter(first.weight.detach().clone())


@pytest.mark.parametrize("change", [layer, weight, one_more, weight_of_the_target], ids=lambda change: change.__name__)
def test_other_parameters_are_trained_and_followed(change: Callable[[TD3X], None]) -> None:
    """Somebody has put them into the networks and the optimizer."""
    trained = []
    for engine in (True, False):
        model = make(engine=engine).learn(30)
        change(model)
        model.critic.optimizer.param_groups[0]["params"] = list(model.critic.parameters())
        with th.no_grad():
            for critic in (model.critic, model.critic_target):
                for parameter in critic.qf0[0].parameters():
                    parameter.fill_(0.1)
        trained.append(train_from(model))
        for critic in (model.critic, model.critic_target):
            first = critic.qf0[0].weight
            assert not th.equal(first, th.full_like(first, 0.1))
    th.testing.assert_close(*trained, rtol=0, atol=1e-5)


def test_an_option_of_adam_set_later_is_honoured() -> None:
    models = [make(engine=engine).learn(30) for engine in (True, False)]
    for model in models:
        model.critic.optimizer.param_groups[0]["maximize"] = True
    trained = [train_from(model) for model in models]
    th.testing.assert_close(*trained, rtol=0, atol=1e-5)
    assert models[0].engine_report()["critic update"] == "PyTorch: Adam's options maximize"
    models[0].critic.optimizer.param_groups[0]["maximize"] = False
    models[0].train(gradient_steps=1, batch_size=8)
    assert isinstance(models[0]._descents["critic"], FlatAdam)


def test_gradients_stay_visible_and_users_can_use_autograd() -> None:
    model = make().learn(30)
    assert all(parameter.grad is not None for parameter in model.critic.parameters())
    x = BOX.sample()[None]
    model.critic.optimizer.zero_grad()
    loss = model.critic(th.as_tensor(x), th.zeros(1, 2))[0].sum()
    loss.backward()
    before = model.critic.qf0[0].weight.grad.clone()
    model.critic(th.as_tensor(x), th.zeros(1, 2))[0].sum().backward()
    th.testing.assert_close(model.critic.qf0[0].weight.grad, 2 * before)  # accumulated, as autograd does


def test_frozen_parameters_stay_frozen() -> None:
    model = make().learn(30)
    frozen = model.critic.qf0[0].weight
    frozen.requires_grad_(False)
    before = frozen.clone()
    model.train(gradient_steps=4, batch_size=8)
    assert th.equal(frozen, before)
    assert not frozen.requires_grad
    assert "frozen" in model.engine_report()["critic update"]


def test_workspace_is_used_again_and_stays_small() -> None:
    model = make().learn(30)

    def held() -> int:
        workspace = model._workspace
        assert not workspace._taken
        return sum(tensor.numel() for free in workspace._free.values() for tensor in free)

    before = held()
    model.train(gradient_steps=10, batch_size=8)
    assert held() == before
    assert 0 < before <= 16 * 8 * 16  # at most 16 intermediate results of 8 rows and 16 columns


def test_a_context_within_another_gives_back_its_own_alone() -> None:
    workspace, like = Workspace(), th.zeros(1)
    with workspace.lend():
        outer = workspace.take((2, 3), like)
        with workspace.lend():
            inner = workspace.take((2, 3), like)
            workspace.give(outer)  # belongs to the other context
        again = workspace.take((2, 3), like)
        assert again is inner
        assert again is not outer
    with workspace.lend():
        assert {id(workspace.take((2, 3), like)) for _ in range(2)} == {id(outer), id(inner)}


# Replay


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize(
    "space",
    [BOX, spaces.Box(-1, 1, (2, 3), np.float64), spaces.Discrete(4), IMAGE],
    ids=["box", "matrix", "discrete", "image"],
)
def test_direct_batches_are_those_of_the_buffer(space: spaces.Space, n_envs: int) -> None:
    buffer = ReplayBuffer(30 * n_envs, space, CONTINUOUS, n_envs=n_envs)
    shape = buffer.obs_shape
    sample = replay.Sampler(buffer, 16, 0.9)
    for step in range(47):  # past the end, so that the buffer is full
        obs = [np.stack([space.sample() for _ in range(n_envs)]).reshape(n_envs, *shape) for _ in range(2)]
        actions = np.stack([CONTINUOUS.sample() for _ in range(n_envs)])
        dones = np.arange(n_envs) % 2 == step % 2
        infos = [{"TimeLimit.truncated": step % 3 == 0}] * n_envs
        buffer.add(*obs, actions, np.random.normal(size=n_envs), dones, infos)
        if step in (10, 46):
            np.random.seed(step)
            theirs = buffer.sample(16)
            following = np.random.random()
            np.random.seed(step)
            ours = sample(buffer)
            assert np.random.random() == following
            assert ours.discounts == 0.9
            for value, expected in zip(ours[:5], theirs[:5], strict=True):
                th.testing.assert_close(value, expected, rtol=0, atol=0)


def test_report_makes_no_buffer() -> None:
    model = make()
    model.engine_report()
    assert model._replay_buffer is None


def test_vec_normalize_and_replaced_methods_take_the_buffers_own_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    env = VecNormalize(make_vec_env(lambda: RandomEnv(BOX, CONTINUOUS)))
    assert "VecNormalize" in make(env).engine_report()["replay"]
    model = make()
    buffer = model.replay_buffer
    assert buffer is not None
    monkeypatch.setattr(buffer, "sample", lambda *args, **kwargs: pytest.fail("asked"))
    with pytest.raises(pytest.fail.Exception, match="asked"):
        model._sample(4)


# Acting


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("observations", "actions"),
    [
        (BOX, CONTINUOUS),
        (spaces.Box(-5, 5, (2, 3), np.float64), spaces.Box(-1, 2, (2, 2), np.float64)),
        (spaces.Box(0, 9, (3,), np.int64), CONTINUOUS),
    ],
    ids=["plain", "float64 matrices", "integers"],
)
def test_numpy_acts_as_torch(observations: spaces.Box, actions: spaces.Box, activation: type[nn.Module]) -> None:
    model = make(RandomEnv(observations, actions), policy_kwargs={"net_arch": [32, 16], "activation_fn": activation})
    assert model.engine_report()["acting"] == "numpy"
    for rows in (None, 1, 2, 33):
        shape = observations.shape if rows is None else (rows, *observations.shape)
        batch = (np.random.random(shape) * 4 - 1).astype(observations.dtype)
        action, state = model.predict(batch, state=("passed",), deterministic=True)  # type: ignore[arg-type]
        expected = torch_predict(model, batch)
        assert state == ("passed",)
        actor = model._choose_actor()
        assert actor is not None
        assert (actor(batch) is None) == (rows in (2, 33))
        assert action.shape == expected.shape
        assert action.dtype == expected.dtype
        np.testing.assert_allclose(action, expected, rtol=0, atol=1e-6)


def test_actions_are_the_callers() -> None:
    """An action that was returned does not change with the next call."""
    model = make()
    first = model.predict(BOX.low)[0]
    kept = first.copy()
    model.predict(BOX.high)
    np.testing.assert_array_equal(first, kept)


def change_parameter(model: TD3X) -> None:
    model.actor.mu[0].weight.data.mul_(2)


def change_memory(model: TD3X) -> None:
    model.actor.mu[0].weight.data = model.actor.mu[0].weight.data * 2


def change_parameter_object(model: TD3X) -> None:
    model.actor.mu[0].weight = nn.Parameter(model.actor.mu[0].weight.data * 2)


def change_layer(model: TD3X) -> None:
    model.actor.mu[0] = nn.Linear(4, 16)


def change_layers(model: TD3X) -> None:
    model.actor.mu = copy.deepcopy(model.actor.mu)
    model.actor.mu[0].weight.data.mul_(2)


def change_actor(model: TD3X) -> None:
    model.policy.actor = copy.deepcopy(model.policy.actor)
    change_parameter(model)
    model.policy.actor.mu[0].weight.data.mul_(3)


def change_by_set_parameters(model: TD3X) -> None:
    model.set_parameters(make(seed=9).get_parameters())


def change_by_training(model: TD3X) -> None:
    model.learn(40)


def change_by_hook(model: TD3X) -> None:
    model.actor.mu[0].register_forward_hook(lambda module, args, output: output * 2)


def change_method(model: TD3X) -> None:
    original = model.policy.actor.forward
    model.policy.actor.forward = lambda obs: original(obs) * 0.5  # type: ignore[method-assign]


def change_policy(model: TD3X) -> None:
    model.policy = make(seed=9).policy


@pytest.mark.parametrize(
    "change",
    [
        change_parameter,
        change_memory,
        change_parameter_object,
        change_layer,
        change_layers,
        change_actor,
        change_by_set_parameters,
        change_by_training,
        change_by_hook,
        change_method,
        change_policy,
    ],
    ids=lambda function: function.__name__,
)
def test_never_acts_on_stale_weights(change: Any) -> None:
    model = make()
    before = model.predict(BOX.high)[0]
    change(model)
    after = model.predict(BOX.high)[0]
    np.testing.assert_allclose(after, torch_predict(model, BOX.high), rtol=0, atol=1e-6)
    assert not np.allclose(after, before)


def test_float64_policies_act_by_torch() -> None:
    model = make()
    model.predict(BOX.high)
    model.policy.double()
    assert "float64" in model.engine_report()["acting"]


def test_rollouts_act_by_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    monkeypatch.setattr(type(model.policy), "predict", lambda *args, **kwargs: pytest.fail("asked torch"))
    model.learn(30)


# Matrix products


@pytest.fixture
def always_onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(matmul, "faster_through_onednn", lambda *size: True)
    yield
    assert setting() == "none"


def setting() -> str:
    return str(th.backends.mkldnn.matmul.fp32_precision)


@pytest.mark.usefixtures("always_onednn")
def test_setting_holds_within_the_context_only() -> None:
    assert setting() == "none"
    with matmul.onednn():
        assert setting() == "bf16"
        with matmul.onednn():
            pass
        assert setting() == "bf16"
    assert setting() == "none"


@pytest.mark.usefixtures("always_onednn")
def test_setting_is_restored_after_an_exception() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        matmul.addmm(th.zeros(200), th.zeros(300, 200), th.zeros(201, 200))
    with pytest.raises(KeyboardInterrupt), matmul.onednn():
        raise KeyboardInterrupt
    assert setting() == "none"


@pytest.mark.usefixtures("always_onednn")
def test_setting_survives_overlapping_threads() -> None:
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with matmul.onednn():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with matmul.onednn():
        leave.set()
        thread.join(10)
        assert setting() == "bf16"
    assert setting() == "none"


@pytest.mark.parametrize(
    ("shape", "candidate"),
    [((256, 400, 300), True), ((256, 18, 400), False), ((256, 400, 1), False), ((64, 400, 300), False)],
)
def test_only_large_products_are_tried(shape: tuple[int, int, int], candidate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(matmul, "faster_through_onednn", lambda *size: tried.append(size) or False)
    rows, inner, columns = shape
    matmul.mm(th.zeros(rows, inner), th.zeros(inner, columns))
    matmul.addmm(th.zeros(columns), th.zeros(rows, inner), th.zeros(inner, columns))
    assert tried == (2 * [shape] if candidate else [])
    matmul.mm(th.zeros(rows, inner).double(), th.zeros(inner, columns).double())
    assert len(tried) == (2 if candidate else 0)


def test_probe_refuses_a_path_that_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on processors with bf16 matrix units; whatever this machine chooses is as exact as fp32."""
    monkeypatch.setattr(matmul, "LARGEST_ERROR", 0.0)
    assert matmul._probe(256, 256, 256) is False


def test_products_are_as_exact_as_fp32_whatever_was_chosen() -> None:
    a, b = th.randn(256, 400), th.randn(400, 300)
    exact = a.double() @ b.double()
    for product in (matmul.mm(a, b), matmul.addmm(th.zeros(300), a, b)):
        assert (product - exact).norm() < 1e-6 * exact.norm()
    assert setting() == "none"


@pytest.mark.parametrize("rows", [512, 300, 255], ids=["divisible", "divisible too", "not divisible"])
@pytest.mark.parametrize("given", [False, True], ids=["new memory", "given memory"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_a_piece_for_each_thread(rows: int, given: bool, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "faster_through_onednn", lambda *size: False)
    monkeypatch.setattr(th, "get_num_threads", lambda: 2)
    batched = []
    original = th.bmm
    monkeypatch.setattr(th, "bmm", lambda *args, **kwargs: batched.append(args[-1].shape) or original(*args, **kwargs))
    a = th.randn(400, rows).t() if transposed else th.randn(rows, 400)
    b, bias = th.randn(300, 400).t(), th.randn(300)
    exact = a.double() @ b.double()
    for product, expected in (
        (matmul.mm(a, b, th.empty(rows, 300) if given else None), exact),
        (matmul.addmm(bias, a, b, th.empty(rows, 300) if given else None), exact + bias),
    ):
        assert product.shape == (rows, 300)
        assert (product - expected).norm() < 1e-6 * expected.norm()
    assert batched == ([] if rows % 2 else 2 * [(2, 400, 300)])
    matmul.mm(a[:128], b)  # too small to be worth it
    assert len(batched) == (0 if rows % 2 else 2)


def test_probe_leaves_the_random_stream_alone() -> None:
    th.manual_seed(0)
    expected = th.rand(1)
    th.manual_seed(0)
    matmul._probe(128, 128, 128, repetitions=1)
    assert th.equal(th.rand(1), expected)


def test_two_models_in_two_threads_do_not_disturb_each_other() -> None:
    """Each has its own random stream here only in what is fed to it, so the batches are fixed."""

    def trained(models: list[TD3X]) -> list[th.Tensor]:
        threads = [threading.Thread(target=model.train, args=(20, 8)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [parameters(model) for model in models]

    def models() -> list[TD3X]:
        made = [make(seed=seed, target_policy_noise=0.0) for seed in (1, 2)]
        for model in made:
            model.learn(12)
            assert model.replay_buffer is not None
            batch = model.replay_buffer._get_samples(np.arange(8))
            model.replay_buffer.sample = lambda *args, batch=batch, **kwargs: batch  # type: ignore[method-assign]
        return made

    together = trained(models())
    alone = [trained([model])[0] for model in models()]
    for one, other in zip(together, alone, strict=True):
        th.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_trained_model_saves_and_loads_with_either_engine(tmp_path: Path) -> None:
    model = make().learn(30)
    model.save(tmp_path / "model")
    for engine in (True, False):
        loaded = TD3X.load(tmp_path / "model", engine=engine, env=model.env)
        assert th.equal(parameters(loaded), parameters(model))
        np.testing.assert_allclose(loaded.predict(BOX.high)[0], model.predict(BOX.high)[0], atol=1e-6)


def test_engine_must_be_a_switch() -> None:
    with pytest.raises(TypeError, match=r"engine must be True or False, got 'fast' of type str"):
        make(engine="fast")


def test_pendulum_runs_on_every_fast_path() -> None:
    model = TD3X("MlpPolicy", gym.make("Pendulum-v1"), learning_starts=10, seed=0)
    report = model.engine_report()
    assert report.pop("operations") == "recorded and replayed"
    assert set(report.values()) == {"fused layers, flat Adam", "numpy", "direct"}
