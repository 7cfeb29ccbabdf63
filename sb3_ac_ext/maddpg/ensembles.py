"""
Policy ensembles (Lowe et al. 2017, arXiv:1706.02275, section 4.3): each agent has K complete sub-policies, and acts in each
episode by one of them, drawn uniformly, so that no opponent can fit itself to a single one.

    J_e(mu_i) = E_{k ~ U(K)} E [R_i]
    grad J_e = 1/K E_{D_i^(k)} [grad mu_i^(k)(o_i) grad_{a_i} Q_i^(k)(o_1 .. o_N, a_1 .. mu_i^(k)(o_i) .. a_N)]      (eq. 9)
    y_i^(k) = r_i + gamma (1 - d_i) Q_target_i^(k)(o'_1 .. o'_N, a'_1 .. a'_N),  a'_j = mu_target_j^(k_j)(o'_j)

D_i^(k) are the transitions in which agent i acted by k, and k_j what agent j acted by in that transition.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from sb3_ac_ext.base.off_policy import OffPolicyMixin
from sb3_ac_ext.engine import Engine
from sb3_ac_ext.functional.losses import td_target
from sb3_ac_ext.maddpg.buffer import JointReplayBuffer, JointTransitions
from sb3_ac_ext.maddpg.ensemble_buffer import SUB_POLICIES, EnsembleReplayBuffer, parts_of
from sb3_ac_ext.maddpg.groups import Groups, parse_teams
from sb3_ac_ext.maddpg.sub_policies import ActorCritic, acting_by, acts_by, follow, mixed_actions
from sb3_ac_ext.validation import ArgumentError, PositiveInt, UnsupportedError, check

Due = tuple[tuple[int, int], ...]
"""The number of a team and that of a sub-policy, for each that is updated."""
State = tuple[np.ndarray, ...] | None


class EnsembleMixin(OffPolicyMixin, OffPolicyAlgorithm):
    """
    Goes before SB3's class: sub-policies that are drawn, stored and trained apart. With one, nothing of this happens.

    Agents of a team have one index, so they learn from one batch.
    """

    n_sub_policies: int
    inferred_policies: bool
    ensemble_draw: Literal["team", "agent"]
    teams: Any
    ensemble_targets: Literal["stored", "current"]
    policy: Any
    _drawn: np.ndarray | None = None
    """``(n_envs, N)`` by which sub-policies the agents act in the episodes that are running."""
    _evaluation_random: np.random.Generator
    """What `predict` draws from, so that an evaluation leaves training as it is."""

    # Arguments

    def _check_arguments(self) -> None:
        made = self.policy_kwargs.get("n_sub_policies", self.n_sub_policies)
        if made != self.n_sub_policies:
            raise ArgumentError(f"n_sub_policies must be what the policy was made with, {made}, got {self.n_sub_policies}")
        super()._check_arguments()
        if self.n_sub_policies == 1:
            return
        if self.inferred_policies:
            raise UnsupportedError(
                f"inferred_policies must be False with several sub-policies, got True and n_sub_policies={self.n_sub_policies}"
            )
        if self.buffer_size < self.n_sub_policies * self.batch_size:
            raise ArgumentError(
                f"buffer_size must be at least n_sub_policies * batch_size = {self.n_sub_policies * self.batch_size}, as a "
                f"sub-policy learns from its own transitions, got {self.buffer_size}"
            )

    def _setup_model(self) -> None:
        check("n_sub_policies", self.n_sub_policies, PositiveInt)
        if self.n_sub_policies != 1:
            self.policy_kwargs = {"n_sub_policies": self.n_sub_policies, **self.policy_kwargs}  # not in the caller's dict
        super()._setup_model()
        self._check_teams()

    def _check_teams(self) -> None:
        """
        :raises ArgumentError: if agents share parameters that do not act by the same sub-policy
        """
        for group in self.policy.groups if self.n_sub_policies > 1 else ():
            if not any(set(group) <= set(team) for team in self.draw_groups()):
                names = ", ".join(self.policy.layout.names[agent] for agent in group)
                raise ArgumentError(
                    "agents in one list of parameter_sharing must be in one list of teams and draw together, got "
                    f"{names} with teams={self.teams!r} and ensemble_draw={self.ensemble_draw!r}"
                )

    def draw_groups(self) -> Groups:
        """The numbers of the agents that draw together."""
        layout = self.policy.layout
        return parse_teams(self.teams, layout) if self.ensemble_draw == "team" else tuple((i,) for i in range(len(layout)))

    def _automatic_buffer(self) -> type[ReplayBuffer]:
        return EnsembleReplayBuffer if self.n_sub_policies > 1 else JointReplayBuffer

    def _check_buffer(self, buffer_class: type[ReplayBuffer]) -> None:
        if self.n_sub_policies > 1 and not issubclass(buffer_class, EnsembleReplayBuffer):
            name = f"{EnsembleReplayBuffer.__module__}.EnsembleReplayBuffer"
            raise UnsupportedError(
                f"replay_buffer_class must be None or derived from {name} with several sub-policies, which knows who acted "
                f"(priorities are not among that), got {buffer_class} with n_sub_policies={self.n_sub_policies}"
            )
        super()._check_buffer(buffer_class)

    def _check_loaded_buffer(self, buffer: Any) -> None:
        """
        :raises ValueError: if a buffer is not of an ensemble like this one
        """
        if isinstance(buffer, EnsembleReplayBuffer) != (self.n_sub_policies > 1):
            raise ValueError(
                f"the replay buffer must be one of n_sub_policies={self.n_sub_policies}, got a {type(buffer).__name__}"
            )
        if self.n_sub_policies > 1:
            numbers = buffer.sub_policies[: buffer.size()]
            if numbers.size and numbers.max() >= self.n_sub_policies:
                raise ValueError(
                    f"the replay buffer must be one of n_sub_policies={self.n_sub_policies}, got one of sub-policies up to "
                    f"number {numbers.max()}"
                )
            if any((numbers[..., team] != numbers[..., team[:1]]).any() for team in map(list, self.draw_groups())):
                raise ValueError(
                    f"the replay buffer must be one of the same teams, got one whose agents drew apart with {self.teams=} and "
                    f"{self.ensemble_draw=}".replace("self.", "")
                )

    # Episodes

    def _setup_learn(
        self, total_timesteps: int, callback: Any = None, reset_num_timesteps: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, *args, **kwargs)
        # what a file has was drawn for the next episode if the last one was over, and is as good as another if it was not
        kept = not reset_num_timesteps and self._drawn is not None and len(self._drawn) == self.n_envs
        if self.n_sub_policies > 1 and not kept:
            self._drawn = self._draw(self.n_envs)
        return result

    def _draw(self, episodes: int, random: np.random.Generator | None = None) -> np.ndarray:
        """
        :param episodes: that begin
        :param random: None for training's numbers, which are numpy's global ones as SB3's
        :return: ``(episodes, N)`` a sub-policy for each agent, the same in a team
        """
        teams = self.draw_groups()
        size = episodes, len(teams)
        if random is None:
            numbers = np.random.randint(self.n_sub_policies, size=size)  # noqa: NPY002 (SB3's stream)
        else:
            numbers = random.integers(self.n_sub_policies, size=size)
        drawn = np.empty((episodes, len(self.policy.layout)), np.int64)
        for team, own in zip(teams, numbers.T, strict=True):
            drawn[:, team] = own[:, None]
        return drawn

    def _sample_action(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray, np.ndarray]:
        if self._drawn is None:
            return super()._sample_action(*args, **kwargs)
        with acting_by(self._drawn):
            return super()._sample_action(*args, **kwargs)

    def _store_transition(
        self, replay_buffer: Any, buffer_action: Any, new_obs: Any, reward: Any, dones: Any, infos: Any
    ) -> None:
        if self._drawn is not None:
            infos = [{**info, SUB_POLICIES: own} for info, own in zip(infos, self._drawn, strict=True)]
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        if self._drawn is not None and np.any(dones):
            ended = np.flatnonzero(dones)
            self._drawn = self._drawn.copy()  # whoever has the last ones keeps them
            self._drawn[ended] = self._draw(len(ended))

    # Updates

    def _update_due(self, engine: Engine, batch_size: int, delayed: bool) -> None:
        """Update each sub-policy of each team of which the replay buffer has a batch."""
        buffer, teams, every = self.replay_buffer, self.draw_groups(), self._every()
        assert isinstance(buffer, EnsembleReplayBuffer)
        due = tuple((team, k) for team, k in every if buffer.number(teams[team][0], k) >= batch_size)
        self.logger.record_mean("train/sub_policies_updated", len(due) / len(every))
        if due == every:
            engine.run(self._update_all, self._sample_due(due, batch_size), delayed)
        elif due:  # for a while, and not the same at each update
            engine.run_plainly(self._update_some, self._sample_due(due, batch_size), due, delayed)

    def _every(self) -> Due:
        return tuple((team, k) for k in range(self.n_sub_policies) for team in range(len(self.draw_groups())))

    def _sample_due(self, due: Due, batch_size: int) -> JointTransitions:
        """
        :param due: M teams with a sub-policy
        :param batch_size: B
        :return: M B transitions: B of D_i^(k) for each of them, one after another
        """
        buffer, teams = self.replay_buffer, self.draw_groups()
        assert isinstance(buffer, EnsembleReplayBuffer)
        drawn = [buffer.places(teams[team][0], k, batch_size) for team, k in due]
        places = np.concatenate([rows for rows, _ in drawn]), np.concatenate([envs for _, envs in drawn])
        if self.ensemble_targets == "stored" or self._drawn is None:
            acting = buffer.sub_policies[places]
        else:
            acting = self._drawn[places[1]]
            for n, (team, k) in enumerate(due):  # an agent's own target is the one that is trained
                acting[n * batch_size : (n + 1) * batch_size, list(teams[team])] = k
        batch = buffer.transitions(places, acting, self._vec_normalize_env)
        return batch._replace(discounts=th.as_tensor(float(self.gamma), dtype=th.float64, device=self.device))

    def _update_all(self, batch: JointTransitions, delayed: bool) -> dict[str, th.Tensor]:
        return self._update_some(batch, self._every(), delayed)

    def _update_some(self, batch: JointTransitions, due: Due, delayed: bool) -> dict[str, th.Tensor]:
        """Algorithm 1 for teams and sub-policies, which have no parameter in common: one step on the sum is one on each."""
        teams = self.draw_groups()
        parts = parts_of(batch, [teams[team] for team, _ in due])
        learners = [(self.policy.sub_policies[k], teams[team], part) for (team, k), part in zip(due, parts, strict=True)]
        next_actions = self._next_actions_of_all(batch).chunk(len(due))
        losses, values = [], []
        for (networks, agents, part), actions in zip(learners, next_actions, strict=True):
            q = networks.critic(part.observations, part.actions, agents)  # of each stream (B, n)
            losses.append(self._critic_loss(q, self._target_of(part, actions, networks, agents), part))
            values.append(q[0].detach().mean())
        outputs = {"critic_loss": th.stack(losses).sum(), "q": th.stack(values).mean()}
        self._engine.minimise(outputs["critic_loss"], "critic")
        if delayed:
            of_each = [self._actor_loss(part, networks, agents) for networks, agents, part in learners]
            outputs["actor_loss"] = th.stack(of_each).sum() / self.n_sub_policies  # eq. 9
            self._engine.minimise(outputs["actor_loss"], "actor")
            for networks, agents, _ in learners:
                follow(networks.critic, networks.critic_target, agents, self.tau)
                follow(networks.actor, networks.actor_target, agents, self.tau)
        return outputs

    @th.no_grad()
    def _next_actions_of_all(self, batch: JointTransitions) -> th.Tensor:
        """``(B, A)`` a' by the target sub-policies that the batch names."""
        assert batch.sub_policies is not None
        actors = [networks.actor_target for networks in self.policy.sub_policies]
        return self._smoothed(mixed_actions(actors, batch.sub_policies, batch.next_observations))

    @staticmethod
    @th.no_grad()
    def _target_of(part: JointTransitions, next_actions: th.Tensor, networks: ActorCritic, agents: Sequence[int]) -> th.Tensor:
        """``(B, n)`` y of these agents."""
        assert part.discounts is not None
        next_q = th.stack(networks.critic_target(part.next_observations, next_actions, agents)).amin(dim=0)
        return td_target(part.rewards, part.dones, part.discounts, next_q)

    # Acting

    def set_random_seed(self, seed: int | None = None) -> None:
        """See SB3's ``BaseAlgorithm.set_random_seed``; the sub-policies that `predict` draws begin anew too."""
        super().set_random_seed(seed)
        self._evaluation_random = np.random.default_rng(seed)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: State = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
        *,
        ensemble_index: int | Sequence[int] | np.ndarray | None = None,
    ) -> tuple[np.ndarray, State]:
        """
        The joint action, see SB3's ``BaseAlgorithm.predict``.

        With several sub-policies each row is an episode in which every team acts by one that is drawn. What was drawn is
        returned in the place of a recurrent state: whoever hands it back, as SB3's ``evaluate_policy``, ``EvalCallback`` and
        RL Zoo's ``enjoy`` do, has the same until an episode starts; without it each call draws anew. These draws come from a
        generator of their own, which the model's seed fixes.

        :param observation: ``(...)`` one observation or ``(B, ...)`` of them
        :param state: what the last call returned; None draws. With one sub-policy it is passed through
        :param episode_start: ``(B,)`` where to draw anew
        :param deterministic: whether Discrete actions are the most probable ones instead of draws
        :param ensemble_index: the sub-policy of all agents, or of each one; None draws
        :return: action or ``(B, ...)`` actions in the environment's range, and the state, an array ``(B, N)`` in a tuple
        :raises ValueError: for an observation that is not of the environment's space, a state that is none, and for
            sub-policies that there are not
        """
        chosen = None if ensemble_index is None else self._numbers(ensemble_index)
        if self.n_sub_policies == 1:
            return super().predict(observation, state, episode_start, deterministic)
        rows = self._rows(observation)
        numbers = acts_by() if chosen is None else np.tile(chosen, (rows, 1))
        if numbers is None:
            numbers = self._kept(state, episode_start, rows)
        with acting_by(numbers):
            actions, _ = super().predict(observation, None, None, deterministic)
        return actions, (numbers,)

    def _numbers(self, ensemble_index: Any) -> np.ndarray:
        """``(N,)`` the sub-policy of each agent."""
        agents = len(self.policy.layout)
        given = np.asarray(ensemble_index)
        if given.dtype.kind not in "iu" or given.shape not in ((), (agents,)) or not self._are_there(given):
            raise ArgumentError(
                f"ensemble_index must be an integer in [0, {self.n_sub_policies - 1}] or one for each of {agents} agents, got "
                f"{ensemble_index!r}"
            )
        return np.broadcast_to(given, (agents,)).astype(np.int64)

    def _are_there(self, numbers: np.ndarray) -> bool:
        return bool(((numbers >= 0) & (numbers < self.n_sub_policies)).all())

    def _kept(self, state: State, episode_start: np.ndarray | None, rows: int) -> np.ndarray:
        """``(B, N)`` what `predict` has drawn before, but for episodes that start."""
        if state is None:
            return self._draw(rows, self._evaluation_random)
        shape = rows, len(self.policy.layout)
        numbers = np.array(state[0]) if isinstance(state, tuple) and len(state) == 1 else np.zeros(0)
        if numbers.dtype.kind not in "iu" or numbers.shape != shape or not self._are_there(numbers):
            raise ArgumentError(f"state must be what predict() returned for {rows} observations, got {state!r}")
        starts = np.flatnonzero(np.zeros(rows) if episode_start is None else episode_start)
        if len(starts):
            numbers[starts] = self._draw(len(starts), self._evaluation_random)
        return numbers

    def _rows(self, observation: Any) -> int:
        """How many observations there are."""
        if isinstance(observation, tuple):  # as reset() returns it, of which SB3 says more
            return 1
        if isinstance(observation, np.ndarray) and observation.shape == self.observation_space.shape:
            return 1
        tensors, _ = self.policy.obs_to_tensor(observation)
        return len(next(iter(tensors.values())) if isinstance(tensors, dict) else tensors)

    def _acting_batch(self, observations: np.ndarray) -> tuple[np.ndarray, ...]:
        numbers = acts_by()
        return super()._acting_batch(observations) if numbers is None else (observations, numbers)

    def _act(self, batch: Any, deterministic: bool) -> dict[str, th.Tensor]:
        if len(batch) == 1:
            return super()._act(batch, deterministic)
        actors = [networks.actor for networks in self.policy.sub_policies]
        return {"actions": mixed_actions(actors, batch[1], batch[0], deterministic)}

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_evaluation_random"]

    # What MADDPG has

    def _critic_loss(self, values: Sequence[th.Tensor], target: th.Tensor, batch: JointTransitions) -> th.Tensor:
        raise NotImplementedError

    def _actor_loss(
        self, batch: JointTransitions, networks: ActorCritic | None = None, agents: Sequence[int] | None = None
    ) -> th.Tensor:
        raise NotImplementedError

    def _smoothed(self, actions: th.Tensor) -> th.Tensor:
        raise NotImplementedError
