"""vLLM's calls: each against plain loops of its contract, and against gather and einsum.

Kinds of batch that broke real systems are here by name: rows without an adapter, slices of unequal
widths, one input for many outputs, weights edited in place, metadata of another step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import sgmv
from sgmv import errors, layouts
from sgmv.compat import products, vllm
from tests.conftest import JITTED
from tests.help.compat_forms import BFLOAT16, DTYPES, check, delta, drawn, indices, product
from tests.help.planting import Fault, imported, outcome, plant, run_python

pytestmark = pytest.mark.usefixtures("one_blas_thread")
LORAS = 5
# r, h_in, h_out: every rank class, and widths that no tile, panel or vector divides.
SHAPES = [(1, 33, 65), (8, 100, 129), (16, 515, 64), (17, 64, 131), (64, 70, 200), (256, 130, 77)]
MIXES = [  # x, weights, y
    *((dtype, dtype, dtype) for dtype in DTYPES),
    (DTYPES[0], BFLOAT16, BFLOAT16),
    (BFLOAT16, BFLOAT16, DTYPES[0]),
    (DTYPES[1], DTYPES[0], DTYPES[3]),
]
if not JITTED:
    SHAPES = [(1, 9, 17), (5, 12, 9)]


def named(mix: Any) -> str:
    return "-".join(dtype.name for dtype in mix)


def runs(ids: np.ndarray) -> tuple[Any, ...]:
    """What the sgmv calls take for these indices."""
    v0 = layouts.vllm_v0(ids)
    arrays = v0.b_seq_start_loc, v0.seq_len_tensor, v0.lora_indices_tensor
    return (*arrays, v0.batches, v0.max_seq_length, v0.token_nums)


# shrink and expand, by index and by run


def check_shrink(vllm: ModuleType, rng: np.random.Generator, shape: Any, mix: Any) -> None:
    r, h_in, _ = shape
    ids = indices(rng, 40, LORAS)
    x, A = drawn(rng, (40, h_in), mix[0]), drawn(rng, (LORAS, r, h_in), mix[1])
    right = product(np.zeros((40, r), mix[2]), x, A, ids, 0.5)
    for call, metadata in ((vllm.bgmv_shrink, (ids,)), (vllm.sgmv_shrink, runs(ids))):
        for weights in (A, A[:, None]):
            out = np.full((40, r + 3), np.nan, np.float32).astype(mix[2])
            call(x, weights, out, *metadata, 0.5)
            check(out[:, :r], right, call.__name__)
            assert np.isnan(out[:, r:].astype(np.float32)).all()


def check_expand(vllm: ModuleType, rng: np.random.Generator, shape: Any, mix: Any) -> None:
    r, _, h_out = shape
    ids = indices(rng, 40, LORAS)
    v, B = drawn(rng, (40, r), mix[0]), drawn(rng, (LORAS, h_out, r), mix[1])
    y = drawn(rng, (40, h_out + 6), mix[2])
    base = ids == -1
    for add_inputs in (True, False):
        start = y[:, 2:-4] if add_inputs else np.zeros((40, h_out), mix[2])
        right = product(start, v, B, ids)
        for weights in (B, B[:, None]):
            sliced, out = y.copy(), y[:, 2:-4].copy()
            vllm.bgmv_expand_slice(v, weights, sliced, ids, 2, h_out, add_inputs)
            vllm.bgmv_expand(v, weights, out, ids, add_inputs)
            again, repeated = y.copy(), y[:, 2:-4].copy()
            vllm.sgmv_expand_slice(v, weights, again, *runs(ids), 2, h_out, add_inputs)
            vllm.sgmv_expand(v, weights, repeated, *runs(ids), add_inputs)
            check(out, right, "bgmv_expand", ~base)
            for other in (sliced[:, 2:-4], repeated, again[:, 2:-4]):
                assert other.tobytes() == out.tobytes()
            untouched = np.r_[0, 1, h_out + 2 : h_out + 6]
            assert sliced[:, untouched].tobytes() == y[:, untouched].tobytes()
            assert out[base].tobytes() == y[base, 2:-4].tobytes()


@pytest.mark.parametrize("mix", MIXES, ids=named)
def test_shrink_and_expand_of_every_type(rng: np.random.Generator, mix: Any) -> None:
    check_shrink(vllm, rng, SHAPES[1], mix)
    check_expand(vllm, rng, SHAPES[1], mix)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shrink_and_expand_of_every_rank(rng: np.random.Generator, shape: Any) -> None:
    for mix in MIXES[::2]:
        check_shrink(vllm, rng, shape, mix)
        check_expand(vllm, rng, shape, mix)


def test_gather_and_einsum_say_the_same(rng: np.random.Generator) -> None:
    """The form of vLLM's own CPU operations; no index of -1, which numpy takes for the last."""
    ids = rng.integers(0, LORAS, 24)
    x, A = drawn(rng, (24, 40), "f"), drawn(rng, (LORAS, 8, 40), "f")
    B, y = drawn(rng, (LORAS, 70, 8), "f"), drawn(rng, (24, 70), "f")
    v, expected = np.empty((24, 8), "f"), y.copy()
    vllm.bgmv_shrink(x, A, v, ids, 2.0)
    gathered = 2.0 * np.einsum("bi,boi->bo", x, A[ids])
    np.testing.assert_allclose(v, gathered, rtol=1e-5, atol=1e-6)  # two forms in float32
    expected += np.einsum("bi,boi->bo", v, B[ids])
    vllm.bgmv_expand(v, B, y, ids)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_one_input_serves_every_output_and_more_inputs_are_cut(rng: np.random.Generator) -> None:
    B, y = drawn(rng, (LORAS, 9, 4), "f"), drawn(rng, (6, 9), "f")
    v, ids = drawn(rng, (8, 4), "f"), np.array([3, 1, -1, 0, 3, 2, 4, 4])
    out = y.copy()
    vllm.bgmv_expand(v[:1], B, out, ids[:1])
    check(out, product(y, np.repeat(v[:1], 6, axis=0), B, np.full(6, 3)), "one for all")
    out = y.copy()
    vllm.bgmv_expand(v, B, out, ids)
    check(out, product(y, v[:6], B, ids[:6]), "the first six")
    with pytest.raises(errors.ShapeError, match="output_tensor: expected shape"):
        vllm.bgmv_expand(v[:3], B, out, ids[:3])


@pytest.mark.parametrize("width", [5, 13])
def test_the_columns_that_both_have(rng: np.random.Generator, width: int) -> None:
    """An output narrower or wider than the weights, as padding makes them."""
    B, y, v = drawn(rng, (2, 9, 4), "f"), drawn(rng, (3, width), "f"), drawn(rng, (3, 4), "f")
    ids, common, out = np.array([1, 0, 1]), min(width, 9), y.copy()
    vllm.bgmv_expand(v, B, out, ids)
    check(out[:, :common], product(y[:, :common], v, B[:, :common], ids), "common columns")
    assert out[:, common:].tobytes() == y[:, common:].tobytes()


def test_empty_batches_ranks_and_stacks() -> None:
    x, none = np.ones((0, 4), "f"), np.empty(0, np.int64)
    vllm.bgmv_shrink(x, np.ones((2, 3, 4), "f"), np.ones((0, 3), "f"), none)
    vllm.bgmv_expand(x, np.ones((2, 3, 4), "f"), np.ones((0, 3), "f"), none)
    y, base = np.ones((2, 3), "f"), np.array([-1, -1])
    vllm.bgmv_expand(np.ones((2, 0), "f"), np.ones((2, 3, 0), "f"), y, np.array([0, 1]))
    vllm.bgmv_expand(np.ones((2, 4), "f"), np.ones((0, 3, 4), "f"), y, base, add_inputs=False)
    assert (y == 1).all()
    vllm.bgmv_shrink(np.ones((2, 4), "f"), np.ones((0, 3, 4), "f"), y, base)
    assert not y.any()


def test_nan_stays_in_its_row_and_base_only_rows_keep_their_bits() -> None:
    A, B = np.ones((2, 2, 3), "f"), np.ones((2, 4, 2), "f")
    A[1], B[1] = np.nan, np.inf
    v, y = np.empty((3, 2), "f"), np.full((3, 4), -0.0, "f")
    vllm.bgmv_shrink(np.ones((3, 3), "f"), A, v, np.array([0, 1, -1]))
    np.testing.assert_array_equal(v, [[3, 3], [np.nan, np.nan], [0, 0]])
    vllm.bgmv_expand(v, B, y, np.array([0, 1, -1]))
    np.testing.assert_array_equal(y, np.repeat([[6], [np.nan], [0]], 4, axis=1))
    assert np.signbit(y[2]).all()


# the wrapper


def wrapper_of(ids: list[int], sampled: list[int] | None = None) -> vllm.PunicaWrapper:
    """The wrapper of a step whose rows have these indices; the ids in the slots are others."""
    slots = [40 + index for index in range(LORAS)]
    tokens, samples = ([0 if i < 0 else slots[i] for i in each] for each in (ids, sampled or ids))
    wrapper = vllm.PunicaWrapper(max_num_batched_tokens=256, max_batches=64, device="cpu")
    wrapper.update_metadata(vllm.LoRAMapping(tokens, samples, True), slots, LORAS, 32000, 256)
    return wrapper


SLICES = {"qkv": (128, 33, 33), "gate, up": (70, 70), "one": (65,)}


@pytest.mark.parametrize("widths", SLICES.values(), ids=SLICES)
@pytest.mark.parametrize("mix", [MIXES[0], MIXES[2], MIXES[3]], ids=named)
def test_linear_layers_of_slices(rng: np.random.Generator, widths: Any, mix: Any) -> None:
    ids, r = indices(rng, 37, LORAS), 16
    wrapper, x = wrapper_of(ids.tolist()), drawn(rng, (37, 90), mix[0])
    A = tuple(drawn(rng, (LORAS, 1, r, 90), mix[1]) for _ in widths)
    B = tuple(drawn(rng, (LORAS, 1, width, r), mix[1]) for width in widths)
    y = drawn(rng, (37, sum(widths) + 1), mix[2])
    out, offset = y.copy(), 0
    buffer = np.full((len(widths), 37, r), np.nan, np.float32)
    wrapper.add_lora_linear(out, x, A, B, 0.25, widths, buffer=buffer)
    for i, width in enumerate(widths):
        columns = slice(offset, offset + width)
        right = delta(y[:, columns], x, A[i][:, 0], B[i][:, 0], ids, 0.25)
        check(out[:, columns], right, f"slice {i}")
        zeros = np.zeros((37, r), np.float32)
        check(buffer[i], product(zeros, x, A[i][:, 0], ids, 0.25), f"buffer {i}")
        offset += width
    assert out[:, offset:].tobytes() == y[:, offset:].tobytes()
    without = y.copy()
    wrapper.add_lora_linear(without, x, A, B, 0.25, widths)
    assert without.tobytes() == out.tobytes()


def test_shrink_and_expand_of_slices_are_those_of_each(rng: np.random.Generator) -> None:
    ids, widths = indices(rng, 30, LORAS), (33, 64, 1)
    wrapper, x = wrapper_of(ids.tolist()), drawn(rng, (2, 15, 70), "f")
    A = [drawn(rng, (LORAS, 1, 8, 70), "f") for _ in widths]
    B = [drawn(rng, (LORAS, 1, width, 8), "f") for width in widths]
    together, apart = np.empty((3, 30, 8), "f"), np.empty((3, 30, 8), "f")
    wrapper.add_shrink(together, x, A, 0.5)
    for i in range(3):
        vllm.bgmv_shrink(x.reshape(30, 70), A[i], apart[i], ids, 0.5)
    assert together.tobytes() == apart.tobytes()
    for add_inputs in (True, False):
        y = drawn(rng, (2, 15, 100), "f")
        expected = y.copy().reshape(30, 100)
        wrapper.add_expand(y, together, B, widths, 2, add_inputs)
        for i, offset in enumerate((2, 35, 99)):
            slices = offset, widths[i], add_inputs
            vllm.bgmv_expand_slice(apart[i], B[i], expected, ids, *slices)
        assert y.tobytes() == expected.tobytes()


def test_several_slices_are_one_shrink(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that x is read once."""
    launches: list[Any] = []
    launch = products.launch

    def counted(kernels: Any, *operands: Any) -> None:
        launches.append((kernels.shrink != 0, kernels.expand != 0))
        launch(kernels, *operands)

    monkeypatch.setattr(products, "launch", counted)
    A, x = drawn(rng, (LORAS, 1, 4, 9), "f"), drawn(rng, (3, 9), "f")
    B, y = drawn(rng, (LORAS, 1, 7, 4), "f"), np.zeros((3, 21), "f")
    wrapper_of([0, 1, 2]).add_lora_linear(y, x, (A, A, A), (B, B, B), 1.0, (7, 7, 7))
    assert launches == [(True, False)] + [(False, True)] * 3


def test_embedding_and_logits(rng: np.random.Generator) -> None:
    ids, sampled = indices(rng, 20, LORAS), [1, -1, 3]
    wrapper = wrapper_of(ids.tolist(), sampled)
    B, v = drawn(rng, (LORAS, 1, 90, 8), "f"), drawn(rng, (20, 8), "f")
    y = drawn(rng, (20, 90), "f")
    out = y.copy()
    wrapper.add_lora_embedding(out, v, B)
    check(out, product(y, v, B[:, 0], ids), "embedding")
    A, x = drawn(rng, (LORAS, 1, 8, 50), "f"), drawn(rng, (3, 50), "f")
    logits, buffer = drawn(rng, (3, 88), "f"), np.empty((3, 8), "f")  # narrower than B
    out = logits.copy()
    wrapper.add_lora_logits(out, x, A, B, 0.5, buffer=buffer)
    at = np.array(sampled)
    check(out, delta(logits, x, A[:, 0], B[:, 0, :88], at, 0.5), "logits")
    check(buffer, product(np.zeros((3, 8), "f"), x, A[:, 0], at, 0.5), "their buffer")


def test_the_same_bits_as_add_lora_and_as_each_row_alone(rng: np.random.Generator) -> None:
    """One kernel and one order of sums, whoever calls: what docs promise of add_lora holds here."""
    ids = indices(rng, 50, LORAS)
    for dtype in DTYPES:
        x, A = drawn(rng, (50, 130), dtype), drawn(rng, (LORAS, 1, 17, 130), dtype)
        B, y = drawn(rng, (LORAS, 1, 200, 17), dtype), drawn(rng, (50, 200), dtype)
        stack = sgmv.AdapterStack.from_adapters([(A[i, 0], B[i, 0]) for i in range(LORAS)])
        expected = sgmv.add_lora(y.copy(), x, stack, ids)
        out, alone = y.copy(), y.copy()
        wrapper_of(ids.tolist()).add_lora_linear(out, x, A, B, 1.0, (200,))
        assert out.tobytes() == expected.tobytes(), dtype
        for i in range(0, 50, 7):
            row = slice(i, i + 1)
            wrapper_of([int(ids[i])]).add_lora_linear(alone[row], x[row], A, B, 1.0, (200,))
            assert alone[row].tobytes() == expected[row].tobytes(), (dtype, i)


def test_metadata_of_a_step() -> None:
    wrapper = vllm.PunicaWrapper(8, 8)
    mapping = vllm.LoRAMapping((9, 9, 0, 4), (9, 0), is_prefill=True)
    wrapper.update_metadata(mapping, [4, None, 9], max_loras=3, vocab_size=32000)
    assert wrapper.token_lora_indices.tolist() == [2, 2, -1, 0]
    assert wrapper.sampler_indices.tolist() == [2, -1]
    assert (wrapper.is_prefill, wrapper.no_lora) == (True, False)
    assert [np.ravel(part).tolist() for part in wrapper.prefill_metadata] == [
        [0, 2, 3], [2, 1, 1], [2, -1, 0], [3], [2], [4],
    ]  # fmt: skip
    before = wrapper.prefill_metadata
    for bad, error in (
        (((5,), (0,), [4, 9], 3), errors.UnknownAdapterError),
        (((4,), (4,), [4, 9], 1), errors.StackError),
        (((4,) * 9, (4,), [4, 9], 3), errors.ValueRangeError),
    ):
        with pytest.raises(error):
            wrapper.update_metadata(vllm.LoRAMapping(*bad[:2]), *bad[2:])
    assert all(a is b for a, b in zip(wrapper.prefill_metadata[:3], before[:3], strict=True))
    wrapper.update_metadata(vllm.LoRAMapping((0, 0), (0,)), [4, 9], 3)
    assert (wrapper.is_prefill, wrapper.no_lora) == (False, True)


# weights where they stand


def test_edits_and_other_arrays_at_one_address_are_seen(rng: np.random.Generator) -> None:
    memory, ids = np.zeros(600, "f"), np.array([1, 0, 1])
    for r, h_in in ((4, 9), (9, 4), (4, 9), (2, 30)):
        A = memory[: 2 * r * h_in].reshape(2, r, h_in)
        x, v = drawn(rng, (3, h_in), "f"), np.empty((3, r), "f")
        for _ in range(2):
            A[:] = drawn(rng, A.shape, "f")
            vllm.bgmv_shrink(x, A, v, ids)
            check(v, product(np.zeros_like(v), x, A, ids), f"{r} x {h_in}")


def test_weights_of_any_strides(rng: np.random.Generator) -> None:
    """Slots that stand apart or backwards are read there; strided rows are copied for the call."""
    ids, x, v = np.array([1, 0, -1]), drawn(rng, (3, 9), "f"), np.empty((3, 4), "f")
    wide = drawn(rng, (4, 8, 18), "f")
    for A in (wide[::2, :4, :9], wide[::-2, :4, 9:], wide.transpose(0, 2, 1)[:2, :4, :8][..., :8]):
        part = np.ascontiguousarray(x[:, : A.shape[2]])
        vllm.bgmv_shrink(part, A, v, ids)
        check(v, product(np.zeros_like(v), part, A, ids), str(A.strides))


def test_inputs_and_outputs_of_any_strides(rng: np.random.Generator) -> None:
    ids, B = np.array([1, 0, -1, 1]), drawn(rng, (2, 33, 6), "f")
    v, y = drawn(rng, (6, 8), "f").T[::2, :], drawn(rng, (66, 8), "f").T[::-2, ::2]
    expected, out = product(y.copy(), v, B, ids), y
    vllm.bgmv_expand(v, B, out, ids)
    check(out, expected, "strided")


# refusals: y is then as it was


def refusals(rng: np.random.Generator) -> Iterator[tuple[str, type, Callable[[np.ndarray], None]]]:
    """A text of the message, its class, and what is called with an output (4, 6)."""
    ids, x = np.array([0, 1, -1, 1]), drawn(rng, (4, 9), "f")
    A, B = drawn(rng, (2, 6, 9), "f"), drawn(rng, (2, 6, 3), "f")
    v, wrapper = drawn(rng, (4, 3), "f"), wrapper_of([0, 1, -1, 1])
    start, length, index = runs(ids)[:3]
    unknown, shape = errors.UnknownAdapterError, errors.ShapeError
    memory, types, number = errors.MemoryLayoutError, errors.DtypeError, errors.ValueRangeError
    yield "lora_b_weights: .*got 2", unknown, lambda y: vllm.bgmv_shrink(x, A, y, ids % 3)
    yield "from -1", number, lambda y: vllm.bgmv_shrink(x, A, y, ids - 1)
    yield "indices_tensor: .*float", types, lambda y: vllm.bgmv_shrink(x, A, y, ids.astype("f"))
    yield "one dimension", shape, lambda y: vllm.bgmv_shrink(x, A, y, ids[:, None])
    yield "inputs: .*n, h_in", shape, lambda y: vllm.bgmv_shrink(x[:, 1:], A, y, ids)
    yield "inputs: .*n, h_in", shape, lambda y: vllm.bgmv_shrink(x, A, y, ids[1:])
    yield "output_tensor", shape, lambda y: vllm.bgmv_shrink(x, A, y[:, 1:], ids)
    yield "four axes", shape, lambda y: vllm.bgmv_shrink(x, A[0], y, ids)
    yield "scaling: .*finite", number, lambda y: vllm.bgmv_shrink(x, A, y, ids, np.nan)
    yield "inputs: .*numpy array", types, lambda y: vllm.bgmv_shrink(x.tolist(), A, y, ids)
    yield "native", types, lambda y: vllm.bgmv_shrink(x, A.astype(">f4"), y, ids)
    yield "apart from", memory, lambda y: vllm.bgmv_expand(y[:, :3], B, y, ids)
    yield "apart from", memory, lambda y: vllm.bgmv_expand(v, y.reshape(2, 4, 3)[:, :, :], y, ids)
    yield "where the last", shape, lambda y: vllm.bgmv_expand_slice(v, B, y, ids, 1, 6)
    yield "as the slices", shape, lambda y: vllm.bgmv_expand_slice(v, B, y, ids, 0, 5)
    yield "slice_offset", number, lambda y: vllm.bgmv_expand_slice(v, B, y, ids, -1, 6)
    sgmv_expand = vllm.sgmv_expand
    yield "one after the", number, lambda y: sgmv_expand(v, B, y, start + 1, length, index, 4, 1, 4)
    yield "one after the", number, lambda y: sgmv_expand(v, B, y, start, length, index, 4, 1, 5)
    yield (
        "expected 3 entries",
        shape,
        lambda y: sgmv_expand(v, B, y, start, length, index, 3, 2, 4),
    )
    yield "3 slices", shape, lambda y: wrapper.add_shrink((y, y), x, (A, A, A), 1.0)
    yield "one rank", shape, lambda y: wrapper.add_shrink((y, y), x, (A, A[:, 1:]), 1.0)
    yield "rank 6", shape, lambda y: wrapper.add_lora_linear(y, x, (A,), (B,), 1.0, (6,))
    yield "none", shape, lambda y: wrapper.add_shrink((), x, (), 1.0)
    yield "shape", shape, lambda y: wrapper_of([0]).add_shrink((y,), x, (A,), 1.0)
    yield "read-only", memory, lambda y: vllm.bgmv_expand(v, B, np.broadcast_to(y, y.shape), ids)
    yield "device", number, lambda y: vllm.PunicaWrapper(1, 1, device="cuda")


def test_refused_before_anything_is_written(rng: np.random.Generator) -> None:
    for text, error, call in refusals(rng):
        y = drawn(rng, (4, 6), "f")
        before = y.copy()
        with pytest.raises(error, match=text):
            call(y)
        assert y.tobytes() == before.tobytes(), text


def test_a_slice_that_does_not_fit_is_refused_before_the_others(rng: np.random.Generator) -> None:
    A, B = drawn(rng, (LORAS, 1, 4, 9), "f"), drawn(rng, (LORAS, 1, 6, 4), "f")
    y, x = drawn(rng, (2, 12), "f"), drawn(rng, (2, 9), "f")
    before, wrapper = y.copy(), wrapper_of([0, 4])
    for slices in ((B, B[:, :, 1:]), (B, B[:4]), (B, B[..., 1:])):
        for act in (
            lambda: wrapper.add_lora_linear(y, x, (A, A), slices, 1.0, (6, 6)),  # noqa: B023
            lambda: wrapper.add_expand(y, (x[:, :4],) * 2, slices, (6, 6), add_inputs=False),  # noqa: B023
        ):
            with pytest.raises(errors.SgmvError):
                act()
            assert y.tobytes() == before.tobytes()


# torch


def test_torch_tensors_are_used_where_they_are(rng: np.random.Generator) -> None:
    torch = pytest.importorskip("torch")
    ids = indices(rng, 20, LORAS)
    for name in ("float32", "bfloat16", "float16"):
        kind = getattr(torch, name)
        x, A, B, y = (
            torch.randn(shape).to(kind)
            for shape in ((20, 90), (LORAS, 1, 8, 90), (LORAS, 1, 70, 8), (20, 70))
        )
        arrays = [_numpy(torch, tensor) for tensor in (x, A, B, y)]
        expected, start = arrays[3].copy(), y.clone()
        wrapper = wrapper_of(ids.tolist())
        wrapper.add_lora_linear(expected, *arrays[:3], 0.5, (70,))
        wrapper.add_lora_linear(y.requires_grad_() if name == "float32" else y, x, A, B, 0.5, (70,))
        assert _numpy(torch, y.detach()).tobytes() == expected.tobytes()
        buffer, indices_tensor = torch.empty(20, 8), torch.from_numpy(ids)
        vllm.bgmv_shrink(x, A, buffer, indices_tensor, 0.5)
        vllm.bgmv_expand(buffer, B, start, indices_tensor)
        base = torch.from_numpy(ids == -1)
        assert torch.equal(start[base], y.detach()[base])


def _numpy(torch: Any, tensor: Any) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    return tensor.numpy()


@pytest.mark.once
def test_torch_is_not_imported() -> None:
    program = (
        "import sys, numpy as np\n"
        "from sgmv.compat import punica, vllm\n"
        "one = np.ones((1, 1, 1), 'f')\n"
        "vllm.bgmv_shrink(one[0], one, one[0].copy(), np.array([0]))\n"
        "punica.BatchedLoraWeight([punica.LoraWeight(1, 1, 1, 1, 'float32')])\n"
        "print('torch' in sys.modules)"
    )
    assert run_python(program, NUMBA_DISABLE_JIT="1").stdout.strip() == "False"


# faults

FAULTS = {
    "base-only rows are written": Fault(
        "compat.products", "return int(segments.seq_start[1]) if base else 0", "return 0"
    ),
    "v stays in sorted order": Fault(
        "compat.vllm.slices", "array[segments.rows] = v", "array[:] = v"
    ),
    "inputs are taken as they stand": Fault(
        "compat.products", "rows[segments.rows].astype", "rows[:].astype"
    ),
    "the scaling is dropped": Fault("compat.products", "v *= scaling", "pass"),
    "the slots are told apart by the wrong pitch": Fault(
        "compat.products", "address + np.arange(count) * pitch", "address + 0 * np.arange(count)"
    ),
    "B is read as its transpose": Fault(
        "compat.products",
        "strides = size, weights.inputs * size",
        "strides = weights.outputs * size, size",
    ),
    "panels are gathered from column 0": Fault(
        "kernels.panels", "gather(panel, wb + c * call[WB_COLUMN],", "gather(panel, wb,"
    ),
    "what stood there is added, too": Fault(
        "compat.vllm.slices", "if not add_inputs:", "if add_inputs is None:"
    ),
    "the slice begins at column 0": Fault(
        "compat.vllm.slices", "[y[:, offset : offset + width]", "[y[:, : width]"
    ),
}
SMALL = (
    Fault("kernels.call", "PANEL, WIDE_PANEL = 64, 1024", "PANEL, WIDE_PANEL = 8, 8"),
    Fault("kernels.loops", "K_BLOCK = 1024", "K_BLOCK = 16"),
)


def accept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above on the package of this folder, as plain Python."""
    module = imported(folder, monkeypatch, "sgmv.compat.vllm")["sgmv.compat.vllm"]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        check_shrink(module, rng, (5, 33, 20), MIXES[0])
        check_expand(module, rng, (5, 33, 20), MIXES[0])


@pytest.mark.once
def test_accepted_without_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accept(plant(tmp_path, *SMALL), monkeypatch)


@pytest.mark.once
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_rejected(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, *SMALL, FAULTS[fault])
    assert "AssertionError" in outcome(lambda: accept(tmp_path, monkeypatch))
