"""Segments side by side, what is behind each of their steps, and their replay."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_ac_ext.buffers.segment_replay import SegmentReplay
from sb3_ac_ext.buffers.segments import Segment, final_observations, stacked

CPU = th.device("cpu")


def segment(offset: int = 0, steps: int = 3, envs: int = 2, ends: dict[tuple[int, int], str] | None = None) -> Segment:
    """
    Observation t of environment i is ``offset + 10 t + i``, its action 0.5 more, its reward 0.25 more.

    :param ends: of a step and an environment how an episode ended there; its last observation is ``-(offset + 10 t + i)``
    """
    numbers = offset + 10.0 * np.arange(steps + 1)[:, None] + np.arange(envs)
    dones = np.zeros((steps, envs), dtype=bool)
    infos: list[list[dict[str, Any]]] = [[{"of no interest": t} for _ in range(envs)] for t in range(steps)]
    for (t, i), how in (ends or {}).items():
        dones[t, i] = True
        last = -numbers[t, i : i + 1]
        infos[t][i] |= {"TimeLimit.truncated": how == "truncated", "terminal_observation": last, "episode": {}}
    return Segment(
        observations=numbers[..., None],
        actions=numbers[:-1, :, None] + 0.5,
        rewards=numbers[:-1] + 0.25,
        dones=dones,
        infos=infos,
        behaviour={"log_probs": numbers[:-1] + 0.125},
        version=offset,
    )


# A batch


def test_segments_stand_side_by_side() -> None:
    one = segment(0, ends={(1, 0): "truncated", (2, 1): "terminated"})
    other = segment(100, ends={(0, 1): "terminated", (2, 0): "truncated"})
    batch = stacked([one, other], spaces.Box(-1, 1, (1,)), CPU, th.float64)
    columns = np.concatenate([one.observations, other.observations], axis=1)  # (T + 1, 4, 1)
    for values, expected in (
        (batch.observations, columns[:-1].reshape(12, 1)),
        (batch.last_observations, columns[-1]),
        (batch.actions, columns[:-1].reshape(12, 1) + 0.5),
        (batch.rewards, columns[:-1, :, 0] + 0.25),
        (batch.behaviour["log_probs"], columns[:-1, :, 0] + 0.125),
        (batch.terminated, [[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]),
        (batch.truncated, [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]]),
    ):
        th.testing.assert_close(values, th.as_tensor(expected, dtype=th.float64), rtol=0, atol=0)
    places, observations = final_observations([one, other])
    assert places == [(1, 0), (2, 2)]
    np.testing.assert_array_equal(np.stack(observations), [[-10], [-120]])


def test_what_is_behind_a_step() -> None:
    """The next value, V(s_T) behind the last step, and V of the episode's own last observation where it was truncated."""
    ends = {(0, 0): "truncated", (1, 1): "terminated", (2, 0): "truncated"}
    batch = stacked([segment(ends=ends)], spaces.Discrete(2), CPU, th.float64)
    batch.final_values[:] = 1000
    values = th.arange(6.0).double().view(3, 2)
    after = batch.next_values(values, th.tensor([70.0, 80.0]).double())
    assert after.tolist() == [[1000, 3], [4, 5], [1000, 80]]


def test_types_of_a_batch() -> None:
    one = segment()
    for space, dtype in ((spaces.Discrete(2), th.int64), (spaces.Box(-1, 1, (1,)), th.float32)):
        batch = stacked([one], space, CPU)
        assert batch.actions.dtype == dtype
        assert {batch.rewards.dtype, batch.terminated.dtype, batch.truncated.dtype, batch.final_values.dtype} == {th.float32}
    one.observations = {"image": np.zeros((4, 2, 3, 5, 5), np.uint8), "choice": np.ones((4, 2), np.int64)}
    batch = stacked([one], spaces.Discrete(2), CPU)
    assert batch.observations["image"].shape == (6, 3, 5, 5) and batch.observations["image"].dtype == th.uint8
    assert batch.last_observations["choice"].shape == (2,)


def test_termination_comes_before_truncation() -> None:
    """SB3's environments say so by an info, which a step that did both has not got."""
    batch = stacked([segment(ends={(0, 0): "terminated"})], spaces.Discrete(2), CPU)
    assert batch.terminated[0, 0] == 1 and batch.truncated[0, 0] == 0


# The replay


def test_replay_keeps_the_newest() -> None:
    replay = SegmentReplay()
    assert replay.sample(2) == []
    for offset in range(0, 500, 100):
        replay.add(segment(offset), 3)
    assert [one.version for one in replay.segments] == [200, 300, 400]
    replay.add(segment(500), 1)
    assert len(replay) == 1


def test_replay_keeps_what_updates_read_and_no_more() -> None:
    ends = {(0, 0): "truncated", (1, 1): "terminated"}
    replay, one = SegmentReplay(), segment(ends=ends)
    one.original = (one.observations, one.rewards)
    replay.add(one, 1)
    (kept,) = replay.segments
    assert kept.original is None
    assert kept.infos[2] == [{}, {}] and "episode" not in kept.infos[0][0]
    for batch in (stacked([part], spaces.Box(-1, 1, (1,)), CPU) for part in (kept, *replay.sample(1))):
        th.testing.assert_close(batch, stacked([one], spaces.Box(-1, 1, (1,)), CPU), rtol=0, atol=0)
    assert final_observations([kept]) == final_observations([one])


def test_replay_holds_no_memory_of_other_processes() -> None:
    """Such as Ray's, from which arrays come as views."""
    replay, one = SegmentReplay(), segment()
    one.observations = {"a": one.observations}
    shared = np.frombuffer(one.rewards.tobytes()).reshape(3, 2)
    one.rewards = one.actions = one.behaviour["log_probs"] = one.observations["b"] = shared
    replay.add(one, 1)
    (kept,) = replay.segments
    for array in (kept.rewards, kept.actions, kept.behaviour["log_probs"], kept.observations["b"]):
        assert array.flags.owndata
        np.testing.assert_array_equal(array, shared)


def test_replay_draws_each_environment_by_itself() -> None:
    """From all segments, and all that belongs to it from the same one."""
    replay = SegmentReplay()
    for offset in (0, 100, 200):
        replay.add(segment(offset, ends={(1, 0): "truncated", (1, 1): "truncated"}), 10)
    np.random.seed(0)
    drawn = np.zeros((3, 3))
    for one in replay.sample(900):
        first, second = (int(one.observations[0, i, 0] - i) for i in range(2))
        drawn[first // 100, second // 100] += 1
        for i, offset in enumerate((first, second)):
            whole = segment(offset)
            for name in ("observations", "actions", "rewards"):
                np.testing.assert_array_equal(getattr(one, name)[:, i], getattr(whole, name)[:, i])
            np.testing.assert_array_equal(one.behaviour["log_probs"][:, i], whole.behaviour["log_probs"][:, i])
            assert one.infos[1][i]["terminal_observation"] == -(offset + 10 + i)
        assert one.version == min(first, second)
    assert np.abs(drawn - 100).max() < 40  # 4 standard deviations


def test_replay_draws_by_numpys_generator() -> None:
    replay = SegmentReplay()
    for offset in range(0, 2000, 100):
        replay.add(segment(offset), 100)
    draws = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        draws.append([one.observations.tolist() for one in replay.sample(5)])
    assert draws[0] == draws[1] != draws[2]


def test_replay_of_dicts() -> None:
    replay = SegmentReplay()
    for offset in (0, 100):
        one = segment(offset)
        one.observations = {"a": one.observations, "b": -one.observations}
        replay.add(one, 2)
    for one in replay.sample(5):
        np.testing.assert_array_equal(one.observations["a"], -one.observations["b"])


@pytest.mark.parametrize("other", [segment(100, steps=4), segment(100, envs=3)], ids=["steps", "environments"])
def test_replay_forgets_what_is_of_another_shape(other: Segment) -> None:
    replay = SegmentReplay()
    replay.add(segment(), 10)
    replay.add(other, 10)
    assert [one.version for one in replay.segments] == [100]


def test_replay_is_small_on_disk() -> None:
    """The arrays, and little else."""
    replay, one = SegmentReplay(), segment(steps=50, envs=4)
    for _ in range(100):
        replay.add(segment(steps=50, envs=4), 1000)
    arrays = (one.observations, one.actions, one.rewards, one.dones, *one.behaviour.values())
    assert len(pickle.dumps(replay)) < 1.5 * 100 * sum(array.nbytes for array in arrays)
