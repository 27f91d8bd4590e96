"""`write_html`: the explorer as one file; and `python -m sgmv explorer`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict
from importlib.resources import files
from itertools import groupby
from pathlib import Path

from sgmv import emulator
from sgmv.checks import check_count
from sgmv.emulator import A100, DEVICES, Device
from sgmv.emulator.punica import RELEASES
from sgmv.errors import DtypeError, SgmvError, ValueRangeError
from sgmv.html import assembled, presented
from sgmv.layouts.rows import Batch, as_segments, row_ids

KERNELS = tuple(name for name in emulator.__all__ if name.endswith(("_shrink", "_expand")))
MOST_ROWS, MOST_ID = 2048, 10**9 - 1
MOST = {"h_in": 65536, "r": 1024, "h_out": 65536, "experts": 256, "top_k": 16}
FIVE_ROWS = [2, 0, -1, 2, 0]
# What there is to read in a clone, beside the paper; an installed package does not have it.
DOCS = {
    "docs/punica.md": "Punica in six steps",
    "docs/engines.md": "one batch in the layout of each engine",
    "docs/kernels.md": "this library’s own kernels",
}


def write_html(
    path: str | os.PathLike[str],
    batch: Batch | None = None,
    *,
    h_in: int = 4096,
    r: int = 16,
    h_out: int = 4096,
    device: Device = A100,
    kernel: str = "punica_sgmv_shrink",
    release: str = "1.1.0",
    experts: int = 8,
    top_k: int = 2,
) -> Path:
    """Write the explorer to a file, set to this batch, layer and launch; returns the file's path.

    Semantics: one HTML file that asks nothing of the network. All that it starts with can be
    changed in it; the address of the page holds the changes.

    path             the file, overwritten
    batch            (n,) adapter ids, or Segments; 1 to 2048 rows. Left out: five rows, the first
                     step of the page's path through SGMV
    h_in, r, h_out   widths and rank
    device           the GPU; one of your own is in the page beside those of `emulator.DEVICES`
    kernel, release  a kernel's name in `sgmv.emulator`; Punica's release, for its shrink
    experts, top_k   of a layer of experts, and how many a row goes through, for its kernels

    Raises ValueRangeError for more rows, wider layers, other kernels and releases; DtypeError and
    ValueRangeError for counts that are no whole numbers >= 1, and as `segment` does.
    Source: the figures are `sgmv.emulator`'s; the popularities Punica's (arXiv 2310.18547).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = write_html(Path(folder) / "explorer.html", [7, -1, 7], device=emulator.H100)
    ...     page.name, "http://" in page.read_text().replace("http://www.w3.org/2000/svg", "")
    ('explorer.html', False)
    """
    widths = {
        name: check_count(name, value, 1)
        for name, value in zip(MOST, (h_in, r, h_out, experts, top_k), strict=True)
    }
    for name, value in widths.items():
        if value > MOST[name]:
            raise ValueRangeError(name, f"at most {MOST[name]}", str(value), "show a smaller one")
    for name, choice, known in (("kernel", kernel, KERNELS), ("release", release, RELEASES)):
        if choice not in known:
            raise ValueRangeError(name, f"one of {known}", repr(choice), "choose one of them")
    ids = row_ids(as_segments(FIVE_ROWS if batch is None else batch)).tolist()
    if not 1 <= len(ids) <= MOST_ROWS:
        raise ValueRangeError("batch", f"1 to {MOST_ROWS} rows", str(len(ids)), "show a part of it")
    if max(ids) > MOST_ID:
        raise ValueRangeError("batch", f"ids up to {MOST_ID}", str(max(ids)), "use smaller ids")
    if not isinstance(device, Device):
        raise DtypeError(
            "device", "a Device", type(device).__name__, "pass one of emulator.DEVICES"
        )
    devices = {**DEVICES, device.name: device}
    data = {
        "devices": [asdict(each) for each in devices.values()],
        "most": {"n": MOST_ROWS, **MOST},
        "docs": _docs(Path(path)),
        "start": {
            "ids": _runs(ids), "popularity": "", **widths,
            "device": device.name, "kernel": kernel, "release": release,
        },
    }  # fmt: skip
    folder, target = files("sgmv.explorer"), Path(path)
    page = assembled(lambda name: (folder / name).read_text(encoding="utf-8"), data)
    target.write_text(page, encoding="utf-8")
    return target


def command(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], str]:
    """Of `python -m sgmv`: writes the page, and opens it where there is a screen."""
    parser.add_argument(
        "path",
        nargs="?",
        default="explorer.html",
        metavar="PATH",
        help="file to write (%(default)s)",
    )
    parser.add_argument("--no-open", action="store_true", help="only write it")
    return _run


def _run(given: argparse.Namespace) -> str:
    try:
        path = write_html(given.path)
    except OSError as error:
        raise SgmvError(
            "PATH", "a file that can be written", str(error), "name another place"
        ) from error
    return presented(path, given.no_open)


def _docs(page: Path) -> list[dict[str, str]]:
    """Links from the page to the documents of the clone that holds this package, if one does."""
    clone = Path(__file__).resolve().parents[2]
    return [
        {
            "href": Path(os.path.relpath(clone / name, page.resolve().parent)).as_posix(),
            "text": text,
        }
        for name, text in DOCS.items()
        if (clone / name).is_file()
    ]


def _runs(ids: list[int]) -> str:
    """The ids as the page writes them.

    >>> _runs([7, 0, 0, 0])
    '7, 0*3'
    """
    counted = [(each, len(list(group))) for each, group in groupby(ids)]
    return ", ".join(str(each) if times == 1 else f"{each}*{times}" for each, times in counted)
