"""Kernels compiled, or loaded, before the first request needs them."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from sgmv import workers
from sgmv.adapter import Adapter
from sgmv.checks import check_dtype, check_several
from sgmv.console import progress
from sgmv.dtypes import BITS
from sgmv.errors import ShapeError
from sgmv.expand import expand
from sgmv.extras import load
from sgmv.kernels.disk import logger
from sgmv.kernels.jit import notice
from sgmv.lora import add_lora
from sgmv.segment import segment
from sgmv.shrink import shrink
from sgmv.stack import AdapterStack

BAR = 20  # characters
Dtype = np.dtype[Any]
Mix = tuple[Dtype, Dtype, Dtype]  # of x, weights and y
_warm: set[Mix] = set()


def warm_up(dtypes: Iterable[Any] | npt.DTypeLike = "float32") -> float:
    """Compile what calls of these float types need; returns the seconds that compiling took.

    Semantics: afterwards `shrink`, `expand` and `add_lora` compile nothing for these types. The
    kernels are kept on disk: a later process loads them, in less than a second. A terminal shows a
    bar; logger "sgmv" gets one line at level INFO.

    dtypes  a float type that x, weights and y share; or several of them, where a tuple of three
            is the type of each

    Raises DtypeError for types that sgmv does not have, ShapeError for a tuple of another length,
    before anything is compiled.

    >>> warm_up(["float32", ("float16", "float32", "float16")]) >= 0
    True
    """
    single = isinstance(dtypes, str | type | np.dtype)
    if not single:
        check_several("dtypes", dtypes, "a float type, or several")
    each: Any = [dtypes] if single else dtypes
    found = [_mix(f"dtypes[{i}]", dtype) for i, dtype in enumerate(each)]
    before, expected = notice.seconds, notice.expected
    notice.expected = True
    try:
        steps = [step for mix in found if mix not in _warm for step in _calls(*mix)]
        with progress() as show:
            for number, (name, call) in enumerate(steps):
                done = "#" * (BAR * number // len(steps))
                show(f"sgmv: compiling [{done:.<{BAR}}] {name}")
                call()
    finally:
        notice.expected = expected
    seconds = notice.seconds - before
    if steps:
        names = ", ".join(map(_name, found))
        logger.info("sgmv: kernels for %s are ready; compiling took %.1f s", names, seconds)
    _warm.update(found)
    return seconds


def _mix(argument: str, dtype: Any) -> Mix:
    if not isinstance(dtype, tuple):
        return (check_dtype(argument, dtype),) * 3
    if len(dtype) != 3:
        raise ShapeError(
            argument,
            "a float type, or three: of x, weights and y",
            repr(dtype),
            "name one, or all three",
        )
    x, weights, y = (check_dtype(argument, each) for each in dtype)
    return x, weights, y


def _name(mix: Mix) -> str:
    return mix[0].name if len(set(mix)) == 1 else "/".join(dtype.name for dtype in mix)


def _calls(x: Dtype, weights: Dtype, y: Dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every call, on rows that are close together, apart and read-only: to numba each is a type."""
    stack = AdapterStack.from_adapters([Adapter(*np.ones((2, 2, 2), weights))])
    segments = segment([0, 0])
    name = _name((x, weights, y))
    read_only, ids = np.ones((2, 2), x), np.zeros(2, np.int64)
    read_only.flags.writeable = ids.flags.writeable = False
    inputs = np.ones((2, 2), x), np.ones((2, 4), x)[:, :2], read_only
    outputs = np.ones((2, 2), y), np.ones((2, 4), y)[:, :2]
    for each in inputs:
        yield f"{name}: shrink", partial(shrink, each, stack, segments)
    v = np.ones((2, 2), np.float32)
    for each in outputs:
        yield f"{name}: expand", partial(expand, v, stack, segments, each)
    batches: tuple[Any, ...] = segments, ids
    for rows_in, rows_out, batch in product(inputs, outputs, batches):
        yield f"{name}: add_lora", partial(add_lora, rows_out, rows_in, stack, batch)
    yield "threads", workers.warm_up


def command(parser: ArgumentParser) -> Callable[[Namespace], str]:
    """Of `python -m sgmv`: compiles, and says how long that took."""
    parser.add_argument(
        "--dtypes",
        type=_names,
        default=["float32"],
        metavar="TYPE,...",
        help=f"of x, weights and y: any of {', '.join(BITS)} (default: float32)",
    )
    return _run


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in BITS]:
        raise ArgumentTypeError(
            f"expected any of {', '.join(BITS)}, with commas, got {unknown[0]!r}"
        )
    if "bfloat16" in names:
        try:
            load("ml_dtypes")
        except ImportError:
            raise ArgumentTypeError(
                "expected ml_dtypes, which defines bfloat16, to be installed; pip install ml_dtypes"
            ) from None
    return names


def _run(given: Namespace) -> str:
    seconds = warm_up(given.dtypes)
    return f"kernels for {', '.join(given.dtypes)} are ready; compiling took {seconds:.1f} s"
