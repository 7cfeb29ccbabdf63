"""What the on-policy algorithms share besides the updates: rollouts, their samples, argument checks."""

import copy
from collections.abc import Callable, Collection, Iterator
from typing import Any, ClassVar, Self

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import explained_variance
from stable_baselines3.common.vec_env import VecEnv

from sb3_ac_ext.base.arguments import check_on_policy_arguments, warn_of_endless_episodes
from sb3_ac_ext.base.checkpoint import CheckpointMixin
from sb3_ac_ext.base.typing import constructor_keys
from sb3_ac_ext.legacy import numpy_actor_critic
from sb3_ac_ext.legacy.acting import ActingMixin
from sb3_ac_ext.legacy.actor_critic import ROWS, ActorCritic, Evaluation, TorchActorCritic
from sb3_ac_ext.legacy.arrays import namespace
from sb3_ac_ext.legacy.descent import FlatAdam, hooked
from sb3_ac_ext.legacy.environment_checks import check_finite, check_rollout, locate_non_finite
from sb3_ac_ext.legacy.rollouts import Samples, fill_estimates, flattened
from sb3_ac_ext.validation import check_keys, translated_assertions

AUTOMATIC_BUFFERS = (RolloutBuffer, DictRolloutBuffer)
"""What SB3 chooses when no class is given, and stores in its zips as if it had been."""


class OnPolicyMixin(ActingMixin, CheckpointMixin, OnPolicyAlgorithm):
    """Goes before the SB3 class: ``class PPOX(OnPolicyMixin, PPO)``."""

    rollout_limit: ClassVar[str] = "n_steps"
    """The argument that bounds the steps of each environment in a rollout."""
    rollout_buffer: RolloutBuffer
    max_grad_norm: float | dict[str, float] | None  # type: ignore[assignment]  # SB3 has one for all
    _learner: ActorCritic
    _kept: np.ndarray | None

    def __init__(
        self,
        *args: Any,
        rollout: str = "steps",
        rollout_episodes: int = 16,
        drop_unfinished_episodes: bool = False,
        engine: bool = True,
        **kwargs: Any,
    ) -> None:
        check_keys(f"{type(self).__name__}()", kwargs, constructor_keys(type(self)) | {"_init_setup_model"})
        self.rollout = rollout
        self.rollout_episodes = rollout_episodes
        self.drop_unfinished_episodes = drop_unfinished_episodes
        self.engine = engine
        self._torch_actor_critic: TorchActorCritic | None = None
        self._rollout_length, self._kept = 0, None
        kwargs["policy_kwargs"] = copy.copy(kwargs.get("policy_kwargs"))  # SB3 writes into it
        with translated_assertions(self):
            super().__init__(*args, **kwargs)

    def _setup_model(self) -> None:
        self._check_arguments()
        if self.rollout_buffer_class in AUTOMATIC_BUFFERS:
            self.rollout_buffer_class = None
        with translated_assertions(self):
            super()._setup_model()
        self._torch_actor_critic = None
        self._make_optimizers()
        self._setup_updates()

    def _check_arguments(self) -> None:
        """
        :raises TypeError: if an argument has the wrong type
        :raises ValueError: if one is out of range or contradicts another
        :raises UnsupportedError: if the spaces or a combination of arguments cannot be served
        """
        check_on_policy_arguments(self)
        if self.rollout == "episodes" and self.env is not None:
            self._check_time_limit()

    def _check_time_limit(self) -> None:
        warn_of_endless_episodes(self)

    def _optimizers(self) -> dict[str, th.optim.Optimizer]:
        return {"policy": self.policy.optimizer}

    def _make_optimizers(self) -> None:
        """Where an algorithm makes others than the one of SB3's policy."""

    def _acting_obstacle(self) -> str | None:
        return numpy_actor_critic.obstacle(self.policy)

    def _make_numpy_actor(self) -> Any:
        return numpy_actor_critic.NumpyActorCritic(self.policy)

    def _actor_critic(self) -> ActorCritic:
        """How the policy is evaluated now."""
        chosen = self._choose_actor()
        if chosen is None:
            if self._torch_actor_critic is None or self._torch_actor_critic.policy is not self.policy:
                self._torch_actor_critic = TorchActorCritic(self.policy)
            chosen = self._torch_actor_critic
        return chosen  # type: ignore[no-any-return]

    # Rollouts

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """
        Fill the buffer, see SB3's ``OnPolicyAlgorithm.collect_rollouts``.

        Values and log-probabilities are computed at the end, all at once, where nobody has replaced what computes them;
        a callback finds None under their names.

        :param env: the training environments
        :param callback: asked after every step
        :param rollout_buffer: gets the samples
        :param n_rollout_steps: steps of each environment, the most of them with ``rollout="episodes"``
        :return: False if the callback stopped the training
        :raises NonFiniteError: if an environment gave NaN or infinite numbers
        """
        ordinary = self._choose_actor() is None or type(rollout_buffer) is not RolloutBuffer
        with locate_non_finite(self, rollout_buffer):
            if ordinary and self.rollout == "steps":
                self._rollout_length, self._kept = n_rollout_steps, None
                continue_training = super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
                check_rollout(self, rollout_buffer)
                return continue_training
            return self._collect(env, callback, rollout_buffer, n_rollout_steps)

    def _collect(self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int) -> bool:
        whole_episodes = self.rollout == "episodes"
        if whole_episodes and self.drop_unfinished_episodes and not np.all(self._last_episode_starts):
            self._last_obs, self._last_episode_starts = env.reset(), np.ones(env.num_envs, dtype=bool)  # type: ignore[assignment]
        policy, actor = self.policy, self._actor_critic()
        policy.set_training_mode(False)
        rollout_buffer.reset()
        if self.use_sde:
            policy.reset_noise(env.num_envs)
        callback.on_rollout_start()
        obs_tensor = values = log_probs = None  # where callbacks look for SB3's names
        truncations: list[tuple[int, int, Any]] = []
        n_steps, finished = 0, np.zeros(env.num_envs, dtype=int)
        while n_steps < n_rollout_steps and not (whole_episodes and self._has_enough(finished)):
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                policy.reset_noise(env.num_envs)
            actions = actor.act(self._last_obs)
            clipped_actions = self._within_bounds(actions)
            new_obs, rewards, dones, infos = env.step(clipped_actions)
            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
            self._store(rollout_buffer, n_steps, actions, rewards)
            if dones.any():
                finished += dones
                truncations += [(n_steps, i, obs) for i, obs in truncated(dones, infos)]
            self._last_obs, self._last_episode_starts = new_obs, dones  # type: ignore[assignment]  # no tuples
            n_steps += 1
        self._rollout_length = rollout_buffer.pos = n_steps
        rollout_buffer.full = True
        values, log_probs = self._complete(rollout_buffer, actor, truncations)
        self._kept = self._finished(rollout_buffer) if whole_episodes and self.drop_unfinished_episodes else None
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _has_enough(self, finished: np.ndarray) -> bool:
        """Whether a rollout of episodes is complete once ``(N,)`` of them have ended."""
        return bool(finished.sum() >= self.rollout_episodes)

    def _within_bounds(self, actions: np.ndarray) -> np.ndarray:
        """What the environments get for the distribution's actions."""
        space = self.action_space
        if not isinstance(space, spaces.Box):
            return actions
        if self.policy.squash_output:
            return np.asarray(self.policy.unscale_action(actions))
        return np.asarray(np.clip(actions, space.low, space.high))

    def _store(self, buffer: RolloutBuffer, step: int, actions: np.ndarray, rewards: np.ndarray) -> None:
        obs: Any = self._last_obs
        for name, value in obs.items() if isinstance(obs, dict) else (("", obs),):
            places: Any = buffer.observations[name] if name else buffer.observations
            places[step] = value.reshape(places[step].shape)
        buffer.actions[step] = actions.reshape(self.n_envs, -1)
        buffer.rewards[step] = rewards
        buffer.episode_starts[step] = self._last_episode_starts

    @np.errstate(over="ignore", invalid="ignore")  # silent as PyTorch
    def _complete(
        self, buffer: RolloutBuffer, actor: ActorCritic, truncations: list[tuple[int, int, Any]]
    ) -> tuple[th.Tensor, th.Tensor]:
        """Everything that follows from observations, actions and rewards; returns what SB3 calls values and log_probs then."""
        check_rollout(self, buffer)
        length, gamma = self._rollout_length, self.gamma
        if truncations:
            steps, envs, last = (list(column) for column in zip(*truncations, strict=True))
            keys = last[0].keys() if isinstance(last[0], dict) else ()
            stacked = {key: np.stack([obs[key] for obs in last]) for key in keys} if keys else np.stack(last)
            check_finite("last observation of an episode", stacked, np.array(envs))
            buffer.rewards[steps, envs] += gamma * actor.values(stacked)
        samples = flattened(buffer, length, None, actor)
        with th.no_grad():
            evaluations = [actor.evaluate(part.observations, part.actions) for part in _pieces(samples)]
        self._put(buffer.values, [evaluation.values for evaluation in evaluations])
        self._put(buffer.log_probs, [evaluation.log_prob for evaluation in evaluations])
        last_values = actor.values(self._last_obs)
        fill_estimates(buffer, length, last_values, np.asarray(self._last_episode_starts))
        return th.as_tensor(last_values)[:, None], th.as_tensor(buffer.log_probs[length - 1])

    def _put(self, places: np.ndarray, parts: list[Any]) -> None:
        """Write what was computed for samples in their flat order."""
        flat = np.concatenate([part.cpu().numpy() if isinstance(part, th.Tensor) else part for part in parts])
        places[: self._rollout_length] = flat.reshape(self.n_envs, self._rollout_length).T

    def _finished(self, buffer: RolloutBuffer) -> np.ndarray:
        """``(T, N)`` which samples belong to episodes that ended within the rollout."""
        length = self._rollout_length
        ends = np.concatenate([buffer.episode_starts[1:length], np.asarray(self._last_episode_starts)[None]])
        kept: np.ndarray = np.cumsum(ends[::-1], axis=0)[::-1] > 0
        if not kept.any():
            raise ValueError(
                f"no episode ended within {self.rollout_limit}={length} steps of each environment, and unfinished ones are "
                f"dropped: raise {self.rollout_limit}, or limit the episodes with gymnasium.wrappers.TimeLimit"
            )
        return kept

    def _samples(self) -> Samples:
        """The rollout, as the policy takes it now."""
        return flattened(self.rollout_buffer, self._rollout_length, self._kept, self._actor_critic())

    # Updates

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        """A rollout may go beyond the end, and a rate that falls by the remaining progress must not become negative."""
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    def _begin_updates(self) -> None:
        self._restore_random_state()
        super()._begin_updates()
        if hooked(self.policy.parameters()):
            self._numpy_actor = None  # what acts without gradients does not look for these
        self._learner = self._actor_critic()
        self._learner.receive(self._descents.values())

    def _over(self, samples: Samples, parts: Collection[str], of: Callable[[Evaluation, Samples], Any]) -> Any:
        """
        :param samples: of a rollout
        :param parts: of the actor-critic that is evaluated
        :param of: what is wanted, ``(B,)`` of an evaluation of B samples
        :return: the same of all samples
        """
        with th.no_grad():
            pieces = [of(self._learner.evaluate(p.observations, p.actions, parts), p) for p in _pieces(samples)]
        return namespace(pieces[0]).concatenate(pieces)

    def _end_updates(self) -> None:
        self._record_explained_variance()
        if isinstance(log_std := getattr(self.policy, "log_std", None), th.Tensor):
            self.logger.record("train/std", log_std.detach().exp().mean().item())
        super()._end_updates()

    def _record_explained_variance(self) -> None:
        buffer, kept = self.rollout_buffer, self._kept
        rows = slice(None) if buffer.generator_ready else slice(self._rollout_length) if kept is None else np.nonzero(kept)
        explained = explained_variance(buffer.values[rows].flatten(), buffer.returns[rows].flatten())
        self.logger.record("train/explained_variance", explained)

    def _step(self, network: str) -> None:
        """See `UpdateMixin._step`; recorded by itself, because what comes before it is not operations on tensors alone."""
        descent = self._descents[network]
        if isinstance(descent, FlatAdam) and descent.whole and self._records:
            self._capture.run(network, lambda: super(OnPolicyMixin, self)._step(network))
        else:
            super()._step(network)
        if self._records:
            descent.settle()

    def engine_report(self) -> dict[str, str]:
        """See `UpdateMixin.engine_report`."""
        report = super().engine_report()
        fast = report["acting"] == "numpy" and type(self.rollout_buffer) is RolloutBuffer
        return {**report, "rollout": "fast" if fast else "SB3's"}

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """
        Train; see SB3's ``OnPolicyAlgorithm.learn``.

        :param tb_log_name: name of the TensorBoard run, the class name by default
        """
        name = type(self).__name__ if tb_log_name is None else tb_log_name
        return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_torch_actor_critic", "_learner", "_kept"]


def truncated(dones: np.ndarray, infos: list[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
    """
    The environments whose episode was truncated.

    :param dones: ``(N,)`` whether a step ended the episode
    :param infos: of the step
    :return: pairs of an environment's number and its episode's last observation
    """
    for i in np.flatnonzero(dones):
        if infos[i].get("terminal_observation") is not None and infos[i].get("TimeLimit.truncated", False):
            yield int(i), infos[i]["terminal_observation"]


def _pieces(samples: Samples) -> Iterator[Samples]:
    for start in range(0, samples.size, ROWS):
        yield samples.at(slice(start, start + ROWS))
