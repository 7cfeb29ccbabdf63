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

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch as th
from annotated_types import Interval
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_ac_ext.base.on_policy import OnPolicyMixin
from sb3_ac_ext.base.schedules import Rate, as_schedule, check_default
from sb3_ac_ext.buffers.rollouts import Samples, minibatches
from sb3_ac_ext.engine import Network
from sb3_ac_ext.functional.surrogates import (
    adapted_kl_coef,
    clipped_squared_error,
    clipped_surrogate,
    kl_estimate,
    normalized,
    squared_error,
    surrogate,
)
from sb3_ac_ext.networks.actor_critic import (
    CnnPolicy,
    MlpPolicy,
    MultiInputPolicy,
    describe,
    kl_divergence,
    separate_optimizers,
)
from sb3_ac_ext.signatures import passed_on
from sb3_ac_ext.validation import Acts, ArgumentError, Excludes, Needs, NonNegative, Positive, PositiveInt, check_number

__all__ = ["PPOX", "CnnPolicy", "MlpPolicy", "MultiInputPolicy"]
__path__: list[str] = []
"""It was a package: `sb3_ac_ext.moved` finds the old name in it."""

KL_TARGET = 0.01
KL_COEF = 1.0
"""Of the adaptive penalty, where the arguments are None."""
PENALISED = Needs("surrogate", "penalty")
APART = Needs("separate_phases", True)
Share = Annotated[float, Interval(ge=1e-9, le=1)]


class Minibatch(NamedTuple):
    """The fields of `Samples`, and the numbers of the losses that change from rollout to rollout."""

    observations: Any
    actions: th.Tensor
    values: th.Tensor
    log_probs: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    described: Any
    clip_range: th.Tensor
    """``()`` c"""
    clip_range_vf: th.Tensor | None
    """``()`` the largest change of a value that counts, in reward units; None if all of it does"""
    kl_coef: th.Tensor
    """``()`` beta, in reward units per nat"""


class PPOX(OnPolicyMixin, PPO):
    """
    PPO with the published clipping of values, early stops, separate phases for policy and value, and the adaptive penalty.

    Differences from the paper: SB3's defaults and its loss of the value without factor 1/2. Differences from SB3's PPO with
    the extras at their defaults: none.

    :param batch_size: samples per gradient step
    :param n_epochs: passes over the rollout
    :param clip_range: c, largest change of a ratio that counts, or its schedule
    :param clip_range_vf: largest change of a value that counts, in reward units, or its schedule; None does not clip
    :param clip_range_vf_mode: "clipped" counts the clipped value's error (SB3), "max" the larger of both errors
        (published); SB3's has no gradient once the value has left its range
    :param normalize_advantage: whether advantages get mean 0 and standard deviation 1
    :param normalize_advantage_over: in each "minibatch" (SB3), or once over the "buffer"
    :param vf_coef: weight of the value's loss; not used with ``separate_phases``
    :param max_grad_norm: bound on the 2-norm of the gradient by all parameters; with ``separate_phases`` on that of each
        network ("policy", "value" in a dict); None does not clip
    :param target_kl: SB3's early stop: all updates end once a minibatch's KL (k3) is above 1.5 times this, in nats
    :param surrogate: what the policy descends: "clip", the clipped ratios, or "penalty", the ratios and beta times the KL
        divergence from the old policy
    :param kl_target: d_targ that the penalty aims at, in nats; None for 0.01
    :param kl_coef: beta that the penalty starts with, reward units per nat; None for 1. It halves after an update that
        moved less than ``kl_target`` / 1.5, doubles after one that moved more than 1.5 ``kl_target``, and is saved
    :param kl_stop: another early stop: KL above which the policy's updates end, in nats
    :param kl_stop_estimator: "k1", -mean log r, which can be negative, or "k3", mean r - 1 - log r, which cannot
    :param kl_stop_every: looked at on every "minibatch" before its step, or after every "epoch" on the whole rollout
    :param kl_stop_scope: what ends: "both" phases, or the "policy" only, whereupon the value's is run all the same
    :param separate_phases: whether the policy's epochs come first, then the value's, each with its own optimizer
    :param policy_epochs: epochs of the policy's phase; None for ``n_epochs``
    :param value_epochs: epochs of the value's phase; None for ``n_epochs``
    :param policy_sample_ratio: share of the rollout, drawn without replacement, that an epoch of the policy's phase takes
        for one gradient step; None makes minibatches of ``batch_size``
    :param value_sample_ratio: the same for the value's phase
    :param policy_learning_rate: rate of the policy instead of ``learning_rate``
    :param value_learning_rate: rate of the value instead of ``learning_rate``
    :param value_stop_mse: the value's phase ends once 1/2 mean (V - V_old)^2 is above this, in squared reward units
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction
    :raises UnsupportedError: for spaces that PPO cannot take
    """

    sb3_class = PPO

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 3e-4,
        n_steps: int = 2048,
        batch_size: PositiveInt = 64,
        n_epochs: PositiveInt = 10,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        clip_range: Rate = 0.2,
        clip_range_vf: Rate | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float | dict[str, float] | None = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        target_kl: NonNegative | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        clip_range_vf_mode: Annotated[Literal["clipped", "max"], Needs("clip_range_vf")] = "clipped",
        normalize_advantage_over: Literal["minibatch", "buffer"] = "minibatch",
        surrogate: Literal["clip", "penalty"] = "clip",
        kl_target: Annotated[Positive | None, PENALISED] = None,
        kl_coef: Annotated[NonNegative | None, PENALISED] = None,
        kl_stop: Annotated[NonNegative | None, Excludes("target_kl")] = None,
        kl_stop_estimator: Literal["k1", "k3"] = "k3",
        kl_stop_every: Literal["minibatch", "epoch"] = "epoch",
        kl_stop_scope: Annotated[Literal["both", "policy"], APART] = "both",
        separate_phases: Annotated[bool, Acts.NEVER] = False,
        policy_epochs: Annotated[PositiveInt | None, APART] = None,
        value_epochs: Annotated[PositiveInt | None, APART] = None,
        policy_sample_ratio: Annotated[Share | None, APART] = None,
        value_sample_ratio: Annotated[Share | None, APART] = None,
        policy_learning_rate: Annotated[Rate | None, APART] = None,
        value_learning_rate: Annotated[Rate | None, APART] = None,
        value_stop_mse: Annotated[NonNegative | None, APART] = None,
        rollout: Literal["steps", "episodes"] = "steps",
        rollout_episodes: int = 16,
        drop_unfinished_episodes: bool = False,
        engine: bool = True,
    ) -> None:
        check_batch_size(batch_size, normalize_advantage)  # SB3 computes with it first
        super().__init__(**passed_on(PPOX, locals()), _init_setup_model=False)
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
        if _init_setup_model:
            self._setup_model()
            if surrogate == "penalty":  # only here: RL Zoo's enjoy loads a model with another one
                check_default("clip_range", clip_range, 0.2, 'surrogate="clip", got surrogate="penalty"')

    def _check_arguments(self) -> None:
        super()._check_arguments()
        self._read_arguments()
        check_batch_size(self.batch_size, self.normalize_advantage)
        if self.clip_range_vf is not None and self.clip_range_vf(1.0) == 0:  # type: ignore[operator]  # a schedule
            raise ArgumentError("clip_range_vf must be > 0, or None for no clipping, got 0")

    def _read_arguments(self) -> None:
        """Schedules, and the penalty that a new start is given for; a loaded model goes on with its own."""
        for name in ("clip_range", "clip_range_vf"):
            if getattr(self, name) is not None:
                setattr(self, name, as_schedule(name, getattr(self, name)))
        start = KL_COEF if self.kl_coef is None else self.kl_coef
        if getattr(self, "_kl_coef_start", None) != start:
            self._kl_coef_start = self._kl_coef = start

    def _make_optimizers(self) -> None:
        if self.separate_phases:
            separate_optimizers(self.policy, self.lr_schedule(1), "separate_phases=True")

    def _networks(self) -> Mapping[str, Network]:
        policy: Any = self.policy
        networks = {"policy": self._network("policy", policy, policy.optimizer, rate=self.policy_learning_rate)}
        if self.separate_phases:
            networks["value"] = self._network("value", policy, policy.value_optimizer, rate=self.value_learning_rate)
        return networks

    def train(self) -> None:
        """
        Updates on the rollout that was collected.

        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        kls: list[th.Tensor] = []
        self._read_arguments()
        with self._updates():
            samples = self._prepared(self._samples())
            for phase in ("policy", "value") if self.separate_phases else ("both",):
                within = self._run_epochs(samples, phase, kls)
                if not within and self.kl_stop_scope == "both":
                    break
            if self.surrogate == "penalty":
                self._adapt_penalty(samples)
        self.logger.record("train/approx_kl", th.stack(kls).mean().item())

    def _prepared(self, samples: Samples) -> Samples:
        """What is computed once for all epochs."""
        if self.normalize_advantage and self.normalize_advantage_over == "buffer":
            samples = samples._replace(advantages=normalized(samples.advantages))
        if self.surrogate == "penalty":
            old = self._over(samples, lambda part: describe(self.policy.get_distribution(part.observations)))
            samples = samples._replace(described=old)
        return samples

    def _run_epochs(self, samples: Samples, phase: str, kls: list[th.Tensor]) -> bool:
        """
        :param samples: the rollout
        :param phase: what is trained: "policy", "value" or "both"
        :param kls: gets the divergences of the last epoch's minibatches, as SB3 logs them
        :return: whether all epochs were done
        """
        prefix = "" if phase == "both" else f"{phase}_"
        epochs = getattr(self, f"{prefix}epochs", None) or self.n_epochs
        ratio = getattr(self, f"{prefix}sample_ratio", None)
        size = self.batch_size if ratio is None else max(int(ratio * samples.size), 1)
        numbers = self._numbers()
        for epoch in range(1, epochs + 1):
            if phase != "value":
                kls.clear()
            within = True
            for part in minibatches(samples, size):
                within = self._descend(Minibatch(*part, *numbers), phase, kls)
                if not within or ratio is not None:
                    break
            within = within and self._within_bounds_after_epoch(samples, phase)
            self._n_updates += 1
            self.logger.record(f"train/{prefix}epochs", epoch)
            if not within:
                return False
        return True

    def _numbers(self) -> tuple[Any, ...]:
        """What a `Minibatch` has besides samples."""
        progress = self._current_progress_remaining
        clip_range = self.clip_range(progress)  # type: ignore[operator]  # a schedule
        clip_range_vf = None if self.clip_range_vf is None else self.clip_range_vf(progress)  # type: ignore[operator]  # one too
        if self.surrogate == "clip":
            self.logger.record("train/clip_range", clip_range)
        if clip_range_vf is not None:
            self.logger.record("train/clip_range_vf", clip_range_vf)
        numbers = clip_range, clip_range_vf, self._kl_coef
        return tuple(None if x is None else th.as_tensor(x, dtype=th.float64, device=self.device) for x in numbers)

    def _descend(self, batch: Minibatch, phase: str, kls: list[th.Tensor]) -> bool:
        """One gradient step, unless the policy has moved too far already; returns whether it was taken."""
        bound = None if phase == "value" else self._bound_within_epochs()[0]
        outputs = self._run(self._update if bound is None else self._gradients, batch, phase)
        if phase != "value":
            kls.append(outputs["approx_kl"])
        if bound is not None:
            if not outputs["moved"] <= bound:
                return False
            self._engine.run(self._step, (), phase)
        return True

    def _bound_within_epochs(self) -> tuple[float | None, str]:
        """The KL divergence of a minibatch that ends the updates, None if there is none, and how it is estimated."""
        if self.target_kl is not None:
            return 1.5 * self.target_kl, "k3"
        return self.kl_stop if self.kl_stop_every == "minibatch" else None, self.kl_stop_estimator

    def _update(self, batch: Minibatch, phase: str) -> dict[str, th.Tensor]:
        outputs = self._gradients(batch, phase)
        self._step((), phase)
        return outputs

    def _step(self, _: tuple[()], phase: str) -> None:
        self._engine.step("value" if phase == "value" else "policy")

    def _gradients(self, batch: Minibatch, phase: str) -> dict[str, th.Tensor]:
        values, log_prob, entropy = self._evaluate(batch, policy=phase != "value", value=phase != "policy")
        if phase == "value":
            outputs = self._value_loss(batch, values)
            self._engine.differentiate(outputs["value_loss"], "value")
            return outputs
        log_ratio = log_prob - batch.log_probs
        over_minibatch = self.normalize_advantage and self.normalize_advantage_over == "minibatch"
        advantages = normalized(batch.advantages) if over_minibatch else batch.advantages
        if self.surrogate == "clip":
            policy_loss = -clipped_surrogate(log_ratio, advantages, batch.clip_range).mean()  # equation 7
            loss = policy_loss
        else:
            divergence = kl_divergence(batch.described, self.policy.get_distribution(batch.observations))
            policy_loss = -surrogate(log_ratio, advantages).mean()
            loss = policy_loss + batch.kl_coef * divergence.mean()  # equation 8
        outputs = {"policy_gradient_loss": policy_loss, "entropy_loss": -entropy.mean()}
        loss = loss + self.ent_coef * outputs["entropy_loss"]
        if phase == "both":
            outputs |= self._value_loss(batch, values)
            loss = loss + self.vf_coef * outputs["value_loss"]  # equation 9
        self._engine.differentiate(loss, "policy")
        return {**outputs, "loss": loss, **self._measures(log_ratio, batch)}

    def _value_loss(self, batch: Minibatch, values: th.Tensor) -> dict[str, th.Tensor]:
        """The mean error, and the share of values that have moved further than counts."""
        if batch.clip_range_vf is None:
            return {"value_loss": squared_error(values, batch.returns).mean()}
        pessimistic = self.clip_range_vf_mode == "max"
        errors = clipped_squared_error(values, batch.values, batch.returns, batch.clip_range_vf, pessimistic)
        outside = (values - batch.values).abs() > batch.clip_range_vf
        return {"value_loss": errors.mean(), "value_clip_fraction": outside.float().mean()}

    @th.no_grad()
    def _measures(self, log_ratio: th.Tensor, batch: Minibatch) -> dict[str, th.Tensor]:
        """How far the policy has moved."""
        bound, estimator = self._bound_within_epochs()
        measures = {"approx_kl": kl_estimate(log_ratio, "k3")}
        if bound is not None:
            measures["moved"] = kl_estimate(log_ratio, estimator)[None]  # with a dimension, as it is not for the log
        if self.surrogate == "clip":
            measures["clip_fraction"] = ((log_ratio.exp() - 1).abs() > batch.clip_range).float().mean()
        return measures

    def _within_bounds_after_epoch(self, samples: Samples, phase: str) -> bool:
        if phase != "value" and self.kl_stop is not None and self.kl_stop_every == "epoch":
            log_probs = self._over(samples, lambda part: self._evaluate(part, value=False).log_prob)
            return bool(kl_estimate(log_probs - samples.log_probs, self.kl_stop_estimator) <= self.kl_stop)
        if phase == "value" and self.value_stop_mse is not None:
            values = self._over(samples, lambda part: self._evaluate(part, policy=False).values)
            return bool(0.5 * squared_error(values, samples.values).mean() <= self.value_stop_mse)
        return True

    def _adapt_penalty(self, samples: Samples) -> None:
        def divergence(part: Samples) -> th.Tensor:
            return kl_divergence(part.described, self.policy.get_distribution(part.observations))

        kl = self._over(samples, divergence).mean().item()
        self.logger.record("train/kl", kl)
        self.logger.record("train/kl_coef", self._kl_coef)
        self._kl_coef = adapted_kl_coef(self._kl_coef, kl, self.kl_target or KL_TARGET)

    def _joint_optimizers(self) -> dict[str, tuple[str, ...]]:
        return {"policy.optimizer": ("policy.optimizer", "policy.value_optimizer")}

    def _translated_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        if "policy.value_optimizer" in parameters and not self.separate_phases:
            raise ArgumentError("separate_phases must stay True for a model with two optimizers, got False")
        return super()._translated_parameters(parameters)


def check_batch_size(batch_size: Any, normalize_advantage: Any) -> None:
    """
    :param batch_size: argument of `PPOX`
    :param normalize_advantage: argument of `PPOX`; a single advantage has no standard deviation
    :raises TypeError: if the size is not an integer
    :raises ValueError: if it is too small
    """
    if normalize_advantage is True:  # what is no bool is refused elsewhere
        check_number("batch_size with normalize_advantage=True", batch_size, low=2, integer=True)
