"""Punica's SGMV: published numbers, the split of K, deadlocks, races and overflows."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

import sgmv
from reference import bounds, by_row, compare
from reference.workloads import popularity
from sgmv import emulator
from sgmv.emulator import A100, H100, L4
from tests.help.emulated import HALVES, ids_of, operands, product
from tests.help.planting import Fault, verdict

pytestmark = pytest.mark.once


def test_shared_memory_of_each_rank() -> None:
    sizes = {
        r: emulator.punica_sgmv_shrink([0], 4096, r).shared_memory for r in (16, 32, 64, 96, 128)
    }
    assert sizes == {16: 40960, 32: 49152, 64: 65536, 96: 81920, 128: 98304}
    assert all(size == 8192 * (4 + r // 16) for r, size in sizes.items())


@pytest.mark.parametrize(
    ("device", "r", "resident", "at_4096", "at_11008"),
    [
        # SMs x resident blocks, over 16 chunks at 4096 and 43 at 11008
        (A100, 16, 4, 27, 10),
        (A100, 64, 2, 13, 5),
        (H100, 16, 5, 41, 15),
        (H100, 64, 3, 24, 9),
        (L4, 16, 2, 7, 2),
        (L4, 64, 1, 3, 1),
    ],
)
def test_the_split_k_cliff(
    device: emulator.Device, r: int, resident: int, at_4096: int, at_11008: int
) -> None:
    for h_in, most in ((4096, at_4096), (11008, at_11008)):
        chunks = math.ceil(h_in / 256)
        last = emulator.punica_sgmv_shrink(range(most), h_in, r, device)
        past = emulator.punica_sgmv_shrink(range(most + 1), h_in, r, device)
        assert last.split_k_segments == past.split_k_segments == most
        assert last.resident_blocks == resident
        assert last.capacity == device.sms * resident
        assert (last.cooperative, last.split_k, last.chunk) == (True, chunks, 256)
        assert (past.cooperative, past.split_k, past.chunk) == (False, 1, h_in)
        assert past.grid == (1, most + 1, 1)
        assert past.tmp == max(work.barriers for work in past.work) == 0


def test_k_is_never_split_from_rank_64_on_unless_more_than_48_kib_count() -> None:
    for r in (16, 32, 64, 96, 128):
        launch = emulator.punica_sgmv_shrink([0, 1, 1], 4096, r, H100, opted_in=False)
        assert launch.cooperative == (launch.split_k_segments > 0) == (r < 64)
        assert launch.resident_blocks > 0


def test_punicas_two_launches_lie_within_the_bound_for_vs_rounding(
    rng: np.random.Generator,
) -> None:
    """|y - exact| <= what expand may add, for the v that it got, + |B| times what v may err by."""
    ids, dtype = popularity("skewed", 40), HALVES[0]
    shrink = emulator.punica_sgmv_shrink(ids, 64, 16)
    expand = emulator.punica_cutlass_expand(ids, 16, 256)
    x, A = operands(rng, shrink)
    _, B = operands(rng, expand)
    y = rng.standard_normal((40, 256)).astype(dtype)
    v = shrink.run(x, A).out
    out = expand.run(v, B, y).out
    _, of_expand = product(v, B, ids, y, 1.0, dtype)
    _, of_v = product(x, A, ids, np.zeros((40, 16), np.float32), 1.0, dtype)
    through_B = np.stack([e @ np.abs(B[i].astype(float)).T for e, i in zip(of_v, ids, strict=True)])
    exact = by_row.add_lora(y, x, {i: (A[i], B[i]) for i in A}, ids)
    compare.check(out, exact, of_expand + through_B)
    # And v is to blame: no later rounding takes part here, yet a float32 v's bound is too tight.
    deltas = by_row.add_lora(0.0 * y, x, {i: (A[i], B[i]) for i in A}, ids)
    of_single_v = bounds.add_lora_bound(
        0.0 * y, x, {i: (A[i], B[i]) for i in A}, ids, out=np.float32
    )
    from_half_v = np.stack([v[i].astype(float) @ B[a].T.astype(float) for i, a in enumerate(ids)])
    assert compare.violations(from_half_v, deltas, of_single_v).mean() > 0.5


def test_k_not_split_is_another_order_of_summation(rng: np.random.Generator) -> None:
    """The cliff shows in a row's bits: the same row, in a batch of one segment more."""
    tiny = emulator.Device("tiny", 1, 164 << 10, 163 << 10, 32, 2048, 10**12, 10**14)
    few = emulator.punica_sgmv_shrink([0, 1], 512, 16, tiny)
    more = emulator.punica_sgmv_shrink([0, 1, 2], 512, 16, tiny)
    assert (few.cooperative, more.cooperative) == (True, False)
    x, w = np.ones((3, 512), np.float16), np.full((16, 512), 1 / 32, np.float16)
    x[:, 0], x[:, 256], w[:, ::256] = 32768, -32768, 512  # 2**24, taken back after 256 products
    A = dict.fromkeys(range(3), w)
    # Beside 2**24 steps of 16 / 32 vanish: split, all of them do; else the second chunk's stay.
    split, whole = few.run(x[:2], A).out[0, 0], more.run(x, A).out[0, 0]
    assert (split, round(float(whole))) == (0, 8)


def test_1_and_132_rows_hang_and_the_fix_does_not(rng: np.random.Generator) -> None:
    ids = ids_of([1, 132])
    before = emulator.punica_sgmv_shrink(ids, 512, 16, release="1.0.0")
    after = emulator.punica_sgmv_shrink(ids, 512, 16, release="1.1.0")
    x, A = operands(rng, before)
    with pytest.raises(emulator.DeadlockError) as raised:
        before.run(x, A)
    report = raised.value.deadlock
    assert report == before.deadlock
    assert report.barrier == 2
    assert report.waiting == ((0, 1, 0), (1, 1, 0))
    assert report.returned == ((0, 0, 0), (1, 0, 0))
    assert "blocks (0..1, 1, 0) wait at grid barrier 2 for blocks (0..1, 0, 0)" in str(report)
    assert str(report) in before.faults
    assert after.deadlock is None
    assert after.run(x, A).barriers == 3


def test_it_is_the_steps_that_differ_not_the_rows(rng: np.random.Generator) -> None:
    """64 and 65 rows hang, one row apart; 1 and 64 do not."""
    for lengths, hangs in (([64, 65], True), ([1, 64], False), ([64, 128, 64], True)):
        launch = emulator.punica_sgmv_shrink(ids_of(lengths), 512, 16, release="1.0.0")
        assert (launch.deadlock is not None) == hangs
    lonely = emulator.punica_sgmv_shrink(ids_of([132]), 512, 16, release="1.0.0")
    assert lonely.deadlock is None


def test_an_empty_segment_hangs_the_old_release(rng: np.random.Generator) -> None:
    segments = sgmv.Segments([0, 1], [0, 0, 2], [3, 4])
    old = emulator.punica_sgmv_shrink(segments, 512, 16, release="1.0.0")
    assert old.deadlock is not None
    assert old.deadlock.barrier == 1
    assert old.early_exits == 2
    new = emulator.punica_sgmv_shrink(segments, 512, 16)
    x, A = operands(rng, new)
    assert new.run(x, A).barriers == 1
    with pytest.raises(emulator.DeadlockError):
        old.run(x, A)


@pytest.mark.oracle
def test_deadlock_and_race_in_1000_random_batches(rng: np.random.Generator) -> None:
    """Found where they are, and nowhere else: predicted, executed and as a loop would tell them."""
    toy = emulator.Device("toy", 3, 164 << 10, 163 << 10, 32, 2048, 10**12, 10**14)  # 12 blocks
    seen: Counter[tuple[bool, bool]] = Counter()
    all_x = rng.standard_normal((7 * 160, 640)).astype(np.float16)
    all_A = rng.standard_normal((7, 16, 640)).astype(np.float16)
    for _ in range(1000):
        lengths = np.floor(1.5 ** rng.uniform(0, 12.5, rng.integers(1, 8))).astype(int)
        h_in = int(rng.choice([128, 256, 512, 640]))
        release = str(rng.choice(["1.0.0", "1.1.0"]))
        ids = ids_of(lengths.tolist())
        launch = emulator.punica_sgmv_shrink(ids, h_in, 16, toy, release)

        chunks = math.ceil(h_in / 256)
        steps = {math.ceil(length / 64) for length in lengths}
        split = chunks * len(lengths) <= 12
        hangs = split and release == "1.0.0" and len(steps) > 1
        races = split and chunks > 1 and max(steps) > 1
        assert launch.cooperative == split
        assert (launch.deadlock is not None) == hangs
        assert launch.race == races
        assert launch.figures()["deterministic"] != races
        seen[hangs, races] += 1

        x, A = all_x[: len(ids), :h_in], dict(enumerate(all_A[:, :, :h_in]))
        seed = int(rng.integers(1 << 30))
        if hangs:
            with pytest.raises(emulator.DeadlockError) as raised:
                launch.run(x, A, order="random", seed=seed)
            assert raised.value.deadlock == launch.deadlock
            continue
        result = launch.run(x, A, order="random", seed=seed)
        assert result.barriers == (max(steps) if split else 0)
        assert bool(result.races) == races
        in_order = launch.run(x, A).out
        assert in_order.tobytes() == result.out.tobytes() or races
        assert (launch.run(x, A, order="reversed").out.tobytes() != in_order.tobytes()) == races
    assert min(seen[key] for key in ((False, False), (True, True), (False, True))) > 50, seen


def test_the_race_gives_wrong_rows(rng: np.random.Generator) -> None:
    """Block 0 adds what chunk 1 wrote for the next 64 rows to its own sums of these."""
    ids = [0] * 70
    launch = emulator.punica_sgmv_shrink(ids, 512, 16)
    x, A = operands(rng, launch)
    expected, bound = product(x, A, ids, np.zeros((70, 16), np.float32), 1.0, x.dtype)
    right, wrong = launch.run(x, A), launch.run(x, A, order="reversed")
    compare.check(right.out, expected, bound)
    assert set(np.flatnonzero(compare.violations(wrong.out, expected, bound).any(1))) == set(
        range(64)
    )
    assert {writer != reader for _, writer, reader in right.races} == {True}
    assert any("race" in fault for fault in launch.faults)


def test_tmp_overflows_on_the_h100_at_rank_128() -> None:
    """6 segments of 43 chunks fit its 264 blocks; their sums take 258 x 32 KiB of 8 MiB."""
    fits = emulator.punica_sgmv_shrink(range(16), 4096, 128, H100)
    over = emulator.punica_sgmv_shrink(range(6), 11008, 128, H100)
    assert (fits.tmp, over.tmp) == (8 << 20, 258 * 64 * 128 * 4)
    assert not fits.faults
    assert over.cooperative
    assert over.faults == (f"overflow: tmp takes {over.tmp} bytes of 8388608",)


def test_no_rank_overflows_tmp_on_the_a100() -> None:
    for r in (16, 32, 64, 96, 128):
        full = A100.sms * A100.resident_blocks(128, 8192 * (4 + r // 16))
        assert full * 64 * r * 4 <= 8 << 20


def test_offsets_that_wrap() -> None:
    segments = sgmv.segment(np.zeros(390_171, np.int64))
    assert not emulator.punica_sgmv_shrink(segments, 11000, 16).faults[1:]
    assert "2**32" in emulator.punica_sgmv_shrink(segments, 11008, 16).faults[-1]


FAULTS = {
    "the fix is left out": (
        Fault("emulator.punica", "range(steps, self.work[s].barriers)", "range(0)"),
        "deadlock",
    ),
    "a barrier opens for those that are there": (
        Fault("emulator.blocks", "if len(waiting) < len(blocks):", "if False:"),
        "no deadlock",
    ),
    "tmp is never written": (
        Fault("emulator.punica", "self.split_k + c] = sums", "self.split_k + c] = 0 * sums"),
        "wrong",
    ),
    "the last chunk is not added": (
        Fault("emulator.punica", "(s + 1) * self.split_k):", "(s + 1) * self.split_k - 1):"),
        "wrong",
    ),
    "every chunk starts from y": (
        Fault("emulator.punica", "memory.out[at] if c == 0 else memory.out[:0]", "memory.out[at]"),
        "wrong",
    ),
    "a second barrier after the reduction": (
        Fault(
            "emulator.punica",
            "                    sums += memory.tmp[slot]\n",
            "                    sums += memory.tmp[slot]\n                yield BARRIER\n",
        ),
        "no race",
    ),
    "the last product of each step is dropped": (
        Fault("emulator.run", "a[:, k : k + step] @ b[:, k : k + step].T",
              "a[:, k : k + step - 1] @ b[:, k : k + step - 1].T"),
        "wrong",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, rng: np.random.Generator) -> None:
    fault, sign = FAULTS[name]
    # Equal steps where barriers are doubled: else the last ones, not doubled, would hang.
    ids = ids_of([66, 70] if sign == "no race" else [1, 70])
    x = rng.standard_normal((len(ids), 512)).astype(np.float16)
    A = {i: rng.standard_normal((16, 512)).astype(np.float16) for i in (0, 1)}
    y = rng.standard_normal((len(ids), 16)).astype(np.float16)

    def check(modules: dict[str, Any]) -> None:
        assert sign not in signs(modules["sgmv.emulator"], ids, x, A, y), f"told: {sign}"

    assert f"told: {sign}" in verdict(check, fault, name="sgmv.emulator")
    assert verdict(check, name="sgmv.emulator") == "nothing"


def signs(room: Any, ids: list[int], x: Any, A: dict[int, Any], y: Any) -> set[str]:
    """What this emulator says of a batch that hung the old release, and races in the new one."""
    found = set()
    old = room.punica_sgmv_shrink(ids, 512, 16, release="1.0.0")
    new = room.punica_sgmv_shrink(ids, 512, 16)
    try:
        old.run(x, A, y)
        found.add("no deadlock")
    except room.DeadlockError:
        pass
    try:
        result = new.run(x, A, y)
    except room.DeadlockError:
        return found | {"deadlock"}
    found |= set() if result.races else {"no race"}
    if compare.violations(result.out, *product(x, A, ids, y, 1.0, x.dtype)).any():
        found.add("wrong")
    return found
