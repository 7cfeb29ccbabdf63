"""What the off-policy algorithms share besides the updates: replay buffer, exploration, argument checks."""

import io
import pathlib
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.save_util import save_to_pkl
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_ac_ext.common.checkpoint import CheckpointMixin, atomic_file
from sb3_ac_ext.common.noise import NoiseSchedule, ScaledNoise
from sb3_ac_ext.common.numpy_actor import NumpyActor
from sb3_ac_ext.common.typing import Transitions, constructor_keys
from sb3_ac_ext.common.updates import UpdateMixin
from sb3_ac_ext.common.validation import (
    UnsupportedError,
    check_choice,
    check_keys,
    check_number,
    translated_assertions,
)

AUTOMATIC_BUFFERS = (ReplayBuffer, DictReplayBuffer, NStepReplayBuffer)
"""What SB3 chooses when no class is given, and stores in its zips as if it had been."""

MADE_ON_DEMAND: Any = object()
"""Stands for the buffer while SB3 sets a model up, which allocates one where it finds none."""


def sample_directly(buffer: ReplayBuffer, batch_size: int) -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
    """
    What ``ReplayBuffer.sample`` returns, from the same random numbers, in a fifth of the time: one gather an array.

    :param buffer: SB3's own buffer, with a next observation for each
    :param batch_size: B
    :return: observations, actions, next observations, dones (truncation excluded), rewards
    """
    rows = np.random.randint(0, buffer.size(), size=batch_size)  # noqa: NPY002 (SB3's stream)
    rows = rows * buffer.n_envs + np.random.randint(0, high=buffer.n_envs, size=batch_size)  # noqa: NPY002

    def gather(array: np.ndarray, shape: tuple[int, ...]) -> th.Tensor:
        flat = array.reshape(-1, *shape)  # a view: (steps, environments, ...) is contiguous
        return th.from_numpy(flat.take(rows, axis=0)).to(buffer.device)

    ended, truncated = gather(buffer.dones, (1,)), gather(buffer.timeouts, (1,))
    return (
        gather(buffer.observations, buffer.obs_shape),
        gather(buffer.actions, (buffer.action_dim,)),
        gather(buffer.next_observations, buffer.obs_shape),
        ended * (1 - truncated),
        gather(buffer.rewards, (1,)),
    )


class OffPolicyMixin(UpdateMixin, CheckpointMixin, OffPolicyAlgorithm):
    """Goes before the SB3 class: ``class TD3X(OffPolicyMixin, TD3)``."""

    def __init__(
        self,
        *args: Any,
        max_grad_norm: float | dict[str, float] | None = None,
        exploration_noise: dict[str, Any] | None = None,
        warmup: str = "uniform",
        engine: bool = True,
        **kwargs: Any,
    ) -> None:
        check_keys(f"{type(self).__name__}()", kwargs, constructor_keys(type(self)) | {"_init_setup_model"})
        self._replay_buffer: ReplayBuffer | None = None
        self._noise: NoiseSchedule | None = None
        self._noise_steps = 0
        self._numpy_actor: NumpyActor | None = None
        with translated_assertions(self):
            super().__init__(*args, **kwargs)
        self.max_grad_norm = max_grad_norm
        self.exploration_noise = exploration_noise
        self.warmup = warmup
        self.engine = engine

    def _setup_model(self) -> None:
        self._check_arguments()
        if self.replay_buffer_class in AUTOMATIC_BUFFERS:
            self.replay_buffer_class = None
        # a zip saved with include=["replay_buffer"] puts the buffer beside the property
        buffer = self.__dict__.pop("replay_buffer", self._replay_buffer)
        self._replay_buffer = MADE_ON_DEMAND
        with translated_assertions(self):
            super()._setup_model()
        self._replay_buffer = buffer
        if self.exploration_noise is not None:
            self._noise = NoiseSchedule.parse(self.exploration_noise)
            self.action_noise = self._noise.unit_process(self.action_space.shape or ())
        self._setup_updates()

    def _check_arguments(self) -> None:
        """
        :raises TypeError: if an argument has the wrong type
        :raises ValueError: if one is out of range or contradicts another
        :raises UnsupportedError: if the spaces or a combination of arguments cannot be served
        """
        if not hasattr(self, "action_space"):
            raise ValueError(f"env must be an environment or the id of one, got None for {type(self).__name__}")
        self._check_action_space()
        for name in ("buffer_size", "batch_size", "n_steps"):
            check_number(name, getattr(self, name), low=1, integer=True)
        check_number("learning_starts", self.learning_starts, low=0)
        check_number("gradient_steps", self.gradient_steps, low=-1, integer=True)
        for name in ("tau", "gamma"):
            check_number(name, getattr(self, name), low=0, high=1)
        self._check_train_freq()
        self._check_buffer_arguments()
        self._check_noise()

    def _check_action_space(self) -> None:
        space = self.action_space
        if isinstance(space, spaces.Box) and not (
            np.all(np.isfinite([space.low, space.high])) and np.all(space.low < space.high)
        ):
            raise UnsupportedError(
                f"action_space must be a Box with finite bounds and low < high in every dimension, got {space}"
            )

    def _check_train_freq(self) -> None:
        train_freq = self.train_freq
        if isinstance(train_freq, list):  # as YAML has it; TrainFreq and the user's pairs are tuples
            self.train_freq = train_freq = tuple(train_freq)
        pair = train_freq if isinstance(train_freq, tuple) else (train_freq, "step")
        if len(pair) != 2:
            raise ValueError(f'train_freq must be a number of steps or a pair such as (2, "episode"), got {train_freq!r}')
        steps, unit = pair
        check_number("train_freq", steps, low=1, integer=True)
        check_choice("the unit of train_freq", getattr(unit, "value", unit), ("step", "episode"))
        if getattr(unit, "value", unit) == "episode" and self.n_envs > 1:
            raise ValueError(
                f"train_freq={train_freq!r} counts episodes, which needs one environment, got n_envs={self.n_envs}"
            )

    def _check_buffer_arguments(self) -> None:
        if self.n_steps > 1 and isinstance(self.observation_space, spaces.Dict):
            raise UnsupportedError(
                f"n_steps must be 1 for Dict observations (SB3 has no n-step buffer for them), got {self.n_steps}"
            )
        if self.n_steps > 1 and self.optimize_memory_usage:
            raise UnsupportedError(f"n_steps must be 1 with optimize_memory_usage=True, got {self.n_steps}")
        handles_timeouts = (self.replay_buffer_kwargs or {}).get("handle_timeout_termination", True)
        if self.optimize_memory_usage and handles_timeouts:
            raise ValueError(
                "optimize_memory_usage=True cannot tell truncation from termination: add "
                f"replay_buffer_kwargs={{'handle_timeout_termination': False}}, got {self.replay_buffer_kwargs!r}"
            )

    def _check_noise(self) -> None:
        check_choice("warmup", self.warmup, ("uniform", "noise"))
        if self.exploration_noise is None:
            if self.warmup == "noise":
                raise ValueError("warmup='noise' needs exploration_noise, got exploration_noise=None")
            self._noise = None
            self._check_action_noise()
            return
        NoiseSchedule.parse(self.exploration_noise)
        if self.action_noise is not None and self._noise is None:
            raise ValueError(
                "exploration_noise and action_noise (noise_type in RL Zoo) exclude each other, got "
                f"exploration_noise={self.exploration_noise!r} and action_noise={self.action_noise!r}"
            )

    def _check_action_noise(self) -> None:
        noise = self.action_noise
        if noise is None:
            return
        if not isinstance(noise, ActionNoise):
            raise TypeError(f"action_noise must be an ActionNoise, got {noise!r} of type {type(noise).__name__}")
        sizes = {np.shape(getattr(noise, name)) for name in ("_mu", "_sigma") if hasattr(noise, name)}
        if not sizes <= {(), self.action_space.shape}:
            raise ValueError(f"action_noise must have the shape of an action, {self.action_space.shape}, got {noise!r}")

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

    def _make_replay_buffer(self) -> ReplayBuffer:
        assert self.replay_buffer_class is not None
        kwargs = dict(self.replay_buffer_kwargs)
        if issubclass(self.replay_buffer_class, HerReplayBuffer):
            if self.env is None:
                raise ValueError(
                    "HerReplayBuffer asks the environment for rewards: call set_env() or load with env=, got None"
                )
            kwargs["env"] = self.env
        return self.replay_buffer_class(
            self.buffer_size,
            self.observation_space,
            self.action_space,
            device=self.device,
            n_envs=self.n_envs,
            optimize_memory_usage=self.optimize_memory_usage,
            **kwargs,
        )

    def _sample(self, batch_size: int) -> Transitions:
        buffer = self.replay_buffer
        assert buffer is not None
        if self.engine and self._sampling_obstacle() is None:
            return Transitions(*sample_directly(buffer, batch_size), self.gamma)
        batch = buffer.sample(batch_size, env=self._vec_normalize_env)
        discounts = self.gamma if batch.discounts is None else batch.discounts
        return Transitions(batch.observations, batch.actions, batch.next_observations, batch.dones, batch.rewards, discounts)

    def _sampling_obstacle(self) -> str | None:
        """Why batches come from the buffer's own ``sample``; None if its arrays can be read directly."""
        buffer = self.replay_buffer
        if type(buffer) is not ReplayBuffer or "sample" in vars(buffer) or "_get_samples" in vars(buffer):
            return f"the buffer is a {type(buffer).__name__} of its own kind"
        if self._vec_normalize_env is not None:
            return "VecNormalize normalises each batch"
        return "optimize_memory_usage=True" if buffer.optimize_memory_usage else None

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
        if buffer is not None and buffer.n_envs != self.n_envs:
            self._replay_buffer = None
            raise ValueError(
                f"the replay buffer holds n_envs={buffer.n_envs} environments, the model has n_envs={self.n_envs}"
            )

    def _acting_obstacle(self) -> str | None:
        """Why numpy cannot act for the policy; an algorithm whose actor is a deterministic MLP asks `numpy_actor`."""
        return f"{type(self).__name__} acts by its policy"

    def _choose_actor(self) -> NumpyActor | None:
        """The numpy actor if it applies; looks again only if something about the policy has changed."""
        if self._numpy_actor is None or self._numpy_actor.policy is not self.policy or not self._numpy_actor.is_current():
            obstacle = self._acting_obstacle() if self.engine else "engine=False"
            self._numpy_actor = NumpyActor(self.policy) if obstacle is None else None
        return self._numpy_actor

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        The policy's action, see SB3's ``BaseAlgorithm.predict``; by numpy where that gives the same (`engine_report`).

        :param observation: ``(...)`` one observation or ``(N, ...)`` of them
        :param state: passed through
        :param episode_start: not used, policies are not recurrent
        :param deterministic: whether a stochastic policy gives its mode
        :return: action or ``(N, ...)`` actions in the environment's range, and ``state``
        """
        actor = self._choose_actor()
        action = None if actor is None else actor(observation)
        return super().predict(observation, state, episode_start, deterministic) if action is None else (action, state)

    def engine_report(self) -> dict[str, str]:
        """See `UpdateMixin.engine_report`."""
        obstacle = self._acting_obstacle() if self.engine else "engine=False"
        sampling = self._sampling_obstacle() if self.engine else "engine=False"
        return {
            **super().engine_report(),
            "acting": "numpy" if obstacle is None else f"PyTorch: {obstacle}",
            "replay": "direct" if sampling is None else f"SB3: {sampling}",
        }

    def _exploration_std(self) -> float | None:
        """Factor or mean sigma of the exploration noise in the scaled action space; None if there is none of known size."""
        if self._noise is not None:
            filling = self.warmup == "noise" and self.num_timesteps < self.learning_starts
            return 1.0 if filling else self._noise.std(self._noise_steps)
        process = getattr(self.action_noise, "base_noise", self.action_noise)
        sigma = getattr(process, "_sigma", None)
        return None if sigma is None else float(np.mean(sigma))

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        if self._noise is not None and action_noise is not None:
            std = self._exploration_std()
            assert std is not None
            action_noise = ScaledNoise(action_noise, std)
            learning_starts = 0 if self.warmup == "noise" else learning_starts
        return super()._sample_action(learning_starts, action_noise, n_envs)

    def _on_step(self) -> None:
        super()._on_step()
        self._noise_steps += self.n_envs

    def _begin_updates(self) -> None:
        self._restore_random_state()
        super()._begin_updates()

    def _end_updates(self) -> None:
        std = self._exploration_std()
        if std is not None:
            self.logger.record("train/exploration_std", std)
        super()._end_updates()

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
        derived = ["_replay_buffer", "_noise", "_numpy_actor"]
        if self._noise is not None:
            derived.append("action_noise")
        return [*super()._excluded_save_params(), *derived]
