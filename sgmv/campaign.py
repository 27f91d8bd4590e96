"""Long work in pieces: in this process, in several of this machine, or on a Ray cluster.

    pieces    0 1 2 3 4 5 ..   ──>  whoever is free  ──>  results, by number  ──>  one outcome
                                                           each also in the journal

A piece is a value of JSON, and so is its result: `work`, a function of an importable module, makes
the one of the other and of nothing else. So the outcome does not depend on where the pieces ran, in
which order they ended, how often a process died meanwhile, or how often the campaign was stopped
and taken up again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

from sgmv.console import at_least, progress
from sgmv.errors import SgmvError, shown
from sgmv.extras import load

AHEAD = 2  # pieces handed out for each process: none waits for the next
MOST_JOBS = 1024
TRIES = 2  # of a piece that runs alone, until it is said to end its process

Found = Iterator[tuple[int, Any]]  # numbers of pieces with their results, as they end


class Campaign(NamedTuple):
    """What is to be done. `work` is "module:function", of one piece."""

    name: str
    work: str
    pieces: Sequence[Any]

    def digest(self) -> str:
        """The same for the same pieces of the same work alone."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()


class Where(NamedTuple):
    """How a campaign runs, as the command line says it."""

    jobs: int = 1
    ray: str | None = None
    journal: Path | None = None
    resume: bool = False


HERE = Where()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of every command that is a campaign."""
    add = parser.add_argument
    add("--jobs", type=at_least(1), default=1, help="processes (%(default)s)")
    add(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="run on Ray: the cluster at this address; without one, that which runs or a local one",
    )
    add("--journal", type=Path, metavar="FILE", help="keep what is done in this file")
    add("--resume", action="store_true", help="go on with what the journal has")


def chosen(given: argparse.Namespace) -> Where:
    """What those arguments say."""
    return Where(given.jobs, given.ray, given.journal, given.resume)


def run(
    campaign: Campaign,
    where: Where = HERE,
    heard: Callable[[int, Any], None] | None = None,
) -> list[Any]:
    """The results of all pieces, in their order.

    Semantics: `work(piece)` of each, as JSON has them. A piece whose process dies runs again; one
    that ends its process every time is an error that names it. What a journal has is not run.

    where  the processes or the cluster; a journal, and whether to go on with it
    heard  called with the number and the result of each piece as it ends

    Raises SgmvError for more than 1024 processes, a journal of something else, one that is there
    already or is not, and Ray where it is not installed or there is no such cluster; what `work`
    raises.

    >>> run(Campaign("roots", "math:sqrt", [1, 4, 9]))
    [1.0, 2.0, 3.0]
    """
    if not 1 <= where.jobs <= MOST_JOBS:
        got, remedy = shown(where.jobs), "pass the number of cores"
        raise SgmvError("jobs", f"1 to {MOST_JOBS} processes", got, remedy)
    journal = Journal(where, campaign)
    total = len(campaign.pieces)
    left = [i for i in range(total) if i not in journal.done]
    try:
        with closing(journal), progress() as show:
            started = time.monotonic()
            for count, (number, result) in enumerate(_found(campaign, where, left), 1):
                journal.add(number, result)
                if heard is not None:
                    heard(number, journal.done[number])
                rate = count / max(time.monotonic() - started, 1e-9)
                done = f"{campaign.name}: {len(journal.done):,} of {total:,} pieces"
                show(f"{done}, {rate:.3g} a second, {(len(left) - count) / rate:,.0f} s left")
    except KeyboardInterrupt:
        if where.journal:
            sys.stderr.write(f"stopped; --resume goes on with {where.journal}\n")
        raise
    return [journal.done[i] for i in range(total)]


def _found(campaign: Campaign, where: Where, left: list[int]) -> Found:
    if where.ray is not None:
        return _on_ray(campaign, where.ray, left)
    if where.jobs > 1:
        return _in_processes(campaign, where.jobs, left)
    return ((i, call(campaign.work, campaign.pieces[i])) for i in left)


def call(work: str, piece: Any) -> Any:
    """The result of a piece: what a worker does."""
    return resolve_name(work)(piece)


class Journal:
    """What is done of a campaign; a line of JSON for each piece, after one for the campaign.

    Semantics: a line that was only half written, as where the machine stopped, is left out.
    """

    def __init__(self, where: Where, campaign: Campaign) -> None:
        self.done: dict[int, Any] = {}
        self._file: Any = None
        path = where.journal
        head = {"campaign": campaign.name, "digest": campaign.digest()}
        if path is None:
            if where.resume:
                remedy = "name the file with --journal"
                raise SgmvError("resume", "a journal to go on with", "none", remedy)
            return
        try:
            there = path.exists()
            if there == where.resume:
                if there:
                    self._read(path, head)
                self._file = path.open("a" if there else "x", encoding="utf-8")
        except OSError as error:
            remedy = "name another file"
            raise SgmvError("journal", "a file that can be written", str(error), remedy) from error
        if there != where.resume:
            expected = "a journal that is there" if where.resume else "a file that is not there yet"
            remedy = "leave --resume out" if where.resume else "pass --resume to go on with it"
            raise SgmvError("journal", expected, str(path), remedy)
        if not there:
            self._write_line(json.dumps(head))

    def _read(self, path: Path, head: dict[str, str]) -> None:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        lines = whole.splitlines()
        try:
            same = bool(lines) and json.loads(lines[0]) == head
            self.done = dict(json.loads(line) for line in lines[1:]) if same else {}
        except ValueError:
            same = False
        if not same:
            remedy = "give the arguments that it was made with, or name another file"
            raise SgmvError("journal", "a journal of these very pieces", str(path), remedy)
        if whole != text:
            os.truncate(path, len(whole.encode()))

    def add(self, number: int, result: Any) -> None:
        """Keep a result, as JSON gives it back."""
        line = json.dumps([number, result])
        self.done[number] = json.loads(line)[1]
        if self._file is not None:
            self._write_line(line)

    def _write_line(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more will be added."""
        if self._file is not None:
            self._file.close()


def _in_processes(campaign: Campaign, jobs: int, left: list[int]) -> Found:
    """By processes of this machine. Where one dies, what was handed out runs again, alone."""
    waiting, alone = deque(left), deque[int]()
    tries: dict[int, int] = {}
    while waiting or alone:
        room = 1 if alone else jobs
        handed: dict[Future[Any], int] = {}
        with _pool(room) as pool:
            try:
                while waiting or alone or handed:
                    source = alone if room == 1 else waiting
                    while source and len(handed) < (1 if room == 1 else AHEAD * jobs):
                        number = source.popleft()
                        piece = campaign.pieces[number]
                        handed[pool.submit(call, campaign.work, piece)] = number
                    if not handed:
                        break  # those that ran alone are done: all processes again
                    for future in wait(handed, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        yield handed.pop(future), result
            except BrokenProcessPool:
                again = sorted(handed.values())
                if room == 1:
                    [number] = again
                    tries[number] = tries.get(number, 0) + 1
                    _check_tries(campaign, number, tries[number])
                alone.extendleft(reversed(again))
            except BaseException:
                _kill(pool)
                raise


def _check_tries(campaign: Campaign, number: int, count: int) -> None:
    if count >= TRIES:
        raise SgmvError(
            "piece",
            "work that ends with a result",
            f"a process that died {count} times, over {json.dumps(campaign.pieces[number])}",
            "run it by itself to see why",
        )


def _pool(jobs: int) -> ProcessPoolExecutor:
    """New processes that leave Ctrl-C to this one. Nothing of this process is theirs."""
    context = multiprocessing.get_context("spawn")
    ignore = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    return ProcessPoolExecutor(jobs, context, ignore)


def _kill(pool: ProcessPoolExecutor) -> None:
    """At once: pieces that run may take long, and will run again."""
    for process in list((pool._processes or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)


def _on_ray(campaign: Campaign, address: str, left: list[int]) -> Found:
    """By tasks of a Ray cluster, which runs those of a worker that dies again."""
    try:
        ray: Any = load("ray")
    except ImportError as error:
        remedy = "pip install ray"
        raise SgmvError("ray", "Ray to be installed", "none", remedy) from error
    _join(ray, address)
    try:
        task = ray.remote(max_retries=TRIES)(call)
        most = max(1, AHEAD * int(ray.cluster_resources().get("CPU", 1)))
        waiting = deque(left)
        handed: dict[Any, int] = {}
        while waiting or handed:
            while waiting and len(handed) < most:
                number = waiting.popleft()
                handed[task.remote(campaign.work, campaign.pieces[number])] = number
            for done in ray.wait(list(handed))[0]:
                number = handed.pop(done)
                try:
                    result = ray.get(done)
                except ray.exceptions.WorkerCrashedError:
                    _check_tries(campaign, number, TRIES + 1)
                yield number, result
    finally:
        ray.shutdown()


def _join(ray: Any, address: str) -> None:
    """The cluster at this address; for "auto" the one that runs here, or else one of our own.

    Workers look for modules where this process does: on other machines, in the same places.
    """
    paths = os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))
    how = {"runtime_env": {"env_vars": {"PYTHONPATH": paths}}, "log_to_driver": False}
    how |= {"logging_level": "ERROR"}
    if address != "auto":
        _check_address(address)
    try:
        ray.init(address=address, **how)
    except ConnectionError as error:
        if address != "auto":
            raise _no_cluster(address) from error
        ray.init(include_dashboard=False, **how)


def _check_address(address: str) -> None:
    """Ray itself tries for minutes where nobody answers."""
    host, _, port = address.rpartition(":")
    if host.isascii() and port.isdecimal() and "/" not in host:
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise _no_cluster(address) from error


def _no_cluster(address: str) -> SgmvError:
    remedy = "start one with `ray start --head`, or leave the address out"
    return SgmvError("ray", "the address of a cluster", address, remedy)
