"""Files written when modules had other names: what pickles name is found, as the same objects."""

import inspect
import pickle
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import gymnasium as gym
import pytest
from gymnasium import spaces

from sb3_ac_ext import DDPGX
from sb3_ac_ext.envs.joint_spaces import JointBox
from sb3_ac_ext.moved import FINDER, GONE, MOVED, install


def by_old_name(module: str, name: str) -> Any:
    """What a pickle gets that names an object of a module."""
    return pickle.loads(f"c{module}\n{name}\n.".encode())


def classes_of(module: ModuleType) -> dict[str, type]:
    return {name: cls for name, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == module.__name__}


@pytest.mark.parametrize(("old", "new"), MOVED.items(), ids=MOVED)
def test_an_old_name_gives_the_same_objects(old: str, new: str) -> None:
    module, alias = import_module(new), import_module(old)
    assert alias is not module
    assert (alias.__name__, module.__name__) == (old, new)
    assert module.__spec__ is not None and module.__spec__.name == new
    for name, value in vars(module).items():
        if not name.startswith("__"):
            assert getattr(alias, name) is value
    for name, cls in classes_of(module).items():
        assert by_old_name(old, name) is cls


def test_most_old_modules_hold_a_class() -> None:
    """Otherwise the comparison above says nothing of pickles."""
    assert sum(bool(classes_of(import_module(new))) for new in MOVED.values()) > len(MOVED) / 2


def test_the_classes_of_ddpgx_are_where_they_were() -> None:
    """It was a module and is a package."""
    for name, cls in {**DDPGX.policy_aliases, "DDPGX": DDPGX}.items():
        assert by_old_name("sb3_ac_ext.ddpgx", name) is cls


def test_a_pickle_of_before_is_read() -> None:
    space = JointBox({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Discrete(3)}, seed=3)
    today = pickle.dumps(space, protocol=0)
    before = today.replace(b"sb3_ac_ext.envs.joint_spaces", b"sb3_ac_ext.maddpg.spaces")
    assert before != today
    read = pickle.loads(before)
    assert type(read) is JointBox and read == space
    assert b"sb3_ac_ext.envs.joint_spaces" in pickle.dumps(read)


def test_the_entry_point_of_before_is_found() -> None:
    """Specs of environments are pickled with the model that trained on them."""
    pytest.importorskip("mpe2")
    spec = gym.spec("MPESimpleSpread-v3")
    assert spec.entry_point == "sb3_ac_ext.envs.joint:make_joint_env"
    spec.entry_point = "sb3_ac_ext.maddpg.environment:make_joint_env"
    env = gym.make(spec)
    assert isinstance(env.observation_space, JointBox)
    env.close()


def test_a_process_that_has_imported_nothing_reads_an_old_name() -> None:
    source = "import pickle; print(pickle.loads(b'csb3_ac_ext.common.actor_critic\\nMlpPolicy\\n.').__module__)"
    done = subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "stable_baselines3.common.policies"


def test_the_old_names_are_only_old_names() -> None:
    for name in GONE | MOVED.keys():
        spec = find_spec(name)
        assert spec is not None and spec.loader is FINDER, f"{name} exists again"
    for name in MOVED.values():
        spec = find_spec(name)
        assert spec is not None and spec.loader is not FINDER
    assert find_spec("sb3_ac_ext.common.nothing") is None
    with pytest.raises(ImportError, match="nothing"):
        exec("from sb3_ac_ext.common.noise import nothing")


def test_installing_twice_installs_once() -> None:
    install()
    assert sys.meta_path.count(FINDER) == 1
