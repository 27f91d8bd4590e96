"""The benchmark of vLLM's calls times two forms of the same thing, and says what it found."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import batch, machine, pages
from benchmarks.clock import Budget
from benchmarks.machine import Commit
from benchmarks.record import RecordError, load, save
from benchmarks.studies import compat
from benchmarks.studies.compat import CompatCase, CompatRecord
from sgmv.tensors import as_array
from tests.help.benched import times
from tests.help.planting import run_python

pytestmark = pytest.mark.once
ONE_CALL = Budget(rounds=1, turn_s=0.0)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("H", 24), ("RANK", 2), ("QKV", (24, 5, 5)), ("MOST_LORAS", 5), ("LEAST_SETTLE_S", 0.0)
    ):  # fmt: skip
        monkeypatch.setattr(compat, name, value)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(("library", "dtype"), batch.KINDS)
def test_both_forms_compute_the_same(library: str, dtype: str) -> None:
    pytest.importorskip(library)
    A, B = compat.stacks(library, dtype)
    o = compat.operands(library, dtype, A, B, np.array([3, 0, 3, 1, 0]))
    compat.check(o)
    for name, both in compat.forms(o).items():
        results = []
        for form in ("vllm", "sgmv"):
            as_array("y", o.y)[:] = 1
            as_array("v", o.v)[:] = 0.5
            both[form]()
            results.append([as_array("y", each).astype("f") for each in (o.y, o.v)])
        # vLLM's form rounds the weights' products and v to y's type: two units of it, at size 4.
        slack = 2**-5 if dtype == "bfloat16" else 2**-20
        for theirs, ours in zip(*results, strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=slack, atol=slack, err_msg=name)


@pytest.mark.usefixtures("narrow")
def test_cases_are_of_the_batches_they_name() -> None:
    found = compat.measure("numpy", "float32", (1, 4, 9), ("shrink", "qkv"), ONE_CALL)
    assert [(c.call, c.rows, c.popularity, c.S) for c in found if c.rows != 4] == [
        ("shrink", 1, "distinct", 1), ("qkv", 1, "distinct", 1),
        ("shrink", 9, "uniform", 3), ("qkv", 9, "uniform", 3),
        ("shrink", 9, "skewed", 5), ("qkv", 9, "skewed", 5),
        ("shrink", 9, "identical", 1), ("qkv", 9, "identical", 1),
    ]  # fmt: skip
    assert all(set(case.times) == {"vllm", "sgmv"} for case in found)


@pytest.mark.usefixtures("narrow")
def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(compat.vllm.PunicaWrapper):
        def add_lora_linear(self, y: Any, *args: Any, **kwargs: Any) -> None:
            super().add_lora_linear(y, *args, **kwargs)
            y[-1, -1] += 1

    monkeypatch.setattr(compat.vllm, "PunicaWrapper", Wrong)
    with pytest.raises(AssertionError, match=r"1 of .* elements wrong"):
        compat.measure("numpy", "float32", (4,), ("shrink",), ONE_CALL)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not say")
def test_peak_memory_is_that_of_the_call() -> None:
    """In a process of its own: what else one like this does meanwhile was seen to count, too."""
    program = (
        "import numpy as np\nfrom benchmarks.studies import compat\nsize = 48 << 20\n"
        "def allocate():\n    np.ones(size, np.uint8).sum()\n"
        "allocate()\n"
        "for _ in range(2):\n"  # what an earlier call freed does not count
        "    print(compat.peak_bytes(allocate) - size)\n"
        "print(compat.peak_bytes(lambda: None))\n"
    )
    found = run_python(program).stdout.split()
    assert len(found) == 3
    assert all(abs(int(beyond)) < 2 << 20 for beyond in found), found


def case(call: str, rows: int, popularity: str, vllm_us: float, mib: int) -> CompatCase:
    peaks = {"vllm": mib << 20, "sgmv": 0}
    both = {"vllm": times(vllm_us), "sgmv": times(10.0)}
    return CompatCase("numpy", "float32", call, rows, popularity, 1, both, peaks, 0.0)


def record() -> CompatRecord:
    return CompatRecord(
        1, "2026-01-02T03:04:05+00:00", Commit("0123456789abcdef", False), machine.machine(),
        {"python": "3"}, 1.0, threads=2, h=4096, rank=16, qkv=[1], weights="hot",
        cases=[
            case("shrink", 8, "uniform", 40.0, 3),
            case("shrink", 8, "skewed", 90.0, 5),
            case("qkv", 8, "uniform", 5.0, 7),
        ],
    )  # fmt: skip


def test_the_table_has_means_worst_and_memory() -> None:
    lines = compat.page(record(), "").splitlines()
    assert lines[-4:-2] == [
        f"| shrink | 8 | {math.sqrt(36):.3g}x (4x) | 5.0 and 0.0 |",
        "| qkv | 8 | 0.5x (0.5x) | 7.0 and 0.0 |",
    ]
    assert lines[-1] == "Below 5x from 64 rows on: none."


def test_what_is_below_the_goal_is_told_with_its_reading() -> None:
    found = record()
    slow, wide = case("expand", 64, "distinct", 49.0, 3), case("qkv", 64, "uniform", 40.0, 3)
    found.cases += [slow, wide, case("shrink", 64, "skewed", 50.0, 3)]
    # 16 ranks of 4096 float32, and of one slice more than 4096, in 10 us.
    assert compat.page(found, "").splitlines()[-1] == (
        "Below 5x from 64 rows on: numpy float32 expand, 64 distinct rows: 4.9x, 0.262 MB of "
        "weights at 26 GB/s; numpy float32 qkv, 64 uniform rows: 4x, 0.262 MB of weights at 26 "
        "GB/s."
    )


def test_a_record_is_saved_as_it_was_and_anything_else_refused(tmp_path: Path) -> None:
    path = tmp_path / "compat.json"
    save(record(), path)
    assert load(CompatRecord, path) == record()
    path.write_text(path.read_text().replace('"rank": 16', '"rank": "16"'))
    with pytest.raises(RecordError, match="Expected `int`"):
        load(CompatRecord, path)


def test_the_page_shows_the_first_record(tmp_path: Path) -> None:
    with pytest.raises(pages.StaleError, match="no record"):
        pages.tables(tmp_path)
    assert compat.STUDY.shown(tmp_path) is None
    save(record(), tmp_path / "compat-here.json")
    assert compat.STUDY.shown(tmp_path) == (tmp_path / "compat-here.json", record())
    with pytest.raises(pages.StaleError, match="no record for summary"):  # none of the other kind
        pages.tables(tmp_path)


@pytest.mark.usefixtures("narrow")
def test_command_prints_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compat, "BUDGET", ONE_CALL)
    monkeypatch.setattr(batch, "KINDS", batch.KINDS[:1])
    words = ["compat", "--rows", "2", "--calls", "expand", "--output", str(tmp_path)]
    assert command.main(words) == 0
    assert re.search(r"^expand +2 ", capsys.readouterr().out, re.M)
    assert len(load(CompatRecord, tmp_path / "compat.json").cases) == 4
    with pytest.raises(SystemExit, match="--record"):
        command.main([*words, "--record"])
