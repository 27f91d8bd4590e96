"""Stacked weights packed: the right ones at every step, whoever has written them and how."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest

from sgmv.compat.vllm.packed import Batch, Packed, can_add, can_pack, identity
from sgmv.errors import ShapeError
from tests.help.compat_forms import check, delta, indices

torch = pytest.importorskip("torch")

SLOTS, RANK, H_IN, WIDTHS = 4, 12, 70, (100, 33)


def stacks(seed: int = 0, kind: str = "float32") -> tuple[list[Any], list[Any]]:
    """A and B of two slices, every slot of another rank, the last of none."""
    generator = torch.Generator().manual_seed(seed)
    A = [torch.randn(SLOTS, 1, RANK, H_IN, generator=generator) for _ in WIDTHS]
    B = [torch.randn(SLOTS, 1, width, RANK, generator=generator) for width in WIDTHS]
    for slot, rank in enumerate((RANK, 5, 1, 0)):
        for a, b in zip(A, B, strict=True):
            a[slot, :, rank:], b[slot, :, :, rank:] = 0, 0
    return [a.to(getattr(torch, kind)) for a in A], [b.to(getattr(torch, kind)) for b in B]


def drawn(rows: int, columns: int, kind: str = "float32") -> Any:
    return torch.randn(rows, columns).to(getattr(torch, kind))


def array(tensor: Any) -> np.ndarray:
    return tensor.float().numpy()


def check_layer(packed: Packed, A: list[Any], B: list[Any], ids: np.ndarray) -> None:
    """Every slice's columns hold what the tensors as they are now give; others are untouched."""
    kind = str(A[0].dtype).removeprefix("torch.")
    x, y = drawn(len(ids), H_IN, kind), drawn(len(ids), sum(WIDTHS) + 3, kind)
    out, start = y.clone(), 0
    packed.add(out, x, Batch.of(ids), WIDTHS)
    for a, b, width in zip(A, B, WIDTHS, strict=True):
        columns = slice(start, start + width)
        right = delta(array(y[:, columns]), array(x), array(a[:, 0]), array(b[:, 0]), ids, 1.0)
        if kind == "float32":
            check(array(out[:, columns]), right, "slice")
        start += width
    assert torch.equal(out[:, start:], y[:, start:])
    assert torch.equal(out[ids == -1], y[ids == -1])


def test_an_embeddings_first_product_is_what_was_looked_up(rng: np.random.Generator) -> None:
    _, (B, _) = stacks()
    with torch.inference_mode():  # as in a step
        A = identity(B)
    assert can_pack(A, B)
    ids = indices(rng, 30, SLOTS)
    x, y = drawn(len(ids), RANK), drawn(len(ids), WIDTHS[0])
    out = y.clone()
    Packed([A], [B]).add(out, x, Batch.of(ids), WIDTHS[:1])
    eye = np.broadcast_to(np.eye(RANK, dtype=np.float32), (SLOTS, RANK, RANK))
    check(array(out), delta(array(y), array(x), eye, array(B[:, 0]), ids, 1.0), "embedding")
    assert torch.equal(out[ids == -1], y[ids == -1])


def test_slices_of_every_rank(rng: np.random.Generator) -> None:
    for kind in ("float32", "bfloat16"):
        A, B = stacks(kind=kind)
        check_layer(Packed(A, B), A, B, indices(rng, 30, SLOTS))


def test_an_adapter_that_leaves_a_layer_alone_takes_no_time(rng: np.random.Generator) -> None:
    A, B = stacks()
    packed = Packed(A, B)
    check_layer(packed, A, B, np.array([3, -1, 3]))
    assert all(stack[3] is None and stack.table.width == 0 for _, _, stack in packed._slices)


def test_only_the_slot_that_a_layer_names_is_packed_again(rng: np.random.Generator) -> None:
    A, B = stacks()
    packed, ids = Packed(A, B), np.array([0, 1, 2, 0])
    check_layer(packed, A, B, ids)
    before = [stack.table.wa_address.copy() for _, _, stack in packed._slices]
    with packed.writing(1):
        A[0][1, 0, :7] += 1.0
        B[1][1, 0, :, :7] = 2.0
    assert packed._stale & {0, 1, 2} == {1}
    check_layer(packed, A, B, ids)
    for (_, _, stack), addresses in zip(packed._slices, before, strict=True):
        assert (stack.table.wa_address == addresses).tolist() == [True, False, True, True]


def test_a_write_that_nobody_told_of_is_noticed(rng: np.random.Generator) -> None:
    """Before, between and after those that are told of."""
    A, B = stacks()
    packed, ids = Packed(A, B), np.array([0, 1, 2, 3])
    check_layer(packed, A, B, ids)
    B[0][2, 0, 4] = 3.0
    check_layer(packed, A, B, ids)
    A[1][0] *= 2
    with packed.writing(3):
        A[0][3, 0, 0], B[0][3, 0, :, 0] = 1.0, 1.0
    check_layer(packed, A, B, ids)
    with contextlib.suppress(KeyError), packed.writing(1):
        A[0][1] = 0
        raise KeyError
    check_layer(packed, A, B, ids)


def test_nan_is_a_weight_like_others(rng: np.random.Generator) -> None:
    """It reaches the rows of its own slot, and no other's."""
    A, B = stacks()
    A[0][1, 0, 2, 3] = float("nan")
    packed, ids = Packed(A, B), np.array([0, 1, 2, -1])
    y = torch.zeros(4, sum(WIDTHS))
    packed.add(y, torch.ones(4, H_IN), Batch.of(ids), WIDTHS)
    assert torch.isnan(y).any(1).tolist() == [False, True, False, False]


def test_what_is_packed_and_added() -> None:
    A, B = stacks()
    assert can_pack(*A, *B)
    with torch.inference_mode():
        assert not can_pack(torch.zeros(2, 2))  # torch counts no writes to it
    assert not can_pack(torch.zeros(2, 2, dtype=torch.float8_e4m3fn))
    x, y = torch.zeros(2, 3), torch.zeros(2, 4)
    assert can_add(y, x)
    assert not can_add(torch.zeros(4, 2).T, x)
    assert not can_add(y, x[0])
    assert not can_add(y, x.to(torch.int32))


def test_rows_that_are_not_the_steps_are_refused() -> None:
    A, B = stacks()
    for rows, columns in ((3, sum(WIDTHS)), (2, sum(WIDTHS) - 1)):
        y = torch.zeros(rows, columns)
        with pytest.raises(ShapeError, match="2 rows"):
            Packed(A, B).add(y, torch.ones(rows, H_IN), Batch.of(np.array([0, 1])), WIDTHS)
        assert not y.any()
