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

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch as th
from annotated_types import Interval
from gymnasium import spaces
from gymnasium.vector.utils import create_empty_array
from sb3_contrib import TRPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import obs_as_tensor
from torch import nn

from sb3_ac_ext.base.checkpoint import parameters_of, split_optimizer_state
from sb3_ac_ext.base.on_policy import OnPolicyMixin
from sb3_ac_ext.buffers.rollouts import Samples, minibatches
from sb3_ac_ext.engine import Network
from sb3_ac_ext.functional.natural_gradient import (
    backtracking_line_search,
    fisher_product,
    flatten,
    natural_step,
    unflatten,
)
from sb3_ac_ext.functional.surrogates import normalized, squared_error, surrogate
from sb3_ac_ext.networks.actor_critic import describe, kl_divergence, policy_parameters, statistics
from sb3_ac_ext.signatures import passed_on
from sb3_ac_ext.validation import NonNegative, NonNegativeInt, Positive, PositiveInt, UnitInterval


class Candidate(NamedTuple):
    """A step of the line search, and what it is judged by."""

    observations: Any
    actions: th.Tensor
    log_probs: th.Tensor
    advantages: th.Tensor
    described: th.Tensor
    """``(B, K)`` the old distributions, see `describe`"""
    start: th.Tensor
    """``(P,)`` the old parameters"""
    step: th.Tensor
    """``(P,)``"""
    scale: th.Tensor
    """``()`` c^j"""


class TRPOX(OnPolicyMixin, TRPO):
    """
    TRPO with the published divergence, Fisher products on a subset, and a line search that asks for enough improvement.

    The policy moves by natural gradients alone, every parameter that the distribution of actions depends on; the optimizer has
    what else the value depends on, so a features extractor that both share learns from the policy. Where there is no gradient
    or no finite step, or the line search accepts none, the policy stays as it is, its standard deviation too.

    Differences from the paper with the defaults, which are sb3-contrib's: KL(pi || pi_old) bounds the step, as a mean over the
    dimensions of Box and MultiBinary actions; advantages are GAE, normalised. Difference from sb3-contrib's TRPO with the
    extras at their defaults: conjugate gradients start at 0, not at random numbers of size 1e-4.

    :param learning_rate: rate of the value; "lin_x" falls linearly from x to 0
    :param batch_size: samples per gradient step of the value
    :param cg_max_steps: iterations of conjugate gradients
    :param cg_damping: added to the Fisher matrix's diagonal
    :param line_search_shrinking_factor: c, from one step that the line search tries to the next
    :param line_search_max_iter: how many steps c^j it tries before it leaves the policy as it is
    :param n_critic_updates: the value's passes over the rollout
    :param normalize_advantage: whether advantages get mean 0 and standard deviation 1
    :param target_kl: delta, in nats
    :param sub_sampling_factor: the policy's update takes one of so many samples
    :param ent_coef: weight of the entropy in the objective, in normalised advantages per nat
    :param fvp_subsample: Fisher products take one of so many of the update's samples
    :param kl_direction: what bounds the step: "new_old", KL(pi || pi_old) (sb3-contrib), or "old_new" (the paper)
    :param kl_reduction: over the dimensions of Box and MultiBinary actions: "mean" (sb3-contrib), or "sum", the divergence of
        the actions as a whole (the paper), in which a ``target_kl`` for the mean counts times the number of dimensions
    :param accept_ratio: share of the improvement to first order that a step must reach; None takes any improvement
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction
    :raises UnsupportedError: for spaces that TRPO cannot take
    """

    sb3_class = TRPO

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 1e-3,
        n_steps: int = 2048,
        batch_size: PositiveInt = 128,
        gamma: float = 0.99,
        cg_max_steps: PositiveInt = 15,
        cg_damping: NonNegative = 0.1,
        line_search_shrinking_factor: Annotated[float, Interval(ge=0.01, le=0.99)] = 0.8,
        line_search_max_iter: PositiveInt = 10,
        n_critic_updates: NonNegativeInt = 10,
        gae_lambda: float = 0.95,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        target_kl: Positive = 0.01,
        sub_sampling_factor: PositiveInt = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        ent_coef: float = 0.0,
        fvp_subsample: PositiveInt = 1,
        kl_direction: Literal["new_old", "old_new"] = "new_old",
        kl_reduction: Literal["mean", "sum"] = "mean",
        accept_ratio: UnitInterval | None = None,
        rollout: Literal["steps", "episodes"] = "steps",
        rollout_episodes: int = 16,
        drop_unfinished_episodes: bool = False,
        engine: bool = True,
    ) -> None:
        super().__init__(**passed_on(TRPOX, locals()), _init_setup_model=False)
        self.ent_coef = ent_coef
        self.fvp_subsample = fvp_subsample
        self.kl_direction = kl_direction
        self.kl_reduction = kl_reduction
        self.accept_ratio = accept_ratio
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self.max_grad_norm = None  # TRPO's base class is told 0, which none of its updates uses
        super()._setup_model()

    def _make_optimizers(self) -> None:
        """Only the value has one; what it shares with the policy is the policy's."""
        policy = self.policy
        own = {*map(id, policy_parameters(policy))}
        if getattr(policy.mlp_extractor, "policy_net", None) is None:
            own -= {*map(id, self._values_layers())}
        unshared = [parameter for parameter in policy.parameters() if id(parameter) not in own]
        policy.optimizer = policy.optimizer_class(unshared, lr=self.lr_schedule(1), **policy.optimizer_kwargs)  # type: ignore[call-arg]  # rates are the subclasses'

    def _values_layers(self) -> list[nn.Parameter]:
        """What the distribution of actions does not depend on of layers that are not divided as SB3's."""
        layers = [parameter for parameter in self.policy.mlp_extractor.parameters() if parameter.requires_grad]
        if not layers:
            return []
        self.policy.set_training_mode(False)
        obs = obs_as_tensor(create_empty_array(self.observation_space, 1, np.zeros), self.device)  # type: ignore[arg-type]  # of arrays
        parts = [part.sum() for part, _ in statistics(self.policy.get_distribution(obs)) if part.requires_grad]
        gradients = th.autograd.grad(parts, layers, allow_unused=True)
        return [parameter for parameter, gradient in zip(layers, gradients, strict=True) if gradient is None]

    def _networks(self) -> Mapping[str, Network]:
        return {"value": self._network("value", self.policy, self.policy.optimizer)}

    def train(self) -> None:
        """
        One step of the policy and the regressions of the value on the rollout that was collected.

        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        with self._updates():
            samples = self._samples()
            everything = next(minibatches(samples, samples.size))  # in random order, so that every k-th is a random share
            self._update_policy(_one_of(everything, self.sub_sampling_factor))
            for _ in range(self.n_critic_updates):
                for batch in minibatches(samples, self.batch_size):
                    self._run(self._update_value, batch)
            self._n_updates += 1

    def _update_policy(self, samples: Samples) -> None:
        """A natural gradient step, as far as the line search lets it go."""
        if not self._free_parameters():
            return
        if self.normalize_advantage:
            samples = samples._replace(advantages=normalized(samples.advantages))
        natural = self._run(self._natural_step, samples)
        start, step, described = natural["start"], natural["step"], natural["described"]
        objective, improvement, predicted_kl = natural["promise"].tolist()
        columns = samples.observations, samples.actions, samples.log_probs, samples.advantages, described, start, step

        def outcome(scale: float) -> tuple[float, float]:
            candidate = Candidate(*columns, th.tensor(scale, dtype=th.float64, device=self.device))
            kl, reached = self._run(self._try, candidate)["outcome"].tolist()
            return kl, reached - objective

        accepted = backtracking_line_search(
            outcome,
            improvement,
            self.target_kl,
            self.line_search_shrinking_factor,
            self.line_search_max_iter,
            self.accept_ratio or 0.0,
        )
        if not accepted.scale:
            _assign(self._free_parameters(), start)
        self.logger.record("train/policy_objective", objective + accepted.improvement)
        self.logger.record("train/kl_divergence_loss", accepted.kl)
        self.logger.record("train/policy_predicted_kl", accepted.scale**2 * predicted_kl)
        self.logger.record("train/step_scale", accepted.scale)
        self.logger.record("train/is_line_search_success", float(accepted.scale > 0))

    def _natural_step(self, batch: Samples) -> dict[str, th.Tensor]:
        """The old policy, the step from it to the border of the trust region, and what that promises."""
        parameters = self._free_parameters()
        distribution = self.policy.get_distribution(batch.observations)
        objective, entropy = self._objective(batch, distribution)
        gradients = th.autograd.grad(objective, parameters, retain_graph=True, materialize_grads=True)
        gradient, described = flatten(gradients), describe(distribution)
        if self.fvp_subsample > 1:
            distribution = self.policy.get_distribution(_one_of(batch, self.fvp_subsample).observations)
        product, weight = fisher_product(statistics(distribution), parameters), self._kl_weight()
        found = natural_step(lambda v: weight * product(v), gradient, self.target_kl, self.cg_damping, self.cg_max_steps)
        return {
            "start": flatten(parameters),
            "step": found.step,
            "described": described,
            "promise": th.stack([objective, found.improvement, found.kl]),
            "policy_grad_norm": gradient.norm(),
            "entropy_loss": -entropy.mean(),
        }

    @th.no_grad()
    def _try(self, candidate: Candidate) -> dict[str, th.Tensor]:
        """Take the step; KL divergence and objective there."""
        _assign(self._free_parameters(), candidate.start + candidate.scale * candidate.step)
        distribution = self.policy.get_distribution(candidate.observations)
        kl = kl_divergence(candidate.described, distribution, reverse=self.kl_direction == "new_old").mean()
        return {"outcome": th.stack([self._kl_weight() * kl, self._objective(candidate, distribution)[0]])}

    def _objective(self, batch: Samples | Candidate, distribution: Distribution) -> tuple[th.Tensor, th.Tensor]:
        """``()`` L, and the entropies ``(B,)``"""
        log_prob, entropy = distribution.log_prob(batch.actions), distribution.entropy()
        entropy = -log_prob if entropy is None else entropy
        return surrogate(log_prob - batch.log_probs, batch.advantages).mean() + self.ent_coef * entropy.mean(), entropy

    def _kl_weight(self) -> float:
        """Of the divergence of the actions as a whole."""
        several = self.kl_reduction == "mean" and isinstance(self.action_space, (spaces.Box, spaces.MultiBinary))
        return 1.0 / get_action_dim(self.action_space) if several else 1.0

    def _update_value(self, batch: Samples) -> dict[str, th.Tensor]:
        value_loss = squared_error(self.policy.predict_values(batch.observations).flatten(), batch.returns).mean()
        self._engine.minimise(value_loss, "value")
        return {"value_loss": value_loss}

    def _free_parameters(self) -> list[nn.Parameter]:
        """What the natural gradient moves, P numbers together."""
        return [parameter for parameter in policy_parameters(self.policy) if parameter.requires_grad]

    def _check_finite(self, means: Mapping[str, float]) -> None:
        norm = flatten(policy_parameters(self.policy)).norm().item()
        self._raise_unless_finite("policy", "parameters", norm)
        super()._check_finite(means)

    def _translated_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """See `CheckpointMixin`; TRPO's optimizer has all parameters, and a state for the same ones as ours."""
        translated = super()._translated_parameters(parameters)
        state = translated.get("policy.optimizer")
        order = [id(parameter) for parameter in self.policy.parameters()]
        # without groups it is what load_state_dict complains of
        if state is not None and "param_groups" in state and len(state["param_groups"][0]["params"]) == len(order):
            share = [order.index(id(parameter)) for parameter in parameters_of(self.policy.optimizer)]
            rest = [number for number in range(len(order)) if number not in share]
            translated["policy.optimizer"], _ = split_optimizer_state(state, (share, rest))
        return translated


def _one_of(samples: Samples, number: int) -> Samples:
    """One of so many samples, and at least one; a slice's step is no larger than memory."""
    return samples.at(slice(None, None, min(number, samples.size)))


@th.no_grad()
def _assign(parameters: Sequence[nn.Parameter], values: th.Tensor) -> None:
    """Give parameters the numbers of a vector, in the memory where they are."""
    for parameter, part in zip(parameters, unflatten(values, parameters), strict=True):
        parameter.copy_(part)
