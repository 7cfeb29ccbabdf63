"""The hyperparameter files: every key is an argument, every value is accepted, and the Zoo's values are unchanged."""

import inspect
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import pytest
import rl_zoo3
import yaml
from models import taken
from rl_zoo3 import ALGOS
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.utils import get_wrapper_class
from sb3_contrib import TRPO
from stable_baselines3 import DDPG, PPO, SAC, TD3
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import nn  # noqa: F401 (for the values that the Zoo evaluates)

from sb3_ac_ext.signatures import arguments_of
from sb3_ac_ext.zoo.registry import ALGORITHMS, AlgoSpec, data_dir

ZOO_KEYS = frozenset(
    {
        "n_timesteps",
        "n_envs",
        "normalize",
        "frame_stack",
        "env_wrapper",
        "vec_env_wrapper",
        "callback",
        "env_kwargs",
        "monitor_kwargs",
    }
)
NOISE_KEYS = frozenset({"noise_type", "noise_std"})

OFF_POLICY = {"learning_starts": 30, "batch_size": 8}
ON_POLICY = {
    "n_envs": 2,
    "n_particles": 2,
    "n_steps": 10,
    "batch_size": 10,
    "n_epochs": 2,
    "rollout_episodes": 1,
    "learning_starts": 0,
    "replay_ratio": 20,
}
"""What trains soon, so far as an algorithm has it."""

SPECS = {spec.name: spec for spec in ALGORITHMS}
STUDIES = sorted(data_dir("zoo_configs").glob("*.yml"))
FILES = [spec.config for spec in ALGORITHMS] + STUDIES


def spec_of(path: Path) -> AlgoSpec:
    """The algorithm that a file is for: hyperparams/<algo>.yml, zoo_configs/<algo>_<study>.yml."""
    return SPECS[path.stem.split("_")[0]]


def read(path: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(path.read_text())


def zoo_file(cls: type) -> Path | None:
    """The Zoo's file for the nearest parent of ``cls`` that the Zoo trains."""
    names = {algorithm: name for name, algorithm in ALGOS.items() if name not in SPECS}
    parent = next((base for base in cls.__mro__ if base in names), None)
    return parent and Path(rl_zoo3.__file__).parent / "hyperparams" / f"{names[parent]}.yml"


def untested(path: Path) -> set[str]:
    """The environments that a file's own comment says were not tried."""
    comments = re.findall(r"^# Untested: (.*)$", path.read_text(), flags=re.MULTILINE)
    return {word.strip(",") for comment in comments for word in comment.split("(")[0].split()}


def entries() -> list[Any]:
    """
    Every entry of every file, with its environment.

    By default one environment is trained in for all entries of a file that differ by it, by the length of training, or by
    fractions alone.
    """
    found = []
    for path in FILES:
        seen = []
        for env_id, values in read(path).items():
            others = {name: type(value) if isinstance(value, float) else value for name, value in values.items()}
            others.pop("n_timesteps", None)
            again = others in seen and env_id not in untested(path)
            if env_id != "default":
                marks = [pytest.mark.slow] if again else []
                found.append(pytest.param(path, env_id, id=f"{path.stem}-{env_id}", marks=marks))
                seen += [] if env_id in untested(path) else [others]
    return found


every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def test_studies_are_found():
    """Without this an empty folder would pass every other test."""
    assert STUDIES


@every_file
def test_first_line_names_the_source(path: Path):
    first = path.read_text().splitlines()[0]
    assert re.match(r"# Source: .*\w{3}", first), first


@every_file
def test_keys_are_arguments_and_required_ones_are_there(path: Path):
    cls = spec_of(path).cls
    allowed = ZOO_KEYS | arguments_of(cls).keys() | (NOISE_KEYS if issubclass(cls, OffPolicyAlgorithm) else frozenset())
    for env_id, values in read(path).items():
        assert set(values) <= allowed, env_id
        assert {"policy", "n_timesteps"} <= set(values), env_id
        # The Zoo reads `n_timesteps` with int(), which would hide a fraction
        assert isinstance(values["n_timesteps"], int) and values["n_timesteps"] > 0, env_id
        # The Zoo evaluates a missing noise type, not a null one
        assert values.get("noise_type", "normal") is not None, env_id
        assert ("noise_type" in values) == ("noise_std" in values), env_id


@every_file
def test_environments_are_known(path: Path):
    for env_id in read(path).keys() - untested(path) - {"default"}:
        if not env_id.startswith(("MPE", "ALE/")):  # which come with extras
            assert gym.spec(env_id).id == env_id


def test_file_has_a_default_and_every_environment_that_the_zoo_tuned(spec: AlgoSpec):
    ours = read(spec.config)
    assert "default" in ours
    parent = zoo_file(spec.cls)
    assert parent is None or set(read(parent)) <= set(ours)


@pytest.mark.parametrize(
    ("name", "cls"),
    [("td3x", TD3), ("ddpgx", DDPG), ("sacx", SAC), ("ppox", PPO), ("trpox", TRPO)],
    ids=lambda value: str(value),
)
def test_values_are_the_zoos(name: str, cls: type):
    defaults = {name: p.default for name, p in inspect.signature(cls.__init__).parameters.items()}

    def effective(values: dict[str, Any]) -> dict[str, Any]:
        given = {**defaults, **values}
        evaluated = {key: given[key] for key in ("policy_kwargs", "replay_buffer_kwargs", "normalize") if key in given}
        evaluated = {key: eval(value) if isinstance(value, str) else value or {} for key, value in evaluated.items()}
        return {**given, **evaluated}

    ours = read(SPECS[name].config)
    theirs = read(zoo_file(cls))
    for env_id in theirs:
        assert effective(ours[env_id]) == effective(theirs[env_id]), env_id
    for env_id in (name for name in theirs if name.endswith(("-v2", "-v4"))):
        successor = f"{env_id[:-1]}5"
        assert successor not in gym.registry or ours[successor] == ours[env_id], env_id


@pytest.mark.parametrize(("path", "env_id"), entries())
def test_entry_trains(path: Path, env_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The Zoo builds the model from the file; it takes a few dozen steps, some of them with updates."""
    if env_id in untested(path):
        with pytest.raises((gym.error.Error, ImportError)):
            env = gym.spec(env_id).make()
            get_wrapper_class(read(path)[env_id])(env)
        return
    if env_id.startswith("MPE") and find_spec("mpe2") is None:
        pytest.skip("needs the extra marl")
    if env_id.startswith("ALE/") and find_spec("ale_py") is None:
        pytest.skip("needs the extra atari")
    if "mujoco" in str(gym.spec(env_id).entry_point) and find_spec("mujoco") is None:
        pytest.skip("needs the extra mujoco")
    spec = spec_of(path)
    monkeypatch.setitem(ALGOS, spec.name, spec.cls)
    monkeypatch.chdir(tmp_path)  # MuJoCo writes a log file where it runs
    small = OFF_POLICY if issubclass(spec.cls, OffPolicyAlgorithm) else ON_POLICY
    override = {**{name: value for name, value in small.items() if name in ZOO_KEYS}, **taken(spec.cls, small)}
    if spec.name == "reinforce":
        override["learning_rate"] = 1e-3  # an episode may be all of the training, and a falling rate is 0 behind it
    if env_id.startswith("ALE/"):
        override["env_kwargs"] = {"max_num_frames_per_episode": 1000}  # some points of a game, which has 3000 frames or more
        override["max_rollout_steps"] = 500  # in place of 50000, whose memory takes longer than the steps
    manager = ExperimentManager(
        SimpleNamespace(),
        spec.name,
        env_id,
        str(tmp_path),
        n_timesteps=40,
        eval_freq=-1,
        hyperparams=override,
        config=str(path),
        log_interval=-1,
        device="cpu",
        verbose=0,
    )
    model, saved = manager.setup_experiment()
    initial = [parameter.detach().clone() for parameter in model.policy.parameters()]
    manager.learn(model)
    assert model.num_timesteps >= 40
    assert any((old != new).any() for old, new in zip(initial, model.policy.parameters(), strict=True))
    assert saved.keys() == read(path)[env_id].keys() | override.keys()
