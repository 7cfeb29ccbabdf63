"""
Of which functions SB3's vectorised environments were made: SB3 forgets them, and actors make their environments of them again.

`install` wraps two constructors. What they remember stands in the environment itself, so that it lives as long, even where a
function refers to the environment that was made of it; no copy or pickle of an environment takes it along.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

EnvFn = Callable[[], gym.Env[Any, Any]]
_NAME = "_sb3_ac_ext_env_fns"


class _Remembered:
    """Functions that are left out of every copy."""

    def __init__(self, env_fns: Sequence[EnvFn] = ()) -> None:
        self.env_fns = list(env_fns)

    def __reduce__(self) -> Any:
        return _Remembered, ()


def remembered(venv: VecEnv) -> list[EnvFn]:
    """
    :param venv: the innermost one, without wrappers
    :return: the functions that its environments were made by, in their order; none if nobody knows
    """
    return list(getattr(vars(venv).get(_NAME), "env_fns", ()))


def install() -> None:
    """Let the constructors of ``DummyVecEnv`` and ``SubprocVecEnv`` remember. Idempotent."""
    for cls in (DummyVecEnv, SubprocVecEnv):
        if not hasattr(cls.__init__, "remembers_env_fns"):
            cls.__init__ = _remembering(cls.__init__)  # type: ignore[method-assign]


def _remembering(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: VecEnv, env_fns: Sequence[EnvFn], *args: Any, **kwargs: Any) -> None:
        original(self, env_fns, *args, **kwargs)
        vars(self)[_NAME] = _Remembered(env_fns)

    __init__.remembers_env_fns = True  # type: ignore[attr-defined]
    return __init__
