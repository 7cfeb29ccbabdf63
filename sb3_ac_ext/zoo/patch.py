"""
What RL Zoo is told about the package, derived from the registry.

Each of the Zoo's modules is patched on its own, because the startup hook calls `apply` the moment one has been executed,
when the others may not exist yet. The Zoo's tables are shared objects and its manager is patched in place, so it does not
matter who imported them before.

The ids of environments that an extra brings need no patch: importing the registry has given them to Gymnasium, whose table the
Zoo reads when it is asked for an environment.
"""

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from sb3_ac_ext.zoo.registry import ALGORITHMS


def _add_algorithms(utils: ModuleType) -> None:
    for spec in ALGORITHMS:
        utils.ALGOS.setdefault(spec.name, spec.cls)


def _add_search_spaces(hyperparams_opt: ModuleType) -> None:
    for spec in ALGORITHMS:
        hyperparams_opt.HYPERPARAMS_SAMPLER.setdefault(spec.name, spec.sample)
        hyperparams_opt.HYPERPARAMS_CONVERTER.setdefault(spec.name, spec.convert)


def _add_default_config(exp_manager: ModuleType) -> None:
    """Let the manager find our ``hyperparams/<algo>.yml`` where it has none and the user named none."""
    manager = exp_manager.ExperimentManager
    original = manager.__init__
    if hasattr(original, "finds_sb3_ac_ext"):
        return
    configs = {spec.name: spec.config for spec in ALGORITHMS}
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments.get("config")
        if not given and self.algo in configs and not Path(self.config).is_file():
            self.config = str(configs[self.algo])

    __init__.finds_sb3_ac_ext = True  # type: ignore[attr-defined]
    manager.__init__ = __init__


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "rl_zoo3.utils": _add_algorithms,
    "rl_zoo3.hyperparams_opt": _add_search_spaces,
    "rl_zoo3.exp_manager": _add_default_config,
}


def apply(module_name: str) -> None:
    """
    Patch one of RL Zoo's modules, importing it if need be. Idempotent.

    Entries that are already there, the Zoo's or the user's, are left alone.

    :param module_name: ``"rl_zoo3.utils"``, ``"rl_zoo3.hyperparams_opt"`` or ``"rl_zoo3.exp_manager"``
    """
    _PATCHES[module_name](import_module(module_name))


def register() -> None:
    """Import RL Zoo and add every algorithm to it, with or without the startup hook. Idempotent."""
    for module_name in _PATCHES:
        apply(module_name)
