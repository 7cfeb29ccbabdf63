"""Whether what environments gave is finite, and which of them it was where it is not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm

from sb3_ac_ext.validation import NonFiniteError


def check_finite(what: str, values: Any, envs: np.ndarray, env_axis: int = 0, cause: Exception | None = None) -> None:
    """
    :param what: what the values are, for the message
    :param values: an array, or a dict of them
    :param envs: numbers of the environments along ``env_axis``
    :param env_axis: the arrays' axis of environments
    :param cause: what went wrong with them already
    :raises NonFiniteError: if a number is not finite
    """
    for array in values.values() if isinstance(values, dict) else (values,):
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            index = envs[np.argwhere(~np.isfinite(array))[0][env_axis]]
            raise NonFiniteError(
                f"environment {index} gave a non-finite {what} (NaN or infinite); check the environment, for instance "
                "with stable_baselines3.common.vec_env.VecCheckNan"
            ) from cause


def check_transition(
    acts_finitely: Callable[[Any], bool],
    observations: Any,
    rewards: np.ndarray,
    dones: np.ndarray,
    infos: list[dict[str, Any]],
) -> None:
    """
    A policy may know what to do with an observation that is not finite; what it makes of it has to be finite.

    :param acts_finitely: whether what the policy makes of ``(n, ...)`` observations is finite
    :param observations: ``(N, ...)`` what environments show now
    :param rewards: ``(N,)``
    :param dones: ``(N,)`` whose episode is over, so that its last observation is in the info
    :param infos: of the step
    :raises NonFiniteError: if a reward is not finite, or what the policy makes of an observation
    """
    check_finite("reward", rewards, np.arange(len(rewards)))
    shown = [("observation", observations, np.arange(len(rewards)))]
    for i in np.flatnonzero(dones):
        if (last := infos[i].get("terminal_observation")) is not None:
            one = (
                {key: np.asarray(value)[None] for key, value in last.items()}
                if isinstance(last, dict)
                else np.asarray(last)[None]
            )
            shown.append(("last observation of an episode", one, np.array([i])))
    for what, values, envs in shown:
        try:
            check_finite(what, values, envs)
        except NonFiniteError:
            if not acts_finitely(values):
                raise


def check_rollout(algorithm: OnPolicyAlgorithm, buffer: RolloutBuffer, length: int) -> None:
    """
    A policy may know what to do with an observation that is not finite; what it makes of it has to be finite.

    :param algorithm: that has collected a rollout
    :param buffer: that was filled
    :param length: with how many steps
    :raises NonFiniteError: if a reward is not finite, or what the policy has said of an observation
    """
    all_envs = np.arange(algorithm.n_envs)
    check_finite("reward", buffer.rewards[:length], all_envs, env_axis=1)
    for array in (buffer.values[:length], buffer.log_probs[:length]):
        if not np.isfinite(array).all():
            check_finite("observation", _rows(buffer.observations, length), all_envs, env_axis=1)
            raise NonFiniteError(
                f"{type(algorithm).__name__}: the policy's values or log-probabilities became non-finite; lower the learning "
                "rate, set max_grad_norm, or normalise observations and rewards"
            )


def _rows(values: Any, length: int) -> Any:
    return {name: array[:length] for name, array in values.items()} if isinstance(values, dict) else values[:length]


@contextmanager
def locate_non_finite(algorithm: OnPolicyAlgorithm, buffer: RolloutBuffer) -> Iterator[None]:
    """
    Say which environment gave NaN where the policy would only complain of its own numbers.

    :param algorithm: that collects a rollout within this context
    :param buffer: that it fills
    """
    try:
        yield
    except Exception as error:  # whatever it is that the policy's NaN led to
        all_envs = np.arange(algorithm.n_envs)
        check_finite("reward", buffer.rewards, all_envs, env_axis=1, cause=error)
        check_finite("observation", algorithm._last_obs, all_envs, cause=error)
        raise
