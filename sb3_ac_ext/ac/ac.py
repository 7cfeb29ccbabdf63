"""
Actor-critic that learns from every step as it is taken (Sutton and Barto 2018, section 13.5), in one or more environments.

    I = 1 at the start of an episode
    a ~ pi(.|s), or mu(s); take it: r, s'
    V critic:      y = r + gamma V(s'), y = r where the episode terminated                (one-step actor-critic)
                   w     <- w     + alpha_w (y - V(s)) grad V(s)
                   theta <- theta + alpha_theta I (y - V(s)) grad log pi(a|s)
    Q critic:      a' ~ pi(.|s'); y = r + gamma Q(s', a')                                  (Sarsa)
                   w     <- w     + alpha_w (y - Q(s, a)) grad Q(s, a)
                   theta <- theta + alpha_theta I Q(s, a) grad log pi(a|s)
    deterministic: theta <- theta + alpha_theta I grad mu(s) grad_a Q(s, a) at a = mu(s)   (Silver et al. 2014, eq. 11 to 13)
    I <- gamma I, if asked for; with traces z <- gamma lambda z + grad in place of grad    (section 13.6)
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule

from sb3_ac_ext.ac.policies import DeterministicMlpPolicy, QMlpPolicy, fitting_policy
from sb3_ac_ext.ac.step import Step, replaced
from sb3_ac_ext.ac.traces import Traces, along, follow, traces_of
from sb3_ac_ext.base.arguments import check_bounded_actions, check_policy_class
from sb3_ac_ext.base.environment_checks import check_finite
from sb3_ac_ext.base.on_policy import truncated
from sb3_ac_ext.base.online import ROLLOUT, OnlineMixin
from sb3_ac_ext.base.schedules import Rate
from sb3_ac_ext.engine import Network
from sb3_ac_ext.networks.actor_critic import SEPARATE_POLICIES, separate_optimizers
from sb3_ac_ext.signatures import passed_on
from sb3_ac_ext.validation import Acts, ArgumentError, Needs, NonNegative, UnitInterval, UnsupportedError


class AC(OnlineMixin, OnPolicyAlgorithm):
    """
    One-step actor-critic: an update on each step of the environments, from that step alone.

    Of several environments the mean of their gradients is taken. Actor and critic are updated from the same derivatives, those
    before the step; a truncated episode bootstraps at its last observation. With plain SGD and critic "v" it is SB3's A2C with
    ``n_steps=1`` and ``vf_coef=0.5``, which is the critic's textbook update.

    Learning rates, the log and the check for non-finite numbers come every 500 steps of each environment. That is a rollout to
    callbacks and gSDE, and where Sarsa draws a' anew.

    Differences from the book: Adam by default (the book's SGD is ``policy_kwargs=dict(optimizer_class=torch.optim.SGD)``), and
    I is left out. From Silver et al.: mu is squashed to the actions' range, actor and critic are any networks, and actions may
    have noise, which the critic then learns the value of.

    :param actor_learning_rate: rate of the actor instead of ``learning_rate``
    :param critic_learning_rate: rate of the critic instead of ``learning_rate``
    :param critic: "v", V(s) whose error is the actor's advantage; "q", Q(s, a) learned by Sarsa
    :param deterministic_policy: whether the actor is mu(s), which needs a Box of actions
    :param exploration_std: std of what is then added to mu(s) in training, in actions scaled to [-1, 1]
    :param gamma_t_weight: whether the actor's steps are weighted by I, as the gradient of the discounted return has it
    :param actor_trace_lambda: lambda of the actor's eligibility traces; 0 for none
    :param critic_trace_lambda: lambda of the critic's
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction
    :raises UnsupportedError: for a deterministic policy without a Box of actions with finite bounds
    """

    sb3_class = OnPolicyAlgorithm
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = SEPARATE_POLICIES
    policy: DeterministicMlpPolicy  # or one that it is derived from, as the arguments ask for

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 7e-4,
        *,
        gamma: float = 0.99,
        ent_coef: float = 0.0,
        max_grad_norm: float | dict[str, float] | None = None,
        use_sde: bool = False,
        sde_sample_freq: int = -1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        actor_learning_rate: Rate | None = None,
        critic_learning_rate: Rate | None = None,
        critic: Annotated[Literal["v", "q"], Acts.NEVER] = "v",
        deterministic_policy: Annotated[bool, Acts.NEVER, Needs("critic", "q")] = False,
        exploration_std: Annotated[NonNegative, Acts.STEP, Needs("deterministic_policy", True)] = 0.0,
        gamma_t_weight: bool = False,
        actor_trace_lambda: Annotated[UnitInterval, Needs("critic", "v")] = 0.0,
        critic_trace_lambda: Annotated[UnitInterval, Needs("deterministic_policy", False)] = 0.0,
        engine: bool = True,
        _init_setup_model: bool = True,
    ) -> None:
        super().__init__(
            **passed_on(AC, locals()),
            n_steps=ROLLOUT,
            gae_lambda=0.0,  # one step
            vf_coef=0.5,  # the critic's update is the error times the gradient
            _init_setup_model=False,
        )
        self.actor_learning_rate = actor_learning_rate
        self.critic_learning_rate = critic_learning_rate
        self.critic = critic
        self.deterministic_policy = deterministic_policy
        self.exploration_std = exploration_std
        self.gamma_t_weight = gamma_t_weight
        self.actor_trace_lambda = actor_trace_lambda
        self.critic_trace_lambda = critic_trace_lambda
        if _init_setup_model:
            self._setup_model()

    def _check_policy_class(self) -> None:
        if not issubclass(self.policy_class, QMlpPolicy):  # which is no alias
            super()._check_policy_class()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        self.policy_class = fitting_policy(self.policy_class, self.critic, self.deterministic_policy)
        if self.deterministic_policy:
            self._check_deterministic()
        check_policy_class(self, ActorCriticPolicy)
        given = self.policy_class
        made_for = issubclass(given, QMlpPolicy), issubclass(given, DeterministicMlpPolicy)
        if made_for != (self.critic == "q", self.deterministic_policy):
            raise ArgumentError(
                f"critic and deterministic_policy must be what the policy was made for, got {self.critic!r} and "
                f"{self.deterministic_policy} with {given}"
            )

    def _check_deterministic(self) -> None:
        if not isinstance(self.action_space, spaces.Box):
            raise UnsupportedError(f"deterministic_policy=True needs a Box of actions, got {self.action_space}")
        check_bounded_actions(self.action_space)
        for name in ("ent_coef", "use_sde"):
            if getattr(self, name):
                raise ArgumentError(
                    f"{name} needs a stochastic policy, got {getattr(self, name)!r} with deterministic_policy=True"
                )

    def _make_optimizers(self) -> None:
        separate_optimizers(self.policy, self.lr_schedule(1), "AC")
        self._weights = np.ones(self.n_envs, dtype=np.float32)  # I
        self._traces: dict[str, Traces] = {}

    def _networks(self) -> Mapping[str, Network]:
        policy: Any = self.policy
        return {
            "actor": self._network("actor", policy, policy.optimizer, rate=self.actor_learning_rate),
            "critic": self._network("critic", policy, policy.value_optimizer, rate=self.critic_learning_rate),
        }

    # Steps

    def _forward(self, obs: Any) -> tuple[np.ndarray, th.Tensor, th.Tensor]:
        actions, values, log_prob = super()._forward(obs)
        return self._explored(th.as_tensor(actions)).numpy(), values, log_prob

    def _learn_from(self, seen: tuple[Any, ...], infos: list[dict[str, Any]], act: bool) -> np.ndarray | None:
        step = self._as_step(seen, infos)
        self._n_updates += 1
        self._engine.begin()
        self._set_traces()
        act = act or self.critic == "q"
        outputs = self._run(self._update, step, act)
        if not act:
            return None
        next_actions: np.ndarray = outputs["next_actions"].cpu().numpy()
        ended = seen[-1]
        if self.critic == "q" and ended.any():  # a' is not what the next episode begins with
            next_actions[ended] = self._forward(step.new_observations)[0][ended]
        return next_actions

    def _as_step(self, seen: tuple[Any, ...], infos: list[dict[str, Any]]) -> Step:
        obs, starts, actions, rewards, new_obs, dones = seen
        ones = np.ones(self.n_envs, dtype=np.float32)
        self._weights = np.where(starts, ones, np.float32(self.gamma) * self._weights) if self.gamma_t_weight else ones
        last, continues = new_obs, ones
        if dones.any():
            cut = dict(truncated(dones, infos))
            self._check_last(cut)
            last, continues = replaced(new_obs, cut), (~dones).astype(np.float32)
            continues[list(cut)] = 1
        if not isinstance(self.action_space, spaces.Discrete):
            actions = actions.reshape(self.n_envs, -1)
        return Step(obs, actions, rewards.astype(np.float32), last, continues, starts, self._weights, new_obs)

    def _check_last(self, observations: Mapping[int, Any]) -> None:
        """Name the environment whose last observation of an episode makes numbers that are not finite."""
        for i, observation in observations.items():
            obs = self.policy.obs_to_tensor(observation)[0]
            with th.no_grad():
                found: Any = self.policy.extract_features(obs)  # type: ignore[arg-type]  # SB3 leaves dicts out
            if not all(part.isfinite().all() for part in (found if isinstance(found, tuple) else (found,))):
                check_finite("last observation of an episode", observation, np.full(len(np.shape(observation)) + 1, i))

    def _set_traces(self) -> None:
        """As many as are asked for now."""
        for name, decay in (("actor", self.actor_trace_lambda), ("critic", self.critic_trace_lambda)):
            if decay:
                parameters = self._engine.networks[name].parameters
                self._traces[name] = traces_of(parameters, self.n_envs, self._traces.get(name))
            else:
                self._traces.pop(name, None)

    # Updates

    def _update(self, step: Step, act: bool) -> dict[str, th.Tensor]:
        outputs = {}
        with th.no_grad():
            if self.critic == "v":
                next_values = self.policy.predict_values(step.next_observations)
            else:
                outputs["next_actions"] = self._sampled(step.next_observations)  # a'
                next_values = self.policy.action_values(step.next_observations, outputs["next_actions"])
            targets = step.rewards + step.continues * (self.gamma * next_values.flatten())  # y
        self.policy.set_training_mode(True)
        losses = self._deterministic_losses if self.deterministic_policy else self._losses
        actor_loss, critic_loss, logged = losses(step, targets)
        self.policy.set_training_mode(False)
        self._engine.minimise(actor_loss, "actor")
        self._engine.minimise(critic_loss, "critic")
        if act and self.critic == "v":
            with th.no_grad():
                outputs["next_actions"] = self._sampled(step.new_observations)
        return {**outputs, **logged}

    def _losses(self, step: Step, targets: th.Tensor) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        values, log_prob, entropy = self._evaluate(step)
        errors = targets - values
        advantages = (errors if self.critic == "v" else values).detach()
        actor_loss = -(step.weights * advantages * log_prob).mean()
        critic_loss = 0.5 * errors.square().mean()
        logged = {"actor_loss": actor_loss, "critic_loss": critic_loss, "entropy_loss": -entropy.mean()}
        if self.actor_trace_lambda:
            actor_loss = -self._along_traces("actor", step, step.weights * log_prob, advantages)
        if self.critic_trace_lambda:
            critic_loss = -self._along_traces("critic", step, values, errors.detach())
        if self.ent_coef:
            actor_loss = actor_loss + self.ent_coef * logged["entropy_loss"]
        return actor_loss, critic_loss, logged

    def _along_traces(self, name: str, step: Step, values: th.Tensor, weights: th.Tensor) -> th.Tensor:
        """What has the weighted traces of ``(N,)`` values for its gradient, in place of their weighted gradients."""
        traces, parameters = self._traces[name], self._engine.networks[name].parameters
        decay = self.gamma * (self.actor_trace_lambda if name == "actor" else self.critic_trace_lambda)
        follow(traces, parameters, values, decay * ~step.started)
        return along(traces, parameters, weights)

    def _deterministic_losses(self, step: Step, targets: th.Tensor) -> tuple[th.Tensor, th.Tensor, dict[str, th.Tensor]]:
        obs = step.observations
        best = self.policy.action_values(obs, self.policy.action(obs)).flatten()
        actor_loss = -(step.weights * best).mean()  # its gradient is that of Silver et al. (2014), eq. 13
        errors = targets - self.policy.action_values(obs, step.actions).flatten()
        critic_loss = 0.5 * errors.square().mean()
        return actor_loss, critic_loss, {"actor_loss": actor_loss, "critic_loss": critic_loss}

    def _sampled(self, obs: Any) -> th.Tensor:
        """``(N, ...)`` actions to be taken, as the distribution gives them."""
        actions, _, _ = self.policy(obs)
        return self._explored(actions)

    def _explored(self, actions: th.Tensor) -> th.Tensor:
        """With the noise of a deterministic policy."""
        if self.exploration_std:
            actions = (actions + self.exploration_std * th.randn_like(actions)).clamp(-1, 1)
        return actions

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_weights", "_traces"]
