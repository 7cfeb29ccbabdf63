"""An actor-critic by numpy is the one by PyTorch: what it says, its gradients, its actions, and never a stale one."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from environments import BOX, CONTINUOUS, IMAGE, RandomEnv
from gymnasium import spaces
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor
from torch import nn

from sb3_ac_ext import PPOX
from sb3_ac_ext.legacy import actor_critic, numpy_layers
from sb3_ac_ext.legacy.actor_critic import PARTS, MlpPolicy, TorchActorCritic
from sb3_ac_ext.legacy.descent import Descent, FlatAdam
from sb3_ac_ext.legacy.numpy_actor_critic import NumpyActorCritic

SMALL: dict[str, Any] = {"net_arch": {"pi": [8, 5], "vf": [6]}}
MATRIX = spaces.Box(-1, 2, (2, 2), np.float64)


def make(
    actions: spaces.Space = CONTINUOUS, observations: spaces.Space = BOX, policy: str = "MlpPolicy", **kwargs: Any
) -> Any:
    own = {"policy_kwargs": SMALL, "seed": 0, "n_steps": 16, "batch_size": 8, "n_epochs": 2}
    model = PPOX(policy, RandomEnv(observations, actions), **{**own, **kwargs})
    model.set_logger(Logger(None, []))
    return model


KINDS: dict[str, tuple[spaces.Space, dict[str, Any]]] = {
    "box": (CONTINUOUS, {}),
    "matrix": (MATRIX, {}),
    "discrete": (spaces.Discrete(3), {}),
    "multidiscrete": (spaces.MultiDiscrete([3, 2]), {}),
    "multibinary": (spaces.MultiBinary(3), {}),
    "gSDE": (CONTINUOUS, {"use_sde": True}),
    "gSDE narrow": (CONTINUOUS, {"use_sde": True, "policy_kwargs": {**SMALL, "full_std": False}}),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


class Pair:
    """A policy in float64, seen by numpy and by PyTorch, at the same observations and actions."""

    def __init__(self, kind: str) -> None:
        actions, kwargs = KINDS[kind]
        self.policy = make(actions, **kwargs).policy.double()
        generator = th.Generator().manual_seed(1)
        with th.no_grad():
            for parameter in self.policy.parameters():
                parameter += 0.3 * th.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        self.obs = np.random.default_rng(0).normal(size=(40, 4))
        self.numpy, self.torch = NumpyActorCritic(self.policy), TorchActorCritic(self.policy)
        np.random.seed(2)
        self.actions = np.stack([actions.sample().reshape(-1) for _ in self.obs]).reshape(40, -1).astype(np.float64)

    def evaluations(self, parts: Any = PARTS) -> tuple[Any, Any]:
        ours = self.numpy.evaluate(self.obs, self.actions, parts)
        return ours, self.torch.evaluate(th.as_tensor(self.obs), th.as_tensor(self.actions), parts)


def close(ours: Any, theirs: Any) -> None:
    assert (ours is None) == (theirs is None)
    if ours is not None:
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)


@every_kind
@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("parts", [PARTS, ("policy",), ("value",)], ids=["both", "policy", "value"])
def test_evaluations_agree(kind: str, parts: tuple[str, ...]) -> None:
    pair = Pair(kind)
    ours, theirs = pair.evaluations(parts)
    for name in ("log_prob", "entropy", "values"):
        close(getattr(ours, name), getattr(theirs, name))
    close(pair.numpy.values(pair.obs), pair.torch.values(pair.obs))


@every_kind
@pytest.mark.usefixtures("double_precision")
def test_divergences_agree(kind: str) -> None:
    pair = Pair(kind)
    old = pair.numpy.describe(pair.obs), pair.torch.describe(th.as_tensor(pair.obs))
    ours, theirs = pair.evaluations()
    close(ours.kl(old[0]), np.zeros(40))
    with th.no_grad():
        for parameter in pair.policy.policy_parameters():
            parameter += 0.1
    ours, theirs = pair.evaluations()
    close(ours.kl(old[0]), theirs.kl(old[1]))
    assert (ours.kl(old[0]) > 1e-6).any()


SLOPES: dict[str, tuple[str, ...]] = {
    "log_prob": ("log_prob",),
    "entropy": ("entropy",),
    "kl": ("kl",),
    "values": ("values",),
    "all": ("log_prob", "entropy", "kl", "values"),
}


@every_kind
@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("names", SLOPES.values(), ids=SLOPES)
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "by parameter"])
def test_gradients_agree(kind: str, names: tuple[str, ...], flat: bool) -> None:
    pair = Pair(kind)
    old = pair.torch.describe(th.as_tensor(pair.obs)), pair.numpy.describe(pair.obs)
    with th.no_grad():
        for parameter in pair.policy.policy_parameters():
            parameter += 0.1
    numbers = np.random.default_rng(3)
    slopes = {name: numbers.normal(size=40) for name in names}
    gradients = []
    for kind_of_side, before, as_ in zip((TorchActorCritic, NumpyActorCritic), old, (th.as_tensor, np.asarray), strict=True):
        optimizer = th.optim.Adam(pair.policy.parameters())
        layers = [m for m in pair.policy.modules() if hasattr(m, "places")]
        descent = FlatAdam(optimizer, layers) if flat else Descent(optimizer)
        side = kind_of_side(pair.policy)  # the flat tensors have moved the parameters
        side.receive([descent])
        evaluation = side.evaluate(as_(pair.obs), as_(pair.actions))
        given = {name: (before, as_(slope)) if name == "kl" else as_(slope) for name, slope in slopes.items()}
        evaluation.backward(**given)
        gradients.append([p.grad.clone() if p.grad is not None else th.zeros_like(p) for p in pair.policy.parameters()])
    for expected, own in zip(*gradients, strict=True):
        close(own, expected)


@pytest.mark.usefixtures("double_precision")
def test_large_batches_are_evaluated_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair("box")
    sides = ((pair.numpy, pair.obs), (pair.torch, th.as_tensor(pair.obs)))
    expected = [(side.values(pair.obs), side.describe(obs)) for side, obs in sides]
    monkeypatch.setattr(actor_critic, "ROWS", 7)
    for (side, obs), (values, described) in zip(sides, expected, strict=True):
        close(side.values(pair.obs), values)
        close(side.describe(obs), described)


def test_frozen_parameters_stay_frozen() -> None:
    model = make()
    frozen = model.policy.action_net.weight.requires_grad_(False)
    before, free = frozen.clone(), model.policy.action_net.bias.clone()
    model.learn(16)
    assert th.equal(frozen, before)
    assert not th.equal(model.policy.action_net.bias, free)
    assert frozen.grad is None


# Acting


@pytest.mark.parametrize("told", [True, False], ids=["", "optimizer not told"])
def test_a_replaced_layer_is_trained_if_the_optimizer_has_it(told: bool) -> None:
    trained = []
    for engine in (True, False):
        model = make(engine=engine).learn(32)
        layers = model.policy.mlp_extractor.policy_net
        layers[0] = nn.Linear(layers[0].in_features, layers[0].out_features)
        weight = layers[0].weight
        with th.no_grad():
            layers[0].bias.zero_()
            weight.fill_(0.1)
        if told:
            model.policy.optimizer.param_groups[0]["params"] = list(model.policy.parameters())
        np.random.seed(0)
        th.manual_seed(0)
        model.learn(32, reset_num_timesteps=False)
        assert th.equal(weight, th.full_like(weight, 0.1)) is not told
        trained.append(nn.utils.parameters_to_vector(model.policy.parameters()))
    th.testing.assert_close(*trained, rtol=0, atol=1e-5)


@every_kind
@pytest.mark.parametrize("deterministic", [True, False], ids=["mode", "sample"])
@pytest.mark.parametrize(
    "observations", [BOX, spaces.Box(-5, 5, (2, 3), np.float64), spaces.Box(0, 9, (3,), np.int64)], ids=str
)
@pytest.mark.parametrize("largest", [0, numpy_layers.LARGEST_PRODUCT], ids=["torch's products", "numpy's"])
def test_predict_is_sb3s(
    kind: str, deterministic: bool, observations: spaces.Box, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numpy_layers, "LARGEST_PRODUCT", largest)
    actions, kwargs = KINDS[kind]
    model = make(actions, observations, **kwargs)
    assert model.engine_report()["acting"] == "numpy"
    for rows in (None, 1, 2, 33):
        shape = observations.shape if rows is None else (rows, *observations.shape)
        batch = (np.random.random(shape) * 4 - 1).astype(observations.dtype)
        th.manual_seed(5)
        action, state = model.predict(batch, state=("passed",), deterministic=deterministic)
        th.manual_seed(5)
        expected, _ = model.policy.predict(batch, deterministic=deterministic)
        assert state == ("passed",)
        assert (action.shape, action.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_allclose(action, expected, rtol=0, atol=1e-6)
        actor = model._choose_actor()
        assert actor is not None and actor(batch) is not None


def test_actions_are_the_callers() -> None:
    """An action that was returned does not change with the next call, and may be changed."""
    model = make()
    first = model.predict(BOX.low, deterministic=True)[0]
    kept = first.copy()
    second = model.predict(BOX.high, deterministic=True)[0]
    np.testing.assert_array_equal(first, kept)
    second += 1
    first += 1
    np.testing.assert_array_equal(model.predict(BOX.low, deterministic=True)[0], kept)


def test_rollouts_and_updates_do_without_the_policys_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    for name in ("forward", "evaluate_actions", "predict_values", "get_distribution"):
        monkeypatch.setattr(ActorCriticPolicy, name, lambda *args, **kwargs: pytest.fail("asked PyTorch"))
    model.learn(32)


class OwnPolicy(MlpPolicy):
    """Of a user."""


class OwnExtractor(FlattenExtractor):
    """Of a user."""


OBSTACLES: dict[str, tuple[dict[str, Any], str]] = {
    "engine off": ({"engine": False}, "engine=False"),
    "another class": ({"policy": OwnPolicy}, "the policy is a OwnPolicy"),
    "images": ({"observations": IMAGE, "policy": "CnnPolicy"}, "the policy is a CnnPolicy"),
    "an extractor": ({"policy_kwargs": {**SMALL, "features_extractor_class": OwnExtractor}}, "is a OwnExtractor"),
    "discrete observations": ({"observations": spaces.Discrete(3)}, "observations are Discrete"),
    "images as vectors": ({"observations": IMAGE}, "observations are Box"),
    "an activation": ({"policy_kwargs": {**SMALL, "activation_fn": nn.SiLU}}, "SiLU"),
    "no hidden layer": ({"policy_kwargs": {"net_arch": []}}, "no layer"),
    "expln": ({"use_sde": True, "policy_kwargs": {**SMALL, "use_expln": True}}, "gSDE with use_expln"),
    "squashed": ({"use_sde": True, "policy_kwargs": {**SMALL, "squash_output": True}}, "gSDE with bijector"),
}


@pytest.mark.parametrize(("kwargs", "reason"), OBSTACLES.values(), ids=OBSTACLES)
def test_report_names_what_stands_in_the_way(kwargs: dict[str, Any], reason: str) -> None:
    model = make(**kwargs)
    report = model.engine_report()
    assert report["acting"].startswith("PyTorch: ") and reason in report["acting"]
    assert report["rollout"] == "SB3's"
    assert isinstance(model._actor_critic(), TorchActorCritic)
    model.learn(16)


def test_report_of_the_fast_paths() -> None:
    assert make().engine_report() == {
        "policy update": "fused layers, flat Adam",
        "operations": "recorded and replayed",
        "acting": "numpy",
        "rollout": "fast",
    }


def change_parameter(model: PPOX) -> None:
    model.policy.action_net.weight.data.mul_(200)


def change_memory(model: PPOX) -> None:
    model.policy.action_net.weight.data = model.policy.action_net.weight.data * 200


def change_parameter_object(model: PPOX) -> None:
    model.policy.action_net.weight = nn.Parameter(model.policy.action_net.weight.data * 200)


def change_layer(model: PPOX) -> None:
    model.policy.action_net = nn.Linear(5, 2)


def change_layers(model: PPOX) -> None:
    model.policy.mlp_extractor.policy_net = copy.deepcopy(model.policy.mlp_extractor.policy_net)
    model.policy.mlp_extractor.policy_net[0].weight.data.mul_(-3)


def change_std(model: PPOX) -> None:
    model.policy.log_std = nn.Parameter(model.policy.log_std.data + 1)


def change_std_in_place(model: PPOX) -> None:
    model.policy.log_std.data.add_(1)


def change_by_set_parameters(model: PPOX) -> None:
    model.set_parameters(make(seed=9).get_parameters())


def change_by_training(model: PPOX) -> None:
    model.learn(64)


def change_by_hook(model: PPOX) -> None:
    model.policy.action_net.register_forward_hook(lambda module, args, output: output + 1)


def change_by_hook_on_the_features(model: PPOX) -> None:
    model.policy.features_extractor.register_forward_hook(lambda module, args, output: 0 * output)


def change_method(model: PPOX) -> None:
    original = model.policy.get_distribution
    model.policy.get_distribution = lambda obs: original(0 * obs)  # type: ignore[method-assign]


def change_method_of_the_distribution(model: PPOX) -> None:
    original = model.policy.action_dist.get_actions
    model.policy.action_dist.get_actions = lambda *args, **kwargs: original(*args, **kwargs) + 1  # type: ignore[method-assign]


def change_policy(model: PPOX) -> None:
    model.policy = make(seed=9).policy


CHANGES: list[Callable[[Any], None]] = [
    change_parameter,
    change_memory,
    change_parameter_object,
    change_layer,
    change_layers,
    change_std,
    change_std_in_place,
    change_by_set_parameters,
    change_by_training,
    change_by_hook,
    change_by_hook_on_the_features,
    change_method,
    change_method_of_the_distribution,
    change_policy,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda function: function.__name__)
def test_never_acts_on_stale_weights(change: Callable[[Any], None]) -> None:
    model = make()

    def drawn(predict: Callable[..., Any]) -> np.ndarray:
        th.manual_seed(3)
        return predict(0.5 * BOX.high, deterministic=False)[0]

    before = drawn(model.predict)
    change(model)
    after = drawn(model.predict)
    np.testing.assert_allclose(after, drawn(model.policy.predict), rtol=0, atol=1e-6)
    assert not np.allclose(after, before)


def test_a_hook_that_comes_later_sees_updates_too() -> None:
    model = make().learn(16)
    seen: list[int] = []
    handle = model.policy.mlp_extractor.value_net[0].register_forward_hook(lambda *args: seen.append(1))
    model.learn(16)
    assert seen
    handle.remove()
    seen.clear()
    model.learn(16)
    assert not seen
    assert model.engine_report()["acting"] == "numpy"
