"""One stack, batches for it, each engine's metadata of them, and faults to plant in that.

A test of an engine lists the faults of its fields in PLANTED: by layout, the field that must be
named, the fault, and the change of that field, or of others.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

import sgmv
from sgmv import errors, layouts
from sgmv.layouts.finding import REMEDY, Fault
from sgmv.layouts.rows import Layout

Planted = dict[str, list[tuple[str, Fault, Any]]]
PlantedFault = tuple[str, str, Fault, Any]  # with the layout
Refusals = dict[str, tuple[Callable[[], Any], type[errors.SgmvError], list[str]]]
H_IN, H_OUT = 24, 70  # 70 columns: a panel and a narrower one
RANKS = {0: 8, 2: 8, 3: 8, 4: 0, 5: 17, 9: 8}
SCALINGS = {0: 1.0, 2: 0.5, 3: 2.0, 4: 1.0, 5: 1.0, 9: 0.1}


def adapter(adapter_id: int, r: int) -> sgmv.Adapter:
    rng = np.random.default_rng(adapter_id)
    A, B = rng.standard_normal((r, H_IN), "f"), rng.standard_normal((H_OUT, r), "f")
    return sgmv.Adapter(A, B, SCALINGS[adapter_id])


# Slots are not in the order of the ids.
STACK = sgmv.AdapterStack(H_IN, H_OUT, slots=6, max_rank=17)
for _id in (9, 3, 5, 0, 4, 2):
    STACK.load(_id, adapter(_id, RANKS[_id]))
SLOT_OF = dict(STACK.table.slot_of)
NAMES = {adapter_id: f"tenant-{adapter_id}" for adapter_id in RANKS}

ids_lists = st.one_of(
    st.lists(st.sampled_from([-1, *RANKS]), max_size=30),
    st.integers(60, 300).map(lambda n: [-1, 9, 9, 3][: n % 5] * (n // 4)),  # csgmv's longer chunks
    st.integers(0, 9).map(lambda n: [-1] * n),
)
batches = settings(max_examples=50)


def of_slots(ids: list[int]) -> list[int]:
    return [-1 if i == -1 else SLOT_OF[i] for i in ids]


def merged(values: list[int]) -> list[tuple[int, int, int]]:
    """(start, length, value) of each run of equal neighbours."""
    found: list[tuple[int, int, int]] = []
    for i, value in enumerate(values):
        if found and found[-1][2] == value:
            start, length, _ = found.pop()
            found.append((start, length + 1, value))
        else:
            found.append((i, 1, value))
    return found


def in_order(values: list[int]) -> list[int]:
    """Rows in a stable order of their values."""
    return [row for value in sorted(set(values)) for row, v in enumerate(values) if v == value]


def equal(layout: object, **expected: Any) -> None:
    for name, value in expected.items():
        got = getattr(layout, name)
        assert (got.tolist() if isinstance(got, np.ndarray) else got) == value, name


def dtypes(layout: object) -> dict[str, str]:
    arrays = {f.name: getattr(layout, f.name) for f in dataclasses.fields(layout)}
    return {n: a.dtype.name for n, a in arrays.items() if isinstance(a, np.ndarray)}


MAKERS: dict[str, Callable[[list[int]], Layout]] = {
    "punica": lambda ids: layouts.punica(ids, STACK, 8),
    "lorax": lambda ids: layouts.lorax(ids, STACK),
    "llamacpp": lambda ids: layouts.llamacpp(ids, slots=STACK),
    "vllm_v0": lambda ids: layouts.vllm_v0(ids, STACK),
    "vllm_v0 sorted": lambda ids: layouts.vllm_v0(ids, STACK, sort=True),
    "vllm_v1": lambda ids: layouts.vllm_v1(ids, 7, STACK),
    "csgmv": lambda ids: layouts.sglang(ids, STACK),
    "triton": lambda ids: layouts.sglang(ids, STACK, backend="triton"),
    "torch_native": lambda ids: layouts.sglang(ids, STACK, backend="torch_native"),
    "flashinfer": lambda ids: layouts.flashinfer(ids, STACK),
    "peft": lambda ids: layouts.peft(ids, NAMES),
}


def raw(layout: Layout) -> dict[str, Any]:
    """The layout's fields by name, as somebody else's metadata: lists, and launches likewise."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(layout):
        value = getattr(layout, field.name)
        if field.name == "rank_data":
            value = {rank: raw(launch) for rank, launch in value.items()}
        if field.name == "batches" and isinstance(value, tuple):
            value = [raw(batch) for batch in value]
        if field.repr:
            found[field.name] = value.tolist() if isinstance(value, np.ndarray) else value
    return found


IDS = [9, 9, -1, 3, 9, 2, 2, -1]  # slots 0 0 -1 1 0 5 5 -1


def put(at: int, value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [*values[:at], value, *values[at:][1:]]


def swap(i: int, j: int) -> Callable[[list[Any]], list[Any]]:
    return lambda v: [v[j] if k == i else v[i] if k == j else x for k, x in enumerate(v)]


def to(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def launch(**changes: Callable[[list[Any]], Any]) -> dict[str, Callable[[Any], Any]]:
    return {"rank_data": lambda data: {16: altered(data[16], changes)}}


def altered(fields: Mapping[str, Any], changes: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
    return {**fields, **{name: change(fields[name]) for name, change in changes.items()}}


# Right metadata of IDS: every layout's, and what people have without an object around it.
RIGHT: dict[str, dict[str, Any]] = {
    **{maker: raw(make(IDS)) for maker, make in MAKERS.items()},
    "punica raw": {"s": [0, 2, 3, 6]},
    "lorax raw": {"s_start": [0, 3], "s_end": [2, 7]},
    "llamacpp raw": {"lora": [[{"id": max(s, 0), "scale": int(s >= 0)}] for s in of_slots(IDS)]},
    "flashinfer raw": {"seg_lens": [3, 1, 2], "weight_indices": [0, 1, 5]},
    "lens": {"prefills": [3, 2], "decode": 3, "indptr": [0, 3, 5], "doff": 5},
    "segments": {
        "rows": [2, 7, 5, 6, 3, 0, 1, 4],
        "seq_start": [0, 2, 4, 5, 8],
        "adapter_ids": [-1, 2, 3, 9],
    },
}


def check(layout: Any, ids: list[int]) -> list[layouts.Finding]:
    return layouts.check(layout, ids, slots=STACK, names=NAMES)


def every_fault_of(planted: Planted) -> pytest.MarkDecorator:
    """Each planted fault as the argument `planted`."""
    cases = [(layout, *case) for layout, cases in planted.items() for case in cases]
    ids = [f"{layout}-{field}-{fault}-{i}" for i, (layout, field, fault, _) in enumerate(cases)]
    return pytest.mark.parametrize("planted", cases, ids=ids)


def with_fault(layout: str, field: str, change: Any) -> dict[str, Any]:
    """Right metadata with the change."""
    return altered(RIGHT[layout], change if isinstance(change, dict) else {field: change})


def found_and_named(layout: str, field: str, fault: Fault, change: Any) -> None:
    found = check(with_fault(layout, field, change), IDS)
    assert (field, fault) in {(f.field, f.fault) for f in found}, "\n".join(map(str, found))
    for finding in found:
        assert finding.remedy == REMEDY[finding.fault]
        assert str(finding).startswith(f"{finding.field}: {finding.fault}: ")


def expected_and_got(layout: str, field: str, fault: Fault, change: Any) -> None:
    for known in (IDS, None):
        metadata = with_fault(layout, field, change)
        for finding in layouts.check(metadata, known, slots=STACK, names=NAMES):
            assert re.fullmatch(r"expected .+, got .+", finding.what), finding


def refused(call: Callable[[], Any], kind: type[errors.SgmvError], parts: list[str]) -> None:
    """The call is refused with these parts in its message, in this order."""
    with pytest.raises(kind) as refusal:
        call()
    message = str(refusal.value)
    assert re.fullmatch(r".+: expected .+, got .+; .+", message), message
    at = 0
    for part in parts:
        assert part in message[at:], f"{part!r} is not in {message[at:]!r}"
        at = message.index(part, at)
