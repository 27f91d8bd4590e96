"""Random sequences of public calls: `python -m tests.stress.fuzz --minutes 10 --seed 0`.

A sequence is some calls on things that live through it: a layer's stack, a wrapper of vLLM's, a
server with its scheduler; and calls of tests/help/surface.py, most with hostile arguments. Valid
calls must give what the reference gives; a refusal is the library's own error and has changed
nothing; no call may end the process or take longer than the limit. Sequences run in child
processes, so that one that dies is seen. A failure is printed as seed, index and the steps that it
needs:

    python -m tests.stress.fuzz --seed 0 --index 17 --steps 2,5

`--inject` patches some children with gevent, forks in the midst of sequences, and damages the files
of a kernel cache of its own meanwhile.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if "--gevent" in sys.argv and __name__ == "__main__":
    from gevent import monkey

    monkey.patch_all()

import numpy as np

import reference
import sgmv
from sgmv import launch, layouts
from sgmv.compat import punica, vllm
from sgmv.emulator import DeadlockError
from sgmv.errors import SgmvError
from sgmv.serving import AdapterSlots, LoRARequest, Scheduler, next_step
from tests.help import surface
from tests.help.acceptance import assert_same_bits, backends
from tests.help.surface import CALLS
from tests.stress import batches
from tests.stress.batches import Layer

MOST_STEPS = 12
SECONDS_PER_CHILD = 15.0
ROOM = 3 << 30  # bytes beyond what a child has: what asks for more gets none
FAILED, HUNG = 3, 4  # statuses of a child
DOCUMENTED = (SgmvError, DeadlockError)
Rng = np.random.Generator


def attempt(call: Callable[..., Any], arguments: dict[str, Any]) -> bool:
    """Whether the call was taken; a refusal must be documented, and have changed nothing."""
    before = repr((surface.state(arguments), surface.state(surface.owner(call))))
    refusal = None
    try:
        call(**arguments)
    except DOCUMENTED as error:
        refusal = error
    after = repr((surface.state(arguments), surface.state(surface.owner(call))))
    assert refusal is None or before == after, f"changed before it was refused: {refusal}"
    return refusal is None


@functools.cache
def how_many(name: str, argument: str) -> int:
    return sum(1 for _ in surface.variants(argument, CALLS[name]()[1][argument]))


def varied(rng: Rng, argument: str, value: Any, count: int) -> surface.Variant:
    return next(itertools.islice(surface.variants(argument, value), int(rng.integers(count)), None))


def hostile(rng: Rng, call: Callable[..., Any], arguments: dict[str, Any]) -> bool:
    """The call with one of its arguments spoilt; those that it may write to are copies."""
    spoilt = {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    argument = str(rng.choice(list(spoilt)))
    every = list(surface.variants(argument, spoilt[argument]))
    spoilt[argument] = every[rng.integers(len(every))].value
    return attempt(call, spoilt)


class Server:
    """Adapter 8 cannot be read, 9 has other widths, 10 holds NaN; the others are whole numbers."""

    WIDTHS = 6, 7

    def __init__(self) -> None:
        self.slots = AdapterSlots(2, 4, 8, modules={"up": self.WIDTHS}, read=self.read)
        self.scheduler: Scheduler[int] = Scheduler(2, 4, 3)
        self.came = 0
        self.asked: dict[int, int] = {}

    @staticmethod
    def weights(number: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(number)
        h_in, h_out = Server.WIDTHS
        A, B = (rng.integers(-3, 4, shape).astype(np.float32) for shape in ((3, h_in), (h_out, 3)))
        if number == 10:
            A[0, 0] = np.nan
        return A, B

    def read(self, path: str) -> dict[str, sgmv.Adapter]:
        number = int(path)
        if number == 8:
            raise OSError("no such adapter")
        A, B = self.weights(number)
        return {"up": sgmv.Adapter(A[:, :5] if number == 9 else A, B, 0.5)}

    def run(self, rng: Rng) -> None:
        """Requests come, a step runs, and some requests go."""
        for _ in range(rng.integers(3)):
            number = int(rng.integers(0, 11))
            lora = LoRARequest(f"adapter {number}", number, str(number)) if number else None
            self.scheduler.add(self.came, lora)
            self.asked[self.came] = number
            self.came += 1
        tokens = {i: int(rng.integers(0, 4)) for i in self.asked}
        step = next_step(self.scheduler, self.slots, tokens)
        for request_id, _, _ in step.failed:
            assert self.asked.pop(request_id) in (8, 9)
        x, y = (rng.integers(-3, 4, (step.n, h)).astype(np.float32) for h in self.WIDTHS)
        ids = np.full(step.n, -1)
        for request_id, rows in step.rows.items():
            ids[rows] = self.asked[request_id] or -1
        if rng.random() < 0.3:
            hostile(rng, step.add_lora, {"module": "up", "y": y, "x": x})
        got = step.add_lora("up", y.copy(), x)
        held = {i: self.weights(i) for i in set(ids.tolist()) - {-1}}
        with np.errstate(invalid="ignore"):
            right = reference.add_lora(y, x, held, ids, dict.fromkeys(held, 0.5))
        np.testing.assert_array_equal(got, right)
        for request_id in list(step.rows):
            if rng.random() < 0.4:
                self.scheduler.finish(request_id)
                del self.asked[request_id]


class World:
    """What the calls of one sequence share."""

    def __init__(self, seed: int, index: int) -> None:
        self.seed = seed, index
        self.rng = np.random.default_rng(self.seed)
        self.things: dict[str, Any] = {}
        self.counts: Counter[str] = Counter()
        self.plan = self.rng.choice(list(STEPS), int(self.rng.integers(2, MOST_STEPS + 1)))

    def step(self, number: int) -> None:
        """One step; it draws the same whichever steps are left out."""
        self.rng = np.random.default_rng((*self.seed, 1 + number))
        name = str(self.plan[number])
        STEPS[name](self)
        self.counts[name] += 1

    def layer(self) -> Layer:
        if "layer" not in self.things:
            self.things["layer"] = Layer(np.random.default_rng((*self.seed, 0)))
        layer: Layer = self.things["layer"]
        layer.rng = self.rng
        return layer

    def any_call(self) -> None:
        rng = self.rng
        name = str(rng.choice(list(CALLS)))
        call, arguments = CALLS[name]()
        for argument in rng.permutation(list(arguments))[: rng.integers(0, 4)]:
            count = how_many(name, argument)
            arguments[argument] = varied(rng, argument, arguments[argument], count).value
        try:
            attempt(call, arguments)
        except BaseException as error:
            shown = {k: surface.shown(v) for k, v in arguments.items()}
            raise AssertionError(f"{name} with {shown}: {error!r}") from error
        finally:
            sgmv.set_num_threads(2)  # 2**31 would have each later call ask for as many

    def core(self) -> None:
        rng, layer = self.rng, self.layer()
        case = layer.batch("core")
        ids, stack = case.adapter_ids, layer.stack
        types = case.x.dtype, layer.dtype, case.y.dtype
        backend = str(rng.choice(backends(*types)))
        sgmv.set_num_threads(int(rng.integers(1, 4)))
        arguments = {"y": case.y, "x": case.x, "stack": stack, "adapter_ids": ids}
        if rng.random() < 0.5:
            hostile(rng, sgmv.add_lora, arguments)
        if rng.random() < 0.3:
            hostile(rng, sgmv.segment, {"adapter_ids": ids.tolist()})
        y = case.y.copy(order="K")
        if rng.random() < 0.3:
            segments = sgmv.segment(ids)
            v = sgmv.shrink(case.x, stack, segments, backend=backend)
            if v.dtype == np.float32 or case.y.dtype == np.float64:
                sgmv.expand(v, stack, segments, y)
                case.check(y)
            return
        case.check(sgmv.add_lora(y, case.x, stack, ids, backend=backend))
        if len(ids):
            one = slice(0, 1)
            alone = sgmv.add_lora(case.y[one].copy(), case.x[one], stack, ids[one], backend=backend)
            assert_same_bits(alone, np.ascontiguousarray(y[one]), "alone")

    def load(self) -> None:
        self.layer().load()

    def unload(self) -> None:
        self.layer().unload()

    def batched(self) -> None:
        rng = self.rng
        n, h_in, h_out = (int(rng.integers(1, 40)) for _ in range(3))
        adapters = {i: (self.whole(2, h_in), self.whole(h_out, 2)) for i in (0, 5)}
        x, W, ids = self.whole(n, h_in), self.whole(h_out, h_in), rng.choice([-1, 0, 5], n)
        got = sgmv.apply_batched(x, W, adapters, ids, 0.5)
        right = reference.apply_batched(x, W, adapters, ids, {0: 0.5, 5: 0.5})
        np.testing.assert_array_equal(got, right)

    def whole(self, *shape: int) -> np.ndarray:
        return self.rng.integers(-3, 4, shape).astype(np.float32)

    def layout(self) -> None:
        rng = self.rng
        ids = rng.choice([-1, 0, 1, 2, 5], int(rng.integers(0, 30)))
        slots = dict(zip((0, 1, 2, 5), rng.permutation(6)[:4].tolist(), strict=True))
        n = len(ids)
        stack = sgmv.AdapterStack.from_adapters(
            {i: (self.whole(2, 3), self.whole(4, 2)) for i in slots}
        )
        made: list[tuple[Any, tuple[Any, ...]]] = [
            (layouts.vllm_v0(ids, slots, sort=bool(rng.integers(2))), (slots,)),
            (layouts.vllm_v1(ids, 6, slots), (slots,)),
            (layouts.flashinfer(ids, slots), (n, slots)),
            (layouts.lorax(ids, 16), ()),
            (layouts.llamacpp(ids, slots=slots), (slots,)),
            (layouts.peft(ids), ()),
            (layouts.punica(ids, stack), (n, stack)),
            (layouts.sglang(ids, stack), (stack,)),
        ]
        layout, back = made[rng.integers(len(made))]
        np.testing.assert_array_equal(layout.adapter_ids(*back), ids)
        known = stack if stack in back else slots
        assert layouts.check(layout, ids, slots=known) == []
        metadata = surface.raw(layout)
        for field in rng.permutation(list(metadata))[: rng.integers(1, 3)]:
            every = list(surface.variants(field, metadata[field]))
            metadata[field] = every[rng.integers(len(every))].value
        attempt(layouts.check, {"metadata": metadata, "adapter_ids": ids, "slots": known})

    def wrapper(self) -> None:
        rng = self.rng
        if "wrapper" not in self.things:
            self.things["wrapper"] = vllm.PunicaWrapper(40, 8), [None, 7, 2**127]
        wrapper, ids = self.things["wrapper"]
        n, h_in, r = (int(rng.integers(1, 20)) for _ in range(3))
        rows = [[0, 7, 2**127][k] for k in rng.integers(0, 3, n)]
        arguments = {"mapping": vllm.LoRAMapping(rows, ()), "lora_index_to_id": ids, "max_loras": 3}
        if rng.random() < 0.3:
            attempt_arguments = {**arguments, "lora_index_to_id": [*ids, 3]}
            assert not attempt(wrapper.update_metadata, attempt_arguments)
        wrapper.update_metadata(**arguments)
        A, B = self.whole(3, 1, r, h_in), (self.whole(3, 1, 4, r), self.whole(3, 1, 5, r))
        x, y = self.whole(n, h_in), self.whole(n, 9)
        right = y.copy()
        for i, row in enumerate(rows):
            if row:
                k = ids.index(row)
                with np.errstate(invalid="ignore"):  # BLAS was seen to raise it over whole numbers
                    v = 0.5 * A[k, 0] @ x[i]
                    right[i] += np.concatenate([B[0][k, 0] @ v, B[1][k, 0] @ v])
        call = {"y": y, "x": x, "lora_a_stacked": (A, A), "lora_b_stacked": B, "scale": 0.5}
        call["output_slices"] = (4, 5)
        if rng.random() < 0.4:
            hostile(rng, wrapper.add_lora_linear, call)
        wrapper.add_lora_linear(**call)
        np.testing.assert_array_equal(y, right)

    def punica(self) -> None:
        rng = self.rng
        n, h_in, h_out, r = (int(rng.integers(1, 20)) for _ in range(4))
        weights = []
        for _ in range(3):
            weight = punica.LoraWeight(2, h_in, h_out, r, "float32")
            weight.copy_from_tensor(self.whole(2, r, h_in), self.whole(2, h_out, r))
            weights.append(weight)
        batch = punica.BatchedLoraWeight(weights)
        s = np.array([0, *sorted(rng.integers(0, n + 1, 2)), n])
        x, y = self.whole(n, h_in), self.whole(n, h_out)
        right = y.copy()
        for k, weight in enumerate(weights):
            rows = slice(s[k], s[k + 1])
            with np.errstate(invalid="ignore"):
                right[rows] += x[rows] @ weight.wa[1].T @ weight.wb[1]
        call = {"y": y, "x": x, "wa_ptr": batch.wa_ptr, "wb_ptr": batch.wb_ptr, "s": s}
        call |= {"layer_idx": 1, "lora_rank": r}
        if rng.random() < 0.4:
            hostile(rng, punica.add_lora_sgmv_custom_cutlass, call)
        punica.add_lora_sgmv_custom_cutlass(**call)
        np.testing.assert_array_equal(y, right)

    def server(self) -> None:
        if "server" not in self.things:
            self.things["server"] = Server()
        self.things["server"].run(self.rng)


STEPS: dict[str, Callable[[World], None]] = {
    **{name: World.any_call for name in ("any call", "any other call", "any third call")},
    **{"core": World.core, "core again": World.core, "load": World.load, "unload": World.unload},
    **{"batched": World.batched, "layout": World.layout, "wrapper": World.wrapper},
    **{"punica": World.punica, "server": World.server, "server again": World.server},
}


def run_sequence(
    seed: int, index: int, steps: Sequence[int] | None, limit: float, forks: bool
) -> int:
    """Run one; returns its calls. What fails is raised with the step at its head."""
    world = World(seed, index)
    chosen = range(len(world.plan)) if steps is None else steps
    fork_at = random.Random(f"{seed} {index}").randrange(4 * MOST_STEPS) if forks else -1
    for number in chosen:
        faulthandler.dump_traceback_later(limit, exit=True)
        if number == fork_at:
            fork(world, chosen, number, limit)
        try:
            world.step(number)
        except BaseException as error:
            where = "".join(traceback.format_tb(error.__traceback__)[-2:])
            told = f"step {number}, {world.plan[number]}: {error!r}\n{where}"
            raise AssertionError(told) from error
    faulthandler.cancel_dump_traceback_later()
    return sum(world.counts.values())


def fork(world: World, steps: Sequence[int], at: int, limit: float) -> None:
    """The rest of the sequence in a child of a fork, too."""
    faulthandler.cancel_dump_traceback_later()  # a child would wait for its thread for ever
    pid = os.fork()
    if pid == 0:
        status = 0
        faulthandler.dump_traceback_later(limit, exit=True)
        try:
            for number in [number for number in steps if number >= at]:
                world.step(number)
        except BaseException as error:
            sys.stderr.write(f"in a forked child: {error!r}\n")
            status = FAILED
        os._exit(status)
    faulthandler.dump_traceback_later(2 * limit, exit=True)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    faulthandler.dump_traceback_later(limit, exit=True)
    assert status == 0, f"the forked child ended with {status}"


def child(given: argparse.Namespace) -> int:
    """Sequences from an index on, for some seconds; each is announced on standard output."""
    launch.WORTH_SHARING_NS = 0
    batches.MOST_ELEMENTS = 4_000
    sgmv.warm_up(["float32"])
    warnings.simplefilter("error")
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.RLIM_INFINITY))
    steps = [int(step) for step in given.steps.split(",")] if given.steps else None
    until = time.monotonic() + SECONDS_PER_CHILD
    for index in itertools.count(given.index):
        say({"index": index})
        try:
            calls = run_sequence(given.seed, index, steps, given.limit, given.forks)
        except AssertionError as error:
            say({"index": index, "failed": str(error)})
            return FAILED
        say({"index": index, "calls": calls})
        if steps is not None or given.single or time.monotonic() > until:
            return 0
    return 0


def say(line: dict[str, Any]) -> None:
    os.write(1, (json.dumps(line) + "\n").encode())


class Ended:
    """How a child ended: the last sequence it began, its calls, and what was wrong."""

    def __init__(self, status: int, lines: list[str], errors: str) -> None:
        said = [json.loads(line) for line in lines if line.startswith("{")]
        self.index = said[-1]["index"] if said else -1
        self.calls = sum(line.get("calls", 0) for line in said)
        self.sequences = sum("calls" in line for line in said)
        self.wrong = said[-1].get("failed", "") if said else "it said nothing"
        if status and not self.wrong:
            self.wrong = f"status {status}: {errors[-2000:]}"
        if status and not said:
            self.wrong = f"status {status} before the first sequence: {errors[-2000:]}"
        if not status:
            self.wrong = ""


def run_child(given: argparse.Namespace, index: int, *more: str) -> Ended:
    """A process of its own, in a folder's cache if one is given, ended if it takes for ever."""
    command = [sys.executable, "-m", "tests.stress.fuzz", "--child", "--seed", str(given.seed)]
    command += ["--index", str(index), "--limit", str(given.limit), *more]
    # Watchdogs are threads: without the limit each leaves an arena's addresses behind.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=given.limit + 8 * SECONDS_PER_CHILD)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own forked child, too, which holds the pipes
        out, errors = process.communicate()
        return Ended(HUNG, out.splitlines(), "hangs: " + errors)
    return Ended(process.returncode, out.splitlines(), errors)


def shrunk(steps: Sequence[int], fails: Callable[[Sequence[int]], bool]) -> list[int]:
    """The steps without those that the failure does not need."""
    left = list(steps)
    for step in list(left):
        fewer = [other for other in left if other != step]
        if fewer and fails(fewer):
            left = fewer
    return left


def report(given: argparse.Namespace, ended: Ended, flags: Sequence[str]) -> str:
    """The failure, with as few steps as show it."""
    plan = range(len(World(given.seed, ended.index).plan))

    def fails(steps: Sequence[int]) -> bool:
        told = ",".join(map(str, steps))
        return bool(run_child(given, ended.index, "--steps", told, *flags).wrong)

    again = fails(plan)
    steps = shrunk(plan, fails) if again else list(plan)
    told = ",".join(map(str, steps))
    often = "" if again else " (not every time)"
    return (
        f"FAILED{often}: python -m tests.stress.fuzz --seed {given.seed} --index {ended.index} "
        f"--steps {told} {' '.join(flags)}\n    {ended.wrong}\n"
    )


def damage(folder: Path, rng: random.Random) -> None:
    """Some files of the kernel cache are cut short, emptied, zeroed or gone."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in rng.sample(files, min(len(files), rng.randrange(4))):
        try:
            content = path.read_bytes()
            way = rng.randrange(4)
            if way == 0:
                path.unlink()
            else:
                halves = content[: len(content) // 2]
                path.write_bytes((b"", halves, bytes(len(content)))[way - 1])
        except OSError:  # a child has replaced it meanwhile
            continue


def flags_of(given: argparse.Namespace, rng: random.Random) -> list[str]:
    """What is injected into the next child."""
    if not given.inject:
        return []
    return [flag for flag, share in (("--forks", 0.6), ("--gevent", 0.4)) if rng.random() < share]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a step may take")
    parser.add_argument("--inject", action="store_true", help="forks, gevent, a damaged cache")
    parser.add_argument("--index", type=int, default=-1, help="this sequence alone")
    parser.add_argument("--steps", default="", help="and of it these steps, with commas")
    for flag in ("--child", "--single", "--forks", "--gevent"):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(given)
    if given.index >= 0:
        flags = [flag for flag in ("--forks", "--gevent") if getattr(given, flag[2:])]
        more = ["--steps", given.steps] if given.steps else ["--single"]
        ended = run_child(given, given.index, *more, *flags)
        sys.stdout.write(f"{ended.wrong or 'passed'}\n")
        return 1 if ended.wrong else 0
    with tempfile.TemporaryDirectory() as folder:
        if given.inject:
            os.environ["NUMBA_CACHE_DIR"] = folder
        return fuzz(given, Path(folder))


def fuzz(given: argparse.Namespace, folder: Path) -> int:
    """Children one after the other, until the time is over."""
    rng, started = random.Random(given.seed), time.monotonic()
    index = calls = sequences = children = 0
    failures: list[str] = []
    while time.monotonic() < started + 60 * given.minutes and len(failures) < 5:
        flags = flags_of(given, rng)
        if given.inject:
            damage(folder, rng)
        ended = run_child(given, index, *flags)
        calls, sequences, children = calls + ended.calls, sequences + ended.sequences, children + 1
        if ended.wrong:
            failures.append(report(given, ended, flags))
            sys.stdout.write(failures[-1])
            sys.stdout.flush()
        index = max(index, ended.index) + 1
    minutes = (time.monotonic() - started) / 60
    sys.stdout.write(
        f"{calls} steps in {sequences} sequences and {children} processes, {calls / minutes:.0f} a "
        f"minute, seed {given.seed}; {len(failures)} failures\n"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
