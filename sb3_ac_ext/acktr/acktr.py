"""
Actor-critic using Kronecker-factored trust regions (ACKTR; Wu et al. 2017, arXiv:1708.05144).

    collect a rollout; A, R = GAE and A + V
    Fisher: y ~ N(V(s), 1); from the derivatives of log pi(a|s) + log N(y; V(s), 1), a and y drawn from the model,
        for each layer: A = E[a a^T] of its inputs a, S = E[g g^T] of the derivatives g by its outputs,
        as moving averages                                                           (section 3.1)
    g = gradient of -mean A log pi(a|s) - ent_coef mean H[pi(.|s)] + vf_coef mean (V(s) - R)^2
    D = (A (x) S + damping)^-1 g, for each layer                                     (section 2.2)
    eta = min(learning_rate, sqrt(2 max_kl / D^T F D))                               (section 3.2)
    theta <- theta - eta D, averaged over steps by momentum

The Fisher matrix of N(V, 1) is the Gauss-Newton matrix of the critic's loss.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Self, Unpack

import torch as th
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.torch_layers import MlpExtractor
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from torch import nn
from torch.nn import functional as F

from sb3_ac_ext.acktr.arguments import check_acktr_arguments, check_shared_arguments
from sb3_ac_ext.acktr.kfac_optimizer import KFAC, OPTIONS
from sb3_ac_ext.base.typing import OnPolicyKwargs
from sb3_ac_ext.functional.kfac import adapted_step_scale
from sb3_ac_ext.legacy.actor_critic import POLICIES, MlpPolicy
from sb3_ac_ext.legacy.descent import backward
from sb3_ac_ext.legacy.on_policy import OnPolicyMixin
from sb3_ac_ext.legacy.rollouts import Samples
from sb3_ac_ext.legacy.surrogates import normalized

VALUE_MAX_KL = 0.01
"""``value_max_kl`` where the argument is None."""


class ACKTR(OnPolicyMixin, OnPolicyAlgorithm):
    """
    A2C with natural gradients by K-FAC, and a bound on what each step changes.

    Where policy and value have layers of their own, as MLPs do, each has its own optimizer and trust region, so that errors
    of the value do not throttle the policy. Where they share layers (a features extractor for images), there is one, with the
    Fisher matrix of pi(a|s) N(y; V(s), 1 / vf_fisher_coef) and the bound ``max_kl`` on both together.

    Differences from the paper: factors are averages with ``stats_decay``, and the bound has the factor 2 that a divergence
    of ``max_kl`` asks for; a continuous action's standard deviation is a parameter of its own with its exact Fisher
    information; the value's bound is separate. Gradients are not clipped, the trust region does that.

    Logged: ``train/kl``, mean KL(pi_old || pi) of the update on the rollout, in nats; and for ``policy`` and ``value``:
    ``train/policy_predicted_kl``, what the averaged Fisher matrix predicts for the step; ``train/policy_step_size``, eta;
    ``train/policy_damping``, the largest of a layer; ``train/policy_trace_ratio``, the layers' mean pi (how damping is
    shared out between A and S). What is measured is several times what is predicted, most of all while the policy becomes more
    certain: the factors are averages, which lag behind (less so with a smaller ``stats_decay``), and they leave out what
    layers do together; and the samples are those that the step was made of.

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", or a policy class derived from `MlpPolicy`
    :param env: environment or its id
    :param learning_rate: largest step eta_max: a number >= 0, "lin_x" (falls linearly from x to 0), or a schedule
    :param n_steps: steps of each environment in a rollout, which is one batch
    :param vf_coef: weight of the value's loss; 0.5 makes a step of size 1 a full Gauss-Newton step
    :param normalize_advantage: whether advantages get mean 0 and standard deviation 1 in a batch
    :param max_kl: delta, largest predicted divergence of a step, in nats, > 0
    :param value_max_kl: the same for the value, mean of ``vf_fisher_coef / 2`` times the squared change (0.01)
    :param value_learning_rate: largest step of the value instead
    :param kl_target: divergence that ``learning_rate`` is adapted to: a third off after a step that measured more than twice
        this, a half on after one of less than half; the schedule is the largest. None for none
    :param vf_fisher_coef: 1 / sigma^2 of the value's Gaussian, > 0
    :param damping: what is added to the Fisher matrix's diagonal, > 0
    :param stats_decay: of the factors' averages, in [0, 1)
    :param inverse_update_interval: updates between inversions of the factors, >= 1
    :param inversion: "eigen" damps exactly; "cholesky" shares damping out between the factors, faster for large layers
    :param momentum: in [0, 1)
    :param cold_iterations: updates by plain gradient steps at the start, within the same bound, >= 0
    :param kwargs: `OnPolicyKwargs`, with the defaults of SB3's A2C
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction
    :raises UnsupportedError: for layers that K-FAC has no factors for, and gSDE
    """

    sb3_class = OnPolicyAlgorithm
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = POLICIES
    policy: MlpPolicy

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 0.25,
        n_steps: int = 20,
        *,
        vf_coef: float = 0.5,
        normalize_advantage: bool = False,
        max_kl: float = 1e-3,
        value_max_kl: float | None = None,
        value_learning_rate: float | str | Schedule | None = None,
        kl_target: float | None = None,
        vf_fisher_coef: float = 1.0,
        damping: float = 1e-2,
        stats_decay: float = 0.99,
        inverse_update_interval: int = 10,
        inversion: str = "eigen",
        momentum: float = 0.9,
        cold_iterations: int = 10,
        _init_setup_model: bool = True,
        **kwargs: Unpack[OnPolicyKwargs],
    ) -> None:
        self.normalize_advantage = normalize_advantage
        self.max_kl = max_kl
        self.value_max_kl = value_max_kl
        self.value_learning_rate = value_learning_rate
        self.kl_target = kl_target
        self.vf_fisher_coef = vf_fisher_coef
        self.damping = damping
        self.stats_decay = stats_decay
        self.inverse_update_interval = inverse_update_interval
        self.inversion = inversion
        self.momentum = momentum
        self.cold_iterations = cold_iterations
        self._step_scale = 1.0
        super().__init__(
            policy,
            env,
            learning_rate,  # type: ignore[arg-type]  # a string too
            n_steps,
            kwargs.pop("gamma", 0.99),
            kwargs.pop("gae_lambda", 1.0),
            kwargs.pop("ent_coef", 0.0),
            vf_coef,
            None,  # max_grad_norm
            kwargs.pop("use_sde", False),
            kwargs.pop("sde_sample_freq", -1),
            _init_setup_model=False,
            **kwargs,
        )
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_acktr_arguments(self)

    def _make_optimizers(self) -> None:
        log_std = getattr(self.policy, "log_std", None)
        options = {name: getattr(self, name) for name in OPTIONS}
        rate = self.lr_schedule(1)
        networks = separate_networks(self.policy)
        if networks is None:
            check_shared_arguments(self)
            self.policy.optimizer = KFAC(dict(self.policy.named_children()), rate, log_std=log_std, **options)
            return
        value_max_kl = VALUE_MAX_KL if self.value_max_kl is None else self.value_max_kl
        self.policy.optimizer = KFAC(networks["policy"], rate, log_std=log_std, **options)
        self.policy.value_optimizer = KFAC(networks["value"], rate, **{**options, "max_kl": value_max_kl})

    def _optimizers(self) -> dict[str, th.optim.Optimizer]:
        optimizers: dict[str, th.optim.Optimizer] = {"policy": self.policy.optimizer}
        return {**optimizers, "value": self.policy.value_optimizer} if hasattr(self.policy, "value_optimizer") else optimizers

    def train(self) -> None:
        """
        One update on the rollout that was collected.

        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        self._begin_updates()
        samples = self._samples()
        samples = samples._replace(described=self._learner.describe(samples.observations))
        batch = self._tensors(samples)
        with self._recording():
            values, log_prob, entropy = self.policy.evaluate_actions(batch.observations, batch.actions)
        values = values.flatten()
        self._update_factors(log_prob, values)
        backward(self._loss(batch, values, log_prob, entropy), self._descents.values())
        for network in self._descents:
            self._step(network)
        self._n_updates += 1
        self._adapt_step(samples)
        self._end_updates()

    def _tensors(self, samples: Samples) -> Samples:
        """What autograd takes; numpy arrays without copies on a CPU."""

        def tensor(field: Any) -> Any:
            if isinstance(field, dict):
                return {name: tensor(value) for name, value in field.items()}
            return th.as_tensor(field, device=self.device)

        batch = Samples(*(tensor(field) for field in samples))
        return (
            batch._replace(actions=batch.actions.long().flatten()) if isinstance(self.action_space, spaces.Discrete) else batch
        )

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """The optimizers see the forward pass."""
        with ExitStack() as stack:
            for optimizer in self._kfacs().values():
                stack.enter_context(optimizer.recording())
            yield

    def _kfacs(self) -> dict[str, KFAC]:
        return {name: optimizer for name, optimizer in self._optimizers().items() if isinstance(optimizer, KFAC)}

    def _update_factors(self, log_prob: th.Tensor, values: th.Tensor) -> None:
        """
        Fisher factors from outputs that the model drew: the rollout's actions, and values one sigma above or below V.

        Both signs have the same odds, which gives y the mean and variance of N(V, sigma^2); the Fisher matrix asks for no
        more.
        """
        signs = 2.0 * th.randint(0, 2, values.shape, device=values.device) - 1
        log_likelihood = log_prob + self.vf_fisher_coef**0.5 * signs * values
        for optimizer in self._kfacs().values():
            optimizer.update_factors(log_likelihood)

    def _loss(self, batch: Samples, values: th.Tensor, log_prob: th.Tensor, entropy: th.Tensor | None) -> th.Tensor:
        """A2C's."""
        advantages = normalized(batch.advantages) if self.normalize_advantage else batch.advantages
        policy_loss = -(advantages * log_prob).mean()
        value_loss = F.mse_loss(values, batch.returns)
        entropy_loss = log_prob.mean() if entropy is None else -entropy.mean()
        for name, loss in (("policy", policy_loss), ("value", value_loss), ("entropy", entropy_loss)):
            self._means.add(f"{name}_loss", loss)
        return policy_loss + self.ent_coef * entropy_loss + self.vf_coef * value_loss

    def _begin_updates(self) -> None:
        super()._begin_updates()
        if self.kl_target is not None:
            policy = self._descents["policy"]
            policy.set_rate(self._step_scale * policy.optimizer.param_groups[0]["lr"])

    def _adapt_step(self, samples: Samples) -> None:
        """Measure the divergence that the update made, and adapt the next one to it."""
        kl = float(self._over(samples, ("policy",), lambda evaluation, part: evaluation.kl(part.described)).mean())
        self._means.add("kl", kl)
        if self.kl_target is not None:
            self.logger.record("train/step_scale", self._step_scale)
            self._step_scale = adapted_step_scale(self._step_scale, kl, self.kl_target)

    def _end_updates(self) -> None:
        for name, optimizer in self._kfacs().items():
            for key, value in optimizer.measures.items():
                self._means.add(f"{name}_{key}", value)
        super()._end_updates()

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
        Train; see `OnPolicyMixin.learn`.

        :param log_interval: updates between logs; they are short
        """
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, *(["policy.value_optimizer"] if "value" in self._optimizers() else [])], tensors


def separate_networks(policy: MlpPolicy) -> dict[str, dict[str, nn.Module]] | None:
    """
    :param policy: the policy of an on-policy algorithm
    :return: the modules of policy and value by name; None if they share trained parameters
    """
    if not isinstance(policy.mlp_extractor, MlpExtractor):
        return None
    policy_ids, value_ids = (
        {id(p) for p in parameters if p.requires_grad}
        for parameters in (policy.policy_parameters(), policy.value_parameters())
    )
    if policy_ids & value_ids:
        return None
    layers = policy.mlp_extractor
    return {
        "policy": {
            "pi_features_extractor": policy.pi_features_extractor,
            "mlp_extractor.policy_net": layers.policy_net,
            "action_net": policy.action_net,
        },
        "value": {
            "vf_features_extractor": policy.vf_features_extractor,
            "mlp_extractor.value_net": layers.value_net,
            "value_net": policy.value_net,
        },
    }
