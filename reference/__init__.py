"""What the results must be: numpy only, and nothing from the library under test.

    by_row.py     the definition: one row at a time, in float64      <- start reading here
    by_einsum.py  the same results another way: gather, pad, einsum
    bounds.py     how far a correct kernel may be from them, derived for every element
    compare.py    a result against both: the verdict, its message, the statistics
    batch.py      one seeded batch with its answer: `case.check(y)`
    workloads.py  the corpus: named nasty batches for anybody's kernel
    floats.py     the four float types by name;  arguments.py  who has which adapter

    x (n, h_in)   A (r, h_in)   B (h_out, r)   W (h_out, h_in)   y (n, h_out)   adapter_ids (n,)

    y[i] + scaling * B @ (A @ x[i])     with the adapter and the scaling of adapter_ids[i]

Try a kernel of your own on every case of the corpus:

>>> import numpy as np
>>> from reference import workloads
>>> def my_kernel(case):
...     y = case.y.copy()
...     for i, adapter_id in enumerate(case.adapter_ids.tolist()):
...         if case.adapters.get(adapter_id) is not None:
...             A, B = case.adapters[adapter_id]
...             y[i] += np.float32(case.scalings[adapter_id]) * (B @ (A @ case.x[i]))
...     return y
>>> with np.errstate(invalid="ignore"):
...     for case in workloads.corpus(dtypes=[np.float32]):
...         case.check(my_kernel(case))  # AssertionError names the case and the worst element
"""

from reference.by_row import add_lora, apply_batched, apply_single, lora_delta

__all__ = ["add_lora", "apply_batched", "apply_single", "lora_delta"]
