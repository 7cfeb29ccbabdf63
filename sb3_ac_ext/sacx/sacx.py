"""
Soft actor-critic (Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications", arXiv:1812.05905).

    for i in 1 .. gradient_steps:                                                     (Algorithm 1)
        sample (s, a, r, s', d);  draw a_pi ~ pi(s), a' ~ pi(s')
        alpha: descend -log alpha mean (log pi(a_pi|s) + H), if it is automatic; below, alpha is that before the step
        y = r + gamma (1 - d) (min(Q_a_target(s', a'), Q_b_target(s', a')) - alpha log pi(a'|s'))
        Q_a: descend 1/2 mean (Q_a(s, a) - y)^2;  Q_b: descend 1/2 mean (Q_b(s, a) - y)^2
        actor: descend mean (alpha log pi(a_pi|s) - min(Q_a(s, a_pi), Q_b(s, a_pi)))
        targets: theta_target <- tau theta + (1 - tau) theta_target

With ``value_network=True`` (Haarnoja et al. 2018, arXiv:1801.01290, Algorithm 1) a network V has the target instead:

        V: descend 1/2 mean (V(s) - (min(Q_a(s, a_pi), Q_b(s, a_pi)) - alpha log pi(a_pi|s)))^2
        y = r + gamma (1 - d) V_target(s')
"""

from typing import Any, ClassVar, NamedTuple, Unpack

import torch as th
from stable_baselines3 import SAC
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule
from stable_baselines3.common.utils import get_parameters_by_name, polyak_update
from stable_baselines3.sac.policies import Actor, SACPolicy
from torch.nn import functional as F

from sb3_ac_ext.base.off_policy import OffPolicyMixin
from sb3_ac_ext.base.typing import OffPolicyKwargs
from sb3_ac_ext.buffers.replay import Transitions
from sb3_ac_ext.functional.losses import ent_coef_loss, soft_value, td_target, twin_mse
from sb3_ac_ext.legacy import numpy_actor
from sb3_ac_ext.legacy.fused_mlp import FusedMLP
from sb3_ac_ext.networks.critics import TwinStreamCritic
from sb3_ac_ext.sacx.arguments import check_sacx_arguments, parse_ent_coef
from sb3_ac_ext.sacx.policies import CnnPolicy, MlpPolicy, MultiInputPolicy


class SoftBatch(NamedTuple):
    """A batch and what the losses of its update share."""

    transitions: Transitions
    actions: th.Tensor
    """``(B, A)`` a_pi ~ pi(s), with gradient."""
    log_prob: th.Tensor
    """``(B, 1)`` log pi(a_pi|s), with gradient."""
    ent_coef: th.Tensor
    """alpha before the update, ``()`` or ``(1,)``."""


class SACX(OffPolicyMixin, SAC):
    """
    SAC with automatic entropy coefficient, a learning rate and an optimizer for each network, and optionally V.

    Differences from the papers: SB3's defaults ([256, 256], Adam 3e-4, batch 256); log alpha is learned in place of alpha;
    actions are scaled to [-1, 1], which entropies and H refer to; truncated episodes bootstrap at their last observation.
    With ``value_network`` both Q bootstrap from V_target and alpha may be automatic too; the paper's reward scale is
    1 / ``ent_coef``. Differences from SB3's SAC with the extras at their defaults: none in the updates; the replay buffer
    is allocated at its first use.

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", or a policy class derived from these
    :param env: environment or its id, with a Box action space of finite bounds
    :param learning_rate: rate of all networks and alpha: a number >= 0, "lin_x" (falls linearly from x to 0), or a schedule
    :param actor_learning_rate: rate of the actor instead
    :param q_a_learning_rate: rate of Q_a instead; a features extractor of the critic's own keeps ``learning_rate``
    :param q_b_learning_rate: rate of Q_b instead
    :param value_learning_rate: rate of V instead; only with ``value_network``
    :param ent_coef_learning_rate: rate of log alpha instead; only with an automatic ``ent_coef``
    :param ent_coef: alpha, reward units per nat: "auto" (learned, from 1), "auto_x" (from x > 0), or a fixed number > 0
    :param target_entropy: H, in nats; "auto" for minus the number of action dimensions
    :param target_update_interval: SB3's: targets move in every such gradient step, counted anew in each `train`
    :param target_update_every: targets move in every such gradient step of the whole training; None for the above
    :param value_network: whether to learn V as the first paper does
    :param exact_log_prob: whether log(1 - tanh(u)^2) is computed exactly; otherwise as SB3 does, log(1 - tanh(u)^2 + 1e-6),
        which is bounded and so underrates the density of actions within 1e-6 of their limits
    :param use_sde: whether to explore with generalised state-dependent exploration (gSDE, Raffin et al. 2021)
    :param sde_sample_freq: environment steps between its noise matrices; -1 for one a rollout
    :param use_sde_at_warmup: whether to act with it until ``learning_starts``, instead of uniformly
    :param kwargs: `OffPolicyKwargs`
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction
    :raises UnsupportedError: for spaces that SAC cannot take
    """

    sb3_class = SAC
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    joint_optimizers: ClassVar[dict[str, tuple[str, ...]]] = {
        "critic.optimizer": ("policy.critic_features_optimizer", "policy.q_a_optimizer", "policy.q_b_optimizer")
    }
    policy: MlpPolicy
    critic: TwinStreamCritic  # type: ignore[assignment]
    critic_target: TwinStreamCritic  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[SACPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 3e-4,
        *,
        actor_learning_rate: float | str | Schedule | None = None,
        q_a_learning_rate: float | str | Schedule | None = None,
        q_b_learning_rate: float | str | Schedule | None = None,
        value_learning_rate: float | str | Schedule | None = None,
        ent_coef_learning_rate: float | str | Schedule | None = None,
        ent_coef: str | float = "auto",
        target_entropy: str | float = "auto",
        target_update_interval: int = 1,
        target_update_every: int | None = None,
        value_network: bool = False,
        exact_log_prob: bool = False,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        use_sde_at_warmup: bool = False,
        _init_setup_model: bool = True,
        **kwargs: Unpack[OffPolicyKwargs],
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            ent_coef=ent_coef,
            target_entropy=target_entropy,
            target_update_interval=target_update_interval,
            use_sde=use_sde,
            sde_sample_freq=sde_sample_freq,
            use_sde_at_warmup=use_sde_at_warmup,
            _init_setup_model=False,
            **kwargs,
        )
        self.actor_learning_rate = actor_learning_rate
        self.q_a_learning_rate = q_a_learning_rate
        self.q_b_learning_rate = q_b_learning_rate
        self.value_learning_rate = value_learning_rate
        self.ent_coef_learning_rate = ent_coef_learning_rate
        self.target_update_every = target_update_every
        self.value_network = value_network
        self.exact_log_prob = exact_log_prob
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_sacx_arguments(self)

    def _setup_model(self) -> None:
        self.log_ent_coef, self.ent_coef_optimizer = None, None  # not those of an earlier setup
        if self.value_network:
            self.policy_kwargs = {**self.policy_kwargs, "value_network": True}  # not in the caller's dict
        super()._setup_model()
        _, ent_coef = parse_ent_coef(self.ent_coef)
        self._fixed_ent_coef = th.tensor(ent_coef, device=self.device)
        # both forms of alpha are always there, so that a file with the other one loads where ``ent_coef`` is changed
        if self.ent_coef_optimizer is None:
            self.log_ent_coef = self._fixed_ent_coef.log().reshape(1)
        else:
            self.ent_coef_tensor = self._fixed_ent_coef.clone()
        if self.value_network:
            self.batch_norm_stats = get_parameters_by_name(self.policy.value, ["running_"])
            self.batch_norm_stats_target = get_parameters_by_name(self.policy.value_target, ["running_"])

    def _optimizers(self) -> dict[str, th.optim.Optimizer]:
        names = ("q_a", "q_b", "critic_features", "value", "value_features")
        optimizers = {name: getattr(self.policy, f"{name}_optimizer", None) for name in names}
        optimizers.update(actor=self.actor.optimizer, ent_coef=self.ent_coef_optimizer)
        return {name: optimizer for name, optimizer in optimizers.items() if optimizer is not None}

    # What follows q_a, q_b and value; where one of them has no target there is no such attribute.

    @property
    def q_a_target(self) -> FusedMLP:
        """The stream that follows Q_a."""
        return self.critic_target.qf0

    @property
    def q_b_target(self) -> FusedMLP:
        """The stream that follows Q_b."""
        return self.critic_target.qf1

    @property
    def value_target(self) -> FusedMLP:
        """The layers that follow those of V."""
        return self.policy.value_target.vf

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Updates of Algorithm 1.

        :param gradient_steps: number of updates
        :param batch_size: transitions per update
        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        self._begin_updates()
        for step in range(gradient_steps):
            self._n_updates += 1
            self._run(self._update, self._sample(batch_size), self._targets_are_due(step))
        self._end_updates()

    def _update(self, transitions: Transitions, targets_too: bool) -> None:
        batch = self._soft_batch(transitions)
        if self.ent_coef_optimizer is not None:
            self._descend("ent_coef", self._ent_coef_loss, batch)
        if self.value_network:
            self._descend(self._trained("value", "value_features"), self._value_loss, batch, name="value")
        self._descend(self._trained("q_a", "q_b", "critic_features"), self._critic_loss, batch, name="critic")
        self._descend("actor", self._actor_loss, batch)
        if targets_too:
            self._update_targets()

    def _soft_batch(self, transitions: Transitions) -> SoftBatch:
        if self.use_sde:
            self.actor.reset_noise()
        batch = SoftBatch(transitions, *self._act(transitions.observations), self._alpha())
        self._means.add("ent_coef", batch.ent_coef)
        self._means.add("entropy", -batch.log_prob)
        return batch

    def _ent_coef_loss(self, batch: SoftBatch) -> th.Tensor:
        assert self.log_ent_coef is not None and isinstance(self.target_entropy, float)
        return ent_coef_loss(self.log_ent_coef, batch.log_prob.detach(), self.target_entropy)

    def _value_loss(self, batch: SoftBatch) -> th.Tensor:
        observations = batch.transitions.observations
        with th.no_grad():
            target = soft_value(th.min(*self.critic(observations, batch.actions)), batch.log_prob, batch.ent_coef)
        return 0.5 * F.mse_loss(self.policy.value(observations), target)

    def _critic_loss(self, batch: SoftBatch) -> th.Tensor:
        transitions = batch.transitions
        with th.no_grad():
            next_value = self._next_value(transitions.next_observations, batch.ent_coef)
            target = td_target(transitions.rewards, transitions.dones, transitions.discounts, next_value)
        q_a, q_b = self.critic(transitions.observations, transitions.actions)
        self._means.add("q_a", q_a)
        self._means.add("q_b", q_b)
        return 0.5 * twin_mse(q_a, q_b, target)

    def _next_value(self, observations: PyTorchObs, ent_coef: th.Tensor) -> th.Tensor:
        if self.value_network:
            value: th.Tensor = self.policy.value_target(observations)
            return value
        actions, log_prob = self._act(observations)
        return soft_value(th.min(*self.critic_target(observations, actions)), log_prob, ent_coef)

    def _actor_loss(self, batch: SoftBatch) -> th.Tensor:
        q_a, q_b = self.critic(batch.transitions.observations, batch.actions)
        q = th.where(q_a <= q_b, q_a, q_b)  # th.min shares the gradient where they are equal, by ten operations
        return -soft_value(q, batch.log_prob, batch.ent_coef).mean()

    def _update_targets(self) -> None:
        if self.value_network:
            online, target = self.policy.value.features_extractor, self.policy.value_target.features_extractor
            self._follow("value", self.tau)
        else:
            online, target = self.critic.features_extractor, self.critic_target.features_extractor
            self._follow("q_a", self.tau)
            self._follow("q_b", self.tau)
        polyak_update(online.parameters(), target.parameters(), self.tau)
        polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

    def _targets_are_due(self, step: int) -> bool:
        """
        :param step: updates before this one in this call of `train`
        """
        if self.target_update_every is None:
            return step % self.target_update_interval == 0
        return self._n_updates % self.target_update_every == 0

    def _trained(self, *networks: str) -> tuple[str, ...]:
        """Those of ``networks`` that have an optimizer."""
        return tuple(name for name in networks if name in self._descents)

    def _alpha(self) -> th.Tensor:
        if self.ent_coef_optimizer is None:
            return self._fixed_ent_coef
        assert self.log_ent_coef is not None
        return self.log_ent_coef.detach().exp()

    def _act(self, observations: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """
        :param observations: ``(B, ...)``
        :return: ``(B, A)`` a ~ pi(s) and ``(B, 1)`` log pi(a|s), both with gradient
        """
        by_sb3 = self._density_obstacle() is not None and not self.exact_log_prob
        return self.policy.action_log_prob(observations, exact=self.exact_log_prob, by_sb3=by_sb3)

    def _density_obstacle(self) -> str | None:
        return self.policy.density_obstacle() if self.engine else "engine=False"

    def _acting_obstacle(self) -> str | None:
        return numpy_actor.obstacle(self.policy, self.policy_aliases.values(), Actor)

    def engine_report(self) -> dict[str, str]:
        """See `UpdateMixin.engine_report`."""
        obstacle = self._density_obstacle()
        formula = self.exact_log_prob or obstacle is None
        return {**super().engine_report(), "log-density": "formula" if formula else f"SB3's distribution: {obstacle}"}

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "log_ent_coef", "ent_coef_tensor", "_fixed_ent_coef"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names = {"actor": "actor.optimizer", "ent_coef": "ent_coef_optimizer"}
        optimizers = [names.get(name, f"policy.{name}_optimizer") for name in self._optimizers()]
        return ["policy", *optimizers], [] if self.ent_coef_optimizer is None else ["log_ent_coef"]

    def _translated_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Alpha's optimizer goes or starts afresh where a file is loaded with another ``ent_coef``."""
        translated = super()._translated_parameters(parameters)
        if self.ent_coef_optimizer is None:
            translated.pop("ent_coef_optimizer", None)
        else:
            translated.setdefault("ent_coef_optimizer", self.ent_coef_optimizer.state_dict())
        return translated
