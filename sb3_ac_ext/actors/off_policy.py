"""What off-policy algorithms with actors share: the steps of all actors side by side in one replay buffer."""

import io
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

import cloudpickle
import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import RolloutReturn, TrainFreq
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_ac_ext.actors.actor import Actor
from sb3_ac_ext.actors.explorer import Explorer
from sb3_ac_ext.actors.learner import ActorArguments, ActorsMixin
from sb3_ac_ext.base.declarations import OffPolicyArguments
from sb3_ac_ext.base.off_policy import OffPolicyMixin
from sb3_ac_ext.buffers.segments import Segment, at, joined, transitions
from sb3_ac_ext.validation import ArgumentError, UnsupportedError


class OffPolicyActorArguments(ActorArguments, OffPolicyArguments):
    """What these algorithms take."""


class OffPolicyActorsMixin(ActorsMixin, OffPolicyMixin):
    """
    Goes before the SB3 class: ``class D4PG(OffPolicyActorsMixin, DDPG)``. A single actor inline is SB3's own loop.

    A row of the replay buffer has a step of each environment of each actor, those of an actor side by side. Where an actor
    does not go on from its last stored step, as it was replaced or its environments were reset, that step is marked as
    truncated.
    """

    declarations = OffPolicyActorArguments
    buffer_arguments: ClassVar[frozenset[str]] = OffPolicyMixin.buffer_arguments | {"n_actors"}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._streams: dict[int, tuple[int, int]] = {}
        """Of each actor generation and sequence number of its last segment in the replay buffer."""

    @property
    def _alone(self) -> bool:
        return self.actors == "inline" and self.n_actors == 1

    @property
    def stored_envs(self) -> int:
        """See `OffPolicyMixin.stored_envs`."""
        return self.n_envs * self.n_actors

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if self._alone:
            return
        needed = f'actors="inline" and n_actors=1, got actors={self.actors!r} and n_actors={self.n_actors}: '
        if self.optimize_memory_usage:
            raise UnsupportedError(
                f"optimize_memory_usage=True needs {needed}where an actor begins anew, the last observation of what it did "
                "before would be written over"
            )
        if issubclass(self._buffer_class(), HerReplayBuffer):
            raise UnsupportedError(
                f"replay_buffer_class={self._buffer_class().__name__} needs {needed}it holds whole episodes, and an actor "
                "that is replaced leaves a part of one"
            )
        pair = self.train_freq if isinstance(self.train_freq, tuple) else (self.train_freq, "step")
        if getattr(pair[1], "value", pair[1]) == "episode":
            raise UnsupportedError(f"train_freq={pair!r} needs {needed}actors send numbers of steps")

    # The pool

    @property
    def _actor_class(self) -> type[Actor]:
        return Explorer

    def _open(self) -> None:
        if not self._alone:
            super()._open()

    def _settings(self) -> dict[str, Any]:
        self._follow_exploration_noise()
        noise = self.action_noise
        return {
            **super()._settings(),
            "n_steps": self.train_freq.frequency,  # type: ignore[union-attr]  # SB3 has made a pair of it
            "uniform": self.warmup == "uniform" and self.num_timesteps < self.learning_starts,
            "noise": None if noise is None else cloudpickle.dumps(getattr(noise, "base_noise", noise)),
            "noise_factor": 1.0 if self._noise is None else self._noise_factor(self._noise),
        }

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        """See SB3; where it resets the environments, the actor in them does not go on."""
        before = self._last_obs
        result = super()._setup_learn(*args, **kwargs)
        if isinstance(self._home, Explorer) and self._last_obs is not before:
            self._streams.pop(self._home.index, None)
            self._home.forget_noise()
        return result

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """See `OffPolicyMixin.load_replay_buffer`; no actor goes on from what it holds."""
        super().load_replay_buffer(path, truncate_last_traj)
        self._streams = {}

    # Experience

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        train_freq: TrainFreq,
        replay_buffer: ReplayBuffer,
        action_noise: ActionNoise | None = None,
        learning_starts: int = 0,
        log_interval: int | None = None,
    ) -> RolloutReturn:
        """
        Take ``train_freq`` steps from each actor, and store them; see SB3's ``OffPolicyAlgorithm.collect_rollouts``.

        :param env: the training environments, not used with several actors, which have it
        :param callback: asked after every step, before any of them is stored
        :param train_freq: steps of each environment
        :param replay_buffer: gets the steps
        :param action_noise: not used with several actors, which have processes of their own
        :param learning_starts: the same
        :param log_interval: episodes of all actors after which there is a log
        :return: how many steps and episodes it were, and whether the training goes on
        :raises ArgumentError: if ``n_actors`` is not what the replay buffer was made for
        :raises ActorError: if an actor has failed
        :raises NonFiniteError: if an environment gave a reward that is not finite, or an observation of which the policy
            makes no finite action
        """
        if replay_buffer.n_envs != self.stored_envs:
            raise ArgumentError(
                f"n_actors must be {replay_buffer.n_envs // self.n_envs}, for which the replay buffer was made, got "
                f"{self.n_actors!r}: a change acts in a new model"
            )
        if self._alone:
            return super().collect_rollouts(
                env, callback, train_freq, replay_buffer, action_noise, learning_starts, log_interval
            )
        callback.on_rollout_start()
        segments = self._one_of_each(train_freq.frequency)
        ended = sum(int(segment.dones.sum()) for segment in segments)
        steps = sum(segment.dones.size for segment in segments)
        for segment in segments:
            if not self._consume(segment, callback):
                return RolloutReturn(steps, ended, continue_training=False)
            self._update_current_progress_remaining(min(self.num_timesteps, self._total_timesteps), self._total_timesteps)
            for _ in range(segment.n_steps):
                self._on_step()
        self._store(replay_buffer, segments)
        if self._pool is not None:
            self._pool.begin(self._weights())
        self._record_actors()
        before, self._episode_num = self._episode_num, self._episode_num + ended
        if log_interval is not None and self._episode_num // log_interval > before // log_interval:
            self.dump_logs()
        callback.on_rollout_end()
        return RolloutReturn(steps, ended, continue_training=True)

    def _one_of_each(self, n_steps: int) -> list[Segment]:
        """A segment of this length of each actor, in their order; those that have given theirs wait for the others."""
        self._open()
        assert self._pool is not None
        taken: dict[int, Segment] = {}
        while len(taken) < self.n_actors:
            self._pool.held = frozenset(taken)
            segment = self._take()
            assert isinstance(segment, Segment)
            if segment.n_steps == n_steps:  # it may have begun before ``train_freq`` was changed
                taken[segment.actor] = segment
        self._pool.held = frozenset()
        return [taken[actor] for actor in sorted(taken)]

    def _store(self, buffer: ReplayBuffer, segments: Sequence[Segment]) -> None:
        """
        :param buffer: gets a row for each step
        :param segments: one of each actor, in their order
        """
        for segment in segments:
            if self._streams.get(segment.actor) != (segment.generation, segment.sequence - 1):
                _cut_off(buffer, slice(segment.actor * self.n_envs, (segment.actor + 1) * self.n_envs))
            self._streams[segment.actor] = segment.generation, segment.sequence
        parts = [transitions(segment) for segment in segments]
        for t in range(segments[0].n_steps):
            observations, following, rewards = (
                joined([at(part[kind], t) for part in parts], np.concatenate) for kind in range(3)
            )
            actions, dones = (
                np.concatenate([getattr(segment, name)[t] for segment in segments]) for name in ("actions", "dones")
            )
            buffer.add(
                observations, following, actions, rewards, dones, [info for segment in segments for info in segment.infos[t]]
            )

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_streams"]


def _cut_off(buffer: ReplayBuffer, columns: slice) -> None:
    """Mark the last stored steps of some environments as truncated, unless they ended an episode."""
    if buffer.size() == 0:
        return
    last = (buffer.pos - 1) % buffer.buffer_size
    going_on = buffer.dones[last, columns] == 0
    for flags in (buffer.dones, buffer.timeouts):
        flags[last, columns][going_on] = 1
