"""What LoRA adds in vLLM's CPU engine: its own products, and the same engine on sgmv.

    python -m benchmarks vllm            Llama-3.2-1B, rank 16, 1 to 64 adapters: ten minutes
    python -m benchmarks vllm --full     ranks 8 and 64 and Llama-3-8B, too: twenty
    python -m benchmarks vllm --quick    16 adapters alone

The real engine in three processes at once, whose calls take turns:

    base    an engine without LoRA
    stock   with vLLM's own products (SGMV_VLLM=0)
    sgmv    with sgmv's

Models have the real widths and drawn weights, and a part of the layers; of the vocabulary the same
part, so that the output layer weighs what it does in the whole model. All linear modules are
adapted. Each of ROWS requests names one of the adapters, in turn. A decode step is one of STEPS
after prompts of one token; a prefill step is one pass over prompts of TOKENS. An engine that holds
adapters has a slot more: vLLM 0.32 gives its last slot's to base-only rows. A round in which other
programs ran is made again, up to as many times as there are rounds.

Needs vLLM, which `make test-vllm` installs in an environment of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import msgspec
import numpy as np

from benchmarks.engine import PRODUCTS, TINY, Engine, Llama, serve, write_adapter
from benchmarks.record import Head, is_quiet, noisy, significant, source
from benchmarks.study import Red, Study
from benchmarks.text import Console, Table
from sgmv.console import Parser, at_least

# Each model's config.json, cut.
MODELS = {
    "Llama-3.2-1B, 2 of 16 layers": Llama(2048, 8192, 32, 8, 64, layers=2, vocabulary=16032),
    "Llama-3-8B, 1 of 32 layers": Llama(4096, 14336, 32, 8, 128, layers=1, vocabulary=4008),
}
ADAPTERS = (1, 4, 16, 64)  # at rank 16; with --full 16 of other ranks, too
RANKS = (8, 64)
ROWS, STEPS, TOKENS = 16, 16, 32
GOALS = {"decode": 1 / 4, "prefill": 1 / 20}  # of what stock adds
DECODE_GOAL = 0.2  # of base, too


@dataclass(frozen=True)
class Setup:
    """An engine of one model and rank, and how many adapters its batches name in turn."""

    model: str
    widths: Llama
    rank: int
    adapters: Sequence[int]


class VllmCase(msgspec.Struct, forbid_unknown_fields=True):
    """One step as it was measured: by products, each call's seconds a step, and the peak memory.

    Units: seconds, bytes; peak is that of the process so far, which had smaller cases before.
    """

    model: str
    layers: int
    rank: int
    adapters: int
    step: str
    rows: int
    tokens: int
    seconds: dict[str, list[float]]
    peak: dict[str, int]
    foreign_cores: float | None


class VllmRecord(Head):
    """One run of this file."""

    SCHEMA: ClassVar[int] = 1
    STUDY: ClassVar[str] = "vllm"
    threads: int
    dtype: str
    cases: list[VllmCase]
    disturbed: list[str] = msgspec.field(default_factory=list)  # cases that are left out


def setups(args: argparse.Namespace) -> list[Setup]:
    """The engines of a run."""
    (name, shape), *_ = MODELS.items()
    if args.quick:
        return [Setup(name, shape, 16, [16])]
    if not args.full:
        return [Setup(name, shape, 16, ADAPTERS)]
    others = [(rank, (16,)) for rank in RANKS]
    return [
        Setup(name, shape, rank, counts)
        for name, shape in MODELS.items()
        for rank, counts in [(16, ADAPTERS), *others]
    ]


def generate(vocabulary: int, adapters: Sequence[Any], tokens: int, new: int) -> dict[str, Any]:
    """A job: ROWS prompts of drawn tokens, the adapters in turn."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, vocabulary, (ROWS, tokens)).tolist()
    requests = [[prompts[i], adapters[i % len(adapters)], new] for i in range(ROWS)]
    return {"do": "generate", "requests": requests}


def check(folder: Path) -> None:
    """A small model's greedy tokens in float32 are those of vLLM's own products."""
    TINY.write(folder / "tiny")
    adapters = [
        [i, str(write_adapter(folder / f"tiny-{i}", TINY.modules(), 8, i))] for i in range(1, 5)
    ]
    job = generate(TINY.vocabulary, adapters, 5, 4) | {"margins": True}
    engine: dict[str, Any] = {"enable_lora": True, "max_loras": 5, "max_lora_rank": 8}
    stock, ours = (
        serve(products, folder / "tiny", [job], **engine).results[0] for products in PRODUCTS[1:]
    )
    wrong = [
        i for i, margin in enumerate(stock["margins"])
        if margin > 1e-3 and ours["tokens"][i] != stock["tokens"][i]
    ]  # fmt: skip
    if wrong:
        raise Red("sgmv's tokens are not those of vLLM's own products", f"requests {wrong}")


def engine_of(setup: Setup, products: str, folder: Path, dtype: str) -> Engine:
    """A process that serves a setup with these products."""
    model = setup.widths.write(folder / "model", weights=False)
    lora: dict[str, Any] = {}
    if products != "base":
        slots = max(setup.adapters) + 1
        lora = {"enable_lora": True, "max_lora_rank": setup.rank, "max_loras": slots}
    return Engine(
        products, model, {"VLLM_CPU_KVCACHE_SPACE": "1"}, seconds=7200, dtype=dtype,
        load_format="dummy", enable_prefix_caching=False, max_num_batched_tokens=ROWS * TOKENS,
        **lora,
    )  # fmt: skip


def numbered(setup: Setup, folder: Path) -> list[Any]:
    """The adapters of a setup, written when they are first asked for."""
    found = []
    for i in range(1, max(setup.adapters) + 1):
        path = folder / f"rank-{setup.rank}-{i}"
        if not path.exists():
            write_adapter(path, setup.widths.modules(), setup.rank, seed=i)
        found.append([i, str(path)])
    return found


def measure(setup: Setup, folder: Path, rounds: int, dtype: str) -> list[VllmCase]:
    """Every case of a setup, all products at once."""
    held, cases = numbered(setup, folder), []
    with ExitStack() as open_engines:
        engines = {
            products: open_engines.enter_context(engine_of(setup, products, folder, dtype))
            for products in PRODUCTS
        }
        for count in setup.adapters:
            for step, tokens, new in (("decode", 1, STEPS), ("prefill", TOKENS, 1)):
                jobs = {
                    products: generate(
                        setup.widths.vocabulary, held[:count] if products != "base" else [None],
                        tokens, new,
                    )
                    for products in PRODUCTS
                }  # fmt: skip
                kept = turns(engines, jobs, rounds)
                seconds = {
                    products: [significant(each[products]["seconds"] / new) for each in kept]
                    for products in PRODUCTS
                }
                peak = {p: max(each[p]["peak"] for each in kept) for p in PRODUCTS}
                foreign = [each[p]["foreign_cores"] for each in kept for p in PRODUCTS]
                cases.append(
                    VllmCase(
                        setup.model, setup.widths.layers, setup.rank, count, step, ROWS, tokens,
                        seconds, peak, None if None in foreign else max(foreign),
                    )
                )  # fmt: skip
    return cases


def turns(
    engines: Mapping[str, Engine], jobs: Mapping[str, Any], rounds: int
) -> list[dict[str, Any]]:
    """The results of each round, by products; the first round warms up and is left out."""
    found: list[dict[str, Any]] = []
    for i in range(1 + 2 * rounds):
        results = {products: engine.run(jobs[products]) for products, engine in engines.items()}
        if i:
            found.append(results)
        if sum(map(undisturbed, found)) == rounds:
            break
    return sorted(found, key=undisturbed, reverse=True)[:rounds]


def undisturbed(results: Mapping[str, Any]) -> bool:
    return all(is_quiet(result["foreign_cores"]) for result in results.values())


def added(case: VllmCase, products: str) -> float:
    """What LoRA adds to a step: the median over rounds, as base drifts. Units: seconds."""
    rounds = zip(case.seconds["base"], case.seconds[products], strict=True)
    return median(its - base for base, its in rounds)


def misses(case: VllmCase) -> bool:
    """Whether sgmv adds more than the goal says."""
    ours, base = added(case, "sgmv"), median(case.seconds["base"])
    dear = case.step == "decode" and ours > DECODE_GOAL * base
    return dear or ours > GOALS[case.step] * added(case, "stock")


def tables(record: VllmRecord) -> list[Table]:
    """A line per case; ! marks what misses a goal."""
    head = [
        "model", "step", "rank", "adapters", "base ms", "stock adds ms", "sgmv adds ms",
        "of stock's", "of base", "tokens/s: base", "stock", "sgmv", "peak GB: base", "stock",
        "sgmv",
    ]  # fmt: skip
    rows = []
    for case in record.cases:
        base, stock, ours = median(case.seconds["base"]), added(case, "stock"), added(case, "sgmv")
        tokens = case.rows * case.tokens
        rows.append(
            [
                case.model, case.step, str(case.rank), str(case.adapters),
                *(f"{seconds * 1e3:.1f}" for seconds in (base, stock, ours)),
                f"{ours / stock:.3f}{' !' * misses(case)}", f"{ours / base:.2f}",
                *(f"{tokens / median(case.seconds[products]):.0f}" for products in PRODUCTS),
                *(f"{case.peak[products] / 1e9:.1f}" for products in PRODUCTS),
            ]
        )  # fmt: skip
    notes = [f"Left out, as other programs ran: {name}." for name in record.disturbed]
    return [Table(head, rows, 2, notes)]


def arguments(parser: Parser) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one number of adapters")
    size.add_argument("--full", action="store_true", help="more ranks, and a larger model")
    parser.add_argument("--rounds", type=at_least(1), default=3, metavar="N",
                        help="timed calls of each case and kind; default: %(default)s")  # fmt: skip
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Check, then measure every setup."""
    if not find_spec("vllm"):
        raise SystemExit("not installed: vllm; `make test-vllm` makes an environment that has it")
    cases: list[VllmCase] = []
    with tempfile.TemporaryDirectory() as scratch:
        check(Path(scratch))
        for setup in setups(args):
            console.print(f"  {setup.model}, rank {setup.rank}")
            folder = Path(scratch) / setup.model.replace(" ", "-")
            cases += measure(setup, folder, args.rounds, args.dtype)
    return {"threads": args.threads, "dtype": args.dtype, "cases": cases}


def undisturbed_cases(record: VllmRecord) -> VllmRecord:
    """The record without the cases beside which other programs ran, which it names."""
    kept = [case for case in record.cases if is_quiet(case.foreign_cores)]
    left = [
        f"{case.model}, {case.step}, rank {case.rank}, {case.adapters} adapters"
        for case in noisy(record.cases)
    ]
    return msgspec.structs.replace(record, cases=kept, disturbed=left)


def page(record: VllmRecord, file: str) -> str:
    """The table, and what it was measured on."""
    [table] = tables(record)
    vllm = record.versions["vllm-cpu"]
    lines = [
        f"vLLM {vllm}, {record.dtype}, {ROWS} requests at once, each of an adapter in turn; "
        f"{source(record)}; record: `benchmarks/records/{file}`.",
        f"! marks more than {GOALS['decode']:g} of what vLLM's own products add in decode, "
        f"{GOALS['prefill']:g} in prefill, {DECODE_GOAL:g} of base in decode.",
        "",
        table.markdown(),
        *(f"\n{note}" for note in table.notes),
    ]
    return "\n".join(lines)


def short(record: VllmRecord, file: str) -> str:
    """What LoRA adds to a step of the smaller model at rank 16, for the first page."""
    head = ["adapters", "step", "base ms", "vLLM adds ms", "sgmv adds ms"]
    rows = [
        [
            str(case.adapters), case.step,
            *(
                f"{seconds * 1e3:.1f}"
                for seconds in (
                    median(case.seconds["base"]), added(case, "stock"), added(case, "sgmv"),
                )
            ),
        ]
        for case in record.cases
        if (case.model, case.rank) == (record.cases[0].model, 16)
    ]  # fmt: skip
    about = f"{record.cases[0].model}, {record.dtype}, {source(record)}."
    return f"{about}\n\n{Table(head, rows, left=2).markdown()}"


STUDY = Study(
    "vllm", __doc__, VllmRecord, run, tables, arguments=arguments,
    pages={("docs/engines.md", "vllm"): page, ("README.md", "vllm"): short},
    whole=lambda args: not args.quick,
    quiet=undisturbed_cases,
    packages=("vllm-cpu", "torch"),
)  # fmt: skip
