"""
Where the environments of actors come from: copies of the training environment, never another one.

They are made by ``actor_env_fn`` if the user gave it; else by the functions that the training environment was made by; else
they are copies of its environments as they are. Where none of this goes there is an `ArgumentError`.
"""

import inspect
import io
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from types import CellType, FunctionType
from typing import Any
from weakref import WeakValueDictionary

import cloudpickle
import gymnasium as gym
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common import env_util
from stable_baselines3.common.monitor import Monitor, ResultsWriter
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecEnvWrapper, VecNormalize, VecVideoRecorder
from stable_baselines3.common.vec_env.util import obs_space_info

from sb3_ac_ext.actors.episodes import no_monitor_files, silent_writer
from sb3_ac_ext.actors.remembering import EnvFn, remembered
from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError, shown

ActorEnvFn = Callable[..., gym.Env[Any, Any]]
REMEDY = (
    "give actor_env_fn, a function that makes one environment of an actor with all its wrappers, such as "
    'actor_env_fn=lambda: gym.make("CartPole-v1"); if it needs an argument, it gets the index of the environment'
)


ZOO_LIMIT = "PatchedTimeLimit"
"""What RL Zoo puts in the place of Gymnasium's time limit, in processes that have imported it."""


@dataclass(frozen=True)
class EnvironmentSource:
    """
    All that an actor needs to build its own copy of the training environment, wherever it runs. See `environment_source`.
    """

    env_fns: bytes
    """A pickle of the functions that make the environments, in their order."""
    wrappers: tuple[tuple[bytes, bytes], ...]
    """Of each VecEnv wrapper its class and its attributes, the innermost first."""
    kinds: tuple[tuple[str, ...], ...] | None
    """Of each environment the names of its wrappers, its class and its id; None if others may be made."""
    specs: Mapping[str, EnvSpec]
    """What Gymnasium knows of their ids here, as it may be known nowhere else."""
    time_limit: type[Any]
    """Gymnasium's, or what RL Zoo has put in its place: pickles name its module, whose import does that elsewhere too."""
    spaces: tuple[Any, Any]
    """Keys and shapes of observations without VecEnv wrappers, and the action space."""

    def make(self, seed: int | None = None) -> VecEnv:
        """
        The environments in this process, with the training environment's VecEnv wrappers. Its ``VecNormalize`` uses
        statistics and does not change them; a ``VecVideoRecorder`` is left out. They write no Monitor files.

        :param seed: of the first environment's first reset, the next one's is larger by 1
        :return: as many environments as the training environment has
        :raises ArgumentError: if they are others than those of the training environment
        """
        for name, spec in self.specs.items():
            if name not in gym.registry and isinstance(spec.entry_point, str):
                import_module(spec.entry_point.partition(":")[0])  # which may register its ids itself
            gym.registry.setdefault(name, spec)
        with no_monitor_files():
            venv = DummyVecEnv(cloudpickle.loads(self.env_fns))
        _use(venv)
        self._check(venv)
        chain: list[VecEnv] = [venv]
        for cls, attributes in self.wrappers:
            chain.append(_wrapped(chain, cls, attributes))
        chain[-1].seed(seed)
        chain[-1].action_space.seed(seed)
        return chain[-1]

    def _check(self, venv: VecEnv) -> None:
        made = kinds(venv)
        if self.kinds is not None and made != self.kinds:
            raise ArgumentError(
                f"the functions that the training environment was made by make {_listed(made)} now, and made "
                f"{_listed(self.kinds)} then (has a variable that they use got another value?); {REMEDY}"
            )
        if _spaces(venv) != self.spaces:
            raise ArgumentError(
                "actor_env_fn must make environments with the training environment's spaces, got observations of "
                f"{_spaces(venv)[0]} and actions of {_spaces(venv)[1]} instead of {self.spaces[0]} and {self.spaces[1]}"
            )


def environment_source(venv: VecEnv, actor_env_fn: ActorEnvFn | None = None) -> EnvironmentSource:
    """
    What the functions use is what it is now. What was done to the environments since they were made, by ``set_attr`` for
    instance, their copies show; environments that are made anew do not.

    :param venv: the training environment, with all its wrappers
    :param actor_env_fn: makes one environment, ``venv.num_envs`` times for each actor; called with the index of the
        environment if it cannot be called without an argument. What it makes gets a Monitor where the training environment
        has one and it has none
    :return: what builds copies of ``venv``; can be pickled
    :raises ArgumentError: if it is not known how to make them, says what to give; if wrappers cannot be copied
    """
    chain = [venv]
    while isinstance(chain[0], VecEnvWrapper):
        chain.insert(0, chain[0].venv)
    if sum(isinstance(part, VecNormalize) for part in chain) > 1:
        raise ArgumentError("env must have at most one VecNormalize where actors play, got several")
    base = chain[0]
    if isinstance(base, DummyVecEnv):
        _in_use.update({id(env.unwrapped): env.unwrapped for env in base.envs})
    names = kinds(base)
    found = [part for name in names for part in name if part in gym.registry]
    return EnvironmentSource(
        env_fns=_pickled_env_fns(base, actor_env_fn),
        wrappers=_pickled_wrappers(chain),
        kinds=names if actor_env_fn is None else None,
        specs={name: gym.registry[name] for name in found},
        time_limit=gym.wrappers.TimeLimit,
        spaces=_spaces(base),
    )


# The environments


def _pickled_env_fns(base: VecEnv, actor_env_fn: ActorEnvFn | None) -> bytes:
    if actor_env_fn is not None:
        env_fns = _of_actors(base, actor_env_fn)
        try:
            return _dumps(env_fns)
        except Exception as error:
            message = f"actor_env_fn must be picklable with cloudpickle, got {shown(actor_env_fn)}: {error}"
            raise ArgumentError(message) from error
    reasons = []
    for what, env_fns in _candidates(base):
        try:
            return _dumps(env_fns)
        except Exception as error:  # pickling runs foreign code
            reasons.append(f"{what} cannot be pickled ({type(error).__name__}: {error})")
    reason = "; ".join(reasons) or f"nobody knows how a {type(base).__name__} was made"
    raise ArgumentError(f"actors cannot copy the training environment, {reason}: {REMEDY}")


def _of_actors(base: VecEnv, actor_env_fn: ActorEnvFn) -> list[EnvFn]:
    if not callable(actor_env_fn):
        raise ArgumentTypeError(f"actor_env_fn must be a function that makes an environment, got {shown(actor_env_fn)}")
    try:
        inspect.signature(actor_env_fn).bind()
    except TypeError:
        env_fns: list[EnvFn] = [partial(actor_env_fn, index) for index in range(base.num_envs)]
    except ValueError:  # of what has no signature
        env_fns = [actor_env_fn] * base.num_envs
    else:
        env_fns = [actor_env_fn] * base.num_envs
    monitored = base.env_is_wrapped(Monitor) if isinstance(base, DummyVecEnv | SubprocVecEnv) else [False] * base.num_envs
    return [partial(_made, *pair) for pair in zip(env_fns, monitored, strict=True)]


def _made(fn: EnvFn, monitored: bool) -> gym.Env[Any, Any]:
    env = fn()
    if not isinstance(env, gym.Env):
        raise ArgumentTypeError(f"actor_env_fn must make a gymnasium.Env, got {shown(fn)}, which made {shown(env)}")
    return Monitor(env) if monitored and not env_util.is_wrapped(env, Monitor) else env


def _candidates(base: VecEnv) -> Iterator[tuple[str, list[EnvFn]]]:
    """What environments can be made of, in the order of preference, each with its name."""
    if type(base) not in (DummyVecEnv, SubprocVecEnv):
        return
    if env_fns := remembered(base):
        yield "the functions that it was made by", [_without_monitor_dir(fn) for fn in env_fns]
    if isinstance(base, DummyVecEnv):
        yield "its environments", [partial(_itself, env) for env in base.envs]


def _itself(env: gym.Env[Any, Any]) -> gym.Env[Any, Any]:
    return env


def _without_monitor_dir(fn: EnvFn) -> EnvFn:
    """A function of SB3's ``make_vec_env`` such that it makes no folder for a Monitor's file."""
    if not isinstance(fn, FunctionType) or fn.__module__ != env_util.__name__ or not fn.__closure__:
        return fn
    cells = zip(fn.__code__.co_freevars, fn.__closure__, strict=True)
    closure = tuple(CellType(None) if name == "monitor_dir" else cell for name, cell in cells)
    return FunctionType(fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, closure)


# Pickling


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """Leaves out the files of Monitors, and refuses what would not be a copy: see the messages."""

    references: Mapping[int, int]
    """By their ``id`` the VecEnvs that are not pickled but found by a number, where wrappers are pickled."""

    def persistent_id(self, obj: Any) -> int | None:
        return self.references.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, ResultsWriter):
            return silent_writer, ()
        if isinstance(obj, VecEnv) or (self.references and isinstance(obj, gym.Env)):
            raise pickle.PicklingError(f"a {type(obj).__name__} cannot be copied with it")
        if _owns_a_resource(type(obj)):
            raise pickle.PicklingError(f"a {type(obj).__name__} owns something outside Python")
        return super().reducer_override(obj)


def _owns_a_resource(cls: type) -> bool:
    """Whether objects have something to do at their end that they would do twice if there were two, as PyBullet's clients."""
    pickles_itself = any(
        getattr(cls, name, None) is not getattr(object, name) for name in ("__getstate__", "__reduce__", "__reduce_ex__")
    )
    return hasattr(cls, "__del__") and not pickles_itself


def _dumps(obj: Any, references: Mapping[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.references = references or {}
    pickler.dump(obj)
    return file.getvalue()


class _Unpickler(pickle.Unpickler):
    chain: list[VecEnv]

    def persistent_load(self, pid: int) -> VecEnv:
        return self.chain[pid]


# The wrappers


def _pickled_wrappers(chain: list[VecEnv]) -> tuple[tuple[bytes, bytes], ...]:
    """
    :param chain: the VecEnv and its wrappers, the innermost first
    """
    numbers: dict[int, int] = {id(chain[0]): 0}
    wrappers: list[tuple[bytes, bytes]] = []
    for wrapper in chain[1:]:
        if isinstance(wrapper, VecVideoRecorder):
            numbers[id(wrapper)] = len(wrappers)
            continue
        numbers[id(wrapper)] = len(wrappers) + 1
        attributes = {name: value for name, value in vars(wrapper).items() if name != "class_attributes"}
        try:
            wrappers.append((cloudpickle.dumps(type(wrapper)), _dumps(attributes, numbers)))
        except Exception as error:
            raise ArgumentError(
                f"actors cannot copy the VecEnv wrapper {type(wrapper).__name__} of the training environment: "
                f"{type(error).__name__}: {error}"
            ) from error
    return tuple(wrappers)


def _wrapped(chain: list[VecEnv], cls: bytes, attributes: bytes) -> VecEnv:
    made: type[VecEnv] = cloudpickle.loads(cls)
    wrapper = made.__new__(made)
    unpickler = _Unpickler(io.BytesIO(attributes))
    unpickler.chain = [*chain, wrapper]
    vars(wrapper).update(class_attributes=dict(inspect.getmembers(made)), **unpickler.load())
    if isinstance(wrapper, VecNormalize):
        wrapper.training = False
    return wrapper


# What is to be the same, and what is not

_in_use: WeakValueDictionary[int, gym.Env[Any, Any]] = WeakValueDictionary()
"""The environments in this process that have a user already, by their ``id``."""


def _use(venv: DummyVecEnv) -> None:
    """
    :raises ArgumentError: if an environment is another VecEnv's too
    """
    for env in venv.envs:
        if id(env.unwrapped) in _in_use:
            raise ArgumentError(f"a function gave {env}, which is in use, instead of a new environment; {REMEDY}")
        _in_use[id(env.unwrapped)] = env.unwrapped


def kinds(venv: VecEnv) -> tuple[tuple[str, ...], ...]:
    """
    :param venv: without wrappers
    :return: of each environment the names of its wrappers, its class and its id, as far as its text has them in brackets
    """
    if not isinstance(venv, DummyVecEnv | SubprocVecEnv):
        return ()
    texts = [text.replace(ZOO_LIMIT, "TimeLimit") for text in venv.env_method("__str__")]
    return tuple(tuple(re.findall(r"<([^<>\s]+)", text)) for text in texts)


def _listed(made: tuple[tuple[str, ...], ...]) -> str:
    return ", ".join(dict.fromkeys("<".join(names) for names in made))


def _spaces(venv: VecEnv) -> tuple[Any, Any]:
    """Not whole observation spaces: ``VecNormalize`` changes those of images in a ``Dict`` where they are."""
    _, shapes, _ = obs_space_info(venv.observation_space)
    return dict(shapes), venv.action_space
