"""Imports go down only, so that the mathematics can be read and tested without the rest (and nothing imports in a circle)."""

import ast
from pathlib import Path

import pytest

import sb3_ac_ext

PACKAGE = Path(sb3_ac_ext.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
FOUNDATIONS = {"functional", "common"}
COMMANDS = {"train", "enjoy"}
ALGORITHMS = (
    {path.stem if path.parent == Path() else path.parts[0] for path in MODULES}
    - FOUNDATIONS
    - COMMANDS
    - {
        "__init__",
        "zoo",
    }
)


def imported(path: Path) -> set[str]:
    """The modules that a file imports, wherever in the file: ``"torch"``, ``"sb3_ac_ext.common"``, ..."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} line {node.lineno}: write the absolute import"
            names |= {f"{node.module}.{alias.name}" if node.module == "sb3_ac_ext" else node.module for alias in node.names}
    return names


def parts_of_package(path: Path) -> set[str]:
    """The first-level modules of our package that a file imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("sb3_ac_ext.")}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_down_only(path: Path) -> None:
    part = path.stem if path.parent == Path() else path.parts[0]
    outside = {name.split(".")[0] for name in imported(path)} - {"sb3_ac_ext"}
    allowed = {
        "functional": {"functional"},
        "common": FOUNDATIONS,
        "zoo": FOUNDATIONS | ALGORITHMS | {"zoo"},
        "__init__": FOUNDATIONS | ALGORITHMS,
    }.get(part, {"zoo"} if part in COMMANDS else FOUNDATIONS | {part})
    assert parts_of_package(path) <= allowed
    if part == "functional":
        assert outside <= {"torch", "math", "collections", "typing"}
    if part not in COMMANDS | {"zoo"}:
        assert "rl_zoo3" not in outside


def test_the_modules_are_found() -> None:
    assert {Path("td3x.py"), Path("zoo/patch.py"), Path("functional/__init__.py")} <= set(MODULES)
    assert "td3x" in ALGORITHMS
    assert {"common", "functional"} <= parts_of_package(Path("td3x.py"))
