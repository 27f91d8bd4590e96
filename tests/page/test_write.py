"""The file of the page: what it holds, what is refused before it is written, and the command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sgmv import emulator
from sgmv.__main__ import main
from sgmv.emulator import DEVICES
from sgmv.errors import SgmvError
from sgmv.explorer.write import DOCS, MOST_ROWS, write_html
from tests.help.explored import FOLDER
from tests.help.planting import ROOT

pytestmark = pytest.mark.once


def test_the_file_needs_nothing_else(tmp_path: Path) -> None:
    text = write_html(tmp_path / "explorer.html").read_text()
    paper = (
        "https://arxiv.org/abs/2310.18547"  # a link, which asks for nothing until it is followed
    )
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg", paper}
    assert not re.search(r"<link[^>]+stylesheet|<script[^>]+src=|@import|url\((?!#)", text)
    start = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])["start"]  # type: ignore[index]
    assert start["ids"] == "2, 0, -1, 2, 0"


def test_the_page_links_to_the_documents_beside_it(tmp_path: Path) -> None:
    path = write_html(tmp_path / "explorer.html")
    linked = json.loads(re.search(r'id="data">(.*?)</script>', path.read_text())[1])["docs"]  # type: ignore[index]
    assert [each["text"] for each in linked] == list(DOCS.values())
    for each, name in zip(linked, DOCS, strict=True):
        assert (tmp_path / each["href"]).resolve() == ROOT / name


def test_a_device_of_ones_own_stands_in_the_page(tmp_path: Path) -> None:
    toy = emulator.Device("</script>toy", 2, 102400, 101376, 16, 1536, 10**11, 10**13)
    text = write_html(tmp_path / "explorer.html", [3, -1], device=toy).read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])  # type: ignore[index]
    assert data["devices"][-1]["name"] == data["start"]["device"] == toy.name
    assert [each["name"] for each in data["devices"][:-1]] == list(DEVICES)


@pytest.mark.parametrize(
    ("argument", "given"),
    [
        ("batch", {"batch": []}),
        ("batch", {"batch": [0] * (MOST_ROWS + 1)}),
        ("batch", {"batch": [10**9]}),
        ("adapter_ids", {"batch": [-2]}),
        ("h_in", {"h_in": 0}),
        ("r", {"r": 1025}),
        ("h_out", {"h_out": 1.5}),
        ("kernel", {"kernel": "half_v_error"}),
        ("release", {"release": "1.2.0"}),
        ("device", {"device": "A100"}),
    ],
)
def test_refusals_come_before_the_file(
    tmp_path: Path, argument: str, given: dict[str, Any]
) -> None:
    with pytest.raises(SgmvError) as refused:
        write_html(tmp_path / "explorer.html", **given)
    assert refused.value.argument == argument
    assert not list(tmp_path.iterdir())


def test_the_command_writes_and_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "explorer.html"
    main(["explorer", str(path), "--no-open"])
    assert capsys.readouterr().out == f"written: {path.as_uri()}\n"
    assert path.read_text() == write_html(tmp_path / "again.html").read_text()


def test_the_command_refuses_a_place_it_cannot_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["explorer", str(tmp_path / "nowhere" / "explorer.html"), "--no-open"])
    said = capsys.readouterr().err
    assert said.startswith("sgmv: error: PATH: expected a file that can be written")


def test_the_command_opens_the_page_where_there_is_a_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opened = tmp_path / "explorer.html", []
    monkeypatch.setattr("webbrowser.open", lambda uri: opened.append(uri) or len(opened) == 1)
    monkeypatch.setenv("DISPLAY", ":0")
    for told in ("opened: ", "written; open it in a browser: "):  # the second time it fails
        main(["explorer", str(path)])
        assert capsys.readouterr().out == f"{told}{path.as_uri()}\n"
    assert opened == [path.as_uri()] * 2


def test_a_wheel_takes_the_page_along() -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    [globs] = re.findall(r'"sgmv.explorer" = \[(.*)\]', declared)
    taken = {path for glob in re.findall(r'"(.*?)"', globs) for path in FOLDER.glob(glob)}
    assert taken == {path for path in FOLDER.iterdir() if path.suffix in (".html", ".css", ".js")}
    assert '"sgmv.explorer"' in declared.split("packages =")[1].split("]")[0]
