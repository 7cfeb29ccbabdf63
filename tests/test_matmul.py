"""Matrix products that are done by whatever is faster here, with the setting of the process left as it was."""

import threading
from collections.abc import Iterator

import pytest
import torch as th

from sb3_ac_ext.legacy import matmul


@pytest.fixture
def always_onednn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(matmul, "faster_through_onednn", lambda *size: True)
    yield
    assert setting() == "none"


def setting() -> str:
    return str(th.backends.mkldnn.matmul.fp32_precision)


@pytest.mark.usefixtures("always_onednn")
def test_setting_holds_within_the_context_only() -> None:
    assert setting() == "none"
    with matmul.onednn():
        assert setting() == "bf16"
        with matmul.onednn():
            pass
        assert setting() == "bf16"
    assert setting() == "none"


@pytest.mark.usefixtures("always_onednn")
def test_setting_is_restored_after_an_exception() -> None:
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        matmul.addmm(th.zeros(200), th.zeros(300, 200), th.zeros(201, 200))
    with pytest.raises(KeyboardInterrupt), matmul.onednn():
        raise KeyboardInterrupt
    assert setting() == "none"


@pytest.mark.usefixtures("always_onednn")
def test_setting_survives_overlapping_threads() -> None:
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with matmul.onednn():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(10)
    with matmul.onednn():
        leave.set()
        thread.join(10)
        assert setting() == "bf16"
    assert setting() == "none"


@pytest.mark.parametrize(
    ("shape", "candidate"),
    [((256, 400, 300), True), ((256, 18, 400), False), ((256, 400, 1), False), ((64, 400, 300), False)],
)
def test_only_large_products_are_tried(shape: tuple[int, int, int], candidate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(matmul, "faster_through_onednn", lambda *size: tried.append(size) or False)
    rows, inner, columns = shape
    matmul.mm(th.zeros(rows, inner), th.zeros(inner, columns))
    matmul.addmm(th.zeros(columns), th.zeros(rows, inner), th.zeros(inner, columns))
    assert tried == (2 * [shape] if candidate else [])
    matmul.mm(th.zeros(rows, inner).double(), th.zeros(inner, columns).double())
    assert len(tried) == (2 if candidate else 0)


def test_probe_refuses_a_path_that_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on processors with bf16 matrix units; whatever this machine chooses is as exact as fp32."""
    monkeypatch.setattr(matmul, "LARGEST_ERROR", 0.0)
    assert matmul._probe(256, 256, 256) is False


def test_products_are_as_exact_as_fp32_whatever_was_chosen() -> None:
    a, b = th.randn(256, 400), th.randn(400, 300)
    exact = a.double() @ b.double()
    for product in (matmul.mm(a, b), matmul.addmm(th.zeros(300), a, b)):
        assert (product - exact).norm() < 1e-6 * exact.norm()
    assert setting() == "none"


@pytest.mark.parametrize("rows", [512, 300, 255], ids=["divisible", "divisible too", "not divisible"])
@pytest.mark.parametrize("given", [False, True], ids=["new memory", "given memory"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_a_piece_for_each_thread(rows: int, given: bool, transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "faster_through_onednn", lambda *size: False)
    monkeypatch.setattr(th, "get_num_threads", lambda: 2)
    batched = []
    original = th.bmm
    monkeypatch.setattr(th, "bmm", lambda *args, **kwargs: batched.append(args[-1].shape) or original(*args, **kwargs))
    a = th.randn(400, rows).t() if transposed else th.randn(rows, 400)
    b, bias = th.randn(300, 400).t(), th.randn(300)
    exact = a.double() @ b.double()
    for product, expected in (
        (matmul.mm(a, b, th.empty(rows, 300) if given else None), exact),
        (matmul.addmm(bias, a, b, th.empty(rows, 300) if given else None), exact + bias),
    ):
        assert product.shape == (rows, 300)
        assert (product - expected).norm() < 1e-6 * expected.norm()
    assert batched == ([] if rows % 2 else 2 * [(2, 400, 300)])
    matmul.mm(a[:128], b)  # too small to be worth it
    assert len(batched) == (0 if rows % 2 else 2)


def test_probe_leaves_the_random_stream_alone() -> None:
    th.manual_seed(0)
    expected = th.rand(1)
    th.manual_seed(0)
    matmul._probe(128, 128, 128, repetitions=1)
    assert th.equal(th.rand(1), expected)
