"""
What goes first where hyperparameters from several sources exclude each other.

RL Zoo lets ``-params`` replace a file's keys of the same name. A key of another name that the constructor refuses beside what
was given would stay, and the command fail: ``exploration_noise`` given where the file has ``noise_type``.
"""

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

Condition = tuple[str, Callable[[Any], bool]]
"""An argument and a test of its value, which is None where the argument is not given."""


def _given(value: Any) -> bool:
    return value is not None


def _missing(value: Any) -> bool:
    return value is None


def _on(value: Any) -> bool:
    return bool(value)


def _off(value: Any) -> bool:
    return not value


def _is(expected: Any) -> Callable[[Any], bool]:
    return lambda value: value == expected


def _is_not(expected: Any) -> Callable[[Any], bool]:
    return lambda value: value != expected


def _changed_from(default: Any) -> Callable[[Any], bool]:
    return lambda value: value is not None and value != default


def _counts_episodes(train_freq: Any) -> bool:
    return isinstance(train_freq, (list, tuple)) and train_freq[-1] == "episode"


def _is_fixed(ent_coef: Any) -> bool:
    return ent_coef is not None and not str(ent_coef).startswith("auto")


CONTRADICTIONS: tuple[tuple[Condition, Condition], ...] = (
    # off-policy; the Zoo makes an action_noise of noise_type and noise_std
    *((("exploration_noise", _given), (name, _given)) for name in ("action_noise", "noise_type", "noise_std")),
    (("exploration_noise", _missing), ("warmup", _is("noise"))),
    (("n_steps", _changed_from(1)), ("optimize_memory_usage", _on)),
    (("n_envs", _changed_from(1)), ("train_freq", _counts_episodes)),
    # SACX
    (("target_update_every", _given), ("target_update_interval", _changed_from(1))),
    (("ent_coef", _is_fixed), ("ent_coef_learning_rate", _given)),
    (("value_network", _off), ("value_learning_rate", _given)),
    # on-policy
    (("rollout", _is_not("episodes")), ("drop_unfinished_episodes", _on)),
    # PPOX
    (("kl_stop", _given), ("target_kl", _given)),
    (("surrogate", _is("penalty")), ("clip_range", _changed_from(0.2))),
    *((("surrogate", _is_not("penalty")), (name, _given)) for name in ("kl_target", "kl_coef")),
    *(
        (("separate_phases", _off), (name, _given))
        for name in (
            *("policy_epochs", "value_epochs", "policy_sample_ratio", "value_sample_ratio"),
            *("policy_learning_rate", "value_learning_rate", "value_stop_mse"),
        )
    ),
    (("separate_phases", _off), ("kl_stop_scope", _is("policy"))),
    (("clip_range_vf", _missing), ("clip_range_vf_mode", _is("max"))),
    # Reinforce
    *((("use_baseline", _is(False)), (name, _on)) for name in ("baseline_learning_rate", "bootstrap_truncated")),
    # AC
    (("critic", _is("q")), ("actor_trace_lambda", _on)),
    (("deterministic_policy", _on), ("critic", _is_not("q"))),
    *((("deterministic_policy", _on), (name, _on)) for name in ("critic_trace_lambda", "ent_coef", "use_sde")),
    (("deterministic_policy", _off), ("exploration_std", _on)),
)
"""Pairs of conditions that no constructor takes together. A name means the same in all algorithms that have it."""


def drop_contradicted(hyperparams: MutableMapping[str, Any], ranks: Mapping[str, int]) -> dict[str, str]:
    """
    Remove what contradicts a hyperparameter of a higher rank, and what cannot do without what has been removed.

    Contradictions within a rank stay, for the constructor to refuse.

    :param hyperparams: from all sources, changed in place
    :param ranks: of those whose source goes before that of rank 0
    :return: what was removed, and the name that it gave way to
    """
    decided_by = dict(ranks)
    gave_way: dict[str, str] = {}
    while outranked := _outranked(hyperparams, decided_by):
        winner, loser = max(outranked, key=lambda names: decided_by[names[0]])
        del hyperparams[loser]
        decided_by[loser] = decided_by[winner]  # that it is missing is the winner's doing
        gave_way[loser] = gave_way.get(winner, winner)
    return gave_way


def _outranked(hyperparams: Mapping[str, Any], ranks: Mapping[str, int]) -> list[tuple[str, str]]:
    """Winner and loser of each contradiction that ends when the loser is not given."""
    found = []
    for pair in CONTRADICTIONS:
        if all(holds(hyperparams.get(name)) for name, holds in pair):
            (loser, holds), (winner, _) = sorted(pair, key=lambda condition: ranks.get(condition[0], 0))
            if ranks.get(loser, 0) < ranks.get(winner, 0) and loser in hyperparams and not holds(None):
                found.append((winner, loser))
    return found
