"""Memory for weights: pieces are apart, come back, and stand in the system's large pages."""

from __future__ import annotations

import ast
import gc
import os
import re
import sys
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sgmv
from sgmv import memory, products, table
from tests.conftest import JITTED
from tests.help.planting import ROOT, Fault, outcome, run_python, verdict
from tests.stress import memory as lives

pytestmark = pytest.mark.once

BYTE = np.dtype("u1")
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FAULTS = {
    "neighbour not joined before": Fault("memory", "self._free[i - 1][1] == start", "False"),
    "neighbour not joined after": Fault("memory", "self._free[i][0] == end", "False"),
    "never returned": Fault("memory", "self._slab.returned.append(self._range)", "pass"),
    "returned too early": Fault("memory", "return np.asarray(piece)[:size]", """\
return np.lib.stride_tricks.as_strided(np.frombuffer(
        (__import__("ctypes").c_char * size).from_address(piece.__array_interface__["data"][0]),
        "u1"))"""),
    "twice the same": Fault("memory", "[(start + size, end)] if", "[(start, end)] if"),
    "one line short": Fault("memory", "(start, start + size)\n", "(start, start + size - 64)\n"),
    "off the line": Fault("memory", "start = -self._address % CACHE_LINE", "start = 8"),
    "what is cut is not counted": Fault("memory", "self.used += size", "pass"),
    "what is free still counts": Fault("memory", "self.used -= end - start", "pass"),
}  # fmt: skip
AFTER = "            self._table = self._table.with_changes(slot_of, changes)\n"
MOVE = "        _move_weights_together()\n"
UNBOUNDED = {
    "weights stay where they are": Fault("stack", "self._table = table.with_changes(", "("),
    "nothing moves after unloading": Fault(
        "stack", f"{AFTER}{MOVE}\n    def fitted", f"{AFTER}\n    def fitted"
    ),
    "nothing moves after loading": Fault(
        "stack", f"{AFTER}{MOVE}\n    def _leave", f"{AFTER}\n    def _leave"
    ),
    "only A moves": Fault(
        "stack", "[table.wa_address, table.wb_address, *gains]", "[table.wa_address, *gains]"
    ),
    "B is not copied": Fault("table", "wb=_placed(self.wb)", "wb=_placed(0 * self.wb)"),
    "A keeps its slab": Fault("table", "A, B = self.wa.copy(),", "A, B = self.wa[:],"),
    "a leaving slab is filled": Fault(
        "memory", "enumerate([] if self.is_leaving else self._free)", "enumerate(self._free)"
    ),
    "one slab is emptied": Fault("memory", "while (number :=", "if (number :="),
    "the fullest leaves": Fault("memory", "found = min(shares", "found = max(shares"),
    "twice what is loaded": Fault("memory", "MOST = 1.5", "MOST = 2"),
}  # fmt: skip
H = 32
RANKS = (0, 1, 2, 4, 8, 16, 21, 22, 40, 64, 100)  # a third of a small slab is rank 21
CACHING = ("add_lora_linear", "update_metadata", "bgmv", "add_lora_bgmv")  # where weights stand
Operations = list[tuple[int, int, int | None]]  # layer, adapter, rank; None unloads


@pytest.fixture(autouse=True)
def _own_slabs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Slabs of the test's own, small ones, whatever else has weights in this process."""
    use_small_slabs(memory, monkeypatch)
    yield
    gc.collect()


def use_small_slabs(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_slabs", type(module._slabs)())
    monkeypatch.setattr(module, "_latest", None)
    monkeypatch.setattr(module, "SLAB", 1 << 16)


def piece(size: int, module: Any = memory) -> Any:
    return module.aligned((size,), BYTE)


def check_random_life(module: Any, seed: int = 0) -> None:
    """Pieces come and go; each keeps what was written to it, and what is free is one range."""
    rng = np.random.default_rng(seed)
    alive: list[tuple[Any, int]] = []
    for step in range(600):
        if alive and rng.random() < 0.48:
            array, value = alive.pop(rng.integers(len(alive)))
            assert (array == value).all(), "another piece was written here"
        else:
            array = piece(int(rng.integers(1, 9000)), module)
            assert array.ctypes.data % module.CACHE_LINE == 0
            array[:] = value = step % 251
            alive.append((array.reshape(1, -1)[:, ::-1], value))  # a view keeps it
            used = sum(-(-held.size // 64) * 64 for held, _ in alive)
            assert module.totals().pieces == used
    assert all((array == value).all() for array, value in alive)
    most, kept = len(module._slabs), module._latest
    alive.clear()
    del array
    assert list(module._slabs.values()) == [kept], "a slab outlived its pieces"
    assert module.totals() == (module.SLAB, 0)
    for order in (0, -1):  # the first freed first, or the last
        pieces = [piece(module.SLAB // 4, module) for _ in range(4)]
        while pieces:
            pieces.pop(order)
        thirds = [piece(module.SLAB // 3 - 64, module) for _ in range(3)]
        assert module._latest is kept, "what is free is not one range"
        thirds.clear()
    assert most > 1


@pytest.mark.parametrize("seed", range(5))
def test_pieces_are_apart_and_come_back(seed: int) -> None:
    check_random_life(memory, seed)


@pytest.mark.oracle
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_bookkeeping_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(modules: dict[str, ModuleType]) -> None:
        use_small_slabs(modules["sgmv.memory"], monkeypatch)
        check_random_life(modules["sgmv.memory"])

    assert verdict(check, FAULTS[name], name="sgmv.memory") != "nothing"


def check_follows(modules: dict[str, ModuleType], operations: Operations) -> None:
    """Memory is in bounds after every load and unload, and every adapter is what it was."""
    memory, stack = modules["sgmv.memory"], modules["sgmv.stack"].AdapterStack
    stacks = [stack(H, H, slots=len(operations), max_rank=100) for _ in range(3)]
    loaded: dict[tuple[int, int], Any] = {}
    shown = {}
    for step, (layer, i, r) in enumerate(operations):
        if r is not None:
            A, B = (np.full(shape, step + 1, "f") for shape in ((r, H), (H, r)))
            stacks[layer].load(i, (A, B))
            loaded[layer, i] = A, B
            shown[layer] = stacks[layer][i]  # what a user keeps is not the stack's memory
        elif (layer, i) in loaded:
            stacks[layer].unload(i)
            del loaded[layer, i]
        used = 2 * sum(max(1, len(A) * H * 4 // 64) * 64 for A, _ in loaded.values())
        held = memory.totals()
        assert held.pieces == used, "pieces are lost, or come twice"
        assert held.slabs <= 1.5 * used + memory.SLAB, f"step {step}: {held}"
        assert sum(slab.size for slab in memory._slabs.values()) == held.slabs
    for (layer, i), weights in loaded.items():
        found = stacks[layer][i]
        for array, wanted in zip((found.A, found.B), weights, strict=True):
            assert array.shape == wanted.shape, "a matrix has lost its shape"
            assert (array == wanted).all(), "moved weights have changed"


def random_operations(seed: int, most: int = 250) -> Operations:
    """Loads of some ranks, then unloads in another order, or replacements; some loads between."""
    rng = np.random.default_rng(seed)
    ids = [(layer, i) for layer in range(3) for i in range(most // 6)]
    ranks = rng.choice(RANKS, len(ids), p=rng.dirichlet(np.full(len(RANKS), 0.3)))
    then = None if seed < 4 else 1
    operations: Operations = [(*one, int(r)) for one, r in zip(ids, ranks, strict=True)]
    order = np.argsort(ranks, kind="stable")[::-1] if seed % 2 else rng.permutation(len(ids))
    for at in order:
        operations.append((*ids[at], then))
        if rng.random() < 0.2:
            operations.append((*ids[rng.integers(len(ids))], int(rng.choice(RANKS))))
    return operations


def check_leaving(memory: Any) -> None:
    """Of three slabs with a piece each and a full one, one is emptied into another."""
    pieces = [piece(memory.SLAB // 4, memory) for _ in range(16)]
    pieces[:12] = pieces[:12:4]
    assert memory.totals() == (4 * memory.SLAB, 7 * memory.SLAB // 4)
    for first, end in memory.sparse():
        for i, left in enumerate(pieces):
            if first <= left.ctypes.data < end:
                pieces[i] = piece(memory.SLAB // 4, memory)
                assert not first <= pieces[i].ctypes.data < end, "cut from a slab that leaves"
        del left
    assert memory.totals() == (3 * memory.SLAB, 7 * memory.SLAB // 4)


def small_slabs_for(modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_slabs(modules["sgmv.memory"], monkeypatch)
    monkeypatch.setattr(modules["sgmv.memory"], "SLAB", 1 << 13)


@pytest.mark.parametrize("seed", range(8))
def test_memory_follows_what_is_loaded(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_slabs_for(sys.modules, monkeypatch)
    check_follows(sys.modules, random_operations(seed))


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2), st.integers(0, 20), st.none() | st.sampled_from(RANKS)
        ),
        max_size=200,
    )
)  # fmt: skip
def test_memory_follows_any_order(operations: Operations) -> None:
    with pytest.MonkeyPatch.context() as patch:
        small_slabs_for(sys.modules, patch)
        check_follows(sys.modules, operations)


def test_a_slab_that_leaves_is_not_filled() -> None:
    check_leaving(memory)


@pytest.mark.oracle
@pytest.mark.parametrize("name", UNBOUNDED)
def test_a_fault_in_moving_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(modules: dict[str, ModuleType]) -> None:
        small_slabs_for(modules, monkeypatch)
        check_leaving(modules["sgmv.memory"])
        for seed in range(8):
            check_follows(modules, random_operations(seed))

    assert verdict(check, UNBOUNDED[name], name="sgmv.stack") != "nothing"


def crowd(layers: int = 3) -> list[sgmv.AdapterStack]:
    """Layers whose small adapters stand among large ones that are to go, in small slabs."""
    stacks = [sgmv.AdapterStack(H, H, slots=40, max_rank=16) for _ in range(layers)]
    for i in range(40):
        r = 16 if i % 4 else 1
        for stack in stacks:
            stack.load(i, (np.full((r, H), i + 1, "f"), np.ones((H, r), "f")))
    return stacks


def leave(stack: sgmv.AdapterStack) -> None:
    for i in range(40):
        if i % 4:
            stack.unload(i)


def test_a_call_in_flight_keeps_weights_that_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SLAB", 1 << 13)
    first, *others = crowd()
    table = first.table
    for stack in others:
        leave(stack)
    leave(first)
    before, now = (each.wa_address[::4] for each in (table, first.table))
    assert (before[:10] != now[:10]).any(), "nothing was moved"
    for i in range(0, 40, 4):
        old, new = table.weights[i], first.table.weights[i]
        assert old is not None
        assert new is not None
        assert (old.wa == i + 1).all()
        assert (new.wa == i + 1).all()
        assert not new.wa.flags.writeable


def test_weights_stay_where_there_is_no_room_to_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SLAB", 1 << 13)
    stacks = crowd()
    with monkeypatch.context() as patch:

        def full(_: object) -> None:
            raise MemoryError

        patch.setattr(table.Stored, "moved", full)
        for stack in stacks:
            leave(stack)
    held = memory.totals()
    assert held.slabs > 1.5 * held.pieces + memory.SLAB
    stacks[0].unload(0)
    held = memory.totals()
    assert held.slabs <= 1.5 * held.pieces + memory.SLAB


def test_threads_load_and_call_while_weights_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread has a layer of its own, whose weights the others move."""
    monkeypatch.setattr(memory, "SLAB", 1 << 13)
    moved: list[int] = []
    move = table.Stored.moved

    def slowly(old: table.Stored) -> table.Stored:
        moved.append(1)
        time.sleep(1e-4)  # the others go on, with what they may
        return move(old)

    monkeypatch.setattr(table.Stored, "moved", slowly)

    def work(seed: int) -> None:
        rng, (stack,) = np.random.default_rng(seed), crowd(1)
        model = {i: (i + 1) * H * (16 if i % 4 else 1) for i in range(40)}
        x = np.ones((1, H), "f")
        for step in range(200 if JITTED else 40):
            if len(model) > 20 * (1 + step // 20 % 2) - 1:
                model.pop(i := int(rng.choice(list(model))))
                stack.unload(i)
            else:
                i, r = int(rng.integers(40)), int(rng.choice([1, 2, 16]))
                stack.load(i, (np.full((r, H), step + 1, "f"), np.ones((H, r), "f")))
                model[i] = (step + 1) * H * r
            i = int(rng.choice(list(model)))
            y = sgmv.add_lora(np.zeros((1, H), "f"), x, stack, np.array([i]))
            assert (y == model[i]).all()
        for i, value in model.items():
            y = sgmv.add_lora(np.zeros((1, H), "f"), x, stack, np.array([i]))
            assert (y == value).all()

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(4))) == [None] * 4
    assert moved


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc here")
def test_the_system_gets_its_memory_back() -> None:
    """Adapters of ranks 4 and 64 loaded in turn, those of rank 64 unloaded."""
    program = """if True:
        import numpy as np, sgmv
        from tests.stress.memory import resident

        H, layers, each = 2048, 20, 12
        adapters = [sgmv.Adapter(np.ones((r, H), "f"), np.ones((H, r), "f")) for r in (4, 64)]
        stacks = [sgmv.AdapterStack(H, H, slots=2 * each) for _ in range(layers)]
        before = resident()
        for i in range(2 * each):
            for stack in stacks:
                stack.load(i, adapters[i % 2])
        most = resident() - before
        for i in range(1, 2 * each, 2):
            for stack in stacks:
                stack.unload(i)
        left = layers * each * 2 * 4 * H * 4
        print(most, resident() - before, left)
    """
    most, now, left = map(int, run_python(program).stdout.split())
    assert most > 16 * left
    assert left <= now <= 1.5 * left + (32 << 20)


def test_an_array_has_its_shape_and_type() -> None:
    for shape in ((3, 5), (0, 4), (7,), (0,)):
        array = memory.aligned(shape, np.dtype("float64"))
        assert (array.shape, array.dtype, array.flags.writeable) == (shape, np.float64, True)
        assert array.flags.c_contiguous


def test_what_was_freed_is_used_again() -> None:
    first, second = piece(1000), piece(1000)
    address = first.ctypes.data
    del first
    assert piece(1000).ctypes.data == address
    assert piece(1001).ctypes.data == address
    assert second.ctypes.data - address == 1024


def test_more_than_a_slab_has_one_of_its_own() -> None:
    few = piece(100)
    large = piece(3 * memory.SLAB)
    large[:] = 1
    assert len(memory._slabs) == 2
    assert memory.totals() == (4 * memory.SLAB, 3 * memory.SLAB + 128)
    assert few.size == 100
    del large
    assert len(memory._slabs) == 1
    quarters = [piece(memory.SLAB // 4) for _ in range(3)]
    assert len(memory._slabs) == 1
    more = piece(memory.SLAB // 3 + 64)  # nor does more than a third of one share a new one
    assert memory.totals().slabs == memory.SLAB + -(-more.size // 64) * 64
    assert len(quarters) == 3


def test_the_latest_slab_stays_for_the_next_call() -> None:
    piece(100)
    (kept,) = memory._slabs.values()
    piece(100)
    assert list(memory._slabs.values()) == [kept]


def test_threads_get_pieces_apart() -> None:
    def work(value: int) -> None:
        for size in range(1, 300):
            array = piece(size)
            array[:] = value
            assert (array == value).all(), f"{value}, {size}"

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(work, range(6))) == [None] * 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_lock_of_its_own() -> None:
    with memory._cutting:
        assert outcome(lambda: piece(10)) == "nothing"


@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(),
    reason="this system has no transparent huge pages",
)
def test_weights_ask_for_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("NUMPY_MADVISE_HUGEPAGE") == "0":
        pytest.skip("switched off in numpy")
    monkeypatch.setattr(memory, "SLAB", 32 << 20)
    array = piece(1000)
    middle = array.ctypes.data + memory.SLAB // 2
    mapped = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            mapped = start <= middle < end
        elif mapped and head == "VmFlags:":
            assert "hg" in line.split()
            return
    pytest.fail("no mapping holds the slab")


@pytest.mark.oracle
@pytest.mark.parametrize("name", lives.NAMES)
def test_steps_leave_nothing(name: str) -> None:
    """A call's caches, once full, take no more: for a step less than an entry and its object."""
    step = lives.steps()[name]()
    full = products.STACKS_KNOWN + 100 if name in CACHING else 500
    tracemalloc.start()
    try:
        for number in range(full):
            step(number)
        points = list(lives.grow(lambda i: step(full + i), 1500, traced))
    finally:
        tracemalloc.stop()
    slopes = np.diff([size for _, size in points]) / np.diff([number for number, _ in points])
    assert np.median(slopes) < lives.ENTRY, slopes  # a dict grows at once, and once


def traced() -> int:
    return tracemalloc.get_traced_memory()[0]


UNBOUNDED_CACHES = {"cache", "functools.cache", "lru_cache(None)", "lru_cache(maxsize=None)"}
CONTAINER = r"\[\]|\{\}|(\w+\.)?(set|dict|list|deque|defaultdict|Weak\w+)\(.*\)"
KEPT = {  # what lasts as long as the process, and why it cannot grow
    "sgmv.backend._expand": "mixes of four float types",
    "sgmv.backend._kernels": "mixes of four float types",
    "sgmv.backend._shrink": "mixes of four float types",
    "sgmv.compat.operator._owners": "of layers and wrappers that are alive",
    "sgmv.compat.peft_weights.is_float": "torch's types",
    "sgmv.compat.punica.pointers._owned": "of arrays that are alive",
    "sgmv.dtypes.bits_of": "four float types",
    "sgmv.kernels.disk._logged": "kinds of problem, which the code names",
    "sgmv.kernels.jit._entries": "compiled functions, of mixes of float types",
    "sgmv.workspace._idle": "as many as calls have run at once, each of the size of a call",
    "sgmv.memory._slabs": "of slabs that are alive",
    "sgmv.compat.peft_batches._all": "of models that are accelerated",
    "sgmv.serving.slots._all": "of slots that are alive",
    "sgmv.stack._stacks": "of stacks that are alive",
    "sgmv.warm_up._warm": "mixes of four float types",
}


def test_whatever_lasts_is_known_not_to_grow() -> None:
    """Containers of modules, and caches without a bound, by name; a new one is to be thought of."""
    found = set()
    for path in sorted((ROOT / "sgmv").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                decorators = {ast.unparse(each) for each in node.decorator_list}
                if node.args.args and UNBOUNDED_CACHES & decorators:
                    found.add(f"{name}.{node.name}")
            elif re.fullmatch(CONTAINER, ast.unparse(getattr(node, "value", None) or node)):
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                found.add(f"{name}.{ast.unparse(target)}")
    assert found == set(KEPT)
