"""TRPOX: equal to sb3-contrib's TRPO with its extras off, dense algebra, the line search's conditions, its own arguments."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from batches import flat
from environments import BOX, CONTINUOUS, DICT, IMAGE, RandomEnv, ScriptedEnv
from gymnasium import spaces
from sb3_contrib import TRPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from torch import nn
from torch.distributions import kl_divergence

import sb3_ac_ext.trpox
from sb3_ac_ext import TRPOX
from sb3_ac_ext.functional.natural_gradient import NaturalStep, natural_step
from sb3_ac_ext.legacy import numpy_layers
from sb3_ac_ext.legacy.numpy_actor_critic import NumpyActorCritic
from sb3_ac_ext.validation import NonFiniteError

SMALL: dict[str, Any] = {"net_arch": [8, 8]}
STEPS = 32
DISCRETE, SEVERAL, COINS = spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3)
engine_on_and_off = pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])


def make(cls: type = TRPOX, env: Any = None, policy: str = "MlpPolicy", **kwargs: Any) -> Any:
    own = {"policy_kwargs": SMALL, "seed": 0, "device": "cpu", "n_steps": STEPS, "batch_size": 8, "n_critic_updates": 2}
    model = cls(policy, env or RandomEnv(BOX, CONTINUOUS), **{**own, **kwargs})
    model.set_logger(Logger(None, []))
    return model


def rollout(model: Any, seed: int = 0, std: float = 1.0) -> dict[str, np.ndarray]:
    """What a policy does in random states, in its type, with random advantages and returns."""
    rng, buffer = np.random.default_rng(seed), model.rollout_buffer
    dtype = flat(model.policy).numpy().dtype
    th.manual_seed(seed)
    if model.use_sde:
        model.policy.reset_noise()  # in the policy's type
    observations = rng.normal(size=(STEPS, *model.observation_space.shape)).astype(dtype)
    with th.no_grad():
        distribution = model.policy.get_distribution(th.as_tensor(observations))
        actions = distribution.get_actions()
        log_probs = distribution.log_prob(actions).numpy()
    shape = (STEPS, 1)
    return {
        "observations": observations[:, None],
        "actions": actions.numpy().reshape(STEPS, 1, buffer.action_dim).astype(dtype),
        "log_probs": log_probs.reshape(shape),
        "advantages": (std * rng.normal(size=shape)).astype(dtype),
        "returns": rng.normal(size=shape).astype(dtype),
        "values": rng.normal(size=shape).astype(dtype),
    }


def collected(model: Any, arrays: dict[str, np.ndarray]) -> None:
    """As if the model had collected this."""
    buffer = model.rollout_buffer
    buffer.reset()
    for name, array in arrays.items():
        setattr(buffer, name, array.copy())
    buffer.pos, buffer.full, model._rollout_length, model._kept = STEPS, True, STEPS, None


def trained(model: Any, arrays: dict[str, np.ndarray] | None = None, seed: int = 0) -> Any:
    """The model behind a `train` on a rollout."""
    collected(model, rollout(model, seed) if arrays is None else arrays)
    np.random.seed(seed)
    model.train()
    return model


def logged(model: Any) -> dict[str, float]:
    return {name.removeprefix("train/"): value for name, value in model.logger.name_to_value.items()}


def policy_vector(model: Any) -> th.Tensor:
    return th.cat([parameter.detach().flatten() for parameter in model.policy.policy_parameters()])


def value_vector(model: Any) -> th.Tensor:
    return th.cat([parameter.detach().flatten() for parameter in model.policy.optimizer.param_groups[0]["params"]])


def moments(model: Any) -> dict[str, dict[str, th.Tensor]]:
    """The optimizer's state by the parameters' names."""
    names = {id(parameter): name for name, parameter in model.policy.named_parameters()}
    return {names[id(parameter)]: state for parameter, state in model.policy.optimizer.state.items()}


@pytest.fixture
def zero_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """sb3-contrib's conjugate gradients start at random numbers of size 1e-4; here at 0."""
    monkeypatch.setattr(th, "randn_like", th.zeros_like)


@pytest.fixture
def exact_actions(monkeypatch: pytest.MonkeyPatch, double_precision: None) -> None:
    """SB3's buffer gives actions in float32."""

    def samples(buffer: RolloutBuffer, rows: np.ndarray, env: Any = None) -> RolloutBufferSamples:
        names = ("observations", "actions", "values", "log_probs", "advantages", "returns")
        arrays = [getattr(buffer, name)[rows] for name in names]
        return RolloutBufferSamples(*(th.as_tensor(a.flatten() if i > 1 else a) for i, a in enumerate(arrays)))

    monkeypatch.setattr(RolloutBuffer, "_get_samples", samples)


# sb3-contrib's TRPO


@pytest.mark.usefixtures("exact_actions", "zero_start")
@pytest.mark.parametrize(
    ("policy", "space", "actions", "kwargs"),
    [
        ("MlpPolicy", BOX, CONTINUOUS, {}),
        ("MlpPolicy", BOX, DISCRETE, {}),
        ("MlpPolicy", BOX, SEVERAL, {"policy_kwargs": {"net_arch": {"pi": [8], "vf": [16, 4]}, "activation_fn": nn.ReLU}}),
        ("MlpPolicy", BOX, COINS, {"sub_sampling_factor": 3, "cg_max_steps": 4}),
        ("MlpPolicy", BOX, CONTINUOUS, {"use_sde": True, "normalize_advantage": False}),
        ("MlpPolicy", BOX, CONTINUOUS, {"policy_kwargs": {**SMALL, "full_std": False}, "use_sde": True, "target_kl": 0.2}),
        ("MlpPolicy", BOX, CONTINUOUS, {"target_kl": 3.0, "line_search_max_iter": 3, "cg_damping": 0.01}),
        ("CnnPolicy", IMAGE, CONTINUOUS, {}),
        ("CnnPolicy", IMAGE, DISCRETE, {"policy_kwargs": {**SMALL, "share_features_extractor": False}}),
    ],
    ids=["box", "discrete", "several", "coins", "sde", "half sde", "backtracking", "shared extractor", "own extractors"],
)
@engine_on_and_off
def test_equals_trpo_with_extras_off(policy: str, space: Any, actions: Any, kwargs: dict[str, Any], engine: bool) -> None:
    env = RandomEnv(space, actions)
    # with more iterations conjugate gradients turn a difference of 1e-16 into one of 1e-7
    kwargs = {"learning_rate": lambda progress: 1e-3 * progress, "cg_max_steps": 6, **kwargs}
    theirs, ours = make(TRPO, env, policy, **kwargs), make(TRPOX, env, policy, engine=engine, **kwargs)
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
    assert engine == (ours.engine_report()["policy update"] == "natural gradient by numpy") or policy == "CnnPolicy"
    if "line_search_max_iter" in kwargs:  # accepted at once, later and not at all: all of it is compared
        assert len(outcomes) > 1, outcomes


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("actions", [CONTINUOUS, DISCRETE], ids=["box", "discrete"])
def test_direction_is_that_of_trpo_with_its_random_start(actions: Any) -> None:
    env = RandomEnv(BOX, actions)
    theirs, ours = make(TRPO, env, cg_max_steps=200), make(env=env, cg_max_steps=200)
    for model in (theirs, ours):
        model.policy.double()
    arrays, start = rollout(theirs), flat(ours.policy)
    steps = [flat(trained(model, arrays).policy) - start for model in (theirs, ours)]
    assert (steps[0] - steps[1]).norm() < 1e-4 * steps[0].norm()


@pytest.mark.usefixtures("zero_start")
@engine_on_and_off
def test_learns_the_same_as_trpo_from_the_same_seed(engine: bool) -> None:
    theirs, ours = make(TRPO, "Pendulum-v1").learn(3 * STEPS), make(env="Pendulum-v1", engine=engine).learn(3 * STEPS)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-4)


def test_zip_of_trpo_loads_and_trains_on(tmp_path: Path) -> None:
    theirs = make(TRPO).learn(STEPS)
    theirs.save(tmp_path / "trpo")
    ours = TRPOX.load(tmp_path / "trpo", env=RandomEnv(BOX, CONTINUOUS))
    assert type(ours.policy) is TRPOX.policy_aliases["MlpPolicy"]
    assert moments(ours).keys() == moments(theirs).keys() != set()
    th.testing.assert_close(moments(ours), moments(theirs), rtol=0, atol=0)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=0)
    ours.set_logger(Logger(None, []))
    arrays = rollout(theirs, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(th, "randn_like", th.zeros_like)
        for model in (theirs, ours):
            trained(model, arrays)
    th.testing.assert_close(flat(ours.policy), flat(theirs.policy), rtol=0, atol=1e-5)


# Fisher products and gradients of both ways to evaluate a policy


def divergences(model: Any, observations: th.Tensor, old: Any) -> tuple[th.Tensor, th.Tensor]:
    """``(B,)`` KL(old || new) and KL(new || old) by PyTorch, summed over dimensions."""
    parts = inner(model.policy.get_distribution(observations))
    pairs = list(zip(old, parts, strict=True))
    sums = [
        sum(kl.reshape(len(observations), -1).sum(1) for kl in (kl_divergence(*pair[::d]) for pair in pairs)) for d in (1, -1)
    ]
    return sums[0], sums[1]


def inner(distribution: Any) -> list[Any]:
    return distribution.distribution if isinstance(distribution.distribution, list) else [distribution.distribution]


def old_parts(model: Any, observations: th.Tensor) -> list[Any]:
    """Copies that stay as they are when the policy moves."""
    with th.no_grad():
        parts = inner(model.policy.get_distribution(observations))
        if isinstance(parts[0], th.distributions.Normal):
            return [th.distributions.Normal(parts[0].loc.clone(), parts[0].scale.clone())]
        return [type(part)(logits=part.logits.clone()) for part in parts]


def derivative(of: th.Tensor, by: list[nn.Parameter], **kwargs: Any) -> th.Tensor:
    return th.cat([g.flatten() for g in th.autograd.grad(of, by, materialize_grads=True, retain_graph=True, **kwargs)])


def dense_fisher(model: Any, observations: th.Tensor, direction: int = 0, by: list[nn.Parameter] | None = None) -> th.Tensor:
    """Second derivatives of a mean KL divergence at the old policy."""
    parameters = model.policy.policy_parameters() if by is None else by
    kl = divergences(model, observations, old_parts(model, observations))[direction].mean()
    gradient = derivative(kl, parameters, create_graph=True)
    return th.stack([derivative(g, parameters) for g in gradient])


HEADS = {
    "box": (CONTINUOUS, {}),
    "discrete": (DISCRETE, {}),
    "several": (SEVERAL, {}),
    "coins": (COINS, {}),
    "sde": (CONTINUOUS, {"use_sde": True}),
    "half sde": (CONTINUOUS, {"use_sde": True, "policy_kwargs": {**SMALL, "full_std": False}}),
}
every_head = pytest.mark.parametrize("head", HEADS)


def model_in_float64(head: str, engine: bool, **kwargs: Any) -> Any:
    """With parameters that are nowhere special."""
    actions, own = HEADS[head]
    merged = {**SMALL, "net_arch": [4, 3], **own.get("policy_kwargs", {}), **kwargs.pop("policy_kwargs", {})}
    merged["net_arch"] = [4, 3]
    model = make(env=RandomEnv(BOX, actions), engine=engine, **{**own, **kwargs, "policy_kwargs": merged})
    model.policy.double()
    generator = th.Generator().manual_seed(3)
    for parameter in model.policy.parameters():
        parameter.data.add_(0.4 * th.randn(parameter.shape, generator=generator, dtype=th.float64))
    return model


def columns(product: Callable[[th.Tensor], th.Tensor], size: int) -> th.Tensor:
    return th.stack([product(unit) for unit in th.eye(size, dtype=th.float64)], dim=1)


def evaluated(model: Any, observations: np.ndarray, actions: np.ndarray) -> Any:
    learner = model._actor_critic()
    assert isinstance(learner, NumpyActorCritic) == model.engine
    return learner.evaluate(learner.array(observations), learner.array(actions), ("policy",))


@pytest.mark.usefixtures("double_precision")
@every_head
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.ELU, nn.Sigmoid])
@engine_on_and_off
def test_fisher_products_are_the_dense_matrix(head: str, activation: type[nn.Module], engine: bool) -> None:
    model = model_in_float64(head, engine, policy_kwargs={"activation_fn": activation})
    arrays = rollout(model)
    observations, actions = arrays["observations"][:, 0], arrays["actions"][:, 0]
    parameters = model.policy.policy_parameters()
    size = len(policy_vector(model))
    fisher = columns(evaluated(model, observations, actions).fisher_product(parameters), size)
    largest = fisher.abs().max().item()
    for direction in (0, 1):
        expected = dense_fisher(model, th.as_tensor(observations), direction)
        th.testing.assert_close(fisher, expected, rtol=0, atol=1e-11 * largest)
    th.testing.assert_close(fisher, fisher.t(), rtol=0, atol=1e-14 * largest)
    assert th.linalg.eigvalsh(fisher).min() > -1e-14 * largest
    if head == "box":
        th.testing.assert_close(fisher[:2, :2], 2 * th.eye(2, dtype=th.float64), rtol=0, atol=1e-12)  # of log_std


@pytest.mark.usefixtures("double_precision")
@every_head
def test_fisher_products_through_pytorchs_matrix_product(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_in_float64(head, engine=True)
    arrays = rollout(model)
    vector = th.randn(len(policy_vector(model)), dtype=th.float64)
    evaluation = evaluated(model, arrays["observations"][:, 0], arrays["actions"][:, 0])
    product = evaluation.fisher_product(model.policy.policy_parameters())
    small = product(vector)
    monkeypatch.setattr(numpy_layers, "LARGEST_PRODUCT", 0)
    th.testing.assert_close(product(vector), small, rtol=0, atol=1e-12)
    th.testing.assert_close(product(2 * vector), 2 * small, rtol=0, atol=1e-12)  # the evaluation is still what it was


@pytest.mark.usefixtures("double_precision")
@every_head
@engine_on_and_off
def test_gradient_is_that_of_autograd(head: str, engine: bool) -> None:
    model = model_in_float64(head, engine)
    arrays = rollout(model)
    observations, actions = arrays["observations"][:, 0], arrays["actions"][:, 0]
    parameters = model.policy.policy_parameters()
    slopes = [th.randn(STEPS, dtype=th.float64) for _ in range(2)]
    evaluation = evaluated(model, observations, actions)
    array = (lambda tensor: tensor.numpy()) if engine else (lambda tensor: tensor)
    chosen = th.as_tensor(actions).long().flatten() if head == "discrete" else th.as_tensor(actions)
    _, log_prob, entropy = model.policy.evaluate_actions(th.as_tensor(observations), chosen)
    for used in (1, 2):
        ours = evaluation.gradient(parameters, *map(array, slopes[:used]))
        loss = sum((slope * of).sum() for slope, of in zip(slopes[:used], (log_prob, entropy), strict=False))
        th.testing.assert_close(ours, derivative(loss, parameters), rtol=0, atol=1e-10)
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.usefixtures("double_precision")
@every_head
@engine_on_and_off
def test_divergence_in_both_directions(head: str, engine: bool) -> None:
    model = model_in_float64(head, engine)
    observations = rollout(model)["observations"][:, 0]
    learner = model._actor_critic()
    described, old = learner.describe(learner.array(observations)), old_parts(model, th.as_tensor(observations))
    with th.no_grad():
        for parameter in model.policy.policy_parameters():
            parameter.add_(0.3)
        expected = divergences(model, th.as_tensor(observations), old)
    evaluation = evaluated(model, observations, rollout(model)["actions"][:, 0])
    for reverse in (False, True):
        th.testing.assert_close(th.as_tensor(evaluation.kl(described, reverse=reverse)), expected[reverse], rtol=0, atol=1e-10)
    assert not np.allclose(*expected)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("frozen", [["log_std"], ["mlp_extractor.policy_net.0.weight"]], ids=["log_std", "a layer"])
@engine_on_and_off
def test_frozen_parameters_stay(frozen: list[str], engine: bool) -> None:
    model = model_in_float64("box", engine)
    named = dict(model.policy.named_parameters())
    for name in frozen:
        named[name].requires_grad_(False)
    free = [parameter for parameter in model.policy.policy_parameters() if parameter.requires_grad]
    before = {name: parameter.clone() for name, parameter in named.items()}
    arrays = rollout(model)
    evaluation = evaluated(model, arrays["observations"][:, 0], arrays["actions"][:, 0])
    fisher = columns(evaluation.fisher_product(free), sum(parameter.numel() for parameter in free))
    expected = dense_fisher(model, th.as_tensor(arrays["observations"][:, 0]), by=free)
    th.testing.assert_close(fisher, expected, rtol=0, atol=1e-10)
    trained(model, arrays)
    for name, parameter in named.items():
        assert th.equal(parameter, before[name]) == (name in frozen), name


# The step


def step_by_hand(model: Any, arrays: dict[str, np.ndarray], stride: int = 1, ent_coef: float = 0.0) -> th.Tensor:
    """By the dense Fisher matrix of every ``stride``-th sample of the order in which they are shuffled."""
    np.random.seed(0)
    order = np.random.permutation(STEPS)
    observations, actions = (th.as_tensor(arrays[name][order, 0]) for name in ("observations", "actions"))
    advantages = th.as_tensor(arrays["advantages"][order, 0])
    advantages = (advantages - advantages.mean()) / advantages.std()
    _, log_prob, entropy = model.policy.evaluate_actions(observations, actions)
    gradient = derivative((log_prob * advantages).mean() + ent_coef * entropy.mean(), model.policy.policy_parameters())
    size = len(gradient)
    weight = 1.0 if model.kl_reduction == "sum" else 1 / 2
    damped = weight * dense_fisher(model, observations[::stride]) + model.cg_damping * th.eye(size, dtype=th.float64)
    direction = th.linalg.solve(damped, gradient)
    return direction * (2 * model.target_kl / (direction @ damped @ direction)).sqrt()


@pytest.mark.usefixtures("double_precision")
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
@engine_on_and_off
def test_step_is_that_of_dense_algebra(kwargs: dict[str, Any], engine: bool) -> None:
    """Sign, damping, length, subset, entropy: each is needed to get this step."""
    model = model_in_float64("box", engine, cg_max_steps=300, target_kl=1e-3, cg_damping=0.05, **kwargs)
    arrays = rollout(model)
    expected = step_by_hand(model, arrays, kwargs.get("fvp_subsample", 1), kwargs.get("ent_coef", 0.0))
    start = policy_vector(model)
    trained(model, arrays)
    scale = logged(model)["step_scale"]
    assert scale > 0
    # as exact as conjugate gradients, which stop at a residual of 1e-5
    assert (policy_vector(model) - start - scale * expected).norm() < 1e-3 * (scale * expected).norm()


@pytest.mark.usefixtures("double_precision")
@engine_on_and_off
def test_predicted_and_actual_divergence_agree_for_small_steps(engine: bool) -> None:
    model = model_in_float64(
        "box", engine, target_kl=1e-4, kl_reduction="sum", kl_direction="old_new", cg_max_steps=300, cg_damping=1e-3
    )
    arrays = rollout(model)
    observations = th.as_tensor(arrays["observations"][:, 0])
    old, fisher, start = old_parts(model, observations), dense_fisher(model, observations), policy_vector(model)
    trained(model, arrays)
    step = policy_vector(model) - start
    kl = divergences(model, observations, old)[0].mean().item()
    assert logged(model)["kl_divergence_loss"] == pytest.approx(kl, rel=1e-6)
    assert logged(model)["policy_predicted_kl"] == pytest.approx((0.5 * step @ fisher @ step).item(), rel=1e-4)
    assert logged(model)["policy_predicted_kl"] == pytest.approx(kl, rel=0.2)
    assert kl <= 1e-4


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("direction", ["old_new", "new_old"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("head", ["box", "discrete", "several", "coins"])
@engine_on_and_off
def test_which_divergence_bounds_the_step(direction: str, reduction: str, head: str, engine: bool) -> None:
    """The mean is over the dimensions of Box and MultiBinary actions, as in sb3-contrib."""
    model = model_in_float64(head, engine, target_kl=0.3, kl_direction=direction, kl_reduction=reduction, cg_damping=0.01)
    arrays = rollout(model)
    observations = th.as_tensor(arrays["observations"][:, 0])
    old = old_parts(model, observations)
    trained(model, arrays)
    assert logged(model)["is_line_search_success"]
    pair = [kl.mean().item() for kl in divergences(model, observations, old)]
    dimensions = {"box": 2, "coins": 3}.get(head, 1) if reduction == "mean" else 1
    expected = pair[direction == "new_old"] / dimensions
    assert logged(model)["kl_divergence_loss"] == pytest.approx(expected, rel=1e-6)
    assert expected <= 0.3
    assert pair[0] != pytest.approx(pair[1], rel=1e-3)


@pytest.mark.usefixtures("double_precision")
def test_entropy_bonus_makes_the_policy_more_random() -> None:
    """It alone, as the advantages are 0: the objective is the entropy, whose gain is reported."""
    model = model_in_float64("discrete", True, normalize_advantage=False, ent_coef=0.5)
    arrays = rollout(model, std=0.0)
    observations = th.as_tensor(arrays["observations"][:, 0])
    entropies = [model.policy.get_distribution(observations).entropy().mean().item()]
    trained(model, arrays)
    entropies.append(model.policy.get_distribution(observations).entropy().mean().item())
    assert entropies[1] > entropies[0]
    assert logged(model)["policy_objective"] == pytest.approx(0.5 * entropies[1], rel=1e-6)
    assert logged(model)["entropy_loss"] == pytest.approx(-entropies[0], rel=1e-6)


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


@pytest.mark.usefixtures("double_precision")
@engine_on_and_off
def test_accept_ratio(engine: bool, found: dict[str, Any]) -> None:
    """The first step that reaches the share of its expected improvement is taken, not the first with any."""
    kwargs = {"target_kl": 0.02, "kl_reduction": "sum", "line_search_shrinking_factor": 0.5, "cg_damping": 0.1}
    free = model_in_float64("box", engine, **kwargs)
    arrays = rollout(free)
    start = policy_vector(free)
    trained(free, arrays)
    assert logged(free)["step_scale"] == 1
    expected = found["step"].improvement.item()
    share = {}
    for j in (0, 1):
        probe = model_in_float64("box", engine, **kwargs)
        nn.utils.vector_to_parameters(start + 0.5**j * found["step"].step, probe.policy.policy_parameters())
        share[j] = objective(probe, arrays) / (0.5**j * expected)
    assert share[0] < share[1] < 1.1
    strict = model_in_float64("box", engine, accept_ratio=(share[0] + share[1]) / 2, **kwargs)
    trained(strict, arrays)
    assert logged(strict)["step_scale"] == 0.5
    assert logged(strict)["policy_objective"] == pytest.approx(share[1] * 0.5 * expected, rel=1e-6)
    loose = model_in_float64("box", engine, accept_ratio=share[0] * 0.99, **kwargs)
    assert logged(trained(loose, arrays))["step_scale"] == 1


CHANGES: dict[str, Callable[[NaturalStep], NaturalStep]] = {
    "too far": lambda natural: natural._replace(step=1e3 * natural.step),
    "downhill": lambda natural: natural._replace(step=-natural.step),
    "nothing": lambda natural: natural._replace(step=th.zeros_like(natural.step)),
}


@pytest.mark.parametrize("change", CHANGES)
@engine_on_and_off
def test_a_step_that_is_not_accepted_leaves_the_policy_as_it_was(change: str, engine: bool, found: dict[str, Any]) -> None:
    """All of it, log_std too, in the memory where it was; the value learns all the same."""
    found["change"] = CHANGES[change]
    model = make(engine=engine, line_search_max_iter=3)
    trained(model)  # memory is laid out at the first update
    pointers = [parameter.data_ptr() for parameter in model.policy.parameters()]
    policy, value = policy_vector(model), value_vector(model)
    trained(model, seed=1)
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
@engine_on_and_off
def test_no_gradient_no_step(advantage: float, engine: bool) -> None:
    model = make(engine=engine, normalize_advantage=False)
    arrays = rollout(model)
    arrays["advantages"][...] = advantage
    policy, value = policy_vector(model), value_vector(model)
    trained(model, arrays)
    assert th.equal(policy_vector(model), policy)
    assert not th.equal(value_vector(model), value)
    assert logged(model)["is_line_search_success"] == 0


def test_a_policy_that_is_not_finite_stops_the_training() -> None:
    model = make()
    arrays = rollout(model)
    model.policy.action_net.bias.data[0] = th.nan
    with pytest.raises(NonFiniteError, match="TRPOX: the parameters of the policy became non-finite"):
        trained(model, arrays)


# Policy and value


@pytest.mark.parametrize("shared", [True, False])
@engine_on_and_off
def test_each_parameter_has_one_owner(shared: bool, engine: bool) -> None:
    env = RandomEnv(IMAGE, CONTINUOUS)
    model = make(env=env, policy="CnnPolicy", engine=engine, policy_kwargs={**SMALL, "share_features_extractor": shared})
    policy = {id(parameter) for parameter in model.policy.policy_parameters()}
    value = {id(parameter) for parameter in model.policy.optimizer.param_groups[0]["params"]}
    assert policy | value == {id(parameter) for parameter in model.policy.parameters()}
    assert not policy & value
    assert {id(parameter) for parameter in model.policy.pi_features_extractor.parameters()} <= policy
    assert value >= {id(parameter) for parameter in model.policy.value_net.parameters()}


@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy"])
@engine_on_and_off
def test_neither_update_touches_the_other(policy: str, engine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    env = RandomEnv(IMAGE if policy == "CnnPolicy" else BOX, CONTINUOUS)
    model = make(env=env, policy=policy, engine=engine, n_critic_updates=0)
    before = policy_vector(model), value_vector(model)
    trained(model)
    assert not th.equal(policy_vector(model), before[0])
    assert th.equal(value_vector(model), before[1])
    assert "value_loss" not in logged(model)

    model = make(env=env, policy=policy, engine=engine)
    monkeypatch.setattr(model, "_update_policy", lambda samples: None)
    before = policy_vector(model), value_vector(model)
    trained(model)
    assert th.equal(policy_vector(model), before[0])
    assert not th.equal(value_vector(model), before[1])
    assert all(parameter.grad is None for parameter in model.policy.policy_parameters())
    assert all(parameter.requires_grad for parameter in model.policy.parameters())


def test_learning_rate_is_the_values() -> None:
    model = make(learning_rate="lin_1e-2")
    policy, value = policy_vector(model), value_vector(model)
    model._current_progress_remaining = 0.0
    trained(model)
    assert th.equal(value_vector(model), value)
    assert not th.equal(policy_vector(model), policy)
    assert logged(model)["learning_rate"] == 0


def test_every_sample_is_used_once_in_an_epoch_of_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(n_critic_updates=3)
    seen: list[Any] = []
    monkeypatch.setattr(model, "_update_value", lambda batch: seen.append(np.asarray(batch.returns)))
    arrays = rollout(model)
    trained(model, arrays)
    assert len(seen) == 3 * STEPS / 8
    for epoch in range(3):
        used = np.concatenate(seen[4 * epoch : 4 * epoch + 4])
        np.testing.assert_array_equal(np.sort(used), np.sort(arrays["returns"][:, 0]))


# As an algorithm


@pytest.mark.parametrize(
    ("policy", "space", "actions", "kwargs"),
    [
        ("MlpPolicy", BOX, COINS, {"accept_ratio": 0.1, "fvp_subsample": 4}),
        ("MlpPolicy", BOX, CONTINUOUS, {"use_sde": True, "policy_kwargs": {**SMALL, "squash_output": True}}),
        ("MultiInputPolicy", DICT, CONTINUOUS, {"kl_direction": "old_new", "kl_reduction": "sum", "sub_sampling_factor": 2}),
        ("CnnPolicy", IMAGE, SEVERAL, {"ent_coef": 0.01}),
    ],
    ids=["coins", "squashed", "dict", "images"],
)
@engine_on_and_off
def test_trains_with_its_options(policy: str, space: Any, actions: Any, kwargs: dict[str, Any], engine: bool) -> None:
    model = make(env=RandomEnv(space, actions), policy=policy, engine=engine, **kwargs)
    before = flat(model.policy)
    model.learn(3 * STEPS)
    assert model._n_updates >= 3
    assert th.isfinite(flat(model.policy)).all()
    assert not th.equal(flat(model.policy), before)


@engine_on_and_off
def test_whole_episodes(engine: bool) -> None:
    model = make(env="CartPole-v1", engine=engine, rollout="episodes", rollout_episodes=3, n_steps=400)
    start = policy_vector(model)
    model.learn(100)
    assert not th.equal(policy_vector(model), start)
    assert len(model.ep_info_buffer) >= 3


@pytest.mark.parametrize(
    "kwargs", [{}, {"kl_direction": "old_new", "fvp_subsample": 2, "ent_coef": 0.01, "accept_ratio": 0.1}]
)
@engine_on_and_off
def test_learn_after_load_is_the_uninterrupted_learn(kwargs: dict[str, Any], engine: bool, tmp_path: Path) -> None:
    """The environment resets to one state, and its episodes end with the rollouts."""
    model = make(env=ScriptedEnv(length=8), engine=engine, **kwargs).learn(2 * STEPS)
    model.save(tmp_path / "model")
    model.learn(2 * STEPS, reset_num_timesteps=False)
    th.manual_seed(99)
    np.random.seed(99)
    loaded = TRPOX.load(tmp_path / "model", env=ScriptedEnv(length=8))
    assert {name: getattr(loaded, name) for name in kwargs} == kwargs
    loaded.learn(2 * STEPS, reset_num_timesteps=False)
    assert th.equal(flat(loaded.policy), flat(model.policy))
    th.testing.assert_close(moments(loaded), moments(model), rtol=0, atol=0)


def test_logged_quantities() -> None:
    model = trained(make())
    numbers = logged(model)
    assert {
        "policy_objective",
        "kl_divergence_loss",
        "is_line_search_success",
        "explained_variance",
        "std",
        "value_loss",
    } < set(numbers)  # sb3-contrib's
    assert {"policy_grad_norm", "value_grad_norm", "policy_predicted_kl", "step_scale", "entropy_loss", "n_updates"} < set(
        numbers
    )
    assert numbers["n_updates"] == 1
    assert numbers["is_line_search_success"] == 1
    assert 0 < numbers["kl_divergence_loss"] <= 0.01
    assert 0 < numbers["policy_predicted_kl"] <= 0.01


def test_fast_path_is_taken_where_it_applies() -> None:
    assert make().engine_report()["policy update"] == "natural gradient by numpy"
    assert make(engine=False).engine_report()["policy update"] == "natural gradient by PyTorch: engine=False"
    assert make().engine_report()["value update"] == "fused layers, flat Adam"
