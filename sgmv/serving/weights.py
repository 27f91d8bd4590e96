"""Adapters' weights in host memory and in slots, wherever the residency has their ids.

    lora_int_id   7 ─┐   slot   generation   one AdapterStack for each module of the model,
    lora_int_id  42 ─┼──> 0        12        all with the same generations:
    lora_int_id  43  │    1        15          q_proj  {12: Adapter, 15: Adapter}
      host memory    └──> 2        none        up_proj {12: Adapter, 15: None}   43 leaves it alone

Each time an adapter enters a slot it gets a generation: a number never given before, which is its
id in every stack. Rows name generations, not slots. So an old step needs no check of what its slots
hold now: the stacks no longer have the generation of an adapter that was evicted or replaced, and
`add_lora`, which takes a stack's table once, refuses it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from sgmv.adapter import Adapter
from sgmv.checks import check_count, check_several
from sgmv.dtypes import Array
from sgmv.errors import DtypeError, ServingError, SgmvError, StackError, some
from sgmv.ids import is_integer
from sgmv.peft_names import near_names
from sgmv.serving.requests import LoRARequest
from sgmv.serving.residency import Residency
from sgmv.stack import AdapterStack
from sgmv.table import Stored


class Active(NamedTuple):
    """Where an adapter is: its slot, and its generation until it leaves the slot."""

    slot: int
    generation: int


@dataclass(frozen=True, eq=False)
class Hosted:
    """An adapter in host memory: its layers in the stacks' dtype, and what it replaces."""

    lora_request: LoRARequest
    layers: Mapping[str, Adapter]
    saved: Mapping[str, Array]

    @property
    def nbytes(self) -> int:
        arrays = [a for one in self.layers.values() for a in (one.A, one.B, one._gains)]
        arrays += self.saved.values()
        return sum(array.nbytes for array in arrays if array is not None)

    @property
    def why_alone(self) -> str:
        """What it has that no mixture of adapters has a meaning for; "" if nothing."""
        if any(layer.magnitude is not None for layer in self.layers.values()):
            return "magnitudes (DoRA)"
        return "parameters in the place of the model's" if self.saved else ""


class Weights:
    """The weights of the ids that a residency has in host memory and in slots.

    Semantics: `host` reads adapters; `settle` moves weights after the residency has changed.
    Nothing here is thread-safe but `fitted` and `packed_layers`, which take time and change
    nothing here: a loading thread calls them, and `adopt` afterwards.

    hosted        lora_int_id -> its adapter in host memory
    packed        lora_int_id -> its layers as slots have them, of adapters on the way to a slot;
                  no more of them than slots
    generation    lora_int_id -> its generation, of those in slots
    stacks        module -> its adapters in slots, by generation
    saved         the parameters that adapters may replace
    bytes_read    from disk into host memory
    bytes_loaded  from host memory into slots
    """

    def __init__(
        self,
        residency: Residency,
        max_lora_rank: int,
        dtype: np.dtype[Any],
        read: Callable[[str], Mapping[str, Adapter]],
        modules: Mapping[str, tuple[int, int]] | None,
        base: Mapping[str, tuple[Any, Any]] | None,
        saved: Collection[str],
    ) -> None:
        base = {} if base is None else base
        _check_settings(read, modules, base)
        self.hosted: dict[int, Hosted] = {}
        self.packed: dict[int, Mapping[str, Stored]] = {}
        self.generation: dict[int, int] = {}
        self.bytes_read = 0
        self.bytes_loaded = 0
        self._residency = residency
        self._max_lora_rank = max_lora_rank
        self._dtype = dtype
        self._read, self._base, self.saved = read, base, _names(saved)
        self._learns_modules = modules is None
        self._generations = count(1)
        self.stacks = {name: self._stack(widths, name) for name, widths in (modules or {}).items()}

    def host(
        self,
        wanted: Mapping[int, LoRARequest],
        pinned: frozenset[int],
        failed: dict[int, Exception] | None = None,
    ) -> bool:
        """Read the adapters that host memory lacks; whether there were any.

        An adapter replaces another of its id, unless that one is pinned. Adapters that fail are
        added to `failed`; if it is None, the first failure is raised and nothing has changed.
        """
        missing = self.missing(wanted)
        if failed is None:  # before any is read
            check_unpinned(missing, pinned)
        stacks, new = dict(self.stacks), {}
        for i, lora_request in missing.items():
            with_new_layers = dict(stacks)
            try:
                check_unpinned([i], pinned)
                new[i] = self.fitted(lora_request, with_new_layers)
            except Exception as error:
                if failed is None:
                    raise
                failed[i] = error
            else:
                stacks = with_new_layers
        self.adopt(new, stacks)
        return bool(new)

    def adopt(self, new: Mapping[int, Hosted], stacks: dict[str, AdapterStack]) -> None:
        """Have these in host memory, and the layers that they name; the residency has them next."""
        for name in stacks.keys() - self.stacks.keys():
            for generation in self.generation.values():
                stacks[name].load(generation, None)
        self.stacks = stacks
        for i in new.keys() & self.hosted.keys():
            self._residency.leave(i)
        self.settle()
        self.hosted.update(new)
        self.bytes_read += sum(hosted.nbytes for hosted in new.values())

    def missing(self, wanted: Mapping[int, LoRARequest]) -> dict[int, LoRARequest]:
        """Those of these that host memory lacks, or has another adapter of that id for."""
        return {
            i: lora_request
            for i, lora_request in wanted.items()
            if i not in self.hosted or self.hosted[i].lora_request != lora_request
        }

    def unready(self, wanted: Mapping[int, LoRARequest]) -> dict[int, LoRARequest]:
        """Those of these that have to be read or packed before a slot can have them."""
        missing = self.missing(wanted)
        return {
            i: lora_request
            for i, lora_request in wanted.items()
            if i in missing or (i not in self.generation and i not in self.packed)
        }

    def packed_layers(
        self, hosted: Hosted, stacks: Mapping[str, AdapterStack]
    ) -> dict[str, Stored]:
        """Copies of an adapter's layers as slots have them."""
        return {module: stacks[module]._packed(one) for module, one in hosted.layers.items()}

    def keep_packed(self, i: int, layers: Mapping[str, Stored]) -> None:
        """Have these for when the adapter, which is in host memory, enters a slot."""
        self.packed[i] = layers
        for old in list(self.packed)[: -self._residency.max_loras]:
            del self.packed[old]

    def settle(self, failed: dict[int, Exception] | None = None) -> None:
        """Move weights to where the residency has their ids.

        An id loses its slot if its weights cannot be loaded, and is added to `failed`, or raises.
        """
        slots, host = self._residency.slots, self._residency.host
        for i in [i for i in self.generation if i not in slots]:
            self._empty(i)
        if len(self.hosted) > len(host):  # adapters are hosted before the residency has their ids
            for i in [i for i in self.hosted if i not in host]:
                del self.hosted[i]
                self.packed.pop(i, None)
        new = [i for i in slots if i not in self.generation]
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
                if i in slots and i not in self.generation:
                    self._residency.leave_slot(i)
            raise

    def fitted(self, lora_request: LoRARequest, stacks: dict[str, AdapterStack]) -> Hosted:
        """Read the adapter as host memory will hold it; adds stacks for modules not seen yet."""
        layers = {}
        try:
            found = self._read(lora_request.lora_path)
        except SgmvError as error:  # it names a path, or a file's option: add the adapter's name
            argument = f"{lora_request}, {error.argument}"
            raise type(error)(argument, error.expected, error.received, error.remedy) from error
        if not isinstance(found, Mapping):
            given = f"{type(found).__name__} for {lora_request}"
            raise DtypeError("read", "a mapping of modules to Adapters", given, "return a dict")
        saved = dict(getattr(found, "saved", {}))
        if unknown := saved.keys() - self.saved:
            raise ServingError(
                "lora_request",
                f"layers with A and B, and of the model's {some(self.saved)}, in {lora_request}",
                f"{some(sorted(unknown))}, which it replaces in the model",
                "name what you take from `Step.saved` in AdapterSlots(saved=...); "
                "read=lambda path: dict(sgmv.load_peft(path)) leaves it out",
            )
        if self._learns_modules:
            _check_prefix(lora_request, found, stacks)
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
            if adapter.r > self._max_lora_rank:
                raise StackError(
                    f"{lora_request}, {module!r}",
                    f"a rank of at most max_lora_rank = {self._max_lora_rank}",
                    str(adapter.r),
                    "make the AdapterSlots with a larger max_lora_rank",
                )
            if adapter.magnitude is not None and module not in self._base:
                raise ServingError(
                    f"{lora_request}, {module!r}",
                    "a layer whose W is known, as the adapter has magnitudes (DoRA)",
                    f"W of {some(self._base)}",
                    "make the AdapterSlots with base={module: (W, bias)}",
                )
            try:
                layers[module] = stacks[module].fitted(adapter, *self._base.get(module, ()))
            except SgmvError as error:
                argument = f"{lora_request}, {module!r}"
                raise type(error)(argument, error.expected, error.received, error.remedy) from error
        if not layers and not saved:
            got = f"{lora_request} without any"
            raise ServingError(
                "lora_request", "an adapter of some layer", got, "check what was saved"
            )
        return Hosted(lora_request, layers, saved)

    def _stack(self, widths: tuple[int, int], name: str) -> AdapterStack:
        """An empty stack for a module."""
        if not isinstance(widths, (tuple, list)) or len(widths) != 2:
            raise ServingError(
                "modules", "name -> (h_in, h_out)", repr(widths), "give each layer's two widths"
            )
        for width in widths:
            check_count(f"modules[{name!r}]", width, 1)
        return AdapterStack(*widths, self._residency.max_loras, self._max_lora_rank, self._dtype)

    def _fill(self, i: int) -> None:
        """Load an adapter into every stack, under a generation of its own."""
        generation, hosted = next(self._generations), self.hosted[i]
        packed = self.packed.get(i, {})
        try:
            for module, stack in self.stacks.items():
                if module in packed:
                    stack._load_all({generation: packed[module]})
                else:
                    stack.load(generation, hosted.layers.get(module))
        except BaseException:
            self._take_out(generation)
            raise
        self.packed.pop(i, None)
        self.generation[i] = generation
        self.bytes_loaded += hosted.nbytes

    def _empty(self, i: int) -> None:
        """Take an adapter out of the stacks; its generation never comes back."""
        self._take_out(self.generation[i])
        del self.generation[i]

    def _take_out(self, generation: int) -> None:
        for stack in self.stacks.values():
            if generation in stack:
                stack.unload(generation)


def _check_settings(read: object, modules: object, base: object) -> None:
    """Refuse what AdapterSlots cannot be made with."""
    if modules is not None and not isinstance(modules, Mapping):
        kind = type(modules).__name__
        raise DtypeError("modules", "name -> (h_in, h_out)", kind, "pass a dict")
    if not isinstance(base, Mapping) or any(
        not isinstance(one, tuple) or len(one) != 2 for one in base.values()
    ):
        got = type(base).__name__
        raise DtypeError("base", "module -> (W, bias)", got, "pass a dict of pairs")
    if not callable(read):
        kind = type(read).__name__
        raise DtypeError("read", "a function of lora_path", kind, "pass load_peft")


def _names(saved: Collection[str]) -> frozenset[str]:
    check_several("saved", saved, "names of parameters")
    names = frozenset(saved)
    if not all(isinstance(name, str) for name in names):
        raise DtypeError("saved", "names of parameters", some(map(repr, names)), "pass texts")
    return names


def check_known(i: object, known: Collection[int], state: str, remedy: str) -> None:
    """Refuse an id that is not one of these."""
    if not is_integer(i) or i not in known:
        expected = f"an adapter {state}, one of {some(sorted(known))}"
        raise ServingError("lora_int_id", expected, repr(i), remedy)


def check_unpinned(ids: Iterable[int], pinned: frozenset[int]) -> None:
    """Refuse to move adapters that are pinned."""
    found = sorted(pinned.intersection(ids))
    if found:
        raise ServingError(
            "lora_int_id", "an adapter that is not pinned", some(found), "unpin it first"
        )


def _check_prefix(
    lora_request: LoRARequest, found: Collection[str], known: Collection[str]
) -> None:
    """Refuse an adapter whose names are those of a wrapper of the model, or of what it wraps.

    Were both names layers, the model's calls would find one adapter under them, and base only for
    the other. Prefixes differ if numbered layers are in other modules ("model.layers" of
    "model.layers.0.mlp.up_proj"), or if one name is another's end.
    """
    if set(found) & set(known) or not all(isinstance(module, str) for module in found):
        return
    new, old = ({*map(_numbered, modules)} - {""} for modules in (found, known))
    is_elsewhere = bool(new and old) and new.isdisjoint(old)
    ends = ((f".{a}", f".{b}") for a in found for b in known)
    if is_elsewhere or any(a.endswith(b) or b.endswith(a) for a, b in ends):
        module = next(iter(found))
        near = near_names(module, known)
        raise ServingError(
            "lora_request",
            f"layers' names with the prefix of the adapters before, in {lora_request}",
            repr(module),
            f"{near} If both are layers of the model, make the AdapterSlots with its modules",
        )


def _numbered(module: str) -> str:
    """The module whose parts are numbered: model.layers of model.layers.0.up; "" if none is."""
    match = re.match(r"(.*?)\.\d+(\.|$)", module)
    return match[1] if match else ""
