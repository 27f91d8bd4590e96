"""The study of a store times steps whose rows are right, and says what was read meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sgmv
from benchmarks import __main__ as command
from benchmarks.engine import TINY
from benchmarks.record import load, made
from benchmarks.studies import store
from benchmarks.studies.store import Index, StoreCase, StoreRecord
from sgmv.serving import AdapterStore
from tests.help.benched import must_not_run

pytestmark = pytest.mark.once


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("SHAPE", TINY), ("RANK", 2), ("REQUESTS", 3), ("HOSTED", 4), ("POOL", 7), ("ROUNDS", 2),
        ("STEPS", 9),
    ):  # fmt: skip
        monkeypatch.setattr(store, name, value)


def words(tmp_path: Path) -> list[str]:
    folders = ["--output", str(tmp_path), "--tiny", str(tmp_path / "tiny")]
    return ["store", "--threads", "1", "--adapters", "20", *folders]


@pytest.mark.usefixtures("narrow")
def test_every_kind_of_step_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(words(tmp_path)) == 0
    record = load(StoreRecord, tmp_path / "store.json")
    assert [case.name for case in record.cases] == list(store.KINDS)
    assert {case.steps for case in record.cases} == {18}
    of = {case.name: case for case in record.cases}
    assert all(0 < case.p50 <= case.p99 for case in record.cases)
    assert [bool(of[kind].first_row) for kind in store.KINDS] == [False, False, True, True]
    assert sum(case.loaded for case in record.cases) >= 2 * 3
    assert record.index.adapters == 20
    modules = TINY.modules().values()
    assert record.adapter_bytes == sum(4 * 2 * (h_in + h_out) for h_in, h_out in modules)
    assert len(record.resident) > 1
    assert "p99 / still" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"store.json", "tiny", "tiny-index.json"}
    assert command.main(words(tmp_path)) == 0  # the folder stays
    assert "writing" not in capsys.readouterr().out


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("fault", ["another adapter", "a wrong row"])
def test_what_is_wrong_is_not_timed(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if fault == "another adapter":
        read = AdapterStore.read
        monkeypatch.setattr(
            AdapterStore, "read", lambda self, path: read(self, path.rpartition("/")[0] + "/a0")
        )
    else:
        add_lora = sgmv.add_lora

        def wrong(y: Any, *operands: Any) -> Any:
            add_lora(y, *operands)
            y[-1] += 1
            return y

        monkeypatch.setattr(sgmv, "add_lora", wrong)
    monkeypatch.setattr(store, "quietly", must_not_run)
    assert command.main(words(tmp_path)) == 1
    assert "RED, nothing was timed" in capsys.readouterr().out
    assert not (tmp_path / "store.json").exists()


@pytest.mark.usefixtures("narrow")
def test_a_store_with_damaged_adapters_is_not_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny" / "half").mkdir(parents=True)
    assert command.main(words(tmp_path)) == 1
    assert "1 damaged" in capsys.readouterr().out


def test_ratios_are_to_steps_that_are_still() -> None:
    def case(name: str, p50: float, p99: float, first_row: list[float]) -> StoreCase:
        return StoreCase(name, 100, 25, p50, p99, [p99], first_row, 0.0)

    cases = [case("still", 10, 12, []), case("joins", 11, 15, [30, 41.26])]
    index = Index(100_000, 31.4, 0.81, 9_000_000, 30_000_000)
    fields = {
        "threads": 2, "adapter_bytes": 2_300_000, "index": index,
        "resident": {"16": 500_000_000, "55": 502_000_000, "300": 501_000_000}, "cases": cases,
    }  # fmt: skip
    record = made(StoreRecord, 0.0, (), fields)
    [table] = store.tables(record)
    assert table.rows[1][1:] == [
        "100", "25", "11.00", "15.00", "1.10x", "1.25x", "30.0", "41.3"
    ]  # fmt: skip
    assert "made in 31.4 s, again in 0.81 s" in table.notes[0]
    assert "500 MB after 16 adapters were read, 501 to 502 MB after 55 to 300" in table.notes[1]
    text = store.page(record, "store-here.json")
    assert "| joins | 100 | 25 | 11.00 | 15.00 | 1.10x | 1.25x | 30.0 | 41.3 |" in text
    assert "store-here.json" in text


def test_quantiles_are_of_all_rounds() -> None:
    rounds = [([int(1e6)] * 98, [], 3), ([int(3e6), int(5e6)], [int(7e6)], 4)]
    found = store.case("joins", rounds, 0.1)
    assert (found.steps, found.loaded, found.p50, found.first_row) == (100, 7, 1.0, [7.0, 7.0])
    assert found.p99 == round(float(np.quantile([1.0] * 98 + [3.0, 5.0], 0.99)), 3)
