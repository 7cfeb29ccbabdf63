"""Recorded updates do what the updates do."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from environments import BOX, CONTINUOUS, RandomEnv
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import FlattenExtractor

from sb3_ac_ext import AC, DDPGX, PPOX, SACX, TD3X
from sb3_ac_ext.buffers.replay import Transitions
from sb3_ac_ext.legacy.capture import WARM_UP, Capture, Lasting
from sb3_ac_ext.legacy.descent import FlatAdam
from sb3_ac_ext.legacy.means import TensorMeans
from sb3_ac_ext.legacy.tape import Tape


class CountedTape(Tape):
    """Knows how many there are."""

    made: int = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).made += 1


def make(recorded: bool, cls: type[TD3X] | type[DDPGX] | type[SACX] = TD3X, **kwargs: Any) -> Any:
    own = {"policy_kwargs": {"net_arch": [16, 16]}, "seed": 0, "learning_starts": 10, "batch_size": 8, "buffer_size": 200}
    model: Any = cls("MlpPolicy", RandomEnv(BOX, CONTINUOUS), **{**own, **kwargs})
    model.set_logger(Logger(None, []))
    model._capture._recording = CountedTape
    if not recorded:
        model._capture_obstacle = lambda ordinary: "switched off"
    return model


def parameters(model: Any) -> th.Tensor:
    return th.cat([value.flatten() for value in model.policy.state_dict().values()]).clone()


@pytest.fixture(autouse=True)
def no_tapes_yet() -> None:
    CountedTape.made = 0


@pytest.mark.parametrize(
    ("cls", "kwargs", "recordings"),
    [
        (TD3X, {}, 2),  # with and without the actor
        (TD3X, {"max_grad_norm": 0.1, "policy_delay": 3}, 2),
        (TD3X, {"gradient_steps": 4}, 2),
        (DDPGX, {"critic_weight_decay": 0.01, "policy_kwargs": {"net_arch": [16, 16], "action_layer": 1}}, 1),
        (SACX, {}, 1),
        (SACX, {"ent_coef": 0.2, "target_update_every": 2}, 2),  # with and without the targets
        (SACX, {"value_network": True, "exact_log_prob": True}, 1),
        (SACX, {"use_sde": True}, 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_same_results_with_recorded_updates(cls: Any, kwargs: dict[str, Any], recordings: int) -> None:
    ours, expected = (make(recorded, cls, **kwargs).learn(60) for recorded in (True, False))
    assert sum(update.recorded for update in ours._capture._updates.values()) == recordings
    th.testing.assert_close(parameters(ours), parameters(expected), rtol=0, atol=1e-5)
    states = [model.actor.optimizer.state_dict()["state"] for model in (ours, expected)]
    th.testing.assert_close(*states, rtol=0, atol=1e-4)
    logged = [model.logger.name_to_value for model in (ours, expected)]
    assert logged[0].keys() == logged[1].keys()
    for key, value in logged[0].items():
        assert value == pytest.approx(logged[1][key], rel=1e-3, abs=1e-5), key


def change_nothing(model: TD3X) -> None:
    pass


def change_tau(model: TD3X) -> None:
    model.tau = 0.5


def change_smoothing(model: TD3X) -> None:
    model.target_policy_noise = 0.9


def change_betas(model: TD3X) -> None:
    model.critic.optimizer.param_groups[0]["betas"] = (0.5, 0.9)


def change_parameters(model: TD3X) -> None:
    model.policy.load_state_dict({name: 0.5 * value for name, value in model.policy.state_dict().items()})


def change_memory(model: TD3X) -> None:
    for parameter in model.critic_target.parameters():
        parameter.data = parameter.data * 0.5


def change_module(model: TD3X) -> None:
    model.actor.features_extractor = FlattenExtractor(model.observation_space)


def change_optimizer_state(model: TD3X) -> None:
    state = copy.deepcopy(model.actor.optimizer.state_dict())
    state["state"][0]["exp_avg"] *= 5
    model.actor.optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "records_again"),
    [
        (change_nothing, False),
        (change_parameters, False),
        (change_tau, True),
        (change_smoothing, True),
        (change_betas, True),
        (change_memory, True),
        (change_module, True),
        (change_optimizer_state, True),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_changes_reach_recorded_updates(change: Callable[[TD3X], None], records_again: bool) -> None:
    results = []
    for recorded in (True, False):
        model = make(recorded).learn(40)
        model.train(8, 8)
        before = CountedTape.made
        change(model)
        model.train(20, 8)
        assert CountedTape.made - before == (2 if records_again and recorded else 0)
        results.append(parameters(model))
    th.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_a_batch_of_another_size_is_another_recording() -> None:
    results = []
    for recorded in (True, False):
        model = make(recorded).learn(40)
        before = CountedTape.made
        for batch_size in (8, 5, 8, 5):
            model.train(2 * WARM_UP, batch_size)
        assert CountedTape.made - before == (2 if recorded else 0)
        results.append(parameters(model))
    th.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_what_cannot_be_recorded_goes_on_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    original = TD3X._actor_loss

    def fetching(self: TD3X, batch: Transitions) -> th.Tensor:
        loss = original(self, batch)
        assert loss.item() == loss.item()
        return loss

    monkeypatch.setattr(TD3X, "_actor_loss", fetching)
    results = []
    for recorded in (True, False):
        model = make(recorded)
        model.learn(40)
        if recorded:
            assert re.search("from Python: .*_local_scalar_dense.* looks at the values", model.engine_report()["operations"])
        results.append(parameters(model))
    th.testing.assert_close(*results, rtol=0, atol=1e-5)


def transitions(value: float) -> Transitions:
    observations = {"a": th.full((2, 1), value)}
    return Transitions(observations, th.zeros(2, 1), observations, th.zeros(2, 1), th.zeros(2, 1), 0.9)


def test_dicts_of_observations_are_copied() -> None:
    means, seen = TensorMeans(), []

    def update(batch: Transitions) -> None:
        seen.append(batch.observations["a"])  # type: ignore[call-overload]
        means.add("a", batch.observations["a"].sum())  # type: ignore[call-overload]

    capture = Capture(means, CountedTape)
    for step in range(WARM_UP + 3):
        capture.run("update", update, transitions(float(step)))
    assert len(seen) == WARM_UP + 1
    assert len({tensor.data_ptr() for tensor in seen}) == 1
    assert means.read() == {"a": pytest.approx(2 * sum(range(WARM_UP + 3)) / (WARM_UP + 3))}
    assert means.read() == {}


def test_settled_where_nothing_changed_and_all_was_replayed() -> None:
    capture, settled = Capture(TensorMeans(), CountedTape), []
    for _ in range(WARM_UP + 3):
        capture.fix("address")
        settled.append(capture.settled)
        capture.run("update", lambda batch: None, transitions(0.0))
        settled.append(capture.settled)
    assert settled == [False, False, *[True, False] * WARM_UP, True, True, True, True]
    capture.fix("another")
    assert not capture.settled


def test_batches_in_memory_that_lasts_are_not_copied() -> None:
    class LastingTransitions(Transitions, Lasting):
        __slots__ = ()

    batch, seen = LastingTransitions(*(th.zeros(2, 1) for _ in range(5)), 0.9), []
    capture = Capture(TensorMeans(), CountedTape)
    for _ in range(WARM_UP):
        capture.run("update", seen.append, batch)
    assert all(one is batch for one in seen)


def test_means_are_read_with_others() -> None:
    means = TensorMeans()
    means.add("a", th.tensor(4.0))
    means.add("a", th.tensor(2.0))
    means.add("b", 7)
    assert means.read({"c": th.tensor(5.0)}) == {"a": 3.0, "b": 7.0, "c": 5.0}
    assert means.read({"c": th.tensor(5.0)}) == {"c": 5.0}


def test_means_of_tensors_are_those_of_their_elements() -> None:
    means = TensorMeans()
    for rows in (2, 4):
        means.add("a", th.full((rows, 1), float(rows), requires_grad=True))
    means.add("a", th.tensor(6.0))
    assert means.read() == {"a": pytest.approx((2 * 2 + 4 * 4 + 6) / 7)}


def test_means_start_again_when_they_are_read() -> None:
    means = TensorMeans()
    for values in ((1.0, 2.0, 6.0), (10.0,)):
        for value in values:
            means.add("a", th.tensor(value))
        means.add("b", th.tensor(-1.0))
        assert means.read() == {"a": sum(values) / len(values), "b": -1.0}
    assert means.read() == {}


class Observing(TD3X):
    """Somebody's algorithm, which does something besides operations on tensors."""

    def _actor_loss(self, batch: Transitions) -> th.Tensor:
        self.seen = getattr(self, "seen", 0) + 1
        return super()._actor_loss(batch)


class Noting(FlattenExtractor):
    """Somebody's features, the same."""

    seen = 0

    def forward(self, observations: th.Tensor) -> th.Tensor:
        type(self).seen += 1
        return super().forward(observations)


@pytest.mark.parametrize(
    ("make_model", "reason"),
    [
        (lambda: make(True, Observing), "what a Observing does besides operations on tensors"),
        (
            lambda: make(True, policy_kwargs={"net_arch": [16, 16], "features_extractor_class": Noting}),
            "what a Noting does besides operations on tensors",
        ),
    ],
    ids=["algorithm", "features"],
)
def test_python_of_others_is_not_skipped(make_model: Callable[[], Any], reason: str) -> None:
    model = make_model().learn(40)
    assert CountedTape.made == 0
    assert model.engine_report()["operations"] == f"from Python: {reason}"


def hook(model: Any, called: list[int]) -> str:
    model.critic.register_forward_hook(lambda *args: called.append(1))
    return "a hook on a TwinStreamCritic"


def method(model: Any, called: list[int]) -> str:
    original = model._critic_loss

    def replaced(batch: Transitions) -> th.Tensor:
        called.append(1)
        loss: th.Tensor = original(batch)
        return loss

    model._critic_loss = replaced
    return "a replaced method of a TD3X"


def module(model: Any, called: list[int]) -> str:
    class Calling(FlattenExtractor):
        def forward(self, observations: th.Tensor) -> th.Tensor:
            called.append(1)
            return super().forward(observations)

    model.critic.features_extractor = Calling(BOX)
    return "what a Calling does besides operations on tensors"


@pytest.mark.parametrize("copied", [False, True], ids=["", "copied"])
@pytest.mark.parametrize("change", [hook, method, module], ids=lambda change: change.__name__)
def test_what_is_added_later_is_called(change: Callable[[Any, list[int]], str], copied: bool) -> None:
    model, called = make(True).learn(40), []
    assert model.engine_report()["operations"] == "recorded and replayed"
    if copied:
        model = copy.deepcopy(model)
        model.set_logger(Logger(None, []))
    reason = change(model, called)
    model.train(5, 8)
    assert len(called) >= 5
    assert model.engine_report()["operations"] == f"from Python: {reason}"


def test_anomalies_are_looked_for_in_the_graph() -> None:
    model = make(True).learn(40)
    with th.autograd.set_detect_anomaly(True):
        assert model.engine_report()["operations"] == "from Python: PyTorch looks for anomalies"
    assert model.engine_report()["operations"] == "recorded and replayed"


def test_rates_may_change_without_another_recording() -> None:
    results = []
    for recorded in (True, False):
        model = make(recorded, learning_rate="lin_0.01", critic_learning_rate="lin_0.02").learn(40)
        before = CountedTape.made
        results.append(parameters(model.learn(40, reset_num_timesteps=False)))
        assert CountedTape.made == before
    th.testing.assert_close(*results, rtol=0, atol=1e-5)
    constant = make(True, learning_rate=0.01, critic_learning_rate=0.02).learn(40).learn(40, reset_num_timesteps=False)
    assert not th.allclose(parameters(constant), results[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("recorded", "steps"), [(True, [200, 200]), (False, [200, 100])], ids=["recorded", "not"])
def test_steps_are_settled(recorded: bool, steps: list[int]) -> None:
    """A recording does not know which networks it steps, and once too often does no harm."""
    model = make(recorded).learn(40)
    model.train(300, 8)
    before = [descent.steps for descent in model._descents.values()]
    model.train(200, 8)
    assert [descent.steps - start for descent, start in zip(model._descents.values(), before, strict=True)] == steps


def test_moments_that_vanish_while_steps_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(True).learn(40)
    moment = model._descents["critic"].moments[0].values
    moment[0] = 1e-31
    monkeypatch.setattr(model._capture, "run", lambda key, function, batch: None)  # no step that would change the moment
    model.train(200, 8)
    assert moment[0] == 0


def test_on_a_cpu_updates_are_taped_and_distributions_validate_as_before() -> None:
    validates = th.distributions.Distribution._validate_args
    model = SACX("MlpPolicy", RandomEnv(BOX, CONTINUOUS), learning_starts=10, batch_size=8, buffer_size=100, use_sde=True)
    th.distributions.Distribution.set_default_validate_args(True)
    try:
        model.learn(40)
        assert th.distributions.Distribution._validate_args is True
    finally:
        th.distributions.Distribution.set_default_validate_args(validates)
    assert all(type(update.recording) is Tape and update.recorded for update in model._capture._updates.values())


@pytest.mark.parametrize(
    ("cls", "kwargs", "keys"),
    [
        (PPOX, {"n_steps": 32, "batch_size": 8, "learning_rate": "lin_0.01"}, {"policy"}),
        (PPOX, {"n_steps": 32, "batch_size": 8, "separate_phases": True, "max_grad_norm": 0.1}, {"policy", "value"}),
        (AC, {}, {"actor", "critic"}),
    ],
    ids=["one", "two", "online"],
)
def test_steps_of_on_policy_updates_are_recorded(cls: Any, kwargs: dict[str, Any], keys: set[str]) -> None:
    results = []
    for recorded in (True, False):
        model = cls("MlpPolicy", RandomEnv(BOX, CONTINUOUS), seed=0, **kwargs)
        if not recorded:
            model._capture_obstacle = lambda ordinary: "switched off"
        model.learn(96)
        recordings = {key[0][1]: update.recorded for key, update in model._capture._updates.items()}
        assert recordings == (dict.fromkeys(keys, True) if recorded else {})
        results.append((parameters(model), model.logger.name_to_value))
    th.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-6)
    for key, value in results[0][1].items():
        assert value == pytest.approx(results[1][1][key], rel=1e-3, abs=1e-5) or key.startswith("time/"), key


def test_steps_of_a_part_are_not_replayed() -> None:
    """Adam leaves parameters alone that the loss has left without a gradient; a recorded step would not."""
    model = PPOX("MlpPolicy", RandomEnv(BOX, CONTINUOUS), seed=0, n_steps=32, batch_size=8).learn(96)
    assert all(update.recorded for update in model._capture._updates.values())
    descent, before = model._descents["policy"], parameters(model)
    assert isinstance(descent, FlatAdam)
    for parameter in descent.parameters[1:]:
        parameter.grad = None
    descent.whole = False
    descent.parameters[0].grad = th.ones_like(descent.parameters[0])
    model._step("policy")
    assert (parameters(model) != before).sum() == descent.parameters[0].numel()


class Hesitant(Tape):
    """Begins twice, as a CUDA graph that could not be recorded."""

    def record(self, function: Callable[[], None]) -> None:
        function()
        super().record(function)


def test_a_second_beginning_counts_once() -> None:
    means = TensorMeans()
    capture = Capture(means, Hesitant)
    for _ in range(WARM_UP + 3):
        capture.run("update", lambda batch: means.add("a", batch.rewards.sum()), transitions(1.0))
    assert means.counts() == {"a": WARM_UP + 3}
