"""vLLM's operations: each against plain loops of its contract, and against gather and einsum.

Kinds of batch that broke real systems are here by name: rows without an adapter, one input for many
outputs, weights edited in place, metadata of another step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from sgmv import errors
from sgmv.compat import vllm
from tests.help.compat_forms import check, drawn, product
from tests.help.planting import run_python
from tests.help.vllm_calls import LORAS, MIXES, SHAPES, check_expand, check_shrink, named, runs

pytestmark = pytest.mark.usefixtures("one_blas_thread")


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


def refusals(rng: np.random.Generator) -> Iterator[tuple[str, type, Callable[[np.ndarray], None]]]:
    """A text of the message, its class, and what is called with an output (4, 6)."""
    ids, x = np.array([0, 1, -1, 1]), drawn(rng, (4, 9), "f")
    A, B = drawn(rng, (2, 6, 9), "f"), drawn(rng, (2, 6, 3), "f")
    v = drawn(rng, (4, 3), "f")
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
    yield "read-only", memory, lambda y: vllm.bgmv_expand(v, B, np.broadcast_to(y, y.shape), ids)


def test_refused_before_anything_is_written(rng: np.random.Generator) -> None:
    for text, error, call in refusals(rng):
        y = drawn(rng, (4, 6), "f")
        before = y.copy()
        with pytest.raises(error, match=text):
            call(y)
        assert y.tobytes() == before.tobytes(), text


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
