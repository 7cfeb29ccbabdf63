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

import math
from collections.abc import Collection, Hashable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch as th
from annotated_types import Ge
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule
from stable_baselines3.common.utils import get_parameters_by_name, polyak_update
from stable_baselines3.sac.policies import Actor, SACPolicy
from torch import nn
from torch.nn import functional as F

from sb3_ac_ext.base.arguments import check_policy_class
from sb3_ac_ext.base.checkpoint import changed_by_load
from sb3_ac_ext.base.noise import ExplorationNoise
from sb3_ac_ext.base.off_policy import OffPolicyMixin, critic_names
from sb3_ac_ext.base.schedules import Rate
from sb3_ac_ext.buffers.replay import Transitions
from sb3_ac_ext.engine import Network
from sb3_ac_ext.functional.gaussian import squashed_gaussian
from sb3_ac_ext.functional.losses import ent_coef_loss, soft_value, squared_error, td_errors, td_target
from sb3_ac_ext.sacx.arguments import EntCoef, TargetEntropy, parse_ent_coef, target_entropy_in
from sb3_ac_ext.sacx.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, divided
from sb3_ac_ext.signatures import passed_on
from sb3_ac_ext.validation import Acts, ArgumentError, Excludes, Needs, PositiveInt, check_keys


class PolicySample(NamedTuple):
    """What the policy does at the observations of a batch; all losses of an update share it."""

    actions: th.Tensor
    """``(B, A)`` a_pi ~ pi(s), with gradient."""
    log_prob: th.Tensor
    """``(B, 1)`` log pi(a_pi|s), with gradient."""


class SACX(OffPolicyMixin, SAC):
    """
    SAC with automatic entropy coefficient, a learning rate and an optimizer for each network, and optionally V.

    Differences from the papers: SB3's defaults ([256, 256], Adam 3e-4, batch 256); log alpha is learned in place of alpha;
    actions are scaled to [-1, 1], which entropies and H refer to; truncated episodes bootstrap at their last observation.
    With ``value_network`` both Q bootstrap from V_target and alpha may be automatic too; the paper's reward scale is
    1 / ``ent_coef``. Differences from SB3's SAC with the extras at their defaults: none in the updates; the replay buffer
    is allocated at its first use.

    :param actor_learning_rate: rate of the actor instead of ``learning_rate``
    :param q_a_learning_rate: rate of Q_a instead of ``learning_rate``; a features extractor of the critic's own keeps
        ``learning_rate``
    :param q_b_learning_rate: rate of Q_b instead of ``learning_rate``
    :param q_learning_rates: rates of any of the critics by their names, ``{"q_c": 1e-4}`` ("q" if there is only one), which
        count before the two above
    :param value_learning_rate: rate of V instead of ``learning_rate``
    :param ent_coef_learning_rate: rate of log alpha instead of ``learning_rate``; only with an automatic ``ent_coef``
    :param ent_coef: alpha, reward units per nat: learned from 1 ("auto") or from x ("auto_x"), or fixed
    :param target_entropy: H, in nats
    :param target_update_interval: gradient steps between movements of the targets, counted anew in each `train`, so that it
        does nothing with one gradient step at a time
    :param target_update_every: what ``target_update_interval`` is, counted over the whole training; None for that one
    :param value_network: whether to learn V and its target, and no targets of Q, as the first paper does, which takes a policy
        derived from those of this package
    :param exact_log_prob: whether log(1 - tanh(u)^2) is computed exactly; otherwise as SB3 does, log(1 - tanh(u)^2 + 1e-6),
        which is bounded and so underrates the density of actions within 1e-6 of their limits
    :param use_sde: whether to explore with generalised state-dependent exploration (gSDE, Raffin et al. 2021)
    :param sde_sample_freq: environment steps between its noise matrices; -1 for one a rollout
    :param use_sde_at_warmup: whether to act with it until ``learning_starts``, instead of uniformly
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
    policy: MlpPolicy

    def __init__(
        self,
        policy: str | type[SACPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 3e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 100,
        batch_size: int = 256,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int = 1,
        ent_coef: EntCoef = "auto",
        target_update_interval: PositiveInt = 1,
        target_entropy: TargetEntropy = "auto",
        use_sde: Annotated[bool, Acts.NEVER] = False,
        sde_sample_freq: Annotated[int, Ge(-1), Acts.STEP] = -1,
        use_sde_at_warmup: Annotated[bool, Acts.STEP] = False,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        actor_learning_rate: Rate | None = None,
        q_a_learning_rate: Rate | None = None,
        q_b_learning_rate: Rate | None = None,
        q_learning_rates: dict[str, Rate | None] | None = None,
        value_learning_rate: Annotated[Rate | None, Needs("value_network", True)] = None,
        ent_coef_learning_rate: Rate | None = None,
        target_update_every: Annotated[PositiveInt | None, Excludes("target_update_interval")] = None,
        value_network: Annotated[bool, Acts.NEVER] = False,
        exact_log_prob: bool = False,
        max_grad_norm: float | dict[str, float] | None = None,
        exploration_noise: ExplorationNoise | None = None,
        warmup: Literal["uniform", "noise"] = "uniform",
        engine: bool = True,
    ) -> None:
        super().__init__(**passed_on(SACX, locals()), _init_setup_model=False)
        self.actor_learning_rate = actor_learning_rate
        self.q_a_learning_rate = q_a_learning_rate
        self.q_b_learning_rate = q_b_learning_rate
        self.q_learning_rates = q_learning_rates
        self.value_learning_rate = value_learning_rate
        self.ent_coef_learning_rate = ent_coef_learning_rate
        self.target_update_every = target_update_every
        self.value_network = value_network
        self.exact_log_prob = exact_log_prob
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        check_policy_class(self, MlpPolicy if self.value_network is True else SACPolicy)
        super()._check_arguments()
        self.target_entropy = target_entropy_in(self.action_space, self.target_entropy)  # as SB3 does
        automatic, _ = parse_ent_coef("ent_coef", self.ent_coef)
        if self.ent_coef_learning_rate is not None and not automatic:
            raise ArgumentError(
                f'ent_coef_learning_rate={self.ent_coef_learning_rate!r} needs ent_coef="auto", got ent_coef={self.ent_coef!r}'
            )
        made = self.policy_kwargs.get("value_network", self.value_network)
        if made != self.value_network:
            raise ArgumentError(f"value_network must be what the policy was made with, {made}, got {self.value_network}")

    def _setup_model(self) -> None:
        self.log_ent_coef, self.ent_coef_optimizer = None, None  # not those of an earlier setup
        if self.value_network is True:  # anything else is refused below
            self.policy_kwargs = {**self.policy_kwargs, "value_network": True}  # not in the caller's dict
        super()._setup_model()
        _, ent_coef = parse_ent_coef("ent_coef", self.ent_coef)
        # both forms of alpha are always there, so that a file with the other one loads where ``ent_coef`` is changed
        if self.ent_coef_optimizer is None:
            self.log_ent_coef = th.tensor([ent_coef], device=self.device).log()
        else:
            self.ent_coef_tensor = th.tensor(ent_coef, device=self.device)
        if self.value_network:
            self.batch_norm_stats = get_parameters_by_name(self.policy.value, ["running_"])
            self.batch_norm_stats_target = get_parameters_by_name(self.policy.value_target, ["running_"])

    def _networks(self) -> Mapping[str, Network]:
        policy, optimizers = self.policy, self._critic_optimizers()
        rates = self._q_rates([name for name in optimizers if name != "critic_features"])
        rates |= {"actor": self.actor_learning_rate, "ent_coef": self.ent_coef_learning_rate}
        if self.value_network:
            optimizers |= {"value": policy.value_optimizer, "value_features": policy.value_features_optimizer}
            rates["value"] = self.value_learning_rate
        optimizers |= {"actor": self.actor.optimizer, "ent_coef": self.ent_coef_optimizer}
        networks = {
            name: self._network(name, None, optimizer, rate=rates.get(name))
            for name, optimizer in optimizers.items()
            if optimizer is not None
        }
        followed = networks[self._followed(networks)]
        online, target = (policy.value, policy.value_target) if self.value_network else (self.critic, self.critic_target)
        followed.module, followed.target = online, target
        return networks

    def _followed(self, networks: Mapping[str, Network]) -> str:
        """The network whose record has the target: V, or the first critic, for all critics and their features together."""
        return "value" if self.value_network else next(iter(networks))

    def _critic_optimizers(self) -> dict[str, th.optim.Optimizer | None]:
        """That of each critic and that of the rest, their features, by their names; one as SB3 has it becomes these."""
        streams = getattr(self.critic, "q_networks", ())  # a critic of the user's need not have any
        names = [*critic_names(len(streams)), "critic_features"]
        whole = vars(self.critic).pop("optimizer", None)
        if whole is not None:
            for name, part in zip(names, divided(whole, streams), strict=True):
                setattr(self.policy, f"{name}_optimizer", part)
        return {name: getattr(self.policy, f"{name}_optimizer") for name in names}

    def _q_rates(self, names: Collection[str]) -> dict[str, Any]:
        """The arguments for the rates of critics, by their ``names``."""
        given = {"q_a": self.q_a_learning_rate, "q_b": self.q_b_learning_rate, **(self.q_learning_rates or {})}
        given = {name: rate for name, rate in given.items() if rate is not None}
        check_keys("q_learning_rates", given, names, kind="key")
        return given

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Updates of Algorithm 1.

        :param gradient_steps: number of updates
        :param batch_size: transitions per update
        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        with self._updates() as engine:
            for step in range(gradient_steps):
                self._n_updates += 1
                batch = self._sample(batch_size)
                self._update_priorities(batch, engine.run(self._update, batch, self._targets_are_due(step)))

    def _update(self, batch: Transitions, targets_too: bool) -> dict[str, th.Tensor]:
        if self.use_sde:
            self.actor.reset_noise()
        sample = PolicySample(*self._action_log_prob(batch.observations))
        ent_coef = self._ent_coef()
        outputs = {"ent_coef": ent_coef.mean(), "entropy": -sample.log_prob.detach().mean()}
        if self.ent_coef_optimizer is not None:
            outputs["ent_coef_loss"] = self._ent_coef_loss(sample)
            self._engine.minimise(outputs["ent_coef_loss"], "ent_coef")
        if self.value_network:
            outputs["value_loss"] = self._value_loss(batch, sample, ent_coef)
            self._engine.minimise(outputs["value_loss"], *self._trained("value", "value_features"))
        outputs |= self._update_critics(batch, ent_coef)
        outputs["actor_loss"] = self._actor_loss(batch, sample, ent_coef)
        self._engine.minimise(outputs["actor_loss"], "actor")
        if targets_too:
            self._update_targets()
        return outputs

    def _ent_coef_loss(self, sample: PolicySample) -> th.Tensor:
        assert self.log_ent_coef is not None
        return ent_coef_loss(self.log_ent_coef, sample.log_prob.detach(), float(self.target_entropy))

    def _value_loss(self, batch: Transitions, sample: PolicySample, ent_coef: th.Tensor) -> th.Tensor:
        with th.no_grad():
            target = soft_value(self._smallest(self.critic, batch.observations, sample.actions), sample.log_prob, ent_coef)
        return 0.5 * F.mse_loss(self.policy.value(batch.observations), target)

    def _update_critics(self, batch: Transitions, ent_coef: th.Tensor) -> dict[str, th.Tensor]:
        with th.no_grad():
            next_value = self._next_value(batch.next_observations, ent_coef)
            target = td_target(batch.rewards, batch.dones, batch.discounts, next_value)
        values = self.critic(batch.observations, batch.actions)
        loss = 0.5 * squared_error(values, target, batch.weights)
        self._engine.minimise(loss, *self._trained(*critic_names(len(values)), "critic_features"))
        outputs = {"critic_loss": loss, **self._means_of(values)}
        return outputs if batch.weights is None else {**outputs, "td_errors": td_errors(values, target)}

    def _next_value(self, observations: PyTorchObs, ent_coef: th.Tensor) -> th.Tensor:
        if self.value_network:
            value: th.Tensor = self.policy.value_target(observations)
            return value
        actions, log_prob = self._action_log_prob(observations)
        return soft_value(self._smallest(self.critic_target, observations, actions), log_prob, ent_coef)

    def _actor_loss(self, batch: Transitions, sample: PolicySample, ent_coef: th.Tensor) -> th.Tensor:
        q = self._smallest(self.critic, batch.observations, sample.actions)
        return -soft_value(q, sample.log_prob, ent_coef).mean()

    @staticmethod
    def _smallest(critic: nn.Module, observations: PyTorchObs, actions: th.Tensor) -> th.Tensor:
        """``(B, 1)`` the smallest value of the critics."""
        return th.cat(critic(observations, actions), dim=1).min(dim=1, keepdim=True).values

    def _update_targets(self) -> None:
        self._engine.follow(self._followed(self._engine.networks), self.tau)
        polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)

    def _targets_are_due(self, step: int) -> bool:
        """
        :param step: updates before this one in this call of `train`
        """
        if self.target_update_every is None:
            return bool(step % self.target_update_interval == 0)
        return bool(self._n_updates % self.target_update_every == 0)

    def _trained(self, *networks: str) -> tuple[str, ...]:
        """Those of ``networks`` that have an optimizer."""
        return tuple(name for name in networks if name in self._engine.networks)

    def _ent_coef(self) -> th.Tensor:
        """alpha, ``()`` or ``(1,)``, without gradient."""
        if self.ent_coef_optimizer is None:
            return th.as_tensor(self.ent_coef_tensor, device=self.device)
        assert self.log_ent_coef is not None
        return self.log_ent_coef.detach().exp()

    def _action_log_prob(self, observations: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """
        :param observations: ``(B, ...)``
        :return: ``(B, A)`` a ~ pi(s) and ``(B, 1)`` log pi(a|s), both with gradient
        """
        if not self.exact_log_prob:
            actions, log_prob = self.actor.action_log_prob(observations)
            return actions, log_prob.reshape(-1, 1)
        mean, log_std, sde = self.actor.get_action_dist_params(observations)
        if sde:  # state-dependent noise, relative to its standard deviation
            distribution = self.actor.action_dist
            std = distribution.proba_distribution(mean, log_std, **sde).distribution.stddev
            return squashed_gaussian(mean, std.log(), distribution.get_noise(sde["latent_sde"]) / std)
        return squashed_gaussian(mean, log_std, th.empty_like(mean).normal_())

    def _act(self, batch: tuple[th.Tensor, ...], deterministic: bool) -> dict[str, th.Tensor]:
        """What SB3's distribution gives, from the same random numbers, in a third of the operations."""
        kinds = type(self.policy)._predict, type(self.actor).forward, type(self.actor.action_dist)
        if kinds != (SACPolicy._predict, Actor.forward, SquashedDiagGaussianDistribution):
            return super()._act(batch, deterministic)
        mean, log_std, _ = self.actor.get_action_dist_params(batch[0])
        u = mean if deterministic else mean + log_std.exp() * th.empty_like(mean).normal_()
        return {"actions": th.tanh(u)}

    def _replayed_actions(
        self, policy: BasePolicy, observation: Any, deterministic: bool, *options: Hashable
    ) -> np.ndarray | None:
        actions = super()._replayed_actions(policy, observation, deterministic, *options)
        return None if actions is None or math.isnan(actions.sum()) else actions  # SB3 raises an error for NaN

    def _acting_obstacle(self, policy: BasePolicy) -> str | None:
        return "gSDE draws its noise elsewhere" if self.use_sde else super()._acting_obstacle(policy)

    @classmethod
    def load(cls, path: Any, *args: Any, **kwargs: Any) -> Self:
        """See `CheckpointMixin.load`; an ``ent_coef`` given here replaces the file's."""
        model = super().load(path, *args, **kwargs)
        if "ent_coef" in kwargs and model.ent_coef_optimizer is None:
            model.ent_coef_tensor.fill_(parse_ent_coef("ent_coef", model.ent_coef)[1])  # SB3 has put the file's there
        return model

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "log_ent_coef", "ent_coef_tensor"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        names = {"actor": "actor.optimizer", "ent_coef": "ent_coef_optimizer"}
        optimizers = [names.get(name, f"policy.{name}_optimizer") for name in self._networks()]
        return ["policy", *optimizers], [] if self.ent_coef_optimizer is None else ["log_ent_coef"]

    def _joint_optimizers(self) -> dict[str, tuple[str, ...]]:
        return {"critic.optimizer": tuple(f"policy.{name}_optimizer" for name in self._critic_optimizers())}

    def _translated_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Alpha's optimizer goes or starts afresh where a file is loaded with another ``ent_coef``."""
        translated = super()._translated_parameters(parameters)
        if "ent_coef" in changed_by_load.get():
            translated.pop("ent_coef_optimizer", None)
            if self.ent_coef_optimizer is not None:
                saved = parameters.get("ent_coef_optimizer")
                translated["ent_coef_optimizer"] = self.ent_coef_optimizer.state_dict() if saved is None else saved
        return translated
