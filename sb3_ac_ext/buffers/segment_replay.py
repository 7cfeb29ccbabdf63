"""A replay of segments, for algorithms that learn from sequences of steps."""

import copy
from collections import deque
from typing import Any

import numpy as np

from sb3_ac_ext.buffers.segments import Segment, joined

KEPT = ("TimeLimit.truncated", "terminal_observation")
"""What updates read of the infos."""


class SegmentReplay:
    """
    The last segments, as actors sent them.

    Observations and rewards are those that the actor saw, so normalised as ``VecNormalize`` did it then: what is known of the
    policy that acted belongs to them.
    """

    def __init__(self) -> None:
        self.segments: deque[Segment] = deque()

    def __len__(self) -> int:
        return len(self.segments)

    def add(self, segment: Segment, size: int) -> None:
        """
        :param segment: of T steps of N environments; if T or N are others than before, those before are forgotten
        :param size: how many segments are kept at most, the newest ones
        """
        if self.segments and self.segments[0].dones.shape != segment.dones.shape:
            self.segments.clear()
        self.segments.append(_stripped(segment))
        while len(self.segments) > size:
            self.segments.popleft()

    def sample(self, number: int) -> list[Segment]:
        """
        Each environment of each segment comes from a segment of its own, as if it had a replay of its own: drawn uniformly, by
        numpy's global generator, one and the same perhaps several times.

        :param number: of segments
        :return: so many segments; none if there are none
        """
        if not self.segments:
            return []
        rows = np.random.randint(len(self.segments), size=(number, self.segments[0].n_envs))  # noqa: NPY002  # which SB3 seeds
        return [_mixed([self.segments[i] for i in row]) for row in rows]


def _stripped(segment: Segment) -> Segment:
    """The segment without what no update reads, in memory of its own: that of other processes is theirs."""
    infos: list[list[dict[str, Any]]] = [[{}] * segment.n_envs for _ in range(segment.n_steps)]
    for t, i in np.argwhere(segment.dones):
        infos[t][i] = copy.deepcopy({name: segment.infos[t][i][name] for name in KEPT if name in segment.infos[t][i]})
    return Segment(
        actions=_own(segment.actions),
        rewards=_own(segment.rewards),
        dones=_own(segment.dones),
        observations=_own(segment.observations),
        behaviour=_own(segment.behaviour),
        infos=infos,
        version=segment.version,
    )


def _own(values: Any) -> Any:
    """Arrays, or dicts of them, copied unless their memory is their own."""
    if isinstance(values, dict):
        return {name: _own(value) for name, value in values.items()}
    return np.require(values, requirements="O")


def _mixed(segments: list[Segment]) -> Segment:
    """
    :param segments: N, of N environments each
    :return: one, whose environment i is that of the i-th
    """

    def mixed(arrays: list[np.ndarray]) -> np.ndarray:
        return np.stack([array[:, i] for i, array in enumerate(arrays)], axis=1)

    return Segment(
        actions=mixed([one.actions for one in segments]),
        rewards=mixed([one.rewards for one in segments]),
        dones=mixed([one.dones for one in segments]),
        observations=joined([one.observations for one in segments], mixed),
        behaviour=joined([one.behaviour for one in segments], mixed),
        infos=[[one.infos[t][i] for i, one in enumerate(segments)] for t in range(segments[0].n_steps)],
        version=min(one.version for one in segments),
    )
