"""The README's table and code, and the tables of docs/arguments.md, are those of the package."""

import re
import runpy
from pathlib import Path

import pytest

from sb3_ac_ext.signatures import arguments_of
from sb3_ac_ext.zoo.registry import ALGORITHMS, AlgoSpec

CHECKOUT = Path(__file__).parent.parent
README = (CHECKOUT / "README.md").read_text()
ARGUMENTS = (CHECKOUT / "docs" / "arguments.md").read_text()


def test_table_of_algorithms_is_the_registry() -> None:
    table = README.split("\n## Algorithms\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `(\w+)` \|", table, re.MULTILINE)
    assert rows == [(spec.name, spec.cls.__name__, spec.cls.sb3_class.__name__) for spec in ALGORITHMS]  # type: ignore[attr-defined]


def test_tables_of_arguments_are_the_declarations() -> None:
    rewritten = runpy.run_path(str(CHECKOUT / "docs" / "make_arguments.py"))["rewritten"]
    assert rewritten(ARGUMENTS) == ARGUMENTS, "docs/arguments.md is stale: run `python docs/make_arguments.py`"


def test_every_argument_is_explained(spec: AlgoSpec) -> None:
    assert [name for name, argument in arguments_of(spec.cls).items() if not argument.meaning] == []


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
