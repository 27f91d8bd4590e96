"""docs/engines.md shows what sgmv.layouts makes."""

from __future__ import annotations

from tests.help.engines_page import PAGE, blocks, rendered


def test_the_page_of_engines_is_fresh() -> None:
    """Remedy: python -m tests.help.engines_page."""
    page = PAGE.read_text()
    assert rendered(page) == page
    for name in blocks():
        assert f"<!-- {name}:begin -->" in page


def test_a_stale_page_is_seen() -> None:
    page = PAGE.read_text()
    assert "[0, 2, 3, 4, 5, 7, 8]" in page
    assert rendered(page.replace("[0, 2, 3, 4, 5, 7, 8]", "[0, 2, 3, 4, 5, 8, 8]")) == page
