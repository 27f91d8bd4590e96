"""The baselines, one place that names them all; what each does is in the files beside it.

Semantics of each: `y[i] += scaling * (x[i] @ A.T) @ B.T` in place, with the adapter of row i.
Fairness: weights are stored in the order and type that suits the baseline, and the rows of each
segment are known before the clock starts, for the baselines as for sgmv; and each may use every
core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from benchmarks.batch import Batch
from benchmarks.peers import mkl, with_numpy, with_torch


@dataclass(frozen=True)
class Peer:
    """A baseline, and its reason not to run on a batch ("" when it does run).

    `short` heads a column of the terminal. `pool` are the threads it runs on. `roundings`: how
    often it rounds to 16 bits what sgmv keeps in float32 (v, or the delta), in a case of 16 bits.
    """

    title: str
    short: str
    pool: str
    run: Callable[[NDArray[Any], NDArray[Any], Batch], None]
    prepare: Callable[[Batch], None] = lambda batch: None
    refuses: Callable[[Batch], str] = lambda batch: ""
    roundings: int = 0


PEERS = {
    "by_row": Peer("numpy per row", "row", "numpy", with_numpy.by_row),
    "by_segment": Peer("numpy per segment", "segm.", "numpy", with_numpy.by_segment),
    "einsum": Peer(
        "numpy gather + einsum", "einsum", "numpy", with_numpy.einsum,
        refuses=with_numpy.gather_refuses,
    ),
    "torch": Peer(
        "torch per segment", "torch", "torch", with_torch.by_segment_float32,
        with_torch.prepare_float32, with_torch.missing,
    ),
    "torch_native": Peer(
        "torch in 16 bits", "tor16", "torch", with_torch.by_segment_native,
        with_torch.prepare_native, with_torch.native_refuses, roundings=1,
    ),
    "grouped_mm": Peer(
        "torch grouped_mm", "group", "torch", with_torch.grouped,
        with_torch.prepare_grouped, with_torch.grouped_refuses, roundings=3,
    ),
    "mkl": Peer(
        "MKL sgemm_batch", "mkl", "mkl", mkl.sgemm_batch,
        mkl.prepare, mkl.refuses,
    ),
    "sglang": Peer(
        "SGLang's CPU form", "sglang", "torch", with_torch.sglang,
        with_torch.prepare_sglang, with_torch.server_refuses, roundings=1,
    ),
    "vllm": Peer(
        "vLLM's CPU form", "vllm", "torch", with_torch.vllm,
        with_torch.prepare_vllm, with_torch.vllm_refuses, roundings=3,
    ),
}  # fmt: skip
# In the order of their turns, those that share threads together; numpy's spin longest, so last.
TURNS = (
    "torch", "torch_native", "grouped_mm", "sglang", "vllm", "mkl", "by_row", "by_segment", "einsum"
)  # fmt: skip


def left_out() -> dict[str, str]:
    """The libraries that are not installed, and so none of its baselines runs."""
    reasons = {"torch": with_torch.missing(), "mkl": mkl.refuses()}
    return {library: why for library, why in reasons.items() if why}


# Seconds that threads go on spinning after their last call, with something to spare. OpenBLAS:
# 2**28 clock ticks; OpenMP: 7 to 10 ms measured. Beside them, calls on other threads took up to 100
# times their time: whatever comes next first makes untimed calls for as long.
SPIN_S = {"numpy": 0.12, "torch": 0.015, "mkl": 0.015}


def rests(pools: Sequence[str]) -> list[float]:
    """Seconds that each turn must wait for the threads of the turn before it.

    Semantics: `pools` are the turns' threads, in a circle: the first turn follows the last.

    >>> rests(["sgmv", "sgmv", "torch", "numpy"])
    [0.12, 0.0, 0.0, 0.015]
    """
    before = [pools[-1], *pools[:-1]]
    return [
        0.0 if pool == last else SPIN_S.get(last, 0.0)
        for pool, last in zip(pools, before, strict=True)
    ]
