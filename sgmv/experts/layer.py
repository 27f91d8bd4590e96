"""A whole layer of experts: route, gate and up, SwiGLU, down, combine; with mixed adapters."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sgmv.checks import check_count, check_matrix
from sgmv.dtypes import Array
from sgmv.errors import DtypeError, ShapeError, ValueRangeError
from sgmv.experts.adapters import ExpertStack, add_lora
from sgmv.experts.grouped import combined, products_of
from sgmv.ids import Integers
from sgmv.segment import segment


def top_k(router_logits: Array, k: int) -> tuple[Integers, npt.NDArray[np.float32]]:
    """The k experts of each row, and their weights.

    Semantics: softmax over the k largest logits, which is softmax over all, then renormalised over
    these, as Mixtral and Qwen3-MoE do. Of equal logits the expert of the lower number comes first.

    router_logits  (n, E)
    returns        expert_ids (n, k) int64, weights (n, k) float32 with sum 1

    Raises ShapeError, DtypeError; ValueRangeError for k outside 1..E, and for logits that are NaN.
    Source: Mixtral (arXiv 2401.04088), equation 1.

    >>> ids, weights = top_k(np.array([[0, 2, 1]], "float32"), 2)
    >>> ids.tolist(), weights.round(2).tolist()
    ([[1, 2]], [[0.7300000190734863, 0.27000001072883606]])
    """
    check_matrix("router_logits", router_logits)
    k = check_count("k", k, 1, router_logits.shape[1])
    logits = router_logits.astype(np.float32, copy=False)
    if not np.isfinite(logits.max(axis=1)).all():  # NaN where any is
        remedy = "look at the router's input"
        raise ValueRangeError("router_logits", "rows with a finite largest one", "none", remedy)
    ids = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    chosen = np.take_along_axis(logits, ids, axis=1)
    powers = np.exp(chosen - chosen[:, :1])
    return ids.astype(np.int64), powers / powers.sum(axis=1, keepdims=True)


def moe_layer(
    x: Array,
    routing: tuple[npt.ArrayLike, npt.ArrayLike],
    W13: Any,
    W2: Any,
    *,
    stack13: ExpertStack | None = None,
    stack2: ExpertStack | None = None,
    adapter_ids: npt.ArrayLike | None = None,
) -> Array:
    """A layer of SwiGLU experts, each row through its own k, with its own adapter.

    Semantics: `sum over j of weights[i, j] * f(x[i])` with expert e = expert_ids[i, j] and
    `f(x) = (silu(gate) * up) @ W2[e].T`, where gate and up are the halves of `x @ W13[e].T`. Both
    products get the delta of the row's adapter on expert e, where a stack is given. Between the
    products all is float32 (float64 if any operand is); the sum is rounded once.

    x            (n, hidden)  float32, float16, bfloat16 or float64
    routing      expert_ids (n, k), -1 for none, and weights (n, k); `top_k` makes them
    W13          (E, 2 * inter, hidden), the gate's rows first; numpy or torch, read in place
    W2           (E, hidden, inter)
    stack13      adapters of W13, stack2 of W2; left out: no deltas there
    adapter_ids  (n,) integers; needed with a stack
    returns      (n, hidden) in x's type

    Raises as `grouped_matmul` and `add_lora` do. Source: Mixtral (arXiv 2401.04088), section 2;
    vLLM, `fused_moe` (its order of W13).

    >>> x, W13 = np.ones((1, 2), "float32"), np.ones((3, 4, 2), "float32")
    >>> moe_layer(x, ([[0, 2]], [[0.5, 0.5]]), W13, np.ones((3, 2, 2), "float32")).round(3)
    array([[7.046, 7.046]], dtype=float32)
    """
    if not isinstance(routing, tuple | list) or len(routing) != 2:
        got = type(routing).__name__
        raise DtypeError("routing", "expert_ids and weights, as top_k returns", got, "pass both")
    expert_ids, weights = routing
    pairs = segment(expert_ids)
    if (stack13 or stack2) and adapter_ids is None:
        raise ShapeError("adapter_ids", "one id per row", "None", "name each row's adapter, or -1")
    hidden, _ = products_of(check_matrix("x", x), "W13", W13, pairs)
    if hidden.shape[2] % 2:
        raise ShapeError(
            "W13", "an even number of rows", str(hidden.shape[2]), "put gate and up together"
        )
    if stack13 is not None and adapter_ids is not None:
        add_lora(hidden, x, stack13, pairs, adapter_ids)
    gate, up = np.split(hidden, 2, axis=2)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        inner = gate / (1 + np.exp(-gate)) * up
    out, _ = products_of(inner, "W2", W2, pairs)
    if stack2 is not None and adapter_ids is not None:
        add_lora(out, inner, stack2, pairs, adapter_ids)
    with np.errstate(over="ignore"):
        return combined(out, pairs, weights).astype(x.dtype, copy=False)
