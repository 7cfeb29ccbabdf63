"""Constructor arguments that the algorithms share, each documented once, here."""

import inspect
from functools import cache
from inspect import Parameter
from typing import Any, Literal, TypedDict, get_args, is_typeddict

import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.noise import ActionNoise


class CommonKwargs(TypedDict, total=False):
    """What every algorithm takes, with SB3's meaning and defaults."""

    policy_kwargs: dict[str, Any] | None
    """Arguments of the policy."""
    stats_window_size: int
    """Number of episodes over which the logged return and length are averaged."""
    tensorboard_log: str | None
    """Folder of the TensorBoard logs; None for none."""
    verbose: int
    """0 no output, 1 info, 2 debug."""
    seed: int | None
    """Seed of every random generator; None leaves them alone."""
    device: th.device | str
    """Where the networks live: "auto", "cpu", "cuda"."""


class OffPolicyArguments(CommonKwargs, total=False):
    """
    What every off-policy algorithm takes as SB3's do, with SB3's meaning and defaults.

    The constructors name these in SB3's positional order; here is what they mean.
    """

    buffer_size: int
    """Transitions that the replay buffer holds."""
    learning_starts: int
    """Environment steps before the first update."""
    batch_size: int
    """Transitions per update."""
    tau: float
    """Share of the online network that a target network takes over per target update, in [0, 1]."""
    gamma: float
    """Discount factor, in [0, 1]."""
    train_freq: int | tuple[int, str]
    """Environment steps (of each environment) between updates, or ``(n, "episode")``."""
    gradient_steps: int
    """Updates each time; -1 for as many as steps were taken."""
    action_noise: ActionNoise | None
    """Exploration noise of SB3, in the action space scaled to [-1, 1]."""
    replay_buffer_class: type[ReplayBuffer] | None
    """Replay buffer; None chooses by observation space and ``n_steps``."""
    replay_buffer_kwargs: dict[str, Any] | None
    """Its arguments."""
    optimize_memory_usage: bool
    """Store each observation once; needs ``replay_buffer_kwargs={"handle_timeout_termination": False}``."""
    n_steps: int
    """Rewards summed before bootstrapping."""


class OffPolicyKwargs(TypedDict, total=False):
    """What every off-policy algorithm takes besides, by name."""

    max_grad_norm: float | dict[str, float] | None
    """Bound on the gradient's 2-norm, for each network by itself (a dict names them); None does not clip."""
    exploration_noise: dict[str, Any] | None
    """Exploration noise that decays: see `sb3_ac_ext.base.noise.NoiseSchedule`. Not together with ``action_noise``."""
    engine: bool
    """Whether updates and actions are recorded and replayed (`engine_report()` says which); the mathematics is the same."""
    warmup: Literal["uniform", "noise"]
    """Until ``learning_starts``: "uniform" draws uniform actions, "noise" the policy's with exploration noise of std 1."""


class ActingKwargs(CommonKwargs, total=False):
    """What every on-policy algorithm takes, whatever it learns from: SB3's arguments and the engine's."""

    gamma: float
    """Discount factor, in [0, 1]."""
    ent_coef: float
    """Weight of the entropy in the loss, reward units per nat."""
    use_sde: bool
    """Whether exploration is generalised state-dependent (gSDE)."""
    sde_sample_freq: int
    """Steps after which gSDE draws new noise; -1 at the start of a rollout only."""
    engine: bool
    """Whether updates and actions are recorded and replayed (`engine_report()` says which); the mathematics is the same."""


class OnPolicyKwargs(ActingKwargs, total=False):
    """What those take that estimate advantages of a rollout: SB3's arguments with its meaning and defaults, then our own."""

    gae_lambda: float
    """Weight of longer advantage estimates, in [0, 1]: 0 bootstraps after one step, 1 sums all rewards."""
    rollout_buffer_class: type[RolloutBuffer] | None
    """Rollout buffer; None chooses by observation space."""
    rollout_buffer_kwargs: dict[str, Any] | None
    """Its arguments."""
    rollout: str
    """"steps" collects ``n_steps`` of each environment, "episodes" until ``rollout_episodes`` have ended."""
    rollout_episodes: int
    """With ``rollout="episodes"``: how many have to end. ``n_steps`` is then the most steps of each environment."""
    drop_unfinished_episodes: bool
    """With ``rollout="episodes"``: whether to forget what is still running then (and reset), which favours short episodes.
    By default it is kept, bootstrapped, and goes on in the next rollout."""


NOT_ARGUMENTS = frozenset({"self", "_init_setup_model"})


@cache
def constructor_keys(cls: type[BaseAlgorithm]) -> frozenset[str]:
    """
    The names of every argument that ``cls`` takes, those behind ``**kwargs`` included: of a TypedDict, or of the class that
    they are handed on to.

    :param cls: an algorithm
    :return: argument names
    """
    keys: set[str] = set()
    for kind in cls.__mro__:
        if "__init__" not in vars(kind):
            continue
        parameters = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]  # of a class, not an instance
        keys |= {
            parameter.name
            for parameter in parameters
            if parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
        }
        others = [parameter.annotation for parameter in parameters if parameter.kind is Parameter.VAR_KEYWORD]
        known = [shared for annotation in others for shared in get_args(annotation) if is_typeddict(shared)]
        keys |= {key for shared in known for key in shared.__optional_keys__}
        if known or not others:
            break
    return frozenset(keys - NOT_ARGUMENTS)
