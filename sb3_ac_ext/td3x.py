"""
TD3 with a twin-stream critic (Fujimoto et al. 2018, "Addressing Function Approximation Error", arXiv:1802.09477).

    for i in 1 .. gradient_steps:                                                     (Algorithm 1)
        sample (s, a, r, s', d)
        a' = clip(mu_target(s') + clip(N(0, sigma), -c, c), -1, 1)
        y  = r + gamma (1 - d) min(Q_a_target(s', a'), Q_b_target(s', a'))
        critic: descend mean (Q_a(s, a) - y)^2 + mean (Q_b(s, a) - y)^2
        every policy_delay updates:
            actor: ascend mean Q_a(s, mu(s))
            targets: theta_target <- tau theta + (1 - tau) theta_target
"""

from typing import ClassVar, Unpack

import torch as th
from stable_baselines3 import TD3
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import polyak_update
from stable_baselines3.td3.policies import Actor, TD3Policy

from sb3_ac_ext.base.off_policy import OffPolicyMixin
from sb3_ac_ext.base.typing import OffPolicyKwargs
from sb3_ac_ext.buffers.replay import Transitions
from sb3_ac_ext.functional.losses import smoothed_action, td_target, twin_mse
from sb3_ac_ext.legacy import numpy_actor
from sb3_ac_ext.networks.critics import TwinStreamCritic
from sb3_ac_ext.networks.policies import DeterministicPolicy, ForDicts, ForImages, TwinStreamPolicy
from sb3_ac_ext.validation import check_number


class MlpPolicy(TwinStreamPolicy, DeterministicPolicy):
    """SB3's TD3 policy with the twin-stream critic, see `TwinStreamPolicy`."""

    critic: TwinStreamCritic  # type: ignore[assignment]
    critic_target: TwinStreamCritic  # type: ignore[assignment]


class CnnPolicy(ForImages, MlpPolicy):
    """The policy for images."""


class MultiInputPolicy(ForDicts, MlpPolicy):
    """The policy for Dict observations."""


class TD3X(OffPolicyMixin, TD3):
    """
    TD3 with a twin-stream critic.

    Differences from the paper: SB3's defaults ([400, 300], Adam 1e-3, batch 256); the smoothing noise and its clip are in
    the action space scaled to [-1, 1], so they are symmetric for any action box; the policy delay counts gradient steps;
    truncated episodes bootstrap at their last observation. Differences from SB3's TD3 with the extras at their defaults:
    none in the updates; the replay buffer is allocated at its first use.

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", or a policy class
    :param env: environment or its id, with a Box action space of finite bounds
    :param learning_rate: rate of both networks: a number >= 0, "lin_x" (falls linearly from x to 0), or a schedule
    :param actor_learning_rate: rate of the actor instead
    :param critic_learning_rate: rate of the critic instead
    :param policy_delay: critic updates per update of actor and targets, >= 1
    :param target_policy_noise: sigma, std of the smoothing noise in the scaled action space, >= 0
    :param target_noise_clip: c, its largest absolute value, >= 0
    :param kwargs: `OffPolicyKwargs`
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction
    :raises UnsupportedError: for spaces that TD3 cannot take
    """

    sb3_class = TD3
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: MlpPolicy
    critic: TwinStreamCritic  # type: ignore[assignment]
    critic_target: TwinStreamCritic  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[TD3Policy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 1e-3,
        *,
        actor_learning_rate: float | str | Schedule | None = None,
        critic_learning_rate: float | str | Schedule | None = None,
        policy_delay: int = 2,
        target_policy_noise: float = 0.2,
        target_noise_clip: float = 0.5,
        _init_setup_model: bool = True,
        **kwargs: Unpack[OffPolicyKwargs],
    ) -> None:
        super().__init__(
            policy,
            env,
            learning_rate,
            policy_delay=policy_delay,
            target_policy_noise=target_policy_noise,
            target_noise_clip=target_noise_clip,
            _init_setup_model=False,
            **kwargs,
        )
        self.actor_learning_rate = actor_learning_rate
        self.critic_learning_rate = critic_learning_rate
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_number("policy_delay", self.policy_delay, low=1, integer=True)
        check_number("target_policy_noise", self.target_policy_noise, low=0)
        check_number("target_noise_clip", self.target_noise_clip, low=0)

    def _optimizers(self) -> dict[str, th.optim.Optimizer]:
        return {"critic": self.critic.optimizer, "actor": self.actor.optimizer}

    def _acting_obstacle(self) -> str | None:
        return numpy_actor.obstacle(self.policy, self.policy_aliases.values(), Actor)

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """
        Updates of Algorithm 1.

        :param gradient_steps: number of critic updates
        :param batch_size: transitions per update
        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        self._begin_updates()
        for _ in range(gradient_steps):
            self._n_updates += 1
            self._run(self._update, self._sample(batch_size), self._n_updates % self.policy_delay == 0)
        self._end_updates()

    def _update(self, batch: Transitions, actor_too: bool) -> None:
        self._descend("critic", self._critic_loss, batch)
        if actor_too:
            self._descend("actor", self._actor_loss, batch)
            self._update_targets()

    def _critic_loss(self, batch: Transitions) -> th.Tensor:
        with th.no_grad():
            noise = th.empty_like(batch.actions).normal_(0, self.target_policy_noise)
            next_actions = smoothed_action(self.actor_target(batch.next_observations), noise, self.target_noise_clip)
            next_q = th.min(*self.critic_target(batch.next_observations, next_actions))  # (B, 1)
            target = td_target(batch.rewards, batch.dones, batch.discounts, next_q)
        q_a, q_b = self.critic(batch.observations, batch.actions)
        self._means.add("q_a", q_a)
        self._means.add("q_b", q_b)
        return twin_mse(q_a, q_b, target)

    def _actor_loss(self, batch: Transitions) -> th.Tensor:
        return -self.critic.q1_forward(batch.observations, self.actor(batch.observations)).mean()

    def _update_targets(self) -> None:
        self._follow("critic", self.tau)
        self._follow("actor", self.tau)
        polyak_update(self.critic_batch_norm_stats, self.critic_batch_norm_stats_target, 1.0)
        polyak_update(self.actor_batch_norm_stats, self.actor_batch_norm_stats_target, 1.0)
