"""
Where the results of a replay lie: memory that is no longer read serves again.

The working set decides whether caches are cold, not the number of operations. Memory is written over or shared only if its
first and whole write is a call of this replay and its last read is past; parameters, inputs, outputs and whatever somebody
holds keep the memory that they have.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch as th
from torch.utils._pytree import tree_map_only

from sb3_ac_ext.engine import products
from sb3_ac_ext.engine.rewrites import Call
from sb3_ac_ext.engine.tape import Key, memory, tensors

SPARE = 4096
"""Bytes by which memory may be larger than four times what it serves for."""


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


def plan(calls: Sequence[Call], kept: Collection[Key]) -> list[Call]:
    """
    :param calls: of a replay, each result in memory of its own
    :param kept: memory that stays as it is
    :return: the same calls, which use less memory
    """
    calls = _without_unused(calls, kept)
    blocks = _blocks(calls, kept)
    homes: dict[Key, tuple[th.UntypedStorage, int]] = {}
    calls = _forward_copies(calls, blocks, homes)
    merged = _write_in_place(calls, blocks, homes)
    taken = _taken(calls, blocks, merged, homes)
    _share({key: block for key, block in blocks.items() if key not in taken}, merged, homes)
    return [_moved(call, merged, homes, taken) for call in calls]


def _in_place(call: Call) -> Call:
    """``clamp_min(x, 0, out=x)`` as the method that takes half of its time."""
    if call.function is th.clamp_min and call.args[1] == 0 and isinstance(call.args[1], int):
        x, out = call.args[0], call.kwargs["out"]
        if x.data_ptr() == out.data_ptr() and x.stride() == out.stride():
            return Call(th.Tensor.relu_, (out,), {})
    return call


def _without_unused(calls: Sequence[Call], kept: Collection[Key]) -> list[Call]:
    """The calls whose results somebody reads."""
    read: set[Key] = set()
    remaining = []
    for call in reversed(calls):
        results = {memory(tensor) for tensor in call.written}
        if not results or call.lasting or any(key in kept or key in read for key in results):
            read.update(memory(tensor) for tensor in tensors((call.args, call.kwargs)))
            remaining.append(call)
    return remaining[::-1]


def _blocks(calls: Sequence[Call], kept: Collection[Key]) -> dict[Key, Block]:
    blocks: dict[Key, Block] = {}
    for i, call in enumerate(calls):
        for tensor in tensors((call.args, call.kwargs)):
            key = memory(tensor)
            if key in kept:
                continue
            if key not in blocks:
                whole = any(memory(out) == key and _fills(out) for out in call.written)
                blocks[key] = Block(tensor.untyped_storage().nbytes(), i, i, whole)
            blocks[key].last = i
    return blocks


def _fills(tensor: th.Tensor) -> bool:
    """Whether there is nothing in the memory but this tensor."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _span(tensor: th.Tensor) -> tuple[int, int]:
    """First and last byte plus one that it may touch in its memory."""
    size, start = tensor.element_size(), tensor.storage_offset() * tensor.element_size()
    length = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    return int(start), int(start + length * size)


def _forward_copies(
    calls: Sequence[Call], blocks: dict[Key, Block], homes: dict[Key, tuple[th.UntypedStorage, int]]
) -> list[Call]:
    """A result that is only made to be copied elsewhere is made there."""
    uses: defaultdict[Key, list[tuple[int, int, int]]] = defaultdict(list)
    barriers = [i for i, call in enumerate(calls) if not call.args and not call.kwargs]
    for i, call in enumerate(calls):
        for tensor in tensors((call.args, call.kwargs)):
            uses[memory(tensor)].append((i, *_span(tensor)))
    remaining = []
    for i, call in enumerate(calls):
        if call.function is th.Tensor.copy_ and len(call.args) == 2:
            place, source = call.args
            block = blocks.get(memory(source))
            free = block is not None and block.whole and block.last == i and memory(source) not in homes
            lasting = memory(place) not in blocks  # what is the replay's own may be moved later
            if block is not None and free and lasting and _fits(place, source):
                start, end = _span(place)
                others = [j for j, low, high in uses[memory(place)] if low < end and start < high and j != i]
                if not any(block.first <= j < i for j in (*others, *barriers)):
                    homes[memory(source)] = place.untyped_storage(), start - source.storage_offset() * source.element_size()
                    continue
        remaining.append(call)
    return remaining if len(remaining) == len(calls) else _renumbered(calls, remaining, blocks)


def _fits(place: th.Tensor, source: th.Tensor) -> bool:
    alike = place.shape == source.shape and place.stride() == source.stride() and place.dtype == source.dtype
    return alike and place.device == source.device and _fills(source) and memory(place) != memory(source)


def _renumbered(calls: Sequence[Call], remaining: list[Call], blocks: dict[Key, Block]) -> list[Call]:
    """After calls were left out: the numbers in ``blocks`` are those of the remaining ones."""
    numbers: list[int] = []
    kept = {id(call) for call in remaining}
    for call in calls:
        numbers.append((numbers[-1] if numbers else -1) + (id(call) in kept))
    for block in blocks.values():
        block.first, block.last = numbers[block.first], numbers[block.last]
    return remaining


def _write_in_place(
    calls: Sequence[Call], blocks: dict[Key, Block], homes: dict[Key, tuple[th.UntypedStorage, int]]
) -> dict[Key, Key]:
    """Elementwise operations write over an argument that is read for the last time; returns what took whose memory."""
    merged: dict[Key, Key] = {}

    def is_free(tensor: th.Tensor, call: int) -> bool:
        block = blocks.get(_root(memory(tensor), merged))
        return block is not None and block.whole and block.last == call and memory(tensor) not in homes

    for i, call in enumerate(calls):
        if not call.elementwise:
            continue
        (out,) = call.written
        block = blocks.get(memory(out))
        if block is None or block.first != i or not block.whole or memory(out) in homes:
            continue
        for given in tensors(call.args):
            same = [t for t in tensors(call.args) if _root(memory(t), merged) == _root(memory(given), merged)]
            if is_free(given, i) and all(_alike(t, out) for t in same):
                target = blocks[_root(memory(given), merged)]
                merged[memory(out)] = _root(memory(given), merged)
                target.last = max(target.last, block.last)
                break
    return merged


def _alike(x: th.Tensor, y: th.Tensor) -> bool:
    same = x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype and x.is_contiguous()
    return same and _fills(x) and _fills(y)


def _taken(
    calls: Sequence[Call],
    blocks: dict[Key, Block],
    merged: dict[Key, Key],
    homes: dict[Key, tuple[th.UntypedStorage, int]],
) -> dict[Key, th.Tensor]:
    """Tensors that are given the memory of oneDNN's results: all that is ever read there is one tensor, whole."""
    found = {
        memory(call.written[0]): call.written[0]
        for i, call in enumerate(calls)
        if call.function is products.by_onednn and _is_made_at(blocks, memory(call.written[0]), i, homes)
    }
    for call in calls:
        for tensor in tensors((call.args, call.kwargs)):
            key = _root(memory(tensor), merged)
            if key in found and not _alike(tensor, found[key]):
                del found[key]
    return {key: th.empty_like(tensor) for key, tensor in found.items() if key not in merged}


def _is_made_at(blocks: dict[Key, Block], key: Key, call: int, homes: dict[Key, tuple[th.UntypedStorage, int]]) -> bool:
    return key in blocks and blocks[key].whole and blocks[key].first == call and key not in homes


def _root(key: Key, merged: dict[Key, Key]) -> Key:
    while key in merged:
        key = merged[key]
    return key


def _share(blocks: dict[Key, Block], merged: dict[Key, Key], homes: dict[Key, tuple[th.UntypedStorage, int]]) -> None:
    """Give each block the warmest memory that has become free."""
    movable = {key: block for key, block in blocks.items() if block.whole and key not in merged and key not in homes}
    free: list[th.UntypedStorage] = []
    ends: defaultdict[int, list[th.UntypedStorage]] = defaultdict(list)
    done = -1
    for key, block in sorted(movable.items(), key=lambda item: item[1].first):
        for call in range(done + 1, block.first):
            free = ends.pop(call, []) + free
        done = max(done, block.first - 1)
        fitting = [home for home in free if block.size <= home.nbytes() <= 4 * block.size + SPARE]
        if fitting:
            home = min(fitting, key=lambda one: one.nbytes())
            free = [one for one in free if one is not home]
        else:
            home = th.empty(block.size, dtype=th.uint8).untyped_storage()
        homes[key] = home, 0
        ends[block.last].append(home)


def _moved(
    call: Call, merged: dict[Key, Key], homes: dict[Key, tuple[th.UntypedStorage, int]], taken: dict[Key, th.Tensor]
) -> Call:
    def now(tensor: th.Tensor) -> th.Tensor:
        key = _root(memory(tensor), merged)
        if key in taken:
            return taken[key]
        if key not in homes:
            return tensor
        storage, start = homes[key]
        offset = start // tensor.element_size() + tensor.storage_offset()
        return th.empty(0, dtype=tensor.dtype).set_(storage, offset, tensor.size(), tensor.stride())

    args, kwargs = tree_map_only(th.Tensor, now, (call.args, call.kwargs))
    function = call.function
    if call.written and _root(memory(call.written[0]), merged) in taken and function is products.by_onednn:
        function = products.taken_from_onednn
    return _in_place(Call(function, args, kwargs, lasting=call.lasting))


def bytes_used(calls: Sequence[Call], kept: Collection[Key]) -> int:
    """
    :param calls: of a replay
    :param kept: memory that is not counted
    :return: bytes of memory that the calls use besides
    """
    found = {memory(t): t.untyped_storage().nbytes() for call in calls for t in tensors((call.args, call.kwargs))}
    return sum(size for key, size in found.items() if key not in kept)


def storages(values: Sequence[th.Tensor]) -> Iterator[Key]:
    """
    :param values: tensors
    :return: the keys of their memory
    """
    return map(memory, values)
