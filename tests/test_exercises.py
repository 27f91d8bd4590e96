"""docs/exercises.md: a check for each exercise, held to model answers and to usual mistakes.

SGMV_EXERCISES=my_answers.py python -m pytest tests/test_exercises.py -k check    your answers
"""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import sgmv
from reference.workloads import corpus
from sgmv import emulator, layouts
from tests import exercises_answers, exercises_page, punica_page
from tests.planting import run_python

pytestmark = pytest.mark.once

Answers = Any  # a module, or whatever has its functions


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("answers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def integers(values: Any) -> list[int]:
    return [int(value) for value in values]


def random_lengths(most: int, count: int = 40) -> Iterator[list[int]]:
    rng = np.random.default_rng(1)
    for _ in range(count):
        yield rng.integers(1, most, rng.integers(1, 6)).tolist()


def random_ids(least: int, most: int, count: int = 40) -> Iterator[list[int]]:
    rng = np.random.default_rng(2)
    for _ in range(count):
        yield rng.integers(least, most, rng.integers(1, 30)).tolist()


def ids_of(lengths: list[int]) -> list[int]:
    return np.repeat(np.arange(len(lengths)), lengths).tolist()


def shrink(
    lengths: list[int],
    h_in: int = 4096,
    r: int = 16,
    device: emulator.Device = emulator.A100,
    release: str = "1.1.0",
) -> Any:
    return emulator.punica_sgmv_shrink(ids_of(lengths), h_in, r, device, release)


def check_1(answers: Answers) -> None:
    for ids in [[], [7], [-1, -1], *random_ids(-1, 9)]:
        got = [integers(field) for field in answers.segment(ids)]
        right = sgmv.segment(ids)
        assert got == [integers(f) for f in (right.rows, right.seq_start, right.adapter_ids)], ids


def check_2(answers: Answers) -> None:
    for case in corpus(max_elements=5_000):
        y = case.y.copy()
        batch = case.rows, case.seq_start, case.segment_ids.tolist()
        with np.errstate(all="ignore"):
            answers.add_lora(y, case.x, *batch, case.adapters, case.scalings)
        case.check(y)


def check_3(answers: Answers) -> None:
    for ids in random_ids(-1, 5):
        if max(ids) == -1:
            continue
        for max_loras in (5, 8):
            got = [integers(field) for field in answers.kernel_meta(ids, max_loras)]
            right = layouts.vllm_v1(ids, max_loras)
            fields = right.active_lora_ids, right.num_tokens_per_lora, right.lora_token_start_loc
            assert got == [integers(field) for field in fields], (ids, max_loras)


def check_4(answers: Answers) -> None:
    A, B = np.zeros((1, 1), "f"), np.zeros((1, 1), "f")
    stack = sgmv.AdapterStack.from_adapters(dict.fromkeys(range(6), (A, B)))
    for lengths in [[5, 40], [256], [64], *random_lengths(150)]:
        for most in (1, 16, 48, 256):
            right = layouts.sglang(ids_of(lengths), stack, max_lora_chunk_size=most)
            wanted = [*zip(integers(right.weight_indices), integers(np.diff(right.seg_indptr)))]  # noqa: B905
            got = [(int(s), int(rows)) for s, rows in answers.chunks(lengths, most)]
            assert got == wanted, (lengths, most)


def check_5(answers: Answers) -> None:
    assert answers.wasted([], 64) == 0
    for lengths in [[64, 128], [65], *random_lengths(200)]:
        expand = emulator.punica_cutlass_expand(ids_of(lengths), 16, 4096)
        for tile_rows, figures in ((64, shrink(lengths).figures()), (32, expand.figures())):
            right = figures["wasted_rows"] / figures["row_slots"]
            got = answers.wasted(lengths, tile_rows)
            assert math.isclose(got, right, abs_tol=1e-12), (lengths, tile_rows, got, right)


def check_6(answers: Answers) -> None:
    for r in (16, 32, 64, 96, 128):
        got, right = answers.shared_memory(r), shrink([1], r=r).shared_memory
        assert got == right, (r, got, right)


def check_7(answers: Answers) -> None:
    """The answer's segments fit, one more does not: the launches themselves are asked."""
    for device in emulator.DEVICES.values():
        for h_in, r in ((4096, 16), (4096, 64), (11008, 16), (3424, 32)):
            S = answers.split_k_segments(h_in, r, device)
            assert shrink([1] * S, h_in, r, device).cooperative, (device.name, h_in, r, S)
            assert not shrink([1] * (S + 1), h_in, r, device).cooperative, (h_in, r, S)


def check_8(answers: Answers) -> None:
    for lengths in [[1, 132], [64, 65], [65, 128], [200], [1], *random_lengths(200)]:
        right = shrink(lengths, release="1.0.0").deadlock is not None
        assert bool(answers.hangs(lengths, True)) == right, lengths
        assert not answers.hangs(lengths, False), "blocks that do not wait cannot wait for ever"
    found = answers.smallest_hang()
    assert shrink(found, release="1.0.0").deadlock is not None, found
    assert sum(found) == 66, f"{sum(found)} rows; it can be done with fewer"


def check_9(answers: Answers) -> None:
    rng = np.random.default_rng(3)
    for k, chunk in ((1, 1), (5, 2), (300, 256), (1000, 256), (1000, 1000)):
        x, w = rng.standard_normal((2, k)).astype(np.float32)
        right = None
        for first in range(0, k, chunk):
            part = x[first] * w[first]
            for i in range(first + 1, min(first + chunk, k)):
                part = part + x[i] * w[i]
            right = part if right is None else right + part
        got = answers.split_sum(x, w, chunk)
        assert np.float32(got).tobytes() == np.float32(right).tobytes(), (k, chunk, got, right)


def check_10(answers: Answers) -> None:
    for lengths in random_lengths(100):
        got = answers.intensity(lengths, 16, 4096)
        right = sgmv.segment(ids_of(lengths)).stats(1, 4096, 16).expand.intensity
        assert math.isclose(got, right), (lengths, got, right)
    for target, k, width in ((1, 16, 4096), (12.7, 16, 4096), (40, 64, 4096), (0.5, 1, 1)):
        got = answers.rows_to_reach(target, k, width)
        enough = (
            m for m in range(1, 10_000) if exercises_answers.intensity([m], k, width) >= target
        )
        assert got == next(enough, None), (target, k, width)
    for target in (15.94, 153):
        assert answers.rows_to_reach(target, 16, 4096) is None, "no number of rows is enough"


CHECKS: dict[int, Callable[[Answers], None]] = {
    1: check_1,
    2: check_2,
    3: check_3,
    4: check_4,
    5: check_5,
    6: check_6,
    7: check_7,
    8: check_8,
    9: check_9,
    10: check_10,
}


@pytest.mark.parametrize("number", CHECKS)
def test_check(number: int) -> None:
    path = os.environ.get("SGMV_EXERCISES")
    answers = load(Path(path)) if path else exercises_answers
    try:
        CHECKS[number](answers)
    except NotImplementedError:
        pytest.skip(f"exercise {number} is not filled in")


# Mistakes that the checks must refuse


def _unstable(ids: list[int]) -> tuple[list[int], list[int], list[int]]:
    right = exercises_answers.segment(ids)
    return np.lexsort((-np.arange(len(ids)), ids)).tolist(), right[1], right[2]


def _without_end(ids: list[int]) -> tuple[Any, Any, Any]:
    rows, seq_start, segment_ids = exercises_answers.segment(ids)
    return rows, seq_start[:-1], segment_ids


def _last_adapter_for_base(
    y: Any, x: Any, rows: Any, seq_start: Any, ids: Any, adapters: Any, scalings: Any
) -> None:
    by_index = [adapters[i] for i in sorted(adapters)]
    exercises_answers.add_lora(
        y,
        x,
        rows,
        seq_start,
        ids,
        {**adapters, -1: by_index[-1]} if by_index else adapters,
        {-1: 1.0, **scalings},
    )


def _unscaled(y: Any, x: Any, *batch: Any) -> None:
    *others, scalings = batch
    exercises_answers.add_lora(y, x, *others, dict.fromkeys(scalings, 1.0))


def _starts_go_on(slots: list[int], max_loras: int) -> tuple[Any, Any, Any]:
    active, counts, _ = exercises_answers.kernel_meta(slots, max_loras)
    return active, counts, np.concatenate([[0], np.cumsum(counts)])


def _equal_chunks(lengths: list[int], most: int = 16) -> list[tuple[int, int]]:
    found = []
    for s, length in enumerate(lengths):
        pieces = -(-length // max(most, 16))
        found += [(s, length * (i + 1) // pieces - length * i // pieces) for i in range(pieces)]
    return found


def _no_least_chunk(lengths: list[int], most: int = 16) -> list[tuple[int, int]]:
    return [(s, min(most, m - i)) for s, m in enumerate(lengths) for i in range(0, m, most)]


def _chunks_rounded_down(h_in: int, r: int, device: emulator.Device) -> int:
    memory = exercises_answers.shared_memory(r)
    return device.sms * device.resident_blocks(128, memory) // (h_in // 256)


def _pairwise(x: Any, w: Any, chunk: int) -> Any:
    parts = [np.sum((x * w)[k : k + chunk]) for k in range(0, len(x), chunk)]
    return np.sum(np.array(parts, np.float32))


def _in_one(x: Any, w: Any, chunk: int) -> Any:
    return exercises_answers.split_sum(x, w, len(x))


MISTAKES: list[tuple[int, dict[str, Any]]] = [
    (1, {"segment": _unstable}),
    (1, {"segment": _without_end}),
    (2, {"add_lora": _last_adapter_for_base}),
    (2, {"add_lora": _unscaled}),
    (3, {"kernel_meta": _starts_go_on}),
    (4, {"chunks": _equal_chunks}),
    (4, {"chunks": _no_least_chunk}),
    (5, {"wasted": lambda lengths, tile: -sum(lengths) % tile / max(sum(lengths), 1)}),
    (6, {"shared_memory": lambda r: 128 * (64 + r) * 2}),  # one stage
    (7, {"split_k_segments": _chunks_rounded_down}),
    (7, {"split_k_segments": lambda h_in, r, d: d.sms // -(-h_in // 256)}),
    (8, {"hangs": lambda lengths, splits_k: splits_k and max(lengths) > 64}),
    (8, {"hangs": lambda lengths, splits_k: splits_k and max(lengths) - min(lengths) >= 65}),
    (8, {"hangs": lambda lengths, splits_k: len({-(-m // 64) for m in lengths}) > 1}),
    (8, {"smallest_hang": lambda: [1, 132]}),
    (8, {"smallest_hang": lambda: [33, 33]}),
    (9, {"split_sum": _pairwise}),
    (9, {"split_sum": _in_one}),
    (9, {"split_sum": lambda x, w, chunk: np.dot(x.astype(float), w)}),
    (10, {"intensity": lambda lengths, k, w: exercises_answers.intensity([sum(lengths)], k, w)}),
    (10, {"rows_to_reach": lambda t, k, w: (exercises_answers.rows_to_reach(t, k, w) or 0) + 1}),
    (10, {"rows_to_reach": lambda target, k, width: math.ceil(target)}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "mistake"), MISTAKES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(MISTAKES)]
)
def test_mistakes_are_refused(number: int, mistake: dict[str, Any]) -> None:
    answers = SimpleNamespace(**{**vars(exercises_answers), **mistake})
    with pytest.raises(AssertionError):
        CHECKS[number](answers)


# The page


def test_the_page_asks_for_what_the_answers_answer(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(exercises_page.skeleton())
    asked = load(path)
    functions = dict(inspect.getmembers(asked, inspect.isfunction))
    assert len(functions) == len(CHECKS) + 2
    for name, function in functions.items():
        answer = inspect.signature(getattr(exercises_answers, name))
        assert list(inspect.signature(function).parameters) == list(answer.parameters), name
    sections = exercises_page.EXERCISE.findall(exercises_page.PAGE.read_text())
    assert [int(number) for number, _, _ in sections] == list(CHECKS)
    for check in CHECKS.values():
        with pytest.raises(NotImplementedError):
            check(asked)


def test_the_pages_examples_are_right(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(exercises_page.skeleton())
    examples = 0
    for name, function in inspect.getmembers(load(path), inspect.isfunction):
        for test in doctest.DocTestFinder().find(function, name):
            test.globs = dict(vars(exercises_answers))
            failed, tried = doctest.DocTestRunner(verbose=False).run(test)
            assert not failed, name
            examples += tried
    assert examples > 5


def test_the_pages_pictures_can_be_drawn() -> None:
    commands = re.findall(
        r"^`python -m sgmv (explain [^`]+)`$", exercises_page.PAGE.read_text(), re.M
    )
    assert len(commands) == len(CHECKS)
    for command in commands:
        assert punica_page.printed(command), command


def test_answers_are_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("mine")
    program = "import runpy; runpy.run_module('tests.exercises_page', run_name='__main__')"
    done = run_python(program, arguments=[str(path)])
    assert done.returncode != 0
    assert "FileExistsError" in done.stderr
    assert path.read_text() == "mine"
