"""Which adapters are in host memory, and which of those in slots: ids and rules, no weights.

    disk ───read───> host memory ───load───> slots      what is in a slot is in host memory too
                     max_cpu_loras           max_loras

Where there is no room, each evicts its first id that need not stay. Ids are in the order in which
they came (FIFO), or in which they were last used (LRU); those of one step count as used at the same
time, in the order of their ids.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice

from sgmv.checks import check_count, fits_memory
from sgmv.errors import ServingError

POLICIES = ("lru", "fifo")


@dataclass
class Counters:
    """How often adapters were found where they were needed.

    Semantics: each id of a step counts once. `slot_hits` were in their slot, `slot_misses` were
    loaded into one; of those, and of ids asked into host memory alone, `host_hits` were in host
    memory, `host_misses` were read from disk. Evictions are what the policy removed, from a slot or
    from host memory; what leaves host memory leaves its slot, and then counts in both.

    >>> residency = Residency(max_loras=1, max_cpu_loras=2)
    >>> for i in (7, 9, 7):
    ...     residency.bring([i], keep={i})
    >>> residency.counters
    Counters(slot_hits=0, slot_misses=3, slot_evictions=2, host_hits=1, host_misses=2, \
host_evictions=0)
    """

    slot_hits: int = 0
    slot_misses: int = 0
    slot_evictions: int = 0
    host_hits: int = 0
    host_misses: int = 0
    host_evictions: int = 0


class Residency:
    """The ids in host memory and in slots, and which are evicted where there is no room.

    Semantics: `bring` makes room, then adds `ids`, which are ascending and all in `keep`: the ids
    that must stay, no more than there is room for. Nothing here is thread-safe.
    """

    def __init__(self, max_loras: int, max_cpu_loras: int, policy: str = "lru") -> None:
        self.max_loras = check_count("max_loras", max_loras, 1)
        self.max_cpu_loras = check_count("max_cpu_loras", max_cpu_loras, 1)
        if self.max_cpu_loras < self.max_loras:
            raise ServingError(
                "max_cpu_loras",
                f"at least max_loras = {self.max_loras}, as what is in a slot is in host memory",
                str(max_cpu_loras),
                "raise it, or lower max_loras",
            )
        if not isinstance(policy, str) or policy not in POLICIES:
            raise ServingError("policy", f"one of {POLICIES}", repr(policy), "pass one of these")
        self.policy = policy
        self.counters = Counters()
        self.host: OrderedDict[int, None] = OrderedDict()  # the next to go first
        self.slots: OrderedDict[int, int] = OrderedDict()  # id -> slot, likewise
        with fits_memory("max_loras", self.max_loras):
            self._free = list(range(self.max_loras))

    def bring_to_host(self, ids: Collection[int], keep: Collection[int]) -> None:
        """Have these ids in host memory."""
        new = [i for i in ids if i not in self.host]
        self.counters.host_hits += len(ids) - len(new)
        self.counters.host_misses += len(new)
        room = self.max_cpu_loras - len(self.host)
        for i in self._first(self.host, len(new) - room, keep):
            self.counters.host_evictions += 1
            self.counters.slot_evictions += self.leave(i)
        for i in new:
            self.host[i] = None
        self.touch(ids)

    def bring(self, ids: Collection[int], keep: Collection[int]) -> None:
        """Have these ids in slots, and so in host memory."""
        new = [i for i in ids if i not in self.slots]
        self.counters.slot_hits += len(ids) - len(new)
        self.counters.slot_misses += len(new)
        if new:
            self.bring_to_host(new, keep)
            for i in self._first(self.slots, len(new) - len(self._free), keep):
                self.counters.slot_evictions += 1
                self.leave_slot(i)
            for i in new:
                self.slots[i] = heappop(self._free)
        self.touch(ids)

    @staticmethod
    def _first(ids: Iterable[int], count: int, keep: Collection[int]) -> list[int]:
        """The first `count` ids that need not stay."""
        evictable: Iterator[int] = (i for i in ids if i not in keep)
        return list(islice(evictable, max(count, 0)))

    def touch(self, ids: Collection[int]) -> None:
        """Note that these, all in host memory, have just been used."""
        if self.policy == "lru":
            for i in ids:
                self.host.move_to_end(i)
                if i in self.slots:
                    self.slots.move_to_end(i)

    def leave_slot(self, i: int) -> None:
        """Free this id's slot; the lowest free one is the next to be filled."""
        heappush(self._free, self.slots.pop(i))

    def leave(self, i: int) -> bool:
        """Take this id out of host memory, and out of its slot; whether it was in one."""
        del self.host[i]
        had_slot = i in self.slots
        if had_slot:
            self.leave_slot(i)
        return had_slot
