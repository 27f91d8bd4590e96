"""Layers of experts with adapters, of random values, for the tests of sgmv.experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from reference.experts import Factors
from sgmv import experts


class Layer(NamedTuple):
    """A batch and its layer; adapters by id, None is base only."""

    x: np.ndarray
    expert_ids: np.ndarray
    weights: np.ndarray
    W13: np.ndarray
    W2: np.ndarray
    adapters13: dict[int, Factors | None]
    adapters2: dict[int, Factors | None]
    adapter_ids: np.ndarray

    def run(self, rows: Any = slice(None)) -> np.ndarray:
        """moe_layer of these rows."""
        return experts.moe_layer(
            self.x[rows],
            (self.expert_ids[rows], self.weights[rows]),
            self.W13,
            self.W2,
            stack13=stack_of(self.adapters13, self.W13),
            stack2=stack_of(self.adapters2, self.W2),
            adapter_ids=self.adapter_ids[rows],
        )


def stack_of(adapters: dict[int, Factors | None], W: np.ndarray) -> experts.ExpertStack:
    E, h_out, h_in = W.shape
    stack = experts.ExpertStack(E, h_in, h_out, slots=len(adapters), max_rank=8, dtype=W.dtype)
    for adapter_id, its in adapters.items():
        stack.load(adapter_id, its and experts.ExpertAdapter(*its))
    return stack


def layer(
    rng: np.random.Generator, dtype: Any, n: int = 7, k: int = 2, E: int = 5, hidden: int = 40
) -> Layer:
    inter = 24

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / shape[-1] ** 0.5).astype(dtype)

    def factors(h_in: int, h_out: int) -> Factors:
        r = int(rng.integers(1, 7))
        return Factors(normal(E, r, h_in), normal(E, h_out, r), float(rng.uniform(0.5, 2)))

    ids, weights = experts.top_k(rng.standard_normal((n, E)).astype(np.float32), k)
    ids[rng.random(ids.shape) < 0.1] = -1
    return Layer(
        rng.standard_normal((n, hidden)).astype(dtype),
        ids,
        weights,
        normal(E, 2 * inter, hidden),
        normal(E, hidden, inter),
        {0: factors(hidden, 2 * inter), 3: None, 8: factors(hidden, 2 * inter)},
        {0: factors(inter, hidden), 3: factors(inter, hidden), 8: None},
        rng.choice([-1, 0, 3, 8], n),
    )
