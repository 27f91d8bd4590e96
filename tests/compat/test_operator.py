"""sgmv's operation in torch's graphs: no break, no graph for each step's adapters."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest

from sgmv.compat.operator import handle_of, operation

torch = pytest.importorskip("torch")


class Adds:
    """Adds `factor * (x @ w.T)` of each weight to its columns; the factor changes between steps."""

    factor = 1.0

    def add_in_graph(self, y: Any, x: Any, weights: Sequence[Any], widths: Sequence[int]) -> None:
        start = 0
        for weight, width in zip(weights, widths, strict=True):
            y[:, start : start + width] += self.factor * (x @ weight.T)
            start += width


class Layer(torch.nn.Module):
    """A base product, what the operation adds to it, and more that a compiler may fuse."""

    def __init__(self, owner: Adds) -> None:
        super().__init__()
        self.base = torch.nn.Linear(8, 12, bias=False)
        self.weights = [torch.randn(4, 8), torch.randn(8, 8)]
        self.handle, self.operation = handle_of(owner), operation()

    def forward(self, x: Any) -> Any:
        y = self.base(x)
        self.operation(y, x, self.weights, (4, 8), self.handle)
        return torch.relu(y) * 2


def test_one_whole_graph_for_all_rows_and_steps() -> None:
    torch._dynamo.reset()
    owner = Adds()
    layer = Layer(owner)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for rows in (3, 5, 17):
            x = torch.randn(rows, 8)
            for owner.factor in (0.0, 1.0, -2.0):
                assert torch.equal(compiled(x), layer(x))
    assert len(graphs) == 1


def test_its_schema_and_fake_form_are_right() -> None:
    """torch's own examination: what is written is what the schema says."""
    owner = Adds()
    y, x, weights = torch.zeros(3, 4), torch.ones(3, 8), [torch.ones(4, 8)]
    arguments = y, x, weights, [4], handle_of(owner)
    torch.library.opcheck(operation(), arguments, test_utils=("test_schema", "test_faketensor"))


def test_an_owner_that_is_gone_is_not_kept() -> None:
    owner = Adds()
    number = handle_of(owner)
    del owner
    gc.collect()
    with pytest.raises(KeyError, match=str(number)):
        operation()(torch.zeros(1, 1), torch.zeros(1, 1), [], [], number)
