"""The page in Chromium, and its JavaScript in Chromium or node; skipped where there is neither."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sgmv.explorer.write import write_html
from tests.help.chromium import FOUND, Page, chromium, opened
from tests.help.explored import NO_CHROMIUM, NODE, Javascript


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if FOUND is None:
        pytest.skip(NO_CHROMIUM)
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def javascript(request: pytest.FixtureRequest) -> Javascript:
    """(script, expression) -> the expression's value, after the script."""
    if FOUND is None and NODE is None:
        pytest.skip("needs Chromium or node")

    def in_chromium(script: str, expression: str) -> Any:
        page = request.getfixturevalue("page")
        return json.loads(
            page.evaluate(f"(() => {{{script}\nreturn JSON.stringify({expression})}})()")
        )

    def in_node(script: str, expression: str) -> Any:
        program = f"{script}\nprocess.stdout.write(JSON.stringify({expression}))"
        done = subprocess.run([str(NODE), "-"], input=program, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return in_chromium if FOUND else in_node


@pytest.fixture
def explorer(page: Page, tmp_path: Path) -> Iterator[Page]:
    """The page as `make explorer` writes it; whatever a test does, nothing may go wrong in it."""
    yield from opened(page, write_html(tmp_path / "explorer.html").as_uri())
