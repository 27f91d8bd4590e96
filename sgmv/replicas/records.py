"""What the compiled loop works on: the trace, the replicas, and each adapter at each replica.

Adapters are numbered from 0, the base model, in the order of their ids; requests in the order in
which they arrive. A ticket is a request with its place in a replica's order of arrival, in one
integer: the smaller ticket is the older request.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sgmv.kernels.jit import IN_ORDER, digest_of, jit

NONE = -1  # no request, adapter, place or replica
ABSENT = -2  # of an adapter that is not in a list
NEVER = 2**63 - 1  # a time, and a ticket, behind all others
TICKET_BITS = 32  # of the request in a ticket

compiled = jit(IN_ORDER, digest_of(Path(__file__).parent))


def _record(kind: Any, *fields: str) -> np.dtype[Any]:
    """A record of fields of one kind, which are attributes in plain Python, too."""
    return np.dtype((np.record, np.dtype([(field, kind) for field in fields])))


REPLICA = _record(
    np.int64,
    *("start", "step_us"),  # of the steps that run now: when they began, and how long each takes
    "step",  # steps taken
    *("running", "waiting"),  # requests
    "held",  # adapters of running requests
    "strangers",  # tickets of `Fleet.strangers`
    "came",  # requests that ever came here
    "tried",  # those that came before this, and wait, were tried and deferred
    "ranks",  # the sum over running requests of their adapters' ranks
    "deferrals",
    *("slot_hits", "slot_misses", "slot_evictions"),
    *("host_hits", "host_misses", "host_evictions"),
    *("loaded_bytes", "read_bytes"),
    "busy_us",  # spent on steps and on loading
)
LINE = _record(
    np.int32,
    *("first", "last"),  # of the requests that wait for this adapter here
    "running",  # requests
    "place",  # in `Fleet.held`, while requests of it run
)
LINK = _record(np.int32, *("before", "after"))  # an adapter's neighbours in a list
ENDS = _record(np.int32, *("first", "last", "count"))  # of a list

Integers = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]
Records = np.ndarray[Any, np.dtype[Any]]


class Requests(NamedTuple):
    """The trace, and what becomes of each request, (n,)."""

    arrival_us: Integers
    adapter: Integers  # its number
    tokens: Integers
    chance: Numbers  # in [0, 1): what a placement that draws lots draws
    ticket: Integers
    after: Integers  # the request behind it in a line, or in the router's queue
    wait_us: Integers  # until its first step began
    replica: Integers  # that served it
    found: Integers  # where its adapter was: IN_SLOT, IN_HOST, ON_DISK
    retries: Integers  # how often its replica failed


class Fleet(NamedTuple):
    """All replicas' state. Rows are adapters and columns replicas, or rows are replicas."""

    rank: Integers  # (adapters,) 0 of the base model
    replicas: Records  # (N,) REPLICA
    wake: Integers  # (N,) when its steps end or are interrupted
    lines: Records  # (adapters, N) LINE
    host: Records  # (adapters, N) LINK: those in host memory, the next to be evicted first
    host_ends: Records  # (N,) ENDS
    slots: Records  # the same of those in slots
    slot_ends: Records
    held: Integers  # (N, 1 + max_loras) adapters of running requests; the base model is the first
    oldest: Integers  # (N, 1 + max_loras) the ticket of the oldest request that waits for each
    strangers: Integers  # (N, adapters) heaps: the oldest of each line that holds no slot
    ending: Integers  # (N, max_num_seqs) heaps: (the step before which it has ended) * n + request
    batch: Integers  # (max_num_seqs,) requests that were just admitted, or have just ended
    ids: Integers  # (max_num_seqs,) their adapters, ascending, each once
    up: Integers  # (N,) the replicas that have not failed come first
    router: Integers  # UP, FIRST, LAST: how many those are; the requests that no replica took


UP, FIRST, LAST = 0, 1, 2
IN_SLOT, IN_HOST, ON_DISK = 0, 1, 2


class Server(NamedTuple):
    """What every replica is like: limits, and costs in microseconds and bytes."""

    max_loras: int
    max_cpu_loras: int
    max_num_seqs: int
    max_overtakes: int
    lru: bool
    base_us: Integers  # (max_num_seqs + 1,) of a step, by its requests
    row_us: float  # what one more request costs, about: what a plan by rank weighs
    adapter_us: int
    rank_us: float
    padded: bool
    rank_bytes: float  # of an adapter, for each of its ranks
    load_us: float  # for each rank, from host memory into a slot
    read_us: float  # for each rank, from disk


class Router(NamedTuple):
    """How requests are placed."""

    placement: int
    most: int  # requests at a replica, beyond which no more are sent to it
    spill: int  # and beyond which one goes elsewhere, if it can
    weights: npt.NDArray[np.float64]  # (adapters, N) rendezvous: the highest is an adapter's home
    by_rank: Integers  # adapters, ascending by rank
    demand: Numbers  # (adapters,) rank-aware: what was asked of each, the last time counts most
    share: Numbers  # (adapters + 1,) where each adapter's share of all begins, by rank
    place: Integers  # (adapters,) its position in by_rank
    plan: Integers  # WHEN: when shares are made anew; EVERY: and how long they last
    candidates: Integers  # (N,) scratch


WHEN, EVERY = 0, 1
