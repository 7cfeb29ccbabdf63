"""Whatever the arguments are, a model trains or says what is wrong with them, by an error that names the argument."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fuzz import GOOD, Case, cases, names_what_is_wrong, outcome_of
from hypothesis import HealthCheck, Phase, given, seed, settings
from models import EVERY, rows


@rows()
def test_trains_or_says_what_is_wrong(row: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    number, chosen = request.config.option.fuzz or 200, request.config.option.fuzz_seed

    @settings(
        max_examples=-(-number // len(EVERY)),
        database=None,
        deadline=None,
        derandomize=chosen is None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(cases(row))
    def holds(case: Case) -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            outcome = outcome_of(case, Path(folder))
        assert outcome.verdict in GOOD, f"{outcome.verdict} (--fuzz {number} --fuzz-seed {chosen}): {outcome.detail}"

    (holds if chosen is None else seed(chosen)(holds))()


def broken(progress: float) -> float:
    """A rate that is none after a while."""
    if progress < 0.5:
        raise RuntimeError("no rate")
    return 1e-3


@pytest.mark.parametrize(
    ("verdict", "case"),
    [
        ("trains", Case("td3x", {"gamma": 0.5})),
        ("trains", Case("ppox", {"gamma": 0.5}, discrete=True, loaded=True)),
        ("refused", Case("td3x", {"gamma": 2})),
        ("refused", Case("ppox", {"gamma": 2}, loaded=True)),
        ("diverged", Case("td3x", {"learning_rate": 1e38})),
        ("taken", Case("td3x", {"gamma": 0.5}, wrong=frozenset({"gamma"}))),
        ("other error", Case("td3x", {"learning_rate": broken})),
    ],
    ids=["legal", "legal at load", "out of range", "out of range at load", "too large", "declared as wrong", "broken"],
)
def test_verdicts(verdict: str, case: Case, tmp_path: Path) -> None:
    assert outcome_of(case, tmp_path).verdict == verdict


@pytest.mark.parametrize(
    ("changed", "message", "expected"),
    [
        ({"gamma": 2}, "gamma must be a number in [0, 1], got 2", True),
        ({"gamma": 2}, "gamma must be a number in [0, 1]", False),
        ({"gamma": 2}, "gammas: 2", False),
        ({"tau": 3, "gamma": 2}, "gamma must be a number in [0, 1], got 3", False),
        ({"policy_kwargs": {"n_critics": 0}}, "n_critics must be an integer >= 1, got 0", True),
        ({"stats_window_size": "x"}, "an integer is required", False),
    ],
)
def test_what_names_an_argument(changed: Mapping[str, Any], message: str, expected: bool) -> None:
    assert names_what_is_wrong(changed, message) is expected
