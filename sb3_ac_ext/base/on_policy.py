"""What the on-policy algorithms share besides the updates: rollouts, their samples, argument checks."""

import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.distributions import Distribution, StateDependentNoiseDistribution
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import explained_variance, obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv
from torch.distributions import Normal

from sb3_ac_ext.base.arguments import (
    ROLLOUTS_GET,
    check_choices_from_zero,
    check_environment,
    check_kwargs,
    made_with,
    warn_of_endless_episodes,
)
from sb3_ac_ext.base.checkpoint import CheckpointMixin
from sb3_ac_ext.base.declarations import OnPolicyArguments
from sb3_ac_ext.base.environment_checks import check_finite, check_rollout, locate_non_finite
from sb3_ac_ext.base.training import TrainingMixin
from sb3_ac_ext.buffers.rollouts import Samples, copied, fill_estimates, flattened
from sb3_ac_ext.engine import Engine, Outputs
from sb3_ac_ext.signatures import check_given
from sb3_ac_ext.validation import NonFiniteError, UnsupportedError, check_number, translated_assertions

AUTOMATIC_BUFFERS = (RolloutBuffer, DictRolloutBuffer)
"""What SB3 chooses when no class is given, for arrays and for dicts, and stores in its zips as if it had been."""
LOG_STD = -103, 88
"""Between these a standard deviation is neither 0 nor infinite in float32."""
ROWS = 8192
"""Samples that are evaluated together at most where a whole rollout is, which bounds the memory of the layers' outputs."""


class Evaluation(NamedTuple):
    """What a policy says of B samples; None where it was not asked."""

    values: Any
    """``(B,)`` V(s), in reward units."""
    log_prob: Any
    """``(B,)`` log pi(a|s), in nats."""
    entropy: Any
    """``(B,)`` H[pi(.|s)] in nats, or -log pi(a|s) where it has no closed form."""


class OnPolicyMixin(TrainingMixin, CheckpointMixin, OnPolicyAlgorithm):
    """Goes before the SB3 class: ``class PPOX(OnPolicyMixin, PPO)``."""

    declarations = OnPolicyArguments
    rollout_limit: ClassVar[str] = "n_steps"
    """The argument that bounds the steps of each environment in a rollout."""
    policy: ActorCriticPolicy
    rollout_buffer: RolloutBuffer
    max_grad_norm: float | dict[str, float] | None  # type: ignore[assignment]  # SB3 has one for all
    _kept: np.ndarray | None
    _buffer_discounts: tuple[float, float]
    """What the buffer was told of gamma and lambda."""

    def __init__(
        self,
        *args: Any,
        rollout: Literal["steps", "episodes"] = "steps",
        rollout_episodes: int = 16,
        drop_unfinished_episodes: bool = False,
        engine: bool = True,
        **kwargs: Any,
    ) -> None:
        kwargs = check_given(type(self), kwargs)
        self.rollout = rollout
        self.rollout_episodes = rollout_episodes
        self.drop_unfinished_episodes = drop_unfinished_episodes
        self.engine = engine
        self._rollout_length, self._kept = 0, None
        kwargs["policy_kwargs"] = copy.copy(kwargs.get("policy_kwargs"))  # SB3 writes into it
        with translated_assertions(self):
            super().__init__(*args, **kwargs)

    def _setup_model(self) -> None:
        self._check_policy_class()
        self._check_arguments()
        automatic = AUTOMATIC_BUFFERS[isinstance(self.observation_space, spaces.Dict)]
        if self.rollout_buffer_class is automatic:
            self.rollout_buffer_class = None
        check_kwargs("rollout_buffer_kwargs", self.rollout_buffer_kwargs, self.rollout_buffer_class or automatic, ROLLOUTS_GET)
        names = "n_steps", "rollout_buffer_kwargs", "policy_kwargs"
        made_of = {name: getattr(self, name) for name in names}
        with translated_assertions(self), made_with("rollout buffer and policy", **made_of):
            super()._setup_model()
        if isinstance(noise := getattr(self.policy, "action_dist", None), StateDependentNoiseDistribution):
            _detach(noise)
        self._buffer_discounts = float(self.gamma), float(self.gae_lambda)
        self._make_optimizers()
        self._setup_engine()

    def _check_arguments(self) -> None:
        """See `TrainingMixin._check_arguments`."""
        check_environment(self)
        check_choices_from_zero(self.action_space)
        super()._check_arguments()
        check_number("policy_kwargs['log_std_init']", (self.policy_kwargs or {}).get("log_std_init", 0.0), *LOG_STD)
        if self.rollout == "episodes" and self.rollout_buffer_class not in (None, *AUTOMATIC_BUFFERS):
            raise UnsupportedError(
                f"rollout='episodes' fills SB3's own buffers, got rollout_buffer_class={self.rollout_buffer_class}"
            )
        if self.rollout == "episodes" and self.env is not None:
            self._check_time_limit()

    def _check_time_limit(self) -> None:
        warn_of_endless_episodes(self)

    def _make_optimizers(self) -> None:
        """Where an algorithm makes others than the one of SB3's policy."""

    # Rollouts

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """
        Fill the buffer, see SB3's ``OnPolicyAlgorithm.collect_rollouts``.

        :param env: the training environments
        :param callback: asked after every step
        :param rollout_buffer: gets the samples
        :param n_rollout_steps: steps of each environment, the most of them with ``rollout="episodes"``
        :return: False if the callback stopped the training
        :raises NonFiniteError: if an environment gave a reward that is not finite, or an observation of which the policy
            makes numbers that are not
        """
        with locate_non_finite(self, rollout_buffer):
            return self._collect(env, callback, rollout_buffer, n_rollout_steps)

    def _collect(self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int) -> bool:
        whole_episodes = self.rollout == "episodes"
        if whole_episodes and self.drop_unfinished_episodes and not np.all(self._last_episode_starts):
            self._last_obs, self._last_episode_starts = env.reset(), np.ones(env.num_envs, dtype=bool)  # type: ignore[assignment]
        self._keep(self._last_obs, self._last_episode_starts)
        self._set_training_mode(False)
        rollout_buffer.buffer_size = n_rollout_steps  # which it makes room for
        rollout_buffer.reset()
        if self.use_sde:
            self._reset_noise()
        callback.on_rollout_start()
        n_steps, finished = 0, np.zeros(env.num_envs, dtype=int)
        while n_steps < n_rollout_steps and not (whole_episodes and self._has_enough(finished)):
            if self.use_sde and self.sde_sample_freq > 0 and n_steps % self.sde_sample_freq == 0:
                self._reset_noise()
            obs_tensor = obs_as_tensor(self._last_obs, self.device)  # type: ignore[arg-type]  # for callbacks, as the others
            actions, values, log_probs = self._forward(self._last_obs)
            clipped_actions = within_bounds(self.policy, actions)
            new_obs, rewards, dones, infos = env.step(clipped_actions)
            dones = dones.astype(bool)  # a copy, of flags or numbers
            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._update_info_buffer(infos, dones)
            if dones.any():
                finished += dones
                rewards = self._bootstrapped(rewards, dones, infos)
            rollout_buffer.add(self._last_obs, actions, rewards, self._last_episode_starts, values, log_probs)  # type: ignore[arg-type]
            self._keep(new_obs, dones)
            n_steps += 1
        self._rollout_length = n_steps
        rollout_buffer.full = True
        check_rollout(self, rollout_buffer, n_steps)
        values = self._values(self._last_obs)
        if not values.isfinite().all():
            check_finite("observation", self._last_obs, np.arange(self.n_envs))
        self._estimate(rollout_buffer, values, dones)
        self._kept = self._finished(rollout_buffer) if whole_episodes and self.drop_unfinished_episodes else None
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _keep(self, obs: Any, dones: Any) -> None:
        """Copies of what the environments show, and of whether episodes begin there; they may use their memory again."""
        self._last_obs, self._last_episode_starts = copied(obs), np.array(dones, dtype=bool)

    def _reset_noise(self) -> None:
        """New noise for gSDE, in the memory that the noise before it has, which a recording reads."""
        noise = vars(self.policy.action_dist)
        held: dict[str, Any] = {name: noise.get(name) for name in ("exploration_mat", "exploration_matrices")}
        with th.no_grad():
            self.policy.reset_noise(self.n_envs)
        for name, memory in held.items():
            new = noise[name].detach()
            kind = new.shape, new.dtype, new.device
            if memory is not None and (memory.shape, memory.dtype, memory.device) == kind and not memory.requires_grad:
                new = memory.copy_(new)
            noise[name] = new

    def _forward(self, obs: Any) -> tuple[np.ndarray, th.Tensor, th.Tensor]:
        """
        ``(N, ...)`` sampled actions as the distribution gives them, their values ``(N, 1)`` and log-probabilities ``(N,)``.
        """
        outputs = self._engine.evaluate(self._sample_actions, (obs,)) if self.engine and self.device.type == "cpu" else None
        if outputs is not None:
            return outputs["actions"], th.from_numpy(outputs["values"]), th.from_numpy(outputs["log_prob"])
        with self._acting_lock, th.no_grad():
            actions, values, log_prob = self._step_of_policy(obs_as_tensor(obs, self.device))
        return actions.cpu().numpy(), values, log_prob

    def _sample_actions(self, batch: tuple[Any]) -> dict[str, th.Tensor]:
        with self._acting_lock:
            actions, values, log_prob = self._step_of_policy(batch[0])
        return {"actions": actions, "values": values, "log_prob": log_prob}

    def _step_of_policy(self, obs: Any) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """For what the environments show ``(N, ...)`` sampled actions, ``(N, 1)`` values, ``(N,)`` log-probabilities."""
        step: tuple[th.Tensor, th.Tensor, th.Tensor] = self.policy(obs)
        return step

    def _values(self, obs: Any) -> th.Tensor:
        """``(N, 1)`` V of what the environments show."""
        with th.no_grad():
            return self.policy.predict_values(obs_as_tensor(obs, self.device))

    def _policy_of(self, env: int) -> ActorCriticPolicy:
        """The policy that acts in an environment."""
        return self.policy

    @property
    def _policies(self) -> Sequence[ActorCriticPolicy]:
        """All policies that act."""
        return [self.policy]

    def _bootstrapped(self, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        """``(N,)`` rewards, with what the last observation of a truncated episode is worth."""
        rewards = np.array(rewards)
        for i, obs in truncated(dones, infos):
            policy = self._policy_of(i)
            with th.no_grad():
                value = (float(self.gamma) * policy.predict_values(policy.obs_to_tensor(obs)[0])).item()
            if not np.isfinite(value):
                check_finite("last observation of an episode", obs, np.full(len(np.shape(obs)) + 1, i))
            rewards[i] += value
        return rewards

    def _has_enough(self, finished: np.ndarray) -> bool:
        """Whether a rollout of episodes is complete once ``(N,)`` of them have ended."""
        return bool(finished.sum() >= int(self.rollout_episodes))

    def _estimate(self, buffer: RolloutBuffer, last_values: th.Tensor, dones: np.ndarray) -> None:
        """Advantages and returns of the rollout, by the buffer itself where it is of another class than SB3's."""
        discounts = float(self.gamma), float(self.gae_lambda)
        if discounts != self._buffer_discounts:  # set on the model since
            buffer.gamma, buffer.gae_lambda = self._buffer_discounts = discounts
        if type(buffer) in AUTOMATIC_BUFFERS:
            fill_estimates(buffer, self._rollout_length, last_values.cpu().numpy().flatten(), dones)
        else:
            buffer.compute_returns_and_advantage(last_values=last_values, dones=dones)

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

    # Updates

    def _samples(self) -> Samples:
        """The rollout."""
        return flattened(self.rollout_buffer, self._rollout_length, self._kept)

    def _evaluate(self, samples: Any, policy: bool = True, value: bool = True) -> Evaluation:
        """
        :param samples: B of a rollout
        :param policy: whether the distribution of actions is wanted
        :param value: whether V is
        :return: what the policy says of them now
        """
        if policy and value:
            return evaluation(self.policy, samples)
        if policy:
            distribution = self.policy.get_distribution(samples.observations)
            log_prob, entropy = distribution.log_prob(samples.actions), distribution.entropy()
            return Evaluation(None, log_prob, -log_prob if entropy is None else entropy)
        return Evaluation(self.policy.predict_values(samples.observations).flatten(), None, None)

    @th.no_grad()
    def _over(self, samples: Samples, of: Callable[[Samples], th.Tensor]) -> th.Tensor:
        """
        :param samples: B of a rollout
        :param of: what is wanted, ``(b, ...)`` of b of them
        :return: ``(B, ...)`` the same of all of them
        """
        with self._acting_lock:
            return th.cat([of(samples.at(slice(start, start + ROWS))) for start in range(0, samples.size, ROWS)])

    def _run(self, function: Callable[..., Any], batch: Any, *options: Hashable) -> Outputs:
        """``function(batch, *options)`` by the engine, recorded where batches of this size come again and again."""
        recurs = self.rollout == "steps" or len(batch.advantages) == getattr(self, "batch_size", None)
        with self._engine.lock, self._acting_lock:  # another thread's prediction would put its distribution into the policy
            return (self._engine.run if recurs else self._engine.run_plainly)(function, batch, *options)

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        """A rollout may go beyond the end, and a rate that falls by the remaining progress must not become negative."""
        super()._update_current_progress_remaining(min(num_timesteps, total_timesteps), total_timesteps)

    @contextmanager
    def _updates(self) -> Iterator[Engine]:
        """See `TrainingMixin._updates`."""
        self._restore_random_state()
        try:
            with super()._updates() as engine:
                yield engine
        except NonFiniteError as error:
            self._check_observations(error)
            raise
        with self._acting_lock:
            for policy in self._policies:
                forget_distribution(policy)
        self._record_explained_variance()
        own = [getattr(policy, "log_std", None) for policy in self._policies]
        if deviations := [log_std.detach().exp().mean() for log_std in own if isinstance(log_std, th.Tensor)]:
            self.logger.record("train/std", th.stack(deviations).mean().item())

    def _check_observations(self, cause: NonFiniteError) -> None:
        """Name the environment where an update failed for its observations: a saturated layer hides them until then."""

        def features(samples: Samples) -> th.Tensor:
            found: Any = self.policy.extract_features(samples.observations)
            return th.cat(found, dim=1) if isinstance(found, tuple) else found

        buffer: Any = self.rollout_buffer
        if self._rollout_length and not buffer.generator_ready and not self._over(self._samples(), features).isfinite().all():
            check_finite("observation", buffer.observations, np.arange(self.n_envs), env_axis=1, cause=cause)

    def _check_finite(self, means: Mapping[str, float]) -> None:
        super()._check_finite(means)
        for policy in self._policies:
            log_std, distribution = getattr(policy, "log_std", None), getattr(policy, "action_dist", None)
            if isinstance(log_std, th.Tensor):
                std = getattr(distribution, "get_std", th.exp)(log_std.detach())  # gSDE has its own
                self._check_deviation(std.max().item())
                self._check_deviation(std.min().item())

    def _check_deviation(self, value: float) -> None:
        if not value < np.inf or (value == 0 and not self.use_sde):
            raise NonFiniteError(
                f"{type(self).__name__}: the standard deviation of actions became {value} by update "
                f"{self._n_updates}; lower the learning rate or ent_coef, or set max_grad_norm"
            )

    def _record_explained_variance(self) -> None:
        buffer, kept = self.rollout_buffer, self._kept
        rows = slice(None) if buffer.generator_ready else slice(self._rollout_length) if kept is None else np.nonzero(kept)
        explained = explained_variance(buffer.values[rows].flatten(), buffer.returns[rows].flatten())
        self.logger.record("train/explained_variance", explained)

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

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, *(["policy.value_optimizer"] if hasattr(self.policy, "value_optimizer") else [])], tensors

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_kept", "_buffer_discounts"]


def _detach(noise: StateDependentNoiseDistribution) -> None:
    """Leave the graph behind gSDE's first noise, which cannot be copied with the policy."""
    noise.exploration_mat, noise.exploration_matrices = noise.exploration_mat.detach(), noise.exploration_matrices.detach()
    noise.weights_dist = Normal(noise.weights_dist.loc, noise.weights_dist.scale.detach())


def evaluation(policy: ActorCriticPolicy, samples: Any) -> Evaluation:
    """
    :param policy: any
    :param samples: B observations and actions
    :return: what it says of them now
    """
    values, log_prob, entropy = policy.evaluate_actions(samples.observations, samples.actions)
    return Evaluation(values.flatten(), log_prob, -log_prob if entropy is None else entropy)


def forget_distribution(policy: BasePolicy) -> None:
    """
    :param policy: loses the distribution of its last actions, on which a graph may hang that cannot be copied with it
    """
    if isinstance(distribution := getattr(policy, "action_dist", None), Distribution):
        vars(distribution)["distribution"] = None


def within_bounds(policy: BasePolicy, actions: np.ndarray) -> np.ndarray:
    """
    :param policy: that has given the actions
    :param actions: ``(N, ...)`` as its distribution has them
    :return: ``(N, ...)`` what the environments get for them
    """
    space = policy.action_space
    if not isinstance(space, spaces.Box):
        return actions
    if policy.squash_output:
        return np.asarray(policy.unscale_action(actions))
    within: np.ndarray = np.minimum(np.maximum(actions, space.low), space.high)  # np.clip, in a fifth of its time
    return within


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
