"""Growth is measured over the batches it names, and the fit says what the points say."""

from pathlib import Path

import numpy as np
import pytest

import sgmv
from benchmarks import __main__ as command
from benchmarks import machine, pages
from benchmarks import record as records
from benchmarks.clock import Budget
from benchmarks.figures import draw
from benchmarks.machine import Commit
from benchmarks.record import RecordError, Times, load, save
from benchmarks.registry import STUDIES
from benchmarks.studies import growth
from benchmarks.studies.growth import GrowthRecord, PointRecord, SeriesRecord
from benchmarks.text import Console
from tests.help.benched import must_not_run, synthetic_record

pytestmark = pytest.mark.once


ONE_CALL = Budget(rounds=1, turn_s=0.0)
SIZES = [1, 2, 4, 8, 16, 32, 64, 128]


def test_fit_finds_a_line_and_its_worst_point() -> None:
    found = growth.fit(SIZES, [10 + 3 * n for n in SIZES])
    assert (found.a, found.b) == (pytest.approx(10), pytest.approx(3))
    assert found.deviation == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(found.at(np.array([5, 7])), [25, 31])
    off = [10.0 + 3 * n for n in SIZES]
    off[3] *= 1.5
    assert 0.2 < growth.fit(SIZES, off).deviation < 0.4


def test_fit_minimises_the_relative_error() -> None:
    """A large point must not drown the small ones: absolute least squares would miss a wholly."""
    times = [10.0 + 3 * n for n in SIZES]
    times[-1] *= 1.1
    absolute = np.polyfit(SIZES, times, 1)[1]
    found = growth.fit(SIZES, times)
    assert abs(found.a - 10) < 0.5 < abs(absolute - 10)

    def loss(a: float, b: float) -> float:
        return sum(((a + b * n - t) / t) ** 2 for n, t in zip(SIZES, times, strict=True))

    best = loss(found.a, found.b)
    for a, b in ((0.01, 0.0), (-0.01, 0.0), (0.0, 0.01), (0.0, -0.01)):
        assert best < loss(found.a + a, found.b + b)


def test_slope_is_that_of_the_large_end() -> None:
    assert growth.fit(SIZES, [7.0] * len(SIZES)).slope == pytest.approx(0, abs=1e-9)
    assert growth.fit(SIZES, [n**2.0 for n in SIZES]).slope == pytest.approx(2)
    bent = [5.0 if n < 16 else 5.0 * n / 16 for n in SIZES]
    assert growth.fit(SIZES, bent).slope == pytest.approx(1)
    assert growth.fit([1, 100], [1.0, 10.0]).slope == pytest.approx(0.5)


def test_fit_refuses_what_determines_no_line() -> None:
    with pytest.raises(ValueError, match=r"two different values or more, got \[3\]"):
        growth.fit([3, 3], [1.0, 1.0])


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("H_IN", 24), ("H_OUT", 8), ("RANK", 2), ("DISTINCT_WEIGHTS", 3)):
        monkeypatch.setattr(growth, name, value)


@pytest.mark.usefixtures("narrow")
def test_curves_are_of_the_batches_they_name() -> None:
    found = {s.name: growth.measure(s, 1, ONE_CALL) for s in growth.curves(9, (1, 64, 100))}
    points = {
        name: [(p.n, p.rows, p.S, p.loaded) for p in series.points]
        for name, series in found.items()
    }
    assert points == {
        "rows, one adapter": [(n, n, 1, 1) for n in (1, 2, 4, 8, 9)],
        "rows, sqrt(n) adapters": [
            (1, 1, 1, 3), (2, 2, 2, 3), (4, 4, 2, 3), (8, 8, 3, 3), (9, 9, 3, 3)
        ],
        "adapters loaded, 1 row": [(n, 1, 1, n) for n in (1, 64, 100)],
        "adapters loaded, 64 rows": [(n, 64, 64, n) for n in (64, 100)],
        "adapters, a row each": [(n, n, n, 100) for n in (1, 2, 4, 8, 16, 32, 64, 100)],
    }  # fmt: skip
    assert {series.axis for series in found.values()} == {"rows", "adapters"}
    assert [s.name for s in growth.curves(2, (1, 4))] == [
        "rows, one adapter", "rows, sqrt(n) adapters", "adapters loaded, 1 row",
        "adapters, a row each",
    ]  # fmt: skip


@pytest.mark.usefixtures("narrow")
def test_adapters_have_memory_of_their_own() -> None:
    table = growth.make_stack(7).table
    step = 4 * growth.RANK * growth.H_IN
    assert (np.diff(np.sort(table.wa_address)) >= step).all()


@pytest.mark.usefixtures("narrow")
def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    (series, *_) = growth.curves(4, (1, 4))
    monkeypatch.setattr(growth, "time_quietly", must_not_run)
    monkeypatch.setattr(sgmv, "add_lora", lambda y, x, stack, ids: y)
    with pytest.raises(AssertionError, match=r"1 adapters, 1 rows: .* elements wrong"):
        growth.measure(series, 1, ONE_CALL)


def synthetic_growth() -> GrowthRecord:
    """Two curves: 10 + 3 n, and one that does not grow but for a last point of twice the time."""

    def points(times: list[float]) -> list[PointRecord]:
        return [
            PointRecord(n, n, 1, 1, Times(t * 0.9, t, t * 1.1, 5))
            for n, t in zip(SIZES, times, strict=True)
        ]

    line, flat = points([10.0 + 3 * n for n in SIZES]), points([5.0] * 7 + [10.0])
    return GrowthRecord(
        1, "2025-01-01T00:00:00+00:00", Commit("0" * 40, False), machine.machine(),
        machine.versions(), 1.0, threads=2, h_in=1024, h_out=1024, rank=16, dtype="float32",
        weights="hot",
        series=[
            SeriesRecord("rows, one adapter", "rows", 0.0, line),
            SeriesRecord("loaded", "adapters", None, flat),
        ],
    )  # fmt: skip


def test_table_tells_the_fit_and_the_ratio_of_the_ends(capsys: pytest.CaptureFixture[str]) -> None:
    record = synthetic_growth()
    line, flat = growth.tables(record)[0].rows
    assert line == ["rows, one adapter", "1..128", "10", "3", "0%", "0.92", "30.3"]
    assert (flat[0], flat[-1]) == ("loaded", "2")
    growth.STUDY.show(record, Console())
    quiet = capsys.readouterr().out
    assert max(map(len, quiet.splitlines())) <= 100
    assert "WARNING" not in quiet
    record.series[0].foreign_cores = 0.5
    growth.STUDY.show(record, Console())
    assert "WARNING: other processes ran during 1 cases: rows, one adapter" in (
        capsys.readouterr().out
    )


def test_growth_record_survives_saving_and_is_checked(tmp_path: Path) -> None:
    record = synthetic_growth()
    path = tmp_path / "growth-x.json"
    save(record, path)
    assert load(GrowthRecord, path) == record
    assert path.read_text().count("\n") > 2 * len(SIZES)  # a point has a line
    record.series[1].points[2].times.q50 = float("nan")
    with pytest.raises(RecordError, match=r"`float`, .*series\[1\]\.points\[2\]\.times\.q50"):
        save(record, path)
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 9'))
    with pytest.raises(RecordError, match=r"growth-x\.json.*expected 1, got 9.*benchmarks growth"):
        load(GrowthRecord, path)


def test_growth_figure_is_stale_once_its_record_changes(tmp_path: Path) -> None:
    record, main = synthetic_growth(), synthetic_record()
    save(main, tmp_path / "quick-x.json")
    draw(STUDIES["grid"].figures, main, tmp_path)
    assert pages.stale_figures(tmp_path) == []
    save(record, tmp_path / "growth-x.json")
    assert pages.stale_figures(tmp_path) == ["growth.png"]
    (path,) = draw(growth.STUDY.figures, record, tmp_path)
    assert path.stat().st_size > 10_000
    assert pages.stale_figures(tmp_path) == []
    record.seconds = 2.0
    save(record, tmp_path / "growth-x.json")
    assert pages.stale_figures(tmp_path) == ["growth.png"]


def test_readme_does_not_take_growth_for_timings(tmp_path: Path) -> None:
    save(synthetic_growth(), tmp_path / "growth-x.json")
    assert STUDIES["grid"].shown(tmp_path) is None
    save(synthetic_record(), tmp_path / "quick-x.json")
    path, _ = STUDIES["grid"].shown(tmp_path) or pytest.fail("no record")
    assert path.name == "quick-x.json"


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("foreign", [0.0, 0.9])
def test_command_records_only_what_was_quiet(
    foreign: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def quick(series: growth.Series, threads: int) -> growth.SeriesRecord:
        found = measure(series, threads, ONE_CALL)
        found.foreign_cores = foreign
        return found

    measure = growth.measure
    monkeypatch.setattr(growth, "measure", quick)
    monkeypatch.setattr(growth, "MOST_ROWS", 4)
    monkeypatch.setattr(growth, "LOADED", (1, 64, 128))
    monkeypatch.setattr(records, "RECORDS", tmp_path / "records")
    argv = ["growth", "--record", "--threads", "1", "--output", str(tmp_path / "out")]
    assert command.main(argv) == 0
    printed = capsys.readouterr().out
    assert "t(last) / t(first)" in printed
    assert ("not recorded" in printed) == (foreign > 0)
    (folder,) = [path.name for path in tmp_path.iterdir()]
    assert folder == ("out" if foreign else "records")
    (path,) = (tmp_path / folder).glob("growth*.json")
    assert load(GrowthRecord, path).rank == 2
