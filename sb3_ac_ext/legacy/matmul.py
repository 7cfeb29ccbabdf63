"""
Matrix products: large fp32 ones through oneDNN, where that is faster and as exact; others in a piece for each thread.

``torch.backends.mkldnn.matmul.fp32_precision = "bf16"`` sends fp32 products on a CPU to oneDNN. On a processor without
bf16 matrix units oneDNN computes them in fp32, on some (AMD Zen) in half of MKL's time; on one with such units (AMX) it
really rounds to bf16. So each size is tried once in a process: the setting is used for it only if it is clearly faster
and its error against float64 is that of fp32.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch as th

SMALLEST_SIDE = 128
"""Thinner products are slower through oneDNN."""
SMALLEST_DIVIDED = 256**3
"""Multiplications of a product from which on a batch of pieces, one for each thread, is faster than MKL's own division."""
LARGEST_ERROR = 1e-6
"""Relative error against float64, as a ratio of norms; fp32 gives about 3e-7 for sums of some hundred terms."""
LEAST_GAIN = 1.15
"""How many times faster oneDNN has to be."""

_choices: dict[tuple[int, int, int, int], bool] = {}
_lock = threading.RLock()
_users = 0
_previous = "none"
_here = threading.local()


@contextmanager
def onednn() -> Iterator[None]:
    """
    fp32 products go to oneDNN within this context; the user's setting is back when the last one inside has left.

    The setting belongs to the process, so other threads see it too. That changes their results no more than another
    order of summation: it is only entered for products that the probe has found exact, and by the probe itself, for one
    product of each size, during which a processor with bf16 units may round other threads' products too.
    """
    global _users, _previous
    backend = th.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _lock:
        if _users == 0:
            _previous = backend.fp32_precision
            backend.fp32_precision = "bf16"
        _users += 1
    outside, _here.inside = inside_onednn(), True
    try:
        yield
    finally:
        _here.inside = outside
        with _lock:
            _users -= 1
            if _users == 0:
                backend.fp32_precision = _previous


def inside_onednn() -> bool:
    """Whether this thread is in the context `onednn`."""
    return getattr(_here, "inside", False)


def _through_onednn(a: th.Tensor, b: th.Tensor) -> bool:
    rows, (inner, columns) = a.shape[0], b.shape
    large = min(rows, inner, columns) >= SMALLEST_SIDE
    return large and a.dtype is th.float32 and a.device.type == "cpu" and faster_through_onednn(rows, inner, columns)


def faster_through_onednn(rows: int, inner: int, columns: int) -> bool:
    """
    Whether products of this size gain from oneDNN; measured at the first call for the size and the number of threads.

    :param rows: of the left matrix
    :param inner: its columns
    :param columns: of the right matrix
    """
    key = (rows, inner, columns, th.get_num_threads())
    if key not in _choices:
        _choices[key] = _probe(rows, inner, columns)
    return _choices[key]


def _probe(rows: int, inner: int, columns: int, repetitions: int = 7) -> bool:
    generator = th.Generator().manual_seed(0)  # of its own: the user's stream stays as it is
    a, b = th.randn(rows, inner, generator=generator), th.randn(inner, columns, generator=generator)
    times: dict[bool, list[float]] = {False: [], True: []}
    with th.no_grad():
        with onednn():
            product = a @ b
        exact = a.double() @ b.double()
        if (product - exact).norm() > LARGEST_ERROR * exact.norm():
            return False
        for _ in range(repetitions):
            for through_onednn, measured in times.items():
                start = time.perf_counter()
                if through_onednn:
                    with onednn():
                        a @ b
                else:
                    a @ b
                measured.append(time.perf_counter() - start)
    return min(times[False]) > LEAST_GAIN * min(times[True])


def mm(a: th.Tensor, b: th.Tensor, out: th.Tensor | None = None) -> th.Tensor:
    """``a @ b`` of matrices, see `torch.mm`."""
    if _through_onednn(a, b):
        with onednn():
            return th.mm(a, b, out=out)
    pieces = _pieces(a, b)
    if pieces == 1:
        return th.mm(a, b, out=out)
    (rows, inner), columns = a.shape, b.shape[1]
    out = a.new_empty(rows, columns) if out is None else out
    rows //= pieces
    th.bmm(a.view(pieces, rows, inner), b.expand(pieces, inner, columns), out=out.view(pieces, rows, columns))
    return out


def addmm(bias: th.Tensor, a: th.Tensor, b: th.Tensor, out: th.Tensor | None = None) -> th.Tensor:
    """
    ``a @ b + bias`` of matrices, see `torch.addmm`.

    On a CPU the bias is added to the product: PyTorch would copy it to the result before, for MKL to read.
    """
    if a.device.type == "cpu":
        return mm(a, b, out).add_(bias)
    return th.addmm(bias, a, b, out=out)


def _pieces(a: th.Tensor, b: th.Tensor) -> int:
    """Into how many products of some of the rows ``a @ b`` is divided."""
    threads = th.get_num_threads()
    if threads == 1 or a.device.type != "cpu":
        return 1
    rows, (inner, columns) = a.shape[0], b.shape
    divisible = rows % threads == 0 and min(rows // threads * 2, inner, columns) >= SMALLEST_SIDE
    return threads if divisible and rows * inner * columns >= SMALLEST_DIVIDED else 1
