"""DoRA: outputs scaled, column by column, so that rows of the weight have the lengths it learned.

    W + scaling * B @ A              (h_out, h_in); row c of it is norm[c] long
    gain[c] = magnitude[c] / norm[c]
    y[i, c] = gain[c] * (y[i, c] + delta[i, c]) + (1 - gain[c]) * bias[c]

Norms depend on weights alone, so they are taken once, when an adapter is loaded. What is left of
DoRA in a call is one multiplication and addition more where expand stores y. y is the layer's
output with its bias, which is no part of W x and is not scaled: `offset` puts back what the gain
took of it.

Source: DoRA (arXiv 2402.09353), equation 5; peft 0.21, lora/dora.py, `DoraLinearLayer.forward`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sgmv.checks import check_columns, check_matrix
from sgmv.dtypes import Array, sum_dtype
from sgmv.errors import ShapeError, StackError, ValueRangeError, some
from sgmv.segment import Segments
from sgmv.table import SlotTable
from sgmv.tensors import as_array

if TYPE_CHECKING:
    from sgmv.adapter import Adapter

BLOCK = 1 << 18  # elements of W at a time: 2 MiB in float64


def gains_of(adapter: Adapter, W: Any, bias: Any) -> Array:
    """Gains (1, h_out), or gains and offsets (2, h_out), in the type that the adapter sums in.

    Norms are summed in float64, which no square of a 16-bit or 32-bit weight overflows.
    """
    h_out, h_in = adapter.h_out, adapter.h_in
    if W is None:
        raise StackError(
            "W",
            f"the layer's weight ({h_out}, {h_in}), as the adapter has magnitudes (DoRA)",
            "none",
            "pass it when the adapter is loaded, as in load(adapter_id, adapter, W=W)",
        )
    if tuple(getattr(W, "shape", ())) != (h_out, h_in):
        received = str(getattr(W, "shape", type(W).__name__))
        raise ShapeError("W", f"(h_out, h_in) = ({h_out}, {h_in})", received, "pass the layer's W")
    if bias is not None:
        bias = check_columns("bias", bias, h_out)
    norm = np.empty(h_out)
    A, step = adapter.A.astype(np.float64), max(1, BLOCK // h_in)
    with np.errstate(all="ignore"):  # inf and NaN go where they belong: to this adapter's rows
        for low in range(0, h_out, step):
            rows = slice(low, min(low + step, h_out))
            block = check_matrix("W", as_array("W", W[rows]))
            if block.shape != (rows.stop - low, h_in):
                expected = f"{rows.stop - low} rows of {h_in} from W[{low}:{rows.stop}]"
                raise ShapeError("W", expected, str(block.shape), "return these rows")
            summed = adapter.scaling * (adapter.B[rows].astype(np.float64) @ A)
            summed += block.astype(np.float64)
            norm[rows] = np.sqrt(np.einsum("ij,ij->i", summed, summed))
        gains = np.empty((1 if bias is None else 2, h_out), sum_dtype(adapter.dtype))
        gains[0] = np.asarray(adapter.magnitude, np.float64) / norm
        if bias is not None:
            gains[1] = (1 - gains[0].astype(np.float64)) * bias.astype(np.float64)
    return gains


def check_alone(table: SlotTable, segments: Segments) -> None:
    """Refuse rows that name another adapter beside one with gains, or give it a weight.

    A gain multiplies all of y: what others add there would be scaled, or not, by their order.
    """
    if table.gains is None or (segments.k == 1 and segments._weights is None):
        return
    slot, rank = table.find(segments.adapter_ids)
    lengths, rows = segments.lengths, segments.rows
    gained = np.repeat(table.is_gained(slot), lengths)
    adds = np.repeat(table.changes(slot, rank), lengths)
    members = np.bincount(rows[adds], minlength=segments.n)
    wrong = gained & (members[rows] > 1)
    if segments._weights is not None:
        wrong |= gained & (segments._weights != 1)
    if wrong.any():
        raise ValueRangeError(
            "adapter_ids",
            "an adapter with magnitudes (DoRA) alone in its rows, with a weight of 1",
            f"others beside it, or weights, in rows {some(np.unique(rows[wrong]))}",
            "name it once in such a row, and -1 in the other places",
        )
