"""ACKTR: A2C's loss, the Fisher matrix of sampled outputs, trust regions, what is saved, and what is refused."""

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from batches import flat
from environments import BOX, CONTINUOUS, DICT, IMAGE, RandomEnv, ScriptedEnv
from gymnasium import spaces
from stable_baselines3 import A2C
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_ac_ext import ACKTR
from sb3_ac_ext.acktr import KFAC
from sb3_ac_ext.functional import kfac
from sb3_ac_ext.validation import NonFiniteError, UnsupportedError

SMALL: dict[str, Any] = {"net_arch": [8, 8]}
DISCRETE = spaces.Discrete(3)
SMALL_CNN: dict[str, Any] = {"features_extractor_kwargs": {"features_dim": 8}}


def make(env: Any = None, policy: str = "MlpPolicy", **kwargs: Any) -> ACKTR:
    own = {"policy_kwargs": SMALL, "seed": 0, "n_steps": 6, "cold_iterations": 0, "learning_rate": 0.25, "device": "cpu"}
    model = ACKTR(policy, env or RandomEnv(BOX, DISCRETE), **{**own, **kwargs})
    model.set_logger(Logger(None, []))
    return model


def logged(model: ACKTR) -> dict[str, float]:
    return {key.removeprefix("train/"): value for key, value in model.logger.name_to_value.items()}


def fill(model: ACKTR) -> None:
    """A rollout, and no update."""
    _, callback = model._setup_learn(100)
    assert model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)


def factors(optimizer: Any) -> list[tuple[th.Tensor, th.Tensor]]:
    states = [optimizer.state[block.parameters[0]] for block in optimizer.blocks]
    return [(state["input_factor"], state["output_factor"]) for state in states if "input_factor" in state]


def rollout(model: ACKTR) -> tuple[Any, ...]:
    """Observations, actions, advantages and returns of the buffer, flat."""
    buffer = copy.deepcopy(model.rollout_buffer)
    data = next(buffer.get(None))
    return data.observations, data.actions, data.advantages, data.returns


# The loss and its gradient


@pytest.mark.parametrize("space", [DISCRETE, CONTINUOUS, spaces.MultiDiscrete([3, 2]), spaces.MultiBinary(3)], ids=str)
@pytest.mark.parametrize("normalize", [False, True])
def test_gradient_is_that_of_a2c(space: spaces.Space, normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same rollout, before anybody clips or preconditions."""
    env = make_vec_env(lambda: RandomEnv(BOX, space), n_envs=3)
    kwargs = {"ent_coef": 0.3, "vf_coef": 0.7, "normalize_advantage": normalize}
    model = make(env, gae_lambda=0.9, **kwargs)
    fill(model)
    sgd = {**SMALL, "optimizer_class": th.optim.SGD}
    theirs = A2C("MlpPolicy", env, n_steps=6, max_grad_norm=1e9, learning_rate=1.0, policy_kwargs=sgd, **kwargs)
    theirs.set_logger(Logger(None, []))
    theirs.policy.load_state_dict(model.policy.state_dict())
    theirs.rollout_buffer = copy.deepcopy(model.rollout_buffer)
    before = flat(theirs.policy)
    theirs.train()
    for optimizer in model._optimizers().values():  # keep the gradients
        monkeypatch.setattr(optimizer, "step", lambda: None)
        monkeypatch.setattr(optimizer, "measures", {})
    model.train()
    gradient = th.cat([dict(model.policy.named_parameters())[name].grad.flatten() for name in theirs.policy.state_dict()])
    th.testing.assert_close(gradient, before - flat(theirs.policy), rtol=1e-3, atol=2e-6)
    for name in ("policy_loss", "value_loss", "entropy_loss", "explained_variance"):
        assert logged(model)[name] == pytest.approx(theirs.logger.name_to_value[f"train/{name}"], rel=1e-3, abs=1e-5), name


def test_one_update_by_hand() -> None:
    """A network of one layer each: factors, damped inverses and the bounds with dense matrices."""
    model = make(
        RandomEnv(BOX, CONTINUOUS), policy_kwargs={"net_arch": []}, n_steps=40, momentum=0.0, max_kl=1e-4, damping=0.05
    )
    fill(model)
    obs, actions, advantages, returns = (value.double() for value in rollout(model))
    policy = model.policy
    old = {name: parameter.detach().double().clone() for name, parameter in policy.named_parameters()}
    model.train()
    rows, n = th.cat([obs, th.ones(40, 1)], dim=1), 40

    def moved(layer: str) -> th.Tensor:
        now = dict(policy.named_parameters())
        step = [now[f"{layer}.{part}"].detach() - old[f"{layer}.{part}"] for part in ("weight", "bias")]
        return th.cat([step[0], step[1][:, None]], dim=1)

    def weights(layer: str) -> th.Tensor:
        return th.cat([old[f"{layer}.weight"], old[f"{layer}.bias"][:, None]], dim=1)

    # policy
    std = old["log_std"].exp()
    scores = (actions - rows @ weights("action_net").t()) / std**2
    a, s = rows.t() @ rows / n, scores.t() @ scores / n
    gradient = -(advantages[:, None] * scores).t() @ rows / n
    log_std_gradient = -(advantages[:, None] * ((scores * std) ** 2 - 1)).mean(dim=0)
    dense = th.linalg.inv(th.kron(a, s) + 0.05 * th.eye(10))
    direction = (dense @ gradient.t().reshape(-1)).view(5, 2).t()
    log_std_direction = log_std_gradient / 2.05
    square = (direction * gradient).sum() + (log_std_direction * log_std_gradient).sum()
    eta = min(0.25, math.sqrt(2e-4 / square))
    th.testing.assert_close(moved("action_net"), -eta * direction, rtol=1e-3, atol=1e-6)
    th.testing.assert_close(policy.log_std.detach() - old["log_std"], -eta * log_std_direction, rtol=1e-3, atol=1e-6)
    assert logged(model)["policy_step_size"] == pytest.approx(eta, rel=1e-3)

    # value: one sigma above or below has the same square
    gradient = ((rows @ weights("value_net").t())[:, 0] - returns)[None] @ rows / n  # 0.5 times the derivative of the square
    direction = th.linalg.solve(a + 0.05 * th.eye(5), gradient.t()).t()
    eta = min(0.25, math.sqrt(0.02 / (direction * gradient).sum()))
    th.testing.assert_close(moved("value_net"), -eta * direction, rtol=1e-3, atol=1e-6)


def test_policy_and_value_have_their_own_trust_regions() -> None:
    """Targets of a thousand change nothing about the policy's step."""
    steps = []
    for offset in (0.0, 1000.0):
        model = make(momentum=0.0)
        fill(model)
        model.rollout_buffer.returns += offset
        before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
        model.train()
        now = dict(model.policy.named_parameters())
        steps.append({name: now[name].detach() - before[name] for name in now})
        assert logged(model)["value_predicted_kl"] <= 0.01 * 1.001
        assert logged(model)["policy_predicted_kl"] <= 1e-3 * 1.001
    values = {name for name in steps[0] if "value" in name}
    assert len(values) == 6
    for name in steps[0]:
        if name not in values:
            th.testing.assert_close(steps[1][name], steps[0][name], rtol=0, atol=0)
    assert any((steps[1][name] - steps[0][name]).abs().max() > 1e-3 for name in values)


# The Fisher matrix


def test_statistics_do_not_depend_on_advantages_or_weights_of_the_loss() -> None:
    results = []
    for kwargs, scale in (({}, 1.0), ({"vf_coef": 0.1, "ent_coef": 0.5, "normalize_advantage": True}, 100.0)):
        model = make(**kwargs)
        fill(model)
        model.rollout_buffer.advantages *= scale
        model.train()
        results.append([factors(optimizer) for optimizer in model._optimizers().values()])
    th.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_statistics_are_those_of_each_samples_log_likelihood() -> None:
    """A loop over the samples with autograd: no factor of the batch size, the bias included once, in the right places."""
    model = make(n_steps=7)
    fill(model)
    obs, actions, _, _ = rollout(model)
    policy = copy.deepcopy(model.policy)
    model.train()
    layers = {"policy": [policy.mlp_extractor.policy_net[0], policy.mlp_extractor.policy_net[2], policy.action_net]}
    layers["value"] = [policy.mlp_extractor.value_net[0], policy.mlp_extractor.value_net[2], policy.value_net]
    for part, optimizer in model._optimizers().items():
        for (a, s), layer in zip(factors(optimizer), layers[part], strict=True):
            a_sum, s_sum = th.zeros_like(a), th.zeros_like(s)
            for i in range(7):
                seen = []
                handle = layer.register_forward_hook(lambda m, inputs, output, seen=seen: seen.append((inputs[0], output)))
                values, log_prob, _ = policy.evaluate_actions(obs[i : i + 1], actions[i : i + 1].long().flatten())
                handle.remove()
                ((inputs, output),) = seen
                (g,) = th.autograd.grad(log_prob.sum() if part == "policy" else values.sum(), output)
                row = th.cat([inputs[0], th.ones(1)]).detach()
                a_sum, s_sum = a_sum + th.outer(row, row), s_sum + th.outer(g[0], g[0])
            th.testing.assert_close(a, a_sum / 7, rtol=1e-4, atol=1e-6)
            th.testing.assert_close(s, s_sum / 7, rtol=1e-4, atol=1e-7)


def test_shared_layers_have_the_joint_fisher_matrix() -> None:
    """S of a shared layer is the policy's plus the value's, weighted; the cross terms vanish in the mean over signs."""
    model = make(
        RandomEnv(IMAGE, DISCRETE), "CnnPolicy", policy_kwargs=SMALL_CNN, n_steps=4, vf_fisher_coef=3.0, stats_decay=0.0
    )
    assert set(model._optimizers()) == {"policy"}
    model.policy.action_net.weight.data *= 200  # derivatives of the policy as large as the value's
    fill(model)
    obs, actions, _, _ = rollout(model)
    optimizer: Any = model.policy.optimizer

    def last_shared() -> th.Tensor:
        block = next(b for b in optimizer.blocks if b.layer is model.policy.features_extractor.linear[0])
        return optimizer.state[block.parameters[0]]["output_factor"]

    single = []
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        with optimizer.recording():
            values, log_prob, _ = model.policy.evaluate_actions(obs, actions.long().flatten())
        optimizer.update_factors(weights[0] * log_prob + weights[1] * values.flatten())
        single.append(last_shared().clone())
    total = th.zeros_like(single[0])
    for seed in range(300):
        th.manual_seed(seed)
        with optimizer.recording():
            values, log_prob, _ = model.policy.evaluate_actions(obs, actions.long().flatten())
        model._update_factors(log_prob, values.flatten())
        total += last_shared() / 300
    expected = single[0] + 3.0 * single[1]
    assert single[0].norm() < 10 * single[1].norm() < 100 * single[0].norm()
    assert (total - expected).norm() < 0.1 * expected.norm()


def test_shared_layers_have_one_bound() -> None:
    model = make(
        RandomEnv(IMAGE, DISCRETE), "CnnPolicy", policy_kwargs=SMALL_CNN, n_steps=4, momentum=0.0, inversion="cholesky"
    )
    fill(model)
    model.rollout_buffer.returns += 1000
    before = flat(model.policy)
    model.train()
    assert 0 < logged(model)["policy_predicted_kl"] <= 1e-3 * 1.01
    assert "value_predicted_kl" not in logged(model)
    assert not th.equal(flat(model.policy), before)
    assert th.isfinite(flat(model.policy)).all()


@pytest.mark.parametrize(
    ("space", "policy", "policy_kwargs", "names"),
    [
        (BOX, "MlpPolicy", SMALL, {"policy", "value"}),
        (BOX, "MlpPolicy", {"net_arch": {"pi": [8], "vf": [16, 4]}, "share_features_extractor": False}, {"policy", "value"}),
        (IMAGE, "CnnPolicy", SMALL_CNN, {"policy"}),
        (IMAGE, "CnnPolicy", {**SMALL_CNN, "share_features_extractor": False}, {"policy", "value"}),
        (DICT, "MultiInputPolicy", {"features_extractor_kwargs": {"cnn_output_dim": 4}}, {"policy"}),
    ],
    ids=["mlp", "unequal", "images", "images separate", "dict"],
)
@pytest.mark.parametrize("action_space", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def test_every_parameter_has_one_optimizer_and_moves(
    space: spaces.Space, policy: str, policy_kwargs: dict[str, Any], names: set[str], action_space: spaces.Space
) -> None:
    model = make(RandomEnv(space, action_space), policy, policy_kwargs=policy_kwargs, inversion="cholesky")
    optimizers = model._optimizers()
    assert set(optimizers) == names
    owned = [id(p) for optimizer in optimizers.values() for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(map(id, model.policy.parameters()))
    before = {name: p.detach().clone() for name, p in model.policy.named_parameters()}
    model.learn(12)
    assert {name for name, p in model.policy.named_parameters() if th.equal(p, before[name])} == set()


# Steps


def test_kl_is_measured_on_the_rollout() -> None:
    model = make(RandomEnv(BOX, CONTINUOUS), n_steps=30, momentum=0.0, max_kl=1e-3)
    fill(model)
    obs = rollout(model)[0]
    old = copy.deepcopy(model.policy).get_distribution(obs).distribution
    model.train()
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


def test_rate_zero_changes_nothing() -> None:
    model = make(learning_rate=0.0)
    before = flat(model.policy)
    model.learn(24)
    th.testing.assert_close(flat(model.policy), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kl", "scale"), [(0.0041, 1 / 1.5), (0.0039, 1.0), (0.0011, 1.0), (0.0009, 1.5), (1.0, 1 / 1.5)], ids=str
)
def test_step_scale_by_hand(kl: float, scale: float) -> None:
    assert kfac.adapted_step_scale(0.5, kl, 0.002) == pytest.approx(0.5 * scale)
    assert kfac.adapted_step_scale(0.9, 0.0, 0.002) == 1.0
    assert kfac.adapted_step_scale(1.2e-6, 1.0, 0.002) == 1e-6


def test_steps_follow_the_measured_kl(tmp_path: Path) -> None:
    model = make(RandomEnv(BOX, CONTINUOUS), kl_target=1e-4, max_kl=1e-2, momentum=0.0, n_steps=30, learning_rate=0.4)
    model.learn(30 * 40)
    assert 2e-5 < np.mean([_update(model)["kl"] for _ in range(10)]) < 5e-4
    scale = model._step_scale
    assert 0 < scale < 0.5
    assert model.policy.optimizer.param_groups[0]["lr"] <= 0.4 * scale * 1.6
    assert model.policy.value_optimizer.param_groups[0]["lr"] == 0.4
    model.save(tmp_path / "model")
    assert ACKTR.load(tmp_path / "model")._step_scale == scale
    free = make(RandomEnv(BOX, CONTINUOUS), max_kl=1e-2, momentum=0.0, n_steps=30, learning_rate=0.4).learn(60)
    assert free._step_scale == 1
    assert "step_scale" not in logged(free)


def _update(model: ACKTR) -> dict[str, float]:
    model.learn(model.n_steps, reset_num_timesteps=False)
    return logged(model)


def test_logged_quantities() -> None:
    model = make(cold_iterations=1)
    model.learn(6)
    first = logged(model)
    assert {"kl", "policy_step_size", "policy_predicted_kl", "value_step_size", "value_predicted_kl"} <= set(first)
    assert "policy_damping" not in first  # nothing is inverted in the cold start
    model.learn(6, reset_num_timesteps=False)
    second = logged(model)
    assert {f"{part}_{name}" for part in ("policy", "value") for name in ("damping", "trace_ratio", "grad_norm")} <= set(
        second
    )
    assert second["policy_damping"] == second["value_damping"] == pytest.approx(0.01)
    assert second["n_updates"] == 2


def test_more_damping_is_logged_and_training_goes_on() -> None:
    model = make(inversion="cholesky", inverse_update_interval=1)
    model.learn(12)
    optimizer: Any = model.policy.optimizer
    optimizer.state[model.policy.action_net.weight]["output_factor"] -= 0.5 * th.eye(3)
    model.learn(6, reset_num_timesteps=False)
    assert logged(model)["policy_damping"] > 0.05
    assert logged(model)["value_damping"] == pytest.approx(0.01)
    assert th.isfinite(flat(model.policy)).all()


# Acting, predicting, copying, saving


def hooks_of(model: ACKTR) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.policy.modules() for kind in kinds)


def test_hooks_are_off_except_in_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    counts = []
    original = model._update_factors
    evaluate = model.policy.evaluate_actions

    def watched(*args: Any) -> Any:
        counts.append(hooks_of(model))
        return evaluate(*args)

    model.policy.evaluate_actions = watched  # type: ignore[method-assign]
    monkeypatch.setattr(model, "_update_factors", lambda *args: (counts.append(hooks_of(model)), original(*args)))
    model.learn(6)
    assert counts == [6, 0]
    monkeypatch.undo()
    del model.policy.evaluate_actions
    model.predict(BOX.sample())
    copy.deepcopy(model.policy)
    pickle.dumps(model.policy.optimizer)
    model.save(tmp_path / "model")
    loaded = ACKTR.load(tmp_path / "model", env=RandomEnv(BOX, DISCRETE))
    loaded.set_parameters(model.get_parameters())
    loaded.learn(6, reset_num_timesteps=False)
    assert hooks_of(model) == hooks_of(loaded) == 0


def assert_same(ours: ACKTR, theirs: ACKTR) -> None:
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=0)
    for name, optimizer in ours._optimizers().items():
        states = [o.state_dict() for o in (optimizer, theirs._optimizers()[name])]
        assert states[0]["param_groups"] == states[1]["param_groups"]
        th.testing.assert_close(states[0]["state"], states[1]["state"], rtol=0, atol=0)


@pytest.mark.parametrize("action_space", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
@pytest.mark.parametrize("inversion", ["eigen", "cholesky"])
@pytest.mark.parametrize("updates", [1, 5], ids=["cold", "between inversions"])
def test_train_after_load_is_the_uninterrupted_train(
    action_space: spaces.Space, inversion: str, updates: int, tmp_path: Path
) -> None:
    kwargs = {"cold_iterations": 2, "inverse_update_interval": 4, "kl_target": 1e-4, "inversion": inversion}
    model = make(RandomEnv(BOX, action_space), **kwargs).learn(6 * updates)
    model.save(tmp_path / "model")
    buffer = copy.deepcopy(model.rollout_buffer)
    loaded = ACKTR.load(tmp_path / "model")
    loaded.set_logger(Logger(None, []))
    th.manual_seed(99)
    for candidate in (model, loaded):
        if candidate is model:
            state = th.get_rng_state()
            model._random_state = copy.deepcopy(loaded._random_state)
        else:
            th.set_rng_state(state)
        for _ in range(6):  # past the next inversion
            candidate.rollout_buffer, candidate._rollout_length = copy.deepcopy(buffer), 6
            candidate.train()
    assert_same(loaded, model)
    assert loaded._step_scale == model._step_scale


@pytest.mark.parametrize("n_envs", [1, 2])
def test_learn_after_load_is_the_uninterrupted_learn(n_envs: int, tmp_path: Path) -> None:
    """Episodes end at the save and resets are deterministic."""

    def env() -> Any:
        return make_vec_env(lambda: ScriptedEnv(length=6), n_envs=n_envs)

    kwargs = {"cold_iterations": 2, "inverse_update_interval": 4, "learning_rate": 0.1}
    model = make(env(), **kwargs).learn(18 * n_envs)
    model.save(tmp_path / "model")
    model.learn(30 * n_envs, reset_num_timesteps=False)
    th.manual_seed(99)
    np.random.seed(99)
    loaded = ACKTR.load(tmp_path / "model", env=env())
    loaded.learn(30 * n_envs, reset_num_timesteps=False)
    assert_same(loaded, model)


def test_options_can_change_at_load(tmp_path: Path) -> None:
    make(damping=0.5).learn(12).save(tmp_path / "model")
    loaded = ACKTR.load(tmp_path / "model", damping=0.02, max_kl=5e-3, inversion="cholesky", env=RandomEnv(BOX, DISCRETE))
    assert loaded.policy.optimizer.damping == 0.02  # type: ignore[attr-defined]
    assert loaded.policy.optimizer.max_kl == 5e-3  # type: ignore[attr-defined]
    loaded.learn(72, reset_num_timesteps=False)
    assert logged(loaded)["policy_damping"] == pytest.approx(0.02)


@pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
def test_engine_changes_nothing(engine: bool) -> None:
    """Rollouts by numpy and by PyTorch; updates are the same."""
    model, other = (make("CartPole-v1", n_steps=20, engine=choice).learn(60) for choice in (engine, False))
    atol = 1e-4 if engine else 0
    th.testing.assert_close(flat(model.policy), flat(other.policy), rtol=0, atol=atol)
    assert model.engine_report()["acting"] == ("numpy" if engine else "PyTorch: engine=False")


# Refusals


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"max_kl": 0}, ValueError, r"max_kl must be a number >= 1e-12, got 0"),
        ({"value_max_kl": -1.0}, ValueError, r"value_max_kl must be .*got -1.0"),
        ({"kl_target": 0.0}, ValueError, r"kl_target must be .*got 0.0"),
        ({"vf_fisher_coef": 0}, ValueError, r"vf_fisher_coef must be .*got 0"),
        ({"damping": 0}, ValueError, r"damping must be a number >= 1e-12, got 0"),
        ({"stats_decay": 1}, ValueError, r"stats_decay must be a number in \[0, 0.999999\], got 1"),
        ({"momentum": -0.1}, ValueError, r"momentum must be .*got -0.1"),
        ({"inverse_update_interval": 0}, ValueError, r"inverse_update_interval must be an integer >= 1, got 0"),
        ({"cold_iterations": 1.5}, TypeError, r"cold_iterations must be an integer, got 1.5"),
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
    env = RandomEnv(BOX, CONTINUOUS)
    with pytest.raises(error, match=message):
        ACKTR("MlpPolicy", env, **kwargs)


def test_a_zip_of_a2c_is_refused_with_the_reason(tmp_path: Path) -> None:
    A2C("MlpPolicy", RandomEnv(BOX, DISCRETE)).save(tmp_path / "a2c")
    with pytest.raises(ValueError, match=r"policy_kwargs\['optimizer_class'\] must be left out.*RMSprop"):
        ACKTR.load(tmp_path / "a2c")


@pytest.mark.parametrize("name", ["value_max_kl", "value_learning_rate"])
def test_shared_layers_have_no_options_for_the_value_alone(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} needs networks of their own.*share_features_extractor=False.*got 0.1"):
        make(RandomEnv(IMAGE, DISCRETE), "CnnPolicy", policy_kwargs=SMALL_CNN, **{name: 0.1})


class Memory(BaseFeaturesExtractor):
    """A recurrent layer over the observation's components."""

    def __init__(self, observation_space: gym.Space) -> None:
        super().__init__(observation_space, 3)
        self.lstm = nn.LSTM(1, 3)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.lstm(observations.t()[:, :, None])[0][-1]


class Grouped(BaseFeaturesExtractor):
    """A convolution in groups."""

    def __init__(self, observation_space: gym.Space) -> None:
        super().__init__(observation_space, 3)
        self.conv = nn.Conv2d(3, 3, 36, groups=3)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.conv(observations).flatten(1)


def test_layers_without_factors_are_named_at_construction() -> None:
    with pytest.raises(UnsupportedError, match=r"features_extractor.lstm, LSTM \(neither linear nor a 2D convolution\)"):
        make(policy_kwargs={"features_extractor_class": Memory})
    with pytest.raises(UnsupportedError, match=r"features_extractor.conv, Conv2d \(groups=3\)"):
        make(RandomEnv(IMAGE, DISCRETE), "CnnPolicy", policy_kwargs={"features_extractor_class": Grouped})


def test_policies_of_other_classes_are_refused() -> None:
    class Other(ActorCriticPolicy):
        """SB3's layers."""

    with pytest.raises(TypeError, match=r"policy must be derived from sb3_ac_ext.legacy.actor_critic.MlpPolicy, got .*Other"):
        ACKTR(Other, RandomEnv(BOX, DISCRETE))


def test_frozen_features_are_left_alone() -> None:
    class Frozen(BaseFeaturesExtractor):
        """A layer that is not trained, of a kind that has no factors."""

        def __init__(self, observation_space: gym.Space) -> None:
            super().__init__(observation_space, 4)
            self.norm = nn.LayerNorm(4).requires_grad_(False)

        def forward(self, observations: th.Tensor) -> th.Tensor:
            return self.norm(observations)

    model = make(policy_kwargs={**SMALL, "features_extractor_class": Frozen})
    before = flat(model.policy.features_extractor)
    model.learn(12)
    assert th.equal(flat(model.policy.features_extractor), before)
    assert set(model._optimizers()) == {"policy", "value"}


def test_parameters_that_are_not_finite_stop_training() -> None:
    model = make().learn(12)
    fill(model)
    model.policy.action_net.weight.data[0, 0] = float("nan")
    with pytest.raises((NonFiniteError, ValueError), match=r"non-finite|nan"):
        model.train()


def test_optimizers_are_kfac() -> None:
    model = make()
    assert all(isinstance(optimizer, KFAC) for optimizer in model._optimizers().values())
    assert model.policy.optimizer.max_kl == 1e-3  # type: ignore[attr-defined]
    assert model.policy.value_optimizer.max_kl == 1e-2  # type: ignore[attr-defined]


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


@pytest.mark.parametrize("inversion", ["eigen", "cholesky"])
@pytest.mark.parametrize(
    ("kind", "n_envs", "steps", "threshold"),
    [("discrete", 8, 20_000, 0.9), ("image", 8, 4000, 0.9), ("continuous", 2, 20_000, -0.05)],
)
def test_learns_to_repeat_what_it_sees(kind: str, n_envs: int, steps: int, threshold: float, inversion: str) -> None:
    """Tasks without memory or foresight: openai/baselines' smoke tests, and one for shared convolutions."""
    policy, kwargs = "MlpPolicy", {"n_steps": 20}
    if kind == "image":
        policy, kwargs = "CnnPolicy", {"n_steps": 8, "policy_kwargs": {"features_extractor_kwargs": {"features_dim": 16}}}
    env = make_vec_env(lambda: Answer(kind), n_envs=n_envs)
    model = make(env, policy, gamma=0.5, cold_iterations=10, learning_rate="lin_0.25", inversion=inversion, **kwargs)
    model.learn(steps)
    mean, _ = evaluate_policy(model, make_vec_env(lambda: Answer(kind), seed=7), n_eval_episodes=3)
    assert mean / 100 >= threshold
