"""
DDPG (Lillicrap et al. 2016, "Continuous control with deep reinforcement learning", arXiv:1509.02971).

    for i in 1 .. gradient_steps:                                                     (Algorithm 1)
        sample (s, a, r, s', d)
        y = r + gamma (1 - d) Q_target(s', mu_target(s'))
        critic: descend mean (Q(s, a) - y)^2
        actor: ascend mean Q(s, mu(s))
        targets: theta_target <- tau theta + (1 - tau) theta_target
"""

import copy
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch as th
from stable_baselines3 import DDPG
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
from sb3_ac_ext.ddpgx.parameter_noise import ParameterNoise, ParameterNoiseOptions, PerturbedActors, action_distance
from sb3_ac_ext.ddpgx.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_ac_ext.engine import Network
from sb3_ac_ext.functional.losses import squared_error, td_errors, td_target
from sb3_ac_ext.signatures import passed_on
from sb3_ac_ext.validation import Acts, ArgumentError, NonFiniteError, NonNegative


class DDPGX(OffPolicyMixin, DDPG):
    """
    DDPG, with the paper's architecture and two kinds of exploration noise as options.

    Differences from the paper: SB3's defaults (Adam 1e-3 for both networks, batch 256, tau 0.005, no noise; the paper's
    are in ``zoo_configs/ddpgx_paper.yml``); with batch normalisation the critic runs on its running statistics everywhere,
    which its own loss updates first; truncated episodes bootstrap at their last observation. Differences from SB3's DDPG
    with the extras at their defaults: none in the updates; the replay buffer is allocated at its first use.

    Ornstein-Uhlenbeck noise is ``exploration_noise={"type": "ornstein-uhlenbeck", "start": 0.2, "dt": 1.0}``, see
    `sb3_ac_ext.base.noise.NoiseSchedule` for what ``dt`` means: 1 is one unit of time a step, as programs that follow
    the paper have it, 0.01 (the default, and SB3's) the same process a hundred times more slowly.

    Logged: ``train/q``, mean Q(s, a) of the critic's batches (``q_a``, ``q_b``, ... of several critics);
    ``train/action_gradient``, mean ``|dQ/da|`` over the components of the actor's actions (reward units per half of the
    action's range); ``train/exploration_share``, mean ``|a - mu(s)| / 2`` over the components of the actions since the last
    log, the share of the action's range that noise has moved them by (not while actions are drawn uniformly);
    ``train/parameter_noise_std`` and ``train/parameter_noise_distance``, sigma and d of
    `sb3_ac_ext.ddpgx.parameter_noise.ParameterNoise`.

    :param actor_learning_rate: rate of the actor instead of ``learning_rate``
    :param critic_learning_rate: rate of the critic instead of ``learning_rate``
    :param critic_weight_decay: L2 decay of the critic's weights (not its biases), as Adam's ``weight_decay``; the paper has
        0.01
    :param parameter_noise: ``{"std": 0.05, "distance": 0.2}``: noise on the actor's parameters, for each environment drawn
        at the start of its episodes, whose std is adapted (times ``coefficient``, 1.01, every ``interval``, 50 steps) until
        it moves actions by ``distance``, in actions scaled to [-1, 1]; action noise comes on top
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction
    :raises UnsupportedError: for spaces that DDPG cannot take
    """

    sb3_class = DDPG
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: MlpPolicy
    _parameter_noise: ParameterNoise | None
    _parameter_noise_spec: ParameterNoiseOptions | None
    """The argument as it was when the noise was started."""
    _parameter_noise_std: float | None = None
    """Sigma as it has been adapted, saved with the model."""
    _perturbed: PerturbedActors

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
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        stats_window_size: int = 100,
        actor_learning_rate: Rate | None = None,
        critic_learning_rate: Rate | None = None,
        critic_weight_decay: NonNegative = 0.0,
        parameter_noise: Annotated[ParameterNoiseOptions | None, Acts.STEP] = None,
        max_grad_norm: float | dict[str, float] | None = None,
        exploration_noise: ExplorationNoise | None = None,
        warmup: Literal["uniform", "noise"] = "uniform",
        engine: bool = True,
    ) -> None:
        super().__init__(**passed_on(DDPGX, locals()), _init_setup_model=False)
        self._stats_window_size = stats_window_size  # SB3's DDPG does not pass it on
        self.actor_learning_rate = actor_learning_rate
        self.critic_learning_rate = critic_learning_rate
        self.critic_weight_decay = critic_weight_decay
        self.parameter_noise = parameter_noise
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        super()._setup_model()
        self._perturbed = PerturbedActors()
        saved = self._parameter_noise_std
        self._start_parameter_noise()
        if self._parameter_noise is not None and saved is not None:
            self._parameter_noise_std = saved

    def _start_parameter_noise(self) -> None:
        spec = self._parameter_noise_spec = copy.copy(self.parameter_noise)
        self._parameter_noise = None if spec is None else ParameterNoise.parse(spec)
        self._parameter_noise_std = None if self._parameter_noise is None else self._parameter_noise.std

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_float_actions(self.action_space)
        if self.policy_delay != 1 or self.target_noise_clip:
            raise ArgumentError(
                "DDPG has policy_delay=1 and target_noise_clip=0, TD3X loads files of TD3: got "
                f"policy_delay={self.policy_delay}, target_noise_clip={self.target_noise_clip}"
            )
        if self.policy_kwargs.get("batch_norm") and self.batch_size == 1:
            raise ArgumentError("batch_size must be an integer >= 2 with batch_norm=True, got 1")

    def _networks(self) -> Mapping[str, Network]:
        critic, actor = self.critic, self.actor
        return {
            "critic": self._network(
                *("critic", critic, critic.optimizer, self.critic_target),
                rate=self.critic_learning_rate,
                weight_decay=self.critic_weight_decay,
            ),
            "actor": self._network("actor", actor, actor.optimizer, self.actor_target, rate=self.actor_learning_rate),
        }

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """
        Updates of Algorithm 1.

        :param gradient_steps: number of updates of critic, actor and targets
        :param batch_size: transitions per update
        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        with self._updates() as engine:
            for _ in range(gradient_steps):
                self._n_updates += 1
                batch = self._sample(batch_size)
                self._update_priorities(batch, engine.run(self._update, batch))

    def _update(self, batch: Transitions) -> dict[str, th.Tensor]:
        target = self._target(batch)  # (B, 1)
        values = self.critic(batch.observations, batch.actions)
        critic_loss = squared_error(values, target, batch.weights)
        self._engine.minimise(critic_loss, "critic")
        outputs = {"critic_loss": critic_loss, **self._means_of(values)}
        if batch.weights is not None:
            outputs["td_errors"] = td_errors(values, target)
        actions = self.actor(batch.observations)
        slopes: list[th.Tensor] = []  # on its way to the actor the backward pass brings -dQ/da / B
        if actions.requires_grad:
            actions.register_hook(lambda grad: slopes.append(len(grad) * grad.abs().mean()))
        q = self.critic.q1_forward(batch.observations, actions)  # type: ignore[arg-type]  # SB3 leaves dicts out
        outputs["actor_loss"] = -q.mean()
        self._engine.minimise(outputs["actor_loss"], "actor")
        if slopes:
            outputs["action_gradient"] = slopes[0]
        self._update_targets()
        return outputs

    @th.no_grad()
    def _target(self, batch: Transitions) -> th.Tensor:
        th.empty_like(batch.actions).normal_()  # SB3's DDPG is a TD3 that draws smoothing noise and bounds it by 0
        next_actions = self.actor_target(batch.next_observations)
        next_q = th.cat(self.critic_target(batch.next_observations, next_actions), dim=1).amin(dim=1, keepdim=True)
        return td_target(batch.rewards, batch.dones, batch.discounts, next_q)

    def _update_targets(self) -> None:
        self._engine.follow("critic", self.tau)
        self._engine.follow("actor", self.tau)
        polyak_update(self.critic_batch_norm_stats, self.critic_batch_norm_stats_target, 1.0)
        polyak_update(self.actor_batch_norm_stats, self.actor_batch_norm_stats_target, 1.0)

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.num_timesteps < learning_starts and self.warmup == "uniform":
            return super()._sample_action(learning_starts, action_noise, n_envs)
        assert self._last_obs is not None
        if self.parameter_noise != self._parameter_noise_spec:
            self._start_parameter_noise()
        greedy = self.policy.scale_action(self.predict(self._last_obs)[0])
        noise = self._scaled_noise(action_noise)
        actions = greedy if self._parameter_noise is None else self._act_perturbed().reshape(greedy.shape)
        actions = actions if noise is None else np.clip(actions + noise(), -1, 1)
        self.logger.record_mean("train/exploration_share", np.abs(actions - greedy).mean() / 2)
        return self.policy.unscale_action(actions), actions

    def _act_perturbed(self) -> np.ndarray:
        assert self._last_obs is not None and self._last_episode_starts is not None and self._parameter_noise_std is not None
        observations, _ = self.policy.obs_to_tensor(self._last_obs)
        actions = self._perturbed.act(self.actor, observations, self._last_episode_starts, self._parameter_noise_std)
        if not np.isfinite(actions).all():
            raise NonFiniteError(
                f"{type(self).__name__}: actions became non-finite with parameter_noise={self.parameter_noise!r}, whose std "
                f"is {self._parameter_noise_std} by now; make it or its coefficient smaller"
            )
        return actions

    def _store_transition(
        self, replay_buffer: Any, buffer_action: Any, new_obs: Any, reward: Any, dones: Any, infos: Any
    ) -> None:
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        self._last_episode_starts = dones

    def _on_step(self) -> None:
        super()._on_step()
        noise, std = self._parameter_noise, self._parameter_noise_std
        if noise is None or std is None or self.num_timesteps <= self.learning_starts:
            return
        if self._noise_steps % noise.interval < self.n_envs:  # the step has reached another multiple of the interval
            distance = action_distance(self.actor, self._sample(self.batch_size).observations, std)
            self._parameter_noise_std = noise.adapted(std, distance)
            self.logger.record("train/parameter_noise_std", self._parameter_noise_std)
            self.logger.record_mean("train/parameter_noise_distance", distance)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_parameter_noise", "_parameter_noise_spec", "_perturbed"]
