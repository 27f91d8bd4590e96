"""How threads meet over a call: a gate that the caller opens, and helpers that come in.

    caller                                   helper, forever
    opens the gate, wakes sleepers           waits at the gate: spinning, then asleep
    runs tasks of shrink                     comes in, runs tasks of shrink
    waits until all of them are done         waits until all of them are done
    runs tasks of expand                     runs tasks of expand
    shuts the gate, waits till all are out   goes out

The caller never waits for a helper that has not come in: it finds the gate shut. One wake serves
both phases. Helpers hold no GIL, so a busy interpreter does not delay them. They are one caller's
at a time; another one runs alone.

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
from sgmv.kernels.jit import jit, record, vector
from sgmv.kernels.records import CALL, CPU_WORDS, INTEGER, POOL, SEAT, offset
from sgmv.kernels.tasks import EVERY_TASK, take_part

GATE, INSIDE, SLEEPERS, NUMBER = (
    offset(POOL, field) for field in ("gate", "inside", "sleepers", "number")
)
THE_CALL, CPU, MEMBERS = offset(POOL, "call"), offset(POOL, "cpu"), offset(CALL, "members")
ASKED = offset(POOL, "asked")
THREAD_ID = offset(SEAT, "thread_id")
SHUT, CLOSED = 0, -1
WAIT_PRIVATE, WAKE_PRIVATE = 128, 129
# Turns at the gate before a helper falls asleep, some 100 us: the next call of a loop finds it
# awake, and a server's base product, which takes longer, gets the core back.
SPINS = 4000


@jit()
def take_helpers(address: int) -> Any:
    """Whether the helpers are the caller's now, until it calls `free_helpers`."""
    return add_atomic(address + ASKED, 1) == 0


@jit()
def free_helpers(address: int) -> None:
    """The helpers are free for another caller."""
    store_atomic(address + ASKED, 0)


@jit()
def open_gate(address: int, call: int) -> None:
    """Let helpers in, and wake those asleep."""
    store_atomic(address + THE_CALL, call)
    store_atomic(address + GATE, add_atomic(address + NUMBER, 1) + 1)
    wake(address)


@jit()
def has_bell(address: int) -> Any:
    """Whether helpers sleep where Python has to wake them, once the gate is open."""
    pool = record(POOL, address)
    return pool.syscall == 0 and pool.team == 0


@jit()
def wake(address: int) -> None:
    """Wake all helpers that sleep on the futex."""
    pool = record(POOL, address)
    sleepers = load_atomic(address + SLEEPERS)
    if pool.syscall != 0 and sleepers > 0:
        keep_clear(address)
        system_call(pool.syscall, pool.futex, address + GATE, WAKE_PRIVATE, sleepers)


@jit()
def keep_clear(address: int) -> None:
    """Have the helpers keep off the caller's core.

    The threads of numpy's BLAS spin on all other cores after a product. Linux then saw no reason to
    wake a helper anywhere but here, where caller and helper took turns: 0.80 ms where two cores
    take 0.42 (16 rows of a 4096 x 4096 layer after their base product, EPYC Zen 4).
    """
    pool = record(POOL, address)
    system_call(pool.syscall, pool.getcpu, address + CPU, 0, 0)
    cpu = load_atomic(address + CPU)
    if cpu == pool.kept_clear:
        return
    pool.kept_clear = cpu
    mask = vector(pool.mask, CPU_WORDS, INTEGER)
    allowed = vector(pool.cpus, CPU_WORDS, INTEGER)
    for word in range(CPU_WORDS):
        mask[word] = allowed[word]
    if cpu < 64 * CPU_WORDS:
        mask[cpu // 64] &= ~(np.int64(1) << np.int64(cpu % 64))
    threads = vector(pool.thread_ids, pool.helpers, INTEGER)
    for i in range(pool.helpers):  # where no other core is left, this changes nothing
        system_call(pool.syscall, pool.setaffinity, threads[i], 8 * CPU_WORDS, pool.mask)


@jit()
def shut_gate(address: int) -> None:
    """Let no helper in any more, and wait for those inside."""
    store_atomic(address + GATE, SHUT)
    while load_atomic(address + INSIDE) > 0:
        pause()


@jit()
def fork_join(address: int, call: int) -> Any:
    """Run tasks on all threads of the team, if the pool is one; returns whether it is."""
    pool = record(POOL, address)
    if pool.team == 0:
        return False
    store_atomic(call + MEMBERS, 0)
    parallel(pool.team, pool.member, call)
    return True


def member(address: int) -> None:
    """What each thread of a team does: its part, unless enough threads do theirs already."""
    call = record(CALL, address)
    if add_atomic(address + MEMBERS, 1) < call.threads:
        take_part(address, call.limit)


@jit()
def close_gate(address: int) -> None:
    """Send all helpers home, for good."""
    store_atomic(address + GATE, CLOSED)
    wake(address)


def life(address: int) -> None:
    """What a native thread runs in its SEAT: it writes its id, then helps until the gate closes."""
    seat = record(SEAT, address)
    pool = record(POOL, seat.pool)
    thread_id = system_call(pool.syscall, pool.gettid, 0, 0, 0)
    store_atomic(address + THREAD_ID, thread_id)
    help_out(seat.pool, seat.index, 0)


@jit()
def help_out(address: int, index: int, served: int) -> Any:
    """A helper's life: take part in every call but the `served` one, until the gate is closed.

    Returns CLOSED then; and, where there is no futex to sleep on, the last call served.
    """
    pool = record(POOL, address)
    while True:
        gate = load_atomic(address + GATE)
        spins = 0
        while gate in (SHUT, served) and spins < SPINS:
            pause()
            spins += 1
            gate = load_atomic(address + GATE)
        if gate == CLOSED:
            return gate
        if gate in (SHUT, served):
            if pool.syscall == 0:
                return served
            add_atomic(address + SLEEPERS, 1)
            system_call(pool.syscall, pool.futex, address + GATE, WAIT_PRIVATE, gate)
            add_atomic(address + SLEEPERS, -1)
            continue
        add_atomic(address + INSIDE, 1)
        if load_atomic(address + GATE) == gate:
            call = load_atomic(address + THE_CALL)
            if index < record(CALL, call).threads - 1:
                take_part(call, EVERY_TASK)
        add_atomic(address + INSIDE, -1)
        served = gate
