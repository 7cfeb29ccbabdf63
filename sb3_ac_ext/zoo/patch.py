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

import optuna

from sb3_ac_ext.buffers.prioritized import (
    PrioritizedDictReplayBuffer,
    PrioritizedHerReplayBuffer,
    PrioritizedReplayBuffer,
)
from sb3_ac_ext.maddpg.buffer import PrioritizedJointReplayBuffer
from sb3_ac_ext.zoo.precedence import drop_contradicted
from sb3_ac_ext.zoo.registry import ALGORITHMS
from sb3_ac_ext.zoo.samplers.searched import Searched, searched

REPLAY_BUFFERS = (
    PrioritizedReplayBuffer,
    PrioritizedDictReplayBuffer,
    PrioritizedHerReplayBuffer,
    PrioritizedJointReplayBuffer,
)
CLASSES = {spec.name: spec.cls for spec in ALGORITHMS}


def _add_algorithms(utils: ModuleType) -> None:
    for spec in ALGORITHMS:
        utils.ALGOS.setdefault(spec.name, spec.cls)


def _add_search_spaces(hyperparams_opt: ModuleType) -> None:
    for spec in ALGORITHMS:
        hyperparams_opt.HYPERPARAMS_SAMPLER.setdefault(spec.name, spec.sample)
        hyperparams_opt.HYPERPARAMS_CONVERTER.setdefault(spec.name, spec.convert)


def _patch_manager(exp_manager: ModuleType) -> None:
    """
    Replace three methods of the manager, which do for other algorithms what they did, and name our replay buffers where it
    evaluates ``replay_buffer_class``.
    """
    for buffer in REPLAY_BUFFERS:
        vars(exp_manager).setdefault(buffer.__name__, buffer)
    for name, around in (
        ("__init__", _find_default_config),
        ("read_hyperparameters", _drop_what_is_contradicted),
        ("objective", _tell_what_is_searched),
    ):
        original = getattr(exp_manager.ExperimentManager, name)
        if not hasattr(original, "knows_sb3_ac_ext"):
            replaced = functools.wraps(original)(around(original))
            replaced.knows_sb3_ac_ext = True  # type: ignore[attr-defined]
            setattr(exp_manager.ExperimentManager, name, replaced)


def _find_default_config(original: Callable[..., None]) -> Callable[..., None]:
    """Let the manager find our ``hyperparams/<algo>.yml`` where it has none and the user named none."""
    configs = {spec.name: spec.config for spec in ALGORITHMS}
    signature = inspect.signature(original)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments.get("config")
        if not given and self.algo in configs and not Path(self.config).is_file():
            self.config = str(configs[self.algo])

    return __init__


def _drop_what_is_contradicted(original: Callable[..., Any]) -> Callable[..., Any]:
    """What ``-params`` or a trial of a study give goes before what the file says; ``-params`` before the trial."""

    def read_hyperparameters(self: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        hyperparams, saved_hyperparams = original(self)
        if self.algo in CLASSES:
            is_trial = self.storage and self.study_name and self.trial_id
            trial = self.load_trial(self.storage, self.study_name, self.trial_id) if is_trial else {}
            ranks = {**dict.fromkeys(trial, 1), **dict.fromkeys(self.custom_hyperparams or {}, 2)}
            dropped = drop_contradicted(CLASSES[self.algo], hyperparams, ranks)
            for winner in dict.fromkeys(dropped.values()):
                losers = ", ".join(f"{name}={saved_hyperparams.pop(name)!r}" for name in dropped if dropped[name] == winner)
                source = "-params" if ranks[winner] == 2 else "the trial"
                print(f"Dropped {losers}: excluded by {winner}={hyperparams[winner]!r} of {source}")
        return hyperparams, saved_hyperparams

    return read_hyperparameters


def _tell_what_is_searched(original: Callable[..., float]) -> Callable[..., float]:
    """Samplers see the file's hyperparameters, so that they neither contradict nor drop what they do not search."""

    def objective(self: Any, trial: optuna.Trial) -> float:
        if self.algo not in CLASSES:
            return original(self, trial)
        token = searched.set(Searched(self._hyperparams, self.n_timesteps))
        try:
            return original(self, trial)
        finally:
            searched.reset(token)

    return objective


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "rl_zoo3.utils": _add_algorithms,
    "rl_zoo3.hyperparams_opt": _add_search_spaces,
    "rl_zoo3.exp_manager": _patch_manager,
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
