"""
Whether everything is as it was when a function was recorded.

A recording holds memory and whatever the function has read from Python. Before it is replayed after foreign code ran (an
environment's step, a callback, the user), `Guard.change` looks at all of that, in one place.
"""

import copy
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch as th
from torch import nn
from torch.nn.modules import module as nn_module
from torch.optim import optimizer as torch_optimizer

from sb3_ac_ext.engine.network import Network, is_adam
from sb3_ac_ext.engine.tape import Key, memory, tensors

MODULE_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
OPTIMIZER_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
GLOBAL_HOOKS: tuple[Mapping[Any, Any], ...] = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
    torch_optimizer._global_optimizer_pre_hooks,
    torch_optimizer._global_optimizer_post_hooks,
)
"""Hooks of all modules and optimizers of the process."""
Read = Callable[[str, Any], None]


@contextmanager
def noted_reads(owner: Any, note: Read) -> Iterator[None]:
    """
    :param owner: an object
    :param note: called in this context with the name and the value of each of its attributes that somebody reads
    """
    kind = type(owner)

    def read(self: Any, name: str) -> Any:
        value = kind.__getattribute__(self, name)
        if not name.startswith("__"):
            note(name, value)
        return value

    names = {"__getattribute__": read, "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__slots__": ()}
    owner.__class__ = type(kind)(kind.__name__, (kind,), names)
    try:
        yield
    finally:
        owner.__class__ = kind


def process_state() -> tuple[Any, ...]:
    """What PyTorch is told for the whole process or thread and a recording depends on."""
    return (
        th.get_num_threads(),
        th.is_anomaly_enabled(),
        th.is_autocast_enabled("cpu"),
        th.is_autocast_enabled("cuda"),
        th.get_default_dtype(),
        th.are_deterministic_algorithms_enabled(),
        th.distributions.Distribution._validate_args,
    )


def modules_in(values: Iterable[Any]) -> list[nn.Module]:
    """
    :param values: anything
    :return: the modules among them, each with the modules that it has
    """
    found: dict[nn.Module, None] = {}
    for value in values:
        if isinstance(value, nn.Module) and value not in found:
            found.update(dict.fromkeys(value.modules()))
    return list(found)


def helpers_of(module: nn.Module) -> list[Any]:
    """
    :param module: of a policy
    :return: objects that it computes with and that are no modules, as SB3's distributions
    """
    values = (value for value in vars(module).values() if hasattr(value, "__dict__"))
    return [v for v in values if not isinstance(v, (nn.Module, th.Tensor, type, FunctionType, MethodType)) and _computes(v)]


def _computes(value: Any) -> bool:
    return any(isinstance(part, (th.Tensor, th.distributions.Distribution)) for part in vars(value).values()) or type(
        value
    ).__module__.endswith("distributions")


def tensors_in(modules: Iterable[nn.Module]) -> list[th.Tensor]:
    """
    :param modules: whose submodules are among them
    :return: parameters, buffers and other tensors that are attributes
    """
    parts = ([*m._parameters.values(), *m._buffers.values(), *vars(m).values()] for m in modules)
    return [part for parts_of_module in parts for part in parts_of_module if isinstance(part, th.Tensor)]


def tensors_of_helpers(modules: Iterable[nn.Module]) -> list[th.Tensor]:
    """
    :param modules: whose submodules are among them
    :return: tensors that `helpers_of` these hold, as the noise matrix of SB3's gSDE
    """
    parts = (value for module in modules for helper in helpers_of(module) for value in vars(helper).values())
    return [part for part in parts if isinstance(part, th.Tensor)]


def _used_modules(modules: Iterable[nn.Module], used: Collection[Key]) -> list[nn.Module]:
    """Without the submodules that have tensors of which none was used, as the critic when a policy acts."""
    found: dict[nn.Module, None] = {}

    def visit(module: nn.Module) -> None:
        if module not in found:
            found[module] = None
            for child in module._modules.values():
                if child is not None and not any(True for _ in child.parameters()) | any(True for _ in child.buffers()):
                    visit(child)
                elif child is not None and any(memory(tensor) in used for tensor in tensors_in(child.modules())):
                    visit(child)

    for module in modules:
        visit(module)
    return list(found)


class Guard:
    """
    What a recording depends on, as it is now.

    :param owner: whose method was recorded
    :param reads: the attributes that it has read, by their names
    :param networks: those that it has changed, by their names
    :param used: the memory that it has used; None for all
    """

    def __init__(
        self, owner: Any, reads: Mapping[str, Any], networks: Mapping[str, Network], used: Collection[Key] | None = None
    ) -> None:
        self.owner, self._kind = owner, type(owner)
        self._process = process_state()
        self._methods, self._values = _split(owner, reads)
        roots = [value for value in reads.values() if isinstance(value, nn.Module)]
        modules = modules_in(roots) if used is None else _used_modules(roots, used)
        self._modules, self._types = modules, [*map(type, modules)]
        kinds = {kind: None for kind in self._types}
        self._kinds, self._forwards = list(kinds), [kind.forward for kind in kinds]
        self._hooks = [getattr(module, name) for module in modules for name in MODULE_HOOKS]
        self._live, self._copies = [], []
        for module in modules:
            self._keep(vars(module), module._modules)
            self._keep_numbers(helpers_of(module))
        self._parameters = [module._parameters for module in modules] + [module._buffers for module in modules]
        for place in self._parameters:
            self._keep_names(place)
        self._parameters = [place for place in self._parameters if place]
        self._tensors = self._current_tensors()
        self._networks = dict(networks)
        self._trained = [parameter for network in networks.values() for parameter in network.parameters]
        self._states = [network.optimizer.state for network in networks.values()]
        self._groups = [_options(network) for network in networks.values()]
        self._settings = [network.settings() for network in networks.values()]
        for network in networks.values():
            self._hooks += [getattr(network.optimizer, name) for name in OPTIMIZER_HOOKS]
        self._memory = [
            *self._tensors,
            *self._trained,
            *self._state_tensors(),
            *(t for _, v, _ in self._values for t in tensors(v)),
        ]
        self._addresses = [tensor.data_ptr() for tensor in self._memory]
        self._gradients = [p.requires_grad for p in self._trained]
        self._instances = [_replaced(vars(owner), type(owner)), *(_replaced(vars(m), type(m)) for m in modules)]

    def _keep(self, *places: dict[str, Any]) -> None:
        for place in places:
            self._live.append(place)
            self._copies.append(dict(place))

    def _keep_names(self, place: dict[str, Any]) -> None:
        if not place:  # parameters are compared by identity; what is empty has to stay so
            self._keep(place)

    def _keep_numbers(self, helpers: Iterable[Any]) -> None:
        for helper in helpers:
            for name, value in vars(helper).items():
                if isinstance(value, (int, float, str, bool, type(None))):
                    self._values.append((name, value, vars(helper)))

    def _current_tensors(self) -> list[Any]:
        return [tensor for place in self._parameters for tensor in place.values()]

    def _state_tensors(self) -> list[Any]:
        found = []
        for network, state in zip(self._networks.values(), self._states, strict=True):
            for parameter in network.parameters if is_adam(network.optimizer) else ():
                found += [value for value in state.get(parameter, {}).values() if isinstance(value, th.Tensor)]
        return found

    def obstacle(self) -> str | None:
        """Why the function must not be replayed as it is now: somebody wants to be called, or may do anything."""
        if any(GLOBAL_HOOKS):
            return "a hook on all modules or optimizers"
        if any(self._hooks):
            return "a hook on a module or an optimizer"
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self._trained):
            return "a hook on a parameter"
        if th.is_anomaly_enabled():
            return "PyTorch looks for anomalies"
        replaced = next((names for names in self._instances if names), None)
        if replaced:
            return f"a replaced method: {', '.join(replaced)}"
        strange = next((kind for kind in self._types if "torch._dynamo" in kind.__module__), None)
        return None if strange is None else f"a compiled module ({strange.__name__})"

    def change(self, networks: Mapping[str, Network]) -> str | None:
        """
        :param networks: as they are now
        :return: what has changed since; None if nothing has
        """
        try:
            return self._change(networks)
        except (
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            KeyError,
        ) as error:  # of comparing what cannot be compared
            return f"something that cannot be compared ({error})"

    def _change(self, networks: Mapping[str, Network]) -> str | None:
        if type(self.owner) is not self._kind or [*map(type, self._modules)] != self._types:
            return "a class"
        if any(self._hooks) or any(GLOBAL_HOOKS):
            return "a hook"
        if self._live != self._copies or [kind.forward for kind in self._kinds] != self._forwards:
            return "a module"
        now = self._current_tensors()
        if len(now) != len(self._tensors) or not all(map(operator.is_, now, self._tensors)):
            return "a parameter or buffer"
        if [tensor.data_ptr() for tensor in self._memory] != self._addresses:
            return "the memory of a tensor"
        if process_state() != self._process:
            return "a setting of PyTorch"
        return self._change_of_values() or self._change_of_networks(networks)

    def _change_of_values(self) -> str | None:
        for name, value, snapshot in self._values:
            if isinstance(snapshot, dict) and snapshot is not value and name in snapshot and _is_number(value):
                now = snapshot[name]  # of a helper
            else:
                now = getattr(self.owner, name)
                if snapshot is not None and not _equal(now, snapshot):
                    return f"{name}"
            if now is not value and not (type(now) is type(value) and _equal(now, value)):
                return f"{name}"
        for name, function in self._methods:
            if getattr(getattr(self.owner, name), "__func__", None) is not function:
                return f"the method {name}"
        return None

    def _change_of_networks(self, networks: Mapping[str, Network]) -> str | None:
        for i, (name, network) in enumerate(self._networks.items()):
            now = networks.get(name)
            if now is None or now.optimizer is not network.optimizer or now.optimizer.state is not self._states[i]:
                return f"the optimizer of {name}"
            if now.settings() != self._settings[i] or _options(now) != self._groups[i]:
                return f"a setting of the optimizer of {name}"
        states = self._state_tensors()
        known = self._memory[len(self._tensors) + len(self._trained) :][: len(states)]
        if len(states) > len(known) or not all(map(operator.is_, states, known)):
            return "the state of an optimizer"
        for parameter, wanted in zip(self._trained, self._gradients, strict=True):
            if parameter.requires_grad is not wanted:
                return "which parameters are trained"
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                return "a hook on a parameter"
        return None


def _split(owner: Any, reads: Mapping[str, Any]) -> tuple[list[tuple[str, Any]], list[tuple[str, Any, Any]]]:
    """Methods with their functions, and values with snapshots of what can be changed in place."""
    methods, values = [], []
    for name, value in reads.items():
        if isinstance(value, MethodType) and value.__self__ is owner:
            methods.append((name, value.__func__))
        elif isinstance(value, (np.ndarray, dict, list)):
            snapshot = copy.copy(value)
            values.append((name, value, snapshot))
        else:
            values.append((name, value, None))
    return methods, values


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, str, bool, type(None)))


def _equal(x: Any, y: Any) -> bool:
    if isinstance(x, th.Tensor) or isinstance(y, th.Tensor):
        return x is y
    if isinstance(x, (list, tuple)) and type(x) is type(y):
        return len(x) == len(y) and all(a is b or _equal(a, b) for a, b in zip(x, y, strict=True))
    if isinstance(x, dict) and type(x) is type(y):
        return x.keys() == y.keys() and all(value is y[key] or _equal(value, y[key]) for key, value in x.items())
    return bool(np.all(x == y))


def _options(network: Network) -> list[dict[str, Any]]:
    """The optimizer's options without what may change: rates."""
    groups = network.optimizer.param_groups
    return [{key: value for key, value in group.items() if key not in ("lr", "params")} for group in groups]


def _replaced(own: Mapping[str, Any], kind: type) -> list[str]:
    """Methods that stand in an instance in place of its class's."""
    functions = (name for name, value in own.items() if callable(value) and not isinstance(value, (nn.Module, type)))
    return [name for name in functions if callable(getattr(kind, name, None))]
