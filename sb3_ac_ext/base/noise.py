"""Exploration noise whose standard deviation falls with the number of environment steps."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import numpy as np
from annotated_types import Ge, Interval
from stable_baselines3.common.noise import (
    ActionNoise,
    NormalActionNoise,
    OrnsteinUhlenbeckActionNoise,
    VectorizedActionNoise,
)

from sb3_ac_ext.validation import ArgumentError, ArgumentTypeError, NonNegative, check, check_number

LOWEST_DT = 1e-9
THETA = 0.15
"""Of the Ornstein-Uhlenbeck process, SB3's, which grows without bound where a step times this is 2 or more."""


class ExplorationNoise(TypedDict):
    """The argument of this name, see `NoiseSchedule`."""

    type: Literal["normal", "ornstein-uhlenbeck"]
    start: NonNegative
    end: NotRequired[NonNegative]
    steps: NotRequired[Annotated[float, Ge(1)]]
    dt: NotRequired[Annotated[float, Interval(ge=LOWEST_DT, lt=2 / THETA)]]


@dataclass(frozen=True)
class NoiseSchedule:
    """
    A noise process of unit scale and the factor that it is multiplied by.

    The factor falls linearly from ``start`` to ``end`` over ``steps`` environment steps (all environments counted
    together, the warm-up included) and stays there. It does not start again with an episode or with another `learn`.
    Actions are scaled to [-1, 1], so 0.1 is a twentieth of every action's range.

    :param type: "normal" (independent draws) or "ornstein-uhlenbeck" (correlated in time, one state per environment,
        reset at the end of its episode; theta 0.15)
    :param start: factor at the first step, >= 0
    :param end: factor from step ``steps`` on, >= 0
    :param steps: environment steps of the decay, >= 1
    :param dt: time step of the Ornstein-Uhlenbeck process, > 0. With 1 each step adds noise of std ``start`` and the
        past decays by 15 % a step; with SB3's 0.01 each step adds a tenth of that and the process wanders a hundred
        times more slowly, with almost the same stationary std (1.9 and 1.8 times ``start``)
    """

    type: str
    start: float
    end: float
    steps: int
    dt: float = 1e-2

    @classmethod
    def parse(cls, spec: Any) -> "NoiseSchedule":
        """
        :param spec: the constructor argument ``exploration_noise``: a dict with ``type`` and ``start``, with ``end`` and
            ``steps`` unless the factor is constant, and ``dt`` for "ornstein-uhlenbeck"
        :raises TypeError: if it is not a dict, has an unknown key or a value of the wrong type
        :raises ValueError: if a key is missing or a value is out of range
        """
        name = "exploration_noise"
        check(name, spec, ExplorationNoise)
        if ("end" in spec) != ("steps" in spec):
            raise ArgumentError(
                f"{name} needs both end and steps for a decay, or neither for a constant std, got {dict(spec)!r}"
            )
        if "dt" in spec and spec["type"] == "normal":
            raise ArgumentError(f"{name}['dt'] belongs to 'ornstein-uhlenbeck', got {dict(spec)!r}")
        return cls(**{"end": spec["start"], "steps": 1, **spec})

    def std(self, step: int) -> float:
        """
        :param step: environment steps taken so far
        :return: the factor
        """
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)

    def unit_process(self, shape: tuple[int, ...]) -> ActionNoise:
        """
        :param shape: of one action
        :return: the process with sigma 1, for one environment
        """
        zeros, ones = np.zeros(shape), np.ones(shape)
        if self.type == "normal":
            return NormalActionNoise(zeros, ones)
        return OrnsteinUhlenbeckActionNoise(zeros, ones, dt=self.dt)


class ScaledNoise(ActionNoise):
    """A noise process times a factor, or one for each component of an action."""

    def __init__(self, process: ActionNoise, factor: float | np.ndarray) -> None:
        super().__init__()
        self.process = process
        self.factor = factor

    def __call__(self) -> np.ndarray:
        return self.factor * self.process()


def _broadcasts(size: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether an array of shape ``size`` becomes one of ``shape`` beside one."""
    try:
        return np.broadcast_shapes(size, shape) == shape
    except ValueError:
        return False


def check_action_noise(noise: Any, shape: tuple[int, ...]) -> None:
    """
    :param noise: the constructor argument ``action_noise``; of one of SB3's processes the arrays and the time step are checked
    :param shape: of one action
    :raises TypeError: if it is not an `ActionNoise`
    :raises ValueError: if its arrays have another shape than an action, or its time step is not positive
    """
    if not isinstance(noise, ActionNoise):
        raise ArgumentTypeError(f"action_noise must be an ActionNoise, got {noise!r} of type {type(noise).__name__}")
    process = noise.base_noise if isinstance(noise, VectorizedActionNoise) else noise
    arrays = {name: getattr(process, name, None) for name in ("_mu", "_sigma", "initial_noise")}
    shapes = {name: np.shape(array) for name, array in arrays.items() if array is not None}
    if not all(_broadcasts(size, shape) for size in shapes.values()):
        given = ", ".join(f"{name.lstrip('_')} of {size}" for name, size in shapes.items())
        legal = f"action_noise must have the shape of an action, {shape}, or broadcast to it"
        raise ArgumentError(f"{legal}, got {noise!r} ({given})")
    if isinstance(process, OrnsteinUhlenbeckActionNoise):
        check_number("the dt of action_noise", process._dt, low=LOWEST_DT)
        if process._theta * process._dt >= 2:
            raise ArgumentError(
                f"theta times dt of action_noise must be < 2, beyond which the process grows without bound, got {noise!r} "
                f"with dt={process._dt}"
            )
