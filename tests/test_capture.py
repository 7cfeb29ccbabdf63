"""
Recorded updates do what the updates do, checked without a GPU.

`Tape` stands for a CUDA graph: it notes the operations on tensors and their memory, and runs them again on that memory
without any Python of ours. Where a graph could not be recorded, because a value is fetched from the device, it raises too.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch as th
from environments import BOX, CONTINUOUS, RandomEnv
from stable_baselines3.common.logger import Logger
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_ac_ext import DDPGX, SACX, TD3X
from sb3_ac_ext.common.capture import WARM_UP, Capture
from sb3_ac_ext.common.means import TensorMeans
from sb3_ac_ext.common.typing import Transitions


class Tape(TorchDispatchMode):
    """Operations on tensors that can be done again."""

    made: int = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).made += 1
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.undo: list[tuple[th.Tensor, th.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "_local_scalar_dense" in str(func):
            raise RuntimeError("a value was fetched from the device")
        arguments = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in arguments:
                written = arguments[argument.name]
                for tensor in written if isinstance(written, (list, tuple)) else [written]:
                    self.undo.append((tensor, tensor.clone()))
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def record(self, function: Callable[[], None]) -> None:
        state = th.get_rng_state()
        try:
            with self:
                function()
        finally:
            th.set_rng_state(state)
            for tensor, before in reversed(self.undo):  # as a graph, which does nothing while it is recorded
                tensor.copy_(before)

    def replay(self) -> None:
        with th.no_grad():
            for func, args, kwargs, recorded in self.calls:
                result = func(*args, **kwargs)
                pairs = zip(*((x if isinstance(x, (list, tuple)) else [x]) for x in (recorded, result)), strict=True)
                for place, value in pairs:
                    if isinstance(place, th.Tensor) and place.data_ptr() != value.data_ptr():
                        place.detach().copy_(value)


def make(recorded: bool, cls: type[TD3X] | type[DDPGX] | type[SACX] = TD3X, **kwargs: Any) -> Any:
    own = {"policy_kwargs": {"net_arch": [16, 16]}, "seed": 0, "learning_starts": 10, "batch_size": 8, "buffer_size": 200}
    model: Any = cls("MlpPolicy", RandomEnv(BOX, CONTINUOUS), **{**own, **kwargs})
    model.set_logger(Logger(None, []))
    if recorded:
        model._capture_obstacle = lambda ordinary: "not flat" if ordinary else None
        model._capture._recording = Tape
    return model


def parameters(model: Any) -> th.Tensor:
    return th.cat([value.flatten() for value in model.policy.state_dict().values()]).clone()


@pytest.fixture(autouse=True)
def no_tapes_yet() -> None:
    Tape.made = 0


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
        (change_optimizer_state, True),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_changes_reach_recorded_updates(change: Callable[[TD3X], None], records_again: bool) -> None:
    results = []
    for recorded in (True, False):
        model = make(recorded).learn(40)
        model.train(8, 8)
        before = Tape.made
        change(model)
        model.train(20, 8)
        assert Tape.made - before == (2 if records_again and recorded else 0)
        results.append(parameters(model))
    th.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_a_batch_of_another_size_is_another_recording() -> None:
    results = []
    for recorded in (True, False):
        model = make(recorded).learn(40)
        before = Tape.made
        for batch_size in (8, 5, 8, 5):
            model.train(2 * WARM_UP, batch_size)
        assert Tape.made - before == (2 if recorded else 0)
        results.append(parameters(model))
    th.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_what_cannot_be_recorded_goes_on_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for recorded in (True, False):
        model = make(recorded)
        original = model._actor_loss

        def fetching(batch: Transitions, original: Any = original) -> th.Tensor:
            loss = original(batch)
            assert loss.item() == loss.item()
            return loss

        model._actor_loss = fetching
        if recorded:
            with pytest.warns(UserWarning, match="recording failed: a value was fetched from the device"):
                model.learn(40)
            assert "fetched" in str(model._capture.obstacle)
        else:
            model.learn(40)
        results.append(parameters(model))
    th.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_dicts_of_observations_are_copied() -> None:
    means, seen = TensorMeans(), []

    def update(batch: Transitions) -> None:
        seen.append(batch.observations["a"])  # type: ignore[call-overload]
        means.add("a", batch.observations["a"].sum())  # type: ignore[call-overload]

    capture = Capture(means, Tape)
    for step in range(WARM_UP + 3):
        observations = {"a": th.full((2, 1), float(step))}
        batch = Transitions(observations, th.zeros(2, 1), observations, th.zeros(2, 1), th.zeros(2, 1), 0.9)
        capture.run("update", update, batch)
    assert len(seen) == WARM_UP + 1
    assert len({tensor.data_ptr() for tensor in seen}) == 1
    assert means.read() == {"a": pytest.approx(2 * sum(range(WARM_UP + 3)) / (WARM_UP + 3))}
    assert means.read() == {}


def test_means_start_again_when_they_are_read() -> None:
    means = TensorMeans()
    for values in ((1.0, 2.0, 6.0), (10.0,)):
        for value in values:
            means.add("a", th.tensor(value))
        means.add("b", th.tensor(-1.0))
        assert means.read() == {"a": sum(values) / len(values), "b": -1.0}
    assert means.read() == {}
