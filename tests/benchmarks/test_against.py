"""Two trees are timed in turn, each by its own process, and a wrong one is not timed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks.machine import commit
from benchmarks.record import ROOT, load
from benchmarks.studies import against
from benchmarks.studies.against import AgainstRecord
from tests.help.benched import must_not_run

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(commit(ROOT).hash == "unknown", reason="no git to take a commit from"),
]


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few columns, and no compiling: the processes start without the jit."""
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    sizes = {"H_IN": 24, "H_OUT": 24, "STARTS": 2, "ROUNDS": 3, "TURN_S": 0.0, "SETTLE_S": 0.0}
    for name, value in sizes.items():
        monkeypatch.setattr(against, name, value)


def test_both_trees_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["against", "HEAD", "--rows", "3", "--threads", "1", "--output", str(tmp_path)]
    assert command.main(argv) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^3 +identical +1 .*(faster|slower|undecided)$", shown, re.M)
    record = load(AgainstRecord, tmp_path / "against.json")
    assert record.against == "HEAD"
    assert [case.S for case in record.cases] == [3, 2, 3, 1]
    assert all(case.times.keys() == {"this", "commit"} for case in record.cases)
    assert all(
        case.times["this"].calls >= 6 and len(case.times["this"].rounds) > 1
        for case in record.cases
    )


def test_this_tree_against_itself_in_another_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, str]] = []
    started = against.started

    def noted(folder: Path, variables: dict[str, str]) -> Any:
        asked.append(variables)
        return started(folder, variables)

    monkeypatch.setattr(against, "started", noted)
    argv = ["against", ".", "--rows", "2", "--popularity", "identical", "--dtype", "bfloat16"]
    argv += ["--layer", "16x40", "--rank", "3", "--threads", "1", "--output", str(tmp_path)]
    argv += ["--here", "SGMV_VECTOR_BITS=128", "--there", "SGMV_VECTOR_BITS=0", "SGMV_AMX=1"]
    assert command.main(argv) == 0
    there = {"SGMV_VECTOR_BITS": "0", "SGMV_AMX": "1"}
    assert asked == [{"SGMV_VECTOR_BITS": "128"}, there] * against.STARTS
    shown = capsys.readouterr().out
    assert "16 -> 3 -> 40, bfloat16" in shown
    assert "there: SGMV_VECTOR_BITS=0 SGMV_AMX=1" in shown
    record = load(AgainstRecord, tmp_path / "against.json")
    assert (record.h_out, record.there, len(record.cases)) == (40, there, 1)


@pytest.mark.parametrize("wrong", ["--layer=4096", "--here=SGMV_AMX"])
def test_a_wrong_argument_is_refused(wrong: str) -> None:
    with pytest.raises(SystemExit):
        command.main(["against", ".", wrong, "--no-save"])


@pytest.mark.parametrize("wrong", against.SIDES)
def test_a_wrong_tree_is_not_timed(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout = against.checkout

    def planted(ref: str | None, folder: Path) -> None:
        checkout(ref, folder)
        if folder.name == wrong:
            with (folder / "sgmv" / "__init__.py").open("a") as file:
                file.write("\n_right = add_lora\n\ndef add_lora(y, *rest):\n")
                file.write("    _right(y, *rest)\n    y[-1, -1] += 1\n")

    monkeypatch.setattr(against, "checkout", planted)
    monkeypatch.setattr(against, "turns", must_not_run)
    argv = ["against", "HEAD", "--rows", "2", "--threads", "1", "--output", str(tmp_path)]
    assert command.main(argv) == 1
    assert re.search(rf"RED, nothing was timed; {wrong}:", capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_commit_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"REF: expected a commit .* got no-such-thing"):
        command.main(["against", "no-such-thing", "--no-save"])


def test_turns_alternate_and_swap_their_places() -> None:
    log: list[str] = []

    class Fake(against.Side):
        def __init__(self, name: str) -> None:
            self.name = name

        def turn(self) -> list[int]:
            log.append(self.name)
            return [1]

    found = against.turns([Fake("a"), Fake("b")])
    assert "".join(log) == "abbaab"
    assert found == [[[1]] * 3, [[1]] * 3]
