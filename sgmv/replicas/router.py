"""Where a request goes: one of the replicas that are up, by one of five rules.

    random        any, all alike
    least-loaded  that with the fewest requests, waiting or running
    rendezvous    its adapter's home, that of the highest weight; where that has `spill` requests,
                  the next highest that has fewer
    rank-aware    adapters in the order of their ranks lie on a line, each as long as what was asked
                  of it times what a row of its rank costs; each replica has an equal piece
    ray           of those with its adapter in host memory, two drawn by lot, the less loaded; where
                  none has it, or all that have it are full, of those with the fewest adapters; a
                  request that waited at the router goes to any

"Full" is to have `most` requests. Where all are, requests wait at the router, the first to come the
first to go; so they do while no replica is up.
"""

from __future__ import annotations

from typing import Any

from sgmv.replicas.lists import has
from sgmv.replicas.records import EVERY, FIRST, LAST, NONE, UP, WHEN, compiled

RANDOM, LEAST_LOADED, RENDEZVOUS, RANK_AWARE, RAY = range(5)


@compiled
def place(fleet: Any, requests: Any, router: Any, i: int, waited: bool) -> int:
    """The replica for request i; NONE if it has to wait at the router."""
    up, chance = fleet.router[UP], requests.chance[i]
    adapter = requests.adapter[i]
    if up == 0:
        return NONE
    if router.placement == RANDOM:
        chosen = int(fleet.up[int(chance * up)])
    elif router.placement == LEAST_LOADED:
        chosen = _least_loaded(fleet, chance)
    elif router.placement == RENDEZVOUS:
        chosen = _home(fleet, router, adapter)
    elif router.placement == RANK_AWARE:
        chosen = _by_rank(fleet, router, adapter, chance)
    else:
        chosen = _as_ray(fleet, router, adapter, chance, waited)
    if chosen != NONE and load(fleet, chosen) >= router.most:
        return NONE
    return int(chosen)


@compiled
def load(fleet: Any, r: int) -> int:
    """Requests that wait or run at a replica."""
    return int(fleet.replicas[r].running + fleet.replicas[r].waiting)


@compiled
def _least_loaded(fleet: Any, chance: float) -> int:
    """Looked for from a replica drawn by lot: of several alike each is as likely."""
    up = fleet.router[UP]
    start, best = int(chance * up), NONE
    for k in range(up):
        r = fleet.up[(start + k) % up]
        if best == NONE or load(fleet, r) < load(fleet, best):
            best = r
    return int(best)


@compiled
def _home(fleet: Any, router: Any, adapter: int) -> int:
    home, spilled = NONE, NONE
    for k in range(fleet.router[UP]):
        r = fleet.up[k]
        weight = router.weights[adapter, r]
        if home == NONE or weight > router.weights[adapter, home]:
            home = r
        if load(fleet, r) < router.spill and (
            spilled == NONE or weight > router.weights[adapter, spilled]
        ):
            spilled = r
    return int(home if spilled == NONE else spilled)


@compiled
def _by_rank(fleet: Any, router: Any, adapter: int, chance: float) -> int:
    at = router.place[adapter]
    start, end = router.share[at], router.share[at + 1]
    position = start + chance * (end - start)
    up = fleet.router[UP]
    return int(fleet.up[min(int(position * up), up - 1)])


@compiled
def plan(fleet: Any, server: Any, router: Any, now: int) -> None:
    """Shares by what was asked for lately: each period counts half as much as the one after it."""
    if now < router.plan[WHEN]:
        return
    router.plan[WHEN] = now + router.plan[EVERY]
    total = 0.0
    for at in range(len(router.by_rank)):
        adapter = router.by_rank[at]
        cost = server.row_us + server.rank_us * fleet.rank[adapter]
        router.share[at] = total
        total += router.demand[adapter] * max(cost, 1e-9)
        router.demand[adapter] /= 2
    router.share[len(router.by_rank)] = total
    for at in range(len(router.share)):
        router.share[at] /= total


@compiled
def _as_ray(fleet: Any, router: Any, adapter: int, chance: float, waited: bool) -> int:
    up = fleet.router[UP]
    having = fewest = 0
    for k in range(up):
        r = fleet.up[k]
        count = fleet.host_ends[r].count
        fewest = count if k == 0 else min(fewest, count)
        if has(fleet.host, adapter, r) and load(fleet, r) < router.most:
            router.candidates[having] = r
            having += 1
    if having and adapter and not waited:
        return int(_of_two(fleet, router, having, chance))
    count = 0
    for k in range(up):
        r = fleet.up[k]
        chosen = waited or adapter == 0 or fleet.host_ends[r].count == fewest
        if chosen and load(fleet, r) < router.most:
            router.candidates[count] = r
            count += 1
    return int(_of_two(fleet, router, count, chance))


@compiled
def _of_two(fleet: Any, router: Any, count: int, chance: float) -> int:
    """Two different candidates by lot, the less loaded; NONE if there are none."""
    if count == 0:
        return NONE
    drawn = chance * count
    first = int(drawn)
    one = router.candidates[first]
    if count == 1:
        return int(one)
    second = int((drawn - first) * (count - 1))
    other = router.candidates[second + (second >= first)]
    return int(other if load(fleet, other) < load(fleet, one) else one)


@compiled
def queue(fleet: Any, requests: Any, i: int) -> None:
    """Request i waits at the router, behind all others."""
    requests.after[i] = NONE
    last = fleet.router[LAST]
    if last == NONE:
        fleet.router[FIRST] = i
    else:
        requests.after[last] = i
    fleet.router[LAST] = i


@compiled
def dequeue(fleet: Any, requests: Any) -> None:
    """The first of them waits no longer."""
    fleet.router[FIRST] = requests.after[fleet.router[FIRST]]
    if fleet.router[FIRST] == NONE:
        fleet.router[LAST] = NONE
