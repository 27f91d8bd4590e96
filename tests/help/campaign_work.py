"""Pieces of work for campaigns: they end out of order, die once, die always."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sgmv.campaign import Campaign

ROOT = Path(__file__).parents[2]
COUNT = 12


def campaign(folder: Path, work: str = "number", count: int = COUNT) -> Campaign:
    """As many pieces, which leave their traces in a folder."""
    pieces = [{"folder": str(folder), "number": i} for i in range(count)]
    return Campaign("a test", f"{__name__}:{work}", pieces)


def expected(count: int = COUNT) -> str:
    """Its outcome, as JSON has it."""
    return json.dumps([[i, i / 3, "nan" if i == 2 else None] for i in range(count)])


def stop_after(count: int, done: list[int]) -> Callable[[int, Any], None]:
    """What hears of each piece, notes its number, and is interrupted by the `count`th."""

    def heard(number: int, _result: Any) -> None:
        done.append(number)
        if len(done) == count:
            raise KeyboardInterrupt

    return heard


def process_in(folder: Path) -> int:
    """The process that `waits_to_be_killed`, once it has said which it is."""
    said = folder / "pid"
    while not said.exists() or not said.read_text():
        time.sleep(0.01)
    return int(said.read_text())


@contextmanager
def killing(folder: Path) -> Iterator[None]:
    """Meanwhile that process is killed by its id."""
    thread = threading.Thread(target=lambda: os.kill(process_in(folder), signal.SIGKILL))
    thread.start()
    yield
    thread.join()


def number(piece: dict[str, Any]) -> list[Any]:
    """Its number, and a float of many digits; the earlier ones take longer."""
    log = Path(piece["folder"])
    time.sleep(0.002 * (7 - piece["number"] % 8))
    with (log / "log").open("a") as file:
        file.write(f"{piece['number']}\n")
    return [piece["number"], piece["number"] / 3, "nan" if piece["number"] == 2 else None]


def dies_once(piece: dict[str, Any]) -> list[Any]:
    """A worker that is killed in the middle of some pieces."""
    marker = Path(piece["folder"]) / f"died-{piece['number']}"
    if piece["number"] % 5 == 3 and not marker.exists():
        marker.write_text("")
        os.kill(os.getpid(), signal.SIGKILL)
    return number(piece)


def dies_always(piece: dict[str, Any]) -> list[Any]:
    """A kernel that ends its process."""
    if piece["number"] == 4:
        os._exit(139)
    return number(piece)


def refuses(piece: dict[str, Any]) -> list[Any]:
    """An exception of the work's own."""
    raise ValueError(f"piece: no such work as {json.dumps(piece['number'])}")


def waits_to_be_killed(piece: dict[str, Any]) -> list[Any]:
    """Says which process it is, and goes on once another has taken its place."""
    told = Path(piece["folder"]) / "pid"
    if piece["number"] == 5 and not told.exists():
        told.write_text(str(os.getpid()))
        time.sleep(60)
    return number(piece)
