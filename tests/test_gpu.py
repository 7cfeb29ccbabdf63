"""On a CUDA device: updates replayed as graphs come to what they come to without, and files go from one device to another."""

from typing import Any

import numpy as np
import pytest
import torch as th
from models import EVERY, environment, rows, small_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not th.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:You are trying to run .* on the GPU"),  # SB3 prefers a CPU for small policies
]

DRAWING = {"sacx", "maddpg", "acktr", "opac"}
"""Rows whose updates draw random numbers, which a graph draws otherwise."""
QUIET = {"td3x": {"target_policy_noise": 0.0}}
"""What keeps others from it."""
FEW = ("ordinary: it has not run often enough", "ordinary: the size of its batches varies")
"""Why a function may run as it stands."""


def trained(row: str, engine: bool, steps: int = 120) -> Any:
    model = small_model(row, device="cuda", engine=engine, **QUIET.get(row, {}))
    return model.learn(steps)


def parameters(model: Any) -> list[np.ndarray]:
    return [value.detach().cpu().numpy() for value in model.policy.state_dict().values()]


@rows(EVERY)
def test_graphs_come_to_what_functions_come_to(row: str) -> None:
    model, plain = trained(row, engine=True), trained(row, engine=False)
    print(row, model.engine_report())
    assert all(np.isfinite(part).all() for part in parameters(model))
    if row not in DRAWING:
        for ours, theirs in zip(parameters(model), parameters(plain), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-3)
    updates = {name: how for name, how in model.engine_report().items() if name not in ("act", "replay")}
    assert set(updates.values()) <= {"replayed", *FEW}, updates
    assert "replayed" in updates.values() or row == "reinforce"  # whose batches are as long as episodes


@rows(EVERY)
def test_files_go_from_one_device_to_another(row: str, tmp_path: Any) -> None:
    model = trained(row, engine=True, steps=40)
    model.save(tmp_path / "model")
    observation = model.observation_space.sample()
    expected, _ = model.predict(observation, deterministic=True)
    for device in ("cpu", "cuda"):
        loaded = type(model).load(tmp_path / "model", env=environment(row), device=device)
        action, _ = loaded.predict(observation, deterministic=True)
        np.testing.assert_allclose(action, expected, atol=1e-5)
        loaded.learn(40)
