"""
Trust region policy optimisation (Schulman et al. 2015, arXiv:1502.05477).

    collect a rollout; A, R = GAE and A + V
    L(theta) = mean pi(a|s) / pi_old(a|s) A + ent_coef mean H[pi(.|s)]               (eq. 14)
    g = grad L at theta_old;  F = mean Fisher matrix of pi_old(.|s) in theta
    x ~ (F + damping I)^-1 g by conjugate gradients                                  (appendix C)
    step = sqrt(2 delta / x^T (F + damping I) x) x
    theta = theta_old + c^j step, with the first j = 0, 1, ... for which
        mean KL(pi_old(.|s) || pi(.|s)) <= delta and L improves; theta_old if there is none
    for epoch in 1 .. n_critic_updates, for each minibatch:
        value: descend mean (V(s) - R)^2
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Unpack

import numpy as np
import torch as th
from gymnasium import spaces
from sb3_contrib import TRPO
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch import nn

from sb3_ac_ext.base.checkpoint import split_optimizer_state
from sb3_ac_ext.base.typing import OnPolicyKwargs
from sb3_ac_ext.functional.natural_gradient import (
    backtracking_line_search,
    flatten,
    natural_step,
    unflatten,
)
from sb3_ac_ext.legacy.actor_critic import POLICIES, Evaluation, MlpPolicy
from sb3_ac_ext.legacy.descent import constant, parameters_of
from sb3_ac_ext.legacy.on_policy import OnPolicyMixin
from sb3_ac_ext.legacy.rollouts import Samples, minibatches
from sb3_ac_ext.legacy.surrogates import normalized, squared_error, surrogate
from sb3_ac_ext.validation import check_choice, check_number, check_switch


class TRPOX(OnPolicyMixin, TRPO):
    """
    TRPO with the published divergence, Fisher products on a subset, and a line search that asks for enough improvement.

    The policy moves by natural gradients alone, every parameter that the distribution of actions depends on; the optimizer has
    what else the value depends on, so a features extractor that both share learns from the policy. Where there is no gradient
    or no finite step, or the line search accepts none, the policy stays as it is, its standard deviation too.

    Differences from the paper with the defaults, which are sb3-contrib's: KL(pi || pi_old) bounds the step, as a mean over the
    dimensions of Box and MultiBinary actions; advantages are GAE, normalised. Differences from sb3-contrib's TRPO with the
    extras at their defaults: conjugate gradients start at 0, not at random numbers of size 1e-4; in rollouts, values and
    log-probabilities are computed at the end.

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", or a policy class derived from these
    :param env: environment or its id
    :param learning_rate: rate of the value: a number >= 0, "lin_x" (falls linearly from x to 0), or a schedule
    :param n_steps: steps of each environment in a rollout, the most of them with ``rollout="episodes"``
    :param batch_size: samples per gradient step of the value
    :param cg_max_steps: iterations of conjugate gradients
    :param cg_damping: added to the Fisher matrix's diagonal
    :param line_search_shrinking_factor: c
    :param line_search_max_iter: how many j are tried
    :param n_critic_updates: the value's passes over the rollout
    :param normalize_advantage: whether advantages get mean 0 and standard deviation 1
    :param target_kl: delta, in nats
    :param sub_sampling_factor: the policy's update takes one of so many samples
    :param fvp_subsample: Fisher products take one of so many of these
    :param kl_direction: what bounds the step: "new_old", KL(pi || pi_old) (sb3-contrib), or "old_new" (the paper)
    :param kl_reduction: over the dimensions of Box and MultiBinary actions: "mean" (sb3-contrib), or "sum", the divergence of
        the actions as a whole (the paper)
    :param accept_ratio: share of the improvement to first order, in [0, 1], that a step must reach; None takes any improvement
    :param kwargs: `OnPolicyKwargs`; ``ent_coef`` in normalised advantages per nat
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction
    :raises UnsupportedError: for spaces that TRPO cannot take
    """

    sb3_class = TRPO
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = POLICIES
    policy: MlpPolicy

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 1e-3,
        n_steps: int = 2048,
        batch_size: int = 128,
        *,
        cg_max_steps: int = 15,
        cg_damping: float = 0.1,
        line_search_shrinking_factor: float = 0.8,
        line_search_max_iter: int = 10,
        n_critic_updates: int = 10,
        normalize_advantage: bool = True,
        target_kl: float = 0.01,
        sub_sampling_factor: int = 1,
        fvp_subsample: int = 1,
        kl_direction: str = "new_old",
        kl_reduction: str = "mean",
        accept_ratio: float | None = None,
        _init_setup_model: bool = True,
        **kwargs: Unpack[OnPolicyKwargs],
    ) -> None:
        for name, value in (("n_steps", n_steps), ("batch_size", batch_size)):
            check_number(name, value, low=1, integer=True)  # TRPO computes with them
        ent_coef = kwargs.pop("ent_coef", 0.0)  # which TRPO does not take
        super().__init__(
            policy,
            env,
            learning_rate,
            n_steps,
            batch_size,
            cg_max_steps=cg_max_steps,
            cg_damping=cg_damping,
            line_search_shrinking_factor=line_search_shrinking_factor,
            line_search_max_iter=line_search_max_iter,
            n_critic_updates=n_critic_updates,
            normalize_advantage=normalize_advantage,
            target_kl=target_kl,
            sub_sampling_factor=sub_sampling_factor,
            _init_setup_model=False,
            **kwargs,
        )
        self.ent_coef = ent_coef
        self.fvp_subsample = fvp_subsample
        self.kl_direction = kl_direction
        self.kl_reduction = kl_reduction
        self.accept_ratio = accept_ratio
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        counts = ("batch_size", "cg_max_steps", "line_search_max_iter", "sub_sampling_factor", "fvp_subsample")
        for name in counts:
            check_number(name, getattr(self, name), low=1, integer=True)
        check_number("n_critic_updates", self.n_critic_updates, low=0, integer=True)
        check_number("cg_damping", self.cg_damping, low=0)
        check_number("line_search_shrinking_factor", self.line_search_shrinking_factor, low=0.01, high=0.99)
        check_number("target_kl", self.target_kl, low=1e-12)
        if self.accept_ratio is not None:
            check_number("accept_ratio", self.accept_ratio, low=0, high=1)
        check_choice("kl_direction", self.kl_direction, ("new_old", "old_new"))
        check_choice("kl_reduction", self.kl_reduction, ("mean", "sum"))
        check_switch("normalize_advantage", self.normalize_advantage)
        if not issubclass(self._translated_policy_class(self.policy_class), MlpPolicy):
            raise TypeError(f"policy must be derived from {MlpPolicy}, got {self.policy_class}")

    def _setup_model(self) -> None:
        self.max_grad_norm = None  # TRPO's base class is told 0, which none of its updates uses
        super()._setup_model()

    def _make_optimizers(self) -> None:
        """Only the value has one; what it shares with the policy is the policy's."""
        policy = self.policy
        shared = {id(parameter) for parameter in policy.policy_parameters()}
        unshared = [parameter for parameter in policy.value_parameters() if id(parameter) not in shared]
        policy.optimizer = policy.optimizer_class(unshared, lr=self.lr_schedule(1), **policy.optimizer_kwargs)  # type: ignore[call-arg]  # rates are the subclasses'

    def _optimizers(self) -> dict[str, th.optim.Optimizer]:
        return {"value": self.policy.optimizer}

    def train(self) -> None:
        """
        One step of the policy and the regressions of the value on the rollout that was collected.

        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        self._begin_updates()
        samples = self._samples()
        everything = next(minibatches(samples, samples.size))  # in random order, so that every k-th is a random share
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is not accepted
            self._update_policy(everything.at(slice(None, None, self.sub_sampling_factor)))
        with constant(self.policy.policy_parameters()):
            for _ in range(self.n_critic_updates):
                for batch in minibatches(samples, self.batch_size):
                    self._update_value(batch)
        self._n_updates += 1
        self._end_updates()

    def _update_policy(self, samples: Samples) -> None:
        """A natural gradient step, as far as the line search lets it go."""
        samples = self._prepared(samples)
        parameters = [parameter for parameter in self.policy.policy_parameters() if parameter.requires_grad]
        start, before = flatten(parameters).detach(), self._evaluate(samples)
        objective = self._objective(samples, before)
        gradient = before.gradient(parameters, *self._slopes(samples, before))
        some = samples.at(slice(None, None, self.fvp_subsample))
        product, weight = self._evaluate(some).fisher_product(parameters), self._kl_weight()
        found = natural_step(lambda v: weight * product(v), gradient, self.target_kl, self.cg_damping, self.cg_max_steps)

        def outcome(scale: float) -> tuple[th.Tensor, th.Tensor]:
            _assign(parameters, start + scale * found.step)
            after = self._evaluate(samples)
            kl = weight * after.kl(samples.described, reverse=self.kl_direction == "new_old").mean()
            return th.as_tensor(kl), self._objective(samples, after) - objective

        with th.no_grad():
            accepted = backtracking_line_search(
                outcome,
                found.improvement,
                self.target_kl,
                self.line_search_shrinking_factor,
                self.line_search_max_iter,
                self.accept_ratio or 0.0,
            )
            if not accepted.scale:
                _assign(parameters, start)
        self._means.add("policy_grad_norm", gradient.norm())
        self._means.add("entropy_loss", -before.entropy.mean())
        self._means.add("policy_objective", objective + accepted.improvement)
        self._means.add("kl_divergence_loss", accepted.kl)
        self._means.add("policy_predicted_kl", accepted.scale**2 * found.kl)
        self._means.add("step_scale", accepted.scale)
        self._means.add("is_line_search_success", float(accepted.scale > 0))

    def _prepared(self, samples: Samples) -> Samples:
        """What is computed once: the advantages that count, the old distributions."""
        advantages = normalized(samples.advantages) if self.normalize_advantage else samples.advantages
        return samples._replace(advantages=advantages, described=self._learner.describe(samples.observations))

    def _evaluate(self, samples: Samples) -> Evaluation:
        return self._learner.evaluate(samples.observations, samples.actions, ("policy",))

    def _objective(self, samples: Samples, evaluation: Evaluation) -> th.Tensor:
        """L, a scalar."""
        loss = surrogate(evaluation.log_prob - samples.log_probs, samples.advantages)
        return th.as_tensor(self.ent_coef * evaluation.entropy.mean() - loss.value)

    def _slopes(self, samples: Samples, evaluation: Evaluation) -> tuple[Any, Any]:
        """The derivatives of L by the log-probabilities and by the entropies."""
        loss = surrogate(evaluation.log_prob - samples.log_probs, samples.advantages)
        return -loss.slope, self.ent_coef / samples.size + 0 * loss.slope if self.ent_coef else None

    def _kl_weight(self) -> float:
        """Of the divergence of the actions as a whole."""
        several = self.kl_reduction == "mean" and isinstance(self.action_space, (spaces.Box, spaces.MultiBinary))
        return 1.0 / get_action_dim(self.action_space) if several else 1.0

    def _update_value(self, batch: Samples) -> None:
        """One gradient step."""
        with self._workspace.lend() if self.engine else nullcontext():
            evaluation = self._learner.evaluate(batch.observations, batch.actions, ("value",))
            loss = squared_error(evaluation.values, batch.returns)
            evaluation.backward(values=loss.slope)
        self._step("value")
        self._means.add("value_loss", loss.value)

    def _end_updates(self) -> None:
        self._check_finite("policy", "parameters", flatten(self.policy.policy_parameters()).norm().item())
        super()._end_updates()

    def engine_report(self) -> dict[str, str]:
        """See `UpdateMixin.engine_report`."""
        report = super().engine_report()
        return {**report, "policy update": f"natural gradient by {report['acting']}"}

    def _translated_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """See `CheckpointMixin`; TRPO's optimizer has all parameters, and a state for the same ones as ours."""
        translated = super()._translated_parameters(parameters)
        state = translated.get("policy.optimizer")
        order = [id(parameter) for parameter in self.policy.parameters()]
        if state is not None and len(state["param_groups"][0]["params"]) == len(order):
            share = [order.index(id(parameter)) for parameter in parameters_of(self.policy.optimizer)]
            rest = [number for number in range(len(order)) if number not in share]
            translated["policy.optimizer"], _ = split_optimizer_state(state, (share, rest))
        return translated


def _assign(parameters: Sequence[nn.Parameter], values: th.Tensor) -> None:
    """Give parameters the values of a vector, in place because others have views of them; without gradients."""
    for parameter, part in zip(parameters, unflatten(values, parameters), strict=True):
        parameter.copy_(part)
