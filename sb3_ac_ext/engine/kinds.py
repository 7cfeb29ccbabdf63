"""Functions with batches of one kind, and what is known of their recordings."""

from collections.abc import Callable, Hashable, Iterator, Mapping

import torch as th

from sb3_ac_ext.engine.guard import Guard
from sb3_ac_ext.engine.recording import Recording, Values

WARM_UP = 3
"""Times that a function runs for batches of one kind before it is recorded, if it changes nothing, or on a GPU."""
PATIENCE = 2
"""Changes of what a recording depends on after which the function is recorded again at once."""
LONGEST_WAIT = 100
"""Runs after which it is tried again at the latest, where recordings were of no use."""
Function = Callable[..., Values | None]


class Outputs(Mapping[str, th.Tensor]):
    """
    What an update function returned, by its names.

    The values of a replay lie in memory that the next replay writes over: whoever asks for one gets a copy, so it has to be
    asked for before the function runs again.
    """

    def __init__(self, values: Values, shared: bool) -> None:
        self._values, self._shared = values, shared

    def __getitem__(self, name: str) -> th.Tensor:
        value = self._values[name].detach()
        return value.clone() if self._shared else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class Means:
    """Sums of scalars where they are, read all together."""

    def __init__(self, names: tuple[str, ...], device: th.device) -> None:
        self.names = names
        self.sums = th.zeros(len(names), dtype=th.float64 if device.type == "cpu" else th.float32, device=device)
        self.count = 0


def named(function: Function, options: tuple[Hashable, ...]) -> str:
    """What reports call a function with its options."""
    return function.__name__.lstrip("_") + (f"({', '.join(map(str, options))})" if options else "")


class Kind:
    """A function with batches and options of one kind, which one recording serves."""

    def __init__(self, function: Function, options: tuple[Hashable, ...], wait: int) -> None:
        self.function, self.options, self.name = function, options, named(function, options)
        self.wait = wait
        """Ordinary runs before it is recorded."""
        self.reason = "it has not run often enough"
        """Why it is not replayed."""
        self.recording: Recording | None = None
        self.guard: Guard | None = None
        self.means: Means | None = None
        """What the recording adds to."""
        self.verified = False
        """Whether a replay came to the same as the function for another batch than the recorded one."""
        self.look = -1
        """The number of the look at which nothing had changed."""
        self._changes = 0

    def forget(self, reason: str, wait: int | None = None) -> None:
        """
        :param reason: why the recording is of no use
        :param wait: ordinary runs before the next one; None for more and more of them
        """
        self._changes += 1
        self.recording, self.guard, self.verified, self.reason = None, None, False, reason
        again = 0 if self._changes <= PATIENCE else min(2**self._changes, LONGEST_WAIT)
        self.wait = again if wait is None else wait
