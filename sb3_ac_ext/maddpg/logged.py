"""Keys of the log that stay distinct where SB3's logger cuts them."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

PRINTED = 33
"""Characters of a key that SB3's logger prints behind its group; it cuts longer ones, and stops where two become the same."""
DOTS = "..."
NUMBER = 6
"""Characters that a number of an agent, or those of a pair, may have."""


def log_keys(names: Mapping[Any, str], *endings: str) -> dict[str, list[str]]:
    """
    What several quantities of each agent, or of each pair of agents, are logged under in one group.

    :param names: of what there is a quantity, by a number that stands for it
    :param endings: of the keys, which say what the quantities are
    :return: for each ending the keys, with the number in the place of the name's end where two keys would look the same
    """
    printed = Counter(_printed(f"{name}_{ending}") for name in names.values() for ending in endings)

    def distinct(number: Any, ending: str) -> str:
        key = f"{names[number]}_{ending}"
        room = PRINTED - len(f"{DOTS}_{ending}") - NUMBER
        return key if printed[_printed(key)] == 1 else f"{names[number][:room]}{DOTS}{number}_{ending}"

    return {ending: [distinct(number, ending) for number in names] for ending in endings}


def _printed(key: str) -> str:
    return key if len(key) <= PRINTED else key[: PRINTED - len(DOTS)] + DOTS
