"""Actors in processes of their own do what an actor here does; and what becomes of a run in which something goes wrong."""

import json
import os
import pickle
import secrets
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_ac_ext.actors import ray_connection, ray_pool
from sb3_ac_ext.actors.actor import Actor, ActorError, ActorValueError, Recipe, Weights
from sb3_ac_ext.actors.process import Process, packed, unpacked
from sb3_ac_ext.actors.ray_pool import RayPool
from sb3_ac_ext.buffers.segments import Segment
from sb3_ac_ext.validation import ArgumentError, NonFiniteError, UnsupportedError

N_STEPS = 5


class Faulty(gym.Wrapper):
    """CartPole that does something else in its third step, or when it is made; each that is made writes a line."""

    def __init__(self, fault: str = "", file: Path | None = None) -> None:
        super().__init__(gym.make("CartPole-v1"))
        self.fault, self.t = fault, 0
        if file is not None:
            with file.open("a") as lines:
                lines.write("made\n")
        if fault == "make":
            raise ValueError("the sensor is broken")

    def step(self, action: Any) -> Any:
        self.t += 1
        obs, reward, *rest = super().step(action)
        if self.t == 3 and self.fault == "step":
            raise ValueError("the sensor is broken")
        if self.t == 3 and self.fault == "unpicklable":
            raise Unpicklable(print, "the sensor is broken")
        if self.t == 3 and self.fault == "exit":
            os._exit(1)
        return obs, float("nan") if self.t == 3 and self.fault == "nan" else reward, *rest


class Unpicklable(Exception):
    """What a pickle of it cannot be made of again."""

    def __init__(self, function: Any, text: str) -> None:
        super().__init__(text)


@dataclass(frozen=True)
class Source:
    """Two environments."""

    fault: str = ""
    file: Path | None = None

    def make(self, seed: int) -> VecEnv:
        env = DummyVecEnv([lambda: Faulty(self.fault, self.file)] * 2)
        env.seed(seed)
        return env


class Reporting(Actor):
    """Says which process it is in, and takes its time where it is told to."""

    def report(self, weights: Weights) -> Segment:
        time.sleep(weights.settings.get("sleep", 0))
        segment = self.segment(weights)
        segment.infos[0][0]["pid"] = os.getpid()
        return segment


def policy() -> ActorCriticPolicy:
    env = gym.make("CartPole-v1")
    return ActorCriticPolicy(env.observation_space, env.action_space, lambda _: 1e-3, net_arch=[8])


POLICY = policy()


def recipe(source: Any = Source()) -> Recipe:
    return Recipe(Reporting, source, cloudpickle.dumps(POLICY), seed=3, engine=False)


def weights(version: int, bias: float | None = None, **settings: Any) -> Weights:
    """Read-only, as Ray gives them to actors."""
    parameters = {name: value.numpy().copy() for name, value in POLICY.state_dict().items()}
    if bias is not None:
        parameters["action_net.bias"][:] = bias
    for array in parameters.values():
        array.flags.writeable = False
    return Weights(version, parameters, {"n_steps": N_STEPS, **settings})


def a_pool(n_actors: int = 1, source: Any = Source(), **kwargs: Any) -> Any:
    return closing(RayPool(Reporting.report, recipe(source), n_actors, **kwargs))


def assert_contiguous(consumed: Iterable[Iterable[int]]) -> dict[tuple[int, int], int]:
    """
    :param consumed: actor, generation and sequence number of what was taken
    :return: how many of each actor and generation, whose numbers are 0, 1, 2, ...
    """
    sequences = defaultdict(list)
    for actor, generation, sequence in consumed:
        sequences[actor, generation].append(sequence)
    for numbers in sequences.values():
        assert numbers == list(range(len(numbers)))
    return {key: len(numbers) for key, numbers in sequences.items()}


# Without Ray


def test_no_shared_memory_is_said_before_ray_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    monkeypatch.setattr(ray_connection, "SHARED_MEMORY", tmp_path / "shm")
    with pytest.raises(UnsupportedError, match=f"shared memory at {tmp_path / 'shm'}, and there is none: .*--shm-size"):
        RayPool(Reporting.report, recipe(), 2)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedError, match=r'pip install "sb3_ac_ext\[distributed\]"'):
        RayPool(Reporting.report, recipe(), 2)


@pytest.mark.parametrize(("address", "reason"), [("head:6379", ": nobody there"), ("ray://head:1", "")])
def test_no_cluster_at_the_address(monkeypatch: pytest.MonkeyPatch, address: str, reason: str) -> None:
    def init(address: str, **kwargs: Any) -> None:
        raise ConnectionError("nobody there")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    with pytest.raises(ArgumentError, match=f"ray_address must be .* got '{address}'{reason}"):
        RayPool(Reporting.report, recipe(), 2, address=address)


def test_results_travel_as_memory_that_can_be_written() -> None:
    value = {"a": np.arange(6.0).reshape(2, 3), "empty": np.zeros((0, 2)), "text": "b", "strided": np.arange(6)[::2]}
    pickled, buffers = packed(value)
    for buffer in buffers:
        buffer.flags.writeable = False
    back = unpacked(pickled, buffers)
    assert back["text"] == "b"
    for name in ("a", "empty", "strided"):
        np.testing.assert_array_equal(back[name], value[name])
        assert back[name].flags.writeable and not np.shares_memory(back[name], value[name])


def in_a_process(source: Any) -> Any:
    """What a learner gets of an actor's process, without the process."""
    process = Process(1, 2)
    started = unpacked(*process.start(([], pickle.dumps((recipe(source), Reporting.report)))))
    return unpacked(*process.do(weights(4))) if started is True else started


@pytest.mark.parametrize("fault", ["make", "step"])
def test_a_failure_keeps_its_cause(fault: str) -> None:
    failure = in_a_process(Source(fault))
    assert type(failure.error) is ActorValueError
    assert str(failure.error) == "actor 1 (generation 2) failed: ValueError: the sensor is broken"
    assert type(failure.cause) is ValueError
    assert any("in __init__" if fault == "make" else "in step" in note for note in failure.cause.__notes__)


def test_a_failure_that_cannot_be_pickled_keeps_its_text() -> None:
    failure = in_a_process(Source("unpicklable"))
    assert str(failure.error) == "actor 1 (generation 2) failed: Unpicklable: the sensor is broken"
    assert type(failure.cause) is RuntimeError
    assert "in step" in str(failure.cause)


def test_a_number_that_is_not_finite_stays_one() -> None:
    failure = in_a_process(Source("nan"))
    assert type(failure.error) is NonFiniteError
    assert str(failure.error).startswith("actor 1 (generation 2): environment 0 gave a non-finite reward")


# On Ray


@pytest.mark.ray
def test_a_killed_process_is_replaced(ray: Any) -> None:
    with a_pool(2) as pool:
        results = [pool.take(weights(version)) for version in range(20)]
        while len(pool.delivered) < 2:
            results.append(pool.take(weights(20)))
        victim = results[-1]
        pool.begin(weights(21, sleep=0.3))
        os.kill(victim.infos[0][0]["pid"], signal.SIGKILL)
        while results[-1].generation == 0 or len(results) < 40:
            results.append(pool.take(weights(22)))
        assert (pool.restarts, pool.lost) == (1, 1)
        assert list(pool.consumed) == [(result.actor, result.generation, result.sequence) for result in results]
    counts = assert_contiguous(pool.consumed)
    assert set(counts) == {(0, 0), (1, 0), (victim.actor, 1)}
    assert counts[victim.actor, 0] == victim.sequence + 1
    first = {result.generation: result for result in reversed(results) if result.actor == victim.actor}
    assert not np.array_equal(first[0].observations[0], first[1].observations[0]), "the same episodes again"
    assert first[1].version == 22


@pytest.mark.ray
def test_a_process_does_what_an_actor_here_does(ray: Any) -> None:
    here = Reporting()
    here.start(recipe())
    with a_pool() as pool:
        for version in range(3):
            expected = here.do(Reporting.report, weights(version, bias=version))
            result = pool.take(weights(version, bias=version))
            assert (result.version, result.sequence) == (version, version)
            np.testing.assert_array_equal(result.observations, expected.observations)
            np.testing.assert_array_equal(result.actions, expected.actions)
            np.testing.assert_array_equal(result.behaviour["log_probs"], expected.behaviour["log_probs"])
            assert result.rewards.flags.writeable


@pytest.mark.ray
def test_nothing_is_done_with_weights_from_before_the_start(ray: Any) -> None:
    with a_pool(2) as pool:
        pool.begin(weights(0))
        assert {pool.take(weights(7)).version, pool.take(weights(7)).version} == {7}


@pytest.mark.ray
def test_weights_are_sent_once_for_all_actors_until_they_change(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_pool(2) as pool:
        pool.take(weights(0))
        sent, put = [], ray.put
        monkeypatch.setattr(ray, "put", lambda value: sent.append(value) or put(value))
        pool.take(weights(1))
        assert not sent, "few weights are a part of the task"
        monkeypatch.setattr(ray_pool, "FEW", 0)
        pool.take(weights(0))
        sent.clear()
        for _ in range(5):
            pool.take(weights(0))
        assert not sent
        for others in (weights(1), weights(1, bias=1.0), weights(1, bias=1.0, sleep=0.0)):
            for _ in range(3):
                pool.take(others)
            assert sent.pop() is others and not sent


@pytest.mark.ray
def test_of_results_that_wait_the_rarer_actors_goes_first(ray: Any) -> None:
    with a_pool(2) as pool:
        while len(pool.delivered) < 2:
            pool.take(weights(0, sleep=0.1))
        for _ in range(2 * (max(pool.delivered.values()) + 5) - pool.delivered.total()):
            pool.begin(weights(0))
            time.sleep(0.2)
            pool.take(weights(0))
        assert len(set(pool.delivered.values())) == 1


@pytest.mark.ray
@pytest.mark.parametrize("fault", ["make", "step"])
def test_an_exception_is_not_tried_again(ray: Any, tmp_path: Path, fault: str) -> None:
    with a_pool(1, Source(fault, tmp_path / "made")) as pool:
        with pytest.raises(ActorError) as caught:
            pool.take(weights(0))
        assert str(caught.value) == "actor 0 (generation 0) failed: ValueError: the sensor is broken"
        assert type(caught.value.__cause__) is ValueError
        assert (tmp_path / "made").read_text() == "made\n" * (1 if fault == "make" else 2)
        assert (pool.restarts, pool.lost, list(pool.consumed)) == (0, 0, [])
        with pytest.raises(ActorError, match="closed"):
            pool.take(weights(0))


@pytest.mark.ray
def test_a_process_that_always_dies_is_not_replaced_for_ever(ray: Any) -> None:
    with a_pool(1, Source("exit"), most_restarts=1) as pool:
        with pytest.raises(ActorError, match=r"actor 0 \(generation 1\) has died, after actor 0 was replaced 1 times"):
            pool.take(weights(0))
        assert (pool.restarts, pool.lost) == (1, 2)


@pytest.mark.ray
def test_what_ray_does_not_have_is_named(ray: Any) -> None:
    with a_pool(2, resources={"actor_node": 2, "num_cpus": 1}, timeout=1) as pool:
        asked = r"1 CPU \(4 there, 4 free\), 2 actor_node \(0 there, 0 free\)"
        with pytest.raises(ActorError, match=f"for 1 s .* any of actors 0, 1; each needs {asked}"):
            pool.take(weights(0))


# In a process of their own


OWN = """
import ray

from test_ray_pool import *

with pytest.raises(ArgumentError, match="actor_resources of 2 actors must not be more than this machine has, 0 node, got 1"):
    RayPool(Reporting.report, recipe(), 2, resources={"node": 1})
assert not ray.is_initialized()
with a_pool(2, resources={"num_cpus": 20}) as pool:
    with a_pool(1) as another:
        another.take(weights(0))
    assert ray.cluster_resources()["CPU"] == 40
    pool.take(weights(0))
assert not ray.is_initialized()
pool.close()
"""


def begun(script: str, home: Path, **kwargs: Any) -> tuple[subprocess.Popen[str], str]:
    """A program that has a Ray of its own, and a mark that is in the environment of all its processes."""
    mark = secrets.token_hex()
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"HOME": str(home), "MARK": mark, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", script], env=env, cwd=home, **pipes, **kwargs), mark


def output(script: str, home: Path) -> str:
    """What a program that has a Ray of its own prints."""
    program, _ = begun(script, home)
    printed, errors = program.communicate(timeout=240)
    assert program.returncode == 0, errors
    return printed


@pytest.mark.ray
def test_a_ray_of_our_own_is_as_large_as_asked_and_ends_with_the_last_pool(tmp_path: Path) -> None:
    assert output(OWN, tmp_path) == ""


def marked(mark: str) -> list[str]:
    """The commands of all processes that have it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"MARK={mark}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has ended
            pass
    return found


INTERRUPTED = """
from test_ray_pool import *

pool = RayPool(Reporting.report, recipe(), 2)
for version in range(4):
    pool.take(weights(version))
print("working", flush=True)
while True:
    pool.take(weights(4, sleep=60.0))
"""


@pytest.mark.ray
def test_nothing_is_left_behind_by_ctrl_c(tmp_path: Path) -> None:
    program, mark = begun(INTERRUPTED, tmp_path, start_new_session=True)
    assert program.stdout is not None
    assert program.stdout.readline() == "working\n", program.communicate()
    assert len(marked(mark)) >= 3
    time.sleep(0.5)
    os.killpg(program.pid, signal.SIGINT)
    _, errors = program.communicate(timeout=60)
    assert program.returncode != 0 and "KeyboardInterrupt" in errors
    until = time.monotonic() + 20
    while (left := marked(mark)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left


NODES = """
from ray.cluster_utils import Cluster

from test_ray_pool import *

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
node = cluster.add_node(num_cpus=1, resources={"actor_node": 2})
pool = RayPool(Reporting.report, recipe(), 2, address=cluster.address, resources={"actor_node": 1, "num_cpus": 0})
while len(pool.delivered) < 2:
    pool.take(weights(9))
pool.begin(weights(10, sleep=0.5))
cluster.remove_node(node, allow_graceful=False)
cluster.add_node(num_cpus=1, resources={"actor_node": 2})
while len({actor for actor, generation, _ in pool.consumed if generation}) < 2 or len(pool.consumed) < 30:
    pool.take(weights(11))
pool.close()
print(json.dumps({"consumed": list(pool.consumed), "restarts": pool.restarts, "lost": pool.lost}))
cluster.shutdown()
"""


@pytest.mark.ray
def test_a_node_goes_and_another_comes(tmp_path: Path) -> None:
    told = json.loads(output(NODES, tmp_path).splitlines()[-1])
    assert (told["restarts"], told["lost"]) == (2, 2)
    assert set(assert_contiguous(told["consumed"])) >= {(0, 1), (1, 1)}
