"""What LoRA adds in vLLM's CPU engine: its own products, and the same engine on sgmv.

    python -m benchmarks vllm            check, timings, table; hours
    python -m benchmarks vllm --quick    2 layers of Llama-3.2-1B, 16 adapters, rank 16: minutes

The real engine, each time in a process of its own, the products in turn:

    base    an engine without LoRA
    stock   with vLLM's own products (SGMV_VLLM=0)
    sgmv    with sgmv's

Models have the real widths and drawn weights; Llama-3-8B has as many layers as memory holds. All
linear modules are adapted. Each of ROWS requests names one of the adapters, in turn. A decode step
is one of STEPS after prompts of one token; a prefill step is one pass over prompts of TOKENS. An
engine that holds adapters has a slot more: vLLM 0.32 gives its last slot's to base-only rows.

Needs vLLM, which `make test-vllm` installs in an environment of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import msgspec
import numpy as np

from benchmarks.engine import PRODUCTS, TINY, Llama, Served, serve, write_adapter
from benchmarks.record import Head, significant
from benchmarks.study import Red, Study
from benchmarks.text import Console, Table
from sgmv.console import Parser, at_least

# Each model's config.json; of the second, layers that 24 GB hold beside 64 adapters of rank 64.
MODELS = {
    "Llama-3.2-1B": Llama(2048, 8192, 32, 8, 64, layers=16, vocabulary=128256),
    "Llama-3-8B, 8 layers": Llama(4096, 14336, 32, 8, 128, layers=8, vocabulary=128256),
}
ADAPTERS, RANKS = (1, 4, 16, 64), (8, 16, 64)
ROWS, STEPS, TOKENS = 16, 16, 64
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

    Units: seconds, bytes.
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


def setups(quick: bool) -> list[Setup]:
    """The engines of a run."""
    if quick:
        small = replace(MODELS["Llama-3.2-1B"], layers=2, vocabulary=1024)
        return [Setup("Llama-3.2-1B, 2 layers", small, 16, [16])]
    return [Setup(name, shape, rank, ADAPTERS) for name, shape in MODELS.items() for rank in RANKS]


def requests(vocabulary: int, adapters: Sequence[Any], tokens: int, new: int) -> list[Any]:
    """ROWS prompts of drawn tokens, the adapters in turn."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, vocabulary, (ROWS, tokens)).tolist()
    return [[prompts[i], adapters[i % len(adapters)], new] for i in range(ROWS)]


def check(folder: Path) -> None:
    """A small model's greedy tokens in float32 are those of vLLM's own products."""
    TINY.write(folder / "tiny")
    adapters = [
        [i, str(write_adapter(folder / f"tiny-{i}", TINY.modules(), 8, i))] for i in range(1, 5)
    ]
    job = {"do": "generate", "requests": requests(TINY.vocabulary, adapters, 5, 4), "margins": True}
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


def served(setup: Setup, products: str, folder: Path, repeats: int, dtype: str) -> Served:
    """One process: every number of adapters, decode and prefill, the first call to warm up."""
    model = setup.widths.write(folder / "model", weights=False)
    held = [None] if products == "base" else numbered(setup, folder)
    jobs = []
    for count in setup.adapters:
        for tokens, new in ((1, STEPS), (TOKENS, 1)):
            asked = requests(setup.widths.vocabulary, held[:count], tokens, new)
            jobs += [{"do": "generate", "requests": asked}] * (1 + repeats)
    lora = {
        "enable_lora": True, "max_lora_rank": setup.rank, "max_loras": len(held) + 1,
    }  # fmt: skip
    return serve(
        products, model, jobs, {"VLLM_CPU_KVCACHE_SPACE": "2"}, timeout=7200, dtype=dtype,
        load_format="dummy", enable_prefix_caching=False, max_num_batched_tokens=ROWS * TOKENS,
        **({} if products == "base" else lora),
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


def measure(setup: Setup, folder: Path, rounds: int, repeats: int, dtype: str) -> list[VllmCase]:
    """Every case of a setup: the products take turns, `rounds` processes each."""
    answers: dict[str, list[Served]] = {products: [] for products in PRODUCTS}
    for _ in range(rounds):
        for products in PRODUCTS:
            answers[products].append(served(setup, products, folder, repeats, dtype))
    cases, job = [], 0
    for count in setup.adapters:
        for step, tokens, steps in (("decode", 1, STEPS), ("prefill", TOKENS, 1)):
            timed = slice(job + 1, job + 1 + repeats)
            results = {
                products: [result for each in its for result in each.results[timed]]
                for products, its in answers.items()
            }
            foreign = [r["foreign_cores"] for its in results.values() for r in its]
            seconds = {
                products: [significant(result["seconds"] / steps) for result in its]
                for products, its in results.items()
            }
            peak = {p: max(each.facts["peak_rss"] for each in its) for p, its in answers.items()}
            cases.append(
                VllmCase(
                    setup.model, setup.widths.layers, setup.rank, count, step, ROWS, tokens,
                    seconds, peak, None if None in foreign else max(foreign),
                )
            )  # fmt: skip
            job += 1 + repeats
    return cases


def added(case: VllmCase, products: str) -> float:
    """What LoRA adds to a step: medians. Units: seconds."""
    return median(case.seconds[products]) - median(case.seconds["base"])


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
    return [Table(head, rows, left=2)]


def arguments(parser: Parser) -> None:
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument("--rounds", type=at_least(1), default=2, metavar="N",
                        help="processes of each kind; default: %(default)s")  # fmt: skip
    parser.add_argument("--repeats", type=at_least(1), default=3, metavar="N",
                        help="timed calls in each; default: %(default)s")  # fmt: skip
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Check, then measure every setup."""
    if not find_spec("vllm"):
        raise SystemExit("not installed: vllm; `make test-vllm` makes an environment that has it")
    cases: list[VllmCase] = []
    with tempfile.TemporaryDirectory() as scratch:
        check(Path(scratch))
        for setup in setups(args.quick):
            console.print(f"  {setup.model}, rank {setup.rank}")
            folder = Path(scratch) / setup.model.replace(" ", "-")
            cases += measure(setup, folder, args.rounds, args.repeats, args.dtype)
    return {"threads": args.threads, "dtype": args.dtype, "cases": cases}


STUDY = Study(
    "vllm", __doc__, VllmRecord, run, tables, arguments=arguments,
    whole=lambda args: not args.quick, packages=("vllm-cpu", "torch"),
)  # fmt: skip
