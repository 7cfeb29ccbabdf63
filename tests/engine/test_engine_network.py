"""Networks that are trained: their steps, targets and moments, recorded and as they stand, against PyTorch's own."""

import copy
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import pytest
import torch as th
import torch.nn.functional as F
from owners import Batch, Learner, Values, assert_in_step, assert_same, mlp, numbers
from stable_baselines3.common.utils import polyak_update
from torch import nn

from sb3_ac_ext.engine import Engine, Network
from sb3_ac_ext.engine import network as steps_of_networks

EPS = 1e-3
"""Of Adam: gradients that are 0 but for rounding hardly move a parameter."""


class Net(nn.Module):
    """Of features that may be shared, and of something else that is given."""

    def __init__(self, features: nn.Module, others: int, outputs: int) -> None:
        super().__init__()
        self.features, self.head = features, nn.Linear(4 + others, outputs)

    def forward(self, x: th.Tensor, *others: th.Tensor) -> th.Tensor:
        result: th.Tensor = self.head(th.cat([self.features(x).tanh(), *others], dim=1))
        return result.tanh() if not others else result


class Pair:
    """
    A critic and an actor.

    :param shared: whether both train the same features
    :param critic: settings of its `Network`
    :param actor: settings of its `Network`
    """

    def __init__(
        self,
        enabled: bool,
        *,
        shared: bool = False,
        optimizer: Callable[..., th.optim.Optimizer] = th.optim.Adam,
        critic: Mapping[str, Any] = {},
        actor: Mapping[str, Any] = {},
    ) -> None:
        th.manual_seed(0)
        features = nn.Linear(3, 4)
        self.critic = Net(features, 2, 1).double()
        self.actor = Net(features if shared else nn.Linear(3, 4), 0, 2).double()
        self.target = copy.deepcopy(self.critic)
        kwargs = {"eps": EPS} if optimizer in (th.optim.Adam, th.optim.RMSprop) else {"momentum": 0.9}
        self.optimizers = {
            "critic": optimizer(self.critic.parameters(), lr=1e-2, **kwargs),
            "actor": optimizer(self.actor.parameters(), lr=1e-2, **kwargs),
        }
        self.settings: dict[str, Mapping[str, Any]] = {"critic": critic, "actor": actor}
        self.engine = Engine(self, self.networks, enabled=enabled)

    def networks(self) -> dict[str, Network]:
        modules = {"critic": (self.critic, self.target), "actor": (self.actor, None)}
        return {
            name: Network(module, self.optimizers[name], target, 1e-2 if name == "critic" else 3e-2, **self.settings[name])
            for name, (module, target) in modules.items()
        }

    def critic_loss(self, x: th.Tensor, y: th.Tensor) -> th.Tensor:
        with th.no_grad():
            wanted = y + 0.9 * self.target(x, self.actor(x))
        return F.mse_loss(self.critic(x, self.actor(x).detach()), wanted)

    def alternate(self, batch: Batch) -> Values:
        """As deep deterministic policy gradients."""
        losses = {"critic_loss": self.critic_loss(*batch)}
        self.engine.minimise(losses["critic_loss"], "critic")
        losses["actor_loss"] = -self.critic(batch[0], self.actor(batch[0])).mean()
        self.engine.minimise(losses["actor_loss"], "actor")
        self.engine.follow("critic", 0.1)
        return losses

    def together(self, batch: Batch) -> Values:
        """One loss of both networks."""
        loss = self.critic(batch[0], self.actor(batch[0])).square().mean()
        self.engine.minimise(loss, "critic", "actor")
        return {"loss": loss}

    def apart(self, batch: Batch) -> Values:
        """Gradients first, then something with them, then the steps."""
        loss = self.critic(batch[0], self.actor(batch[0])).square().mean()
        self.engine.differentiate(loss, "actor", "critic")
        with th.no_grad():
            for parameter in self.critic.head.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(0.5)
        self.engine.step("critic")
        self.engine.step("actor")
        return {"loss": loss}

    def one_after_another(self, batch: Batch) -> Values:
        """Two steps of one network in an update."""
        first = self.critic_loss(*batch)
        self.engine.minimise(first, "critic")
        second = self.critic_loss(*batch)
        self.engine.minimise(second, "critic")
        self.engine.follow("critic", 0.1)
        return {"first": first, "second": second}

    def in_part(self, batch: Batch) -> Values:
        """A loss that a part of the network has no part in."""
        loss = self.critic.features(batch[0]).square().mean()
        self.engine.minimise(loss, "critic")
        return {"loss": loss}

    def not_at_all(self, batch: Batch) -> Values:
        """A loss that the network has no part in."""
        loss = batch[0].square().mean()
        self.engine.minimise(loss, "critic")
        return {"loss": loss}

    def penalty(self, batch: Batch) -> Values:
        """Of the critic's gradient."""
        x = batch[0].detach().requires_grad_()
        (slope,) = th.autograd.grad(self.critic(x, self.actor(x).detach()).sum(), x, create_graph=True)
        loss = (slope.norm(dim=1) - 1).square().mean()
        self.engine.minimise(loss, "critic")
        return {"loss": loss}

    def train(self, name: str, step: int) -> dict[str, float]:
        self.engine.begin()
        self.engine.run(
            getattr(self, name), (numbers(step, 5, 3, dtype=th.float64), numbers(100 + step, 5, 1, dtype=th.float64))
        )
        return self.engine.end()

    def state(self) -> Values:
        found = {
            f"{name}.{key}": v for name in ("critic", "actor", "target") for key, v in getattr(self, name).state_dict().items()
        }
        for name, optimizer in self.optimizers.items():
            for i, own in optimizer.state_dict()["state"].items():
                found |= {f"{name}.{key}.{i}": value for key, value in own.items() if isinstance(value, th.Tensor)}
        for name in ("critic", "actor"):
            for key, p in getattr(self, name).named_parameters():
                found[f"{name}.{key}.grad"] = th.zeros(()) if p.grad is None else p.grad
        return {name: value.detach().clone() for name, value in found.items()}


UPDATES = ["alternate", "together", "apart", "one_after_another", "in_part", "not_at_all", "penalty"]
SETTINGS: dict[str, dict[str, Any]] = {
    "": {},
    "clipped": {"critic": {"max_grad_norm": 0.1}, "actor": {"max_grad_norm": 0.01}},
    "decayed": {"critic": {"weight_decay": 0.1, "max_grad_norm": 0.1}},
    "sgd": {"optimizer": th.optim.SGD},
    "rmsprop": {"optimizer": th.optim.RMSprop, "critic": {"max_grad_norm": 0.1}},
}


@pytest.mark.parametrize(
    ("update", "settings", "shared"),
    [
        *((update, settings, False) for update in UPDATES for settings in ("", "clipped")),
        *((update, settings, False) for update in ("alternate", "apart") for settings in ("decayed", "sgd", "rmsprop")),
        *((update, settings, True) for update in ("alternate", "together", "apart") for settings in SETTINGS),
    ],
)
def test_updates_of_two_networks(update: str, settings: str, shared: bool) -> None:
    ours, theirs = (Pair(enabled, shared=shared, **SETTINGS[settings]) for enabled in (True, False))
    for step in range(6):
        logs = [one.train(update, step) for one in (ours, theirs)]
        assert logs[0] == pytest.approx(logs[1], rel=1e-9, abs=1e-10)
        assert_same(ours.state(), theirs.state(), 1e-10 * (step + 1))
    assert ours.engine.report() == {update: "replayed"}


def test_updates_that_change_about() -> None:
    """They share parameters, moments and gradients."""
    ours, theirs = (Pair(enabled, critic={"max_grad_norm": 0.1}) for enabled in (True, False))
    for step in range(24):
        update = UPDATES[(step * 5) % len(UPDATES)]
        logs = [one.train(update, step) for one in (ours, theirs)]
        assert logs[0] == pytest.approx(logs[1], rel=1e-7, abs=1e-8)
        assert_same(ours.state(), theirs.state(), 1e-8)
    assert set(ours.engine.report()) == set(UPDATES)


def test_a_step_is_pytorchs() -> None:
    """Without the engine nothing else is done than PyTorch and SB3 would, to the bit."""
    ours, theirs = Pair(False), Pair(False)
    for step in range(4):
        ours.train("alternate", step)
        x, y = numbers(step, 5, 3, dtype=th.float64), numbers(100 + step, 5, 1, dtype=th.float64)
        theirs.optimizers["critic"].zero_grad()
        theirs.critic_loss(x, y).backward()
        theirs.optimizers["critic"].step()
        loss = -theirs.critic(x, theirs.actor(x)).mean()
        theirs.optimizers["actor"].zero_grad()
        theirs.optimizers["actor"].param_groups[0]["lr"] = 3e-2
        loss.backward()
        theirs.optimizers["actor"].step()
        polyak_update(theirs.critic.parameters(), theirs.target.parameters(), 0.1)
        for name in ("critic", "actor", "target"):
            assert_same(getattr(ours, name).state_dict(), getattr(theirs, name).state_dict())


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_else_is_differentiated(enabled: bool) -> None:
    """The other networks are constants of a loss, whatever it depends on."""
    own = Pair(enabled)
    for step in range(4):
        own.train("in_part", step)
        assert all(p.grad is None for p in own.actor.parameters())
        assert own.critic.head.weight.grad is None
        assert own.critic.features.weight.grad is not None


def norm(tensors: Iterable[Any]) -> float:
    return th.cat([tensor.flatten() for tensor in tensors]).norm().item()


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("bound", [None, 1e-3, 1e6])
@pytest.mark.parametrize("apart", [False, True])
def test_norms_and_bounds(apart: bool, bound: float | None, enabled: bool) -> None:
    """The logged norm is that of all gradients before any is clipped; parts that are clipped apart have a bound each."""

    def parts(net: Any) -> list[list[nn.Parameter]]:
        return [[*net[0].parameters()], [*net[2].parameters()]] if apart else [[*net.parameters()]]

    own = Learner(
        enabled=enabled,
        dtype=th.float64,
        settings=lambda net: {"max_grad_norm": bound, "clipped": parts(net) if apart else None},
    )
    for step in range(5):
        parameters = [*own.net.parameters()]
        before = dict(zip(parameters, th.autograd.grad(own.loss(own, own.batch(step)), parameters), strict=True))
        assert own.train([step])["net_grad_norm"] == pytest.approx(norm(before.values()), rel=1e-9)
        for part in parts(own.net):
            expected = min(norm(before[p] for p in part), bound or float("inf"))
            assert norm(p.grad for p in part) == pytest.approx(expected, rel=1e-2 if bound == 1e-3 else 1e-9)


@pytest.mark.parametrize("enabled", [True, False])
def test_decay_is_of_weights_alone(enabled: bool) -> None:
    """And added to the gradient after it was clipped."""
    own = Learner(
        lambda: nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)),
        th.optim.SGD,
        enabled=enabled,
        dtype=th.float64,
        loss=lambda learner, batch: learner.net(batch[0]).sum() * 0,
        settings=lambda _: {"weight_decay": 0.5, "max_grad_norm": 1e-3},
    )
    own.rate = 0.1
    net: Any = own.net
    for step in range(4):
        before = {name: value.clone() for name, value in net.state_dict().items()}
        own.train([step])
        th.testing.assert_close(net[0].weight, before["0.weight"] * (1 - 0.1 * 0.5), rtol=1e-12, atol=0)
        for name in ("0.bias", "1.weight", "1.bias"):
            assert th.equal(net.state_dict()[name], before[name])


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("tau", [0.0, 0.005, 0.5, 1.0])
def test_targets_follow(tau: float, enabled: bool) -> None:
    own = Learner(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), enabled=enabled, dtype=th.float64
    )
    own.tau = tau
    for step in range(4):
        before = copy.deepcopy(own.target)
        own.train([step])
        for name, p in own.target.named_parameters():
            online = dict(own.net.named_parameters())[name]
            expected = tau * online + (1 - tau) * dict(before.named_parameters())[name]
            th.testing.assert_close(p, expected, rtol=1e-12, atol=1e-12)
        for key, value in own.target.named_buffers():  # SB3 copies these by itself
            assert th.equal(value, dict(before.named_buffers())[key])


def test_norms_of_parameters_that_became_nan() -> None:
    """They are computed where there is something to say."""
    own = Pair(True)
    own.engine.begin()
    assert own.engine.parameter_norms() == {}
    next(own.actor.parameters()).data.fill_(float("nan"))
    norms = own.engine.parameter_norms()
    assert th.tensor(norms["actor"]).isnan()
    expected = th.cat([p.flatten() for p in own.critic.parameters()]).norm().item()
    assert norms["critic"] == pytest.approx(expected, rel=1e-6)
    assert Engine(own, dict).parameter_norms() == {}


class Counting(th.optim.SGD):
    """Keeps something that is in no state."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=1e-2)
        self.steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for group in self.param_groups:
            group["lr"] /= self.steps
        return super().step(closure)


@pytest.mark.parametrize(
    "optimizer",
    [
        Counting,
        th.optim.Adamax,
        th.optim.NAdam,
        th.optim.RAdam,
        th.optim.Rprop,
        th.optim.ASGD,
        lambda p: th.optim.Adam(p, capturable=False, foreach=False, fused=False),
        lambda p: th.optim.Adam(p, fused=True),
    ],
    ids=["counting", "adamax", "nadam", "radam", "rprop", "asgd", "not fused", "fused"],
)
def test_optimizers_of_all_kinds(optimizer: Any) -> None:
    own = assert_in_step(lambda enabled: Learner(mlp, optimizer, dtype=th.float64, enabled=enabled), 6, 1e-10)
    assert getattr(own.optimizer, "steps", 6) == 6


def test_parameters_of_several_types() -> None:
    """Which have no memory in common."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(3, 2), nn.Parameter(th.ones(2, dtype=th.float64))

        def forward(self, x: th.Tensor) -> th.Tensor:
            result: th.Tensor = self.layer(x) * self.scale
            return result

    class Learns(Learner):
        def batch(self, step: int) -> Batch:
            return numbers(step, 5, 3), numbers(step + 1, 5, 2, dtype=th.float64)

    def make(enabled: bool) -> Learner:
        own = Learns(Mixed, enabled=enabled, settings=lambda _: {"max_grad_norm": 0.1})
        net: Any = own.net
        net.scale.data = net.scale.data.double()
        own.target = copy.deepcopy(net)
        own.optimizer = th.optim.Adam(net.parameters())
        return own

    assert assert_in_step(make).engine.report() == {"update": "replayed"}


def test_parameters_in_any_layout() -> None:
    """Transposed, and of images with the channels last."""

    def transpose(net: Any) -> None:
        net[0].weight.data = net[0].weight.data.t().contiguous().t()
        net[2].weight = nn.Parameter(numbers(0, 8, 2).t())

    def channels_last(net: Any) -> None:
        net.to(memory_format=th.channels_last)

    def images(learner: Learner, batch: Batch) -> th.Tensor:
        return learner.net(batch[0].reshape(1, 3, 5, 1)).square().mean()

    cases: list[Any] = [{"prepare": transpose}]
    cases.append({"net": lambda: nn.Conv2d(3, 4, (2, 1)), "prepare": channels_last, "loss": images})
    for kwargs in cases:
        own = assert_in_step(lambda enabled, kwargs=kwargs: Learner(**kwargs, enabled=enabled))  # type: ignore[misc]
        assert own.engine.report() == {"update": "replayed"}
        assert all(state["exp_avg"].stride() == p.stride() for p, state in own.optimizer.state.items())


@pytest.mark.parametrize("cls", [th.optim.Adam, th.optim.SGD])
def test_networks_without_anything_to_train(cls: Any) -> None:
    """A scalar parameter, one without elements, and none that is trained."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.nothing = nn.Parameter(th.ones(())), nn.Parameter(th.ones(0))

        def forward(self, x: th.Tensor) -> th.Tensor:
            return x[:, :2] * self.scale + self.nothing.sum()

    for prepare in (lambda net: None, lambda net: net.requires_grad_(False)):
        assert_in_step(lambda enabled, prepare=prepare: Learner(Small, cls, enabled=enabled, prepare=prepare))  # type: ignore[misc]


# Moments that vanish


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)], ids=str)
def test_moments_of_dead_weights_never_become_subnormal(betas: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight whose gradient is 0 from some step on; left alone, its moments stay subnormal for ever."""
    smallest = th.finfo(th.float32).smallest_normal
    subnormal, nets = [], []
    for flushed in (True, False):
        if not flushed:
            monkeypatch.setattr(steps_of_networks, "flush_subnormals", lambda *args: None)
        own = Learner(
            lambda: nn.Linear(2, 3),
            lambda parameters: th.optim.Adam(parameters, betas=betas),
            loss=lambda learner, batch: learner.net(batch[0]).square().sum(),
        )
        found = 0
        for step in range(1100):
            x = th.tensor([[1.0, 1e-3 * (step < 5)]])
            own.engine.begin()
            own.engine.run(own.update, (x, x), False)
            own.engine.end()
            for state in own.optimizer.state.values():
                for moment in (state["exp_avg"], state["exp_avg_sq"]):
                    found += int(((moment != 0) & (moment.abs() < smallest)).sum())
        subnormal.append(found)
        nets.append(own.net)
    assert subnormal[0] == 0 < subnormal[1]
    assert_same(nets[0].state_dict(), nets[1].state_dict())


@pytest.mark.parametrize(
    ("eps", "dtype", "kept"), [(1e-20, th.float32, True), (1e-8, th.float32, False), (1e-8, th.float64, True)]
)
def test_moments_are_kept_where_they_could_show(eps: float, dtype: th.dtype, kept: bool) -> None:
    own = Learner(optimizer=lambda parameters: th.optim.Adam(parameters, eps=eps), dtype=dtype)
    steps_of_networks.flush_subnormals(own.networks(), 0, 100_000)  # there is no state yet
    own.train([0])
    moments = [state["exp_avg"] for state in own.optimizer.state.values()]
    for moment in moments:
        moment.fill_(1e-33)
    steps_of_networks.flush_subnormals(own.engine.networks, 0, 100_000)
    assert all(bool((moment > 0).all()) is kept for moment in moments)


class Halves:
    """One optimizer for two layers, of which an update differentiates one."""

    def __init__(self, optimizer: Any, enabled: bool) -> None:
        th.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
        self.optimizer = optimizer(self.layers.parameters())
        self.engine = Engine(self, lambda: {"layers": Network(self.layers, self.optimizer, rate=1e-2)}, enabled=enabled)

    def update(self, batch: Batch, which: int) -> Values:
        loss = (self.layers[which](batch[0]) - batch[1]).square().mean()
        self.engine.minimise(loss, "layers")
        return {"loss": loss}


@pytest.mark.parametrize(
    "optimizer",
    [th.optim.Adam, th.optim.RMSprop, partial(th.optim.SGD, lr=1e-2, momentum=0.9)],
    ids=["adam", "rmsprop", "momentum"],
)
def test_what_has_no_gradient_is_not_stepped(optimizer: Any) -> None:
    """Neither by one that is left from another update, nor in what an optimizer counts."""
    ends = []
    for enabled in (True, False):
        owner = Halves(optimizer, enabled)
        generator = th.Generator().manual_seed(1)
        for which in (0, 0, 0, 1, 0, 1, 1, 0, 1, 1):
            batch = th.randn(4, 3, generator=generator), th.randn(4, 2, generator=generator)
            owner.engine.begin()
            owner.engine.run(owner.update, batch, which)
        states = [value for state in owner.optimizer.state.values() for value in state.values() if value is not None]
        ends.append([*owner.layers.parameters(), *states])
        assert set(owner.engine.report().values()) <= {"replayed"} or not enabled
    th.testing.assert_close(*ends, rtol=0, atol=1e-6)
