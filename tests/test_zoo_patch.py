"""The patch of RL Zoo: complete in either import order, idempotent, and nothing but additions."""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import rl_zoo3.exp_manager
from conftest import Command
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import ALGOS

import sb3_ac_ext
from sb3_ac_ext.zoo import patch
from sb3_ac_ext.zoo.registry import ALGORITHMS, AlgoSpec


def manager(algo: str, **kwargs: Any) -> ExperimentManager:
    return ExperimentManager(argparse.Namespace(), algo, "Pendulum-v1", "logs", **kwargs)


def zoo_hyperparams(algo: str) -> Path:
    return Path(rl_zoo3.exp_manager.__file__).parent / "hyperparams" / f"{algo}.yml"


def test_adds_what_is_missing(spec: AlgoSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (ALGOS, HYPERPARAMS_SAMPLER, HYPERPARAMS_CONVERTER):
        monkeypatch.delitem(table, spec.name, raising=False)
    patch.register()
    assert ALGOS[spec.name] is spec.cls
    assert HYPERPARAMS_SAMPLER[spec.name] is spec.sample
    assert HYPERPARAMS_CONVERTER[spec.name] is spec.convert


def test_leaves_other_entries_alone(spec: AlgoSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: tuple[dict[str, Any], ...] = (ALGOS, HYPERPARAMS_SAMPLER, HYPERPARAMS_CONVERTER)
    for table in tables:
        monkeypatch.setitem(table, spec.name, "the user's own")
    before = [dict(table) for table in tables]
    patch.register()
    assert [dict(table) for table in tables] == before


def test_manager_is_patched_once() -> None:
    patch.register()
    patched = ExperimentManager.__init__
    patch.register()
    assert ExperimentManager.__init__ is patched
    assert not hasattr(patched.__wrapped__, "__wrapped__")


def test_default_config_is_ours_where_the_zoo_has_none(spec: AlgoSpec) -> None:
    patch.register()
    assert manager(spec.name).config == str(spec.config)
    assert spec.config.is_file()


@pytest.mark.parametrize("given", ["no_such_file.yml", "a.python.package"])
def test_given_config_is_kept(spec: AlgoSpec, given: str) -> None:
    patch.register()
    assert manager(spec.name, config=given).config == given


def test_config_of_the_zoo_comes_first(spec: AlgoSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the Zoo bring a file for one of our names."""
    patch.register()
    theirs = tmp_path / "hyperparams" / f"{spec.name}.yml"
    theirs.parent.mkdir()
    theirs.touch()
    monkeypatch.setattr(rl_zoo3.exp_manager, "__file__", str(tmp_path / "exp_manager.py"))
    assert manager(spec.name).config == str(theirs)


@pytest.mark.parametrize("algo", ["td3", "an_algorithm_of_the_user"])
def test_config_of_other_algorithms_is_kept(algo: str) -> None:
    patch.register()
    assert manager(algo).config == str(zoo_hyperparams(algo))


def test_the_hook_and_the_patch_name_the_same_modules() -> None:
    import _sb3_ac_ext_hook

    assert set(_sb3_ac_ext_hook.ZOO_MODULES) == set(patch._PATCHES)


NO_STARTUP_FILES = """
import sys, _sb3_ac_ext_hook
assert "site" not in sys.modules and _sb3_ac_ext_hook._Finder not in sys.meta_path, "a startup file has run"
"""
REGISTERED = """
import importlib.resources, inspect, pathlib, sys
names = sys.argv[1:]
from rl_zoo3 import ALGOS, exp_manager, hyperparams_opt, utils
for table in (ALGOS, hyperparams_opt.HYPERPARAMS_SAMPLER, hyperparams_opt.HYPERPARAMS_CONVERTER):
    assert set(names) <= set(table), (names, sorted(table))
assert hasattr(exp_manager.ExperimentManager.__init__, "__wrapped__")

for module in (exp_manager, hyperparams_opt, utils):
    assert inspect.getsource(module) == pathlib.Path(module.__file__).read_text()
assert "def __init__(\\n" in inspect.getsource(exp_manager.ExperimentManager.__init__)
assert "trial_id" in inspect.signature(exp_manager.ExperimentManager).parameters
assert (importlib.resources.files("rl_zoo3") / "hyperparams" / "ppo.yml").read_text()
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import rl_zoo3, sb3_ac_ext",
        "import rl_zoo3.exp_manager, sb3_ac_ext",
        "import sb3_ac_ext, rl_zoo3",
        "import sb3_ac_ext.zoo.registry, rl_zoo3.train",
    ],
)
def test_either_import_order_registers(imports: str, python: Command, tmp_path: Path) -> None:
    """Without the startup files (-S), so that it is the import that registers; the parent's whole path makes up for -S."""
    hook = importlib.util.find_spec("_sb3_ac_ext_hook")
    assert hook is not None and hook.origin is not None
    path = [str(Path(sb3_ac_ext.__file__).parents[1]), str(Path(hook.origin).parent), *filter(None, sys.path)]
    code = f"{NO_STARTUP_FILES}\n{imports}\n{REGISTERED}"
    names = [spec.name for spec in ALGORITHMS]
    python("-S", "-W", "error::UserWarning", "-c", code, *names, cwd=tmp_path, PYTHONPATH=os.pathsep.join(path))


def test_importing_the_package_does_not_import_the_zoo(python: Command, tmp_path: Path) -> None:
    code = "import sys, sb3_ac_ext.zoo.registry; assert not [name for name in sys.modules if name.startswith('rl_zoo3')]"
    python("-c", code, cwd=tmp_path)
