"""What an ensemble of two teams gets, for every pair of sub-policies."""

from typing import Any

import numpy as np
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_ac_ext.maddpg.maddpg import MADDPG
from sb3_ac_ext.validation import UnsupportedError


class _Pair:
    """A model whose agents act by given sub-policies."""

    def __init__(self, model: MADDPG, sub_policies: np.ndarray) -> None:
        self.model, self.sub_policies = model, sub_policies

    def predict(self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
        return self.model.predict(observation, None, None, deterministic, ensemble_index=self.sub_policies)


def returns_of_pairs(
    model: MADDPG, env: Any, n_eval_episodes: int = 10, deterministic: bool = True, seed: int | None = None
) -> np.ndarray:
    """
    Mean returns of all agents for each pair of sub-policies of two teams.

    Their mean over the pairs is what ensembles get that are drawn each by itself; the spread over the sub-policies of one team
    says how far it depends on which one it meets.

    :param model: of two teams with K sub-policies
    :param env: a parallel environment or a ``VecEnv`` of some, not the one that the model trains in
    :param n_eval_episodes: of each pair
    :param deterministic: whether Discrete actions are the most probable ones instead of draws
    :param seed: of the environment, the same for each pair; None leaves it alone
    :return: ``(K, K, N)``: the first team (that of the first agent) acts by the first index, the other by the second
    :raises UnsupportedError: if there are not two teams
    """
    teams = model.draw_groups()
    if len(teams) != 2:
        raise UnsupportedError(f"there must be two teams that draw apart, got {len(teams)}")
    venv = model._wrap_env(env)
    k, agents = model.n_sub_policies, len(model.policy.layout)
    means = np.zeros((k, k, agents))
    for pair in np.ndindex(k, k):
        numbers = np.zeros(agents, int)
        for team, number in zip(teams, pair, strict=True):
            numbers[list(team)] = number
        returns: list[np.ndarray] = []

        def note(seen: dict[str, Any], _: Any, returns: list[np.ndarray] = returns) -> None:
            if seen["done"]:
                returns.append(seen["info"]["agent_returns"])

        if seed is not None:
            venv.seed(seed)
        policy: Any = _Pair(model, numbers)
        evaluate_policy(policy, venv, n_eval_episodes, deterministic, callback=note, warn=False)
        means[pair] = np.mean(returns, axis=0)
    return means
