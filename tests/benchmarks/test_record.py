"""A record holds what it should, survives saving, and is summed up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.machine import slug
from benchmarks.record import RecordError, check, load, save
from benchmarks.studies.grid.records import Record, case_label, summarise, without_noisy
from tests.help.benched import synthetic_record

pytestmark = pytest.mark.once


def test_a_record_to_commit_leaves_noisy_cases_out() -> None:
    record = synthetic_record()
    record.cases[0].foreign_cores = 0.5
    label = case_label(record.cases[0])
    quiet = without_noisy(record)
    assert len(quiet.cases) == len(record.cases) - 1
    assert quiet.untimed[label] == "other processes ran meanwhile"
    assert label not in record.untimed
    check(quiet)


def test_summary_counts_losses_and_names_the_worst_case() -> None:
    lines = {line.popularity: line for line in summarise(synthetic_record(), "sgmv@2")}
    assert set(lines) == {"all", "uniform", "identical"}
    everything = lines["all"]
    assert (everything.cases, everything.losses) == (2, 1)
    assert everything.geomean == pytest.approx(1.0)
    assert (everything.worst, everything.best) == (0.5, 2.0)
    assert everything.worst_case == "4096>14336 r=16 n=256 identical"
    assert lines["uniform"].losses == 0


@pytest.mark.parametrize(
    ("cpu", "name"),
    [
        ("AMD EPYC", "amd-epyc-2c"),
        ("Intel(R) Xeon(R) Processor", "intel-xeon-processor-2c"),
        ("Intel(R) Core(TM) i7-8700K CPU @ 3.70GHz", "intel-core-i7-8700k-cpu-3-70ghz-2c"),
    ],
)
def test_a_records_file_is_named_after_the_cpu(cpu: str, name: str) -> None:
    facts = synthetic_record().machine
    assert slug(msgspec.structs.replace(facts, cpu=cpu, cores=2)) == name


def test_record_survives_saving(tmp_path: Path) -> None:
    record = synthetic_record()
    save(record, tmp_path / "sub" / "r.json")
    assert load(Record, tmp_path / "sub" / "r.json") == record


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("seed",), "0", r"Expected `int`, got `str` - at `\$\.seed`"),
        (("schema",), 1, r"record\.schema: expected 2, got 1"),
        (("cases", 0, "S"), 8.5, r"Expected `int`, got `float` - at `\$\.cases\[0\]\.S`"),
        (("cases", 0, "times", "sgmv@2", "q50"), float("nan"), r"Expected `float`, got `null`"),
        (
            ("cases", 1, "ratios"),
            [],
            r"Expected `object`, got `array` - at `\$\.cases\[1\]\.ratios`",
        ),
        (("machine", "cpu"), None, r"Expected `str`, got `null` - at `\$\.machine\.cpu`"),
        (("surplus",), 1, r"unknown field `surplus`"),
    ],
)
def test_records_that_break_the_schema_are_refused(
    path: tuple[Any, ...], value: Any, message: str, tmp_path: Path
) -> None:
    record: Any = msgspec.to_builtins(synthetic_record())
    *parents, last = path
    inner = record
    for key in parents:
        inner = inner[key]
    inner[last] = value
    (tmp_path / "r.json").write_text(msgspec.json.encode(record).decode())
    with pytest.raises(RecordError, match=rf"r\.json.*{message}.*python -m benchmarks"):
        load(Record, tmp_path / "r.json")
