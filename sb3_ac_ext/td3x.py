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

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch as th
from stable_baselines3 import TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import polyak_update
from stable_baselines3.td3.policies import TD3Policy

from sb3_ac_ext.base.arguments import check_float_actions
from sb3_ac_ext.base.noise import ExplorationNoise
from sb3_ac_ext.base.off_policy import OffPolicyMixin
from sb3_ac_ext.base.schedules import Rate
from sb3_ac_ext.buffers.replay import Transitions
from sb3_ac_ext.engine import Network
from sb3_ac_ext.functional.losses import smoothed_action, squared_error, td_errors, td_target
from sb3_ac_ext.networks.policies import CriticPolicy, ForDicts, ForImages
from sb3_ac_ext.signatures import passed_on
from sb3_ac_ext.validation import NonNegative, PositiveInt


class MlpPolicy(CriticPolicy, TD3Policy):
    """
    SB3's TD3 policy; the critic's streams can be normalised, see `CriticPolicy`.

    :param n_critics: streams of the critic, with one optimizer for all; targets are their smallest value, and the actor
        ascends the first
    """


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

    :param actor_learning_rate: rate of the actor instead of ``learning_rate``
    :param critic_learning_rate: rate of the critic instead of ``learning_rate``
    :param policy_delay: critic updates per update of actor and targets, counted over the whole training
    :param target_policy_noise: sigma, std of the smoothing noise in the scaled action space
    :param target_noise_clip: c, its largest absolute value
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

    def __init__(
        self,
        policy: str | type[TD3Policy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 1e-3,
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
        policy_delay: PositiveInt = 2,
        target_policy_noise: NonNegative = 0.2,
        target_noise_clip: NonNegative = 0.5,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        actor_learning_rate: Rate | None = None,
        critic_learning_rate: Rate | None = None,
        max_grad_norm: float | dict[str, float] | None = None,
        exploration_noise: ExplorationNoise | None = None,
        warmup: Literal["uniform", "noise"] = "uniform",
        engine: bool = True,
    ) -> None:
        super().__init__(**passed_on(TD3X, locals()), _init_setup_model=False)
        self.actor_learning_rate = actor_learning_rate
        self.critic_learning_rate = critic_learning_rate
        if _init_setup_model:
            self._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_float_actions(self.action_space)

    def _networks(self) -> Mapping[str, Network]:
        critic, actor = self.critic, self.actor
        return {
            "critic": self._network("critic", critic, critic.optimizer, self.critic_target, rate=self.critic_learning_rate),
            "actor": self._network("actor", actor, actor.optimizer, self.actor_target, rate=self.actor_learning_rate),
        }

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """
        Updates of Algorithm 1.

        :param gradient_steps: number of critic updates
        :param batch_size: transitions per update
        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        with self._updates() as engine:
            for _ in range(gradient_steps):
                self._n_updates += 1
                batch = self._sample(batch_size)
                outputs = engine.run(self._update, batch, bool(self._n_updates % self.policy_delay == 0))
                self._update_priorities(batch, outputs)

    def _update(self, batch: Transitions, delayed: bool) -> dict[str, th.Tensor]:
        target = self._target(batch)  # (B, 1)
        values = self.critic(batch.observations, batch.actions)
        critic_loss = squared_error(values, target, batch.weights)
        self._engine.minimise(critic_loss, "critic")
        outputs = {"critic_loss": critic_loss, **self._means_of(values)}
        if batch.weights is not None:
            outputs["td_errors"] = td_errors(values, target)
        if delayed:
            actions = self.actor(batch.observations)
            q = self.critic.q1_forward(batch.observations, actions)  # type: ignore[arg-type]  # SB3 leaves dicts out
            outputs["actor_loss"] = -q.mean()
            self._engine.minimise(outputs["actor_loss"], "actor")
            self._update_targets()
        return outputs

    @th.no_grad()
    def _target(self, batch: Transitions) -> th.Tensor:
        noise = th.empty_like(batch.actions).normal_(0, self.target_policy_noise)
        next_actions = smoothed_action(self.actor_target(batch.next_observations), noise, self.target_noise_clip)
        next_q = th.cat(self.critic_target(batch.next_observations, next_actions), dim=1).amin(dim=1, keepdim=True)
        return td_target(batch.rewards, batch.dones, batch.discounts, next_q)

    def _update_targets(self) -> None:
        self._engine.follow("critic", self.tau)
        self._engine.follow("actor", self.tau)
        polyak_update(self.critic_batch_norm_stats, self.critic_batch_norm_stats_target, 1.0)
        polyak_update(self.actor_batch_norm_stats, self.actor_batch_norm_stats_target, 1.0)
