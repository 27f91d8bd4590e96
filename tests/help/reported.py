"""Records of several machines and kinds, for the tests of the benchmarks' report."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import record
from benchmarks.machine import Machine
from benchmarks.record import QUIET, save
from benchmarks.studies.grid.records import Record
from tests.help.planting import ROOT

FOLDER = ROOT / "benchmarks" / "report"
SCRIPT = (FOLDER / "records.js").read_text()
OTHER = "quick-other-8c"
MACHINE = Machine(
    "A CPU of 8 cores", 8, {"L1": 49152, "L2": 2 << 20, "L3": 60 << 20},
    ["avx2", "fma", "avx512f", "amx_tile", "amx_bf16"], "Linux 9", "GenuineIntel", "6 143",
)  # fmt: skip


@cache
def other_machine() -> Record:
    """Wins, losses, intervals that decide and that do not, and one noisy case."""
    [path] = record.RECORDS.glob("quick-*.json")
    found: Any = json.loads(path.read_text().replace("sgmv@2", "sgmv@8"))
    found |= {"threads": [1, 8], "machine": msgspec.to_builtins(MACHINE)}
    ceilings = found["ceilings"]
    for name in ("bandwidth", "peak"):
        ceilings[name]["8"] = ceilings[name].pop("2")
    for place, case in enumerate(found["cases"]):
        case["foreign_cores"] = 2 * QUIET if place == 3 else 0.01
        for variant, times in case["times"].items():
            own = variant.startswith("sgmv@8")
            part = (0.5 if place % 4 else 2.0) if own else 0.6
            for name in ("q20", "q50", "q80"):
                times[name] = record.significant(part * times[name])
            # Rounds alike decide; where they differ by as much as the ratio, they do not.
            swing = 2 if own and place % 3 == 0 else 1.01
            times["rounds"] = [times["q50"] * swing**power for power in (-1, 0, 1)]
        for variant, ratios in case["ratios"].items():
            for peer in ratios:
                medians = [case["times"][name]["q50"] for name in (peer, variant)]
                ratios[peer] = record.significant(medians[0] / medians[1])
    return msgspec.convert(found, Record)


def records_folder(folder: Path) -> Path:
    """The committed records, and one of another machine."""
    for path in record.RECORDS.glob("*.json"):
        shutil.copy(path, folder)
    save(other_machine(), folder / f"{OTHER}.json")
    return folder
