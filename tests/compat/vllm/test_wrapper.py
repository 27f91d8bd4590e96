"""vLLM's wrapper: the metadata of a step, and the products of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import sgmv
from sgmv import errors
from sgmv.compat import vllm
from tests.help.compat_forms import BFLOAT16, DTYPES, check, delta, drawn, indices, product
from tests.help.vllm_calls import LORAS, wrapper_of

pytestmark = pytest.mark.usefixtures("one_blas_thread")


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


def refusals(rng: np.random.Generator) -> Iterator[tuple[str, type, Callable[[np.ndarray], None]]]:
    """A text of the message, its class, and what is called with an output (4, 6)."""
    A, B, x = (drawn(rng, shape, "f") for shape in ((2, 6, 9), (2, 6, 3), (4, 9)))
    wrapper, shape = wrapper_of([0, 1, -1, 1]), errors.ShapeError
    yield "3 slices", shape, lambda y: wrapper.add_shrink((y, y), x, (A, A, A), 1.0)
    yield "one rank", shape, lambda y: wrapper.add_shrink((y, y), x, (A, A[:, 1:]), 1.0)
    yield "rank 6", shape, lambda y: wrapper.add_lora_linear(y, x, (A,), (B,), 1.0, (6,))
    yield "none", shape, lambda y: wrapper.add_shrink((), x, (), 1.0)
    yield "shape", shape, lambda y: wrapper_of([0]).add_shrink((y,), x, (A,), 1.0)
    yield (
        "device",
        errors.ValueRangeError,
        lambda y: vllm.PunicaWrapper(1, 1, device="cuda"),
    )


def test_refused_before_anything_is_written(rng: np.random.Generator) -> None:
    for text, error, call in refusals(rng):
        y = drawn(rng, (4, 6), "f")
        before = y.copy()
        with pytest.raises(error, match=text):
            call(y)
        assert y.tobytes() == before.tobytes(), text


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
