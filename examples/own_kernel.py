"""A kernel of your own against the corpus: named batches that hunt the faults of real systems.

python -m reference check examples/own_kernel.py:add_lora
"""

import numpy as np


def add_lora(y, x, rows, seq_start, segment_ids, adapters, scalings):
    """y[i] += scaling * (x[i] @ A.T) @ B.T in place, one row at a time, as BGMV kernels do."""
    adapter_ids = np.repeat(segment_ids, np.diff(seq_start))
    for i, adapter_id in zip(rows, adapter_ids, strict=True):
        if adapters.get(adapter_id) is not None:  # -1, and None: base only
            A, B = adapters[adapter_id]  # (r, h_in), (h_out, r)
            y[i] += scalings[adapter_id] * (B @ (A @ x[i]))
