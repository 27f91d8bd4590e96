"""AdapterStack: slots, true ranks, loading, unloading, replacing."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import threading
import weakref

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sgmv
from sgmv.errors import SgmvError, UnknownAdapterError
from tests.conftest import JITTED

H_IN, H_OUT = 6, 5


def adapter(
    value: float, r: int = 2, scaling: float = 1.0, dtype: type = np.float32
) -> sgmv.Adapter:
    return sgmv.Adapter(np.full((r, H_IN), value, dtype), np.ones((H_OUT, r), dtype), scaling)


def served(stack: sgmv.AdapterStack, adapter_id: int) -> float:
    """What one row of ones gets from this adapter."""
    y = np.zeros((1, H_OUT), np.float64)
    sgmv.add_lora(y, np.ones((1, H_IN), np.float32), stack, [adapter_id])
    return float(y[0, 0])


def test_a_stack_holds_copies() -> None:
    A, B = np.ones((1, H_IN), np.float32), np.ones((H_OUT, 1), np.float32)
    stack = sgmv.AdapterStack.from_adapters({0: (A, B)})
    A[:], B[:] = np.nan, np.nan
    assert served(stack, 0) == H_IN
    with pytest.raises(ValueError, match="read-only"):
        stack[0].A[:] = 0


def test_mapping_behaviour() -> None:
    stack = sgmv.AdapterStack.from_adapters({7: adapter(1.0), 3: None, 10_000: adapter(2.0, r=4)})
    assert stack.ids == list(stack) == [3, 7, 10_000]
    assert len(stack) == 3
    assert 7 in stack
    assert 8 not in stack
    assert stack[3] is None
    assert stack[10_000].r == 4
    assert stack.max_rank == 4
    assert repr(stack) == ("AdapterStack(h_in=6, h_out=5, 2 of 2 slots used, max_rank=4, float32)")


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([np.float16, np.float16], np.float16),
        ([ml_dtypes.bfloat16, ml_dtypes.bfloat16], ml_dtypes.bfloat16),
        ([ml_dtypes.bfloat16, np.float16], np.float32),
        ([np.float16, np.float64], np.float64),
    ],
)
def test_the_stacks_type_holds_all_adapters_exactly(dtypes: list[type], expected: type) -> None:
    stack = sgmv.AdapterStack.from_adapters([adapter(1.5, dtype=dtype) for dtype in dtypes])
    assert stack.dtype == expected
    assert stack[0].A.dtype == expected
    assert served(stack, 0) == served(stack, 1) == 1.5 * H_IN * 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", ml_dtypes.bfloat16, np.float64])
def test_weights_of_another_type_are_rounded_once(dtype: object) -> None:
    stack = sgmv.AdapterStack(H_IN, H_OUT, dtype=dtype)
    stack.load(0, adapter(1 / 3))
    storage = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    np.testing.assert_array_equal(stack[0].A, np.float32(1 / 3).astype(storage))


def test_none_is_base_only_and_takes_no_slot() -> None:
    stack = sgmv.AdapterStack(H_IN, H_OUT, slots=1)
    stack.load(1, None)
    stack.load(2, adapter(1.0))
    assert served(stack, 1) == 0
    stack.load(2, None)
    stack.load(1, adapter(3.0))
    assert served(stack, 2) == 0
    assert served(stack, 1) == 3.0 * H_IN * 2


def test_replacing_changes_everything_of_the_old_one() -> None:
    stack = sgmv.AdapterStack(H_IN, H_OUT, slots=2, max_rank=8)
    stack.load(5, adapter(1.0, r=8, scaling=100.0))
    stack.load(5, adapter(2.0, r=1, scaling=0.5))
    assert served(stack, 5) == 2.0 * H_IN * 1 * 0.5
    assert len(stack) == 1


def test_a_full_stack_can_replace_and_refuses_one_more() -> None:
    stack = sgmv.AdapterStack.from_adapters([adapter(1.0), adapter(2.0)])
    stack.load(1, adapter(5.0))
    with pytest.raises(SgmvError, match="free slot"):
        stack.load(2, adapter(9.0))
    assert stack.ids == [0, 1]
    assert served(stack, 1) == 5.0 * H_IN * 2


def test_a_failed_load_changes_nothing() -> None:
    stack = sgmv.AdapterStack(H_IN, H_OUT, slots=1, max_rank=2)
    stack.load(5, adapter(1.0))
    for wrong in (adapter(1.0, r=3), sgmv.Adapter(np.ones((1, 9), "f"), np.ones((5, 1), "f"))):
        with pytest.raises(SgmvError):
            stack.load(5, wrong)
    assert served(stack, 5) == 1.0 * H_IN * 2


def test_unloaded_weights_are_freed() -> None:
    stack = sgmv.AdapterStack(H_IN, H_OUT)
    stack.load(5, adapter(1.0))
    weights = weakref.ref(stack.table.weights[0].wa)
    stack.unload(5)
    gc.collect()
    assert weights() is None


@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_copies_stand_on_their_own(duplicate: object) -> None:
    """A copied table would keep addresses of weights that the original may free."""
    stack = sgmv.AdapterStack.from_adapters(
        {4: adapter(1.0), 9: adapter(2.0, r=1, scaling=3.0), 2: None, 5: adapter(1.0, r=0)}
    )
    other = duplicate(stack)
    assert set(other.table.wa_address).isdisjoint(stack.table.wa_address)
    stack.unload(4)
    assert other.ids == [2, 4, 5, 9]
    assert other[5].B.shape == (H_OUT, 0)
    assert served(other, 9) == 2.0 * H_IN * 1 * 3.0
    assert served(other, 4) == 1.0 * H_IN * 2


def test_a_call_in_flight_keeps_the_weights_it_started_with() -> None:
    """Another thread replaces the adapter all the while: each row is one adapter's, never a mix."""
    A, B = np.ones((16, 512), np.float32), np.ones((512, 16), np.float32)
    versions = [sgmv.Adapter(k * A, B) for k in (1, 2, 3)]
    stack = sgmv.AdapterStack.from_adapters([versions[0]])
    stop = threading.Event()

    def replace() -> None:
        k = 0
        while not stop.is_set():
            k += 1
            stack.load(0, versions[k % 3])

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        x = np.ones((64, 512), np.float32)
        for _ in range(40 if JITTED else 3):
            y = sgmv.add_lora(np.zeros((64, 512), np.float32), x, stack, np.zeros(64, int))
            values = np.unique(y)
            assert len(values) == 1
            assert values[0] in (512 * 16, 2 * 512 * 16, 3 * 512 * 16)
    finally:
        stop.set()
        thread.join()


def test_lookups_take_ids_as_strictly_as_loading() -> None:
    stack = sgmv.AdapterStack.from_adapters({0: adapter(1.0), 1: adapter(2.0)})
    assert np.int32(1) in stack
    for no_id in (True, 1.0, "1", None, [1]):
        assert no_id not in stack
        with pytest.raises(SgmvError, match="adapter_id"):
            stack[no_id]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_child_can_load_though_the_parent_was_loading() -> None:
    stack = sgmv.AdapterStack.from_adapters([adapter(1.0)])
    with stack._changing:
        child = os.fork()
        if child == 0:  # pragma: no cover
            signal.alarm(20)
            stack.load(0, adapter(3.0))
            os._exit(0 if stack[0].A[0, 0] == 3.0 else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_ten_thousand_slots() -> None:
    one = adapter(1.0, r=1)
    stack = sgmv.AdapterStack.from_adapters({3 * i: one for i in range(10_000)})
    stack.load(29_997, adapter(4.0, r=1))
    assert served(stack, 29_997) == 4.0 * H_IN
    assert served(stack, 0) == 1.0 * H_IN


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["load", "none", "unload"]), st.integers(0, 5), st.integers(0, 3)),
    max_size=30,
)


@settings(max_examples=60)
@given(OPERATIONS)
def test_never_stale(operations: list[tuple[str, int, int]]) -> None:
    """Random loads and unloads against a dict: every id serves what it was given last."""
    stack = sgmv.AdapterStack(H_IN, H_OUT, slots=3, max_rank=3)
    model: dict[int, float] = {}
    held: set[int] = set()
    for step, (operation, i, r) in enumerate(operations):
        if operation == "unload":
            if i in model:
                stack.unload(i)
                model.pop(i)
                held.discard(i)
            else:
                with pytest.raises(SgmvError):
                    stack.unload(i)
        elif operation == "none":
            stack.load(i, None)
            model[i] = 0.0
            held.discard(i)
        elif i in held or len(held) < 3:
            stack.load(i, adapter(step + 1.0, r=r))
            model[i] = (step + 1.0) * H_IN * r
            held.add(i)
        else:
            with pytest.raises(SgmvError):
                stack.load(i, adapter(-1.0))
        assert stack.ids == sorted(model)
        for known, value in model.items():
            assert served(stack, known) == value


def test_what_is_not_loaded_need_not_be_loaded_to_be_unloaded() -> None:
    stack = sgmv.AdapterStack(H_IN, H_OUT, slots=1)
    with pytest.raises(UnknownAdapterError, match=r"got 99; there is nothing to unload$"):
        stack.unload(99)
    with pytest.raises(UnknownAdapterError, match=r"got 99; load it first$"):
        stack[99]
