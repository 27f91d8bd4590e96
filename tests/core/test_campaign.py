"""A campaign has one outcome, whoever did its pieces, and whatever ended meanwhile."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sgmv.campaign import Where, run
from sgmv.errors import SgmvError
from tests.help.campaign_work import (
    COUNT,
    ROOT,
    campaign,
    expected,
    killing,
    process_in,
    stop_after,
)

pytestmark = pytest.mark.once


def ran(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "log").read_text().split()]


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_processes_do_not_change_the_outcome(jobs: int, tmp_path: Path) -> None:
    heard: list[int] = []
    found = run(campaign(tmp_path), Where(jobs), lambda number, _: heard.append(number))
    assert json.dumps(found) == expected()
    assert sorted(heard) == sorted(ran(tmp_path)) == list(range(COUNT))


def test_a_worker_that_dies_has_its_piece_run_again(tmp_path: Path) -> None:
    found = run(campaign(tmp_path, "dies_once"), Where(2))
    assert json.dumps(found) == expected()
    assert len(list(tmp_path.glob("died-*"))) == 2


def test_a_worker_is_killed_by_its_id(tmp_path: Path) -> None:
    with killing(tmp_path):
        found = run(campaign(tmp_path, "waits_to_be_killed"), Where(2))
    assert json.dumps(found) == expected()


def test_a_piece_that_always_ends_its_process_is_named(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with pytest.raises(SgmvError, match=r'a process that died 2 times, over .*"number": 4'):
        run(campaign(tmp_path, "dies_always"), Where(2, journal=journal))
    done = dict(json.loads(line) for line in journal.read_text().splitlines()[1:])
    assert 4 not in done
    assert 3 in done


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_the_work_raises_is_raised(jobs: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such work as"):
        run(campaign(tmp_path, "refuses"), Where(jobs))


@pytest.mark.parametrize("jobs", [1, 2])
def test_stopped_and_resumed(jobs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is done is not done again, and the outcome is that of a campaign without a stop."""
    journal = tmp_path / "journal"
    done: list[int] = []

    with pytest.raises(KeyboardInterrupt):
        run(campaign(tmp_path), Where(jobs, journal=journal), stop_after(4, done))
    assert capsys.readouterr().err == f"stopped; --resume goes on with {journal}\n"
    (tmp_path / "log").unlink()
    again: list[int] = []
    where = Where(jobs, journal=journal, resume=True)
    found = run(campaign(tmp_path), where, lambda number, _: again.append(number))
    assert json.dumps(found) == expected()
    assert sorted(done + again) == list(range(COUNT))
    assert sorted(ran(tmp_path)) == sorted(again)


def test_ctrl_c_ends_the_workers_and_keeps_what_is_done(tmp_path: Path) -> None:
    program = (
        "from tests.help.campaign_work import *\n"
        "from sgmv.campaign import *\n"
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may have it ignored
        "folder = Path(sys.argv[1])\n"
        "whole = campaign(folder, 'waits_to_be_killed')\n"
        "run(whole, Where(2, journal=folder / 'journal'))"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    waiting = Path(f"/proc/{process_in(tmp_path)}")
    time.sleep(0.3)  # some more end
    os.killpg(started.pid, signal.SIGINT)
    _, err = started.communicate(timeout=150)
    assert "stopped; --resume goes on with" in err
    assert started.returncode != 0
    deadline = time.monotonic() + 60
    while waiting.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not waiting.exists()
    where = Where(2, journal=tmp_path / "journal", resume=True)
    assert json.dumps(run(campaign(tmp_path, "waits_to_be_killed"), where)) == expected()


def test_a_line_that_was_half_written_is_left_out(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    run(campaign(tmp_path), Where(journal=journal))
    whole = journal.read_text()
    journal.write_text(whole[:-9])
    (tmp_path / "log").unlink()
    found = run(campaign(tmp_path), Where(journal=journal, resume=True))
    assert json.dumps(found) == expected()
    assert ran(tmp_path) == [COUNT - 1]
    assert journal.read_text() == whole


def test_journals_are_of_these_pieces_alone(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    run(campaign(tmp_path), Where(journal=journal))
    for where, whole, said in (
        (Where(journal=journal), campaign(tmp_path), "a file that is not there yet"),
        (Where(journal=journal, resume=True), campaign(tmp_path, count=3), "of these very pieces"),
        (Where(journal=journal, resume=True), campaign(tmp_path, "refuses"), "these very pieces"),
        (Where(journal=tmp_path / "none", resume=True), campaign(tmp_path), "that is there"),
        (Where(resume=True), campaign(tmp_path), "a journal to go on with"),
        (Where(journal=tmp_path / ("9" * 300)), campaign(tmp_path), "a file that can be written"),
        (Where(journal=tmp_path), campaign(tmp_path), "a file that is not there yet"),
        (Where(journal=tmp_path, resume=True), campaign(tmp_path), "a file that can be written"),
    ):
        before = journal.read_bytes()
        with pytest.raises(SgmvError, match=said):
            run(whole, where)
        assert journal.read_bytes() == before
    journal.write_text("{}")
    with pytest.raises(SgmvError, match="these very pieces"):
        run(campaign(tmp_path), Where(journal=journal, resume=True))


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_ray_is_an_extra(tmp_path: Path) -> None:
    with pytest.raises(SgmvError, match="pip install ray"):
        run(campaign(tmp_path), Where(ray="auto"))
