"""The batches of `accelerate`: the adapter of each row, by ids that all layers share."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np

from sgmv.ids import BASE_ONLY
from sgmv.layouts.peft import BASE_NAME
from sgmv.segment import Segments, segment

Names: TypeAlias = Sequence[str]
_all: weakref.WeakSet[Batches] = weakref.WeakSet()


class Call(Protocol):
    """A call of the model with `adapter_names`."""

    names: Names  # the adapter of each sample
    is_over: bool


class _Here(threading.local):
    """What this thread is in: whether the model's call has refreshed all layers on entry."""

    are_fresh = False


class Batches:
    """The ids of adapter names, alike in all layers, and the batch at hand."""

    def __init__(self) -> None:
        self.here = _Here()
        self.changing = threading.RLock()  # of layers, stacks and ids
        _all.add(self)
        self._ids = {BASE_NAME: BASE_ONLY}
        self._next_id = 0
        self._last = Batch([], self)
        self._calls: list[Call] = []
        self.is_mixed = False  # a plain bool: torch.compile's graphs ask it of every batch

    def begin(self, call: Call) -> None:
        """A call of the model has begun: all layers have its names."""
        self._calls.append(call)
        self.is_mixed = True

    def settle(self) -> None:
        """Forget calls that are over; they need not be the latest, where threads call."""
        self._calls = [call for call in self._calls if not call.is_over]
        self.is_mixed = bool(self._calls)

    @property
    def names_now(self) -> Names:
        """The adapter of each sample, of the latest call that is not over."""
        return self._calls[-1].names

    @property
    def names(self) -> set[str]:
        """The adapters that have an id."""
        return self._ids.keys() - {BASE_NAME}

    def id(self, name: str) -> int:
        """The adapter's id, a new one if it has none."""
        if name not in self._ids:
            self._ids[name] = self._next_id
            self._next_id += 1
        return self._ids[name]

    def forget(self, name: str) -> int:
        """Take the adapter's id away; no other gets it."""
        self._last = Batch([], self)
        return self._ids.pop(name)

    def of(self, names: Names) -> Batch:
        """The batch of these `adapter_names`; one for all layers of a step."""
        batch = self._last
        if batch.names != list(names):
            batch = self._last = Batch(names, self)
        return batch


class Batch:
    """The samples of one step, by adapter; their tokens as Segments, made once for all layers."""

    def __init__(self, names: Names, batches: Batches) -> None:
        self.names = list(names)
        self.used = [name for name in dict.fromkeys(names) if name != BASE_NAME]
        self._ids = np.array([batches.id(name) for name in names], np.int64)
        self._segments: tuple[object, Segments] = ((0, None), segment([]))

    def segments(self, tokens: int, active: tuple[int, ...] | None = None) -> Segments:
        """The segments of x's rows: `tokens` rows for each sample.

        active  how many of each sample's last rows have its adapter; all, if left out
        """
        known, segments = self._segments
        if known != (tokens, active):
            ids = np.repeat(self._ids, tokens)
            if active is not None:
                first = tokens - np.array(active, np.int64)[:, None]
                ids = np.where((np.arange(tokens) >= first).ravel(), ids, BASE_ONLY)
            segments = segment(ids)
            self._segments = (tokens, active), segments
        return segments


def _renew_locks() -> None:
    """In a forked child: another thread of the parent may have held one."""
    for batches in _all:
        batches.changing = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
