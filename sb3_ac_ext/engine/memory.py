"""
Where the results of a replay lie: memory that is no longer read serves again.

The working set decides whether caches are cold, not the number of operations. Memory is written over or shared only if its
first and whole write is a call of this replay and its last read is past; parameters, inputs, outputs and whatever somebody
holds keep the memory that they have.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch as th
from torch.utils._pytree import tree_map_only

from sb3_ac_ext.engine import products
from sb3_ac_ext.engine.rewrites import Call
from sb3_ac_ext.engine.tape import Key, memory, tensors

SPARE = 4096
"""Bytes by which memory may be larger than four times what it serves for."""


def plan(calls: Sequence[Call], kept: Collection[Key]) -> list[Call]:
    """
    :param calls: of a replay, each result in memory of its own
    :param kept: memory that stays as it is
    :return: the same calls, which use less memory
    """
    own = _Plan(_without_unused(calls, kept), kept)
    own.forward_copies()
    own.write_in_place()
    own.take_results()
    own.share()
    return own.moved()


def bytes_used(calls: Sequence[Call], kept: Collection[Key]) -> int:
    """Bytes of memory that calls use besides what is kept."""
    found = {memory(t): t.untyped_storage().nbytes() for call in calls for t in _given(call)}
    return sum(size for key, size in found.items() if key not in kept)


@dataclass
class Block:
    """A piece of memory that only the replay uses."""

    size: int
    """Bytes."""
    first: int
    """The call that writes it first."""
    last: int
    """The call that reads or writes it last."""
    whole: bool
    """Whether the first write is of all of it."""


class _Plan:
    """What becomes of the memory of calls, decided in four steps."""

    def __init__(self, calls: Sequence[Call], kept: Collection[Key]) -> None:
        self.calls: list[Call | None] = [*calls]
        self.homes: dict[Key, tuple[th.UntypedStorage, int]] = {}
        """Where blocks go: other memory, and the byte from which on."""
        self.merged: dict[Key, Key] = {}
        """Blocks that take the place of others."""
        self.taken: dict[Key, th.Tensor] = {}
        """Tensors that are given the memory of oneDNN's results."""
        self.blocks: dict[Key, Block] = {}
        for i, call in enumerate(calls):
            for tensor in _given(call):
                key = memory(tensor)
                if key in kept:
                    continue
                if key not in self.blocks:
                    whole = any(memory(out) == key and _fills(out) for out in call.written)
                    self.blocks[key] = Block(tensor.untyped_storage().nbytes(), i, i, whole)
                self.blocks[key].last = i

    def remaining(self) -> list[tuple[int, Call]]:
        """The calls that are still done, with their numbers."""
        return [(i, call) for i, call in enumerate(self.calls) if call is not None]

    def root(self, tensor: th.Tensor) -> Key:
        """The block that a tensor is in, after mergers."""
        key = memory(tensor)
        while key in self.merged:
            key = self.merged[key]
        return key

    def is_made_at(self, tensor: th.Tensor, call: int) -> bool:
        """Whether the call is the first to write to a tensor's memory, all of it, and it may be elsewhere."""
        block = self.blocks.get(memory(tensor))
        return block is not None and block.whole and block.first == call and memory(tensor) not in self.homes

    def is_free_after(self, tensor: th.Tensor, call: int) -> bool:
        """Whether the call is the last that uses a tensor's memory, and it may be elsewhere."""
        block = self.blocks.get(self.root(tensor))
        return block is not None and block.whole and block.last == call and memory(tensor) not in self.homes

    def forward_copies(self) -> None:
        """A result that is only made to be copied elsewhere is made there."""
        uses: defaultdict[Key, list[tuple[int, int, int]]] = defaultdict(list)
        barriers = [i for i, call in self.remaining() if not call.args and not call.kwargs]
        for i, call in self.remaining():
            for tensor in _given(call):
                uses[memory(tensor)].append((i, *_span(tensor)))
        for i, call in self.remaining():
            if call.function is not th.Tensor.copy_ or len(call.args) != 2:
                continue
            place, source = call.args
            lasting = memory(place) not in self.blocks  # what is the replay's own may be moved later
            if lasting and self.is_free_after(source, i) and _fits(place, source):
                start, end = _span(place)
                others = [j for j, low, high in uses[memory(place)] if low < end and start < high and j != i]
                if not any(self.blocks[memory(source)].first <= j < i for j in (*others, *barriers)):
                    offset = start - source.storage_offset() * source.element_size()
                    self.homes[memory(source)] = place.untyped_storage(), offset
                    self.calls[i] = None

    def write_in_place(self) -> None:
        """Elementwise operations write over an argument that is read for the last time."""
        for i, call in self.remaining():
            if not call.elementwise or not self.is_made_at(call.written[0], i):
                continue
            (out,) = call.written
            for given in tensors(call.args):
                same = [t for t in tensors(call.args) if self.root(t) == self.root(given)]
                if self.is_free_after(given, i) and all(_alike(t, out) for t in same):
                    root = self.merged[memory(out)] = self.root(given)
                    self.blocks[root].last = max(self.blocks[root].last, self.blocks[memory(out)].last)
                    break

    def take_results(self) -> None:
        """All that is ever read of a result of oneDNN is one tensor, whole: it gets the memory of the result."""
        found: dict[Key, th.Tensor] = {}
        for i, call in self.remaining():
            if call.function is products.by_onednn and self.is_made_at(call.written[0], i):
                found[memory(call.written[0])] = call.written[0]
        for _, call in self.remaining():
            for tensor in _given(call):
                key = self.root(tensor)
                if key in found and not _alike(tensor, found[key]):
                    del found[key]
        self.taken = {key: th.empty_like(tensor) for key, tensor in found.items() if key not in self.merged}

    def share(self) -> None:
        """Give each block that has no place yet the warmest memory that has become free."""
        placed = self.merged.keys() | self.homes.keys() | self.taken.keys()
        movable = [(key, block) for key, block in self.blocks.items() if block.whole and key not in placed]
        free: list[th.UntypedStorage] = []
        ends: defaultdict[int, list[th.UntypedStorage]] = defaultdict(list)
        done = -1
        for key, block in sorted(movable, key=lambda item: item[1].first):
            for call in range(done + 1, block.first):
                free = ends.pop(call, []) + free
            done = max(done, block.first - 1)
            fitting = [home for home in free if block.size <= home.nbytes() <= 4 * block.size + SPARE]
            if fitting:
                home = min(fitting, key=lambda one: one.nbytes())
                free = [one for one in free if one is not home]
            else:
                home = th.empty(block.size, dtype=th.uint8).untyped_storage()
            self.homes[key] = home, 0
            ends[block.last].append(home)

    def moved(self) -> list[Call]:
        """The calls with their memory as it was decided."""
        found = []
        for _, call in self.remaining():
            function = call.function
            if function is products.by_onednn and self.root(call.written[0]) in self.taken:
                function = products.taken_from_onednn
            args, kwargs = tree_map_only(th.Tensor, self._placed, (call.args, call.kwargs))
            found.append(_in_place(Call(function, args, kwargs, lasting=call.lasting)))
        return found

    def _placed(self, tensor: th.Tensor) -> th.Tensor:
        key = self.root(tensor)
        if key in self.taken:
            return self.taken[key]
        if key not in self.homes:
            return tensor
        storage, start = self.homes[key]
        offset = start // tensor.element_size() + tensor.storage_offset()
        return th.empty(0, dtype=tensor.dtype).set_(storage, offset, tensor.size(), tensor.stride())


def _given(call: Call) -> list[th.Tensor]:
    return tensors((call.args, call.kwargs))


def _without_unused(calls: Sequence[Call], kept: Collection[Key]) -> list[Call]:
    """The calls whose results somebody reads."""
    read: set[Key] = set()
    remaining = []
    for call in reversed(calls):
        results = {memory(tensor) for tensor in call.written}
        if not results or call.lasting or any(key in kept or key in read for key in results):
            read.update(map(memory, _given(call)))
            remaining.append(call)
    return remaining[::-1]


def _in_place(call: Call) -> Call:
    """``clamp_min(x, 0, out=x)`` as the method that takes half of its time."""
    if call.function is th.clamp_min and call.args[1] == 0 and isinstance(call.args[1], int):
        x, out = call.args[0], call.kwargs["out"]
        if x.data_ptr() == out.data_ptr() and x.stride() == out.stride():
            return Call(th.Tensor.relu_, (out,), {})
    return call


def _fills(tensor: th.Tensor) -> bool:
    """Whether there is nothing in the memory but this tensor."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _span(tensor: th.Tensor) -> tuple[int, int]:
    """First and last byte plus one that it may touch in its memory."""
    size, start = tensor.element_size(), tensor.storage_offset() * tensor.element_size()
    length = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    return int(start), int(start + length * size)


def _fits(place: th.Tensor, source: th.Tensor) -> bool:
    alike = place.shape == source.shape and place.stride() == source.stride() and place.dtype == source.dtype
    return alike and place.device == source.device and _fills(source) and memory(place) != memory(source)


def _alike(x: th.Tensor, y: th.Tensor) -> bool:
    same = x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype and x.is_contiguous()
    return same and _fills(x) and _fills(y)
