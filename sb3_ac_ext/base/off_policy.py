"""What the off-policy algorithms share besides the updates: replay buffer, exploration, argument checks."""

import copy
import io
import pathlib
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import ActionNoise, VectorizedActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import save_to_pkl
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_ac_ext.base.arguments import (
    BUFFER_GETS,
    check_batch_fits,
    check_bounded_actions,
    check_buffer,
    check_environment,
    check_episodes_of_one,
    check_kwargs,
    made_with,
)
from sb3_ac_ext.base.checkpoint import CheckpointMixin, atomic_file, changed_by_load
from sb3_ac_ext.base.declarations import OffPolicyArguments
from sb3_ac_ext.base.environment_checks import check_transition
from sb3_ac_ext.base.noise import ExplorationNoise, NoiseSchedule, ScaledNoise, check_action_noise
from sb3_ac_ext.base.training import TrainingMixin
from sb3_ac_ext.buffers import replay
from sb3_ac_ext.buffers.prioritized import PrioritizedReplayBuffer
from sb3_ac_ext.buffers.replay import Transitions
from sb3_ac_ext.engine import Engine
from sb3_ac_ext.signatures import arguments_of, check_given
from sb3_ac_ext.validation import ArgumentError, translated_assertions

SHARED_WITH_BUFFERS = frozenset({"n_steps", "gamma"})
"""Arguments of a model that a replay buffer may take too."""

MADE_ON_DEMAND: Any = object()
"""Stands for the buffer while SB3 sets a model up, which allocates one where it finds none."""


def critic_names(number: int) -> list[str]:
    """
    :param number: of critics
    :return: what they are called in logs and arguments: "q" if there is one, else "q_a", "q_b", ..., "q_z", "q_a1", ...
    """
    letters = [string.ascii_lowercase[k % 26] + (str(k // 26) if k >= 26 else "") for k in range(number)]
    return ["q"] if number == 1 else [f"q_{letter}" for letter in letters]


class OffPolicyMixin(TrainingMixin, CheckpointMixin, OffPolicyAlgorithm):
    """
    Goes before the SB3 class: ``class TD3X(OffPolicyMixin, TD3)``. docs/extending.md has an example.

    A subclass says what it trains (`_networks`), checks its own arguments (`_check_arguments`) and runs its updates (`train`,
    in `_updates`, on what `_sample` returns). Its constructor calls this one with ``_init_setup_model=False``, as arguments
    are complete only afterwards, keeps its own ones as attributes, and calls `_setup_model` last.

    :param args: the SB3 class's, in its order
    :param kwargs: the SB3 class's, by name
    :raises TypeError: for an unknown argument
    :raises UnsupportedError: for spaces that the SB3 class refuses
    """

    declarations = OffPolicyArguments
    automatic_buffers: ClassVar[tuple[type[ReplayBuffer], ...]] = (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer)
    """What may be chosen where no class is given; zips, SB3's too, have it as if it had been."""
    choosing_buffers: ClassVar[frozenset[str]] = frozenset({"n_steps"})
    """The arguments that this depends on."""
    buffer_arguments: ClassVar[frozenset[str]] = frozenset(
        {"buffer_size", "replay_buffer_class", "replay_buffer_kwargs", "optimize_memory_usage", "prioritized"}
    )
    """The arguments that a buffer is made of, and does not follow."""

    def __init__(
        self,
        *args: Any,
        max_grad_norm: float | dict[str, float] | None = None,
        exploration_noise: ExplorationNoise | None = None,
        warmup: Literal["uniform", "noise"] = "uniform",
        engine: bool = True,
        **kwargs: Any,
    ) -> None:
        kwargs = check_given(type(self), kwargs)
        self._replay_buffer: ReplayBuffer | None = None
        self._sampler: tuple[int, replay.Sampler] | None = None
        self._noise: NoiseSchedule | None = None
        self._noise_spec: ExplorationNoise | None = None
        self._noise_steps = 0
        if "policy_kwargs" in kwargs:
            kwargs["policy_kwargs"] = copy.copy(kwargs["policy_kwargs"])  # SB3 writes into it
        with translated_assertions(self):
            super().__init__(*args, **kwargs)
        self.max_grad_norm = max_grad_norm
        self.exploration_noise = exploration_noise
        self.warmup = warmup
        self.engine = engine

    def _setup_model(self) -> None:
        self._check_policy_class()
        self._check_arguments()
        self.replay_buffer_class = self._buffer_class()
        # a zip saved with include=["replay_buffer"] puts the buffer beside the property
        buffer = self.__dict__.pop("replay_buffer", self._replay_buffer)
        if buffer is not None and (useless := changed_by_load.get() & self.buffer_arguments):
            raise ArgumentError(
                f"{', '.join(sorted(useless))} must be left out where the file has its replay buffer, on which it has no "
                "effect: save without include=['replay_buffer']"
            )
        self._replay_buffer = MADE_ON_DEMAND
        n_steps, self.n_steps = self.n_steps, 1  # which SB3 would ignore with a warning where a class is given
        try:
            with translated_assertions(self), made_with("the policy", policy_kwargs=self.policy_kwargs):
                super()._setup_model()
        finally:
            self.n_steps = n_steps
        self._replay_buffer = buffer
        self._hand_over(buffer)
        check_kwargs("replay_buffer_kwargs", self.replay_buffer_kwargs, self.replay_buffer_class, BUFFER_GETS)
        self._follow_exploration_noise()
        self._setup_engine()

    def _check_arguments(self) -> None:
        """See `TrainingMixin._check_arguments`."""
        check_environment(self)
        check_bounded_actions(self.action_space)
        super()._check_arguments()
        if isinstance(self.train_freq, list):  # as YAML has it; SB3 wants tuples
            self.train_freq = tuple(self.train_freq)
        check_episodes_of_one(self)
        made_with_sde = self.policy_kwargs.get("use_sde", self.use_sde)
        if made_with_sde != self.use_sde:  # at load
            raise ArgumentError(f"use_sde must be what the policy was made with, {made_with_sde}, got {self.use_sde}")
        check_batch_fits(self)
        self._take_up_buffer_arguments()
        self._check_buffer(self._buffer_class())
        if self.exploration_noise is None:
            self._noise = None
            if self.action_noise is not None:
                check_action_noise(self.action_noise, self.action_space.shape or ())
        else:
            NoiseSchedule.parse(self.exploration_noise)

    def _arguments(self) -> dict[str, Any]:
        """See `TrainingMixin._arguments`; the process that ``exploration_noise`` makes is no argument."""
        made = {} if self._noise is None else {"action_noise": None}
        return {**super()._arguments(), **made}

    @property
    def stored_envs(self) -> int:
        """Environments whose steps the replay buffer holds."""
        return self.n_envs

    # The buffer is made when training or the user first asks for it: a model loaded to predict needs none.

    @property
    def replay_buffer(self) -> ReplayBuffer | None:
        """The replay buffer, allocated at the first access."""
        if self._replay_buffer is None and hasattr(self, "policy"):
            self._replay_buffer = self._make_replay_buffer()
        return self._replay_buffer

    @replay_buffer.setter
    def replay_buffer(self, buffer: ReplayBuffer | None) -> None:
        self._replay_buffer = buffer

    @replay_buffer.deleter
    def replay_buffer(self) -> None:
        self._replay_buffer = None

    def _take_up_buffer_arguments(self) -> None:
        """
        Arguments of the model that the buffer takes too are the model's: the buffer is handed them, and follows them.

        :raises ArgumentError: if ``replay_buffer_kwargs`` says otherwise
        """
        changed = changed_by_load.get()
        taken = SHARED_WITH_BUFFERS if self.replay_buffer_class is None else self._shared_with(self.replay_buffer_class)
        self.replay_buffer_kwargs = dict(self.replay_buffer_kwargs or {})
        for name in taken & self.replay_buffer_kwargs.keys():
            value, own = self.replay_buffer_kwargs.pop(name), getattr(self, name)
            arguments_of(type(self))[name].check(value)
            if name in changed and "replay_buffer_kwargs" not in changed:
                continue  # what the file has is out of date
            if arguments_of(type(self))[name].is_default(own):
                setattr(self, name, value)
            elif value != own:
                raise ArgumentError(
                    f"replay_buffer_kwargs[{name!r}] must be {name}, which the replay buffer is handed: got {value!r} and "
                    f"{name}={own!r}"
                )
        steps = None if self.replay_buffer_class is None else arguments_of(self.replay_buffer_class).get("n_steps")
        if steps is not None and steps.default != 1 and self.n_steps == 1 and "n_steps" not in changed:
            self.n_steps = steps.default  # as with SB3

    @staticmethod
    def _shared_with(buffer_class: type[ReplayBuffer]) -> frozenset[str]:
        """The arguments that a buffer has in common with the model."""
        return SHARED_WITH_BUFFERS & arguments_of(buffer_class).keys()

    def _hand_over(self, buffer: ReplayBuffer | None) -> None:
        """Tell a buffer from a file what it has in common with the model."""
        for name in frozenset() if buffer is None else self._shared_with(type(buffer)):
            setattr(buffer, name, getattr(self, name))

    def _automatic_buffer(self) -> type[ReplayBuffer]:
        """The class of the buffer where none is given."""
        several = NStepReplayBuffer if self.n_steps > 1 else ReplayBuffer
        return DictReplayBuffer if isinstance(self.observation_space, spaces.Dict) else several

    def _buffer_class(self) -> type[ReplayBuffer]:
        """The class of the buffer: what is given, unless that was chosen for other arguments when the file was saved."""
        changed = changed_by_load.get()
        given, file_is_outdated = self.replay_buffer_class, not changed.isdisjoint(self.choosing_buffers)
        if file_is_outdated and "replay_buffer_class" not in changed and given in self.automatic_buffers:
            given = None
        return given or self._automatic_buffer()

    def _check_buffer(self, buffer_class: type[ReplayBuffer]) -> None:
        """
        :raises ArgumentError: if a replay buffer of this class does not do what it is asked for
        :raises UnsupportedError: if it cannot
        """
        check_buffer(self, buffer_class)

    def _make_replay_buffer(self) -> ReplayBuffer:
        assert self.replay_buffer_class is not None
        shared = self._shared_with(self.replay_buffer_class)
        kwargs = {**self.replay_buffer_kwargs, **{name: getattr(self, name) for name in shared}}
        if issubclass(self.replay_buffer_class, HerReplayBuffer):
            if self.env is None:
                raise ArgumentError(
                    "HerReplayBuffer asks the environment for rewards: call set_env() or load with env=, got None"
                )
            kwargs["env"] = self.env
        sizes = {"buffer_size": self.buffer_size, "replay_buffer_kwargs": self.replay_buffer_kwargs}
        with made_with(f"a {self.replay_buffer_class.__name__}", **sizes):
            return self.replay_buffer_class(
                self.buffer_size,
                self.observation_space,
                self.action_space,
                device=self.device,
                n_envs=self.stored_envs,
                optimize_memory_usage=self.optimize_memory_usage,
                **kwargs,
            )

    def _sample(self, batch_size: int) -> Transitions:
        """
        :param batch_size: B
        :return: transitions from the replay buffer, by SB3's random numbers; with the engine in memory that the next ones take
        """
        buffer = self.replay_buffer
        assert buffer is not None
        discounts = th.as_tensor(float(self.gamma), dtype=th.float64, device=self.device)
        if self.engine and replay.obstacle(buffer, self._vec_normalize_env) is None:
            if self._sampler is None or self._sampler[0] != batch_size:
                self._sampler = batch_size, replay.Sampler(buffer, batch_size)
            return self._sampler[1](buffer, discounts)
        batch = self._prepared(buffer).sample(batch_size, env=self._vec_normalize_env)
        discounts = discounts if batch.discounts is None else batch.discounts
        return Transitions(
            *(batch.observations, batch.actions, batch.next_observations, batch.dones, batch.rewards, discounts),
            **{name: getattr(batch, name) for name in ("weights", "indices", "versions", "log_probs") if hasattr(batch, name)},
        )

    def _prepared(self, buffer: ReplayBuffer) -> ReplayBuffer:
        """The buffer, with what it shares with the model as it is now."""
        if "gamma" in self._shared_with(type(buffer)):
            buffer.gamma = float(self.gamma)  # type: ignore[attr-defined]  # it takes one
        if isinstance(buffer, PrioritizedReplayBuffer):
            buffer.progress_remaining = self._current_progress_remaining
        return buffer

    def _check_sums(self) -> None:
        """
        :raises ArgumentError: if the buffer, which may be the user's, sums another number of rewards than the model
        """
        buffer: Any = self.replay_buffer
        n_steps = getattr(buffer, "n_steps", self.n_steps) if "n_steps" in self._shared_with(type(buffer)) else 1
        if n_steps != self.n_steps:
            raise ArgumentError(
                f"replay_buffer must sum n_steps={self.n_steps} rewards, got a {type(buffer).__name__} that sums {n_steps}"
            )

    def _update_priorities(self, batch: Any, outputs: Mapping[str, th.Tensor]) -> None:
        """
        Give a prioritised buffer the errors of what it has sampled.

        :param batch: from `_sample`
        :param outputs: of the update, with ``(B, 1)`` absolute ``td_errors`` if the batch has weights
        """
        buffer = self._replay_buffer
        if not isinstance(buffer, PrioritizedReplayBuffer) or batch.indices is None:
            return
        errors = outputs["td_errors"]
        if errors.isfinite().all():  # if not, the search for NaN says more
            buffer.update_priorities(batch.indices, errors, batch.versions)
        self.logger.record("train/importance_beta", buffer.beta)
        self.logger.record_mean("train/importance_weight", float(batch.weights.mean()))

    @staticmethod
    def _means_of(values: Sequence[th.Tensor]) -> dict[str, th.Tensor]:
        """
        :param values: ``(B, 1)`` of each critic
        :return: what is logged of them: the mean of each
        """
        return {name: value.detach().mean() for name, value in zip(critic_names(len(values)), values, strict=True)}

    def save(self, path: Any, exclude: Iterable[str] | None = None, include: Iterable[str] | None = None) -> None:
        """See `CheckpointMixin.save`; ``include=["replay_buffer"]`` puts the buffer into the zip."""
        include = {"_replay_buffer" if name == "replay_buffer" else name for name in include or ()}
        super().save(path, exclude, include)

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay buffer as SB3 does, and never leave half a file.

        :param path: file name, or an open binary file
        """
        if not isinstance(path, (str, pathlib.Path)):
            return super().save_replay_buffer(path)
        with atomic_file(path, "pkl") as file:
            save_to_pkl(file, self.replay_buffer, self.verbose)  # type: ignore[arg-type]

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer of ours or of SB3's.

        :param path: file name, or an open binary file
        :param truncate_last_traj: with HER, whether to close the episode that was running
        :raises ValueError: if the buffer was filled by another number of environments
        """
        super().load_replay_buffer(path, truncate_last_traj)
        buffer = self._replay_buffer
        if buffer is not None and buffer.n_envs != self.stored_envs:
            self._replay_buffer = None
            times = "" if self.stored_envs == self.n_envs else f" times n_actors={self.stored_envs // self.n_envs}"
            raise ValueError(
                f"the replay buffer holds n_envs={buffer.n_envs} environments, the model has n_envs={self.n_envs}{times}"
            )
        self._hand_over(buffer)

    def engine_report(self) -> dict[str, str]:
        """See `TrainingMixin.engine_report`."""
        buffer = self._replay_buffer or self.replay_buffer_class  # do not make one to report on it
        sampling = replay.obstacle(buffer, self._vec_normalize_env) if self.engine else "engine=False"
        return {
            **super().engine_report(),
            "replay": "direct" if sampling is None else f"SB3: {sampling}",
        }

    def _exploration_std(self) -> float | None:
        """Factor or mean sigma of the exploration noise in the scaled action space; None if there is none of known size."""
        self._follow_exploration_noise()
        if self._noise is not None:
            return self._noise_factor(self._noise)
        process = getattr(self.action_noise, "base_noise", self.action_noise)
        sigma = getattr(process, "_sigma", None)
        return None if sigma is None else float(np.mean(sigma))

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        learning_starts = 0 if self.warmup == "noise" else learning_starts
        return super()._sample_action(learning_starts, self._scaled_noise(action_noise), n_envs)

    def _scaled_noise(self, action_noise: ActionNoise | None) -> ActionNoise | None:
        """The process times this moment's factor, where ``exploration_noise`` asks for one."""
        if self._follow_exploration_noise():
            action_noise = self.action_noise
        if self._noise is None or action_noise is None:
            return action_noise
        return ScaledNoise(action_noise, self._noise_factor(self._noise))

    def _follow_exploration_noise(self) -> bool:
        """Take ``exploration_noise`` up as it is now; whether it has changed."""
        if self.exploration_noise == self._noise_spec:
            return False
        self._noise_spec = copy.deepcopy(self.exploration_noise)
        if self.exploration_noise is None:
            self._noise = self.action_noise = None
            return True
        self._noise = NoiseSchedule.parse(self.exploration_noise)
        process = self._noise.unit_process(self.action_space.shape or ())
        running = self._last_obs is not None and self.n_envs > 1  # otherwise SB3 makes one of it for each environment
        self.action_noise = VectorizedActionNoise(process, self.n_envs) if running else process
        return True

    def _noise_factor(self, noise: NoiseSchedule) -> float:
        filling = self.warmup == "noise" and self.num_timesteps < self.learning_starts
        return 1.0 if filling else noise.std(self._noise_steps)

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """
        See SB3's ``OffPolicyAlgorithm``.

        :raises NonFiniteError: for a reward that is not finite, and an observation of which the policy makes no finite action
        """
        check_transition(self._acts_finitely, new_obs, reward, dones, infos)
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _acts_finitely(self, observations: Any) -> bool:
        """Whether what the policy makes of ``(n, ...)`` observations is finite."""
        try:
            actions, _ = self.predict(observations, deterministic=True)
        except ValueError:  # of SB3's distributions
            return False
        return bool(np.isfinite(actions).all())

    def _on_step(self) -> None:
        super()._on_step()
        self._noise_steps += self.n_envs

    @contextmanager
    def _updates(self) -> Iterator[Engine]:
        """See `TrainingMixin._updates`."""
        self._restore_random_state()
        self._check_sums()
        with super()._updates() as engine:
            yield engine
            std = self._exploration_std()
            if std is not None:
                self.logger.record("train/exploration_std", std)

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """
        Train; see SB3's ``OffPolicyAlgorithm.learn``.

        :param tb_log_name: name of the TensorBoard run, the class name by default
        """
        name = type(self).__name__ if tb_log_name is None else tb_log_name
        return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)

    def _excluded_save_params(self) -> list[str]:
        derived = ["_replay_buffer", "_sampler", "_noise", "_noise_spec"]
        if self._noise is not None:
            derived.append("action_noise")
        return [*super()._excluded_save_params(), *derived]
