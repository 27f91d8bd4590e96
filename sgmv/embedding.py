"""tokens -> y: an embedding's delta, of which the first product is a look-up."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sgmv.backend import kernels
from sgmv.checks import check_y
from sgmv.dora import check_alone
from sgmv.dtypes import Array, sum_dtype
from sgmv.errors import ShapeError, ValueRangeError, some
from sgmv.ids import as_integers
from sgmv.launch import run_expand
from sgmv.segment import Segments, segment, times_weights, weighted
from sgmv.stack import AdapterStack, check_stack


def add_lora_embedding(
    y: Array,
    tokens: npt.ArrayLike,
    stack: AdapterStack,
    adapter_ids: Segments | npt.ArrayLike,
    *,
    weights: npt.ArrayLike | None = None,
    backend: str | None = None,
) -> Array:
    """Add every row's own delta of an embedding to y, in place: look up, then expand.

    Semantics: `y[i] += scaling * A[:, tokens[i]] @ B.T` with the adapter of `adapter_ids[i]`, which
    is `add_lora` of x where row i is 1 at tokens[i] and else 0. Rows of id -1 or of a None entry
    keep their bits, and their tokens are not looked at.

    y            (n, h_out)  float32, float16, bfloat16 or float64; writable; any strides
    tokens       (n,) integers, from 0 to h_in - 1; not changed
    stack        the embedding's adapters: h_in is the vocabulary
    adapter_ids  (n,) or (n, k) integers, or Segments, as in `add_lora`
    weights      (n, k) finite numbers, as in `add_lora`
    backend      as in `expand`
    returns      y

    Raises as `expand` does, and ValueRangeError for tokens outside the vocabulary; y is then as it
    was. Source: peft 0.21, lora.Embedding; vLLM, lora/layers/vocal_parallel_embedding.py.

    >>> import sgmv
    >>> A, B = np.array([[1, 2, 3]], "float32"), np.array([[1], [10]], "float32")
    >>> stack = sgmv.AdapterStack.from_adapters({4: sgmv.Adapter(A, B, scaling=0.5)})
    >>> add_lora_embedding(np.zeros((2, 2), "float32"), [2, 0], stack, [4, -1])
    array([[ 1.5, 15. ],
           [ 0. ,  0. ]], dtype=float32)
    """
    check_stack(stack)
    segments = adapter_ids if isinstance(adapter_ids, Segments) else segment(adapter_ids)
    looked_up = as_integers("tokens", tokens)
    if len(looked_up) != segments.n:
        expected = f"shape (n,) = ({segments.n},)"
        raise ShapeError("tokens", expected, str(looked_up.shape), "give one per adapter id")
    check_y(y, segments.n, stack.h_out, "tokens", tokens if isinstance(tokens, np.ndarray) else ())
    table = stack.table
    slot, rank = table.find(segments.adapter_ids)
    has_adapter = np.repeat(rank > 0, segments.lengths)
    used = looked_up[segments.rows[has_adapter]]
    outside = used[(used < 0) | (used >= stack.h_in)]
    if len(outside):
        expected = f"tokens from 0 to {stack.h_in - 1}, the vocabulary of the adapters"
        remedy = "pass ids of tokens, and adapters of this embedding"
        raise ValueRangeError("tokens", expected, some(outside), remedy)
    v = np.zeros((len(segments.rows), int(rank.max(initial=0))), sum_dtype(stack.dtype, y.dtype))
    for s in np.flatnonzero(rank).tolist():
        stored, span = table.weights[slot[s]], slice(*segments.seq_start[s : s + 2].tolist())
        if stored is not None:
            v[span, : rank[s]] = stored.wa[:, looked_up[segments.rows[span]]].T
    check_alone(table, weighted(segments, weights))
    if weights is not None:
        v = times_weights(v, segments, weights)
    run_expand(kernels(backend, None, stack.dtype, y.dtype, v.dtype), table, segments, v, y)
    return y
