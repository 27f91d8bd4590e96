"""Which requests run in a step: at most `max_loras` adapters, in the order in which they came.

    waiting   r0·A  r1·B  r2·C  r3·A  r4·base        max_loras = 2
    runs      r0·A  r1·B        r3·A  r4·base        r2 is deferred; r3 and r4 overtake it

The rule. Requests wait in the order in which they came. As long as the batch has room, the oldest
one that fits is admitted, and runs until it finishes. It fits if its adapter is that of a running
request, or pinned, or if fewer than `max_loras` adapters are either; the base model always fits.

No starvation. A request is overtaken when one that came after it is admitted before it. None is
overtaken more than `max_overtakes` times: at that number nothing behind it is admitted until it is.
The running requests finish, then, and it is the first to get what they leave. So every request runs
that waits while requests finish and fewer than `max_loras` adapters are pinned.

Of two waiting requests the older one has been overtaken at least as often, by all that overtook the
other; so it is enough to know how often the oldest has been.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Hashable, Mapping, Set
from heapq import heappop, heappush
from types import MappingProxyType
from typing import Generic, TypeVar

from sgmv.checks import check_count, check_several
from sgmv.errors import ServingError
from sgmv.serving.requests import BASE_MODEL, LoRARequest, check_lora_request

R = TypeVar("R", bound=Hashable)
Ticket = tuple[int, int]  # when it came, and its adapter's id


class _Line(Generic[R]):
    """One adapter's requests."""

    __slots__ = ("lora_request", "running", "waiting")

    def __init__(self, lora_request: LoRARequest | None) -> None:
        self.lora_request = lora_request
        self.running = 0
        self.waiting: deque[tuple[int, R]] = deque()  # when it came, and its id; oldest first


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
        self._running: dict[R, LoRARequest | None] = {}
        self._waiting: dict[R, Ticket] = {}
        self._lines: dict[int, _Line[R]] = {}
        self._pinned: frozenset[int] = frozenset()
        self._holding = {BASE_MODEL}  # adapters that hold a slot; the base model needs none
        # The oldest request of each line, by age; those that no longer are that are skipped.
        self._held_lines: list[Ticket] = []
        self._other_lines: list[Ticket] = []
        self._came = 0
        self._tried = 0  # those that came before this, and wait, were tried and deferred
        self._given_up: list[int] = []  # when those came that finished waiting; a heap

    @property
    def running(self) -> Mapping[R, LoRARequest | None]:
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

    def add(self, request_id: R, lora_request: LoRARequest | None = None) -> None:
        """Let a request wait.

        Semantics: it waits behind all that came before it.

        request_id    any hashable value that no other request here has
        lora_request  its adapter; None = the base model

        Raises ServingError for an id that waits or runs already, and for a lora_request with the
        lora_int_id of another adapter in use: the weights would change under its requests.
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
        adapter_id = BASE_MODEL if lora_request is None else lora_request.lora_int_id
        line = self._lines.get(adapter_id)
        if line is None:
            line = self._lines[adapter_id] = _Line(lora_request)
        elif line.lora_request != lora_request:
            raise ServingError(
                "lora_request",
                f"{line.lora_request}, as the other requests of id {adapter_id}",
                repr(lora_request),
                "give other weights another lora_int_id, or wait until those have finished",
            )
        line.waiting.append((self._came, request_id))
        self._waiting[request_id] = self._came, adapter_id
        self._came += 1
        if len(line.waiting) == 1:
            self._line_up(adapter_id, line)

    def schedule(self, pinned: Collection[int] = frozenset()) -> dict[R, LoRARequest | None]:
        """Admit what fits, and return what runs in the next step.

        Semantics: the rule at the head of this file; first admitted first. Where pinned adapters
        leave too few slots for those of all running requests, the adapters of the oldest ones that
        fit run, and the other requests sit out the step.

        pinned   ids of adapters that hold a slot whether they are used or not
        returns  request_id -> LoRARequest, or None for the base model

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
        step: dict[R, LoRARequest | None] = {}
        having = {BASE_MODEL, *self._pinned}
        for request_id, lora_request in self._running.items():
            adapter_id = BASE_MODEL if lora_request is None else lora_request.lora_int_id
            if adapter_id in having or len(having) <= self.max_loras:
                having.add(adapter_id)
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
            adapter_id = self._next() if self._waiting else None
            if adapter_id is None:
                newest = self._came  # all others were tried
                break
            line = self._lines[adapter_id]
            came, request_id = line.waiting.popleft()
            del self._waiting[request_id]
            self._running[request_id] = line.lora_request
            line.running += 1
            admitted.append(request_id)
            self.deferrals += came < self._tried
            self._holding.add(adapter_id)
            newest = came
            if line.waiting:
                self._line_up(adapter_id, line)
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
            lora_request = self._running.pop(request_id)
            adapter_id = BASE_MODEL if lora_request is None else lora_request.lora_int_id
            line = self._lines[adapter_id]
            line.running -= 1
            if not line.running:
                self._let_go(adapter_id, line)
        elif request_id in self._waiting:
            self._give_up(request_id)
        else:
            raise ServingError(
                "request_id", "one that waits or runs", repr(request_id), "finish a request once"
            )

    def _next(self) -> int | None:
        """The adapter to admit a request of now, its oldest one; None if there is none."""
        held = self._oldest(self._held_lines, True)
        other = self._oldest(self._other_lines, False)
        if other is None or (held is not None and held < other):
            return None if held is None else held[1]
        if len(self._holding) <= self.max_loras:  # with the base model
            return other[1]
        if held is None or self._overtaken(other[0]) >= self.max_overtakes:
            return None
        return held[1]

    def _oldest(self, lines: list[Ticket], held: bool) -> Ticket | None:
        """The first in this heap that still is the oldest of its line, and still belongs here."""
        while lines:
            came, adapter_id = lines[0]
            line = self._lines.get(adapter_id)
            if (
                line is not None
                and line.waiting
                and line.waiting[0][0] == came
                and (adapter_id in self._holding) is held
            ):
                return lines[0]
            heappop(lines)
        return None

    def _overtaken(self, came: int) -> int:
        """How many of those that came after the oldest waiting request were admitted."""
        while self._given_up and self._given_up[0] < came:
            heappop(self._given_up)
        # Of all that no longer wait, `came` are older: all that ever came before it.
        return self._came - len(self._waiting) - came - len(self._given_up)

    def _line_up(self, adapter_id: int, line: _Line[R]) -> None:
        """Put a line's oldest request where it is looked for."""
        lines = self._held_lines if adapter_id in self._holding else self._other_lines
        heappush(lines, (line.waiting[0][0], adapter_id))

    def _let_go(self, adapter_id: int, line: _Line[R]) -> None:
        """None of the line's requests runs any more: its slot is for others, unless pinned."""
        if not line.waiting:
            del self._lines[adapter_id]
        if adapter_id != BASE_MODEL and adapter_id not in self._pinned:
            self._holding.remove(adapter_id)
            if line.waiting:
                self._line_up(adapter_id, line)

    def _give_up(self, request_id: R) -> None:
        came, adapter_id = self._waiting.pop(request_id)
        heappush(self._given_up, came)
        line = self._lines[adapter_id]
        was_oldest = line.waiting[0][0] == came
        line.waiting.remove((came, request_id))
        if line.waiting and was_oldest:
            self._line_up(adapter_id, line)
        elif not line.waiting and not line.running:
            del self._lines[adapter_id]
        lines = self._oldest(self._held_lines, True), self._oldest(self._other_lines, False)
        oldest = min(filter(None, lines), default=(self._came,))[0]
        while self._given_up and self._given_up[0] < oldest:  # nobody is asked about these again
            heappop(self._given_up)

    def _hold(self, pinned: Collection[int]) -> None:
        """Note which adapters are pinned now."""
        pinned = _ids(pinned)
        if pinned == self._pinned:
            return
        before, self._pinned = self._pinned, pinned
        for adapter_id in before ^ self._pinned:
            line = self._lines.get(adapter_id)
            if line is not None and line.running:
                continue
            if adapter_id in self._pinned:
                self._holding.add(adapter_id)
            else:
                self._holding.remove(adapter_id)
            if line is not None and line.waiting:
                self._line_up(adapter_id, line)
