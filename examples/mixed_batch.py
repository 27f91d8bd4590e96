"""A mixed batch in numpy: six rows, three adapters of different ranks, one call per layer.

python examples/mixed_batch.py
"""

import numpy as np

import sgmv

rng = np.random.default_rng(0)
h_in, h_out = 1024, 512


def draw(*shape: int) -> np.ndarray:
    """Small integers: every sum is exact in float32, so that two ways must agree to the bit."""
    return rng.integers(-2, 3, shape).astype("float32")


adapters = {
    adapter_id: sgmv.Adapter(A=draw(r, h_in), B=draw(h_out, r), scaling=0.5)
    for adapter_id, r in [(1, 8), (2, 64), (7, 17)]
}
stack = sgmv.AdapterStack.from_adapters(adapters)  # packs the weights: once, when they are loaded
x, W = draw(6, h_in), draw(h_out, h_in)

adapter_ids = [7, 1, -1, 7, 2, 1]  # one per row; -1 is base only
segments = sgmv.segment(adapter_ids)  # once per step, for all layers
y = x @ W.T  # the base product, once for all rows
sgmv.add_lora(y, x, stack, segments)  # each row's own delta, in place
print(segments)

for i, adapter_id in enumerate(adapter_ids):  # the same, one row at a time
    expected = x[i] @ W.T
    if adapter_id in adapters:
        adapter = adapters[adapter_id]
        expected += adapter.scaling * (x[i] @ adapter.A.T) @ adapter.B.T
    print(f"row {i}, adapter {adapter_id:2}: equal bits {np.array_equal(y[i], expected)}")
