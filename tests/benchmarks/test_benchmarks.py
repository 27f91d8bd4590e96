"""The benchmark measures what it says. No test looks at how long anything took."""

import copy
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sgmv
from benchmarks import __main__ as command
from benchmarks import ceilings, figures, gate, goals, machine, readme, run, table
from benchmarks.batch import (
    Batch,
    Pool,
    dtype_of,
    make_batch,
    make_pool,
    pool_from_adapters,
    popularity_ids,
)
from benchmarks.ceilings import Ceilings
from benchmarks.console import Console
from benchmarks.grid import FULL_ROWS, ONE_ROW, RANKS, Case, Filters, cases
from benchmarks.models import LAYERS, MODELS, shapes
from benchmarks.peers import PEERS
from benchmarks.record import (
    Record,
    RecordError,
    case_label,
    geomean,
    load,
    save,
    summarise,
    validate,
    without_noisy,
)
from benchmarks.timing import Budget, Deadline, Variant, alternate
from reference import workloads

pytestmark = pytest.mark.once


ROOT = Path(__file__).resolve().parents[2]
PEFT = ROOT / "tests" / "fixtures" / "peft" / "llama"
ONE_CALL = Budget(rounds=1, turn_s=0.0)
FLAT = Ceilings({1: [(1 << 10, 1e9), (1 << 30, 1e9)]}, {1: 1e9})


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    before = sgmv.get_num_threads()
    yield
    sgmv.set_num_threads(before)


# Layers, vocabulary, whether the embedding is also the output layer, and billions of parameters:
# the model cards' own figures, which the widths in models.py must add up to.
CARDS = {
    "Llama-2-7B": (32, 32000, False, 6.74),
    "Llama-3-8B": (32, 128256, False, 8.03),
    "Qwen2.5-7B": (28, 152064, False, 7.62),
    "Mistral-7B": (32, 32000, False, 7.24),
    "Gemma-2-9B": (42, 256000, True, 9.24),
}


@pytest.mark.parametrize("name", MODELS)
def test_widths_add_up_to_the_models_size(name: str) -> None:
    layers, vocabulary, tied, billions = CARDS[name]
    model = MODELS[name]
    q, kv, gate_up, down = (np.prod(model.layer(layer)) for layer in LAYERS)
    total = layers * (2 * q + 2 * kv + 2 * gate_up + down)  # the output projection is q's mirror
    total += vocabulary * model.hidden * (1 if tied else 2)
    assert total / 1e9 == pytest.approx(billions, abs=0.006)  # cards give two decimals


@pytest.mark.parametrize("name", MODELS)
def test_widths_follow_from_heads(name: str) -> None:
    model = MODELS[name]
    assert model.heads % model.kv_heads == 0
    assert model.layer("q") == (model.hidden, model.heads * model.head_dim)
    assert model.layer("kv")[1] * model.heads == model.layer("q")[1] * model.kv_heads
    assert model.layer("down") == model.layer("gate/up")[::-1]


def test_equal_shapes_are_timed_once_and_carry_all_names() -> None:
    found = shapes(["Llama-3-8B", "Mistral-7B"], list(LAYERS))
    assert found[4096, 14336] == ["Llama-3-8B gate/up", "Mistral-7B gate/up"]
    assert len(found) == len(LAYERS)


def test_full_grid_is_the_product_of_all_axes_and_a_layer_in_16_bits() -> None:
    everything = cases("full", Filters())
    found = [case for case in everything if case.dtype == "float32"]
    halves = [case for case in everything if case.dtype != "float32"]
    assert {(c.h_in, c.h_out, c.dtype) for c in halves} == {(4096, 4096, "bfloat16")}
    twins = {case for case in found if (case.h_in, case.h_out) == (4096, 4096)}
    assert len(halves) == len(twins) == 63
    keys = {(c.h_in, c.h_out, c.rank, c.rows, c.popularity) for c in found}
    expected = {
        (*shape, rank, n, popularity)
        for shape in shapes(list(MODELS), list(LAYERS))
        for rank in RANKS
        for n in FULL_ROWS
        for popularity in (workloads.POPULARITIES if n > 1 else [ONE_ROW])
    }
    assert keys == expected
    assert len(found) == len(keys)


def test_quick_grid_touches_every_value_of_every_axis_but_the_model() -> None:
    found = cases("quick", Filters())
    assert {c.rank for c in found} == set(RANKS)
    assert {c.popularity for c in found} == {*workloads.POPULARITIES, ONE_ROW}
    assert {name.split()[1] for c in found for name in c.names} == set(LAYERS)


def test_filters_narrow_their_axis() -> None:
    filters = Filters(["Gemma-2-9B"], ["q"], [3], [2], ["skewed"], ["float16"])
    assert cases("quick", filters) == cases("full", filters)
    assert cases("quick", filters) == [
        Case(3584, 4096, 3, 2, "skewed", "float16", ("Gemma-2-9B q",))
    ]


def test_cases_beyond_memory_are_named_with_the_reason() -> None:
    few = cases("quick", Filters(rows=[4], popularities=["distinct", "identical"]))
    need = 4 * 16 * (4096 + 4096) * 8
    groups, untimed = run.synthetic_groups(few, seed=0, memory=need - 1)
    assert [case.popularity for group in groups for case, _ in group.cases] == ["identical"]
    assert list(untimed) == ["4096>4096 r=16 n=4 distinct"]
    assert "--memory-gib" in untimed["4096>4096 r=16 n=4 distinct"]
    assert run.synthetic_groups(few, seed=0, memory=need)[1] == {}


def small_pool(dtype: str = "float32", *, h_in: int = 48, h_out: int = 33) -> Pool:
    """Mixed ranks and a slot without an adapter, as real batches have them."""
    rng = np.random.default_rng(7)
    adapters: list[sgmv.Adapter | None] = [
        sgmv.Adapter(
            rng.standard_normal((rank, h_in)).astype(dtype_of(dtype)),
            rng.standard_normal((h_out, rank)).astype(dtype_of(dtype)),
            scaling=scaling,
        )
        for rank, scaling in ((1, 2.0), (8, 0.5), (16, 1.0))
    ]
    return pool_from_adapters([*adapters, None], dtype_of(dtype))


def small_batch(popularity: str = "uniform", dtype: str = "float32", n: int = 16) -> Batch:
    return make_batch(small_pool(dtype), popularity_ids(popularity, n, seed=3) % 4, seed=5)


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


def test_footprint_and_flops_count_what_one_call_does() -> None:
    pool = make_pool(10, 20, 4, 3, np.dtype(np.float32), seed=0)
    batch = make_batch(pool, np.array([0, 2, 2]), seed=0)
    assert batch.footprint() == 4 * (2 * 4 * (10 + 20) + 3 * 10 + 2 * 3 * 20)
    assert batch.flops() == 2 * 3 * 4 * (10 + 20)


def _unscaled(y: Any, x: Any, batch: Batch) -> None:
    pool = batch.pool
    for i, slot in enumerate(batch.adapter_ids):
        y[i] += (x[i] @ pool.A[slot].T) @ pool.wb[slot]


def _last_row_dropped(y: Any, x: Any, batch: Batch) -> None:
    kept = y[-1].copy()
    PEERS["by_row"].run(y, x, batch)
    y[-1] = kept


def _one_element_off(y: Any, x: Any, batch: Batch) -> None:
    PEERS["by_row"].run(y, x, batch)
    y[5, 7] += 1.0


def _nan(y: Any, x: Any, batch: Batch) -> None:
    PEERS["by_row"].run(y, x, batch)
    y[5, 7] = np.nan


def _twice(y: Any, x: Any, batch: Batch) -> None:
    PEERS["by_row"].run(y, x, batch)
    PEERS["by_row"].run(y, x, batch)


@pytest.mark.parametrize("wrong", [_unscaled, _last_row_dropped, _one_element_off, _nan, _twice])
def test_case_gate_is_red_on_a_wrong_kernel(wrong: Any) -> None:
    pool = make_pool(64, 40, 4, 16, np.dtype(np.float32), seed=1)
    batch = make_batch(pool, popularity_ids("distinct", 16, seed=1), seed=1)
    with pytest.raises(gate.GateError, match="planted"):
        gate.check_case(batch, {"planted": wrong}, seed=0)


@pytest.mark.parametrize("wrong", [_last_row_dropped, _one_element_off, _nan])
def test_case_gate_looks_beyond_the_rows_it_samples(
    wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "_sample", lambda batch, seed: np.array([0, 1]))
    pool = make_pool(64, 40, 4, 16, np.dtype(np.float32), seed=1)
    batch = make_batch(pool, popularity_ids("distinct", 16, seed=1), seed=1)
    with pytest.raises(gate.GateError, match="planted: y"):
        gate.check_case(batch, {"planted": wrong}, seed=0)


def test_sample_takes_ends_of_segments_and_respects_its_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gate, "REFERENCE_WORK", 0)
    pool = make_pool(8, 8, 2, 2, np.dtype(np.float32), seed=0)
    batch = make_batch(pool, np.repeat([0, 1], 50), seed=0)
    rows = gate._sample(batch, seed=0)
    assert len(rows) == len(set(rows.tolist())) == 8
    assert {0, 49, 50, 99} <= set(rows.tolist())


def few_corpus_cases(**options: Any) -> Any:
    # The library's own tests run the whole corpus; here it is the gate that is under test.
    return itertools.islice(workloads_corpus(**options), 3)


workloads_corpus = workloads.corpus


def test_corpus_gate_is_green_on_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "corpus", few_corpus_cases)
    float32 = [np.dtype(np.float32)]
    assert gate.corpus_failures(gate.sgmv_kernel, float32, [1]) == (3, [])


def _adds_nothing(y: Any, x: Any, adapters: Any, adapter_ids: Any, scalings: Any) -> None:
    pass


def _crashes(y: Any, x: Any, adapters: Any, adapter_ids: Any, scalings: Any) -> None:
    raise IndexError("past the end")


def must_not_run(*args: Any, **kwargs: Any) -> None:
    pytest.fail("something was timed behind a red gate")


@pytest.mark.parametrize("kernel", [_adds_nothing, _crashes])
def test_red_corpus_gate_times_nothing(
    kernel: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(workloads, "corpus", few_corpus_cases)
    monkeypatch.setattr(gate, "sgmv_kernel", kernel)
    monkeypatch.setattr(command, "probe", must_not_run)
    monkeypatch.setattr(run, "alternate", must_not_run)
    status = command.main(["--rows", "1", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert status == 1
    assert "gate: RED" in printed
    assert "nothing was timed" in printed
    first = next(iter(workloads_corpus(dtypes=[np.dtype(np.float32)])))
    assert first.name in printed
    assert list(tmp_path.iterdir()) == []


def test_red_case_gate_times_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(workloads, "corpus", few_corpus_cases)
    monkeypatch.setattr(run, "add_lora_with_segments", _twice)
    monkeypatch.setattr(command, "probe", lambda threads, repeats: FLAT)
    monkeypatch.setattr(run, "alternate", must_not_run)
    argv = ["--model", "Qwen2.5-7B", "--layer", "kv", "--rank", "8", "--rows", "4"]
    status = command.main([*argv, "--threads", "1", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert status == 1
    assert "gate: RED" in printed
    assert "3584>512 r=8 n=4" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("h_in", "dtype", "message"),
    [
        (5, np.float32, r"one \(h_in, h_out\), got \[\(3, 4\), \(5, 4\)\]"),
        (3, np.float64, "float64"),
    ],
)
def test_adapters_that_cannot_be_mixed_are_refused(h_in: int, dtype: type, message: str) -> None:
    first = sgmv.Adapter(np.ones((2, 3), np.float32), np.ones((4, 2), np.float32))
    second = sgmv.Adapter(np.ones((2, h_in), dtype), np.ones((4, 2), dtype))
    with pytest.raises(SystemExit, match=message):
        run._check_mixable("mlp.up_proj", [first, second])


class Clock:
    """A clock that stands still until something takes time."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds

    def until(self, seconds: float) -> Deadline:
        return Deadline(self.seconds + seconds, self)


def one_case_groups(names: str, made: list[str]) -> list[run.Group]:
    """A group of one case for each letter, which stands as its dtype."""
    return [
        run.Group(
            partial(made.append, name),
            [(Case(8, 8, 1, 1, "identical", name, ()), np.zeros(1, np.int64))],
        )
        for name in names
    ]


def measured(monkeypatch: pytest.MonkeyPatch, clock: Clock, takes: float, noise: Any) -> Any:
    """Have each case take that long; `noise` is each case's busy cores, timing after timing."""
    shares: list[tuple[str, float]] = []

    def measure(case: Case, pool: Any, ids: Any, terms: Any, until: Deadline) -> Any:
        shares.append((case.dtype, round(until.left(), 6)))
        clock.seconds += takes
        return {"foreign_cores": noise[case.dtype].pop(0)}

    monkeypatch.setattr(run, "measure", measure)
    return shares


def test_noisy_cases_are_timed_again_and_the_quieter_timing_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, made, terms = Clock(), list[str](), Any
    noise = {"a": [0.0], "b": [0.9, 0.0], "c": [0.9, 0.95, 0.92], "d": [None]}
    measured(monkeypatch, clock, 1.0, noise)
    groups, records = one_case_groups("abcd", made), dict[Case, Any]()
    steps: list[list[str]] = []
    while left := run.unsettled(groups, records):
        if len(steps) == 3:
            break
        steps.append([])
        run.time_cases(left, records, terms, clock.until(100.0), steps[-1].append)
    assert "".join(made) == "abcdbcc"
    assert [len(labels) for labels in steps] == [4, 2, 1]
    assert [record["foreign_cores"] for record in records.values()] == [0.0, 0.0, 0.9, None]


def test_cases_share_the_time_and_none_begins_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that is slow, or always noisy, delays the end by itself alone."""
    clock, made = Clock(), list[str]()
    shares = measured(monkeypatch, clock, 10.0, {name: [0.9] for name in "abcde"})
    groups, records = one_case_groups("abcde", made), dict[Case, Any]()
    run.time_cases(groups, records, Any, clock.until(25.0), lambda label: None)
    assert clock.seconds == 1030.0
    assert shares == [("a", 5.0), ("b", 3.75), ("c", 1.666667)]
    untimed_first = [group.cases[0][0].dtype for group in run.unsettled(groups, records)]
    assert "".join(untimed_first) == "deabc"
    assert "".join(made) == "abc"


def test_one_case_is_timed_even_if_compiling_took_all_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, records = Clock(), dict[Case, Any]()
    measured(monkeypatch, clock, 10.0, {"a": [0.0]})
    run.time_cases(one_case_groups("ab", []), records, Any, clock.until(-5.0), lambda label: None)
    assert [case.dtype for case in records] == ["a"]


def test_large_batches_are_timed_last() -> None:
    groups, _untimed = run.synthetic_groups(cases("quick", Filters()), seed=0, memory=1 << 40)
    rows = [max(case.rows for case, _ids in group.cases) for group in run.smallest_first(groups)]
    assert rows == [64, 64, 64, 64, 64, 1024]


@pytest.fixture
def fake_run(monkeypatch: pytest.MonkeyPatch) -> tuple[Clock, list[tuple[str, float]]]:
    """A benchmark in which nothing but the clock is measured, and when each table was printed."""
    clock, printed = Clock(), list[tuple[str, float]]()
    print_table = table.print_table

    def first_use_s() -> float:
        clock.seconds += 13.0
        return 13.0

    def measure(case: Case, pool: Any, ids: Any, terms: Any, until: Deadline) -> Any:
        clock.seconds += 4.0
        found: Any = {**synthetic_record()["cases"][0], "foreign_cores": 0.9}
        fields = ("h_in", "h_out", "rank", "rows", "popularity", "dtype")
        return {**found, **{name: getattr(case, name) for name in fields}}

    def shown(record: Record, console: Console, only: Any = None) -> None:
        printed.append(("all" if only is None else "again", clock.seconds - 1000.0))
        print_table(record, console, only)

    monkeypatch.setattr(run, "first_use_s", first_use_s)
    monkeypatch.setattr(run, "measure", measure)
    monkeypatch.setattr(run, "_synthetic_pool", lambda *sizes: None)
    monkeypatch.setattr(run, "call_us", lambda: {"segments": 2.0, "ids": 6.0})
    monkeypatch.setattr(gate, "corpus_failures", lambda *_: (3, []))
    monkeypatch.setattr(command, "probe", lambda threads, repeats: FLAT)
    monkeypatch.setattr(table, "print_table", shown)
    return clock, printed


ARGV = ["--threads", "1", "2", "--no-figures", "--output"]


def test_no_case_delays_the_table_and_patience_is_kept_to(
    fake_run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Every case takes 4 s and is noisy: what a busy machine looks like."""
    clock, printed = fake_run
    assert command.main([*ARGV, str(tmp_path), "--patience", "120"], now=clock) == 0
    text = capsys.readouterr().out
    assert "to time: 41 cases" in text
    assert "65 s at the most; then noisy cases again, for 120 s" in text
    timed = 13  # 13 s of compiling, then 4 s each, and none begins after 65 s
    assert printed == [("all", 13.0 + 4 * timed), ("again", 13.0 + 4 * timed + 120.0)]
    assert clock.seconds - 1000.0 == 13.0 + 4 * timed + 120.0
    assert f"during {timed} of {timed} cases, marked ?" in text
    assert f"no time was left for {41 - timed} cases" in text
    counts = [tuple(map(int, found)) for found in re.findall(r"(\d+)/(\d+) \d+>", text)]
    assert all(done < total for done, total in counts)
    assert {total for _done, total in counts} == {41}
    record = load(tmp_path / "quick.json")
    assert len(record["cases"]) == len(record["noisy"]) == 41
    assert record["untimed"] == {}


@pytest.mark.parametrize("patience", ["0", "9"])
def test_rows_that_stay_noisy_or_untimed_are_in_table_and_record(
    patience: str, fake_run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    clock, printed = fake_run
    assert command.main([*ARGV, str(tmp_path), "--patience", patience], now=clock) == 0
    text = capsys.readouterr().out
    record = load(tmp_path / "quick.json")
    again = {"0": 0, "9": 3}[patience]
    assert len(printed) == 1 + bool(again)
    assert ("timed again" in text) == bool(again)
    assert ("then noisy cases again" in text) == bool(again)
    assert clock.seconds - 1000.0 == 65.0 + 4 * again
    assert record["noisy"] == [case_label(case) for case in record["cases"]]
    assert len(record["cases"]) == 13 + again
    assert set(record["untimed"].values()) == {command.NO_TIME}
    assert len(record["untimed"]) == 28 - again
    first, *second = text.split("timed again: ")
    marked = r"^\? +\d+ +\d+ +\w+"
    assert len(re.findall(marked, first, re.MULTILINE)) == 13
    assert [len(re.findall(marked, part, re.MULTILINE)) for part in second] == [again] * len(second)


def test_each_pass_counts_its_own_cases(
    fake_run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    clock, printed = fake_run
    slow = run.measure

    def measure(case: Case, *rest: Any) -> Any:
        found = slow(case, *rest)
        clock.seconds -= 3.0  # 1 s each: there is time for all
        late = clock.seconds > 1000.0 + 13.0 + 41.0
        return {**found, "foreign_cores": 0.9 if case.rank == 8 and not late else 0.0}

    monkeypatch.setattr(run, "measure", measure)
    assert command.main([*ARGV, str(tmp_path)], now=clock) == 0
    text = capsys.readouterr().out
    first, again = text.split("noisy cases again, for at most 30 s")
    assert set(re.findall(r"^ +\d+/(\d+) \d+>", first, re.MULTILINE)) == {"41"}
    assert re.findall(r"^ +(\d+)/(\d+) \d+>", again, re.MULTILINE)[0] == ("0", "4")
    assert "4 rows changed, 0 of 41 cases are noisy now" in again
    assert "?" not in again
    assert "(4 of 41 cases noisy)" in first
    assert load(tmp_path / "quick.json")["noisy"] == []
    assert printed == [("all", 54.0), ("again", 58.0)]


def test_ctrl_c_while_cases_are_timed_again_keeps_what_there_is(
    fake_run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    clock, _printed = fake_run
    measure = run.measure

    def interrupted(*arguments: Any) -> Any:
        if clock.seconds > 1068.0:
            raise KeyboardInterrupt
        return measure(*arguments)

    monkeypatch.setattr(run, "measure", interrupted)
    assert command.main([*ARGV, str(tmp_path), "--patience", "60"], now=clock) == 0
    assert "interrupted" in capsys.readouterr().out
    assert len(load(tmp_path / "quick.json")["cases"]) == 14


def test_a_record_to_commit_takes_the_time_it_needs(
    fake_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, printed = fake_run
    monkeypatch.setattr(readme, "RECORDS", tmp_path / "records")
    argv = ["--record", "--no-figures", "--patience", "0"]
    monkeypatch.setattr(command, "cores", lambda: 2)
    monkeypatch.setattr(command, "OUTPUT", tmp_path)
    assert command.main(argv, now=clock) == 0
    assert printed == [("all", 13.0 + 4 * 41)]


def test_timing_ends_after_the_round_in_which_time_is_up() -> None:
    clock, calls = Clock(), list[str]()

    def call(name: str) -> None:
        calls.append(name)
        clock.seconds += 1.0

    variants = [Variant(name, partial(call, name), settles=False) for name in "AB"]
    times = alternate(variants, Budget(rounds=4, turn_s=0.0), clock.until(3.0))
    assert "".join(calls) == "ABAB"
    assert {name: timing.calls for name, timing in times.items()} == {"A": 2, "B": 2}
    alternate(variants, Budget(rounds=4, turn_s=0.0), clock.until(-1.0))
    assert "".join(calls) == "ABABAB"


def test_a_record_to_commit_leaves_noisy_cases_out() -> None:
    record = synthetic_record()
    record["cases"][0]["foreign_cores"] = 0.5
    label = case_label(record["cases"][0])
    quiet = without_noisy(record)
    assert len(quiet["cases"]) == len(record["cases"]) - 1
    assert quiet["untimed"][label] == "other processes ran meanwhile"
    assert label not in record["untimed"]
    validate(quiet)


def test_variants_take_turns_after_untimed_calls() -> None:
    calls: list[str] = []
    variants = [
        Variant(name, partial(calls.append, name), partial(calls.append, f"set {name}"), 0.0)
        for name in "AB"
    ]
    times = alternate(variants, Budget(rounds=3, turn_s=0.0))
    assert calls == ["set A", "A", "A", "set B", "B", "B"] * 3
    calls.clear()
    alternate([replace(variant, settles=False) for variant in variants], Budget(1, 0.0))
    assert calls == ["set A", "A", "set B", "B"]
    assert {name: timing.calls for name, timing in times.items()} == {"A": 3, "B": 3}
    assert all(0 < t.q20 <= t.q50 <= t.q80 for t in times.values())


def test_timings_repeat_until_others_are_still(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_with(*foreign: float | None) -> tuple[Any, float | None]:
        loads, runs = iter(foreign), itertools.count()
        monkeypatch.setattr(run, "foreign_cores", lambda before, after: next(loads))
        monkeypatch.setattr(run, "alternate", lambda turns, budget: next(runs))
        return run.time_quietly([], ONE_CALL)

    assert time_with(0.0) == (0, 0.0)
    assert time_with(None) == (0, None)
    assert time_with(0.9, 0.2, 0.05) == (2, 0.05)
    assert time_with(0.9, 0.3, 0.5, 0.8) == (1, 0.3)


def test_measured_case_holds_what_was_asked_for() -> None:
    pool = make_pool(32, 16, 4, 4, np.dtype(np.float32), seed=0)
    case = Case(32, 16, 4, 4, "distinct", "float32", ("a", "b"))
    record = run.measure(case, pool, np.arange(4), run.Terms([1], ONE_CALL, 0, FLAT))
    assert {"sgmv@1", "sgmv@1 ids", "by_row", "by_segment", "einsum"} <= record["times"].keys()
    assert (record["S"], record["checked_rows"], record["names"]) == (4, 4, ["a", "b"])
    assert set(record["ratios"]["sgmv@1"]) == set(PEERS) - set(record["skipped"])
    limit_us = max(record["footprint"], record["flops"]) / 1e9 * 1e6
    expected = limit_us / record["times"]["sgmv@1"]["q50"]
    assert record["shares"]["sgmv@1"] == pytest.approx(expected, rel=1e-3)


def test_peft_adapters_become_mixed_batches() -> None:
    pytest.importorskip("safetensors")
    directories = [PEFT / "attention-f32", PEFT / "rslora-f32"]
    groups = run.adapter_groups(directories, [5, 1], "float32", seed=0)
    modules = {module for d in directories for module in sgmv.load_peft(d)}
    named = [name for group in groups for name in group.cases[0][0].names]
    assert sorted(named) == sorted(modules)
    for group in groups:
        (case, ids), (_, one) = group.cases
        pool = group.make()
        assert pool.adapters[one[0]] is not None
        assert sorted(np.bincount(ids)) == [2, 3]
        record = run.measure(case, pool, ids, run.Terms([1], ONE_CALL, 0, FLAT))
        assert record["checked_rows"] == 5


@pytest.mark.skipif(
    os.environ.get("NUMBA_DISABLE_JIT") == "1", reason="the probe is an intrinsic of the compiler"
)
def test_probe_measures_every_footprint_and_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "FOOTPRINTS", (1 << 15, 1 << 17))
    found = ceilings.probe([1, 2], pass_s=1e-4, repeats=1)
    assert set(found.bandwidth) == set(found.peak) == {1, 2}
    for measured in found.bandwidth.values():
        assert [size for size, _ in measured] == [1 << 15, 1 << 17]
        assert all(rate > 0 for _, rate in measured)
    assert all(peak > 0 for peak in found.peak.values())
    # The optimiser has left every chain: one fused instruction for each, in the widest registers.
    (assembly,) = ceilings._fma.inspect_asm().values()
    register = {16: r"%zmm\d+", 8: r"%ymm\d+", 4: r"(%xmm\d+|v\d+\.4s)"}[ceilings.vector_lanes()]
    fused = re.findall(rf"(?:vfmadd\w+|fmla)\s[^\n]*{register}", assembly)
    assert len(fused) >= ceilings.ACCUMULATORS


def test_failure_in_a_probe_thread_is_not_swallowed() -> None:
    def fail() -> None:
        raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError, match="no such instruction"):
        ceilings._concurrent([fail])


def test_limit_is_the_larger_of_memory_and_arithmetic() -> None:
    found = Ceilings({2: [(1 << 20, 1e9), (1 << 22, 1e9)]}, {2: 1e10})
    assert found.limit_s(10**6, 10**6, 2) == pytest.approx(1e-3)
    assert found.limit_s(10**6, 10**9, 2) == pytest.approx(1e-1)


def synthetic_record() -> Record:
    """Two cases: a win of 2x and a loss of 0.5x against by_segment, and torch not there."""
    times = {
        "sgmv@2": {"q20": 9.0, "q50": 10.0, "q80": 11.0, "calls": 7},
        "sgmv@1": {"q20": 19.0, "q50": 20.0, "q80": 21.0, "calls": 7},
        "by_segment": {"q20": 19.0, "q50": 20.0, "q80": 21.0, "calls": 7},
    }
    win: Any = {
        "h_in": 4096, "h_out": 14336, "names": ["Llama-3-8B gate/up", "Mistral-7B gate/up"],
        "rank": 16, "rows": 64, "popularity": "uniform", "dtype": "float32", "S": 8,
        "footprint": 10**7, "flops": 10**7, "checked_rows": 64, "times": times,
        "ratios": {"sgmv@2": {"by_segment": 2.0}, "sgmv@1": {"by_segment": 1.0}},
        "shares": {"sgmv@2": 0.5, "sgmv@1": 0.4}, "foreign_cores": 0.02,
        "skipped": {"torch": "torch is not installed"},
    }  # fmt: skip
    loss = copy.deepcopy(win)
    loss.update(popularity="identical", S=1, rows=256)
    loss["times"]["by_segment"]["q50"] = 5.0
    loss["ratios"] = {"sgmv@2": {"by_segment": 0.5}, "sgmv@1": {"by_segment": 0.25}}
    bandwidth = [[2.0**15, 5e11], [2.0**20, 2e11], [2.0**29, 5e10]]
    return {
        "schema": 2, "mode": "quick", "date": "2025-01-01T00:00:00+00:00", "seed": 0,
        "commit": {"hash": "0" * 40, "dirty": False}, "machine": machine.machine(),
        "versions": machine.versions(), "blas": machine.blas(), "threads": [1, 2],
        "weights": "hot", "seconds": 1.0,
        "gate": {"corpus_cases": 3, "threads": [1, 2], "first_use_s": 0.1, "seconds": 1.0},
        "ceilings": {"bandwidth": {"1": bandwidth, "2": bandwidth}, "peak": {"1": 3e11, "2": 5e11}},
        "call_us": {"segments": 2.0, "ids": 6.0}, "untimed": {}, "cases": [win, loss],
    }  # fmt: skip


def test_geomean_refuses_nothing() -> None:
    assert geomean([4.0, 1.0, 2.0]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="at least one"):
        geomean([])


def test_summary_counts_losses_and_names_the_worst_case() -> None:
    lines = {line.popularity: line for line in summarise(synthetic_record(), "sgmv@2")}
    assert set(lines) == {"all", "uniform", "identical"}
    everything = lines["all"]
    assert (everything.cases, everything.losses) == (2, 1)
    assert everything.geomean == pytest.approx(1.0)
    assert (everything.worst, everything.best) == (0.5, 2.0)
    assert everything.worst_case == "4096>14336 r=16 n=256 identical"
    assert lines["uniform"].losses == 0


def test_record_survives_saving(tmp_path: Path) -> None:
    record = synthetic_record()
    save(record, tmp_path / "sub" / "r.json")
    assert load(tmp_path / "sub" / "r.json") == record


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("seed",), "0", r"record\.seed: expected int"),
        (("schema",), 1, r"record\.schema: expected 2, got 1"),
        (("cases", 0, "S"), 8.5, r"record\.cases\[0\]\.S: expected int"),
        (("cases", 0, "times", "sgmv@2", "q50"), float("nan"), r"expected float, got nan"),
        (("cases", 1, "ratios"), [], r"record\.cases\[1\]\.ratios: expected dict"),
        (("machine", "cpu"), None, r"record\.machine\.cpu: expected str"),
        (("surplus",), 1, r"expected the keys .* got .*surplus"),
    ],
)
def test_records_that_break_the_schema_are_refused(
    path: tuple[Any, ...], value: Any, message: str, tmp_path: Path
) -> None:
    record: Any = synthetic_record()
    *parents, last = path
    inner = record
    for key in parents:
        inner = inner[key]
    inner[last] = value
    with pytest.raises(RecordError, match=message):
        validate(record)
    (tmp_path / "r.json").write_text(json.dumps(record))
    with pytest.raises(RecordError, match=r"r\.json.*python -m benchmarks"):
        load(tmp_path / "r.json")


@pytest.mark.parametrize("rich", [False, True])
def test_table_fits_and_marks_losses(rich: bool, capsys: pytest.CaptureFixture[str]) -> None:
    if rich:
        pytest.importorskip("rich")
    record = synthetic_record()
    # The widest row there can be: the longest heads there is room for, every figure at its longest.
    heads = sorted(set(PEERS) - {"by_segment"}, key=lambda name: -len(PEERS[name].short))
    for case in record["cases"]:
        case["rows"], case["S"] = 2048, 2048
        for name in heads[: table.ROOM - 1]:
            case["times"][name] = case["times"]["by_segment"]
            case["ratios"]["sgmv@2"].setdefault(name, 0.51)
        case["times"]["sgmv@2"]["q50"] = case["times"]["sgmv@1"]["q50"] = 123456.0
    console = Console(rich=rich)
    table.print_table(record, console)
    table.print_summary(record, console)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    rows = [line.split() for line in printed.splitlines() if line.split()[:2] == ["16", "2048"]]
    assert [("2.00x" in row, "0.50x!" in row) for row in rows] == [(True, False), (False, True)]
    assert "do not trust" not in printed


def test_busy_machine_is_told_and_not_recorded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    record = synthetic_record()
    record["cases"][1]["foreign_cores"] = 0.8
    assert "1 of 2 cases, marked ?: do not trust" in " ".join(table.noise(record))
    monkeypatch.setattr(readme, "RECORDS", tmp_path / "records")
    args = command.parser().parse_args(["--record", "--no-figures"])
    args.output = tmp_path / "out"
    command._write(record, args, Console(rich=False))
    assert "not recorded" in capsys.readouterr().out
    assert not readme.RECORDS.exists()
    assert load(tmp_path / "out" / "quick.json") == record

    record["cases"][1]["foreign_cores"] = None
    command._write(record, args, Console(rich=False))
    (written,) = readme.RECORDS.iterdir()
    assert written.name.startswith("quick-")


MARKED = (
    "# x\n<!-- bench:summary:begin -->\nold\n<!-- bench:summary:end -->\nbetween\n"
    "<!-- bench:cases:begin -->\n<!-- bench:cases:end -->\nafter\n"
)


def test_readme_tables_follow_the_record() -> None:
    record = synthetic_record()
    text = readme.rendered("README.md", MARKED, record, "r.json")
    row = "| numpy per segment | 2 | **1.00x** | 0.50x! | 2.00x | 1 of 2 | 2.00x | 0.50x! |"
    assert row in text.splitlines()
    assert "old" not in text
    assert text.startswith("# x\n")
    assert text.endswith("after\n")
    assert readme.rendered("README.md", text, record, "r.json") == text
    record["cases"][0]["ratios"]["sgmv@2"]["by_segment"] = 3.0
    assert readme.rendered("README.md", text, record, "r.json") != text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "once each"),
        (MARKED + MARKED, "once each"),
        (MARKED.replace("cases:end", "cases"), "once each"),
        (MARKED.replace("begin", "?").replace("end", "begin").replace("?", "end"), "swap them"),
    ],
)
def test_readme_without_its_markers_is_refused(text: str, message: str) -> None:
    with pytest.raises(readme.StaleError, match=message):
        readme.rendered("README.md", text, synthetic_record(), "r.json")


def test_stale_tables_and_figures_are_found(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record = synthetic_record()

    def stale(text: str) -> list[str]:
        return readme.stale_parts({"README.md": text}, record, "r.json", tmp_path)

    fresh = readme.rendered("README.md", MARKED, record, "r.json")
    assert stale(fresh) == list(readme.FIGURES)
    paths = figures.draw(record, tmp_path)
    assert [path.name for path in paths] == list(readme.FIGURES)
    assert all(path.stat().st_size > 10_000 for path in paths)
    assert stale(fresh) == []
    assert stale(MARKED) == ["README.md"]
    record["seed"] = 1
    assert stale(fresh) == list(readme.FIGURES)


def test_float_types_get_a_table_each() -> None:
    """A ratio in bfloat16 says nothing of float32: neither table counts the other's cases."""
    record = synthetic_record()
    record["cases"][1]["dtype"] = "bfloat16"
    table = readme.summary_table(record, "r.json").splitlines()
    wins = [line for line in table if line.startswith("| numpy per segment | 2 |")]
    assert [line.split(" | ")[2] for line in wins] == ["**2.00x**", "**0.50x!**"]


def test_goals_are_figures_of_their_own_cases() -> None:
    record = synthetic_record()
    win, loss = record["cases"]
    half = copy.deepcopy(win)
    half.update(dtype="bfloat16", popularity="distinct", rows=64, S=64)
    half["times"]["sgmv@2"]["q50"] = 5.0
    distinct = copy.deepcopy(half)
    distinct.update(dtype="float32")
    distinct["times"]["sgmv@2"]["q50"] = 12.0
    distinct["ratios"]["sgmv@2"]["by_segment"] = 4.0
    peak = copy.deepcopy(loss)
    peak.update(rows=2048, rank=64, flops=2_000_000)  # in 10 us: 0.2 of 5e11 a second
    record["cases"] += [half, distinct, peak]
    found = {goal.what: goal for goal in goals.goals(record)}
    against = found["float32 against numpy's segments"]
    assert (against.found, against.cases) == (pytest.approx(2.0**0.25), 4)
    assert found["distinct decode, of the read limit"].found == pytest.approx(0.5)
    assert found["segments of 2 to 8 rows, of the limit"].cases == 1
    assert found["bfloat16 against float32, distinct, over 8 MiB"].found == pytest.approx(2.4)
    assert found["2048 rows, identical, r = 64, of the FMA peak"].found == pytest.approx(0.4)
    assert found["2048 rows, uniform, r = 16, of the FMA peak"].found is None
    calls = [found[f"one call beyond its kernels, {how}"] for how in ("Segments", "from ids")]
    assert [(goal.found, goal.met) for goal in calls] == [(2.0, True), (6.0, False)]
    missed = sum(not goal.met for goal in found.values())
    assert goals.markdown(record).count("**missed**") == missed
    assert len(found) == len(goals.goals(record))


def test_full_record_goes_before_a_quick_one(tmp_path: Path) -> None:
    with pytest.raises(readme.StaleError, match="--record"):
        readme.primary(tmp_path)
    for name in ("quick-a.json", "full-b.json"):
        save(synthetic_record(), tmp_path / name)
    assert readme.primary(tmp_path)[0].name == "full-b.json"


def test_committed_readme_is_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    status = readme.main(["--check"])
    assert status == 0, capsys.readouterr().out


def test_command_line_from_gate_to_record(tmp_path: Path) -> None:
    # A bare environment of its own: the probe and the timings need the compiler.
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_DISABLE_JIT"}
    argv = ["--model", "Qwen2.5-7B", "--layer", "kv", "--rank", "8", "--rows", "1", "4"]
    done = subprocess.run(
        [
            sys.executable, "-m", "benchmarks", *argv, "--popularity", "skewed",
            "--threads", "1", "--no-figures", "--patience", "0", "--output", str(tmp_path),
        ],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    parts = ("gate: green", "ceiling, 1", "3584 > 512", "lost")
    order = [done.stdout.index(part) for part in parts]
    assert order == sorted(order)
    record = load(tmp_path / "quick.json")
    assert [case["rows"] for case in record["cases"]] == [1, 4]
    assert [case["popularity"] for case in record["cases"]] == [ONE_ROW, "skewed"]
    assert record["gate"]["corpus_cases"] > 30
    assert [path.name for path in tmp_path.iterdir()] == ["quick.json"]
