"""
RL Zoo's own commands, unmodified, with the algorithms of the registry.

Each of them trains, goes on and is watched; what the Zoo does around that is tried with one algorithm of each kind.

Commands that start like others, which have an interpreter of their own here, are forks of a process that has imported the Zoo.
"""

import csv
import json
import math
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import optuna
import pytest
import yaml
import zoo_commands
from conftest import Command
from models import BY_SEGMENTS, taken, taking
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import load_from_pkl

from sb3_ac_ext.zoo.registry import ALGORITHMS, AlgoSpec

ONE_OF_EACH_KIND = [spec for spec in ALGORITHMS if spec.name in ("td3x", "ppox")]
one_of_each_kind = pytest.mark.parametrize("spec", ONE_OF_EACH_KIND, ids=lambda spec: spec.name, indirect=True)
whatever_the_kind = pytest.mark.parametrize(
    "spec",
    [pytest.param(spec, marks=[pytest.mark.slow] if spec.name == "ppox" else []) for spec in ONE_OF_EACH_KIND],
    ids=lambda spec: spec.name,
    indirect=True,
)
"""Of what the Zoo does with any algorithm, in processes of its own, which cost several seconds each."""

ENV_ID = "Pendulum-v1"  # its episodes have 200 steps
STEPS = 1000


@dataclass
class Run:
    """One training whose files the tests look at."""

    spec: AlgoSpec
    root: Path
    printed: str

    @property
    def folder(self) -> Path:
        """The newest: a search before the training takes a number too."""
        return max((self.root / "logs" / self.spec.name).glob(f"{ENV_ID}_*"), key=lambda path: int(path.name.split("_")[1]))

    @property
    def zip(self) -> Path:
        return self.folder / f"{ENV_ID}.zip"

    @property
    def data(self) -> dict[str, Any]:
        """The attributes that the saved model has as JSON."""
        with zipfile.ZipFile(self.zip) as archive:
            return json.loads(archive.read("data"))

    def hyperparams(self) -> dict[str, Any]:
        return dict(yaml.load((self.folder / ENV_ID / "config.yml").read_text(), Loader=yaml.UnsafeLoader))

    def episodes(self, monitor: int = 0) -> int:
        with (self.folder / f"{monitor}.monitor.csv").open() as lines:
            return len(list(csv.reader(lines))) - 2  # a comment and a header


def is_off_policy(spec: AlgoSpec) -> bool:
    return issubclass(spec.cls, OffPolicyAlgorithm)


def params(**hyperparams: Any) -> list[str]:
    return ["-params", *(f"{name}:{value!r}" for name, value in hyperparams.items())]


def small(spec: AlgoSpec, **hyperparams: Any) -> list[str]:
    """``-params`` that make a training take a second."""
    several = spec.name in taking("n_particles")
    chosen = {"policy_kwargs": {"net_arch": [16]}, **({"n_envs": 2, "n_particles": 2} if several else {"n_envs": 1})}
    of_the_kind = {"learning_starts": 100, "buffer_size": 2000} if is_off_policy(spec) else {"n_steps": 50, "batch_size": 50}
    return params(**{**chosen, **taken(spec.cls, of_the_kind), **hyperparams})


OWN_NOISE = {"exploration_noise": {"type": "normal", "start": 0.5, "end": 0.1, "steps": 1000}, "warmup": "noise"}

Train = Callable[..., Run]
Forked = Callable[..., str]

BY_DEFAULT = {spec.name for spec in ALGORITHMS} - {*BY_SEGMENTS} | {"a3c"}
"""Of those whose rollouts are segments of actors one is enough, which has two."""


@pytest.fixture(
    scope="session",
    params=[pytest.param(spec, marks=[] if spec.name in BY_DEFAULT else pytest.mark.slow) for spec in ALGORITHMS],
    ids=lambda spec: spec.name,
)
def spec(request: pytest.FixtureRequest) -> AlgoSpec:
    """In the place of all algorithms of the registry."""
    return request.param


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Forked:
    """Runs a command of the Zoo in a fork, and gives what it prints."""

    def run(module: str, *args: object, cwd: Path) -> str:
        return zoo_commands.run(module, *args, cwd=cwd, output=tmp_path_factory.mktemp("output"))

    with pytest.MonkeyPatch.context() as patch:  # the same as `python` has
        patch.delenv("SB3_AC_EXT_ZOO", raising=False)
        patch.setenv("MPLBACKEND", "Agg")
        patch.setenv("SDL_VIDEODRIVER", "dummy")
        zoo_commands.start()
    return run


@pytest.fixture(scope="session")
def train(python: Command, forked: Forked) -> Train:
    """Trains on Pendulum-v1 in a folder of its own; in an interpreter of its own an algorithm of each kind."""

    def run(spec: AlgoSpec, root: Path, *args: object, module: str = "rl_zoo3.train", fork: bool = False, **env: str) -> Run:
        common = ("--algo", spec.name, "--env", ENV_ID, "--num-threads", 1, "--seed", 1, "--eval-episodes", 1)
        if fork or spec not in ONE_OF_EACH_KIND:
            return Run(spec, root, forked(module, *common, *args, cwd=root))
        return Run(spec, root, python("-m", module, *common, *args, cwd=root, **env).stdout)

    return run


@pytest.fixture(scope="session")
def trained(spec: AlgoSpec, train: Train, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished training; tests read it and write elsewhere."""
    every = ("--eval-freq", 250, "--eval-episodes", 2, "--save-freq", 500, "--save-replay-buffer")
    return train(spec, tmp_path_factory.mktemp(spec.name), "-n", STEPS, *every, *small(spec))


def test_training_writes_the_zoos_files(trained: Run) -> None:
    assert f"hyperparams/{trained.spec.name}.yml" in trained.printed
    actors, envs = (trained.hyperparams().get(name, 1) for name in ("n_actors", "n_envs"))  # each actor with an environment
    assert trained.episodes() == actors * (STEPS // (actors * envs) // 200)
    assert trained.data["num_timesteps"] == STEPS
    assert {path.name for path in trained.folder.glob("*.zip")} == {
        f"{ENV_ID}.zip",
        "best_model.zip",
        "rl_model_500_steps.zip",
        "rl_model_1000_steps.zip",
    }
    evaluations = np.load(trained.folder / "evaluations.npz")
    assert evaluations["timesteps"].tolist() == [250, 500, 750, 1000]
    assert np.isfinite(evaluations["results"]).all()
    assert trained.hyperparams()["policy_kwargs"] == {"net_arch": [16]}


def test_continues_from_the_zip_with_its_replay_buffer(trained: Run, train: Train, tmp_path: Path) -> None:
    more = train(trained.spec, tmp_path, "-n", 300, "-i", trained.zip, "--save-replay-buffer", *small(trained.spec))
    assert "Loading pretrained agent" in more.printed
    assert more.data["_n_updates"] > trained.data["_n_updates"] > 0
    if not hasattr(trained.spec.cls, "save_replay_buffer"):
        assert not (trained.folder / "replay_buffer.pkl").exists()
        return
    replays = [load_from_pkl(run.folder / "replay_buffer.pkl") for run in (trained, more)]
    if is_off_policy(trained.spec):
        assert [replay.size() for replay in replays] == [STEPS, STEPS + 300]
    else:  # of segments, which impala keeps none of by default
        assert [sum(one.n_steps for one in replay.segments) for replay in replays] in ([0, 0], [STEPS, STEPS + 300])


def test_given_noise_goes_before_that_of_the_default_file(train: Train, tmp_path: Path) -> None:
    spec = next(spec for spec in ALGORITHMS if spec.name == "td3x")
    run = train(spec, tmp_path, "-n", 150, *small(spec, **OWN_NOISE), fork=True)
    assert "Dropped noise_type='normal', noise_std=0.1: excluded by exploration_noise" in run.printed
    assert OWN_NOISE.items() <= run.hyperparams().items() and "noise_type" not in run.hyperparams()
    assert OWN_NOISE.items() <= run.data.items()


@whatever_the_kind
def test_several_environments_in_processes_of_their_own(spec: AlgoSpec, train: Train, tmp_path: Path) -> None:
    run = train(spec, tmp_path, "-n", 400, "--vec-env", "subproc", "-tb", "tb", *small(spec, n_envs=2))
    assert run.data["n_envs"] == 2 and run.data["num_timesteps"] == 400
    assert [run.episodes(0), run.episodes(1)] == [1, 1]
    (events,) = (tmp_path / "tb" / ENV_ID).glob(f"{spec.cls.__name__}_1/events.*")
    assert events.stat().st_size > 0


@whatever_the_kind
def test_ctrl_c_saves(spec: AlgoSpec, tmp_path: Path) -> None:
    command = (
        "-u",
        "-m",
        "rl_zoo3.train",
        "--algo",
        spec.name,
        "--env",
        ENV_ID,
        "-n",
        10**6,
        "--num-threads",
        1,
        *small(spec),
    )

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, and so their children, ignore it

    arguments = [sys.executable, *map(str, command)]
    with subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.PIPE, text=True, preexec_fn=listen) as process:
        assert process.stdout is not None
        try:
            next(line for line in process.stdout if "n_updates" in line)  # it has learned something
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    run = Run(spec, tmp_path, "")
    assert (200 if is_off_policy(spec) else 100) <= run.data["num_timesteps"] < 10**6
    assert spec.cls.load(run.zip)._n_updates > 0


def test_enjoy(trained: Run, python: Command, forked: Forked) -> None:
    watch = ("rl_zoo3.enjoy", "--algo", trained.spec.name, "--env", ENV_ID, "-f", "logs", "-n", 400, "--no-render")
    started = trained.spec in ONE_OF_EACH_KIND
    shown = python("-m", *watch, cwd=trained.root).stdout if started else forked(*watch, cwd=trained.root)
    assert "2 Episodes" in shown and "Mean reward: -" in shown


@whatever_the_kind
def test_record_video(trained: Run, forked: Forked, tmp_path: Path) -> None:
    record = ("--algo", trained.spec.name, "--env", ENV_ID, "-f", "logs", "-n", 20, "-o", tmp_path)
    forked("rl_zoo3.record_video", *record, cwd=trained.root)
    (video,) = tmp_path.glob("*.mp4")
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(video)
    assert frames >= 20 and seconds > 0


DRAW = """
import json, runpy, sys
from matplotlib import pyplot as plt
algo, root, out = sys.argv[1:]

def run(module, *args):
    sys.argv = [module, *args]
    runpy.run_module("rl_zoo3.plots." + module, run_name="__main__")
    drawn = {}
    for number in plt.get_fignums():
        axes = plt.figure(number).gca()
        drawn[plt.figure(number).get_label()] = {
            "curves": [[line.get_xdata().tolist(), line.get_ydata().tolist()] for line in axes.lines],
            "bars": [bar.get_height() for container in axes.containers for bar in container],
        }
        plt.savefig(f"{out}/{module}_{number}.png")
    plt.close("all")
    return drawn

common = ["-a", algo, "-e", "Pendulum"]
shown = {"plot_train": run("plot_train", *common, "-f", root, "-w", "2")}
shown["all_plots"] = run("all_plots", *common, "-f", root, "-o", out + "/results", "--no-million")
shown["plot_from_file"] = run("plot_from_file", "-i", out + "/results.pkl", "-o", out + "/bars.png", "--format", "png")
json.dump(shown, open(out + "/shown.json", "w"))
"""


@whatever_the_kind
def test_plots_draw(trained: Run, python: Command, tmp_path: Path) -> None:
    for number in (1, 2):  # plot_from_file leaves out what has been run only once
        shutil.copytree(trained.folder, tmp_path / "logs" / trained.spec.name / f"{ENV_ID}_{number}")
    python("-c", DRAW, trained.spec.name, "logs", tmp_path, cwd=tmp_path)
    shown = json.loads((tmp_path / "shown.json").read_text())

    curves = shown["plot_train"]["Training Episodic Reward"]["curves"]
    assert [steps for steps, _ in curves] == 2 * [[400, 600, 800, 1000]]  # each the mean of two episodes, at the second's end
    assert all(-2000 < reward < 0 for _, rewards in curves for reward in rewards)

    evaluations = np.load(trained.folder / "evaluations.npz")
    ((steps, scores),) = shown["all_plots"]["Results Pendulum"]["curves"]
    assert steps == evaluations["timesteps"].tolist()
    np.testing.assert_allclose(scores, evaluations["results"].mean(axis=1))

    ((_, scores_again),) = shown["plot_from_file"]["Results Pendulum"]["curves"]
    assert scores_again == scores
    (bar,) = shown["plot_from_file"]["Sensitivity plot"]["bars"]
    assert math.isclose(bar, scores[-1])
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


SEARCH = ("-optimize", "-n", 150, "--n-trials", 2, "--n-evaluations", 1, "--sampler", "random", "--no-optim-plots")


@one_of_each_kind
def test_search_in_memory(spec: AlgoSpec, train: Train, tmp_path: Path) -> None:
    run = train(spec, tmp_path, *SEARCH, *small(spec), fork=True)
    assert "Best trial:" in run.printed
    (report,) = (tmp_path / "logs" / spec.name).glob("report_*.csv")
    with report.open() as lines:
        trials = list(csv.DictReader(lines))
    assert len(trials) == 2 and any(trial["state"] == "COMPLETE" for trial in trials)


@pytest.mark.parametrize(
    ("spec", "storage"),
    [
        pytest.param(spec, storage, id=f"{name}-{spec.name}", marks=[] if chosen else pytest.mark.slow)
        for spec, by_default in zip(ONE_OF_EACH_KIND, ("sqlite", "journal"), strict=True)
        for name, storage in {"sqlite": "sqlite:///study.db", "journal": "study.log"}.items()
        for chosen in [name == by_default]
    ],
    indirect=["spec"],
)
def test_search_in_a_storage_then_train_a_trial(spec: AlgoSpec, train: Train, tmp_path: Path, storage: str) -> None:
    study = ("--storage", storage, "--study-name", "s")
    noise = OWN_NOISE if is_off_policy(spec) else {}
    train(spec, tmp_path, *SEARCH, *study, *small(spec, **noise), fork=True)
    run = train(spec, tmp_path, "-n", 150, *study, "--trial-id", 1, *params(n_envs=1, **noise), fork=True)
    assert "Loading from Optuna study..." in run.printed
    assert noise.items() <= run.data.items()

    if storage.endswith(".log"):
        backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / storage))
        trials = optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(backend)).trials
    else:
        trials = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/study.db").trials
    assert [trial.state.is_finished() for trial in trials] == [True, True] and trials[0].params != trials[1].params
    expected = spec.convert(dict(trials[1].params))
    assert {name: value for name, value in run.hyperparams().items() if name in expected} == expected


@whatever_the_kind
def test_opt_out_hides_the_name(spec: AlgoSpec, python: Command, tmp_path: Path) -> None:
    refused = python("-m", "rl_zoo3.train", "--algo", spec.name, cwd=tmp_path, status=2, SB3_AC_EXT_ZOO="0")
    assert f"invalid choice: '{spec.name}'" in refused.stderr


@whatever_the_kind
def test_own_commands_work_without_the_hook(spec: AlgoSpec, train: Train, python: Command, tmp_path: Path) -> None:
    run = train(spec, tmp_path, "-n", 200, *small(spec), module="sb3_ac_ext.train", SB3_AC_EXT_ZOO="0")
    assert run.data["num_timesteps"] == 200
    watch = ("--algo", spec.name, "--env", ENV_ID, "-f", "logs", "-n", 200, "--no-render")
    assert "1 Episodes" in python("-m", "sb3_ac_ext.enjoy", *watch, cwd=tmp_path, SB3_AC_EXT_ZOO="0").stdout
