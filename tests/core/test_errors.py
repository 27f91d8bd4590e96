"""Every refusal: its text's key parts, its class, and that nothing was changed before it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sgmv
from tests.help.refusals import ALIASED, BROADCAST, IDS, REFUSALS, SHARED, A, B, F, W, X, Y, stack

SOURCES = Path(sgmv.__file__).parent


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_a_clear_message_before_anything_is_changed(name: str) -> None:
    call, kind, parts = REFUSALS[name]
    inputs = [A, B, X, W, Y, SHARED, ALIASED, BROADCAST]
    before = [array.copy() for array in inputs]
    with pytest.raises(kind) as refusal:
        call()
    message = str(refusal.value)
    assert re.fullmatch(r".+: expected .+, got .+; .+", message), message
    at = 0
    for part in parts:
        assert part in message[at:], f"{part!r} is not in {message[at:]!r}"
        at = message.index(part, at)
    assert isinstance(refusal.value, sgmv.SgmvError)
    assert isinstance(refusal.value, ValueError)
    for array, same in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(array, same)


def test_every_refusal_in_the_sources_is_in_this_table() -> None:
    """Each `raise` names its argument; one that is not hit by a case above is not tested.

    The PEFT reader's are in test_peft*.py, test_files.py and test_foreign.py, those of the command
    `adapters` in test_adapters.py and test_model_files.py, those of tensors in test_tensors.py, the
    environment's in test_workers.py, those of campaigns in test_campaign.py, those of products over
    other engines' weights in tests/compat/.
    """
    elsewhere = "adapters", "campaign", "files", "foreign", "model_files", "products", "tensors"
    raised = {
        path.name: [
            (node.lineno, node.end_lineno)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Raise) and getattr(node.exc, "func", None)
        ]
        for path in SOURCES.glob("*.py")
        if not path.name.startswith("peft") and path.stem not in elsewhere
    }
    hit: set[tuple[str, int]] = set()
    for call, kind, _ in REFUSALS.values():
        with pytest.raises(kind) as refusal:
            call()
        last = refusal.traceback[-1]
        hit.add((Path(str(last.path)).name, last.lineno + 1))
    missed = {
        f"{name}:{first}": "\n".join((SOURCES / name).read_text().splitlines()[first - 1 : last])
        for name, places in raised.items()
        for first, last in places
        if not any((name, line) in hit for line in range(first, last + 1))
    }
    # Refusals that another process must see: test_workers.py and the test below.
    # Those of the command line, and of names that are not there: test_console.py.
    # What no user sees, for a pool goes on without the thread: test_workers.py.
    elsewhere = (
        "NUM_THREADS.name",
        "'bfloat16'",
        "ArgumentTypeError",
        "AttributeError",
        "strerror",
        "subinterpreter",
    )
    assert not {at for at, text in missed.items() if not any(word in text for word in elsewhere)}


def test_the_name_bfloat16_needs_ml_dtypes_imported() -> None:
    program = "import sgmv; sgmv.AdapterStack(3, 4, dtype='bfloat16')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    for part in ("dtype: expected a numpy dtype", "'bfloat16'", "import ml_dtypes"):
        assert part in done.stderr


def test_columns_of_one_buffer_do_not_overlap() -> None:
    """x and y interleaved in memory, but no element shared: allowed."""
    both = np.ones((5, 7), F)
    sgmv.add_lora(both[:, 3:], both[:, :3], stack(), IDS)
    np.testing.assert_array_equal(both[0], [1, 1, 1, 7, 7, 7, 7])


def test_warnings_are_not_raised_for_nan_and_inf() -> None:
    x = X.copy()
    x[0] = [np.nan, np.inf, -np.inf]
    sgmv.apply_batched(x.astype(np.float16), W, [(A, B)], [0] * 5)
