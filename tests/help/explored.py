"""Launches as the explorer's page names their parts, and what a reader does on the page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest

from reference.workloads import POPULARITIES, popularity
from sgmv import emulator
from sgmv.emulator import DEVICES, Launch
from sgmv.emulator.punica import RELEASES
from sgmv.explorer.write import KERNELS
from tests.help.chromium import FOUND, Page
from tests.help.planting import ROOT

FOLDER = ROOT / "sgmv" / "explorer"
SCRIPT = "".join(
    (FOLDER / f"{name}.js").read_text()
    for name in (
        "batch",
        "launch",
        "punica",
        "bgmv",
        "vllm",
        "sglang",
        "vllm_experts",
        "kernels",
        "timeline",
        "layouts",
    )
)
HANG, FIX, CLIFF, DISTINCT, EXPERTS = 4, 5, 6, 2, 9  # places of stories
HUNG = [1] * 50 + [0] + [1] * 82  # segments of 1 and 132 rows
NODE = shutil.which("node")
CHECKS = (ROOT / "tests" / "page" / "page_checks.js").read_text()
BEYOND = """[...document.querySelectorAll("figure svg text")].filter((text) => {
  const [a, b] = [text, text.closest("figure")].map((each) => each.getBoundingClientRect());
  return a.left < b.left - 6 || a.right > b.right + 6; }).map((text) => text.textContent)"""
NO_CHROMIUM = "no Chromium on the path: apt-get install chromium"
needs_chromium = pytest.mark.skipif(FOUND is None, reason=NO_CHROMIUM)
Javascript = Callable[[str, str], Any]


class Case(NamedTuple):
    """One launch, as the page names its parts."""

    ids: list[int]
    kernel: str
    h_in: int
    r: int
    h_out: int
    device: str
    release: str
    max_loras: int
    max_lora_chunk_size: int
    experts: int = 8
    top_k: int = 2

    def launch(self) -> Launch:
        """The emulator's."""
        slots = slots_of(self.ids)
        if "_moe_" in self.kernel:
            return self.launch_of(routed(len(self.ids), self.experts, self.top_k))
        own: dict[str, dict[str, Any]] = {
            "punica_sgmv_shrink": {"release": self.release},
            "vllm_v1": {"slots": slots, "max_loras": max(self.max_loras, len(slots))},
            "sglang": {"max_lora_chunk_size": self.max_lora_chunk_size},
        }
        named = next((own[name] for name in own if self.kernel.startswith(name)), {})
        shrinks = self.kernel.endswith("shrink")
        widths = {"h_in": self.h_in, "r": self.r} if shrinks else {"r": self.r, "h_out": self.h_out}
        made: Launch = getattr(emulator, self.kernel)(
            self.ids, **widths, device=DEVICES[self.device], **named
        )
        return made

    def launch_of(self, expert_ids: list[list[int]]) -> Launch:
        """The same on experts, with these for each row."""
        slots = slots_of(self.ids)
        widths = (self.h_in, self.r) if self.kernel.endswith("shrink") else (self.r, self.h_out)
        made: Launch = getattr(emulator, self.kernel)(
            [slots.get(i, -1) for i in self.ids], expert_ids, *widths, self.experts,
            max(self.max_loras, len(slots)), DEVICES[self.device],
        )  # fmt: skip
        return made


def routed(rows: int, experts: int, top_k: int) -> list[list[int]]:
    """The page's router."""
    seed, found = 20231106, []
    for _ in range(rows):
        left, chosen = list(range(experts)), []
        for _ in range(top_k):
            seed = (seed * 1664525 + 1013904223) % 2**32
            chosen.append(left.pop(seed * len(left) >> 32))
        found.append(chosen)
    return found


def slots_of(ids: list[int]) -> dict[int, int]:
    """The page's slots: the places of the adapters in ascending order."""
    return {adapter_id: s for s, adapter_id in enumerate(sorted(set(ids) - {-1}))}


def cases() -> list[Case]:
    """Batches of all kinds, each with every kernel; widths, ranks and devices at random."""
    rng = np.random.default_rng(5)
    batches = [[7], [-1, -1], HUNG, [2, 0, -1, 2, 0], [5] * 64, [5] * 65, [-1, *range(40)]]
    batches += [list(range(n)) for n in (26, 27, 28, 33, 127, 128, 129)]
    batches += [popularity(k, n).tolist() for k in POPULARITIES for n in (1, 8, 64, 133, 600)]
    batches += [popularity("skewed", 256).tolist()]
    batches += [rng.integers(-1, 9, int(rng.integers(1, 400))).tolist() for _ in range(10)]
    ranks, widths = (8, 16, 17, 32, 64, 96, 128), (16, 768, 3424, 3584, 4096, 4099, 11008, 20480)
    overflow = Case(list(range(33)), "punica_sgmv_shrink", 2048, 128, 16, "H100", "1.1.0", 8, 16)
    return [overflow] + [
        Case(
            ids, kernel, int(rng.choice(widths)), int(rng.choice(ranks)), int(rng.choice(widths)),
            str(rng.choice(list(DEVICES))), str(rng.choice(RELEASES)),
            int(rng.choice((1, 8, 64))), int(rng.choice((16, 32, 128))),
            *((8, 2), (128, 8), (4, 4), (60, 3))[rng.integers(4)],
        )
        for ids in batches
        for kernel in KERNELS
        for _ in range(3)
    ]  # fmt: skip


CASES = cases()
DATA = {name: vars(device) for name, device in DEVICES.items()}


def of_each(expression: str, chosen: list[Case]) -> str:
    """JavaScript: the expression's value for the launch of each case."""
    given = json.dumps({"devices": DATA, "cases": [c._asdict() for c in chosen]})
    return (
        f"(({{devices, cases}}) => cases.map((c) => {{ const values = {{...c, device: devices["
        "c.device], max_loras: Math.max(c.max_loras, laid_out(segment(c.ids)).length)}; "
        "const launch = KERNELS[c.kernel](segment(c.ids), values); "
        f"return {expression}; }}))({given})"
    )


@cache
def emulators() -> list[dict[str, Any]]:
    """The emulator's figures of every case, as JSON would bring them."""
    figures: list[dict[str, Any]] = json.loads(json.dumps([c.launch().figures() for c in CASES]))
    return figures


def examined(page: Page, *names: str) -> dict[str, list[str]]:
    """What the named functions of page_checks.js find."""
    calls = ", ".join(f"{name}: {name}()" for name in names)
    found: dict[str, list[str]] = page.evaluate(f"(() => {{{CHECKS}\nreturn {{{calls}}}}})()")
    return {name: wrong for name, wrong in found.items() if wrong}


def text(page: Page, name: str) -> str:
    return str(page.evaluate(f"document.getElementById({name!r}).innerText"))


def choose(page: Page, name: str, value: object) -> None:
    page.evaluate(
        f"(() => {{ const c = document.getElementById({name!r}); c.value = {json.dumps(value)};"
        "c.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )


def stories(page: Page) -> int:
    return int(page.evaluate("STORIES.length"))


def click(page: Page, link: str, story: int) -> None:
    """Click a link to a story; its state is there once the browser has noticed the new address."""
    page.evaluate(
        f"(async () => {{ document.querySelector({json.dumps(link)}).click();"
        f"while (story_of(state) !== {story})"
        "await new Promise((done) => setTimeout(done, 5)); })()"
    )


def follow(page: Page, story: int) -> None:
    click(page, f"#stories li:nth-child({story + 1}) a", story)
