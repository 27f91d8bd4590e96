"""Every baseline computes what it is timed for, or says why it does not run."""

import itertools
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from typing import Any

import numpy as np
import pytest

from benchmarks import clock, gate, peers
from benchmarks.batch import Batch, dtype_of, make_batch, make_pool
from benchmarks.peers import LIBRARIES, PEERS, TURNS, mkl, with_jax, with_torch
from benchmarks.record import Times
from benchmarks.studies.grid import figures, readme, run, table
from benchmarks.studies.grid.cases import Case
from reference import workloads
from sgmv import Adapter
from tests.help.benched import (
    FLAT,
    ONE_CALL,
    last_row_dropped,
    nan,
    one_element_off,
    small_batch,
    small_pool,
    synthetic_record,
    twice,
    unscaled,
)

pytestmark = pytest.mark.once


# The ways rows can lie: in order, each alone, mixed, in part consecutive; slot 3 has no adapter.
LAYOUTS = {
    "sorted": [0, 0, 0, 1, 1, 2, 2, 2],
    "distinct": [2, 0, 1],
    "one row": [1],
    "mixed": [2, 0, 1, 0, 2, 1, 0, 0],
    "in part": [0, 0, 2, 1, 2, 3, 3, 1],
    "base only": [3, 3],
}


def prepared(name: str, batch: Batch) -> Any:
    if reason := PEERS[name].refuses(batch):
        pytest.skip(reason)
    PEERS[name].prepare(batch)
    return PEERS[name]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PEERS)
def test_baselines_are_right_however_rows_lie(name: str, layout: str, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    # Widths of whole 16 bytes, which torch's grouped product may ask for.
    batch = make_batch(small_pool(dtype, h_in=48, h_out=40), np.array(LAYOUTS[layout]), seed=5)
    peer = prepared(name, batch)
    checked = gate.check_case(batch, {name: peer.run}, 0, {name: peer.roundings})
    assert checked == len(LAYOUTS[layout])


@pytest.mark.parametrize("name", PEERS)
def test_baselines_are_right_beside_each_other(name: str) -> None:
    """One segment of rank 4 is where MKL went wrong on another OpenMP than torch's."""
    pool = make_pool(112, 48, 4, 1, np.dtype(np.float32), seed=0)
    batch = make_batch(pool, np.zeros(3, np.int64), seed=0)
    for other in TURNS:
        if not PEERS[other].refuses(batch):
            PEERS[other].prepare(batch)
    peer = prepared(name, batch)
    assert gate.check_case(batch, {name: peer.run}, 0) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PEERS)
def test_baselines_read_what_they_are_given(name: str, layout: str) -> None:
    """Not the arrays that stood there when they were prepared."""
    batch = make_batch(small_pool(h_in=48, h_out=40), np.array(LAYOUTS[layout]), seed=5)
    expected, x = batch.y.copy(), batch.x.copy()
    PEERS["by_row"].run(expected, x, batch)
    peer = prepared(name, batch)
    y = batch.y.copy()
    batch.x[...], batch.y[...] = np.nan, np.nan
    peer.run(y, x, batch)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_every_baseline_has_a_turn_a_look_and_threads() -> None:
    assert sorted(TURNS) == sorted(PEERS)
    assert len(set(figures.LOOKS.values())) == len(PEERS) + 2
    turns = [library for library, _ in itertools.groupby(PEERS[name].library for name in TURNS)]
    assert turns == list(LIBRARIES), "each library's turns follow each other"


def test_turns_wait_for_the_threads_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def alternate(turns: Any, *limits: Any) -> Any:
        seen.extend(turns)
        return real(turns, *limits)

    real = clock.alternate
    monkeypatch.setattr(clock, "alternate", alternate)
    pool = make_pool(32, 16, 4, 4, np.dtype(np.float32), seed=0)
    case = Case(32, 16, 4, 4, "distinct", "float32", ())
    run.measure(case, pool, np.arange(4), run.Terms([1], ONE_CALL, 0, FLAT))
    settle = {turn.name: turn.settle_s for turn in seen}
    spin_s = {name: library.spin_s for name, library in LIBRARIES.items()}
    assert settle["read@1"] >= spin_s["numpy"]
    assert settle["sgmv@1"] < spin_s["torch"]
    assert settle["sgmv@1 ids"] < spin_s["torch"]
    assert settle["by_segment"] < spin_s["torch"]


def test_missing_libraries_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    monkeypatch.setattr(mkl, "_path", lambda: "")
    pool = make_pool(32, 16, 4, 4, np.dtype(np.float32), seed=0)
    case = Case(32, 16, 4, 4, "distinct", "float32", ())
    record = run.measure(case, pool, np.arange(4), run.Terms([1], ONE_CALL, 0, FLAT))
    away = {name for name, peer in PEERS.items() if peer.library != "numpy"}
    assert set(record.skipped) == away
    assert {why.split(" ", 1)[1] for why in record.skipped.values()} == {"is not installed"}
    assert not away & set(record.times)


def test_mkl_is_found_where_pip_says(monkeypatch: pytest.MonkeyPatch) -> None:
    class Installed:
        def __init__(self, name: str) -> None:
            self.name = name

        def locate(self) -> str:
            return f"/opt/lib/{self.name}"

    names = ["libmkl_rt_extra.so.3", "libmkl_core.so.3", "libmkl_rt.so.3"]
    monkeypatch.setattr(mkl, "files", lambda package: [Installed(name) for name in names])
    assert mkl._path.__wrapped__() == "/opt/lib/libmkl_rt.so.3"

    def nothing(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(mkl, "files", nothing)
    assert mkl._path.__wrapped__() == ""


def test_weights_of_another_type_are_not_rounded_behind_ones_back() -> None:
    pytest.importorskip("torch")
    batch = make_batch(small_pool(), np.array([0, 1]), seed=0)
    adapter = Adapter(np.ones((2, 48), np.float32), np.ones((33, 2), np.float32))
    batch.pool.adapters[0] = adapter
    half = make_batch(small_pool("float16"), np.array([0, 1]), seed=0)
    half.pool.adapters[0] = adapter
    for name in ("torch_native", "grouped_mm", "sglang", "vllm"):
        assert "they are float32" in PEERS[name].refuses(half)
    assert PEERS["sglang"].refuses(batch) == ""
    assert PEERS["torch"].refuses(half) == ""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_packed_by_onednn_are_those_of_their_segment(layout: str) -> None:
    """In float32, which every CPU has; it is timed in bfloat16, which few have."""
    pytest.importorskip("torch")
    batch = make_batch(small_pool(), np.array(LAYOUTS[layout]), seed=5)
    with_torch.prepare_packed(batch)
    assert gate.check_case(batch, {"packed": with_torch.packed}, 0) == len(batch.y)
    assert "timed in bfloat16 alone" in PEERS["onednn"].refuses(batch)


def test_jax_is_not_asked_for_what_takes_long() -> None:
    batch = make_batch(small_pool(), np.array([0, 1]), seed=5)
    assert with_jax.dense_refuses(batch) == ""
    wide = replace(batch, slots=list(range(10**6)))
    assert "cap 1.1e+09" in with_jax.dense_refuses(wide)


def test_the_table_of_baselines_names_each_one() -> None:
    rows = peers.table().rows
    assert [row[:2] for row in rows] == [[peer.title, peer.library] for peer in PEERS.values()]


def test_sglang_merges_neighbours_only() -> None:
    pytest.importorskip("torch")
    batch = make_batch(small_pool(), np.array([2, 2, 0, 2, 3]), seed=0)
    PEERS["sglang"].prepare(batch)
    *_, runs = batch.prepared["sglang"]
    assert [run[:3] for run in runs] == [(0, 2, 16), (2, 3, 1), (3, 4, 16)]


def _rounds_v(y: Any, x: Any, batch: Batch) -> None:
    pool = batch.pool
    for i, slot in enumerate(batch.adapter_ids):
        v = pool.A[slot] @ x[i].astype(np.float32)
        y[i] += (v.astype(x.dtype).astype(np.float32) * pool.scalings[slot]) @ pool.wb[slot]


def float16_batch() -> Batch:
    pool = make_pool(64, 40, 4, 16, dtype_of("float16"), seed=1)
    return make_batch(pool, np.arange(16), seed=1)


def test_case_gate_allows_the_roundings_that_are_told() -> None:
    with pytest.raises(gate.GateError, match="planted"):
        gate.check_case(float16_batch(), {"planted": _rounds_v}, 0)
    assert gate.check_case(float16_batch(), {"planted": _rounds_v}, 0, {"planted": 1}) == 16


@pytest.mark.parametrize("sampled", [16, 1])
@pytest.mark.parametrize("wrong", [unscaled, last_row_dropped, one_element_off, nan, twice])
def test_case_gate_with_roundings_is_red_on_a_wrong_kernel(
    wrong: Any, sampled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_sample", lambda batch, seed: np.arange(sampled))
    with pytest.raises(gate.GateError, match="planted"):
        gate.check_case(float16_batch(), {"planted": wrong}, 0, {"planted": 3})


def with_all_peers() -> Any:
    """The record of two cases, in which the n-th baseline takes n times as long as sgmv."""
    record = synthetic_record()
    for case in record.cases:
        for place, name in enumerate(PEERS, 1):
            case.times[name] = Times(1.0, 10.0 * place, 999.0, 1)
            case.ratios["sgmv@2"][name] = float(place)
            case.ratios["sgmv@1"][name] = place / 2
    return record


def test_terminal_shows_the_closest_and_names_the_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = with_all_peers()
    assert table.closest(record, table.ROOM) == list(PEERS)[: table.ROOM]
    for case in record.cases:
        case.ratios["sgmv@2"]["vllm"] = 0.1
    shown = table.closest(record, table.ROOM)
    assert shown == [*list(PEERS)[: table.ROOM - 1], "vllm"]
    table.print_table(record, table.Console())
    (line,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("Only in")]
    assert all((peer.title in line) == (name not in shown) for name, peer in PEERS.items())


def test_readme_shows_a_baseline_once_a_record_has_it() -> None:
    for record, expected in ((synthetic_record(), {"by_segment"}), (with_all_peers(), set(PEERS))):
        summary = readme.summary_table(record, "r.json")
        cases = readme.cases_table(record, "r.json")
        for name, peer in PEERS.items():
            assert (f"| {peer.title} | 2 |" in summary) == (name in expected)
            assert (f"| {peer.title} |" in cases) == (name in expected)


def test_roofs_are_those_of_caches_and_memory() -> None:
    record = synthetic_record()
    sizes = [1 << shift for shift in range(15, 30, 2)]
    record.ceilings.bandwidth["2"] = [(size, 1e18 / size) for size in sizes]
    caches = record.machine.caches = {"L1": 48 << 10, "L2": 1 << 20, "L3": 32 << 20}
    labels = [label.split(":")[0] for label, _ in figures.roofs(record, "2")]
    assert labels == ["L2 (512 KiB)", "L3 (8 MiB)", "memory (512 MiB)"]
    assert [rate for _, rate in figures.roofs(record, "2")][1] == 1e18 / (8 << 20)
    caches["L3"] = 3 << 20  # too small to hold more than both L2
    assert [label[:2] for label, _ in figures.roofs(record, "2")] == ["L2", "me"]
    caches.clear()
    assert [label[:2] for label, _ in figures.roofs(record, "2")] == ["me"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("popularity", workloads.POPULARITIES)
@pytest.mark.parametrize("name", PEERS)
def test_baselines_are_right(name: str, popularity: str, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    batch = small_batch(popularity, dtype)
    peer = PEERS[name]
    if reason := peer.refuses(batch):
        pytest.skip(reason)
    peer.prepare(batch)
    assert gate.check_case(batch, {name: peer.run}, 0, {name: peer.roundings}) == 16


def test_einsum_refuses_what_would_not_fit() -> None:
    batch = small_batch(n=16)
    assert PEERS["einsum"].refuses(batch) == ""
    wide = replace(batch, adapter_ids=np.zeros(10**6, np.int64))
    assert "cap 256 MiB" in PEERS["einsum"].refuses(wide)
