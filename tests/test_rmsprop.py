"""RMSProp with eps inside of the root: numbers of the paper's equations, TensorFlow's variant, its state, what it refuses."""

import copy
import pickle
from typing import Any

import pytest
import torch as th
from batches import engine_on_and_off
from stable_baselines3.common.sb2_compat.rmsprop_tf_like import RMSpropTFLike

from sb3_ac_ext.base.rmsprop import RMSprop
from sb3_ac_ext.engine import Engine, Network


def descended(gradients: list[float], **options: Any) -> tuple[float, float]:
    """theta and g after steps from theta = 1 with a rate of 0.01."""
    theta = th.ones((), dtype=th.float64, requires_grad=True)
    optimizer = RMSprop([theta], 0.01, **options)
    for gradient in gradients:
        theta.grad = th.tensor(gradient, dtype=th.float64)
        optimizer.step()
    return theta.item(), optimizer.state[theta]["square_avg"].item()


@pytest.mark.parametrize(
    ("gradients", "options", "theta", "square"),
    [
        ([1, -2], {"eps": 0.1, "start": 0.0}, 1.02150587, 0.0499),
        ([1, -2], {"eps": 0.1, "start": 1.0}, 1.00927979, 1.03),
        ([1], {"eps": 0.1, "start": 0.0}, 1 - 0.03015113, 0.01),
        ([5], {"eps": 0.1, "start": 0.0}, 1 - 0.08451543, 0.25),
        ([1], {"eps": 1e-5, "start": 0.0}, 1 - 0.09995004, 0.01),
        ([5], {"eps": 1e-5, "start": 0.0}, 1 - 0.099998, 0.25),
        ([4], {"eps": 1e-5, "start": 0.0, "alpha": 0.0}, 1 - 0.01 * 4 / (16 + 1e-5) ** 0.5, 16.0),
    ],
)
def test_numbers(gradients: list[float], options: dict[str, Any], theta: float, square: float) -> None:
    assert descended(gradients, **options) == pytest.approx((theta, square), abs=1e-8)


class Descent:
    """Steps of two parameters of which the second has a gradient now and then, by the engine or without."""

    def __init__(self, cls: Any, engine: bool, **options: Any) -> None:
        th.manual_seed(0)
        self.theta = [th.randn(2, 3, dtype=th.float64, requires_grad=True), th.randn(3, dtype=th.float64, requires_grad=True)]
        self.optimizer = cls(self.theta, lr=0.05, alpha=0.9, eps=1e-3, **options)
        self.rate = 0.05
        self.engine = Engine(self, lambda: {"theta": Network(None, self.optimizer, rate=self.rate)}, enabled=engine)

    def step(self, number: int) -> None:
        self.engine.begin()
        self.engine.run(self._update, (th.full((), float(number), dtype=th.float64),), number % 3 == 0)
        self.engine.end()

    def _update(self, batch: tuple[th.Tensor], both: bool) -> None:
        loss = ((self.theta[0] - batch[0].sin()) ** 2).sum()
        self.engine.minimise(loss + (self.theta[1] ** 3).sum() if both else loss, "theta")


@engine_on_and_off
def test_with_start_1_it_is_tensorflows(engine: bool) -> None:
    ours, theirs = Descent(RMSprop, engine), Descent(RMSpropTFLike, engine=False)
    for number in range(15):
        for one in (ours, theirs):
            one.rate = 0.05 / (1 + number)
            one.step(number)
        th.testing.assert_close(ours.theta, theirs.theta, rtol=0, atol=1e-12)
    assert ("replayed" in ours.engine.report().values()) is engine


def test_state_is_saved_and_loaded() -> None:
    ours = Descent(RMSprop, engine=True, start=0.0)
    for number in range(7):
        ours.step(number)
    other = Descent(RMSprop, engine=True, start=0.5)
    with th.no_grad():
        for mine, its in zip(other.theta, ours.theta, strict=True):
            mine.copy_(its)
    other.optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
    for number in range(7, 12):
        for one in (ours, other):
            one.step(number)
    th.testing.assert_close(other.theta, ours.theta, rtol=0, atol=0)


def test_copies_and_groups() -> None:
    """A group that comes later has its own start, and its own rate in ordinary steps."""
    parameters = [th.ones(2, requires_grad=True) for _ in range(2)]
    optimizer = RMSprop(parameters[:1], 0.1, eps=1.0, start=0.0)
    optimizer.add_param_group({"params": parameters[1:], "lr": 0.2, "start": 1.0})
    for made in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        groups = [group["params"][0] for group in made.param_groups]
        for parameter in groups:
            parameter.grad = th.full((2,), 2.0)
        made.step()
        squares = [0.01 * 4, 0.99 + 0.01 * 4]
        for parameter, square, rate in zip(groups, squares, (0.1, 0.2), strict=True):
            th.testing.assert_close(parameter.detach(), th.full((2,), 1 - rate * 2 / (square + 1) ** 0.5))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": 1.0}, ValueError, r"alpha must be a number in \[0, 1\), got 1.0"),
        ({"eps": 0.0}, ValueError, "eps must be a number >= 1e-12, got 0.0"),
        ({"start": -1.0}, ValueError, "start must be a number >= 0, got -1.0"),
        ({"lr": "fast"}, TypeError, "lr must be a number >= 0, got 'fast' of type str"),
    ],
)
def test_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RMSprop([th.ones(1, requires_grad=True)], **{"lr": 0.1, **options})
