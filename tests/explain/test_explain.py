"""`python -m sgmv explain`: what it tells is what happens, and it fits any terminal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sgmv
from reference import workloads
from sgmv import emulator, explain, layouts
from sgmv.__main__ import main
from sgmv.explain import cpu, engines, launches, mixes, punica
from sgmv.explain.command import SHOWN, VIEWS
from sgmv.explain.question import Question
from sgmv.kernels.call import BLOCK_COUNT, BLOCKS, EXPAND_CUTS, INTEGER, SHRINK_CUTS
from sgmv.kernels.jit import vector
from sgmv.models import LAYERS, MODELS
from sgmv.popularity import POPULARITIES, popularity
from sgmv.terminal import ESCAPE, NARROWEST, PLAIN, Terminal
from tests.conftest import JITTED
from tests.help import punica_page
from tests.help.planting import Fault, verdict

pytestmark = pytest.mark.once

Ids = Sequence[int]
ids_lists = st.lists(st.integers(-1, 12), max_size=40) | st.lists(
    st.sampled_from([-1, 3, 2**40]), min_size=60, max_size=300
)
few = settings(max_examples=40)


def ask(ids: Ids, **changed: Any) -> Question:
    """The question that the command line's defaults ask."""
    adapters = len({i for i in ids if i != -1})
    settings = dict(h_in=4096, h_out=4096, rank=16, device=emulator.A100, threads=2)
    return Question(
        segments=sgmv.segment(ids), **{**settings, "max_loras": max(adapters, 1), **changed}
    )


def lengths(*rows: int) -> list[int]:
    return np.repeat(np.arange(len(rows)), rows).tolist()


def drawn(view: str, question: Question, width: int = 80, colour: bool = False) -> str:
    terminal = Terminal(width, colour, True, question.slots)
    return terminal.text(VIEWS[view].draw(VIEWS[view].facts(question), terminal))


# The facts


@pytest.mark.parametrize("kind", POPULARITIES)
def test_popularities_are_those_of_the_reference(kind: str) -> None:
    assert POPULARITIES == workloads.POPULARITIES
    for n in (0, 1, 2, 7, 64, 65, 500):
        for seed in (0, 3):
            np.testing.assert_array_equal(
                popularity(kind, n, seed), workloads.popularity(kind, n, seed)
            )


@few
@given(ids_lists)
def test_group_tells_every_row_once(ids: list[int]) -> None:
    check_group(cpu, ask(ids), ids)


def check_group(module: Any, question: Question, ids: list[int]) -> None:
    facts = module.group(question)
    assert facts["adapter_ids"] == ids
    rows = [row for i in sorted(set(ids)) for row, each in enumerate(ids) if each == i]
    assert facts["rows"] == rows
    for s, adapter_id in enumerate(facts["segment_ids"]):
        first, last = facts["seq_start"][s : s + 2]
        assert {ids[row] for row in rows[first:last]} == {adapter_id}


def plan_of_a_call(ids: list[int], rank: int, h_out: int, threads: int) -> dict[str, Any]:
    """The row blocks and cuts that a real call has left in its workspace."""
    launch = sys.modules["sgmv.launch"]
    used = sorted({i for i in ids if i != -1})
    A, B = np.zeros((rank, 8), "f"), np.zeros((h_out, rank), "f")
    stack = sgmv.AdapterStack.from_adapters(dict.fromkeys(used, (A, B)), h_in=8, h_out=h_out)
    sgmv.set_num_threads(threads)
    y = np.zeros((len(ids), h_out), "f")
    sgmv.add_lora(y, np.zeros((len(ids), 8), "f"), stack, np.array(ids, np.int64))
    call = launch._idle[-1].call
    blocks = vector(int(call[BLOCKS]), int(call[BLOCK_COUNT]) * 4, INTEGER).reshape(-1, 4)
    return {
        "blocks": [(used[slot], first, last) for slot, _, first, last in blocks.tolist()],
        "shrink_cuts": call[SHRINK_CUTS],
        "expand_cuts": call[EXPAND_CUTS],
    }


@pytest.mark.skipif(not JITTED, reason="the plain loops would take long")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_tasks_are_those_of_a_real_call(
    threads: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of small work, which one thread does alone, and of more."""
    monkeypatch.setattr(sys.modules["sgmv.launch"], "WORTH_SHARING_NS", 20_000)
    shared = set()
    for rank, h_out in ((16, 200), (17, 70), (64, 4096)):
        for n in (1, 5, 60, 400):
            ids = rng.integers(-1, rng.integers(1, 6), n).tolist()
            if max(ids) == -1:
                continue
            told = cpu.tasks(ask(ids, rank=rank, h_in=8, h_out=h_out, threads=threads))
            real = plan_of_a_call(ids, rank, h_out, threads)
            blocks = [(each["adapter_id"], each["first"], each["last"]) for each in told["blocks"]]
            assert blocks == real["blocks"]
            assert told["shrink_cuts"] == real["shrink_cuts"]
            assert told["expand_cuts"] == real["expand_cuts"]
            shared.add(told["shared"])
    assert shared == {False, True}


@few
@given(ids_lists, st.integers(1, 130), st.integers(1, 500), st.integers(1, 8))
def test_tasks_and_tiles_hold_everything_once(
    ids: list[int], rank: int, h_out: int, threads: int
) -> None:
    check_tasks(cpu, ask(ids, rank=rank, h_out=h_out, threads=threads), ids)


def check_tasks(module: Any, question: Question, ids: list[int]) -> None:
    facts = module.tasks(question)
    sorted_ids = sorted(ids)
    positions = []
    for block in facts["blocks"]:
        positions += range(block["first"], block["last"])
        assert {sorted_ids[p] for p in range(block["first"], block["last"])} == {
            block["adapter_id"]
        }
        if facts["tile_ranks"]:
            assert sum(block["tiles"]) == block["last"] - block["first"]
            assert set(block["tiles"]) <= set(facts["tile_ranks"])
    assert positions == list(range(ids.count(-1), len(ids)))
    for parts, extent in (("shrink_ranks", question.rank), ("expand_columns", question.h_out)):
        assert [i for low, high in facts[parts] for i in range(low, high)] == list(range(extent))


@few
@given(ids_lists)
def test_layouts_mean_the_batch(ids: list[int]) -> None:
    check_layout(engines, ask(ids), ids)


def check_layout(module: Any, question: Question, ids: list[int]) -> None:
    """By the strip that is drawn: one adapter between two edges, each row once, or base only."""
    facts = module.layout(question)
    assert set(facts) == set(engines.ENGINES)
    for name, engine in facts.items():
        rows, starts = engine["rows"], engine["starts"]
        assert engine["adapter_ids"] == [ids[row] for row in rows], name
        assert len(set(rows)) == len(rows), name
        assert {ids[row] for row in set(range(len(ids))) - set(rows)} <= {-1}, name
        if not starts:  # PEFT has no segments, and vLLM launches nothing for base-only rows
            assert not rows or name == "peft" or (name == "vllm_v1" and set(ids) == {-1}), name
            continue
        assert starts[0] == 0, name
        for first, last in zip(starts, [*starts[1:], len(rows)], strict=True):
            assert len({ids[row] for row in rows[first:last]}) == 1, name


def test_layouts_fields_are_the_engines() -> None:
    ids = [7, 7, -1, 3]
    question = ask(ids, h_in=64, h_out=32)
    facts = engines.layout(question)
    meta = layouts.vllm_v1(ids, 2, question.slots)
    assert facts["vllm_v1"]["fields"]["active_lora_ids"] == meta.active_lora_ids.tolist()
    assert facts["vllm_v1"]["shown"] == str(meta)
    assert "(16, 64)" in facts["punica"]["shown"]
    assert facts["lorax"]["fields"]["rank_data"]["16"]["s_start"] == [0, 3]
    assert facts["peft"]["fields"]["adapter_names"] == ["7", "7", "__base__", "3"]


def test_launches_are_the_emulators() -> None:
    """All its kernels, each given the widths, slots and device of the question."""
    question = ask([9, 4, -1, 9], h_in=512, h_out=1024, rank=32, max_loras=4, device=emulator.L4)
    facts = launches.launches(question)
    assert set(facts) == {name for name in emulator.__all__ if name.endswith(("shrink", "expand"))}
    for name, figures in facts.items():
        inner, outer = ("h_in", "r") if "shrink" in name else ("r", "h_out")
        assert (figures[inner], figures[outer]) == ((512, 32) if inner == "h_in" else (32, 1024))
        assert figures["device"] == "L4"
        assert figures["adapter_ids"] == [4, 9]
    assert facts["vllm_v1_shrink"]["grid_z"] == 5


def test_mixes_are_the_papers() -> None:
    """Section 7.1: 64 distinct rows at 0.94 FLOP per byte, of one adapter at 12.8."""
    facts = mixes.mixes(ask(popularity("uniform", 64).tolist()))
    found = {name: each["expand"]["intensity"] for name, each in facts["batches"].items()}
    assert round(found["distinct"], 2) == 0.94
    assert round(found["identical"], 1) == 12.8
    assert found["this batch"] == found["uniform"]
    for each in facts["batches"].values():
        launch = emulator.punica_cutlass_expand(lengths(*each["rows_per_adapter"]), 16, 4096)
        expand = each["expand"]
        assert expand["weight_bytes"] + expand["row_bytes"] == launch.io_bytes
        assert expand["weight_bytes"] == 2 * each["S"] * 16 * 4096


# The drawings


def test_the_barrier_is_drawn_for_both_releases() -> None:
    text = drawn("barrier", ask(lengths(1, 132)))
    before, after = text.split("release 1.1.0")
    assert "adapter 0: 1 step   ██┃  returns" in before
    assert "adapter 1: 3 steps  ██┃██┃  waits for ever" in before
    assert "The call never returns" in before
    assert "adapter 0: 1 step   ██┃  ┃  ┃  returns" in after
    assert "never" not in after
    assert "race" in punica.barrier(ask(lengths(1, 132)))["releases"]["1.1.0"]


def test_no_deadlock_is_drawn_where_there_is_none() -> None:
    for rows in ([65, 128], [3, 60], [200]):
        text = drawn("barrier", ask(lengths(*rows)))
        assert "for ever" not in text
        assert "never" not in text


@pytest.mark.parametrize("device", ["A100", "H100"])
def test_the_cliff_is_where_the_drawing_says(device: str) -> None:
    where = emulator.DEVICES[device]
    [told] = re.findall(
        r"takes up to (\d+) segments", drawn("barrier", ask([0], device=where), 500)
    )
    assert "They fit: K is split" in drawn("barrier", ask(range(int(told)), device=where), 500)
    over = drawn("barrier", ask(range(int(told) + 1), device=where), 500)
    assert "They do not fit" in over
    assert "K is not split" in over


def test_bars_show_full_only_what_is_full() -> None:
    terminal = Terminal()
    for total in (1, 32, 64, 1000):
        for used in {0, 1, total // 2, total - 1, total}:
            bar = terminal.bar(used, total, 8)
            assert len(bar) == 8
            assert ("█" in bar) == (used > 0)
            assert ("░" not in bar) == (used == total)


def test_shrinks_bars_are_its_steps() -> None:
    text = drawn("shrink", ask(lengths(1, 132, 64)))
    assert "adapter 0 █░░░░░░░  1 of 64 row slots" in text
    assert "adapter 1 ████████ ████████ █░░░░░░░  132 of 192 row slots" in text
    assert "adapter 2 ████████  64 of 64 row slots" in text


def test_a_kernel_that_there_is_not_is_named() -> None:
    assert "No such kernel (rank 8" in drawn("shrink", ask([0], rank=8), 500)
    assert "No such kernel" not in drawn("shrink", ask([0]), 500)
    text = drawn("launches", ask([0], h_in=3424), 500)
    assert "punica_bgmv_shrink ! " in text
    assert "punica_bgmv_shrink: width 3424" in text
    assert "!" not in drawn("launches", ask([0]), 500)


widths = st.integers(NARROWEST, 40) | st.integers(41, 220)


@settings(max_examples=60)
@given(
    ids_lists,
    widths,
    st.booleans(),
    st.sampled_from([1, 8, 16, 17, 64, 128]),
    st.sampled_from([1, 70, 4096, 11008]),
    st.sampled_from(sorted(emulator.DEVICES)),
)
def test_every_view_fits_every_width(
    ids: list[int], width: int, colour: bool, rank: int, h: int, device: str
) -> None:
    question = ask(ids, rank=rank, h_in=h, h_out=h, device=emulator.DEVICES[device])
    for view in VIEWS:
        json.dumps(VIEWS[view].facts(question), allow_nan=False)
        for line in drawn(view, question, width, colour).splitlines():
            assert len(ESCAPE.sub("", line)) <= width, (view, line)


@few
@given(ids_lists, widths)
def test_colour_only_repeats_what_the_text_says(ids: list[int], width: int) -> None:
    """Without its escapes a coloured view is the plain one, whose titles are underlined."""
    question = ask(ids)
    for view in VIEWS:
        plain = drawn(view, question, width).splitlines()
        coloured = ESCAPE.sub("", drawn(view, question, width, colour=True)).splitlines()
        underlined = [line for line in plain if not line or set(line) != {"─"}]
        assert [line.rstrip() for line in coloured] == underlined, view


def test_an_adapter_has_one_colour_everywhere() -> None:
    question = ask([50, 90, -1, 50, 90, 90])
    for view in ("group", "tasks", "layout", "shrink", "expand"):
        text = drawn(view, question, colour=True)
        cells = set(re.findall(r"\x1b\[30;48;5;(\d+)m *(50|90)\x1b", text))
        assert len(cells) == 2, view
        assert len({colour for colour, _ in cells}) == 2, view


def test_long_batches_are_cut_short() -> None:
    text = drawn("group", ask([0, 1] * 2000))
    assert "more" in text
    assert len(text.splitlines()) < 60
    assert len(drawn("layout", ask(range(1000))).splitlines()) < 300


# The terminal


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "sgmv", "explain", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        timeout=120,
    )


def on_a_terminal(**environment: str) -> str:
    """What the command writes where standard output is a terminal."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
    ours, its = pty.openpty()
    variables = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "60", **environment}
    variables = {name: value for name, value in variables.items() if value != "unset"}
    program = [sys.executable, "-m", "sgmv", "explain", "group"]
    with subprocess.Popen(program, stdout=its, env=variables) as process:
        os.close(its)
        read = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux's way to say that nobody writes any more
                break
            if not part:
                break
            read += part
        process.wait(60)
    os.close(ours)
    return read.decode()


def test_colours_on_a_terminal_alone() -> None:
    assert "\x1b[" in on_a_terminal(NO_COLOR="unset")
    assert "\x1b[" not in on_a_terminal(NO_COLOR="1")
    assert "\x1b[" not in on_a_terminal(NO_COLOR="unset", TERM="dumb")
    assert b"\x1b[" not in command("group").stdout


def test_without_box_characters_where_the_encoding_has_none() -> None:
    done = command("shrink", "barrier", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode("ascii")
    assert "#......." in text
    assert "##|" in text


def test_every_character_that_is_drawn_has_a_plain_one() -> None:
    question = ask(lengths(1, 132, 3))
    for view in VIEWS:
        assert drawn(view, question).translate(PLAIN).isascii(), view


def test_a_reader_that_leaves_is_no_error() -> None:
    """As in `python -m sgmv explain | head -1`."""
    program = [sys.executable, "-m", "sgmv", "explain", "layout", "--ids", "0"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(program, stdout=writing, stderr=subprocess.PIPE, timeout=120)
    os.close(writing)
    assert done.stderr == b""


# The command


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


# The tour


def test_the_tour_is_fresh() -> None:
    page = punica_page.PAGE.read_text()
    assert punica_page.rendered(page) == page, "run `python -m tests.help.punica_page`"


def test_the_tour_has_a_picture_for_each_of_six_steps() -> None:
    steps = re.split(r"^## (?=\d)", punica_page.PAGE.read_text(), flags=re.MULTILINE)[1:]
    views = [command for step in steps for command in punica_page.COMMAND.findall(step)]
    assert [view.split()[1] for view in views] == [
        "group", "layout", "shrink", "barrier", "expand", "popularity",
    ]  # fmt: skip
    assert len(steps) == 6


# Faults that the checks above must find

FAULTS: dict[str, tuple[Fault, Callable[..., None]]] = {
    "rows unsorted": (
        Fault("explain.cpu", "segments.rows.tolist()", "list(range(segments.n))"),
        check_group,
    ),
    "starts one row late": (
        Fault("explain.cpu", "segments.seq_start.tolist()", "(segments.seq_start + 1).tolist()"),
        check_group,
    ),
    "ranks cut twice": (
        Fault("explain.cpu", "_parts(shrink_cuts, question.rank, RANK_UNIT)", "[[0, 8], [0, 8]]"),
        check_tasks,
    ),
    "base-only rows in a block": (
        Fault("explain.cpu", "np.where(has_adapter, question.rank, 0)", "np.full(segments.S, 1)"),
        check_tasks,
    ),
    "another engine's order": (
        Fault(
            "explain.engines",
            "lambda layout: layout.token_indices_sorted_by_lora_ids",
            "lambda layout: None",
        ),
        check_layout,
    ),
    "edges of the padding": (
        Fault("explain.engines", "[: int(np.count_nonzero(layout.num_tokens_per_lora))]", ""),
        check_layout,
    ),
}


def verdict_on(check: Callable[..., None], *faults: Fault) -> str:
    """What the check says of a copy of the package: of its own question, and its own view."""
    module = "sgmv.explain.engines" if check is check_layout else "sgmv.explain.cpu"
    ids = [4, -1, 9, 4, 9, 9, 4, -1, 4, 4]

    def check_copy(modules: dict[str, Any]) -> None:
        question = modules["sgmv.explain.question"].Question(
            segments=modules["sgmv"].segment(ids),
            **dict(h_in=64, h_out=70, rank=17, max_loras=4, threads=2),
            device=modules["sgmv.emulator"].A100,
        )
        check(modules[module], question, ids)

    return verdict(check_copy, *faults, name=module)


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name: str) -> None:
    fault, check = FAULTS[name]
    assert verdict_on(check, fault).startswith("AssertionError")


@pytest.mark.parametrize("check", [check_group, check_tasks, check_layout])
def test_without_a_fault_nothing_is_found(check: Callable[..., None]) -> None:
    assert verdict_on(check) == "nothing"
