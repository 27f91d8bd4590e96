"""A kernel of your own against the corpus: named batches that hunt the faults of real systems.

python -m examples.own_kernel
"""

import numpy as np

from reference.workloads import corpus


def add_lora(y, x, rows, seq_start, segment_ids, adapters, scalings):
    """y[i] += scaling * (x[i] @ A.T) @ B.T in place, one row at a time, as BGMV kernels do."""
    adapter_ids = np.repeat(segment_ids, np.diff(seq_start))
    for i, adapter_id in zip(rows, adapter_ids, strict=True):
        if adapters.get(adapter_id) is not None:  # -1, and None: base only
            A, B = adapters[adapter_id]  # (r, h_in), (h_out, r)
            y[i] += scalings[adapter_id] * (B @ (A @ x[i]))


if __name__ == "__main__":
    cases = list(corpus())  # float32
    for case in cases:
        y = case.y.copy()
        batch = case.rows, case.seq_start, case.segment_ids.tolist()
        with np.errstate(invalid="ignore"):  # some cases hold inf and NaN on purpose
            add_lora(y, case.x, *batch, case.adapters, case.scalings)
        case.check(y)  # AssertionError: the case, what it hunts, the worst element, its bound
    print(f"{len(cases)} cases passed")
