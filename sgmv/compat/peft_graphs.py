"""Adapted layers inside torch.compile's graphs: a node each, the same for every batch.

The node has a tensor with the layer's number, not the number itself: torch makes a graph of its own
for another number, and none for another value of a tensor. So layers that share their code share
its graph, too.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Protocol

from sgmv import tensors
from sgmv.compat.operator import Tensor, handle_of, operation


class Adds(Protocol):
    """A layer, which knows the adapters of the batch at hand when the node runs."""

    def add_now(self, y: Tensor, x: Tensor) -> None:
        """Add each row's own delta to y, the base layer's result."""


class _Layers:
    """What the handle of every node names."""

    def __init__(self) -> None:
        self.by_number: weakref.WeakValueDictionary[int, Adds] = weakref.WeakValueDictionary()
        self.numbers = itertools.count()

    def add_in_graph(
        self, y: Tensor, x: Tensor, weights: Sequence[Tensor], widths: Sequence[int]
    ) -> None:
        self.by_number[int(weights[0])].add_now(y, x)


@cache
def _layers() -> tuple[_Layers, int]:
    """One for the process: a handle of its own for each model would be a graph of its own."""
    layers = _Layers()
    return layers, handle_of(layers)


class Node:
    """A layer's node: `node(y, x)` in a graph is `layer.add_now(y, x)` when the graph runs."""

    def __init__(self, layer: Adds) -> None:
        layers, self._handle = _layers()
        number = next(layers.numbers)
        layers.by_number[number] = layer
        self._number = tensors.torch().tensor(number)
        self._operation = operation()

    def __call__(self, y: Tensor, x: Tensor) -> None:
        self._operation(y, x, [self._number], [], self._handle)
