"""START HERE. One step of a served model: schedule, activate, map rows to slots, then every layer.

scheduler.schedule(pinned)  ──>  requests of this step, at most max_loras adapters
slots.try_activate(...)     ──>  each adapter's slot and generation; those that fail drop out, and
                                 with wait=False those that are still being read sit out
tokens of each request      ──>  rows of x, and Segments, made once for all layers
step.add_lora(module, y, x)      one SGMV for each layer
"""

from __future__ import annotations

from collections.abc import Collection, Container, Hashable, Mapping, Set
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from sgmv.checks import check_count, fits_memory
from sgmv.dtypes import Array
from sgmv.embedding import add_lora_embedding
from sgmv.errors import DtypeError, ServingError, StaleStepError, UnknownAdapterError, some
from sgmv.ids import BASE_ONLY, Integers
from sgmv.lora import add_lora
from sgmv.peft_names import near_names
from sgmv.segment import Segments, segment, weighted
from sgmv.serving.requests import Asked, LoRARequest, ids_of, members_of
from sgmv.serving.scheduler import Scheduler
from sgmv.serving.slots import AdapterSlots
from sgmv.serving.weights import Active

R = TypeVar("R", bound=Hashable)


@dataclass(frozen=True, eq=False)
class Step(Generic[R]):
    """What one step of the model runs: the rows of each request, and their slots.

    Semantics: rows `rows[request_id]` of every layer's x and y are that request's tokens; row i
    uses the adapter that was in slot `slots[i]` when the step was made, and only while it still is.

    rows         request_id -> slice, in the scheduler's order
    slots        (n,) int64, -1 = base model; vLLM: token_lora_mapping. (n, k) if a request of the
                 step names several adapters: those of each row, and -1
    segments     the rows grouped by generation, with the adapters' weights, for every layer
    adapters     generation -> LoRARequest, of this step
    failed       (request_id, LoRARequest, error) of each request that `next_step` dropped, as this
                 adapter of its could not be loaded
    loading      ids of the requests that sit out, as `next_step` was not to wait for their adapters

    Made by `next_step` or `make_step`. Source: vLLM, gpu_input_batch.py, and
    lora/punica_wrapper, `update_metadata`.

    >>> make_step(AdapterSlots(1, 1, 8), {"r0": None, "r1": None}).n
    2
    """

    rows: Mapping[R, slice]
    slots: Integers
    segments: Segments
    adapters: Mapping[int, LoRARequest]
    adapter_slots: AdapterSlots
    failed: tuple[tuple[R, LoRARequest, Exception], ...] = ()
    loading: tuple[R, ...] = ()

    @property
    def n(self) -> int:
        """Rows of the step."""
        return self.segments.n

    def add_lora(self, module: str, y: Array, x: Array, *, backend: str | None = None) -> Array:
        """Add every row's own delta at one layer to y, in place.

        Semantics: `sgmv.add_lora` with the layer's adapters.

        module  the layer's name
        y       (n, h_out), as in `sgmv.add_lora`
        x       (n, h_in)

        Raises StaleStepError when an adapter of the step has been evicted, unloaded or replaced
        since; ServingError for a module that the model lacks; and as `sgmv.add_lora`. y is then as
        it was. Source: vLLM, lora/punica_wrapper, `add_lora_linear`.

        >>> slots = AdapterSlots(1, 1, 8, modules={"up": (3, 2)})
        >>> step = make_step(slots, {"r0": None})
        >>> step.add_lora("up", np.zeros((1, 2), "float32"), np.ones((1, 3), "float32"))
        array([[0., 0.]], dtype=float32)
        """
        stack = self.adapter_slots.stack(module)
        try:
            return add_lora(y, x, stack, self.segments, backend=backend)
        except UnknownAdapterError as error:
            raise self._stale(stack) from error

    def add_lora_embedding(
        self, module: str, y: Array, tokens: npt.ArrayLike, *, backend: str | None = None
    ) -> Array:
        """Add every row's own delta at an embedding to y, in place.

        Semantics: `sgmv.add_lora_embedding` with the embedding's adapters; `PeftAdapter.embeddings`
        says which layers are embeddings.

        module  the embedding's name
        y       (n, h_out), as in `sgmv.add_lora_embedding`
        tokens  (n,) integers

        Raises as `add_lora`; ValueRangeError for tokens outside the adapters' vocabulary. y is then
        as it was. Source: vLLM, lora/layers/vocal_parallel_embedding.py.

        >>> slots = AdapterSlots(1, 1, 8, modules={"embed_tokens": (32, 2)})
        >>> step = make_step(slots, {"r0": None})
        >>> step.add_lora_embedding("embed_tokens", np.zeros((1, 2), "float32"), [7])
        array([[0., 0.]], dtype=float32)
        """
        stack = self.adapter_slots.stack(module)
        try:
            return add_lora_embedding(y, tokens, stack, self.segments, backend=backend)
        except UnknownAdapterError as error:
            raise self._stale(stack) from error

    def saved(self, parameter: str) -> list[tuple[Integers, Array]]:
        """The rows whose adapters replace a parameter of the model, and what they replace it with.

        Semantics: one pair for each such adapter, rows ascending; all other rows use the model's
        own. `for rows, weight in step.saved("score.weight"): y[rows] = x[rows] @ weight.T`.

        parameter  a name of the slots' `saved`

        Raises ServingError for another name; StaleStepError as `add_lora`.
        Source: PEFT, ModulesToSaveWrapper, `_mixed_batch_forward`.

        >>> slots = AdapterSlots(1, 1, 8, saved=["score.weight"])
        >>> make_step(slots, {"r0": None}).saved("score.weight")
        []
        """
        names = self.adapter_slots._weights.saved
        if not isinstance(parameter, str) or parameter not in names:
            remedy = f"name it in AdapterSlots(saved=...) ({near_names(str(parameter), names)})"
            expected = "a parameter that adapters may replace"
            raise ServingError("parameter", expected, repr(parameter), remedy)
        found: list[tuple[Integers, Array]] = []
        starts = self.segments.seq_start
        hosted = self.adapter_slots._in_slots()
        for s, generation in enumerate(self.segments.adapter_ids.tolist()):
            if generation == BASE_ONLY:
                continue
            if generation not in hosted:
                raise self._stale(hosted)
            if parameter in hosted[generation].saved:
                rows = self.segments.rows[starts[s] : starts[s + 1]]
                found.append((rows, hosted[generation].saved[parameter]))
        return found

    def _stale(self, known: Container[int]) -> StaleStepError:
        """Ids of the step are not known any more: it is older than what the slots hold."""
        gone = [self.adapters[i].lora_name for i in self.adapters if i not in known]
        return StaleStepError(
            "step",
            "adapters that are still in the slots they had",
            f"{some(gone)} evicted or replaced since",
            "make the step again, and run it from its first layer",
        )


def next_step(
    scheduler: Scheduler[R],
    slots: AdapterSlots,
    tokens: Mapping[R, int] | None = None,
    wait: bool = True,
) -> Step[R]:
    """Schedule the next step, bring its adapters into slots, and map its rows to them.

    Semantics: `make_step` of `scheduler.schedule(slots.pinned)`, without the requests for adapters
    that cannot be loaded: missing, damaged, of other widths, above max_lora_rank, or the reader
    raises; and without mixtures with adapters that have magnitudes (DoRA) or parameters in the
    place of the model's. These are finished in the scheduler and listed in `Step.failed`; the other
    requests run as if they had not come. NaN or inf in an adapter's weights is no failure: its own
    rows get it.

    tokens  request_id -> its rows in this step, of requests that wait or run: a prompt's length, or
            1, as for those left out
    wait    False: requests whose adapters are still to be read or packed sit out the step, and a
            thread brings these meanwhile, as `AdapterSlots.prefetch` does. So no step waits for an
            adapter that none of its rows names. They run, hold their place in the scheduler, and
            are in `Step.loading`. Where nothing else runs, the step waits for the first of them

    Raises ServingError when the scheduler has more max_loras than there are slots, or for tokens of
    a request that neither waits nor runs, with near names; DtypeError or ValueRangeError for a
    number of tokens below 0. Nothing has changed then. ServingError, too, when another thread pins
    adapters meanwhile: call it again. Source: vLLM, Scheduler.schedule and set_active_loras.

    >>> def read(path):
    ...     return {"up": Adapter(np.ones((1, 2), "float32"), np.full((1, 1), 3, "float32"))}
    >>> from sgmv import Adapter
    >>> slots = AdapterSlots(max_loras=1, max_cpu_loras=1, max_lora_rank=8, read=read)
    >>> scheduler = Scheduler(max_loras=1)
    >>> scheduler.add("r0", LoRARequest("french", 7, "adapters/french"))
    >>> scheduler.add("r1")
    >>> step = next_step(scheduler, slots, tokens={"r0": 2})
    >>> step.rows, step.slots
    ({'r0': slice(0, 2, None), 'r1': slice(2, 3, None)}, array([ 0,  0, -1]))
    >>> x, y = np.ones((3, 2), "float32"), np.zeros((3, 1), "float32")
    >>> for module in slots.modules:
    ...     step.add_lora(module, y, x)
    array([[6.],
           [6.],
           [0.]], dtype=float32)
    >>> scheduler.finish("r0")
    >>> scheduler.add("r2", LoRARequest("greek", 9, "no-such-place"))
    >>> step = next_step(scheduler, AdapterSlots(max_loras=1, max_cpu_loras=1, max_lora_rank=8))
    >>> list(step.rows), [(request_id, lora.lora_name) for request_id, lora, error in step.failed]
    (['r1'], [('r2', 'greek')])
    """
    if not isinstance(scheduler, Scheduler):
        kind = type(scheduler).__name__
        raise DtypeError("scheduler", "a Scheduler", kind, "make one with Scheduler(max_loras)")
    _check_slots(slots)
    if scheduler.max_loras > slots.max_loras:
        raise ServingError(
            "scheduler",
            f"max_loras of at most {slots.max_loras}, as there are slots",
            str(scheduler.max_loras),
            "make both with the same max_loras",
        )
    tokens = {} if tokens is None else tokens
    _check_tokens(tokens, "requests that wait or run", scheduler.running, scheduler.waiting)
    scheduled = scheduler.schedule(slots.pinned)
    active, errors, loading = _activated(slots, list(scheduled.values()), wait)
    failed, requests, absent = [], {}, []
    for request_id, lora in scheduled.items():
        bad = [member for member, _ in members_of(lora) if member.lora_int_id in errors]
        if bad:
            scheduler.finish(request_id)
            failed.append((request_id, bad[0], errors[bad[0].lora_int_id]))
        elif not loading.isdisjoint(ids_of(lora)):
            absent.append(request_id)
        elif found := _unmixable(slots, lora):
            scheduler.finish(request_id)
            failed.append((request_id, *found))
        else:
            requests[request_id] = lora
    return _step(slots, requests, tokens, active, tuple(failed), tuple(absent))


def _activated(
    slots: AdapterSlots, asked: list[Asked], wait: bool
) -> tuple[dict[int, Active], dict[int, Exception], Set[int]]:
    """What is in slots for these requests, what failed, and the ids that are not there yet."""
    if wait:
        return *slots.try_activate(asked), frozenset()
    failed: dict[int, Exception] = {}
    while True:
        loading: dict[int, LoRARequest] = {}
        active = slots._activate(asked, failed, loading)
        runs = any(loading.keys().isdisjoint(ids_of(one)) for one in asked)
        if runs or failed or not loading:
            return active, failed, loading.keys()
        slots._loader.wait(loading.values())


def make_step(
    slots: AdapterSlots,
    requests: Mapping[R, Asked],
    tokens: Mapping[R, int] | None = None,
) -> Step[R]:
    """Bring these requests' adapters into slots, and map their rows to them.

    Semantics: the rows of each request are together, in the order of `requests`.

    requests  request_id -> its adapter, or a LoRAMixture; None = the base model
    tokens    request_id -> its rows in this step: a prompt's length, or 1, as for those left out

    Raises as `AdapterSlots.activate`; ServingError for tokens of a request that is not among them,
    with near names; DtypeError or ValueRangeError for a number of tokens below 0. Nothing has
    changed then. Source: vLLM, gpu_input_batch.py, `make_lora_inputs`.

    >>> make_step(AdapterSlots(1, 1, 8), {"r0": None, "r1": None}, {"r0": 3}).n
    4
    """
    tokens = {} if tokens is None else tokens
    _check_slots(slots)
    if not isinstance(requests, Mapping):
        kind = type(requests).__name__
        raise DtypeError("requests", "a mapping request_id -> LoRARequest", kind, "pass a dict")
    _check_tokens(tokens, "requests of the step", requests)
    active = slots.activate(requests.values())
    for asked in requests.values():
        if found := _unmixable(slots, asked):
            raise found[1]
    return _step(slots, requests, tokens, active)


def _unmixable(slots: AdapterSlots, asked: Asked) -> tuple[LoRARequest, ServingError] | None:
    """The member of a mixture that has to be alone, and why; or None."""
    members = members_of(asked)
    if len(members) == 1 and members[0][1] == 1:
        return None
    for member, _ in members:
        hosted = slots._weights.hosted.get(member.lora_int_id)
        if hosted is not None and hosted.why_alone:
            expected = f"adapters without {hosted.why_alone} in a mixture"
            error = ServingError("lora_request", expected, str(member), "ask for it alone")
            return member, error
    return None


def _check_slots(slots: object) -> None:
    if not isinstance(slots, AdapterSlots):
        kind = type(slots).__name__
        raise DtypeError("slots", "AdapterSlots", kind, "make them with AdapterSlots(...)")


def _check_tokens(tokens: Mapping[R, int], expected: str, *known: Collection[R]) -> None:
    """Refuse numbers below 0, and names that none of the collections holds."""
    if not isinstance(tokens, Mapping):
        kind = type(tokens).__name__
        raise DtypeError("tokens", "a mapping request_id -> rows", kind, "pass a dict")
    unknown = [name for name in tokens if not any(name in names for names in known)]
    if unknown:
        there = list(chain(*known))
        near = f"there are {some(there)}"
        if all(isinstance(name, str) for name in (unknown[0], *there)):
            near = near_names(str(unknown[0]), [str(name) for name in there])
        remedy = f"leave out those that have finished or failed ({near})"
        raise ServingError("tokens", expected, some(map(repr, unknown)), remedy)
    rows = sum(check_count(f"tokens[{name!r}]", number, 0) for name, number in tokens.items())
    with fits_memory("tokens", rows):
        np.empty((rows, 3), np.int64)  # numpy's repeat does not look whether its result fits


def _step(
    slots: AdapterSlots,
    requests: Mapping[R, Asked],
    tokens: Mapping[R, int],
    active: Mapping[int, Active],
    failed: tuple[tuple[R, LoRARequest, Exception], ...] = (),
    loading: tuple[R, ...] = (),
) -> Step[R]:
    """The step of these requests; their adapters are active, their tokens checked."""
    lengths = [int(tokens.get(request_id, 1)) for request_id in requests]
    members = [members_of(asked) for asked in requests.values()]
    k = max(1, *map(len, members), 1)
    of = np.full((len(members), k, 2), BASE_ONLY, np.int64)
    factors = np.ones((len(members), k), np.float32)
    for i, each in enumerate(members):
        for j, (lora, weight) in enumerate(each):
            of[i, j], factors[i, j] = active[lora.lora_int_id], weight
    slot, generation = np.moveaxis(np.repeat(of if k > 1 else of[:, 0], lengths, axis=0), -1, 0)
    segments = segment(generation)
    if any(weight != 1 for each in members for _, weight in each):
        segments = weighted(segments, np.repeat(factors, lengths, axis=0))
    ends = np.cumsum([0, *lengths]).tolist()
    rows = dict(zip(requests, map(slice, ends[:-1], ends[1:]), strict=True))
    loras = {active[lora.lora_int_id].generation: lora for each in members for lora, _ in each}
    slot = slot.copy()
    slot.flags.writeable = False
    return Step(rows, slot, segments, loras, slots, failed, loading)
