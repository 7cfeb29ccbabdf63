"""
Stein variational policy gradient (SVPG; Liu et al. 2017, arXiv:1704.02399): n policies that learn together and repel each
other.

    each iteration:
        each particle i collects a batch with its own policy in its own environments; A by its own critic
        g_i   = grad of J_i, the mean of A log pi_i(a|s), in particle i's actor parameters theta_i        (an ascent direction)
        k_ij  = exp(-||theta_i - theta_j||^2 / h)
        phi_i = 1/n sum_j [ k_ji (1/T g_j + grad log q0(theta_j)) + 2/h k_ji (theta_i - theta_j) ]       (algorithm 1)
        all actors at once: ascend phi_i by particle i's own optimizer
        critics: descend mean (V_i(s) - R)^2, each for itself
        T falls, from exploration to the best policies
"""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch as th
from annotated_types import Interval
from stable_baselines3 import A2C
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import obs_as_tensor

from sb3_ac_ext.base.arguments import check_policy_class
from sb3_ac_ext.base.episodes import EpisodesMixin
from sb3_ac_ext.base.schedules import Rate, as_schedule, check_default
from sb3_ac_ext.buffers.rollouts import Samples
from sb3_ac_ext.engine import Network
from sb3_ac_ext.functional import stein
from sb3_ac_ext.functional.surrogates import clipped_surrogate, kl_estimate, normalized, squared_error
from sb3_ac_ext.signatures import passed_on
from sb3_ac_ext.svpg.acting import ActingMixin
from sb3_ac_ext.svpg.arguments import Base, SVPGArguments, one_for_each
from sb3_ac_ext.svpg.batched import act, evaluate, values_of
from sb3_ac_ext.svpg.policies import Particles, actor_parameters, flat, slopes
from sb3_ac_ext.svpg.samples import ParticleSamples, normalized_parts, whose
from sb3_ac_ext.validation import Acts, ArgumentError, Needs, NonNegative, NonNegativeInt, Positive, PositiveInt, check


class SVPG(ActingMixin, EpisodesMixin, OnPolicyAlgorithm):
    """
    n particles, each a full actor-critic policy of SB3's, that share what they have learned and keep away from each other.

    A particle is pulled by the gradients of all, the more the nearer they are, and pushed away from those that are near. The
    temperature T says how much the task counts against that: with a large one the particles explore different policies, with a
    small one they go for the best of theirs. Kernels compare actors only; each critic learns for itself.

    ``base`` says what J is: "a2c" has one update per batch of ``n_steps`` by generalised advantages; "reinforce" whole
    episodes with the critic as baseline, see `Reinforce`; "ppo" several epochs of minibatches with clipped ratios, each of
    whose steps is a Stein step. One particle with ``temperature=1``, ``annealing="none"`` and the base's own
    ``normalize_advantage``, rates and optimizer is that algorithm.

    Steps count for all particles together: 100 000 steps of each of 4 are ``learn(400_000)``. `predict` acts by the particle
    with the largest mean return of its last ``stats_window_size`` training episodes (which ``Monitor`` measures); that is the
    best of several noisy numbers, so new episodes tell how good it is. ``predict(..., particle=2)`` asks another one,
    ``ensemble="vote"`` or ``"mean"`` all of them. ``model.policy.particles`` are the policies.

    Differences from the authors' program: the bandwidth is by default the median over pairs, not halved and without the
    diagonal's zeros; the prior, flat by default, is outside of 1/T; SB3's networks and critics instead of linear baselines;
    their extra evolution step between particles is left out.

    Logged: ``particles/best_return``, ``particles/mean_return``, ``particles/return_std``, of the particles' mean training
    returns; ``particles/best``, which one it is; ``train/distance``, mean ||theta_i - theta_j|| over pairs;
    ``train/bandwidth``, h; ``train/temperature``, T; losses as means over particles; each particle's gradient norm.

    :param normalize_advantage: whether each particle's advantages get mean 0 and standard deviation 1, which gives T its
        meaning: with advantages in reward units the same T is another algorithm
    :param n_particles: n
    :param base: the objective, "a2c", "reinforce" or "ppo"
    :param temperature: T, in units of J
    :param annealing: how T falls: "linear" by ``annealing_step`` after each iteration, "exponential" by ``annealing_factor``,
        both from iteration ``annealing_start`` on and not below ``temperature_min``; "tanh" divides it by tanh((slope
        x)^power), x being the share of the training that is over; "none" keeps it
    :param annealing_start: iterations before it begins to fall
    :param annealing_step: what is taken off after each iteration
    :param annealing_factor: what it is multiplied by after each iteration
    :param annealing_slope: slope of the tanh
    :param annealing_power: power in the tanh
    :param temperature_min: least temperature
    :param bandwidth: h of the kernel, in squared units of the parameters, or the rule that finds it: "offdiag", the median of
        the squared distances of pairs over log(n + 1); "liu", with the zeros of the diagonal; "author", half of that
    :param kernel: whether particles know of each other; without, each one ascends 1/T g_i for itself
    :param prior_precision: precision of a Gaussian prior around 0 of the actors' parameters, in nats per squared unit; 0 is a
        flat one
    :param batch_size: samples of each particle in a gradient step of "ppo"
    :param n_epochs: passes over a batch of "ppo"
    :param clip_range: largest change of a ratio that counts in "ppo", or its schedule
    :param max_rollout_steps: most steps of each environment in a batch of "reinforce", see `Reinforce`
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction, and if ``n_envs`` is no multiple of ``n_particles``
    :raises UnsupportedError: for spaces that SB3's A2C cannot take, and gSDE
    """

    sb3_class = OnPolicyAlgorithm
    declarations = SVPGArguments
    policy: Particles  # type: ignore[assignment]  # see ActingMixin
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = A2C.policy_aliases

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 1e-3,
        n_steps: int = 64,
        gamma: float = 0.99,
        gae_lambda: float = 1.0,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float | dict[str, float] | None = 0.5,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        normalize_advantage: bool = True,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
        *,
        n_particles: Annotated[PositiveInt, Acts.NEVER] = 4,
        base: Annotated[Base, Acts.NEVER] = "a2c",
        temperature: Positive = 10.0,
        annealing: Literal["none", "linear", "exponential", "tanh"] = "linear",
        annealing_start: Annotated[NonNegativeInt, Needs("annealing", "linear", "exponential")] = 500,
        annealing_step: Annotated[NonNegative, Needs("annealing", "linear")] = 0.02,
        annealing_factor: Annotated[float, Interval(ge=1e-6, le=1), Needs("annealing", "exponential")] = 0.99,
        annealing_slope: Annotated[Positive, Needs("annealing", "tanh")] = 5.0,
        annealing_power: Annotated[Positive, Needs("annealing", "tanh")] = 1.0,
        temperature_min: Annotated[Positive, Needs("annealing", "linear", "exponential")] = 0.01,
        bandwidth: Annotated[stein.BandwidthRule | Positive, Needs("kernel", True)] = "offdiag",
        kernel: bool = True,
        prior_precision: NonNegative = 0.0,
        batch_size: Annotated[PositiveInt, Needs("base", "ppo")] = 64,
        n_epochs: Annotated[PositiveInt, Needs("base", "ppo")] = 10,
        clip_range: Rate = 0.2,
        rollout_episodes: int = 16,
        max_rollout_steps: Annotated[PositiveInt | None, Acts.ROLLOUT, Needs("base", "reinforce")] = None,
        engine: bool = True,
    ) -> None:
        check("n_particles", n_particles, PositiveInt)
        check("base", base, Base)
        if isinstance(env, str):
            env = one_for_each(env, n_particles)
        super().__init__(**passed_on(SVPG, locals()), use_sde=False, sde_sample_freq=-1, _init_setup_model=False)
        self.normalize_advantage = normalize_advantage
        self.n_particles = n_particles
        self.base = base
        self.temperature = temperature
        self.annealing = annealing
        self.annealing_start = annealing_start
        self.annealing_step = annealing_step
        self.annealing_factor = annealing_factor
        self.annealing_slope = annealing_slope
        self.annealing_power = annealing_power
        self.temperature_min = temperature_min
        self.bandwidth = bandwidth
        self.kernel = kernel
        self.prior_precision = prior_precision
        self.batch_size = batch_size
        self.n_epochs = n_epochs
        self.clip_range = clip_range
        self.max_rollout_steps = max_rollout_steps
        self._iterations = 0
        self._returns: list[deque[float]] = []
        if _init_setup_model:
            self._check_shares()
            self._setup_model()
            if base != "ppo":  # only here, as in `PPOX`
                check_default("clip_range", clip_range, 0.2, f'base="ppo", got base={base!r}')

    def _check_arguments(self) -> None:
        by_episodes = self.base == "reinforce"  # also where a file's base is changed by `load`
        self.rollout, self.drop_unfinished_episodes = ("episodes" if by_episodes else "steps"), by_episodes
        super()._check_arguments()
        check_policy_class(self, ActorCriticPolicy)
        if (self.policy_kwargs or {}).get("use_sde", False):
            raise ArgumentError("policy_kwargs['use_sde'] must be False, as gSDE's noise is of one policy, got True")
        if self.annealing in ("linear", "exponential") and self.temperature < self.temperature_min:
            raise ArgumentError(
                f"temperature_min must be at most temperature={self.temperature}, which falls to it, got "
                f"{self.temperature_min}"
            )
        self.clip_range = as_schedule("clip_range", self.clip_range)

    def _check_shares(self) -> None:
        if self.env is not None and self.n_envs % self.n_particles:
            raise ArgumentError(
                f"n_envs must be a multiple of n_particles={self.n_particles}, each of which has environments of its own, got "
                f"{self.n_envs}: give an id, or several as by make_vec_env(..., n_envs={self.n_particles})"
            )

    def _make_optimizers(self) -> None:
        """The other particles, each with its own optimizer; the first one is what SB3 has made."""
        arguments = (self.observation_space, self.action_space, self.lr_schedule)
        others = [self.policy_class(*arguments, use_sde=False, **self.policy_kwargs) for _ in range(self.n_particles - 1)]
        self.policy = Particles([self.policy, *others]).to(self.device)  # type: ignore[list-item]  # until here it is one

    def _networks(self) -> Mapping[str, Network]:
        named = {f"particle_{i}": particle for i, particle in enumerate(self.policy.particles)}
        return {name: self._network(name, particle, particle.optimizer) for name, particle in named.items()}

    # Rollouts

    @property
    def _envs_each(self) -> int:
        return self.n_envs // self.n_particles

    @property
    def _share(self) -> int:
        return -(-int(self.rollout_episodes) // self._envs_each)

    @property
    def _policies(self) -> Any:
        return self.policy.particles

    def _policy_of(self, env: int) -> ActorCriticPolicy:
        return self.policy.particles[env // self._envs_each]

    def _step_of_policy(self, obs: Any) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        return act(self.policy.particles, obs)

    @th.no_grad()
    def _values(self, obs: Any) -> th.Tensor:
        return values_of(self.policy.particles, obs_as_tensor(obs, self.device))

    def _setup_learn(
        self, total_timesteps: int, callback: Any = None, reset_num_timesteps: bool = True, *args: Any, **kwargs: Any
    ) -> tuple[int, BaseCallback]:
        self._check_shares()
        if reset_num_timesteps or len(self._returns) != self.n_particles:
            self._returns = [deque(maxlen=int(self._stats_window_size)) for _ in range(self.n_particles)]
        return super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        super()._update_info_buffer(infos, dones)
        for env, info in enumerate(infos):
            if (episode := info.get("episode")) is not None:
                self._returns[env // self._envs_each].append(float(episode["r"]))

    # Updates

    def train(self) -> None:
        """
        The updates of an iteration: one on all that was collected, or the epochs of "ppo".

        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        temperature = self.current_temperature()
        self.clip_range = as_schedule("clip_range", self.clip_range)
        with self._updates():
            samples = self._samples()
            for _ in range(self.n_epochs if self.base == "ppo" else 1):
                for batch in self._batches(samples, temperature):
                    self._run(self._update, batch)
                self._n_updates += 1
        self._iterations += 1
        self.logger.record("train/temperature", temperature)
        self._record_particles()

    def current_temperature(self) -> float:
        """T of the next iteration."""
        annealed = max(0, self._iterations - int(self.annealing_start))
        if self.annealing == "linear":
            return stein.linear_annealing(self.temperature, annealed, self.annealing_step, self.temperature_min)
        if self.annealing == "exponential":
            return stein.exponential_annealing(self.temperature, annealed, self.annealing_factor, self.temperature_min)
        if self.annealing == "tanh":
            progress = 1 - self._current_progress_remaining
            weight = stein.tanh_weight(progress, self.annealing_slope, self.annealing_power)
            return self.temperature / weight if weight > 0 else np.inf
        return float(self.temperature)

    def _batches(self, samples: Samples, temperature: float) -> Iterator[ParticleSamples]:
        """The rollout in random order, as SB3's buffers give it; episodes as they are."""
        rows, weights = whose(self._kept, self._rollout_length, self.n_envs, self.n_particles)
        size = step = rows.shape[1]
        order = np.arange(size)
        if not self._whole_episodes:
            order = np.random.permutation(size)  # noqa: NPY002 (SB3 draws from the global one)
        if self.base == "ppo":
            step = int(self.batch_size)
        for start in range(0, size, step):
            columns = order[start : start + step]
            yield self._batch(samples, rows[:, columns], weights if weights is None else weights[:, columns], temperature)

    def _batch(self, samples: Samples, rows: np.ndarray, weights: np.ndarray | None, temperature: float) -> ParticleSamples:
        part = samples.at(th.from_numpy(rows.flatten()).to(samples.advantages.device))
        columns = part.log_probs, part.advantages, part.returns
        log_probs, advantages, returns = (column.view(rows.shape) for column in columns)
        there = None if weights is None else th.from_numpy(weights).to(advantages)
        if self.normalize_advantage:
            advantages = normalized(advantages) if weights is None else normalized_parts(advantages, weights.sum(axis=1))
        clip_range = self.clip_range(self._current_progress_remaining) if self.base == "ppo" else None  # type: ignore[operator]  # a schedule
        numbers = (
            None if x is None else th.as_tensor(x, dtype=th.float64, device=self.device) for x in (temperature, clip_range)
        )
        return ParticleSamples(part.observations, part.actions, log_probs, advantages, returns, there, *numbers)  # type: ignore[arg-type]  # T is there

    def _update(self, batch: ParticleSamples) -> dict[str, th.Tensor]:
        names, actors = tuple(self._engine.networks), actor_parameters(self.policy.particles)
        values, log_prob, entropy = evaluate(self.policy.particles, batch)  # (n, B)
        policy_loss, entropy_loss = -batch.mean(self._objective(batch, log_prob)), -batch.mean(entropy)
        value_loss = batch.mean(squared_error(values, batch.returns))
        objectives = policy_loss + self.ent_coef * entropy_loss  # -J
        phi, measures = self._direction(theta := flat(actors), -slopes(objectives.sum(), actors), batch.temperature)
        # in the actors its gradient is -phi
        self._engine.minimise(self.vf_coef * value_loss.sum() - (theta * phi).sum(), *names)
        if batch.clip_range is not None:
            measures["approx_kl"] = kl_estimate((log_prob - batch.log_probs).detach(), "k3")
        losses = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy_loss": entropy_loss}
        return {**{name: loss.detach().mean() for name, loss in losses.items()}, **measures}

    def _objective(self, batch: ParticleSamples, log_prob: th.Tensor) -> th.Tensor:
        """``(n, B)`` whose mean is J without the entropy."""
        if batch.clip_range is not None:
            return clipped_surrogate(log_prob - batch.log_probs, batch.advantages, batch.clip_range)
        return batch.advantages * log_prob

    @th.no_grad()
    def _direction(
        self, theta: th.Tensor, gradients: th.Tensor, temperature: th.Tensor
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """``(n, d)`` phi for ``(n, d)`` actors and gradients of J, and what is logged of it."""
        prior = -self.prior_precision * theta if self.prior_precision else None
        if len(theta) == 1 or not self.kernel:
            return stein.driving_force(theta, gradients, temperature, prior), {}
        distances = stein.squared_distances(theta)
        rule = self.bandwidth
        h = stein.median_bandwidth(distances, rule) if isinstance(rule, str) else distances.new_full((), float(rule))
        pairs = len(theta) * (len(theta) - 1)
        measures = {"bandwidth": h.clone(), "distance": distances.sqrt().sum() / pairs}
        return stein.phi(theta, gradients, temperature, h, prior, distances), measures

    def _record_particles(self) -> None:
        """The best particle so far, and how good all are."""
        means = np.array([np.mean(returns) if returns else -np.inf for returns in self._returns])
        known = means[np.isfinite(means)]
        if len(known) == 0:
            return
        self.policy.best.fill_(int(means.argmax()))
        self.logger.record("particles/best", int(means.argmax()))
        self.logger.record("particles/best_return", known.max())
        self.logger.record("particles/mean_return", known.mean())
        self.logger.record("particles/return_std", known.std())

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", *(f"policy.particles.{i}.optimizer" for i in range(self.n_particles))], []
