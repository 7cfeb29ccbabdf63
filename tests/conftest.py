"""What several test modules share: commands in their own process, because that is how RL Zoo is used."""

import gc
import os
import random
import secrets
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import stable_baselines3.common.policies
import torch

from sb3_ac_ext.zoo.registry import ALGORITHMS, AlgoSpec

CHECKOUT = Path(__file__).parents[1]

torch.set_num_threads(1)  # the networks of the tests are small

Command = Callable[..., subprocess.CompletedProcess[str]]


def pytest_addoption(parser: pytest.Parser) -> None:
    """How many configurations `test_fuzz.py` draws: always the same 200, or any others."""
    parser.addoption("--fuzz", type=int, help="draw so many configurations of all algorithms, others each time")
    parser.addoption("--fuzz-seed", type=int, help="draw those of this seed, which was printed, again")


def pytest_configure(config: pytest.Config) -> None:
    """The seed is the same in all processes."""
    if config.option.fuzz and config.option.fuzz_seed is None:
        config.option.fuzz_seed = random.randrange(2**32)


def pytest_report_header(config: pytest.Config) -> str | None:
    """The seed, so that it can be given again."""
    seed = config.option.fuzz_seed
    return None if seed is None else f"fuzz: --fuzz {config.option.fuzz or 200} --fuzz-seed {seed}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Few tests that take long come first, or one process works at them when the others have nothing left to do."""
    items.sort(key=lambda item: item.path.name not in ("test_zoo_cli.py", "test_hook.py"))


def pytest_collection_finish() -> None:
    """What is imported stays, so the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(scope="session", params=ALGORITHMS, ids=lambda spec: spec.name)
def spec(request: pytest.FixtureRequest) -> AlgoSpec:
    """Every algorithm of the registry in turn."""
    return request.param


@pytest.fixture
def double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """SB3 casts observations to float32; a policy in float64 is given float64 instead."""

    def doubled(obs: Any, space: object, normalize_images: bool = True) -> Any:
        return {name: part.double() for name, part in obs.items()} if isinstance(obs, dict) else obs.double()

    monkeypatch.setattr(stable_baselines3.common.policies, "preprocess_obs", doubled)


@pytest.fixture(scope="session")
def python() -> Command:
    """Runs an interpreter, by default the one that runs the tests, and fails with the output unless it exits as expected."""

    def run(
        *args: object, cwd: Path, executable: object = sys.executable, status: int = 0, **env: str
    ) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if name != "SB3_AC_EXT_ZOO"}
        headless = {"MPLBACKEND": "Agg", "SDL_VIDEODRIVER": "dummy"}
        done = subprocess.run(
            [str(executable), *map(str, args)],
            cwd=cwd,
            env={**inherited, **headless, **env},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == status, f"{' '.join(done.args)}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def ray() -> Iterator[Any]:
    """Ray on this machine, one for all tests; with a token of its own, as it would leave one in the user's home."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex())
        patch.setenv("RAY_AUTH_MODE", "token")  # as Ray itself sets it for its processes, where it finds none
        patch.delenv("RAY_AUTH_MODE")
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield ray
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # it does not wait for what it ends
            ray.shutdown()
            gc.collect()
