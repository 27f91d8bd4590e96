"""Numbers at every edge, in every argument of the definition: its own error by name, or right."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import reference
from reference import by_einsum, by_row
from tests.help import surface
from tests.help.surface import H_IN, H_OUT, IDS, array, pair, x, y

pytestmark = [pytest.mark.once, pytest.mark.oracle]

# The other public names take a kernel, or are what it returns.
OF_KERNELS = {"Report", "Workload", "call", "check", "load"}
CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "lora_delta": lambda: {"x": x(), "A": pair()[0], "B": pair()[1], "scaling": 2.0},
    "apply_single": lambda: {
        "x": x(), "W": array(H_OUT, H_IN), "A": pair()[0], "B": pair()[1], "scaling": 2.0
    },
    "apply_batched": lambda: {
        "x": x(), "W": array(H_OUT, H_IN), "adapters": {3: pair(), 100: pair()},
        "adapter_ids": list(IDS), "scalings": {3: 2.0, 100: 1.0},
    },
    "add_lora": lambda: {
        "y": y(), "x": x(), "adapters": {3: pair(), 100: pair()}, "adapter_ids": np.array(IDS),
        "scalings": 2.0,
    },
    "add_lora, lists": lambda: {
        "y": y(), "x": x(), "adapters": [pair(), None, pair()], "adapter_ids": [0, -1, 2, 1, 0],
        "scalings": [2.0, 1.0, 0.5],
    },
    "add_lora, an array": lambda: {
        "y": y(), "x": x(), "adapters": (pair(), pair()), "adapter_ids": [0, -1, 1, 1, 0],
        "scalings": np.array([2.0, 0.5]),
    },
}  # fmt: skip


def test_every_public_call_is_in_the_table() -> None:
    assert {name.split(",")[0] for name in CALLS} == set(reference.__all__) - OF_KERNELS


@pytest.mark.parametrize("form", [by_row, by_einsum], ids=["by_row", "by_einsum"])
@pytest.mark.parametrize("name", CALLS)
def test_any_value_anywhere_is_refused_by_name_or_right(name: str, form: Any) -> None:
    call = getattr(form, name.split(",")[0])
    valid = CALLS[name]()
    right = repr(surface.state(call(**valid)))
    named = {*inspect.signature(call).parameters, "adapter"}
    wrong: list[str] = []
    for argument in valid:
        for variant in surface.variants(argument, valid[argument]):
            arguments = {**CALLS[name](), argument: variant.value}
            before = repr(surface.state(arguments))
            what = f"{argument} = {variant.told}"
            try:
                result = call(**arguments)
            except ValueError as error:
                told = re.fullmatch(r"(?s)(\w+).*: expected .+, got .*; .+", str(error))
                if told is None or told[1] not in named:
                    wrong.append(f"{what}: {error}")
                if variant.same and isinstance(variant.value, np.generic):
                    wrong.append(f"{what}: the same number is refused: {error}")
            except BaseException as error:
                wrong.append(f"{what}: {type(error).__name__}: {error}")
            else:
                if result.dtype != np.float64:
                    wrong.append(f"{what}: {result.dtype}")
                if variant.same and repr(surface.state(result)) != right:
                    wrong.append(f"{what}: another result")
            if repr(surface.state(arguments)) != before:
                wrong.append(f"{what}: changed")
    assert not wrong, f"{len(wrong)} of {name}:\n" + "\n".join(wrong)
