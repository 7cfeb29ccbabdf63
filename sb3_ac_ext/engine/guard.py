"""
Whether everything is as it was when a function was recorded.

A recording holds memory and whatever the function has read from Python. Before it is replayed after foreign code ran (an
environment's step, a callback, the user), `Guard.change` looks at all of that, in one place.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch as th
from torch import nn
from torch.distributions import Distribution
from torch.nn.modules import module as nn_module
from torch.optim import optimizer as torch_optimizer

from sb3_ac_ext.engine.network import Network, identical, is_adam
from sb3_ac_ext.engine.tape import Key, memory, tensors

MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OF_MODULES = frozenset(vars(nn.Module()))
"""The attributes of every module."""


class Closed:
    """An object that a guard does not look into."""


OTHERS = (Closed, nn.Module, th.Tensor, th.optim.Optimizer, Distribution, type, FunctionType, MethodType, ModuleType)
"""What is not looked into where an object is."""
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
CHANGEABLE = (list, dict, set, np.ndarray, th.Tensor)
"""Values of which more than the identity is looked at."""
Place = tuple[Mapping[str, Any], str]
"""A dict of attributes, and the name of one."""
Content = tuple[Mapping[str, Any], str, Any]
"""A dict of attributes, the name of one, and what it was."""
MISSING: Any = object()
"""What is noted of an attribute that is not there."""
Read = Callable[[str, Any], None]


@contextmanager
def noted_reads(owner: Any, note: Read) -> Iterator[None]:
    """
    :param owner: an object
    :param note: called in this context with the name and the value of each of its attributes that somebody reads
    """
    kind = type(owner)

    def read(self: Any, name: str) -> Any:
        try:
            value = kind.__getattribute__(self, name)  # type: ignore[call-arg]  # of an instance
        except AttributeError:
            note(name, MISSING)
            raise
        if name == "__dict__":
            for key, one in value.items():
                note(key, one)
        elif not name.startswith("__"):
            note(name, value)
        return value

    names = {"__getattribute__": read, "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__slots__": ()}
    names["_kind_before"] = kind
    owner.__class__ = type(kind)(kind.__name__, (kind,), names)  # type: ignore[misc]  # the class's own class
    try:
        yield
    finally:
        owner.__class__ = kind


def _kind_of(owner: Any) -> type:
    """The owner's class, also while its reads are noted."""
    kind: type = type(owner).__dict__.get("_kind_before", type(owner))
    return kind


def process_state(trains: bool) -> tuple[Any, ...]:
    """What PyTorch is told for the whole process or thread and a recording depends on, if it computes gradients or not."""
    return (
        trains and (th.is_grad_enabled(), th.is_inference_mode_enabled()),
        th.get_num_threads(),
        th.is_anomaly_enabled(),
        th.is_autocast_enabled("cpu"),
        th.is_autocast_enabled("cuda"),
        th.get_default_dtype(),
        th.are_deterministic_algorithms_enabled(),
        Distribution._validate_args,
    )


def modules_in(values: Iterable[Any]) -> list[nn.Module]:
    """The modules among values of any kind, each with the modules that it has."""
    found: dict[nn.Module, None] = {}
    for value in values:
        if isinstance(value, nn.Module) and value not in found:
            found.update(dict.fromkeys(value.modules()))
    return list(found)


def objects_in(value: Any, depth: int = 3) -> list[Any]:
    """
    Objects with attributes of their own that are found in a value: no modules, tensors, functions or classes.

    :param value: anything
    :param depth: how many objects and containers are opened, one inside another
    """
    if depth == 0:
        return []
    if isinstance(value, (list, tuple, set)):
        return [found for part in value for found in objects_in(part, depth - 1)]
    if isinstance(value, dict):
        return [found for part in value.values() for found in objects_in(part, depth - 1)]
    if isinstance(value, MethodType):
        return objects_in(value.__self__, depth)
    if isinstance(value, OTHERS) or not hasattr(value, "__dict__"):
        return []
    return [value, *(found for part in vars(value).values() for found in objects_in(part, depth - 1))]


def helpers_of(module: nn.Module) -> list[Any]:
    """Objects that a module computes with and that are no modules, as SB3's distributions."""
    return [found for name, value in vars(module).items() if name not in OF_MODULES for found in objects_in(value, 2)]


def tensors_in(modules: Iterable[nn.Module]) -> list[th.Tensor]:
    """Parameters, buffers and other tensors that are attributes of modules, not of their submodules."""
    parts = ([*m._parameters.values(), *m._buffers.values(), *vars(m).values()] for m in modules)
    return [part for parts_of_module in parts for part in parts_of_module if isinstance(part, th.Tensor)]


def tensors_of_helpers(modules: Iterable[nn.Module]) -> list[th.Tensor]:
    """Tensors that `helpers_of` modules hold, as the noise matrix of SB3's gSDE."""
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
    :param read: tensors of objects that modules compute with which it has read: where, under which name, and the tensor
    :param differentiates: whether it may take gradients, also of networks that others change
    """

    def __init__(
        self,
        owner: Any,
        reads: Mapping[str, Any],
        networks: Mapping[str, Network],
        used: Collection[Key] | None = None,
        read: Sequence[Content] = (),
        differentiates: bool = False,
    ) -> None:
        self.owner, self._kind, self._networks = owner, _kind_of(owner), dict(networks)
        self._differentiates = differentiates or bool(networks)
        self._used = used
        self._process = process_state(self._differentiates)
        self._methods = [(name, value.__func__) for name, value in reads.items() if _is_method_of(owner, value)]
        self._values = [(name, value, _snapshot(value)) for name, value in reads.items() if not _is_method_of(owner, value)]
        roots = [*reads.values(), *(m for network in networks.values() for m in (network.module, network.target))]
        roots = [root for root in roots if isinstance(root, nn.Module)]
        self._contents: list[Content] = [*read]
        self._look_at_modules(modules_in(roots) if used is None else _used_modules(roots, used))
        self._look_at_objects([found for _, value, _ in self._values for found in objects_in(value)])
        self._look_at_networks()
        tensors_of_values = [tensor for _, value, _ in self._values for tensor in tensors(value)]
        tensors_of_values += [value for _, _, value in self._contents if isinstance(value, th.Tensor)]
        plain = [content for content in self._contents if _compares_plainly(content[2])]
        self._plain = [(place, name) for place, name, _ in plain]
        self._plain_snapshots = [snapshot for _, _, snapshot in plain]
        self._contents = [content for content in self._contents if not _compares_plainly(content[2])]
        held = [*self._tensors, *self._trained, *self._states, *tensors_of_values]
        self._memory = list({id(tensor): tensor for tensor in held if isinstance(tensor, th.Tensor)}.values())
        self._addresses = [tensor.data_ptr() for tensor in self._memory]
        owners = [owner, *self._modules, *self._helpers, *(network.optimizer for network in networks.values())]
        self._replaced = [name for one in owners for name in _replaced_methods(one)]

    def _look_at_modules(self, modules: list[nn.Module]) -> None:
        self._modules = modules
        self._helpers = [helper for module in modules for helper in helpers_of(module)]
        self._types = [*map(type, modules), *map(type, self._helpers)]
        kinds: list[Any] = list(dict.fromkeys(map(type, modules)))
        self._forwards = [(kind, kind.forward) for kind in kinds]
        self._hooks = [getattr(module, name) for module in modules for name in MODULE_HOOKS]
        tensors_of_modules = [module._parameters for module in modules] + [module._buffers for module in modules]
        self._named_tensors = [place for place in tensors_of_modules if place]  # compared by identity
        self._tensors = self._current_tensors()
        children = [module._modules for module in modules]
        self._live: list[Mapping[str, Any]] = [place for place in children if place]
        self._copies = [dict(place) for place in self._live]
        empty = [place for place in (*children, *tensors_of_modules) if not place]
        self._sized = [*map(vars, modules), *map(vars, self._helpers), *empty]
        self._lengths = [*map(len, self._sized)]
        own = OF_MODULES - {"training"}
        pairs: list[Place] = [(place, name) for place in map(vars, modules) for name in place if name not in own]
        for place, name in pairs:
            if isinstance(place[name], CHANGEABLE):
                self._contents.append((place, name, _snapshot(place[name])))
        classes = dict.fromkeys(base for kind in self._types for base in kind.__mro__ if _is_of_users(base))
        methods = _methods_within_reach(classes, (function.__code__.co_names for _, function in self._methods))
        self._pairs = [(place, name) for place, name in pairs if not isinstance(place[name], CHANGEABLE)] + methods
        self._pair_values = [place[name] for place, name in self._pairs]
        for helper in self._helpers:
            self._contents += [(vars(helper), name, value) for name, value in vars(helper).items() if _is_number(value)]

    def _look_at_objects(self, objects: list[Any]) -> None:
        for place in map(vars, objects):
            self._live.append(place)
            self._copies.append(dict(place))
            self._contents += [(place, name, _snapshot(value)) for name, value in place.items()]

    def _look_at_networks(self) -> None:
        networks = self._networks.values()
        self._trained = [parameter for network in networks for parameter in network.parameters]
        self._state_dicts = [network.optimizer.state for network in networks]
        self._states = self._current_states()
        self._used = {*map(memory, tensors(self._states))}  # others may get memory that the function has left
        self._settings = [network.settings() for network in networks]
        self._hooks += [getattr(network.optimizer, name) for network in networks for name in OPTIMIZER_HOOKS]
        self._trainable = list(dict.fromkeys([*self._trained, *self._tensors]))
        self._free = [*map(_requires_grad, self._trainable)]

    def _current_tensors(self) -> list[Any]:
        return [tensor for place in self._named_tensors for tensor in place.values()]

    def _current_states(self) -> list[th.Tensor]:
        found = []
        for network in self._networks.values():
            if is_adam(network.optimizer):  # without lookups: to hash a tensor takes time
                states = network.optimizer.state
                found += [*states, *(value for state in states.values() for value in state.values())]
                continue
            own = [network.optimizer.state.get(parameter, {}) for parameter in network.parameters]
            # the step is not looked into, or the function's own
            found += [value for value in tensors(own) if self._used is None or memory(value) in self._used]
        return found

    def obstacle(self) -> str | None:
        """Why the function must not be replayed as it is now: somebody wants to be called, or may do anything."""
        if any(GLOBAL_HOOKS):
            return "a hook on all modules or optimizers"
        if any(self._hooks):
            return "a hook on a module or an optimizer"
        if self._differentiates and any(map(_has_hook, self._trainable)):
            return "a hook on a parameter"
        if th.is_anomaly_enabled():
            return "PyTorch looks for anomalies"
        if self._replaced:
            return f"a replaced method: {', '.join(self._replaced)}"
        if self._differentiates and (th.is_inference_mode_enabled() or not th.is_grad_enabled()):
            return "gradients are switched off"
        compiled = any(vars(module).get("_compiled_call_impl") for module in self._modules)
        compiled |= any(base.__name__ == "OptimizedModule" for kind in self._types for base in kind.__mro__)
        return "a compiled module" if compiled else None

    def change(self, networks: Mapping[str, Network]) -> str | None:
        """What has changed since, given the networks as they are now; None if nothing has."""
        try:
            return self._change(networks)
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
            return f"something that cannot be compared ({error})"

    def _change(self, networks: Mapping[str, Network]) -> str | None:
        if _kind_of(self.owner) is not self._kind or [*map(type, self._modules), *map(type, self._helpers)] != self._types:
            return "a class"
        if any(self._hooks) or any(GLOBAL_HOOKS):
            return "a hook"
        if process_state(self._differentiates) != self._process:
            return "a setting of PyTorch"
        changed = self._change_of_modules() or self._change_of_values()
        return changed or (self._change_of_networks(networks) if self._differentiates else None)

    def _change_of_modules(self) -> str | None:
        if [*map(len, self._sized)] != self._lengths:
            return "a module, or what it computes with"
        if [place[name] for place, name in self._pairs] != self._pair_values:
            return "the training mode, an attribute or a method of a module"
        if self._live != self._copies or any(kind.forward is not function for kind, function in self._forwards):
            return "a module"
        if not identical(self._current_tensors(), self._tensors):
            return "a parameter or buffer"
        if [*map(_requires_grad, self._trainable)] != self._free:
            return "which parameters are trained"
        if [tensor.data_ptr() for tensor in self._memory] != self._addresses:
            return "the memory of a tensor"
        return None

    def _change_of_values(self) -> str | None:
        for name, value, snapshot in self._values:
            now = getattr(self.owner, name, MISSING)
            if not (now is value or _equal(now, value)) or (snapshot is not value and not _equal(now, snapshot)):
                return name
        if [place[name] for place, name in self._plain] != self._plain_snapshots:
            return "what an attribute contains"
        for place, name, snapshot in self._contents:
            if place[name] is not snapshot and not _equal(place[name], snapshot):
                return name
        for name, function in self._methods:
            if getattr(getattr(self.owner, name), "__func__", None) is not function:
                return f"the method {name}"
        return None

    def _change_of_networks(self, networks: Mapping[str, Network]) -> str | None:
        for i, (name, network) in enumerate(self._networks.items()):
            now = networks.get(name)
            if now is None or now.optimizer is not network.optimizer or now.optimizer.state is not self._state_dicts[i]:
                return f"the optimizer of the {name}"
            if now.settings() != self._settings[i] or _replaced_methods(now.optimizer):
                return f"a setting of the {name} or its optimizer"
            if not identical(now.parameters, network.parameters):
                return f"what the optimizer of the {name} trains"
        if not identical(self._current_states(), self._states):
            return "the state of an optimizer"
        return "a hook on a parameter" if any(map(_has_hook, self._trainable)) else None


def _is_method_of(owner: Any, value: Any) -> bool:
    return isinstance(value, MethodType) and value.__self__ is owner


def _is_of_users(kind: type) -> bool:
    """Whether a class may have methods that somebody replaces; those of PyTorch and Python are left out."""
    return kind.__module__.partition(".")[0] not in ("torch", "builtins", "abc", "typing")


def _methods_within_reach(classes: Iterable[type], names: Iterable[Iterable[str]]) -> list[Place]:
    """
    :param classes: of modules
    :param names: that functions use which call these modules
    :return: methods that may be called, and constants: where they are, and their names
    """
    functions = [(vars(kind), name, f) for kind in classes for name, f in vars(kind).items() if isinstance(f, FunctionType)]
    wanted, new = {"forward"}.union(*names), True
    while new:
        used = {one for _, name, function in functions if name in wanted for one in function.__code__.co_names}
        new = not used <= wanted
        wanted |= used
    found: list[Place] = [(place, name) for place, name, _ in functions if name in wanted]
    for kind in classes:
        found += [(vars(kind), name) for name, v in vars(kind).items() if _is_number(v) and not name.startswith("__")]
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, str, bool, type(None)))


def _compares_plainly(value: Any) -> bool:
    """Whether ``==`` says whether a value is the same: not of tensors and arrays, or of what they are in."""
    if isinstance(value, dict):
        return all(map(_compares_plainly, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_compares_plainly, value))
    return not isinstance(value, (th.Tensor, np.ndarray))


def _requires_grad(tensor: Any) -> bool:
    return bool(tensor is not None and tensor.requires_grad)


def _has_hook(tensor: Any) -> bool:
    return bool(tensor is not None and (tensor._backward_hooks or tensor._post_accumulate_grad_hooks))


def _snapshot(value: Any) -> Any:
    """A copy of what can be changed in place; the value itself if it cannot."""
    if isinstance(value, dict):
        return {key: _snapshot(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_snapshot, value))
    return value.copy() if isinstance(value, (np.ndarray, set)) else value


def _equal(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if type(x) is not type(y) or isinstance(x, (th.Tensor, nn.Module)):
        return False
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(_equal, x, y))
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(_equal(value, y[key]) for key, value in x.items())
    return bool(np.array_equal(x, y)) if isinstance(x, np.ndarray) else bool(x == y)


def _replaced_methods(owner: Any) -> list[str]:
    """The methods that stand in an instance in place of its class's."""
    functions = (name for name, value in vars(owner).items() if callable(value) and not isinstance(value, (nn.Module, type)))
    return [name for name in functions if callable(getattr(type(owner), name, None))]
