"""PettingZoo's parallel environments as Gymnasium environments, and their ids."""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import gymnasium as gym
import numpy as np

from sb3_ac_ext.envs.joint_spaces import JointBox, Layout
from sb3_ac_ext.validation import NonFiniteError

ENTRY_POINT = f"{__name__}:make_joint_env"
MPE_TASKS = (
    "collect_treasure_v1",
    "simple_v3",
    "simple_adversary_v3",
    "simple_crypto_v3",
    "simple_formation_v1",
    "simple_line_v1",
    "simple_push_v3",
    "simple_reference_v3",
    "simple_speaker_listener_v4",
    "simple_spread_v3",
    "simple_tag_v3",
    "simple_world_comm_v3",
)
"""The modules of mpe2."""


def is_multi_agent(env: Any) -> bool:
    """
    :param env: any object
    :return: whether it follows one of PettingZoo's two interfaces
    """
    return not isinstance(env, gym.Env) and (hasattr(env, "possible_agents") or hasattr(env, "agent_iter"))


class JointEnv(gym.Env[np.ndarray, np.ndarray]):
    """
    A PettingZoo ``ParallelEnv`` as one Gymnasium environment: joint observations, joint actions, the sum of the rewards.

    Observations and actions are a `JointBox`. The episode ends when every agent's has; it is truncated if any agent's was.
    An agent that ends earlier observes 0 from then on, its actions go nowhere and its reward is 0. ``info`` has vectors with
    one entry for each agent, in the order of ``possible_agents``: ``agent_rewards``; ``agent_terminated`` and
    ``agent_truncated``, whether the step ended the agent's episode that way; ``agent_active``, whether it acted in the step;
    ``agent_returns``, at the end the sums of its rewards; and the agents' own infos as ``agent_infos``.

    :param env: the parallel environment, all of whose agents are there at each reset
    :raises TypeError: if it is no parallel environment
    :raises UnsupportedError: for spaces that cannot be joint
    """

    def __init__(self, env: Any) -> None:
        check_parallel(env)
        self.parallel_env = env
        self.metadata = {"render_modes": [], **getattr(env, "metadata", {})}
        self.render_mode = getattr(env, "render_mode", None)
        self.agents = list(env.possible_agents)
        self.observation_space = JointBox({str(agent): env.observation_space(agent) for agent in self.agents})
        self.action_space = JointBox({str(agent): env.action_space(agent) for agent in self.agents})
        Layout.of(self.observation_space, self.action_space)  # refuses what it cannot place
        self._ended = np.zeros(len(self.agents), bool)
        self._was_truncated = False
        self._returns = np.zeros(len(self.agents))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """
        See Gymnasium's ``Env.reset``.

        :raises ValueError: unless exactly the possible agents are there
        """
        super().reset(seed=seed)
        observations, infos = self.parallel_env.reset(seed=seed, options=options)
        present = list(self.parallel_env.agents)
        if set(present) != set(self.agents):
            raise ValueError(
                f"every agent of possible_agents must be there at each reset, got {present} instead of {self.agents}; agents "
                "that appear late or change from episode to episode are not supported"
            )
        self._ended[:], self._was_truncated = False, False
        self._returns[:] = 0
        return self._join(observations, self.agents), {"agent_infos": self._copied(infos)}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """
        See Gymnasium's ``Env.step``.

        :raises ValueError: if an agent appears late, leaves without an end, gets no observation or reward, or one that is no
            number
        :raises NonFiniteError: if a reward is NaN or infinite
        """
        active = ~self._ended
        acting = [agent for agent, is_active in zip(self.agents, active, strict=True) if is_active]
        actions = self.action_space.split(action)  # type: ignore[attr-defined]
        observations, rewards, terminations, truncations, infos = self.parallel_env.step(
            {agent: actions[str(agent)] for agent in acting}
        )
        vector = np.zeros(len(self.agents), np.float32)
        vector[active] = [self._number(self._of("reward", rewards, agent), agent) for agent in acting]
        self._check_rewards(vector)
        terminated, truncated = active.copy(), active.copy()
        terminated[active] = [bool(terminations.get(agent, False)) for agent in acting]
        truncated[active] = [bool(truncations.get(agent, False)) for agent in acting]
        truncated &= ~terminated
        self._ended |= terminated | truncated
        self._check_agents(self.parallel_env.agents)
        self._was_truncated |= bool(truncated.any())
        self._returns += vector
        over = bool(self._ended.all())
        info = {
            "agent_rewards": vector,
            "agent_terminated": terminated,
            "agent_truncated": truncated,
            "agent_active": active,
            "agent_infos": self._copied(infos),
        }
        if over:
            info["agent_returns"] = self._returns.copy()
        ends = over and not self._was_truncated, over and self._was_truncated
        return self._join(observations, acting), float(vector.sum()), *ends, info

    def _join(self, observations: Mapping[Any, Any], agents: Iterable[Any]) -> np.ndarray:
        values = {str(agent): self._of("observation", observations, agent) for agent in agents}
        joint: np.ndarray = self.observation_space.join(values)  # type: ignore[attr-defined]
        return joint

    def _of(self, what: str, values: Mapping[Any, Any], agent: Any) -> Any:
        try:
            return values[agent]
        except KeyError:
            raise ValueError(f"the environment must give agent {agent!r} its {what}, got one for {list(values)}") from None

    @staticmethod
    def _number(reward: Any, agent: Any) -> float:
        try:
            return float(np.asarray(reward, np.float64).item())
        except (TypeError, ValueError):
            raise ValueError(f"the reward of agent {agent!r} must be a number, got {reward!r}") from None

    def _copied(self, infos: Mapping[Any, Any] | None) -> dict[str, dict[str, Any]]:
        """Without what belongs to no agent; environments may give the same objects again at the next step, or None."""
        infos = {} if infos is None else infos
        return {str(agent): self._info(infos[agent], agent) for agent in self.agents if agent in infos}

    @staticmethod
    def _info(info: Any, agent: Any) -> dict[str, Any]:
        if info is None:
            return {}
        if not isinstance(info, Mapping):
            raise ValueError(f"the info of agent {agent!r} must be a dict, got {info!r}")
        return dict(info)

    def _check_rewards(self, rewards: np.ndarray) -> None:
        if not np.isfinite(rewards).all():
            wrong = {str(agent): float(r) for agent, r in zip(self.agents, rewards, strict=True) if not np.isfinite(r)}
            raise NonFiniteError(f"rewards must be finite, got {wrong}")

    def _check_agents(self, present: Iterable[Any]) -> None:
        """What the environment says of who is still there must be what it said of their ends."""
        expected = {agent for agent, ended in zip(self.agents, self._ended, strict=True) if not ended}
        late, lost = set(present) - expected, expected - set(present)
        if late:
            raise ValueError(
                f"agents must be there from the reset on, got {sorted(map(str, late))} late or again after an end"
            )
        if lost:
            raise ValueError(f"an agent must leave by termination or truncation, got {sorted(map(str, lost))} leaving without")

    def render(self) -> Any:
        """See Gymnasium's ``Env.render``."""
        return self.parallel_env.render()

    def close(self) -> None:
        """See Gymnasium's ``Env.close``."""
        self.parallel_env.close()


def check_parallel(env: Any) -> None:
    """
    :param env: any object
    :raises TypeError: unless it follows PettingZoo's ``ParallelEnv`` and knows its possible agents
    """
    if hasattr(env, "agent_iter") and hasattr(env, "last"):
        raise TypeError(
            "env must be a PettingZoo ParallelEnv, got one in which agents take turns (AEC), "
            f"{type(env).__name__}; convert it with pettingzoo.utils.conversions.aec_to_parallel(env)"
        )
    needed = ("possible_agents", "observation_space", "action_space", "reset", "step")
    missing = [name for name in needed if not hasattr(env, name)]
    if missing:
        raise TypeError(f"env must be a PettingZoo ParallelEnv, got a {type(env).__name__} without {', '.join(missing)}")


def make_joint_env(factory: str | Callable[..., Any], render_mode: str | None = None, **kwargs: Any) -> JointEnv:
    """
    What ``gymnasium.make`` calls for a registered parallel environment.

    :param factory: makes the parallel environment, or where it is, as "module:function"
    :param render_mode: passed on unless it is None
    :param kwargs: passed on
    :return: the joint environment
    """
    if isinstance(factory, str):
        module, _, name = factory.partition(":")
        factory = getattr(import_module(module), name)
        assert callable(factory)
    if render_mode is not None:
        kwargs["render_mode"] = render_mode
    return JointEnv(factory(**kwargs))


def register_parallel_env(
    id: str, factory: str | Callable[..., Any], max_episode_steps: int | None = None, **kwargs: Any
) -> None:
    """
    Give a parallel environment an id for ``gymnasium.make`` and RL Zoo; nothing is imported or made until then.

    :param id: such as "MyTask-v0"
    :param factory: makes the parallel environment, or where it is, as "module:function"
    :param max_episode_steps: where episodes are truncated; None if the environment does it
    :param kwargs: arguments of the factory, which those given to ``gymnasium.make`` override
    :raises TypeError: if ``factory`` is neither
    """
    if not (callable(factory) or (isinstance(factory, str) and factory.partition(":")[2])):
        raise TypeError(f'factory must be callable or a string "module:function", got {factory!r}')
    gym.register(id, ENTRY_POINT, max_episode_steps=max_episode_steps, kwargs={"factory": factory, **kwargs})


def mpe_id(task: str, continuous: bool) -> str:
    """
    :param task: a module of mpe2
    :param continuous: whether actions are continuous
    :return: "simple_spread_v3" as "MPESimpleSpread-v3" or "MPESimpleSpreadContinuous-v3"
    """
    name, _, version = task.rpartition("_")
    return f"MPE{name.title().replace('_', '')}{'Continuous' if continuous else ''}-{version}"


def register_mpe() -> None:
    """Register the tasks of mpe2, with discrete and with continuous actions, if it is installed. Idempotent."""
    if find_spec("mpe2") is None:
        return
    for task in MPE_TASKS:
        for continuous in (False, True):
            name = mpe_id(task, continuous)
            if name not in gym.registry:
                register_parallel_env(name, f"mpe2.{task}:parallel_env", continuous_actions=continuous)
