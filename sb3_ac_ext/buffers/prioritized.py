"""
Prioritised experience replay (Schaul et al. 2016, "Prioritized Experience Replay", arXiv:1511.05952, proportional variant).

    store:   p_i = largest priority so far                                            (Algorithm 1)
    sample:  P(i) = p_i^alpha / sum_k p_k^alpha, one i from each of B equal parts of the sum
             w_i = (N P(i))^-beta / max_j w_j
    learn:   minimise the mean of w_i loss_i
             p_i = |delta_i| + eps

The buffers hold single transitions; sums over n rewards are formed when they are sampled, so each step of an episode is the
first of one, up to the last.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_ac_ext.buffers.sum_tree import SumTree, Tree
from sb3_ac_ext.signatures import check_given
from sb3_ac_ext.validation import ArgumentError, NonFiniteError, Positive, PositiveInt, UnitInterval, UnsupportedError


class PrioritizedSamples(NamedTuple):
    """A batch of B transitions: what SB3's replay buffers give, the weights, and where priorities go back to."""

    observations: PyTorchObs
    """``(B, ...)`` s, or a dict of them."""
    actions: th.Tensor
    """``(B, A)`` a."""
    next_observations: PyTorchObs
    """``(B, ...)`` s' behind the last of the summed rewards, the episode's last observation where it ended."""
    dones: th.Tensor
    """``(B, 1)`` 1 where the episode terminated, 0 where it goes on or was truncated."""
    rewards: th.Tensor
    """``(B, 1)`` r, or the discounted sum of up to n of them."""
    discounts: th.Tensor | None
    """``(B, 1)`` gamma to the number of summed rewards; None for single rewards, as with SB3, for the algorithm's gamma."""
    weights: th.Tensor
    """``(B, 1)`` w, of each transition's loss, in (0, 1]."""
    indices: np.ndarray
    """``(B,)`` where they are stored, for `PrioritizedReplayBuffer.update_priorities`."""
    versions: np.ndarray
    """``(B,)`` how often these places had been written to, for the same."""


def importance_weights(leaves: np.ndarray, reference: float, beta: float) -> np.ndarray:
    """
    How much less than uniformly transitions have to count for being drawn more often (Schaul et al. 2016, section 3.4).

        w_i = (p_i^alpha / reference)^-beta

    With the mean over all N transitions as reference it is (N P(i))^-beta, with the smallest one that divided by its maximum.

    :param leaves: ``(B,)`` p_i^alpha, > 0
    :param reference: the value whose weight is 1, > 0
    :param beta: 0 for weights 1, 1 for a full correction
    :return: ``(B,)``
    """
    return (leaves / reference) ** -beta


class PrioritizedReplayBuffer(ReplayBuffer):
    """
    SB3's replay buffer with priorities and n-step returns, for every off-policy algorithm.

    A new transition has the largest priority so far, which is 1 at first and never decays. While no priority was updated
    all are equal: SB3's own algorithms, which know of no priorities, run on it with uniform replay. Those that use it multiply
    each transition's loss by its weight, hand the errors to `update_priorities`, and say how much of the training remains
    (`progress_remaining`). The paper divides the step size by 4 against uniform replay; that is left to the user.

    With ``alpha=0`` there are no priorities: batches are those of SB3's ``ReplayBuffer`` or ``NStepReplayBuffer``, by the same
    random numbers.

    :param buffer_size: transitions of all environments that it holds
    :param observation_space: of the transitions
    :param action_space: of the transitions
    :param device: where batches go
    :param n_envs: number of environments
    :param optimize_memory_usage: whether each observation is stored once; needs ``handle_timeout_termination=False`` and
        ``n_steps=1``
    :param handle_timeout_termination: whether truncated episodes are bootstrapped at their last observation
    :param n_steps: rewards summed before bootstrapping; fewer where the episode or the buffer's newest transition comes before
    :param gamma: discount factor of these sums
    :param alpha: how much priorities count: 0 for uniform replay, 1 for draws in proportion to them
    :param beta_start: share of the bias of these draws that the weights correct at the start of training
    :param beta_end: the same at its end
    :param eps: added to each absolute error, so that every transition is drawn again
    :param weight_norm: whether the largest weight of the "batch" is 1 or that of the whole "buffer", with which steps are the
        smaller the farther the smallest priority is below the others
    :raises TypeError: for an unknown argument or one of the wrong type
    :raises ValueError: for a value out of range
    :raises UnsupportedError: for what does not go together
    """

    progress_remaining: float = 1.0
    """Share of the training that is still to come, over which beta goes from ``beta_start`` to ``beta_end``."""

    def __init__(
        self,
        buffer_size: PositiveInt,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: th.device | str = "auto",
        n_envs: PositiveInt = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        *,
        n_steps: PositiveInt = 1,
        gamma: UnitInterval = 0.99,
        alpha: UnitInterval = 0.6,
        beta_start: UnitInterval = 0.4,
        beta_end: UnitInterval = 1.0,
        eps: Positive = 1e-6,
        weight_norm: Literal["batch", "buffer"] = "batch",
        **kwargs: Any,
    ) -> None:
        check_given(type(self), {name: value for name, value in locals().items() if name not in ("self", "kwargs")})
        self._check_observations(observation_space, optimize_memory_usage)
        if optimize_memory_usage and handle_timeout_termination:
            raise UnsupportedError(
                "optimize_memory_usage=True needs handle_timeout_termination=False, got True: a truncated episode's last "
                "observation is written over by the next episode's first, so truncation can only count as termination"
            )
        if optimize_memory_usage and n_steps > 1:
            raise UnsupportedError(f"optimize_memory_usage=True needs n_steps=1, got n_steps={n_steps}")
        least = n_steps + optimize_memory_usage  # one place is always between two transitions
        if buffer_size // n_envs < least:
            raise ArgumentError(
                f"buffer_size must be an integer >= {least * n_envs} with n_envs={n_envs}, n_steps={n_steps} and "
                f"optimize_memory_usage={optimize_memory_usage}, got {buffer_size}"
            )
        super().__init__(
            buffer_size,
            observation_space,
            action_space,
            device=device,
            n_envs=n_envs,
            optimize_memory_usage=optimize_memory_usage,
            handle_timeout_termination=handle_timeout_termination,
            **kwargs,
        )
        self.n_steps, self.gamma, self.alpha = n_steps, float(gamma), float(alpha)
        self.beta_start, self.beta_end = float(beta_start), float(beta_end)
        self.eps, self.weight_norm = float(eps), weight_norm
        self.max_priority = 1.0
        """The largest one so far."""
        places = self.buffer_size * self.n_envs
        self.tree = SumTree(places) if self.alpha else None
        """p^alpha of each place, 0 where nothing may be drawn; ``n_envs`` places are a row of the storage."""
        self._smallest = Tree(places) if self.alpha and weight_norm == "buffer" else None
        """The same, infinite where nothing may be drawn."""
        self._laps = 0
        """How often the storage's end was reached."""

    def _check_observations(self, space: spaces.Space[Any], optimize_memory_usage: bool) -> None:
        if isinstance(space, spaces.Dict):
            raise UnsupportedError(f"{type(self).__name__} takes no Dict, got {space}; PrioritizedDictReplayBuffer does")

    @property
    def beta(self) -> float:
        """How much of the bias the weights correct now."""
        done = min(max(1 - self.progress_remaining, 0.0), 1.0)
        return self.beta_start + (self.beta_end - self.beta_start) * done

    def add(
        self,
        obs: Any,
        next_obs: Any,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """See SB3's ``ReplayBuffer.add``."""
        row = self.pos
        super().add(obs, next_obs, action, reward, done, infos)
        self._laps += self.pos == 0
        self._stored(row)

    def _stored(self, row: int) -> None:
        """Set the priorities of a row that was written."""
        self._fill(row, self.max_priority**self.alpha)
        if self.optimize_memory_usage:
            self._fill(self.pos, 0.0)  # its observation is the next one of the row before now

    def _fill(self, row: int, leaf: float) -> None:
        if self.tree is not None:
            self.tree.fill(row * self.n_envs, (row + 1) * self.n_envs, leaf)
        if self._smallest is not None:
            self._smallest.fill(row * self.n_envs, (row + 1) * self.n_envs, leaf or np.inf)

    def _assign(self, indices: np.ndarray, leaves: np.ndarray | float) -> None:
        if self.tree is not None:
            self.tree.assign(indices, leaves)
        if self._smallest is not None:
            self._smallest.assign(indices, np.where(np.equal(leaves, 0), np.inf, leaves))

    def reset(self) -> None:
        """Forget all transitions and priorities."""
        super().reset()
        self.max_priority = 1.0
        self._laps += 1
        for tree in (self.tree, self._smallest):
            if tree is not None:
                tree.fill(0, tree.size, tree.empty)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> PrioritizedSamples:  # type: ignore[override]
        """
        :param batch_size: B
        :param env: normalises observations and rewards
        :return: transitions, drawn by their priorities from numpy's global generator, as SB3 does
        :raises RuntimeError: if there is nothing to be drawn
        """
        if self.tree is None:
            return super().sample(batch_size, env)  # type: ignore[return-value]  # from _get_samples
        return self._samples(self._drawn(self.tree, batch_size), env)

    def _drawn(self, tree: SumTree, batch_size: int) -> np.ndarray:
        """``(B,)`` places, each from an equal part of the sum, so in the order of the storage."""
        total = tree.result
        if total == 0:
            raise RuntimeError(f"{type(self).__name__} has nothing to be drawn: its size is {self.size()}")
        return tree.find((np.arange(batch_size) + np.random.random(batch_size)) * (total / batch_size))  # noqa: NPY002 (SB3's stream)

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> PrioritizedSamples:  # type: ignore[override]
        envs = np.random.randint(0, high=self.n_envs, size=(len(batch_inds),))  # noqa: NPY002 (SB3's stream)
        return self._samples(batch_inds * self.n_envs + envs, env)

    def _samples(self, indices: np.ndarray, env: VecNormalize | None) -> PrioritizedSamples:
        """
        :param indices: ``(B,)`` places
        :param env: normalises observations and rewards
        :return: the transitions that begin there
        """
        last, rewards, discounts = self._rewards(indices, env)
        if self.optimize_memory_usage:
            next_observations = self._at(self.observations, (last + self.n_envs) % (self.buffer_size * self.n_envs))
        else:
            next_observations = self._at(self.next_observations, last)
        terminated = self._at(self.dones, last) * (1 - self._at(self.timeouts, last))
        return PrioritizedSamples(
            self._tensors(self._normalize_obs(self._at(self.observations, indices), env)),
            self._tensors(self._at(self.actions, indices)),
            self._tensors(self._normalize_obs(next_observations, env)),
            self._tensors(terminated[:, None]),
            self._tensors(rewards),
            None if discounts is None else self._tensors(discounts),
            *self._origin(indices),
        )

    def _origin(self, indices: np.ndarray) -> tuple[th.Tensor, np.ndarray, np.ndarray]:
        """The weights of places, the places, and how often they were written to."""
        if self.tree is None:
            weights = np.ones(len(indices))
        else:
            leaves = self.tree.leaves.take(indices)
            smallest = leaves.min() if self._smallest is None else self._smallest.result
            weights = importance_weights(leaves, smallest, self.beta)
        return self._tensors(weights.astype(np.float32)[:, None]), indices, self._versions(indices)

    def _versions(self, indices: np.ndarray) -> np.ndarray:
        return self._laps + (indices < self.pos * self.n_envs)

    def _rewards(self, indices: np.ndarray, env: VecNormalize | None) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """
        :return: ``(B,)`` places of the sums' last rewards, ``(B, 1)`` sums, ``(B, 1)`` gamma to the numbers of rewards in them
        """
        if self.n_steps == 1:
            return indices, self._normalize_reward(self._at(self.rewards, indices)[:, None], env), None
        steps = np.arange(self.n_steps)
        places = (indices[:, None] + steps * self.n_envs) % (self.buffer_size * self.n_envs)  # (B, n)
        newest = (self.pos - 1) % self.buffer_size
        ends = (self._at(self.dones, places) > 0) | (self._at(self.timeouts, places) > 0) | (places // self.n_envs == newest)
        ends[:, -1] = True
        final = ends.argmax(axis=1)[:, None]
        # in float32 and this order, as SB3's NStepReplayBuffer does
        rewards = self._normalize_reward(self._at(self.rewards, places), env) * self.gamma ** steps.astype(np.float32)
        sums = np.where(steps <= final, rewards, np.float32(0)).sum(axis=1, keepdims=True)
        last = np.take_along_axis(places, final, axis=1)[:, 0]
        return last, sums, self.gamma ** (final + 1).astype(np.float32)

    @staticmethod
    def _at(stored: Any, places: np.ndarray) -> Any:
        """What is at these places of an array ``(rows, n_envs, ...)``, or of a dict of them."""
        if isinstance(stored, dict):
            return {name: PrioritizedReplayBuffer._at(part, places) for name, part in stored.items()}
        return stored.reshape(-1, *stored.shape[2:]).take(places, axis=0)

    def _tensors(self, arrays: Any) -> Any:
        """Arrays of their own memory, or a dict of them, as tensors."""
        if isinstance(arrays, dict):
            return {name: self.to_torch(part, copy=False) for name, part in arrays.items()}
        return self.to_torch(arrays, copy=False)

    def update_priorities(
        self, indices: np.ndarray, td_errors: np.ndarray | th.Tensor, versions: np.ndarray | None = None
    ) -> None:
        """
        Make priorities of what an update found for the transitions that it drew.

        :param indices: ``(B,)`` of the samples; of one that is there twice, the last error counts
        :param td_errors: ``(B,)`` or ``(B, 1)`` the errors, of either sign and without the weights
        :param versions: ``(B,)`` of the samples, by which the errors of transitions that were written over meanwhile are
            dropped; None if nothing was
        :raises ValueError: if there is not one error for each index, or an index of no place
        :raises NonFiniteError: if an error is NaN or infinite
        """
        if isinstance(td_errors, th.Tensor):
            td_errors = td_errors.detach().cpu().numpy()
        indices = np.asarray(indices)
        errors = np.abs(td_errors, dtype=np.float64).reshape(-1)
        if errors.shape != indices.shape:
            raise ArgumentError(f"td_errors must be {len(indices)} numbers, one for each index, got {errors.size}")
        if not np.isfinite(errors).all():
            raise NonFiniteError(f"td_errors must be finite, got {errors[~np.isfinite(errors)][0]}")
        if self.tree is None or not len(indices):
            return
        if indices.min() < 0 or indices.max() >= self.tree.size:
            raise ArgumentError(f"indices must be in [0, {self.tree.size}), got {indices.min()} to {indices.max()}")
        known = self.tree.leaves.take(indices) > 0
        if versions is not None:
            known &= versions == self._versions(indices)
        if not known.all():
            indices, errors = indices[known], errors[known]
        priorities = errors + self.eps
        self.max_priority = float(priorities.max(initial=self.max_priority))
        self._assign(indices, priorities**self.alpha)


class PrioritizedDictReplayBuffer(PrioritizedReplayBuffer, DictReplayBuffer):  # type: ignore[misc]  # what is sampled
    """`PrioritizedReplayBuffer` for Dict observations; with ``alpha=0`` and one step SB3's ``DictReplayBuffer``."""

    def _check_observations(self, space: spaces.Space[Any], optimize_memory_usage: bool) -> None:
        if not isinstance(space, spaces.Dict):
            raise UnsupportedError(f"{type(self).__name__} takes a Dict, got {space}; PrioritizedReplayBuffer takes others")
        if optimize_memory_usage:
            raise UnsupportedError("optimize_memory_usage must be False for Dict observations, as with SB3, got True")


class PrioritizedHerReplayBuffer(PrioritizedDictReplayBuffer, HerReplayBuffer):  # type: ignore[misc]  # the same
    """
    `PrioritizedReplayBuffer` with hindsight; with ``alpha=0`` SB3's ``HerReplayBuffer``.

    A transition can be drawn once its episode has ended. It has one priority, whatever its goal. Which ones of a batch get
    another goal is a matter of chance. The class's name has that of SB3's in it, by which the Zoo knows to load with an
    environment.

    :param env: computes the rewards of other goals
    """

    def __init__(
        self,
        buffer_size: PositiveInt,
        observation_space: spaces.Dict,
        action_space: spaces.Space[Any],
        env: Any,
        device: th.device | str = "auto",
        n_envs: PositiveInt = 1,
        optimize_memory_usage: bool = False,
        *,
        n_steps: PositiveInt = 1,
        **kwargs: Any,
    ) -> None:
        if n_steps != 1:
            raise UnsupportedError(
                f"n_steps must be 1 for {type(self).__name__}, got {n_steps}: other goals' rewards are those of single steps"
            )
        super().__init__(
            buffer_size,
            observation_space,
            action_space,
            device,
            n_envs,
            optimize_memory_usage,
            env=env,
            **kwargs,
        )

    def add(
        self,
        obs: Any,
        next_obs: Any,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """See SB3's ``HerReplayBuffer.add``: an episode whose first step is written over is not drawn any more."""
        for env in range(self.n_envs):
            end = self.ep_start[self.pos, env] + self.ep_length[self.pos, env]
            if self.ep_length[self.pos, env]:
                self._assign(self._places(self.pos, end, env), 0.0)
        super().add(obs, next_obs, action, reward, done, infos)

    def _stored(self, row: int) -> None:
        """Nothing: see `_compute_episode_length`."""

    def _compute_episode_length(self, env_idx: int) -> None:
        start = self._current_ep_start[env_idx]
        super()._compute_episode_length(env_idx)
        places = self._places(start, start + self.ep_length[start, env_idx], env_idx)
        self._assign(places, self.max_priority**self.alpha)

    def _places(self, start: int, stop: int, env: int) -> np.ndarray:
        return np.arange(start, stop) % self.buffer_size * self.n_envs + env

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> PrioritizedSamples:  # type: ignore[override]
        """
        See `PrioritizedReplayBuffer.sample`; the transitions with other goals are the last ones.

        :raises RuntimeError: if no episode has ended
        """
        ended = np.flatnonzero(self.ep_length > 0) if self.tree is None else self.tree.result
        if not np.any(ended):
            raise RuntimeError("no episode has ended that could be drawn from: learning_starts must be longer than an episode")
        if self.tree is None:
            indices = np.random.choice(ended, size=batch_size, replace=True)  # noqa: NPY002 (SB3's stream)
        else:
            indices = np.random.permutation(self._drawn(self.tree, batch_size))  # noqa: NPY002 (the same)
        relabelled, own = np.split(indices, [int(self.her_ratio * batch_size)])
        parts = (
            self._get_real_samples(*np.divmod(own, self.n_envs), env),
            self._get_virtual_samples(*np.divmod(relabelled, self.n_envs), env),
        )
        return PrioritizedSamples(
            {name: th.cat([part.observations[name] for part in parts]) for name in self.observations},
            th.cat([part.actions for part in parts]),
            {name: th.cat([part.next_observations[name] for part in parts]) for name in self.observations},
            th.cat([part.dones for part in parts]),
            th.cat([part.rewards for part in parts]),
            None,
            *self._origin(np.concatenate([own, relabelled])),
        )
