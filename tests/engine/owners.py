"""Owners of an engine that are as small as they can be, and what is seen of them."""

import copy
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch as th
import torch.nn.functional as F
from torch import nn

from sb3_ac_ext.engine import Engine, Network

Batch = tuple[th.Tensor, th.Tensor]
Values = dict[str, th.Tensor]
Loss = Callable[["Learner", Batch], th.Tensor]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


class Tied(nn.Module):
    """One weight used twice, and a parameter that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.unused = nn.Linear(3, 3), nn.Linear(3, 2), nn.Parameter(th.ones(4))
        self.again = nn.Linear(3, 3, bias=False)
        self.again.weight = self.first.weight

    def forward(self, x: th.Tensor) -> th.Tensor:
        result: th.Tensor = self.last(self.again(self.first(x).tanh()).tanh())
        return result


def squared_error(learner: "Learner", batch: Batch) -> th.Tensor:
    return F.mse_loss(learner.net(batch[0]), batch[1])


class Learner:
    """
    Fits a network, with a target that follows it.

    :param net: makes the network
    :param optimizer: makes its optimizer
    :param loss: of the network
    :param prepare: changes the network before the optimizer is made
    :param settings: of `Network`
    """

    def __init__(
        self,
        net: Callable[[], nn.Module] = mlp,
        optimizer: Callable[[Iterable[nn.Parameter]], th.optim.Optimizer] = th.optim.Adam,
        *,
        loss: Loss = squared_error,
        enabled: bool = True,
        dtype: th.dtype = th.float32,
        prepare: Callable[[nn.Module], Any] = lambda _: None,
        settings: Callable[[nn.Module], dict[str, Any]] = lambda _: {},
    ) -> None:
        th.manual_seed(0)
        self.net, self.dtype, self.loss = net().to(dtype), dtype, loss
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        prepare(self.net)
        self.optimizer = optimizer(self.net.parameters())
        self.rate, self.tau, self.scale = 1e-2, 0.25, 1.0
        self.settings = settings(self.net)
        self.enabled = enabled
        self.renew()

    def renew(self) -> None:
        """Another engine, which knows nothing."""
        self.engine = Engine(self, self.networks, enabled=self.enabled)

    def networks(self) -> Mapping[str, Network]:
        return {"net": Network(self.net, self.optimizer, self.target, self.rate, **self.settings)}

    def update(self, batch: Batch, delayed: bool = True) -> Values:
        loss = self.loss(self, batch)
        self.engine.minimise(loss, "net")
        if delayed:
            self.engine.follow("net", self.tau)
        return {"loss": loss}

    def train(self, steps: Iterable[int], *options: Any) -> dict[str, float]:
        """One update with the batch of each of these numbers, and what is logged of them."""
        self.engine.begin()
        for step in steps:
            self.engine.run(self.update, self.batch(step), *options)
        return self.engine.end()

    def batch(self, step: int) -> Batch:
        x, y = numbers(step, 5, 3), numbers(step + 1000, 5, 2)
        return x.to(self.dtype), y.to(self.dtype)

    def copy_from(self, other: "Learner") -> None:
        """The other's numbers, in this one's own memory."""
        self.net.load_state_dict(other.net.state_dict())
        self.target.load_state_dict(other.target.state_dict())
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))

    def state(self) -> dict[str, th.Tensor]:
        """Copies of everything that an update changes."""
        found = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        found |= {f"target.{name}": value for name, value in self.target.state_dict().items()}
        for i, own in self.optimizer.state_dict()["state"].items():
            found |= {f"{name}.{i}": value for name, value in own.items() if isinstance(value, th.Tensor)}
        return {
            name: value.detach().clone().to(th.float32 if name.startswith("step.") else value.dtype)
            for name, value in found.items()
        }


def assert_in_step(make: Callable[[bool], Learner], steps: int = 5, atol: float | None = 1e-6) -> Learner:
    """
    Train with the engine and without it, and compare everything after each update.

    :param make: a learner, given whether its engine is enabled
    :param atol: largest difference; None for the same bits
    :return: the learner with the engine
    """
    ours, theirs = make(True), make(False)
    for step in range(steps):
        logs = []
        for one in (ours, theirs):
            th.manual_seed(step)
            logs.append(one.train([step]))
        assert_same(logs[0], logs[1], None if atol is None else 10 * atol)
        assert_same(ours.state(), theirs.state(), atol)
    return ours


def numbers(seed: int, *shape: int, dtype: th.dtype = th.float32) -> th.Tensor:
    """Drawn without a look at the global generators."""
    return th.randn(*shape, generator=th.Generator().manual_seed(seed), dtype=dtype)


def random_state() -> tuple[Any, ...]:
    """Where all global generators are."""
    name, keys, position, *_ = np.random.get_state(legacy=True)
    return bytes(th.get_rng_state().numpy()), name, bytes(keys), position, random.getstate()


def seed_everything(seed: int) -> None:
    th.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def assert_same(values: Mapping[str, Any], expected: Mapping[str, Any], atol: float | None = None) -> None:
    """
    :param values: tensors or numbers
    :param atol: largest difference; None for the same bits
    """
    assert values.keys() == expected.keys()
    for name, value in values.items():
        value, wanted = th.as_tensor(value), th.as_tensor(expected[name])
        assert value.dtype == wanted.dtype, name
        if atol is None:
            assert th.equal(value, wanted), f"{name}: {value} is not {wanted}"
        else:
            th.testing.assert_close(
                value, wanted, rtol=0, atol=atol, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
            )
