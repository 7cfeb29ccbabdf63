"""
What goes first where hyperparameters from several sources exclude each other.

RL Zoo lets ``-params`` replace a file's keys of the same name. A key of another name that the constructor refuses beside what
was given would stay, and the command fail: ``exploration_noise`` given where the file has ``noise_type``.
"""

from collections.abc import Callable, Mapping, MutableMapping
from functools import cache
from typing import Any

from sb3_ac_ext.signatures import Argument, arguments_of
from sb3_ac_ext.validation import Excludes, Needs

Condition = tuple[str, Callable[[Any], bool]]
"""The name of a hyperparameter and a test of its value."""


def _given(value: Any) -> bool:
    return value is not None


def _several(value: Any) -> bool:
    return value not in (None, 1)


def _counts_episodes(train_freq: Any) -> bool:
    return isinstance(train_freq, (list, tuple)) and "episode" in train_freq


def _is_fixed(ent_coef: Any) -> bool:
    return not str(ent_coef).startswith("auto")


OF_THE_ZOO = frozenset({"noise_type", "noise_std", "n_envs"})
"""What the Zoo takes out of the hyperparameters before the constructor sees them; None where they are not given."""

UNDECLARED: tuple[tuple[Condition, Condition], ...] = (
    # of which the Zoo makes an action_noise
    *((("exploration_noise", _given), (name, _given)) for name in ("noise_type", "noise_std")),
    (("n_steps", _several), ("optimize_memory_usage", bool)),
    (("n_envs", _several), ("train_freq", _counts_episodes)),
    (("ent_coef", _is_fixed), ("ent_coef_learning_rate", _given)),
    (("surrogate", lambda value: value == "penalty"), ("clip_range", lambda value: value != 0.2)),
    *((("deterministic_policy", bool), (name, bool)) for name in ("ent_coef", "use_sde")),
)
"""Pairs of conditions that constructors refuse together, beyond what their signatures declare."""


@cache
def contradictions(cls: type) -> tuple[tuple[Condition, Condition], ...]:
    """
    :param cls: an algorithm
    :return: pairs of conditions that its constructor refuses together
    """
    arguments = arguments_of(cls)
    declared: list[tuple[Condition, Condition]] = []
    for argument in arguments.values():
        changed = argument.name, _is_changed(argument)
        declared += [(changed, (one.name, _lacks(one, arguments[one.name]))) for one in argument.of_kind(Needs)]
        declared += [(changed, (one.name, _is_changed(arguments[one.name]))) for one in argument.of_kind(Excludes)]
    known = arguments.keys() | OF_THE_ZOO
    return (*declared, *(pair for pair in UNDECLARED if all(name in known for name, _ in pair)))


def _is_changed(argument: Argument) -> Callable[[Any], bool]:
    return lambda value: not argument.is_default(value)


def _lacks(needed: Needs, argument: Argument) -> Callable[[Any], bool]:
    return lambda value: value not in needed.values if needed.values else argument.is_default(value)


def drop_contradicted(cls: type, hyperparams: MutableMapping[str, Any], ranks: Mapping[str, int]) -> dict[str, str]:
    """
    Remove what contradicts a hyperparameter of a higher rank, and what cannot do without what has been removed.

    Contradictions within a rank stay, for the constructor to refuse.

    :param cls: the algorithm that they are for
    :param hyperparams: from all sources, changed in place
    :param ranks: of those whose source goes before that of rank 0
    :return: what was removed, and the name that it gave way to
    """
    decided_by = dict(ranks)
    gave_way: dict[str, str] = {}
    while outranked := _outranked(cls, hyperparams, decided_by):
        winner, loser = max(outranked, key=lambda names: decided_by[names[0]])
        del hyperparams[loser]
        decided_by[loser] = decided_by[winner]  # that it is missing is the winner's doing
        gave_way[loser] = gave_way.get(winner, winner)
    return gave_way


def _outranked(cls: type, hyperparams: Mapping[str, Any], ranks: Mapping[str, int]) -> list[tuple[str, str]]:
    """Winner and loser of each contradiction that ends when the loser is not given."""
    defaults = {**dict.fromkeys(OF_THE_ZOO), **{name: argument.default for name, argument in arguments_of(cls).items()}}
    found = []
    for pair in contradictions(cls):
        if all(holds(hyperparams.get(name, defaults[name])) for name, holds in pair):
            (loser, holds), (winner, _) = sorted(pair, key=lambda condition: ranks.get(condition[0], 0))
            if ranks.get(loser, 0) < ranks.get(winner, 0) and loser in hyperparams and not holds(defaults[loser]):
                found.append((winner, loser))
    return found
