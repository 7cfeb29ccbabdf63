"""
D4PG (Barth-Maron et al. 2018, "Distributed Distributional Deterministic Policy Gradients", arXiv:1804.08617).

    for i in 1 .. gradient_steps:                                                     (Algorithm 1)
        sample (s, a, R, s', D) with importance weights w:  R = sum_k gamma^k r_k over m <= n steps, s' the state after
            them, D = gamma^m, or 0 if the episode has terminated
        Y  = R + D Z_target(s', mu_target(s'))                                        (a distribution)
        critic: descend mean w d(Y, Z(s, a))                                          d: cross-entropy of Y's projection, or
            the negative log-likelihood of samples of Y
        actor: ascend mean E Z(s, mu(s))
        priorities: d(Y, Z(s, a))
        every target_update_interval updates:
            targets: theta_target <- tau theta + (1 - tau) theta_target
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from annotated_types import Interval
from gymnasium import spaces
from stable_baselines3 import DDPG
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule
from stable_baselines3.common.utils import polyak_update
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer
from stable_baselines3.td3.policies import TD3Policy

from sb3_ac_ext.actors.off_policy import OffPolicyActorsMixin
from sb3_ac_ext.base.arguments import check_float_actions, check_policy_class
from sb3_ac_ext.base.environment_checks import check_finite
from sb3_ac_ext.base.noise import ExplorationNoise
from sb3_ac_ext.base.schedules import Rate
from sb3_ac_ext.buffers.prioritized import PrioritizedDictReplayBuffer, PrioritizedReplayBuffer
from sb3_ac_ext.buffers.replay import Transitions
from sb3_ac_ext.d4pg.arguments import N_STEPS, READ_FIRST, D4PGArguments
from sb3_ac_ext.d4pg.networks import CategoricalCritic, DistributionalCritic, MixtureCritic
from sb3_ac_ext.d4pg.policies import N_ATOMS, CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_ac_ext.d4pg.value_range import CLIPPED_UPDATES, MOST_CLIPPED, Return, automatic_range, check_range, least_width
from sb3_ac_ext.engine import Network
from sb3_ac_ext.functional.categorical import (
    clipped_to_norm,
    cross_entropy,
    entropy,
    mixture_loss,
    mixture_samples,
    projection,
)
from sb3_ac_ext.functional.gumbel import gumbel_noise
from sb3_ac_ext.functional.losses import td_target
from sb3_ac_ext.signatures import check_given, passed_on
from sb3_ac_ext.validation import Acts, ArgumentError, Needs, Positive, PositiveInt


class Errors(NamedTuple):
    """What the critic's update gives."""

    losses: th.Tensor
    """``(B, 1)`` d(Y, Z(s, a)), with gradient."""
    priorities: th.Tensor
    """``(B, 1)`` >= 0, without gradient."""
    logged: dict[str, th.Tensor]
    """Whose means are logged."""


class D4PG(OffPolicyActorsMixin, DDPG):
    """
    DDPG with a critic that gives the distribution of the return, n-step returns and prioritised replay.

    Differences from the paper: all actors take as many steps as each other between updates, and by default there is only one,
    with any number of environments; the critic steps before the actor's gradient
    is taken, as in SB3's DDPG; truncated episodes bootstrap at their last observation, after fewer than n steps; SB3's
    layers of 400 and 300. Defaults are those of DeepMind's Acme, except that there is one update per environment step
    instead of one per eight, that replay is prioritised, and that there is no noise unless it is asked for, as with SB3: Acme
    has ``exploration_noise={"type": "normal", "start": 0.3}``. The actor's loss has no importance weights.

    Logged: ``train/q``, mean Q(s, a); ``train/v_min``, ``train/v_max``; ``train/edge_mass``, the mean probability that Z(s, a)
    puts on its first and last atom; ``train/clipped_mass``, the mean probability of Y that lies beyond them and is put on
    them: above 5 % a warning says that the range of values is too narrow.

    :param learning_rate: rate of all that has no rate of its own; "lin_x" falls linearly from x to 0 in a `learn()`
    :param tau: share of the online network that a target network takes over per target update; 1 copies it
    :param replay_buffer_class: class of the replay buffer; None chooses by ``prioritized``, observation space and ``n_steps``
    :param actor_learning_rate: rate of the actor instead of ``learning_rate``
    :param critic_learning_rate: rate of the critic instead of ``learning_rate``
    :param distribution: "categorical", probabilities of fixed atoms, or "mixture", of Gaussians;
        `sb3_ac_ext.d4pg.policies.MlpPolicy` has the numbers of both, for ``policy_kwargs``
    :param v_min: the smallest return that the atoms stand for, in reward units (of what is learned from, so after
        ``VecNormalize``); "auto" derives it from gamma and the rewards before the first update, and keeps it
    :param v_max: the largest, likewise
    :param n_target_samples: samples of Y for each transition
    :param target_update_interval: updates per target update, counted over the whole training
    :param dqda_clipping: bound on the 2-norm of dQ/da of each transition in the actor's update; None for none
    :param prioritized: whether the replay buffer is a prioritised one where ``replay_buffer_class`` is None; its arguments are
        ``replay_buffer_kwargs={"alpha": 0.6, "beta_start": 0.4}``
    :param priority: what a categorical critic's priorities are: the cross-entropy, or less the entropy of Y ("kl"), which is 0
        where Z is right
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction
    :raises UnsupportedError: for spaces that D4PG cannot take
    """

    sb3_class = OffPolicyAlgorithm
    declarations = D4PGArguments
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: MlpPolicy
    critic: DistributionalCritic
    critic_target: DistributionalCritic
    automatic_buffers = (*OffPolicyActorsMixin.automatic_buffers, PrioritizedReplayBuffer, PrioritizedDictReplayBuffer)
    choosing_buffers = OffPolicyActorsMixin.choosing_buffers | {"prioritized"}
    _automatic_range: list[float] | None = None
    """v_min and v_max as they were derived, saved with the model."""
    _clipped = 0.0
    """Mean of ``train/clipped_mass`` over the last updates, counted from 0."""
    _warned_of_range = False

    def __init__(
        self,
        policy: str | type[TD3Policy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 1e-4,
        buffer_size: int = 1_000_000,
        learning_starts: int = 1000,
        batch_size: int = 256,
        tau: float = 1.0,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = 1,
        action_noise: ActionNoise | None = None,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: dict[str, Any] | None = None,
        optimize_memory_usage: bool = False,
        n_steps: int | None = None,
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
        distribution: Annotated[Literal["categorical", "mixture"], Acts.NEVER] = "categorical",
        v_min: Annotated[Return | Literal["auto"], Needs("distribution", "categorical")] = "auto",
        v_max: Annotated[Return | Literal["auto"], Needs("distribution", "categorical")] = "auto",
        n_target_samples: Annotated[int, Interval(ge=1, le=10_000), Needs("distribution", "mixture")] = 20,
        target_update_interval: PositiveInt = 100,
        dqda_clipping: Positive | None = None,
        prioritized: Annotated[bool, Acts.NEVER] = True,
        priority: Annotated[Literal["cross-entropy", "kl"], Needs("distribution", "categorical")] = "cross-entropy",
        max_grad_norm: float | dict[str, float] | None = 40.0,
        exploration_noise: ExplorationNoise | None = None,
        warmup: Literal["uniform", "noise"] = "uniform",
        actors: Literal["inline", "ray"] = "inline",
        n_actors: int = 1,
        max_policy_lag: int | None = None,
        ray_address: str | None = None,
        actor_resources: dict[str, float] | None = None,
        actor_env_fn: Callable[..., gym.Env[Any, Any]] | None = None,
        engine: bool = True,
    ) -> None:
        super().__init__(**passed_on(D4PG, locals()), _init_setup_model=False)
        self.actor_learning_rate = actor_learning_rate
        self.critic_learning_rate = critic_learning_rate
        self.distribution = distribution
        self.v_min = v_min
        self.v_max = v_max
        self.n_target_samples = n_target_samples
        self.target_update_interval = target_update_interval
        self.dqda_clipping = dqda_clipping
        self.prioritized = prioritized
        self.priority = priority
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self._choose_n_steps()
        if self.distribution != "categorical":
            self.policy_kwargs = {**self.policy_kwargs, "distribution": self.distribution}  # not in the caller's dict
        super()._setup_model()
        self._set_atoms()

    def _choose_n_steps(self) -> None:
        check_given(type(self), {name: getattr(self, name) for name in READ_FIRST})
        if self.n_steps is None:  # by `load` too
            self.n_steps = (self.replay_buffer_kwargs or {}).get("n_steps", N_STEPS if self._sums_rewards() else 1)

    def _check_arguments(self) -> None:
        self._choose_n_steps()
        check_policy_class(self, MlpPolicy)
        super()._check_arguments()
        check_float_actions(self.action_space)
        made = self.policy_kwargs.get("distribution", self.distribution)
        if made != self.distribution:
            raise ArgumentError(f"distribution must be what the policy was made with, {made!r}, got {self.distribution!r}")
        if "auto" not in (self.v_min, self.v_max):
            n_atoms = self.policy_kwargs.get("n_atoms", N_ATOMS)
            check_range(self.v_min, self.v_max, n_atoms)  # type: ignore[arg-type]  # numbers
        if "auto" in (self.v_min, self.v_max) and self.distribution == "categorical" and self.gamma == 1:
            raise ArgumentError(
                f'v_min="auto" and v_max="auto" need gamma < 1, got gamma={self.gamma}: give both as numbers, got '
                f"v_min={self.v_min!r} and v_max={self.v_max!r}"
            )

    def _networks(self) -> Mapping[str, Network]:
        critic, actor = self.critic, self.actor
        return {
            "critic": self._network("critic", critic, critic.optimizer, self.critic_target, rate=self.critic_learning_rate),
            "actor": self._network("actor", actor, actor.optimizer, self.actor_target, rate=self.actor_learning_rate),
        }

    @property
    def _acting(self) -> Any:
        """The actor network alone, unless the policy is one that acts in its own way."""
        return self.actor if type(self.policy)._predict is TD3Policy._predict else self.policy

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """
        Updates of Algorithm 1.

        :param gradient_steps: number of updates of critic and actor
        :param batch_size: transitions per update
        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        self._set_atoms()
        with self._updates() as engine:
            for _ in range(gradient_steps):
                self._n_updates += 1
                batch = self._sample(batch_size)
                outputs = engine.run(self._update, batch, bool(self._n_updates % self.target_update_interval == 0))
                self._update_priorities(batch, outputs)
        self._record_range(gradient_steps)

    def _update(self, batch: Transitions, targets_too: bool) -> dict[str, th.Tensor]:
        errors = self._categorical_errors(batch) if self.distribution == "categorical" else self._mixture_errors(batch)
        losses = errors.losses if batch.weights is None else batch.weights * errors.losses
        outputs = {name: values.mean() for name, values in errors.logged.items()}
        outputs["critic_loss"] = losses.mean()
        self._engine.minimise(outputs["critic_loss"], "critic")
        if batch.weights is not None:
            outputs["td_errors"] = errors.priorities
        outputs["actor_loss"] = self._improve_actor(batch.observations)
        if targets_too:
            self._update_targets()
        return outputs

    def _categorical_errors(self, batch: Transitions) -> Errors:
        target, clipped_mass = self._categorical_target(batch)
        logits = self.critic.outputs(batch.observations, batch.actions)
        losses = cross_entropy(logits, target)
        with th.no_grad():
            priorities = losses if self.priority == "cross-entropy" else (losses - entropy(target)).clamp(min=0)  # rounding
            probs = logits.softmax(dim=1)
            edge_mass = probs[:, 0] + probs[:, -1]
            logged = {"q": self.critic.mean(logits), "edge_mass": edge_mass, "clipped_mass": clipped_mass}
        return Errors(losses, priorities.detach(), logged)

    @th.no_grad()
    def _categorical_target(self, batch: Transitions) -> tuple[th.Tensor, th.Tensor]:
        """``(B, n_atoms)`` Y on the atoms, and ``(B,)`` the probability that was moved there from beyond them."""
        critic = self.critic_target
        assert isinstance(critic, CategoricalCritic)
        discounts = (1 - batch.dones) * batch.discounts  # D
        probs = critic.outputs(batch.next_observations, self.actor_target(batch.next_observations)).softmax(dim=1)
        probs = probs.type_as(batch.rewards)  # under autocast they are not
        returns = batch.rewards + discounts * critic.atoms  # (B, n_atoms)
        margin = (critic.atoms[1] - critic.atoms[0]) / 10  # more than rounding, where the range ends at r / (1 - gamma)
        beyond = (returns < critic.atoms[0] - margin) | (returns > critic.atoms[-1] + margin)
        return projection(probs, critic.atoms, batch.rewards, discounts), (beyond * probs).sum(dim=1)

    def _mixture_errors(self, batch: Transitions) -> Errors:
        returns = self._sampled_target(batch)
        critic = self.critic
        assert isinstance(critic, MixtureCritic)
        outputs = critic.outputs(batch.observations, batch.actions)
        losses = mixture_loss(*critic.components(outputs), returns)
        q = critic.mean(outputs).detach()
        # the logarithm of a density may have any sign
        return Errors(losses, (q - returns.mean(dim=1, keepdim=True)).abs(), {"q": q})

    @th.no_grad()
    def _sampled_target(self, batch: Transitions) -> th.Tensor:
        """``(B, n_target_samples)`` draws of Y."""
        critic = self.critic_target
        assert isinstance(critic, MixtureCritic)
        outputs = critic.outputs(batch.next_observations, self.actor_target(batch.next_observations))
        logits, means, stds = critic.components(outputs)
        choice_noise = gumbel_noise(logits[:, None].expand(-1, self.n_target_samples, -1))
        noise = choice_noise.new_empty(choice_noise.shape[:2]).normal_()
        samples = mixture_samples(logits, means, stds, choice_noise, noise)
        return td_target(batch.rewards, batch.dones, batch.discounts, samples)

    def _improve_actor(self, observations: PyTorchObs) -> th.Tensor:
        """One step of the actor; the loss."""
        actions = self.actor(observations)
        if self.dqda_clipping is None:
            loss = -self.critic.q1_forward(observations, actions).mean()
            self._engine.minimise(loss, "actor")
            return loss
        points = actions.detach().requires_grad_()
        q = self.critic.q1_forward(observations, points)
        (slopes,) = th.autograd.grad(q.sum(), points)  # (B, A) dQ/da
        self._engine.minimise(-(clipped_to_norm(slopes, self.dqda_clipping) * actions).sum(dim=1).mean(), "actor")
        return -q.detach().mean()

    def _update_targets(self) -> None:
        self._engine.follow("critic", self.tau)
        self._engine.follow("actor", self.tau)
        polyak_update(self.critic_batch_norm_stats, self.critic_batch_norm_stats_target, 1.0)
        polyak_update(self.actor_batch_norm_stats, self.actor_batch_norm_stats_target, 1.0)

    # The range of values

    @property
    def value_range(self) -> tuple[float, float] | None:
        """The first and the last atom, reward units; None as long as one is "auto" and there are no rewards yet."""
        if "auto" not in (self.v_min, self.v_max):
            return float(self.v_min), float(self.v_max)
        if self._automatic_range is None:
            return None
        low, high = self._automatic_range
        if self.v_min == self.v_max == "auto":
            return low, high
        # the automatic end makes room where the given one lies beyond it
        given = float(self.v_max if self.v_min == "auto" else self.v_min)
        width = max(high - low, 2 * least_width(given, given, self.policy.n_atoms))
        return (min(low, given - width), given) if self.v_min == "auto" else (given, max(high, given + width))

    def _set_atoms(self) -> None:
        if self.distribution != "categorical":
            return
        buffer = self._replay_buffer
        if self.value_range is None and buffer is not None and buffer.size() > 0:
            rewards = buffer.rewards[: buffer.size()]
            check_finite("reward", rewards, np.arange(buffer.n_envs), env_axis=1)
            if self._vec_normalize_env is not None:
                rewards = self._vec_normalize_env.normalize_reward(rewards)
            self._automatic_range = [*automatic_range(rewards, self.gamma)]
        if self.value_range is not None:
            check_range(*self.value_range, self.policy.n_atoms)  # they may have been set meanwhile
            for critic in (self.critic, self.critic_target):
                assert isinstance(critic, CategoricalCritic)
                critic.set_range(*self.value_range)

    def _record_range(self, gradient_steps: int) -> None:
        if self.value_range is None:
            return
        for name, value in zip(("v_min", "v_max"), self.value_range, strict=True):
            self.logger.record(f"train/{name}", value)
        share = min(gradient_steps / CLIPPED_UPDATES, 1)
        self._clipped += share * (self.logger.name_to_value.get("train/clipped_mass", 0.0) - self._clipped)
        if self._clipped > MOST_CLIPPED and not self._warned_of_range:
            self._warned_of_range = True
            v_min, v_max = self.value_range
            warnings.warn(
                f"{self._clipped:.0%} of the returns' probability lies outside of [v_min, v_max] = [{v_min:g}, {v_max:g}] and "
                "counts as these (train/clipped_mass): give a wider range",
                stacklevel=3,
            )

    # The replay buffer

    def _automatic_buffer(self) -> type[ReplayBuffer]:
        if not self.prioritized:
            return super()._automatic_buffer()
        return PrioritizedDictReplayBuffer if isinstance(self.observation_space, spaces.Dict) else PrioritizedReplayBuffer

    def _sums_rewards(self) -> bool:
        """Whether there can be n-step returns."""
        if self.optimize_memory_usage:
            return False
        if self.replay_buffer_class is not None:
            hindsight = issubclass(self.replay_buffer_class, HerReplayBuffer)
            return not hindsight and "n_steps" in self._shared_with(self.replay_buffer_class)
        return self.prioritized or not isinstance(getattr(self, "observation_space", None), spaces.Dict)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_clipped", "_warned_of_range"]
