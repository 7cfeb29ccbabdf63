"""The arguments that algorithms share, declared once; the constructors name them in SB3's order, with SB3's defaults."""

import os
from typing import Annotated, Any, Literal

import torch as th
from annotated_types import Ge, Interval
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy

from sb3_ac_ext.base.noise import ExplorationNoise
from sb3_ac_ext.base.schedules import Rate
from sb3_ac_ext.validation import (
    Acts,
    ArgumentError,
    ArgumentTypeError,
    Excludes,
    Needs,
    NonNegative,
    Positive,
    PositiveInt,
    Syntax,
    UnitInterval,
    check,
    shown,
)


def check_device(name: str, value: Any) -> None:
    """
    :raises TypeError: if ``value`` is neither a string nor a device
    :raises ValueError: if PyTorch has no such device
    """
    if not isinstance(value, str | th.device):
        raise ArgumentTypeError(f"{name} must be {DEVICES}, got {shown(value)} of type {type(value).__name__}")
    try:
        if value != "auto" and th.device(value).type not in ("cpu", "cuda"):  # SB3 takes the CPU where there is no CUDA
            th.zeros((), device=value).cpu()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ArgumentError(f"{name} must be {DEVICES}, got {shown(value)}") from error


def check_train_freq(name: str, value: Any) -> None:
    """
    :raises TypeError: if a number is none
    :raises ValueError: if ``value`` is neither a number of steps nor a pair of a number and its unit
    """
    pair = value if isinstance(value, tuple | list) else (value, "step")
    if len(pair) != 2:
        raise ArgumentError(f"{name} must be {FREQUENCIES}, got {shown(value)}")
    check(name, pair[0], PositiveInt)
    check(f"the unit of {name}", getattr(pair[1], "value", pair[1]), Literal["step", "episode"])


DEVICES = '"auto", "cpu", "cuda", or another device of PyTorch'
FREQUENCIES = 'an integer >= 1, or a pair such as (2, "episode")'
Device = Annotated[th.device | str, Syntax(DEVICES, check_device), Acts.NEVER]
TrainFrequency = Annotated[int | tuple[int, str], Syntax(FREQUENCIES, check_train_freq), Acts.ROLLOUT]
GradientBound = Positive | dict[str, Positive | None] | None


class CommonArguments:
    """
    What every algorithm takes.

    :param policy: "MlpPolicy", "CnnPolicy", "MultiInputPolicy", or a policy class
    :param env: environment or its id, which `set_env` replaces; off-policy algorithms act in a Box with finite bounds
    :param learning_rate: rate of all that has no rate of its own; "lin_x" falls linearly from x to 0 in a `learn()`
    :param gamma: discount factor
    :param max_grad_norm: bound on the 2-norm of each network's gradient; a dict such as ``{"critic": 1.0}`` bounds some
        networks only, None none
    :param policy_kwargs: arguments of the policy, such as ``{"net_arch": [64, 64]}``
    :param stats_window_size: episodes over which the logged return and length are averaged
    :param tensorboard_log: folder of the TensorBoard logs; None for none
    :param verbose: 0 no output, 1 info, 2 debug
    :param seed: of every random generator; None leaves them alone
    :param device: where the networks live; "auto" takes CUDA where there is some
    :param engine: whether updates and actions are recorded once and replayed, with the same mathematics (`engine_report()`
        says which, and why not the others); False runs all of them from Python, as SB3 does
    """

    policy: Annotated[str | type[BasePolicy], Acts.NEVER]
    env: Annotated[Any, Acts.NEVER]
    learning_rate: Rate
    gamma: UnitInterval
    max_grad_norm: GradientBound
    policy_kwargs: Annotated[dict[str, Any] | None, Acts.NEVER]
    stats_window_size: Annotated[PositiveInt, Acts.NEVER]
    tensorboard_log: Annotated[str | os.PathLike[str] | None, Acts.LEARN]
    verbose: Annotated[int, Ge(0), Acts.LEARN]
    seed: Annotated[Annotated[int, Interval(ge=0, le=2**32 - 1)] | None, Acts.NEVER]
    device: Device
    engine: bool


class OffPolicyArguments(CommonArguments):
    """
    What every off-policy algorithm takes.

    :param buffer_size: transitions that the replay buffer holds
    :param learning_starts: environment steps before the first update, of all environments together
    :param batch_size: transitions per update
    :param tau: share of the online network that a target network takes over per target update
    :param train_freq: environment steps (of each environment) between updates, or ``(n, "episode")``
    :param gradient_steps: updates each time; -1 for as many as steps were taken in all environments
    :param action_noise: exploration noise of SB3, in the action space scaled to [-1, 1]
    :param replay_buffer_class: class of the replay buffer; None chooses by observation space and ``n_steps``
    :param replay_buffer_kwargs: its arguments
    :param optimize_memory_usage: whether each observation is stored once; needs
        ``replay_buffer_kwargs={"handle_timeout_termination": False}``
    :param n_steps: rewards summed before bootstrapping; more than 1 only with a replay buffer that sums them, and not with
        ``optimize_memory_usage``
    :param exploration_noise: noise in the place of ``action_noise``, in the action space scaled to [-1, 1] too: ``{"type":
        "normal", "start": 0.5, "end": 0.1, "steps": 200000}``, whose std falls linearly with environment steps; without
        ``end`` and ``steps`` it stays. "ornstein-uhlenbeck" takes ``dt``: with 1 a step is a unit of the process's time,
        with 0.01 (SB3's) it wanders a hundred times more slowly with almost the same std
    :param warmup: until ``learning_starts``: "uniform" draws uniform actions, "noise" the policy's with exploration noise of
        std 1
    """

    buffer_size: Annotated[PositiveInt, Acts.NEVER]
    learning_starts: Annotated[NonNegative, Acts.ROLLOUT]
    batch_size: PositiveInt
    tau: UnitInterval
    train_freq: TrainFrequency
    gradient_steps: Annotated[int, Ge(-1), Acts.ROLLOUT]
    action_noise: Annotated[ActionNoise | None, Acts.ROLLOUT]
    replay_buffer_class: Annotated[type[ReplayBuffer] | None, Acts.NEVER]
    replay_buffer_kwargs: Annotated[dict[str, Any] | None, Acts.NEVER]
    optimize_memory_usage: Annotated[bool, Acts.NEVER]
    n_steps: Annotated[PositiveInt, Acts.NEVER]
    exploration_noise: Annotated[ExplorationNoise | None, Acts.STEP, Excludes("action_noise")]
    warmup: Annotated[Literal["uniform", "noise"], Acts.STEP, Needs("exploration_noise")]


class OnPolicyArguments(CommonArguments):
    """
    What on-policy algorithms take.

    :param n_steps: steps of each environment in a rollout, the most of them with ``rollout="episodes"``
    :param gae_lambda: weight of longer advantage estimates: 0 bootstraps after one step, 1 sums all rewards
    :param ent_coef: weight of the entropy in the loss, reward units per nat
    :param vf_coef: weight of the value's loss
    :param use_sde: whether exploration is generalised state-dependent (gSDE, Raffin et al. 2021)
    :param sde_sample_freq: steps after which gSDE draws new noise; -1 at the start of a rollout only
    :param rollout_buffer_class: class of the rollout buffer; None chooses by observation space
    :param rollout_buffer_kwargs: its arguments
    :param rollout: "steps" collects ``n_steps`` of each environment, "episodes" until ``rollout_episodes`` have ended, in
        at most ``n_steps`` steps of each environment
    :param rollout_episodes: how many have to end, in all environments together
    :param drop_unfinished_episodes: whether to forget the episodes that are under way then, and reset, which favours short
        ones; otherwise they are bootstrapped, and go on in the next rollout
    """

    n_steps: Annotated[PositiveInt, Acts.ROLLOUT]
    gae_lambda: Annotated[UnitInterval, Acts.ROLLOUT]
    ent_coef: NonNegative
    vf_coef: NonNegative
    use_sde: Annotated[bool, Acts.NEVER]
    sde_sample_freq: Annotated[int, Ge(-1), Acts.ROLLOUT]
    rollout_buffer_class: Annotated[type[RolloutBuffer] | None, Acts.NEVER]
    rollout_buffer_kwargs: Annotated[dict[str, Any] | None, Acts.NEVER]
    rollout: Annotated[Literal["steps", "episodes"], Acts.ROLLOUT]
    rollout_episodes: Annotated[PositiveInt, Acts.ROLLOUT]
    drop_unfinished_episodes: Annotated[bool, Acts.ROLLOUT, Needs("rollout", "episodes")]
