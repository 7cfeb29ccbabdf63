"""Segments of experience, as actors send them and as updates read them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces

ORIGINAL_END = "original_terminal_observation"
"""Where an info has an episode's last observation before it was normalised."""


@dataclass(kw_only=True)
class Result:
    """
    What an actor has made of T steps of its N environments.

    :param rewards: ``(T, N)``, in reward units
    :param dones: ``(T, N)`` whether a step ended an episode
    :param infos: what each environment said of each step; of an episode's last one ``episode``, its statistics, and
        ``terminal_observation``
    :param version: number of the weights that acted
    :param actor: which actor it was
    :param generation: how often that one had been replaced
    :param sequence: how many results of this generation came before
    :param original: ``(T + 1, N, ...)`` observations and ``(T, N)`` rewards before they were normalised; None if that was not
        the actor's doing
    """

    rewards: np.ndarray
    dones: np.ndarray
    infos: list[list[dict[str, Any]]]
    version: int = 0
    actor: int = 0
    generation: int = 0
    sequence: int = 0
    original: tuple[Any, np.ndarray] | None = None

    @property
    def n_steps(self) -> int:
        """T"""
        return len(self.dones)

    @property
    def n_envs(self) -> int:
        """N"""
        return int(self.dones.shape[1])

    def step(self, t: int) -> dict[str, Any]:
        """
        :param t: number of a step
        :return: what callbacks may know of it, by the names that SB3 gives it
        """
        return {"rewards": self.rewards[t], "dones": self.dones[t], "infos": self.infos[t]}


@dataclass(kw_only=True)
class Segment(Result):
    """
    T steps of N environments, all with the same weights.

    :param observations: ``(T + 1, N, ...)``, or a dict of them; behind an episode's last step the next one's first
    :param actions: ``(T, N, ...)`` as the distribution gave them, so before they are clipped
    :param behaviour: ``(T, N, ...)`` each, by names: what is known of the policy that acted, "log_probs" in nats
    """

    observations: Any
    actions: np.ndarray
    behaviour: dict[str, np.ndarray]

    def step(self, t: int) -> dict[str, Any]:
        """See `Result.step`."""
        return {**super().step(t), "new_obs": at(self.observations, t + 1), "actions": self.actions[t]}

    @property
    def truncated(self) -> np.ndarray:
        """``(T, N)`` whether a step ended an episode that had not terminated."""
        truncated = np.zeros_like(self.dones)
        for t, i in np.argwhere(self.dones):
            truncated[t, i] = self.infos[t][i].get("TimeLimit.truncated", False)
        return truncated


class SegmentBatch(NamedTuple):
    """B segments side by side: T steps of N environments, those of all of them."""

    observations: Any
    """``(T * N, ...)`` s_t, step after step, or a dict of them."""
    last_observations: Any
    """``(N, ...)`` s_T"""
    actions: th.Tensor
    """``(T * N, ...)`` a_t, as the distribution gave it."""
    rewards: th.Tensor
    """``(T, N)`` r_t, in reward units."""
    terminated: th.Tensor
    """``(T, N)`` 1 where the step terminated its episode."""
    truncated: th.Tensor
    """``(T, N)`` 1 where it cut it off."""
    final_values: th.Tensor
    """``(T, N)`` V of the last observations of truncated episodes, 0 elsewhere, in reward units."""
    behaviour: dict[str, th.Tensor]
    """``(T, N, ...)`` each: what is known of the policy that acted."""

    def next_values(self, values: th.Tensor, last_values: th.Tensor) -> th.Tensor:
        """
        :param values: ``(T, N)`` V(s_t)
        :param last_values: ``(N,)`` V(s_T)
        :return: ``(T, N)`` V of what each step led to, which counts where the episode did not terminate
        """
        following = th.cat([values[1:], last_values[None]])
        return th.where(self.truncated > 0, self.final_values, following)


def stacked(
    segments: Sequence[Segment], action_space: spaces.Space[Any], device: th.device, dtype: th.dtype = th.float32
) -> SegmentBatch:
    """
    :param segments: of T steps each
    :param action_space: of their environments
    :param device: where they are put
    :param dtype: of rewards, values, flags, and continuous actions
    :return: the segments side by side, with values of 0 behind truncated episodes
    """

    def tensor(arrays: Sequence[np.ndarray]) -> th.Tensor:
        return th.as_tensor(np.concatenate(arrays, axis=1), device=device)

    def flat(values: th.Tensor) -> th.Tensor:
        return values.flatten(0, 1)

    observations = joined([segment.observations for segment in segments], tensor)
    first, last = at(observations, slice(-1)), at(observations, -1)
    actions = flat(tensor([segment.actions for segment in segments]))
    rewards = tensor([segment.rewards for segment in segments]).to(dtype)
    dones, truncated = (tensor([getattr(segment, name) for segment in segments]) for name in ("dones", "truncated"))
    return SegmentBatch(
        observations={name: flat(part) for name, part in first.items()} if isinstance(first, Mapping) else flat(first),
        last_observations=last,
        actions=actions.long() if isinstance(action_space, spaces.Discrete) else actions.to(dtype),
        rewards=rewards,
        terminated=(dones & ~truncated).to(dtype),
        truncated=truncated.to(dtype),
        final_values=th.zeros_like(rewards),
        behaviour={name: tensor([segment.behaviour[name] for segment in segments]) for name in segments[0].behaviour},
    )


def final_observations(segments: Sequence[Segment]) -> tuple[list[tuple[int, int]], list[Any]]:
    """
    :param segments: of T steps each
    :return: for each truncated episode the step and the environment, as `stacked` numbers them, and its last observation
    """
    places, observations, before = [], [], 0
    for segment in segments:
        for t, i in np.argwhere(segment.truncated):
            places.append((int(t), before + int(i)))
            observations.append(segment.infos[t][i]["terminal_observation"])
        before += segment.n_envs
    return places, observations


def transitions(segment: Segment) -> tuple[Any, Any, np.ndarray]:
    """
    A segment as replay buffers store it: before anything was normalised, episodes' last observations where they ended.

    :param segment: of T steps
    :return: ``(T, N, ...)`` observations and the next ones, and ``(T, N)`` rewards
    """
    is_original = segment.original is not None
    observations, rewards = segment.original or (segment.observations, segment.rewards)
    following = joined([at(observations, slice(1, None))], lambda parts: parts[0].copy())
    for t, i in np.argwhere(segment.dones):
        end = segment.infos[t][i].get(ORIGINAL_END if is_original else "terminal_observation")
        if isinstance(end, Mapping):
            for name, value in end.items():
                following[name][t, i] = value
        elif end is not None:
            following[t, i] = end
    return at(observations, slice(-1)), following, rewards


def at(observations: Any, index: Any) -> Any:
    """
    :param observations: an array or a tensor, or a dict of them
    :param index: what is wanted of each
    :return: that
    """
    if isinstance(observations, Mapping):
        return {name: value[index] for name, value in observations.items()}
    return observations[index]


def joined(observations: Sequence[Any], join: Any = np.stack) -> Any:
    """
    :param observations: arrays, or dicts of them
    :param join: makes one of several arrays
    :return: one, or a dict of them
    """
    if isinstance(observations[0], Mapping):
        return {name: join([one[name] for one in observations]) for name in observations[0]}
    return join(observations)
