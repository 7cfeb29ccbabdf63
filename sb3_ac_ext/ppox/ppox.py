"""
Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347), with clipped ratios or with an adaptive KL penalty.

    collect a rollout; A, R = GAE and A + V                                          (Algorithm 1)
    for epoch in 1 .. n_epochs, for each minibatch:
        r = pi(a|s) / pi_old(a|s)
        clip:    L = -mean min(r A, clip(r, 1 - c, 1 + c) A)                         (eq. 7)
        penalty: L = -mean r A + beta mean KL(pi_old(.|s) || pi(.|s))                (eq. 8)
        descend L - ent_coef mean H[pi(.|s)] + vf_coef mean (V(s) - R)^2             (eq. 9)
        stop early where pi has moved far enough from pi_old
    penalty: d = mean KL(pi_old || pi); halve beta if d < d_targ / 1.5, double it if d > 1.5 d_targ
"""

from collections.abc import Collection, Iterator
from contextlib import nullcontext
from typing import Any, ClassVar, Unpack

import numpy as np
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_ac_ext.base.on_policy import OnPolicyMixin
from sb3_ac_ext.base.schedules import as_schedule
from sb3_ac_ext.base.typing import OnPolicyKwargs
from sb3_ac_ext.buffers.rollouts import Samples, minibatches
from sb3_ac_ext.functional.surrogates import (
    Loss,
    adapted_kl_coef,
    clipped_squared_error,
    clipped_surrogate,
    kl_estimate,
    normalized,
    outside,
    squared_error,
    surrogate,
)
from sb3_ac_ext.legacy.actor_critic import PARTS, POLICIES, Evaluation, MlpPolicy
from sb3_ac_ext.ppox.arguments import check_clip_range_is_default, check_ppox_arguments, check_sizes

KL_TARGET = 0.01
KL_COEF = 1.0
"""Of the adaptive penalty, where the arguments are None."""


class PPOX(OnPolicyMixin, PPO):
    """
    PPO with the published clipping of values, early stops, separate phases for policy and value, and the adaptive penalty.

    Differences from the paper: SB3's defaults and its loss of the value without factor 1/2. Differences from SB3's PPO with
    the extras at their defaults: none in the updates; in rollouts, values and log-probabilities are computed at the end.

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", or a policy class
    :param env: environment or its id
    :param learning_rate: rate: a number >= 0, "lin_x" (falls linearly from x to 0), or a schedule
    :param n_steps: steps of each environment in a rollout, the most of them with ``rollout="episodes"``
    :param batch_size: samples per gradient step
    :param n_epochs: passes over the rollout
    :param clip_range: c, or its schedule
    :param clip_range_vf: largest change of a value that counts, in reward units, or its schedule; None does not clip
    :param clip_range_vf_mode: "clipped" counts the clipped value's error (SB3), "max" the larger of both errors (published)
    :param normalize_advantage: whether advantages get mean 0 and standard deviation 1
    :param normalize_advantage_over: in each "minibatch" (SB3), or once over the "buffer"
    :param vf_coef: weight of the value's loss
    :param max_grad_norm: bound on the 2-norm of the gradient by all parameters; with ``separate_phases`` on that of each
        network ("policy", "value" in a dict); None does not clip
    :param target_kl: SB3's early stop: all updates end once a minibatch's KL (k3) is above 1.5 times this
    :param surrogate: "clip" or "penalty"
    :param kl_target: d_targ of the penalty, in nats (0.01)
    :param kl_coef: beta that the penalty starts with, reward units per nat (1)
    :param kl_stop: another early stop: KL above which the policy's updates end, in nats
    :param kl_stop_estimator: "k1", -mean log r, or "k3", mean r - 1 - log r, see `kl_estimate`
    :param kl_stop_every: looked at on every "minibatch" before its step, or after every "epoch" on the whole rollout
    :param kl_stop_scope: what ends: "both", or the "policy" only, which needs ``separate_phases``
    :param separate_phases: whether the policy's epochs come first, then the value's, each with its own optimizer; ``vf_coef``
        is not used then
    :param policy_epochs: epochs of the policy's phase (``n_epochs``)
    :param value_epochs: of the value's (``n_epochs``)
    :param policy_sample_ratio: share of the rollout, in (0, 1], that an epoch of the policy's phase takes for one gradient
        step; None makes minibatches of ``batch_size``
    :param value_sample_ratio: the same for the value's phase
    :param policy_learning_rate: rate of the policy instead, with ``separate_phases``
    :param value_learning_rate: rate of the value instead, with ``separate_phases``
    :param value_stop_mse: with ``separate_phases``: the value's phase ends once 1/2 mean (V - V_old)^2 is above this
    :param kwargs: `OnPolicyKwargs`
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction
    :raises UnsupportedError: for spaces that PPO cannot take
    """

    sb3_class = PPO
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = POLICIES
    policy: MlpPolicy

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: int = 64,
        n_epochs: int = 10,
        *,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        clip_range_vf_mode: str = "clipped",
        normalize_advantage: bool = True,
        normalize_advantage_over: str = "minibatch",
        vf_coef: float = 0.5,
        max_grad_norm: float | dict[str, float] | None = 0.5,
        target_kl: float | None = None,
        surrogate: str = "clip",
        kl_target: float | None = None,
        kl_coef: float | None = None,
        kl_stop: float | None = None,
        kl_stop_estimator: str = "k3",
        kl_stop_every: str = "epoch",
        kl_stop_scope: str = "both",
        separate_phases: bool = False,
        policy_epochs: int | None = None,
        value_epochs: int | None = None,
        policy_sample_ratio: float | None = None,
        value_sample_ratio: float | None = None,
        policy_learning_rate: float | str | Schedule | None = None,
        value_learning_rate: float | str | Schedule | None = None,
        value_stop_mse: float | None = None,
        _init_setup_model: bool = True,
        **kwargs: Unpack[OnPolicyKwargs],
    ) -> None:
        check_sizes(n_steps, batch_size, normalize_advantage)  # SB3 computes with them first
        super().__init__(
            policy,
            env,
            learning_rate,
            n_steps,
            batch_size,
            n_epochs,
            clip_range=clip_range,
            clip_range_vf=clip_range_vf,
            normalize_advantage=normalize_advantage,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            target_kl=target_kl,
            _init_setup_model=False,
            **kwargs,
        )
        self.clip_range_vf_mode = clip_range_vf_mode
        self.normalize_advantage_over = normalize_advantage_over
        self.surrogate = surrogate
        self.kl_target = kl_target
        self.kl_coef = kl_coef
        self.kl_stop = kl_stop
        self.kl_stop_estimator = kl_stop_estimator
        self.kl_stop_every = kl_stop_every
        self.kl_stop_scope = kl_stop_scope
        self.separate_phases = separate_phases
        self.policy_epochs = policy_epochs
        self.value_epochs = value_epochs
        self.policy_sample_ratio = policy_sample_ratio
        self.value_sample_ratio = value_sample_ratio
        self.policy_learning_rate = policy_learning_rate
        self.value_learning_rate = value_learning_rate
        self.value_stop_mse = value_stop_mse
        if surrogate == "penalty":
            check_clip_range_is_default(clip_range)
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_ppox_arguments(self)

    def _setup_model(self) -> None:
        for name in ("clip_range", "clip_range_vf"):
            if getattr(self, name) is not None:
                setattr(self, name, as_schedule(name, getattr(self, name)))
        start = KL_COEF if self.kl_coef is None else self.kl_coef
        if getattr(self, "_kl_coef_start", None) != start:  # a loaded model goes on with its own
            self._kl_coef_start = self._kl_coef = start
        self._kls: list[Any] = []
        super()._setup_model()

    def _make_optimizers(self) -> None:
        if self.separate_phases:
            self.policy.separate_optimizers(self.lr_schedule(1), "separate_phases=True")

    def _optimizers(self) -> dict[str, th.optim.Optimizer]:
        optimizers: dict[str, th.optim.Optimizer] = {"policy": self.policy.optimizer}
        return {**optimizers, "value": self.policy.value_optimizer} if self.separate_phases else optimizers

    @np.errstate(over="ignore", invalid="ignore")  # silent as PyTorch; `_end_updates` says what became of it
    def train(self) -> None:
        """
        Updates on the rollout that was collected.

        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        self._begin_updates()
        samples = self._prepared(self._samples())
        for parts in (("policy",), ("value",)) if self.separate_phases else (PARTS,):
            within = self._run_epochs(samples, parts)
            if not within and self.kl_stop_scope == "both":
                break
        if self.surrogate == "penalty":
            self._adapt_penalty(samples)
        self._end_updates()

    def _run_epochs(self, samples: Samples, parts: Collection[str]) -> bool:
        """
        :param samples: the rollout
        :param parts: what is trained: policy, value or both
        :return: whether all epochs were done
        """
        prefix = "" if parts == PARTS else f"{next(iter(parts))}_"
        epochs = getattr(self, f"{prefix}epochs", None) or self.n_epochs
        ratio = getattr(self, f"{prefix}sample_ratio", None)
        for epoch in range(1, epochs + 1):
            if "policy" in parts:
                self._kls.clear()  # the log has the last epoch's, as with SB3
            within = all(self._update(batch, parts) for batch in self._batches(samples, ratio))
            within = within and self._within_bounds_after_epoch(samples, parts)
            self._n_updates += 1
            self.logger.record(f"train/{prefix}epochs", epoch)
            if not within:
                return False
        return True

    def _batches(self, samples: Samples, ratio: float | None) -> Iterator[Samples]:
        """Minibatches of the whole rollout, or one batch with a share of it."""
        if ratio is None:
            return minibatches(samples, self.batch_size)
        return iter([next(minibatches(samples, max(int(ratio * samples.size), 1)))])

    def _update(self, batch: Samples, parts: Collection[str]) -> bool:
        """One gradient step, unless the KL divergence is too large already; returns whether it was taken."""
        with self._workspace.lend() if self.engine else nullcontext():
            return self._descend_on(batch, parts)

    def _descend_on(self, batch: Samples, parts: Collection[str]) -> bool:
        evaluation = self._learner.evaluate(batch.observations, batch.actions, parts)
        slopes: dict[str, Any] = {}
        if "value" in parts:
            weight = 1.0 if self.separate_phases else self.vf_coef
            slopes["values"] = weight * self._value_loss(batch, evaluation.values).slope
        if "policy" in parts:
            log_ratio = evaluation.log_prob - batch.log_probs
            slopes.update(self._policy_slopes(batch, evaluation, log_ratio))
            if not self._within_bounds_on_minibatch(log_ratio):
                return False
        evaluation.backward(**slopes)
        for network in parts if self.separate_phases else ("policy",):
            self._step(network)
        return True

    def _policy_slopes(self, batch: Samples, evaluation: Evaluation, log_ratio: Any) -> dict[str, Any]:
        """The policy's loss, by what it is a function of."""
        advantages = batch.advantages
        if self.normalize_advantage and self.normalize_advantage_over == "minibatch":
            advantages = normalized(advantages)
        if self.surrogate == "clip":
            clip_range = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]  # a schedule
            loss = clipped_surrogate(log_ratio, advantages, clip_range)
            self._means.add("clip_fraction", outside(log_ratio, clip_range))
            slopes = {}
        else:
            loss = surrogate(log_ratio, advantages)
            slopes = {"kl": (batch.described, self._kl_coef / batch.size + 0 * advantages)}
        self._means.add("policy_gradient_loss", loss.value)
        self._means.add("entropy_loss", -evaluation.entropy.mean())
        if self.ent_coef:
            slopes["entropy"] = -self.ent_coef / batch.size + 0 * advantages
        return {"log_prob": loss.slope, **slopes}

    def _value_loss(self, batch: Samples, values: Any) -> Loss:
        if self.clip_range_vf is None:
            loss = squared_error(values, batch.returns)
        else:
            clip_range = self.clip_range_vf(self._current_progress_remaining)  # type: ignore[operator]  # a schedule
            pessimistic = self.clip_range_vf_mode == "max"
            loss = clipped_squared_error(values, batch.values, batch.returns, clip_range, pessimistic)
            self._means.add("value_clip_fraction", (abs(values - batch.values) > clip_range).sum() / batch.size)
        self._means.add("value_loss", loss.value)
        return loss

    def _within_bounds_on_minibatch(self, log_ratio: Any) -> bool:
        kl = kl_estimate(log_ratio, "k3")
        self._kls.append(kl)
        if self.target_kl is not None:
            return bool(kl <= 1.5 * self.target_kl)
        if self.kl_stop is not None and self.kl_stop_every == "minibatch":
            return bool(kl_estimate(log_ratio, self.kl_stop_estimator) <= self.kl_stop)
        return True

    def _within_bounds_after_epoch(self, samples: Samples, parts: Collection[str]) -> bool:
        if "policy" in parts and self.kl_stop is not None and self.kl_stop_every == "epoch":
            log_probs = self._over(samples, ("policy",), lambda evaluation, _: evaluation.log_prob)
            return bool(kl_estimate(log_probs - samples.log_probs, self.kl_stop_estimator) <= self.kl_stop)
        if "policy" not in parts and self.value_stop_mse is not None:
            values = self._over(samples, ("value",), lambda evaluation, _: evaluation.values)
            return bool(0.5 * squared_error(values, samples.values).value <= self.value_stop_mse)
        return True

    def _adapt_penalty(self, samples: Samples) -> None:
        kl = float(self._over(samples, ("policy",), lambda evaluation, part: evaluation.kl(part.described)).mean())
        self.logger.record("train/kl", kl)
        self.logger.record("train/kl_coef", self._kl_coef)
        self._kl_coef = adapted_kl_coef(self._kl_coef, kl, self.kl_target or KL_TARGET)

    def _prepared(self, samples: Samples) -> Samples:
        """What is computed once for all epochs."""
        if self.normalize_advantage and self.normalize_advantage_over == "buffer":
            samples = samples._replace(advantages=normalized(samples.advantages))
        if self.surrogate == "penalty":
            samples = samples._replace(described=self._learner.describe(samples.observations))
        return samples

    def _end_updates(self) -> None:
        for name in ("clip_range", "clip_range_vf"):
            if getattr(self, name) is not None and (self.surrogate == "clip" or name == "clip_range_vf"):
                self.logger.record(f"train/{name}", getattr(self, name)(self._current_progress_remaining))
        if self._kls:
            self.logger.record("train/approx_kl", float(sum(self._kls) / len(self._kls)))
        super()._end_updates()

    def _joint_optimizers(self) -> dict[str, tuple[str, ...]]:
        return {"policy.optimizer": ("policy.optimizer", "policy.value_optimizer")}

    def _translated_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        if "policy.value_optimizer" in parameters and not self.separate_phases:
            raise ValueError("separate_phases must stay True for a model with two optimizers, got False")
        return super()._translated_parameters(parameters)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, *(["policy.value_optimizer"] if self.separate_phases else [])], tensors

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_kls"]
