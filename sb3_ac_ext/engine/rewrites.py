"""
What an operation becomes in a replay: a table from operations to better ones.

A rule gets an operation whose result is new and returns calls that write the same numbers to the memory of the result. It is
*exact*, or it *rounds* differently (by 1e-6 relative to the operation at most). What has no rule is done by the variant of
the operation that takes memory for its result, or else its result is copied there.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch as th

from sb3_ac_ext.engine import products
from sb3_ac_ext.engine.tape import Key, Operation, memory, require, require_equal, tensors


class Call(NamedTuple):
    """A call of a replay."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    written: tuple[th.Tensor, ...] = ()
    """Those of the arguments that it overwrites wholly, without reading them."""
    elementwise: bool = False
    """Whether it may write over an argument of the shape of its result."""
    lasting: bool = False
    """Whether it does something besides writing its result: draws random numbers, or keeps running statistics."""


Rule = Callable[[Operation], list[Call] | None]
EXACT: dict[str, Rule] = {}
"""Rules that give the same bits."""
ROUNDING: dict[str, Rule] = {}
"""Rules that sum in another order."""

WITHOUT_CONTENT = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"})
"""Operations that only make memory."""
DIRECT = frozenset(
    {"abs", "add", "addmm", "bitwise_and", "bitwise_not", "bmm", "cat", "clamp", "clamp_max", "clamp_min", "cos", "div", "eq"}
    | {"exp", "ge", "gt", "index_select", "le", "log", "log1p", "logical_and", "logical_not", "lt", "maximum", "mean"}
    | {"minimum", "mul", "ne", "neg", "pow", "reciprocal", "rsqrt", "sigmoid", "sin", "sqrt", "square", "stack", "sub"}
    | {"tanh", "where"}
)
"""Operations whose function in ``torch`` takes the same arguments and ``out``; it is called in a third of the time."""
ELEMENTWISE = frozenset(
    {"abs", "add", "clamp", "clamp_min", "clamp_max", "cos", "div", "exp", "log", "log1p", "maximum", "minimum", "mul", "neg"}
    | {"pow", "reciprocal", "rsqrt", "sigmoid", "sigmoid_backward", "sin", "sqrt", "square", "sub", "tanh", "tanh_backward"}
    | {"threshold_backward", "softplus", "softplus_backward", "elu_backward", "rsub"}
)
"""Each number of the result depends on the numbers in its place alone."""
IN_PLACE = frozenset({"add_", "copy_", "div_", "fill_", "mul_", "sub_", "zero_"})
"""Operations that a tensor's own method does; it is called in a third of the time."""
ARITHMETIC = frozenset({"add", "sub", "mul", "div", "eq", "ne", "ge", "gt", "le", "lt"} | {"add_", "sub_", "mul_", "div_"})
"""Operations that take a number or a tensor of no dimensions, which is twice as fast."""
NUMBERS = {"zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1}
"""Operations whose result is one number everywhere."""


def calls(operation: Operation, rounding: bool = True) -> list[Call]:
    """
    What does an operation again, in the same memory.

    :param operation: that was noted
    :param rounding: whether rules that round differently may be used
    """
    if operation.name in WITHOUT_CONTENT:
        return []
    if operation.result is None:
        function = getattr(operation.function, "_op", operation.function)
        if operation.name in IN_PLACE:
            function = getattr(th.Tensor, operation.name)
        lasting = th.Tag.nondeterministic_seeded in getattr(operation.function, "tags", ())
        return [Call(function, _without_number(operation), operation.kwargs, lasting=lasting)]
    for rules in (EXACT, ROUNDING) if rounding else (EXACT,):
        rule = rules.get(operation.name)
        better = rule(operation) if rule is not None else None
        if better is not None:
            return better
    return [_general(operation)]


def _general(operation: Operation) -> Call:
    function, args, kwargs, result = operation
    name = operation.name
    elementwise = name in ELEMENTWISE
    lasting = th.Tag.nondeterministic_seeded in function.tags or "batch_norm" in name
    if isinstance(result, th.Tensor):
        if name in DIRECT:
            numbers = _without_number(operation)
            return Call(getattr(th, name), numbers, {**kwargs, "out": result}, (result,), elementwise, lasting)
        variant = _variant_with_memory(function)
        if variant is not None:
            overload, argument, kept = variant
            given = {key: value for key, value in kwargs.items() if key in kept}
            return Call(overload._op, args, {**given, argument: result}, (result,), elementwise, lasting)
    return Call(_copied, (function._op, result, args, kwargs), {}, tuple(tensors(result)), lasting=lasting)


def _without_number(operation: Operation) -> tuple[Any, ...]:
    """The arguments, with a tensor in place of a number where that is the same to an operation."""
    args = operation.args
    if operation.name not in ARITHMETIC or operation.kwargs or type(args[-1]) not in (int, float):
        return args
    x = args[0]
    alike = isinstance(x, th.Tensor) and x.dtype in (th.float32, th.float64) and len(args) == 2
    return (x, th.tensor(args[1], dtype=x.dtype, device=x.device)) if alike else args


def _copied(function: Callable[..., Any], result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for place, value in zip(tensors(result), tensors(function(*args, **kwargs)), strict=True):
        place.copy_(value)


@cache
def _variant_with_memory(function: Any) -> tuple[Any, str, frozenset[str]] | None:
    """The operation with memory for its one result, the name of that argument and those of all others, if there is one."""
    types = {argument.name: str(argument.type) for argument in function._schema.arguments}
    if function._schema.is_mutable or "reduction" in types:  # losses make the memory larger before they take the mean
        return None
    for name in function.overloadpacket.overloads():
        overload = getattr(function.overloadpacket, name)
        results = [argument.name for argument in overload._schema.arguments if argument.is_out]
        others = {argument.name: str(argument.type) for argument in overload._schema.arguments if not argument.is_out}
        ignored = {"dtype", "layout", "device", "pin_memory"} - others.keys()  # which the memory has
        if len(results) == 1 and others == {key: value for key, value in types.items() if key not in ignored}:
            return overload, results[0], frozenset(others)
    return None


def _rule(table: dict[str, Rule], *names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        table.update(dict.fromkeys(names, rule))
        return rule

    return register


@_rule(EXACT, *NUMBERS, "scalar_tensor", "full", "full_like", "new_full")
def _filled(operation: Operation) -> list[Call] | None:
    """Memory that is there already is filled."""
    name, args, out = operation.name, operation.args, operation.result
    number = NUMBERS.get(name, args[0] if name == "scalar_tensor" else args[-1])
    return [Call(th.Tensor.fill_, (out, number), {}, (out,))]


@_rule(EXACT, "relu")
def _relu(operation: Operation) -> list[Call] | None:
    """It has no variant with memory for the result."""
    out = operation.result
    return [Call(th.clamp_min, (operation.args[0], 0), {"out": out}, (out,), elementwise=True)]


@_rule(EXACT, "clone", "_to_copy")
def _copy(operation: Operation) -> list[Call] | None:
    """The memory has type and place already."""
    out = operation.result
    return [Call(th.Tensor.copy_, (out, operation.args[0]), {}, (out,))]


@_rule(EXACT, "_is_all_true")
def _all(operation: Operation) -> list[Call] | None:
    """It has no variant with memory for the result."""
    return [Call(th.all, operation.args, {"out": operation.result}, (operation.result,))]


@_rule(ROUNDING, "sum", "mean")
def _sum(operation: Operation) -> list[Call] | None:
    """Over a batch of one it copies. That of everything has no variant with memory; that over all dimensions has one."""
    (x, *rest), out = operation.args, operation.result
    if operation.kwargs or not x.is_floating_point():
        return None
    if x.numel() == out.numel():
        return [Call(th.Tensor.copy_, (out, x.view(out.shape)), {}, (out,))]
    return None if rest or operation.name == "mean" else [Call(th.sum, (x, list(range(x.dim()))), {"out": out}, (out,))]


@_rule(ROUNDING, "mse_loss")
def _mean_square(operation: Operation) -> list[Call] | None:
    """It has none either where it takes the mean."""
    x, y, *reduction = operation.args
    if reduction not in ([], [1]) or operation.kwargs:
        return None
    difference = th.empty_like(x)
    return [
        Call(th.sub, (x, y), {"out": difference}, (difference,), elementwise=True),
        Call(th.mul, (difference, difference), {"out": difference}),
        Call(th.mean, (difference,), {"out": operation.result}, (operation.result,)),
    ]


@_rule(ROUNDING, "mm")
def _product(operation: Operation) -> list[Call] | None:
    """See `products`."""
    a, b = operation.args
    return _products(operation.result, a, b, None)


@_rule(ROUNDING, "addmm")
def _product_and_bias(operation: Operation) -> list[Call] | None:
    """The bias is added to the product, where PyTorch would copy it to the result first; a batch of one is a vector."""
    bias, a, b = operation.args
    if operation.kwargs or a.device.type != "cpu":
        return None
    if a.shape[0] == 1 and bias.dim() == 1:
        row = operation.result[0]
        return [Call(th.addmv, (bias, b.t(), a[0]), {"out": row}, (row,))]
    return _products(operation.result, a, b, bias)


def _products(out: th.Tensor, a: th.Tensor, b: th.Tensor, bias: th.Tensor | None) -> list[Call]:
    vector = bias is None or bias.dim() == 1
    if products.takes_onednn(a, b) and vector:
        return [Call(products.by_onednn, (out, a, b.t(), bias), {}, (out,))]
    count = products.pieces(a, b)
    if count == 1:
        product = Call(th.mm, (a, b), {"out": out}, (out,))
    else:
        parts = a.unflatten(0, (count, -1)), b.expand(count, *b.shape)
        product = Call(th.bmm, parts, {"out": out.view(count, -1, out.shape[1])}, (out,))
    return [product] if bias is None else [product, Call(th.Tensor.add_, (out, bias), {})]


def rewritten(operations: Sequence[Operation], rounding: bool = True) -> list[Call]:
    """The `calls` of all operations, and what is better for several of them together."""
    uses = Counter(memory(tensor) for operation in operations for tensor in tensors((operation.args, operation.kwargs)))
    found: list[Call] = []
    skipped = False
    for i, (operation, following) in enumerate(zip(operations, [*operations[1:], None], strict=True)):
        equality = _required_equality(operations[: i + 1]) if operation.function is require else None
        if skipped:
            skipped = False
        elif equality is not None:
            found.append(Call(require_equal, equality, {}))
        elif rounding and following is not None and _is_rectified_layer(operation, following, uses):
            (bias, a, b), out = operation.args, following.result
            found.append(Call(products.by_onednn, (out, a, b.t(), bias, "relu"), {}, (out,)))
            skipped = True
        else:
            found += calls(operation, rounding)
    return found


def _required_equality(operations: Sequence[Operation]) -> tuple[Any, ...] | None:
    """Two tensors, if the last operation requires nothing but that all their numbers are the same."""
    *before, last = operations
    while before and before[-1].name in ("_is_all_true", "all") and memory(before[-1].result) == memory(last.args[0]):
        last = before.pop()
    if last.name not in ("_is_all_true", "all") or not before or before[-1].name != "eq":
        return None
    x, y = before[-1].args
    same = isinstance(y, th.Tensor) and x.shape == y.shape and x.dtype == y.dtype
    return (x, y) if same and memory(before[-1].result) == memory(last.args[0]) else None


def _is_rectified_layer(operation: Operation, following: Operation, uses: Mapping[Key, int]) -> bool:
    """Whether two operations are a product with a bias and the rectifier of it, and nobody else reads the product."""
    if (operation.name, following.name) != ("addmm", "relu") or operation.kwargs:
        return False
    bias, a, b = operation.args
    result, rectified = operation.result, following.args[0]
    same = memory(result) == memory(rectified) and result.shape == rectified.shape and result.stride() == rectified.stride()
    return same and uses[memory(result)] == 1 and bias.dim() == 1 and products.takes_onednn(a, b, rectified=True)
