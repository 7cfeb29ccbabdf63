"""Small deterministic environments of several agents, with PettingZoo's interface but without PettingZoo."""

from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

INF = np.inf


class Meadow:
    """
    Three unequal agents: "cow" grazes in a Box of [0, 3], "dog" chooses one of three from 1 on, "fly" moves in a 2 x 1 Box.

    At step t (from 1 on) the rewards are t, -t and 10 t. Observations are t, and what everybody has just done where the space
    is large enough. The episode takes ``length`` steps; ``ends`` says in which step an agent ends earlier.

    :param length: of an episode
    :param truncates: whether its end is a truncation
    :param ends: step and kind of an earlier end by agent, such as ``{"fly": (2, "terminates")}``
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "name": "meadow_v0", "render_fps": 5}
    possible_agents: ClassVar[list[str]] = ["cow", "dog", "fly"]
    observations: ClassVar[dict[str, spaces.Space]] = {
        "cow": spaces.Box(-INF, INF, (4,), np.float32),
        "dog": spaces.Box(-INF, INF, (2, 3), np.float64),
        "fly": spaces.Discrete(6),
    }
    actions: ClassVar[dict[str, spaces.Space]] = {
        "cow": spaces.Box(0, 3, (1,), np.float32),
        "dog": spaces.Discrete(3, start=1),
        "fly": spaces.Box(np.array([[-1.0], [0.0]], np.float32), np.array([[1.0], [4.0]], np.float32)),
    }

    def __init__(
        self,
        length: int = 5,
        truncates: bool = False,
        ends: dict[str, tuple[int, str]] | None = None,
        render_mode: str | None = None,
    ) -> None:
        kind = "truncates" if truncates else "terminates"
        self.ends = {**dict.fromkeys(self.possible_agents, (length, kind)), **(ends or {})}
        self.render_mode = render_mode
        self.agents: list[str] = []
        self.seen: list[dict[str, Any]] = []
        """The actions of every step."""
        self.random = np.random.default_rng(0)
        self.closed = False

    def observation_space(self, agent: str) -> spaces.Space:
        return self.observations[agent]

    def action_space(self, agent: str) -> spaces.Space:
        return self.actions[agent]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.t = 0
        self.agents = list(self.possible_agents)
        self.start = float(self.random.random())
        return self._observe({}), {agent: {} for agent in self.agents}

    def _observe(self, actions: dict[str, Any]) -> dict[str, Any]:
        done = np.concatenate([np.ravel(actions.get(agent, 0)) for agent in self.possible_agents])
        cow, dog = np.zeros(4, np.float32), np.zeros(6)
        cow[0], cow[1] = self.t, self.start
        cow[2:] = done[:2]
        dog[0], dog[1 : 1 + len(done)] = self.t, done
        return {agent: {"cow": cow, "dog": dog.reshape(2, 3), "fly": self.t}[agent] for agent in self.agents}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        assert set(actions) == set(self.agents)
        for agent, action in actions.items():
            assert self.actions[agent].contains(action), (agent, action)
        self.seen.append(actions)
        self.t += 1
        observations = self._observe(actions)
        rewards = {
            agent: factor * self.t for agent, factor in {"cow": 1.0, "dog": -1.0, "fly": 10.0}.items() if agent in actions
        }
        over = {kind: {a: self.ends[a] == (self.t, kind) for a in self.agents} for kind in ("terminates", "truncates")}
        infos = {agent: {"at": self.t} for agent in self.agents}
        self.agents = [agent for agent in self.agents if self.ends[agent][0] > self.t]
        return observations, rewards, over["terminates"], over["truncates"], infos

    def render(self) -> np.ndarray:
        return np.full((4, 4, 3), self.t, np.uint8)

    def close(self) -> None:
        self.closed = True


class Crowd:
    """
    Alike agents with random observations and actions of one kind; agent i's reward is its own first observation times i + 1.

    :param n: number of agents
    :param discrete: whether actions are one of three; otherwise Boxes of two
    :param zero_sum: whether the second agent's reward is minus the first one's
    :param size: of an observation
    """

    def __init__(self, n: int = 3, discrete: bool = False, zero_sum: bool = False, size: int = 4) -> None:
        self.possible_agents = [f"agent_{i}" for i in range(n)]
        self.agents: list[str] = []
        self.space = spaces.Box(-INF, INF, (size,), np.float32)
        self.choice = spaces.Discrete(3) if discrete else spaces.Box(-1, 2, (2,), np.float32)
        self.zero_sum = zero_sum
        self.random = np.random.default_rng(0)

    def observation_space(self, agent: str) -> spaces.Space:
        return self.space

    def action_space(self, agent: str) -> spaces.Space:
        return self.choice

    def _observe(self) -> dict[str, np.ndarray]:
        return {agent: self.random.normal(size=self.space.shape).astype(np.float32) for agent in self.possible_agents}

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        if seed is not None:
            self.random = np.random.default_rng(seed)
        self.t, self.agents = 0, list(self.possible_agents)
        self.last = self._observe()
        return self.last, {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, Any]) -> tuple[dict, dict, dict, dict, dict]:
        self.t += 1
        rewards = {agent: (i + 1) * float(self.last[agent][0]) for i, agent in enumerate(self.possible_agents)}
        if self.zero_sum:
            rewards["agent_1"] = -rewards["agent_0"]
        self.last = self._observe()
        over = dict.fromkeys(self.possible_agents, self.t == 7)
        self.agents = [] if self.t == 7 else self.agents
        return self.last, rewards, over, dict.fromkeys(over, False), {agent: {} for agent in over}

    def close(self) -> None:
        pass
