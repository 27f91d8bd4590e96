"""docs/exercises.md: a check for each exercise, held to model answers and to usual mistakes.

SGMV_EXERCISES=my_answers.py python -m pytest tests/docs/test_exercises.py -k check    yours
"""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import math
import operator
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
from tests.help import exercises_answers, exercises_page, punica_page
from tests.help.planting import ROOT, run_python

pytestmark = pytest.mark.once

Answers = Any  # a module, or whatever has its functions
FUNCTIONS = exercises_page.functions()


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("answers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain(value: Any) -> Any:
    """Arrays, tuples and numpy's numbers as Python's lists and numbers."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def close(got: Any, right: float) -> bool:
    return isinstance(got, int | float) and math.isclose(got, right, abs_tol=1e-12)


def called(function: Callable[..., Any], name: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    """The call as one writes it, and what it returns; an answer's own exception fails the check."""
    shown = [getattr(each, "name", None) or repr(plain(each)) for each in arguments]
    call = f"{name}({', '.join(shown)})"
    try:
        return call, plain(function(*arguments))
    except NotImplementedError:
        raise
    except Exception as error:
        raise AssertionError(f"{call} raised {error!r}") from error


def hold(
    answers: Answers,
    name: str,
    arguments: tuple[Any, ...],
    right: Any,
    equal: Callable[[Any, Any], bool] = operator.eq,
    why: str = "",
) -> None:
    """Fails with what was given, what the answer made of it, and what it should have been."""
    call, got = called(getattr(answers, name), name, arguments)
    right = plain(right)
    reason = f": {why}" if why else ""
    assert equal(got, right), f"{call} gave {got!r}; it should have been {right!r}{reason}"


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
        right = sgmv.segment(ids)
        hold(answers, "segment", (ids,), [right.rows, right.seq_start, right.adapter_ids])


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
            right = layouts.vllm_v1(ids, max_loras)
            fields = right.active_lora_ids, right.num_tokens_per_lora, right.lora_token_start_loc
            hold(answers, "kernel_meta", (ids, max_loras), fields)


def check_4(answers: Answers) -> None:
    A, B = np.zeros((1, 1), "f"), np.zeros((1, 1), "f")
    stack = sgmv.AdapterStack.from_adapters(dict.fromkeys(range(6), (A, B)))
    for lengths in [[5, 40], [256], [64], *random_lengths(150)]:
        for most in (1, 16, 48, 256):
            right = layouts.sglang(ids_of(lengths), stack, max_lora_chunk_size=most)
            pairs = np.column_stack([right.weight_indices, np.diff(right.seg_indptr)])
            hold(answers, "chunks", (lengths, most), pairs)


def check_5(answers: Answers) -> None:
    hold(answers, "wasted", ([], 64), 0.0, close)
    for lengths in [[64, 128], [65], *random_lengths(200)]:
        expand = emulator.punica_cutlass_expand(ids_of(lengths), 16, 4096)
        for tile_rows, figures in ((64, shrink(lengths).figures()), (32, expand.figures())):
            right = figures["wasted_rows"] / figures["row_slots"]
            hold(answers, "wasted", (lengths, tile_rows), right, close)


def check_6(answers: Answers) -> None:
    for r in (16, 32, 64, 96, 128):
        hold(answers, "shared_memory", (r,), shrink([1], r=r).shared_memory)


def check_7(answers: Answers) -> None:
    """The answer's segments fit, one more does not: the launches themselves are asked."""
    for device in emulator.DEVICES.values():
        for h_in, r in ((4096, 16), (4096, 64), (11008, 16), (3424, 32)):
            S = shrink([1], h_in, r, device).split_k_segments
            assert shrink([1] * S, h_in, r, device).cooperative, (device.name, h_in, r, S)
            assert not shrink([1] * (S + 1), h_in, r, device).cooperative, (h_in, r, S)
            hold(answers, "split_k_segments", (h_in, r, device), S)


def check_8(answers: Answers) -> None:
    for lengths in [[1, 132], [64, 65], [65, 128], [200], [1], *random_lengths(200)]:
        right = shrink(lengths, release="1.0.0").deadlock is not None
        hold(answers, "hangs", (lengths, True), right)
        hold(answers, "hangs", (lengths, False), False, why="without a split, no block waits")
    call, found = called(answers.smallest_hang, "smallest_hang", ())
    shown = f"{call} gave {found!r}"
    assert isinstance(found, list), f"{shown}; it should have been a list of lengths"
    assert shrink(found, release="1.0.0").deadlock, f"{shown}; it should have been one that hangs"
    assert sum(found) == 66, f"{shown}, {sum(found)} rows; it should have been 66 rows in all"


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
        got = np.float32(called(answers.split_sum, "split_sum", (x, w, chunk))[1])
        given = f"x, w of {k} numbers" if k > 5 else f"{plain(x)}, {plain(w)}"
        assert got.tobytes() == np.float32(right).tobytes(), (
            f"split_sum({given}, {chunk}) gave {got:.9g}; it should have been {right:.9g}"
        )


def check_10(answers: Answers) -> None:
    for lengths in random_lengths(100):
        right = sgmv.segment(ids_of(lengths)).stats(1, 4096, 16).expand.intensity
        hold(answers, "intensity", (lengths, 16, 4096), right, close)
    for target, k, width in ((1, 16, 4096), (12.7, 16, 4096), (40, 64, 4096), (0.5, 1, 1)):
        enough = (
            m for m in range(1, 10_000) if exercises_answers.intensity([m], k, width) >= target
        )
        hold(answers, "rows_to_reach", (target, k, width), next(enough, None))
    for target in (15.94, 153):
        hold(answers, "rows_to_reach", (target, 16, 4096), None, why="no number of rows is enough")


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


def answers_to(number: int, path: str | None) -> Answers:
    """The module that holds the answers; skips an exercise that it does not answer."""
    if path is None:
        return exercises_answers
    if not Path(path).is_file():
        pytest.fail(
            f"SGMV_EXERCISES: expected a file of answers, got {path} (no such file); "
            f"write one with `python -m tests.help.exercises_page {path}`",
            pytrace=False,
        )
    answers = load(Path(path))
    missing = [name for name in FUNCTIONS[number] if not hasattr(answers, name)]
    if missing:
        pytest.skip(f"exercise {number}: {path} has no {' or '.join(missing)}")
    return answers


@pytest.mark.parametrize("number", CHECKS)
def test_check(number: int) -> None:
    answers = answers_to(number, os.environ.get("SGMV_EXERCISES"))
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
    with pytest.raises(AssertionError) as refused:
        CHECKS[number](answers)
    if number == 2:  # the corpus's own words: the case, and its worst element
        assert re.search("expected|lost its bits", str(refused.value))
    else:
        assert "it should have been" in str(refused.value)


@pytest.mark.parametrize(
    ("number", "mistake", "message"),
    [
        (
            1,
            {"segment": lambda ids: None},
            "segment([]) gave None; it should have been [[], [0], []]",
        ),
        (1, {"segment": lambda ids: ids[0]}, "segment([]) raised IndexError"),
        (
            7,
            {"split_k_segments": lambda h_in, r, device: 28},
            "split_k_segments(4096, 16, A100) gave 28; it should have been 27",
        ),
        (
            8,
            {"smallest_hang": lambda: [1, 132]},
            "smallest_hang() gave [1, 132], 133 rows; it should have been 66 rows in all",
        ),
    ],
)
def test_a_refusal_says_what_it_should_have_been(
    number: int, mistake: dict[str, Any], message: str
) -> None:
    answers = SimpleNamespace(**{**vars(exercises_answers), **mistake})
    with pytest.raises(AssertionError) as refused:
        CHECKS[number](answers)
    assert str(refused.value).startswith(message)


# Somebody's file


def checked(path: Path) -> str:
    """What pytest says of these answers, as the page has it run."""
    program = (
        "import pytest; "
        "raise SystemExit(pytest.main(['-q', 'tests/docs/test_exercises.py', '-k', 'check']))"
    )
    return run_python(program, SGMV_EXERCISES=str(path)).stdout


def test_a_file_with_one_answer_skips_the_others(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"import numpy as np\n{inspect.getsource(exercises_answers.segment)}")
    path.write_text(path.read_text().replace("Sequence[int]", "'list'").replace("Any", "'Any'"))
    said = checked(path)
    assert "1 passed, 9 skipped" in said
    assert "mine.py has no hangs or smallest_hang" in said


def test_an_empty_skeleton_skips_all(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(exercises_page.skeleton())
    assert "10 skipped" in checked(path)


def test_answers_that_are_not_there_say_how_to_begin(tmp_path: Path) -> None:
    said = checked(tmp_path / "mine.py")
    assert "10 failed" in said
    assert f"python -m tests.help.exercises_page {tmp_path / 'mine.py'}" in said


def test_no_page_gives_an_answer_away() -> None:
    """Exercise 2's answer stood in the README: segment by segment, in numpy."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.*")]
    assert len(pages) > 10
    for path in pages:
        assert "((x[p] @ A.T) @ B.T)" not in path.read_text(), path


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
    commands = re.findall(r"^`sgmv (explain [^`]+)`$", exercises_page.PAGE.read_text(), re.M)
    assert len(commands) == len(CHECKS)
    for command in commands:
        assert punica_page.printed(command), command


def test_answers_are_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("mine")
    program = "import runpy; runpy.run_module('tests.help.exercises_page', run_name='__main__')"
    done = run_python(program, arguments=[str(path)])
    assert done.returncode != 0
    assert f"expected a new file, got {path} (File exists)" in done.stderr
    assert path.read_text() == "mine"


def test_help_is_no_file_name(tmp_path: Path) -> None:
    program = "import runpy; runpy.run_module('tests.help.exercises_page', run_name='__main__')"
    done = run_python(program, tmp_path, arguments=["--help"])
    assert done.returncode == 0
    assert "my_answers.py" in done.stdout
    assert not list(tmp_path.iterdir())
