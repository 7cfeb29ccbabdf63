"""
Off-policy actor-critic (Degris, White and Sutton 2012, "Off-Policy Actor-Critic", arXiv:1205.4839), and its deep descendants.

A behaviour b acts. For each gradient step of the deep variants:
    sample (s, a, r, s', d, log b(a|s))
    "is", critic V:   rho = min(rho_max, pi(a|s) / b(a|s));  y = r + gamma (1 - d) V_target(s');  A = y - V(s)
                      critic: descend mean 1/2 rho (y - V(s))^2
    "is", critic Q:   y = r + gamma (1 - d) E Q_target(s', a'), a' ~ pi(.|s');  A = Q(s, a) - E Q(s, a_pi), a_pi ~ pi(.|s)
                      critic: descend mean 1/2 (y - Q(s, a))^2
    "is":             actor: ascend mean rho A log pi(a|s) + ent_coef H(pi(.|s))
    "q":              y as with "is" and critic Q, and the same critic; no rho anywhere
                      actor: ascend mean J(s) + ent_coef H(pi(.|s)), where the gradient of J is one of
                          "exact":   that of sum_a pi(a|s) Q(s, a), with Q constant                       (Discrete)
                          "reparam": that of Q(s, a_pi) through a_pi = tanh(mu + sigma noise)             (Box)
                          "score":   mean over K draws of (Q(s, a_k) - baseline) grad log pi(a_k|s)       (both)
    target:           theta_target <- tau theta + (1 - tau) theta_target

``variant="degris"`` is in `sb3_ac_ext.opac.linear`.
"""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, PyTorchObs, Schedule
from stable_baselines3.common.utils import polyak_update

from sb3_ac_ext.base.arguments import check_environment
from sb3_ac_ext.base.environment_checks import check_finite
from sb3_ac_ext.base.noise import ExplorationNoise
from sb3_ac_ext.base.off_policy import critic_names
from sb3_ac_ext.base.schedules import Rate
from sb3_ac_ext.buffers.replay import Transitions
from sb3_ac_ext.engine import Network
from sb3_ac_ext.functional.importance import importance_ratio
from sb3_ac_ext.functional.losses import squared_error, td_errors, td_target
from sb3_ac_ext.functional.policy_gradients import (
    exact_policy_loss,
    leave_one_out,
    policy_value,
    score_function_loss,
    weighted_value_loss,
)
from sb3_ac_ext.opac.base import StochasticActorCritic
from sb3_ac_ext.opac.behaviour import Behaviour
from sb3_ac_ext.opac.buffer import LOG_PROB, BehaviourReplayBuffer, DictBehaviourReplayBuffer, StoresLogProbs
from sb3_ac_ext.opac.checks import check_choices, check_made_for
from sb3_ac_ext.opac.linear import Features, LinearPolicy
from sb3_ac_ext.opac.networks import ChoiceActor, Critic
from sb3_ac_ext.opac.online import OnlineMixin
from sb3_ac_ext.opac.policies import CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_ac_ext.signatures import passed_on
from sb3_ac_ext.validation import (
    Acts,
    ArgumentError,
    Needs,
    NonNegative,
    Positive,
    PositiveInt,
    UnitInterval,
    UnsupportedError,
)


class OPAC(OnlineMixin, StochasticActorCritic):
    """
    Actor-critic that learns about its policy pi from what another one, b, does.

    Three variants: "q" (the default, and the one to start with) asks a critic Q for the value of actions that pi would take
    now, so that it needs no probability of b; "is" learns from the actions of b alone, weighted by pi / b; "degris" is the
    paper's algorithm, linear in features, with gradient temporal differences and eligibility traces, from each step as it is
    taken.

    Convergence is not promised. The paper's policy improvement theorem has an erratum: it holds for tables only; and the state
    distribution is that of b (of the replay buffer), which is the objective of off-policy actor-critic and not the one of pi.

    Differences from the paper, "degris": of several environments the mean of their updates is taken, each with traces of its
    own; truncated episodes bootstrap at their last observation, which clears the traces as termination does. "is" and "q" are
    no algorithms of the paper: networks, Adam, replay, target networks, an entropy bonus, and two critics of which the smaller
    counts. See docs/opac.md.

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", "LinearPolicy" (which "MlpPolicy" is with "degris"), or a
        class derived from one of them, which have the arguments that ``policy_kwargs`` takes
    :param env: environment or its id, with Discrete actions, or a Box with finite bounds where the variant is not "degris"
    :param learning_rate: rate of all that has no rate of its own; "lin_x" falls linearly from x to 0 in a `learn()`
    :param actor_learning_rate: rate of the actor instead of ``learning_rate``; a_u of "degris"
    :param critic_learning_rate: rate of the critic instead of ``learning_rate``; a_v of "degris", for which 0.1 / (number of
        features that are 1 at a time) is usual
    :param correction_learning_rate: a_w, rate of GTD's second weights; None for 1e-4. With 0 the critic is TD(lambda)
    :param variant: "q", "is" or "degris", see above
    :param behaviour: b: "policy" is pi; "uniform"; "epsilon" is pi, and with probability ``epsilon`` uniform; "policy_noise"
        is pi with more noise before the tanh of Box actions
    :param epsilon: share of uniform actions
    :param behaviour_noise: std of the noise that "policy_noise" adds
    :param critic_type: "v" learns V(s), "q" learns Q(s, a)
    :param rho_max: bound on the weights pi / b, which makes them biased and their variance finite; None for none
    :param actor_gradient: "score", "exact" or "reparam"; None for "exact" with Discrete actions and "reparam" in a Box
    :param n_actor_samples: K, actions of "score" at each state
    :param baseline: what "score" subtracts from Q: the mean of the other draws, "v" for sum_a pi(a|s) Q(s, a) of Discrete
        actions, or nothing
    :param target: whether Q's target has the expectation over a' ("exact", of Discrete actions) or one draw; None for "exact"
        with Discrete actions and "sample" in a Box
    :param ent_coef: weight of the entropy in the actor's objective, reward units per nat
    :param target_update_interval: updates per target update, counted over the whole training
    :param features: x of "degris": "tile" (tile coding of a Box), "identity" (numbers as they are, Discrete observations
        one-hot), or a function from ``(N, ...)`` observations to ``(N, n)`` features, tensors
    :param trace_lambda: lambda of the traces of actor and critic
    :param actor_trace_gamma: whether gamma decays the actor's traces too, as in the paper; the author's program has lambda
        alone
    :param n_steps: rewards summed before bootstrapping, without correction for b; more than 1 only with "q"
    :param replay_buffer_class: class of the replay buffer; "q" takes any, "is" those of `sb3_ac_ext.opac.buffer`, which store
        log b(a|s); "degris" has none
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction
    :raises UnsupportedError: for spaces or a combination of arguments that the variant cannot take
    """

    sb3_class: ClassVar[type[BaseAlgorithm]] = OffPolicyAlgorithm
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
        "LinearPolicy": LinearPolicy,
    }
    automatic_buffers = (*OnlineMixin.automatic_buffers, BehaviourReplayBuffer, DictBehaviourReplayBuffer)
    choosing_buffers = OnlineMixin.choosing_buffers | {"variant"}

    def __init__(
        self,
        policy: str | type[BasePolicy],
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
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        device: th.device | str = "auto",
        seed: int | None = None,
        _init_setup_model: bool = True,
        *,
        variant: Annotated[Literal["q", "is", "degris"], Acts.NEVER] = "q",
        behaviour: Annotated[Behaviour, Acts.STEP] = "policy",
        epsilon: Annotated[UnitInterval, Acts.STEP, Needs("behaviour", "epsilon")] = 0.1,
        behaviour_noise: Annotated[NonNegative, Acts.STEP, Needs("behaviour", "policy_noise")] = 0.3,
        critic_type: Annotated[Literal["v", "q"], Acts.NEVER, Needs("variant", "is")] = "v",
        rho_max: Annotated[Positive | None, Needs("variant", "is")] = None,
        actor_gradient: Annotated[Literal["score", "exact", "reparam"] | None, Needs("variant", "q")] = None,
        n_actor_samples: Annotated[PositiveInt, Needs("actor_gradient", "score")] = 2,
        baseline: Annotated[Literal["leave-one-out", "v"] | None, Needs("actor_gradient", "score")] = "leave-one-out",
        target: Annotated[Literal["sample", "exact"] | None, Needs("variant", "q", "is")] = None,
        ent_coef: Annotated[NonNegative, Needs("variant", "q", "is")] = 0.01,
        target_update_interval: Annotated[PositiveInt, Needs("variant", "q", "is")] = 1,
        actor_learning_rate: Rate | None = None,
        critic_learning_rate: Rate | None = None,
        correction_learning_rate: Annotated[Rate | None, Needs("variant", "degris")] = None,
        features: Features = "tile",
        trace_lambda: Annotated[UnitInterval, Acts.STEP, Needs("variant", "degris")] = 0.4,
        actor_trace_gamma: Annotated[bool, Acts.STEP, Needs("variant", "degris")] = True,
        max_grad_norm: float | dict[str, float] | None = None,
        exploration_noise: ExplorationNoise | None = None,
        warmup: Literal["uniform", "noise"] = "uniform",
        engine: bool = True,
    ) -> None:
        super().__init__(**passed_on(OPAC, locals()))
        self.variant = variant
        self.behaviour = behaviour
        self.epsilon = epsilon
        self.behaviour_noise = behaviour_noise
        self.critic_type = critic_type
        self.rho_max = rho_max
        self.actor_gradient = actor_gradient
        self.n_actor_samples = n_actor_samples
        self.baseline = baseline
        self.target = target
        self.ent_coef = ent_coef
        self.target_update_interval = target_update_interval
        self.actor_learning_rate = actor_learning_rate
        self.critic_learning_rate = critic_learning_rate
        self.correction_learning_rate = correction_learning_rate
        self.features = features
        self.trace_lambda = trace_lambda
        self.actor_trace_gamma = actor_trace_gamma
        if _init_setup_model:
            self._setup_model()

    # What the model is made of

    def _check_policy_class(self) -> None:
        if self.variant == "degris" and self.policy_class is MlpPolicy:
            self.policy_class = LinearPolicy
        super()._check_policy_class()

    def _setup_model(self) -> None:
        made: dict[str, Any] = {}
        if self.variant == "degris":
            made = {"features": self.features}
        elif self.variant == "is" and self.critic_type == "v":
            made = {"critic_type": "v"}
        if made:
            self.policy_kwargs = {**self.policy_kwargs, **made}  # not in the caller's dict
        super()._setup_model()

    def _check_arguments(self) -> None:
        check_environment(self)
        check_made_for(self)
        super()._check_arguments()
        check_choices(self)

    def _networks(self) -> Mapping[str, Network]:
        if self.variant == "degris":
            return {}
        critic, actor = self.critic, self.actor
        return {
            "critic": self._network("critic", critic, critic.optimizer, self.critic_target, rate=self.critic_learning_rate),
            "actor": self._network("actor", actor, actor.optimizer, rate=self.actor_learning_rate),
        }

    # Experience

    def _automatic_buffer(self) -> type[ReplayBuffer]:
        if self.variant != "is":
            return super()._automatic_buffer()
        return DictBehaviourReplayBuffer if isinstance(self.observation_space, spaces.Dict) else BehaviourReplayBuffer

    def _check_buffer(self, buffer_class: type[ReplayBuffer]) -> None:
        if self.variant != "q" and self.n_steps > 1:
            raise UnsupportedError(f"n_steps must be 1 with variant={self.variant!r}, got {self.n_steps}")
        if self.variant == "degris" and buffer_class not in self.automatic_buffers:  # those stand in files
            raise ArgumentError(f"replay_buffer_class must be None with variant='degris', got {buffer_class}")
        if self.variant == "is" and not issubclass(buffer_class, StoresLogProbs):
            name = f"{StoresLogProbs.__module__}.StoresLogProbs"
            raise UnsupportedError(
                f"replay_buffer_class must be None or derived from {name} with variant='is', which needs log b(a|s), got "
                f"{buffer_class}"
            )
        super()._check_buffer(buffer_class)

    def _make_replay_buffer(self) -> ReplayBuffer:
        if self.variant == "degris":  # which keeps no more than the last step
            return ReplayBuffer(self.n_envs, self.observation_space, self.action_space, self.device, self.n_envs)
        return super()._make_replay_buffer()

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer.

        :param path: file name, or an open binary file
        :param truncate_last_traj: with HER, whether to close the episode that was running
        :raises ValueError: for a buffer without log b(a|s) where the variant is "is"
        """
        super().load_replay_buffer(path, truncate_last_traj)
        buffer = self._replay_buffer
        if self.variant == "is" and not isinstance(buffer, StoresLogProbs):
            self._replay_buffer = None
            raise ValueError(f"the replay buffer must store log b(a|s) for variant='is', got a {type(buffer).__name__}")

    def _needs_log_probs(self) -> bool:
        return self.variant != "q"

    def _acts_finitely(self, observations: Any) -> bool:
        """See `OffPolicyMixin._acts_finitely`; a choice is finite whatever it is made by."""
        actor = getattr(self.policy, "actor", None)
        if not isinstance(actor, ChoiceActor):
            return super()._acts_finitely(observations)
        with th.no_grad():
            return bool(actor(self.policy.obs_to_tensor(observations)[0]).isfinite().all())

    def _store_transition(
        self, replay_buffer: Any, buffer_action: Any, new_obs: Any, reward: Any, dones: Any, infos: Any
    ) -> None:
        if self.variant == "is":
            assert self._log_probs is not None
            infos = [{**info, LOG_PROB: value} for info, value in zip(infos, self._log_probs, strict=True)]
        if self.variant == "degris":  # whose features may have no index for others
            check_finite("observation", new_obs, np.arange(self.n_envs))
        obs = self._last_obs
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        if self.variant == "degris":
            self._learn_from(obs, buffer_action, new_obs, reward, dones, infos)
            self._last_episode_starts = np.array(dones, bool)

    # Updates

    def train(self, gradient_steps: int, batch_size: int = 64) -> None:
        """
        Updates of the deep variants; "degris" has learned from its steps already.

        :param gradient_steps: number of updates of critic and actor
        :param batch_size: transitions per update
        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        with self._updates() as engine:
            for _ in range(0 if self.variant == "degris" else gradient_steps):
                self._n_updates += 1
                batch = self._sample(batch_size)
                outputs = engine.run(self._update, batch, bool(self._n_updates % self.target_update_interval == 0))
                self._update_priorities(batch, outputs)

    def _update(self, batch: Transitions, targets_too: bool) -> dict[str, th.Tensor]:
        outputs = self._weighted_update(batch) if self.variant == "is" else self._fresh_update(batch)
        if targets_too:
            self._engine.follow("critic", self.tau)
            polyak_update(self.batch_norm_stats, self.batch_norm_stats_target, 1.0)
        return outputs

    def _weighted_update(self, batch: Transitions) -> dict[str, th.Tensor]:
        """Variant "is"."""
        obs, actions = batch.observations, batch.actions
        policy = self.actor(obs)
        log_prob = self.actor.log_prob(policy, actions)
        assert batch.log_probs is not None
        ratio = importance_ratio(log_prob, batch.log_probs, float("inf") if self.rho_max is None else self.rho_max)
        y = td_target(batch.rewards, batch.dones, batch.discounts, self._next_value(batch.next_observations))
        values = self.critic(obs, actions)
        if self.critic_type == "v":
            critic_loss = th.stack([weighted_value_loss(value, y, ratio) for value in values]).sum()
            advantages = y - _smallest(values)
        else:
            critic_loss = 0.5 * squared_error(values, y)
            advantages = _smallest(values) - self._value(self.critic, obs)
        self._engine.minimise(critic_loss, "critic")
        actor_loss, entropy = score_function_loss(log_prob, advantages, ratio), self.actor.entropy(policy).mean()
        self._engine.minimise(actor_loss - self.ent_coef * entropy, "actor")
        return {
            **{"critic_loss": critic_loss, "actor_loss": actor_loss, "entropy": entropy, "importance_ratio": ratio.mean()},
            **self._means_of_critics(values),
        }

    def _fresh_update(self, batch: Transitions) -> dict[str, th.Tensor]:
        """Variant "q"."""
        y = td_target(batch.rewards, batch.dones, batch.discounts, self._next_value(batch.next_observations))
        values = self.critic(batch.observations, batch.actions)
        critic_loss = 0.5 * squared_error(values, y, batch.weights)
        self._engine.minimise(critic_loss, "critic")
        policy = self.actor(batch.observations)
        actor_loss, entropy = self._actor_loss(batch.observations, policy), self.actor.entropy(policy).mean()
        self._engine.minimise(actor_loss - self.ent_coef * entropy, "actor")
        outputs = {"critic_loss": critic_loss, "actor_loss": actor_loss, "entropy": entropy, **self._means_of_critics(values)}
        return outputs if batch.weights is None else {**outputs, "td_errors": td_errors(values, y)}

    def _actor_loss(self, obs: PyTorchObs, policy: Any) -> th.Tensor:
        gradient = self.actor_gradient or ("exact" if self._discrete else "reparam")
        if gradient == "exact":
            return exact_policy_loss(policy, _smallest(self.critic(obs)))
        if gradient == "reparam":
            return -_smallest(self.critic(obs, self.actor.sample(policy)[0])).mean()
        actions = [self.actor.sample(policy)[0].detach() for _ in range(self.n_actor_samples)]
        log_prob = th.cat([self.actor.log_prob(policy, action) for action in actions], dim=1)  # (B, K)
        q = th.cat([_smallest(self.critic(obs, action)) for action in actions], dim=1).detach()
        return score_function_loss(log_prob, q - self._baseline(obs, policy, q))

    def _baseline(self, obs: PyTorchObs, policy: Any, q: th.Tensor) -> th.Tensor | float:
        if self.baseline is None:
            return 0.0
        return leave_one_out(q) if self.baseline == "leave-one-out" else policy_value(policy, _smallest(self.critic(obs)))

    @th.no_grad()
    def _next_value(self, obs: PyTorchObs) -> th.Tensor:
        """``(B, 1)`` of the target."""
        if self.critic_target.kind == "v":
            return _smallest(self.critic_target(obs))
        return self._value(self.critic_target, obs)

    @th.no_grad()
    def _value(self, critic: Critic, obs: PyTorchObs) -> th.Tensor:
        """``(B, 1)`` E Q(s, a), a ~ pi(.|s), or of one draw."""
        policy = self.actor(obs)
        if (self.target or ("exact" if self._discrete else "sample")) == "exact":
            return policy_value(policy, _smallest(critic(obs)))
        return _smallest(critic(obs, self.actor.sample(policy)[0]))

    @property
    def _discrete(self) -> bool:
        return isinstance(self.action_space, spaces.Discrete)

    def _means_of_critics(self, values: Sequence[th.Tensor]) -> dict[str, th.Tensor]:
        """What is logged of them; V as "v"."""
        means = zip(critic_names(len(values)), values, strict=True)
        return {self.critic.kind + name[1:]: value.detach().mean() for name, value in means}


def _smallest(values: Sequence[th.Tensor]) -> th.Tensor:
    """``(B, ...)`` the smallest of the critics."""
    return values[0] if len(values) == 1 else th.stack(tuple(values)).amin(dim=0)
