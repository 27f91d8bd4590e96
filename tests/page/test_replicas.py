"""The page of `sgmv simulate --replicas --page` in a browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sgmv.serving import Failure, Placement, ReplicasOutcome, draw_trace, simulate_replicas
from sgmv.serving.page import shown, write_page
from sgmv.serving.report import figures
from tests.help.chromium import Page, opened
from tests.help.explored import BEYOND, examined, needs_chromium, text

pytestmark = [pytest.mark.once, needs_chromium]
LOOKS = ("faint_texts", "faint_labels", "overlaps")


def outcomes() -> list[ReplicasOutcome]:
    trace = draw_trace(4_000, 500, 60.0, arrivals="flash-crowd")
    failures = [Failure(1, 20, 30)]
    return [
        simulate_replicas(trace, 4, Placement(rule), failures=failures)
        for rule in ("random", "rendezvous", "ray")
    ]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "replicas.html"
    made = outcomes()
    asked = {"rate": 60.0, "arrivals": "flash-crowd"}
    return write_page(path, made, list(map(figures, made)), asked).as_uri()


@pytest.fixture
def replicas(page: Page, address: str) -> Iterator[Page]:
    yield from opened(page, address)


def show(page: Page, which: int) -> None:
    page.evaluate(f"document.querySelectorAll('#outcomes button')[{which}].click()")


def test_it_tells_what_was_simulated(replicas: Page) -> None:
    assert text(replicas, "arguments") == "rate 60 · arrivals flash-crowd"
    rows = replicas.evaluate("document.querySelectorAll('#outcomes tbody tr').length")
    assert rows == 3
    assert "random" in text(replicas, "time-now")


def test_the_outcome_that_is_chosen_stays_in_the_address(replicas: Page, address: str) -> None:
    show(replicas, 2)
    assert "ray" in text(replicas, "time-now")
    assert replicas.evaluate("location.hash") == "#outcome=2"
    for end, expected in (("#outcome=1", "rendezvous"), ("#outcome=77", "random")):
        replicas.open("about:blank")
        replicas.open(address + end)
        assert expected in text(replicas, "time-now")


def test_its_figures_are_pythons(replicas: Page) -> None:
    told = json.loads(replicas.evaluate("JSON.stringify(DATA.outcomes)"))
    assert told == json.loads(json.dumps([shown(one, figures(one)) for one in outcomes()]))
    show(replicas, 1)
    replicas.evaluate("document.querySelector('details').open = true")
    cells = replicas.evaluate(
        "[...document.querySelectorAll('#served-table tbody tr')]"
        ".map((row) => row.cells[1].innerText)"
    )
    expected = [sum(row) for row in told[1]["served"]]
    assert [int(cell.replace(",", "")) for cell in cells] == expected
    bars = replicas.evaluate("document.querySelectorAll('#served rect').length")
    assert bars == 4 * len(told[1]["served"][0])


@pytest.mark.parametrize("width", [1280, 800, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read(replicas: Page, width: int, dark: bool) -> None:
    replicas.view(width, dark=dark)
    for which in range(3):
        show(replicas, which)
        assert examined(replicas, *LOOKS) == {}
        assert replicas.evaluate(BEYOND) == []
        wide = replicas.evaluate("document.documentElement.scrollWidth")
        assert wide <= width


def test_it_can_be_looked_at(replicas: Page, tmp_path: Path) -> None:
    replicas.screenshot(tmp_path / "replicas.png")
    assert (tmp_path / "replicas.png").read_bytes().startswith(b"\x89PNG")
