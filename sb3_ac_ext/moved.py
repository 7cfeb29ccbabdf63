"""
Modules under the names that they had, so that zips and replay buffers written then can be read: pickles name modules.

The package installs `FINDER` last of Python's finders, so a module that exists is never replaced. An old name gets a module of
its own that looks everything up in the new one; classes are the same objects under both names.
"""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_ROOMS = {
    "base": "arguments checkpoint environment_checks noise off_policy on_policy online schedules",
    "buffers": "replay rollouts",
    "ddpgx": "parameter_noise",
    "envs": "frames",
    "networks": "actor_critic critics policies",
}
MOVED = {
    **{f"sb3_ac_ext.common.{name}": f"sb3_ac_ext.{room}.{name}" for room, names in _ROOMS.items() for name in names.split()},
    "sb3_ac_ext.common.validation": "sb3_ac_ext.validation",
    "sb3_ac_ext.legacy.actor_critic": "sb3_ac_ext.networks.actor_critic",
    "sb3_ac_ext.maddpg.environment": "sb3_ac_ext.envs.joint",
    "sb3_ac_ext.maddpg.spaces": "sb3_ac_ext.envs.joint_spaces",
    "sb3_ac_ext.ppox.ppox": "sb3_ac_ext.ppox",
}
"""Today's name of each module by its old one."""
GONE = {"sb3_ac_ext.common", "sb3_ac_ext.legacy"}
"""Packages of which nothing is left but the old names in them."""


class MovedFinder(MetaPathFinder, Loader):
    """Finds the old names, and makes their modules."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """See Python's ``MetaPathFinder``."""
        if fullname in MOVED or fullname in GONE:
            return ModuleSpec(fullname, self, is_package=fullname in GONE)
        return None

    def exec_module(self, module: ModuleType) -> None:
        """See Python's ``Loader``."""
        if module.__name__ in MOVED:
            new = import_module(MOVED[module.__name__])
            module.__getattr__ = lambda name: getattr(new, name)  # type: ignore[method-assign]


FINDER = MovedFinder()


def install() -> None:
    """Let Python find the old names. Idempotent."""
    if FINDER not in sys.meta_path:
        sys.meta_path.append(FINDER)
