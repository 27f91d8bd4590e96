"""What the results must be: numpy only, and nothing from the library under test.

    by_row.py     the definition: one row at a time, in float64      <- start reading here
    by_einsum.py  the same results another way: gather, pad, einsum
    bounds.py     how far a correct kernel may be from them, derived for every element;  gains.py
    compare.py    a result against both: the verdict, its message, the statistics
    batch.py      one seeded batch with its answer: `case.check(y)`
    workloads.py  the corpus: named nasty batches for anybody's kernel
    mixtures.py   the same of rows with several weighted adapters;  dora.py  with magnitudes
    experts.py    layers of experts
    runner.py     the corpus on a kernel: `check(kernel)`;  drawn.py  random batches, shrunk
    diagnosis.py  the likeliest fault, from the pattern of failures;  questions.py  known faults
    signatures.py how each engine's kernel is called;  loading.py  FILE:FUNCTION
    floats.py     the four float types by name;  arguments.py  who has which adapter

    x (n, h_in)   A (r, h_in)   B (h_out, r)   W (h_out, h_in)   y (n, h_out)   adapter_ids (n,)

    y[i] + scaling * B @ (A @ x[i])     with the adapter and the scaling of adapter_ids[i]

    with a magnitude (DoRA), gain * (that) + (1 - gain) * bias
    of k adapters per row, adapter_ids (n, k), the sum of these, each times weights[i, j]

Try a kernel of your own on every case of the corpus; `python -m reference check FILE:FUNCTION` does
the same from the command line:

>>> import reference
>>> def my_kernel(y, x, rows, seq_start, segment_ids, adapters, scalings):
...     for s, adapter_id in enumerate(segment_ids):
...         if adapters.get(adapter_id) is not None:
...             A, B = adapters[adapter_id]
...             p = rows[seq_start[s] : seq_start[s + 1]]
...             y[p] += scalings[adapter_id] * ((x[p] @ A.T) @ B.T)
>>> print(reference.check(my_kernel, max_elements=5_000))
passed: all 28 cases
"""

from reference.batch import Workload
from reference.by_row import add_lora, apply_batched, apply_single, lora_delta
from reference.loading import load
from reference.runner import Report, call, check

__all__ = [
    "Report",
    "Workload",
    "add_lora",
    "apply_batched",
    "apply_single",
    "call",
    "check",
    "load",
    "lora_delta",
]
