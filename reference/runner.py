"""Is a kernel right: the corpus and random batches on it, and the likeliest fault first."""

import json
import math
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from reference import drawn, workloads
from reference.batch import Workload, Wrong
from reference.compare import Worst
from reference.diagnosis import Evidence, likeliest
from reference.signatures import SIGNATURES, Handed, Kernel, SpoiledError, posed

# Failed random batches that take part in the diagnosis: it holds each against many questions.
RANDOM_EVIDENCE = 100
MOST_BATCHES = 10_000_000  # of each type: hours


PIECE = 500  # batches that are drawn at a time


class Piece(NamedTuple):
    """The random batches first to last - 1 of a seed, in one type."""

    dtype: str
    seed: int
    first: int
    last: int


Found = list[Any]  # by `draw`, of a piece: as JSON has it


@dataclass(frozen=True)
class Failure:
    """A case that failed: its name, what it hunts, and what is wrong."""

    case: str
    hunts: str
    wrong: Wrong


@dataclass(frozen=True)
class Report:
    """What the cases say of a kernel; `print` it.

    diagnosis is the likeliest fault, in one line. checked {what is hunted: how many cases}.
    smallest is a snippet that runs: the smallest random batch that still fails.
    """

    checked: dict[str, int] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    diagnosis: str = ""
    smallest: str = ""

    @property
    def ok(self) -> bool:
        """Whether every case passed."""
        return not self.failures

    @property
    def passed(self) -> int:
        """How many cases passed."""
        return sum(self.checked.values()) - len(self.failures)

    def __str__(self) -> str:
        return self.text()

    def text(self, most: int | None = 10) -> str:
        """What `print` shows; of the table at most so many groups, None for all."""
        width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
        cases = sum(self.checked.values())
        if self.ok:
            return f"passed: all {cases} cases" if cases else "no case was checked"
        lines = textwrap.wrap(self.diagnosis, width, subsequent_indent="    ")
        lines += ["", f"{len(self.failures)} of {cases} cases failed, {self.passed} passed", ""]
        groups = self.groups()
        lines.append("  failed  what they hunt, and the worst element")
        for hunts, failures in groups[:most]:
            worst = max(failures, key=_severity)
            of = f"/{self.checked[hunts]}" if hunts in self.checked else ""
            count = f"{f'{len(failures)}{of}':>8}  "
            lines += textwrap.wrap(count + hunts, width, subsequent_indent=" " * 10)
            what = worst.case if hunts == worst.wrong.what else f"{worst.case}: {worst.wrong.what}"
            indent = " " * 12
            lines += textwrap.wrap(what, width, initial_indent=indent, subsequent_indent=indent)
        left = groups[len(groups) if most is None else most :]
        if left:
            others = sum(len(failures) for _, failures in left)
            lines.append(f"{others:>8}  more, which hunt {len(left)} other things")
        if self.smallest:
            lines += ["", "The smallest random batch found that fails:", "", self.smallest]
        return "\n".join(lines)

    def groups(self) -> list[tuple[str, list[Failure]]]:
        """The failures by what they hunt, those of values; the others by what was wrong.

        Semantics: first those of which the largest share failed.
        """
        of: dict[str, list[Failure]] = {}
        for failure in self.failures:
            valued = failure.wrong.kind in ("values", "base only")
            of.setdefault(failure.hunts if valued else failure.wrong.what, []).append(failure)

        def share(group: tuple[str, list[Failure]]) -> float:
            return len(group[1]) / self.checked.get(group[0], 1)

        return sorted(of.items(), key=share, reverse=True)

    def as_json(self) -> str:
        """All of it, in JSON; NaN and inf as strings."""
        failures = [
            {
                "case": failure.case,
                "hunts": failure.hunts,
                "kind": failure.wrong.kind,
                "what": failure.wrong.what,
                "worst": failure.wrong.worst and failure.wrong.worst._asdict(),
            }
            for failure in self.failures
        ]
        report = {
            "ok": self.ok,
            "diagnosis": self.diagnosis,
            "passed": self.passed,
            "failed": len(self.failures),
            "checked": self.checked,
            "failures": failures,
            "smallest": self.smallest,
        }
        return json.dumps(_finite(report), indent=2, allow_nan=False)


def _severity(failure: Failure) -> float:
    worst = failure.wrong.worst
    if worst is None or not math.isfinite(worst.error):
        return math.inf
    return worst.error / worst.bound if worst.bound else math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def call(
    kernel: Kernel | Sequence[Kernel], case: Workload, like: str = "reference", torch: bool = False
) -> Any:
    """What a kernel makes of the case's y.

    Semantics: the kernel is called with operands of its own, in `like`'s signature (see
    signatures.py), numpy arrays or, with torch, tensors over their memory; numpy's warnings are off
    meanwhile, for NaN and inf are among the operands on purpose. y is what it returns, or what it
    wrote to if it returns None.
    Raises: what the kernel raises; SpoiledError, an AssertionError, naming the operands other than
    y that it changed, which are put back before; ValueError for a signature that is not known, or
    another number of functions than it has.
    Source: each engine's own calls.

    >>> from reference.batch import real
    >>> case = real("demo", "y as it was", [-1], {}, h_in=3, h_out=4)
    >>> case.check(call(lambda y, *operands: None, case))
    """
    kernels = _functions(kernel, like)
    handed = Handed(torch)
    with np.errstate(all="ignore"):
        y = SIGNATURES[like].call(kernels, case, handed)
    changed = handed.changed()
    if changed:
        raise SpoiledError(f"the kernel changed {' and '.join(changed)}; write to y alone")
    return y


def check(
    kernel: Kernel | Sequence[Kernel],
    *,
    like: str = "reference",
    dtypes: DTypeLike | Iterable[DTypeLike] = "float32",
    random: int = 0,
    seed: int = 0,
    torch: bool = False,
    max_elements: int | None = None,
    name: str = "my_kernel",
    progress: Callable[[int, int], None] | None = None,
    elsewhere: Callable[[list[Piece]], Iterable[Found]] | None = None,
) -> Report:
    """The corpus, and random batches, on a kernel; no failure ends it.

    Semantics: every case of `workloads.corpus(max_elements, dtypes)`, then batches 0 to random - 1
    of this seed in each type, are called as in `call` and held to their answer as by
    `Workload.check`. The smallest random batch that fails is made smaller still.

    kernel     a function; the two halves for signatures that have two
    like       its signature, see signatures.py: reference, punica, punica-sgmv, vllm-bgmv,
               vllm-sgmv, sglang
    torch      whether it takes torch tensors, on the CPU
    name       FILE:FUNCTION, for the snippet of the smallest batch
    progress   called after each case with the numbers of cases checked and failed
    elsewhere  returns what `draw` finds in each piece of the random batches, in their order; left
               out, they are drawn here

    Raises: ValueError for a signature, a type or a number that is none. A kernel's own exceptions
    are failures of their cases. Source: Punica (2023), section 4, for the call.

    >>> def my_kernel(y, x, rows, seq_start, segment_ids, adapters, scalings):
    ...     for s, adapter_id in enumerate(segment_ids):
    ...         if adapters.get(adapter_id) is not None:
    ...             A, B = adapters[adapter_id]
    ...             p = rows[seq_start[s] : seq_start[s + 1]]
    ...             y[p] += (x[p] @ A.T) @ B.T
    >>> report = check(my_kernel, max_elements=5_000)
    >>> report.ok, report.diagnosis[:34]
    (False, 'likeliest: the scaling is dropped:')
    """
    kernels = _functions(kernel, like)
    if random < 0:
        raise ValueError(f"random: expected 0 or more batches, got {random}; leave it out for none")
    if random > MOST_BATCHES:
        raise ValueError(
            f"random: expected at most {MOST_BATCHES} batches, got {random}; pass fewer, and "
            "another seed in the next run"
        )
    types = workloads.types_of(dtypes)
    evidence: list[Evidence] = []
    failures: list[Failure] = []
    checked: dict[str, int] = {}

    def count(hunts: str, cases: int = 1) -> None:
        checked[hunts] = checked.get(hunts, 0) + cases

    def told(held: int = 0, failed: int = 0) -> None:
        if progress is not None:
            progress(sum(checked.values()) + held, len(failures) + failed)

    for case in workloads.corpus(max_elements, types):
        case = posed(case, like)
        result = judge(kernels, case, like, torch)
        count(case.why)
        if result.wrong is not None:
            failures.append(Failure(case.name, case.why, result.wrong))
        evidence.append(result)
        told()
    pieces = pieces_of(types, random, seed)
    if elsewhere is None:
        found: Iterable[Found] = (draw(kernels, like, torch, piece, told) for piece in pieces)
    else:
        found = elsewhere(pieces)
    failed: list[tuple[int, Piece, int]] = []  # numbers held, the piece, the batch's number
    for piece, wrongs in zip(pieces, found, strict=True):
        count(drawn.HUNTS, piece.last - piece.first)
        for index, size, kind, what, worst in wrongs:
            named = drawn.name(piece.seed, index, piece.dtype)
            wrong = Wrong(kind, what, None if worst is None else Worst(*worst))
            failures.append(Failure(named, drawn.HUNTS, wrong))
            failed.append((size, piece, index))
        told()
    for _size, piece, index in failed[:RANDOM_EVIDENCE]:
        evidence.append(judge(kernels, _batch(piece, index, like), like, torch))
    smallest = ""
    if failed:
        _size, piece, index = min(failed, key=lambda each: each[0])
        least = drawn.smallest(
            _batch(piece, index, like), lambda case: judge(kernels, case, like, torch).wrong
        )
        smallest = drawn.snippet(least, name, like, torch)
    return Report(checked, tuple(failures), likeliest(evidence), smallest)


def pieces_of(types: Iterable[np.dtype[Any]], random: int, seed: int) -> list[Piece]:
    """The random batches 0 to random - 1 of each type.

    >>> [piece.last for piece in pieces_of([np.dtype("float32")], 700, 0)]
    [500, 700]
    """
    return [
        Piece(dtype.name, seed, first, min(first + PIECE, random))
        for dtype in types
        for first in range(0, random, PIECE)
    ]


def draw(
    kernels: Sequence[Kernel],
    like: str,
    torch: bool,
    piece: Piece,
    told: Callable[[int, int], None] = lambda held, failed: None,
) -> Found:
    """Those of a piece's batches that fail: number, numbers held, and what is wrong.

    told  called after each with how many were held to their answer, and how many failed

    >>> draw([lambda y, *operands: y], "reference", False, Piece("float32", 0, 0, 1))[0][:3]
    [0, 7293, 'values']
    """
    found: Found = []
    for index in range(piece.first, piece.last):
        result = judge(kernels, _batch(piece, index, like), like, torch)
        if result.wrong is not None:
            kind, what, worst = result.wrong
            found.append([index, drawn.size(result.case), kind, what, worst and list(worst)])
        told(index - piece.first + 1, len(found))
    return found


def _batch(piece: Piece, index: int, like: str) -> Workload:
    [dtype] = workloads.types_of(piece.dtype)
    return posed(drawn.batch(piece.seed, index, dtype), like)


def judge(kernels: Sequence[Kernel], case: Workload, like: str, torch: bool) -> Evidence:
    """One case: what the kernel made of it, and what is wrong with that.

    >>> from reference.batch import real
    >>> case = real("demo", "an exception", [-1], {}, h_in=3, h_out=4)
    >>> judge([lambda y, *operands: 1 / 0], case, "reference", torch=False).wrong.what
    'ZeroDivisionError: division by zero'
    """
    try:
        actual = call(kernels, case, like, torch)
    except SpoiledError as error:
        return Evidence(case, None, Wrong("spoiled", str(error)))
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())
        return Evidence(case, None, Wrong("raised", f"{type(error).__name__}: {said}"[:300]))
    return Evidence(case, actual, case.wrong(actual))


def _functions(kernel: Kernel | Sequence[Kernel], like: str) -> Sequence[Kernel]:
    if like not in SIGNATURES:
        raise ValueError(f"like: expected one of {', '.join(SIGNATURES)}, got {like}; pick one")
    kernels = kernel if isinstance(kernel, Sequence) else (kernel,)
    expected = SIGNATURES[like].functions
    if len(kernels) != len(expected):
        raise ValueError(
            f"kernel: expected {len(expected)} for {like} ({', '.join(expected)}), "
            f"got {len(kernels)}; name {'both halves' if len(expected) == 2 else 'one function'}"
        )
    return kernels
