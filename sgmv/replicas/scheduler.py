"""The rule of `sgmv.serving.scheduler`, for requests that ask for one adapter each.

A line is the requests that wait for one adapter at one replica. Those of an adapter that holds a
slot are looked through (there are at most max_loras); the oldest of each other line is in a heap.
"""

from __future__ import annotations

from typing import Any

from sgmv.replicas.lists import pop, push
from sgmv.replicas.records import NEVER, NONE, TICKET_BITS, compiled


@compiled
def add(fleet: Any, requests: Any, r: int, i: int) -> None:
    """Request i waits at replica r."""
    replica = fleet.replicas[r]
    line = fleet.lines[requests.adapter[i], r]
    requests.ticket[i] = replica.came << TICKET_BITS | i
    requests.after[i] = NONE
    replica.came += 1
    replica.waiting += 1
    if line.first == NONE:
        line.first = i
        _line_up(fleet, requests, r, line)
    else:
        requests.after[line.last] = i
    line.last = i


@compiled
def admit(fleet: Any, requests: Any, server: Any, r: int) -> int:
    """Admit what fits, into `fleet.batch`; how many these are."""
    replica = fleet.replicas[r]
    admitted, newest = 0, 0
    while replica.running < server.max_num_seqs:
        ticket = _next(fleet, server, r) if replica.waiting else NEVER
        if ticket == NEVER:
            newest = replica.came
            break
        newest = ticket >> TICKET_BITS
        i = ticket & ((1 << TICKET_BITS) - 1)
        adapter = requests.adapter[i]
        line = fleet.lines[adapter, r]
        replica.waiting -= 1
        replica.running += 1
        replica.ranks += fleet.rank[adapter]
        replica.deferrals += newest < replica.tried
        if line.place == NONE:
            pop(fleet.strangers[r], replica.strangers)
            replica.strangers -= 1
            replica.held += 1
            line.place = replica.held
            fleet.held[r, replica.held] = adapter
        line.running += 1
        line.first = requests.after[i]
        fleet.oldest[r, line.place] = NEVER
        if line.first != NONE:
            _line_up(fleet, requests, r, line)
        fleet.batch[admitted] = i
        admitted += 1
    replica.tried = max(replica.tried, newest)
    return admitted


@compiled
def finish(fleet: Any, requests: Any, r: int, i: int) -> None:
    """Request i no longer runs; the slot of its adapter is free if it was the last."""
    replica = fleet.replicas[r]
    adapter = requests.adapter[i]
    line = fleet.lines[adapter, r]
    replica.running -= 1
    replica.ranks -= fleet.rank[adapter]
    line.running -= 1
    if line.running or adapter == 0:
        return
    last = replica.held
    fleet.held[r, line.place] = fleet.held[r, last]
    fleet.oldest[r, line.place] = fleet.oldest[r, last]
    fleet.lines[fleet.held[r, last], r].place = line.place
    replica.held -= 1
    line.place = NONE
    if line.first != NONE:
        _line_up(fleet, requests, r, line)


@compiled
def _line_up(fleet: Any, requests: Any, r: int, line: Any) -> None:
    """Put a line's oldest request where it is looked for."""
    ticket = requests.ticket[line.first]
    if line.place == NONE:
        push(fleet.strangers[r], fleet.replicas[r].strangers, ticket)
        fleet.replicas[r].strangers += 1
    else:
        fleet.oldest[r, line.place] = ticket


@compiled
def _next(fleet: Any, server: Any, r: int) -> int:
    """The ticket to admit now; NEVER if there is none."""
    replica = fleet.replicas[r]
    fitting = NEVER
    for place in range(replica.held + 1):
        fitting = min(fitting, fleet.oldest[r, place])
    stranger = fleet.strangers[r, 0] if replica.strangers else NEVER
    oldest = min(fitting, stranger)
    if replica.held < server.max_loras:
        fitting = oldest
    if fitting != oldest:
        # The number of those that no longer wait and came after the oldest that does.
        overtaken = replica.came - replica.waiting - (oldest >> TICKET_BITS)
        if overtaken >= server.max_overtakes:
            return NEVER
    return fitting
