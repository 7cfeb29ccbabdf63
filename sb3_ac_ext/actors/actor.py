"""An actor: environments, a policy that acts in them, and what is made of that. It knows nothing of processes."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, NoReturn

import cloudpickle
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_ac_ext.actors.environments import EnvironmentSource
from sb3_ac_ext.actors.normalization import set_statistics
from sb3_ac_ext.base.environment_checks import check_finite
from sb3_ac_ext.base.on_policy import within_bounds
from sb3_ac_ext.base.training import TrainingMode
from sb3_ac_ext.buffers.rollouts import copied
from sb3_ac_ext.buffers.segments import Result, Segment, joined
from sb3_ac_ext.engine import Engine, Network
from sb3_ac_ext.validation import ArgumentError, NonFiniteError


class ActorError(RuntimeError):
    """An actor's environments or policy have failed; the message says which actor, and why."""


class ActorValueError(ActorError, ValueError):
    """They have, by an error for which RL Zoo's search gives up a trial and goes on with the next one."""


class Weights(NamedTuple):
    """What an actor is told before it acts."""

    version: int
    """How many updates they are the result of."""
    parameters: Mapping[str, np.ndarray] | None
    """The policy's parameters and buffers; None where its policy is the learner's own."""
    settings: Mapping[str, Any]
    """Numbers of the algorithm as they are now, "n_steps" among them."""
    statistics: Any = None
    """Of `VecNormalize`, None where the actor's environments are the learner's own, or have none."""


Work = Callable[["Actor", Weights], Result]
"""What an actor is to do: a method of its class."""


@dataclass(frozen=True)
class Recipe:
    """
    What actors are made of; it can be sent to another machine.

    :param actor: their class
    :param source: of their environments
    :param policy: pickled, without its optimizer
    :param seed: of all of them together
    :param engine: whether actions and gradients are recorded and replayed
    """

    actor: type["Actor"]
    source: EnvironmentSource
    policy: bytes
    seed: int
    engine: bool


class Actor:
    """
    Environments and a policy that acts in them.

    Making one cannot fail; `start` and `join` give it what it acts with.

    :param index: which one it is
    :param generation: how often it has been replaced
    """

    env: VecEnv
    policy: Any
    observations: Any
    """``(N, ...)`` what the environments show."""
    keeps_original: ClassVar[bool] = False
    """Whether its segments have what the learner's own ``VecNormalize`` was given, as they have it of an actor's own one."""

    def __init__(self, index: int = 0, generation: int = 0) -> None:
        self.index, self.generation, self.sequence = index, generation, 0

    def start(self, recipe: Recipe, policy: Any = None, lock: Any = None) -> None:
        """
        Make environments as the learner's are.

        :param recipe: for them, and for the policy
        :param policy: to act with; None to make one, where this process is the actor's alone: then its random generators
            are seeded, and PyTorch has one thread
        :param lock: of whoever uses the policy
        """
        seeds = np.random.SeedSequence([recipe.seed, self.index, self.generation]).generate_state(3)
        if policy is None:
            th.set_num_threads(1)
            th.manual_seed(int(seeds[1]))
            np.random.seed(seeds[2])  # noqa: NPY002  # policies and environments draw from the global one
            policy = cloudpickle.loads(recipe.policy)
        self._act_with(recipe.source.make(int(seeds[0])), policy, recipe.engine, lock)
        self.own = True
        self.observations = copied(self.env.reset())

    def join(self, env: VecEnv, policy: Any, engine: bool, lock: Any = None) -> None:
        """
        Act in the learner's own environments.

        :param env: those
        :param policy: the learner's own, or a copy
        :param engine: see `Recipe`
        :param lock: of whoever uses the policy
        """
        self._act_with(env, policy, engine, lock)
        self.own = False

    def _act_with(self, env: VecEnv, policy: Any, engine: bool, lock: Any = None) -> None:
        self.env, self.policy = env, policy
        self._mode, self._lock = TrainingMode(policy), lock or threading.RLock()
        self._make_engine(engine)

    def _make_engine(self, enabled: bool) -> None:
        self._engine = Engine(self, self._networks, enabled=enabled, device=self.policy.device)

    def _networks(self) -> Mapping[str, Network]:
        """What it trains; nothing."""
        return {}

    def engine_report(self) -> dict[str, str]:
        """What the engine replays of what it does, see `Engine.report`."""
        return self._engine.report()

    def close(self) -> None:
        """Close the environments, unless they are the learner's."""
        if getattr(self, "own", False):
            self.env.close()

    def do(self, work: Work, weights: Weights) -> Result:
        """
        :param work: what to do
        :param weights: to do it with
        :return: the result, labelled
        :raises ActorError: for whatever goes wrong
        :raises NonFiniteError: if that is a number which is not finite
        :raises ArgumentError: if it is an argument, which the message names
        """
        with self.failures_named():
            if weights.parameters is not None:
                self.policy.load_state_dict({name: th.tensor(array) for name, array in weights.parameters.items()})
            if weights.statistics is not None and self.own:
                set_statistics(self.env, weights.statistics)
            if (enabled := weights.settings.get("engine", self._engine.enabled)) is not self._engine.enabled:
                self._make_engine(enabled)
            result = work(self, weights)
        result.version, result.actor, result.generation = weights.version, self.index, self.generation
        result.sequence = self.sequence
        self.sequence += 1
        return result

    @contextmanager
    def failures_named(self) -> Iterator[None]:
        """Say which actor it was that something has failed in."""
        try:
            yield
        except (ArgumentError, ActorError):
            raise
        except NonFiniteError as error:
            raise NonFiniteError(f"actor {self.index} (generation {self.generation}): {error}") from error
        except Exception as error:
            kind = ActorValueError if isinstance(error, (ValueError, AssertionError)) else ActorError
            name = f"actor {self.index} (generation {self.generation})"
            raise kind(f"{name} failed: {type(error).__name__}: {error}") from error

    # Acting

    def segment(self, weights: Weights) -> Segment:
        """
        Act for some steps.

        :param weights: whose settings say "n_steps"
        :return: what has happened
        :raises NonFiniteError: if a reward is not finite, or what the policy makes of an observation
        """
        self._mode.set(False)
        normalizer = unwrap_vec_normalize(self.env) if self.own or self.keeps_original else None
        observations, rewards, dones, infos, outputs = [self.observations], [], [], [], []
        original, original_rewards = [copied(normalizer.get_original_obs())] if normalizer else [], []
        for _ in range(weights.settings["n_steps"]):
            with self._non_finite_located():
                outputs.append(self._act(weights))
                new_obs, reward, done, info = self._step(outputs[-1]["actions"])
            self.observations = copied(new_obs)
            observations.append(self.observations)
            rewards.append(np.array(reward))  # environments may use their memory again
            dones.append(np.array(done, dtype=bool))
            infos.append(_kept(info))
            if normalizer is not None:
                original.append(copied(normalizer.get_original_obs()))
                original_rewards.append(normalizer.get_original_reward())
        behaviour = joined(outputs)
        segment = Segment(
            observations=joined(observations),
            actions=behaviour.pop("actions"),
            rewards=np.stack(rewards),
            dones=np.stack(dones),
            infos=infos,
            behaviour=behaviour,
            original=(joined(original), np.stack(original_rewards)) if normalizer else None,
        )
        self._check(segment)
        return segment

    def _act(self, weights: Weights) -> dict[str, np.ndarray]:
        """``(N, ...)`` each: "actions" as the distribution gives them, and what is to be known of it later."""
        return self._outputs()

    def _outputs(self) -> dict[str, np.ndarray]:
        """What `_sample` makes of the observations."""
        outputs = None
        if self.policy.device.type == "cpu":
            outputs = self._engine.evaluate(self._sample, (self.observations,))
        if outputs is None:
            with self._lock, th.no_grad():
                batch = (obs_as_tensor(self.observations, self.policy.device),)
                outputs = {name: value.cpu().numpy() for name, value in self._sample(batch).items()}
        return outputs

    def _sample(self, batch: tuple[Any]) -> dict[str, th.Tensor]:
        with self._lock:
            actions, _, log_probs = self.policy(batch[0])
        chosen = isinstance(self.policy.action_space, spaces.Discrete)
        return {"actions": actions if chosen else actions.reshape(len(actions), -1), "log_probs": log_probs}

    def _step(self, actions: np.ndarray) -> Any:
        """What the environments' ``step`` returns for the distribution's actions."""
        return self.env.step(self._environment_actions(actions))

    def _environment_actions(self, actions: np.ndarray) -> np.ndarray:
        """``(N, ...)`` what the environments get for the distribution's actions."""
        return within_bounds(self.policy, actions.reshape(-1, *self.policy.action_space.shape))

    @contextmanager
    def _non_finite_located(self) -> Iterator[None]:
        """Say which environment gave NaN where the policy, or an environment, would only complain of what it led to."""
        try:
            yield
        except Exception as error:
            check_finite("observation", self.observations, np.arange(self.env.num_envs), cause=error)
            raise

    def _check(self, segment: Segment) -> None:
        check_finite("reward", segment.rewards, np.arange(segment.n_envs), env_axis=1)
        for name, values in segment.behaviour.items():
            if not np.isfinite(values).all():
                self.refuse(name, segment)

    def refuse(self, what: str, segment: Segment) -> NoReturn:
        """
        :param what: the policy has made of a segment that is not finite
        :param segment: the cause, if its observations are not
        :raises NonFiniteError: always
        """
        check_finite("observation", segment.observations, np.arange(segment.n_envs), env_axis=1)
        raise NonFiniteError(
            f"the policy's {what} became non-finite; lower the learning rate, set max_grad_norm, or normalise observations "
            "and rewards"
        )


def _kept(infos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The infos of a step, with copies of last observations, whose memory environments may use again."""
    name = "terminal_observation"
    return [{**info, name: copied(info[name])} if name in info else info for info in infos]
