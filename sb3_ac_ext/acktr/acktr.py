"""
Actor-critic using Kronecker-factored trust regions (ACKTR; Wu et al. 2017, arXiv:1708.05144).

    collect a rollout; A, R = GAE and A + V
    Fisher: y ~ N(V(s), 1); from the derivatives of log pi(a|s) + log N(y; V(s), 1), a and y drawn from the model,
        for each layer: A = E[a a^T] of its inputs a, S = E[g g^T] of the derivatives g by its outputs,
        as moving averages                                                           (section 3.1)
    g = gradient of -mean A log pi(a|s) - ent_coef mean H[pi(.|s)] + vf_coef mean (V(s) - R)^2
    D = (F + damping I)^-1 g with F = A (x) S, for each layer                        (section 2.2)
    eta = min(learning_rate, sqrt(2 max_kl / D^T (F + damping I) D))                 (section 3.2)
    theta <- theta - eta D, averaged over steps by momentum

The Fisher matrix of N(V, 1) is the Gauss-Newton matrix of the critic's loss.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch as th
from stable_baselines3 import A2C
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from torch import nn

from sb3_ac_ext.acktr.blocks import LayerCalls
from sb3_ac_ext.acktr.kfac_optimizer import KFAC, OPTIONS, Inversion, ShareOfBefore
from sb3_ac_ext.base.on_policy import OnPolicyMixin
from sb3_ac_ext.base.schedules import Rate
from sb3_ac_ext.engine import Network
from sb3_ac_ext.functional.kfac import adapted_step_scale
from sb3_ac_ext.functional.surrogates import normalized, squared_error
from sb3_ac_ext.networks.actor_critic import describe, kl_divergence, policy_modules, value_modules
from sb3_ac_ext.signatures import passed_on
from sb3_ac_ext.validation import ArgumentError, NonNegativeInt, Positive, PositiveInt, UnsupportedError

VALUE_MAX_KL = 0.01
"""``value_max_kl`` where the argument is None."""


class Rollout(NamedTuple):
    """The fields of `Samples` that an update reads."""

    observations: Any
    actions: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    described: Any
    """``(B, K)`` pi(.|s) before the step, see `describe`; None as long as it is not known."""


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

    :param learning_rate: largest step eta_max; "lin_x" falls linearly from x to 0
    :param n_steps: steps of each environment in a rollout, which is one batch, the most of them with ``rollout="episodes"``
    :param vf_coef: weight of the value's loss; 0.5 makes a step of size 1 a full Gauss-Newton step
    :param normalize_advantage: whether advantages get mean 0 and standard deviation 1 in a batch
    :param max_kl: delta, largest predicted divergence of a step, from the old policy to the new one, in nats; programs that
        leave out the definition's factor 1/2 state twice as much
    :param value_max_kl: the same for the value, mean of ``vf_fisher_coef / 2`` times the squared change; None for 0.01. Not
        with shared layers, where ``max_kl`` bounds both together
    :param value_learning_rate: largest step of the value instead of ``learning_rate``; not with shared layers
    :param kl_target: divergence in nats that ``learning_rate`` is adapted to: a third off after a step that measured more than
        twice this, a half on after one of less than half; the schedule is the largest. None for none
    :param vf_fisher_coef: 1 / sigma^2 of the value's Gaussian, whose Fisher matrix is the Gauss-Newton matrix
    :param damping: what is added to the Fisher matrix's diagonal
    :param stats_decay: of the factors' moving averages
    :param inverse_update_interval: updates between inversions of the factors
    :param inversion: "eigen" damps exactly; "cholesky" shares damping out between the factors, faster for large layers
    :param momentum: share of the steps before in a step
    :param cold_iterations: updates by plain gradient steps at the start, within the same bound
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction
    :raises UnsupportedError: for layers that K-FAC has no factors for, and gSDE
    """

    sb3_class = OnPolicyAlgorithm
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = A2C.policy_aliases

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 0.25,
        n_steps: int = 20,
        *,
        gamma: float = 0.99,
        gae_lambda: float = 1.0,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        max_kl: Positive = 1e-3,
        value_max_kl: Positive | None = None,
        value_learning_rate: Rate | None = None,
        kl_target: Positive | None = None,
        vf_fisher_coef: Positive = 1.0,
        damping: Positive = 1e-2,
        stats_decay: ShareOfBefore = 0.99,
        inverse_update_interval: PositiveInt = 10,
        inversion: Inversion = "eigen",
        momentum: ShareOfBefore = 0.9,
        cold_iterations: NonNegativeInt = 10,
        rollout: Literal["steps", "episodes"] = "steps",
        rollout_episodes: int = 16,
        drop_unfinished_episodes: bool = False,
        engine: bool = True,
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(**passed_on(ACKTR, locals()), max_grad_norm=None, _init_setup_model=False)
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
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if self.use_sde:
            raise UnsupportedError("use_sde must be False: K-FAC has no block for gSDE's noise matrix, got True")
        for name in ("optimizer_class", "optimizer_kwargs"):
            if (given := (self.policy_kwargs or {}).get(name)) is not None:
                raise ArgumentError(
                    f"policy_kwargs[{name!r}] must be left out: ACKTR's optimizer is K-FAC, whose options are arguments of "
                    f"ACKTR; got {given!r}"
                )

    def _make_optimizers(self) -> None:
        policy: Any = self.policy
        log_std = log_std_of(policy)
        networks = separate_networks(policy, log_std)
        rate = self.lr_schedule(1)
        if networks is None:
            self._check_shared_layers()
            policy.optimizer = KFAC({"policy": policy}, rate, log_std=log_std, **self._options("policy"))
        else:
            policy.optimizer = KFAC(networks["policy"], rate, log_std=log_std, **self._options("policy"))
            policy.value_optimizer = KFAC(networks["value"], rate, **self._options("value"))

    def _check_shared_layers(self) -> None:
        """
        :raises ArgumentError: if an argument is there that would be the value's own
        """
        for name in ("value_max_kl", "value_learning_rate"):
            if getattr(self, name) is not None:
                raise ArgumentError(
                    f"{name} needs networks of their own for policy and value, whose steps are bounded together otherwise: "
                    f"set policy_kwargs=dict(share_features_extractor=False), or leave it out; got {getattr(self, name)!r}"
                )

    def _options(self, network: str) -> dict[str, Any]:
        """Of a network's optimizer."""
        options = {name: getattr(self, name) for name in OPTIONS}
        if network == "value":
            options["max_kl"] = VALUE_MAX_KL if self.value_max_kl is None else self.value_max_kl
        return options

    def _networks(self) -> Mapping[str, Network]:
        policy: Any = self.policy
        networks = {"policy": self._network("policy", policy, policy.optimizer)}
        if self.kl_target is not None:
            networks["policy"].rate *= self._step_scale
        if hasattr(policy, "value_optimizer"):
            networks["value"] = self._network("value", policy, policy.value_optimizer, rate=self.value_learning_rate)
        for name, optimizer in kfacs(networks).items():
            optimizer.param_groups[0].update(self._options(name))
            optimizer.look_for_layers({"policy": policy}, log_std_of(policy))
        return networks

    def train(self) -> None:
        """
        One update on the rollout that was collected.

        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        with self._updates() as engine:
            samples = self._samples()
            columns = samples.observations, samples.actions, samples.advantages, samples.returns
            batch = Rollout(*columns, described=None)
            outputs = self._run(self._gradients, batch)
            cold = []
            for name, optimizer in kfacs(engine.networks).items():
                prefix = f"{name} "
                optimizer.average({key.removeprefix(prefix): outputs[key] for key in outputs if key.startswith(prefix)})
                cold.append(optimizer.begin_step())
            outputs = self._run(self._step, batch._replace(described=outputs["described"]), *cold)
            self._n_updates += 1
            if self.kl_target is not None:
                self.logger.record("train/step_scale", self._step_scale)
                self._step_scale = adapted_step_scale(self._step_scale, outputs["kl"].item(), self.kl_target)

    def _gradients(self, batch: Rollout) -> dict[str, th.Tensor]:
        """Of the loss, A2C's; and the Fisher factors of the same forward pass."""
        with LayerCalls() as calls:
            values, log_prob, entropy = self._evaluate(batch)
        # y is one sigma above or below V, with the same odds: the mean and variance of N(V, sigma^2), and no more is needed
        signs = 2.0 * th.randint(0, 2, values.shape, device=values.device) - 1
        log_likelihood = log_prob + self.vf_fisher_coef**0.5 * signs * values
        outputs: dict[str, th.Tensor] = {}
        for name, optimizer in kfacs(self._engine.networks).items():
            factors = optimizer.factors(log_likelihood, calls)
            outputs |= {f"{name} {key}": value for key, value in factors.items()}

        advantages = normalized(batch.advantages) if self.normalize_advantage else batch.advantages
        policy_loss = -(advantages * log_prob).mean()
        value_loss = squared_error(values, batch.returns).mean()
        entropy_loss = -entropy.mean()
        loss = policy_loss + self.ent_coef * entropy_loss + self.vf_coef * value_loss
        self._engine.differentiate(loss, *self._engine.networks)
        with th.no_grad():
            outputs["described"] = describe(self.policy.get_distribution(batch.observations))
        return {**outputs, "policy_loss": policy_loss, "value_loss": value_loss, "entropy_loss": entropy_loss}

    def _step(self, batch: Rollout, *cold: bool) -> dict[str, th.Tensor]:
        """Of the parameters, and how far the policy has moved."""
        for name in self._engine.networks:
            self._engine.step(name)
        outputs = {
            f"{name}_{key}": value
            for name, optimizer in kfacs(self._engine.networks).items()
            for key, value in optimizer.measures.items()
        }
        with th.no_grad():
            kl = kl_divergence(batch.described, self.policy.get_distribution(batch.observations)).mean()
        return {**outputs, "kl": kl}

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


def kfacs(networks: Mapping[str, Network]) -> dict[str, KFAC]:
    """
    :param networks: by name
    :return: their optimizers, but for others that somebody has put in their place
    """
    optimizers = {name: network.optimizer for name, network in networks.items()}
    return {name: optimizer for name, optimizer in optimizers.items() if isinstance(optimizer, KFAC)}


def log_std_of(policy: Any) -> nn.Parameter | None:
    """
    :param policy: any
    :return: ``(A,)`` the parameter of a Gaussian policy that belongs to no layer
    """
    log_std = getattr(policy, "log_std", None)
    return log_std if isinstance(log_std, nn.Parameter) else None


def separate_networks(policy: ActorCriticPolicy, log_std: nn.Parameter | None) -> dict[str, dict[str, nn.Module]] | None:
    """
    :param policy: any
    :param log_std: a trained parameter of its own
    :return: the modules of policy and value by name; None if these share trained parameters or are not all that is trained
    """
    networks = {"policy": policy_modules(policy), "value": value_modules(policy)}
    own = [{p for module in modules.values() for p in module.parameters() if p.requires_grad} for modules in networks.values()]
    everything = {p for p in policy.parameters() if p.requires_grad and p is not log_std}
    return networks if not own[0] & own[1] and own[0] | own[1] == everything else None
