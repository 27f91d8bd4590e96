"""The likeliest fault of a kernel, from all of its results.

A wrong y is, more often than not, the right answer to another question: that of a batch whose
scalings are all 1, whose -1 rows have the last adapter, whose ranks end at a multiple of 8. So the
evidence is weighed thus, the first that holds being told:

    1. what the kernel did at all: it raised, returned no y, wrote to an operand
    2. another question (questions.py), whose right answer each wrong y is, and which would have
       passed where this kernel passed
    3. a single thing hunted by all cases that failed: the corpus has its name
    4. errors that are small: a rounding to fewer bits
    5. what the wrong rows, or the cases that failed, have in common and the others have not
    6. a question that explains most of them; else the smallest case that failed

Nothing here is proof, and the words say so.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reference import by_row, compare
from reference.batch import Workload, Wrong
from reference.questions import (
    Answer,
    Question,
    adapted,
    of_history,
    places,
    questions,
    rank_of,
    used,
)

# As many failed, and as many passed, cases a question is held against.
SAMPLE = 24
# Shares that make a cause likely. They decide what is said, never whether a kernel passes.
EXPLAINED = 0.9  # of the failed cases, by one question
NEARLY_ALL = 0.85  # of the wrong rows, and of the rows of a kind
UNEXPLAINED = 0.3  # of the errors, that one rounding may leave
SMALL = 2.0**-6  # an error beside what was added up, where something is rounded to 8 bits or more


@dataclass(frozen=True, eq=False)
class Evidence:
    """One case, what a kernel made of it (None if it raised), and what is wrong with that."""

    case: Workload
    actual: Any
    wrong: Wrong | None


@np.errstate(all="ignore")
def likeliest(evidence: Sequence[Evidence]) -> str:
    """The likeliest fault in one line; "" if nothing failed.

    Semantics: the order of this file's head.

    >>> from reference import workloads
    >>> cases = [case for case in workloads.corpus(max_elements=3_000)]
    >>> likeliest([Evidence(c, c.y, c.wrong(c.y)) for c in cases])[:32]
    'likeliest: y is left as it was: '
    """
    failed = [e for e in evidence if e.wrong is not None]
    if not failed:
        return ""
    passed = [e for e in evidence if e.wrong is None]
    kinds = Counter(_family(e) for e in failed)
    kind = kinds.most_common(1)[0][0]
    alike = [e for e in failed if _family(e) == kind]
    others = len(failed) - len(alike)
    found = _misbehaviour(alike, passed) if kind != "values" else _wrong_values(alike, evidence)
    also = f"; {others} other failed cases are of another kind" if others else ""
    return f"likeliest: {found}{also}"


def _family(e: Evidence) -> str:
    kind = e.wrong.kind if e.wrong else ""
    return "values" if kind == "base only" else kind


def _misbehaviour(failed: Sequence[Evidence], passed: Sequence[Evidence]) -> str:
    """What a kernel did that is no matter of values."""
    said = Counter(e.wrong.what for e in failed if e.wrong)
    what = said.most_common(1)[0][0]
    kind = failed[0].wrong.kind if failed[0].wrong else ""
    if kind == "spoiled":
        return what
    if kind == "result":
        return f"what it returns is no y ({what}); change y in place, or return one of y's type"
    first = f"it raises {what}" if len(said) == 1 else f"it raises, mostly {what}"
    if not passed:
        return f"{first}, in every case: is its signature the one that --like names?"
    common = _common_to_cases(failed, passed)
    return f"{first}, {common or _hunted(failed)}"


def _wrong_values(failed: Sequence[Evidence], evidence: Sequence[Evidence]) -> str:
    passed = [e for e in evidence if e.wrong is None]
    valued = [e for e in failed if e.wrong and e.wrong.worst]
    if not valued:
        return "base-only rows are rewritten: their values stay, their bits do not (-0.0 + 0.0)"
    scored = _best_question(valued, passed, [*of_history([e.case for e in evidence]), *questions()])
    if scored is not None and scored.share > EXPLAINED:
        return f"{scored.what} (explains {scored.told} looked at)"
    hunted = {e.case.why for e in failed}
    if len(hunted) == 1:
        cases = "one case that failed hunts" if len(failed) == 1 else "failed cases all hunt"
        return f"{hunted.pop()} (what the {cases})"
    spared = all(e.wrong and e.wrong.kind == "values" for e in failed)  # base-only rows
    found = _rounding(failed) if spared else None
    found = found or _common_to_rows(failed, passed)
    if found is not None:
        return found
    common = _common_to_cases(failed, passed)
    if common is not None:
        return f"wrong {common}"
    if scored is not None:
        return f"{scored.what} (explains {scored.told} looked at; the others have another cause)"
    least = min(failed, key=lambda e: e.case.x.size + e.case.y.size).case.name
    return f"no single fault known here explains it; the smallest case that fails is {least!r}"


def _hunted(failed: Sequence[Evidence]) -> str:
    hunted = Counter(e.case.why for e in failed)
    most = ", ".join(f"{why!r}" for why, _ in hunted.most_common(2))
    return f"in cases that hunt {most}" + (", and more" if len(hunted) > 2 else "")


# 2. Another question


class _Scored(NamedTuple):
    share: float
    what: str
    told: str


def _best_question(
    failed: Sequence[Evidence],
    passed: Sequence[Evidence],
    asked: Iterable[tuple[str, Question]],
) -> _Scored | None:
    """The question that explains most, with its equals. None if none explains half."""
    sample = _sample(failed)
    best: list[_Scored] = []
    for what, question in asked:
        score = 0
        for i, e in enumerate(sample):
            score += _answers(question, e)
            if 2 * (score + len(sample) - 1 - i) < len(sample):
                break
        told = f"{score} of {len(sample)} failed cases"
        for e in passed if 2 * score >= len(sample) else ():
            score -= not _passes(question, e)
            if 2 * score < len(sample):
                break
        share = score / len(sample)
        if share >= 0.5 and (not best or share >= best[0].share):
            kept = best if best and share == best[0].share else []
            best = [*kept, _Scored(share, what, told)]
    if not best:
        return None
    return best[0]._replace(what="; or ".join(scored.what for scored in best[:2]))


def _sample(evidence: Sequence[Evidence]) -> list[Evidence]:
    """Small cases, as different as there are: the smallest of each thing hunted, then others."""
    by_size = sorted(evidence, key=lambda e: e.case.x.size + e.case.y.size)
    seen: Counter[str] = Counter()
    ranked: list[tuple[int, int]] = []
    for i, e in enumerate(by_size):
        ranked.append((seen[e.case.why], i))
        seen[e.case.why] += 1
    chosen = sorted(i for _, i in sorted(ranked)[:SAMPLE])
    return [by_size[i] for i in chosen]


def _answer(question: Question, case: Workload) -> Answer | None:
    """What the other question's answer is; None where it is no other."""
    try:
        other = question(case)
        if other is None or isinstance(other, Answer):
            return other
        return Answer(other.expected, other.bound)
    except (ValueError, IndexError):  # a batch that cannot be asked so
        return None


def _answers(question: Question, e: Evidence) -> bool:
    """Whether a wrong y is this question's right answer."""
    answer = _answer(question, e.case)
    return answer is not None and not compare.violations(e.actual, *answer).any()


def _passes(question: Question, e: Evidence) -> bool:
    """Whether this question's answer passes, as the kernel's did."""
    answer = _answer(question, e.case)
    if answer is None:
        return True
    bound = answer.bound + e.case.bound
    return not compare.violations(answer.expected, e.case.expected, bound).any()


# 4. Small errors


# The significand's bits, hidden one included, of the types that kernels round to on the way.
WIDTHS = {11: "float16 (or TF32)", 8: "bfloat16", 24: "float32"}
STAGES = {
    "x": "x is rounded",
    "weights": "A and B are rounded",
    "v": "v, what shrink hands to expand, is rounded",
    "delta": "the delta is rounded, before it is added to y,",
}


def _rounding(failed: Sequence[Evidence]) -> str | None:
    """Where something is rounded to fewer bits; None if errors are not small beside what was added.

    The stage and type are those that leave the least of the errors: less than UNEXPLAINED.
    """
    small = [e for e in failed if _error_share(e) < SMALL]
    if len(small) < 0.7 * len(failed):
        return None
    stops = any("stop growing" in e.case.why for e in failed if e not in small)
    if stops:
        return "sums are kept in 16 bits: errors are small, but for a long sum, which stops growing"
    sample = _sample(small)
    plain = _rms((e, e.case.expected) for e in sample)
    best, found = UNEXPLAINED * plain, None
    for stage, what in STAGES.items():
        for bits, kind in WIDTHS.items():
            left = _rms((e, _rounded(e.case, stage, bits)) for e in sample)
            if left < best:
                best, found = left, f"{what} to {bits} bits, as {kind} does"
    if found is not None:
        return f"{found} (leaves {best / plain:.0%} of the errors, which are small)"
    bits = math.floor(-math.log2(max(_error_share(e) for e in small)))
    return (
        "something is rounded on the way, to fewer bits than the sums have: errors are small, "
        f"below 2**-{bits} of what was summed"
    )


def _error_share(e: Evidence) -> float:
    """The largest error beyond its bound, beside the sum of what was added, in absolute values."""
    case = e.case
    actual = np.asarray(e.actual).astype(np.float64)
    finite = np.isfinite(case.expected)
    if not np.array_equal(np.isfinite(actual), finite):
        return math.inf
    y, x = np.abs(case.y.astype(np.float64)), np.abs(case.x.astype(np.float64))
    weights = {
        i: pair and (np.abs(pair[0].astype(np.float64)), np.abs(pair[1].astype(np.float64)))
        for i, pair in case.adapters.items()
    }
    scalings = {i: abs(s) for i, s in case.scalings.items()}
    size = by_row.add_lora(y, x, weights, case.adapter_ids, scalings)[finite]
    beyond = np.maximum(np.abs(actual[finite] - case.expected[finite]) - case.bound[finite], 0)
    share = np.divide(beyond, size, out=np.zeros_like(beyond), where=beyond > 0)
    return float(share.max(initial=0.0))


def _rms(compared: Iterable[tuple[Evidence, NDArray[np.float64]]]) -> float:
    """How far the results are from these, in bounds: the root of the cases' mean squares."""
    total = 0.0
    for e, y in compared:
        error = np.asarray(e.actual).astype(np.float64) - y
        of_bound = (error / np.where(e.case.bound > 0, e.case.bound, 1.0))[np.isfinite(error)]
        total += float((of_bound**2).mean()) if of_bound.size else 0.0
    return math.sqrt(total)


def _rounded(case: Workload, stage: str, bits: int) -> NDArray[np.float64]:
    """The y of a kernel that rounds at one stage, and then to y's type; the rest in float64."""

    def at(name: str, values: NDArray[Any]) -> NDArray[np.float64]:
        wide: NDArray[np.float64] = values.astype(np.float64)
        if name != stage:
            return wide
        significand, exponent = np.frexp(wide)
        return np.asarray(np.ldexp(np.round(significand * 2.0**bits), exponent - bits))

    out = case.y.astype(np.float64)
    with np.errstate(all="ignore"):
        for i in used(case):
            A, B = (at("weights", weight) for weight in case.adapters[i] or ())
            rows = np.flatnonzero(case.adapter_ids == i)
            v = at("v", at("x", case.x[rows]) @ A.T)
            out[rows] += at("delta", case.scalings[i] * (v @ B.T))
        return out.astype(case.y.dtype).astype(np.float64)


# 5. What they have in common


def _common_to_rows(failed: Sequence[Evidence], passed: Sequence[Evidence]) -> str | None:
    """The trait of rows that the wrong ones have, nearly all of them, and the others have not."""
    wrong = [(e.case, _wrong_rows(e)) for e in failed]
    wrong += [(e.case, np.zeros(len(e.case.x), bool)) for e in passed]
    rows = np.concatenate([at for _, at in wrong])
    with_adapter = np.concatenate([adapted(case) for case, _ in wrong])
    if all(
        rows[kind].sum() > NEARLY_ALL * kind.sum() > 0 for kind in (with_adapter, ~with_adapter)
    ):
        return "nearly all rows are wrong, base-only ones as well: y as a whole is changed"
    best, found = NEARLY_ALL, None
    for trait, of_case in ROW_TRAITS.items():
        has = np.concatenate([of_case(case) for case, _ in wrong])
        alike = int((has & rows).sum()) / max(1, int((has | rows).sum()))
        if alike > best:
            best, found = alike, trait
    if found is None:
        return None
    return f"{found} (true of {best:.0%} of the rows that are wrong or of that kind)"


def _wrong_rows(e: Evidence) -> NDArray[np.bool_]:
    wrong = compare.violations(e.actual, e.case.expected, e.case.bound).any(axis=1)
    bits = [a.tobytes() != b.tobytes() for a, b in zip(e.actual, e.case.y, strict=True)]
    return np.asarray(wrong | (np.array(bits, bool) & ~adapted(e.case)))


def _rank_of_rows(case: Workload) -> NDArray[np.int64]:
    """Of each row; -1 without an adapter."""
    ranks = {i: rank_of(case, i) for i in used(case)}
    return np.array([ranks.get(i, -1) for i in case.adapter_ids.tolist()], np.int64)


ROW_TRAITS: dict[str, Callable[[Workload], NDArray[np.bool_]]] = {
    "base-only rows (-1, or None as adapter) are changed": lambda case: ~adapted(case),
    "rows of rank 0 are wrong: is something divided by the rank?": (
        lambda case: _rank_of_rows(case) == 0
    ),
    "rows of a rank below the batch's largest are wrong: garbage past a slot's own rank is read": (
        lambda case: (
            (_rank_of_rows(case) >= 0) & (_rank_of_rows(case) < _rank_of_rows(case).max(initial=0))
        )
    ),
    "rows of a rank above the batch's smallest are wrong: is one rank taken for all?": (
        lambda case: (
            _rank_of_rows(case)
            > np.where(adapted(case), _rank_of_rows(case), 10**9).min(initial=10**9)
        )
    ),
    "every segment's last row is wrong": (
        lambda case: adapted(case) & (places(case)[1] == places(case)[2] - 1)
    ),
    "every segment's first row is wrong": lambda case: adapted(case) & (places(case)[1] == 0),
    "the last segment is wrong": (
        lambda case: adapted(case) & (places(case)[0] == places(case)[0].max(initial=0))
    ),
    "rows beyond the first segment are wrong": lambda case: (
        adapted(case) & (case.adapter_ids != (used(case) or [-1])[0])
    ),
    "rows of ids above 255 are wrong": lambda case: case.adapter_ids > 255,
    "rows of segments of more than one row are wrong": (
        lambda case: adapted(case) & (places(case)[2] > 1)
    ),
}


def _common_to_cases(failed: Sequence[Evidence], passed: Sequence[Evidence]) -> str | None:
    """The trait that all cases that failed have, and no case that passed has."""
    such = {
        trait: len(failed) + sum(of_case(e.case) for e in passed)
        for trait, of_case in CASE_TRAITS.items()
        if all(of_case(e.case) for e in failed)
    }
    trait = min(such, key=lambda trait: such[trait], default="")
    if not such or such[trait] >= 2 * len(failed):
        return None
    if such[trait] > len(failed):
        return f"only where {trait}: in {len(failed)} of {such[trait]} such cases"
    cases = "the one such case" if len(failed) == 1 else f"all {len(failed)} such cases"
    return f"where {trait}: in {cases}, and in no other"


def _holds_nonfinite(*arrays: Any) -> bool:
    return not all(np.isfinite(array).all() for array in arrays)


def _used_weights(case: Workload) -> list[Any]:
    return [weight for i in used(case) for weight in case.adapters[i] or ()]


CASE_TRAITS: dict[str, Callable[[Workload], bool]] = {
    "there is no row": lambda case: len(case.x) == 0,
    "no row has an adapter": lambda case: not used(case),
    "a row is base only by its id -1": lambda case: -1 in case.adapter_ids,
    "a row is base only by a None as adapter": lambda case: any(
        case.adapters.get(i, case) is None for i in case.segment_ids.tolist()
    ),
    "a row is base only": lambda case: not adapted(case).all(),
    "a rank is 0": lambda case: 0 in _rank_of_rows(case),
    "ranks differ": lambda case: len({rank_of(case, i) for i in used(case)}) > 1,
    "8 does not divide a rank": lambda case: any(rank_of(case, i) % 8 for i in used(case)),
    "16 does not divide a rank": lambda case: any(rank_of(case, i) % 16 for i in used(case)),
    "a rank is above 64": lambda case: any(rank_of(case, i) > 64 for i in used(case)),
    "ids are not the places of the adapters": lambda case: (
        list(case.adapters) != list(range(len(case.adapters)))
    ),
    "an adapter has no rows": lambda case: any(i not in used(case) for i in case.adapters),
    "there is more than one adapter": lambda case: len(used(case)) > 1,
    "an id is above 255": lambda case: max(case.adapter_ids, default=0) > 255,
    "a scaling is negative": lambda case: any(case.scalings[i] < 0 for i in used(case)),
    "x is not contiguous": lambda case: not case.x.flags.c_contiguous,
    "x holds NaN or inf": lambda case: _holds_nonfinite(case.x),
    "weights hold NaN or inf": lambda case: _holds_nonfinite(*_used_weights(case)),
    "y holds NaN or inf": lambda case: _holds_nonfinite(case.y),
    "NaN or inf is among the operands": lambda case: _holds_nonfinite(
        case.x, case.y, *(w for pair in case.adapters.values() for w in pair or ())
    ),
    "there are more than 64 rows": lambda case: len(case.x) > 64,
    "a segment has more than 64 rows": lambda case: bool(
        np.diff(case.seq_start).max(initial=0) > 64
    ),
    "8 does not divide h_in": lambda case: case.x.shape[1] % 8 != 0,
    "8 does not divide h_out": lambda case: case.y.shape[1] % 8 != 0,
    "h_in is above 1024": lambda case: case.x.shape[1] > 1024,
    "h_out is above 1024": lambda case: case.y.shape[1] > 1024,
    "the type is float16": lambda case: case.x.dtype.name == "float16",
    "the type is bfloat16": lambda case: case.x.dtype.name == "bfloat16",
    "the type has 16 bits": lambda case: case.x.dtype.itemsize == 2,
    "the type is float64": lambda case: case.x.dtype.name == "float64",
}
