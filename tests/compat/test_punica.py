"""Punica's calls: each against plain loops of its contract; and pointers of every wrong kind.

A pointer that cannot be read must be refused: whoever gets one wrong in Punica loses the process.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sgmv import errors
from sgmv.compat import punica
from sgmv.compat.punica import pointers
from sgmv.tensors import as_array
from tests.conftest import JITTED
from tests.help.compat_forms import BFLOAT16, DTYPES, check, delta, drawn, indices, product
from tests.help.planting import Fault, imported, outcome, plant

pytestmark = pytest.mark.usefixtures("one_blas_thread")
posix = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "writev"), reason="no writev")
LAYERS, COUNT = 2, 5
# inputs, outputs: shrink, expand, square; what no tile divides; ranks that Punica has no kernel for
SHAPES = [(100, 1), (515, 17), (1, 129), (64, 200), (70, 256), (256, 33), (16, 16)]
LENGTHS = [3, 0, 1, 17, 0, 9]  # of the segments
S = np.cumsum([0, *LENGTHS]).astype(np.int32)
N = int(S[-1])
SEGMENT_OF_ROW = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
if not JITTED:
    SHAPES = [(20, 3), (3, 20)]


def addresses(weights: Any) -> np.ndarray:
    """Pointers to weights, null for the empty segments: nobody may look at those."""
    found = np.array([each.ctypes.data for each in weights])
    return np.where(np.array(LENGTHS) > 0, found, 0)


# by index


def check_bgmv(punica: ModuleType, rng: np.random.Generator, shape: Any, dtype: Any) -> None:
    inputs, outputs = shape
    ids = indices(rng, 40, COUNT)
    x, y = drawn(rng, (40, inputs), dtype), drawn(rng, (40, outputs), dtype)
    W, out = drawn(rng, (COUNT, LAYERS, outputs, inputs), dtype), y.copy()
    punica.bgmv(out, x, W, ids, 1, 0.5)
    check(out, product(y, x, W[:, 1], ids, 0.5), "bgmv")
    assert out[ids == -1].tobytes() == y[ids == -1].tobytes()


def check_add_lora_bgmv(
    punica: ModuleType, rng: np.random.Generator, r: int, dtype: Any, widths: Any = (90, 70)
) -> None:
    h_in, h_out = widths
    ids = indices(rng, 40, COUNT)
    x, y = drawn(rng, (40, h_in), dtype), drawn(rng, (40, h_out), dtype)
    A, B = drawn(rng, (COUNT, LAYERS, r, h_in), dtype), drawn(rng, (COUNT, LAYERS, h_out, r), dtype)
    out = y.copy()
    punica.add_lora_bgmv(out, x, A, B, ids, 1, 2.0)
    check(out, delta(y, x, A[:, 1], B[:, 1], ids, 2.0), "add_lora_bgmv")


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


# by segment


def check_sgmv(punica: ModuleType, rng: np.random.Generator, shape: Any, dtype: Any) -> None:
    inputs, outputs = shape
    x, y = drawn(rng, (N, inputs), dtype), drawn(rng, (N, outputs), dtype)
    W = [drawn(rng, (LAYERS, outputs, inputs), dtype) for _ in LENGTHS]
    W_T = [np.ascontiguousarray(each.transpose(0, 2, 1)) for each in W]
    right = product(y, x, [each[1] for each in W], SEGMENT_OF_ROW)
    for call, weights in ((punica.sgmv, W), (punica.sgmv_cutlass, W_T)):
        out = y.copy()
        call(out, x, addresses(weights), S, 1)
        check(out, right, call.__name__)


LORA_CALLS = {  # and whether wa and wb stand as (inputs, outputs)
    "add_lora_sgmv": (False, False),
    "add_lora_sgmv_cutlass": (True, True),
    "add_lora_sgmv_custom_cutlass": (False, True),
}


def check_add_lora_sgmv(
    punica: ModuleType, rng: np.random.Generator, r: int, dtype: Any, widths: Any = (90, 70)
) -> None:
    h_in, h_out = widths
    x, y = drawn(rng, (N, h_in), dtype), drawn(rng, (N, h_out), dtype)
    A = [drawn(rng, (LAYERS, r, h_in), dtype) for _ in LENGTHS]
    B = [drawn(rng, (LAYERS, h_out, r), dtype) for _ in LENGTHS]
    pairs = [each[1] for each in A], [each[1] for each in B]
    right = delta(y, x, *pairs, SEGMENT_OF_ROW)
    for name, turned in LORA_CALLS.items():
        wa, wb = (
            [np.ascontiguousarray(w.transpose(0, 2, 1)) for w in weights] if turn else weights
            for weights, turn in zip((A, B), turned, strict=True)
        )
        out = y.copy()
        getattr(punica, name)(out, x, addresses(wa), addresses(wb), S, 1, r)
        check(out, right, name)


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


# LoraWeight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_lora_weight(rng: np.random.Generator, dtype: Any) -> None:
    a, b = drawn(rng, (COUNT, LAYERS, 8, 90), "f"), drawn(rng, (COUNT, LAYERS, 70, 8), "f")
    weights = [punica.LoraWeight(LAYERS, 90, 70, 8, dtype, "cpu") for _ in range(COUNT)]
    for i, weight in enumerate(weights):
        weight.copy_from_tensor(a[i], b[i])
        sizes = weight.num_layers, weight.in_features, weight.out_features, weight.lora_rank
        assert sizes == (LAYERS, 90, 70, 8)
        assert (weight.dtype, weight.device) == (dtype, "cpu")
    chosen = [3, 0, 3, 1, 2, 2]  # one of each segment
    batched = punica.BatchedLoraWeight([weights[i] for i in chosen])
    A, B = ([each[i, 1].astype(dtype) for i in chosen] for each in (a, b))
    x, y = drawn(rng, (N, 90), dtype), drawn(rng, (N, 70), dtype)
    del weights, weight
    gc.collect()  # the batch holds them
    out = y.copy()
    punica.add_lora_sgmv_custom_cutlass(out, x, batched.wa_ptr, batched.wb_ptr, S, 1, 8)
    check(out, delta(y, x, A, B, SEGMENT_OF_ROW), "LoraWeight")


def test_an_address_is_known_as_long_as_its_array_lives() -> None:
    array = np.zeros((1, 2, 3), "f")
    address = pointers.own(array)
    assert address in pointers._owned
    del array
    gc.collect()
    assert address not in pointers._owned


def test_sizes_and_types_of_lora_weight_are_checked() -> None:
    for arguments, error in (
        ((1, 2, 3, -1, "float32"), errors.ValueRangeError),
        ((1, 2, 3, 4, "int32"), errors.DtypeError),
        ((1, 2, 3, 4, "float32", "cuda:0"), errors.ValueRangeError),
    ):
        with pytest.raises(error):
            punica.LoraWeight(*arguments)
    weight = punica.LoraWeight(1, 2, 3, 4, "float32")
    with pytest.raises(errors.ShapeError, match="b: expected"):
        weight.copy_from_tensor(np.zeros((1, 4, 2)), np.zeros((1, 4, 3)))
    with pytest.raises(errors.ValueRangeError, match="at least one"):
        punica.BatchedLoraWeight([])


# pointers that cannot be right


@pytest.fixture
def fenced() -> Iterator[tuple[int, int]]:
    """The first address of three pages of which the middle one may not be read; and their size."""
    memory = mmap.mmap(-1, 3 * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    middle, size = ctypes.c_void_p(start + mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE)
    assert libc.mprotect(middle, size, 0) == 0
    yield start, mmap.PAGESIZE
    assert libc.mprotect(middle, size, 3) == 0


def sgmv_with(pointer: int, layer_idx: int = 0, width: int = 16) -> np.ndarray:
    """y (2, 1) of ones and weights (layers, 1, width) at this address."""
    y = np.ones((2, 1), "f")
    punica.sgmv(y, np.ones((2, width), "f"), np.array([pointer]), np.array([0, 2]), layer_idx)
    return y


@posix
def test_only_what_can_be_read_is_read(fenced: tuple[int, int]) -> None:
    start, page = fenced
    assert (sgmv_with(start + page - 64) == 1).all()  # to the last byte
    assert (sgmv_with(start + 2 * page) == 1).all()
    refused: dict[int, type] = {
        0: errors.ValueRangeError,
        -64: errors.ValueRangeError,
        2**63 - 8: errors.MemoryLayoutError,  # wraps
        64: errors.MemoryLayoutError,  # nothing is there
        start + 2: errors.MemoryLayoutError,  # not aligned
        start + page - 60: errors.MemoryLayoutError,  # the last four bytes are not
        start + page: errors.MemoryLayoutError,
        start + 2 * page - 4: errors.MemoryLayoutError,
    }
    for pointer, error in refused.items():
        with pytest.raises((error, errors.ValueRangeError), match="w_ptr"):
            sgmv_with(pointer)
    with pytest.raises(errors.MemoryLayoutError):  # both ends can be read, the middle cannot
        sgmv_with(start, width=3 * page // 4)
    with pytest.raises(errors.MemoryLayoutError):
        sgmv_with(start, layer_idx=page // 64)
    with pytest.raises(errors.ValueRangeError):
        sgmv_with(start, layer_idx=2**62)


@posix
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_nothing_past_a_weight_is_read(
    rng: np.random.Generator, fenced: tuple[int, int], dtype: Any
) -> None:
    """Weights that end where memory does, of widths that no vector divides."""
    start, page = fenced
    for inputs, outputs in ((5, 200), (17, 60), (1, 129), (33, 7), (16, 64)):
        x, y = drawn(rng, (3, inputs), dtype), drawn(rng, (3, outputs), dtype)
        W = drawn(rng, (outputs, inputs), dtype)
        address = start + page - W.nbytes
        for call, stands in ((punica.sgmv, W), (punica.sgmv_cutlass, np.ascontiguousarray(W.T))):
            ctypes.memmove(address, stands.ctypes.data, W.nbytes)
            out = y.copy()
            call(out, x, np.array([address]), np.array([0, 3]), 0)
            check(out, product(y, x, [W], np.zeros(3, int)), f"{call.__name__} {W.shape}")


@posix
def test_freed_memory_is_refused() -> None:
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    gc.collect()
    memory.close()
    with pytest.raises(errors.MemoryLayoutError, match="keep the weights alive"):
        sgmv_with(start)


@posix
def test_every_page_of_many_weights_is_probed(fenced: tuple[int, int]) -> None:
    """More probes than one system call takes, and the bad pointer among good ones is named."""
    start, page = fenced
    good = np.zeros((300, 5 * page), np.uint8)
    where = [int(row.ctypes.data) for row in good]
    assert pointers.readable(where, 5 * page)
    assert not pointers.readable([*where, start + page - 5 * page + 1], 5 * page)
    bad, x, y = start + page, np.ones((3, 16), "f"), np.ones((3, 1), "f")
    with pytest.raises(errors.MemoryLayoutError, match=hex(bad)):
        punica.sgmv(y, x, np.array([where[0], bad, where[1]]), np.array([0, 1, 2, 3]), 0)


@posix
def test_probing_leaves_no_files_open() -> None:
    array = np.zeros(9)
    pointers.readable([array.ctypes.data], 72)
    before = os.dup(0)
    for _ in range(5):
        pointers.readable([array.ctypes.data], 72)
        pointers.readable([8], 72)
    after = os.dup(0)
    assert after == before + 1
    os.close(before)
    os.close(after)


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


# torch


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


# faults

FAULTS = {
    "the first layer for all": Fault("compat.punica.ops", "array[:, layer_idx]", "array[:, 0]"),
    "the first layer behind a pointer": Fault(
        "compat.punica.pointers", "+= layer_idx * nbytes", "+= 0"
    ),
    "weights are read in the other order": Fault(
        "compat.products", "if weights.by_input:\n", "if False:\n"
    ),
    "the scale is dropped": Fault("compat.products", "v *= scaling", "pass"),
    "y is overwritten by shrink": Fault(
        "compat.products", "y[segments.rows[start:]] += v", "y[segments.rows[start:]] = v"
    ),
    "rows are taken backwards": Fault(
        "compat.punica.ops", "Segments(np.arange(n),", "Segments(np.arange(n)[::-1],"
    ),
}


def accept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above on the package of this folder, as plain Python."""
    module = imported(folder, monkeypatch, "sgmv.compat.punica")["sgmv.compat.punica"]
    for seed in range(2):
        rng = np.random.default_rng(seed)
        for shape in ((20, 3), (3, 20)):
            check_bgmv(module, rng, shape, np.dtype("f"))
            check_sgmv(module, rng, shape, np.dtype("f"))
        check_add_lora_bgmv(module, rng, 5, np.dtype("f"), (20, 11))
        check_add_lora_sgmv(module, rng, 5, np.dtype("f"), (20, 11))


@posix
@pytest.mark.once
def test_accepted_without_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accept(plant(tmp_path), monkeypatch)


@posix
@pytest.mark.once
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_rejected(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, FAULTS[fault])
    assert "AssertionError" in outcome(lambda: accept(tmp_path, monkeypatch))
