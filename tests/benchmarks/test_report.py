"""The report's file: what it holds of the records, and what is refused before it is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import record
from benchmarks.__main__ import main
from benchmarks.record import RECORDS, RecordError
from benchmarks.registry import DEFAULT, STUDIES
from benchmarks.report import write
from benchmarks.studies.grid.figures import roofs
from benchmarks.studies.grid.records import Record
from tests.help.reported import FOLDER, MACHINE, OTHER, other_machine, records_folder

pytestmark = pytest.mark.once


def data_of(page: Path) -> Any:
    found = re.search(r'id="data">(.*?)</script>', page.read_text())
    assert found
    return json.loads(found[1])


def test_the_file_needs_nothing_else(tmp_path: Path) -> None:
    text = write.write(tmp_path / "report.html", [record.RECORDS]).read_text()
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<link[^>]+stylesheet|<script[^>]+src=|@import|url\((?!#)", text)
    assert "default-src 'none'" in text
    assert len(text) < 2_000_000


def test_every_committed_record_is_in_the_page(tmp_path: Path) -> None:
    data = data_of(write.write(tmp_path / "report.html", [record.RECORDS]))
    assert [each["name"] for each in data["records"]] == sorted(
        path.stem for path in record.RECORDS.glob("*.json")
    )
    for each in data["records"]:
        study = STUDIES[each["study"]]
        found = record.load(study.record, record.RECORDS / f"{each['name']}.json")
        shown = [
            (table.head, table.rows, table.left, list(table.notes)) for table in study.tables(found)
        ]
        in_page = [
            tuple(t[name] for name in ("head", "rows", "left", "notes")) for t in each["tables"]
        ]
        assert in_page == shown
        assert bool(each["grid"]) == (study is DEFAULT)
        assert bool(each["growth"]) == (study.name == "growth")


def before_intervals(found: Record) -> Record:
    """As a record was before it kept rounds."""
    plain = msgspec.to_builtins(found)
    for case in plain["cases"]:
        for times in case["times"].values():
            times.pop("rounds", None)
    return msgspec.convert(plain, Record)


def test_every_case_of_the_grid_is_in_the_page_with_its_figures(tmp_path: Path) -> None:
    [path] = record.RECORDS.glob("full-*.json")
    committed = record.load(Record, path)
    older = before_intervals(committed)
    for found in (committed, other_machine(), older):
        grid = json.loads(json.dumps(write.grid(found)))
        assert len(grid["cases"]) == len(found.cases)
        for packed, case in zip(grid["cases"], found.cases, strict=True):
            assert packed[:2] == [case.h_in, case.h_out]
            assert grid["names"][packed[2]] == case.names
            assert packed[3:12] == [
                case.rank, case.rows, case.popularity, case.dtype, case.S, case.footprint,
                case.flops, case.foreign_cores, case.shares,
            ]  # fmt: skip
            for name, quantiles in zip(grid["variants"], packed[12], strict=True):
                times = case.times.get(name)
                assert quantiles == ([times.q20, times.q50, times.q80] if times else [])
            for variant, ratios in case.ratios.items():
                for peer, ratio in ratios.items():
                    interval = case.interval(variant, peer)
                    assert packed[13][variant][peer] == [ratio, *(interval or ())]
                    assert bool(interval) == (found is not older)
            assert {peer: grid["reasons"][why] for peer, why in packed[14].items()} == case.skipped
        for threads in map(str, found.threads):
            assert grid["roofs"][threads] == [list(roof) for roof in roofs(found, threads)]


def test_machines_are_told_apart_by_vendor_family_and_features(tmp_path: Path) -> None:
    folder = records_folder(tmp_path)
    data = data_of(write.write(tmp_path / "report.html", [folder]))
    [other] = [each for each in data["records"] if each["name"] == OTHER]
    machine = data["machines"][other["machine"]]
    assert (machine["vendor"], machine["family"]) == (MACHINE.vendor, MACHINE.family)
    assert machine["flags"] == MACHINE.flags
    committed = data_of(write.write(tmp_path / "committed.html", [RECORDS]))
    assert len(data["machines"]) == len(committed["machines"]) + 1
    assert sum(cores > data["quiet"] for cores in other["busy"]) == 1


def test_records_of_two_folders_keep_their_names_apart(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    [path] = record.RECORDS.glob("quick-*.json")
    (mine / path.name).write_text(path.read_text())
    names = [*write.found_in([record.RECORDS, mine])]
    assert {path.stem, f"{mine}/{path.stem}"} <= set(names)


def test_the_command_writes_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "report.html"
    assert main(["report", str(path), "--no-open"]) == 0
    assert capsys.readouterr().out == f"written: {path.as_uri()}\n"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "python -m benchmarks report" in capsys.readouterr().out


def test_refusals_come_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(SystemExit, match="--records: expected a folder of records"):
        main(["report", str(path), "--no-open", "--records", str(empty)])
    (empty / "growth.json").write_text('{"schema": 9}')
    with pytest.raises(SystemExit, match="python -m benchmarks growth"):
        main(["report", str(path), "--no-open", "--records", str(empty)])
    with pytest.raises(RecordError):
        write.found_in([empty])
    assert not path.exists()
    with pytest.raises(SystemExit, match="PATH: expected a file that can be written"):
        main(["report", str(tmp_path), "--no-open"])


def test_the_page_names_every_file_of_its_folder() -> None:
    text = (FOLDER / "page.html").read_text()
    named = set(re.findall(r'(?:href|src)="([\w.]+)"', text))
    assert named == {path.name for path in FOLDER.iterdir() if path.suffix in (".js", ".css")}
    for path in FOLDER.glob("*.js"):
        assert len(path.read_text().splitlines()) <= 450
