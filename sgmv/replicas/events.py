"""The loop over all events: arrivals, failures, returns, and replicas that wake.

At one time failures and returns come first, then arrivals, then replicas, the lowest first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sgmv.replicas.records import ABSENT, FIRST, NEVER, NONE, UP, compiled
from sgmv.replicas.replica import awake, interrupt
from sgmv.replicas.router import dequeue, place, plan, queue
from sgmv.replicas.scheduler import add


@compiled
def run(fleet: Any, requests: Any, server: Any, router: Any, failures: Any) -> int:
    """Serve all requests; when the last one ended.

    failures  (m, 3) ascending microseconds, a replica, and 1 if it fails or 0 if it returns
    """
    n, arrival = len(requests.arrival_us), requests.arrival_us
    came = failed = 0
    end = 0
    while True:
        arrives = arrival[came] if came < n else NEVER
        fails = failures[failed, 0] if failed < len(failures) else NEVER
        r = _first_awake(fleet.wake)
        now = min(fleet.wake[r], arrives, fails)
        if now == NEVER:
            return end
        if fails == now:
            _change(fleet, requests, server, router, failures[failed])
            failed += 1
        elif arrives == now:
            plan(fleet, server, router, now)
            router.demand[requests.adapter[came]] += 1
            _send(fleet, requests, server, router, came, now)
            came += 1
        else:
            awake(fleet, requests, server, r)
            end = now
        _send_waiting(fleet, requests, server, router, now)


@compiled
def _first_awake(wake: Any) -> int:
    first = 0
    for r in range(1, len(wake)):
        if wake[r] < wake[first]:
            first = r
    return first


@compiled
def _send(fleet: Any, requests: Any, server: Any, router: Any, i: int, now: int) -> None:
    """A request goes to a replica, or waits at the router."""
    chosen = NONE
    if fleet.router[FIRST] == NONE:
        chosen = place(fleet, requests, router, i, False)
    if chosen == NONE:
        queue(fleet, requests, i)
    else:
        _hand_over(fleet, requests, server, chosen, i, now)


@compiled
def _hand_over(fleet: Any, requests: Any, server: Any, r: int, i: int, now: int) -> None:
    """Request i is replica r's."""
    add(fleet, requests, r, i)
    interrupt(fleet, server, r, now)


@compiled
def _send_waiting(fleet: Any, requests: Any, server: Any, router: Any, now: int) -> None:
    """Those at the router, as long as there is a replica for the first."""
    while fleet.router[FIRST] != NONE:
        i = fleet.router[FIRST]
        chosen = place(fleet, requests, router, i, True)
        if chosen == NONE:
            return
        dequeue(fleet, requests)
        _hand_over(fleet, requests, server, chosen, i, now)


@compiled
def _change(fleet: Any, requests: Any, server: Any, router: Any, failure: Any) -> None:
    """A replica fails, and all that it had is lost; or it returns, empty."""
    now, r, fails = failure[0], failure[1], failure[2]
    up = fleet.router[UP]
    if not fails:
        fleet.up[up] = r
        fleet.up[: up + 1].sort()
        fleet.router[UP] = up + 1
    else:
        kept = 0
        for k in range(up):
            if fleet.up[k] != r:
                fleet.up[kept] = fleet.up[k]
                kept += 1
        fleet.router[UP] = kept
        lost = _lose(fleet, requests, r, now)
        for k in range(len(lost)):
            requests.retries[lost[k]] += 1
            _send(fleet, requests, server, router, lost[k], now)


@compiled
def _lose(fleet: Any, requests: Any, r: int, now: int) -> Any:
    """Empty a replica; the requests that it had, in the order in which they first came."""
    replica = fleet.replicas[r]
    lost = np.empty(replica.running + replica.waiting, np.int64)
    count = replica.running
    for k in range(count):
        lost[k] = fleet.ending[r, k] % len(requests.arrival_us)
    for adapter in range(len(fleet.lines)):
        line = fleet.lines[adapter, r]
        i = line.first
        while i != NONE:
            lost[count] = i
            count += 1
            i = requests.after[i]
        line.first = NONE
        line.running = 0
        line.place = NONE if adapter else 0
        fleet.host[adapter, r].after = ABSENT
        fleet.slots[adapter, r].after = ABSENT
    for ends in (fleet.host_ends, fleet.slot_ends):
        ends[r].first = ends[r].last = NONE
        ends[r].count = 0
    if replica.running:
        replica.busy_us += now - replica.start
    replica.running = replica.waiting = replica.held = replica.strangers = replica.ranks = 0
    fleet.oldest[r, :] = NEVER
    fleet.wake[r] = NEVER
    lost.sort()
    return lost
