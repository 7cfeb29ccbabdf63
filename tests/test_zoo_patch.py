"""The patch of RL Zoo: complete in either import order, idempotent, and without effect on other algorithms."""

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import rl_zoo3.exp_manager
import yaml
from conftest import Command
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
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


@pytest.mark.parametrize("name", ["__init__", "read_hyperparameters", "objective"])
def test_manager_is_patched_once(name: str) -> None:
    patch.register()
    patched = getattr(ExperimentManager, name)
    patch.register()
    assert getattr(ExperimentManager, name) is patched
    assert not hasattr(patched.__wrapped__, "__wrapped__")


def test_default_config_is_ours_where_the_zoo_has_none(spec: AlgoSpec) -> None:
    patch.register()
    assert manager(spec.name).config == str(spec.config)
    assert spec.config.is_file()


@pytest.mark.parametrize("algo", ["td3x", "maddpg", "sac"])
def test_hyperparameter_files_name_our_replay_buffers(algo: str, tmp_path: Path) -> None:
    """For the Zoo's algorithms too, which replay uniformly by them."""
    patch.register()
    name = "PrioritizedJointReplayBuffer" if algo == "maddpg" else "PrioritizedReplayBuffer"
    config = tmp_path / "config.yml"
    values = {"policy": "MlpPolicy", "n_timesteps": 10, "replay_buffer_class": name, "replay_buffer_kwargs": "dict(alpha=0.5)"}
    config.write_text(yaml.dump({"Pendulum-v1": values}))
    made = ExperimentManager(
        argparse.Namespace(), algo, "Pendulum-v1", str(tmp_path), config=str(config), eval_freq=-1, device="cpu", verbose=0
    )
    model, _ = made.setup_experiment()
    model.env.close()
    assert type(model.replay_buffer).__name__ == name
    assert model.replay_buffer.alpha == 0.5


def test_names_that_the_zoo_has_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl_zoo3.exp_manager, "PrioritizedReplayBuffer", "the Zoo's own", raising=False)
    patch.register()
    assert vars(rl_zoo3.exp_manager)["PrioritizedReplayBuffer"] == "the Zoo's own"


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


DECAYING = {"type": "normal", "start": 0.5, "end": 0.1, "steps": 1000}
WITH_NOISE_TYPE = {"noise_type": "normal", "noise_std": 0.1}
WITH_DECAYING = {"exploration_noise": DECAYING, "warmup": "noise"}


def read(algo: str, folder: Path, entry: dict[str, Any], given: dict[str, Any], **study: Any) -> dict[str, Any]:
    """What the manager makes of a file's entry and ``-params``; what it makes the model of and what it saves are the same."""
    patch.register()
    config = folder / "file.yml"
    config.write_text(yaml.dump({"default": {"policy": "MlpPolicy", **entry}}, sort_keys=False))
    hyperparams, saved = manager(algo, config=str(config), hyperparams=given, **study).read_hyperparameters()
    assert hyperparams == dict(saved)
    assert hyperparams.pop("policy") == "MlpPolicy"
    return hyperparams


def test_given_noise_goes_before_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for algo in ("td3x", "ddpgx", "sacx", "maddpg"):
        assert read(algo, tmp_path, WITH_NOISE_TYPE, {"exploration_noise": DECAYING}) == {"exploration_noise": DECAYING}
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "Dropped" in line]
        assert line == f"Dropped noise_type='normal', noise_std=0.1: excluded by exploration_noise={DECAYING} of -params"

        assert read(algo, tmp_path, WITH_DECAYING, WITH_NOISE_TYPE) == WITH_NOISE_TYPE
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "Dropped" in line]
        assert line == f"Dropped exploration_noise={DECAYING}, warmup='noise': excluded by noise_type='normal' of -params"


@pytest.mark.parametrize("entry", [WITH_NOISE_TYPE, WITH_DECAYING, {**WITH_NOISE_TYPE, **WITH_DECAYING}], ids=str)
def test_nothing_is_dropped_without_need(entry: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Contradictions in the file, in ``-params``, and of algorithms that are not ours stay what they are."""
    assert read("td3x", tmp_path, entry, {"gamma": 0.9}) == {**entry, "gamma": 0.9}
    assert read("td3x", tmp_path, {}, entry) == entry
    assert read("td3", tmp_path, WITH_NOISE_TYPE, entry) == {**WITH_NOISE_TYPE, **entry}
    assert "Dropped" not in capsys.readouterr().out


def test_a_trial_goes_before_the_file_and_params_before_the_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = next(spec for spec in ALGORITHMS if spec.name == "td3x")
    storage = str(tmp_path / "study.log")
    backend = JournalStorage(JournalFileBackend(storage))
    study = optuna.create_study(storage=backend, study_name="study", sampler=optuna.samplers.RandomSampler(seed=0))
    while not study.trials or not study.trials[-1].params.get("noise_decay"):  # the Zoo takes trial 0 for none
        trial = study.ask()
        spec.sample(trial, 1, 1, {"using_her_replay_buffer": False, "her_kwargs": {}})
        study.tell(trial, 0.0)
    stored = {"storage": storage, "study_name": "study", "trial_id": trial.number}
    decaying = spec.convert(trial.params)["exploration_noise"]

    from_trial = read("td3x", tmp_path, WITH_NOISE_TYPE, {}, **stored)
    assert from_trial == spec.convert(trial.params)
    assert f"exploration_noise={decaying} of the trial" in capsys.readouterr().out
    given = read("td3x", tmp_path, WITH_NOISE_TYPE, WITH_NOISE_TYPE, **stored)
    assert given == {**{name: value for name, value in from_trial.items() if name != "exploration_noise"}, **WITH_NOISE_TYPE}


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
        "import sb3_ac_ext.zoo.registry, rl_zoo3.train",
        *(  # the same orders, by other modules
            pytest.param(imports, marks=pytest.mark.slow)
            for imports in ("import rl_zoo3.exp_manager, sb3_ac_ext", "import sb3_ac_ext, rl_zoo3")
        ),
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
