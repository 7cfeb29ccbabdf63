"""
``VecNormalize`` with actors: they use the statistics that the learner sends them, the learner updates them by what they saw.
"""

from copy import deepcopy
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize

Statistics = tuple[Any, Any]
"""Of observations (a dict of them for a dict, None if they are not normalised), and of returns: ``RunningMeanStd``."""


def statistics(venv: VecEnv) -> Statistics | None:
    """
    :param venv: with all its wrappers
    :return: a copy of the statistics of its ``VecNormalize``; None if it has none
    """
    normalize = unwrap_vec_normalize(venv)
    return None if normalize is None else deepcopy((vars(normalize).get("obs_rms"), normalize.ret_rms))


def set_statistics(venv: VecEnv, values: Statistics | None) -> None:
    """
    :param venv: an actor's environments
    :param values: what `statistics` gave for the training environment; None changes nothing
    """
    normalize = unwrap_vec_normalize(venv)
    if normalize is not None and values is not None:
        obs_rms, normalize.ret_rms = values
        if obs_rms is not None:
            normalize.obs_rms = obs_rms


def update_statistics(
    normalize: VecNormalize, observations: Any, rewards: np.ndarray, dones: np.ndarray, returns: np.ndarray | None
) -> np.ndarray:
    """
    Update as if ``normalize`` itself had stepped these environments, with ``training`` on; do nothing if it is off.

    :param normalize: the training environment's
    :param observations: ``(T + 1, N, ...)``, or a dict of them, as `VecNormalize.get_original_obs` gives them
    :param rewards: ``(T, N)``, as `VecNormalize.get_original_reward` gives them
    :param dones: ``(T, N)``, whether the step ended an episode
    :param returns: ``(N,)``, what this function returned for the segment before of the same actor and generation; None if this
        is its first one, whose first observation is then counted too
    :return: ``(N,)``, the discounted sums of rewards, by which rewards are normalised
    """
    is_first = returns is None
    returns = np.zeros(rewards.shape[1]) if returns is None else returns
    if not normalize.training:
        return returns
    if normalize.norm_obs:
        named = isinstance(normalize.obs_rms, dict)
        statistics_of = normalize.obs_rms if named else {None: normalize.obs_rms}
        for name, rms in statistics_of.items():
            for observation in (observations[name] if named else observations)[0 if is_first else 1 :]:
                rms.update(observation)
    for reward, done in zip(rewards, dones, strict=True):
        returns = returns * normalize.gamma + reward
        normalize.ret_rms.update(returns)
        returns[done] = 0
    return returns
