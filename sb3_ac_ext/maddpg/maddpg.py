"""
Several agents, each with a critic of its own that sees all of them (Lowe et al. 2017, "Multi-Agent Actor-Critic for Mixed
Cooperative-Competitive Environments", arXiv:1706.02275).

    for each gradient step:                                                           (Algorithm 1)
        sample (o_1 .. o_N, a_1 .. a_N, r_1 .. r_N, o'_1 .. o'_N, d_1 .. d_N)
        a'_i = mu_target_i(o'_i)
        y_i = r_i + gamma (1 - d_i) Q_target_i(o'_1 .. o'_N, a'_1 .. a'_N)
        critics: descend mean (Q_i(o_1 .. o_N, a_1 .. a_N) - y_i)^2                            (eq. 6)
        actors: ascend mean Q_i(o_1 .. o_N, a_1 .. mu_i(o_i) .. a_N), the other actions those of the batch   (eq. 5)
        targets: theta_target <- tau theta + (1 - tau) theta_target

The losses of different agents have no parameter in common, so one step on their sum is a step on each. Two critics for each
agent, delayed actors and smoothed targets make it MATD3 (Ackermann et al. 2019, arXiv:1910.01465).
"""

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.vec_env import VecEnv

from sb3_ac_ext.base.arguments import check_float_actions, check_policy_class
from sb3_ac_ext.base.noise import ExplorationNoise, ScaledNoise
from sb3_ac_ext.base.schedules import Rate
from sb3_ac_ext.engine import Network
from sb3_ac_ext.envs.joint import JointEnv, is_multi_agent
from sb3_ac_ext.envs.joint_spaces import ALONE, JointBox
from sb3_ac_ext.functional.losses import smoothed_action, td_errors, td_target
from sb3_ac_ext.functional.multi_agent import active_mean, replace_agent_action
from sb3_ac_ext.maddpg.base import JointActorCritic, check_normalisation
from sb3_ac_ext.maddpg.buffer import JointReplayBuffer, JointTransitions
from sb3_ac_ext.maddpg.ensembles import EnsembleMixin
from sb3_ac_ext.maddpg.groups import Sharing
from sb3_ac_ext.maddpg.inferred import InferenceMixin
from sb3_ac_ext.maddpg.logged import log_keys
from sb3_ac_ext.maddpg.policies import MlpPolicy
from sb3_ac_ext.maddpg.sub_policies import ActorCritic
from sb3_ac_ext.signatures import passed_on
from sb3_ac_ext.validation import Acts, ArgumentError, Needs, NonNegative, PositiveInt, UnsupportedError


class MADDPG(EnsembleMixin, InferenceMixin, JointActorCritic):
    """
    DDPG for several agents, with central critics.

    The environment is a PettingZoo ``ParallelEnv``, a `JointEnv` of one, the id of one (`register_parallel_env`), or several
    of them in a ``VecEnv``. An ordinary environment is one agent, and MADDPG is then DDPG, equal to SB3's with the extras at
    their defaults.

    Differences from the paper: SB3's defaults (Adam 1e-3, batch 256, layers of 400 and 300; the values of the authors' program
    are in ``hyperparams/maddpg.yml``); Discrete actions are straight-through one-hots instead of relaxed ones, in the
    environment, the replay buffer and the losses alike; all agents learn at once from the same batch, where the authors'
    program goes agent by agent, each with a batch of its own and after the targets of those before it have moved; truncated
    episodes bootstrap at their last observation; an agent learns from no transition after its end.

    With ``inferred_policies`` (section 4.2) each agent learns by what it sees the others do, and never by their policies:
    `sb3_ac_ext.maddpg.inferred` has the equations, ``docs/maddpg.md`` what the paper leaves open. The paper says that the
    others' log-probabilities go into Q in the place of their actions; that is not offered, as Q is fitted to actions, and
    would be asked in its own target about something that it never sees.

    Policy ensembles (section 4.3) are there by ``n_sub_policies``, see `sb3_ac_ext.maddpg.ensembles`. Differences from the
    paper's and the authors' program: the sub-policies of an agent share one replay buffer of ``buffer_size``, in which each
    transition says who acted, instead of one of that size each; every sub-policy of which the buffer has a batch is updated
    at each update; co-players' target actions are those of the sub-policies that acted, which "current" changes.

    With Discrete actions exploration is the draw from the policy: noise moves Box actions only.

    Logged: ``train/q``, mean Q of the critics' batches over all agents; ``train/critic_loss`` and ``train/actor_loss``, sums
    over agents; gradient norms, over all agents; ``rollout/<agent>_return``, mean return of the episodes since the last log.
    With inferred policies also ``train/inferred_loss``, the sum over pairs, and of agent i's model of agent j
    ``inferred/<i>_of_<j>_loss``, ``..._entropy`` in nats (of Box actions before the tanh), and on a batch of the replay
    buffer ``..._kl``, KL(mu_j || mu_hat_ij) of Discrete actions, or ``..._distance``, the mean of |mu_j - tanh(mean_ij)| of
    Box actions.

    :param policy: "MlpPolicy" or a class derived from it; `sb3_ac_ext.maddpg.policies.MlpPolicy` has the arguments that
        ``policy_kwargs`` takes
    :param env: environment or its id
    :param actor_learning_rate: rate of the actors instead of ``learning_rate``
    :param critic_learning_rate: rate of the critics instead of ``learning_rate``
    :param centralised: whether critics see all agents; without, each agent learns by DDPG as if it were alone
    :param policy_delay: updates of the critics per update of actors and targets
    :param target_policy_noise: std of the smoothing noise on targets' Box actions in the scaled action space
    :param target_noise_clip: its largest absolute value
    :param logit_penalty: weight of the mean square of an actor's outputs (before softmax or tanh) in its loss; the authors'
        program has 1e-3
    :param inferred_policies: whether critics' targets take the others' actions from models of their policies, which every
        agent learns from what they do, instead of from their policies
    :param inferred_batch_size: the newest joint transitions that the models learn from, in one step per training; rounded up
        to whole steps of all environments
    :param inferred_ent_coef: lambda, weight of the models' entropy in their loss
    :param inferred_learning_rate: rate of the models; None for the actors'
    :param inferred_input: what the models put into the targets: a "sample" (one-hots; a draw of a squashed Gaussian), or
        "probs", probabilities (of a Box the tanh of the mean)
    :param n_sub_policies: K, complete policies of each agent (actor, critics, targets), of which one is drawn at each
        episode's start and acts until its end
    :param ensemble_draw: "team" draws one index for all agents of a team, "agent" one for each
    :param teams: the names of the agents that draw together; "all" for all, None for those whose names differ only by the
        number at the end, as ``agent_0`` and ``agent_1``. Who is in no list draws alone; agents that share parameters have to
        be in one
    :param ensemble_targets: which sub-policies of the co-players act in the critics' targets: "stored" those that acted in the
        transition; "current" those that act now in the environment that the transition is from, as in the authors' program
    :param max_grad_norm: bound on the 2-norm of each agent's gradient of actor and of critic, and of each inferred policy's;
        a dict bounds only those that it names ("actor", "critic", "inferred"), None none
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction
    :raises UnsupportedError: for spaces or a combination of arguments that MADDPG cannot take
    """

    sb3_class: ClassVar[type[BaseAlgorithm]] = OffPolicyAlgorithm
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": MlpPolicy}
    buffer_arguments: ClassVar[frozenset[str]] = EnsembleMixin.buffer_arguments | {"ensemble_draw", "teams"}

    def __init__(
        self,
        policy: str | type[MlpPolicy],
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
        centralised: Annotated[bool, Acts.NEVER] = True,
        policy_delay: PositiveInt = 1,
        target_policy_noise: NonNegative = 0.0,
        target_noise_clip: NonNegative = 0.5,
        logit_penalty: NonNegative = 0.0,
        inferred_policies: Annotated[bool, Needs("centralised", True), Acts.NEVER] = False,
        inferred_batch_size: Annotated[PositiveInt, Needs("inferred_policies", True)] = 100,
        inferred_ent_coef: Annotated[NonNegative, Needs("inferred_policies", True)] = 1e-3,
        inferred_learning_rate: Annotated[Rate | None, Needs("inferred_policies", True)] = None,
        inferred_input: Annotated[Literal["sample", "probs"], Needs("inferred_policies", True)] = "sample",
        n_sub_policies: Annotated[PositiveInt, Acts.NEVER] = 1,
        ensemble_draw: Annotated[Literal["team", "agent"], Needs("n_sub_policies"), Acts.NEVER] = "team",
        teams: Annotated[Sharing, Needs("n_sub_policies"), Needs("ensemble_draw", "team"), Acts.NEVER] = None,
        ensemble_targets: Annotated[Literal["stored", "current"], Needs("n_sub_policies")] = "stored",
        max_grad_norm: float | dict[str, float] | None = None,
        exploration_noise: ExplorationNoise | None = None,
        warmup: Literal["uniform", "noise"] = "uniform",
        engine: bool = True,
    ) -> None:
        super().__init__(**passed_on(MADDPG, locals()))
        self.actor_learning_rate = actor_learning_rate
        self.critic_learning_rate = critic_learning_rate
        self.centralised = centralised
        self.policy_delay = policy_delay
        self.target_policy_noise = target_policy_noise
        self.target_noise_clip = target_noise_clip
        self.logit_penalty = logit_penalty
        self.inferred_policies = inferred_policies
        self.inferred_batch_size = inferred_batch_size
        self.inferred_ent_coef = inferred_ent_coef
        self.inferred_learning_rate = inferred_learning_rate
        self.inferred_input = inferred_input
        self.n_sub_policies = n_sub_policies
        self.ensemble_draw = ensemble_draw
        self.teams = teams
        self.ensemble_targets = ensemble_targets
        if _init_setup_model:
            self._setup_model()

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        return OffPolicyAlgorithm._wrap_env(JointEnv(env) if is_multi_agent(env) else env, verbose, monitor_wrapper)

    def _check_arguments(self) -> None:
        check_policy_class(self, MlpPolicy)
        super()._check_arguments()
        check_float_actions(self.action_space)
        made = self.policy_kwargs.get("centralised", self.centralised)
        if made != self.centralised:
            raise ArgumentError(f"centralised must be what the policy was made with, {made}, got {self.centralised}")
        check_normalisation(self.env)

    def _setup_model(self) -> None:
        if self.centralised is False:
            self.policy_kwargs = {**self.policy_kwargs, "centralised": False}  # not in the caller's dict
        super()._setup_model()

    def _check_buffer(self, buffer_class: type[ReplayBuffer]) -> None:
        if not issubclass(buffer_class, JointReplayBuffer):
            name = f"{JointReplayBuffer.__module__}.JointReplayBuffer"
            raise UnsupportedError(
                f"replay_buffer_class must be None or derived from {name}, which knows each agent's rewards, got "
                f"{buffer_class}"
            )
        if self.n_steps > 1 and not self.optimize_memory_usage:  # which it does not go with anywhere
            raise UnsupportedError(f"n_steps must be 1 (agents may end at different steps), got {self.n_steps}")
        super()._check_buffer(buffer_class)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """See SB3's ``BaseAlgorithm.set_env``."""
        env = self._wrap_env(env, self.verbose)
        check_normalisation(env)
        super().set_env(env, force_reset)

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay buffer that was saved with a model of this class.

        :param path: file name, or an open binary file
        :param truncate_last_traj: SB3's, without effect here
        :raises ValueError: for a buffer without rewards of each agent, or of other sub-policies
        """
        super().load_replay_buffer(path, truncate_last_traj)
        buffer = self._replay_buffer
        if not isinstance(buffer, JointReplayBuffer):
            self._replay_buffer = None
            raise ValueError(f"the replay buffer must be a JointReplayBuffer, got a {type(buffer).__name__}")
        try:
            self._check_loaded_buffer(buffer)
        except ValueError:
            self._replay_buffer = None
            raise

    def _networks(self) -> Mapping[str, Network]:
        critic, actor = self.critic, self.actor
        return {
            "critic": self._network(
                *("critic", critic, critic.optimizer, self.critic_target),
                rate=self.critic_learning_rate,
                clipped=[own for one in (self, *self.policy.further) for own in one.critic.network_parameters()],
            ),
            "actor": self._network(
                *("actor", actor, actor.optimizer, self.actor_target),
                rate=self.actor_learning_rate,
                clipped=[own for one in (self, *self.policy.further) for own in one.actor.network_parameters()],
            ),
            **super()._networks(),
        }

    def _sample(self, batch_size: int) -> JointTransitions:  # type: ignore[override]
        buffer = self.replay_buffer
        assert isinstance(buffer, JointReplayBuffer)
        batch: Any = self._prepared(buffer).sample(batch_size, env=self._vec_normalize_env)
        return batch._replace(discounts=th.as_tensor(float(self.gamma), dtype=th.float64, device=self.device))  # type: ignore[no-any-return]

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """
        Updates of Algorithm 1.

        :param gradient_steps: number of updates of the critics
        :param batch_size: joint transitions per update
        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        with self._updates() as engine:
            fitted = self._infer() if self.policy.inferred_policies else None
            for _ in range(gradient_steps):
                self._n_updates += 1
                delayed = bool(self._n_updates % self.policy_delay == 0)
                if self.n_sub_policies > 1:
                    self._update_due(engine, batch_size, delayed)
                    continue
                batch = self._sample(batch_size)
                outputs = engine.run(self._update, batch, delayed)
                self._update_priorities(batch, outputs)
            if fitted is not None and gradient_steps > 0:
                self._record_inferred(fitted, batch)

    def _update(self, batch: JointTransitions, delayed: bool) -> dict[str, th.Tensor]:
        target = self._target(batch)  # (B, N)
        values = self.critic(batch.observations, batch.actions)
        critic_loss = self._critic_loss(values, target, batch)
        self._engine.minimise(critic_loss, "critic")
        outputs = {"critic_loss": critic_loss, "q": values[0].detach().mean()}
        if batch.weights is not None:  # each transition's mean over the agents that took part in it
            outputs["td_errors"] = active_mean(td_errors(values, target).T, batch.active.T).unsqueeze(1)
        if delayed:
            outputs["actor_loss"] = self._actor_loss(batch)
            self._engine.minimise(outputs["actor_loss"], "actor")
            self._engine.follow("critic", self.tau)
            self._engine.follow("actor", self.tau)
        return outputs

    @th.no_grad()
    def _target(self, batch: JointTransitions) -> th.Tensor:
        assert batch.discounts is not None
        next_actions = self._smoothed(self._next_actions(batch.next_observations))  # (B, A) or (N, B, A)
        next_q = th.stack(self.critic_target(batch.next_observations, next_actions)).amin(dim=0)
        return td_target(batch.rewards, batch.dones, batch.discounts, next_q)

    def _next_actions(self, observations: th.Tensor) -> th.Tensor:
        actions = self.actor_target(observations)
        if not self.policy.inferred_policies:
            return actions
        return self.policy.inferred_target.joint_actions(observations, actions, self.inferred_input == "sample")

    def _smoothed(self, actions: th.Tensor) -> th.Tensor:
        if self.target_policy_noise == 0:
            return actions
        noise = th.empty_like(actions).normal_(0, self.target_policy_noise) * self.actor.continuous
        return smoothed_action(actions, noise, self.target_noise_clip)

    @staticmethod
    def _critic_loss(values: Sequence[th.Tensor], target: th.Tensor, batch: JointTransitions) -> th.Tensor:
        """The sum over agents and their critics."""
        squares = [(q - target).square() for q in values]
        if batch.weights is not None:
            squares = [batch.weights * square for square in squares]
        return th.stack([active_mean(square, batch.active).sum() for square in squares]).sum()

    def _actor_loss(
        self, batch: JointTransitions, networks: ActorCritic | None = None, agents: Sequence[int] | None = None
    ) -> th.Tensor:
        """The sum over agents (None for all); each agent's critic sees its present action, and the others' of the batch."""
        actor, critic = (self.actor, self.critic) if networks is None else (networks.actor, networks.critic)
        outputs, masks = actor.outputs(batch.observations, agents), actor.action_masks  # (B, A)
        own = masks if agents is None else th.stack([masks[agent] for agent in agents])
        actions = replace_agent_action(own, actor.act(outputs), batch.actions)  # (N, B, A)
        loss = -active_mean(critic.q1_forward(batch.observations, actions, agents), batch.active).sum()
        if self.logit_penalty:
            parts = actor.by_agent(outputs)
            parts = parts if agents is None else [parts[agent] for agent in agents]
            squares = th.stack([part.square().mean(dim=1) for part in parts], dim=1)  # (B, N)
            loss = loss + self.logit_penalty * active_mean(squares, batch.active).sum()
        return loss

    def _scaled_noise(self, action_noise: ActionNoise | None) -> ActionNoise | None:
        noise, discrete = super()._scaled_noise(action_noise), self.policy.discrete
        return ScaledNoise(noise, 1 - discrete.astype(np.float32)) if noise is not None and discrete.any() else noise

    def _store_transition(
        self, replay_buffer: Any, buffer_action: Any, new_obs: Any, reward: Any, dones: Any, infos: Any
    ) -> None:
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        for returns in (info["agent_returns"] for info in infos if "agent_returns" in info):
            keys = log_keys(dict(enumerate(self.policy.layout.names)), "return")["return"]
            for key, value in zip(keys, returns, strict=True):
                self.logger.record_mean(f"rollout/{key}", value)

    def _acts_finitely(self, observations: Any) -> bool:
        """See `OffPolicyMixin._acts_finitely`; a choice is finite whatever it is made by."""
        tensors, _ = self.policy.obs_to_tensor(observations)
        with th.no_grad():
            return all(bool(one.actor.outputs(tensors).isfinite().all()) for one in self.policy.sub_policies)

    def agent_actions(self, joint_action: np.ndarray) -> dict[str, Any]:
        """
        What single agents do in a joint action.

        :param joint_action: ``(A,)`` or ``(B, A)``, as `predict` returns it
        :return: by the agents' names actions of their own spaces, or B of them: a one-hot becomes its integer
        """
        space = self.action_space
        return space.split(joint_action) if isinstance(space, JointBox) else {ALONE: joint_action}

    def predict_agent(
        self, agent: str | int, observation: Any, deterministic: bool = False, *, ensemble_index: int | None = None
    ) -> Any:
        """
        One agent's action, from its own observation.

        :param agent: name or number
        :param observation: one of its own observation space, or ``(B, ...)`` of them where that is a Box; normalised if the
            model was trained so
        :param deterministic: whether a Discrete action is the most probable one instead of a draw
        :param ensemble_index: by which of its sub-policies; to be given where there are several
        :return: action, or B of them, of its own action space
        """
        return self.policy.agent(agent, ensemble_index).predict(observation, deterministic)

    def save_agent(self, agent: str | int, path: str | pathlib.Path, *, ensemble_index: int | None = None) -> None:
        """
        Save what one agent needs to act: `sb3_ac_ext.maddpg.Agent.load` reads it.

        :param agent: name or number
        :param path: the file's name, ".pth" is added where there is no suffix
        :param ensemble_index: which of its sub-policies; to be given where there are several
        """
        self.policy.agent(agent, ensemble_index).save(path)
