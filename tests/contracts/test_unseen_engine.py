"""
Nobody can tell that the engine is there: not by memory that grows, not by what is set in the process, not from another thread,
and not by differentiating its networks, which are PyTorch modules like any other.
"""

import copy
import gc
import random
import resource
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from environments import BOX, CONTINUOUS, RandomEnv
from gymnasium.wrappers import TimeLimit
from models import (
    BY_SEGMENTS,
    CRITICS,
    EVERY,
    OFF_POLICY,
    ON_POLICY,
    SB3,
    VARIANTS,
    WITH_ALPHA,
    environment,
    policy_of,
    rows,
    small_model,
    taking,
)
from parallel_environments import Crowd
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from subjects import AFTER, BEFORE, WARM_UP, numbers
from torch import nn
from torch.distributions import Distribution, Normal

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # by PyTorch's own jvp

ATOL = 1e-5


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """What is imported where something is done for the first time may set a filter of warnings."""
    small_model("td3x").learn(30)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """What a failing test leaves set would make others fail."""
    yield
    Distribution.set_default_validate_args(True)


# There is something to be seen


def drawn_by_default(row: str, variant: str) -> bool:
    return row in OFF_POLICY or random.Random(f"{row} {variant}").random() < 1 / 2


@pytest.mark.parametrize(
    ("row", "variant"),
    [
        pytest.param(row, name, marks=[] if drawn_by_default(row, name) else pytest.mark.slow)
        for name, variant in VARIANTS.items()
        for row in variant.rows
        if row != "reinforce" and name not in ("looks at values", "counts", "linear")
    ],
)
def test_updates_are_replayed(row: str, variant: str) -> None:
    """
    Otherwise the other tests of this folder show nothing; on-policy half of them by default.

    Episodes, of which REINFORCE learns, have any length; the linear OPAC learns without the engine.
    """
    model = small_model(row, variant).learn(WARM_UP + BEFORE)
    assert_replayed(model)


def assert_replayed(model: Any) -> None:
    """Each update function with some options; a step that is done once, as K-FAC's cold one, cannot be."""
    others = ("act", "sample", "replay")
    report = {name.removeprefix("actor "): how for name, how in model.engine_report().items()}
    report = {name: how for name, how in report.items() if not name.startswith(others)}
    assert set(report.values()) <= {"replayed", "ordinary: it has run once"}
    functions = [name.partition("(")[0] for name, how in report.items() if how == "replayed"]
    assert {*functions} == {name.partition("(")[0] for name in report} != set()


@rows(row for row in EVERY if row != "reinforce")
def test_updates_are_replayed_again_after_a_change(row: str) -> None:
    """Which nobody sees by what is learned."""
    model = small_model(row).learn(WARM_UP + BEFORE)
    for parameter in model.policy.parameters():
        parameter.data = parameter.data.clone()
    model.learn(AFTER, reset_num_timesteps=False)
    assert_replayed(model)


@rows(row for row in ON_POLICY if row != "ac")
def test_actions_of_rollouts_are_replayed(row: str) -> None:
    """AC's are drawn in its updates."""
    report = small_model(row).learn(WARM_UP + BEFORE).engine_report()
    assert report["actor sample" if row in BY_SEGMENTS else "sample_actions"] == "replayed"


@rows()
def test_engine_switched_off_replays_nothing(row: str) -> None:
    model = small_model(row, engine=False).learn(30)
    assert "replayed" not in model.engine_report().values()


# Memory


def live_bytes() -> int:
    """Of all tensors that Python can reach, but those without memory that compilers make."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (th.Tensor, nn.Parameter) and found.layout is th.strided]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


class Annealing(BaseCallback):
    """Other numbers in every step, and what is alive at some of them."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        super().__init__()
        self.steps = steps
        self.alive: list[tuple[int, int]] = []

    def _on_step(self) -> bool:
        self.model.gamma = 0.9 + 1e-4 * self.n_calls
        name = "tau" if hasattr(self.model, "tau") else "ent_coef"
        setattr(self.model, name, np.float32(0.1 - 1e-4 * self.n_calls))
        if self.n_calls in self.steps:
            self.alive.append((live_bytes(), len(gc.get_objects())))
        return True


@rows(by_default=("td3x", "sacx", "ppox", "ac", "maddpg", "a3c"))
def test_annealed_numbers_take_no_memory(row: str) -> None:
    """Eighty values; a recording for each would hold a hundred tensors each."""
    callback = Annealing((50, 130))
    small_model(row).learn(130, callback=callback)
    (bytes_before, objects_before), (bytes_after, objects_after) = callback.alive
    assert bytes_after - bytes_before < 30_000
    assert objects_after - objects_before < 1_200


@rows((*CRITICS, "ppox"), by_default=("td3x", "ppox"))
def test_a_thousand_batch_sizes_take_no_memory(row: str) -> None:
    """Kept for each of them, what one layer of 512 gives would be a gigabyte."""
    model = small_model(row, policy_kwargs={"net_arch": [512]})
    observations = np.zeros((1000, *model.observation_space.shape), np.float32)
    model.predict(observations)
    before = resident_bytes(), live_bytes()
    for rows_of_the_batch in range(1, 1001):
        model.predict(observations[:rows_of_the_batch], deterministic=True)
    assert resident_bytes() - before[0] < 50_000_000
    assert live_bytes() - before[1] < 20_000_000


@rows(OFF_POLICY, by_default=("td3x", "maddpg"))
def test_sizes_of_updates_take_bounded_memory(row: str) -> None:
    """Thirty sizes, each often enough to be recorded; kept all, they would take some thirty times what one takes."""
    model = small_model(row).learn(12)
    before = live_bytes()
    model.train(4, batch_size=60)
    one = max(live_bytes() - before, 30_000)
    for size in range(45, 75):
        model.train(4, batch_size=size)
    assert live_bytes() - before < 20 * one


class Uneven(RandomEnv):
    """Its episodes have any length."""

    def reset(self, **kwargs: Any) -> Any:
        self.length = int(np.random.randint(3, 30))
        return super().reset(**kwargs)


@rows(taking("rollout_episodes"), by_default=("trpox", "reinforce"))
def test_episodes_of_any_length_take_bounded_memory(row: str) -> None:
    """Kept for each of twenty sizes, what one layer of 256 gives would be half a megabyte."""
    own = {"rollout": "episodes", "n_steps": 30} if row in taking("rollout") else {}
    own |= {"batch_size": 30} if row in taking("batch_size") else {}
    env = TimeLimit(Uneven(BOX, CONTINUOUS), 30)
    model = small_model(row, env=env, policy_kwargs={"net_arch": [256]}, **own)
    model.learn(120)
    before = live_bytes()
    model.learn(400, reset_num_timesteps=False)
    assert live_bytes() - before < 200_000


@rows()
def test_nothing_keeps_a_model_that_is_gone(row: str) -> None:
    model = small_model(row).learn(40)
    model.predict(np.zeros(model.observation_space.shape, np.float32))
    gone = [weakref.ref(model), weakref.ref(model.policy), *map(weakref.ref, model.policy.parameters())]
    del model
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)


# Threads, and what is set in the whole process


def process_state() -> dict[str, Any]:
    """What PyTorch, NumPy and Python have for everybody."""
    hooks = [name for name in vars(nn.modules.module) if name.startswith("_global_") and name.endswith("hooks")]
    return {
        "validates": Distribution._validate_args,
        "grad mode": (th.is_grad_enabled(), th.is_inference_mode_enabled()),
        "threads": (th.get_num_threads(), th.get_num_interop_threads()),
        "precision": (
            th.get_float32_matmul_precision(),
            th.backends.mkldnn.matmul.fp32_precision,
            th.backends.mkldnn.conv.fp32_precision,
            th.backends.fp32_precision,
            th.backends.mkldnn.enabled,
        ),
        "dtype": th.get_default_dtype(),
        "autocast": (th.is_autocast_enabled("cpu"), th.is_autocast_cache_enabled()),
        "autograd": (th.is_anomaly_enabled(), th.are_deterministic_algorithms_enabled()),
        "modes": (th._C._len_torch_function_stack(), th._C._len_torch_dispatch_stack()),
        "hooks": {name: len(getattr(nn.modules.module, name)) for name in hooks},
        "numpy": np.geterr(),
        "warnings": len(warnings.filters),
        "interpreter": (sys.getswitchinterval(), sys.getrecursionlimit(), threading.active_count()),
        "collector": (gc.isenabled(), gc.get_threshold()),
        "nan is refused": refuses_nan(),
    }


def refuses_nan() -> bool:
    try:
        Normal(th.tensor(float("nan")), 1.0)
    except ValueError:
        return True
    return False


def without_global_draws(row: str, seed: int) -> Any:
    """A model all of whose random numbers are its own, so that a thread beside it does not change them."""
    env = Crowd(2) if row == "maddpg" else environment(row)
    if row == "maddpg":
        env.choice = copy.deepcopy(env.choice)
    noiseless = {} if row in ("ddpgx", "d4pg") else {"target_policy_noise": 0.0}
    model = small_model(row, env=env, seed=seed, **noiseless)
    buffer, generator = model.replay_buffer, np.random.default_rng(seed)

    def sample(self: Any, batch_size: int, env: Any = None) -> Any:
        return self._get_samples(generator.integers(0, self.size(), batch_size), env=env)

    buffer.__class__ = type("OwnDraws", (type(buffer),), {"sample": sample})
    return model


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """Each in a thread; the interpreter changes between them as often as it can."""
    results: list[Any] = [None] * len(functions)
    barrier = threading.Barrier(len(functions))

    def run(i: int) -> None:
        barrier.wait()
        try:
            results[i] = functions[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@rows(tuple(row for row in OFF_POLICY if row not in (*WITH_ALPHA, "opac")))
def test_trainings_in_threads_give_what_they_give_alone(row: str) -> None:
    """Not SACX and OPAC, which draw their actions from PyTorch's only generator."""
    lengths = (60, 45, 52)
    alone = [numbers(without_global_draws(row, seed).learn(length)) for seed, length in enumerate(lengths)]
    models = [without_global_draws(row, seed) for seed in range(len(lengths))]
    before = process_state()
    at_once(*(lambda model=model, length=length: model.learn(length) for model, length in zip(models, lengths, strict=True)))
    assert process_state() == before
    for model, expected in zip(models, alone, strict=True):
        th.testing.assert_close(numbers(model), expected, rtol=0, atol=1e-6)


@rows()
def test_trainings_in_threads_leave_the_process_as_it_was(row: str) -> None:
    models = [small_model(row, seed=seed) for seed in range(3)]
    before = process_state()
    at_once(*(lambda model=model, i=i: model.learn(40 + 7 * i) for i, model in enumerate(models)))
    assert process_state() == before
    assert all(bool(th.isfinite(numbers(model)).all()) for model in models)


@rows()
def test_training_leaves_the_process_as_it_was(row: str) -> None:
    before = process_state()
    model = small_model(row).learn(40)
    model.predict(np.zeros(model.observation_space.shape, np.float32))
    assert process_state() == before


@rows()
def test_an_error_leaves_the_process_as_it_was(row: str) -> None:
    """Raised inside an update, where a recording is made and where one is replayed."""
    before = process_state()
    for step in (11, 12, 13, 14, 30):
        model = small_model(row).learn(step)
        critic = model.critic if row in OFF_POLICY else policy_of(model).value_net
        critic = critic.qf0 if row == "d4pg" else critic  # which is asked for more than its values
        original = critic.forward

        def forward(*args: Any, original: Any = original) -> Any:
            return pytest.fail("asked") if th.is_grad_enabled() else original(*args)

        critic.forward = forward
        with pytest.raises(pytest.fail.Exception, match="asked"):
            model.learn(8, reset_num_timesteps=False)
        assert process_state() == before


ALARM: list[None] = []
"""Shortened by every differentiated forward pass; the last one is interrupted."""


class Alarmed(nn.Tanh):
    """As if somebody pressed Ctrl+C."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        if ALARM and th.is_grad_enabled():
            ALARM.pop()
            if not ALARM:
                raise KeyboardInterrupt
        return super().forward(x)


@rows()
@pytest.mark.parametrize("calls", [1, 3])
def test_interrupted_trainings_go_on(row: str, calls: int) -> None:
    """Also where a recording was being made, or looked over."""
    before = process_state()
    model = small_model(row, policy_kwargs={"activation_fn": Alarmed})
    ALARM.extend([None] * calls)
    with pytest.raises(KeyboardInterrupt):
        model.learn(30)
    assert process_state() == before
    moved = numbers(model) - numbers(model.learn(30))
    assert moved.isfinite().all()
    assert moved.abs().max() > 1e-3
    if row != "reinforce":
        assert_replayed(model)


@rows()
@pytest.mark.parametrize("size", [None, 3], ids=["one", "batch"])
def test_predictions_in_threads_are_each_callers_own(row: str, size: int | None) -> None:
    model = small_model(row).learn(30)
    shape = model.observation_space.shape if size is None else (size, *model.observation_space.shape)
    observations = [np.random.default_rng(i).uniform(-1, 1, shape).astype(np.float32) for i in range(4)]
    expected = [model.policy.predict(observation, deterministic=True)[0] for observation in observations]

    def ask(i: int) -> list[np.ndarray]:
        return [model.predict(observations[i], deterministic=True)[0] for _ in range(60)]

    answers = at_once(*(lambda i=i: ask(i) for i in range(4)))
    for own, wanted in zip(answers, expected, strict=True):
        for action in own:
            np.testing.assert_allclose(action, wanted, rtol=0, atol=1e-6)


@rows()
def test_actions_are_the_callers(row: str) -> None:
    """What was returned does not change with the next call, nor the model with what is written to it."""
    model = small_model(row).learn(30)
    zeros = np.zeros((2, *model.observation_space.shape), np.float32)
    first = model.predict(zeros, deterministic=True)[0]
    kept = first.copy()
    model.predict(zeros + 1, deterministic=True)
    np.testing.assert_array_equal(first, kept)
    first[:] = 7
    np.testing.assert_array_equal(model.predict(zeros, deterministic=True)[0], kept)


# Modes of PyTorch that users are in


@rows()
def test_first_calls_in_inference_mode(row: str) -> None:
    """What is allocated there must not be used by what is differentiated later."""
    trained = []
    for engine in (True, False):
        model = small_model(row, engine=engine)
        with th.inference_mode():
            for _ in range(10):
                model.predict(np.zeros(model.observation_space.shape, np.float32))
        model.set_random_seed(0)
        trained.append(numbers(model.learn(40)))
    th.testing.assert_close(*trained, rtol=0, atol=ATOL)


@rows(OFF_POLICY)
def test_autocast_around_some_of_the_updates(row: str) -> None:
    """
    From the same numbers each time, so that bfloat16 rounds the same ones.

    It changes an update by 1e-5 to 1e-3, a rounding error of float32 in all parameters one by 4e-7.
    """
    models = [small_model(row, engine=engine, learning_rate=1e-2).learn(30) for engine in (True, False)]
    fast, plain = models
    fast.replay_buffer.__dict__.update(copy.deepcopy(plain.replay_buffer.__dict__))
    moved = []
    for update in range(24):
        fast.set_parameters(copy.deepcopy(plain.get_parameters()))
        if getattr(plain, "log_ent_coef", None) is not None:
            fast.log_ent_coef.data.copy_(plain.log_ent_coef.data)
        before = numbers(plain)
        for model in models:
            th.manual_seed(update)
            np.random.seed(update)
            with th.autocast("cpu", th.bfloat16, enabled=update % 12 < 8):
                model.train(1, 8)
        moved.append((numbers(plain) - before).abs().max())
        th.testing.assert_close(numbers(fast), numbers(plain), rtol=0, atol=2e-6, msg=lambda text, i=update: f"{i}: {text}")
    assert min(moved) > 1e-3


class RootOfNothing(nn.Module):
    """0, whose derivative is not a number."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return x + (0 * x).sqrt()


@rows()
@pytest.mark.parametrize("engine", [True, False])
def test_anomaly_mode_names_the_operation(row: str, engine: bool) -> None:
    model = small_model(row, engine=engine).learn(30)
    for parent in list((model.critic if row in OFF_POLICY else model.policy).modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, (nn.ReLU, nn.Tanh)):
                setattr(parent, name, RootOfNothing())
    with warnings.catch_warnings(), th.autograd.set_detect_anomaly(True):
        warnings.simplefilter("ignore")  # PyTorch shows where the operation was called
        with pytest.raises(RuntimeError, match=r"Function '\w+Backward0' returned nan values"):
            model.learn(8, reset_num_timesteps=False)


# Gradients that users take


@cache
def trained_in_float64(row: str) -> Any:
    """Its second derivatives are not zero. One for all tests that only differentiate it."""
    model = small_model(row, policy_kwargs={"activation_fn": nn.Tanh}).learn(30)
    model.policy.double()
    return model


@pytest.fixture
def smooth_model(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """Gives `trained_in_float64`, and lets it be asked in float64."""

    def get(row: str) -> Any:
        model = trained_in_float64(row)
        request.getfixturevalue("double_precision")
        return model

    return get


def inputs(model: Any, n: int = 5) -> tuple[th.Tensor, th.Tensor]:
    generator = th.Generator().manual_seed(0)
    sizes = np.prod(model.observation_space.shape), np.prod(model.action_space.shape)
    return tuple(th.randn(n, int(size), generator=generator, dtype=th.float64) * 0.5 for size in sizes)  # type: ignore[return-value]


class Heads(nn.Module):
    """What an actor-critic policy makes of observations, as one module."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def features(self, obs: th.Tensor, of: int) -> th.Tensor:
        """Of the policy (0) or the values (1)."""
        features = self.policy.extract_features(obs)
        return features if self.policy.share_features_extractor else features[of]

    def mean(self, obs: th.Tensor) -> th.Tensor:
        """Of the actions; PyTorch's distributions look at values, which some transformations of functions do not allow."""
        return self.policy.action_net(self.policy.mlp_extractor.forward_actor(self.features(obs, 0)))

    def forward(self, obs: th.Tensor, actions: th.Tensor) -> tuple[th.Tensor, ...]:
        """V, how far actions are from their mean, and their advantages where a policy has them."""
        log_std = 0.0 if self.policy.squash_output else self.policy.log_std
        known = self.policy.predict_values(obs), (self.mean(obs) - actions).square() + log_std
        if not hasattr(self.policy, "advantage_net"):
            return known
        return *known, self.policy.advantages(self.policy.mlp_extractor.forward_critic(self.features(obs, 1)), actions)


def critic_of(model: Any) -> nn.Module:
    """A module of observations and actions with several outputs."""
    return model.critic if isinstance(model, OffPolicyAlgorithm) else Heads(policy_of(model))


def value(model: Any, parameters: dict[str, th.Tensor] | None, obs: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """The sum of all Q values, as a function of the critic's parameters."""
    critic = critic_of(model)
    parameters = dict(critic.named_parameters()) if parameters is None else parameters
    outputs = th.func.functional_call(critic, parameters, (obs, actions))
    return th.stack([output.sum() for output in outputs]).sum()


def action(model: Any, obs: th.Tensor) -> th.Tensor:
    """The greedy action."""
    if isinstance(model, OffPolicyAlgorithm):
        return model.policy._predict(obs, deterministic=True)
    return Heads(policy_of(model)).mean(obs)


def close(actual: th.Tensor, expected: th.Tensor, atol: float = 1e-10) -> None:
    th.testing.assert_close(actual, expected, rtol=0, atol=atol)
    assert expected.abs().max() > 1e-4  # there is something to differ in


@rows()
def test_func_grad_is_autograds(row: str, smooth_model: Any) -> None:
    model = smooth_model(row)
    obs, actions = inputs(model)
    parameters = {name: parameter.detach() for name, parameter in critic_of(model).named_parameters()}
    found = th.func.grad(lambda own: value(model, own, obs, actions))(parameters)
    expected = th.autograd.grad(value(model, None, obs, actions), list(critic_of(model).parameters()))
    for name, gradient in zip(parameters, expected, strict=True):
        close(found[name], gradient)


@rows()
def test_vmap_gives_a_gradient_for_each_sample(row: str, smooth_model: Any) -> None:
    model = smooth_model(row)
    obs, actions = inputs(model)
    parameters = {name: parameter.detach() for name, parameter in critic_of(model).named_parameters()}

    def of_one(own: dict[str, th.Tensor], o: th.Tensor, a: th.Tensor) -> th.Tensor:
        return value(model, own, o[None], a[None])

    found = th.func.vmap(th.func.grad(of_one), in_dims=(None, 0, 0))(parameters, obs, actions)
    for i in range(len(obs)):
        expected = th.autograd.grad(
            value(model, None, obs[i : i + 1], actions[i : i + 1]), list(critic_of(model).parameters())
        )
        for name, gradient in zip(parameters, expected, strict=True):
            close(found[name][i], gradient)


@rows()
def test_jvp_is_the_difference_quotient(row: str, smooth_model: Any) -> None:
    model = smooth_model(row)
    obs, actions = inputs(model)
    direction, h = th.ones_like(obs), 1e-6
    _, found = th.func.jvp(lambda o: action(model, o), (obs,), (direction,))
    with th.no_grad():
        expected = (action(model, obs + h * direction) - action(model, obs - h * direction)) / (2 * h)
    close(found, expected, 1e-8)
    _, found = th.func.jvp(lambda o: value(model, None, o, actions), (obs,), (direction,))
    with th.no_grad():
        expected = (value(model, None, obs + h, actions) - value(model, None, obs - h, actions)) / (2 * h)
    close(found, expected, 1e-7)


@rows()
def test_hessians_are_difference_quotients_of_gradients(row: str, smooth_model: Any) -> None:
    model = smooth_model(row)
    obs, actions = inputs(model, 1)

    def q(joint: th.Tensor) -> th.Tensor:
        return value(model, None, *joint.split((obs.shape[1], actions.shape[1]), dim=1))

    def first_action(joint: th.Tensor) -> th.Tensor:
        return action(model, joint)[0, 0]

    for function, at in ((q, th.cat([obs, actions], dim=1)), (first_action, obs)):
        found = th.autograd.functional.hessian(function, at)[0, :, 0]
        rows_of_it, h = [], 1e-5
        for i in range(at.shape[1]):
            ends = []
            for sign in (1, -1):
                x = at.clone()
                x[0, i] += sign * h
                x.requires_grad_()
                ends.append(th.autograd.grad(function(x), x)[0][0])
            rows_of_it.append((ends[0] - ends[1]) / (2 * h))
        close(found, th.stack(rows_of_it), 1e-7)
        close(th.func.hessian(function)(at)[0, :, 0], found)


@rows()
def test_gradient_penalties_reach_the_parameters(row: str, smooth_model: Any) -> None:
    model = copy.deepcopy(smooth_model(row))  # whose parameters are moved
    obs, actions = inputs(model)
    parameters = list(critic_of(model).parameters())

    def penalty() -> th.Tensor:
        a = actions.clone().requires_grad_()
        (gradient,) = th.autograd.grad(value(model, None, obs, a), a, create_graph=True)
        return (gradient.norm(dim=1) - 1).square().mean()

    found = th.autograd.grad(penalty(), parameters, allow_unused=True)
    generator, h = th.Generator().manual_seed(1), 1e-6
    direction = [th.randn(parameter.shape, generator=generator, dtype=parameter.dtype) for parameter in parameters]
    ends = []
    for sign in (1, -2):  # the second one goes back, and as far again
        with th.no_grad():
            for parameter, own in zip(parameters, direction, strict=True):
                parameter.add_(own, alpha=sign * h)
        ends.append(penalty().detach())
    slope = sum((own * gradient).sum() for own, gradient in zip(direction, found, strict=True) if gradient is not None)
    close(th.as_tensor(slope), (ends[0] - ends[1]) / (2 * h), 1e-6)


@rows()
@pytest.mark.parametrize("engine", [True, False], ids=["engine on", "engine off"])
def test_gradients_stay_visible(row: str, engine: bool) -> None:
    """In ``.grad``, the actor's as SB3 leaves them, and `backward` adds to them."""
    model, plain = small_model(row, engine=engine).learn(40), small_model(row, engine=False).learn(40)
    pairs = [*zip(model.policy.parameters(), plain.policy.parameters(), strict=True)]
    if row in SB3:
        theirs = small_model(SB3[row]).learn(40)
        networks = (model.actor, theirs.actor) if row in OFF_POLICY else (model.policy, theirs.policy)
        pairs += zip(*(network.parameters() for network in networks), strict=True)
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter, _ in pairs)
    for parameter, expected in pairs:
        assert (parameter.grad is None) == (expected.grad is None)
        if parameter.grad is not None:
            th.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-4)
    critic = critic_of(model)
    critic.zero_grad()
    sizes = int(np.prod(model.observation_space.shape)), int(np.prod(model.action_space.shape))
    for _ in range(2):
        once = [parameter.grad for parameter in critic.parameters()]
        once = [None if gradient is None else gradient.clone() for gradient in once]
        critic(*(th.ones(1, size) for size in sizes))[0].sum().backward()
    for gradient, parameter in zip(once, critic.parameters(), strict=True):
        if gradient is not None:
            th.testing.assert_close(parameter.grad, 2 * gradient)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in once)
