"""Whatever changes after an update was recorded: the next one is as without the engine."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from owners import Batch, Learner, Values, assert_same, seed_everything
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from sb3_ac_ext.engine import Network
from sb3_ac_ext.engine.guard import Guard

BEFORE, AFTER = 2, 3
"""Updates before a change, enough for the next one to be replayed, and after it."""
EPS = 1e-2


def outcome(
    make: Callable[[bool], Learner], change: Callable[[Any], Any] | None, enabled: bool, replayed: bool = True
) -> tuple[Learner, list[Any]]:
    """
    Train, change something, and go on.

    :param replayed: whether the engine must replay updates before the change
    :return: the learner and what was seen after each update
    """
    seed_everything(0)
    own = make(enabled)
    seen: list[Any] = []
    with contextlib.ExitStack() as undo:
        for step in range(BEFORE + AFTER):
            if step == BEFORE:
                if enabled and replayed:
                    assert own.engine.report() == {"update": "replayed"}
                if change is not None:
                    undone = change(own)
                    if isinstance(undone, RemovableHandle | FunctionType):
                        undo.callback(getattr(undone, "remove", undone))
            try:
                log: Any = own.train([step])
            except Exception as error:
                log = {type(error): 1.0}
                own.engine.end()
            seen.append((log, own.state()))
    return own, seen


def assert_followed(
    make: Callable[[bool], Learner], change: Callable[[Any], Any], *, matters: bool = True, replayed: bool = True
) -> Learner:
    """
    The change acts as it does without the engine.

    :param matters: whether the change must make a difference there
    :param replayed: whether the engine must replay updates before the change
    :return: the learner with the engine
    """
    own, seen = outcome(make, change, enabled=True, replayed=replayed)
    _, expected = outcome(make, change, enabled=False)
    if matters:
        assert not all(map(same, expected, untouched(make))), "the change makes no difference"
    for mine, wanted in zip(seen, expected, strict=True):
        assert mine[0] == pytest.approx(wanted[0], rel=1e-9, abs=1e-9, nan_ok=True)
        assert_same(mine[1], wanted[1], 1e-9)
    return own


@cache
def untouched(make: Callable[[bool], Learner]) -> list[Any]:
    return outcome(make, None, enabled=False)[1]


def same(one: Any, other: Any) -> bool:
    if one[0] != other[0] or one[1].keys() != other[1].keys():
        return False
    return all(value.shape == other[1][name].shape and bool((value == other[1][name]).all()) for name, value in one[1].items())


# What the function reads from its owner


@dataclass
class Options:
    scale: float = 1.0


class Schedule:
    """Called by the function."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self) -> float:
        return self.value


class Reader(Learner):
    """Multiplies its loss by what it reads from itself."""

    by_class = 1.0

    def __init__(self, prepare: Callable[[Any], Any], read: Callable[[Any], Any], enabled: bool) -> None:
        super().__init__(enabled=enabled, dtype=th.float64)
        self.read = read
        prepare(self)

    def update(self, batch: Batch, delayed: bool = True) -> Values:
        loss = F.mse_loss(self.net(batch[0]), batch[1]) * self.read(self)
        self.engine.minimise(loss, "net")
        self.engine.follow("net", self.tau)
        return {"loss": loss}

    @property
    def by_property(self) -> float:
        return float(self.__dict__["hidden"])

    def factor(self) -> float:
        return 1.0


def sets(name: str, value: Any) -> Callable[[Any], None]:
    return lambda owner: setattr(owner, name, value)


def reads(name: str) -> Callable[[Any], Any]:
    return lambda owner: getattr(owner, name)


def number(old: Any, new: Any, read: Callable[[Any], Any] = float) -> tuple[Any, Any, Any]:
    """An attribute that is replaced."""
    return sets("x", old), lambda owner: read(owner.x), sets("x", new)


def inside(make: Callable[[], Any], read: Callable[[Any], Any], change: Callable[[Any], Any]) -> tuple[Any, Any, Any]:
    """An attribute that is changed in place."""
    return lambda owner: setattr(owner, "x", make()), lambda owner: read(owner.x), lambda owner: change(owner.x)


def plain(value: Any) -> Any:
    return value


def method_of_the_class(owner: Reader) -> Any:
    original = Reader.factor
    Reader.factor = lambda self: 2.0  # type: ignore[method-assign]
    return lambda: setattr(Reader, "factor", original)


def attribute_of_the_class(owner: Reader) -> Any:
    Reader.by_class = 2.0
    return lambda: setattr(Reader, "by_class", 1.0)


class Other(Reader):
    """Another class for a learner that has one."""

    def factor(self) -> float:
        return 3.0


READS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "float": number(1.0, 2.0, plain),
    "int that becomes a float": number(1, 1.5, plain),
    "bool": number(True, False, lambda x: 2.0 if x else 1.0),
    "text": number("a", "b", lambda x: 2.0 if x == "a" else 1.0),
    "none": number(None, 2.0, lambda x: x or 1.0),
    "nan": number(1.0, float("nan"), plain),
    "float32": number(np.float32(1), np.float32(2)),
    "array": number(np.array(1.0), np.array(2.0)),
    "array in place": inside(lambda: np.array([1.0, 2.0]), lambda x: float(x.sum()), lambda x: x.__setitem__(0, 5.0)),
    "array of no dimensions in place": inside(lambda: np.array(1.0), float, lambda x: x.__setitem__((), 5.0)),
    "array as a shared tensor": inside(lambda: np.ones(2), lambda x: th.as_tensor(x).sum(), lambda x: x.fill(5.0)),
    "tensor": number(th.tensor(1.0), th.tensor(2.0), plain),
    "tensor in place": inside(lambda: th.tensor(1.0), plain, lambda x: x.fill_(2.0)),
    "data of a tensor": inside(lambda: th.tensor(1.0), plain, lambda x: setattr(x, "data", th.tensor(2.0))),
    "parameter": inside(lambda: nn.Parameter(th.tensor(1.0)), plain, lambda x: x.data.fill_(2.0)),
    "tensor in a list in place": inside(lambda: [th.tensor(1.0)], lambda x: x[0], lambda x: x[0].fill_(2.0)),
    "tensor in a dict": inside(lambda: {"a": th.tensor(1.0)}, lambda x: x["a"], lambda x: x.update(a=th.tensor(2.0))),
    "tuple": number((1.0, 2.0), (1.0, 3.0), sum),
    "list": inside(lambda: [1.0, 2.0], sum, lambda x: x.append(3.0)),
    "list of lists": inside(lambda: [[1.0], [2.0]], lambda x: x[0][0], lambda x: x[0].__setitem__(0, 3.0)),
    "dict": inside(lambda: {"a": 1.0}, lambda x: x["a"], lambda x: x.update(a=2.0)),
    "key of a dict": inside(dict, lambda x: x.get("a", 1.0), lambda x: x.update(a=2.0)),
    "set": inside(lambda: {1.0}, sum, lambda x: x.add(2.0)),
    "object": inside(lambda: SimpleNamespace(scale=1.0), lambda x: x.scale, lambda x: setattr(x, "scale", 2.0)),
    "object in a list": inside(lambda: [Options()], lambda x: x[0].scale, lambda x: setattr(x[0], "scale", 2.0)),
    "object of an object": inside(
        lambda: SimpleNamespace(inner=Options()), lambda x: x.inner.scale, lambda x: setattr(x.inner, "scale", 2.0)
    ),
    "method of an object": (
        lambda owner: (setattr(owner, "y", Schedule(1.0)), setattr(owner, "x", owner.y.__call__)),
        lambda owner: owner.x(),
        lambda owner: setattr(owner.y, "value", 2.0),
    ),
    "function": number(lambda: 1.0, lambda: 2.0, lambda x: x()),
    "tensor of an object": inside(
        lambda: SimpleNamespace(x=th.tensor(1.0)), lambda x: x.x.sum(), lambda x: setattr(x, "x", th.tensor(2.0))
    ),
    "tensor of an object in place": inside(
        lambda: SimpleNamespace(x=th.tensor(1.0)), lambda x: x.x.sum(), lambda x: x.x.fill_(2.0)
    ),
    "property": (sets("hidden", 1.0), reads("by_property"), sets("hidden", 2.0)),
    "attribute of the class": (plain, reads("by_class"), attribute_of_the_class),
    "attribute in front of the class's": (plain, reads("by_class"), sets("by_class", 2.0)),
    "attribute that comes later": (plain, lambda owner: getattr(owner, "late", 1.0), sets("late", 2.0)),
    "attribute that is looked for": (plain, lambda owner: 2.0 if hasattr(owner, "late") else 1.0, sets("late", 2.0)),
    "attribute that goes": (sets("x", 2.0), lambda owner: getattr(owner, "x", 1.0), lambda owner: delattr(owner, "x")),
    "dict of the owner": (sets("x", 1.0), lambda owner: vars(owner)["x"], sets("x", 2.0)),
    "method": (plain, lambda owner: owner.factor(), lambda owner: setattr(owner, "factor", lambda: 2.0)),
    "method of the class": (plain, lambda owner: owner.factor(), method_of_the_class),
    "class": (plain, lambda owner: owner.factor(), lambda owner: setattr(owner, "__class__", Other)),
    "type of a number": number(1, True, lambda x: 2.0 if isinstance(x, bool) else 1.0),
}


@pytest.mark.parametrize("name", READS)
def test_what_the_function_reads(name: str) -> None:
    prepare, read, change = READS[name]
    replayed = "tensor of an object" not in name
    assert_followed(lambda enabled: Reader(prepare, read, enabled), change, replayed=replayed)


@pytest.mark.parametrize(
    "name", ["float", "dict", "array in place", "tensor", "tensor in place", "method of the class", "class"]
)
def test_it_is_replayed_again(name: str) -> None:
    prepare, read, change = READS[name]
    own, _ = outcome(lambda enabled: Reader(prepare, read, enabled), change, enabled=True)
    assert own.engine.report() == {"update": "replayed"}


def test_what_it_does_not_read_may_change() -> None:
    own, _ = outcome(lambda enabled: Reader(sets("x", 1.0), lambda owner: 1.0, enabled), sets("x", 2.0), enabled=True)
    kinds = list(own.engine._kinds.values())
    assert [kind._changes for kind in kinds] == [0]


def test_a_value_that_always_changes_is_not_recorded_at_each_update() -> None:
    """Which would take three times as long as without the engine."""
    own = Reader(sets("x", 1.0), reads("x"), enabled=True)
    recorded = 0
    original = own.engine._record

    def record(*args: Any) -> None:
        nonlocal recorded
        recorded += 1
        original(*args)

    own.engine._record = record  # type: ignore[method-assign]
    for step in range(100):
        own.x = 1.0 + step
        own.train([step])
    assert recorded < 15
    assert "x changed" in own.engine.report()["update"]


# Networks


class Tree(nn.Module):
    """A module with everything that can be changed in one."""

    shared = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.0), nn.Linear(8, 2))
        self.norm = nn.BatchNorm1d(2)
        self.scale, self.scales, self.names = 1.0, [1.0, 2.0], {"a": {"b": 1.0}}
        self.array, self.box, self.activation = np.ones(1), SimpleNamespace(scale=1.0), F.relu
        self.register_buffer("factor", th.ones(()))

    def forward(self, x: th.Tensor) -> th.Tensor:
        factor = self.scale * self.scales[0] * self.names["a"]["b"] * float(self.array[0]) * self.box.scale * self.shared
        result: th.Tensor = self.head(self.norm(self.layers(x))) * self.factor
        return result * factor + self.activation(result)

    def head(self, x: th.Tensor) -> th.Tensor:
        return x


def adam(parameters: Any) -> th.optim.Optimizer:
    """A gradient that is 0 but for rounding, as that of a bias before a normalisation, hardly moves its parameter."""
    return th.optim.Adam(parameters, eps=EPS)


def tree(enabled: bool, **kwargs: Any) -> Learner:
    return Learner(Tree, adam, enabled=enabled, dtype=th.float64, **kwargs)


def layer(owner: Any, which: int = 0) -> Any:
    return owner.net.layers[which]


def each(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Other memory with other numbers."""
    for parameter in parameters:
        parameter.data = parameter.data.clone() * factor


def doubled(module: Any, args: Any, output: Any) -> Any:
    return output * 2


def new_parameter(owner: Any) -> None:
    layer(owner).weight = nn.Parameter(layer(owner).weight.detach() * 2)


def new_parameter_that_is_trained(owner: Any) -> None:
    new_parameter(owner)
    owner.optimizer = adam(owner.net.parameters())


def assigned(owner: Any) -> None:
    state = {name: value.clone() * 0.5 for name, value in owner.net.state_dict().items() if name.startswith("layers")}
    owner.net.load_state_dict({**owner.net.state_dict(), **state}, assign=True)


def moved_buffers(owner: Any) -> None:
    owner.net.norm.running_mean = owner.net.norm.running_mean.clone() + 1
    owner.net.norm._buffers["running_var"].data = owner.net.norm.running_var.clone() + 1


def edited(owner: Any) -> None:
    with th.no_grad():
        layer(owner).weight.mul_(0.5)
        owner.net.factor.fill_(2.0)


def of_the_class(cls: Any, name: str, value: Any) -> Callable[[Any], Any]:
    def change(owner: Any) -> Any:
        original = getattr(cls, name)
        setattr(cls, name, value)
        return lambda: setattr(cls, name, original)

    return change


def linear_twice(self: nn.Linear, x: th.Tensor) -> th.Tensor:
    return F.linear(x, self.weight, self.bias) * 2


def half(gradient: th.Tensor) -> th.Tensor:
    return gradient * 0.5


def gradient_hook_of_a_buffer(owner: Any) -> Any:
    owner.net.factor.requires_grad_()
    return owner.net.factor.register_hook(half)


def halve(parameter: nn.Parameter) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


def replaced_network(owner: Any) -> None:
    owner.net = copy.deepcopy(owner.net)
    owner.optimizer = adam(owner.net.parameters())


def replaced_target(owner: Any) -> None:
    owner.target = copy.deepcopy(owner.target)
    each(owner.target.parameters(), 2)


NETWORKS: dict[str, Callable[[Any], Any]] = {
    "number": lambda o: setattr(o.net, "scale", 2.0),
    "list": lambda o: o.net.scales.__setitem__(0, 2.0),
    "dict of dicts": lambda o: o.net.names["a"].update(b=2.0),
    "array": lambda o: o.net.array.fill(2.0),
    "object": lambda o: setattr(o.net.box, "scale", 2.0),
    "function": lambda o: setattr(o.net, "activation", th.tanh),
    "number of a layer": lambda o: setattr(layer(o, 2), "p", 0.5),
    "momentum": lambda o: setattr(o.net.norm, "momentum", 0.5),
    "eps": lambda o: setattr(o.net.norm, "eps", 0.1),
    "attribute of the class": of_the_class(Tree, "shared", 2.0),
    "mode": lambda o: o.net.eval(),
    "mode of a layer": lambda o: o.net.norm.eval(),
    "layer": lambda o: o.net.layers.__setitem__(1, nn.Sigmoid()),
    "one layer more": lambda o: o.net.layers.insert(1, nn.Sigmoid()),
    "parameter": new_parameter,
    "parameter that is trained": new_parameter_that_is_trained,
    "assigned": assigned,
    "loaded": lambda o: o.net.load_state_dict({name: value * 0.5 for name, value in o.net.state_dict().items()}),
    "moved": lambda o: each(o.net.parameters(), 0.5),
    "moved buffers": moved_buffers,
    "edited": edited,
    "buffer": lambda o: setattr(o.net, "factor", th.tensor(2.0)),
    "no buffer": lambda o: setattr(o.net.norm, "running_mean", None) or setattr(o.net.norm, "running_var", None),
    "bias that goes": lambda o: setattr(layer(o), "bias", None),
    "frozen": lambda o: layer(o).weight.requires_grad_(False),
    "all frozen": lambda o: o.net.requires_grad_(False),
    "forward": lambda o: setattr(o.net, "forward", lambda x, before=o.net.forward: before(x) * 2),
    "method": lambda o: setattr(o.net, "head", lambda x: x * 2),
    "forward of the class": of_the_class(Tree, "forward", lambda self, x: self.layers(x)),
    "method of the class": of_the_class(Tree, "head", lambda self, x: x * 2),
    "forward of a layer's class": of_the_class(nn.Linear, "forward", linear_twice),
    "class of a layer": lambda o: setattr(layer(o, 1), "__class__", nn.Sigmoid),
    "forward hook": lambda o: layer(o).register_forward_hook(doubled),
    "forward pre-hook": lambda o: layer(o).register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "backward hook": lambda o: layer(o, 3).register_full_backward_hook(lambda module, inner, outer: (inner[0] * 2,)),
    "backward pre-hook": lambda o: layer(o, 3).register_full_backward_pre_hook(lambda module, outer: (outer[0] * 2,)),
    "gradient hook": lambda o: layer(o).weight.register_hook(half),
    "gradient hook of a buffer": gradient_hook_of_a_buffer,
    "post-accumulate hook": lambda o: layer(o).weight.register_post_accumulate_grad_hook(halve),
    "hook of all modules": lambda o: register_module_forward_hook(
        lambda m, args, out: out * 1.5 if type(m) is nn.Tanh else out
    ),
    "hook of all gradients": lambda o: register_module_full_backward_hook(
        lambda m, inner, outer: tuple(None if g is None else g * 2 for g in inner) if type(m) is nn.Tanh else None
    ),
    "another network": replaced_network,
    "another target": replaced_target,
    "moved target": lambda o: each(o.target.parameters(), 2),
    "target in training": lambda o: o.target.requires_grad_(True),
    "share": lambda o: setattr(o, "tau", 1.0),
}
NO_DIFFERENCE = {"target in training", "gradient hook of a buffer"}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_what_the_network_is(name: str) -> None:
    assert_followed(tree, NETWORKS[name], matters=name not in NO_DIFFERENCE)


@pytest.mark.parametrize(
    "where",
    [
        lambda own, net: setattr(own, "parts", [net]),
        lambda own, net: setattr(own, "parts", {"net": net}),
        lambda own, net: setattr(own, "parts", SimpleNamespace(net=net)),
        lambda own, net: setattr(own, "parts", SimpleNamespace(inner=SimpleNamespace(net=net))),
        lambda own, net: setattr(own, "parts", lambda: net),
    ],
    ids=["list", "dict", "object", "object of an object", "closure"],
)
@pytest.mark.parametrize("name", ["number", "layer", "forward hook", "mode of a layer"])
def test_networks_that_are_no_attributes(name: str, where: Callable[[Any, nn.Module], Any]) -> None:
    """Those that are trained are known by their record; others must be found, or the function is refused."""

    class Holder(Learner):
        def __init__(self, enabled: bool) -> None:
            super().__init__(Tree, adam, enabled=enabled, dtype=th.float64)
            self.hidden = SimpleNamespace(net=Tree().double())
            where(self, self.hidden.net)

        def update(self, batch: Batch, delayed: bool = True) -> Values:
            loss = F.mse_loss(self.net(batch[0]), self.found()(batch[0]).detach())
            self.engine.minimise(loss, "net")
            return {"loss": loss}

        def found(self) -> Any:
            parts: Any = self.parts  # type: ignore[attr-defined]
            if isinstance(parts, list | dict):
                return next(iter(parts.values())) if isinstance(parts, dict) else parts[0]
            return parts() if callable(parts) else getattr(parts, "net", None) or parts.inner.net

    def make(enabled: bool) -> Learner:
        own = Holder(enabled)
        hidden.append(own.__dict__.pop("hidden"))
        return own

    hidden: list[Any] = []
    assert_followed(make, lambda own: NETWORKS[name](hidden[-1]), replayed=False)


class Watching(Learner):
    """Its target's source is known from the record of the network alone."""

    def __init__(self, enabled: bool) -> None:
        super().__init__(enabled=enabled, dtype=th.float64)
        self.engine._make_networks = self.records
        self.source = [self.net]

    def records(self) -> Mapping[str, Network]:
        return {"net": Network(self.source[0], self.optimizer, self.target, self.rate)}


def test_another_module_for_the_same_target() -> None:
    def change(owner: Any) -> None:
        owner.source = [copy.deepcopy(owner.net)]
        each(owner.source[0].parameters(), 2)

    assert_followed(Watching, change)


# Optimizers and settings


def own_adam(owner: Any) -> None:
    class Slow(th.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                parameter.grad.mul_(0.1)
            return super().step(closure)

    owner.optimizer = Slow(owner.net.parameters(), eps=EPS)


def step_replaced(owner: Any) -> None:
    original = owner.optimizer.step

    def step(*args: Any) -> Any:
        for parameter in owner.net.parameters():
            parameter.grad.mul_(-1)
        return original(*args)

    owner.optimizer.step = step


def state_loaded(owner: Any) -> None:
    state = copy.deepcopy(owner.optimizer.state_dict())
    for own in state["state"].values():
        own["exp_avg"].mul_(-3)
    owner.optimizer.load_state_dict(state)


def states(change: Callable[[dict[str, th.Tensor]], Any]) -> Callable[[Any], None]:
    def change_all(owner: Any) -> None:
        for own in owner.optimizer.state.values():
            change(own)

    return change_all


def counters(owner: Any) -> None:
    for i, own in enumerate(owner.optimizer.state.values()):
        own["step"].fill_(100 * i + 1)


def option(**options: Any) -> Callable[[Any], None]:
    return lambda owner: owner.optimizer.param_groups[0].update(options)


def amsgrad(owner: Any) -> None:
    option(amsgrad=True)(owner)
    for parameter, own in owner.optimizer.state.items():
        own["max_exp_avg_sq"] = th.zeros_like(parameter)


def another_group(owner: Any) -> None:
    parameter = nn.Parameter(th.ones(2, dtype=th.float64))
    owner.net.register_parameter("extra", parameter)
    owner.net.head = MethodType(lambda self, x: x * self.extra, owner.net)
    owner.target.register_parameter("extra", nn.Parameter(th.ones(2, dtype=th.float64)))
    owner.optimizer.add_param_group({"params": [parameter]})


def a_parameter_less(owner: Any) -> None:
    parameter = owner.optimizer.param_groups[0]["params"].pop(0)
    owner.optimizer.state.pop(parameter)


def scale_gradients(optimizer: th.optim.Optimizer, *args: Any) -> None:
    for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        parameter.grad.mul_(-1)


def clipped(owner: Any) -> None:
    owner.settings = {"max_grad_norm": 0.05, "clipped": [[*owner.net.layers.parameters()], [*owner.net.norm.parameters()]]}


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda o: setattr(o, "optimizer", th.optim.SGD(o.net.parameters(), momentum=0.9)),
    "own adam": own_adam,
    "another adam": lambda o: setattr(o, "optimizer", adam(o.net.parameters())),
    "step": step_replaced,
    "loaded": state_loaded,
    "forgotten": lambda o: o.optimizer.state.clear(),
    "one forgotten": lambda o: o.optimizer.state.__delitem__(next(o.net.parameters())),
    "replaced": lambda o: setattr(o.optimizer, "state", type(o.optimizer.state)(dict)),
    "moments": states(lambda own: own["exp_avg"].mul_(-3)),
    "new moments": states(lambda own: own.update(exp_avg=own["exp_avg"] * -3)),
    "moved moments": states(lambda own: setattr(own["exp_avg"], "data", own["exp_avg"] * -3)),
    "counters": counters,
    "new counters": states(lambda own: own.update(step=th.tensor(100.0))),
    "betas": option(betas=(0.5, 0.5)),
    "eps": option(eps=1.0),
    "weight decay of adam": option(weight_decay=0.1),
    "decoupled": option(weight_decay=1.0, decoupled_weight_decay=True),
    "maximize": option(maximize=True),
    "amsgrad": amsgrad,
    "foreach": option(foreach=False),
    "group": another_group,
    "a parameter less": a_parameter_less,
    "pre-hook": lambda o: o.optimizer.register_step_pre_hook(scale_gradients),
    "post-hook": lambda o: o.optimizer.register_step_post_hook(lambda *_: next(o.net.parameters()).data.mul_(0.9)),
    "pre-hook of all": lambda _: register_optimizer_step_pre_hook(scale_gradients),
    "post-hook of all": lambda _: register_optimizer_step_post_hook(
        lambda optimizer, *_: optimizer.param_groups[0]["params"][0].data.mul_(0.9)
    ),
    "rate": lambda o: setattr(o, "rate", 0.1),
    "rate of the optimizer": lambda o: o.optimizer.param_groups[0].update(lr=1.0),
    "scheduler": lambda o: setattr(o, "scheduler", th.optim.lr_scheduler.ExponentialLR(o.optimizer, 0.1)),
    "weight decay": lambda o: o.settings.update(weight_decay=1.0),
    "norm": lambda o: o.settings.update(max_grad_norm=0.05),
    "no norm": lambda o: o.settings.update(max_grad_norm=None),
    "clipped apart": clipped,
}


def bounded(enabled: bool) -> Learner:
    """The norm of its gradient is bounded by about a half of it."""
    return tree(enabled, settings=lambda _: {"max_grad_norm": 0.5})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_how_it_is_trained(name: str) -> None:
    matters = name not in ("foreach", "rate of the optimizer", "scheduler", "decoupled")
    assert_followed(bounded, OPTIMIZERS[name], matters=matters)


def test_parameters_that_are_clipped_apart_change() -> None:
    def change(owner: Any) -> None:
        owner.settings = {"max_grad_norm": 0.5, "clipped": [[p] for p in owner.net.parameters()]}

    assert_followed(
        lambda enabled: tree(enabled, settings=lambda net: {"max_grad_norm": 0.5, "clipped": [[*net.parameters()]]}), change
    )


# The process


@contextlib.contextmanager
def setting(put: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    put(value)
    try:
        yield
    finally:
        put(before)


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": th.no_grad,
    "inference mode": th.inference_mode,
    "autocast": lambda: th.autocast("cpu", dtype=th.bfloat16),
    "two threads": lambda: setting(th.set_num_threads, 2, th.get_num_threads()),
    "default dtype": lambda: setting(th.set_default_dtype, th.float64, th.float32),
    "deterministic": lambda: setting(th.use_deterministic_algorithms, True, False),
}


@pytest.mark.parametrize("when", [range(1), range(3), range(3, 5)], ids=["first", "recorded", "replayed"])
@pytest.mark.parametrize("name", MODES)
def test_modes_that_some_updates_run_in(name: str, when: range) -> None:
    """An update in a mode is compared from the same numbers each time."""
    ours, theirs = Learner(), Learner(enabled=False)
    for step in range(6):
        logs: list[Any] = []
        for one in (ours, theirs):
            with MODES[name]() if step in when else contextlib.nullcontext():
                try:
                    logs.append(one.train([step]))
                except RuntimeError as error:
                    logs.append({type(error): 1.0})
                    one.engine.end()
        atol = 1e-3 if "autocast" in name and step in when else 1e-6
        assert logs[0] == pytest.approx(logs[1], rel=1e-2 if "autocast" in name and step in when else 1e-5)
        assert_same(ours.state(), theirs.state(), atol)
        theirs.copy_from(ours)


@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_anomalies_are_looked_for() -> None:
    """By PyTorch, in the function itself."""

    class Root(Learner):
        def update(self, batch: Batch, delayed: bool = True) -> Values:
            loss = (self.net(batch[0]) * 0).sqrt().sum()  # its gradient is infinite, and NaN times 0
            self.engine.minimise(loss, "net")
            return {"loss": loss}

    own = Root()
    own.train(range(3))
    with th.autograd.detect_anomaly(), pytest.raises(RuntimeError, match=r"(Sqrt|Mul)Backward0"):
        own.train([3])


# What is in the way from the start


REASONS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "forward hook": (NETWORKS["forward hook"], "a hook on a module or an optimizer"),
    "gradient hook": (NETWORKS["gradient hook"], "a hook on a parameter"),
    "post-accumulate hook": (NETWORKS["post-accumulate hook"], "a hook on a parameter"),
    "pre-hook": (OPTIMIZERS["pre-hook"], "a hook on a module or an optimizer"),
    "forward": (NETWORKS["forward"], "a replaced method: forward"),
    "step": (OPTIMIZERS["step"], "a replaced method: step"),
    "hook of all modules": (NETWORKS["hook of all modules"], "a hook on all modules or optimizers"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name: str) -> None:
    change, reason = REASONS[name]
    own = tree(True)
    undone = change(own)
    try:
        own.train(range(4))
    finally:
        getattr(undone, "remove", lambda: None)()
    assert reason in own.engine.report()["update"]


@pytest.fixture
def validated() -> Iterator[None]:
    """The compiler switches the checks of distributions off for the whole process."""
    before = th.distributions.Distribution._validate_args
    yield
    th.distributions.Distribution.set_default_validate_args(before)


@pytest.mark.usefixtures("validated")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_modules_run_as_they_stand() -> None:
    """Nothing is compiled here: the guard is asked before it would be."""
    own, whole = Learner(), Learner()
    own.net = th.compile(own.net)  # type: ignore[assignment]
    whole.net.compile()
    for one in (own, whole):
        assert Guard(one, vars(one), {}).obstacle() is not None


def test_a_look_costs_little_and_changes_nothing() -> None:
    own = tree(True)
    own.train(range(3))
    guard = Guard(own, {"net": own.net, "tau": own.tau}, own.engine.networks)
    before = own.state()
    assert guard.change(own.engine.networks) is None
    assert guard.obstacle() is None
    assert_same(own.state(), before)
    own.tau = 0.5
    assert guard.change(own.engine.networks) == "tau"
    own.tau = 0.25
    assert guard.change(own.engine.networks) is None
