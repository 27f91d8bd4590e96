"""The baselines, one table that names them all; what each does is in the files beside it.

Semantics of each: `y[i] += scaling * (x[i] @ A.T) @ B.T` in place, with the adapter of row i.
Fairness: weights are stored in the order and type that suits the baseline, and the rows of each
segment are known before the clock starts, for the baselines as for sgmv; and each may use every
core.

KTransformers' kt-kernel is none of them. It computes whole expert layers: no call of it is one pair
of products, and its LoRA is for CPUs with AMX (0.7.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from numpy.typing import NDArray

from benchmarks.batch import DTYPES, Batch, weights_refuse
from benchmarks.peers import mkl, with_jax, with_numpy, with_torch
from benchmarks.text import Table


@dataclass(frozen=True)
class Library:
    """What computes a baseline, with threads of its own.

    missing  why it is not here, "" where it is
    spin_s   seconds that its threads go on spinning after their last call, with something to spare
    dashes   the kind of its lines in a figure
    """

    missing: Callable[[], str]
    spin_s: float
    dashes: str


def _installed(package: str) -> Callable[[], str]:
    return lambda: "" if find_spec(package) else f"{package} is not installed"


# In the order of their turns: numpy's threads spin longest, so last. OpenBLAS: 2**28 clock ticks;
# OpenMP: 7 to 10 ms measured; XLA: none beyond 1 ms. Beside them, calls on other threads took up to
# 100 times their time: whatever comes next first makes untimed calls for as long.
LIBRARIES = {
    "torch": Library(_installed("torch"), 0.015, "--"),
    "jax": Library(_installed("jax"), 0.015, "-."),
    "mkl": Library(mkl.missing, 0.015, ":"),
    "numpy": Library(lambda: "", 0.12, "-"),
}


@dataclass(frozen=True)
class Peer:
    """A baseline.

    title      its name in tables
    short      its head of a column of the terminal
    library    of LIBRARIES
    layout     how its weights are stored
    own        whether they have x's type, else float32
    look       its colour and marker in figures
    run        adds the deltas to y
    prepare    what it needs of a batch before the clock starts
    dtypes     float types of the cases that it is timed in
    limit      its own reason not to run on a batch, "" where it does
    roundings  how often it rounds to 16 bits what sgmv keeps in float32 (v, or the delta), in a
               case of 16 bits
    """

    title: str
    short: str
    library: str
    layout: str
    own: bool
    look: tuple[str, str]
    run: Callable[[NDArray[Any], NDArray[Any], Batch], None]
    prepare: Callable[[Batch], None] = lambda batch: None
    dtypes: Sequence[str] = DTYPES
    limit: Callable[[Batch], str] = lambda batch: ""
    roundings: int = 0

    def refuses(self, batch: Batch) -> str:
        """Why it does not run on a batch, "" where it does."""
        if why := LIBRARIES[self.library].missing():
            return why
        if batch.x.dtype.name not in self.dtypes:
            return f"is timed in {' and '.join(self.dtypes)} alone"
        return (weights_refuse(batch) if self.own else "") or self.limit(batch)


SEGMENTS = "A (r, h_in), wb (r, h_out) of each segment"
SLOTS = "A (slots, r, h_in), wb (slots, r, h_out)"
PADDED = "A (S, r, h_in), wb (S, r, h_out), ranks padded"
SERVERS = "A (S, r, h_in), B (S, h_out, r), ranks padded"
PEERS = {
    "by_row": Peer("numpy per row", "row", "numpy", SLOTS, False, ("#E69F00", "v"),
                   with_numpy.by_row),
    "by_segment": Peer("numpy per segment", "segm.", "numpy", SLOTS, False, ("#D55E00", "^"),
                       with_numpy.by_segment),
    "einsum": Peer("numpy gather + einsum", "einsum", "numpy", SLOTS, False, ("#CC79A7", "D"),
                   with_numpy.einsum, limit=with_numpy.gather_refuses),
    "torch": Peer("torch per segment", "torch", "torch", SEGMENTS, False, ("#009E73", "P"),
                  with_torch.by_segment_float32, with_torch.prepare_float32),
    # In float32 it would be the one above. bfloat16 is oneDNN's, on AMX where the CPU has it.
    "torch_native": Peer("torch in 16 bits", "tor16", "torch", SEGMENTS, True, ("#117733", "X"),
                         with_torch.by_segment_native, with_torch.prepare_native, DTYPES[1:],
                         roundings=1),
    "onednn": Peer("torch, packed by oneDNN", "onednn", "torch",
                   "A and B of each segment, packed for its rows", True, ("#999933", "h"),
                   with_torch.packed, with_torch.prepare_packed, ("bfloat16",),
                   with_torch.packed_refuses, roundings=1),
    "grouped_mm": Peer("torch grouped_mm", "group", "torch", PADDED, True, ("#44AA99", "p"),
                       with_torch.grouped, with_torch.prepare_grouped,
                       limit=with_torch.grouped_refuses, roundings=3),
    "ragged_dot": Peer("JAX ragged_dot", "jax", "jax", "A.T (S, h_in, r), wb (S, r, h_out), padded",
                       True, ("#AA4499", "d"), with_jax.ragged_dot, with_jax.prepare,
                       limit=with_jax.dense_refuses, roundings=1),
    "mkl": Peer("MKL sgemm_batch", "mkl", "mkl", SLOTS, False, ("#000000", "*"),
                mkl.sgemm_batch, mkl.prepare),
    "sglang": Peer("SGLang's CPU form", "sglang", "torch", SERVERS, True, ("#882255", "<"),
                   with_torch.sglang, with_torch.prepare_sglang, roundings=1),
    "vllm": Peer("vLLM's CPU form", "vllm", "torch", SERVERS, True, ("#777777", ">"),
                 with_torch.vllm, with_torch.prepare_vllm, limit=with_numpy.gather_refuses,
                 roundings=3),
}  # fmt: skip
TURNS = sorted(PEERS, key=lambda name: list(LIBRARIES).index(PEERS[name].library))


def left_out() -> dict[str, str]:
    """The libraries that are not installed, and why none of their baselines runs."""
    reasons = {name: library.missing() for name, library in LIBRARIES.items()}
    return {name: why for name, why in reasons.items() if why}


def table() -> Table:
    """The baselines as docs/kernels.md shows them."""
    head = ["baseline", "library", "weights", "stored in", "cases in", "rounds to 16 bits"]
    rows = [
        [peer.title, peer.library, peer.layout, "x's type" if peer.own else "float32",
         "any type" if len(peer.dtypes) == len(DTYPES) else ", ".join(peer.dtypes),
         str(peer.roundings) if peer.roundings else "-"]
        for peer in PEERS.values()
    ]  # fmt: skip
    return Table(head, rows, left=len(head))


def rests(libraries: Sequence[str]) -> list[float]:
    """Seconds that each turn must wait for the threads of the turn before it.

    Semantics: `libraries` are the turns', in a circle: the first turn follows the last. What is not
    of LIBRARIES does not spin.

    >>> rests(["sgmv", "sgmv", "torch", "numpy"])
    [0.12, 0.0, 0.0, 0.015]
    """
    before = [libraries[-1], *libraries[:-1]]
    return [
        0.0 if library == last or last not in LIBRARIES else LIBRARIES[last].spin_s
        for library, last in zip(libraries, before, strict=True)
    ]
