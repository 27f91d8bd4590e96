"""The benchmarks' report in a browser: sorting, filters, two records, the address, the looks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import record
from benchmarks.peers import PEERS
from benchmarks.record import made, save
from benchmarks.report.write import write
from benchmarks.studies.grid.records import CaseRecord, Record, by_dtype, case_label, summarise
from benchmarks.studies.instructions import InstructionsRecord, Loop
from benchmarks.text import microseconds, ratio_text
from tests.help.chromium import Page, opened
from tests.help.explored import BEYOND, choose, examined, needs_chromium, text
from tests.help.reported import MACHINE, OTHER, other_machine, records_folder

pytestmark = [pytest.mark.once, needs_chromium]

FILTERS = {
    "layer": ("4096>4096", lambda case: (case.h_in, case.h_out) == (4096, 4096)),
    "rank": ("64", lambda case: case.rank == 64),
    "rows": ("16", lambda case: case.rows == 16),
    "popularity": ("skewed", lambda case: case.popularity == "skewed"),
    "dtype": ("bfloat16", lambda case: case.dtype == "bfloat16"),
}
NAMES = "shown.cases.map(({ name }) => name)"
STATES: list[dict[str, str]] = [
    {},
    {"rows": "1", "threads": "1", "b": "nothing"},
    {"a": OTHER, "rank": "64", "popularity": "identical", "dtype": "float32"},
    {"machine": "1"},
]
LOOKS = ("faint_texts", "faint_labels", "faint_shapes", "overlaps", "wrong_numbers")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the committed records and those of another machine, as one page."""
    folder = records_folder(tmp_path_factory.mktemp("records"))
    return write(folder / "report.html", [folder]).as_uri()


@pytest.fixture
def report(page: Page, address: str) -> Iterator[Page]:
    """The page, just opened; whatever a test does, nothing may go wrong in it."""
    yield from opened(page, address)


def full() -> Record:
    [path] = record.RECORDS.glob("full-*.json")
    return record.load(Record, path)


def column(page: Page, table: str, head: str) -> list[str]:
    """What the cells below a head say first."""
    found: list[str] = page.evaluate(
        f"(() => {{ const rows = [...document.querySelectorAll('#{table} tr')];"
        f"const at = [...rows[0].cells].findIndex((each) => each.innerText.startsWith('{head}'));"
        "return rows.slice(1).map((row) => row.cells[at].innerText.split('\\n')[0]); })()"
    )
    return found


def press(page: Page, table: str, key: str) -> None:
    page.evaluate(f"document.querySelector('[data-key=\"{table}-{key}\"]').click()")


def reset(page: Page) -> None:
    page.evaluate("document.getElementById('reset').click()")


def test_it_opens_on_the_largest_record_and_says_the_answer(report: Page) -> None:
    found = full()
    count = len(found.cases)
    assert text(report, "verdict-title").endswith(
        f"times as fast as the closest peer, over {count} cases"
    )
    assert found.commit.hash[:10] in text(report, "verdict")
    assert f"other processes ran during 0 of {count} cases" in text(report, "verdict")
    assert "interval that spans 1: " in text(report, "verdict")
    announced = report.evaluate("document.getElementById('announcement').textContent")
    assert announced == text(report, "verdict-title")
    choose(report, "a", OTHER)
    cases = len(other_machine().cases)
    assert f"other processes ran during 1 of {cases} cases" in text(report, "verdict")
    assert "interval that spans 1: " in text(report, "verdict")


@pytest.mark.parametrize("name", FILTERS)
def test_each_filter_shows_the_cases_that_pass(report: Page, name: str) -> None:
    value, passes = FILTERS[name]
    choose(report, name, value)
    expected = [case_label(case) for case in full().cases if passes(case)]
    assert 0 < len(expected) < len(full().cases)
    assert report.evaluate(NAMES) == expected
    assert text(report, "cases-now").startswith(f"{len(expected)} of ")
    assert len(column(report, "cases", "layer")) == min(len(expected), 50)
    reset(report)
    assert len(report.evaluate(NAMES)) == len(full().cases)


def test_filters_add_up_and_may_leave_nothing(report: Page) -> None:
    choose(report, "popularity", "skewed")
    choose(report, "rows", "256")
    expected = [c for c in full().cases if (c.popularity, c.rows) == ("skewed", 256)]
    assert report.evaluate(NAMES) == [case_label(case) for case in expected]
    choose(report, "rows", "1")
    assert text(report, "verdict-title") == "No case passes these filters."
    assert column(report, "cases", "layer") == []
    assert examined(report, *LOOKS) == {}


def test_threads_choose_the_variant(report: Page) -> None:
    choose(report, "layer", "4096>1024")
    for threads in ("1", "2"):
        choose(report, "threads", threads)
        shown = column(report, "cases", "sgmv, µs")
        cases = [case for case in full().cases if (case.h_in, case.h_out) == (4096, 1024)]
        assert shown
        assert set(shown) <= {microseconds(case.times[f"sgmv@{threads}"].q50) for case in cases}
        assert f"with {threads} thread" in text(report, "verdict")


def place_of_other(report: Page) -> int:
    """Of the machine that no committed record is of, among the page's."""
    place: int = report.evaluate(
        f"DATA.machines.findIndex(({{cpu}}) => cpu === {json.dumps(MACHINE.cpu)})"
    )
    return place


def test_a_machine_leaves_its_records(report: Page) -> None:
    choose(report, "machine", str(place_of_other(report)))
    assert report.evaluate("shown.record.name") == OTHER
    options = report.evaluate("[...document.getElementById('a').options].map(({value}) => value)")
    assert options == [OTHER]
    assert report.evaluate("document.getElementById('growth-panel').hidden")
    assert OTHER in text(report, "records")
    assert "full-" not in text(report, "records")
    full_ones = "DATA.records.find(({name}) => name.startsWith('full-')).machine"
    choose(report, "machine", str(report.evaluate(full_ones)))
    assert report.evaluate("shown.record.name").startswith("full-")


def test_heads_sort_by_their_column_both_ways(report: Page) -> None:
    choose(report, "rows", "16")
    choose(report, "rank", "8")
    choose(report, "popularity", "distinct")
    lowest = [float(each.rstrip("x!~")) for each in column(report, "cases", "lowest")]
    assert lowest == sorted(lowest)
    for key, head in (("sgmv", "sgmv, µs"), ("rows", "n"), ("mkl", "MKL sgemm_batch")):
        for down in (False, True):
            press(report, "cases", key)
            cells = [each.rstrip("x!~").replace(",", "") for each in column(report, "cases", head)]
            values = [float(each) for each in cells if each != "–"]
            assert values == sorted(values, reverse=down), key
            assert all(each == "–" for each in cells[len(values) :]), key
            sort = report.evaluate(
                f"document.querySelector('[data-key=cases-{key}]').parentElement.ariaSort"
            )
            assert sort == ("descending" if down else "ascending")


def test_ratios_intervals_and_marks_are_in_the_table(report: Page) -> None:
    choose(report, "a", OTHER)
    press(report, "cases", "by_segment")
    cells = report.evaluate(
        "(() => { const rows = [...document.querySelectorAll('#cases tr')];"
        "const head = (each) => each.innerText.startsWith('numpy per segment');"
        "const at = [...rows[0].cells].findIndex(head);"
        "const told = (each) => [each.className, each.innerText];"
        "return rows.slice(1).map((row) => [...row.cells[at].children].map(told)); })()"
    )
    assert {cell[0][0] for cell in cells} == {"win", "loss", "undecided"}
    for (kind, ratio), (_, interval), (_, peer) in cells:
        low, high = map(float, interval.split("–"))
        assert low <= float(ratio.rstrip("x!~")) <= high
        assert ratio[-1] == {"win": "x", "loss": "!", "undecided": "~"}[kind]
        assert peer.endswith(" µs")
    press(report, "cases", "noise")
    press(report, "cases", "noise")
    noises = column(report, "cases", "noise")
    assert noises[0] == f"{2 * record.QUIET:.2f}"


def undecided(cases: list[CaseRecord], peer: str) -> str:
    """In how many of these cases its ratio's interval spans 1."""
    its = [case.interval("sgmv@2", peer) for case in cases if peer in case.ratios["sgmv@2"]]
    known = [each for each in its if each is not None]
    return str(sum(low <= 1 <= high for low, high in known)) if known else "–"


def test_sums_are_written_as_in_the_readme(report: Page) -> None:
    report.evaluate("document.querySelector('#summary-panel details').open = true")
    shown = report.evaluate(
        "[...document.querySelectorAll('#summary-table tbody tr')]"
        ".map((row) => [...row.cells].map((cell) => cell.innerText))"
    )
    expected = [
        [
            PEERS[name].title, dtype, line.worst_case, ratio_text(line.geomean),
            ratio_text(line.worst), ratio_text(line.best), str(line.losses),
            undecided(part.cases, name), str(line.cases),
        ]
        for dtype, part in by_dtype(full()).items()
        for name in PEERS
        for line in summarise(part, "sgmv@2")
        if (line.baseline, line.popularity) == (name, "all")
    ]  # fmt: skip
    assert shown == expected


def test_cases_that_were_left_out_are_named(report: Page) -> None:
    report.evaluate("document.getElementById('left-out').open = true")
    shown = text(report, "left-out-table")
    assert full().untimed
    for name, why in full().untimed.items():
        assert name in shown
        assert why in shown
    choose(report, "a", OTHER)
    assert report.evaluate("document.getElementById('left-out').hidden")


def test_narrow_windows_show_a_case_and_its_ratio_first(report: Page) -> None:
    report.view(390)
    report.evaluate("draw()")
    heads = report.evaluate(
        "['cases', 'beside'].map((name) => [...document.querySelectorAll(`#${name} th button`)]"
        ".slice(0, 2).map((head) => head.innerText.replace(/ [▲▼]/, '')))"
    )
    assert heads == [["case", "lowest"], ["case", "B / A"]]


def test_two_records_are_set_side_by_side(report: Page) -> None:
    choose(report, "b", OTHER)
    choose(report, "layer", "4096>4096")
    assert MACHINE.cpu in text(report, "beside-now")
    one = {case_label(case): case for case in full().cases}
    two = {case_label(case): case for case in other_machine().cases}
    both = [name for name in one if name in two and one[name].h_in == one[name].h_out]
    assert f"{len(both)} cases in both" in text(report, "beside-now")
    shown = sorted(float(each.rstrip("x!~")) for each in column(report, "beside", "B / A"))
    times = [two[n].times["sgmv@8"].q50 / one[n].times["sgmv@2"].q50 for n in both]
    assert shown == pytest.approx(sorted(times), abs=0.0051)
    choose(report, "b", "nothing")
    assert report.evaluate("document.getElementById('beside-body').hidden")
    assert "Choose a record B" in text(report, "beside-now")


STATE = (
    "({ state, cases: shown.cases.length,"
    " first: document.querySelector('#cases tbody').innerText })"
)


def reloaded(page: Page) -> tuple[Any, Any]:
    before = page.evaluate(STATE)
    page.open(page.evaluate("location.href"))
    return before, page.evaluate(STATE)


def test_every_control_and_order_comes_back_from_the_address(report: Page) -> None:
    controls = report.evaluate(
        "[...document.querySelectorAll('#controls select')]"
        ".map((control) => [control.id, [...control.options].at(-1).value])"
    )
    assert {name for name, _ in controls} == {"machine", "a", "b", "threads", *FILTERS}
    for name, value in controls:
        choose(report, name, value)
        before = report.evaluate(STATE)
        assert before["state"][name] == value
        kept = report.evaluate("location.hash")
        report.evaluate("(history.replaceState(null, '', '#'), read_address())")
        assert report.evaluate("state")[name] != value
        report.evaluate(f"(history.replaceState(null, '', {kept!r}), read_address())")
        assert report.evaluate(STATE) == before, name
        report.evaluate("(history.replaceState(null, '', '#'), read_address())")
    for name, value in (("layer", "4096>4096"), ("threads", "1"), ("b", OTHER)):
        choose(report, name, value)
    for key in ("sgmv", "mkl", "mkl"):
        press(report, "cases", key)
    press(report, "beside", "a")
    report.evaluate("document.getElementById('cases-more').click()")
    assert len(column(report, "cases", "layer")) == report.evaluate("shown.cases.length") > 50
    before, after = reloaded(report)
    assert before == after
    orders = {name: after["state"][name] for name in ("sort", "more", "beside_sort")}
    assert orders == {"sort": "-mkl", "more": "all", "beside_sort": "a"}


def test_what_an_address_asks_in_vain_is_as_the_page_begins(report: Page, address: str) -> None:
    report.open(f"{address}#a=none&rank=17&dtype=int4&threads=99&machine=9&sort=none&b=none&x=1")
    assert len(report.evaluate(NAMES)) == len(full().cases)
    for name in ("rank", "dtype", "threads", "machine"):
        assert report.evaluate(f"state['{name}']") == ""


def test_the_jumps_leave_the_address_alone_and_move_the_focus(report: Page) -> None:
    before = report.evaluate("location.hash")
    for i in range(report.evaluate("document.querySelectorAll('.jumps a').length")):
        report.evaluate(f"document.querySelectorAll('.jumps a')[{i}].click()")
        assert report.evaluate("location.hash") == before
        assert report.evaluate("document.activeElement.tagName") == "H2"


def test_the_page_works_by_keyboard(report: Page) -> None:
    """Tab reaches every control and head; Enter sorts, and the focus stays at the head."""
    met = []
    for _ in range(60):
        report.press("Tab")
        met.append(
            report.evaluate("document.activeElement.id || document.activeElement.dataset.key || ''")
        )
    assert [name for name in met if name in ("machine", "a", "b", "threads", *FILTERS)] == [
        "machine", "a", "b", "threads", *FILTERS,
    ]  # fmt: skip
    assert {"reset", "cases", "cases-closest", "cases-noise", "cases-more"} <= set(met)
    report.evaluate("document.querySelector('[data-key=cases-rows]').focus()")
    for order in ("ascending", "descending"):
        report.press("Enter")
        assert report.evaluate("document.activeElement.dataset.key") == "cases-rows"
        assert report.evaluate("document.activeElement.parentElement.ariaSort") == order


def test_a_reader_of_the_screen_hears_every_figure(report: Page) -> None:
    images = [each["name"] for each in report.accessible() if each["role"] == "image"]
    for part in (
        "Roofline with 2 threads",
        "Time of one call over rows",
        "B’s time / A’s time",
        "float32: ratio of each peer",
    ):
        assert any(name.startswith(part) for name in images), part
    assert all(images)


@pytest.mark.parametrize(
    ("width", "dark"), [(390, False), (390, True), (820, False), (1280, True), (1920, False)]
)
def test_it_fits_and_can_be_read(report: Page, width: int, dark: bool) -> None:
    report.view(width, dark=dark)
    home = report.evaluate("location.href").split("#")[0]
    for changes in STATES:
        report.open(f"{home}#{'&'.join(f'{name}={value}' for name, value in changes.items())}")
        assert report.evaluate("document.documentElement.scrollWidth") <= width, changes
        assert report.evaluate(BEYOND) == [], changes
        assert examined(report, *LOOKS) == {}, changes
    assert examined(report, "clipped_rings") == {}


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("faint_texts", "document.getElementById('verdict-body').style.opacity = 0.5"),
        ("faint_labels", "document.querySelector('#roof text').style.fill = '#999'"),
        ("faint_shapes", "document.querySelector('#latency .curve').style.opacity = 0.2"),
        (
            "overlaps",
            "document.querySelectorAll('#latency text').forEach((e) => e.setAttribute('x', 40))",
        ),
        ("wrong_numbers", "document.getElementById('cases-now').textContent = '1 cases'"),
    ],
)
def test_the_checks_of_looks_can_fail(report: Page, name: str, spoil: str) -> None:
    report.evaluate(spoil)
    assert name in examined(report, *LOOKS)


def test_every_study_and_machine_is_told(report: Page) -> None:
    for path in record.RECORDS.glob("*.json"):
        assert path.stem in text(report, "records")
    for part in (MACHINE.vendor, MACHINE.family, "amx_bf16", "AMD EPYC"):
        assert part in text(report, "machines")
    assert report.evaluate("document.querySelectorAll('#studies table').length") >= 4
    assert "PEFT adds ms" in text(report, "studies")


def test_machines_of_one_name_are_told_apart_by_a_number(report: Page) -> None:
    names = report.evaluate(
        "(() => { DATA.machines.push({ ...DATA.machines[0], vendor: 'another' });"
        "return DATA.machines.map((_, place) => machine_name(place)); })()"
    )
    first = names[0].removesuffix(" (1)")
    assert names[0] == f"{first} (1)"
    alike = [name for name in names if name.startswith(first)]
    assert alike == [f"{first} ({number})" for number in range(1, len(alike) + 1)]
    assert names[-1] == alike[-1]
    assert names[place_of_other(report)] == f"{MACHINE.cpu}, 8 cores"


def test_growth_is_drawn_with_its_lines(report: Page) -> None:
    [path] = record.RECORDS.glob("growth-*.json")
    told = report.evaluate("document.querySelector('#growth svg').getAttribute('aria-label')")
    assert "rows, one adapter" in told
    curves = report.evaluate("DATA.records.find(({ growth }) => growth).growth.series.length")
    drawn = "document.querySelectorAll('#growth path.curve').length"
    assert report.evaluate(drawn) > 2 * curves
    assert path.stem in text(report, "growth")


def test_records_without_a_grid_make_a_page(page: Page, tmp_path: Path) -> None:
    """Such as those of one's own runs; one of them has no timings."""
    for path in record.RECORDS.glob("growth-*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    loops = [Loop("shrink", 8, 20, 0, False)]
    fields = {"dtype": "float32", "loops": loops}
    save(made(InstructionsRecord, 0.0, (), fields), tmp_path / "instructions.json")
    page.errors.clear()
    page.open(write(tmp_path / "report.html", [tmp_path]).as_uri())
    assert page.errors == []
    assert not page.evaluate("document.getElementById('verdict').checkVisibility()")
    assert page.evaluate("document.querySelectorAll('#growth svg').length") == 1
    assert "multiplies" in text(page, "studies")
    assert "not timed" in text(page, "records")
    assert examined(page, *LOOKS) == {}
