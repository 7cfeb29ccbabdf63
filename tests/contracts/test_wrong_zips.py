"""A zip of another algorithm is refused when it is loaded, by an error that says whose it is; all others load as in SB3."""

import io
import json
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from environments import BOX, CONTINUOUS, RandomEnv
from gymnasium import spaces
from models import EVERY, algorithm_class, environment, rows, small_model
from sb3_contrib import ARS, QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3

from sb3_ac_ext import PPOX, TD3X
from sb3_ac_ext.base.on_policy import OnPolicyMixin
from sb3_ac_ext.validation import ArgumentError

DATA = Path(__file__).parents[1] / "data"
EARLIER: dict[str, str] = {  # files that do not name their algorithm, and whose they are
    name: algorithm_class(file["algorithm"]).__name__
    for name, file in json.loads((DATA / "expected.json").read_text())["files"].items()
    if not name.startswith("sb3_")
}
SB3 = TD3, DDPG, SAC, PPO, A2C, TRPO, DQN, QRDQN, TQC, CrossQ, ARS, RecurrentPPO, MaskablePPO
THEIRS = {cls.__name__: cls for cls in SB3}
LOADERS = {row.sb3_class.__name__: row.__name__ for row in map(algorithm_class, EVERY) if row.sb3_class.__name__ in THEIRS}
"""Which of ours loads SB3's."""


def model_of(name: str) -> Any:
    """A small one of a row, or of SB3."""
    if name in EVERY:
        return small_model(name)
    policy = "MlpLstmPolicy" if name == "RecurrentPPO" else "MlpPolicy"
    actions = spaces.Discrete(3) if name in ("DQN", "QRDQN", "MaskablePPO") else CONTINUOUS
    env = RandomEnv(BOX, actions)
    if name == "ARS":
        return ARS(policy, env, device="cpu", policy_kwargs={"net_arch": [8]})
    return small_model(THEIRS[name], env=env, policy=policy, policy_kwargs={"optimizer_kwargs": {}})


@cache
def zip_of(name: str) -> bytes:
    """What a model saved: of a row, of SB3, or the file of an earlier version."""
    return (DATA / f"{name[:-8]}.zip").read_bytes() if name.endswith(" earlier") else saved(model_of(name))


def saved(model: Any) -> bytes:
    file = io.BytesIO()
    model.save(file)
    return file.getvalue()


def load(row: Any, content: bytes, **kwargs: Any) -> Any:
    return algorithm_class(row).load(io.BytesIO(content), device="cpu", **kwargs)


@rows()
@pytest.mark.parametrize("name", [*EVERY, *(f"{name} earlier" for name in EARLIER), *THEIRS])
def test_only_zips_of_the_algorithm_load(row: str, name: str) -> None:
    cls = algorithm_class(row)
    saver = name if name in THEIRS else EARLIER.get(name.removesuffix(" earlier")) or algorithm_class(name).__name__
    loader = LOADERS.get(saver, saver)
    if cls.__name__ == loader:
        assert type(load(row, zip_of(name))) is cls
    else:
        message = rf"path must be a file of {cls.__name__}, got one that {saver} saved: load it with {loader}\.load\(\)"
        with pytest.raises(ArgumentError, match=message):
            load(row, zip_of(name), env=environment(row))


@rows()
def test_subclasses_load_each_other(row: str) -> None:
    cls = algorithm_class(row)
    mine, other = (type(name, (cls,), {}) for name in ("Mine", "Other"))
    file = saved(small_model(mine, env=environment(row)))
    for loader in (mine, cls, other):
        assert type(load(loader, file)) is loader
    assert type(load(mine, zip_of(row))) is mine
    for wrong in {*EVERY} - {row}:
        with pytest.raises(ArgumentError, match=r"got one that Mine saved: load it with Mine\.load\(\)"):
            load(wrong, file)


class Own(OnPolicyMixin, A2C):
    """An algorithm of somebody's own, with an argument of the name of one of ours."""

    sb3_class = A2C

    def __init__(self, *args: Any, surrogate: str = "none", **kwargs: Any) -> None:
        self.surrogate = surrogate
        super().__init__(*args, **kwargs)

    def _networks(self) -> dict[str, Any]:
        return {"policy": self._network("policy", self.policy, self.policy.optimizer)}


def unnamed(content: bytes) -> bytes:
    """As an earlier version would have written it."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            part = old.read(name)
            if name == "data":
                data = json.loads(part)
                del data["_saver"]
                part = json.dumps(data).encode()
            new.writestr(name, part)
    return file.getvalue()


def test_algorithms_of_users() -> None:
    file = saved(Own("MlpPolicy", RandomEnv(BOX, CONTINUOUS), device="cpu", surrogate="own"))
    for content in (file, unnamed(file), zip_of("A2C")):
        assert type(load(Own, content)) is Own
    assert load(Own, unnamed(file)).surrogate == "own"
    with pytest.raises(ArgumentError, match=r"file of Own, got one that PPOX saved: load it with PPOX\.load\(\)"):
        load(Own, zip_of("ppox"))
    with pytest.raises(ArgumentError, match=r"file of PPOX, got one that Own saved: load it with Own\.load\(\)"):
        load("ppox", file)


def test_a_loaded_zip_is_its_loaders_when_it_is_saved() -> None:
    model = load("ppox", saved(load("ppox", zip_of("PPO"))))
    assert model._saver == ("PPOX", "PPOX")
    assert json.loads(zipfile.ZipFile(io.BytesIO(saved(model))).read("data"))["_saver"] == ["PPOX", "PPOX"]


def test_td3_with_some_of_what_ddpg_has_is_td3() -> None:
    file = saved(small_model(TD3, policy_delay=1, target_noise_clip=0))
    assert type(load("td3x", file)) is TD3X
    with pytest.raises(ArgumentError, match="got one that TD3 saved"):
        load("ddpgx", file)


@pytest.mark.parametrize("name", ["acktr", "acktr earlier", "A2C"])
def test_nothing_of_a_wrong_zip_is_unpickled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = zip_of(name)
    monkeypatch.setattr(cloudpickle, "loads", lambda _: pytest.fail("unpickled"))
    with pytest.raises(ArgumentError):
        load("ppox", content)


def test_names_and_open_files(tmp_path: Path) -> None:
    for name in ("ppox", "acktr"):
        (tmp_path / f"{name}.zip").write_bytes(zip_of(name))
    for path in (tmp_path / "ppox", str(tmp_path / "ppox"), tmp_path / "ppox.zip"):
        assert type(PPOX.load(path)) is PPOX
    for path in (tmp_path / "acktr", str(tmp_path / "acktr.zip")):
        with pytest.raises(ArgumentError, match="ACKTR"):
            PPOX.load(path)
    with (tmp_path / "ppox.zip").open("rb") as file:
        file.seek(7)
        assert PPOX._check_saver(file) is None
        assert file.tell() == 7
        assert type(PPOX.load(file)) is PPOX
    custom = {"learning_rate": 0.0, "clip_range": 0.1, "n_epochs": 3}
    assert load("ppox", zip_of("PPO"), custom_objects=custom).n_epochs == 3


@rows()
def test_what_else_is_wrong_is_said_as_by_sb3(row: str, tmp_path: Path) -> None:
    cls = algorithm_class(row)
    with pytest.raises(ValueError, match=r"wasn't a zip-file"):
        load(row, b"no zip")
    with pytest.raises(ValueError, match=r"wasn't a zip-file"):
        load(row, zip_of(row)[:100])
    with pytest.raises(FileNotFoundError):
        cls.load(tmp_path / "missing")
    with pytest.raises(TypeError, match="invalid type"):
        cls.load(3)
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    with pytest.raises(AssertionError, match="No data found"):
        load(row, empty.getvalue())
    if row != "maddpg":
        with pytest.raises(ValueError, match="spaces do not match"):
            load(row, zip_of(row), env=RandomEnv(BOX, spaces.Box(-1, 1, (5,))))
