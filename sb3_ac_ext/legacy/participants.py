"""Who takes part in an update, and whether it can be done again without their Python."""

import inspect
import operator
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch as th

REPEATABLE = frozenset({"torch", "stable_baselines3", "sb3_ac_ext"})
"""Packages whose modules and algorithms do nothing but operations on tensors, as far as an update is concerned."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def modules_in(module: th.nn.Module) -> list[th.nn.Module]:
    """``module.modules()`` in a tenth of the time, and a module that is in several others as often."""
    found: list[th.nn.Module] = [module]
    for parent in found:  # which grows meanwhile
        found += [child for child in parent._modules.values() if child is not None]
    return found


def parameters_in(modules: Iterable[th.nn.Module]) -> list[Any]:
    """The parameters of ``modules``, None where one has been left out, as a bias can be."""
    return [parameter for module in modules for parameter in module._parameters.values()]


class Participants:
    """
    The objects whose methods make up an update; looked up once, so that their state is quick to see before each round.

    :param algorithm: the algorithm
    :param modules: of its policy, see `modules_in`
    """

    def __init__(self, algorithm: Any, modules: Sequence[th.nn.Module]) -> None:
        self.modules = modules
        self.parameters = parameters_in(modules)
        owners: tuple[Any, ...] = (algorithm, *modules)
        kinds: list[Any] = [type(owner) for owner in owners]
        self._strangers = [kind for kind in kinds if not _repeatable(kind)]
        self._hooks = [getattr(module, name) for module in modules for name in HOOKS]
        self._methods = [(owner, _methods(kind)) for owner, kind in zip(owners, kinds, strict=True)]

    def are(self, modules: Sequence[th.nn.Module]) -> bool:
        """Whether ``modules`` are the same ones, with the same parameters."""
        parameters = parameters_in(modules)
        same = self.modules == modules and len(self.parameters) == len(parameters)
        return same and all(map(operator.is_, self.parameters, parameters))

    def obstacle(self) -> str | None:
        """Why their update cannot be done again without Python; None if it can."""
        if self._strangers:
            return f"what a {self._strangers[0].__name__} does besides operations on tensors"
        if any(self._hooks):
            place = next(i for i, hooks in enumerate(self._hooks) if hooks)
            return f"a hook on a {type(self.modules[place // len(HOOKS)]).__name__}"
        for owner, methods in self._methods:
            if not methods.isdisjoint(vars(owner)):
                return f"a replaced method of a {type(owner).__name__}"
        return None


@cache
def _repeatable(kind: Any) -> bool:
    return kind.__module__.partition(".")[0] in REPEATABLE


@cache
def _methods(kind: Any) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if inspect.isroutine(inspect.getattr_static(kind, name)))
