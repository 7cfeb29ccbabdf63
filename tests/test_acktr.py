"""ACKTR: A2C's loss, the Fisher matrix of sampled outputs, trust regions, its arguments, and what is refused."""

import copy
import math
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from batches import flat
from environments import BOX, CONTINUOUS, DICT, IMAGE, RandomEnv
from gymnasium import spaces
from models import features, small_model
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_ac_ext import ACKTR
from sb3_ac_ext.acktr import LayerCalls
from sb3_ac_ext.validation import UnsupportedError

DISCRETE = spaces.Discrete(3)
SMALL_CNN: dict[str, Any] = {"features_extractor_kwargs": {"features_dim": 8}}
either_engine = pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])


def make(observations: spaces.Space = BOX, actions: spaces.Space = DISCRETE, cls: Any = ACKTR, **kwargs: Any) -> Any:
    env = RandomEnv(*copy.deepcopy((observations, actions)))  # spaces draw
    own: dict[str, Any] = {"n_steps": 6, "learning_rate": 0.25, "env": env}
    if cls is ACKTR:
        own["cold_iterations"] = 0
    policy_kwargs = {"net_arch": [8, 8], "optimizer_kwargs": None, **kwargs.pop("policy_kwargs", {})}
    return small_model(cls, **{**own, **kwargs}, policy_kwargs=policy_kwargs)


def logged(model: Any) -> dict[str, float]:
    return {key.removeprefix("train/"): value for key, value in model.logger.name_to_value.items()}


def fill(model: Any) -> Any:
    """
    A rollout, and no update.

    :return: its observations, actions, advantages and returns
    """
    _, callback = model._setup_learn(100)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    data = next(copy.deepcopy(model.rollout_buffer).get(None))
    actions = data.actions.long().flatten() if isinstance(model.action_space, spaces.Discrete) else data.actions
    return data.observations, actions, data.advantages, data.returns


def optimizers(model: Any) -> dict[str, Any]:
    found = {"policy": model.policy.optimizer, "value": getattr(model.policy, "value_optimizer", None)}
    return {name: optimizer for name, optimizer in found.items() if optimizer is not None}


def factors(optimizer: Any) -> list[tuple[th.Tensor, th.Tensor]]:
    states = [optimizer.state[block.parameters[0]] for block in optimizer.blocks]
    return [(state["input_factor"], state["output_factor"]) for state in states if "input_factor" in state]


# The loss and its gradient


@pytest.mark.parametrize("actions", [DISCRETE, CONTINUOUS, spaces.MultiDiscrete([3, 2]), spaces.MultiBinary(3)], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@either_engine
def test_gradient_is_that_of_a2c(actions: spaces.Space, normalize: bool, engine: bool) -> None:
    """On the same rollout, before anybody clips or preconditions."""
    env = make_vec_env(lambda: RandomEnv(BOX, actions), n_envs=3)
    kwargs = {"env": env, "ent_coef": 0.3, "vf_coef": 0.7, "normalize_advantage": normalize, "learning_rate": 0.0}
    ours = make(gae_lambda=0.9, engine=engine, **kwargs)
    theirs = make(cls=A2C, max_grad_norm=1e9, policy_kwargs={"optimizer_class": th.optim.SGD}, **kwargs)
    theirs.policy.load_state_dict(ours.policy.state_dict())
    for _ in range(3):  # recorded, checked, replayed
        fill(ours)
        theirs.rollout_buffer = copy.deepcopy(ours.rollout_buffer)
        before = flat(ours.policy)
        for model in (ours, theirs):
            model.train()
        assert th.equal(flat(ours.policy), before)  # the rate is 0
        for (name, one), other in zip(ours.policy.named_parameters(), theirs.policy.parameters(), strict=True):
            th.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)
        for name in ("policy_loss", "value_loss", "entropy_loss", "explained_variance"):
            assert logged(ours)[name] == pytest.approx(logged(theirs)[name], rel=1e-4, abs=1e-5), name


@either_engine
def test_one_update_by_hand(engine: bool) -> None:
    """A network of one layer each: factors, damped inverses and the bounds with dense matrices."""
    kwargs = {"n_steps": 40, "momentum": 0.0, "max_kl": 1e-4, "damping": 0.05, "engine": engine}
    model = make(BOX, CONTINUOUS, policy_kwargs={"net_arch": []}, **kwargs)
    obs, actions, advantages, returns = (value.double() for value in fill(model))
    old = {name: parameter.detach().double().clone() for name, parameter in model.policy.named_parameters()}
    model.train()
    new = dict(model.policy.named_parameters())
    rows, n = th.cat([obs, th.ones(40, 1)], dim=1), 40

    def matrix(of: dict[str, Any], layer: str) -> th.Tensor:
        return th.cat([of[f"{layer}.weight"].detach(), of[f"{layer}.bias"].detach()[:, None]], dim=1)

    # policy
    std = old["log_std"].exp()
    scores = (actions - rows @ matrix(old, "action_net").t()) / std**2
    a, s = rows.t() @ rows / n, scores.t() @ scores / n
    gradient = -(advantages[:, None] * scores).t() @ rows / n
    log_std_gradient = -(advantages[:, None] * ((scores * std) ** 2 - 1)).mean(dim=0)
    dense = th.linalg.inv(th.kron(a, s) + 0.05 * th.eye(10))
    direction = (dense @ gradient.t().reshape(-1)).view(5, 2).t()
    log_std_direction = log_std_gradient / 2.05
    square = (direction * gradient).sum() + (log_std_direction * log_std_gradient).sum()
    eta = min(0.25, math.sqrt(2e-4 / square))
    moved = matrix(new, "action_net") - matrix(old, "action_net")
    th.testing.assert_close(moved, -eta * direction, rtol=1e-3, atol=1e-6)
    th.testing.assert_close(new["log_std"].detach() - old["log_std"], -eta * log_std_direction, rtol=1e-3, atol=1e-6)
    assert logged(model)["policy_step_size"] == pytest.approx(eta, rel=1e-3)

    # value: one sigma above or below has the same square
    gradient = ((rows @ matrix(old, "value_net").t())[:, 0] - returns)[None] @ rows / n  # half of the square's derivative
    direction = th.linalg.solve(a + 0.05 * th.eye(5), gradient.t()).t()
    eta = min(0.25, math.sqrt(0.02 / (direction * gradient).sum()))
    th.testing.assert_close(matrix(new, "value_net") - matrix(old, "value_net"), -eta * direction, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared layers"])
def test_trust_regions(shared: bool) -> None:
    """Targets of a thousand change nothing about the policy's step, unless there is one bound on all."""
    kwargs = {"observations": IMAGE, "policy": "CnnPolicy", "policy_kwargs": SMALL_CNN} if shared else {}
    steps = []
    for offset in (0.0, 1000.0):
        model = make(momentum=0.0, inversion="cholesky" if shared else "eigen", **kwargs)
        fill(model)
        model.rollout_buffer.returns += offset
        before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
        model.train()
        steps.append({name: p.detach() - before[name] for name, p in model.policy.named_parameters()})
        assert 0 < logged(model)["policy_predicted_kl"] <= 1e-3 * 1.001
        assert shared or 0 < logged(model)["value_predicted_kl"] <= 0.01 * 1.001
    same = {name for name in steps[0] if th.equal(steps[0][name], steps[1][name])}
    assert same == (set() if shared else {name for name in steps[0] if "value" not in name})


# The Fisher matrix


def test_statistics_do_not_depend_on_advantages_or_weights_of_the_loss() -> None:
    results = []
    for kwargs, scale in (({}, 1.0), ({"vf_coef": 0.1, "ent_coef": 0.5, "normalize_advantage": True}, 100.0)):
        model = make(**kwargs)
        fill(model)
        model.rollout_buffer.advantages *= scale
        model.train()
        results.append([factors(optimizer) for optimizer in optimizers(model).values()])
    th.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@either_engine
def test_statistics_are_those_of_each_samples_log_likelihood(engine: bool) -> None:
    """A loop over the samples with autograd: no factor of the batch size, the bias included once, in the right places."""
    model = make(n_steps=7, stats_decay=0.0, learning_rate=0.0, engine=engine)
    policy = copy.deepcopy(model.policy)
    for _ in range(3):
        obs, actions, _, _ = fill(model)
        model.train()
    own = policy.mlp_extractor
    layers = {"policy": [*own.policy_net[::2], policy.action_net], "value": [*own.value_net[::2], policy.value_net]}
    for part, optimizer in optimizers(model).items():
        for (a, s), layer in zip(factors(optimizer), layers[part], strict=True):
            a_sum, s_sum = th.zeros_like(a), th.zeros_like(s)
            for i in range(7):
                seen = []
                handle = layer.register_forward_hook(lambda m, inputs, output, seen=seen: seen.append((inputs[0], output)))
                values, log_prob, _ = policy.evaluate_actions(obs[i : i + 1], actions[i : i + 1])
                handle.remove()
                ((inputs, output),) = seen
                (g,) = th.autograd.grad(log_prob.sum() if part == "policy" else values.sum(), output)
                row = th.cat([inputs[0], th.ones(1)]).detach()
                a_sum, s_sum = a_sum + th.outer(row, row), s_sum + th.outer(g[0], g[0])
            th.testing.assert_close(a, a_sum / 7, rtol=1e-4, atol=1e-6)
            th.testing.assert_close(s, s_sum / 7, rtol=1e-4, atol=1e-7)


def test_shared_layers_have_the_joint_fisher_matrix() -> None:
    """S of a shared layer is the policy's plus the value's, weighted; the cross terms vanish in the mean over signs."""
    fixed = {"learning_rate": 0.0, "cold_iterations": 10**6, "stats_decay": 0.0}
    model = make(policy_kwargs=features(share=True), vf_fisher_coef=3.0, **fixed)
    model.policy.action_net.weight.data *= 200  # derivatives of the policy as large as the value's
    obs, actions, _, _ = fill(model)
    optimizer = model.policy.optimizer
    layer = model.policy.features_extractor.layers[1]
    number = next(i for i, block in enumerate(optimizer.blocks) if block.parameters[0] is layer.weight)

    single = []
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        with LayerCalls() as calls:
            values, log_prob, _ = model.policy.evaluate_actions(obs, actions)
        log_likelihood = weights[0] * log_prob + weights[1] * values.flatten()
        single.append(optimizer.factors(log_likelihood, calls)[f"output_factor {number}"])
    total = th.zeros_like(single[0])
    for _ in range(300):
        model.train()
        total += optimizer.state[layer.weight]["output_factor"] / 300
    expected = single[0] + 3.0 * single[1]
    assert single[0].norm() < 10 * single[1].norm() < 100 * single[0].norm()
    assert (total - expected).norm() < 0.1 * expected.norm()


# Policies


class Undivided(nn.Module):
    """Layers for policy and value that share one, under names of their own."""

    latent_dim_pi, latent_dim_vf = 5, 6

    def __init__(self, features_dim: int) -> None:
        super().__init__()
        self.common, self.actor, self.critic = nn.Linear(features_dim, 7), nn.Linear(7, 5), nn.Linear(7, 6)

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return th.tanh(self.actor(th.relu_(self.common(features))))

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        return th.tanh(self.critic(th.relu_(self.common(features))))


class OwnPolicy(ActorCriticPolicy):
    """A user's."""

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = Undivided(self.features_dim)  # type: ignore[assignment]


class Frozen(BaseFeaturesExtractor):
    """A layer that is not trained, of a kind that has no factors."""

    def __init__(self, observation_space: gym.Space) -> None:
        super().__init__(observation_space, 4)
        self.norm = nn.LayerNorm(4).requires_grad_(False)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.norm(observations)


POLICIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "discrete": ({}, {"policy", "value"}),
    "continuous": ({"actions": CONTINUOUS}, {"policy", "value"}),
    "choices": ({"actions": spaces.MultiDiscrete([3, 2])}, {"policy", "value"}),
    "coins": ({"actions": spaces.MultiBinary(3)}, {"policy", "value"}),
    "unequal": (
        {"policy_kwargs": {"net_arch": {"pi": [8], "vf": [16, 4]}, "share_features_extractor": False}},
        {"policy", "value"},
    ),
    "images": (
        {"observations": IMAGE, "actions": CONTINUOUS, "policy": "CnnPolicy", "policy_kwargs": SMALL_CNN},
        {"policy"},
    ),
    "images apart": (
        {"observations": IMAGE, "policy": "CnnPolicy", "policy_kwargs": {**SMALL_CNN, "share_features_extractor": False}},
        {"policy", "value"},
    ),
    "dict": (
        {
            "observations": DICT,
            "policy": "MultiInputPolicy",
            "policy_kwargs": {"features_extractor_kwargs": {"cnn_output_dim": 4}},
        },
        {"policy"},
    ),
    "own": ({"actions": CONTINUOUS, "policy": OwnPolicy}, {"policy"}),
    "frozen extractor": ({"policy_kwargs": {"features_extractor_class": Frozen}}, {"policy", "value"}),
}


@pytest.mark.parametrize(("kwargs", "names"), POLICIES.values(), ids=POLICIES)
def test_every_trained_parameter_has_one_optimizer_and_moves(kwargs: dict[str, Any], names: set[str]) -> None:
    """And the engine replays the updates, which makes no difference but rounding."""
    trained = []
    for engine in (True, False):
        model = make(**kwargs, engine=engine, inversion="cholesky", inverse_update_interval=2, cold_iterations=2)
        assert set(optimizers(model)) == names
        parameters = {name: p for name, p in model.policy.named_parameters() if p.requires_grad}
        owned = [id(p) for optimizer in optimizers(model).values() for p in optimizer.param_groups[0]["params"]]
        assert sorted(owned) == sorted(map(id, parameters.values()))
        before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
        model.learn(36)
        still = {name for name, p in model.policy.named_parameters() if th.equal(p, before[name])}
        assert still == before.keys() - parameters.keys()
        trained.append(flat(model.policy))
        report = {name: how for name, how in model.engine_report().items() if "act" not in name}
        assert not engine or set(report.values()) == {"replayed"}
    th.testing.assert_close(*trained, rtol=0, atol=1e-5)


def test_layers_without_factors_are_named_at_construction() -> None:
    class Memory(BaseFeaturesExtractor):
        """A recurrent layer over the observation's components."""

        def __init__(self, observation_space: gym.Space) -> None:
            super().__init__(observation_space, 3)
            self.lstm = nn.LSTM(1, 3)

    class WithParameter(ActorCriticPolicy):
        """A parameter outside of layers."""

        def _build(self, lr_schedule: Any) -> None:
            self.temperature = nn.Parameter(th.ones(1))
            super()._build(lr_schedule)

    with pytest.raises(UnsupportedError, match=r"features_extractor.lstm, LSTM \(neither linear nor a 2D convolution\)"):
        make(policy_kwargs={"features_extractor_class": Memory})
    with pytest.raises(UnsupportedError, match=r"policy, WithParameter \(neither linear nor a 2D convolution\)"):
        make(policy=WithParameter, actions=CONTINUOUS)


@pytest.mark.parametrize("part", ["policy", "value", "both"])
def test_a_part_that_is_frozen_later_stays(part: str) -> None:
    model = make().learn(18)
    for name in ("policy", "value") if part == "both" else (part,):
        for parameter in optimizers(model)[name].param_groups[0]["params"]:
            parameter.requires_grad_(False)
    before = {name: flat_of(optimizer) for name, optimizer in optimizers(model).items()}
    model.learn(18, reset_num_timesteps=False)
    moved = {name for name, optimizer in optimizers(model).items() if not th.equal(flat_of(optimizer), before[name])}
    assert moved == {"policy", "value"} - ({"policy", "value"} if part == "both" else {part})


def flat_of(optimizer: Any) -> th.Tensor:
    return th.cat([parameter.detach().flatten() for parameter in optimizer.param_groups[0]["params"]])


# Steps


def test_kl_is_measured_on_the_rollout() -> None:
    model = make(BOX, CONTINUOUS, n_steps=30, momentum=0.0, max_kl=1e-3)
    for _ in range(3):
        obs = fill(model)[0]
        old = copy.deepcopy(model.policy).get_distribution(obs).distribution
        model.train()
        with th.no_grad():
            new = model.policy.get_distribution(obs).distribution
        kl = th.distributions.kl_divergence(old, new).sum(dim=1).mean().item()
        assert logged(model)["kl"] == pytest.approx(kl, rel=1e-3)
        assert 1e-4 < kl < 4e-3  # about max_kl
        assert 2e-4 < logged(model)["policy_predicted_kl"] <= 1e-3


def test_rates() -> None:
    model = make(learning_rate="lin_0.25", value_learning_rate=0.03)
    fill(model)
    model._current_progress_remaining = 0.5
    model.train()
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.125)
    assert model.policy.value_optimizer.param_groups[0]["lr"] == pytest.approx(0.03)
    assert logged(model)["learning_rate"] == pytest.approx(0.125)
    assert logged(model)["value_learning_rate"] == pytest.approx(0.03)


def test_steps_follow_the_measured_kl(tmp_path: Path) -> None:
    model = make(BOX, CONTINUOUS, kl_target=1e-4, max_kl=1e-2, momentum=0.0, n_steps=30, learning_rate=0.4)
    model.learn(30 * 40)
    kls = []
    for _ in range(10):
        scale = model._step_scale
        model.learn(30, reset_num_timesteps=False)
        kls.append(logged(model)["kl"])
        assert logged(model)["step_scale"] == scale
        assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.4 * scale)
        assert model.policy.value_optimizer.param_groups[0]["lr"] == 0.4
    assert 2e-5 < np.mean(kls) < 5e-4
    assert 0 < model._step_scale < 0.5
    model.save(tmp_path / "model")
    assert ACKTR.load(tmp_path / "model")._step_scale == model._step_scale


def test_logged_quantities() -> None:
    model = make(cold_iterations=1).learn(6)
    first = set(logged(model))
    parts = ("policy", "value")
    assert {"kl"} | {f"{p}_{name}" for p in parts for name in ("step_size", "predicted_kl", "grad_norm", "loss")} <= first
    assert not {"policy_damping", "step_scale"} & first  # nothing is inverted in the cold start, and there is no kl_target
    model.learn(6, reset_num_timesteps=False)
    second = logged(model)
    assert {f"{p}_trace_ratio" for p in parts} <= set(second)
    assert second["policy_damping"] == second["value_damping"] == pytest.approx(0.01)
    assert second["n_updates"] == 2


CHANGES: dict[str, Any] = {
    **{"max_kl": 1e-5, "value_max_kl": 1e-5, "value_learning_rate": 1e-3, "damping": 3.0, "stats_decay": 0.2},
    **{"inverse_update_interval": 1, "inversion": "cholesky", "momentum": 0.1, "cold_iterations": 100},
    **{"vf_fisher_coef": 10.0, "vf_coef": 5.0, "ent_coef": 1.0, "normalize_advantage": True, "kl_target": 1e-7},
}


@pytest.mark.parametrize("name", CHANGES)
def test_arguments_act_when_they_are_changed_on_a_model(name: str) -> None:
    """As without the engine. Small rates, where the trust region would hide the weights of the loss."""
    rate = 1e-2 if name in ("vf_coef", "value_learning_rate", "kl_target") else 0.25
    th.testing.assert_close(changed(name, rate, True), changed(name, rate, False), rtol=0, atol=1e-5)
    assert (changed(name, rate, True) - changed(None, rate, True)).abs().max() > 1e-4


@cache
def changed(name: str | None, rate: float, engine: bool) -> th.Tensor:
    """The parameters of a model of which an argument was changed halfway."""
    model = make(BOX, CONTINUOUS, engine=engine, inverse_update_interval=4, learning_rate=rate).learn(36)
    if name is not None:
        setattr(model, name, CHANGES[name])
    return flat(model.learn(36, reset_num_timesteps=False).policy)


@either_engine
def test_layers_that_are_replaced_are_trained(engine: bool) -> None:
    """Once their parameters are in the optimizer's group, as SB3 wants it."""
    model = make(BOX, CONTINUOUS, engine=engine).learn(18)
    for name, key in (("policy", "action_net"), ("value", "value_net")):
        old, new = getattr(model.policy, key), copy.deepcopy(getattr(model.policy, key))
        setattr(model.policy, key, new)
        pairs = dict(zip(old.parameters(), new.parameters(), strict=True))
        group = optimizers(model)[name].param_groups[0]
        group["params"] = [pairs.get(parameter, parameter) for parameter in group["params"]]
    before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
    model.learn(18, reset_num_timesteps=False)
    assert not [name for name, p in model.policy.named_parameters() if th.equal(p, before[name])]
    assert "momentum" in model.policy.optimizer.state[model.policy.action_net.weight]


@either_engine
def test_another_optimizer_in_place_of_kfac(engine: bool) -> None:
    model = make(engine=engine).learn(18)
    model.policy.optimizer = th.optim.SGD(model.policy.optimizer.param_groups[0]["params"], lr=0.1)
    model.logger.name_to_value.clear()
    fill(model)
    before = flat_of(model.policy.optimizer)
    model.train()
    gradient = th.cat([p.grad.flatten() for p in model.policy.optimizer.param_groups[0]["params"]])
    th.testing.assert_close(flat_of(model.policy.optimizer), before - 0.25 * gradient)
    assert "policy_step_size" not in logged(model)
    assert "value_step_size" in logged(model)


# Interrupting, copying, saving


@either_engine
def test_nothing_is_left_of_an_interrupted_update(engine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, twin = (make(engine=engine).learn(18) for _ in range(2))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nn.functional.linear(th.ones(1, 1), th.ones(1, 1))
        raise KeyboardInterrupt

    for candidate in (model, twin):
        th.manual_seed(0)
        fill(candidate)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.policy, "evaluate_actions", interrupted)
        model.train()
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    assert not any(getattr(module, kind) for module in model.policy.modules() for kind in kinds)
    assert not th.overrides._get_current_function_mode_stack()
    for candidate in (model, twin):
        th.manual_seed(0)
        candidate.train()
    assert th.equal(flat(model.policy), flat(twin.policy))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda policy: pickle.loads(pickle.dumps(policy))], ids=["copy", "pickle"])
@either_engine
def test_policies_can_be_copied_after_an_update(copied: Callable[[Any], Any], engine: bool) -> None:
    model = make(BOX, CONTINUOUS, engine=engine)
    for _ in range(5):
        fill(model)
        model.train()
        other = copied(model.policy)
        assert th.equal(flat(other), flat(model.policy))
        states = [optimizer.state_dict() for optimizer in (other.optimizer, model.policy.optimizer)]
        th.testing.assert_close(states[0]["state"], states[1]["state"], rtol=0, atol=0)


@pytest.mark.parametrize("inversion", ["eigen", "cholesky"])
@pytest.mark.parametrize("updates", [1, 5], ids=["cold", "between inversions"])
def test_train_after_load_is_the_uninterrupted_train(inversion: str, updates: int, tmp_path: Path) -> None:
    kwargs = {"cold_iterations": 2, "inverse_update_interval": 4, "kl_target": 1e-4, "inversion": inversion}
    model = make(BOX, CONTINUOUS, **kwargs).learn(6 * updates)
    model.save(tmp_path / "model")
    loaded = ACKTR.load(tmp_path / "model")
    loaded.set_logger(Logger(None, []))
    loaded.rollout_buffer = copy.deepcopy(model.rollout_buffer)
    for candidate in (model, loaded):
        candidate._random_state = None
        th.manual_seed(99)
        for _ in range(6):  # past the next inversion
            candidate.train()
    assert loaded._step_scale == model._step_scale
    assert th.equal(flat(loaded.policy), flat(model.policy))
    for ours, theirs in zip(optimizers(loaded).values(), optimizers(model).values(), strict=True):
        assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
        th.testing.assert_close(ours.state_dict()["state"], theirs.state_dict()["state"], rtol=0, atol=0)


def test_arguments_can_change_at_load(tmp_path: Path) -> None:
    make(damping=0.5).learn(12).save(tmp_path / "model")
    loaded = ACKTR.load(tmp_path / "model", damping=0.02, inversion="cholesky", env=RandomEnv(BOX, DISCRETE))
    loaded.learn(72, reset_num_timesteps=False)
    assert logged(loaded)["policy_damping"] == pytest.approx(0.02)
    assert "input_inverse" in loaded.policy.optimizer.state[loaded.policy.action_net.weight]


# Refusals


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"max_kl": 0}, ValueError, r"max_kl must be a number >= 1e-12, got 0"),
        ({"value_max_kl": -1.0}, ValueError, r"value_max_kl must be .*got -1.0"),
        ({"kl_target": 0.0}, ValueError, r"kl_target must be .*got 0.0"),
        ({"vf_fisher_coef": 0}, ValueError, r"vf_fisher_coef must be .*got 0"),
        ({"inversion": "qr"}, ValueError, r"inversion must be one of 'eigen', 'cholesky', got 'qr'"),
        ({"normalize_advantage": "yes"}, TypeError, r"normalize_advantage must be True or False, got 'yes'"),
        ({"learning_rate": -0.1}, ValueError, r"learning_rate must be .*got -0.1"),
        ({"value_learning_rate": "fast"}, ValueError, r"value_learning_rate must be .*got 'fast'"),
        ({"n_steps": 0}, ValueError, r"n_steps must be an integer >= 1, got 0"),
        ({"max_grad_norm": 0.5}, TypeError, r"ACKTR\(\) got an unexpected argument 'max_grad_norm'"),
        ({"dampng": 0.5}, TypeError, r"ACKTR\(\) got an unexpected argument 'dampng'; did you mean 'damping'\?"),
        ({"use_sde": True}, NotImplementedError, r"use_sde must be False"),
        (
            {"policy_kwargs": {"optimizer_class": th.optim.Adam}},
            ValueError,
            r"policy_kwargs\['optimizer_class'\] must be left out: ACKTR's optimizer is K-FAC.*Adam",
        ),
        (
            {"policy_kwargs": {"optimizer_kwargs": {"eps": 1}}},
            ValueError,
            r"policy_kwargs\['optimizer_kwargs'\] must be left out",
        ),
    ],
    ids=str,
)
def test_arguments(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ACKTR("MlpPolicy", RandomEnv(BOX, CONTINUOUS), **kwargs)


@pytest.mark.parametrize("name", ["value_max_kl", "value_learning_rate"])
def test_shared_layers_have_no_options_for_the_value_alone(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} needs networks of their own.*share_features_extractor=False.*got 0.1"):
        make(IMAGE, policy="CnnPolicy", policy_kwargs=SMALL_CNN, **{name: 0.1})


# Learning


class Answer(gym.Env):
    """A new question each step; the reward is for the right answer to it, and nothing depends on earlier ones."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.observation_space = {
            "discrete": spaces.Discrete(10),
            "image": spaces.Box(0, 255, (1, 36, 36), np.uint8),
            "continuous": spaces.Box(-1, 1, (1,), np.float32),
        }[kind]
        choices = {"discrete": 10, "image": 4}
        self.action_space = spaces.Discrete(choices[kind]) if kind in choices else self.observation_space

    def _ask(self) -> Any:
        if self.kind == "continuous":
            self.answer = self.np_random.uniform(-1, 1, 1).astype(np.float32)
            return self.answer
        self.answer = int(self.np_random.integers(self.action_space.n))
        if self.kind == "discrete":
            return self.answer
        image = np.zeros((1, 36, 36), np.uint8)
        row, column = divmod(self.answer, 2)
        image[0, 18 * row : 18 * row + 18, 18 * column : 18 * column + 18] = 255
        return image

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self._ask(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.t += 1
        reward = -float(abs(action - self.answer)[0]) if self.kind == "continuous" else float(action == self.answer)
        return self._ask(), reward, False, self.t == 100, {}


@pytest.mark.parametrize(
    ("kind", "n_envs", "steps", "threshold", "inversion"),
    [
        ("discrete", 8, 20_000, 0.9, "eigen"),
        ("image", 8, 4000, 0.9, "cholesky"),
        pytest.param("continuous", 2, 20_000, -0.05, "eigen", marks=pytest.mark.slow),  # longer than all others here
    ],
)
def test_learns_to_repeat_what_it_sees(kind: str, n_envs: int, steps: int, threshold: float, inversion: str) -> None:
    """Tasks without memory or foresight: openai/baselines' smoke tests, and one for shared convolutions."""
    kwargs: dict[str, Any] = {"n_steps": 20}
    if kind == "image":
        policy_kwargs = {"features_extractor_kwargs": {"features_dim": 16}}
        kwargs = {"n_steps": 8, "policy": "CnnPolicy", "policy_kwargs": policy_kwargs}
    env = make_vec_env(lambda: Answer(kind), n_envs=n_envs)
    model = make(env=env, gamma=0.5, cold_iterations=10, learning_rate="lin_0.25", inversion=inversion, **kwargs)
    model.learn(steps)
    mean, _ = evaluate_policy(model, make_vec_env(lambda: Answer(kind), seed=7), n_eval_episodes=3)
    assert mean / 100 >= threshold
