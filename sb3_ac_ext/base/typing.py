"""To be removed."""

from typing import Any

from sb3_ac_ext.base.signatures import arguments_of


def constructor_keys(cls: Any) -> frozenset[str]:
    """The names of the arguments that ``cls`` takes."""
    return frozenset(arguments_of(cls))
