"""Zips and replay buffers of an earlier version, and SB3's zips: they load, predict as they did and train on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from environments import BOX, CONTINUOUS, RandomEnv
from gymnasium import spaces
from parallel_environments import Crowd
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.save_util import load_from_zip_file

from sb3_ac_ext.zoo.registry import ALGORITHMS

DATA = Path(__file__).parents[1] / "data"
EXPECTED = json.loads((DATA / "expected.json").read_text())
FILES: dict[str, dict[str, Any]] = EXPECTED["files"]
CLASSES: dict[str, Any] = {spec.name: spec.cls for spec in ALGORITHMS}
ENVIRONMENTS: dict[str, Callable[[], Any]] = {
    "box": lambda: RandomEnv(BOX, CONTINUOUS),
    "wide": lambda: RandomEnv(BOX, BOX),
    "choice": lambda: RandomEnv(BOX, spaces.Discrete(3)),
    "crowd": lambda: Crowd(2),
}

OURS = [name for name in FILES if not name.startswith("sb3_")]
THEIRS = [name for name in FILES if name.startswith("sb3_")]


def load(name: str, **kwargs: Any) -> Any:
    return CLASSES[FILES[name]["algorithm"]].load(DATA / f"{name}.zip", device="cpu", **kwargs)


def predict(name: str, model: Any) -> np.ndarray:
    """Its actions at the recorded observations."""
    observations = np.array(EXPECTED["observations"][FILES[name]["environment"]], np.float32)
    return model.predict(observations, deterministic=True)[0]


def numbers(value: Any) -> Any:
    """The tensors and numbers of a nested dict, without what is None or a name."""
    if isinstance(value, dict):
        kept = {str(key): numbers(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not None}
    return th.as_tensor(value) if isinstance(value, (th.Tensor, int, float)) else None


def optimizer_states(model: Any) -> dict[str, Any]:
    """What each optimizer knows of each parameter, by the parameter's name in the policy, or else the optimizer's."""
    names = {id(parameter): name for name, parameter in model.policy.named_parameters()}
    states = {}
    for attribute in model._get_torch_save_params()[0]:
        optimizer = model
        for part in attribute.split("."):
            optimizer = getattr(optimizer, part)
        if isinstance(optimizer, th.optim.Optimizer):
            states |= {names.get(id(parameter), attribute): numbers(state) for parameter, state in optimizer.state.items()}
    return states


@pytest.mark.parametrize("name", FILES)
def test_predicts_as_before(name: str) -> None:
    np.testing.assert_allclose(predict(name, load(name)), FILES[name]["actions"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OURS)
def test_networks_and_optimizers_are_those_of_the_file(name: str) -> None:
    _, saved, _ = load_from_zip_file(DATA / f"{name}.zip", device="cpu")
    loaded = load(name).get_parameters()
    assert loaded.keys() == saved.keys()
    for part in saved:
        ours, theirs = (numbers(content[part].get("state", content[part])) for content in (loaded, saved))  # without rates
        assert theirs
        th.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", THEIRS)
def test_networks_and_optimizers_are_those_of_sb3(name: str) -> None:
    ours = load(name)
    theirs = ours.sb3_class.load(DATA / f"{name}.zip", device="cpu")
    th.testing.assert_close(ours.policy.state_dict(), theirs.policy.state_dict(), rtol=0, atol=0)
    states = optimizer_states(theirs)
    assert states
    th.testing.assert_close(optimizer_states(ours), states, rtol=0, atol=0)


@pytest.mark.parametrize("name", FILES)
def test_trains_on(name: str) -> None:
    model = load(name, env=ENVIRONMENTS[FILES[name]["environment"]]())
    before, updates, steps = model.policy.state_dict(), model._n_updates, model.num_timesteps
    before = {key: value.clone() for key, value in before.items()}
    model.learn(24, reset_num_timesteps=False)
    assert model._n_updates > updates
    assert model.num_timesteps >= steps + 24
    after = model.policy.state_dict()
    assert all(th.isfinite(value).all() for value in after.values())
    assert any(not th.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", [name for name in FILES if "rewards" in FILES[name]])
def test_goes_on_with_its_replay_buffer_as_before(name: str) -> None:
    """Same transitions, same draws from them, same updates."""
    model = load(name)
    model.load_replay_buffer(DATA / f"{name}_replay_buffer.pkl")
    buffer = model.replay_buffer
    np.testing.assert_array_equal(buffer.rewards.ravel(), np.array(FILES[name]["rewards"], np.float32))
    assert buffer.size() == len(buffer.rewards)
    model.set_logger(Logger(None, []))
    model.train(gradient_steps=5, batch_size=8)
    np.testing.assert_allclose(predict(name, model), FILES[name]["actions_after_5_updates"], rtol=0, atol=1e-5)
