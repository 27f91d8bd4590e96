"""Adapters' weights in host memory and in slots: `AdapterSlots`.

    lora_int_id   7 ─┐   slot   generation   one AdapterStack for each module of the model,
    lora_int_id  42 ─┼──> 0        12        all with the same generations:
    lora_int_id  43  │    1        15          q_proj  {12: Adapter, 15: Adapter}
      host memory    └──> 2        none        up_proj {12: Adapter, 15: None}   43 leaves it alone

Each time an adapter enters a slot it gets a generation: a number never given before, which is its
id in every stack. Rows name generations, not slots. So nobody has to look whether a slot still
holds what it held: what has been evicted or replaced is not in the stacks under the number that an
old step names, and `add_lora`, which takes a stack's table once, refuses it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

import numpy.typing as npt

from sgmv.adapter import Adapter, load_peft
from sgmv.checks import check_count, check_dtype, check_several
from sgmv.errors import DtypeError, ServingError, SgmvError, StackError, some
from sgmv.ids import is_integer
from sgmv.peft import near_names
from sgmv.serving.requests import LoRARequest, check_lora_request
from sgmv.serving.residency import Counters, Residency
from sgmv.stack import AdapterStack
from sgmv.warm_up import warm_up


class Active(NamedTuple):
    """Where an adapter is: its slot, and the generation that it is until it leaves."""

    slot: int
    generation: int


@dataclass(frozen=True, eq=False)
class Hosted:
    """An adapter in host memory: its layers in the stacks' dtype."""

    lora_request: LoRARequest
    layers: Mapping[str, Adapter]

    @property
    def nbytes(self) -> int:
        return sum(layer.A.nbytes + layer.B.nbytes for layer in self.layers.values())


_all: weakref.WeakSet[AdapterSlots] = weakref.WeakSet()


class AdapterSlots:
    """The adapters of a model: up to `max_cpu_loras` in host memory, `max_loras` of them in slots.

    Semantics: `activate` puts what a step needs into slots, from host memory or from disk, and lets
    others go: of those neither needed nor pinned the least recently used (policy "lru"), or the
    first that came ("fifo"). What leaves host memory leaves its slot. A module that an adapter does
    not change is base only for its rows.

    max_loras      slots: the most adapters in one step
    max_cpu_loras  adapters in host memory, those in slots included; at least max_loras
    max_lora_rank  the highest rank taken; weights stand at their own rank, without padding
    modules        the model's layers, name -> (h_in, h_out): an adapter of any other is refused.
                   Left out, the layers that loaded adapters name, with the first one's widths
    dtype          of the weights, as for AdapterStack; others are converted when loaded
    policy         "lru" or "fifo"
    read           lora_path -> {module: Adapter}; reads PEFT's directories, if left out

    Any thread may call any method; calls wait for each other, also while one reads from disk.
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
    ) -> None:
        self._residency = Residency(max_loras, max_cpu_loras, policy)
        if modules is not None and not isinstance(modules, Mapping):
            kind = type(modules).__name__
            raise DtypeError("modules", "name -> (h_in, h_out)", kind, "pass a dict")
        if not callable(read):
            kind = type(read).__name__
            raise DtypeError("read", "a function of lora_path", kind, "pass load_peft")
        self.max_lora_rank = check_count("max_lora_rank", max_lora_rank, 1)
        self.dtype = check_dtype("dtype", dtype)
        warm_up([self.dtype])
        self.policy = policy
        self.bytes_read = 0  # from disk into host memory
        self.bytes_loaded = 0  # from host memory into slots
        self._read = read
        self._learns_modules = modules is None
        self._stacks = {name: self._stack(widths, name) for name, widths in (modules or {}).items()}
        self._hosted: dict[int, Hosted] = {}
        self._generation: dict[int, int] = {}  # of the ids in slots
        self._generations = count(1)
        self._pinned: frozenset[int] = frozenset()
        self._changing = threading.RLock()
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
        return list(self._stacks)

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
            wanted = self._by_id([lora_request])
            self._check_room(wanted, "max_cpu_loras", self.max_cpu_loras)
            is_new = self._host(wanted)
            residency.bring_to_host(sorted(wanted), self._pinned | wanted.keys())
        return is_new

    def activate(self, lora_requests: Iterable[LoRARequest | None]) -> dict[int, Active]:
        """Have all these adapters in slots at once: what a step does before it runs.

        Semantics: afterwards each has a slot, and none of them was evicted for another. One that
        was in a slot keeps it, and its generation. None, the base model, needs no slot.

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
        self, lora_requests: Iterable[LoRARequest | None]
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
            self._check_known(lora_int_id, residency.slots, "in a slot", remedy)
            self._check_unpinned([lora_int_id])
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
            self._check_known(lora_int_id, residency.host, "in host memory", remedy)
            self._check_unpinned([lora_int_id])
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
            self._check_known(lora_int_id, residency.host, "in host memory", "load it first")
            self.activate([self._hosted[lora_int_id].lora_request])
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
            self._check_known(lora_int_id, self._pinned, "pinned", "there is nothing to unpin")
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
            return self._stacks[module]
        except (KeyError, TypeError):
            raise ServingError(
                "module",
                "a layer that adapters may change",
                repr(module),
                near_names(str(module), self.modules),
            ) from None

    def __repr__(self) -> str:
        with self._changing:
            used, hosted = len(self._residency.slots), len(self._hosted)
        return (
            f"AdapterSlots({used} of {self.max_loras} slots used, {hosted} of {self.max_cpu_loras} "
            f"in host memory, max_lora_rank={self.max_lora_rank}, {self.dtype.name})"
        )

    def __str__(self) -> str:
        with self._changing:
            lines = [("id", "name", "slot", "pinned", "layers", "bytes")]
            for i, hosted in sorted(self._hosted.items()):
                slot = str(self._residency.slots.get(i, "-"))
                pinned = "yes" if i in self._pinned else "no"
                name, layers = hosted.lora_request.lora_name, str(len(hosted.layers))
                lines.append((str(i), name, slot, pinned, layers, str(hosted.nbytes)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column == 1 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )

    def _stack(self, widths: tuple[int, int], name: str) -> AdapterStack:
        if not isinstance(widths, (tuple, list)) or len(widths) != 2:
            raise ServingError(
                "modules", "name -> (h_in, h_out)", repr(widths), "give each layer's two widths"
            )
        for width in widths:
            check_count(f"modules[{name!r}]", width, 1)
        return AdapterStack(*widths, self.max_loras, self.max_lora_rank, self.dtype)

    def _by_id(self, lora_requests: Iterable[LoRARequest | None]) -> dict[int, LoRARequest]:
        wanted: dict[int, LoRARequest] = {}
        check_several("lora_requests", lora_requests, "a LoRARequest, or None, for each")
        for lora_request in lora_requests:
            check_lora_request(lora_request)
            if lora_request is None:
                continue
            other = wanted.setdefault(lora_request.lora_int_id, lora_request)
            if other != lora_request:
                raise ServingError(
                    "lora_requests",
                    f"one adapter for each id, as {other}",
                    repr(lora_request),
                    "give other weights another lora_int_id",
                )
        return wanted

    def _check_room(self, wanted: Mapping[int, LoRARequest], name: str, room: int) -> None:
        keep = self._pinned | wanted.keys()
        if len(keep) > room:
            raise ServingError(
                "lora_requests",
                f"at most {name} = {room} adapters, with the pinned ones",
                some(sorted(keep)),
                "schedule fewer adapters, or unpin some",
            )

    def _check_known(self, i: int, known: Collection[int], where: str, remedy: str) -> None:
        if not is_integer(i) or i not in known:
            expected = f"an adapter {where}, one of {some(sorted(known))}"
            raise ServingError("lora_int_id", expected, repr(i), remedy)

    def _check_unpinned(self, ids: Iterable[int]) -> None:
        pinned = sorted(self._pinned.intersection(ids))
        if pinned:
            raise ServingError(
                "lora_int_id", "an adapter that is not pinned", some(pinned), "unpin it first"
            )

    def _activate(
        self, lora_requests: Iterable[LoRARequest | None], failed: dict[int, Exception] | None
    ) -> dict[int, Active]:
        """What `activate` does; adapters that fail are added to `failed`, or raise without it."""
        with self._settled() as residency:
            wanted = self._by_id(lora_requests)
            self._check_room(wanted, "max_loras", self.max_loras)
            self._host(wanted, failed)
            ids = [i for i in wanted if i not in (failed or ())]
            residency.bring(sorted(ids), self._pinned.union(ids))
            self._settle(failed)
            return {
                i: Active(residency.slots[i], self._generation[i])
                for i in ids
                if i not in (failed or ())
            }

    def _host(
        self, wanted: Mapping[int, LoRARequest], failed: dict[int, Exception] | None = None
    ) -> bool:
        """Read what is not in host memory, or is there as another adapter, which has to go.

        Adapters that fail are added to `failed`, or raise if it is None.
        """
        missing = {
            i: lora_request
            for i, lora_request in wanted.items()
            if i not in self._hosted or self._hosted[i].lora_request != lora_request
        }
        if failed is None:  # before any is read
            self._check_unpinned(missing)
        stacks, new = dict(self._stacks), {}
        for i, lora_request in missing.items():
            with_new_layers = dict(stacks)
            try:
                self._check_unpinned([i])
                new[i] = self._fitted(lora_request, with_new_layers)
            except Exception as error:
                if failed is None:
                    raise
                failed[i] = error
            else:
                stacks = with_new_layers
        for name in stacks.keys() - self._stacks.keys():
            for generation in self._generation.values():
                stacks[name].load(generation, None)
        self._stacks = stacks
        for i in new.keys() & self._hosted.keys():
            self._residency.leave(i)
        self._settle()
        self._hosted.update(new)
        self.bytes_read += sum(hosted.nbytes for hosted in new.values())
        return bool(new)

    def _fitted(self, lora_request: LoRARequest, stacks: dict[str, AdapterStack]) -> Hosted:
        """The adapter as host memory will hold it; adds stacks for modules not seen yet."""
        layers = {}
        try:
            found = self._read(lora_request.lora_path)
        except SgmvError as error:  # it names a path, or an option of a file: say whose
            where = f"{lora_request}, {error.argument}"
            raise type(error)(where, error.expected, error.received, error.remedy) from error
        if not isinstance(found, Mapping):
            given = f"{type(found).__name__} for {lora_request}"
            raise DtypeError("read", "a mapping of modules to Adapters", given, "return a dict")
        for module, adapter in found.items():
            if module not in stacks and not self._learns_modules:
                expected = f"layers of the model, in {lora_request}"
                remedy = near_names(module, stacks)
                raise ServingError("lora_request", expected, repr(module), remedy)
            if not isinstance(adapter, Adapter):
                given = f"{type(adapter).__name__} for {module!r} of {lora_request}"
                raise DtypeError("read", "an Adapter for each module", given, "wrap it in Adapter")
            if module not in stacks:
                stacks[module] = self._stack((adapter.h_in, adapter.h_out), module)
            if adapter.r > self.max_lora_rank:
                raise StackError(
                    f"{lora_request}, {module!r}",
                    f"a rank of at most max_lora_rank = {self.max_lora_rank}",
                    str(adapter.r),
                    "make the AdapterSlots with a larger max_lora_rank",
                )
            try:
                layers[module] = stacks[module].fitted(adapter)
            except SgmvError as error:
                where = f"{lora_request}, {module!r}"
                raise type(error)(where, error.expected, error.received, error.remedy) from error
        if not layers:
            got = f"{lora_request} without any"
            raise ServingError(
                "lora_request", "an adapter of some layer", got, "check what was saved"
            )
        return Hosted(lora_request, layers)

    @contextmanager
    def _settled(self) -> Iterator[Residency]:
        """The residency, to be changed under the lock; weights follow it afterwards.

        And before: an interrupt may have broken off the call before this one.
        """
        with self._changing:
            self._settle()
            yield self._residency
            self._settle()

    def _settle(self, failed: dict[int, Exception] | None = None) -> None:
        """Have weights where the residency says that ids are.

        Ids whose weights cannot be loaded lose their slot, and are added to `failed` or raise.
        """
        slots, host = self._residency.slots, self._residency.host
        for i in [i for i in self._generation if i not in slots]:
            self._empty(i)
        if len(self._hosted) > len(host):  # what comes is hosted before the residency knows it
            for i in [i for i in self._hosted if i not in host]:
                del self._hosted[i]
        new = [i for i in slots if i not in self._generation]
        try:
            for i in new:
                try:
                    self._fill(i)
                except Exception as error:
                    if failed is None:
                        raise
                    failed[i] = error
                    self._residency.leave_slot(i)
        except BaseException:  # out of memory, say: ids without weights have no slot
            for i in new:
                if i in slots and i not in self._generation:
                    self._residency.leave_slot(i)
            raise

    def _fill(self, i: int) -> None:
        """Load an adapter into every stack, under a generation of its own."""
        generation, hosted = next(self._generations), self._hosted[i]
        try:
            for module, stack in self._stacks.items():
                stack.load(generation, hosted.layers.get(module))
        except BaseException:
            self._take_out(generation)
            raise
        self._generation[i] = generation
        self.bytes_loaded += hosted.nbytes

    def _empty(self, i: int) -> None:
        """Take an adapter out of the stacks; its generation never comes back."""
        self._take_out(self._generation[i])
        del self._generation[i]

    def _take_out(self, generation: int) -> None:
        for stack in self._stacks.values():
            if generation in stack:
                stack.unload(generation)


def _renew_locks() -> None:
    """In a forked child: another thread of the parent may have held one."""
    for slots in _all:
        slots._changing = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
