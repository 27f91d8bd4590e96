"""The pages' tables and figures follow the committed records."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import figures, readme
from benchmarks.record import save
from tests.help.benched import MARKED, synthetic_record

pytestmark = pytest.mark.once


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


def test_full_record_goes_before_a_quick_one(tmp_path: Path) -> None:
    with pytest.raises(readme.StaleError, match="--record"):
        readme.primary(tmp_path)
    for name in ("quick-a.json", "full-b.json"):
        save(synthetic_record(), tmp_path / name)
    assert readme.primary(tmp_path)[0].name == "full-b.json"


def test_committed_readme_is_fresh(capsys: pytest.CaptureFixture[str]) -> None:
    status = readme.main(["--check"])
    assert status == 0, capsys.readouterr().out
