"""How threads meet over a call: a gate that the caller opens, and helpers who come in.

    caller                                   helper, forever
    opens the gate, wakes sleepers           waits at the gate: spinning, then asleep
    runs tasks of shrink                     comes in, runs tasks of shrink
    waits until all of them are done         waits until all of them are done
    runs tasks of expand                     runs tasks of expand
    shuts the gate, waits till all are out   goes out

The caller never waits for a helper that has not come in: it finds the gate shut. One wake serves
both phases. Helpers hold no GIL, so a busy interpreter does not delay them.

Where torch made the call's arrays, the helpers are the OpenMP team that torch computed them with.
A thread of that team spins for some milliseconds after each product: a helper of ours, woken onto
its core, would have to wait for it. All of a team come to every parallel region and leave together.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sgmv.kernels.atomics import (
    add_atomic,
    load_atomic,
    parallel,
    pause,
    store_atomic,
    system_call,
)
from sgmv.kernels.call import (
    BLOCK_COUNT,
    EXPAND,
    EXPAND_CUTS,
    EXPAND_NEXT,
    FIELDS,
    INTEGER,
    LIMIT,
    MEMBERS,
    SHRINK,
    SHRINK_CUTS,
    SHRINK_DONE,
    SHRINK_NEXT,
    THREADS,
)
from sgmv.kernels.jit import enter, jit, vector
from sgmv.kernels.modes import DEFAULT, set_mode

# The pool's int64s, each on a cache line of its own. GATE is SHUT, or the number of the call that
# stands in CALL, where no number comes twice, or CLOSED for good. TEAM is GOMP_parallel's address,
# or 0, and MEMBER that of `member`.
GATE, INSIDE, SLEEPERS, CALL, NUMBER, TEAM, MEMBER = range(0, 56, 8)
# Linux's, or 0: the address of libc's syscall(2), and the numbers of four system calls.
SYSCALL, FUTEX, GETCPU, SETAFFINITY, GETTID = range(56, 61)
# The caller's core, now and when helpers were last told to keep off it; how many helpers there are;
# the addresses of their thread ids, of the cores that they may use, one bit each, and of scratch.
CPU, KEPT_CLEAR, HELPERS, THREAD_IDS, CPUS, MASK = range(64, 70)
CPU_WORDS = 16  # int64s: 1,024 cores, as many as libc's own set of them has
POOL_FIELDS = 72
SHUT, CLOSED = 0, -1
WAIT_PRIVATE, WAKE_PRIVATE = 128, 129
# Turns at the gate before a helper falls asleep, some 100 us: the next call of a loop finds it
# awake, and a server's base product, which takes longer, gets the core back.
SPINS = 4000
EVERY_TASK = 1 << 62


@jit()
def take_part(call: int, limit: int) -> None:
    """Run tasks of both phases, at most `limit` of each, in the one floating-point mode."""
    mode = set_mode(DEFAULT)
    run_tasks(call, limit)
    set_mode(mode)


@jit()
def run_tasks(call: int, limit: int) -> None:
    """`take_part`, in whatever mode."""
    fields = vector(call, FIELDS, INTEGER)
    if fields[SHRINK] != 0:
        tasks = fields[BLOCK_COUNT] * fields[SHRINK_CUTS]
        enter(fields[SHRINK], call, limit)
        if load_atomic(call + 8 * SHRINK_NEXT) < tasks:
            return
        while load_atomic(call + 8 * SHRINK_DONE) < tasks:
            pause()
    if fields[EXPAND] != 0:
        enter(fields[EXPAND], call, limit)


@jit()
def all_begun(call: int) -> Any:
    """Whether no task is left that nobody has begun."""
    fields = vector(call, FIELDS, INTEGER)
    if fields[EXPAND] != 0:
        return load_atomic(call + 8 * EXPAND_NEXT) >= fields[BLOCK_COUNT] * fields[EXPAND_CUTS]
    return load_atomic(call + 8 * SHRINK_NEXT) >= fields[BLOCK_COUNT] * fields[SHRINK_CUTS]


@jit()
def abandon(call: int) -> None:
    """Leave the tasks that nobody has begun undone."""
    for counter in (SHRINK_NEXT, SHRINK_DONE, EXPAND_NEXT):
        store_atomic(call + 8 * counter, EVERY_TASK)


@jit()
def open_gate(pool: int, call: int) -> None:
    """Let helpers in, and wake those asleep."""
    store_atomic(pool + 8 * CALL, call)
    store_atomic(pool + 8 * GATE, add_atomic(pool + 8 * NUMBER, 1) + 1)
    wake(pool)


@jit()
def wake(pool: int) -> None:
    """Wake all who sleep on the futex."""
    syscall, sleepers = load_atomic(pool + 8 * SYSCALL), load_atomic(pool + 8 * SLEEPERS)
    if syscall != 0 and sleepers > 0:
        keep_clear(pool)
        futex = load_atomic(pool + 8 * FUTEX)
        system_call(syscall, futex, pool + 8 * GATE, WAKE_PRIVATE, sleepers)


@jit()
def keep_clear(pool: int) -> None:
    """Have the helpers keep off the caller's core.

    The threads of numpy's BLAS spin on all other cores after a product. Linux then saw no reason to
    wake a helper anywhere but here, where caller and helper took turns: 0.80 ms where two cores
    take 0.42 (16 rows of a 4096 x 4096 layer after their base product, EPYC Zen 4).
    """
    fields = vector(pool, POOL_FIELDS, INTEGER)
    system_call(fields[SYSCALL], fields[GETCPU], pool + 8 * CPU, 0, 0)
    cpu = load_atomic(pool + 8 * CPU)
    if cpu == fields[KEPT_CLEAR]:
        return
    fields[KEPT_CLEAR] = cpu
    mask = vector(fields[MASK], CPU_WORDS, INTEGER)
    allowed = vector(fields[CPUS], CPU_WORDS, INTEGER)
    for word in range(CPU_WORDS):
        mask[word] = allowed[word]
    if cpu < 64 * CPU_WORDS:
        mask[cpu // 64] &= ~(np.int64(1) << np.int64(cpu % 64))
    threads = vector(fields[THREAD_IDS], fields[HELPERS], INTEGER)
    for i in range(fields[HELPERS]):  # where no other core is left, this changes nothing
        system_call(fields[SYSCALL], fields[SETAFFINITY], threads[i], 8 * CPU_WORDS, fields[MASK])


@jit()
def shut_gate(pool: int) -> None:
    """Let no helper in any more, and wait for those inside."""
    store_atomic(pool + 8 * GATE, SHUT)
    while load_atomic(pool + 8 * INSIDE) > 0:
        pause()


@jit()
def fork_join(pool: int, call: int) -> Any:
    """Run tasks on all threads of the team, if the pool is one; returns whether it is."""
    fields = vector(pool, POOL_FIELDS, INTEGER)
    if fields[TEAM] == 0:
        return False
    store_atomic(call + 8 * MEMBERS, 0)
    parallel(fields[TEAM], fields[MEMBER], call)
    return True


def member(call: int) -> None:
    """What each thread of a team does: its part, unless enough threads do theirs already."""
    fields = vector(call, FIELDS, INTEGER)
    if add_atomic(call + 8 * MEMBERS, 1) < fields[THREADS]:
        take_part(call, fields[LIMIT])


@jit()
def close_gate(pool: int) -> None:
    """Send all helpers home, for good."""
    store_atomic(pool + 8 * GATE, CLOSED)
    wake(pool)


def life(seat: int) -> None:
    """What a native thread runs: it stores its id, then helps until the gate is closed.

    seat  the address of int64s: the pool's address, the helper's index, room for the thread's id
    """
    given = vector(seat, 3, INTEGER)
    fields = vector(given[0], POOL_FIELDS, INTEGER)
    store_atomic(seat + 16, system_call(fields[SYSCALL], fields[GETTID], 0, 0, 0))
    help_out(given[0], given[1], 0)


@jit()
def help_out(pool: int, index: int, served: int) -> Any:
    """A helper's life: take part in every call but the `served` one, until the gate is closed.

    Returns CLOSED then; and, where there is no futex to sleep on, the last call served.
    """
    while True:
        gate = load_atomic(pool + 8 * GATE)
        spins = 0
        while gate in (SHUT, served) and spins < SPINS:
            pause()
            spins += 1
            gate = load_atomic(pool + 8 * GATE)
        if gate == CLOSED:
            return gate
        if gate in (SHUT, served):
            syscall = load_atomic(pool + 8 * SYSCALL)
            if syscall == 0:
                return served
            add_atomic(pool + 8 * SLEEPERS, 1)
            futex = load_atomic(pool + 8 * FUTEX)
            system_call(syscall, futex, pool + 8 * GATE, WAIT_PRIVATE, gate)
            add_atomic(pool + 8 * SLEEPERS, -1)
            continue
        add_atomic(pool + 8 * INSIDE, 1)
        if load_atomic(pool + 8 * GATE) == gate:
            call = load_atomic(pool + 8 * CALL)
            if index < vector(call, FIELDS, INTEGER)[THREADS] - 1:
                take_part(call, EVERY_TASK)
        add_atomic(pool + 8 * INSIDE, -1)
        served = gate
