"""Several actors behind one interface; here those that act in this process, one after another."""

from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Sequence

from sb3_ac_ext.actors.actor import Actor, Weights, Work
from sb3_ac_ext.buffers.segments import Result


class Pool(ABC):
    """
    Actors that work for one learner.

    :param work: what they do with the weights that they are given
    """

    restarts = 0
    """Actors that have been replaced."""
    lost = 0
    """Results that went with them."""
    turn = 0
    """Which actor is next, where they take turns."""
    held: frozenset[int] = frozenset()
    """Actors that do not begin, though they have nothing to do; in turns the others come first anyway."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.consumed: deque[tuple[int, int, int]] = deque(maxlen=10_000)
        """Actor, generation and sequence number of the last results that were taken, in their order."""
        self.delivered: Counter[int] = Counter()
        """How many results of each actor have been taken."""

    def _taken(self, result: Result) -> Result:
        """Note it."""
        self.consumed.append((result.actor, result.generation, result.sequence))
        self.delivered[result.actor] += 1
        return result

    @abstractmethod
    def take(self, weights: Weights) -> Result:
        """
        Wait for a result. Actors that have nothing to do begin before that.

        :param weights: for those
        :return: the result; its actor has nothing to do from then on
        :raises ActorError: if an actor has failed
        """

    def begin(self, weights: Weights) -> None:  # noqa: B027  # nothing by default
        """
        Actors that have nothing to do begin now, while the learner computes; in this process nothing can.

        :param weights: for those
        """

    @abstractmethod
    def close(self) -> None:
        """Leave nothing behind; a second time does nothing."""


class InlinePool(Pool):
    """
    Actors in this process, in turns.

    :param work: see `Pool`
    :param actors: have begun
    :param turn: which one is next
    """

    def __init__(self, work: Work, actors: Sequence[Actor], turn: int = 0) -> None:
        super().__init__(work)
        self.actors, self.turn = actors, turn % len(actors)

    def take(self, weights: Weights) -> Result:
        """See `Pool.take`."""
        actor = self.actors[self.turn]
        result = actor.do(self.work, weights)
        self.turn = (self.turn + 1) % len(self.actors)
        return self._taken(result)

    def close(self) -> None:
        """See `Pool.close`."""
        for actor in self.actors:
            actor.close()
        self.actors = ()
