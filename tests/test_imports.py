"""Imports go down only, so that the mathematics can be read and tested without the rest (and nothing imports in a circle)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sb3_ac_ext

PACKAGE = Path(sb3_ac_ext.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
BELOW: dict[str, set[str]] = {"functional": set(), "validation": set(), "signatures": {"validation"}, "envs": {"validation"}}
"""Of each room the rooms that it may import besides itself; each of the following ones may import all above it here."""
BELOW["engine"] = {"functional", "validation"}
BELOW["networks"] = BELOW["buffers"] = {*BELOW["engine"], "engine", "envs", "signatures"}
BELOW["base"] = {*BELOW["networks"], "networks", "buffers"}
BELOW["actors"] = {*BELOW["base"], "base"}
FOUNDATIONS = set(BELOW)
COMMANDS = {"train", "enjoy"}
ALGORITHMS = {path.stem if path.parent == Path() else path.parts[0] for path in MODULES}
ALGORITHMS -= FOUNDATIONS | COMMANDS | {"__init__", "moved", "zoo"}
VARIANTS: dict[str, set[str]] = {}
"""The algorithms that subclass another one: from which."""
OPTIONAL = {"ray", "pettingzoo", "mpe2"}
"""What is imported when it is used, never with the package."""


def imports(nodes: Iterator[ast.AST], path: Path) -> set[str]:
    """The modules that these nodes of a file import: ``"torch"``, ``"sb3_ac_ext.base.noise"``, ..."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} line {node.lineno}: write the absolute import"
            names |= {f"{node.module}.{alias.name}" if node.module == "sb3_ac_ext" else node.module for alias in node.names}
    return names


def at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the file is imported: those outside functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from at_import(child)


def tree(path: Path) -> ast.Module:
    return ast.parse((PACKAGE / path).read_text())


def rooms(path: Path) -> set[str]:
    """The first-level modules of our package that a file imports, wherever in the file."""
    return {name.split(".")[1] for name in imports(ast.walk(tree(path)), path) if name.startswith("sb3_ac_ext.")}


def allowed(room: str) -> set[str]:
    """
    :param room: a first-level module of the package
    :return: those that it may import
    """
    if room == "functional":
        return {room}
    if room in FOUNDATIONS:
        return {*BELOW[room], room}
    if room in ALGORITHMS:
        return {*FOUNDATIONS, room, *VARIANTS.get(room, ())}
    everything = {*FOUNDATIONS, *ALGORITHMS}
    return {
        "moved": set(),
        "__init__": {*everything, "moved"},
        "zoo": {*everything, "zoo"},
    }.get(room, {"zoo"})


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_down_only(path: Path) -> None:
    room = path.stem if path.parent == Path() else path.parts[0]
    assert rooms(path) <= allowed(room)
    outside = {name.split(".")[0] for name in imports(ast.walk(tree(path)), path)} - {"sb3_ac_ext"}
    if room == "functional":
        assert outside <= {"torch", "math", "collections", "typing"}
    if room not in COMMANDS | {"zoo"}:
        assert "rl_zoo3" not in outside
    assert not OPTIONAL & {name.split(".")[0] for name in imports(at_import(tree(path)), path)}


def test_the_modules_are_found() -> None:
    assert {Path("td3x.py"), Path("zoo/patch.py"), Path("functional/__init__.py")} <= set(MODULES)
    assert {"td3x", "ddpgx", "maddpg"} <= ALGORITHMS
    assert {"base", "functional"} <= rooms(Path("td3x.py"))
    assert "gymnasium" in imports(at_import(tree(Path("envs/joint.py"))), Path("envs/joint.py"))


def test_what_is_optional_does_not_come_with_the_package() -> None:
    """As above, for what other packages' modules bring in."""
    source = f"import sys, sb3_ac_ext; print(*sys.modules.keys() & {OPTIONAL!r})"
    assert subprocess.run([sys.executable, "-c", source], check=True, capture_output=True, text=True).stdout.strip() == ""
