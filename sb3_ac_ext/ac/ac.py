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

from typing import Any, ClassVar, Unpack

import numpy as np
import torch as th
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from torch.nn import functional as F

from sb3_ac_ext.ac.arguments import check_ac_arguments, fitting_policy
from sb3_ac_ext.ac.policies import DeterministicMlpPolicy
from sb3_ac_ext.ac.step import Step, replaced
from sb3_ac_ext.ac.traces import Traces
from sb3_ac_ext.base.typing import ActingKwargs, constructor_keys
from sb3_ac_ext.functional.losses import td_target
from sb3_ac_ext.legacy.actor_critic import SEPARATE_POLICIES, Evaluation, MlpPolicy
from sb3_ac_ext.legacy.descent import parameters_of
from sb3_ac_ext.legacy.on_policy import truncated
from sb3_ac_ext.legacy.online import ROLLOUT, OnlineMixin
from sb3_ac_ext.legacy.surrogates import policy_gradient, squared_error
from sb3_ac_ext.validation import check_keys


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

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", or a policy class derived from `MlpPolicy`
    :param env: environment or its id
    :param learning_rate: rate of actor and critic: a number >= 0, "lin_x" (falls linearly from x to 0), or a schedule
    :param actor_learning_rate: rate of the actor instead
    :param critic_learning_rate: rate of the critic instead
    :param critic: "v", V(s) whose error is the actor's advantage; "q", Q(s, a) learned by Sarsa
    :param deterministic_policy: whether the actor is mu(s), which needs a Box of actions and critic "q"
    :param exploration_std: std of what is then added to mu(s) in training, in actions scaled to [-1, 1]
    :param gamma_t_weight: whether the actor's steps are weighted by I, as the gradient of the discounted return has it
    :param actor_trace_lambda: lambda of the actor's eligibility traces, in [0, 1], with critic "v"; 0 for none
    :param critic_trace_lambda: lambda of the critic's
    :param max_grad_norm: bound on the gradient's 2-norm, of each network by itself (a dict names them); None does not clip
    :param kwargs: `ActingKwargs`
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction
    :raises UnsupportedError: for a deterministic policy without a Box of actions with finite bounds
    """

    sb3_class = OnPolicyAlgorithm
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = SEPARATE_POLICIES
    policy: DeterministicMlpPolicy  # or one that it is derived from, as the arguments ask for

    def __init__(
        self,
        policy: str | type[MlpPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 7e-4,
        *,
        actor_learning_rate: float | str | Schedule | None = None,
        critic_learning_rate: float | str | Schedule | None = None,
        critic: str = "v",
        deterministic_policy: bool = False,
        exploration_std: float = 0.0,
        gamma_t_weight: bool = False,
        actor_trace_lambda: float = 0.0,
        critic_trace_lambda: float = 0.0,
        max_grad_norm: float | dict[str, float] | None = None,
        _init_setup_model: bool = True,
        **kwargs: Unpack[ActingKwargs],
    ) -> None:
        check_keys("AC()", kwargs, constructor_keys(AC))
        self.actor_learning_rate = actor_learning_rate
        self.critic_learning_rate = critic_learning_rate
        self.critic = critic
        self.deterministic_policy = deterministic_policy
        self.exploration_std = exploration_std
        self.gamma_t_weight = gamma_t_weight
        self.actor_trace_lambda = actor_trace_lambda
        self.critic_trace_lambda = critic_trace_lambda
        super().__init__(
            policy,
            env,
            learning_rate,  # type: ignore[arg-type]  # a string too
            ROLLOUT,
            kwargs.pop("gamma", 0.99),
            0.0,  # gae_lambda: one step
            kwargs.pop("ent_coef", 0.0),
            0.5,  # vf_coef: the critic's update is the error times the gradient
            max_grad_norm,
            kwargs.pop("use_sde", False),
            kwargs.pop("sde_sample_freq", -1),
            _init_setup_model=False,
            **kwargs,
        )
        if _init_setup_model:
            self._setup_model()

    def _setup_model(self) -> None:
        self.policy_class = fitting_policy(self)
        super()._setup_model()

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_ac_arguments(self)

    def _make_optimizers(self) -> None:
        self.policy.separate_optimizers(self.lr_schedule(1), "AC")
        self._weights = np.ones(self.n_envs, dtype=np.float32)  # I
        self._decays = {"actor": self.gamma * self.actor_trace_lambda, "critic": self.gamma * self.critic_trace_lambda}
        traced = self._optimizers() if any(self._decays.values()) else {}
        self._traces = {name: Traces(parameters_of(optimizer), self.n_envs) for name, optimizer in traced.items()}

    def _optimizers(self) -> dict[str, th.optim.Optimizer]:
        return {"actor": self.policy.optimizer, "critic": self.policy.value_optimizer}

    # Updates

    def _act(self, obs: Any) -> np.ndarray:
        actions = super()._act(obs)
        if self.exploration_std:
            noise = th.empty(actions.shape, dtype=th.float32).normal_(0, self.exploration_std).numpy()
            actions = np.clip(actions + noise, -1, 1)
        return actions

    def _learn_from(
        self, actions: np.ndarray, rewards: np.ndarray, new_obs: Any, dones: np.ndarray, infos: list[dict[str, Any]]
    ) -> np.ndarray | None:
        next_actions = self._act(new_obs) if self.critic == "q" else None
        self._update(self._as_step(actions, rewards, new_obs, dones, infos, next_actions))
        return next_actions

    def _as_step(
        self,
        actions: np.ndarray,
        rewards: np.ndarray,
        new_obs: Any,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
        next_actions: np.ndarray | None,
    ) -> Step:
        """What was seen in a step, for the update."""
        starts = np.asarray(self._last_episode_starts)
        self._weights = np.where(starts, np.float32(1), np.float32(self.gamma if self.gamma_t_weight else 1) * self._weights)
        last, terminated = new_obs, dones.astype(np.float32)
        if dones.any():
            cut = dict(truncated(dones, infos))
            last, terminated[list(cut)] = replaced(new_obs, cut), 0
            if cut and next_actions is not None:
                drawn = self._act(last)
                next_actions = replaced(next_actions, {i: drawn[i] for i in cut})
        array = self._learner.array
        with th.no_grad():
            next_values = self._critic_values(array(last), array(actions if next_actions is None else next_actions))
        # gamma goes with the values, whose precision may be higher than that of the rewards
        targets = td_target(array(rewards.astype(np.float32)), array(terminated), 1.0, self.gamma * next_values)
        return Step(array(self._last_obs), array(actions.reshape(self.n_envs, -1)), targets, array(self._weights))

    def _critic_values(self, obs: Any, actions: Any) -> Any:
        """``(N,)`` V(s), or Q(s, a)."""
        if self.critic == "v":
            return self._learner.evaluate(obs, actions, ("value",)).values
        return self.policy.action_values(obs, actions).flatten()

    @np.errstate(over="ignore", invalid="ignore")  # silent as PyTorch; `_end_updates` says what became of it
    def _update(self, step: Step) -> None:
        """One update of actor and critic."""
        self._set_training(True)
        self._n_updates += 1
        if self.deterministic_policy:
            self._descend("actor", self._actor_loss, step)
            self._descend("critic", self._critic_loss, step)
            return
        evaluation = self._learner.evaluate(step.observations, step.actions)
        error = squared_error(evaluation.values, step.targets)
        advantages = step.targets - evaluation.values if self.critic == "v" else evaluation.values
        loss = policy_gradient(evaluation.log_prob, step.weights * advantages)
        entropy = -self.ent_coef / self.n_envs + 0 * loss.slope if self.ent_coef else None
        if self._traces:
            self._backward_through_traces(step, evaluation, advantages, entropy)
        else:
            evaluation.backward(log_prob=loss.slope, entropy=entropy, values=0.5 * error.slope)
        self._step("actor")
        self._step("critic")
        self._means.add("actor_loss", loss.value)
        self._means.add("critic_loss", 0.5 * error.value)
        self._means.add("entropy_loss", -evaluation.entropy.mean())

    def _backward_through_traces(self, step: Step, evaluation: Evaluation, advantages: Any, entropy: Any) -> None:
        """What ``evaluation.backward`` leaves, with each environment's traces in place of its gradients."""
        actor, critic = self._traces["actor"], self._traces["critic"]
        bonus: th.Tensor | float = 0.0
        if entropy is not None:
            evaluation.backward(entropy=entropy)
            bonus = actor.gradient()
        not_done = ~np.asarray(self._last_episode_starts)
        for i in range(self.n_envs):
            sample = step.of(i)
            one = 0 * sample.targets + 1
            self._learner.evaluate(sample.observations, sample.actions).backward(log_prob=one, values=one)
            actor.follow(i, self._decays["actor"] * not_done[i], self._weights[i])
            critic.follow(i, self._decays["critic"] * not_done[i])
        actor.apply(th.as_tensor(-advantages / self.n_envs), bonus)
        critic.apply(th.as_tensor((evaluation.values - step.targets) / self.n_envs))

    def _actor_loss(self, step: Step) -> th.Tensor:
        """-mean I Q(s, mu(s)), whose gradient is that of Silver et al. (2014), eq. 13."""
        actions = self.policy.action(step.observations)
        return -(step.weights * self.policy.action_values(step.observations, actions).flatten()).mean()

    def _critic_loss(self, step: Step) -> th.Tensor:
        values = self.policy.action_values(step.observations, step.actions).flatten()
        return 0.5 * F.mse_loss(values, step.targets)

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, "policy.value_optimizer"], tensors

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_weights", "_decays", "_traces"]
