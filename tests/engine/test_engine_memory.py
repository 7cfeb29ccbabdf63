"""A replay in memory that serves again gives what it gives with memory for each result, again and again."""

import random
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch as th
import torch.nn.functional as F
from owners import numbers, random_state, seed_everything
from torch import nn

from sb3_ac_ext.engine.memory import bytes_used
from sb3_ac_ext.engine.recording import Replay
from sb3_ac_ext.engine.rewrites import rewritten
from sb3_ac_ext.engine.tape import Tape, memory, tensors

State = dict[str, th.Tensor]
SHAPES = {"x": (4, 6), "y": (4, 6), "w": (6, 6), "b": (6,), "p": (4, 6), "q": (2, 4, 3)}


def fresh(seed: int) -> State:
    return {name: numbers(100 * seed + i, *shape) for i, (name, shape) in enumerate(SHAPES.items())}


UNARY: list[Callable[[th.Tensor], th.Tensor]] = [
    *(th.tanh, th.sigmoid, th.relu, th.neg, th.abs, th.sin, th.square, F.softplus, F.elu, F.gelu, th.clone, th.zeros_like),
    *(lambda x: x * 0.5, lambda x: 1 - x, lambda x: x.clamp(-1, 1), lambda x: x + 1, lambda x: x / 2),
]
BINARY: list[Callable[[th.Tensor, th.Tensor], th.Tensor]] = [
    *(th.add, th.mul, th.sub, th.maximum, th.minimum, th.atan2),
    lambda x, y: th.where(x > y, x, y),
]


class Program:
    """
    Operations drawn at random, the same ones at each call.

    :param seed: of the draws
    :param call: how functions are called that are not looked into
    """

    def __init__(self, seed: int, call: Callable[[Callable[[], None]], None]) -> None:
        self.seed, self.call = seed, call
        self.held: list[th.Tensor] = []

    def __call__(self, state: State) -> State:
        self.draw, self.state = random.Random(self.seed), state
        self.pool = [*state.values()]
        self.held.clear()
        for _ in range(self.draw.randint(3, 30)):
            made = self.draw.choice(self.STEPS)(self)
            self.pool += [value for value in tensors(made) if value.numel()]
        chosen = self.draw.sample(self.pool, min(len(self.pool), self.draw.randint(1, 5)))
        self.pool.clear()  # what somebody holds keeps its memory
        return {str(i): value for i, value in enumerate(chosen)}

    def any(self) -> th.Tensor:
        """Likely one that was made a moment ago."""
        if self.draw.random() < 0.6:
            return self.draw.choice(self.pool[-4:])
        return self.draw.choice(self.pool)

    def matrix(self, rows: int | None = None) -> th.Tensor:
        """``(rows, 6)``"""
        fitting = [
            x for x in self.pool if x.dim() == 2 and x.shape[1] == 6 and rows in (None, len(x)) and x.dtype is th.float32
        ]
        return self.draw.choice(fitting[-5:])

    def writable(self) -> th.Tensor:
        return self.draw.choice(
            [x for x in self.pool if all(step or n == 1 for n, step in zip(x.shape, x.stride(), strict=True))][-8:]
        )

    def unary(self) -> Any:
        return self.draw.choice(UNARY)(self.any().float())

    def binary(self) -> Any:
        x = self.matrix()
        return self.draw.choice(BINARY)(x, self.matrix(len(x)))

    def broadcast(self) -> Any:
        x, row = self.matrix(), self.matrix()[0]
        made = [x + row, x * x[:, :1], row.expand(3, 6) - 1, x - row.mean(), x + self.state["b"], row.unsqueeze(0) * x]
        return self.draw.choice(made)

    def product(self) -> Any:
        x, weight = self.matrix(), self.state["w"]
        square = [y for y in self.pool if y.shape == (6, 6) and y.dtype is th.float32]
        weight = self.draw.choice([weight, weight.t(), *square[-2:]])
        ways = [
            lambda: (x @ weight).tanh(),
            lambda: F.linear(x, weight, self.state["b"]),
            lambda: th.mm(x, weight),
        ]
        return self.draw.choice(ways)()

    def view(self) -> Any:
        x = self.any()
        if x.dim() == 0:
            return x.expand(2)
        ways = [x.t() if x.dim() == 2 else x, x[: max(len(x) - 1, 1)], x[len(x) // 2 :], x.unsqueeze(0), x.flatten(), x[::2]]
        return self.draw.choice([*ways, x.chunk(2)])

    def copied(self) -> Any:
        x = self.matrix()
        ways = [
            lambda: x.t().contiguous(),
            lambda: th.cat([x, self.matrix()]),
            lambda: th.stack([x, self.matrix(len(x))]).sum(0),
            lambda: x.double().float() + 1,
            lambda: x.repeat(2, 1),
            lambda: F.pad(x, (0, 1))[:, 1:],
            lambda: x.flip(0),
        ]
        return self.draw.choice(ways)()

    def reduced(self) -> Any:
        x = self.matrix()
        made = [x.sum(), x.mean(dim=0), x.sum(dim=1, keepdim=True), x.softmax(1), x.max(dim=1), x.sort(dim=0), x.std()]
        return self.draw.choice(made)

    def in_place(self) -> None:
        x = self.writable()
        if x.is_floating_point():
            changes = [lambda: x.mul_(0.5), lambda: x.add_(1), lambda: x.tanh_(), lambda: x.relu_(), lambda: x.zero_()]
            changes += [lambda: x.copy_(x * 2), lambda: x.clamp_(-1, 1), lambda: x.sub_(x.mean()), lambda: x.fill_(0.25)]
            self.draw.choice(changes)()

    def written(self) -> None:
        """One tensor to another, wholly or in part."""
        x = self.matrix()
        if any(not step and n > 1 for n, step in zip(x.shape, x.stride(), strict=True)):
            return
        y = self.draw.choice([x, self.matrix(len(x))])
        source = self.draw.choice([lambda: y + 1, lambda: y, lambda: y.tanh()])()
        way = self.draw.randint(0, 4)
        if way == 0:
            x.copy_(source.clone())
        elif way == 1:
            x[0] = source[-1].clone()
        elif way == 2:
            x[:, 1:3] = source[:, 2:4].clone()
        elif way == 3:
            x.add_(source.clone(), alpha=0.5)
        else:
            x.copy_(source if memory(source) != memory(x) else source.clone())

    def filled_by_parts(self) -> Any:
        made = th.empty(4, 6)
        made[:2] = self.matrix()[0]
        if self.draw.random() < 0.5:
            made[2:].fill_(1.5)
        else:
            made[2:] = self.matrix()[-1] * 2
        return made

    def random(self) -> Any:
        x = self.matrix()
        ways = [lambda: th.randn_like(x), lambda: F.dropout(x, 0.3), lambda: x + th.rand(6), lambda: th.empty(2, 6).normal_()]
        return self.draw.choice(ways)()

    def outside(self) -> None:
        name, other = self.draw.choice("xyp"), self.draw.choice("xyp")
        state = self.state

        def change() -> None:
            state[name].mul_(0.5).add_(state[other].sum() / 100)

        self.call(change)

    def target(self) -> None:
        """As gradients and moments."""
        x, place = self.matrix(4), self.state["p"]
        self.draw.choice([lambda: place.copy_(x), lambda: place.lerp_(x, 0.3), lambda: place.add_(x)])()

    def hold(self) -> None:
        self.held.append(self.any())

    def learned(self) -> Any:
        w = self.state["w"].detach().requires_grad_()
        x = self.matrix().detach().clone()
        loss = (F.layer_norm(th.tanh(x @ w), (6,)) @ w).square().mean()
        return th.autograd.grad(loss, w)

    STEPS: ClassVar[list[Callable[["Program"], Any]]] = [
        *(unary, unary, unary, binary, binary, broadcast, product, product, view, view, copied, copied, reduced),
        *(in_place, in_place, written, written, filled_by_parts, random, outside, target, hold, learned),
    ]


def same(x: th.Tensor, y: th.Tensor) -> bool:
    return x.dtype is y.dtype and x.shape == y.shape and th.equal(x.nan_to_num(), y.nan_to_num())


def compare(seed: int) -> tuple[int, int]:
    """
    Replay a program several times beside itself.

    :return: bytes that it uses, and would use without a plan
    """
    ours, theirs = fresh(seed), fresh(seed)
    tape = Tape(ours.values())
    mine, plain = Program(seed, tape.call), Program(seed, lambda function: function())
    seed_everything(seed)
    with tape.recording():
        outputs = {name: value.detach() for name, value in mine(ours).items()}
    replay = Replay(tape, outputs, rounding=False)
    for step in range(4):
        for name, value in fresh(1000 + 10 * seed + step).items():
            ours[name].copy_(value)
            theirs[name].copy_(value)
        seed_everything(step)
        replay()
        after = random_state()
        seed_everything(step)
        expected = plain(theirs)
        assert random_state() == after, f"program {seed}, replay {step}: random numbers"
        for found, wanted in ((outputs, expected), (ours, theirs)):
            for name, value in found.items():
                assert same(value, wanted[name].detach()), f"program {seed}, replay {step}: {name}"
        for i, (value, held) in enumerate(zip(mine.held, plain.held, strict=True)):
            assert same(value, held), f"program {seed}, replay {step}: the held tensor {i}"
    kept = {*map(memory, ours.values())}
    return replay.bytes, bytes_used(rewritten(tape.operations, rounding=False), kept)


@pytest.mark.parametrize("first", range(0, 160, 20))
def test_programs_drawn_at_random(first: int) -> None:
    used = [compare(seed) for seed in range(first, first + 20)]
    assert sum(planned for planned, _ in used) < sum(plain for _, plain in used)


# What is saved


def bytes_of(net: nn.Module, x: th.Tensor) -> tuple[int, int]:
    """Of an update's replay, and without a plan."""
    parameters = list(net.parameters())
    tape = Tape([x, *parameters, *net.buffers()])
    with tape.recording():
        loss = net(x).square().mean()
        gradients = th.autograd.grad(loss, parameters)
        with th.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=1e-3)
        del gradients
    replay = Replay(tape, {"loss": loss.detach()})
    calls = rewritten(tape.operations)
    return replay.bytes, bytes_used(calls, tape.external)


def test_networks_take_less() -> None:
    """What the backward pass reads is kept; all else serves again."""
    deep = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(64, 64), nn.ReLU())), nn.Linear(64, 1))
    planned, plain = bytes_of(deep, numbers(0, 256, 64))
    activations = 12 * 256 * 64 * 4
    assert planned < 0.5 * plain and planned < 1.5 * activations
    images = nn.Sequential(nn.Conv2d(3, 16, 4, 2), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    planned, plain = bytes_of(images, numbers(0, 16, 3, 32, 32))
    assert planned < 0.75 * plain


def test_a_chain_takes_no_more_than_its_largest_pair() -> None:
    """Elementwise operations write over what is read for the last time."""
    x = numbers(0, 1000)
    tape = Tape([x])
    with tape.recording():
        y = x
        for _ in range(20):
            y = (y * 0.5 + 1).tanh().abs()
    assert Replay(tape, {"y": y}).bytes <= 2 * 4000 + 40 * 4  # and the numbers


def test_what_nobody_reads_is_not_done() -> None:
    x = numbers(0, 5)
    tape = Tape([x])
    with tape.recording():
        x.exp().sum()
        y = x * 2
        (y + 1).tanh()
    assert len(Replay(tape, {"y": y})) == 1


# What is left alone


@pytest.mark.parametrize("kind", ["input", "output", "view of an output", "constant", "held", "parameter"])
def test_memory_that_is_never_written_over(kind: str) -> None:
    """By an elementwise operation that reads it for the last time, or by whatever comes later."""
    x, held = numbers(0, 4, 6), []
    parameter = nn.Parameter(numbers(1, 4, 6))
    tape = Tape([x, parameter])
    outputs: State = {}

    def function() -> None:
        first = x * 2
        last = {"input": x, "parameter": parameter}.get(kind, first).tanh()
        if kind == "constant":
            last = th.full((4, 6), 0.5).tanh() + th.tensor(2.0).expand(4, 6).tanh()
        if kind in ("output", "view of an output"):
            outputs["first"] = first.detach() if kind == "output" else first[1:, ::2]
        if kind == "held":
            held.append(first)
        for _ in range(6):
            last = (last + 1).sin() * x.mean()
        outputs["last"] = last

    with tape.recording(), th.no_grad():
        function()
    replay = Replay(tape, outputs)
    values = numbers(2, 4, 6)
    for _ in range(3):
        x.copy_(values)
        replay()
        assert th.equal(x, values) and th.equal(parameter, numbers(1, 4, 6))
        for one in [*outputs.values(), *held]:
            if one is not outputs["last"]:
                assert th.equal(one, (values * 2)[1:, ::2] if kind == "view of an output" else values * 2)


@pytest.mark.parametrize("place", ["before", "after", "both"])
def test_calls_are_barriers(place: str) -> None:
    """A result that is copied to where a call reads it is there by then, and not sooner than the call before has read."""
    x, gradient, seen = numbers(0, 4), th.zeros(4), []
    tape = Tape([x, gradient])

    def step() -> None:
        seen.append(gradient.clone())

    def function() -> None:
        if place != "after":
            tape.call(step)
        made = x.exp()
        other = x * 3
        if place == "both":
            tape.call(step)
        gradient.copy_(made)
        if place != "before":
            tape.call(step)
        gradient.copy_(other)
        if place == "after":
            tape.call(step)

    with tape.recording():
        function()
    replay = Replay(tape, {})
    for i in range(3):
        x.copy_(numbers(i, 4))
        gradient.fill_(7.0)
        seen.clear()
        replay()
        full, exp, triple = th.full((4,), 7.0), numbers(i, 4).exp(), numbers(i, 4) * 3
        expected = {"before": [full], "after": [exp, triple], "both": [full, full, exp]}[place]
        assert len(seen) == len(expected)
        assert all(map(th.equal, seen, expected))
        assert th.equal(gradient, triple)


def test_a_result_is_not_made_where_somebody_still_reads() -> None:
    """It is copied there afterwards, as the function says."""
    x, place = numbers(0, 4), numbers(1, 4)
    tape = Tape([x, place])

    def function() -> State:
        made = x.exp()
        before = place * 2
        place.copy_(made)
        return {"before": before}

    with tape.recording():
        outputs = function()
    replay = Replay(tape, outputs)
    for i in range(3):
        x.copy_(numbers(i, 4))
        place.fill_(7)
        replay()
        assert outputs["before"].tolist() == [14.0] * 4 and th.equal(place, x.exp())


def test_arguments_that_overlap_are_not_written_over() -> None:
    """An elementwise operation on two views of one memory, of the same shape and not."""
    x = numbers(0, 6, 6)
    tape = Tape([x])

    def function() -> State:
        first, second, third, fourth = x * 2, x * 3, x * 4, x * 5
        made = first + first.t(), second + second, third[:, 0] + third[0], fourth * fourth[:, :1]
        return {str(i): value for i, value in enumerate(made)}

    with tape.recording():
        outputs = function()
    replay = Replay(tape, outputs)
    for i in range(3):
        x.copy_(numbers(i, 6, 6))
        replay()
        expected = x * 2 + (x * 2).t(), x * 3 + x * 3, (x * 4)[:, 0] + (x * 4)[0], (x * 5) * (x * 5)[:, :1]
        assert all(map(th.equal, outputs.values(), expected))


@pytest.mark.parametrize("dtype", [th.float64, th.float16, th.int32, th.bool])
def test_memory_of_one_type_serves_another(dtype: th.dtype) -> None:
    x = numbers(0, 16, 16)
    tape = Tape([x])
    with tape.recording():
        result = th.zeros(16, 16)
        for _ in range(4):
            y = (x * 2 + result).to(dtype)
            result = y.float() * 0.5
            result = result + 1
    replay = Replay(tape, {"result": result})
    for i in range(3):
        x.copy_(numbers(i, 16, 16))
        expected = th.zeros(16, 16)
        for _ in range(4):
            expected = (x * 2 + expected).to(dtype).float() * 0.5 + 1
        replay()
        assert th.equal(result, expected)
