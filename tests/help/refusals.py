"""Every refusal of the core: the call, the error's class, and the key parts of its message."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sgmv
import sgmv.experts
from sgmv import cache, errors
from sgmv.kernels.disk import SUFFIX
from sgmv.popularity import popularity

F = np.float32
A, B = np.ones((2, 3), F), np.ones((4, 2), F)
X, W, Y = np.ones((5, 3), F), np.ones((4, 3), F), np.ones((5, 4), F)
IDS = [0, -1, 0, 7, 0]
SEGMENTS = sgmv.segment(IDS)


def stack(**shape: Any) -> sgmv.AdapterStack:
    made = sgmv.AdapterStack(3, 4, **{"slots": 2, "max_rank": 2, **shape})
    for adapter_id in (0, 7):
        made.load(adapter_id, (A, B))
    return made


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def add(y: Any = Y, x: Any = X, ids: Any = IDS, to: Any = None) -> Any:
    return lambda: sgmv.add_lora(y, x, stack() if to is None else to, ids)


def empty_a_folder_of_someone_else() -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError("Permission denied")

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"kernel{SUFFIX}").touch()
        patch.setattr(cache, "folder", lambda: Path(folder))
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Path, "unlink", refuse)
            cache.clear()


def experts(count: int) -> Any:
    return sgmv.experts.ExpertAdapter(np.ones((count, 2, 3), F), np.ones((count, 4, 2), F))


class Short:
    """A weight that returns too few rows."""

    shape = 4, 3

    def __getitem__(self, rows: slice) -> np.ndarray:
        return W[:2]


DORA = sgmv.Adapter(A, B, 1.0, np.ones(4, F))


def gained() -> sgmv.AdapterStack:
    return sgmv.AdapterStack.from_adapters({0: DORA, 7: (A, B)}, W=W)


SHARED = np.ones((5, 7), F)
ALIASED = np.lib.stride_tricks.as_strided(np.ones(30, F), (5, 4), (4, 8))
BROADCAST = np.lib.stride_tricks.as_strided(np.ones(4, F), (5, 4), (0, 4))

# call, class, key parts of the message in their order: argument, expected, received, remedy
REFUSALS: dict[str, tuple[Callable[[], Any], type[errors.SgmvError], list[str]]] = {
    # embeddings
    "a token too few": (
        lambda: sgmv.add_lora_embedding(Y, [0, 1, 2, 0], stack(), IDS),
        errors.ShapeError,
        ["tokens: ", "(n,) = (5,)", "(4,)", "one per adapter id"],
    ),
    "a token outside the vocabulary": (
        lambda: sgmv.add_lora_embedding(Y, [0, 9, 3, 0, 0], stack(), IDS),
        errors.ValueRangeError,
        ["tokens: ", "from 0 to 2", "3", "this embedding"],
    ),
    # mixtures
    "rows of no id": (
        add(ids=np.zeros((5, 0), int)),
        errors.ShapeError,
        ["adapter_ids: ", "k of 1 or more", "(5, 0)", "one id per row"],
    ),
    "weights of another shape": (
        lambda: sgmv.add_lora(Y, X, stack(), [[0, 7]] * 5, weights=np.ones((5, 3))),
        errors.ShapeError,
        ["weights: ", "(n, k) = (5, 2)", "(5, 3)", "each adapter id"],
    ),
    "one weight per row for two ids": (
        lambda: sgmv.add_lora(Y, X, stack(), [[0, 7]] * 5, weights=np.ones(5)),
        errors.ShapeError,
        ["weights: ", "(n, k) = (5, 2)", "(5,)"],
    ),
    "weights of unequal lengths": (
        lambda: sgmv.add_lora(Y, X, stack(), [[0, 7]] * 5, weights=[[1.0], [1.0, 2.0]]),
        errors.DtypeError,
        ["weights: ", "real numbers", "object", ".astype"],
    ),
    "weights of text": (
        lambda: sgmv.add_lora(Y, X, stack(), IDS, weights=["1"] * 5),
        errors.DtypeError,
        ["weights: ", "real numbers", "<U1", ".astype"],
    ),
    "a weight of NaN": (
        lambda: sgmv.add_lora(Y, X, stack(), IDS, weights=[1, 1, np.nan, 1, 1]),
        errors.ValueRangeError,
        ["weights: ", "finite", "nan", "-1"],
    ),
    "a weight beyond float32": (
        lambda: sgmv.expand(np.ones((5, 2), F), stack(), SEGMENTS, Y, weights=[1e39] * 5),
        errors.ValueRangeError,
        ["weights: ", "float32", "1e+39", "-1"],
    ),
    "an unknown adapter in a mixture": (
        add(ids=[[0, 7], [0, 3], [0, 0], [-1, 7], [0, 7]]),
        errors.UnknownAdapterError,
        ["adapter_ids: ", "3"],
    ),
    "pairs that name a row twice in a segment": (
        lambda: sgmv.Segments([0, 0], [0, 2], [4], [0, 1]),
        errors.ValueRangeError,
        ["rows: ", "once at most in a segment", "0, 0", "further segment"],
    ),
    "pairs of other rows": (
        lambda: sgmv.Segments([0, 0, 1, 1], [0, 2, 4], [4, 5], [0, 2, 1, 3]),
        errors.ValueRangeError,
        ["pairs: ", "rows = pairs // 2", "0, 2, 1, 3", "segment(adapter_ids)"],
    ),
    # add_lora's arrays
    "y is no array": (
        add(y=Y.tolist()),
        errors.DtypeError,
        ["y: ", "two-dimensional numpy array", "list", "np.asarray"],
    ),
    "y of integers": (
        add(y=Y.astype(int)),
        errors.DtypeError,
        ["y: ", "float32, float16", "int64", ".astype"],
    ),
    "y big-endian": (
        add(y=Y.astype(">f4")),
        errors.DtypeError,
        ["y: ", "native", ">f4", ".astype"],
    ),
    "y one-dimensional": (
        add(y=Y[0]),
        errors.ShapeError,
        ["y: ", "two dimensions", "(4,)", "reshape"],
    ),
    "y too narrow": (
        add(y=Y[:, :3].copy()),
        errors.ShapeError,
        ["y: ", "(5, 4)", "(5, 3)", "h_out"],
    ),
    "y too short": (add(y=Y[:4].copy()), errors.ShapeError, ["y: ", "(5, 4)", "(4, 4)", "one row"]),
    "y read-only": (
        add(y=read_only(Y)),
        errors.MemoryLayoutError,
        ["y: ", "writable", "read-only", "y.copy()"],
    ),
    "y overlaps itself": (
        add(y=ALIASED),
        errors.MemoryLayoutError,
        ["y: ", "own memory", "strides (4, 8)", "y.copy()"],
    ),
    "y broadcast": (
        add(y=BROADCAST),
        errors.MemoryLayoutError,
        ["y: ", "own memory", "strides (0, 4)", "y.copy()"],
    ),
    "y overlaps x": (
        add(y=SHARED[:, 2:6], x=SHARED[:, :3]),
        errors.MemoryLayoutError,
        ["y: ", "apart from x", "overlap", "x.copy()"],
    ),
    "a cache that cannot be emptied": (
        empty_a_folder_of_someone_else,
        errors.SgmvError,
        ["--clear: ", "can be written", "Permission denied", "by hand"],
    ),
    "more threads than any machine has": (
        lambda: sgmv.set_num_threads(2**31),
        errors.ValueRangeError,
        ["n: ", "at most 1024", str(2**31), "cores"],
    ),
    "two types to warm up for": (
        lambda: sgmv.warm_up([("float32", "float32")]),
        errors.ShapeError,
        ["dtypes[0]: ", "three", "('float32', 'float32')", "name one, or all three"],
    ),
    "x of integers": (
        add(x=X.astype(np.int32)),
        errors.DtypeError,
        ["x: ", "float32", "int32", ".astype"],
    ),
    "x complex": (
        add(x=X.astype(complex)),
        errors.DtypeError,
        ["x: ", "float32", "complex128", ".astype"],
    ),
    "x too wide": (
        add(x=np.ones((5, 9), F)),
        errors.ShapeError,
        ["x: ", "(5, 3)", "(5, 9)", "h_in"],
    ),
    "x with another n": (
        add(x=X[:2]),
        errors.ShapeError,
        ["x: ", "(5, 3)", "(2, 3)", "one row per adapter id"],
    ),
    "x three-dimensional": (
        add(x=X[None]),
        errors.ShapeError,
        ["x: ", "two dimensions", "(1, 5, 3)", "reshape"],
    ),
    "x masked": (
        add(x=np.ma.masked_array(X)),
        errors.DtypeError,
        ["x: ", "plain", "MaskedArray", "np.asarray"],
    ),
    # ids
    "ids unknown, all listed": (
        add(ids=[3, 0, 2, -1, 9]),
        errors.UnknownAdapterError,
        ["adapter_ids: ", "[0, 7]", "[2, 3, 9]", "load"],
    ),
    "ids below -1": (
        add(ids=[0, -2, -9, 0, 0]),
        errors.ValueRangeError,
        ["adapter_ids: ", ">= 0", "[-9, -2]", "-1"],
    ),
    "ids of floats": (
        add(ids=[0.0] * 5),
        errors.DtypeError,
        ["adapter_ids: ", "integers", "float64", "astype"],
    ),
    "ids of bools": (
        add(ids=[True] * 5),
        errors.DtypeError,
        ["adapter_ids: ", "integers", "bool", "astype"],
    ),
    "ids two-dimensional": (
        add(ids=np.zeros((2, 1, 1), int)),
        errors.ShapeError,
        ["adapter_ids: ", "(n,) or (n, k)", "(2, 1, 1)", "per row"],
    ),
    "ids beyond int64": (
        add(ids=np.array([2**63] * 5, np.uint64)),
        errors.ValueRangeError,
        ["adapter_ids: ", "2**63", str(2**63), "smaller"],
    ),
    "too few ids": (
        add(ids=[0]),
        errors.ShapeError,
        ["x: ", "(1, 3)", "(5, 3)", "one row per adapter id"],
    ),
    "ids beyond uint64": (
        add(ids=[2**64] * 5),
        errors.ValueRangeError,
        ["adapter_ids: ", "2**63", str(2**64), "smaller"],
    ),
    "ids below int64": (
        add(ids=[-(2**64)] * 5),
        errors.ValueRangeError,
        ["adapter_ids: ", "from -2**63", str(-(2**64)), "-1"],
    ),
    "ids of strings": (
        add(ids=np.array(["a"] * 5, object)),
        errors.DtypeError,
        ["adapter_ids: ", "integers", "<U1", "astype"],
    ),
    "ids of unequal lengths": (
        add(ids=[[0], [0, 1]]),
        errors.ShapeError,
        ["adapter_ids: ", "one dimension", "unequal lengths", "per row"],
    ),
    "lists among the ids of a row": (
        add(ids=[[0, []], [0, 1]]),
        errors.ShapeError,
        ["adapter_ids: ", "an integer at each place", "lists", "per row"],
    ),
    "a list of lists of lists as ids": (
        add(ids=[[[0, 1]], [[0, 1]]]),
        errors.ShapeError,
        ["adapter_ids: ", "an integer at each place", "lists"],
    ),
    "ids of one number": (
        add(ids=3),
        errors.ShapeError,
        ["adapter_ids: ", "one dimension", "shape ()", "per row"],
    ),
    # stack and segments
    "no stack": (
        add(to={0: (A, B)}),
        errors.DtypeError,
        ["stack: ", "AdapterStack", "dict", "from_adapters"],
    ),
    "shrink without segments": (
        lambda: sgmv.shrink(X, stack(), IDS),
        errors.DtypeError,
        ["segments: ", "Segments", "list", "segment(adapter_ids)"],
    ),
    # expand's v
    "v of halves": (
        lambda: sgmv.expand(np.ones((5, 2), np.float16), stack(), SEGMENTS, Y),
        errors.DtypeError,
        ["v: ", "float32 or float64", "float16", "shrink"],
    ),
    "v too narrow": (
        lambda: sgmv.expand(np.ones((5, 1), F), stack(), SEGMENTS, Y),
        errors.ShapeError,
        ["v: ", "(5, >= 2)", "(5, 1)", "shrink"],
    ),
    "v with another n": (
        lambda: sgmv.expand(np.ones((4, 2), F), stack(), SEGMENTS, Y),
        errors.ShapeError,
        ["v: ", "(5, >= 2)", "(4, 2)", "shrink"],
    ),
    "y overlaps v": (
        lambda: sgmv.expand(SHARED[:, :2], stack(), SEGMENTS, SHARED[:, 1:5]),
        errors.MemoryLayoutError,
        ["y: ", "apart from v", "overlap", "v.copy()"],
    ),
    # Adapter
    "A and B of unequal rank": (
        lambda: sgmv.Adapter(A, np.ones((4, 3), F)),
        errors.ShapeError,
        ["B: ", "(h_out, 2)", "(4, 3)", "(r, h_in)"],
    ),
    "A one-dimensional": (
        lambda: sgmv.Adapter(A[0], B),
        errors.ShapeError,
        ["A: ", "two dimensions", "(3,)", "reshape"],
    ),
    "B no array": (
        lambda: sgmv.Adapter(A, None),
        errors.DtypeError,
        ["B: ", "numpy array", "NoneType", "np.asarray"],
    ),
    "scaling NaN": (
        lambda: sgmv.Adapter(A, B, float("nan")),
        errors.ValueRangeError,
        ["scaling: ", "finite", "nan", "lora_alpha"],
    ),
    "scaling beyond float32": (
        lambda: sgmv.Adapter(A, B, 1e39),
        errors.ValueRangeError,
        ["scaling: ", "float32", "1e+39", "lora_alpha"],
    ),
    "scaling no number": (
        lambda: sgmv.Adapter(A, B, "2"),
        errors.DtypeError,
        ["scaling: ", "real number", "str", "1.0"],
    ),
    "scaling beyond every float": (
        lambda: sgmv.Adapter(A, B, 10**400),
        errors.ValueRangeError,
        ["scaling: ", "float32", "inf", "lora_alpha"],
    ),
    # AdapterStack
    "h_in of 0": (
        lambda: sgmv.AdapterStack(0, 4),
        errors.ValueRangeError,
        ["h_in: ", "at least 1", "0", "larger"],
    ),
    "slots of a float": (
        lambda: sgmv.AdapterStack(3, 4, slots=2.0),
        errors.DtypeError,
        ["slots: ", "integer", "float", "whole"],
    ),
    "stack of integers": (
        lambda: sgmv.AdapterStack(3, 4, dtype="int8"),
        errors.DtypeError,
        ["dtype: ", "float32", "int8", "astype"],
    ),
    "stack of nonsense": (
        lambda: sgmv.AdapterStack(3, 4, dtype="wide"),
        errors.DtypeError,
        ["dtype: ", "float32", "'wide'", "astype"],
    ),
    "slots beyond all memory": (
        lambda: sgmv.AdapterStack(3, 4, slots=2**62),
        errors.ValueRangeError,
        ["slots: ", "there is memory", str(2**62), "smaller"],
    ),
    "slots beyond int64": (
        lambda: sgmv.AdapterStack(3, 4, slots=2**63),
        errors.ValueRangeError,
        ["slots: ", "less than 2**63", str(2**63), "smaller"],
    ),
    "no adapter to fit": (
        lambda: stack().fitted((A, B)),
        errors.DtypeError,
        ["adapter: ", "an Adapter", "tuple", "wrap"],
    ),
    "a pair that does not fit, among several": (
        lambda: sgmv.AdapterStack.from_adapters({5: (A, None)}),
        errors.DtypeError,
        ["adapters[5], B: ", "numpy array", "NoneType", "np.asarray"],
    ),
    "no adapters, no widths": (
        lambda: sgmv.AdapterStack.from_adapters({3: None}),
        errors.ShapeError,
        ["adapters: ", "at least one", "1 ids without", "h_in and h_out"],
    ),
    "adapters no mapping": (
        lambda: sgmv.AdapterStack.from_adapters(7),
        errors.DtypeError,
        ["adapters: ", "mapping", "int", "dict"],
    ),
    "an adapter that is none": (
        lambda: sgmv.AdapterStack.from_adapters({5: "adapter"}),
        errors.DtypeError,
        ["adapters[5]: ", "Adapter", "str", "wrap"],
    ),
    "adapters of unequal widths": (
        lambda: sgmv.AdapterStack.from_adapters([(A, B), (np.ones((1, 9), F), np.ones((4, 1), F))]),
        errors.ShapeError,
        ["adapter: ", "h_in = 3", "h_in = 9", "this layer"],
    ),
    "rank above max_rank": (
        lambda: stack().load(0, (np.ones((3, 3), F), np.ones((4, 3), F))),
        errors.StackError,
        ["adapter: ", "max_rank = 2", "got 3", "larger max_rank"],
    ),
    "no free slot": (
        lambda: stack().load(1, (A, B)),
        errors.StackError,
        ["adapter: ", "free slot among 2", "none", "unload"],
    ),
    "a negative id": (
        lambda: stack().load(-1, (A, B)),
        errors.ValueRangeError,
        ["adapter_id: ", "from 0", "-1", "base only"],
    ),
    "an id of a string": (
        lambda: stack().load("a", (A, B)),
        errors.DtypeError,
        ["adapter_id: ", "integer >= 0", "'a'", "integers"],
    ),
    "unload what is not there": (
        lambda: stack().unload(5),
        errors.UnknownAdapterError,
        ["adapter_id: ", "[0, 7]", "5", "load"],
    ),
    "get what is not there": (
        lambda: stack()[5],
        errors.UnknownAdapterError,
        ["adapter_id: ", "[0, 7]", "5", "load"],
    ),
    "weights beyond float16": (
        lambda: sgmv.AdapterStack.from_adapters([(1e6 * A, B)], dtype="float16"),
        errors.ValueRangeError,
        ["adapter: ", "float16 can hold", "1000000.0", "wider dtype"],
    ),
    # apply_batched
    "W no matrix": (
        lambda: sgmv.apply_batched(X, W[0], [], [-1] * 5),
        errors.ShapeError,
        ["W: ", "two dimensions", "(3,)", "reshape"],
    ),
    "W of another width": (
        lambda: sgmv.apply_batched(X, np.ones((4, 9), F), [], [-1] * 5),
        errors.ShapeError,
        ["W: ", "(h_out, 3)", "(4, 9)", "(h_out, h_in)"],
    ),
    "adapters of another layer": (
        lambda: sgmv.apply_batched(X, np.ones((6, 3), F), stack(), IDS),
        errors.ShapeError,
        ["adapters: ", "h_out = 6", "h_out = 4", "this layer"],
    ),
    "scalings beside a stack": (
        lambda: sgmv.apply_batched(X, W, stack(), IDS, 2.0),
        errors.DtypeError,
        ["scalings: ", "none", "float", "when loading"],
    ),
    "an id without adapter": (
        lambda: sgmv.apply_batched(X, W, {0: (A, B)}, IDS),
        errors.UnknownAdapterError,
        ["adapter_ids: ", "[0]", "7", "add them"],
    ),
    "an id beyond the sequence": (
        lambda: sgmv.apply_batched(X, W, [(A, B)], IDS),
        errors.UnknownAdapterError,
        ["adapter_ids: ", "[0]", "7", "add them"],
    ),
    "an id without scaling": (
        lambda: sgmv.apply_batched(X, W, {0: (A, B), 7: (A, B)}, IDS, {0: 1.0}),
        errors.UnknownAdapterError,
        ["scalings: ", "every adapter", "adapter 7", "leave scalings out"],
    ),
    "a scaling that is none": (
        lambda: sgmv.apply_batched(X, W, {0: (A, B), 7: (A, B)}, IDS, {0: 1.0, 7: float("inf")}),
        errors.ValueRangeError,
        ["scalings[7]: ", "finite", "inf", "lora_alpha"],
    ),
    "scalings of a string": (
        lambda: sgmv.apply_batched(X, W, [(A, B)], [0] * 5, object()),
        errors.DtypeError,
        ["scalings: ", "real number", "object", "lora_alpha"],
    ),
    # Segments by hand
    "offsets that end early": (
        lambda: sgmv.Segments([0, 1], [0, 1], [3]),
        errors.ValueRangeError,
        ["seq_start: ", "from 0 to n = 2", "[0, 1]", "running sum"],
    ),
    "offsets that descend": (
        lambda: sgmv.Segments([0, 1], [0, 2, 1, 2], [3, 4, 5]),
        errors.ValueRangeError,
        ["seq_start: ", "ascending", "[0, 2, 1, 2]", "running sum"],
    ),
    "one offset short": (
        lambda: sgmv.Segments([0, 1], [0, 2], [3, 4]),
        errors.ShapeError,
        ["seq_start: ", "3 offsets", "2", "n at the end"],
    ),
    "a row twice": (
        lambda: sgmv.Segments([1, 1], [0, 2], [3]),
        errors.ValueRangeError,
        ["rows: ", "0..1 once", "[1, 1]", "permutation"],
    ),
    "segments out of order": (
        lambda: sgmv.Segments([0, 1], [0, 1, 2], [4, 3]),
        errors.ValueRangeError,
        ["adapter_ids: ", "ascending", "[4, 3]", "merge"],
    ),
    # stats
    "ranks for too few segments": (
        lambda: SEGMENTS.stats(3, 4, [2, 2]),
        errors.ShapeError,
        ["ranks: ", "3 segments", "(2,)", "rank of 0"],
    ),
    "a rank missing": (
        lambda: SEGMENTS.stats(3, 4, {0: 2}),
        errors.UnknownAdapterError,
        ["ranks: ", "every adapter", "[7]", "mapping"],
    ),
    "ranks of floats": (
        lambda: SEGMENTS.stats(3, 4, [2.7, 1.0, 1.0]),
        errors.DtypeError,
        ["ranks: ", "integers", "float64", "astype"],
    ),
    "a negative rank for all": (
        lambda: SEGMENTS.stats(3, 4, -2),
        errors.ValueRangeError,
        ["ranks: ", "at least 0", "-2", "larger"],
    ),
    "a negative rank": (
        lambda: SEGMENTS.stats(3, 4, [0, -2, 1]),
        errors.ValueRangeError,
        ["ranks: ", ">= 0", "-2", "use 0"],
    ),
    # backend; without vectors nothing runs on tiles, and the message says so
    "a backend that is none": (
        lambda: sgmv.add_lora(Y, X, stack(), IDS, backend="cuda"),
        errors.ValueRangeError,
        ["backend: ", "tiles or loops", "'cuda'", "leave it out"],
    ),
    "a backend that is no name": (
        lambda: sgmv.add_lora(Y, X, stack(), IDS, backend=["tiles"]),
        errors.ValueRangeError,
        ["backend: ", "tiles or loops", "['tiles']", "leave it out"],
    ),
    "tiles for float64 x": (
        lambda: sgmv.add_lora(Y, X.astype(float), stack(), IDS, backend="tiles"),
        errors.ValueRangeError,
        ["backend: ", "loops", "tiles", "leave it out"],
    ),
    "tiles for float64 weights": (
        lambda: sgmv.shrink(X, stack(dtype="float64"), SEGMENTS, backend="tiles"),
        errors.ValueRangeError,
        ["backend: ", "loops", "tiles", "leave it out"],
    ),
    "tiles for float64 y": (
        lambda: sgmv.expand(
            np.ones((5, 2), F), stack(), SEGMENTS, Y.astype(float), backend="tiles"
        ),
        errors.ValueRangeError,
        ["backend: ", "loops", "tiles", "leave it out"],
    ),
    # magnitudes
    "magnitudes of another width": (
        lambda: sgmv.Adapter(A, B, 1.0, np.ones(3, F)),
        errors.ShapeError,
        ["magnitude: ", "(h_out,) = (4,)", "(3,)", "per row of B"],
    ),
    "magnitudes that are no array": (
        lambda: sgmv.Adapter(A, B, 1.0, [1.0] * 4),  # type: ignore[arg-type]
        errors.DtypeError,
        ["magnitude: ", "numpy array", "list", "np.asarray"],
    ),
    "magnitudes without W": (
        lambda: stack().load(7, DORA),
        errors.StackError,
        ["W: ", "(4, 3)", "DoRA", "none", "W=W"],
    ),
    "another layer's W": (
        lambda: stack().load(7, DORA, W=W.T),
        errors.ShapeError,
        ["W: ", "(h_out, h_in) = (4, 3)", "(3, 4)", "the layer's W"],
    ),
    "a W of fewer rows than it says": (
        lambda: stack().load(7, DORA, W=Short()),
        errors.ShapeError,
        ["W: ", "4 rows of 3 from W[0:4]", "(2, 3)", "return these rows"],
    ),
    "a bias of another width": (
        lambda: stack().load(7, DORA, W=W, bias=np.ones(3, F)),
        errors.ShapeError,
        ["bias: ", "(h_out,) = (4,)", "(3,)"],
    ),
    "magnitudes beside another adapter": (
        lambda: sgmv.add_lora(Y, X, gained(), [[0, 7]] * 5),
        errors.ValueRangeError,
        ["adapter_ids: ", "DoRA", "alone", "rows [0, 1, 2, 3, 4]", "-1 in the other places"],
    ),
    # adapters of experts
    "a factor of one axis": (
        lambda: sgmv.experts.ExpertAdapter(np.ones(3, F), B),
        errors.ShapeError,
        ["A: ", "(experts, rows, columns)", "(3,)", "stack"],
    ),
    "other numbers of experts": (
        lambda: sgmv.experts.ExpertAdapter(np.ones((2, 2, 3), F), np.ones((3, 4, 2), F)),
        errors.ShapeError,
        ["A and B: ", "same number of experts", "(2, 2, 3) and (3, 4, 2)", "share one"],
    ),
    "adapters of other experts joined": (
        lambda: sgmv.experts.ExpertAdapter.joined(experts(2), experts(3)),
        errors.ShapeError,
        ["second: ", "(2, 3)", "(3, 3)", "the same x"],
    ),
    "what is no adapter of experts joined": (
        lambda: sgmv.experts.ExpertAdapter.joined(experts(2), (A, B)),
        errors.DtypeError,
        ["second: ", "ExpertAdapter", "tuple"],
    ),
    # threads
    "threads below 1": (
        lambda: sgmv.set_num_threads(0),
        errors.ValueRangeError,
        ["n: ", "at least 1", "0", "larger"],
    ),
    "threads of a float": (
        lambda: sgmv.set_num_threads(2.0),
        errors.DtypeError,
        ["n: ", "integer", "float", "whole number"],
    ),
    "types to warm up for that are none": (
        lambda: sgmv.warm_up(3),
        errors.DtypeError,
        ["dtypes: ", "float type", "int", "list"],
    ),
    # popularity
    "a popularity that is none": (
        lambda: popularity("zipf", 8),
        errors.ValueRangeError,
        ["kind: ", "distinct", "identical", "'zipf'", "choose"],
    ),
}
