"""The spaces of several agents side by side: one flat Box, and the way from there to each agent's own space and back."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.spaces.utils import flatten, flatten_space
from stable_baselines3.common.preprocessing import get_action_dim, get_flattened_obs_dim

from sb3_ac_ext.validation import UnsupportedError

ALONE = "agent"
"""The name of the agent of an ordinary environment."""


class JointBox(spaces.Box):
    """
    The agents' spaces one after another as one flat Box.

    A Box takes its entries as they are, anything else its flat form: a Discrete space is a one-hot. Samples are made of
    samples of the agents' spaces, so a one-hot has a single 1.

    :param parts: each agent's space by its name
    :param seed: of the random generator that samples come from
    :raises UnsupportedError: for a space that has no flat form
    """

    def __init__(self, parts: Mapping[str, spaces.Space[Any]], seed: int | None = None) -> None:
        self.parts = dict(parts)
        lows, highs, self.columns, start = [], [], {}, 0
        for name, part in self.parts.items():
            flat = flatten_space(part) if part.is_np_flattenable else None
            if not isinstance(flat, spaces.Box):
                raise UnsupportedError(f"the space of agent {name!r} must have a flat form, got {part}")
            with np.errstate(over="ignore"):  # bounds beyond fp32 are infinite there
                lows.append(flat.low.astype(np.float32))
                highs.append(flat.high.astype(np.float32))
            self.columns[name] = slice(start, start + len(flat.low))
            start += len(flat.low)
        super().__init__(np.concatenate(lows), np.concatenate(highs), dtype=np.float32, seed=seed)

    def sample(self, mask: None = None, probability: None = None) -> np.ndarray:
        """A joint sample, all of it from this space's own random generator."""
        joint = super().sample(mask, probability)
        for name, part in self.parts.items():
            if isinstance(part, spaces.Discrete):
                joint[self.columns[name]] = 0
                joint[self.columns[name].start + self.np_random.integers(part.n)] = 1
            elif not isinstance(part, spaces.Box):
                part = copy.deepcopy(part)  # it is the environment's, and so is its random generator
                part.seed(int(self.np_random.integers(2**31)))
                joint[self.columns[name]] = np.asarray(flatten(part, part.sample()))
        return joint

    def join(self, values: Mapping[str, Any]) -> np.ndarray:
        """
        :param values: of the agents' own spaces by their names
        :return: ``(D,)`` their flat forms; 0 for an agent without a value
        """
        joint = np.zeros(self.shape, np.float32)
        for name, value in values.items():
            part = self.parts[name]
            joint[self.columns[name]] = np.ravel(value if isinstance(part, spaces.Box) else np.asarray(flatten(part, value)))
        return joint

    def split(self, joint: np.ndarray) -> dict[str, Any]:
        """
        The way back, for Box and Discrete spaces.

        :param joint: ``(D,)`` or ``(B, D)``
        :return: by their names what each agent's own space holds, or B of it: arrays within the bounds, and the integer that
            a one-hot (or the largest entry of anything else) stands for
        """
        values: dict[str, Any] = {}
        for name, part in self.parts.items():
            entries = joint[..., self.columns[name]]
            if isinstance(part, spaces.Discrete):
                values[name] = part.start + entries.argmax(axis=-1)
            else:
                assert isinstance(part, spaces.Box)
                shaped = entries.reshape((*joint.shape[:-1], *part.shape)).astype(part.dtype)
                values[name] = np.asarray(shaped.clip(part.low, part.high))  # numpy makes a scalar of no dimensions
        return values

    def __eq__(self, other: object) -> bool:
        """The same agents in the same order with the same spaces."""
        return isinstance(other, JointBox) and list(self.parts.items()) == list(other.parts.items())

    __hash__ = None  # type: ignore[assignment]  # as every Gymnasium space with an order of its own

    def __repr__(self) -> str:
        return f"JointBox({', '.join(f'{name}: {part}' for name, part in self.parts.items())})"


@dataclass(frozen=True)
class Layout:
    """Which columns of joint observations (preprocessed) and joint actions are whose."""

    names: tuple[str, ...]
    observations: tuple[slice, ...]
    actions: tuple[slice, ...]
    choices: tuple[int, ...]
    """Of each agent's Discrete actions; 0 for a Box."""

    @classmethod
    def of(cls, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> "Layout":
        """
        :param observation_space: of a `JointEnv`, or any that belongs to one agent
        :param action_space: likewise
        :return: the layout
        :raises UnsupportedError: if only one of the two is joint, or an agent's actions are neither Box nor Discrete
        """
        if isinstance(observation_space, JointBox) != isinstance(action_space, JointBox):
            raise UnsupportedError(
                "observation_space and action_space must be those of a JointEnv: wrap the parallel environment, not the joint "
                f"one; got {observation_space} and {action_space}"
            )
        if not (isinstance(observation_space, JointBox) and isinstance(action_space, JointBox)):
            sizes = get_flattened_obs_dim(observation_space), get_action_dim(action_space)
            return cls((ALONE,), (slice(0, sizes[0]),), (slice(0, sizes[1]),), (0,))
        for name, part in action_space.parts.items():
            if not isinstance(part, spaces.Discrete) and not (isinstance(part, spaces.Box) and part.dtype.kind == "f"):
                raise UnsupportedError(f"the actions of agent {name!r} must be Discrete or a Box of floats, got {part}")
        return cls(
            tuple(action_space.parts),
            tuple(observation_space.columns.values()),
            tuple(action_space.columns.values()),
            tuple(int(part.n) if isinstance(part, spaces.Discrete) else 0 for part in action_space.parts.values()),
        )

    def __len__(self) -> int:
        return len(self.names)

    @property
    def action_dim(self) -> int:
        """A, the size of the joint action."""
        return int(self.actions[-1].stop)

    def alike(self, agents: tuple[int, ...]) -> bool:
        """Whether agents have observations of one size and actions of one size and kind."""
        kinds = {(size(self.observations[i]), size(self.actions[i]), self.choices[i]) for i in agents}
        return len(kinds) == 1

    def index(self, agent: str | int) -> int:
        """
        :param agent: name or number of an agent
        :return: its number
        :raises ValueError: if there is no such agent
        """
        if agent in self.names:
            return self.names.index(agent)
        if isinstance(agent, int) and not isinstance(agent, bool) and 0 <= agent < len(self):
            return agent
        raise ValueError(f"agent must be one of {', '.join(map(repr, self.names))} or its number from 0, got {agent!r}")


def size(columns: slice) -> int:
    """
    :param columns: of a joint vector
    :return: their number
    """
    return int(columns.stop - columns.start)


def agent_spaces(space: spaces.Space[Any]) -> list[spaces.Space[Any]]:
    """
    :param space: joint, or of the only agent
    :return: each agent's own
    """
    return list(space.parts.values()) if isinstance(space, JointBox) else [space]
