"""Punica's figures are counted by its formulas, and what is wrong is never timed."""

import re
from pathlib import Path

import numpy as np
import pytest

import sgmv
from benchmarks import __main__ as command
from benchmarks import machine
from benchmarks.record import RecordError, load
from benchmarks.studies import paper
from benchmarks.studies.paper import PaperRecord
from tests.help.benched import must_not_run

pytestmark = pytest.mark.once

COUNTS = ["--counts", "--rows", "1", "64"]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer small enough to be timed within a test."""
    for name, value in (("LAYER", (96, 40)), ("ROWS", (1, 2)), ("FLUSHED", 1 << 12)):
        monkeypatch.setattr(paper, name, value)


def test_the_axis_is_the_papers_formula() -> None:
    points = paper.axis()
    assert len(points) == len(paper.POPULARITIES) * len(paper.ROWS)
    for point in points:
        n, S, (h_in, h_out) = point.n, point.S, paper.AXIS
        assert point.flops == 2 * n * h_in * h_out
        assert point.io_bytes == (n * (h_in + h_out) + S * h_in * h_out) * 2
        assert point.limit == "memory"
    distinct = [p for p in points if p.popularity == "distinct"]
    assert {round(p.intensity, 2) for p in distinct} == {0.94}
    assert max(round(p.intensity, 1) for p in points) == 12.8


@pytest.mark.parametrize("popularity", paper.POPULARITIES)
@pytest.mark.parametrize("rank", paper.RANKS)
def test_counts_are_those_of_segments(popularity: str, rank: int) -> None:
    point = paper.counted(popularity, 16, rank)
    ids = paper.popularity_ids(popularity, 16, seed=0)
    total = sgmv.segment(ids).stats(*paper.LAYER, rank).total
    assert point.flops == total.flops
    assert point.io_bytes == total.bytes_read + total.bytes_written
    assert point.intensity == total.intensity


@pytest.mark.usefixtures("narrow")
def test_each_case_is_timed_as_often_as_asked() -> None:
    points = [paper.counted(kind, n, r) for r in (8, 16) for kind in ("distinct",) for n in (1, 2)]
    done: list[str] = []
    timed = paper.measure(points, 1, 2, done.append)
    assert len(done) == len(timed) == 4
    for point in timed:
        times = point.times
        assert times is not None
        assert times.calls == 2
        assert 0 < times.q20 <= times.q50 <= times.q80


def test_weights_are_flushed_before_each_timed_call() -> None:
    log: list[str] = []
    paper.cold(lambda: log.append("call"), lambda: log.append("flush"), 3)
    assert log == ["call", *["flush", "call"] * 3]


@pytest.mark.usefixtures("narrow")
def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_one(y: np.ndarray, *_: object) -> np.ndarray:
        y += 1
        return y

    monkeypatch.setattr(sgmv, "add_lora", off_by_one)
    monkeypatch.setattr(paper, "cold", must_not_run)
    with pytest.raises(AssertionError, match="elements wrong"):
        paper.measure([paper.counted("distinct", 2, 8)], 1, 1, must_not_run)


def test_counts_alone_are_printed_beside_the_paper(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper, "measure", must_not_run)
    assert command.main(["paper", *COUNTS, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^identical +64 +1 .* 12\.76 ", shown, re.M)
    assert re.search(r"^16 +distinct +64 +64 .* 116, 75 +- ", shown, re.M)
    assert re.search(r"^64 +distinct +64 +64 .* 118 +- ", shown, re.M)
    record = load(PaperRecord, tmp_path / "paper.json")
    assert {point.times for point in record.points} == {None}
    assert (tmp_path / "paper.png").stat().st_size > 10_000
    path = tmp_path / "paper.json"
    path.write_text(path.read_text().replace('"axis": [', '"axis": [1,'))
    with pytest.raises(RecordError, match=r"axis\[0\].*benchmarks paper"):
        load(PaperRecord, path)


@pytest.mark.usefixtures("narrow")
def test_times_beside_other_processes_are_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "foreign_cores", lambda *_: 0.7)
    options = ["--rows", "1", "--ranks", "16", "--repeats", "1", "--threads", "1"]
    assert paper.STUDY.main([*options, "--output", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "WARNING: other processes ran during 4 cases" in shown
    assert re.search(r"^16 +distinct .* \?\d+ ", shown, re.M)


@pytest.mark.usefixtures("narrow")
def test_a_timed_run_draws_all_panels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rows", "1", "--ranks", "16", "--repeats", "2", "--threads", "1"]
    assert paper.STUDY.main([*options, "--output", str(tmp_path)]) == 0
    record = load(PaperRecord, tmp_path / "paper.json")
    assert record.threads == 1
    assert record.machine == machine.machine()
    figure = paper.figure(record)
    assert len(figure.axes) == 3
    assert "1.0x" in capsys.readouterr().out


def test_what_the_paper_prints_is_all_shown() -> None:
    """Each printed number stands in the table exactly where its case does."""
    found = {
        (kind, n, rank): paper.printed(paper.counted(kind, n, rank))
        for kind in paper.POPULARITIES
        for n in (1, 64)
        for rank in paper.RANKS
    }
    assert {key: text for key, text in found.items() if key[2] != 16 and text != "-"} == {
        ("distinct", 1, 8): "42", ("distinct", 64, 8): "72",
        ("distinct", 1, 32): "42", ("distinct", 64, 32): "89",
        ("distinct", 1, 64): "42", ("distinct", 64, 64): "118",
    }  # fmt: skip
    assert [found[kind, 64, 16] for kind in paper.POPULARITIES] == ["116, 75", "46", "46", "40"]
