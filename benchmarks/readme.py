"""The measured tables of the README and the docs, generated from the committed records.

    python -m benchmarks.readme            rewrite the tables, and the figures if they are stale
    python -m benchmarks.readme --check    exit 1 if a page or a figure is stale

A table stands between `<!-- bench:NAME:begin -->` and `<!-- bench:NAME:end -->`; TABLES tells which
page holds which NAME. The figures lie beside the records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import compat, layer, peft
from benchmarks.console import Console
from benchmarks.figures import digest, draw, draw_growth, hub_cases
from benchmarks.goals import markdown
from benchmarks.growth import PREFIX
from benchmarks.growth import load as load_growth
from benchmarks.machine import Machine, slug
from benchmarks.peers import PEERS
from benchmarks.record import CaseRecord, Record, by_dtype, is_quiet, load, main_variant, summarise
from benchmarks.table import LOSS, microseconds, ran, ratio_text
from sgmv.console import Parser

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "records"
FIGURES = ("latency.png", "roofline.png")
GROWTH_FIGURE = "growth.png"
REMEDY = "run python -m benchmarks.readme"


class StaleError(Exception):
    """A page or a figure does not show what the record holds: which part, and the remedy."""


def primary(directory: Path = RECORDS) -> tuple[Path, Record]:
    """The record the README shows: a full one before a quick one. Raises StaleError for none."""
    others = (PREFIX, compat.PREFIX, layer.PREFIX, peft.PREFIX)
    found = [path for path in directory.glob("*.json") if not path.name.startswith(others)]
    paths = sorted(found, key=lambda p: (not p.name.startswith("full-"), p.name))
    if not paths:
        raise StaleError(f"{directory}: no record; make one with python -m benchmarks --record")
    return paths[0], load(paths[0])


def rendered(page: str, text: str, record: Record, name: str) -> str:
    """The page's `text` with every table of it written anew from `record`, a file of this `name`.

    Raises StaleError for a marker that is not there exactly once.
    """
    for key, table in TABLES[page].items():
        begin, end = f"<!-- bench:{key}:begin -->", f"<!-- bench:{key}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise StaleError(f"{page}: expected {begin} and {end} once each; put them in")
        before, rest = text.split(begin)
        if end not in rest:
            raise StaleError(f"{page}: {end} stands before {begin}; swap them")
        text = f"{before}{begin}\n{table(record, name)}\n{end}{rest.split(end)[1]}"
    return text


def stale_parts(
    pages: Mapping[str, str], record: Record, name: str, directory: Path = RECORDS
) -> list[str]:
    """What does not show the record: pages and figures by file name; [] when all is fresh."""
    parts = [page for page, text in pages.items() if rendered(page, text, record, name) != text]
    wanted = digest(record).encode()
    figures = dict.fromkeys(FIGURES, wanted)
    if growths := records_of(PREFIX, directory):
        figures[GROWTH_FIGURE] = digest(load_growth(growths[0])).encode()
    for figure, content in figures.items():
        path = directory / figure
        if not path.exists() or content not in path.read_bytes():
            parts.append(figure)
    return parts


def records_of(prefix: str, directory: Path | None = None) -> list[Path]:
    """The records of one of the other benchmarks; the first is the one that is shown."""
    return sorted((directory or RECORDS).glob(f"{prefix}*.json"))


def destination(
    prefix: str, wanted: bool, quiet: bool, output: Path, facts: Machine, console: Console
) -> Path:
    """Where such a benchmark writes: among the records, if that is wanted and nobody disturbed."""
    if wanted and quiet:
        return RECORDS / f"{prefix}{slug(facts)}.json"
    if wanted:
        console.print("not recorded: run again on a quiet machine", "bold red")
    return output / f"{prefix.removesuffix('-')}.json"


def keep(
    prefix: str,
    record: Any,
    save: Callable[[Any, Path], None],
    wanted: bool,
    output: Path,
    console: Console,
) -> None:
    """Save a record of cases at its destination, and say where that is."""
    quiet = all(is_quiet(case["foreign_cores"]) for case in record["cases"])
    path = destination(prefix, wanted, quiet, output, record["machine"], console)
    save(record, path)
    console.print(f"written: {path}")
    if path.parent == RECORDS:
        console.print("now: python -m benchmarks.readme", "bold")


def summary_table(record: Record, name: str) -> str:
    """Where the record comes from; then a table for each float type."""
    machine, commit = record["machine"], record["commit"]
    lines = [
        f"{len(record['cases'])} cases, {machine['cpu']}, {machine['cores']} cores, "
        f"numpy {record['versions']['numpy']} ({record['blas']['name']}), "
        f"numba {record['versions']['numba']}, {record['date'][:10]}, commit "
        f"`{commit['hash'][:10]}`{' with changes' if commit['dirty'] else ''}; "
        f"{len(record['untimed'])} more were left out (mostly for want of memory, see the record); "
        f"record: `benchmarks/records/{name}`.",
    ]
    for dtype, part in by_dtype(record).items():
        lines += ["", *_ratio_lines(dtype, part)]
    return "\n".join(lines)


def _ratio_lines(dtype: str, record: Record) -> list[str]:
    """Ratios per baseline over all cases, and per popularity; for all threads and for one."""
    popularities = list(dict.fromkeys(case["popularity"] for case in record["cases"]))
    lines = [
        f"| {dtype}: baseline / sgmv | threads | geomean | worst | best | lost | "
        + " | ".join(popularities)
        + " |",
        "| --- " + "| ---: " * (5 + len(popularities)) + "|",
    ]
    for threads in sorted(record["threads"], reverse=True):
        found = summarise(record, f"sgmv@{threads}")
        by_key = {(line.baseline, line.popularity): line for line in found}
        for baseline in dict.fromkeys(line.baseline for line in found):
            line = by_key[baseline, "all"]
            cells = [
                PEERS[baseline].title,
                str(threads),
                f"**{ratio_text(line.geomean)}**",
                ratio_text(line.worst),
                ratio_text(line.best),
                f"{line.losses} of {line.cases}",
            ]
            for popularity in popularities:
                part = by_key.get((baseline, popularity))
                cells.append(ratio_text(part.geomean) if part else "-")
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def cases_table(record: Record, _name: str) -> str:
    """Every row count and popularity of one layer; the other cases are in the record."""
    main = main_variant(record)
    cases = hub_cases(record)
    baselines = ran({**record, "cases": cases})
    first = cases[0]
    head = ["n", "popularity", "S", f"sgmv, {max(record['threads'])} threads, µs"]
    head += [PEERS[name].title for name in baselines] + ["share of limit"]
    lines = [
        f"{first['h_in']} → {first['rank']} → {first['h_out']} ({first['names'][0]}), "
        f"{first['dtype']}; ratios as above, {LOSS} marks a loss, - did not run.",
        "",
        "| " + " | ".join(head) + " |",
        "| ---: | --- " + "| ---: " * (len(head) - 2) + "|",
    ]
    for case in cases:
        lines.append("| " + " | ".join(_cells(case, main, baselines)) + " |")
    return "\n".join(lines)


def _cells(case: CaseRecord, main: str, baselines: Sequence[str]) -> list[str]:
    ratios = case["ratios"][main]
    return [
        str(case["rows"]),
        case["popularity"],
        str(case["S"]),
        microseconds(case["times"][main]["q50"]),
        *(ratio_text(ratios[name]) if name in ratios else "-" for name in baselines),
        f"{case['shares'][main]:.0%}",
    ]


def goals_table(record: Record, _name: str) -> str:
    return markdown(record)


def peft_table(_record: Record, _name: str) -> str:
    """From the first record of `python -m benchmarks peft`."""
    paths = records_of(peft.PREFIX)
    if not paths:
        return "Not measured yet: `python -m benchmarks peft --record`."
    return peft.markdown(peft.load(paths[0]), paths[0].name)


def layer_table(_record: Record, _name: str) -> str:
    """From the first record of `python -m benchmarks layer`."""
    paths = records_of(layer.PREFIX)
    if not paths:
        return "Not measured yet: `python -m benchmarks layer --record`."
    return layer.markdown(layer.load(paths[0]), paths[0].name)


def compat_table(_record: Record, _name: str) -> str:
    """The calls of vLLM, from a record of their own."""
    paths = records_of(compat.PREFIX)
    if not paths:
        return "No record is committed yet; `python -m benchmarks compat` makes one."
    return compat.markdown(compat.load(paths[0]))


TABLES: dict[str, dict[str, Callable[[Record, str], str]]] = {
    "README.md": {"summary": summary_table, "cases": cases_table},
    "docs/kernels.md": {"goals": goals_table, "layer": layer_table},
    "docs/engines.md": {"compat": compat_table, "peft": peft_table},
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 if stale")
    check = parser.parse_args(argv).check
    pages = {page: (ROOT / page).read_text() for page in TABLES}
    try:
        record_path, record = primary()
        parts = stale_parts(pages, record, record_path.name)
        if check and parts:
            raise StaleError(f"{', '.join(parts)}: stale against {record_path.name}; {REMEDY}")
    except StaleError as error:
        print(error)
        return 1
    for page in set(parts) & set(pages):
        (ROOT / page).write_text(rendered(page, pages[page], record, record_path.name))
    if set(parts) & set(FIGURES):
        draw(record, RECORDS)
    if GROWTH_FIGURE in parts:
        draw_growth(load_growth(records_of(PREFIX)[0]), RECORDS)
    print(f"fresh: {', '.join(parts) or 'nothing to do'}" if not check else "fresh")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
