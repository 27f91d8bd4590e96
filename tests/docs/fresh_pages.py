"""README.md and docs/ in a fresh clone and a fresh environment: each block as printed.

make pages

Pages that ask for the same extra share an environment. The file's name keeps it out of the suite:
it takes minutes, of which the README's `make bench` takes two.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.help import pages
from tests.help.pages import PAGES, ROOT

INSTALL = re.compile(r"^## Install$.*?```sh\n(.*?)```", re.MULTILINE | re.DOTALL)
# Run by .ci/run itself; this is a part of it.
ELSEWHERE = {"make test"}
# Left to who has the gigabytes: what needs it is left out, and says so.
LARGE = {".[torch]", ".[vllm]", ".[ray]"}


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What git has of this tree, edits and new files included."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in listed:
        if (ROOT / name).is_file():
            target = tmp_path / "clone" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    return tmp_path / "clone"


def script(extra: str | None, of: list[Path]) -> str:
    """The install section, the extra, then each page's commands and Python blocks, in order."""
    found = INSTALL.search((ROOT / "README.md").read_text())
    assert found is not None
    lines = ["set -euo pipefail", *found[1].splitlines()]
    if extra:
        lines.append(f"pip install --quiet -e '{extra}'")
    for page in of:
        commands = [*pages.commands(page, "sh"), *pages.commands(page, "console")]
        prose = pages.commands_in_prose(page)
        commands += [c for c in prose if c.startswith(("sgmv explain", "sgmv info"))]
        lines += [c for c in commands if c not in {*ELSEWHERE, *lines}]
        lines.append(f"python -m tests.help.pages {page.relative_to(ROOT)}")
    return "\n".join(lines)


def pages_by_extra() -> dict[str | None, list[Path]]:
    found: dict[str | None, list[Path]] = {}
    for page in PAGES:
        extra = pages.extra(page)
        found.setdefault(None if extra in LARGE else extra, []).append(page)
    return found


@pytest.mark.parametrize("extra", pages_by_extra())
def test_pages_run_as_printed(extra: str | None, clone: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV") and not name.startswith("PYTEST")
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-x"], input=script(extra, pages_by_extra()[extra]), cwd=clone,
        env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_what_runs_elsewhere_does() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    for command in ELSEWHERE:
        assert f"\n{command} " in ci
