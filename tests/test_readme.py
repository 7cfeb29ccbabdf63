"""The README's table and code are those of the package."""

import re
from pathlib import Path

import pytest

from sb3_ac_ext.common.typing import constructor_keys
from sb3_ac_ext.zoo.registry import ALGORITHMS, AlgoSpec

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_table_of_algorithms_is_the_registry() -> None:
    table = README.split("\n## Algorithms\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(\w+)` \|", table, re.MULTILINE)
    assert rows == [(spec.name, spec.cls.__name__, spec.cls.sb3_class.__name__) for spec in ALGORITHMS]  # type: ignore[attr-defined]


def documented(heading: str) -> set[str]:
    """The arguments in the table under a heading."""
    table = README.split(f"\n### {heading}\n")[1].split("\n### ")[0]
    return {name for row in re.findall(r"^\|(.*?)\|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}


def test_arguments_beyond_sb3_are_documented(spec: AlgoSpec) -> None:
    own = constructor_keys(spec.cls) - constructor_keys(spec.cls.sb3_class)  # type: ignore[attr-defined]
    shared = documented("Arguments of every algorithm")
    assert shared <= own
    assert documented(f"`{spec.name}`") == own - shared


def test_application_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    assert re.fullmatch(r"return -\d+\n", capsys.readouterr().out)
    assert (tmp_path / "pendulum.zip").is_file()
