"""The adapters of a model, as requests need them in slots: `AdapterSlots`.

Which adapters are in host memory and in slots is decided in residency.py; their weights are read
and moved in weights.py, ahead of a step in a thread: loading.py. Here are the calls: their checks,
their pins, and the lock that they share.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy.typing as npt

from sgmv.adapter import Adapter, load_peft
from sgmv.checks import check_count, check_dtype
from sgmv.errors import ServingError, some
from sgmv.peft_names import near_names
from sgmv.serving.loading import Loader
from sgmv.serving.requests import Asked, LoRARequest, by_id
from sgmv.serving.residency import Counters, Residency
from sgmv.serving.weights import Active, Hosted, Weights, check_known, check_unpinned
from sgmv.stack import AdapterStack
from sgmv.warm_up import warm_up

_all: weakref.WeakSet[AdapterSlots] = weakref.WeakSet()


class AdapterSlots:
    """The adapters of a model: up to `max_cpu_loras` in host memory, `max_loras` of them in slots.

    Semantics: `activate` puts what a step needs into slots, from host memory or from disk, and lets
    others go: of those neither needed nor pinned the least recently used (policy "lru"), or the
    first that came ("fifo"). What leaves host memory leaves its slot. A module that an adapter does
    not change is base only for its rows.

    max_loras      slots: the most adapters in one step
    max_cpu_loras  adapters in host memory, those in slots included; at least max_loras
    max_lora_rank  the highest rank taken; weights are stored at their own rank, without padding
    modules        the model's layers, name -> (h_in, h_out): an adapter of any other is refused.
                   Left out, the layers that loaded adapters name, with the first one's widths; an
                   adapter is refused whose names are like theirs, but under another prefix
    dtype          of the weights, as for AdapterStack; others are converted when loaded
    policy         "lru" or "fifo"
    read           lora_path -> {module: Adapter}; reads PEFT's directories, if left out
    base           module -> (W, bias), or (W, None): the model's own, as `AdapterStack.load` takes
                   them for adapters with magnitudes (DoRA). They are read when such an adapter
                   comes into host memory
    saved          parameters that an adapter may replace (PEFT's modules_to_save), such as a head's
                   "score.weight": `Step.saved` has them. Adapters that replace others are refused

    Any thread may call any method; calls wait for each other's reading, but not for `prefetch`'s.
    Raises ServingError, DtypeError, ValueRangeError, ShapeError.
    Source: vLLM, vllm/lora/model_manager.py, LRUCacheLoRAModelManager, and worker_manager.py.

    >>> import numpy as np
    >>> def read(path):
    ...     return {"up": Adapter(np.ones((2, 3), "float32"), np.ones((5, 2), "float32"))}
    >>> slots = AdapterSlots(max_loras=1, max_cpu_loras=2, max_lora_rank=8, read=read)
    >>> french, greek = LoRARequest("french", 7, "a/fr"), LoRARequest("greek", 9, "a/el")
    >>> slots.activate([french])
    {7: Active(slot=0, generation=1)}
    >>> slots.activate([greek]), slots.active, slots.loaded
    ({9: Active(slot=0, generation=2)}, [9], [7, 9])
    >>> print(slots)
    id  name    slot  pinned  layers  bytes
     7  french     -      no       1     64
     9  greek      0      no       1     64
    >>> slots
    AdapterSlots(1 of 1 slots used, 2 of 2 in host memory, max_lora_rank=8, float32)
    """

    def __init__(
        self,
        max_loras: int,
        max_cpu_loras: int,
        max_lora_rank: int,
        *,
        modules: Mapping[str, tuple[int, int]] | None = None,
        dtype: npt.DTypeLike = "float32",
        policy: str = "lru",
        read: Callable[[str], Mapping[str, Adapter]] = load_peft,
        base: Mapping[str, tuple[Any, Any]] | None = None,
        saved: Collection[str] = (),
    ) -> None:
        self._residency = Residency(max_loras, max_cpu_loras, policy)
        self.max_lora_rank = check_count("max_lora_rank", max_lora_rank, 1)
        self.dtype = check_dtype("dtype", dtype)
        warm_up([self.dtype])
        self.policy = policy
        limits = self._residency, self.max_lora_rank, self.dtype
        self._weights = Weights(*limits, read, modules, base, saved)
        self._pinned: frozenset[int] = frozenset()
        self._changing = threading.RLock()
        self._needed: Mapping[int, LoRARequest] = {}  # by the latest step, or the next
        self._loader = Loader(self._changing)
        _all.add(self)

    @property
    def max_loras(self) -> int:
        """Slots."""
        return self._residency.max_loras

    @property
    def max_cpu_loras(self) -> int:
        """Adapters that host memory holds."""
        return self._residency.max_cpu_loras

    @property
    def modules(self) -> list[str]:
        """The model's layers, or those that adapters have named so far."""
        return list(self._weights.stacks)

    @property
    def bytes_read(self) -> int:
        """Bytes of weights read from disk into host memory so far."""
        return self._weights.bytes_read

    @property
    def bytes_loaded(self) -> int:
        """Bytes of weights loaded from host memory into slots so far."""
        return self._weights.bytes_loaded

    @property
    def pinned(self) -> frozenset[int]:
        """Ids of the adapters that stay."""
        return self._pinned

    @property
    def loaded(self) -> list[int]:
        """Ids of the adapters in host memory, the next to go first."""
        with self._changing:
            return list(self._residency.host)

    @property
    def active(self) -> list[int | None]:
        """(max_loras,) id of the adapter in each slot; None = free. vLLM: lora_index_to_id."""
        with self._changing:
            id_of = {slot: i for i, slot in self._residency.slots.items()}
            return [id_of.get(slot) for slot in range(self.max_loras)]

    @property
    def counters(self) -> Counters:
        """Hits, misses and evictions so far."""
        with self._changing:
            return replace(self._residency.counters)

    def load(self, lora_request: LoRARequest) -> bool:
        """Have an adapter in host memory; whether it had to be read.

        Semantics: afterwards `lora_request.lora_int_id in loaded`. If the id was another adapter's,
        that one is forgotten first, in its slot too.

        Raises what `read` raises; ServingError for a module that the model lacks, or when all that
        is in host memory is pinned; ShapeError and StackError for layers of other widths or above
        max_lora_rank; ValueRangeError for weights too large for the dtype. Nothing has changed
        then. Source: vLLM, LRUCacheWorkerLoRAManager.add_adapter.

        >>> slots = AdapterSlots(1, 1, max_lora_rank=8, read=lambda path: {})
        >>> slots.load(LoRARequest("french", 7, "a/fr"))
        Traceback (most recent call last):
        sgmv.errors.ServingError: lora_request: expected an adapter of some layer, got \
LoRARequest(lora_name='french', lora_int_id=7, lora_path='a/fr') without any; check what was saved
        """
        with self._settled() as residency:
            wanted = by_id([lora_request])
            self._check_room(wanted, "max_cpu_loras", self.max_cpu_loras)
            is_new = self._weights.host(wanted, self._pinned)
            self._loader.forget(wanted.values())
            residency.bring_to_host(sorted(wanted), self._pinned | wanted.keys())
        return is_new

    def prefetch(self, lora_requests: Iterable[Asked]) -> None:
        """Have adapters read into host memory by a thread of their own, while steps run.

        Semantics: as `load` of each, some time later: `read` is called in that thread. None of the
        latest step's is evicted for them. One that cannot be read changes nothing;
        `next_step(wait=False)` has the reason for those that ask for it.

        Raises ServingError when these and the pinned ones are more than max_cpu_loras, or when two
        of them share an id; RuntimeError where the system has no thread. Source: SGLang,
        lora_overlap_loader.py; vLLM, pull request 31941.

        >>> slots = AdapterSlots(max_loras=1, max_cpu_loras=1, max_lora_rank=8)
        >>> slots.prefetch([LoRARequest("french", 7, "a/fr"), LoRARequest("greek", 9, "a/el")])
        Traceback (most recent call last):
        sgmv.errors.ServingError: lora_requests: expected at most max_cpu_loras = 1 adapters, with \
the pinned ones, got [7, 9]; schedule fewer adapters, or unpin some
        """
        with self._changing:
            wanted = by_id(lora_requests)
            self._check_room(wanted, "max_cpu_loras", self.max_cpu_loras)
            self._loader.ask(self._weights.missing(wanted).values(), self._load_ahead)

    def activate(self, lora_requests: Iterable[Asked]) -> dict[int, Active]:
        """Have all these adapters in slots at once: what a step does before it runs.

        Semantics: afterwards each has a slot, and none of them was evicted for another. One that
        was in a slot keeps it, and its generation. None, the base model, needs no slot; a mixture
        needs one for each of its adapters.

        returns  lora_int_id -> Active

        Raises as `load`, and ServingError when these and the pinned ones are more than max_loras,
        or when two of them share an id. Nothing has changed then.
        Source: vLLM, LRUCacheWorkerLoRAManager._apply_adapters.

        >>> slots = AdapterSlots(max_loras=1, max_cpu_loras=2, max_lora_rank=8)
        >>> slots.activate([LoRARequest("french", 7, "a/fr"), LoRARequest("greek", 9, "a/el")])
        Traceback (most recent call last):
        sgmv.errors.ServingError: lora_requests: expected at most max_loras = 1 adapters, with the \
pinned ones, got [7, 9]; schedule fewer adapters, or unpin some
        """
        return self._activate(lora_requests, None)

    def try_activate(
        self, lora_requests: Iterable[Asked]
    ) -> tuple[dict[int, Active], dict[int, Exception]]:
        """Have those of these adapters in slots that can be loaded.

        Semantics: `activate` for those, and all others' errors. An adapter that failed has changed
        nothing: neither slots nor the layers known so far.

        returns  lora_int_id -> Active, and lora_int_id -> what `load` would raise for it

        Raises ServingError when all these and the pinned ones are more than max_loras, or when two
        of them share an id. Nothing has changed then. Source: as `activate`; vLLM has no
        counterpart.

        >>> slots = AdapterSlots(max_loras=1, max_cpu_loras=2, max_lora_rank=8)
        >>> active, failed = slots.try_activate([LoRARequest("french", 7, "no-such-place")])
        >>> active, list(failed), type(failed[7]).__name__
        ({}, [7], 'PeftError')
        """
        failed: dict[int, Exception] = {}
        return self._activate(lora_requests, failed), failed

    def deactivate(self, lora_int_id: int) -> None:
        """Empty an adapter's slot; it stays in host memory.

        Semantics: afterwards `lora_int_id not in active`, and steps that use it are stale.

        Raises ServingError when it is in no slot, or pinned.
        Source: vLLM, LoRAModelManager.deactivate_adapter.

        >>> AdapterSlots(max_loras=1, max_cpu_loras=1, max_lora_rank=8).deactivate(7)
        Traceback (most recent call last):
        sgmv.errors.ServingError: lora_int_id: expected an adapter in a slot, one of [], got 7; \
there is nothing to deactivate
        """
        with self._settled() as residency:
            remedy = "there is nothing to deactivate"
            check_known(lora_int_id, residency.slots, "in a slot", remedy)
            check_unpinned([lora_int_id], self._pinned)
            residency.leave_slot(lora_int_id)

    def unload(self, lora_int_id: int) -> None:
        """Forget an adapter, in its slot and in host memory.

        Semantics: afterwards `lora_int_id not in loaded`; asked for again, it is read again.

        Raises ServingError when it is not in host memory, or pinned.
        Source: vLLM, LoRAModelManager.remove_adapter.

        >>> AdapterSlots(max_loras=1, max_cpu_loras=1, max_lora_rank=8).unload(7)
        Traceback (most recent call last):
        sgmv.errors.ServingError: lora_int_id: expected an adapter in host memory, one of [], got \
7; there is nothing to unload
        """
        with self._settled() as residency:
            remedy = "there is nothing to unload"
            check_known(lora_int_id, residency.host, "in host memory", remedy)
            check_unpinned([lora_int_id], self._pinned)
            residency.leave(lora_int_id)

    def pin(self, lora_int_id: int) -> None:
        """Have a loaded adapter in a slot, and keep it there until it is unpinned.

        Semantics: `activate`, and afterwards `lora_int_id in pinned`: it is neither evicted nor
        unloaded, deactivated or replaced.

        Raises ServingError when it is not in host memory, or when every slot is pinned.
        Source: vLLM, LRUCacheLoRAModelManager.pin_adapter.

        >>> AdapterSlots(max_loras=1, max_cpu_loras=1, max_lora_rank=8).pin(7)
        Traceback (most recent call last):
        sgmv.errors.ServingError: lora_int_id: expected an adapter in host memory, one of [], got \
7; load it first
        """
        with self._settled() as residency:
            check_known(lora_int_id, residency.host, "in host memory", "load it first")
            needed = self._needed
            self.activate([self._weights.hosted[lora_int_id].lora_request])
            self._needed = needed
            self._pinned |= {int(lora_int_id)}

    def unpin(self, lora_int_id: int) -> None:
        """Let a pinned adapter be evicted again.

        Semantics: afterwards `lora_int_id not in pinned`; it stays where it is.

        Raises ServingError when it is not pinned. Source: as `pin`; vLLM has no counterpart.

        >>> AdapterSlots(max_loras=1, max_cpu_loras=1, max_lora_rank=8).unpin(7)
        Traceback (most recent call last):
        sgmv.errors.ServingError: lora_int_id: expected an adapter pinned, one of [], got 7; \
there is nothing to unpin
        """
        with self._changing:
            check_known(lora_int_id, self._pinned, "pinned", "there is nothing to unpin")
            self._pinned -= {lora_int_id}

    def stack(self, module: str) -> AdapterStack:
        """One layer's adapters in slots, by generation.

        Semantics: `stack[active.generation]` for each of `activate`'s values; for looking at.

        Raises ServingError for a module that the model lacks, with near names.
        Source: vLLM, LoRAModelManager.modules.

        >>> slots = AdapterSlots(1, 1, 8, modules={"layers.0.up_proj": (64, 172)})
        >>> slots.stack("layers.0.up_prj")
        Traceback (most recent call last):
        sgmv.errors.ServingError: module: expected a layer that adapters may change, got \
'layers.0.up_prj'; did you mean 'layers.0.up_proj'?
        """
        try:
            return self._weights.stacks[module]
        except (KeyError, TypeError):
            raise ServingError(
                "module",
                "a layer that adapters may change",
                repr(module),
                near_names(str(module), self.modules),
            ) from None

    def _in_slots(self) -> dict[int, Hosted]:
        """Generation -> its adapter, of those in slots."""
        with self._changing:
            weights = self._weights
            return {number: weights.hosted[i] for i, number in weights.generation.items()}

    def __repr__(self) -> str:
        with self._changing:
            used, hosted = len(self._residency.slots), len(self._weights.hosted)
        return (
            f"AdapterSlots({used} of {self.max_loras} slots used, {hosted} of {self.max_cpu_loras} "
            f"in host memory, max_lora_rank={self.max_lora_rank}, {self.dtype.name})"
        )

    def __str__(self) -> str:
        with self._changing:
            lines = [("id", "name", "slot", "pinned", "layers", "bytes")]
            for i, hosted in sorted(self._weights.hosted.items()):
                slot = str(self._residency.slots.get(i, "-"))
                pinned = "yes" if i in self._pinned else "no"
                name, layers = hosted.lora_request.lora_name, str(len(hosted.layers))
                lines.append((str(i), name, slot, pinned, layers, str(hosted.nbytes)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        pads = [str.rjust, str.ljust, *[str.rjust] * 4]
        rows = [map(lambda pad, text, w: pad(text, w), pads, line, widths) for line in lines]
        return "\n".join(map("  ".join, rows))

    def _check_room(self, wanted: Mapping[int, LoRARequest], name: str, room: int) -> None:
        keep = self._pinned | wanted.keys()
        if len(keep) > room:
            raise ServingError(
                "lora_requests",
                f"at most {name} = {room} adapters, with the pinned ones",
                some(sorted(keep)),
                "schedule fewer adapters, or unpin some",
            )

    def _activate(
        self,
        lora_requests: Iterable[Asked],
        failed: dict[int, Exception] | None,
        loading: dict[int, LoRARequest] | None = None,
    ) -> dict[int, Active]:
        """What `activate` does; adapters that fail are added to `failed`, or raise without it.

        With `loading` nothing is read or packed here: what has to be is added to it.
        """
        with self._settled() as residency:
            wanted = by_id(lora_requests)
            self._check_room(wanted, "max_loras", self.max_loras)
            self._needed = wanted
            if loading is not None and failed is not None:
                unready = self._weights.unready(wanted)
                loading.update(self._loader.ask_first(unready, self._load_ahead, failed))
                wanted = {i: one for i, one in wanted.items() if i not in unready}
            self._weights.host(wanted, self._pinned, failed)
            ids = [i for i in wanted if i not in (failed or ())]
            self._loader.forget(wanted[i] for i in ids)
            residency.bring(sorted(ids), self._pinned.union(ids))
            self._weights.settle(failed)
            return {
                i: Active(residency.slots[i], self._weights.generation[i])
                for i in ids
                if i not in (failed or ())
            }

    def _load_ahead(self, lora_request: LoRARequest) -> None:
        """In the loading thread: read an adapter, and pack it if a step needs it by then."""
        i, weights = lora_request.lora_int_id, self._weights
        with self._changing:
            before = weights.stacks.keys()
            hosted = None if weights.missing({i: lora_request}) else weights.hosted[i]
            stacks = dict(weights.stacks)
        found = hosted or weights.fitted(lora_request, stacks)
        is_needed = self._needed.get(i) == lora_request
        packed = weights.packed_layers(found, stacks) if is_needed else None
        with self._settled() as residency:
            keep = self._pinned | self._needed.keys() | {i}
            is_in_use = self._needed.get(i, lora_request) != lora_request  # another of that id
            if is_in_use or len(keep) > self.max_cpu_loras or weights.stacks.keys() != before:
                return  # no room, or others have taught layers: a step that needs it asks again
            if weights.missing({i: lora_request}):
                check_unpinned([i], self._pinned)
                weights.adopt({i: found}, stacks)
                residency.bring_to_host([i], keep)
            if packed is not None and weights.hosted[i] is found and i not in residency.slots:
                weights.keep_packed(i, packed)

    @contextmanager
    def _settled(self) -> Iterator[Residency]:
        """The residency, to be changed under the lock; weights follow it afterwards.

        And before: an interrupt may have broken off the call before this one.
        """
        with self._changing:
            self._weights.settle()
            yield self._residency
            self._weights.settle()


def _renew_locks() -> None:
    """In a forked child: another thread of the parent may have held one."""
    for slots in _all:
        slots._changing = threading.RLock()
        slots._loader = slots._loader.renewed(slots._changing)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
