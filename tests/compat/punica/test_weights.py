"""LoraWeight and BatchedLoraWeight."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from sgmv import errors
from sgmv.compat import punica
from tests.help.compat_forms import DTYPES, check, delta, drawn
from tests.help.punica_calls import COUNT, LAYERS, SEGMENT_OF_ROW, N, S

pytestmark = pytest.mark.usefixtures("one_blas_thread")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_lora_weight(rng: np.random.Generator, dtype: Any) -> None:
    a, b = drawn(rng, (COUNT, LAYERS, 8, 90), "f"), drawn(rng, (COUNT, LAYERS, 70, 8), "f")
    weights = [punica.LoraWeight(LAYERS, 90, 70, 8, dtype, "cpu") for _ in range(COUNT)]
    for i, weight in enumerate(weights):
        weight.copy_from_tensor(a[i], b[i])
        sizes = weight.num_layers, weight.in_features, weight.out_features, weight.lora_rank
        assert sizes == (LAYERS, 90, 70, 8)
        assert (weight.dtype, weight.device) == (dtype, "cpu")
    chosen = [3, 0, 3, 1, 2, 2]  # one of each segment
    batched = punica.BatchedLoraWeight([weights[i] for i in chosen])
    A, B = ([each[i, 1].astype(dtype) for i in chosen] for each in (a, b))
    x, y = drawn(rng, (N, 90), dtype), drawn(rng, (N, 70), dtype)
    del weights, weight
    gc.collect()  # the batch holds them
    out = y.copy()
    punica.add_lora_sgmv_custom_cutlass(out, x, batched.wa_ptr, batched.wb_ptr, S, 1, 8)
    check(out, delta(y, x, A, B, SEGMENT_OF_ROW), "LoraWeight")


def test_sizes_and_types_of_lora_weight_are_checked() -> None:
    for arguments, error in (
        ((1, 2, 3, -1, "float32"), errors.ValueRangeError),
        ((1, 2, 3, 4, "int32"), errors.DtypeError),
        ((1, 2, 3, 4, "float32", "cuda:0"), errors.ValueRangeError),
    ):
        with pytest.raises(error):
            punica.LoraWeight(*arguments)
    weight = punica.LoraWeight(1, 2, 3, 4, "float32")
    with pytest.raises(errors.ShapeError, match="b: expected"):
        weight.copy_from_tensor(np.zeros((1, 4, 2)), np.zeros((1, 4, 3)))
    with pytest.raises(errors.ValueRangeError, match="at least one"):
        punica.BatchedLoraWeight([])
