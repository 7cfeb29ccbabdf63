"""The learner's side of actors: when they work, what they are told, and how what they send is counted."""

import copy
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

import cloudpickle
import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback

from sb3_ac_ext.actors.actor import Actor, Recipe, Weights, Work
from sb3_ac_ext.actors.environments import environment_source
from sb3_ac_ext.actors.episodes import EpisodeWriter
from sb3_ac_ext.actors.normalization import statistics, update_statistics
from sb3_ac_ext.actors.pool import InlinePool, Pool
from sb3_ac_ext.base.checkpoint import CheckpointMixin
from sb3_ac_ext.base.training import TrainingMixin
from sb3_ac_ext.buffers.rollouts import copied
from sb3_ac_ext.buffers.segments import Result
from sb3_ac_ext.validation import Acts, ArgumentError, Needs, NonNegative, NonNegativeInt, PositiveInt

RAY = Needs("actors", "ray")


class ActorArguments:
    """
    What algorithms with actors take.

    :param actors: where they act: "inline" in this process, by turns, or "ray" in processes of their own, here or on other
        machines, while the learner computes (``pip install "sb3_ac_ext[distributed]"``)
    :param n_actors: how many there are; each has as many environments as ``env``, copies of them, but for the first one
        inline, which acts in ``env`` itself
    :param simulated_lag: updates by which the weights of actors in this process are behind the learner's
    :param max_policy_lag: updates behind which what actors send is thrown away; None for none
    :param ray_address: of a running cluster, such as "auto" or "head:6379"; None starts Ray on this machine
    :param actor_resources: what each actor needs of Ray, such as ``{"num_cpus": 1, "actor_node": 1}``
    :param actor_env_fn: makes one environment of an actor, where it cannot be found out how those of ``env`` were made
    """

    actors: Annotated[Literal["inline", "ray"], Acts.NEVER]
    n_actors: Annotated[PositiveInt, Acts.NEVER]
    simulated_lag: Annotated[NonNegativeInt, Acts.NEVER, Needs("actors", "inline")]
    max_policy_lag: Annotated[NonNegativeInt | None, Acts.ROLLOUT]
    ray_address: Annotated[str | None, Acts.NEVER, RAY]
    actor_resources: Annotated[dict[str, NonNegative] | None, Acts.NEVER, RAY]
    actor_env_fn: Annotated[Callable[..., gym.Env[Any, Any]] | None, Acts.NEVER]


class PastWeights:
    """
    The policy's parameters and buffers after each of the last updates.

    :param lag: how many updates ago the oldest ones are
    """

    def __init__(self, lag: int) -> None:
        self.entries: deque[tuple[int, dict[str, th.Tensor]]] = deque(maxlen=lag + 1)

    def remember(self, version: int, policy: th.nn.Module) -> None:
        """
        :param version: number of updates that there have been
        :param policy: as it is now
        """
        entry = version, {name: value.detach().clone() for name, value in policy.state_dict().items()}
        if self.entries and self.entries[-1][0] == version:  # a user may have changed it since
            self.entries.pop()
        self.entries.append(entry)

    def state_dict(self) -> dict[str, Any]:
        """All of them, as PyTorch saves them."""
        return {"entries": list(self.entries)}

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """
        :param state: what `state_dict` returned
        :param strict: not used
        """
        self.entries.extend((int(version), weights) for version, weights in state["entries"])


class ActorsMixin(TrainingMixin, CheckpointMixin):
    """
    Takes experience from a pool of actors, which opens in `learn` and outlives it; goes before `OnPolicyMixin` or
    `OffPolicyMixin`.
    """

    work: ClassVar[Work] = Actor.segment
    """What actors do: a method of their class."""
    _pool: Pool | None = None
    _env_fn: Callable[..., gym.Env[Any, Any]] | None = None
    """What has made the environment, where only its id was given."""
    _home: Actor | None = None
    """The actor that acts in ``env`` itself."""

    def __init__(
        self,
        *args: Any,
        actors: Literal["inline", "ray"] = "inline",
        n_actors: int = 1,
        simulated_lag: int = 0,
        max_policy_lag: int | None = None,
        ray_address: str | None = None,
        actor_resources: dict[str, float] | None = None,
        actor_env_fn: Callable[..., gym.Env[Any, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(env := kwargs.get("env"), str):
            self._env_fn = partial(gym.make, env)
        self.actors = actors
        self.n_actors = n_actors
        self.simulated_lag = simulated_lag
        self.max_policy_lag = max_policy_lag
        self.ray_address = ray_address
        self.actor_resources = actor_resources
        self.actor_env_fn = actor_env_fn
        self._turn = 0
        self._discarded = 0

    def _setup_model(self) -> None:
        super()._setup_model()
        self._past_weights = PastWeights(self.simulated_lag)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        self._check_lags()

    def _check_lags(self) -> None:
        if self.max_policy_lag is not None and self.simulated_lag > self.max_policy_lag:
            raise ArgumentError(
                f"max_policy_lag must be at least simulated_lag={self.simulated_lag}, or nothing is learned from, "
                f"got {self.max_policy_lag}"
            )

    # The pool

    @property
    def _acting(self) -> Any:
        """What of the policy acts."""
        return self.policy

    @property
    def _actor_class(self) -> type[Actor]:
        return Actor

    def _open(self) -> None:
        """Have a pool."""
        if self._pool is not None:
            return
        assert self.env is not None
        self._since, self._segments_of = (time.perf_counter(), self.num_timesteps), Counter[int]()
        self._writer = EpisodeWriter(self.env)
        self._running_returns: dict[tuple[int, int], np.ndarray] = {}
        if self.actors == "inline":
            self._pool = InlinePool(type(self).work, self._inline_actors(), self._turn)
        else:
            from sb3_ac_ext.actors.ray_pool import RayPool

            address, resources = self.ray_address, self.actor_resources
            self._pool = RayPool(type(self).work, self._recipe(), self.n_actors, address=address, resources=resources)

    def _inline_actors(self) -> list[Actor]:
        assert self.env is not None
        kind = self._actor_class
        policy = self._acting if self._shares_policy else cloudpickle.loads(self._pickled_policy())
        lock = self._acting_lock if self._shares_policy else None
        self._home = kind()
        self._home.join(self.env, policy, self.engine, lock)
        if self.n_actors == 1:
            return [self._home]
        recipe, others = self._recipe(), [kind(index) for index in range(1, self.n_actors)]
        for actor in others:
            with actor.failures_named():
                actor.start(recipe, policy, lock)
        return [self._home, *others]

    def _recipe(self) -> Recipe:
        seed = int(np.random.default_rng().integers(2**31)) if self.seed is None else self.seed
        if self.num_timesteps:  # what was seen before is not to be seen again
            seed = int(np.random.SeedSequence([seed, self.num_timesteps]).generate_state(1)[0])
        assert self.env is not None
        source = environment_source(self.env, self.actor_env_fn or self._env_fn)
        return Recipe(self._actor_class, source, self._pickled_policy(), seed, self.engine)

    def _pickled_policy(self) -> bytes:
        """What acts, on the CPU, with nothing that trains it."""
        policy: Any = copy.copy(self._acting)
        policy.optimizer = None
        pickled: bytes = cloudpickle.dumps(copy.deepcopy(policy).to("cpu"))
        return pickled

    @property
    def _shares_policy(self) -> bool:
        """Whether actors act with the learner's own policy."""
        return self.actors == "inline" and self.simulated_lag == 0

    @property
    def _version(self) -> int:
        """The number of the weights as they are now, one more after each `train`."""
        return self._n_updates

    def _weights(self) -> Weights:
        """What actors that begin now are told."""
        assert self.env is not None
        version, parameters = self._version, None
        if self.simulated_lag > 0:
            self._past_weights.remember(version, self._acting)
            version, past = self._past_weights.entries[0]
            parameters = {name: value.cpu().numpy() for name, value in past.items()}
        elif not self._shares_policy:
            parameters = {name: value.detach().cpu().numpy() for name, value in self._acting.state_dict().items()}
        return Weights(version, parameters, self._settings(), statistics(self.env))

    def _settings(self) -> dict[str, Any]:
        """The numbers that actors need, as they are now."""
        return {"n_steps": self.n_steps, "engine": self.engine}  # type: ignore[attr-defined]  # an argument

    def close(self) -> None:
        """Let the actors go: their environments, their processes, and Ray if it was started for them."""
        pool, self._pool, self._home = self._pool, None, None
        if pool is not None:
            self._turn = pool.turn
            pool.close()

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """See SB3's ``BaseAlgorithm.set_env``; actors for the new one are made in the next `learn`."""
        self.close()
        self._env_fn = None
        super().set_env(env, force_reset)

    # Results

    def _take(self) -> Result:
        """The next result that is not too old."""
        self._check_lags()  # it may have been set meanwhile
        while True:
            self._open()  # a callback may have closed it
            assert self._pool is not None
            if self._home is not None:
                self._home.observations = copied(self._last_obs)
            result = self._pool.take(self._weights())
            self._turn = self._pool.turn
            if self._home is not None and result.actor == self._home.index:
                self._last_obs, self._last_episode_starts = self._home.observations, result.dones[-1]
            lag = self._version - result.version
            if self.max_policy_lag is None or lag <= self.max_policy_lag:
                self.logger.record_mean("train/policy_lag", lag)
                return result
            self._discarded += 1

    def _consume(self, result: Result, callback: BaseCallback) -> bool:
        """
        Count a result's steps, and let callbacks see each.

        :param result: what an actor has sent
        :param callback: asked after every step
        :return: False if it stops the training; what is behind that step is not counted
        """
        foreign = self.actors == "ray" or result.actor > 0
        if foreign:
            self._learn_statistics(result)
        for t in range(result.n_steps):
            step = result.step(t)
            self.num_timesteps += result.n_envs
            callback.update_locals({"self": self, "env": self.env, "n_steps": t, "result": result, **step})
            if not callback.on_step():
                return False
            self._update_info_buffer(step["infos"], step["dones"])
            for i, info in enumerate(step["infos"]) if foreign else ():
                if "episode" in info:
                    self._writer.write(i, info["episode"])
        self._segments_of[result.actor] += 1
        return True

    def _learn_statistics(self, result: Result) -> None:
        """Let `VecNormalize` learn of what an actor has seen before it normalised that."""
        normalizer = self.get_vec_normalize_env()
        if normalizer is not None and result.original is not None:
            key = result.actor, result.generation
            before = self._running_returns.get(key)
            self._running_returns[key] = update_statistics(normalizer, *result.original, result.dones, before)

    def _record_actors(self) -> None:
        """What is there to be known of several actors."""
        if self._pool is None or (self.n_actors == 1 and self.actors == "inline"):
            return
        before, steps = self._since
        now = time.perf_counter()
        if now - before > 1:
            self.logger.record("actors/steps_per_second", (self.num_timesteps - steps) / (now - before))
            self._since = now, self.num_timesteps
        for name, value in (
            ("restarts", self._pool.restarts),
            ("lost_segments", self._pool.lost),
            ("discarded", self._discarded),
        ):
            self.logger.record(f"actors/{name}", value)
        for actor, number in sorted(self._segments_of.items()):
            self.logger.record(f"actors/segments_{actor}", number)

    # SB3

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        """See SB3."""
        result = super()._setup_learn(*args, **kwargs)
        self._open()
        return result

    def learn(self, *args: Any, **kwargs: Any) -> Self:
        """See the mixin behind this one; whatever goes wrong, actors are let go."""
        try:
            return super().learn(*args, **kwargs)  # type: ignore[safe-super]  # of the mixin behind
        except BaseException:
            self.close()
            raise

    def engine_report(self) -> dict[str, str]:
        """See `TrainingMixin.engine_report`; what an actor in this process runs is there too, as long as there is one."""
        report: dict[str, str] = super().engine_report()
        if self._home is None or not self.engine:
            return report
        return report | {f"actor {name}": how for name, how in self._home.engine_report().items()}

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        state_dicts, tensors = super()._get_torch_save_params()
        return [*state_dicts, *(["_past_weights"] if self.simulated_lag else [])], tensors

    def _translated_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """A file of other lags has other weights of the past, or none."""
        translated: dict[str, Any] = super()._translated_parameters(parameters)
        past = translated.pop("_past_weights", self._past_weights.state_dict())
        return {**translated, **({"_past_weights": past} if self.simulated_lag else {})}

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), *TRANSIENT, "_past_weights", "_env_fn", "actor_env_fn"]

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        return {name: value for name, value in state.items() if name not in TRANSIENT}


TRANSIENT = ("_pool", "_home", "_writer", "_running_returns", "_since", "_segments_of")
"""Attributes of a learner that go with its pool."""
