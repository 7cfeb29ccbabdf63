"""The startup hook as installed: the stock commands know our algorithms, and an interpreter start costs and risks nothing."""

import re
import shutil
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import CHECKOUT, Command

from sb3_ac_ext.zoo.registry import ALGORITHMS

OURS = ("sb3_ac_ext", "_sb3_ac_ext_hook")
STARTUP_FILES = {path.name for path in (CHECKOUT / "startup").glob("*sb3_ac_ext*") if path.is_file()}


class Environment:
    """A virtual environment that borrows every installed package of the parent but ours."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        borrowed = folder / "borrowed"
        borrowed.mkdir()
        for parent in filter(Path.is_dir, map(Path, sys.path)):
            for entry in parent.iterdir() if parent.name == "site-packages" else ():
                link = borrowed / entry.name
                if not link.exists() and not entry.name.startswith(OURS) and entry.suffix != ".pth":
                    link.symlink_to(entry)
        # sorts last: a startup file that is read before it must do without the borrowed packages
        (self.site_packages / "zz_borrowed.pth").write_text(f"{borrowed}\n")


@pytest.fixture(scope="module")
def wheel(python: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ("wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", folder, CHECKOUT)
    python("-m", "pip", *build, cwd=folder, PYTHONPATH="")
    (built,) = folder.glob("sb3_ac_ext-*.whl")
    return built


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment without us."""
    return Environment(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request: pytest.FixtureRequest, python: Command, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment into which pip has installed the package."""
    environment = Environment(tmp_path_factory.mktemp(request.param))
    what = [request.getfixturevalue("wheel")] if request.param == "wheel" else ["--no-build-isolation", "--editable", CHECKOUT]
    command = ("-m", "pip", "install", "--no-deps", "--no-index", *what)
    python(*command, cwd=environment.site_packages, executable=environment.python, PYTHONPATH="")
    return environment


@pytest.fixture
def inside(installed: Environment, python: Command, tmp_path: Path) -> Command:
    """Runs the interpreter of the installed environment."""

    def run(*args: object, **kwargs: object):
        return python(*args, **{"cwd": tmp_path, "executable": installed.python, "PYTHONPATH": "", **kwargs})

    return run


def test_startup_files_are_installed(installed: Environment) -> None:
    assert len(STARTUP_FILES) == 3
    assert STARTUP_FILES <= {path.name for path in installed.site_packages.iterdir()}


def test_start_file_names_the_same_function() -> None:
    """Read by Python 3.15 and later only; there it replaces the path file."""
    module, function = (CHECKOUT / "startup" / "sb3_ac_ext_zoo.start").read_text().strip().split(":")
    path_file = (CHECKOUT / "startup" / "sb3_ac_ext_zoo.pth").read_text()
    assert f"{module}.{function}()" in path_file and len(path_file.splitlines()) == 1
    assert f"def {function}():" in (CHECKOUT / "startup" / f"{module}.py").read_text()


def test_help_lists_our_names(inside: Command) -> None:
    shown = inside("-m", "rl_zoo3.train", "--help").stdout
    choices = re.search(r"--algo \{([^}]*)\}", shown)
    assert choices is not None
    assert {spec.name for spec in ALGORITHMS} | {"td3", "ppo"} <= set(re.split(r",\s*", choices[1]))


def test_stock_command_trains(inside: Command, tmp_path: Path) -> None:
    command = "-m rl_zoo3.train --algo td3x --env HopperBulletEnv-v0 -n 300"
    shown = inside(*command.split()).stdout
    assert "hyperparams/td3x.yml" in shown
    assert (tmp_path / "logs/td3x/HopperBulletEnv-v0_1/HopperBulletEnv-v0.zip").stat().st_size > 0


def test_data_files_are_found(inside: Command, installed: Environment, request: pytest.FixtureRequest) -> None:
    code = """if True:
        import sb3_ac_ext
        from sb3_ac_ext.zoo.registry import ALGORITHMS, data_dir
        assert all(spec.config.is_file() for spec in ALGORITHMS)
        assert list(data_dir("zoo_configs").glob("*.yml"))
        print(sb3_ac_ext.__file__, data_dir("hyperparams"), data_dir("zoo_configs"), sep="\\n")"""
    editable = "editable" in request.node.name
    package = (CHECKOUT if editable else installed.site_packages) / "sb3_ac_ext"
    data = CHECKOUT if editable else package  # an editable install uses the files of the checkout, not the copies made with it
    expected = [package / "__init__.py", data / "hyperparams", data / "zoo_configs"]
    assert [Path(line) for line in inside("-c", code).stdout.splitlines()] == expected


def test_nothing_is_imported_at_start(inside: Command, bare: Environment) -> None:
    code = "import sys; print(*sorted(sys.modules))"
    with_us = set(inside("-c", code).stdout.split())
    without = set(inside("-c", code, executable=bare.python).stdout.split())
    assert with_us - without == {"_sb3_ac_ext_hook"}


def test_opt_out(inside: Command) -> None:
    code = "import sys, _sb3_ac_ext_hook; _sb3_ac_ext_hook.startup(); print(_sb3_ac_ext_hook._Finder in sys.meta_path)"
    assert inside("-c", code).stdout == "True\n"
    assert inside("-c", code, SB3_AC_EXT_ZOO="0").stdout == "False\n"


def test_startup_is_idempotent(inside: Command) -> None:
    code = "import sys, _sb3_ac_ext_hook as hook; hook.startup(); hook.startup(); print(sys.meta_path.count(hook._Finder))"
    assert inside("-c", code).stdout == "1\n"


@pytest.mark.parametrize("position", [0, 1], ids=["before_ours", "after_ours"])
def test_another_finder_of_the_same_kind(position: int, python: Command, tmp_path: Path) -> None:
    """A tool that also asks all other finders must not send the two of them round in a circle."""
    code = """if True:
        import sys
        class Curious:
            seen = []
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                cls.seen.append(name)
                return next(filter(None, (f.find_spec(name, path, target) for f in sys.meta_path if f is not cls)), None)
        import _sb3_ac_ext_hook
        _sb3_ac_ext_hook.startup()
        sys.meta_path.insert(int(sys.argv[1]), Curious)
        from rl_zoo3 import ALGOS
        assert "rl_zoo3.utils" in Curious.seen and "td3x" in ALGOS"""
    python("-c", code, position, cwd=tmp_path)


LEFTOVERS = {
    "package_gone": (),
    "only_data_left": ("sb3_ac_ext/hyperparams",),  # what an editable install leaves when its checkout has moved
}


@pytest.mark.parametrize("folders", LEFTOVERS.values(), ids=LEFTOVERS)
def test_half_removed_package_warns_once(folders: tuple[str, ...], python: Command, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    for name in STARTUP_FILES:
        shutil.copy(CHECKOUT / "startup" / name, environment.site_packages)
    for folder in folders:
        (environment.site_packages / folder).mkdir(parents=True)
    code = "import rl_zoo3.train; print(*rl_zoo3.ALGOS)"
    done = python("-W", "always", "-c", code, cwd=tmp_path, executable=environment.python, PYTHONPATH="")
    assert "td3" in done.stdout.split() and "td3x" not in done.stdout.split()
    assert done.stderr.count("UserWarning: sb3_ac_ext could not add its algorithms") == 1
    assert "install sb3_ac_ext again, or delete" in done.stderr
    assert all(name in done.stderr for name in (*STARTUP_FILES, str(environment.site_packages)))


def test_path_file_without_the_hook_is_silent(python: Command, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    shutil.copy(CHECKOUT / "startup" / "sb3_ac_ext_zoo.pth", environment.site_packages)
    done = python("-c", "print('works')", cwd=tmp_path, executable=environment.python, PYTHONPATH="")
    assert (done.stdout, done.stderr) == ("works\n", "")


def test_error_in_the_package_leaves_the_zoo_working(python: Command, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    shutil.copy(CHECKOUT / "startup" / "_sb3_ac_ext_hook.py", environment.site_packages)
    (environment.site_packages / "sb3_ac_ext.py").write_text("raise RuntimeError('broken')")
    code = "import _sb3_ac_ext_hook; _sb3_ac_ext_hook.startup(); import rl_zoo3.train; print(*rl_zoo3.ALGOS)"
    done = python("-c", code, cwd=tmp_path, executable=environment.python, PYTHONPATH="")
    assert "td3" in done.stdout.split()
    assert done.stderr.count("RuntimeError('broken')") == 1 and "SB3_AC_EXT_ZOO=0" in done.stderr
