"""PPOX: SB3's PPO with its extras off; equations 7 and 8, early stops, phases of their own and the penalty as defined."""

import copy
from collections import defaultdict
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch as th
from batches import flat
from gymnasium import spaces
from models import VARIANTS, environment, small_model
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBufferSamples
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from sb3_ac_ext import PPOX
from sb3_ac_ext.buffers.rollouts import flattened
from sb3_ac_ext.networks.actor_critic import policy_parameters, value_parameters

STEPS, ENVS, ROWS = 12, 2, 24
OWN_PARAMETERS = {"policy": policy_parameters, "value": value_parameters}
DISCRETE, SEVERAL, COINS = ({"variant": name} for name in ("discrete", "several choices", "coins"))

either_engine = pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
in_double = pytest.mark.usefixtures("double_precision")
pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")


def make(cls: Any = PPOX, variant: str = "mlp", actions: spaces.Space | None = None, **kwargs: Any) -> Any:
    def env() -> Any:
        made = environment("ppox", variant)
        made.action_space = actions or made.action_space
        return made

    sizes = {"n_steps": STEPS, "batch_size": 8, "n_epochs": 3, "learning_rate": 1e-3}
    return small_model(cls, variant, env=make_vec_env(env, ENVS), **{**sizes, **kwargs})


def sgd(**policy_kwargs: Any) -> dict[str, Any]:
    """Steps that are the gradients, in one batch."""
    own = {"optimizer_class": th.optim.SGD, "optimizer_kwargs": {}, **policy_kwargs}
    return {"policy_kwargs": own, "learning_rate": 0.1, "max_grad_norm": None, "batch_size": ROWS}


def random_actions(space: Any, numbers: np.random.Generator) -> np.ndarray:
    if isinstance(space, spaces.Box):
        return numbers.normal(size=(ROWS, int(np.prod(space.shape))))
    sizes = space.nvec if isinstance(space, spaces.MultiDiscrete) else [space.n]
    sizes = np.full(space.n, 2) if isinstance(space, spaces.MultiBinary) else np.array(sizes)
    return numbers.integers(sizes, size=(ROWS, len(sizes))).astype(np.float64)


def fill(model: Any, off: float = 0.3, seed: int = 0) -> Any:
    """A rollout of random numbers in float64, of a policy that was ``off`` the present one."""
    model.policy.double().set_training_mode(False)
    buffer, numbers, space = model.rollout_buffer, np.random.default_rng(seed), model.observation_space

    def observations(part: Any) -> np.ndarray:
        return numbers.normal(size=(STEPS, ENVS, *(part.shape or (part.n,))))

    def placed(column: np.ndarray) -> np.ndarray:
        return column.reshape(ENVS, STEPS).T.copy()

    buffer.reset()
    whole = not isinstance(space, spaces.Dict)
    buffer.observations = observations(space) if whole else {name: observations(part) for name, part in space.items()}
    buffer.actions = random_actions(model.action_space, numbers).reshape(STEPS, ENVS, -1)
    buffer.values = buffer.log_probs = buffer.advantages = buffer.returns = np.zeros((STEPS, ENVS))
    values, log_probs = (column.numpy() + off * numbers.normal(size=ROWS) for column in now(model))
    advantages = 1 + numbers.normal(size=ROWS)
    buffer.values, buffer.log_probs, buffer.advantages = placed(values), placed(log_probs), placed(advantages)
    buffer.returns, buffer.full, model._rollout_length = placed(values + advantages), True, STEPS
    buffer._get_samples = lambda rows, env=None: RolloutBufferSamples(*flattened(buffer, STEPS).at(rows)[:6])  # not in fp32
    return model


@th.no_grad()
def now(model: Any) -> tuple[th.Tensor, th.Tensor]:
    """V and log pi of the rollout that `fill` made, by SB3's own method."""
    samples = flattened(model.rollout_buffer, STEPS)
    values, log_probs, _ = model.policy.evaluate_actions(samples.observations, samples.actions)
    return values.flatten(), log_probs


def k1(model: Any) -> float:
    return (flattened(model.rollout_buffer, STEPS).log_probs - now(model)[1]).mean().item()


def k3(model: Any) -> float:
    log_ratio = now(model)[1] - flattened(model.rollout_buffer, STEPS).log_probs
    return (log_ratio.exp() - 1 - log_ratio).mean().item()


def trained(model: Any, seed: int = 0) -> Any:
    np.random.seed(seed)
    th.manual_seed(seed)
    model.train()
    return model


def logged(model: Any, name: str) -> Any:
    return model.logger.name_to_value[f"train/{name}"]


def steps(model: Any, optimizer: str = "optimizer") -> int:
    """Gradient steps that Adam has taken."""
    states = getattr(model.policy, optimizer).state_dict()["state"].values()
    return int(max((state["step"] for state in states), default=0))


# Equal to SB3


class Doubling(ActorCriticPolicy):
    """A user's, which doubles what it says of values."""

    def evaluate_actions(self, *args: Any) -> Any:
        values, *others = super().evaluate_actions(*args)
        return 2 * values, *others


CASES: dict[str, dict[str, Any]] = {
    **{name: {"variant": name} for name, variant in VARIANTS.items() if "ppox" in variant.rows and variant.sb3},
    "matrix": {"actions": spaces.Box(-1, 2, (2, 2), np.float64)},
    "gsde narrow": {"use_sde": True, "policy_kwargs": {"full_std": False}},
    "gsde squashed": {"use_sde": True, "policy_kwargs": {"squash_output": True}, "ent_coef": 0.1},
    "unequal": {"policy_kwargs": {"net_arch": {"pi": [5], "vf": [7, 6, 5]}, "activation_fn": nn.ReLU}},
    "images apart": {"variant": "images", "policy_kwargs": {"share_features_extractor": False}},
    "a policy of the user": {"policy": Doubling},
    "clip_range_vf": {"clip_range_vf": 0.2},
    "falling clip ranges": {"clip_range": lambda progress: 0.3 * progress, "clip_range_vf": lambda progress: 0.5 * progress},
    "target_kl": {"target_kl": 0.05, "n_epochs": 10},
    "clipped gradient": {"max_grad_norm": 0.01},
    "coefficients": {"ent_coef": 0.3, "vf_coef": 2.0},
    "entropy of choices": {**DISCRETE, "ent_coef": 0.3},
    "entropy of several choices": {**SEVERAL, "ent_coef": 0.3},
    "entropy of coins": {**COINS, "ent_coef": 0.3},
    "entropy of gsde": {"use_sde": True, "ent_coef": 0.3},
    "raw advantages": {"normalize_advantage": False},
    "a last minibatch of one": {"batch_size": 23},
    "one batch": {"batch_size": 64},
    "RMSprop": {"policy_kwargs": {"optimizer_class": th.optim.RMSprop}},
}
ORDINARY = ("looks at values", "counts")
"""Variants that cannot be recorded."""


@in_double
@pytest.mark.parametrize("case", CASES)
@either_engine
def test_equals_ppo_with_extras_off(case: str, engine: bool) -> None:
    kwargs = {"learning_rate": lambda progress: 3e-3 * progress, **CASES[case]}
    if "image" in case:
        kwargs["n_epochs"] = 1
    theirs, ours = make(PPO, **copy.deepcopy(kwargs)), make(PPOX, engine=engine, **kwargs)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=0)  # same seed, same initial weights
    for update in range(2):
        for model in (theirs, ours):
            fill(model, seed=update)
            model._current_progress_remaining = 1 - update / 3
            trained(model, update)
        th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-10)
        moments = [model.policy.optimizer.state_dict()["state"] for model in (ours, theirs)]
        th.testing.assert_close(*moments, rtol=0, atol=1e-10)
        assert ours._n_updates == theirs._n_updates
        for name in theirs.logger.name_to_value.keys() - {"train/loss"}:  # of which SB3 logs the last
            own, other = (model.logger.name_to_value[name] for model in (ours, theirs))
            assert own == pytest.approx(other, rel=1e-6, abs=1e-9), name
    if "target_kl" in kwargs:
        assert 1 < ours._n_updates < 20  # it has stopped early, and not at once
    if engine:
        report = {name: state for name, state in ours.engine_report().items() if name != "act"}
        assert ({*report.values()} == {"replayed"}) == (case not in ORDINARY), report


@either_engine
@pytest.mark.parametrize("kwargs", [{}, {"use_sde": True}], ids=["gaussian", "gSDE"])
def test_learns_the_same_as_ppo_from_the_same_seed(engine: bool, kwargs: dict[str, Any]) -> None:
    small = {"env": "Pendulum-v1", "n_steps": 64, "batch_size": 64, "n_epochs": 3, "learning_rate": 3e-4, **kwargs}
    theirs, ours = (small_model(cls, **small, **own).learn(192) for cls, own in ((PPO, {}), (PPOX, {"engine": engine})))
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-5 if engine else 1e-6)


# Equations 7 and 8


BETA = 20.0


def by_hand(policy: Any, old: Any, samples: Any, surrogate: str) -> tuple[th.Tensor, th.Tensor]:
    """The loss, and mean KL(old || policy) by PyTorch's own."""
    values, log_probs, entropy = policy.evaluate_actions(samples.observations, samples.actions)
    new = policy.get_distribution(samples.observations).distribution
    pairs = zip(old, new, strict=True) if isinstance(old, list) else ((old, new),)
    divergences = [th.distributions.kl_divergence(p, q) for p, q in pairs]
    kl = sum(part if part.dim() == 1 else part.sum(dim=1) for part in divergences).mean()
    advantages = (samples.advantages - samples.advantages.mean()) / (samples.advantages.std() + 1e-8)
    ratios = (log_probs - samples.log_probs).exp()
    if surrogate == "clip":
        pairs = zip(ratios, advantages, strict=True)
        objective = sum(min(r * a, min(max(r, 0.9), 1.1) * a) for r, a in pairs) / ROWS
    else:
        objective = (ratios * advantages).mean() - BETA * kl
    return -objective - 0.1 * entropy.mean() + 0.3 * ((values.flatten() - samples.returns) ** 2).mean(), kl


@th.no_grad()
def move(policy: Any, direction: Any, h: float) -> Any:
    """theta <- theta + h direction"""
    th._foreach_add_([*policy.parameters()], [*direction], alpha=h)
    return policy


@in_double
@pytest.mark.parametrize("surrogate", ["clip", "penalty"])
@pytest.mark.parametrize("case", ["mlp", "discrete", "several choices", "coins", "gsde", "gsde narrow"])
@either_engine
def test_equations_by_hand(case: str, surrogate: str, engine: bool) -> None:
    """At the old policy and one step away from it: the loss's derivative by differences is that by which the policy moves."""
    own = {"kl_coef": BETA} if surrogate == "penalty" else {"clip_range": 0.1}
    given = {**CASES[case], **sgd(**CASES[case].get("policy_kwargs", {})), "ent_coef": 0.1, "vf_coef": 0.3}
    models = [fill(make(engine=engine, surrogate=surrogate, n_epochs=n, **own, **given)) for n in (1, 2)]
    samples, (reference, before) = (
        flattened(models[0].rollout_buffer, STEPS),
        (make(**given).policy.double() for _ in range(2)),
    )
    with th.no_grad():
        old = before.get_distribution(samples.observations).distribution
    generator, divergences = th.Generator().manual_seed(0), []
    for model in models:
        loss, kl = by_hand(reference, old, samples, surrogate)
        parameters = [*reference.parameters()]
        gradients = th.autograd.grad(loss, parameters)
        if not model.use_sde:  # whose standard deviation has a gradient that SB3 stops at the features
            direction = [th.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
            slope = sum((gradient * part).sum() for gradient, part in zip(gradients, direction, strict=True))
            ends = [by_hand(move(reference, direction, h), old, samples, surrogate)[0] for h in (1e-6, -2e-6)]
            th.testing.assert_close((ends[0] - ends[1]) / 2e-6, slope, rtol=1e-6, atol=1e-8)
            move(reference, direction, 1e-6)
        move(reference, gradients, -0.1)
        divergences.append(kl.item())
        trained(model)
        th.testing.assert_close(flat(model.policy), flat(reference), rtol=0, atol=1e-10)
    assert divergences[0] == 0 and divergences[1] > 1e-6
    if surrogate == "penalty":
        assert logged(models[1], "kl") == pytest.approx(by_hand(reference, old, samples, surrogate)[1].item(), rel=1e-6)
    else:
        assert 0 < logged(models[0], "clip_fraction") < 1


# Value clipping


@in_double
@either_engine
@pytest.mark.parametrize("mode", ["clipped", "max"])
def test_an_overshot_value_is_pulled_back_by_max_alone(mode: str, engine: bool) -> None:
    """V is beyond R, further from V_old than it may be: SB3's loss has no gradient there."""
    kwargs = sgd() | {"n_epochs": 1, "vf_coef": 1.0, "normalize_advantage": False}
    model = fill(make(clip_range_vf=0.1, clip_range_vf_mode=mode, engine=engine, **kwargs), off=0)
    buffer, values = model.rollout_buffer, model.rollout_buffer.values
    buffer.values, buffer.returns, buffer.advantages = values - 1, values - 0.5, np.zeros((STEPS, ENVS))
    before, expected = [p.clone() for p in value_parameters(model.policy)], now(model)[0]
    trained(model)
    moved = [not th.equal(new, old) for new, old in zip(value_parameters(model.policy), before, strict=True)]
    assert all(moved) if mode == "max" else not any(moved)
    if mode == "max":
        assert (now(model)[0] < expected).all()
    assert logged(model, "value_loss") == pytest.approx(0.25 if mode == "max" else 0.16)


# Early stops


def half_the_square_of_the_move(model: Any) -> float:
    return 0.5 * (now(model)[0] - flattened(model.rollout_buffer, STEPS).values).square().mean().item()


@in_double
@either_engine
@pytest.mark.parametrize(
    ("epochs", "stop", "measure", "kwargs"),
    [
        ("n_epochs", "kl_stop", k1, {"kl_stop_estimator": "k1"}),
        ("n_epochs", "kl_stop", k3, {"kl_stop_estimator": "k3"}),
        ("policy_epochs", "kl_stop", k3, {"separate_phases": True}),
        ("value_epochs", "value_stop_mse", half_the_square_of_the_move, {"separate_phases": True}),
    ],
    ids=["k1", "k3", "k3 of a phase", "move of the value"],
)
def test_stops_after_the_epoch_that_went_too_far(
    epochs: str, stop: str, measure: Callable[[Any], float], kwargs: dict[str, Any], engine: bool
) -> None:
    """What is measured is that of the whole rollout."""

    def after(n: int, **limit: float) -> Any:
        given = {"n_epochs": 1, "learning_rate": 5e-3, "engine": engine, **kwargs, epochs: n, **limit}
        return trained(fill(make(**given), off=0))

    first, second, third = (measure(after(n)) for n in (1, 2, 3))
    assert 0 < first < second < third
    for limit, done in ((0.0, 1), (0.999 * second, 2), (1.001 * second, 3)):
        assert logged(after(5, **{stop: limit}), epochs.removeprefix("n_")) == done


@in_double
@either_engine
@pytest.mark.parametrize(("limit", "batch_size", "done"), [(0.0, 8, (1, 1)), (1.0, 8, (15, 5)), (0.0, ROWS, (1, 2))], ids=str)
def test_kl_stop_on_a_minibatch_comes_before_its_step(
    limit: float, batch_size: int, done: tuple[int, int], engine: bool
) -> None:
    """The first is at the old policy, where the divergence is 0; what a step leads to is seen by the next minibatch."""
    kwargs = {"kl_stop": limit, "kl_stop_every": "minibatch", "n_epochs": 5, "batch_size": batch_size}
    model = trained(fill(make(engine=engine, **kwargs), off=0))
    assert (steps(model), logged(model, "epochs")) == done


@in_double
@pytest.mark.parametrize("every", ["minibatch", "epoch"])
@pytest.mark.parametrize(("estimator", "done"), [("k1", 3), ("k3", 1)])
def test_the_signed_estimate_does_not_stop_where_it_is_negative(every: str, estimator: str, done: int) -> None:
    model = fill(make(kl_stop=0.05, kl_stop_estimator=estimator, kl_stop_every=every, learning_rate=1e-5), off=0)
    model.rollout_buffer.log_probs -= 1  # log r = 1: k1 = -1, k3 = 0.7
    assert logged(trained(model), "epochs") == done


@in_double
@either_engine
@pytest.mark.parametrize("every", ["minibatch", "epoch"])
@pytest.mark.parametrize("scope", ["both", "policy"])
def test_what_a_stop_of_the_policy_ends(scope: str, every: str, engine: bool) -> None:
    kwargs = {"separate_phases": True, "kl_stop": 0.0, "kl_stop_scope": scope, "kl_stop_every": every, "engine": engine}
    model = trained(fill(make(policy_epochs=4, value_epochs=2, **kwargs)))
    assert logged(model, "policy_epochs") == 1
    assert steps(model, "value_optimizer") == (0 if scope == "both" else 6)
    assert model.logger.name_to_value.get("train/value_epochs") == (None if scope == "both" else 2)


@pytest.mark.filterwarnings("ignore:rollout='episodes'")
@either_engine
def test_a_stop_that_never_comes_changes_nothing(engine: bool) -> None:
    """The last minibatch of a rollout of episodes has a size of its own, which is not recorded, and 8 is."""
    kwargs = {"rollout": "episodes", "rollout_episodes": 3, "n_steps": 40, "engine": engine}
    models = [make(**kwargs, target_kl=target_kl).learn(128) for target_kl in (None, 10.0)]
    assert models[0]._rollout_length * ENVS % 8
    th.testing.assert_close(flat(models[1].policy), flat(models[0].policy), rtol=0, atol=1e-6)


# Separate phases


@in_double
@either_engine
def test_a_phase_is_the_joint_update_without_the_other_network(engine: bool) -> None:
    """Adam scales every parameter by itself, so without a gradient bound the networks do not feel each other."""
    free = {"max_grad_norm": None, "batch_size": ROWS, "ent_coef": 0.1, "engine": engine}
    apart = trained(fill(make(separate_phases=True, policy_epochs=2, value_epochs=4, vf_coef=123.0, **free)))
    joint = {"policy": make(n_epochs=2, vf_coef=0.0, **free), "value": make(n_epochs=4, vf_coef=1.0, **free)}
    for name, own in OWN_PARAMETERS.items():
        expected = own(trained(fill(joint[name])).policy)
        th.testing.assert_close(own(apart.policy), expected, rtol=0, atol=1e-10)


@in_double
@either_engine
@pytest.mark.parametrize("still", OWN_PARAMETERS)
@pytest.mark.parametrize("case", ["mlp", "gsde", "coins", "extractors apart", "images apart", "a policy of the user"])
def test_each_phase_trains_its_network_and_no_other(case: str, still: str, engine: bool) -> None:
    kwargs = {**CASES[case], "n_epochs": 1, f"{still}_learning_rate": 0.0}
    model = fill(make(separate_phases=True, engine=engine, **kwargs))
    optimizers = {"policy": model.policy.optimizer, "value": model.policy.value_optimizer}
    ids = [id(p) for optimizer in optimizers.values() for p in optimizer.param_groups[0]["params"]]
    assert sorted(ids) == sorted(map(id, model.policy.parameters()))
    before = {name: [p.clone() for p in own(model.policy)] for name, own in OWN_PARAMETERS.items()}
    trained(model)
    for name, own in OWN_PARAMETERS.items():
        same = [th.equal(new, old) for new, old in zip(own(model.policy), before[name], strict=True)]
        assert all(same) if name == still else not any(same)


def test_a_shared_features_extractor_is_refused() -> None:
    for variant in ("images", "shared extractor"):
        with pytest.raises(ValueError, match=r"separate_phases=True needs .*share_features_extractor=False"):
            make(variant=variant, separate_phases=True)


@in_double
@either_engine
def test_rates_and_gradient_bounds_of_the_phases(engine: bool) -> None:
    bounds = {"policy": 1e-3, "value": 1e-2}
    kwargs = {**sgd(), "n_epochs": 1, "max_grad_norm": bounds, "engine": engine}
    model = fill(make(separate_phases=True, policy_learning_rate="lin_4.0", value_learning_rate=2.0, **kwargs))
    before = {name: th.cat([p.flatten() for p in own(model.policy)]) for name, own in OWN_PARAMETERS.items()}
    model._current_progress_remaining = 0.25
    trained(model)
    for name, rate in (("policy", 1.0), ("value", 2.0)):
        moved = th.cat([p.flatten() for p in OWN_PARAMETERS[name](model.policy)]) - before[name]
        assert moved.norm().item() == pytest.approx(rate * bounds[name], rel=2e-2)
        assert logged(model, f"{name}_learning_rate") == rate
        assert logged(model, f"{name}_grad_norm") > bounds[name]


class Watched(PPOX):
    """Keeps the batches of its updates."""

    def _run(self, function: Any, batch: Any, phase: str) -> Any:
        self.batches[phase].append(batch)
        return super()._run(function, batch, phase)

    @cached_property
    def batches(self) -> dict[str, list[Any]]:
        return defaultdict(list)


@in_double
def test_sample_ratios_take_a_share_of_the_rollout_without_replacement() -> None:
    """int(0.4 * 24) = 9 samples for each step of the policy, the value's phase as ever."""
    model = trained(fill(make(Watched, separate_phases=True, policy_sample_ratio=0.4, n_epochs=2)))
    everything = model._samples().advantages.tolist()
    batches = {phase: [batch.advantages.tolist() for batch in model.batches[phase]] for phase in ("policy", "value")}
    assert [len(set(batch)) for batch in batches["policy"]] == [len(batch) for batch in batches["policy"]] == [9, 9]
    assert set(batches["policy"][0]) != set(batches["policy"][1])  # drawn anew
    assert [len(batch) for batch in batches["value"]] == [8, 8, 8, 8, 8, 8]
    assert sorted(number for batch in batches["value"][:3] for number in batch) == sorted(everything)
    assert (steps(model), steps(model, "value_optimizer")) == (2, 6)
    assert steps(trained(fill(make(separate_phases=True, value_sample_ratio=1e-6))), "value_optimizer") == 3  # of one sample


# Advantages


@in_double
@either_engine
def test_advantages_normalised_over_the_buffer_and_returns_not(engine: bool) -> None:
    model = fill(make(normalize_advantage_over="buffer", engine=engine))
    by_hand = fill(make(normalize_advantage=False, engine=engine))
    per_minibatch = fill(make(engine=engine))
    advantages = by_hand.rollout_buffer.advantages
    by_hand.rollout_buffer.advantages = (advantages - advantages.mean()) / (advantages.std(ddof=1) + 1e-8)
    policies = [flat(trained(candidate).policy) for candidate in (model, by_hand, per_minibatch)]
    th.testing.assert_close(policies[0], policies[1], rtol=0, atol=1e-10)
    assert not th.allclose(policies[0], policies[2], rtol=0, atol=1e-6)


# Penalty


@in_double
def test_the_penalty_does_not_clip() -> None:
    """Every ratio is far outside of any clip range, and the gradient is there."""
    model = fill(make(surrogate="penalty", **sgd(), n_epochs=1, vf_coef=0.0), off=3)
    assert ((now(model)[1] - flattened(model.rollout_buffer, STEPS).log_probs).abs() > 0.3).float().mean() > 0.5
    before = flat(model.policy)
    assert not th.equal(flat(trained(model).policy), before)


@in_double
@either_engine
@pytest.mark.parametrize(("target", "factor"), [(1e-9, 2.0), (1e3, 0.5)], ids=["too far", "not far enough"])
def test_the_coefficient_adapts_once_after_all_updates_and_is_carried_over(target: float, factor: float, engine: bool) -> None:
    model = fill(make(Watched, surrogate="penalty", kl_target=target, kl_coef=3.0, engine=engine))
    for update in range(3):
        model.train()
        assert logged(model, "kl_coef") == 3.0 * factor**update  # the one that was used
        assert model._kl_coef == 3.0 * factor ** (update + 1)
    used = [batch.kl_coef.item() for batch in model.batches["both"]]
    assert used == [3.0] * 9 + [3.0 * factor] * 9 + [3.0 * factor**2] * 9


@in_double
def test_the_coefficient_stays_where_the_divergence_is_right() -> None:
    def with_target(target: float) -> Any:
        return trained(fill(make(surrogate="penalty", kl_target=target)))

    kl = logged(with_target(1.0), "kl")
    targets = (kl, kl / 1.49, kl / 1.51, kl * 1.49, kl * 1.51)
    assert [with_target(target)._kl_coef for target in targets] == [1.0, 1.0, 2.0, 1.0, 0.5]


def test_defaults_of_the_penalty() -> None:
    model = make(surrogate="penalty")
    assert (model.kl_coef, model.kl_target, model._kl_coef) == (None, None, 1.0)
    kl = logged(model.learn(ROWS, log_interval=None), "kl")
    assert model._kl_coef == (0.5 if kl < 0.01 / 1.5 else 2.0 if kl > 0.015 else 1.0)


def test_the_coefficient_is_saved_and_starts_anew_where_it_is_given(tmp_path: Any) -> None:
    model = make(surrogate="penalty", kl_coef=3.0, kl_target=1e-9).learn(ROWS)
    model.save(tmp_path / "model")
    assert PPOX.load(tmp_path / "model")._kl_coef == model._kl_coef == 6.0
    assert PPOX.load(tmp_path / "model", kl_coef=5.0)._kl_coef == 5.0


class Divergences(BaseCallback):
    """What the updates have logged."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.seen.append(self.logger.name_to_value.get("train/kl", 0.0))


def test_the_penalty_keeps_the_divergence_near_its_target() -> None:
    """With a rate that would go too far, the median of the last iterations is within a factor of 2."""
    sizes = {"n_steps": 128, "batch_size": 64, "n_epochs": 10, "learning_rate": 1e-2, "gamma": 0.9}
    policy_kwargs = {"net_arch": [8, 8], "optimizer_kwargs": {}}
    model = small_model(PPOX, "penalty", env="Pendulum-v1", kl_target=0.01, policy_kwargs=policy_kwargs, **sizes)
    divergences = Divergences()
    model.learn(128 * 25, divergences, log_interval=None)
    assert max(divergences.seen[:11]) > 0.02
    assert 0.005 <= np.median(divergences.seen[11:]) <= 0.02


# Files


def adam(model: Any) -> dict[str, dict[str, th.Tensor]]:
    """The state of each parameter by its name."""
    names = {id(parameter): name for name, parameter in model.policy.named_parameters()}
    optimizers = [model.policy.optimizer, getattr(model.policy, "value_optimizer", None)]
    return {names[id(p)]: state for optimizer in optimizers if optimizer is not None for p, state in optimizer.state.items()}


@pytest.mark.parametrize("source", [PPO, PPOX], ids=["SB3's zip", "our joint zip"])
@pytest.mark.parametrize("variant", ["mlp", "gsde", "discrete"])
@pytest.mark.parametrize("separate", [False, True], ids=["joint", "separate"])
def test_zips_of_one_optimizer_load(source: Any, variant: str, separate: bool, tmp_path: Any) -> None:
    model = make(source, variant).learn(ROWS)
    model.save(tmp_path / "zip")
    loaded = PPOX.load(tmp_path / "zip", env=model.env, separate_phases=separate)
    assert hasattr(loaded.policy, "value_optimizer") == separate
    assert th.equal(flat(loaded.policy), flat(model.policy))
    assert adam(model).keys() == dict(model.policy.named_parameters()).keys()
    th.testing.assert_close(adam(loaded), adam(model), rtol=0, atol=0)
    loaded.learn(ROWS, reset_num_timesteps=False)
    assert {int(state["step"]) for state in adam(loaded).values()} == {18}


def test_zips_of_separate_phases_load_and_cannot_be_joined(tmp_path: Any) -> None:
    model = make(separate_phases=True).learn(ROWS)
    model.save(tmp_path / "zip")
    th.testing.assert_close(adam(PPOX.load(tmp_path / "zip")), adam(model), rtol=0, atol=0)
    with pytest.raises(ValueError, match="separate_phases must stay True"):
        PPOX.load(tmp_path / "zip", separate_phases=False)


def test_our_zip_of_one_optimizer_goes_back_to_sb3() -> None:
    model, fresh = make().learn(ROWS), make(PPO)
    fresh.set_parameters(model.get_parameters())
    observations = np.ones((3, 4), np.float32)
    expected = model.predict(observations, deterministic=True)[0]
    np.testing.assert_allclose(fresh.predict(observations, deterministic=True)[0], expected, atol=1e-6)


# Log


COMMON = {"learning_rate", "n_updates", "approx_kl", "entropy_loss", "policy_gradient_loss", "value_loss", "std", "loss"}
COMMON |= {"explained_variance", "policy_grad_norm"}
VALUE_CLIP = {"clip_range_vf", "value_clip_fraction"}
CLIP, PHASES = {"clip_fraction", "clip_range"}, {"policy_epochs", "value_epochs", "value_grad_norm"}


@pytest.mark.parametrize(
    ("kwargs", "own"),
    [
        ({}, CLIP | {"epochs"}),
        ({"clip_range_vf": 0.2}, CLIP | VALUE_CLIP | {"epochs"}),
        ({"surrogate": "penalty", "clip_range_vf": 0.2}, VALUE_CLIP | {"epochs", "kl", "kl_coef"}),
        ({"target_kl": 0.1}, CLIP | {"epochs"}),
        ({"separate_phases": True}, CLIP | PHASES),
        ({"separate_phases": True, "value_learning_rate": 1e-3}, CLIP | PHASES | {"value_learning_rate"}),
    ],
    ids=["clip", "clipped values", "penalty", "early stop", "phases", "rates"],
)
def test_logged_quantities(kwargs: dict[str, Any], own: set[str]) -> None:
    """The divergence is that of the policy's last epoch."""
    model = make(**kwargs).learn(ROWS, log_interval=None)
    names = {name.removeprefix("train/") for name in model.logger.name_to_value if name.startswith("train/")}
    assert names == COMMON | own
    assert logged(model, "approx_kl") > 1e-7
    at_the_old_policy = make(n_epochs=1, batch_size=ROWS, **kwargs).learn(ROWS, log_interval=None)
    assert logged(at_the_old_policy, "approx_kl") == pytest.approx(0, abs=1e-6)
    for name in ("clip_fraction", "value_clip_fraction"):
        assert at_the_old_policy.logger.name_to_value.get(f"train/{name}", 0) == 0
