"""A launch that hung the GPU: what Punica's shrink does with segments of 1 and 132 rows.

python examples/emulate_launch.py
"""

import numpy as np

from sgmv import emulator

adapter_ids = [0] * 1 + [1] * 132  # two segments
h_in, r = 4096, 16

for release in ("1.0.0", "1.1.0"):  # before and after the fix
    launch = emulator.punica_sgmv_shrink(adapter_ids, h_in, r, emulator.A100, release)
    figures = launch.figures()
    print(f"Punica {release}: grid {launch.grid}, split K {launch.split_k}")
    print(f"  zeros among the rows multiplied: {figures['wasted_rows']} of {figures['row_slots']}")
    print(f"  {launch.deadlock or 'every block returns'}")

# Every thread block, executed in some legal order: the same sums, and the same hang.
rng = np.random.default_rng(0)
x = rng.standard_normal((len(adapter_ids), h_in)).astype("float16")
A = {i: rng.standard_normal((r, h_in)).astype("float16") for i in (0, 1)}
result = launch.run(x, A)
print(f"release 1.1.0 ran: {result.barriers} barriers, v {result.out.shape} {result.out.dtype}")
try:
    emulator.punica_sgmv_shrink(adapter_ids, h_in, r, emulator.A100, "1.0.0").run(x, A)
except emulator.DeadlockError:
    print("release 1.0.0 ran: DeadlockError")
