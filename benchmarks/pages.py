"""python -m benchmarks pages: the measured tables and figures, from the committed records.

    python -m benchmarks pages            rewrite the tables, and the figures if they are stale
    python -m benchmarks pages --check    exit 1 if a page or a figure is stale

A table is between `<!-- bench:NAME:begin -->` and `<!-- bench:NAME:end -->`; each study says in
which page. The figures are beside the records.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.figures import digest, draw
from benchmarks.registry import STUDIES
from sgmv.console import Parser

REMEDY = "run python -m benchmarks pages"


class StaleError(Exception):
    """A page or a figure does not show what the record holds: which part, and the remedy."""


def tables(folder: Path | None = None) -> dict[str, dict[str, str]]:
    """The text of every marker, by page. Raises StaleError where a study has no record."""
    found: dict[str, dict[str, str]] = {}
    for study in STUDIES.values():
        shown = study.shown(folder) if study.pages else None
        for (page, key), make in study.pages.items():
            if shown is None:
                raise StaleError(
                    f"{folder or record.RECORDS}: no record for {key} of {page}; make one with "
                    f"python -m benchmarks {study.name} --record"
                )
            path, its = shown
            found.setdefault(page, {})[key] = make(its, path.name)
    return found


def rendered(page: str, text: str, parts: Mapping[str, str]) -> str:
    """The page's `text` with these parts between their markers.

    Raises StaleError for a marker that is not there exactly once.
    """
    for key, part in parts.items():
        begin, end = f"<!-- bench:{key}:begin -->", f"<!-- bench:{key}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise StaleError(f"{page}: expected {begin} and {end} once each; put them in")
        before, rest = text.split(begin)
        if end not in rest:
            raise StaleError(f"{page}: {end} is before {begin}; swap them")
        text = f"{before}{begin}\n{part}\n{end}{rest.split(end)[1]}"
    return text


def stale_figures(folder: Path | None = None) -> list[str]:
    """The figures that do not show their study's record, by file name."""
    stale = []
    for study in STUDIES.values():
        shown = study.shown(folder) if study.figures else None
        if shown is not None:
            path, its = shown
            for name in study.figures:
                figure = path.parent / name
                if not figure.exists() or digest(its).encode() not in figure.read_bytes():
                    stale.append(name)
    return stale


def main(argv: Sequence[str] | None = None) -> int:
    """Write, or check; return the exit status: 0, or 1 where something is stale."""
    parser = Parser(
        prog="python -m benchmarks pages", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    check = parser.parse_args(argv).check
    try:
        made = tables()
        old = {page: (record.ROOT / page).read_text() for page in made}
        new = {page: rendered(page, old[page], parts) for page, parts in made.items()}
        pages, pictures = [page for page in old if new[page] != old[page]], stale_figures()
        if check and (pages or pictures):
            raise StaleError(f"{', '.join([*pages, *pictures])}: stale; {REMEDY}")
    except StaleError as error:
        print(error)
        return 1
    for page in pages:
        (record.ROOT / page).write_text(new[page])
    for study in STUDIES.values():
        shown = study.shown() if set(pictures) & set(study.figures) else None
        if shown is not None:
            draw(study.figures, shown[1], record.RECORDS)
    print("fresh" if check else f"fresh: {', '.join([*pages, *pictures]) or 'nothing to do'}")
    return 0
