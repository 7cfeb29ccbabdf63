"""Each better operation against the operation itself: the same bits, or within the bound of those that round."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch as th
import torch.nn.functional as F
from owners import numbers

from sb3_ac_ext.engine import products
from sb3_ac_ext.engine.recording import Replay
from sb3_ac_ext.engine.rewrites import DIRECT, ELEMENTWISE, EXACT, NUMBERS, ROUNDING, WITHOUT_CONTENT, Call, calls
from sb3_ac_ext.engine.tape import Operation, Tape, UnmetError, tensors

BOUND = 1e-6
"""Of what rounds, relative to the result's norm, in fp32."""

Make = Callable[..., th.Tensor]


def bits(x: th.Tensor) -> th.Tensor:
    """Which tell -0 from 0 and one NaN from another."""
    whole_numbers = {1: th.uint8, 2: th.int16, 4: th.int32, 8: th.int64}
    return x if x.is_complex() else x.detach().contiguous().view(whole_numbers[x.element_size()])


def noted(function: Callable[[], Any], given: Any) -> tuple[list[Operation], Any]:
    tape = Tape(tensors(given))
    with tape.recording():
        result = function()
    return tape.operations, result


def again(operations: list[Operation], rounding: bool) -> list[Call]:
    """Do operations again by calls, in memory with something else in it, and return the calls."""
    found = [call for operation in operations for call in calls(operation, rounding)]
    for call in found:
        for tensor in call.written:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype is not th.bool:
                tensor.fill_(77)
    with th.inference_mode():
        for call in found:
            call.function(*call.args, **call.kwargs)
    return found


def check(function: Callable[..., Any], *given: Any, rounding: bool = False, **kwargs: Any) -> list[Call]:
    """
    What a function does is done again by its calls.

    :return: the calls
    """
    operations, result = noted(lambda: function(*given, **kwargs), given)
    expected = [tensor.clone() for tensor in tensors(result)]
    strides = [tensor.stride() for tensor in tensors(result)]
    found = again(operations, rounding)
    for value, wanted, stride in zip(tensors(result), expected, strides, strict=True):
        assert value.dtype is wanted.dtype and value.shape == wanted.shape and value.stride() == stride
        if rounding and value.is_floating_point():
            bound = BOUND * (1 if value.dtype in (th.float32, th.float64) else 1e4)
            assert (value - wanted).double().norm() <= bound * wanted.double().norm()
        else:
            assert th.equal(bits(value), bits(wanted))
    return found


SPECIAL = th.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-45, 3.4e38, -1.0, 2.5])


def matrices(dtype: th.dtype = th.float32) -> Iterator[th.Tensor]:
    """Of all layouts."""
    x = numbers(0, 6, 4).to(dtype)
    yield from (x, x.t(), x[::2], x[:, 1:3], x[0].expand(3, 4), x[:, :1].expand(6, 3), x[:0], x[:, :0], x[1:].clone())


def tensors_of_all_kinds() -> Iterator[th.Tensor]:
    yield from matrices()
    yield from matrices(th.float64)
    yield from matrices(th.float16)
    yield from (SPECIAL, SPECIAL.double(), SPECIAL.bfloat16(), SPECIAL[2], numbers(1, 2, 3, 4).transpose(0, 2), th.ones(()))
    yield numbers(2, 2, 3, 4, 4).to(memory_format=th.channels_last)


def whole_numbers() -> Iterator[th.Tensor]:
    for dtype in (th.int64, th.int32, th.uint8):
        yield from matrices(dtype)


# Those that are exact


@pytest.mark.parametrize(
    "x", [*tensors_of_all_kinds(), *whole_numbers()], ids=lambda x: f"{x.dtype} {tuple(x.shape)} {x.stride()}"
)
def test_exact_rules(x: th.Tensor) -> None:
    assert len(check(th.relu, x)) == 1
    for function in (th.clone, lambda y: y.clone(memory_format=th.contiguous_format), lambda y: y.double()):
        check(function, x)
    check(lambda y: y.to(th.float32, copy=True), x)
    check(lambda y: th._is_all_true(y == y), x)
    for function in (th.zeros_like, th.ones_like, lambda y: th.full_like(y, 3), lambda y: y.new_full((2, 3), 2)):
        (call,) = check(function, x)
        assert call.function is th.Tensor.fill_
    for function in (lambda y: y.new_zeros(3), lambda y: y.new_ones(2, 2), lambda y: th.full_like(y, 1.5, dtype=th.float64)):
        check(function, x)


def test_exact_rules_without_inputs() -> None:
    made: list[Callable[[], th.Tensor]] = [
        *(lambda: th.zeros(3), lambda: th.ones(2, 3, dtype=th.int32), lambda: th.full((2,), 3), lambda: th.full((2,), -0.5)),
        *(lambda: th.full((2,), True), lambda: th.full((), 2.5), lambda: th.zeros(0), lambda: th.ones((), dtype=th.bool)),
        *(lambda: th.full((2,), float("nan")), lambda: th.full((3,), 2, dtype=th.float64), lambda: th.scalar_tensor(1.5)),
        lambda: th.full((2,), fill_value=1 + 2j),
    ]
    for make in made:
        (call,) = check(make)
        assert call.function is th.Tensor.fill_
    for make in (lambda: th.empty(3), lambda: th.empty_strided((2,), (1,)), lambda: th.ones(2).new_empty(2)):
        operations, _ = noted(make, ())
        assert [call for operation in operations for call in calls(operation) if operation.name in WITHOUT_CONTENT] == []


@pytest.mark.parametrize("loss", [F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy, F.mse_loss, F.soft_margin_loss])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses(loss: Callable[..., th.Tensor], reduction: str, capfd: pytest.CaptureFixture[str]) -> None:
    """PyTorch warns, from C++, where it is given memory of another shape than a loss is computed in first."""
    x, y = th.sigmoid(numbers(0, 6, 4)), th.sigmoid(numbers(1, 6, 4))
    check(loss, x, y, reduction=reduction, rounding=True)
    assert capfd.readouterr().err == ""


def test_the_table_is_tested() -> None:
    """A new rule wants a test of its own here."""
    others = {"scalar_tensor", "full", "full_like", "new_full", "relu", "clone", "_to_copy", "_is_all_true"}
    assert EXACT.keys() == NUMBERS.keys() | others
    assert ROUNDING.keys() == {"sum", "mean", "mse_loss", "mm", "addmm"}


# Those that round


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_sums(dtype: th.dtype) -> None:
    for x in matrices(dtype):
        (call,) = check(th.sum, x, rounding=True)
        assert call.function is th.sum
        for function, dim, keepdim in itertools.product((th.sum, th.mean), (0, 1, (0, 1)), (False, True)):
            if x.numel() or function is th.sum:
                check(function, x, dim=dim, keepdim=keepdim, rounding=True)
    one = numbers(0, 1, 5).to(dtype)
    for function, x in itertools.product((th.sum, th.mean), (one, one.t(), numbers(0, 4, 6).to(dtype)[:1, ::2], one[:, :1])):
        for keepdim in (False, True):
            (call,) = check(function, x, dim=x.shape.index(1), keepdim=keepdim, rounding=True)
            assert call.function is th.Tensor.copy_
    for x in (SPECIAL[:2], numbers(0, 100, 301).t(), th.ones(()), numbers(0, 2, 3, 4)):
        check(th.sum, x.to(dtype), rounding=True)
    assert th.isnan(th.sum(SPECIAL))


@pytest.mark.parametrize("x", [*whole_numbers()], ids=lambda x: f"{x.dtype} {tuple(x.shape)}")
def test_sums_of_whole_numbers(x: th.Tensor) -> None:
    check(th.sum, x, rounding=True)
    check(th.sum, x > 1, rounding=True)
    check(th.sum, x.float(), rounding=True, dtype=th.float64)
    check(th.sum, x.float(), dim=0, rounding=True)


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_mean_squares(dtype: th.dtype) -> None:
    for x, y in itertools.product([*matrices(dtype)], [*matrices(dtype)]):
        if x.shape == y.shape and x.numel():
            found = check(F.mse_loss, x, y, rounding=True)
            assert len(found) == 3
    x, y = numbers(0, 6, 4).to(dtype), numbers(1, 6, 4).to(dtype)
    for reduction in ("none", "sum"):
        assert len(check(F.mse_loss, x, y, reduction=reduction, rounding=True)) == 1
    check(F.mse_loss, x[0, 0], y[0, 0], rounding=True)
    check(lambda a, b: th._C._nn.mse_loss(a, b), x, y[:1], rounding=True)
    check(lambda a, b: th._C._nn.mse_loss(a, b), x[:1], y, rounding=True)
    check(lambda a, b: th._C._nn.mse_loss(a, b), x, y.to(th.float64), rounding=True)


@pytest.fixture(params=["as it is", "oneDNN", "two threads", "four threads"])
def routed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How products are done."""
    way: str = request.param
    monkeypatch.setattr(products, "onednn_is_faster", lambda: way == "oneDNN")
    count = {"two threads": 2, "four threads": 4}.get(way, 1)
    monkeypatch.setattr(products.th, "get_num_threads", lambda: count)
    if way == "oneDNN" and not hasattr(th.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    return way


SIZES = [(1, 5, 3), (2, 5, 3), (5, 1, 1), (0, 3, 2), (3, 0, 2), (3, 2, 0), (256, 400, 300), (100, 96, 96)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size: tuple[int, int, int], routed: str) -> None:
    rows, inner, columns = size
    for dtype, left, right in itertools.product([th.float32, th.float64], [False, True], [False, True]):
        a = numbers(0, inner, rows).to(dtype).t() if left else numbers(0, rows, inner).to(dtype)
        b = numbers(1, columns, inner).to(dtype).t() if right else numbers(1, inner, columns).to(dtype)
        bias = numbers(2, columns).to(dtype)
        check(th.mm, a, b, rounding=True)
        check(th.addmm, bias, a, b, rounding=True)
        with th.no_grad():
            check(F.linear, a, b.t(), rounding=True)
            check(F.linear, a, b.t(), bias, rounding=True)
    check(th.addmm, numbers(3, rows, columns), numbers(0, rows, inner), numbers(1, inner, columns), rounding=True)
    check(th.addmm, numbers(3, rows, 1), numbers(0, rows, inner), numbers(1, inner, columns), rounding=True)
    check(th.addmm, numbers(3, 1)[0], numbers(0, rows, inner), numbers(1, inner, columns), rounding=True)


def test_products_that_have_no_rule() -> None:
    a, b, bias = numbers(0, 6, 4), numbers(1, 4, 3), numbers(2, 3)
    (call,) = check(th.addmm, bias, a, b, beta=0.5, alpha=2, rounding=True)
    assert call.function is th.addmm
    with th.no_grad():
        check(F.linear, numbers(3, 2, 6, 4), b.t(), bias, rounding=True)
        check(F.linear, numbers(3, 4), b.t(), bias, rounding=True)
        check(F.linear, a, numbers(3, 4), rounding=True)
    for dtype in (th.int64, th.int32, th.float16, th.bfloat16):
        check(th.mm, a.mul(3).to(dtype), b.mul(3).to(dtype), rounding=True)
        check(th.addmm, bias.mul(3).to(dtype), a.mul(3).to(dtype), b.mul(3).to(dtype), rounding=True)
    check(th.mm, a.expand(6, 4)[::2], b[:, :1].expand(4, 5), rounding=True)
    check(th.bmm, numbers(0, 3, 4, 5), numbers(1, 3, 5, 2), rounding=True)


def test_products_that_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    """One piece for each thread, of large products whose rows can be divided."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    monkeypatch.setattr(products.th, "get_num_threads", lambda: 2)
    b, bias = numbers(1, 400, 300), numbers(2, 300)
    for rows, divided in ((512, True), (256, True), (255, False), (64, False)):
        for a in (numbers(0, rows, 400), numbers(0, 400, rows).t()):
            assert check(th.mm, a, b, rounding=True)[0].function is (th.bmm if divided else th.mm)
            assert check(th.addmm, bias, a, b, rounding=True)[0].function is (th.bmm if divided else th.mm)
    assert products.pieces(numbers(0, 2000, 20), numbers(0, 20, 2000)) == 1
    monkeypatch.setattr(products.th, "get_num_threads", lambda: 1)
    assert products.pieces(numbers(0, 512, 400), b) == 1


def test_products_that_go_through_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """By processor and shape alone; no setting of the process is touched, and they are as exact as fp32."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    precision = th.backends.mkldnn.matmul.fp32_precision
    for shape, taken in (((256, 400, 300), True), ((256, 18, 400), False), ((256, 400, 1), False), ((64, 400, 300), False)):
        a, b = numbers(0, *shape[:2]), numbers(1, *shape[1:])
        assert products.takes_onednn(a, b) is taken
        assert not products.takes_onednn(a.double(), b.double())
        for bias in (None, numbers(2, shape[2])):
            out = th.full((shape[0], shape[2]), float("nan"))
            products.by_onednn(out, a, b.t().contiguous(), bias)
            exact = a.double() @ b.double() + (0 if bias is None else bias)
            assert (out - exact).norm() < BOUND * exact.norm()
    assert th.backends.mkldnn.matmul.fp32_precision == precision


# All other operations


def pairs(x: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    return x, numbers(9, *x.shape).to(x.dtype)


FUNCTIONS: dict[str, list[Callable[[th.Tensor, th.Tensor], Any]]] = {
    "add": [th.add, lambda x, y: th.add(x, y, alpha=2), lambda x, y: x + 1.5, lambda x, y: x + y[:1]],
    "sub": [th.sub, lambda x, y: x - 1, lambda x, y: th.sub(x, y, alpha=3)],
    "mul": [th.mul, lambda x, y: x * 2.5],
    "div": [th.div, lambda x, y: x / 3, lambda x, y: th.div(x, y.abs() + 1, rounding_mode="floor")],
    "rsub": [lambda x, y: th.rsub(x, 2), lambda x, y: th.rsub(x, y, alpha=2)],
    "pow": [lambda x, y: x.abs() ** y, lambda x, y: x**2, lambda x, y: 2**x],
    "maximum": [th.maximum],
    "minimum": [th.minimum],
    "clamp": [lambda x, y: x.clamp(-0.5, 0.5), lambda x, y: x.clamp(max=0.3), lambda x, y: x.clamp(y, y + 1)],
    "clamp_min": [lambda x, y: th.clamp_min(x, 0.1)],
    "clamp_max": [lambda x, y: th.clamp_max(x, 0.1)],
    "where": [lambda x, y: th.where(x > 0, x, y), lambda x, y: th.where(x > 0, x, 0.5), lambda x, y: th.where(y > 0, 1.0, x)],
    "eq": [th.eq, lambda x, y: x == 0],
    "ne": [th.ne, lambda x, y: x != 0],
    "lt": [th.lt, lambda x, y: x < 0.2],
    "le": [th.le, lambda x, y: x <= 0.2],
    "gt": [th.gt, lambda x, y: x > 0.2],
    "ge": [th.ge, lambda x, y: x >= 0.2],
    "logical_and": [lambda x, y: th.logical_and(x > 0, y > 0)],
    "logical_not": [lambda x, y: th.logical_not(x > 0)],
    "bitwise_and": [lambda x, y: (x > 0) & (y > 0)],
    "bitwise_not": [lambda x, y: ~(x > 0)],
    "mean": [lambda x, y: x.mean(), lambda x, y: x.mean(dim=-1, keepdim=True), lambda x, y: x.mean(dtype=th.float64)],
    "cat": [lambda x, y: th.cat([x, y]), lambda x, y: th.cat([x, y[:0], y], dim=0), lambda x, y: th.cat([x.double(), y])],
    "stack": [lambda x, y: th.stack([x, y]), lambda x, y: th.stack([x, y], dim=-1)],
    "bmm": [lambda x, y: th.bmm(x.unsqueeze(0), y.t().unsqueeze(0))],
    "index_select": [lambda x, y: x.index_select(0, (y[:, :1].flatten() * 0).long())],
    "addmm": [lambda x, y: th.addmm(y[:, :1], x, y.t())],
}
UNARY = {"abs", "cos", "exp", "log", "log1p", "neg", "reciprocal", "rsqrt", "sigmoid", "sin", "sqrt", "square", "tanh"}
FUNCTIONS |= {name: [lambda x, y, name=name: getattr(th, name)(x)] for name in UNARY}


@pytest.mark.parametrize("name", sorted(DIRECT | {"rsub"}))
def test_operations_that_are_called_directly(name: str) -> None:
    """With inputs of all layouts, in the memory that the result has."""
    for x, y in map(pairs, [*matrices(), *matrices(th.float64)]):
        for function in FUNCTIONS[name]:
            try:
                function(x, y)
            except (RuntimeError, IndexError):  # as of a tensor without elements
                assert not x.numel()
            else:
                check(function, x, y)
    if name in UNARY or name in ("maximum", "minimum", "clamp_min", "clamp_max"):
        for values in (SPECIAL, SPECIAL.double(), SPECIAL.half()):
            check(FUNCTIONS[name][0], values, values.flip(0))


@pytest.mark.parametrize(
    "name", sorted(DIRECT & FUNCTIONS.keys() - {"addmm", "bmm", "index_select", "cat", "stack", "mean", "where"} - UNARY)
)
def test_operations_that_promote(name: str) -> None:
    """Whole numbers, booleans, and two types at once."""
    x = numbers(0, 4, 3)
    i = (x * 3).long()
    given: list[tuple[Any, Any]] = [(i, i + 1), (i, x), (x, x.double()), (i.int(), i), (x.half(), x)]
    for one, other in given:
        for function in FUNCTIONS[name]:
            try:
                function(one, other)
            except RuntimeError:
                continue
            check(function, one, other)


@pytest.mark.parametrize("number", [0, 3, -0.0, 0.1, 1e-45, 1e39, 2**24 + 1, float("inf"), float("nan")])
def test_numbers_become_tensors(number: float) -> None:
    """Where that gives the same bits: not in half precision, where numbers are taken in more than that."""
    tensors_of_two_kinds = (numbers(0, 4, 3), SPECIAL, SPECIAL.double(), th.tensor(1.5)), (SPECIAL.half(), SPECIAL.bfloat16())
    for name in ("add", "sub", "mul", "div", "eq", "ne", "ge", "gt", "le", "lt"):
        for become, given in zip((True, False), tensors_of_two_kinds, strict=True):
            for x in given:
                (call,) = check(lambda y, name=name: getattr(th, name)(y, number), x)
                assert isinstance(call.args[1], th.Tensor) is become


def gradient(function: Make) -> Callable[[th.Tensor, th.Tensor], Any]:
    def of(x: th.Tensor, y: th.Tensor) -> Any:
        x = x.detach().requires_grad_()
        return th.autograd.grad(function(x), x, y)

    return of


ELEMENTWISE_FUNCTIONS: dict[str, Callable[[th.Tensor, th.Tensor], Any]] = {
    "sigmoid_backward": gradient(th.sigmoid),
    "tanh_backward": gradient(th.tanh),
    "threshold_backward": gradient(th.relu),
    "softplus": lambda x, y: F.softplus(x),
    "softplus_backward": gradient(F.softplus),
    "elu_backward": gradient(F.elu),
}


@pytest.mark.parametrize("name", sorted(ELEMENTWISE))
def test_elementwise_operations_may_write_over_an_argument(name: str) -> None:
    """Whichever of them is read for the last time, and whichever is read again."""
    functions = [ELEMENTWISE_FUNCTIONS[name]] if name in ELEMENTWISE_FUNCTIONS else FUNCTIONS[name]
    for function, first, second, transposed in itertools.product(functions, [False, True], [False, True], [False, True]):
        x, y = numbers(0, 5, 5), numbers(1, 5, 5)
        if name in ("log", "sqrt", "rsqrt", "log1p"):
            x = x.abs() + 0.1

        def run(x: th.Tensor, y: th.Tensor, function: Any = function, first: bool = first, second: bool = second) -> Any:
            a, b = x * 1, y * 1
            if transposed:  # noqa: B023
                a = a.t()
            return function(a, b), a * 2 if first else None, b * 2 if second else None

        tape = Tape([x, y])
        with tape.recording():
            results = tensors(run(x, y))
        replay = Replay(tape, {str(i): value.detach() for i, value in enumerate(results)}, rounding=False)
        for i in range(3):
            x.copy_(numbers(10 + i, 5, 5).abs() + 0.1 if name in ("log", "sqrt", "rsqrt", "log1p") else numbers(10 + i, 5, 5))
            y.copy_(numbers(20 + i, 5, 5))
            replay()
            for value, wanted in zip(results, tensors(run(x, y)), strict=True):
                assert th.equal(bits(value), bits(wanted))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sort(dim=0),
        lambda x: th.var_mean(x, dim=0),
        lambda x: x.argmax(dim=1),
        lambda x: x.softmax(dim=1),
        lambda x: x.cumsum(dim=0),
        lambda x: x.norm(dim=1),
        lambda x: F.gelu(x),
        lambda x: x.sum(dim=0, keepdim=True, dtype=th.float64),
        lambda x: x.lerp(x * 2, 0.3),
        lambda x: x.flip(0),
        lambda x: th._foreach_add([x, x * 2], 1),
    ],
)
def test_operations_without_a_rule(function: Callable[[th.Tensor], Any]) -> None:
    for x in matrices():
        if x.numel():
            check(function, x)


def test_operations_in_place() -> None:
    """They are done as they are, by the tensor's own method where that is the same."""
    changes: list[Callable[[th.Tensor], Any]] = [
        *(lambda x: x.add_(1), lambda x: x.add_(x, alpha=2), lambda x: x.mul_(x), lambda x: x.sub_(0.5), lambda x: x.div_(3)),
        *(lambda x: x.copy_(x.flip(0)), lambda x: x.fill_(2), lambda x: x.zero_(), lambda x: x.relu_()),
        *(lambda x: x.lerp_(x * 2, 0.5), lambda x: th._foreach_add_([x, x], 1), lambda x: x.index_fill_(0, th.tensor([0]), 3)),
        *(lambda x: x.t().add_(1), lambda x: x.__setitem__(0, 5.0), lambda x: th.exp(x, out=x)),
    ]
    for change in changes:
        x = numbers(0, 4, 4)
        operations, _ = noted(lambda change=change, x=x: change(x), x)
        found = [call for operation in operations for call in calls(operation)]
        x.copy_(numbers(1, 4, 4))
        expected = x.clone()
        change(expected)
        for call in found:
            call.function(*call.args, **call.kwargs)
        assert th.equal(x, expected)


REQUIREMENTS: dict[str, tuple[Callable[[th.Tensor], th.Tensor], int]] = {
    "no NaN": (lambda x: x == x, 1),
    "no NaN in a row": (lambda x: (x == x).all(-1), 1),
    "no NaN in a row and column": (lambda x: (x == x).all(-1).all(-1), 1),
    "equal": (lambda x: x == 2 * x / 2, 3),
    "a number": (lambda x: x == 1.0, 3),
    "a row": (lambda x: x == x[0], 3),
    "positive": (lambda x: x > 0, 3),
    "positive rows": (lambda x: (x > 0).all(-1), 4),
    "one of both": (lambda x: (x == x) | (x > 0), 5),
}
"""Conditions of tensors, and the calls that a replay makes to look at them."""


@pytest.mark.parametrize("name", REQUIREMENTS)
@pytest.mark.parametrize("value", [1.0, 3.0, -1.0, float("nan"), float("inf")])
def test_requirements(name: str, value: float) -> None:
    """As `torch.distributions` has them."""
    condition, count = REQUIREMENTS[name]
    x = th.ones(3, 4)
    tape = Tape([], [x])
    with tape.recording():
        tape.require(th._is_all_true(condition(x)))
    replay = Replay(tape, {})
    assert len(replay) == count
    replay()
    x[1, 2] = value
    with contextlib.nullcontext() if condition(x).all() else pytest.raises(UnmetError):
        replay()
