"""One replica's steps: what ends, what is admitted, what that loads, how long the next steps take.

Between two events all steps are alike, and are taken at once. An event is the end of a request, or
an arrival while the batch has room; a replica wakes at the end of the step in which it falls.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sgmv.replicas.lists import append, has, pop, push, remove
from sgmv.replicas.records import IN_HOST, IN_SLOT, NEVER, NONE, ON_DISK, compiled
from sgmv.replicas.scheduler import admit, finish


@compiled
def awake(fleet: Any, requests: Any, server: Any, r: int) -> None:
    """The steps up to now are over: requests end, others are admitted, and the next steps begin."""
    replica = fleet.replicas[r]
    now = fleet.wake[r]
    n = len(requests.arrival_us)
    if replica.running:
        replica.busy_us += now - replica.start
        replica.step += (now - replica.start) // replica.step_us
        _end(fleet, requests, server, r)
    admitted = admit(fleet, requests, server, r)
    if admitted:
        _note_where_found(fleet, requests, r, admitted)
        loading = _bring(fleet, requests, server, r, admitted)
        replica.busy_us += loading
        now += loading
        for k in range(admitted):
            i = fleet.batch[k]
            requests.wait_us[i] = now - requests.arrival_us[i]
            requests.replica[i] = r
            end = replica.step + requests.tokens[i]
            push(fleet.ending[r], replica.running - admitted + k, end * n + i)
    if replica.running:
        replica.start = now
        replica.step_us = _step_us(fleet, requests, server, r)
        fleet.wake[r] = now + (fleet.ending[r, 0] // n - replica.step) * replica.step_us
    else:
        fleet.wake[r] = NEVER


@compiled
def interrupt(fleet: Any, server: Any, r: int, now: int) -> None:
    """A request came: it may be admitted after the step that runs now."""
    replica = fleet.replicas[r]
    if not replica.running:
        fleet.wake[r] = min(fleet.wake[r], now)
    elif replica.running < server.max_num_seqs:
        steps = max(1, -(-(now - replica.start) // replica.step_us))
        fleet.wake[r] = min(fleet.wake[r], replica.start + steps * replica.step_us)


@compiled
def _end(fleet: Any, requests: Any, server: Any, r: int) -> None:
    """Finish those with no step left; their adapters count as used now."""
    replica = fleet.replicas[r]
    n = len(requests.arrival_us)
    ended = 0
    while replica.running and fleet.ending[r, 0] < (replica.step + 1) * n:
        i = pop(fleet.ending[r], replica.running) % n
        finish(fleet, requests, r, i)
        fleet.batch[ended] = i
        ended += 1
    for k in range(_ids_of(fleet, requests, ended)):
        if fleet.lines[fleet.ids[k], r].place == NONE:
            _touch(fleet, server, r, fleet.ids[k])


@compiled
def _ids_of(fleet: Any, requests: Any, count: int) -> int:
    """The adapters of `fleet.batch`, into `fleet.ids`, ascending; how many these are."""
    for k in range(count):
        fleet.ids[k] = requests.adapter[fleet.batch[k]]
    fleet.ids[:count].sort()
    distinct = 0
    for k in range(count):
        adapter = fleet.ids[k]
        if adapter and (not distinct or adapter != fleet.ids[distinct - 1]):
            fleet.ids[distinct] = adapter
            distinct += 1
    return distinct


@compiled
def _note_where_found(fleet: Any, requests: Any, r: int, count: int) -> None:
    for k in range(count):
        i = fleet.batch[k]
        adapter = requests.adapter[i]
        if adapter == 0 or has(fleet.slots, adapter, r):
            requests.found[i] = IN_SLOT
        else:
            requests.found[i] = IN_HOST if has(fleet.host, adapter, r) else ON_DISK


@compiled
def _bring(fleet: Any, requests: Any, server: Any, r: int, count: int) -> int:
    """Have the adapters of `fleet.batch` in slots, as `Residency.bring`; how long that takes."""
    replica = fleet.replicas[r]
    distinct = _ids_of(fleet, requests, count)
    new = unread = loading = 0
    for k in range(distinct):
        adapter = fleet.ids[k]
        if not has(fleet.slots, adapter, r):
            new += 1
            rank = fleet.rank[adapter]
            loading += int(np.rint(server.load_us * rank))
            replica.loaded_bytes += int(np.rint(server.rank_bytes * rank))
            if not has(fleet.host, adapter, r):
                unread += 1
                loading += int(np.rint(server.read_us * rank))
                replica.read_bytes += int(np.rint(server.rank_bytes * rank))
    replica.slot_hits += distinct - new
    replica.slot_misses += new
    replica.host_hits += new - unread
    replica.host_misses += unread
    if new:
        _evict(fleet, r, True, fleet.host_ends[r].count + unread - server.max_cpu_loras)
        _append_new(fleet.host, fleet.host_ends, fleet.ids, distinct, r)
        _evict(fleet, r, False, fleet.slot_ends[r].count + new - server.max_loras)
        _append_new(fleet.slots, fleet.slot_ends, fleet.ids, distinct, r)
    for k in range(distinct):
        _touch(fleet, server, r, fleet.ids[k])
    return loading


@compiled
def _append_new(links: Any, ends: Any, ids: Any, count: int, r: int) -> None:
    for k in range(count):
        if not has(links, ids[k], r):
            append(links, ends, ids[k], r)


@compiled
def _evict(fleet: Any, r: int, from_host: bool, count: int) -> None:
    """The first that no running request holds; what leaves host memory leaves its slot, too."""
    links, ends = (fleet.host, fleet.host_ends) if from_host else (fleet.slots, fleet.slot_ends)
    adapter = ends[r].first
    while count > 0:
        after = links[adapter, r].after
        if fleet.lines[adapter, r].place == NONE:
            if from_host:
                remove(fleet.host, fleet.host_ends, adapter, r)
                fleet.replicas[r].host_evictions += 1
            if has(fleet.slots, adapter, r):
                remove(fleet.slots, fleet.slot_ends, adapter, r)
                fleet.replicas[r].slot_evictions += 1
            count -= 1
        adapter = after


@compiled
def _touch(fleet: Any, server: Any, r: int, adapter: int) -> None:
    """It has just been used: the last to be evicted, where that counts."""
    if server.lru:
        remove(fleet.host, fleet.host_ends, adapter, r)
        append(fleet.host, fleet.host_ends, adapter, r)
        if has(fleet.slots, adapter, r):
            remove(fleet.slots, fleet.slot_ends, adapter, r)
            append(fleet.slots, fleet.slot_ends, adapter, r)


@compiled
def _step_us(fleet: Any, requests: Any, server: Any, r: int) -> int:
    """How long a step of these requests takes: as in `sgmv.serving.simulate`."""
    replica = fleet.replicas[r]
    ranks = replica.ranks
    if server.padded:
        highest = 0
        for place in range(1, replica.held + 1):
            highest = max(highest, fleet.rank[fleet.held[r, place]])
        ranks = highest * (replica.running - fleet.lines[0, r].running)
    step_us = server.base_us[replica.running] + server.adapter_us * replica.held
    return int(step_us + int(np.rint(server.rank_us * ranks)))
