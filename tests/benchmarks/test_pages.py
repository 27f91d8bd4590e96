"""The pages' tables and figures follow the committed records."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import pages
from benchmarks import record as records
from benchmarks.figures import draw
from benchmarks.record import save
from benchmarks.registry import DEFAULT, STUDIES
from benchmarks.studies.grid import readme
from benchmarks.studies.grid.records import Record
from tests.help.benched import MARKED, synthetic_record

pytestmark = pytest.mark.once


def rendered(text: str, record: Record) -> str:
    """README.md as the grid's tables make it."""
    parts = {
        key: make(record, "r.json")
        for (page, key), make in DEFAULT.pages.items()
        if page == "README.md"
    }
    return pages.rendered("README.md", text, parts)


def test_readme_tables_follow_the_record() -> None:
    record = synthetic_record()
    text = rendered(MARKED, record)
    row = "| numpy per segment | 2 | **1.00x** | 0.50x! | 2.00x | 1 of 2 | 2.00x | 0.50x! |"
    assert row in text.splitlines()
    assert "old" not in text
    assert text.startswith("# x\n")
    assert text.endswith("after\n")
    assert rendered(text, record) == text
    record.cases[0].ratios["sgmv@2"]["by_segment"] = 3.0
    assert rendered(text, record) != text


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
    with pytest.raises(pages.StaleError, match=message):
        rendered(text, synthetic_record())


def test_stale_tables_and_figures_are_found(tmp_path: Path) -> None:
    record = synthetic_record()
    assert rendered(MARKED, record) != MARKED
    fresh = rendered(MARKED, record)
    assert rendered(fresh, record) == fresh
    save(record, tmp_path / "quick-x.json")
    names = list(DEFAULT.figures)
    assert pages.stale_figures(tmp_path) == names
    paths = draw(DEFAULT.figures, record, tmp_path)
    assert [path.name for path in paths] == names
    assert all(path.stat().st_size > 10_000 for path in paths)
    assert pages.stale_figures(tmp_path) == []
    record.seed = 1
    save(record, tmp_path / "quick-x.json")
    assert pages.stale_figures(tmp_path) == names


def test_a_stale_page_or_figure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And written anew, but for the words around its tables."""
    for name in sorted({page for study in STUDIES.values() for page, _ in study.pages}):
        page = tmp_path / name
        page.parent.mkdir(exist_ok=True)
        page.write_text((records.ROOT / name).read_text().replace("| numpy per", "| mumpy per"))
    monkeypatch.setattr(records, "ROOT", tmp_path)
    assert pages.main(["--check"]) == 1
    assert (
        "README.md, docs/kernels.md: stale; run python -m benchmarks pages"
        in capsys.readouterr().out
    )
    assert pages.main([]) == 0
    assert "| numpy per segment |" in (tmp_path / "README.md").read_text()
    assert pages.main(["--check"]) == 0


def test_float_types_get_a_table_each() -> None:
    """A ratio in bfloat16 says nothing of float32: neither table counts the other's cases."""
    record = synthetic_record()
    record.cases[1].dtype = "bfloat16"
    table = readme.summary_table(record, "r.json").splitlines()
    wins = [line for line in table if line.startswith("| numpy per segment | 2 |")]
    assert [line.split(" | ")[2] for line in wins] == ["**2.00x**", "**0.50x!**"]


def test_full_record_goes_before_a_quick_one(tmp_path: Path) -> None:
    with pytest.raises(pages.StaleError, match="--record"):
        pages.tables(tmp_path)
    for name in ("quick-a.json", "full-b.json"):
        save(synthetic_record(), tmp_path / name)
    path, _ = DEFAULT.shown(tmp_path) or pytest.fail("no record")
    assert path.name == "full-b.json"


def test_committed_readme_is_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    status = pages.main(["--check"])
    assert status == 0, capsys.readouterr().out
