"""Operands of engines: numpy's as they are, torch's over the same memory, all else refused."""

from __future__ import annotations

import sys

import ml_dtypes
import numpy as np
import pytest

import sgmv
from sgmv.compat import vllm
from sgmv.errors import DtypeError, MemoryLayoutError
from sgmv.tensors import as_array, float_dtype, to_float32

pytestmark = pytest.mark.once


def test_numpy_arrays_are_themselves() -> None:
    array = np.ones((2, 3))[:, ::2]
    assert as_array("x", array) is array


def test_others_are_refused_by_name() -> None:
    with pytest.raises(DtypeError, match=r"^x: expected a numpy array or a torch tensor.*got list"):
        as_array("x", [1.0])


@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16", "int64"])
def test_tensors_share_their_memory(name: str) -> None:
    torch = pytest.importorskip("torch")
    tensor = (
        torch.arange(12, dtype=getattr(torch, name)).reshape(3, 4).requires_grad_(name[0] != "i")
    )
    array = as_array("x", tensor[:, 1::2])
    assert array.dtype == (ml_dtypes.bfloat16 if name == "bfloat16" else name)
    assert array.ctypes.data == tensor.data_ptr() + tensor.element_size()
    array[0, 0] = 7
    assert tensor[0, 1] == 7


def test_what_to_do_is_said_in_the_owners_words() -> None:
    """A tensor has no .astype, an array no .float()."""
    assert to_float32(np.ones(1)) == "convert it first, for example with .astype(np.float32)"
    assert to_float32(object()) == "convert it first, for example with .float()"


def test_a_tensor_is_not_told_astype() -> None:
    torch = pytest.importorskip("torch")
    x, A, y = torch.ones(2, 4), torch.ones(1, 1, 3, 4), torch.zeros(2, 3)
    ids = torch.zeros(2, dtype=torch.int64)
    for operands in ((x.int(), A, y), (x, A.int(), y), (x, A, y.int())):
        with pytest.raises(DtypeError, match=r"got int32; .*\.float\(\)"):
            vllm.bgmv_shrink(*operands, ids, 1.0)
    for values in ([0.5, 1.0], [True, False]):
        with pytest.raises(DtypeError, match=r"adapter_ids: .*\.long\(\)"):
            sgmv.segment(torch.tensor(values))


def test_a_tensor_elsewhere_is_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(
        MemoryLayoutError, match=r"^x: expected a tensor on the CPU, got one on meta"
    ):
        as_array("x", torch.ones(3, device="meta"))


def test_a_tensor_that_numpy_cannot_show_is_refused() -> None:
    """Sparse, or conjugated on paper: there is no memory with these numbers in it."""
    torch = pytest.importorskip("torch")
    half = torch.ones(2, 2, dtype=torch.bfloat16)
    for tensor in (half.to_sparse(), half.float().to_sparse(), half.to(torch.complex64).conj()):
        with pytest.raises(DtypeError, match=r"^x: expected a dense .*; .*\.to_dense\(\)"):
            as_array("x", tensor)


def test_bfloat16_of_torch_needs_ml_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)  # type: ignore[arg-type]  # not installed
    with pytest.raises(DtypeError, match=r"^missing: .*got torch\.bfloat16; pip install ml_dtypes"):
        float_dtype("missing", "torch.bfloat16")
