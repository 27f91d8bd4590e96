"""Calls of sgmv as operations of torch's own, so that torch.compile keeps them inside its graphs.

torch cannot trace compiled kernels that take addresses: it breaks its graph at them, or fails. An
operation with a schema and a fake form is a node of the graph. What a step's rows and weights are
is not in the graph: the owner that a handle names knows it when the node runs. So one graph serves
every mix of adapters.

Source: torch.library.custom_op.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol, TypeAlias

from sgmv import tensors

Tensor: TypeAlias = Any  # a torch tensor
SCHEMA = "(Tensor(a!) y, Tensor x, Tensor[] weights, int[] widths, int handle) -> ()"


class Owner(Protocol):
    """What adds to y when the operation runs."""

    def add_in_graph(
        self, y: Tensor, x: Tensor, weights: Sequence[Tensor], widths: Sequence[int]
    ) -> None:
        """Add to y in place; weights and widths are as the owner passed them to the operation."""


_owners: weakref.WeakValueDictionary[int, Owner] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def handle_of(owner: Owner) -> int:
    """A new number for an owner, good for as long as it lives."""
    number = next(_numbers)
    _owners[number] = owner
    return number


@cache
def operation() -> Any:
    """`torch.ops.sgmv.add_in_graph`: y, x, weights, widths and a handle; it returns nothing."""

    def run(y: Tensor, x: Tensor, weights: Any, widths: Any, handle: int) -> None:
        _owners[handle].add_in_graph(y, x, weights, widths)

    def fake(y: Tensor, x: Tensor, weights: Any, widths: Any, handle: int) -> None:
        """Shapes alone: there is no output to tell of."""

    made = tensors.torch().library.custom_op(
        "sgmv::add_in_graph", run, mutates_args=("y",), schema=SCHEMA
    )
    made.register_fake(fake)
    return made
