"""What LoRA adds to a model's forward pass: PEFT's mixed batch, and the same through add_lora.

    python -m benchmarks peft            check, timings, table; under half an hour
    python -m benchmarks peft --record   the same, into benchmarks/records/, to commit

A Llama of random weights, as wide as Llama-3.2-1B and LAYERS deep, all its linear layers adapted.
Each sample names another adapter, or shares it with a few. The variants hold the same weights and
take turns, all but the last:

    base           the model before PEFT wrapped it
    peft           PEFT's mixed batch: adapter_names=names
    sgmv           the same under sgmv.compat.peft.accelerate
    one_at_a_time  for each adapter: set_adapter, then its samples alone

A decode step is one of STEPS that `generate` makes from one token per sample; a prefill step is one
forward pass. What LoRA adds is a variant's time less that of base in the same round: a machine's
speed changes by more than LoRA adds, so a round is one call of each, as short as can be, and the
median of many counts. The standard error of a share tells what that is worth. Inside the layers
LoRA is timed apart from the base layers' noise: what adapted layers take, less what their base
layers take within them, in calls of their own.

The past is short and the output layer small, as neither is LoRA's: base is faster than in a full
model. What PEFT and sgmv do once per call, a few steps bear here.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain
from statistics import median
from typing import Any, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

import sgmv
from benchmarks.clock import Budget, Variant, alternate, drawn_medians, time_quietly
from benchmarks.gate import spread
from benchmarks.record import Head, Times, significant, source
from benchmarks.study import Study
from benchmarks.text import Console, Table
from reference import bounds, by_row, compare
from sgmv.compat.peft import accelerate
from sgmv.models import Model
from sgmv.tensors import as_array

LLAMA = Model(2048, 8192, heads=32, kv_heads=8, head_dim=64)  # Llama-3.2-1B's config.json
LAYERS, VOCABULARY, RANK, STEPS = 2, 1024, 16, 2
GOAL = 0.25  # of what PEFT's own mixed batch adds
CHECKED_ROWS = 6
DECODE_ROUNDS, PREFILL_ROUNDS, INSIDE_ROUNDS = 60, 40, 12
ONCE = Budget(rounds=1, turn_s=0.0)  # for what takes many times as long, so that no turns matter


@dataclass(frozen=True)
class Case:
    """A batch: `samples` of `tokens` each, spread evenly over so many adapters.

    `dtype` is the base model's; `adapter_dtype` float32 is what PEFT makes of adapters if not told
    otherwise.
    """

    dtype: str
    adapter_dtype: str
    adapters: int
    samples: int
    tokens: int

    @property
    def steps(self) -> int:
        """The forward passes of one timed call."""
        return STEPS if self.tokens == 1 else 1

    @property
    def rounds(self) -> int:
        """How often the variants take turns."""
        return DECODE_ROUNDS if self.tokens == 1 else PREFILL_ROUNDS

    def label(self) -> str:
        """Its name in messages.

        >>> Case("float32", "float32", 16, 64, 1).label()
        'float32/float32, 16 adapters, 64 x 1 tokens'
        """
        sizes = f"{self.adapters} adapters, {self.samples} x {self.tokens} tokens"
        return f"{self.dtype}/{self.adapter_dtype}, {sizes}"


BATCHES = ((16, 16, 1), (16, 64, 1), (64, 64, 1), (16, 16, 32), (32, 32, 32))
TYPES = (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
CASES = [Case(*types, *batch) for types in TYPES for batch in BATCHES]


class CaseRecord(msgspec.Struct, forbid_unknown_fields=True):
    """One case as it was measured; `times` by variant, `foreign_cores` as in the other record.

    `steps`: the forward passes of one timed call, which is a round. `inside`: what LoRA adds within
    the adapted layers, in each clocked call.
    Units: microseconds.
    """

    dtype: str
    adapter_dtype: str
    adapters: int
    samples: int
    tokens: int
    steps: int
    times: dict[str, Times]
    inside: dict[str, list[float]]
    foreign_cores: float | None


class PeftRecord(Head):
    """One run of this file: raw times; what LoRA adds is computed from them where it is shown."""

    SCHEMA: ClassVar[int] = 4
    STUDY: ClassVar[str] = "peft"
    threads: int
    hidden: int
    intermediate: int
    layers: int
    rank: int
    cases: list[CaseRecord]


@dataclass(frozen=True)
class Models:
    """One set of weights, three times: without PEFT, with it, and with it for `accelerate`."""

    base: Any
    peft: Any
    sgmv: Any


def make_models(dtype: str, adapter_dtype: str, adapters: int, layers: int = LAYERS) -> Models:
    """The models of a case's types, with adapters "0", "1", ... of random weights."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=LLAMA.hidden, intermediate_size=LLAMA.intermediate,
        num_attention_heads=LLAMA.heads, num_key_value_heads=LLAMA.kv_heads,
        head_dim=LLAMA.head_dim, num_hidden_layers=layers, vocab_size=VOCABULARY,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    alone = _sharing(base)
    lora = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    widen = adapter_dtype != dtype
    model = get_peft_model(base, lora, adapter_name="0", autocast_adapter_dtype=widen)
    for index in range(1, adapters):
        model.add_adapter(str(index), lora, autocast_adapter_dtype=widen)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:  # PEFT starts B at zero, where no fault could show
            torch.nn.init.normal_(weight, std=0.02)
    model.eval().requires_grad_(False)
    return Models(alone, model, _sharing(model))


def _sharing(model: Any) -> Any:
    """A copy of the model over the same weights."""
    kept = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in kept})


def measure(case: Case, models: Models) -> CaseRecord:
    """Check and time one case; `models.sgmv` is accelerated already."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (case.samples, case.tokens), generator=generator)
    names = [str(i % case.adapters) for i in range(case.samples)]
    run = generate if case.steps > 1 else forward
    mixed = partial(run, models.sgmv, tokens, adapter_names=names)
    with torch.inference_mode():
        check(models.sgmv, mixed, names, case.label())
        calls = {
            "base": partial(run, models.base, tokens),
            "peft": partial(run, models.peft, tokens, adapter_names=names),
            "sgmv": mixed,
        }
        for call in calls.values():
            call()
        variants = [Variant(name, call, settles=False) for name, call in calls.items()]
        timed, foreign = time_quietly(variants, Budget(case.rounds, turn_s=0.0))
        clocked = {"peft": models.peft, "sgmv": models.sgmv}
        inside: dict[str, list[float]] = {name: [] for name in clocked}
        for _ in range(INSIDE_ROUNDS):
            for name, model in clocked.items():
                inside[name].append(significant(inside_us(model, calls[name])))
        alone = partial(one_at_a_time, run, models.peft, tokens, names)
        timed |= alternate([Variant("one_at_a_time", alone)], ONCE)
    return CaseRecord(
        case.dtype, case.adapter_dtype, case.adapters, case.samples, case.tokens, case.steps, timed,
        inside, foreign,
    )  # fmt: skip


def inside_us(model: Any, call: Callable[[], object]) -> float:
    """The time of one call in all adapted layers, less that of their base layers. Units: us."""
    spent = 0
    handles = []

    def clock(sign: int) -> Callable[..., None]:
        def read(*_: Any) -> None:
            nonlocal spent
            spent += sign * time.perf_counter_ns()

        return read

    for layer in adapted(model).values():
        for module, sign in ((layer, 1), (layer.base_layer, -1)):
            handles.append(module.register_forward_pre_hook(clock(-sign)))
            handles.append(module.register_forward_hook(clock(sign)))
    with removed(handles):
        call()
    return spent / 1e3


def forward(model: Any, tokens: Any, **names: Any) -> None:
    """One pass; only the last token's logits, as in a prefill."""
    model(input_ids=tokens, use_cache=False, logits_to_keep=1, **names)


def generate(model: Any, tokens: Any, **names: Any) -> None:
    """STEPS passes, of one token per sample each, from prompts of one token."""
    length = {"min_new_tokens": STEPS, "max_new_tokens": STEPS}
    mask = tokens.new_ones(tokens.shape)
    model.generate(
        input_ids=tokens, attention_mask=mask, do_sample=False, pad_token_id=0, **length, **names
    )


def one_at_a_time(run: Callable[..., None], model: Any, tokens: Any, names: Sequence[str]) -> None:
    """A run for each adapter of the batch, of its samples alone."""
    for name in dict.fromkeys(names):
        model.set_adapter(name, inference_mode=True)
        run(model, tokens[[i for i, its in enumerate(names) if its == name]])


def check(
    model: Any,
    forward: Callable[[], object],
    names: Sequence[str],
    label: str,
    most: int = CHECKED_ROWS,
) -> None:
    """Hold so many rows of every adapted layer to the reference: wrong results are not timed.

    Semantics: each layer's x and base output, as they are in the last step of `forward`, make what
    is expected of its result; weights are read where PEFT keeps them.
    """
    before: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
    after: dict[str, NDArray[Any]] = {}

    def keep_base(name: str, _module: Any, inputs: Any, output: Any) -> None:
        before[name] = as_array("x", inputs[0]), as_array("y", output.clone())

    def keep(name: str, _module: Any, _inputs: Any, output: Any) -> None:
        after[name] = as_array("y", output)

    modules, handles = adapted(model), []
    for name, module in modules.items():
        handles.append(module.base_layer.register_forward_hook(partial(keep_base, name)))
        handles.append(module.register_forward_hook(partial(keep, name)))
    with removed(handles):
        forward()
    for name, module in modules.items():
        x, y = before[name]
        tokens = math.prod(x.shape[1:-1])
        n = len(names) * tokens
        rows = spread(n, most)
        ids = [names.index(names[row // tokens]) for row in rows]
        adapters = {i: adapter_of(module, names[i]) for i in ids}
        x, y, result = (array.reshape(n, -1)[rows] for array in (x, y, after[name]))
        expected = by_row.add_lora(y, x, adapters, ids)
        bound = bounds.add_lora_bound(y, x, adapters, ids, expected=expected)
        compare.check(result, expected, bound, f"{label}, {name}")


def adapted(model: Any) -> dict[str, Any]:
    """The model's adapted layers, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@contextmanager
def removed(handles: Sequence[Any]) -> Iterator[None]:
    """These hooks are gone afterwards."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def adapter_of(module: Any, name: str) -> sgmv.Adapter | None:
    """A layer's adapter, over PEFT's own memory; None if it has none of this name."""
    if name not in module.lora_A:
        return None
    A, B = as_array("A", module.lora_A[name].weight), as_array("B", module.lora_B[name].weight)
    return sgmv.Adapter(A, B, module.scaling[name])


def added(case: CaseRecord, variant: str) -> NDArray[np.float64]:
    """What LoRA adds to a step, round by round; all of it at once if there was none. Units: ms."""
    its, base = (np.array(case.times[name].rounds) for name in (variant, "base"))
    if len(its) != len(base):
        return np.array([per_step(case, variant) - per_step(case, "base")])
    each: NDArray[np.float64] = (its - base) / case.steps / 1e3
    return each


def share(case: CaseRecord) -> tuple[float, float]:
    """What sgmv adds as a part of what PEFT adds, and its standard error.

    Semantics: a ratio of medians over rounds; its standard deviation among `drawn_medians`.
    """
    ours, theirs = (added(case, variant) for variant in ("sgmv", "peft"))
    mine, other = drawn_medians(ours.tolist(), theirs.tolist())
    return float(np.median(ours) / np.median(theirs)), float(np.std(mine / other))


def per_step(case: CaseRecord, variant: str) -> float:
    """The median time of a step. Units: milliseconds."""
    return case.times[variant].q50 / case.steps / 1e3


def tables(record: PeftRecord) -> list[Table]:
    """One line per case; a share above the goal is marked."""
    head = [
        "base", "adapters", "step", "samples", "base ms", "PEFT adds ms", "sgmv adds ms",
        "share", "inside the layers", "one at a time adds ms",
    ]  # fmt: skip
    rows = []
    for case in record.cases:
        part, error = share(case)
        rows.append(
            [
                case.dtype,
                f"{case.adapters} {case.adapter_dtype}",
                "decode" if case.steps > 1 else "prefill",
                f"{case.samples} x {case.tokens}",
                f"{per_step(case, 'base'):.1f}",
                *(f"{median(added(case, variant)):.2f}" for variant in ("peft", "sgmv")),
                f"{part:.2f} ± {error:.2f}{' !' * (part > GOAL)}",
                f"{median(case.inside['sgmv']) / median(case.inside['peft']):.2f}",
                f"{median(added(case, 'one_at_a_time')):.0f}",
            ]
        )
    return [Table(head, rows, left=4)]


def page(record: PeftRecord, name: str) -> str:
    """The table of docs/engines.md, and where it comes from."""
    head = (
        f"Llama of width {record.hidden} / {record.intermediate}, {record.layers} layers, all "
        f"linear ones adapted, rank {record.rank}; torch {record.versions['torch']}, PEFT "
        f"{record.versions['peft']}, {source(record)}; record: `benchmarks/records/{name}`. "
        "share: what sgmv adds / what PEFT's mixed batch adds, ± its standard error, of "
        f"the whole pass and inside the adapted layers; ! marks more than {GOAL}."
    )
    return f"{head}\n\n{tables(record)[0].markdown()}"


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure every case, with one set of weights for each pair of float types."""
    missing = [name for name in ("torch", "peft", "transformers") if not find_spec(name)]
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)}; pip install -e '.[torch,bench]'")
    import torch

    torch.set_num_threads(args.threads)
    sgmv.set_num_threads(args.threads)
    cases = []
    for types in dict.fromkeys((case.dtype, case.adapter_dtype) for case in CASES):
        its = [case for case in CASES if (case.dtype, case.adapter_dtype) == types]
        models = make_models(*types, max(case.adapters for case in its))
        with accelerate(models.sgmv):
            for case in its:
                console.print(f"  {case.label()}")
                cases.append(measure(case, models))
    return {
        "threads": args.threads, "hidden": LLAMA.hidden, "intermediate": LLAMA.intermediate,
        "layers": LAYERS, "rank": RANK, "cases": cases,
    }  # fmt: skip


STUDY = Study(
    "peft", __doc__, PeftRecord, run, tables, pages={("docs/engines.md", "peft"): page},
    packages=("peft", "transformers"),
)  # fmt: skip
