"""Which requests run in a step: at most `max_loras` adapters, in the order in which they came.

    waiting   r0·A  r1·B  r2·C  r3·A  r4·base        max_loras = 2
    runs      r0·A  r1·B        r3·A  r4·base        r2 is deferred; r3 and r4 overtake it

The rule. Requests wait in the order in which they came. As long as the batch has room, the oldest
one that fits is admitted, and runs until it finishes. It fits if its adapter is that of a running
request, or pinned, or if fewer than `max_loras` adapters are either; the base model always fits. A
request for several adapters fits if there is room for all of those that are neither.

No starvation. A request is overtaken when one that came after it is admitted before it. None is
overtaken more than `max_overtakes` times: at that number nothing behind it is admitted until it is.
The running requests finish, then, and it is the first to get what they leave. So every request runs
that waits while requests finish and its adapters and the pinned ones are at most `max_loras`.

Of two waiting requests the older one has been overtaken at least as often, by all that overtook the
other; so it is enough to know how often the oldest has been.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Hashable, Iterable, Mapping, Set
from heapq import heappop, heappush
from types import MappingProxyType
from typing import Generic, TypeVar

from sgmv.checks import check_count, check_several
from sgmv.errors import ServingError
from sgmv.serving.requests import (
    BASE_MODEL,
    Asked,
    LoRARequest,
    check_lora_request,
    ids_of,
    members_of,
)

R = TypeVar("R", bound=Hashable)
Ids = tuple[int, ...]  # of the adapters that a request is for, in ascending order
Ticket = tuple[int, Ids]  # when it came, and what it is for
Line = deque[tuple[int, R]]  # waiting requests for the same adapters: when each came, and its id


def check_hashable(request_id: object) -> None:
    """Refuse what no dict takes as a key."""
    try:
        hash(request_id)
    except TypeError:
        kind = type(request_id).__name__
        raise ServingError("request_id", "a hashable value", kind, "pass a str or int") from None


def _ids(pinned: Collection[int]) -> frozenset[int]:
    """Ids of adapters, checked."""
    check_several("pinned", pinned, "ids of adapters")
    return frozenset(check_count("pinned", i, 1, math.inf) for i in pinned)


class Scheduler(Generic[R]):
    """The requests that wait and those that run.

    Semantics: `schedule` admits waiting requests by the rule at the head of this file, and returns
    all that run in the next step. A running request runs in every step until it finishes.

    max_loras      the most adapters in one step; the base model is none
    max_num_seqs   the most requests that run at once
    max_overtakes  how often a waiting request may be overtaken; 0 is strict first come, first
                   served

    Admitting one takes time in the logarithm of the adapters that wait, however many requests do.
    Raises DtypeError, ValueRangeError. Not thread-safe: one thread schedules.
    Source: vLLM, vllm/v1/core/sched/scheduler.py, which has no bound on overtaking.

    >>> french, greek = LoRARequest("french", 1, "a/fr"), LoRARequest("greek", 2, "a/el")
    >>> scheduler = Scheduler[str](max_loras=1)  # request ids are strings
    >>> for name, adapter in [("r0", french), ("r1", greek), ("r2", french), ("r3", None)]:
    ...     scheduler.add(name, adapter)
    >>> list(scheduler.schedule())
    ['r0', 'r2', 'r3']
    >>> scheduler.finish("r0"), scheduler.finish("r2")
    (None, None)
    >>> list(scheduler.schedule())
    ['r3', 'r1']
    >>> scheduler
    Scheduler(2 running, 0 waiting, max_loras=1, max_num_seqs=256, max_overtakes=256)
    """

    def __init__(self, max_loras: int, max_num_seqs: int = 256, max_overtakes: int = 256) -> None:
        self.max_loras = check_count("max_loras", max_loras, 1)
        self.max_num_seqs = check_count("max_num_seqs", max_num_seqs, 1)
        self.max_overtakes = check_count("max_overtakes", max_overtakes, 0)
        self.deferrals = 0  # of the admitted requests, those that others' adapters made wait
        self._running: dict[R, Asked] = {}
        self._asked: dict[R, Asked] = {}  # of those that wait
        self._waiting: dict[R, Ticket] = {}
        self._lines: dict[Ids, Line[R]] = {}
        self._lines_of: dict[int, set[Ids]] = {}  # those that an adapter is wanted in
        self._adapters: dict[int, LoRARequest] = {}  # in use: of requests that wait or run
        self._uses: Counter[int] = Counter()  # how many these are
        self._runs: Counter[int] = Counter()  # how many run
        self._pinned: frozenset[int] = frozenset()
        self._holding = {BASE_MODEL}  # adapters that hold a slot; the base model needs none
        # The oldest request of each line, by age, by how many slots it needs beside those that are
        # held; tickets that no longer are that are skipped.
        self._oldest_of: dict[int, list[Ticket]] = {}
        self._came = 0
        self._tried = 0  # those that came before this, and wait, were tried and deferred
        self._given_up: list[int] = []  # when those came that finished waiting; a heap

    @property
    def running(self) -> Mapping[R, Asked]:
        """The running requests, first admitted first; a view that follows them."""
        return MappingProxyType(self._running)

    @property
    def waiting(self) -> Collection[R]:
        """The waiting requests, oldest first; a view that follows them."""
        return self._waiting.keys()

    @property
    def holding(self) -> Set[int]:
        """Ids of the adapters that hold a slot: running, or pinned at the last step; and 0."""
        return self._holding

    def __repr__(self) -> str:
        return (
            f"Scheduler({len(self._running)} running, {len(self._waiting)} waiting, "
            f"max_loras={self.max_loras}, max_num_seqs={self.max_num_seqs}, "
            f"max_overtakes={self.max_overtakes})"
        )

    def add(self, request_id: R, lora_request: Asked = None) -> None:
        """Let a request wait.

        Semantics: it waits behind all that came before it.

        request_id    any hashable value that no other request here has
        lora_request  its adapter, or a LoRAMixture of several; None = the base model

        Raises ServingError for an id that waits or runs already, for more adapters than max_loras,
        and for a lora_request with the lora_int_id of another adapter in use: the weights would
        change under its requests.
        Source: vLLM, Scheduler.add_request.

        >>> scheduler = Scheduler(max_loras=1)
        >>> scheduler.add("r0")
        >>> scheduler.add("r0")
        Traceback (most recent call last):
        sgmv.errors.ServingError: request_id: expected one that neither waits nor runs, got 'r0'; \
give each request an id of its own
        """
        check_hashable(request_id)
        if request_id in self._waiting or request_id in self._running:
            raise ServingError(
                "request_id",
                "one that neither waits nor runs",
                repr(request_id),
                "give each request an id of its own",
            )
        check_lora_request(lora_request)
        ids, members = ids_of(lora_request), members_of(lora_request)
        if len(ids) > self.max_loras:
            raise ServingError(
                "lora_request",
                f"at most max_loras = {self.max_loras} adapters",
                str(len(ids)),
                "merge some, or make the scheduler with a larger max_loras",
            )
        for member, _ in members:
            known = self._adapters.get(member.lora_int_id, member)
            if known != member:
                raise ServingError(
                    "lora_request",
                    f"{known}, as the other requests of id {member.lora_int_id}",
                    repr(member),
                    "give other weights another lora_int_id, or wait until those have finished",
                )
        self._adapters.update({member.lora_int_id: member for member, _ in members})
        self._uses.update(ids)
        if ids not in self._lines:
            self._lines[ids] = deque()
            for i in ids:
                self._lines_of.setdefault(i, set()).add(ids)
        line = self._lines[ids]
        line.append((self._came, request_id))
        self._waiting[request_id], self._asked[request_id] = (self._came, ids), lora_request
        self._came += 1
        if len(line) == 1:
            self._line_up(ids)

    def schedule(self, pinned: Collection[int] = frozenset()) -> dict[R, Asked]:
        """Admit what fits, and return what runs in the next step.

        Semantics: the rule at the head of this file; first admitted first. Where pinned adapters
        leave too few slots for those of all running requests, the adapters of the oldest ones that
        fit run, and the other requests sit out the step.

        pinned   ids of adapters that hold a slot whether they are used or not
        returns  request_id -> what it asks for

        Source: vLLM, Scheduler.schedule.

        >>> scheduler = Scheduler(max_loras=2)
        >>> for i in (1, 2, 3):
        ...     scheduler.add(f"r{i}", LoRARequest(f"adapter-{i}", i, f"adapters/{i}"))
        >>> list(scheduler.schedule(pinned={3}))
        ['r1', 'r3']
        """
        self.admit(pinned)
        if len(self._holding) <= self.max_loras + 1:
            return dict(self._running)
        step: dict[R, Asked] = {}
        having = {BASE_MODEL, *self._pinned}
        for request_id, lora_request in self._running.items():
            ids = ids_of(lora_request)
            if len(having.union(ids)) <= max(self.max_loras + 1, len(having)):
                having.update(ids)
                step[request_id] = lora_request
        return step

    def admit(self, pinned: Collection[int] = frozenset()) -> list[R]:
        """Admit what fits, and return that alone.

        Semantics: as `schedule`, which does this first; oldest first.

        Source: as `schedule`.

        >>> scheduler = Scheduler(max_loras=1)
        >>> scheduler.add("r0")
        >>> scheduler.admit(), scheduler.admit()
        (['r0'], [])
        """
        self._hold(pinned)
        admitted: list[R] = []
        newest = 0
        while len(self._running) < self.max_num_seqs:
            ids = self._next() if self._waiting else None
            if ids is None:
                newest = self._came  # all others were tried
                break
            came, request_id = self._lines[ids].popleft()
            del self._waiting[request_id]
            self._running[request_id] = self._asked.pop(request_id)
            self._runs.update(ids)
            admitted.append(request_id)
            self.deferrals += came < self._tried
            newest = came
            new = [i for i in ids if i not in self._holding]
            self._holding.update(new)
            self._line_up(ids)
            self._have_changed(new)
        self._tried = max(self._tried, newest)
        return admitted

    def finish(self, request_id: R) -> None:
        """Forget a request: it is done, or given up, running or waiting.

        Semantics: it neither waits nor runs afterwards, and its id may be used again.

        Raises ServingError for one that does neither. Source: vLLM, Scheduler.finish_requests.

        >>> scheduler = Scheduler(max_loras=1)
        >>> scheduler.finish("r0")
        Traceback (most recent call last):
        sgmv.errors.ServingError: request_id: expected one that waits or runs, got 'r0'; \
finish a request once
        """
        check_hashable(request_id)
        if request_id in self._running:
            ids = ids_of(self._running.pop(request_id))
            self._runs.subtract(ids)
            gone = [i for i in ids if not self._runs[i] and i not in self._pinned]
            self._holding.difference_update(gone)
            self._forget(ids)
            self._have_changed(gone)
        elif request_id in self._waiting:
            self._give_up(request_id)
        else:
            raise ServingError(
                "request_id", "one that waits or runs", repr(request_id), "finish a request once"
            )

    def _next(self) -> Ids | None:
        """What to admit a request for now, its oldest one; None if there is none."""
        room = self.max_loras + 1 - len(self._holding)  # with the base model
        oldest: Ticket | None = None
        fitting: Ticket | None = None
        for need in list(self._oldest_of):
            found = self._oldest(need)
            if found is None:
                continue
            oldest = min(oldest or found, found)
            if need <= max(room, 0):
                fitting = min(fitting or found, found)
        if oldest is None or fitting is None:
            return None
        if oldest is not fitting and self._overtaken(oldest[0]) >= self.max_overtakes:
            return None
        return fitting[1]

    def _oldest(self, need: int) -> Ticket | None:
        """The first of these tickets that is the oldest of its line, and still needs as much."""
        tickets = self._oldest_of[need]
        while tickets:
            came, ids = tickets[0]
            line = self._lines.get(ids)
            if line and line[0][0] == came and self._need(ids) == need:
                return tickets[0]
            heappop(tickets)
        del self._oldest_of[need]
        return None

    def _need(self, ids: Ids) -> int:
        """Slots that these adapters need beside those that are held."""
        return sum(i not in self._holding for i in ids)

    def _overtaken(self, came: int) -> int:
        """How many of those that came after the oldest waiting request were admitted."""
        while self._given_up and self._given_up[0] < came:
            heappop(self._given_up)
        # Of all that no longer wait, `came` are older: all that ever came before it.
        return self._came - len(self._waiting) - came - len(self._given_up)

    def _line_up(self, ids: Ids) -> None:
        """Put a line's oldest request where it is looked for."""
        if line := self._lines.get(ids):
            heappush(self._oldest_of.setdefault(self._need(ids), []), (line[0][0], ids))

    def _have_changed(self, adapter_ids: Iterable[int]) -> None:
        """These hold a slot now, or no longer: lines that want them need another number."""
        for ids in {ids for i in adapter_ids for ids in self._lines_of.get(i, ())}:
            self._line_up(ids)

    def _forget(self, ids: Ids) -> None:
        """One request less is for these."""
        self._uses.subtract(ids)
        for i in ids:
            if not self._uses[i]:
                del self._uses[i], self._adapters[i]
                self._runs.pop(i, None)
        if not self._lines.get(ids, True):
            del self._lines[ids]
            for i in ids:
                self._lines_of[i].discard(ids)
                if not self._lines_of[i]:
                    del self._lines_of[i]

    def _give_up(self, request_id: R) -> None:
        came, ids = self._waiting.pop(request_id)
        del self._asked[request_id]
        heappush(self._given_up, came)
        line = self._lines[ids]
        was_oldest = line[0][0] == came
        line.remove((came, request_id))
        if line and was_oldest:
            self._line_up(ids)
        self._forget(ids)
        found = [self._oldest(need) for need in list(self._oldest_of)]
        oldest = min(filter(None, found), default=(self._came,))[0]
        while self._given_up and self._given_up[0] < oldest:  # nobody is asked about these again
            heappop(self._given_up)

    def _hold(self, pinned: Collection[int]) -> None:
        """Note which adapters are pinned now."""
        pinned = _ids(pinned)
        if pinned == self._pinned:
            return
        before, self._pinned = self._pinned, pinned
        changed = [i for i in before ^ pinned if not self._runs.get(i)]
        self._holding.difference_update(changed)
        self._holding.update(self._pinned.intersection(changed))
        self._have_changed(changed)
