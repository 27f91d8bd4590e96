"""The slices of a layer, of equal and unequal widths; and planted faults."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from sgmv import errors, products
from sgmv.compat import vllm
from tests.help.compat_forms import check, delta, drawn, indices, product
from tests.help.planting import Fault, verdict
from tests.help.vllm_calls import LORAS, MIXES, check_expand, check_shrink, named, wrapper_of

pytestmark = pytest.mark.usefixtures("one_blas_thread")

SLICES = {"qkv": (128, 33, 33), "gate, up": (70, 70), "one": (65,)}


@pytest.mark.parametrize("widths", SLICES.values(), ids=SLICES)
@pytest.mark.parametrize("mix", [MIXES[0], MIXES[2], MIXES[3]], ids=named)
def test_linear_layers_of_slices(rng: np.random.Generator, widths: Any, mix: Any) -> None:
    ids, r = indices(rng, 37, LORAS), 16
    wrapper, x = wrapper_of(ids.tolist()), drawn(rng, (37, 90), mix[0])
    A = tuple(drawn(rng, (LORAS, 1, r, 90), mix[1]) for _ in widths)
    B = tuple(drawn(rng, (LORAS, 1, width, r), mix[1]) for width in widths)
    y = drawn(rng, (37, sum(widths) + 1), mix[2])
    out, offset = y.copy(), 0
    buffer = np.full((len(widths), 37, r), np.nan, np.float32)
    wrapper.add_lora_linear(out, x, A, B, 0.25, widths, buffer=buffer)
    for i, width in enumerate(widths):
        columns = slice(offset, offset + width)
        right = delta(y[:, columns], x, A[i][:, 0], B[i][:, 0], ids, 0.25)
        check(out[:, columns], right, f"slice {i}")
        zeros = np.zeros((37, r), np.float32)
        check(buffer[i], product(zeros, x, A[i][:, 0], ids, 0.25), f"buffer {i}")
        offset += width
    assert out[:, offset:].tobytes() == y[:, offset:].tobytes()
    without = y.copy()
    wrapper.add_lora_linear(without, x, A, B, 0.25, widths)
    assert without.tobytes() == out.tobytes()


def test_shrink_and_expand_of_slices_are_those_of_each(rng: np.random.Generator) -> None:
    ids, widths = indices(rng, 30, LORAS), (33, 64, 1)
    wrapper, x = wrapper_of(ids.tolist()), drawn(rng, (2, 15, 70), "f")
    A = [drawn(rng, (LORAS, 1, 8, 70), "f") for _ in widths]
    B = [drawn(rng, (LORAS, 1, width, 8), "f") for width in widths]
    together, apart = np.empty((3, 30, 8), "f"), np.empty((3, 30, 8), "f")
    wrapper.add_shrink(together, x, A, 0.5)
    for i in range(3):
        vllm.bgmv_shrink(x.reshape(30, 70), A[i], apart[i], ids, 0.5)
    assert together.tobytes() == apart.tobytes()
    for add_inputs in (True, False):
        y = drawn(rng, (2, 15, 100), "f")
        expected = y.copy().reshape(30, 100)
        wrapper.add_expand(y, together, B, widths, 2, add_inputs)
        for i, offset in enumerate((2, 35, 99)):
            slices = offset, widths[i], add_inputs
            vllm.bgmv_expand_slice(apart[i], B[i], expected, ids, *slices)
        assert y.tobytes() == expected.tobytes()


def test_several_slices_are_one_shrink(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that x is read once."""
    launches: list[str] = []

    def counted(name: str) -> Callable[..., None]:
        run = getattr(products, name)

        def counting(*operands: Any) -> None:
            launches.append(name)
            run(*operands)

        return counting

    for name in ("run_shrink", "run_expand"):
        monkeypatch.setattr(products, name, counted(name))
    A, x = drawn(rng, (LORAS, 1, 4, 9), "f"), drawn(rng, (3, 9), "f")
    B, y = drawn(rng, (LORAS, 1, 7, 4), "f"), np.zeros((3, 21), "f")
    wrapper_of([0, 1, 2]).add_lora_linear(y, x, (A, A, A), (B, B, B), 1.0, (7, 7, 7))
    assert launches == ["run_shrink"] + ["run_expand"] * 3


def test_a_slice_that_does_not_fit_is_refused_before_the_others(rng: np.random.Generator) -> None:
    A, B = drawn(rng, (LORAS, 1, 4, 9), "f"), drawn(rng, (LORAS, 1, 6, 4), "f")
    y, x = drawn(rng, (2, 12), "f"), drawn(rng, (2, 9), "f")
    before, wrapper = y.copy(), wrapper_of([0, 4])
    for slices in ((B, B[:, :, 1:]), (B, B[:4]), (B, B[..., 1:])):
        for act in (
            lambda: wrapper.add_lora_linear(y, x, (A, A), slices, 1.0, (6, 6)),  # noqa: B023
            lambda: wrapper.add_expand(y, (x[:, :4],) * 2, slices, (6, 6), add_inputs=False),  # noqa: B023
        ):
            with pytest.raises(errors.SgmvError):
                act()
            assert y.tobytes() == before.tobytes()


FAULTS = {
    "base-only rows are written": Fault(
        "products", "return int(segments.seq_start[1]) if base else 0", "return 0"
    ),
    "v stays in sorted order": Fault(
        "compat.vllm.slices", "array[segments.rows] = v", "array[:] = v"
    ),
    "inputs are taken as they stand": Fault(
        "products", "rows[segments.rows].astype", "rows[:].astype"
    ),
    "the scaling is dropped": Fault("products", "v *= scaling", "pass"),
    "the slots are told apart by the wrong pitch": Fault(
        "products", "address + np.arange(count) * pitch", "address + 0 * np.arange(count)"
    ),
    "B is read as its transpose": Fault(
        "products",
        "strides = size, weights.inputs * size",
        "strides = weights.outputs * size, size",
    ),
    "panels are gathered from column 0": Fault(
        "kernels.panels", "gather(panel, wb + c * table.wb_column_stride,", "gather(panel, wb,"
    ),
    "what stood there is added, too": Fault(
        "compat.vllm.slices", "if not add_inputs:", "if add_inputs is None:"
    ),
    "the slice begins at column 0": Fault(
        "compat.vllm.slices", "[y[:, offset : offset + width]", "[y[:, : width]"
    ),
}
SMALL = (
    Fault("kernels.records", "PANEL, WIDE_PANEL = 64, 1024", "PANEL, WIDE_PANEL = 8, 8"),
    Fault("kernels.loops", "K_BLOCK = 1024", "K_BLOCK = 16"),
)


def accept(modules: dict[str, ModuleType]) -> None:
    """The checks of each call on a copy of the package."""
    module = modules["sgmv.compat.vllm"]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        check_shrink(module, rng, (5, 33, 20), MIXES[0])
        check_expand(module, rng, (5, 33, 20), MIXES[0])


@pytest.mark.once
def test_accepted_without_a_fault() -> None:
    assert verdict(accept, *SMALL, name="sgmv.compat.vllm") == "nothing"


@pytest.mark.once
@pytest.mark.parametrize("fault", FAULTS)
def test_rejected(fault: str) -> None:
    assert "AssertionError" in verdict(accept, *SMALL, FAULTS[fault], name="sgmv.compat.vllm")
