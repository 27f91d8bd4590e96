"""A kernel of your own against the corpus: named batches that hunt the faults of real systems.

python -m examples.own_kernel
"""

import numpy as np

from reference.workloads import corpus


def add_lora(y, x, rows, seq_start, segment_ids, adapters, scalings):
    """y[i] += scaling * (x[i] @ A.T) @ B.T, in place, segment by segment."""
    for s, adapter_id in enumerate(segment_ids):
        if adapters.get(adapter_id) is not None:  # -1, and None: base only
            A, B = adapters[adapter_id]  # (r, h_in), (h_out, r)
            p = rows[seq_start[s] : seq_start[s + 1]]
            y[p] += scalings[adapter_id] * ((x[p] @ A.T) @ B.T)


if __name__ == "__main__":
    cases = list(corpus())  # float32
    for case in cases:
        y = case.y.copy()
        batch = case.rows, case.seq_start, case.segment_ids.tolist()
        with np.errstate(invalid="ignore"):  # some cases hold inf and NaN on purpose
            add_lora(y, case.x, *batch, case.adapters, case.scalings)
        case.check(y)  # AssertionError: the case, what it hunts, the worst element, its bound
    print(f"{len(cases)} cases passed")
