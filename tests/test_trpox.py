"""TRPOX: equal to sb3-contrib's TRPO with its extras off, dense algebra, the line search's conditions, its own arguments."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from batches import flat
from models import environment, small_model
from rollout_data import InDouble, rollout, trained
from sb3_contrib import TRPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn
from torch.distributions import Normal, kl_divergence

import sb3_ac_ext.trpox
from sb3_ac_ext import TRPOX
from sb3_ac_ext.functional.natural_gradient import NaturalStep, flatten, natural_step
from sb3_ac_ext.networks.actor_critic import policy_parameters
from sb3_ac_ext.validation import NonFiniteError

STEPS = 32
either_engine = pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
in_double = pytest.mark.usefixtures("double_precision")


class Undivided(nn.Module):
    """Layers for policy and value that are not named as SB3's."""

    latent_dim_pi, latent_dim_vf = 5, 6

    def __init__(self, features_dim: int) -> None:
        super().__init__()
        self.common, self.actor, self.critic = nn.Linear(features_dim, 7), nn.Linear(7, 5), nn.Linear(7, 6)

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        return self.actor(self.common(features.to(self.common.weight)).tanh()).tanh()

    def forward_critic(self, features: th.Tensor) -> th.Tensor:
        return self.critic(self.common(features.to(self.common.weight)).tanh()).tanh()


class OwnPolicy(ActorCriticPolicy):
    """A user's."""

    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = Undivided(self.features_dim)


def make(cls: type = TRPOX, variant: str = "mlp", **kwargs: Any) -> Any:
    return small_model(cls, variant, **{"n_steps": STEPS, "batch_size": 8, "n_critic_updates": 2, **kwargs})


def logged(model: Any) -> dict[str, float]:
    return {name.removeprefix("train/"): value for name, value in model.logger.name_to_value.items()}


def policy_vector(model: Any) -> th.Tensor:
    return flatten(policy_parameters(model.policy)).detach()


def value_vector(model: Any) -> th.Tensor:
    return flatten(model.policy.optimizer.param_groups[0]["params"]).detach().clone()


def moments(model: Any) -> dict[str, dict[str, th.Tensor]]:
    """The optimizer's state by the parameters' names."""
    names = {id(parameter): name for name, parameter in model.policy.named_parameters()}
    return {names[id(parameter)]: state for parameter, state in model.policy.optimizer.state.items()}


@pytest.fixture
def zero_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """sb3-contrib's conjugate gradients start at random numbers of size 1e-4; here at 0."""
    monkeypatch.setattr(th, "randn_like", th.zeros_like)


# sb3-contrib's TRPO

CASES: dict[str, dict[str, Any]] = {
    "box": {},
    "discrete": {"variant": "discrete"},
    "unequal": {
        "variant": "several choices",
        "policy_kwargs": {"net_arch": {"pi": [8], "vf": [9, 4]}, "activation_fn": nn.ReLU},
    },
    "coins": {"variant": "coins", "sub_sampling_factor": 3, "cg_max_steps": 4},
    "gSDE": {"variant": "gsde", "normalize_advantage": False},
    "gSDE narrow": {"variant": "gsde", "policy_kwargs": {"full_std": False}, "target_kl": 0.2},
    "backtracking": {"variant": "gsde", "target_kl": 1.0, "line_search_max_iter": 3, "cg_damping": 0.01},
    "shared extractor": {"variant": "shared extractor"},
    "extractors apart": {"variant": "extractors apart"},
    "images": {"variant": "images"},
    "a user's policy": {"policy": OwnPolicy},
}


@pytest.mark.usefixtures("double_precision", "zero_start")
@pytest.mark.parametrize("kwargs", CASES.values(), ids=CASES)
@either_engine
def test_equals_trpo_with_extras_off(kwargs: dict[str, Any], engine: bool) -> None:
    # with more iterations conjugate gradients turn a difference of 1e-16 into one of 1e-7
    kwargs = {"learning_rate": lambda progress: 1e-3 * progress, "cg_max_steps": 6, **kwargs}
    theirs, ours = make(TRPO, rollout_buffer_class=InDouble, **kwargs), make(engine=engine, **kwargs)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=0)  # same seed, same initial weights
    for model in (theirs, ours):
        model.policy.double()
    outcomes = set()
    for update in range(4):
        arrays = rollout(theirs, seed=update)
        for model in (theirs, ours):
            model._current_progress_remaining = 1 - update / 10
            trained(model, arrays, seed=update)
        th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-10)
        own, state = moments(ours), moments(theirs)
        assert own.keys() == state.keys()
        th.testing.assert_close(own, state, rtol=0, atol=1e-10)
        for name, value in logged(theirs).items():
            assert logged(ours)[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name
        outcomes.add((logged(ours)["is_line_search_success"], logged(ours)["step_scale"]))
    if engine:
        assert {ours.engine_report()[name] for name in ("natural_step", "try", "update_value")} == {"replayed"}
    if "line_search_max_iter" in kwargs:  # accepted later, and not at all
        assert len(outcomes) > 1, outcomes


@in_double
@pytest.mark.parametrize("variant", ["mlp", "discrete"])
def test_direction_is_that_of_trpo_with_its_random_start(variant: str) -> None:
    models = make(TRPO, variant, cg_max_steps=200), make(TRPOX, variant, cg_max_steps=200, engine=False)
    for model in models:
        model.policy.double()
    arrays, start = rollout(models[0]), flat(models[0].policy)
    steps = [flat(trained(model, arrays).policy) - start for model in models]
    assert (steps[0] - steps[1]).norm() < 1e-4 * steps[0].norm()


@pytest.mark.usefixtures("zero_start")
@either_engine
def test_learns_the_same_as_trpo_from_the_same_seed(engine: bool) -> None:
    theirs = make(TRPO, env="Pendulum-v1").learn(3 * STEPS)
    ours = make(env="Pendulum-v1", engine=engine).learn(3 * STEPS)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("zero_start")
@pytest.mark.parametrize("policy", ["MlpPolicy", OwnPolicy], ids=["SB3's", "a user's"])
def test_zip_of_trpo_loads_and_trains_on(policy: Any, tmp_path: Path) -> None:
    theirs = make(TRPO, policy=policy).learn(STEPS)
    theirs.save(tmp_path / "trpo")
    ours = TRPOX.load(tmp_path / "trpo", env=environment(TRPOX))
    assert moments(ours).keys() == moments(theirs).keys() != set()
    th.testing.assert_close(moments(ours), moments(theirs), rtol=0, atol=0)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=0)
    ours.set_logger(Logger(None, []))
    arrays = rollout(theirs, seed=1)
    for model in (theirs, ours):
        trained(model, arrays)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-5)


# The step


def in_float64(variant: str = "mlp", **kwargs: Any) -> Any:
    """With parameters that are nowhere special."""
    model = make(variant=variant, policy_kwargs={"net_arch": [4, 3]}, **kwargs)
    model.policy.double()
    generator = th.Generator().manual_seed(3)
    for parameter in model.policy.parameters():
        parameter.data.add_(0.4 * th.randn(parameter.shape, generator=generator, dtype=th.float64))
    return model


def distributions(model: Any, observations: np.ndarray) -> list[Any]:
    """PyTorch's."""
    own = model.policy.get_distribution(th.as_tensor(observations)).distribution
    return own if isinstance(own, list) else [own]


def divergences(model: Any, observations: np.ndarray, old: list[Any]) -> list[th.Tensor]:
    """``()`` mean KL(old || new) and KL(new || old) by PyTorch, summed over dimensions."""
    pairs = [*zip(old, distributions(model, observations), strict=True)]
    return [sum(kl_divergence(*p[::d]).reshape(len(observations), -1).sum(1) for p in pairs).mean() for d in (1, -1)]


def old_distributions(model: Any, observations: np.ndarray) -> list[Any]:
    """Copies that stay as they are when the policy moves."""
    with th.no_grad():
        parts = distributions(model, observations)
        if isinstance(parts[0], Normal):
            return [Normal(parts[0].loc.clone(), parts[0].scale.clone())]
        return [type(part)(logits=part.logits.clone()) for part in parts]


def dense_fisher(model: Any, observations: np.ndarray) -> th.Tensor:
    """Second derivatives of the mean KL divergence at the old policy."""
    parameters = policy_parameters(model.policy)
    kl = divergences(model, observations, old_distributions(model, observations))[0]
    gradient = flatten(th.autograd.grad(kl, parameters, create_graph=True))
    rows = [th.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in gradient]
    return th.stack([*map(flatten, rows)])


def step_by_hand(model: Any, arrays: dict[str, np.ndarray], stride: int = 1, ent_coef: float = 0.0) -> th.Tensor:
    """By the dense Fisher matrix of every ``stride``-th sample of the order in which they are shuffled."""
    np.random.seed(0)
    order = np.random.permutation(STEPS)
    observations, actions, advantages = (arrays[name][order, 0] for name in ("observations", "actions", "advantages"))
    weights = th.as_tensor((advantages - advantages.mean()) / advantages.std(ddof=1))
    _, log_prob, entropy = model.policy.evaluate_actions(th.as_tensor(observations), th.as_tensor(actions))
    objective = (log_prob * weights).mean() + ent_coef * entropy.mean()
    gradient = flatten(th.autograd.grad(objective, policy_parameters(model.policy)))
    weight = 1.0 if model.kl_reduction == "sum" else 1 / 2
    damped = weight * dense_fisher(model, observations[::stride]) + model.cg_damping * th.eye(len(gradient), dtype=th.float64)
    direction = th.linalg.solve(damped, gradient)
    return direction * (2 * model.target_kl / (direction @ damped @ direction)).sqrt()


@in_double
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"fvp_subsample": 3},
        {"kl_reduction": "sum", "kl_direction": "old_new"},
        {"ent_coef": 0.3, "kl_reduction": "sum"},
    ],
    ids=["plain", "subset", "paper", "entropy"],
)
@either_engine
def test_step_is_that_of_dense_algebra(kwargs: dict[str, Any], engine: bool) -> None:
    """Sign, damping, length, subset, entropy: each is needed to get this step, of the first training and of later ones."""
    model = in_float64(engine=engine, cg_max_steps=60, target_kl=1e-3, cg_damping=0.05, **kwargs)
    for seed in range(3):
        arrays = rollout(model, seed)
        expected = step_by_hand(model, arrays, kwargs.get("fvp_subsample", 1), kwargs.get("ent_coef", 0.0))
        start = policy_vector(model)
        trained(model, arrays)
        scale = logged(model)["step_scale"]
        assert scale > 0
        # as exact as conjugate gradients, which stop at a residual of 1e-5
        assert (policy_vector(model) - start - scale * expected).norm() < 1e-3 * (scale * expected).norm()


@in_double
@either_engine
def test_predicted_and_actual_divergence_agree_for_small_steps(engine: bool) -> None:
    small = {"target_kl": 1e-6, "cg_max_steps": 100, "cg_damping": 1e-3}
    model = in_float64(engine=engine, kl_reduction="sum", kl_direction="old_new", **small)
    arrays = rollout(model)
    observations = arrays["observations"][:, 0]
    old, fisher, start = old_distributions(model, observations), dense_fisher(model, observations), policy_vector(model)
    trained(model, arrays)
    step = policy_vector(model) - start
    kl = divergences(model, observations, old)[0].item()
    assert logged(model)["kl_divergence_loss"] == pytest.approx(kl, rel=1e-6)
    assert logged(model)["policy_predicted_kl"] == pytest.approx((0.5 * step @ fisher @ step).item(), rel=1e-4)
    assert logged(model)["policy_predicted_kl"] == pytest.approx(kl, rel=0.05)
    assert kl <= 1e-6


@in_double
@pytest.mark.parametrize("direction", ["old_new", "new_old"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("variant", ["mlp", "discrete", "several choices", "coins"])
def test_which_divergence_bounds_the_step(direction: str, reduction: str, variant: str) -> None:
    """The mean is over the dimensions of Box and MultiBinary actions, as in sb3-contrib."""
    model = in_float64(variant, target_kl=0.3, kl_direction=direction, kl_reduction=reduction, cg_damping=0.01)
    arrays = rollout(model)
    observations = arrays["observations"][:, 0]
    old = old_distributions(model, observations)
    trained(model, arrays)
    assert logged(model)["is_line_search_success"]
    pair = [kl.item() for kl in divergences(model, observations, old)]
    dimensions = {"mlp": 2, "coins": 3}.get(variant, 1) if reduction == "mean" else 1
    expected = pair[direction == "new_old"] / dimensions
    assert logged(model)["kl_divergence_loss"] == pytest.approx(expected, rel=1e-6)
    assert expected <= 0.3
    assert pair[0] != pytest.approx(pair[1], rel=1e-3)


@in_double
def test_entropy_bonus_makes_the_policy_more_random() -> None:
    """It alone, as the advantages are 0: the objective is the entropy, whose gain is reported."""
    model = in_float64("discrete", normalize_advantage=False, ent_coef=0.5)
    arrays = {**rollout(model), "advantages": np.zeros((STEPS, 1))}
    (before,) = old_distributions(model, arrays["observations"][:, 0])
    trained(model, arrays)
    (after,) = old_distributions(model, arrays["observations"][:, 0])
    assert after.entropy().mean() > before.entropy().mean()
    assert logged(model)["policy_objective"] == pytest.approx(0.5 * after.entropy().mean().item(), rel=1e-6)
    assert logged(model)["entropy_loss"] == pytest.approx(-before.entropy().mean().item(), rel=1e-6)


@either_engine
def test_arguments_act_when_they_change(engine: bool) -> None:
    """Those of the recorded functions: a model that is told later is one that was made so."""
    changes = {
        "target_kl": 0.05,
        "cg_damping": 0.5,
        "cg_max_steps": 2,
        "fvp_subsample": 2,
        "kl_direction": "old_new",
        "kl_reduction": "sum",
        "ent_coef": 0.2,
        "normalize_advantage": False,
        "accept_ratio": 0.9,
        "sub_sampling_factor": 2,
        "batch_size": 16,
        "n_critic_updates": 1,
    }
    live = make(engine=engine)
    for seed in range(3):
        trained(live, seed=seed)
    made, start = {}, live.policy.state_dict()
    for name, value in changes.items():
        setattr(live, name, value)
        made[name] = value
        other = make(engine=False, **made)
        live.policy.load_state_dict(start)
        other.policy.load_state_dict(start)
        for model in (live, other):
            model.policy.optimizer.state.clear()
            trained(model, rollout(other), seed=1)
        th.testing.assert_close(flat(live.policy), flat(other.policy), rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("frozen", [["log_std"], ["mlp_extractor.policy_net.0.weight"]], ids=["log_std", "a layer"])
@either_engine
def test_parameters_may_be_frozen_and_freed(frozen: list[str], engine: bool) -> None:
    model = make(engine=engine)
    named = dict(model.policy.named_parameters())
    for names in ([], [], [], frozen, frozen, [], [*named], []):
        for name, parameter in named.items():
            parameter.requires_grad_(name not in names)
        before = {name: parameter.clone() for name, parameter in named.items()}
        trained(model)
        for name, parameter in named.items():
            assert th.equal(parameter, before[name]) == (name in names), (name, names)


# The line search


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the natural step was; ``change`` in it replaces it."""
    seen: dict[str, Any] = {}

    def natural(*args: Any, **kwargs: Any) -> NaturalStep:
        result = natural_step(*args, **kwargs)
        seen["step"] = seen["change"](result) if "change" in seen else result
        return seen["step"]

    monkeypatch.setattr(sb3_ac_ext.trpox, "natural_step", natural)
    return seen


def objective(model: Any, arrays: dict[str, np.ndarray]) -> float:
    advantages = arrays["advantages"][:, 0]
    advantages = (advantages - advantages.mean()) / advantages.std(ddof=1)
    _, log_prob, _ = model.policy.evaluate_actions(*(th.as_tensor(arrays[n][:, 0]) for n in ("observations", "actions")))
    return float((np.exp(log_prob.detach().numpy() - arrays["log_probs"][:, 0]) * advantages).mean())


@in_double
@either_engine
def test_accept_ratio(engine: bool, found: dict[str, Any]) -> None:
    """The first step that reaches the share of its expected improvement is taken, not the first with any."""
    kwargs = {"target_kl": 0.02, "kl_reduction": "sum", "line_search_shrinking_factor": 0.5, "engine": engine}
    free = in_float64(**kwargs)
    arrays = rollout(free)
    start = policy_vector(free)
    trained(free, arrays)
    assert logged(free)["step_scale"] == 1
    expected = found["step"].improvement.item()
    share = {}
    for j in (0, 1):
        probe = in_float64(**kwargs)
        nn.utils.vector_to_parameters(start + 0.5**j * found["step"].step, policy_parameters(probe.policy))
        share[j] = objective(probe, arrays) / (0.5**j * expected)
    assert share[0] < share[1] < 1.1
    strict = in_float64(accept_ratio=(share[0] + share[1]) / 2, **kwargs)
    trained(strict, arrays)
    assert logged(strict)["step_scale"] == 0.5
    assert logged(strict)["policy_objective"] == pytest.approx(share[1] * 0.5 * expected, rel=1e-6)
    loose = in_float64(accept_ratio=share[0] * 0.99, **kwargs)
    assert logged(trained(loose, arrays))["step_scale"] == 1


CHANGES: dict[str, Callable[[NaturalStep], NaturalStep]] = {
    "too far": lambda natural: natural._replace(step=1e3 * natural.step),
    "downhill": lambda natural: natural._replace(step=-natural.step),
    "nothing": lambda natural: natural._replace(step=th.zeros_like(natural.step)),
}


@pytest.mark.parametrize("change", CHANGES)
@either_engine
def test_a_step_that_is_not_accepted_leaves_the_policy_as_it_was(change: str, engine: bool, found: dict[str, Any]) -> None:
    """All of it, log_std too, in the memory where it was; the value learns all the same."""
    found["change"] = CHANGES[change]
    model = make(engine=engine, line_search_max_iter=3)
    pointers = [parameter.data_ptr() for parameter in model.policy.parameters()]
    for seed in range(3):
        policy, value = policy_vector(model), value_vector(model)
        trained(model, seed=seed)
        assert th.equal(policy_vector(model), policy)
        assert not th.equal(value_vector(model), value)
        assert [parameter.data_ptr() for parameter in model.policy.parameters()] == pointers
        numbers = logged(model)
        assert numbers["is_line_search_success"] == numbers["step_scale"] == 0
        assert numbers["kl_divergence_loss"] == numbers["policy_predicted_kl"] == 0
        assert numbers["policy_objective"] == pytest.approx(0, abs=1e-6)  # of the policy that stays


def test_line_search_tries_so_many_steps(found: dict[str, Any]) -> None:
    found["change"] = lambda natural: natural._replace(step=8 * natural.step)
    kwargs = {"line_search_shrinking_factor": 0.5, "target_kl": 1e-3}
    few, enough = (logged(trained(make(line_search_max_iter=count, **kwargs))) for count in (2, 6))
    assert few["step_scale"] == 0
    assert enough["step_scale"] in (0.5**3, 0.5**4)
    # of the step that was taken: the divergence is quadratic
    predicted = enough["step_scale"] ** 2 * found["step"].kl.item()
    assert enough["policy_predicted_kl"] == pytest.approx(predicted, rel=1e-6)


@pytest.mark.parametrize("advantage", [0.0, float("nan"), float("inf")])
@either_engine
def test_no_gradient_no_step(advantage: float, engine: bool) -> None:
    model = make(engine=engine, normalize_advantage=False)
    arrays = rollout(model)
    arrays["advantages"][...] = advantage
    policy, value = policy_vector(model), value_vector(model)
    trained(model, arrays)
    assert th.equal(policy_vector(model), policy)
    assert not th.equal(value_vector(model), value)
    assert logged(model)["is_line_search_success"] == 0


@either_engine
def test_a_policy_that_is_not_finite_stops_the_training(engine: bool) -> None:
    model = make(engine=engine)
    arrays = rollout(model)
    model.policy.action_net.bias.data[0] = th.nan
    with pytest.raises(NonFiniteError, match="TRPOX: the parameters of the policy became non-finite"):
        trained(model, arrays)


# Policy and value


@pytest.mark.parametrize("variant", ["mlp", "shared extractor", "extractors apart"])
@either_engine
def test_neither_update_touches_the_other(variant: str, engine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parameter has one owner; a shared features extractor is the policy's."""
    model = make(TRPOX, variant, engine=engine, n_critic_updates=0)
    own, values = policy_parameters(model.policy), model.policy.optimizer.param_groups[0]["params"]
    assert {*map(id, [*own, *values])} == {*map(id, model.policy.parameters())}
    assert len({*map(id, own)}) + len(values) == len([*model.policy.parameters()])
    before = policy_vector(model), value_vector(model)
    trained(model)
    assert not th.equal(policy_vector(model), before[0])
    assert th.equal(value_vector(model), before[1])
    assert "value_loss" not in logged(model)

    model = make(TRPOX, variant, engine=engine)
    monkeypatch.setattr(model, "_update_policy", lambda samples: None)
    before = policy_vector(model), value_vector(model)
    trained(model)
    assert th.equal(policy_vector(model), before[0])
    assert not th.equal(value_vector(model), before[1])
    assert all(parameter.grad is None for parameter in own)


def test_learning_rate_is_the_values() -> None:
    model = make(learning_rate="lin_1e-2")
    policy, value = policy_vector(model), value_vector(model)
    model._current_progress_remaining = 0.0
    trained(model)
    assert th.equal(value_vector(model), value)
    assert not th.equal(policy_vector(model), policy)
    assert logged(model)["learning_rate"] == 0


def test_every_sample_is_used_once_in_an_epoch_of_the_value() -> None:
    model = make(n_critic_updates=3, engine=False)
    seen: list[th.Tensor] = []
    update = model._update_value
    model._update_value = lambda batch: [update(batch), seen.append(batch.returns)][0]
    model._run = lambda function, batch, *options: function(batch, *options)
    arrays = rollout(model)
    trained(model, arrays)
    assert len(seen) == 3 * STEPS / 8
    for epoch in range(3):
        used = th.cat(seen[4 * epoch : 4 * epoch + 4]).numpy()
        np.testing.assert_array_equal(np.sort(used), np.sort(arrays["returns"][:, 0]))


# As an algorithm


@pytest.mark.parametrize(
    "kwargs",
    [
        {"variant": "coins", "accept_ratio": 0.1, "fvp_subsample": 4},
        {"variant": "gsde", "policy_kwargs": {"squash_output": True}},
        {"variant": "dict", "kl_direction": "old_new", "sub_sampling_factor": 2},
        {"variant": "images", "ent_coef": 0.01},
        {"variant": "discrete", "policy": OwnPolicy},
    ],
    ids=["coins", "squashed", "dict", "images", "a user's"],
)
def test_engine_on_is_engine_off(kwargs: dict[str, Any]) -> None:
    on, off = (make(engine=engine, **kwargs).learn(4 * STEPS) for engine in (True, False))
    th.testing.assert_close(flat(on.policy), flat(off.policy), rtol=0, atol=1e-4)
    report = on.engine_report()
    assert {report[name] for name in ("natural_step", "try", "update_value")} == {"replayed"}


@either_engine
def test_whole_episodes(engine: bool) -> None:
    model = make(env="CartPole-v1", engine=engine, rollout="episodes", rollout_episodes=3, n_steps=400)
    start = policy_vector(model)
    model.learn(100)
    assert not th.equal(policy_vector(model), start)
    assert len(model.ep_info_buffer) >= 3


def test_logged_quantities() -> None:
    numbers = logged(trained(make()))
    theirs = {"policy_objective", "kl_divergence_loss", "is_line_search_success", "explained_variance", "std", "value_loss"}
    ours = {"policy_grad_norm", "value_grad_norm", "policy_predicted_kl", "step_scale", "entropy_loss", "n_updates"}
    assert {"learning_rate"} | theirs | ours == numbers.keys()
    assert numbers["n_updates"] == numbers["is_line_search_success"] == 1
    assert 0 < numbers["kl_divergence_loss"] <= 0.01
    assert 0 < numbers["policy_predicted_kl"] <= 0.01


@either_engine
@pytest.mark.parametrize("name", ["sub_sampling_factor", "fvp_subsample"])
def test_one_sample_of_a_rollout_at_least(name: str, engine: bool) -> None:
    few, none = (flat(make(engine=engine, **{name: number}).learn(STEPS).policy) for number in (STEPS, 2**63 - 1))
    th.testing.assert_close(none, few, rtol=0, atol=0)
