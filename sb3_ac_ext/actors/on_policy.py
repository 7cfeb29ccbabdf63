"""What the on-policy algorithms with actors share: a rollout is a number of results of actors."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import explained_variance, obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_ac_ext.actors.learner import ActorArguments, ActorsMixin
from sb3_ac_ext.actors.tasks import Tasks, task_names
from sb3_ac_ext.base.declarations import OnPolicyArguments
from sb3_ac_ext.base.environment_checks import check_finite
from sb3_ac_ext.base.on_policy import OnPolicyMixin
from sb3_ac_ext.base.rmsprop import RMSprop
from sb3_ac_ext.buffers.segments import Result, Segment, SegmentBatch, at, final_observations, joined, stacked
from sb3_ac_ext.validation import NonFiniteError, UnsupportedError


class OnPolicyActorArguments(ActorArguments, OnPolicyArguments):
    """
    What these algorithms take.

    :param n_steps: T, steps of each environment that an actor takes with the same weights
    """


class OnPolicyActorsMixin(ActorsMixin, OnPolicyMixin):
    """Goes before the SB3 class: ``class IMPALA(OnPolicyActorsMixin, OnPolicyAlgorithm)``."""

    declarations = OnPolicyActorArguments
    overlaps: ClassVar[bool] = True
    """Whether actors act while the learner computes, instead of waiting for what it comes to."""
    use_rms_prop: bool
    rms_prop_eps: float
    rms_prop_init: float = 1.0
    _results: Sequence[Any] = ()
    """What an update is made of."""
    _values_and_targets: tuple[th.Tensor, th.Tensor] | None = None
    _tasks: Tasks

    def _setup_model(self) -> None:
        given = self.policy_kwargs
        if self.use_rms_prop and "optimizer_class" not in given:
            options = {"eps": self.rms_prop_eps, "start": self.rms_prop_init, **(given.get("optimizer_kwargs") or {})}
            self.policy_kwargs = {**given, "optimizer_class": RMSprop, "optimizer_kwargs": options}
        super()._setup_model()
        self.policy_kwargs = given

    def _make_optimizers(self) -> None:
        optimizer = self.policy.optimizer
        optimizer.load_state_dict(optimizer.state_dict())  # whose state may not be where SB3 has moved the parameters

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if (self.policy_kwargs or {}).get("use_sde", False):
            raise UnsupportedError("policy_kwargs['use_sde'] must be False, as actors have no noise of their own, got True")

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        """
        Take as many results as an update is made of, see SB3's ``OnPolicyAlgorithm.collect_rollouts``.

        :param env: not used, as the actors have it
        :param callback: asked after every step
        :param rollout_buffer: not used
        :param n_rollout_steps: not used, as results are as long as actors make them
        :return: False if the callback stopped the training
        :raises ActorError: if an actor has failed
        :raises NonFiniteError: if an environment gave a reward that is not finite, or an observation of which the policy
            makes numbers that are not
        """
        callback.on_rollout_start()
        self._results = results = list[Result]()
        while len(results) < self._results_per_update():
            results.append(self._take())
            if not self._consume(results[-1], callback):
                return False
            self._tasks.count(results[-1], self._task_names)
        if self.overlaps and self._pool is not None:
            self._pool.begin(self._weights())
        self._record_actors()
        callback.on_rollout_end()
        return True

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        """See SB3."""
        result = super()._setup_learn(*args, **kwargs)
        assert self.env is not None
        self._task_names = task_names(self.env)
        if not hasattr(self, "_tasks") or self.num_timesteps == 0:
            self._tasks = Tasks(self._stats_window_size)
        return result

    def dump_logs(self, iteration: int = 0) -> None:
        """See SB3's ``OnPolicyAlgorithm.dump_logs``."""
        self._tasks.record(self.logger)
        super().dump_logs(iteration)

    def _results_per_update(self) -> int:
        raise NotImplementedError

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 100,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """
        Train; see `ActorsMixin.learn`.

        :param log_interval: updates between logs; they are short
        """
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _batch(self, segments: Sequence[Segment]) -> SegmentBatch:
        """
        The segments side by side, with V of the last observations of truncated episodes as it is now. Where ``n_steps`` was
        set while some were under way, those that are not as long as the last one are left out.
        """
        segments = [segment for segment in segments if segment.n_steps == segments[-1].n_steps]
        dtype = next(self.policy.parameters()).dtype
        return with_final_values(self.policy, segments, stacked(segments, self.action_space, self.device, dtype))

    # What is read of the rollout buffer otherwise

    def _check_observations(self, cause: NonFiniteError) -> None:
        """Name the environment where an update failed for its observations."""
        for result in self._results:
            if isinstance(result, Segment):
                check_finite("observation", result.observations, np.arange(result.n_envs), env_axis=1, cause=cause)

    def _record_explained_variance(self) -> None:
        if self._values_and_targets is not None:
            values, targets = (part.cpu().numpy().flatten() for part in self._values_and_targets)
            self.logger.record("train/explained_variance", explained_variance(values, targets))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_results", "_values_and_targets", "_task_names"]


@th.no_grad()
def with_final_values(policy: Any, segments: Sequence[Segment], batch: SegmentBatch) -> SegmentBatch:
    """
    :param policy: with values
    :param segments: that the batch was made of
    :param batch: gets V of the last observations of truncated episodes
    :return: the batch
    :raises NonFiniteError: if such an observation is not finite, nor its value, or that of a segment's last one
    """
    _check_last(policy, segments, batch)
    places, observations = final_observations(segments)
    if places:
        values = policy.predict_values(obs_as_tensor(joined(observations), policy.device)).flatten()
        steps, envs = zip(*places, strict=True)
        if not values.isfinite().all():
            check_finite("last observation of an episode", joined(observations), np.array(envs))
        batch.final_values[list(steps), list(envs)] = values.to(batch.final_values.dtype)
    return batch


def _check_last(policy: Any, segments: Sequence[Segment], batch: SegmentBatch) -> None:
    """A policy may know what to do with an observation that is not finite; what it makes of it has to be finite."""
    for segment in segments:
        try:
            check_finite("observation", at(segment.observations, -1), np.arange(segment.n_envs))
        except NonFiniteError:
            if not policy.predict_values(batch.last_observations).isfinite().all():
                raise
