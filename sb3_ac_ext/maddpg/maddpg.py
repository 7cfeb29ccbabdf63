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
from typing import Any, ClassVar, Unpack

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.vec_env import VecEnv
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from sb3_ac_ext.base.noise import ScaledNoise
from sb3_ac_ext.base.off_policy import OffPolicyMixin
from sb3_ac_ext.base.typing import OffPolicyKwargs
from sb3_ac_ext.envs.joint import JointEnv, is_multi_agent
from sb3_ac_ext.envs.joint_spaces import ALONE, JointBox
from sb3_ac_ext.functional.losses import smoothed_action, td_target
from sb3_ac_ext.functional.multi_agent import active_mean, replace_agent_action
from sb3_ac_ext.legacy.descent import Descent
from sb3_ac_ext.legacy.flat_tensor import bind
from sb3_ac_ext.maddpg import numpy_actor
from sb3_ac_ext.maddpg.arguments import check_maddpg_arguments, check_normalisation
from sb3_ac_ext.maddpg.buffer import JointReplayBuffer, JointTransitions
from sb3_ac_ext.maddpg.networks import JointActor, JointCritic
from sb3_ac_ext.maddpg.policies import MlpPolicy

NETWORKS = ("actor", "critic", "actor_target", "critic_target")


class JointActorCritic(OffPolicyAlgorithm):
    """What SB3's TD3 has around its update: Box actions, no gSDE, the policy's networks as attributes, what is saved."""

    policy: MlpPolicy
    actor: JointActor  # type: ignore[assignment]
    actor_target: JointActor
    critic: JointCritic
    critic_target: JointCritic

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"sde_support": False, "supported_action_spaces": (spaces.Box,), "support_multi_env": True}
        super().__init__(*args, **kwargs)

    def _setup_model(self) -> None:
        self.replay_buffer_class = self.replay_buffer_class or JointReplayBuffer
        super()._setup_model()
        for name in NETWORKS:
            setattr(self, name, getattr(self.policy, name))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *NETWORKS]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "actor.optimizer", "critic.optimizer"], []


class MADDPG(OffPolicyMixin, JointActorCritic):
    """
    DDPG for several agents, with central critics.

    The environment is a PettingZoo ``ParallelEnv``, a `JointEnv` of one, the id of one (`register_parallel_env`), or several
    of them in a ``VecEnv``. An ordinary environment is one agent, and MADDPG is then DDPG, equal to SB3's with the extras at
    their defaults.

    Differences from the paper: SB3's defaults (Adam 1e-3, batch 256, layers of 400 and 300; the values of the authors' program
    are in ``hyperparams/maddpg.yml``); Discrete actions are straight-through one-hots instead of relaxed ones, in the
    environment, the replay buffer and the losses alike; all agents learn from the same batch; truncated episodes bootstrap at
    their last observation; an agent learns from no transition after its end. Inferred policies (section 4.2) and policy
    ensembles (section 4.3) are not there.

    With Discrete actions exploration is the draw from the policy: noise moves Box actions only.

    Logged: ``train/q``, mean Q of the critics' batches over all agents; ``train/critic_loss`` and ``train/actor_loss``, sums
    over agents; gradient norms, over all agents; ``rollout/<agent>_return``, mean return of the episodes since the last log.

    :param policy: "MlpPolicy" or a class derived from it; `sb3_ac_ext.maddpg.policies.MlpPolicy` has the arguments that
        ``policy_kwargs`` takes
    :param env: environment or its id
    :param learning_rate: rate of all networks: a number >= 0, "lin_x" (falls linearly from x to 0), or a schedule
    :param actor_learning_rate: rate of the actors instead
    :param critic_learning_rate: rate of the critics instead
    :param centralised: whether critics see all agents; without, each agent learns by DDPG as if it were alone
    :param policy_delay: updates of the critics per update of actors and targets, >= 1
    :param target_policy_noise: std of the smoothing noise on targets' Box actions in the scaled action space, >= 0
    :param target_noise_clip: its largest absolute value, >= 0
    :param logit_penalty: weight of the mean square of an actor's outputs (before softmax or tanh) in its loss, >= 0; the
        authors' program has 1e-3
    :param kwargs: `OffPolicyKwargs`; ``max_grad_norm`` bounds each agent's gradients by themselves
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range or a contradiction
    :raises UnsupportedError: for spaces or a combination of arguments that MADDPG cannot take
    """

    sb3_class: ClassVar[type[BaseAlgorithm]] = OffPolicyAlgorithm
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"MlpPolicy": MlpPolicy}

    def __init__(
        self,
        policy: str | type[MlpPolicy],
        env: GymEnv | str,
        learning_rate: float | str | Schedule = 1e-3,
        *,
        actor_learning_rate: float | str | Schedule | None = None,
        critic_learning_rate: float | str | Schedule | None = None,
        centralised: bool = True,
        policy_delay: int = 1,
        target_policy_noise: float = 0.0,
        target_noise_clip: float = 0.5,
        logit_penalty: float = 0.0,
        _init_setup_model: bool = True,
        **kwargs: Unpack[OffPolicyKwargs],
    ) -> None:
        super().__init__(policy, env, learning_rate, **kwargs)
        self.actor_learning_rate = actor_learning_rate
        self.critic_learning_rate = critic_learning_rate
        self.centralised = centralised
        self.policy_delay = policy_delay
        self.target_policy_noise = target_policy_noise
        self.target_noise_clip = target_noise_clip
        self.logit_penalty = logit_penalty
        if _init_setup_model:
            self._setup_model()

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        return OffPolicyAlgorithm._wrap_env(JointEnv(env) if is_multi_agent(env) else env, verbose, monitor_wrapper)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        check_maddpg_arguments(self)

    def _setup_model(self) -> None:
        if not self.centralised:
            self.policy_kwargs = {**self.policy_kwargs, "centralised": False}  # not in the caller's dict
        super()._setup_model()
        for name in NETWORKS if self.engine else ():
            bind([*getattr(self, name).parameters()])  # side by side in memory, where they can run as one

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
        :raises ValueError: for a buffer without rewards of each agent
        """
        super().load_replay_buffer(path, truncate_last_traj)
        buffer = self._replay_buffer
        if not isinstance(buffer, JointReplayBuffer):
            self._replay_buffer = None
            raise ValueError(f"the replay buffer must be a JointReplayBuffer, got a {type(buffer).__name__}")

    def _sample(self, batch_size: int) -> JointTransitions:  # type: ignore[override]
        buffer = self.replay_buffer
        assert isinstance(buffer, JointReplayBuffer)
        return buffer.sample(batch_size, env=self._vec_normalize_env)  # type: ignore[return-value]

    def _optimizers(self) -> dict[str, th.optim.Optimizer]:
        return {"critic": self.critic.optimizer, "actor": self.actor.optimizer}

    def _acting_obstacle(self) -> str | None:
        return numpy_actor.obstacle(self.policy)

    def _make_numpy_actor(self) -> numpy_actor.JointNumpyActor:
        return numpy_actor.JointNumpyActor(self.policy)

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """
        Updates of Algorithm 1.

        :param gradient_steps: number of updates of the critics
        :param batch_size: joint transitions per update
        :raises NonFiniteError: if a loss or a parameter is NaN or infinite afterwards
        """
        self._begin_updates()
        for _ in range(gradient_steps):
            self._n_updates += 1
            self._run(self._update, self._sample(batch_size), self._n_updates % self.policy_delay == 0)
        self._end_updates()

    def _update(self, batch: JointTransitions, actors_too: bool) -> None:
        self._descend("critic", self._critic_loss, batch)
        if actors_too:
            self._descend("actor", self._actor_loss, batch)
            self._follow("critic", self.tau)
            self._follow("actor", self.tau)

    def _critic_loss(self, batch: JointTransitions) -> th.Tensor:
        with th.no_grad():
            next_actions = self._smoothed(self.actor_target(batch.next_observations))
            next_q = th.stack(self.critic_target(batch.next_observations, next_actions)).amin(dim=0)  # (B, N)
            target = td_target(batch.rewards, batch.dones, self.gamma, next_q)
        streams = self.critic(batch.observations, batch.actions)
        self._means.add("q", streams[0])
        return th.stack([active_mean((q - target).square(), batch.active).sum() for q in streams]).sum()

    def _smoothed(self, actions: th.Tensor) -> th.Tensor:
        if self.target_policy_noise == 0:
            return actions
        noise = th.empty_like(actions).normal_(0, self.target_policy_noise) * self.actor.continuous
        return smoothed_action(actions, noise, self.target_noise_clip)

    def _actor_loss(self, batch: JointTransitions) -> th.Tensor:
        outputs = self.actor.outputs(batch.observations)  # (B, A)
        actions = replace_agent_action(self.actor.action_masks, self.actor.act(outputs), batch.actions)  # (N, B, A)
        loss = -active_mean(self.critic.q1_forward(batch.observations, actions), batch.active).sum()
        if self.logit_penalty:
            squares = th.stack([part.square().mean(dim=1) for part in self.actor.by_agent(outputs)], dim=1)  # (B, N)
            loss = loss + self.logit_penalty * active_mean(squares, batch.active).sum()
        return loss

    def _clip(self, network: str, descent: Descent, norm: th.Tensor) -> None:
        """Bound each agent's gradient by itself: whoever has a large one does not slow the others down."""
        for parameters in getattr(self, network).network_parameters():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            clip_grads_with_norm_(parameters, self._max_grad_norms[network], get_total_norm(gradients))

    def _scaled_noise(self, action_noise: ActionNoise | None) -> ActionNoise | None:
        noise, discrete = super()._scaled_noise(action_noise), self.policy.discrete
        return ScaledNoise(noise, 1 - discrete.astype(np.float32)) if noise is not None and discrete.any() else noise

    def _store_transition(
        self, replay_buffer: Any, buffer_action: Any, new_obs: Any, reward: Any, dones: Any, infos: Any
    ) -> None:
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        for returns in (info["agent_returns"] for info in infos if "agent_returns" in info):
            for name, value in zip(self.policy.layout.names, returns, strict=True):
                self.logger.record_mean(f"rollout/{name}_return", value)

    def agent_actions(self, joint_action: np.ndarray) -> dict[str, Any]:
        """
        What single agents do in a joint action.

        :param joint_action: ``(A,)`` or ``(B, A)``, as `predict` returns it
        :return: by the agents' names actions of their own spaces, or B of them: a one-hot becomes its integer
        """
        space = self.action_space
        return space.split(joint_action) if isinstance(space, JointBox) else {ALONE: joint_action}

    def predict_agent(self, agent: str | int, observation: Any, deterministic: bool = False) -> Any:
        """
        One agent's action, from its own observation.

        :param agent: name or number
        :param observation: one of its own observation space, or ``(B, ...)`` of them where that is a Box; normalised if the
            model was trained so
        :param deterministic: whether a Discrete action is the most probable one instead of a draw
        :return: action, or B of them, of its own action space
        """
        return self.policy.agent(agent).predict(observation, deterministic)

    def save_agent(self, agent: str | int, path: str | pathlib.Path) -> None:
        """
        Save what one agent needs to act: `sb3_ac_ext.maddpg.Agent.load` reads it.

        :param agent: name or number
        :param path: the file's name, ".pth" is added where there is no suffix
        """
        self.policy.agent(agent).save(path)
