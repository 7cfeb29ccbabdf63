"""
How matrix products are done: by processor and shape, so that a seed gives one result on one machine, however busy it is.

Measured in fp32 on AMD Zen 5: oneDNN takes half of MKL's time for large products and as much or more for thin ones. MKL,
which takes its slow path on processors that are not Intel's, is the faster on those. Nothing is set for the whole process:
oneDNN is called by its own operation.
"""

from functools import cache
from pathlib import Path

import torch as th

SMALLEST_SIDE = 96
"""Thinner products are not faster through oneDNN."""
SMALLEST_INNER = 8
"""The same for what is summed over, where bias and rectifier are done with the product."""
SMALLEST_DIVIDED = 256**3
"""Multiplications of a product from which on MKL gains from a batch of pieces, one for each thread."""
SMALLEST_PIECE = 128
"""Rows of a piece times two, and sides of the product, below which it does not."""


@cache
def onednn_is_faster() -> bool:
    """Whether this processor is one on which oneDNN is the faster for large fp32 products."""
    information = Path("/proc/cpuinfo")
    amd = information.is_file() and "AuthenticAMD" in information.read_text()
    return amd and th.backends.mkldnn.is_available() and hasattr(th.ops.mkldnn, "_linear_pointwise")


def takes_onednn(a: th.Tensor, b: th.Tensor, rectified: bool = False) -> bool:
    """
    Whether a product goes through oneDNN.

    :param a: ``(M, K)``
    :param b: ``(K, N)``
    :param rectified: whether its bias and a rectifier are done with it, where thinner ones gain too
    """
    (rows, inner), columns = a.shape, b.shape[1]
    large = min(rows, columns) >= SMALLEST_SIDE and inner >= (SMALLEST_INNER if rectified else SMALLEST_SIDE)
    return large and a.dtype is b.dtype is th.float32 and a.device.type == "cpu" and onednn_is_faster()


def by_onednn(out: th.Tensor, a: th.Tensor, b: th.Tensor, bias: th.Tensor | None, then: str = "none") -> None:
    """
    ``a @ b.t() + bias``, and what is done to it.

    :param out: ``(M, N)`` for the result
    :param a: ``(M, K)``
    :param b: ``(N, K)``, the right matrix transposed
    :param bias: ``(N,)`` or None
    :param then: "relu" or "none"
    """
    out.copy_(th.ops.mkldnn._linear_pointwise(a, b, bias, then, [], ""))


def taken_from_onednn(out: th.Tensor, a: th.Tensor, b: th.Tensor, bias: th.Tensor | None, then: str = "none") -> None:
    """`by_onednn` for a tensor without views, which is given the memory of the result instead of a copy."""
    out.set_(th.ops.mkldnn._linear_pointwise(a, b, bias, then, [], ""))


def pieces(a: th.Tensor, b: th.Tensor) -> int:
    """Into how many products of some of the rows ``a @ b`` is divided, of ``(M, K)`` and ``(K, N)``."""
    threads = th.get_num_threads()
    if threads == 1 or a.device.type != "cpu":
        return 1
    (rows, inner), columns = a.shape, b.shape[1]
    divisible = rows % threads == 0 and min(rows // threads * 2, inner, columns) >= SMALLEST_PIECE
    return threads if divisible and rows * inner * columns >= SMALLEST_DIVIDED else 1
