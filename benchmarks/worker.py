"""A process that times one checkout of sgmv, turn by turn, as `studies/against.py` asks it.

It is copied beside the checkout. It imports numpy and sgmv alone, and ml_dtypes for bfloat16, and
calls what each commit has.
An order is a line of JSON on standard input, its answer a line on standard output.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np


def operands(case: dict[str, Any]) -> tuple[Any, Any, dict[int, tuple[Any, Any]]]:
    """x, y and {id: (A, B)} of a case, the same in each process."""
    if case["dtype"] == "bfloat16":
        import ml_dtypes  # noqa: F401  # numpy then knows the name
    rng = np.random.default_rng(0)

    def drawn(rows: int, columns: int) -> Any:
        values = rng.standard_normal((rows, columns), np.float32) / np.float32(columns**0.5)
        return values.astype(case["dtype"])

    n, h_in, h_out, rank = len(case["ids"]), case["h_in"], case["h_out"], case["rank"]
    pairs = {int(i): (drawn(rank, h_in), drawn(h_out, rank)) for i in np.unique(case["ids"])}
    return drawn(n, h_in), drawn(n, h_out), pairs


def main() -> None:
    """Answer each order: a case, of which the result is saved, or a turn, which is timed."""
    import sgmv

    call: Any = None
    for line in sys.stdin:
        order = json.loads(line)
        if "case" in order:
            case = order["case"]
            x, y, pairs = operands(case)
            sgmv.set_num_threads(case["threads"])
            stack, segments = sgmv.AdapterStack.from_adapters(pairs), sgmv.segment(case["ids"])
            result = y.copy()
            sgmv.add_lora(result, x, stack, segments)
            np.save(order["result"], result)

            def call(y: Any = y, x: Any = x, stack: Any = stack, segments: Any = segments) -> None:
                sgmv.add_lora(y, x, stack, segments)

            answer: dict[str, Any] = {"file": sgmv.__file__}
        else:
            taken: list[int] = []
            settled = time.perf_counter() + order["settle_s"]
            end = settled + order["turn_s"]
            while not taken or time.perf_counter() < end:
                start = time.perf_counter_ns()
                call()
                if time.perf_counter() >= settled:
                    taken.append(time.perf_counter_ns() - start)
            answer = {"nanoseconds": taken}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
