"""`python -m sgmv explain`: what it shows, its flags, and what it refuses."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from sgmv import emulator, explain
from sgmv.__main__ import main
from sgmv.explain.command import SHOWN, VIEWS
from sgmv.models import LAYERS, MODELS
from sgmv.popularity import popularity
from tests.help.explained import ask, drawn

pytestmark = pytest.mark.once


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["explain", *arguments])
    return capsys.readouterr().out


def test_what_is_not_shown_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys)
    assert [line.split(":")[0] for line in titles(text)] == ["Group", "Launches"]
    assert len(text.splitlines()) <= 44  # about one screen
    for view in set(VIEWS) - set(SHOWN):
        assert view in text.split("Further: ")[1]
    assert "Further: " not in said(capsys, "group")


def titles(text: str) -> list[str]:
    """The lines that are underlined."""
    lines = text.splitlines()
    return [line for line, below in pairwise(lines) if below and set(below) == {"─"}]


def test_all_are_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--all")
    assert len(titles(text)) == len(VIEWS)
    assert "Further: " not in text
    assert list(json.loads(said(capsys, "--all", "--json"))) == list(VIEWS)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_table_says_what_it_is_about(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pasted output names its batch, layer, rank and device."""
    monkeypatch.setenv("COLUMNS", str(width))
    layer = ["--h-in", "512", "--h-out", "640", "--rank", "32", "--device", "L4"]
    for view in VIEWS:
        text = said(capsys, view, "--ids", "-1,0,0,5", *layer)
        assert max(map(len, text.splitlines())) <= width
        below = " ".join(text.splitlines()[2:4])
        expected = "4 rows (1 base only), 2 adapters; h_in=512, r=32, h_out=640; L4"
        assert below.startswith(expected), view


def test_tables_name_their_units_and_end_before_the_text() -> None:
    text = drawn("launches", ask([0, 1]))
    table = text.split("exits: blocks")[0].splitlines()
    assert table[-1] == ""
    assert "         grid    threads   exits         wasted  shared  asked" in table[2]
    assert " ".join(table[3].split()) == "kernel blocks per block blocks waves % KiB MB"
    for view, row in (("group", "1:2"), ("tasks", "1:2"), ("popularity", "this batch")):
        lines = drawn(view, ask([0, 1])).splitlines()
        last = max(i for i, line in enumerate(lines) if row in line and "│" not in line and i < 16)
        assert lines[last + 1] == "", view


def test_json_is_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    ids = [0, 1, 0, -1, 2]
    found = json.loads(said(capsys, "--ids", "0,1,0,-1,2", "--threads", "2", "--json"))
    assert list(found) == list(SHOWN)
    for view, facts in found.items():
        assert facts == json.loads(json.dumps(VIEWS[view].facts(ask(ids))))


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [
        (["--ids=-1,3"], [-1, 3]),
        (["--ids", "-1,3"], [-1, 3]),
        (["--ids", "-1"], [-1]),
        (["--ids", ""], []),
        (["--lengths", "1,3"], [0, 1, 1, 1]),
        (["--popularity", "identical", "--n", "3"], [0, 0, 0]),
        ([], [2, 0, -1, 2, 0]),
        (["--n", "9"], popularity("skewed", 9).tolist()),
        (["--popularity", "uniform"], popularity("uniform", 64).tolist()),
        (
            ["--popularity", "skewed", "--n", "9", "--seed", "4"],
            popularity("skewed", 9, 4).tolist(),
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_ways_to_tell_a_batch(
    arguments: list[str], ids: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    facts = json.loads(said(capsys, "group", "--json", *arguments))
    assert facts["group"]["adapter_ids"] == ids


@pytest.mark.parametrize("model", MODELS)
def test_layers_of_models_by_name(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    for layer in LAYERS:
        found = json.loads(said(capsys, "launches", "--json", "--layer", f"{model} {layer}"))
        into, out = (found["launches"][f"punica_{k}"] for k in ("sgmv_shrink", "cutlass_expand"))
        assert (into["h_in"], out["h_out"]) == MODELS[model].layer(layer)


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "rtx_4090", "RTX-4090"])
def test_devices_by_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "shrink", "--json", "--device", name))
    assert found["shrink"]["device"] == "RTX 4090"


def test_engines_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, "layout", "--json", "--engines", "peft,punica"))
    assert list(found["layout"]) == ["peft", "punica"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-view"], "VIEW: expected one of group, layout, tasks"),
        (["--ids", "0,x"], "--ids: expected whole numbers of at least -1, with commas, got 'x'"),
        (["--ids", "0,-2"], "--ids: expected whole numbers of at least -1, with commas, got '-2'"),
        (
            ["--lengths", "-1,1"],
            "--lengths: expected whole numbers of at least 0, with commas",
        ),
        (["--popularity", "zipf"], "--popularity: expected one of distinct, uniform, skewed"),
        (["--popularity", "skewed", "--n=-1"], "--n: expected at least 0, got -1"),
        (["--ids", "0", "--lengths", "1"], "--lengths: expected no --ids beside it; leave one"),
        (["--ids", "0", "--n", "1"], "--n: expected --popularity beside it"),
        (["--rank", "0"], "--rank: expected at least 1, got 0\n"),
        (["--rank", "x"], "--rank: expected a whole number, got 'x'\n"),
        (["--rank"], "--rank: expected a value, got none\n"),
        (["--rnk=1"], "--rnk=1: no such argument; see --help\n"),
        (["--all", "group"], "--all: expected no VIEW beside it, got group; leave"),
        (["--h-in", "0"], "--h-in: expected at least 1, got 0"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--layer", "Llama-3-8B"], "as in 'Llama-3-8B q'; got 'Llama-3-8B'"),
        (["--device", "TPU"], "--device: expected one of A100, H100"),
        (["--engines", "punica,orca"], "--engines: expected one of punica, lorax"),
        (["--max-loras", "1"], "--max-loras: expected at least the batch's 2 adapters, got 1"),
        (["--top-k", "9"], "--top-k: expected at most the 8 experts, got 9"),
        (["--experts", "1025"], "--experts: expected at most 1024, got 1025"),
        (["--json", "--html", "x"], "--html: expected no --json beside it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["explain", *arguments])
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("sgmv: error: ")
    assert message in said
    assert len(said.splitlines()) == 1


def test_html_is_the_explorer_of_this_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sgmv.explorer import write_html

    got, wanted = tmp_path / "got.html", tmp_path / "wanted.html"
    layer = ["--h-in", "512", "--h-out", "640", "--rank", "32", "--device", "L4"]
    text = said(capsys, "--ids", "3,0", *layer, "--html", str(got))
    assert str(got) in text
    write_html(wanted, [3, 0], h_in=512, r=32, h_out=640, device=emulator.L4)
    assert got.read_text() == wanted.read_text()


def test_a_place_that_cannot_be_written_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["explain", "--html", str(tmp_path / "no-such-folder" / "x.html")])
    assert "--html: expected a file that can be written" in capsys.readouterr().err


def test_help_names_every_view() -> None:
    named = re.findall(r"^    (\w+) ", explain.__doc__ or "", re.MULTILINE)
    assert named == list(VIEWS)
