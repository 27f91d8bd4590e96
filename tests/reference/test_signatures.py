"""Kernels of each engine's signature: a right one passes, and a wrong one is named."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reference
from reference.signatures import SIGNATURES
from tests.help.my_kernel import run

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("one_blas_thread")]


def at_address(address: int, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    return np.array((ctypes.c_float * count).from_address(int(address)), "f").reshape(shape)


def punica(y: Any, x: Any, wa_ptr: Any, wb_ptr: Any, s: Any, layer_idx: int, r: int) -> None:
    for i in range(len(s) - 1):
        A = at_address(wa_ptr[i], (1, r, x.shape[1]))[layer_idx]
        B = at_address(wb_ptr[i], (1, y.shape[1], r))[layer_idx]
        y[s[i] : s[i + 1]] += (x[s[i] : s[i + 1]] @ A.T) @ B.T


def punica_sgmv(y: Any, x: Any, w_ptr: Any, s: Any, layer_idx: int) -> None:
    for i in range(len(s) - 1):
        W = at_address(w_ptr[i], (1, y.shape[1], x.shape[1]))[layer_idx]
        y[s[i] : s[i + 1]] += x[s[i] : s[i + 1]] @ W.T


def bgmv_shrink(x: Any, weights: Any, out: Any, indices: Any, scaling: float) -> None:
    for row, i in enumerate(indices):
        out[row] = 0 if i < 0 else scaling * (x[row] @ weights[i].T)


def bgmv_expand(v: Any, weights: Any, out: Any, indices: Any, add_inputs: bool) -> None:
    for row, i in enumerate(indices):
        if i >= 0:
            out[row] += v[row] @ weights[i].T


def exploded(start: Any, length: Any, indices: Any, batches: int, longest: int, n: int) -> Any:
    assert (len(start), int(length.max(initial=0)), int(length.sum())) == (batches, longest, n)
    return np.repeat(indices, length)


def sgmv_shrink(x: Any, weights: Any, out: Any, *rest: Any) -> None:
    bgmv_shrink(x, weights, out, exploded(*rest[:-1]), rest[-1])


def sgmv_expand(v: Any, weights: Any, out: Any, *rest: Any) -> None:
    bgmv_expand(v, weights, out, exploded(*rest[:-1]), rest[-1])


def segments_of(info: Any) -> Any:
    for i in range(info.num_segments):
        w, start = int(info.weight_indices[i]), int(info.seg_indptr[i])
        assert info.seg_lens[i] <= info.max_len
        yield w, int(info.lora_ranks[w]), slice(start, start + int(info.seg_lens[i]))


def sgemm_lora_a_fwd(x: Any, weights: Any, info: Any) -> Any:
    v = np.zeros((len(x), weights.shape[1]), x.dtype)
    for w, r, rows in segments_of(info):
        v[rows, :r] = x[rows] @ weights[w, :r].T
    return v


def sgemm_lora_b_fwd(v: Any, weights: Any, info: Any, base_output: Any) -> Any:
    for w, r, rows in segments_of(info):
        if r:
            base_output[rows] += info.scalings[w] * (v[rows, :r] @ weights[w, :, :r].T)
    return base_output


LIKE: dict[str, tuple[Any, ...]] = {
    "punica": (punica,),
    "punica-sgmv": (punica_sgmv,),
    "vllm-bgmv": (bgmv_shrink, bgmv_expand),
    "vllm-sgmv": (sgmv_shrink, sgmv_expand),
    "sglang": (sgemm_lora_a_fwd, sgemm_lora_b_fwd),
}


def test_each_signature_is_tried() -> None:
    assert {"reference", *LIKE} == set(SIGNATURES)


@pytest.mark.parametrize("like", LIKE)
def test_a_right_kernel_of_each_signature_passes(like: str) -> None:
    report = reference.check(LIKE[like], like=like, random=100)
    assert report.ok, str(report)


def unscaled_expand(v: Any, weights: Any, info: Any, base_output: Any) -> Any:
    info.scalings = np.ones_like(info.scalings)
    return sgemm_lora_b_fwd(v, weights, info, base_output)


def overwriting(y: Any, *others: Any) -> None:
    y[...] = 0
    punica(y, *others)


WRONG: dict[str, tuple[tuple[Any, ...], str]] = {
    "punica": ((overwriting,), "y is overwritten"),
    "punica-sgmv": ((lambda *operands: None,), "y is left as it was"),
    "vllm-bgmv": (
        (lambda x, w, out, i, s: bgmv_shrink(x, w, out, i, 1.0), bgmv_expand),
        "the scaling is dropped",
    ),
    "vllm-sgmv": (
        (sgmv_shrink, lambda v, w, out, *rest: sgmv_expand(2 * v, w, out, *rest)),
        "the delta is added twice",
    ),
    "sglang": ((sgemm_lora_a_fwd, unscaled_expand), "the scaling is dropped"),
}


@pytest.mark.parametrize("like", LIKE)
def test_a_wrong_kernel_of_each_signature_is_named(like: str) -> None:
    kernels, said = WRONG[like]
    report = reference.check(kernels, like=like)
    assert said in report.diagnosis


def test_the_package_that_this_repository_makes_passes() -> None:
    from sgmv.compat import punica, vllm

    for like, kernels in {
        "punica": (punica.add_lora_sgmv,),
        "punica-sgmv": (punica.sgmv,),
        "vllm-bgmv": (vllm.bgmv_shrink, vllm.bgmv_expand),
        "vllm-sgmv": (vllm.sgmv_shrink, vllm.sgmv_expand),
    }.items():
        report = reference.check(kernels, like=like, random=20)
        assert report.ok, str(report)


@pytest.mark.parametrize(
    ("kernels", "like", "said"),
    [
        ((bgmv_shrink,), "vllm-bgmv", "expected 2 for vllm-bgmv .* got 1; name both halves"),
        ((punica, punica), "punica", "expected 1 for punica .* got 2; name one function"),
        ((punica,), "cuda", "like: expected one of reference, punica"),
    ],
)
def test_another_number_of_functions_is_refused(kernels: Any, like: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        reference.check(kernels, like=like)


TORCH_KERNEL = """
import torch


def my_kernel(y, x, rows, seq_start, segment_ids, adapters, scalings):
    assert isinstance(y, torch.Tensor) and isinstance(rows, torch.Tensor)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for s, adapter_id in enumerate(segment_ids):
        if adapters.get(adapter_id) is not None:
            A, B = (weight.to(wide) for weight in adapters[adapter_id])
            p = rows[seq_start[s] : seq_start[s + 1]]
            delta = scalings[adapter_id] * ((x[p].to(wide) @ A.T) @ B.T)
            y[p] = (y[p].to(wide) + delta).to(y.dtype)


def spoils(y, x, *others):
    my_kernel(y, x, *others)
    x.zero_()


def bgmv_shrink(x, weights, out, indices, scaling):
    kept = indices >= 0
    w = weights[indices[kept]].to(out.dtype)
    out[kept] = scaling * torch.einsum("nk,nrk->nr", x[kept].to(out.dtype), w)


def bgmv_expand(v, weights, out, indices, add_inputs):
    kept = indices >= 0
    w = weights[indices[kept]].to(v.dtype)
    out[kept] = (out[kept].to(v.dtype) + torch.einsum("nr,nkr->nk", v[kept], w)).to(out.dtype)


def returned(y, *others):
    out = y.clone()
    my_kernel(out, *others)
    return out
"""


def test_torchs_tensors_share_the_memory(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "torched.py").write_text(TORCH_KERNEL)
    dtypes = "float16,bfloat16,float32,float64"
    for name in ("my_kernel", "returned"):
        done = run("check", f"torched.py:{name}", "--torch", "--dtypes", dtypes, folder=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    done = run("check", "torched.py:spoils", "--torch", folder=tmp_path)
    assert done.stdout.startswith("likeliest: the kernel changed x;")
    halves = "torched.py:bgmv_shrink,bgmv_expand"
    done = run("check", halves, "--like", "vllm-bgmv", "--torch", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
