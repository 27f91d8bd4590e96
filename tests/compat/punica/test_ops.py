"""Punica's calls: each against plain loops of its contract; refusals; planted faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sgmv import errors
from sgmv.compat import punica
from sgmv.compat.punica import pointers
from sgmv.tensors import as_array
from tests.conftest import JITTED
from tests.help.compat_forms import BFLOAT16, DTYPES, check, delta, drawn, product
from tests.help.planting import Fault, verdict
from tests.help.punica_calls import (
    LAYERS,
    LENGTHS,
    SEGMENT_OF_ROW,
    SHAPES,
    N,
    S,
    check_add_lora_bgmv,
    check_add_lora_sgmv,
    check_bgmv,
    check_sgmv,
    posix,
)

pytestmark = pytest.mark.usefixtures("one_blas_thread")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bgmv(rng: np.random.Generator, dtype: Any) -> None:
    for shape in SHAPES:
        check_bgmv(punica, rng, shape, dtype)


@pytest.mark.parametrize("r", [1, 8, 17, 64, 256] if JITTED else [5])
def test_add_lora_bgmv(rng: np.random.Generator, r: int) -> None:
    for dtype in DTYPES:
        check_add_lora_bgmv(punica, rng, r, dtype)


def test_the_smallest_negative_zero_keeps_its_bits() -> None:
    """A base-only row is not written, by shrink either: -0.0 + 0.0 would be 0.0."""
    y, W = np.full((2, 1), -0.0, "f"), np.zeros((1, 1, 1, 4), "f")
    punica.bgmv(y, np.ones((2, 4), "f"), W, np.array([-1, 0]), 0, 1.0)
    assert np.signbit(y).tolist() == [[True], [False]]


@posix
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sgmv_in_both_directions_and_orders(rng: np.random.Generator, dtype: Any) -> None:
    for shape in SHAPES:
        check_sgmv(punica, rng, shape, dtype)


@posix
@pytest.mark.parametrize("r", [1, 8, 17, 64, 256] if JITTED else [5])
def test_add_lora_sgmv(rng: np.random.Generator, r: int) -> None:
    for dtype in DTYPES:
        check_add_lora_sgmv(punica, rng, r, dtype)


def test_one_weight_of_many_segments_and_no_rows_at_all(rng: np.random.Generator) -> None:
    x, W = drawn(rng, (4, 9), "f"), drawn(rng, (1, 3, 9), "f")
    y, where = drawn(rng, (4, 3), "f"), pointers.own(W)
    out = y.copy()
    punica.sgmv(out, x, [where, where], [0, 1, 4], 0)
    check(out, product(y, x, [W[0], W[0]], np.array([0, 1, 1, 1])), "twice")
    punica.sgmv(out[:0], x[:0], [0], [0, 0], 0)
    punica.sgmv(out[:0], x[:0], np.empty(0, np.int64), [0], 0)


def refusals(rng: np.random.Generator) -> Iterator[tuple[str, type, Callable[[np.ndarray], None]]]:
    """A text of the message, its class, and what is called with an output (4, 6)."""
    x, W = drawn(rng, (4, 9), "f"), drawn(rng, (2, 3, 6, 9), "f")
    B, ids = drawn(rng, (2, 3, 6, 2), "f"), np.array([0, 1, -1, 1])
    weight = punica.LoraWeight(3, 9, 6, 2, "float32")
    half = punica.LoraWeight(3, 9, 6, 2, "float16")
    batched, halves = punica.BatchedLoraWeight([weight]), punica.BatchedLoraWeight([half])
    one, s = (batched.wa_ptr, batched.wb_ptr), np.array([0, 4])
    lora = punica.add_lora_sgmv_custom_cutlass
    shape, number, memory = errors.ShapeError, errors.ValueRangeError, errors.MemoryLayoutError
    types = errors.DtypeError
    yield "layer_idx", number, lambda y: punica.bgmv(y, x, W, ids, 3, 1.0)
    yield "layer_idx", number, lambda y: punica.bgmv(y, x, W, ids, -1, 1.0)
    yield (
        "w_T_all: .*index",
        errors.UnknownAdapterError,
        lambda y: punica.bgmv(y, x, W, ids % 3, 0, 1.0),
    )
    yield "all four", shape, lambda y: punica.bgmv(y, x, W[0], ids, 0, 1.0)
    yield "y: ", shape, lambda y: punica.bgmv(y[:, 1:], x, W, ids, 0, 1.0)
    yield "x: ", shape, lambda y: punica.bgmv(y, x[:, 1:], W, ids, 0, 1.0)
    yield "scale", number, lambda y: punica.bgmv(y, x, W, ids, 0, np.inf)
    yield "wb_T_all", shape, lambda y: punica.add_lora_bgmv(y, x, W, B, ids, 0, 1.0)
    yield "apart", memory, lambda y: lora(y, y, *one, s, 0, 2)
    yield "s: .*0 to 4", number, lambda y: lora(y, x, *one, np.array([0, 3]), 0, 2)
    yield "s: .*0 to 4", number, lambda y: lora(y, x, *one, np.array([1, 4]), 0, 2)
    yield "s: .*ascend", number, lambda y: lora(y, x, *one * 1, np.array([0, 5, 4]), 0, 2)
    yield "s: .*integers", types, lambda y: lora(y, x, *one, np.array([0.0, 4.0]), 0, 2)
    yield "s: .*offsets", shape, lambda y: lora(y, x, *one, np.array([], int), 0, 2)
    yield "wa_ptr: .*addresses", shape, lambda y: lora(y, x, *one, np.array([0, 2, 4]), 0, 2)
    yield "wa_ptr: .*int64", shape, lambda y: lora(y, x, one[0].astype("f"), one[1], s, 0, 2)
    yield "wa_ptr: .*layers", shape, lambda y: lora(y, x, *one, s, 3, 2)
    yield "wa_ptr: .*layers", shape, lambda y: lora(y, x, *one, s, 0, 1)
    yield "wb_ptr: .*layers", shape, lambda y: punica.add_lora_sgmv(y, x, *one, s, 0, 2)
    yield "wa_ptr: .*type", types, lambda y: lora(y, x, halves.wa_ptr, halves.wb_ptr, s, 0, 2)
    yield (
        "w_ptr: .*apart",
        memory,
        lambda y: punica.sgmv(y[:1], x[:1], np.array([y.ctypes.data]), np.array([0, 1]), 0),
    )
    yield "lora_rank", types, lambda y: lora(y, x, *one, s, 0, 2.0)


def test_refused_before_anything_is_written(rng: np.random.Generator) -> None:
    for text, error, call in refusals(rng):
        y = drawn(rng, (4, 6), "f")
        before = y.copy()
        with pytest.raises(error, match=text):
            call(y)
        assert y.tobytes() == before.tobytes(), text


def test_torch_tensors_and_their_data_pointers(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    for kind, dtype in ((torch.float32, np.dtype("f")), (torch.bfloat16, BFLOAT16)):
        x, y = torch.randn(N, 90).to(kind), torch.randn(N, 70).to(kind)
        weights = [punica.LoraWeight(LAYERS, 90, 70, 8, kind, torch.device("cpu")) for _ in LENGTHS]
        A, B = drawn(rng, (6, LAYERS, 8, 90), dtype), drawn(rng, (6, LAYERS, 70, 8), dtype)
        for i, weight in enumerate(weights):
            weight.copy_from_tensor(torch.from_numpy(A[i].astype("f")), B[i])
        batched, raw = punica.BatchedLoraWeight(weights), y.clone()
        assert (weights[0].dtype, batched.wa_ptr.dtype) == (kind, torch.int64)
        operands = as_array("y", y).copy(), as_array("x", x)
        right = delta(*operands, A[:, 1], B[:, 1], SEGMENT_OF_ROW)
        s, lora = torch.from_numpy(S), punica.add_lora_sgmv_custom_cutlass
        lora(y, x, batched.wa_ptr, batched.wb_ptr, s, 1, 8)
        check(as_array("y", y), right, "tensors")
        copies = [(weight.wa.clone(), weight.wb.clone()) for weight in weights]
        wa, wb = (torch.tensor([pair[i].data_ptr() for pair in copies]) for i in (0, 1))
        lora(raw, x, wa, wb, s, 1, 8)
        assert torch.equal(raw, y)


FAULTS = {
    "the first layer for all": Fault("compat.punica.ops", "array[:, layer_idx]", "array[:, 0]"),
    "the first layer behind a pointer": Fault(
        "compat.punica.pointers", "+= layer_idx * nbytes", "+= 0"
    ),
    "weights are read in the other order": Fault(
        "products", "if weights.by_input:\n", "if False:\n"
    ),
    "the scale is dropped": Fault("products", "v *= scaling", "pass"),
    "y is overwritten by shrink": Fault(
        "products", "y[segments.rows[start:]] += v", "y[segments.rows[start:]] = v"
    ),
    "rows are taken backwards": Fault(
        "compat.punica.ops", "Segments(np.arange(n),", "Segments(np.arange(n)[::-1],"
    ),
}


def accept(modules: dict[str, ModuleType]) -> None:
    """The checks above on a copy of the package."""
    module = modules["sgmv.compat.punica"]
    for seed in range(2):
        rng = np.random.default_rng(seed)
        for shape in ((20, 3), (3, 20)):
            check_bgmv(module, rng, shape, np.dtype("f"))
            check_sgmv(module, rng, shape, np.dtype("f"))
        check_add_lora_bgmv(module, rng, 5, np.dtype("f"), (20, 11))
        check_add_lora_sgmv(module, rng, 5, np.dtype("f"), (20, 11))


@posix
@pytest.mark.once
def test_accepted_without_a_fault() -> None:
    assert verdict(accept, name="sgmv.compat.punica") == "nothing"


@posix
@pytest.mark.once
@pytest.mark.parametrize("fault", FAULTS)
def test_rejected(fault: str) -> None:
    assert "AssertionError" in verdict(accept, FAULTS[fault], name="sgmv.compat.punica")
