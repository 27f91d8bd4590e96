"""What is to be explained: one batch at one layer, on one GPU and on this machine's threads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from sgmv.checks import check_count, fits_memory
from sgmv.emulator import Device
from sgmv.errors import ValueRangeError
from sgmv.ids import BASE_ONLY
from sgmv.layouts.rows import row_ids
from sgmv.segment import Segments
from sgmv.stack import AdapterStack
from sgmv.terminal import plural

MOST_WIDTH = 2**31 - 1  # what engines keep in int32
MOST_EXPERTS = 1024
Facts: TypeAlias = dict[str, Any]  # what a view tells: numbers, texts, lists, fit for JSON


@dataclass(frozen=True, eq=False, kw_only=True)
class Question:
    """One batch, one layer, one rank for all adapters, one device.

    Semantics: adapters are in slots in the order of their ids, from slot 0.

    segments           the batch
    h_in, h_out, rank  of the layer and its adapters
    device             the GPU that the emulator lays launches out for
    max_loras          slots of the server
    threads            of this machine
    experts, top_k     of a layer of experts, and how many of them a row goes through

    Raises DtypeError and ValueRangeError for counts that are no whole numbers >= 1, for fewer
    slots than the batch has adapters, and for fewer experts than each row has.
    """

    segments: Segments
    h_in: int
    h_out: int
    rank: int
    device: Device
    max_loras: int
    threads: int
    experts: int = 8
    top_k: int = 2

    def __post_init__(self) -> None:
        for name in ("h_in", "h_out", "rank", "max_loras", "threads"):
            check_count(name, getattr(self, name), 1, MOST_WIDTH)
        for name in ("experts", "top_k"):
            check_count(name, getattr(self, name), 1, MOST_EXPERTS)
        if self.max_loras < len(self.slots):
            raise ValueRangeError(
                "max_loras",
                f"at least the batch's {len(self.slots)} adapters",
                str(self.max_loras),
                "give the server more slots; vLLM would put off some of the requests",
            )
        if self.top_k > self.experts:
            raise ValueRangeError(
                "top_k", f"at most the {self.experts} experts", str(self.top_k), "name more experts"
            )

    @property
    def headline(self) -> str:
        """Batch, layer, rank and device in one line, without which no figure means anything."""
        rows, base = plural(self.segments.n, "row"), self.ids.count(BASE_ONLY)
        return (
            f"{rows} ({base:,} base only), {plural(len(self.slots), 'adapter')}; "
            f"h_in={self.h_in}, r={self.rank}, h_out={self.h_out}; {self.device.name}"
        )

    @cached_property
    def ids(self) -> list[int]:
        """(n,) the adapter id of each row."""
        return list(map(int, row_ids(self.segments)))

    @cached_property
    def slots(self) -> dict[int, int]:
        """Adapter id -> slot, of those that the batch uses."""
        used = [i for i in self.segments.adapter_ids.tolist() if i != BASE_ONLY]
        return {adapter_id: slot for slot, adapter_id in enumerate(used)}

    @cached_property
    def stack(self) -> AdapterStack:
        """Adapters of these ids and this rank for a layer of width 1: layouts look at no width."""
        with fits_memory("rank", self.rank):
            A, B = np.zeros((self.rank, 1), np.float32), np.zeros((1, self.rank), np.float32)
            adapters = dict.fromkeys(self.slots, (A, B))
            return AdapterStack.from_adapters(adapters, h_in=1, h_out=1)
