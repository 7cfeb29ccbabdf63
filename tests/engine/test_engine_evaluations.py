"""`Engine.evaluate`: functions that change nothing, from any thread, at any time, to the same bits."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch as th
from owners import Batch, Learner, Values, assert_same, numbers
from torch import nn

ENOUGH = 6
"""Calls after which a function is replayed."""


class Actor(Learner):
    """Acts with its network, and trains it."""

    def act(self, batch: tuple[th.Tensor], deterministic: bool = True) -> Values:
        mean = self.net(batch[0])
        return {"actions": mean if deterministic else mean + th.randn_like(mean), "mean": mean.mean()}

    def expected(self, observation: np.ndarray, deterministic: bool = True) -> dict[str, np.ndarray]:
        with th.no_grad():
            return {name: value.numpy() for name, value in self.act((th.as_tensor(observation),), deterministic).items()}


def observation(seed: int, rows: int = 1) -> np.ndarray:
    return numbers(seed, rows, 3).numpy()


def replayed(own: Actor, rows: int = 1, *options: Any) -> Actor:
    """After calls enough."""
    for i in range(ENOUGH):
        own.engine.evaluate(own.act, (observation(i, rows),), *options)
    return own


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """Each in a thread; the interpreter changes between them as often as it can."""
    barrier, interval = threading.Barrier(len(functions)), sys.getswitchinterval()

    def run(function: Callable[[], Any]) -> Any:
        barrier.wait()
        return function()

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(functions)) as pool:
            return [*pool.map(run, functions)]
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_the_same_bits_as_the_function(rows: int, dtype: Any) -> None:
    layers = [nn.Linear(3, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 2), nn.Tanh()]
    own = Actor(lambda: nn.Sequential(*layers), dtype=th.as_tensor(dtype(0)).dtype)
    answers = 0
    for i in range(10):
        given = observation(i, rows).astype(dtype)
        outputs = own.engine.evaluate(own.act, (given,))
        if outputs is not None:
            answers += 1
            for name, value in own.expected(given).items():
                np.testing.assert_array_equal(outputs[name], value)
                assert outputs[name].dtype == value.dtype == dtype and outputs[name].shape == value.shape
    assert answers >= 6
    assert own.engine.report() == {"act": "replayed"}


@pytest.mark.parametrize("rows", [1, 3])
def test_random_numbers_are_drawn_once(rows: int) -> None:
    """Whether it is recorded, replayed, or left to the caller."""
    own = Actor()
    for i in range(10):
        given = observation(i, rows)
        th.manual_seed(i)
        expected, after = own.expected(given, False), th.get_rng_state()
        th.manual_seed(i)
        outputs = own.engine.evaluate(own.act, (given,), False)
        if outputs is None:
            outputs = own.expected(given, False)
        assert th.equal(th.get_rng_state(), after)
        np.testing.assert_array_equal(outputs["actions"], expected["actions"])
    assert own.engine.report() == {"act(False)": "replayed"}


def test_what_is_returned_is_the_callers() -> None:
    own = replayed(Actor())
    first = own.engine.evaluate(own.act, (observation(0),))
    assert first is not None
    kept = {name: value.copy() for name, value in first.items()}
    second = own.engine.evaluate(own.act, (observation(1),))
    assert second is not None
    for name, value in kept.items():
        np.testing.assert_array_equal(first[name], value)
        first[name][...] = 7
    np.testing.assert_array_equal(second["actions"], own.expected(observation(1))["actions"])


@pytest.mark.parametrize("enabled", [True, False])
def test_a_function_that_is_not_recorded(enabled: bool) -> None:
    """As it is switched off, or hardly runs twice for batches of one kind."""
    own = Actor(enabled=enabled)
    assert [own.engine.evaluate(own.act, (observation(0, rows if enabled else 1),)) for rows in range(1, 40)] == [None] * 39
    assert own.engine.memory() == 0


def test_nothing_is_differentiated_or_logged() -> None:
    own = replayed(Actor())
    assert own.engine.end() == {}
    assert all(p.grad is None for p in own.net.parameters())
    before = own.state()
    own.engine.evaluate(own.act, (observation(0),))
    assert_same(own.state(), before)


@pytest.mark.parametrize("mode", [th.no_grad, th.enable_grad, th.inference_mode])
@pytest.mark.parametrize("first", [True, False])
def test_modes_of_the_caller(mode: Any, first: bool) -> None:
    own = Actor()
    for i in range(10):
        given = observation(i)
        if (i < 5) == first:
            with mode():
                outputs = own.engine.evaluate(own.act, (given,))
        else:
            outputs = own.engine.evaluate(own.act, (given,))
        if outputs is not None:
            np.testing.assert_array_equal(outputs["actions"], own.expected(given)["actions"])
    own.train(range(3))  # what was made in a mode does not hinder that


@pytest.mark.parametrize(
    "given",
    [np.asfortranarray, lambda x: np.repeat(x, 2, axis=0)[::2], lambda x: np.flip(x.copy(), 0)],
    ids=["by columns", "every second row", "backwards"],
)
def test_arrays_of_any_layout(given: Callable[[np.ndarray], np.ndarray]) -> None:
    """Or an error as PyTorch's, which takes no negative strides, where it is not replayed yet."""
    own = Actor()
    for i in range(10):
        try:
            outputs = own.engine.evaluate(own.act, (given(observation(i, 4)),))
        except ValueError as error:
            assert "negative" in str(error)
            continue
        if outputs is not None:
            np.testing.assert_array_equal(outputs["actions"], own.expected(np.array(given(observation(i, 4))))["actions"])


def test_weights_are_those_of_the_moment() -> None:
    own = replayed(Actor())
    for step in range(5):
        own.train([step])
        outputs = own.engine.evaluate(own.act, (observation(step),))
        assert outputs is not None
        np.testing.assert_array_equal(outputs["actions"], own.expected(observation(step))["actions"])
    own.net[0].weight.data = own.net[0].weight.data * 2  # type: ignore[index, operator]
    for i in range(3):
        outputs = own.engine.evaluate(own.act, (observation(i),))
        if outputs is not None:
            np.testing.assert_array_equal(outputs["actions"], own.expected(observation(i))["actions"])


# Threads


@pytest.mark.parametrize("warm", [True, False], ids=["replayed", "from the first call"])
@pytest.mark.parametrize("deterministic", [True, False])
def test_eight_threads(warm: bool, deterministic: bool) -> None:
    """Each caller gets the answer to its own question; with noise, one that is of the size of noise."""
    own = Actor()
    if warm:
        replayed(own, 2, deterministic)
    given = [observation(i, 2) + 100 * i for i in range(8)]
    expected = [own.expected(one)["actions"] for one in given]

    def ask(i: int) -> list[np.ndarray]:
        answers = [own.engine.evaluate(own.act, (given[i],), deterministic) for _ in range(40)]
        return [answer["actions"] for answer in answers if answer is not None]

    answers = at_once(*(lambda i=i: ask(i) for i in range(8)))
    for own_answers, wanted in zip(answers, expected, strict=True):
        for answer in own_answers:
            np.testing.assert_allclose(answer, wanted, rtol=0, atol=0 if deterministic else 8)
    assert sum(map(len, answers)) > (300 if warm else 8)


def test_threads_with_batches_of_all_sizes() -> None:
    """More sizes than are remembered."""
    own = Actor()

    def ask(i: int) -> int:
        answers = 0
        for j in range(60):
            given = observation(j, 1 + (7 * i + j) % 90)
            for _ in range(2):
                outputs = own.engine.evaluate(own.act, (given,))
                if outputs is not None:
                    answers += 1
                    np.testing.assert_allclose(outputs["actions"], own.expected(given)["actions"], rtol=0, atol=1e-6)
        return answers

    at_once(*(lambda i=i: ask(i) for i in range(8)))
    assert th._C._len_torch_dispatch_stack() == th._C._len_torch_function_stack() == 0
    assert type(own) is Actor


def test_threads_that_act_while_one_trains() -> None:
    """An action is computed with weights between two updates or within one, and no update is lost."""
    own, alone = Actor(), Actor()
    stop = threading.Event()

    def act() -> None:
        i = 0
        while not stop.is_set():
            i += 1
            own.engine.evaluate(own.act, (observation(i, 1 + i % 30),))

    def train() -> None:
        try:
            for step in range(30):
                own.train([step])
        finally:
            stop.set()

    at_once(train, act, act)
    for step in range(30):
        alone.train([step])
    assert_same(own.state(), alone.state(), 1e-6)


class Waiting(Actor):
    """Its evaluations in other threads wait inside for an update."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.go_on = threading.Event(), threading.Event()

    def act(self, batch: tuple[th.Tensor], deterministic: bool = True) -> Values:
        if threading.current_thread() is not threading.main_thread():
            self.inside.set()
            self.go_on.wait(10)
        return super().act(batch, deterministic)


def test_an_update_while_an_evaluation_is_recorded() -> None:
    """What the recording puts back to where it was is not what the update has done meanwhile."""
    own, alone = Waiting(), Actor()
    for one in (own, alone):
        one.train(range(3))

    def act() -> None:
        for i in range(ENOUGH):
            own.engine.evaluate(own.act, (observation(i),))

    thread = threading.Thread(target=act)
    own.engine.begin()
    own.engine.run(own.update, own.batch(3))
    thread.start()
    assert own.inside.wait(10)
    done = threading.Timer(0.3, own.go_on.set)  # where the update waits for the recording
    done.start()
    own.engine.run(own.update, own.batch(4))
    own.go_on.set()
    thread.join(10)
    done.cancel()
    own.engine.end()
    alone.train([3, 4])
    assert_same(own.state(), alone.state(), 1e-6)


def test_two_owners_train_at_once() -> None:
    """Neither the recording of one nor its replays are disturbed by the other's."""

    def train(own: Learner) -> dict[str, th.Tensor]:
        for step in range(20):
            own.train([step])
        return own.state()

    together = at_once(*(lambda own=own: train(own) for own in (Learner(), Learner(optimizer=th.optim.AdamW))))
    for own, other in zip(together, (Learner(), Learner(optimizer=th.optim.AdamW)), strict=True):
        assert_same(own, train(other), 1e-6)


class Branching(Actor):
    """Acts in a way that has to be refused."""

    def act(self, batch: tuple[th.Tensor], deterministic: bool = True) -> Values:
        return {"actions": self.net(batch[0]) if float(batch[0].sum()) > 0 else -self.net(batch[0])}


def test_what_cannot_be_recorded_is_left_to_the_caller() -> None:
    own = Branching()
    assert [own.engine.evaluate(own.act, (observation(i),)) for i in range(30)] == [None] * 30
    assert "reads the values of a tensor" in own.engine.report()["act"]


class Checked(Actor):
    """With a distribution whose arguments are validated."""

    def act(self, batch: tuple[th.Tensor], deterministic: bool = True) -> Values:
        return {"actions": th.distributions.Normal(self.net(batch[0]), 1.0).log_prob(th.zeros(2))}


def test_what_distributions_refuse_is_left_to_the_caller() -> None:
    """Who gets their error from the function itself."""
    own = replayed(Checked())
    assert own.engine.report() == {"act": "replayed"}
    wrong = np.full((1, 3), np.nan, np.float32)
    assert own.engine.evaluate(own.act, (wrong,)) is None
    with pytest.raises(ValueError, match="Expected parameter loc"):
        own.act((th.as_tensor(wrong),))
    assert own.engine.evaluate(own.act, (observation(0),)) is not None


class Likely(Learner):
    """The more likely the targets, the better."""

    def update(self, batch: Batch, delayed: bool = True) -> Values:
        loss = -th.distributions.Normal(self.net(batch[0]), 1.0).log_prob(batch[1]).mean()
        self.engine.minimise(loss, "net")
        return {"loss": loss}


def test_updates_with_what_distributions_refuse() -> None:
    """The error is the function's, before anything has changed; where it is recorded, verified and replayed."""
    ours, theirs = Likely(), Likely(enabled=False)
    for wrong in (0, 1, 2, 5):
        for one in (ours, theirs):
            for step in range(6):
                x, y = one.batch(step)
                one.engine.begin()
                if step == wrong:
                    with pytest.raises(ValueError, match="Expected parameter loc"):
                        one.engine.run(one.update, (x * float("nan"), y))
                else:
                    one.engine.run(one.update, (x, y))
                one.engine.end()
        assert_same(ours.state(), theirs.state(), 1e-5)
    assert ours.engine.report() == {"update": "replayed"}
