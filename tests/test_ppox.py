"""PPOX: equal to SB3's PPO with its extras off, the penalty and the early stops by their definitions, phases of their own."""

import copy
from typing import Any

import numpy as np
import pytest
import torch as th
from batches import flat
from environments import BOX, CONTINUOUS, DICT, IMAGE, RandomEnv
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer, RolloutBufferSamples
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_ac_ext import PPOX
from sb3_ac_ext.legacy.actor_critic import MlpPolicy

SMALL: dict[str, Any] = {"net_arch": [8, 8]}
ROWS = 24

pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
either_engine = pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])


class InDouble(RolloutBuffer):
    """SB3's buffer without its cast of actions to float32."""

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> RolloutBufferSamples:
        columns = (self.values, self.log_probs, self.advantages, self.returns)
        rows = (self.observations, self.actions.astype(np.float64), *(column.reshape(-1) for column in columns))
        return RolloutBufferSamples(*(th.as_tensor(row[batch_inds]) for row in rows))


def make(
    cls: type[PPO] = PPOX,
    actions: spaces.Space = CONTINUOUS,
    observations: spaces.Space = BOX,
    policy: str = "MlpPolicy",
    **kwargs: Any,
) -> Any:
    own = {"policy_kwargs": SMALL, "seed": 0, "n_steps": 12, "batch_size": 8, "n_epochs": 3, "learning_rate": 1e-3}
    env = make_vec_env(lambda: RandomEnv(observations, actions), n_envs=2)
    model = cls(policy, env, **{**own, **kwargs})
    model.set_logger(Logger(None, []))
    return model


def sgd(**kwargs: Any) -> dict[str, Any]:
    """Steps that are the gradients, in one batch."""
    policy_kwargs = {**SMALL, "optimizer_class": th.optim.SGD, **kwargs}
    return {"policy_kwargs": policy_kwargs, "learning_rate": 0.1, "max_grad_norm": 1e9, "batch_size": ROWS}


def random_actions(space: spaces.Space, numbers: np.random.Generator) -> np.ndarray:
    if isinstance(space, spaces.Box):
        return numbers.normal(size=(ROWS, int(np.prod(space.shape))))
    if isinstance(space, spaces.MultiDiscrete):
        sizes = space.nvec
    else:
        sizes = np.full(space.n, 2) if isinstance(space, spaces.MultiBinary) else np.array([space.n])
    return numbers.integers(sizes, size=(ROWS, len(sizes))).astype(np.float64)


def fill(model: Any, off: float = 0.3, seed: int = 0) -> Any:
    """A rollout of random numbers in float64, of a policy that was ``off`` the present one."""
    model.policy.double()
    buffer, numbers = model.rollout_buffer, np.random.default_rng(seed)
    buffer.reset()
    observations = numbers.normal(size=(ROWS, *model.observation_space.shape))
    actions = random_actions(model.action_space, numbers)
    value, log_prob, _ = evaluated(model, observations, actions)
    value = value.numpy() + off * numbers.normal(size=ROWS)
    advantage = 1 + numbers.normal(size=ROWS)
    columns = {"values": value, "advantages": advantage, "returns": value + advantage}
    columns["log_probs"] = log_prob.numpy() + off * numbers.normal(size=ROWS)
    for name, column in {**columns, "observations": observations, "actions": actions}.items():
        setattr(buffer, name, column.reshape(12, 2, *column.shape[1:]))
    buffer.full, model._rollout_length = True, 12
    return model


def evaluated(model: Any, observations: np.ndarray, actions: np.ndarray) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """V, log pi and entropy by SB3's own policy methods."""
    chosen = th.as_tensor(actions)
    chosen = chosen.long().flatten() if isinstance(model.action_space, spaces.Discrete) else chosen
    with th.no_grad():
        values, log_prob, entropy = model.policy.evaluate_actions(th.as_tensor(observations), chosen)
    return values.flatten(), log_prob, entropy


def on_rollout(model: Any) -> tuple[th.Tensor, th.Tensor]:
    """V and log r on the whole rollout, which is that of `fill`."""
    buffer = model.rollout_buffer
    columns = (buffer.observations, buffer.actions, buffer.log_probs)
    observations, actions, old = (array.reshape(ROWS, *array.shape[2:]) for array in columns)
    values, log_prob, _ = evaluated(model, observations, actions)
    return values, log_prob - th.as_tensor(old)


def epochs(model: Any, phase: str = "") -> int:
    return model.logger.name_to_value[f"train/{phase}epochs"]


# Equal to SB3


SPACES: dict[str, dict[str, Any]] = {
    "box": {},
    "matrix": {"actions": spaces.Box(-1, 2, (2, 2), np.float64)},
    "discrete": {"actions": spaces.Discrete(3)},
    "multidiscrete": {"actions": spaces.MultiDiscrete([3, 2])},
    "multibinary": {"actions": spaces.MultiBinary(3)},
    "gSDE": {"use_sde": True},
    "gSDE narrow": {"use_sde": True, "policy_kwargs": {**SMALL, "full_std": False}},
    "gSDE squashed": {"use_sde": True, "policy_kwargs": {**SMALL, "squash_output": True}, "ent_coef": 0.1},
    "unequal": {"policy_kwargs": {"net_arch": {"pi": [5], "vf": [7, 6, 5]}, "activation_fn": nn.ReLU}},
    "images": {"observations": IMAGE, "policy": "CnnPolicy", "n_epochs": 1},
    "images apart": {
        "observations": IMAGE,
        "policy": "CnnPolicy",
        "n_epochs": 1,
        "policy_kwargs": {**SMALL, "share_features_extractor": False},
    },
}
OPTIONS: dict[str, dict[str, Any]] = {
    "clip_range_vf": {"clip_range_vf": 0.2},
    "falling clip ranges": {"clip_range": lambda progress: 0.3 * progress, "clip_range_vf": lambda progress: 0.5 * progress},
    "target_kl": {"target_kl": 0.06, "n_epochs": 10},
    "clipped gradient": {"max_grad_norm": 0.01},
    "coefficients": {"ent_coef": 0.3, "vf_coef": 2.0},
    "entropy of choices": {"actions": spaces.Discrete(3), "ent_coef": 0.3},
    "entropy of coins": {"actions": spaces.MultiBinary(3), "ent_coef": 0.3},
    "entropy of several choices": {"actions": spaces.MultiDiscrete([3, 2]), "ent_coef": 0.3},
    "entropy of gSDE": {"use_sde": True, "ent_coef": 0.3},
    "raw advantages": {"normalize_advantage": False},
    "a last minibatch of one": {"batch_size": 23},
    "one batch": {"batch_size": 64},
    "RMSprop": {"policy_kwargs": {**SMALL, "optimizer_class": th.optim.RMSprop}},
}


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("kwargs", [*SPACES.values(), *OPTIONS.values()], ids=[*SPACES, *OPTIONS])
@either_engine
def test_equals_ppo_with_extras_off(kwargs: dict[str, Any], engine: bool) -> None:
    kwargs = {"learning_rate": lambda progress: 3e-3 * progress, **kwargs}
    theirs = make(PPO, rollout_buffer_class=InDouble, **copy.deepcopy(kwargs))
    ours = make(PPOX, engine=engine, **kwargs)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=0)  # same seed, same initial weights
    for update in range(2):
        for model in (theirs, ours):
            fill(model, seed=update)
            model._current_progress_remaining = 1 - update / 3
            np.random.seed(update)
            model.train()
        th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-10)
        moments = [model.policy.optimizer.state_dict()["state"] for model in (ours, theirs)]
        th.testing.assert_close(*moments, rtol=0, atol=1e-10)
        assert ours._n_updates == theirs._n_updates
        own, other = (model.logger.name_to_value for model in (ours, theirs))
        for name in other.keys() - {"train/loss"}:
            assert own[name] == pytest.approx(other[name], rel=1e-6, abs=1e-9), name
    if "target_kl" in kwargs:
        assert 1 < ours._n_updates < 20  # it has stopped early, and not at once


@either_engine
@pytest.mark.parametrize("kwargs", [{}, {"use_sde": True}], ids=["gaussian", "gSDE"])
def test_learns_the_same_as_ppo_from_the_same_seed(engine: bool, kwargs: dict[str, Any]) -> None:
    small = {"policy_kwargs": SMALL, "seed": 0, "n_steps": 64, "n_epochs": 3, **kwargs}
    theirs, ours = (
        cls("MlpPolicy", "Pendulum-v1", **small, **own).learn(192) for cls, own in ((PPO, {}), (PPOX, {"engine": engine}))
    )
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-4 if engine else 1e-6)


def test_images_and_dicts_train() -> None:
    for space, policy in ((IMAGE, "CnnPolicy"), (DICT, "MultiInputPolicy")):
        for kwargs in (
            {"surrogate": "penalty"},
            {"separate_phases": True, "policy_kwargs": {**SMALL, "share_features_extractor": False}},
        ):
            model = make(observations=space, policy=policy, n_steps=4, batch_size=4, n_epochs=1, **kwargs)
            before = flat(model.policy)
            model.learn(8)
            assert not th.equal(flat(model.policy), before)


def test_at_the_old_policy_nothing_is_clipped() -> None:
    model = make(n_epochs=1, batch_size=ROWS).learn(ROWS)
    logged = model.logger.name_to_value
    assert logged["train/clip_fraction"] == 0
    assert logged["train/approx_kl"] == pytest.approx(0, abs=1e-6)


# Value clipping


@pytest.mark.usefixtures("double_precision")
@either_engine
@pytest.mark.parametrize("mode", ["clipped", "max"])
def test_an_overshot_value_is_pulled_back_by_max_alone(mode: str, engine: bool) -> None:
    """V is beyond R, further from V_old than it may be: SB3's loss has no gradient there."""
    kwargs = sgd() | {"n_epochs": 1, "vf_coef": 1.0, "normalize_advantage": False}
    model = fill(make(clip_range_vf=0.1, clip_range_vf_mode=mode, engine=engine, **kwargs))
    buffer = model.rollout_buffer
    values = on_rollout(model)[0].numpy().reshape(12, 2)
    buffer.values, buffer.returns, buffer.advantages = values - 1, values - 0.5, np.zeros((12, 2))
    before = [parameter.clone() for parameter in model.policy.value_parameters()]
    model.train()
    moved = [not th.equal(new, old) for new, old in zip(model.policy.value_parameters(), before, strict=True)]
    assert all(moved) if mode == "max" else not any(moved)
    if mode == "max":
        assert (on_rollout(model)[0].numpy() < values.reshape(-1)).all()
    assert model.logger.name_to_value["train/value_clip_fraction"] == 1
    assert model.logger.name_to_value["train/value_loss"] == pytest.approx(0.25 if mode == "max" else 0.16)


# Early stops


def stopped_at(limit: float, measure: Any, **kwargs: Any) -> int:
    """The first epoch after which ``measure`` is above ``limit``, by training anew for each number of epochs."""
    for count in range(1, 12):
        model = fill(make(n_epochs=count, batch_size=ROWS, **kwargs), off=0)
        model.train()
        if measure(model) > limit:
            return count
    raise AssertionError("it never is")


def k1(model: Any) -> float:
    return -on_rollout(model)[1].mean().item()


def k3(model: Any) -> float:
    log_ratio = on_rollout(model)[1]
    return (log_ratio.exp() - 1 - log_ratio).mean().item()


@pytest.mark.usefixtures("double_precision")
@either_engine
@pytest.mark.parametrize(("estimator", "measure", "limit"), [("k1", k1, 0.0485), ("k3", k3, 0.0485)], ids=["k1", "k3"])
def test_kl_stop_after_the_epoch_that_went_too_far_on_the_whole_rollout(
    estimator: str, measure: Any, limit: float, engine: bool
) -> None:
    kwargs = {"learning_rate": 2e-2, "engine": engine}
    expected = stopped_at(limit, measure, **kwargs)
    assert expected > 1
    model = fill(make(n_epochs=20, batch_size=ROWS, kl_stop=limit, kl_stop_estimator=estimator, **kwargs), off=0)
    model.train()
    assert epochs(model) == model._n_updates == expected
    assert measure(model) > limit


@pytest.mark.usefixtures("double_precision")
def test_kl_after_an_epoch_is_of_the_whole_rollout_not_of_the_last_minibatch() -> None:
    model = fill(make(n_epochs=1, kl_stop=0.01))
    seen = []
    original = model._within_bounds_after_epoch
    model._within_bounds_after_epoch = lambda samples, parts: seen.append(samples.size) or original(samples, parts)
    model.train()
    assert seen == [ROWS]


def steps(model: Any, optimizer: str = "optimizer") -> int:
    """Gradient steps that Adam has taken."""
    states = getattr(model.policy, optimizer).state_dict()["state"].values()
    return int(max((state["step"] for state in states), default=0))


@pytest.mark.usefixtures("double_precision")
@either_engine
def test_kl_stop_on_a_minibatch_comes_before_its_step(engine: bool) -> None:
    """The first is at the old policy, where the divergence is 0; the second is not."""
    model = fill(make(n_epochs=5, kl_stop=0.0, kl_stop_every="minibatch", engine=engine), off=0)
    model.train()
    assert (steps(model), epochs(model)) == (1, 1)
    everything = fill(make(n_epochs=5, kl_stop=1.0, kl_stop_every="minibatch", engine=engine), off=0)
    everything.train()
    assert (steps(everything), epochs(everything)) == (15, 5)
    one_batch = fill(make(n_epochs=5, batch_size=ROWS, kl_stop=0.0, kl_stop_every="minibatch", engine=engine), off=0)
    one_batch.train()
    assert (steps(one_batch), epochs(one_batch)) == (1, 2)  # what the first epoch led to is seen by the second


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("every", ["minibatch", "epoch"])
@pytest.mark.parametrize(("estimator", "done"), [("k1", 3), ("k3", 1)])
def test_the_signed_estimate_does_not_stop_where_it_is_negative(every: str, estimator: str, done: int) -> None:
    model = fill(make(kl_stop=0.05, kl_stop_estimator=estimator, kl_stop_every=every, learning_rate=1e-5), off=0)
    model.rollout_buffer.log_probs = model.rollout_buffer.log_probs - 1  # log r = 1: k1 = -1, k3 = 0.7
    model.train()
    assert epochs(model) == done


@pytest.mark.usefixtures("double_precision")
@either_engine
def test_kl_stop_of_nothing_allows_one_epoch(engine: bool) -> None:
    model = fill(make(kl_stop=0.0, engine=engine), off=0)
    model.train()
    assert (steps(model), epochs(model)) == (3, 1)


@pytest.mark.usefixtures("double_precision")
@either_engine
@pytest.mark.parametrize("scope", ["both", "policy"])
def test_what_a_stop_of_the_policy_ends(scope: str, engine: bool) -> None:
    kwargs = {"separate_phases": True, "kl_stop": 0.0, "kl_stop_scope": scope, "engine": engine}
    model = fill(make(policy_epochs=4, value_epochs=2, **kwargs))
    model.train()
    assert epochs(model, "policy_") == 1
    if scope == "both":
        assert "train/value_epochs" not in model.logger.name_to_value
        assert steps(model, "value_optimizer") == 0
    else:
        assert epochs(model, "value_") == 2
        assert steps(model, "value_optimizer") == 6


def half_the_square_of_the_move(model: Any) -> float:
    old = th.as_tensor(model.rollout_buffer.values).reshape(-1)
    return 0.5 * ((on_rollout(model)[0] - old) ** 2).mean().item()


@pytest.mark.usefixtures("double_precision")
@either_engine
def test_value_stop_is_half_the_mean_square_of_what_the_value_has_moved(engine: bool) -> None:
    kwargs = {"separate_phases": True, "value_learning_rate": 3e-3, "engine": engine}
    limit = 0.015  # twice the measure would be above it after fewer epochs
    expected = stopped_at(limit, half_the_square_of_the_move, **kwargs)
    assert expected > 1
    model = fill(make(n_epochs=20, batch_size=ROWS, value_stop_mse=limit, **kwargs), off=0)
    model.train()
    assert (epochs(model, "policy_"), epochs(model, "value_")) == (20, expected)
    once = fill(make(value_stop_mse=0.0, **kwargs))
    once.train()
    assert (epochs(once, "policy_"), epochs(once, "value_")) == (3, 1)


# Separate phases


@pytest.mark.usefixtures("double_precision")
@either_engine
def test_a_phase_is_the_joint_update_without_the_other_network(engine: bool) -> None:
    """Adam scales every parameter by itself, so without a gradient bound the networks do not feel each other."""
    free = {"max_grad_norm": 1e9, "batch_size": ROWS, "ent_coef": 0.1, "engine": engine}
    apart = fill(make(separate_phases=True, policy_epochs=2, value_epochs=4, vf_coef=123.0, **free))
    policy_alone, value_too = fill(make(n_epochs=2, vf_coef=0.0, **free)), fill(make(n_epochs=4, vf_coef=1.0, **free))
    for model in (apart, policy_alone, value_too):
        model.train()
    for own, joint in (("policy", policy_alone), ("value", value_too)):
        parameters = (getattr(model.policy, f"{own}_parameters")() for model in (apart, joint))
        for value, expected in zip(*parameters, strict=True):
            th.testing.assert_close(value, expected, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("double_precision")
@either_engine
@pytest.mark.parametrize("still", ["policy", "value"])
def test_each_phase_leaves_the_other_network_untouched(still: str, engine: bool) -> None:
    model = fill(make(separate_phases=True, engine=engine, **{f"{still}_learning_rate": 0.0}))
    before = {name: [p.clone() for p in getattr(model.policy, f"{name}_parameters")()] for name in ("policy", "value")}
    model.train()
    for name, old in before.items():
        same = [th.equal(new, was) for new, was in zip(getattr(model.policy, f"{name}_parameters")(), old, strict=True)]
        assert all(same) if name == still else not any(same)


def test_no_parameter_is_in_both_optimizers_and_none_in_neither() -> None:
    for kwargs in ({}, {"use_sde": True}, {"actions": spaces.Discrete(2)}):
        model = make(separate_phases=True, **kwargs)
        groups = [optimizer.param_groups[0]["params"] for optimizer in model._optimizers().values()]
        assert len(groups) == 2
        ids = [id(parameter) for group in groups for parameter in group]
        assert sorted(ids) == sorted(map(id, model.policy.parameters()))


def test_a_shared_features_extractor_is_refused() -> None:
    kwargs = {"observations": IMAGE, "policy": "CnnPolicy", "separate_phases": True}
    with pytest.raises(ValueError, match=r"share_features_extractor=False"):
        make(**kwargs)
    make(**kwargs, policy_kwargs={**SMALL, "share_features_extractor": False})


@either_engine
def test_rates_and_gradient_bounds_of_the_phases(engine: bool) -> None:
    kwargs = {"policy_learning_rate": "lin_4e-3", "value_learning_rate": 2e-3, "learning_rate": 1e-3}
    model = make(separate_phases=True, max_grad_norm={"value": 0.05}, engine=engine, **kwargs)
    model.learn(2 * ROWS)
    model._current_progress_remaining = 0.25
    model.train()
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in model._optimizers().items()}
    assert rates == {"policy": pytest.approx(1e-3), "value": pytest.approx(2e-3)}
    assert model._max_grad_norms == {"value": 0.05}
    assert {"train/policy_grad_norm", "train/value_grad_norm"} <= model.logger.name_to_value.keys()


@pytest.mark.usefixtures("double_precision")
def test_gradients_are_clipped_for_each_phase() -> None:
    kwargs = sgd() | {"n_epochs": 1, "learning_rate": 1.0, "max_grad_norm": {"policy": 1e-3, "value": 1e-2}}
    model = fill(make(separate_phases=True, **kwargs))
    before = {
        name: th.cat([p.flatten() for p in getattr(model.policy, f"{name}_parameters")()]) for name in ("policy", "value")
    }
    model.train()
    for name, bound in kwargs["max_grad_norm"].items():
        after = th.cat([p.flatten() for p in getattr(model.policy, f"{name}_parameters")()])
        assert (after - before[name]).norm().item() == pytest.approx(bound, rel=2e-2)


@pytest.mark.usefixtures("double_precision")
def test_sample_ratios_take_a_share_of_the_rollout_without_replacement() -> None:
    """int(0.4 * 24) = 9 samples for each step of the policy, the value's phase as ever."""
    model = fill(make(separate_phases=True, policy_sample_ratio=0.4, n_epochs=2))
    batches: dict[str, list[list[float]]] = {"policy": [], "value": []}
    original = model._update

    def watched(batch: Any, parts: Any) -> bool:
        batches[parts[0]].append(batch.advantages.tolist())
        return original(batch, parts)

    model._update = watched
    model.train()
    assert [len(set(batch)) for batch in batches["policy"]] == [len(batch) for batch in batches["policy"]] == [9, 9]
    assert set(batches["policy"][0]) != set(batches["policy"][1])  # drawn anew
    assert [len(batch) for batch in batches["value"]] == [8, 8, 8, 8, 8, 8]
    everything = model._samples().advantages.tolist()
    assert sorted(number for batch in batches["value"][:3] for number in batch) == sorted(everything)
    assert (steps(model), steps(model, "value_optimizer")) == (2, 6)


@pytest.mark.usefixtures("double_precision")
def test_the_smallest_sample_ratio_takes_one_sample() -> None:
    model = fill(make(separate_phases=True, value_sample_ratio=1e-6))
    model.train()
    assert steps(model, "value_optimizer") == 3


# Advantages


@pytest.mark.usefixtures("double_precision")
@either_engine
def test_advantages_normalised_over_the_buffer_and_returns_not(engine: bool) -> None:
    model = fill(make(normalize_advantage_over="buffer", engine=engine))
    by_hand = fill(make(normalize_advantage=False, engine=engine))
    per_minibatch = fill(make(engine=engine))
    advantages = by_hand.rollout_buffer.advantages
    by_hand.rollout_buffer.advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
    for candidate in (model, by_hand, per_minibatch):
        np.random.seed(0)
        candidate.train()
    th.testing.assert_close(flat(model.policy), flat(by_hand.policy), rtol=0, atol=1e-10)
    assert not th.allclose(flat(model.policy), flat(per_minibatch.policy), rtol=0, atol=1e-6)


# Penalty


PENALISED = {name: SPACES[name] for name in ("box", "discrete", "multidiscrete", "multibinary", "gSDE", "gSDE narrow")}


def divergence(old: Any, new: Any) -> th.Tensor:
    """``(B,)`` KL(old || new) by PyTorch's own; SB3's distributions of several choices hold a list."""
    pairs = zip(old, new, strict=True) if isinstance(old, list) else ((old, new),)
    parts = [th.distributions.kl_divergence(p, q) for p, q in pairs]
    return sum(part if part.dim() == 1 else part.sum(dim=1) for part in parts)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("kwargs", PENALISED.values(), ids=PENALISED)
@either_engine
def test_penalty_by_hand(kwargs: dict[str, Any], engine: bool) -> None:
    """-mean r A + beta mean KL(old || new) - c mean H + mean (V - R)^2, at the old policy and one step away from it."""
    extra = {name: value for name, value in kwargs.get("policy_kwargs", {}).items() if name == "full_std"}
    options = {**kwargs, **sgd(**extra), "n_epochs": 2, "ent_coef": 0.1, "vf_coef": 0.3}
    model = fill(make(surrogate="penalty", kl_coef=20.0, engine=engine, **options), off=0.1)
    reference, before = (make(**options).policy.double() for _ in range(2))
    optimizer = th.optim.SGD(reference.parameters(), lr=0.1)
    samples = {
        name: th.as_tensor(getattr(model.rollout_buffer, name)).flatten(0, 1)
        for name in ("observations", "actions", "log_probs", "advantages", "returns")
    }
    actions = samples["actions"].long().flatten() if isinstance(model.action_space, spaces.Discrete) else samples["actions"]
    advantages = (samples["advantages"] - samples["advantages"].mean()) / (samples["advantages"].std() + 1e-8)
    with th.no_grad():
        old = before.get_distribution(samples["observations"]).distribution
    divergences = []
    for _ in range(2):
        values, log_prob, entropy = reference.evaluate_actions(samples["observations"], actions)
        kl = divergence(old, reference.action_dist.distribution).mean()
        divergences.append(kl.item())
        policy_loss = -((log_prob - samples["log_probs"]).exp() * advantages).mean() + 20.0 * kl - 0.1 * entropy.mean()
        loss = policy_loss + 0.3 * ((values.flatten() - samples["returns"]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.train()
    assert divergences[0] == 0 and divergences[1] > 1e-6
    th.testing.assert_close(flat(model.policy), flat(reference), rtol=0, atol=1e-10)
    reference.get_distribution(samples["observations"])
    final = divergence(old, reference.action_dist.distribution).mean().item()
    assert model.logger.name_to_value["train/kl"] == pytest.approx(final, rel=1e-6)


@pytest.mark.usefixtures("double_precision")
def test_the_penalty_does_not_clip() -> None:
    """Every ratio is far outside of any clip range, and the gradient is there."""
    model = fill(make(surrogate="penalty", **sgd(), n_epochs=1, vf_coef=0.0), off=3)
    assert (on_rollout(model)[1].abs() > 0.3).float().mean() > 0.5
    before = flat(model.policy)
    model.train()
    assert not th.equal(flat(model.policy), before)
    assert "train/clip_fraction" not in model.logger.name_to_value
    assert "train/clip_range" not in model.logger.name_to_value


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(("target", "factor"), [(1e-9, 2.0), (1e3, 0.5)], ids=["too far", "not far enough"])
def test_the_coefficient_adapts_once_after_all_updates_and_is_carried_over(target: float, factor: float) -> None:
    model = fill(make(surrogate="penalty", kl_target=target, kl_coef=3.0))
    used = []
    original = model._policy_slopes
    model._policy_slopes = lambda *args: used.append(model._kl_coef) or original(*args)
    for update in range(3):
        model.train()
        assert model.logger.name_to_value["train/kl_coef"] == 3.0 * factor**update  # the one that was used
        assert model._kl_coef == 3.0 * factor ** (update + 1)
    assert used == [3.0] * 9 + [3.0 * factor] * 9 + [3.0 * factor**2] * 9


@pytest.mark.usefixtures("double_precision")
def test_the_coefficient_stays_where_the_divergence_is_right() -> None:
    def trained(target: float) -> Any:
        model = fill(make(surrogate="penalty", kl_target=target))
        np.random.seed(0)
        model.train()
        return model

    kl = trained(1.0).logger.name_to_value["train/kl"]
    targets = (kl, kl / 1.49, kl / 1.51, kl * 1.49, kl * 1.51)
    assert [trained(target)._kl_coef for target in targets] == [1.0, 1.0, 2.0, 1.0, 0.5]


def test_defaults_of_the_penalty() -> None:
    model = make(surrogate="penalty")
    assert (model.kl_coef, model.kl_target, model._kl_coef) == (None, None, 1.0)
    model.learn(ROWS)
    kl = model.logger.name_to_value["train/kl"]
    assert model._kl_coef == (0.5 if kl < 0.01 / 1.5 else 2.0 if kl > 0.015 else 1.0)


def test_the_coefficient_is_saved_and_starts_anew_where_it_is_given(tmp_path: Any) -> None:
    model = make(surrogate="penalty", kl_coef=3.0, kl_target=1e-9).learn(ROWS)
    model.save(tmp_path / "model")
    assert PPOX.load(tmp_path / "model")._kl_coef == model._kl_coef == 6.0
    assert PPOX.load(tmp_path / "model", kl_coef=5.0)._kl_coef == 5.0


def test_the_penalty_keeps_the_divergence_near_its_target() -> None:
    """With a rate that would go too far, the median of the last iterations is within a factor of 2."""
    kwargs = {"policy_kwargs": SMALL, "seed": 0, "n_steps": 128, "learning_rate": 1e-2, "gamma": 0.9}
    seen = []
    model = PPOX("MlpPolicy", "Pendulum-v1", surrogate="penalty", kl_target=0.01, **kwargs)
    original = model._adapt_penalty

    def watched(samples: Any) -> None:
        original(samples)
        seen.append(model.logger.name_to_value["train/kl"])

    model._adapt_penalty = watched
    model.learn(128 * 24)
    assert max(seen[:10]) > 0.02
    assert 0.005 <= np.median(seen[10:]) <= 0.02


# Files


def adam(model: Any) -> dict[str, dict[str, th.Tensor]]:
    """The state of each parameter by its name."""
    names = {id(parameter): name for name, parameter in model.policy.named_parameters()}
    optimizers = [model.policy.optimizer, getattr(model.policy, "value_optimizer", None)]
    return {names[id(p)]: state for optimizer in optimizers if optimizer is not None for p, state in optimizer.state.items()}


@pytest.mark.parametrize("source", [PPO, PPOX], ids=["SB3's zip", "our joint zip"])
@pytest.mark.parametrize("kwargs", [{}, {"use_sde": True}, {"actions": spaces.Discrete(3)}], ids=["box", "gSDE", "discrete"])
@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
def test_zips_of_one_optimizer_load(source: Any, kwargs: dict[str, Any], separate: bool, tmp_path: Any) -> None:
    model = make(source, **kwargs).learn(ROWS)
    model.save(tmp_path / "zip")
    loaded = PPOX.load(tmp_path / "zip", env=model.env, separate_phases=separate)
    assert type(loaded.policy) is MlpPolicy
    assert th.equal(flat(loaded.policy), flat(model.policy))
    ours, theirs = adam(loaded), adam(model)
    assert ours.keys() == theirs.keys() == dict(model.policy.named_parameters()).keys()
    th.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert len(loaded._optimizers()) == 1 + separate
    loaded.learn(ROWS, reset_num_timesteps=False)
    counts = {int(state["step"]) for state in adam(loaded).values()}
    assert counts == {18}


def test_sb3s_zip_trains_on_as_sb3(tmp_path: Any) -> None:
    theirs = make(PPO).learn(ROWS)
    theirs.save(tmp_path / "zip")
    ours = PPOX.load(tmp_path / "zip", env=theirs.env)
    for model in (theirs, ours):
        np.random.seed(1)
        th.manual_seed(1)
        model.env.seed(1)
        model.learn(2 * ROWS)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-5)


def test_zips_of_separate_phases_load_and_cannot_be_joined(tmp_path: Any) -> None:
    model = make(separate_phases=True).learn(ROWS)
    model.save(tmp_path / "zip")
    loaded = PPOX.load(tmp_path / "zip")
    th.testing.assert_close(adam(loaded), adam(model), rtol=0, atol=0)
    with pytest.raises(ValueError, match="separate_phases must stay True"):
        PPOX.load(tmp_path / "zip", separate_phases=False)


def test_our_zip_of_one_optimizer_goes_back_to_sb3() -> None:
    model, fresh = make().learn(ROWS), make(PPO)
    fresh.set_parameters(model.get_parameters())
    observations = np.ones((3, 4), np.float32)
    expected = model.predict(observations, deterministic=True)[0]
    np.testing.assert_allclose(fresh.predict(observations, deterministic=True)[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("policy", "space"), [("MlpPolicy", BOX), ("CnnPolicy", IMAGE), ("MultiInputPolicy", DICT)], ids=["box", "images", "dict"]
)
def test_sb3s_policy_classes_are_ours(policy: str, space: spaces.Space) -> None:
    assert type(make(observations=space, policy=policy).policy) is PPOX.policy_aliases[policy]
    assert type(make(observations=space, policy=PPO.policy_aliases[policy]).policy) is PPOX.policy_aliases[policy]


def test_another_policy_trains_by_its_own_methods() -> None:
    class Own(ActorCriticPolicy):
        """Doubles what it says of values."""

        def evaluate_actions(self, *args: Any) -> Any:
            calls.append("evaluated")
            return super().evaluate_actions(*args)

    calls: list[str] = []
    model = make(policy=Own).learn(ROWS)
    assert calls and type(model.policy) is Own
    with pytest.raises(TypeError, match=r"separate_phases=True needs a policy derived from .*MlpPolicy.*Own"):
        make(policy=Own, separate_phases=True)


# Log


def test_logged_quantities() -> None:
    common = {"learning_rate", "n_updates", "approx_kl", "entropy_loss", "policy_gradient_loss", "value_loss", "std"}
    common |= {"explained_variance", "policy_grad_norm"}
    clip, phases = {"clip_fraction", "clip_range"}, {"policy_epochs", "value_epochs", "value_grad_norm"}
    for kwargs, own in (
        ({}, clip | {"epochs"}),
        ({"clip_range_vf": 0.2}, clip | {"epochs", "clip_range_vf", "value_clip_fraction"}),
        ({"surrogate": "penalty"}, {"epochs", "kl", "kl_coef"}),
        ({"surrogate": "penalty", "clip_range_vf": 0.2}, {"epochs", "kl", "kl_coef", "clip_range_vf", "value_clip_fraction"}),
        ({"separate_phases": True}, clip | phases),
        ({"separate_phases": True, "value_learning_rate": 1e-3}, clip | phases | {"value_learning_rate"}),
    ):
        model = make(**kwargs)
        model.learn(ROWS, log_interval=None)
        logged = {name.removeprefix("train/") for name in model.logger.name_to_value if name.startswith("train/")}
        assert logged == common | own, kwargs


def test_the_logged_divergence_is_that_of_the_policys_last_epoch() -> None:
    for kwargs in ({}, {"separate_phases": True}):
        model = make(**kwargs).learn(ROWS)
        assert model.logger.name_to_value["train/approx_kl"] > 0
