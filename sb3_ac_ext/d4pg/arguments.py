"""What D4PG declares otherwise than the other off-policy algorithms."""

from typing import Annotated

from sb3_ac_ext.actors.off_policy import OffPolicyActorArguments
from sb3_ac_ext.validation import Acts, PositiveInt

N_STEPS = 5
"""Where ``n_steps`` is not given and the replay buffer sums rewards."""

READ_FIRST = ("n_steps", "optimize_memory_usage", "replay_buffer_class", "replay_buffer_kwargs", "distribution", "prioritized")
"""Arguments that the others' defaults depend on, so they are checked before the others."""


class D4PGArguments(OffPolicyActorArguments):
    """
    What D4PG takes.

    :param n_steps: n, rewards summed before bootstrapping; None for 5, and for 1 with a replay buffer that does not sum
        (``HerReplayBuffer``, Dict observations without priorities, ``optimize_memory_usage``)
    """

    n_steps: Annotated[PositiveInt | None, Acts.NEVER]  # type: ignore[assignment]  # None too
