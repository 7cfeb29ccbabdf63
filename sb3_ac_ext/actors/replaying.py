"""What algorithms share that replay segments."""

import io
import pathlib
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl

from sb3_ac_ext.base.arguments import MEMORY
from sb3_ac_ext.base.checkpoint import atomic_file
from sb3_ac_ext.buffers.segment_replay import SegmentReplay
from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError, shown


class SegmentReplayMixin(BaseAlgorithm):
    """
    Has a `SegmentReplay`, which is saved as SB3 saves replay buffers: apart from the model. Goes before `OnPolicyActorsMixin`.
    """

    replay_buffer: SegmentReplay

    def _setup_model(self) -> None:
        if not hasattr(self, "replay_buffer"):  # a zip that was saved with include=["replay_buffer"] has it
            self.replay_buffer = SegmentReplay()
        super()._setup_model()  # type: ignore[safe-super]  # of the mixin behind this one

    def _check_fits(self, name: str, steps: int, unit: str) -> None:
        """
        :param name: of the argument that says how much the replay holds
        :param steps: that are, of each environment
        :param unit: of the argument
        :raises ArgumentError: if this machine's memory cannot hold the observations
        """
        if steps * self.n_envs * _bytes(self.observation_space) > MEMORY:
            raise ArgumentError(
                f"{name} must be an integer >= 1 such that so many {unit} fit into memory, got {getattr(self, name)}"
            )

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay as SB3's off-policy algorithms do, and never leave half a file.

        :param path: file name, or an open binary file
        """
        if not isinstance(path, (str, pathlib.Path)):
            return save_to_pkl(path, self.replay_buffer, self.verbose)
        with atomic_file(path, "pkl") as file:
            save_to_pkl(file, self.replay_buffer, self.verbose)  # type: ignore[arg-type]

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        :param path: file name, or an open binary file
        :param truncate_last_traj: not used, as no segment goes on in the next one; RL Zoo gives it
        :raises ArgumentTypeError: if the file has no replay of segments
        :raises ArgumentError: if they are of another number of environments
        """
        replay = load_from_pkl(path, self.verbose)
        if not isinstance(replay, SegmentReplay):
            raise ArgumentTypeError(f"path must be a file of a SegmentReplay, got {shown(path)} of a {type(replay).__name__}")
        if replay.segments and replay.segments[0].n_envs != self.n_envs:
            raise ArgumentError(
                f"path must be a file of segments of n_envs={self.n_envs} environments, as the model has, got one of "
                f"{replay.segments[0].n_envs}: {shown(path)}"
            )
        self.replay_buffer = replay


def _bytes(space: spaces.Space[Any]) -> int:
    """Of an observation."""
    if isinstance(space, spaces.Dict):
        return sum(map(_bytes, space.values()))
    return int(np.prod(space.shape or ())) * np.dtype(space.dtype).itemsize
