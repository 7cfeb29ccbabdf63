"""What a search is about, beyond what RL Zoo tells a sampler."""

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Searched:
    """What the trials of a search have in common."""

    hyperparams: Mapping[str, Any] = field(default_factory=dict)
    """Those of the file and of ``-params``, which a trial's replace."""
    n_timesteps: int = 100_000
    """Environment steps of a trial's training."""


OUTSIDE_OF_A_SEARCH = Searched()

searched: ContextVar[Searched] = ContextVar("searched", default=OUTSIDE_OF_A_SEARCH)
"""Of this thread's trial: a search may run several at once."""
