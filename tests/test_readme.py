"""The README's table and code are those of the package."""

import re
from pathlib import Path

import pytest
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_ac_ext.base.typing import constructor_keys
from sb3_ac_ext.zoo.registry import ALGORITHMS, AlgoSpec

CHECKOUT = Path(__file__).parent.parent
README = (CHECKOUT / "README.md").read_text()
ARGUMENTS = (CHECKOUT / "docs" / "arguments.md").read_text()


def test_table_of_algorithms_is_the_registry() -> None:
    table = README.split("\n## Algorithms\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(\w+)` \|", table, re.MULTILINE)
    assert rows == [(spec.name, spec.cls.__name__, spec.cls.sb3_class.__name__) for spec in ALGORITHMS]  # type: ignore[attr-defined]


def documented(heading: str) -> set[str]:
    """The arguments in the table under a heading."""
    table = ARGUMENTS.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return {name for row in re.findall(r"^\|(.*?)\|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}


def test_arguments_beyond_sb3_are_documented(spec: AlgoSpec) -> None:
    own = constructor_keys(spec.cls) - constructor_keys(spec.cls.sb3_class)  # type: ignore[attr-defined]
    kind = "off" if issubclass(spec.cls, OffPolicyAlgorithm) else "on"
    shared = documented("Arguments of every algorithm") | documented(f"Arguments of every {kind}-policy algorithm")
    assert documented(f"`{spec.name}`") == own - shared


@pytest.mark.parametrize(
    ("number", "printed"), [(0, r"return -\d+"), (1, r"agent_0 -[\d.]+, agent_1 -[\d.]+, agent_2 -[\d.]+")]
)
def test_snippets_run(
    number: int, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 2
    exec(compile(snippets[number], "README.md", "exec"), {})
    assert re.fullmatch(printed + "\n", capsys.readouterr().out)
    assert any(tmp_path.iterdir())
