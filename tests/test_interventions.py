"""Whatever is done to a model between updates, the fast paths go on as the ordinary ones do."""

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from environments import BOX, CONTINUOUS, RandomEnv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rl_zoo3.callbacks import ParallelTrainCallback, SaveVecNormalizeCallback
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.logger import Logger
from torch import nn

from sb3_ac_ext import DDPGX, PPOX, SACX, TD3X, TRPOX
from sb3_ac_ext.legacy.participants import is_passive

ALGORITHMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "td3x": (TD3X, {"learning_starts": 10, "buffer_size": 300}),
    "ddpgx": (DDPGX, {"learning_starts": 10, "buffer_size": 300}),
    "sacx": (SACX, {"learning_starts": 10, "buffer_size": 300}),
    "ppox": (PPOX, {"n_steps": 16, "n_epochs": 2}),
    "trpox": (TRPOX, {"n_steps": 16}),
}


class Subject:
    """A model and what has been done to it."""

    def __init__(self, algorithm: str, engine: bool) -> None:
        cls, kwargs = ALGORITHMS[algorithm]
        own = {"policy_kwargs": {"net_arch": [8, 8]}, "seed": 0, "batch_size": 8, "engine": engine}
        self.model = cls("MlpPolicy", RandomEnv(BOX, CONTINUOUS), **own, **kwargs)
        self.model.set_logger(Logger(None, []))
        self.hooks: list[Any] = []

    def actor(self) -> Any:
        """The layers of the policy."""
        if isinstance(self.model, (PPOX, TRPOX)):
            return self.model.policy.mlp_extractor.policy_net
        return self.model.actor.latent_pi if isinstance(self.model, SACX) else self.model.actor.mu

    def critic(self) -> Any:
        """The layers of a value."""
        on_policy = isinstance(self.model, (PPOX, TRPOX))
        return self.model.policy.mlp_extractor.value_net if on_policy else self.model.critic.qf0

    def optimizers(self) -> list[th.optim.Optimizer]:
        return list(self.model._optimizers().values())

    def train(self, seed: int, intervention: "Callable[[Subject], None] | None") -> th.Tensor:
        """Some updates after an intervention, from given random states; returns all parameters."""
        self.seed(seed)
        if intervention is not None:
            intervention(self)
        return self.learn(32)

    def seed(self, seed: int) -> None:
        """All random states."""
        np.random.seed(seed)
        th.manual_seed(seed)
        self.model.action_space.seed(seed)
        self.model.env.seed(seed)

    def learn(self, steps: int, callback: Any = None) -> th.Tensor:
        """Training from the first state of an episode; returns all parameters."""
        self.model._last_obs = None
        self.model.learn(steps, callback, reset_num_timesteps=False)
        return th.cat([value.detach().flatten() for value in self.model.policy.state_dict().values()])


def hook_on_a_layer(subject: Subject) -> None:
    subject.hooks.append(subject.critic()[0].register_forward_hook(lambda module, inputs, output: 0.9 * output))


def hook_on_a_gradient(subject: Subject) -> None:
    subject.hooks.append(subject.actor()[0].weight.register_hook(lambda grad: 0.5 * grad))


def hooks_gone(subject: Subject) -> None:
    while subject.hooks:
        subject.hooks.pop().remove()


def frozen(subject: Subject) -> None:
    subject.critic()[0].bias.requires_grad_(False)


def thawed(subject: Subject) -> None:
    subject.critic()[0].bias.requires_grad_(True)


def weights_loaded(subject: Subject) -> None:
    state = subject.model.policy.state_dict()
    subject.model.policy.load_state_dict({name: 0.9 * value for name, value in state.items()})


def everything_set(subject: Subject) -> None:
    subject.model.set_parameters(copy.deepcopy(subject.model.get_parameters()))


def optimizers_loaded(subject: Subject) -> None:
    for optimizer in subject.optimizers():
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def new_memory(subject: Subject) -> None:
    for parameter in subject.model.policy.parameters():
        parameter.data = parameter.data.clone()


def edited_in_place(subject: Subject) -> None:
    with th.no_grad():
        subject.actor()[0].weight.mul_(1.1)


def no_gradients(subject: Subject) -> None:
    for parameter in subject.model.policy.parameters():
        parameter.grad = None


def own_gradients(subject: Subject) -> None:
    subject.critic()(th.ones(2, subject.critic()[0].in_features)).sum().backward()


def other_layer(subject: Subject) -> None:
    layers = subject.actor()
    old, new = layers[0], nn.Linear(layers[0].in_features, layers[0].out_features)
    with th.no_grad():
        new.weight.copy_(old.weight).mul_(0.5)
        new.bias.copy_(old.bias)
    layers[0] = new
    replaced = {id(a): b for a, b in zip(old.parameters(), new.parameters(), strict=True)}
    for optimizer in subject.optimizers():
        group = optimizer.param_groups[0]
        group["params"] = [replaced.get(id(parameter), parameter) for parameter in group["params"]]
        for parameter in old.parameters():
            optimizer.state.pop(parameter, None)


def other_activation(subject: Subject) -> None:
    subject.critic()[1] = nn.Sigmoid()


def unknown_activation(subject: Subject) -> None:
    subject.critic()[1] = nn.GELU()


def other_gamma(subject: Subject) -> None:
    subject.model.gamma = 0.9


def other_tau(subject: Subject) -> None:
    subject.model.tau = 0.3


def other_batches(subject: Subject) -> None:
    subject.model.batch_size = 4


def other_rate(subject: Subject) -> None:
    subject.model.lr_schedule = lambda _: 1e-4


def other_betas(subject: Subject) -> None:
    for optimizer in subject.optimizers():
        optimizer.param_groups[0]["betas"] = (0.8, 0.99)


def other_decay(subject: Subject) -> None:
    for optimizer in subject.optimizers():
        optimizer.param_groups[0]["weight_decay"] = 0.01


def other_optimizer(subject: Subject) -> None:
    own = subject.model.policy if isinstance(subject.model, (PPOX, TRPOX)) else subject.model.actor
    parameters = own.optimizer.param_groups[0]["params"]
    own.optimizer = th.optim.RMSprop(parameters, lr=1e-3)


def saved_and_loaded(subject: Subject) -> None:
    hooks_gone(subject)
    file, old = io.BytesIO(), subject.model
    old.save(file)
    file.seek(0)
    if not all(isinstance(optimizer, th.optim.Adam) for optimizer in subject.optimizers()):
        return  # the file is for another optimizer than the one that a new model has
    subject.model = type(old).load(file, env=old.env, engine=old.engine)
    if hasattr(old, "replay_buffer"):
        subject.model.replay_buffer = old.replay_buffer
    subject.model.set_logger(Logger(None, []))


INTERVENTIONS: list[Callable[[Subject], None]] = [
    *(hook_on_a_layer, hook_on_a_gradient, hooks_gone, frozen, thawed, weights_loaded, everything_set, optimizers_loaded),
    *(new_memory, edited_in_place, no_gradients, own_gradients, other_layer, other_activation, unknown_activation),
    *(other_gamma, other_tau, other_batches, other_rate, other_betas, other_decay, other_optimizer, saved_and_loaded),
]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(INTERVENTIONS), min_size=3, max_size=5))
def test_updates_go_on_as_without_the_engine(algorithm: str, interventions: list[Callable[[Subject], None]]) -> None:
    subjects = [Subject(algorithm, engine) for engine in (True, False)]
    for step, intervention in enumerate([None, *interventions]):
        trained = [subject.train(step, intervention) for subject in subjects]
        th.testing.assert_close(*trained, rtol=0, atol=1e-4)


class Once(BaseCallback):
    """Does something to the model in the middle of its training."""

    def __init__(self, subject: Subject, intervention: Callable[[Subject], None]) -> None:
        super().__init__()
        self.subject, self.intervention = subject, intervention

    def _on_step(self) -> bool:
        if self.num_timesteps == 40:
            self.intervention(self.subject)
        return True


def as_function(callback: Once) -> Callable[..., bool]:
    def function(local: dict[str, Any], _: dict[str, Any]) -> bool:
        callback.num_timesteps = local["self"].num_timesteps
        return callback._on_step()

    return function


def evaluation(**kwargs: Any) -> EvalCallback:
    return EvalCallback(RandomEnv(BOX, CONTINUOUS), n_eval_episodes=1, eval_freq=20, verbose=0, warn=False, **kwargs)


WAYS: dict[str, Callable[[Once], Any]] = {
    "callback": lambda callback: callback,
    "function": as_function,
    "list": lambda callback: [evaluation(), callback],
    "list of functions": lambda callback: [CallbackList([callback])],
    "now and then": lambda callback: EveryNTimesteps(20, callback),
    "after an evaluation": lambda callback: evaluation(callback_after_eval=callback),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("intervention", [hook_on_a_layer, new_memory, other_layer, other_betas, other_tau])
def test_callbacks_are_followed_at_once(intervention: Callable[[Subject], None], way: str) -> None:
    subjects = [Subject("td3x", engine) for engine in (True, False)]
    trained = []
    for subject in subjects:
        subject.seed(0)
        trained.append(subject.learn(64, WAYS[way](Once(subject, intervention))))
    th.testing.assert_close(*trained, rtol=0, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["td3x", "ddpgx", "sacx"])
def test_nobody_looks_where_nobody_intervenes(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    for callback in (evaluation(), lambda local, _: True):
        model = Subject(algorithm, True).model
        look, count = model._choose_paths, []
        monkeypatch.setattr(type(model), "_choose_paths", lambda self, look=look, count=count: (count.append(1), look()))
        model.learn(100, callback=callback)
        monkeypatch.undo()
        looks.append(len(count))
        assert model.policy.training and model.actor.training  # as SB3 leaves it
    assert looks[1] == 90
    assert looks[0] < 20


def test_updates_from_python_are_in_training_mode_whenever_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    model, modes = Subject("sacx", True).model, []
    update = model._update

    def seen(self: Any, batch: Any, targets_too: bool) -> None:
        modes.append((targets_too, self.policy.training and self.actor.training))
        update(batch, targets_too)

    monkeypatch.setattr(SACX, "_update", seen)
    model.target_update_every = 40  # long after the others have been recorded
    model.learn(100)
    assert modes.count((True, True)) == 2
    assert all(training for _, training in modes)


def test_a_model_saved_by_a_callback_is_looked_at(tmp_path: Any) -> None:
    model = Subject("td3x", True).model
    model.learn(40, callback=CheckpointCallback(40, str(tmp_path)))
    loaded = TD3X.load(tmp_path / "rl_model_40_steps", env=model.env)
    assert not model._alone
    assert not loaded._alone


@pytest.mark.parametrize(
    ("callback", "alone"),
    [
        (None, True),
        ([], True),
        (evaluation(), True),
        ([evaluation(), CallbackList([ProgressBarCallback(), CheckpointCallback(10, "folder")])], True),
        (evaluation(callback_on_new_best=StopTrainingOnRewardThreshold(1.0)), True),
        (evaluation(callback_on_new_best=SaveVecNormalizeCallback(10, "folder")), True),
        (lambda local, _: True, False),
        ([None, lambda local, _: True], False),
        (type("Own", (EvalCallback,), {"__module__": "own"})(RandomEnv(BOX, CONTINUOUS)), False),
        (ParallelTrainCallback(), False),
    ],
)
def test_who_leaves_the_model_alone(callback: Any, alone: bool) -> None:
    assert is_passive(callback) is alone


def test_a_callback_with_a_replaced_method_may_do_anything() -> None:
    callback = evaluation()
    callback._on_step = lambda: True  # type: ignore[method-assign]  # which is the point
    assert not is_passive(callback)
