"""Every public call with valid arguments, and what to put in their places: for tests of the edges.

`CALLS` says how a valid call is built, anew each time; `variants` replaces one argument, or one
element of it, by hostile values; `state` is what must not change when a call is refused. A public
name that is neither in CALLS nor in RECORDS fails a test in core/test_edges.py.
"""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

import sgmv
from sgmv import emulator, experts, layouts, models, popularity, serving
from sgmv.compat import punica, vllm
from sgmv.serving import AdapterSlots, LoRAMixture, LoRARequest, Scheduler, Trace, make_step
from tests.help.api_page import methods_of

F = np.float32
N, H_IN, R, H_OUT = 5, 6, 2, 7
IDS = [3, -1, 3, 100, 3]
MIXED = [[3, 100], [-1, -1], [3, -1], [100, 3], [3, 100]]
WEIGHTS = [[0.5, 1.0], [1.0, 1.0], [1.0, 0.0], [0.5, 1.0], [0.5, 1.0]]
MODULES = (sgmv, experts, layouts, punica, vllm, serving, emulator, popularity, models)
# What calls return, and what tells of an error: made by the library, not by its users.
RECORDS = {
    *("SgmvError", "AdapterNames", "Finding", "FlashInfer", "LoRABatchInfo", "LoRAKernelMeta"),
    *(
        "LlamaBatch",
        "LlamaCpp",
        "MergedAdapters",
        "Lorax",
        "Punica",
        "RankSegments",
        "VllmV0",
        "Counters",
        "Outcome",
        "ReplicasOutcome",
        "Step",
        "Deadlock",
    ),
    *("DeadlockError", "Histogram", "Launch", "Result", "Work", "Model", "LAYERS", "MODELS"),
    *("POLICIES", "POPULARITIES", "DEVICES", "A100", "H100", "H200", "L4", "RTX_4090"),
    "PeftAdapter",
}
Made = tuple[Callable[..., Any], dict[str, Any]]


def array(*shape: int, dtype: Any = F) -> np.ndarray:
    """Small whole numbers, the same for the same shape."""
    return np.random.default_rng(len(shape)).integers(-3, 4, shape).astype(dtype)


def pair(r: int = R) -> tuple[np.ndarray, np.ndarray]:
    return array(r, H_IN), array(H_OUT, r)


def stack() -> sgmv.AdapterStack:
    made = sgmv.AdapterStack(H_IN, H_OUT, slots=3, max_rank=4)
    made.load(3, sgmv.Adapter(*pair(), 0.5))
    made.load(100, pair())
    return made


def segments() -> sgmv.Segments:
    return sgmv.segment(IDS)


@cache
def peft_directory() -> str:
    folder = Path(tempfile.mkdtemp(prefix="sgmv-edges-"))
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    A, B = pair()
    name = "base_model.model.up.lora"
    save_file({f"{name}_A.weight": A, f"{name}_B.weight": B}, folder / "adapter_model.safetensors")
    return str(folder)


@cache
def store_directory() -> str:
    """One adapter, in a store."""
    folder = Path(tempfile.mkdtemp(prefix="sgmv-edges-"))
    shutil.copytree(peft_directory(), folder / "up")
    return str(folder)


def adapter_store() -> serving.AdapterStore:
    return serving.AdapterStore(store_directory())


def read(path: str) -> dict[str, sgmv.Adapter]:
    return {"up": sgmv.Adapter(*pair())}


FRENCH, GREEK = LoRARequest("french", 7, "a/fr"), LoRARequest("greek", 100, "a/el")


def adapter_slots() -> AdapterSlots:
    made = AdapterSlots(2, 4, 8, modules={"up": (H_IN, H_OUT)}, read=read, saved=["score.weight"])
    made.activate([FRENCH])
    made.load(GREEK)
    return made


def pinned_slots() -> AdapterSlots:
    made = adapter_slots()
    made.pin(7)
    return made


def scheduler() -> Scheduler[Any]:
    made: Scheduler[Any] = Scheduler(2)
    made.add("r0", FRENCH)
    made.add("r1")
    return made


def step() -> Any:
    return make_step(adapter_slots(), {"r0": FRENCH, "r1": None}, {"r0": 4})


def wrapper() -> vllm.PunicaWrapper:
    made = vllm.PunicaWrapper(100, 100)
    made.update_metadata(vllm.LoRAMapping((7, 7, 0, 9, 7), (7, 9)), [9, 7], max_loras=2)
    return made


RUNS = {
    "b_seq_start_loc": np.array([0, 2, 3]),
    "seq_len_tensor": np.array([2, 1, 2]),
    "lora_indices_tensor": np.array([1, -1, 0]),
    "batches": 3,
    "max_seq_length": 2,
    "token_nums": 5,
}


def runs() -> dict[str, Any]:
    return {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in RUNS.items()}


def indices() -> np.ndarray:
    return np.array([1, 1, -1, 0, 1])


_alive: list[Any] = []  # weights that calls name by address


def pointers(*shape: int) -> np.ndarray:
    weights = [array(*shape) for _ in range(2)]
    _alive.extend(weights)
    return np.array([one.ctypes.data for one in weights])


def sgmv_of_punica(name: str) -> Callable[[], Made]:
    by_input = "cutlass" in name and "custom" not in name
    wa = (1, H_IN, R) if by_input else (1, R, H_IN)
    wb = (1, H_OUT, R) if name == "add_lora_sgmv" else (1, R, H_OUT)
    return lambda: (
        getattr(punica, name),
        {
            "y": array(N, H_OUT), "x": array(N, H_IN), "wa_ptr": pointers(*wa),
            "wb_ptr": pointers(*wb), "s": np.array([0, 2, 5]), "layer_idx": 0, "lora_rank": R,
        },
    )  # fmt: skip


def one_sgmv_of_punica(name: str) -> Callable[[], Made]:
    shape = (1, H_IN, R) if "cutlass" in name else (1, R, H_IN)
    return lambda: (
        getattr(punica, name),
        {
            "y": array(N, R), "x": array(N, H_IN), "w_ptr": pointers(*shape),
            "s": np.array([0, 2, 5]), "layer_idx": 0,
        },
    )  # fmt: skip


def shrink_of_vllm(name: str) -> Callable[[], Made]:
    weights = "lora_b_weights" if name == "bgmv_shrink" else "lora_a_weights"
    where = {"lora_indices_tensor": indices()} if name == "bgmv_shrink" else runs()
    return lambda: (
        getattr(vllm, name),
        {
            "inputs": array(N, H_IN), weights: array(2, R, H_IN), "output_tensor": array(N, R),
            **{k: np.copy(v) if isinstance(v, np.ndarray) else v for k, v in where.items()},
            "scaling": 0.5,
        },
    )  # fmt: skip


def expand_of_vllm(name: str) -> Callable[[], Made]:
    where = runs if name.startswith("sgmv") else (lambda: {"lora_indices_tensor": indices()})
    sliced = {"slice_offset": 1, "slice_size": H_OUT} if name.endswith("slice") else {}
    return lambda: (
        getattr(vllm, name),
        {
            "inputs": array(N, R), "lora_b_weights": array(2, H_OUT, R),
            "output_tensor": array(N, H_OUT + 2), **where(), **sliced, "add_inputs": True,
        },
    )  # fmt: skip


LAYOUTS: dict[str, Callable[[], Any]] = {
    "punica": lambda: layouts.punica([3, -1, 3], stack()),
    "lorax": lambda: layouts.lorax(IDS, 16),
    "lorax merged": lambda: layouts.lorax(MIXED, 16, WEIGHTS),
    "llamacpp": lambda: layouts.llamacpp(MIXED, WEIGHTS, {3: 0, 100: 1}),
    "vllm_v0": lambda: layouts.vllm_v0([0, -1, 1]),
    "vllm_v0 sorted": lambda: layouts.vllm_v0([0, -1, 1, 0], sort=True),
    "vllm_v1": lambda: layouts.vllm_v1([0, -1, 1], 3),
    "vllm_v1 base only": lambda: layouts.vllm_v1([-1, -1], 3),
    "sglang": lambda: layouts.sglang(IDS, stack()),
    "sglang triton": lambda: layouts.sglang(IDS, stack(), backend="triton"),
    "flashinfer": lambda: layouts.flashinfer(IDS),
    "peft": lambda: layouts.peft(IDS),
    "segments": segments,
    "batch lens": lambda: layouts.BatchLenInfo([3, 2], 2),
}


def raw(layout: Any) -> dict[str, Any]:
    """A layout's fields as a mapping, in arrays that can be changed."""
    found = {f.name: getattr(layout, f.name) for f in fields(layout)}
    if isinstance(layout, layouts.BatchLenInfo):
        found |= {"indptr": layout.indptr, "doff": layout.doff}
    return {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in found.items()}


def checked(name: str) -> Callable[[], Made]:
    return lambda: (
        layouts.check,
        {"metadata": raw(LAYOUTS[name]()), "n": len(IDS), "slots": {3: 3, 100: 100}},
    )


def back(name: str, **arguments: Callable[[], Any]) -> Callable[[], Made]:
    """The way from a layout back to ids."""
    return lambda: (LAYOUTS[name]().adapter_ids, {k: v() for k, v in arguments.items()})


def launch(name: str, **counts: Any) -> Callable[[], Made]:
    def of(**arguments: Any) -> str:
        return str(getattr(emulator, name)(**arguments))

    of.__signature__ = inspect.signature(getattr(emulator, name))  # type: ignore[attr-defined]
    return lambda: (of, {"batch": list(IDS), **counts})


def device(sms: int = 100) -> emulator.Device:
    return emulator.Device("toy", sms, 100 * 1024, 99 * 1024, 16, 1536, 10**11, 10**13)


def ran() -> Any:
    return emulator.punica_bgmv_shrink([3, -1, 3], 768, 8)


def method(
    of: Callable[[], Any], name: str, /, **arguments: Callable[[], Any]
) -> Callable[[], Made]:
    return lambda: (getattr(of(), name), {k: v() for k, v in arguments.items()})


def plain(call: Callable[..., Any], **arguments: Callable[[], Any]) -> Callable[[], Made]:
    return lambda: (call, {k: v() for k, v in arguments.items()})


def x() -> np.ndarray:
    return array(N, H_IN)


def y() -> np.ndarray:
    return array(N, H_OUT)


def ids() -> Any:
    return list(IDS)


def const(value: Any) -> Callable[[], Any]:
    return lambda: value


def adapters() -> Any:
    return {3: pair(), 100: sgmv.Adapter(*pair(), 2.0), 9: None}


def stacked(*shape: int) -> Callable[[], Any]:
    return lambda: (array(2, 1, *shape),)


EXPERT_IDS = np.array([[0, 2], [1, -1], [2, 1], [1, 0], [2, 0]])
of_experts: dict[str, Callable[[], Any]] = {
    "y": lambda: array(N, 2, H_OUT),
    "x": x,
    "lora_a_stacked": lambda: (array(2, 3, R, H_IN),),
    "lora_b_stacked": lambda: (array(2, 3, H_OUT, R),),
    "topk_weights": lambda: np.full((N, 2), 0.5, "f"),
    "adapter_enabled": lambda: np.array([1, 1, 0]),
}


def expert_adapter() -> experts.ExpertAdapter:
    return experts.ExpertAdapter(array(3, R, H_IN), array(3, H_OUT, R), 2.0)


def expert_stack() -> experts.ExpertStack:
    made = experts.ExpertStack(3, H_IN, H_OUT, slots=3, max_rank=4)
    for adapter_id in (3, 100):
        made.load(adapter_id, expert_adapter())
    return made


SMALL_TRACE = {"requests": const(50), "adapters": const(100), "rate": const(100.0)}
CALLS: dict[str, Callable[[], Made]] = {
    "Adapter": plain(
        sgmv.Adapter, A=lambda: pair()[0], B=lambda: pair()[1], scaling=const(2.0)
    ),
    "Adapter.from_peft": plain(
        sgmv.Adapter.from_peft, directory=peft_directory, module=const("up")
    ),
    "AdapterStack": plain(
        sgmv.AdapterStack, h_in=const(100), h_out=const(100), slots=const(100),
        max_rank=const(100), dtype=const("float32"),
    ),
    "AdapterStack.from_adapters": plain(
        sgmv.AdapterStack.from_adapters, adapters=adapters, h_in=const(H_IN), h_out=const(H_OUT),
        dtype=const("float32"),
    ),
    "AdapterStack.from_adapters, a list": plain(
        sgmv.AdapterStack.from_adapters, adapters=lambda: [pair(), None]
    ),
    "AdapterStack.load": method(stack, "load", adapter_id=const(100), adapter=pair),
    "AdapterStack.unload": method(stack, "unload", adapter_id=const(100)),
    "AdapterStack.fitted": method(stack, "fitted", adapter=lambda: sgmv.Adapter(*pair())),
    "AdapterStack[]": method(stack, "__getitem__", adapter_id=const(100)),
    "AdapterStack in": method(stack, "__contains__", adapter_id=const(100)),
    "Segments": plain(
        sgmv.Segments, rows=const([1, 0, 2]), seq_start=const([0, 1, 3]), adapter_ids=const([-1, 3])
    ),
    "Segments, arrays": plain(
        sgmv.Segments, rows=lambda: np.array([1, 0, 2]), seq_start=lambda: np.array([0, 1, 3]),
        adapter_ids=lambda: np.array([-1, 3]),
    ),
    "Segments.stats": method(
        segments, "stats", h_in=const(100), h_out=const(100), ranks=const(100), itemsize=const(2)
    ),
    "Segments.stats, a list": method(
        segments, "stats", h_in=const(100), h_out=const(100), ranks=const([0, 100, 100])
    ),
    "Segments.stats, an array": method(
        segments, "stats", h_in=const(100), h_out=const(100), ranks=lambda: np.array([0, 100, 9])
    ),
    "Segments.stats, a mapping": method(
        segments, "stats", h_in=const(100), h_out=const(100), ranks=lambda: {3: 100, 100: 100}
    ),
    "add_lora": plain(sgmv.add_lora, y=y, x=x, stack=stack, adapter_ids=ids, backend=const(None)),
    "add_lora, an array": plain(
        sgmv.add_lora, y=y, x=x, stack=stack, adapter_ids=lambda: np.array(IDS)
    ),
    "add_lora_embedding": plain(
        sgmv.add_lora_embedding, y=y, tokens=const([0, 2, 1, 0, 2]), stack=stack, adapter_ids=ids,
        backend=const(None),
    ),
    "add_lora, segments": plain(sgmv.add_lora, y=y, x=x, stack=stack, adapter_ids=segments),
    "shrink": plain(sgmv.shrink, x=x, stack=stack, segments=segments, backend=const(None)),
    "expand": plain(
        sgmv.expand, v=lambda: array(N, R), stack=stack, segments=segments, y=y,
        backend=const(None),
    ),
    "apply_batched": plain(
        sgmv.apply_batched, x=x, W=lambda: array(H_OUT, H_IN), adapters=adapters, adapter_ids=ids,
        scalings=const(2.0),
    ),
    "apply_batched, a mapping": plain(
        sgmv.apply_batched, x=x, W=lambda: array(H_OUT, H_IN), adapters=adapters, adapter_ids=ids,
        scalings=lambda: {3: 2.0, 100: 1},
    ),
    "apply_batched, sequences": plain(
        sgmv.apply_batched, x=x, W=lambda: array(H_OUT, H_IN), adapters=lambda: [pair(), pair()],
        adapter_ids=lambda: np.array([1, -1, 0, 1, 1]), scalings=lambda: [2.0, 1.0],
    ),
    "apply_batched, an array": plain(
        sgmv.apply_batched, x=x, W=lambda: array(H_OUT, H_IN), adapters=lambda: [pair(), pair()],
        adapter_ids=lambda: np.array([1, -1, 0, 1, 1]), scalings=lambda: np.array([2.0, 1.0]),
    ),
    "apply_single": plain(
        sgmv.apply_single, x=x, W=lambda: array(H_OUT, H_IN), A=lambda: pair()[0],
        B=lambda: pair()[1], scaling=const(2.0),
    ),
    "lora_delta": plain(
        sgmv.lora_delta, x=x, A=lambda: pair()[0], B=lambda: pair()[1], scaling=const(2.0)
    ),
    "get_num_threads": plain(sgmv.get_num_threads),
    "info": plain(sgmv.info),
    "load_peft": plain(sgmv.load_peft, directory=peft_directory),
    "load_peft, a model": plain(
        sgmv.load_peft, directory=peft_directory, model=const({"up": (H_IN, H_OUT)})
    ),
    "segment": plain(sgmv.segment, adapter_ids=ids),
    "segment, an array": plain(sgmv.segment, adapter_ids=lambda: np.array(IDS)),
    "set_num_threads": plain(sgmv.set_num_threads, n=const(2)),
    "warm_up": plain(sgmv.warm_up, dtypes=const("float32")),
    "warm_up, a list": plain(sgmv.warm_up, dtypes=const(["float32"])),
    # layouts
    "BatchLenInfo": plain(layouts.BatchLenInfo, prefills=const([100, 2]), decode=const(100)),
    "BatchLenInfo.adapter_ids": method(
        LAYOUTS["batch lens"], "adapter_ids", request_ids=const([7, -1, 7, 4])
    ),
    "BatchLenInfo.request_ids": method(
        LAYOUTS["batch lens"], "request_ids", adapter_ids=const([7, 7, 7, 4, 4, -1, 4])
    ),
    "flashinfer": plain(layouts.flashinfer, batch=ids, slots=lambda: {3: 0, 100: 100}),
    "lorax": plain(layouts.lorax, batch=ids, ranks=lambda: {3: 100, 100: 16}),
    "lorax, one rank": plain(layouts.lorax, batch=ids, ranks=const(100)),
    "lorax, merged": plain(
        layouts.lorax, batch=lambda: [*map(list, MIXED)], ranks=const(16),
        weights=lambda: np.array(WEIGHTS, F),
    ),
    "llamacpp": plain(
        layouts.llamacpp, batch=lambda: [*map(list, MIXED)], weights=lambda: np.array(WEIGHTS, F),
        slots=lambda: {3: 0, 100: 1},
    ),
    "peft": plain(layouts.peft, batch=ids, names=lambda: {3: "fr", 100: "el"}),
    "punica": plain(layouts.punica, batch=ids, stack=stack, lora_rank=const(R)),
    "sglang": plain(
        layouts.sglang, batch=ids, stack=stack, seq_lens=const([1, 1, 1, 1, 1]),
        backend=const("csgmv"), max_lora_chunk_size=const(100),
    ),
    "sglang, triton": plain(
        layouts.sglang, batch=ids, stack=stack, seq_lens=const([1, 1, 1, 1, 1]),
        backend=const("triton"),
    ),
    "sglang, torch_native": plain(
        layouts.sglang, batch=ids, stack=stack, seq_lens=const([1, 1, 1, 1, 1]),
        backend=const("torch_native"),
    ),
    "vllm_v0": plain(
        layouts.vllm_v0, batch=ids, slots=lambda: {3: 0, 100: 100}, sort=const(False)
    ),
    "vllm_v0, slots": plain(layouts.vllm_v0, batch=ids),
    "vllm_v1": plain(
        layouts.vllm_v1, batch=ids, max_loras=const(101), slots=lambda: {3: 0, 100: 100}
    ),
    "vllm_v1, an array": plain(
        layouts.vllm_v1, batch=lambda: np.array(IDS), max_loras=const(127), slots=stack
    ),
    **{f"check, {name}": checked(name) for name in LAYOUTS},
    "check, ids": plain(
        layouts.check, metadata=LAYOUTS["vllm_v0"], adapter_ids=const([3, -1, 100]), n=const(3),
        slots=lambda: {3: 0, 100: 1}, names=lambda: {3: "fr", 100: "el"},
    ),
    "check, names": plain(
        layouts.check, metadata=LAYOUTS["peft"], adapter_ids=ids,
        names=lambda: {3: "3", 100: "100"},
    ),
    "check, mixtures": plain(
        layouts.check, metadata=LAYOUTS["llamacpp"], adapter_ids=lambda: [*map(list, MIXED)],
        slots=lambda: {3: 0, 100: 1}, weights=lambda: np.array(WEIGHTS, F),
    ),
    "AdapterNames.adapter_ids": back("peft", names=lambda: {3: "3", 100: "100"}),
    "FlashInfer.adapter_ids": back("flashinfer", n=const(5), slots=lambda: {3: 3, 100: 100}),
    "LoRABatchInfo.adapter_ids": back("sglang", stack=stack),
    "LoRAKernelMeta.adapter_ids": back("vllm_v1", slots=lambda: {3: 0, 100: 1}),
    "LlamaCpp.adapter_ids": back("llamacpp", slots=lambda: {3: 0, 100: 1}),
    "LlamaCpp.weights": lambda: (LAYOUTS["llamacpp"]().weights, {}),
    "Lorax.adapter_ids": back("lorax"),
    "Lorax.weights": lambda: (LAYOUTS["lorax merged"]().weights, {}),
    "Punica.adapter_ids": lambda: (
        lambda n: layouts.punica([3, -1, 3], _stack).adapter_ids(n, _stack), {"n": 3}
    ),
    "VllmV0.adapter_ids": back("vllm_v0", slots=lambda: {3: 0, 100: 1}),
    # compat.punica
    "bgmv": plain(
        punica.bgmv, y=lambda: array(N, R), x=x, w_T_all=lambda: array(2, 3, R, H_IN),
        indicies=indices, layer_idx=const(2), scale=const(2.0),
    ),
    "add_lora_bgmv": plain(
        punica.add_lora_bgmv, y=y, x=x, wa_T_all=lambda: array(2, 3, R, H_IN),
        wb_T_all=lambda: array(2, 3, H_OUT, R), indicies=indices, layer_idx=const(2),
        scale=const(2.0),
    ),
    **{name: one_sgmv_of_punica(name) for name in ("sgmv", "sgmv_cutlass")},
    **{
        name: sgmv_of_punica(name)
        for name in ("add_lora_sgmv", "add_lora_sgmv_cutlass", "add_lora_sgmv_custom_cutlass")
    },
    "LoraWeight": plain(
        punica.LoraWeight, num_layers=const(2), in_features=const(100), out_features=const(100),
        lora_rank=const(100), dtype=const("float32"), device=const("cpu"),
    ),
    "LoraWeight.copy_from_tensor": method(
        lambda: punica.LoraWeight(1, H_IN, H_OUT, R, "float32"), "copy_from_tensor",
        a=lambda: array(1, R, H_IN), b=lambda: array(1, H_OUT, R),
    ),
    "BatchedLoraWeight": plain(
        punica.BatchedLoraWeight,
        weights=lambda: [punica.LoraWeight(1, H_IN, H_OUT, R, "float32")],
    ),
    # compat.vllm
    **{name: shrink_of_vllm(name) for name in ("bgmv_shrink", "sgmv_shrink")},
    **{
        name: expand_of_vllm(name)
        for name in ("bgmv_expand", "sgmv_expand", "bgmv_expand_slice", "sgmv_expand_slice")
    },
    "LoRAMapping": plain(
        vllm.LoRAMapping, index_mapping=const((7, 0)), prompt_mapping=const((7,)),
        is_prefill=const(True),
    ),
    "PunicaWrapper": plain(
        vllm.PunicaWrapper, max_num_batched_tokens=const(8), max_batches=const(8),
        device=const("cpu"),
    ),
    "PunicaWrapper.update_metadata": method(
        wrapper, "update_metadata", mapping=lambda: vllm.LoRAMapping((7, 7, 0), (7, 0)),
        lora_index_to_id=const([None, 7, 9]), max_loras=const(3),
    ),
    "PunicaWrapper.update_metadata, ids": lambda: (
        lambda index_mapping, prompt_mapping: wrapper().update_metadata(
            vllm.LoRAMapping(index_mapping, prompt_mapping), [None, 7], 2
        ),
        {"index_mapping": [7, 7, 0], "prompt_mapping": [7, 0]},
    ),
    "PunicaWrapper.add_shrink": method(
        wrapper, "add_shrink", y=lambda: (array(N, R),), x=x, lora_a_stacked=stacked(R, H_IN),
        scale=const(2.0),
    ),
    "PunicaWrapper.add_expand": method(
        wrapper, "add_expand", y=lambda: array(N, H_OUT + 2), x=lambda: (array(N, R),),
        lora_b_stacked=stacked(H_OUT, R), output_slices=const((H_OUT,)), offset_start=const(1),
        add_inputs=const(True),
    ),
    "PunicaWrapper.add_lora_embedding": method(
        wrapper, "add_lora_embedding", y=y, x=lambda: array(N, R),
        lora_b_stacked=lambda: array(2, 1, H_OUT, R), add_inputs=const(True),
    ),
    "PunicaWrapper.add_lora_linear": method(
        wrapper, "add_lora_linear", y=y, x=x, lora_a_stacked=stacked(R, H_IN),
        lora_b_stacked=stacked(H_OUT, R), scale=const(2.0), output_slices=const((H_OUT,)),
        buffer=lambda: (array(N, R),),
    ),
    "PunicaWrapper.add_lora_logits": method(
        wrapper, "add_lora_logits", y=lambda: array(2, H_OUT), x=lambda: array(2, H_IN),
        lora_a_stacked=lambda: array(2, 1, R, H_IN), lora_b_stacked=lambda: array(2, 1, H_OUT, R),
        scale=const(2.0), buffer=lambda: array(2, R),
    ),
    "PunicaWrapper.add_lora_fused_moe": method(
        wrapper, "add_lora_fused_moe", **of_experts, sorted_token_ids=const(None),
        expert_ids=lambda: EXPERT_IDS.reshape(-1), num_tokens_post_padded=const(None),
        max_lora_rank=const(R), top_k_num=const(2), shrink_config=const({}),
        expand_config=const({}), mul_routed_weight=const(False), fully_sharded=const(False),
        offset=const(0), token_lora_mapping=const([1, 0, -1, 0, 1]), add_inputs=const(True),
    ),
    "PunicaWrapper.add_lora_w13": method(
        wrapper, "add_lora_w13", **of_experts, topk_ids=lambda: EXPERT_IDS.copy(),
        expert_map=const(None), w1=const(None), w2=const(None), num_tokens=const(N),
        top_k_num=const(2), max_loras=const(2),
    ),
    "PunicaWrapper.add_lora_w2": method(
        wrapper, "add_lora_w2", **{**of_experts, "x": lambda: array(2 * N, H_IN)},
        sorted_token_ids_lora=const(None), expert_ids_lora=lambda: EXPERT_IDS.reshape(-1),
        num_tokens_post_padded_lora=const(None), token_lora_mapping=const([1, 0, -1, 0, 1]),
        num_tokens=const(N), w1=const(None), w2=const(None), top_k_num=const(2),
        max_loras=const(2),
    ),
    # experts
    "ExpertAdapter": plain(
        experts.ExpertAdapter, A=lambda: array(3, R, H_IN), B=lambda: array(3, H_OUT, R),
        scaling=const(2.0),
    ),
    "ExpertAdapter.joined": plain(
        experts.ExpertAdapter.joined, first=expert_adapter, second=expert_adapter
    ),
    "ExpertAdapter.of": method(expert_adapter, "of", expert=const(1)),
    "ExpertStack": plain(
        experts.ExpertStack, experts=const(3), h_in=const(H_IN), h_out=const(H_OUT),
        slots=const(2), max_rank=const(R), dtype=const("float32"),
    ),
    "ExpertStack.load": method(
        expert_stack, "load", adapter_id=const(9), adapter=expert_adapter
    ),
    "ExpertStack.unload": method(expert_stack, "unload", adapter_id=const(3)),
    "add_lora, experts": plain(
        experts.add_lora, y=lambda: array(N, 2, H_OUT), x=x, stack=expert_stack,
        expert_ids=lambda: EXPERT_IDS.copy(), adapter_ids=const([3, -1, 100, 3, -1]),
    ),
    "grouped_matmul": plain(
        experts.grouped_matmul, x=x, W=lambda: array(3, H_OUT, H_IN),
        expert_ids=lambda: EXPERT_IDS.copy(), weights=lambda: np.full((N, 2), 0.5, "f"),
    ),
    "top_k": plain(experts.top_k, router_logits=lambda: array(N, 3), k=const(2)),
    "moe_layer": plain(
        experts.moe_layer, x=x, routing=lambda: (EXPERT_IDS.copy(), np.full((N, 2), 0.5, "f")),
        W13=lambda: array(3, 8, H_IN), W2=lambda: array(3, H_IN, 4),
    ),
    # serving
    "LoRARequest": plain(
        LoRARequest, lora_name=const("fr"), lora_int_id=const(100), lora_path=const("a/fr")
    ),
    "LoRAMixture": plain(LoRAMixture, members=const([(FRENCH, 0.5), (FRENCH, 2.0)])),
    "AdapterSlots": plain(
        AdapterSlots, max_loras=const(2), max_cpu_loras=const(100), max_lora_rank=const(100),
        modules=lambda: {"up": (100, 100)}, dtype=const("float32"), policy=const("lru"),
        read=const(read),
    ),
    "AdapterSlots.load": method(adapter_slots, "load", lora_request=const(FRENCH)),
    "AdapterSlots.activate": method(
        adapter_slots, "activate", lora_requests=lambda: [FRENCH, None, GREEK]
    ),
    "AdapterSlots.try_activate": method(
        adapter_slots, "try_activate", lora_requests=lambda: [FRENCH, None, GREEK]
    ),
    "AdapterSlots.prefetch": method(
        adapter_slots, "prefetch", lora_requests=lambda: [FRENCH, None, GREEK]
    ),
    "AdapterSlots.deactivate": method(adapter_slots, "deactivate", lora_int_id=const(7)),
    "AdapterSlots.unload": method(adapter_slots, "unload", lora_int_id=const(7)),
    "AdapterSlots.pin": method(adapter_slots, "pin", lora_int_id=const(7)),
    "AdapterSlots.unpin": method(pinned_slots, "unpin", lora_int_id=const(7)),
    "AdapterSlots.stack": method(adapter_slots, "stack", module=const("up")),
    "Scheduler": plain(
        Scheduler, max_loras=const(100), max_num_seqs=const(100), max_overtakes=const(100)
    ),
    "Scheduler.add": method(scheduler, "add", request_id=const("r2"), lora_request=const(GREEK)),
    "Scheduler.schedule": method(scheduler, "schedule", pinned=lambda: [7, 9]),
    "Scheduler.admit": method(scheduler, "admit", pinned=lambda: {7}),
    "Scheduler.finish": method(scheduler, "finish", request_id=const("r0")),
    "Costs": plain(
        serving.Costs, step_us=const(100), row_us=const(100), adapter_bytes=const(100),
        load_rate=const(2e9), read_rate=const(100.0), adapter_us=const(100), rank_us=const(0.5),
    ),
    "Trace": plain(
        Trace, arrival_us=const([0, 100, 100]), adapter_ids=const([1, 0, 100]),
        tokens=const([100, 1, 1]), ranks=const([8, 1, 100]), tenants=const([3, 0, 100]),
    ),
    "Trace, arrays": plain(
        Trace, arrival_us=lambda: np.array([0, 100, 100]), adapter_ids=lambda: np.array([1, 0, 9]),
        tokens=lambda: np.array([100, 1, 1]),
    ),
    "draw_trace": plain(
        serving.draw_trace, **SMALL_TRACE, alpha=const(1.0), burst=const(2.0),
        mean_tokens=const(8.0), arrivals=const("diurnal"), updates=const(1.0),
        turnover=const(1.0), seed=const(100),
    ),
    "Trace.with_ranks": method(
        lambda: Trace([0, 100], [1, 2], [1, 1]), "with_ranks", ranks=const([8, 100])
    ),
    "Placement": plain(
        serving.Placement, rule=const("ray"), max_ongoing=const(100), spill=const(100),
        plan_s=const(60.0), seed=const(100),
    ),
    "Failure": plain(serving.Failure, replica=const(1), from_s=const(1.0), until_s=const(2.0)),
    "simulate_replicas": plain(
        serving.simulate_replicas, trace=lambda: Trace([0, 100, 100], [1, 0, 100], [100, 1, 1]),
        replicas=const(3), placement=const("ray"), max_loras=const(2), policy=const("lru"),
        max_cpu_loras=const(100), max_num_seqs=const(100), max_overtakes=const(100),
        costs=lambda: serving.Costs(), failures=lambda: [serving.Failure(1, 1.0, 2.0)],
    ),
    "fewest_replicas": plain(
        serving.fewest_replicas, trace=lambda: Trace([0, 100], [1, 2], [1, 1]),
        target_s=const(2.0), most=const(4), placement=const("ray"),
    ),
    "simulate": plain(
        serving.simulate, trace=lambda: Trace([0, 100, 100], [1, 0, 100], [100, 1, 1]),
        max_loras=const(2), policy=const("lru"), max_cpu_loras=const(100), max_num_seqs=const(100),
        max_overtakes=const(100), costs=lambda: serving.Costs(),
    ),
    "simulate, a trace": lambda: (
        lambda arrival_us, adapter_ids, tokens: serving.simulate(
            Trace(arrival_us, adapter_ids, tokens)
        ),
        {"arrival_us": [0, 100, 100], "adapter_ids": [1, 0, 100], "tokens": [100, 1, 1]},
    ),
    "simulate, costs": lambda: (
        lambda **costs: serving.simulate(
            Trace([0, 0], [1, 2], [9, 9]), costs=serving.Costs(**costs)
        ),
        {"step_us": 100, "row_us": 1, "adapter_bytes": 100, "load_rate": 1e9, "read_rate": 1e9},
    ),
    "ReplicasOutcome.wait_s": method(
        lambda: serving.simulate_replicas(Trace([0, 0], [1, 2], [9, 9]), 2), "wait_s",
        percent=const(50),
    ),
    "Outcome.wait_s": method(
        lambda: serving.simulate(Trace([0, 0], [1, 2], [9, 9])), "wait_s", percent=const(50)
    ),
    "make_step": plain(
        make_step, slots=adapter_slots, requests=lambda: {"r0": FRENCH, "r1": None},
        tokens=lambda: {"r0": 100},
    ),
    "next_step": plain(
        serving.next_step, scheduler=scheduler, slots=adapter_slots, tokens=lambda: {"r0": 100},
        wait=const(True),
    ),
    "AdapterStore": plain(serving.AdapterStore, directory=store_directory, cache_bytes=const(100)),
    "AdapterStore.refresh": method(adapter_store, "refresh"),
    "AdapterStore.request": method(adapter_store, "request", name=const("up")),
    "AdapterStore.read": method(
        adapter_store, "read", lora_path=lambda: f"{store_directory()}/up"
    ),
    "Step.add_lora_embedding": method(
        step, "add_lora_embedding", module=const("up"), y=y, tokens=const([0, 2, 1, 0, 2]),
        backend=const(None),
    ),
    "Step.add_lora": method(step, "add_lora", module=const("up"), y=y, x=x, backend=const(None)),
    "Step.saved": method(step, "saved", parameter=const("score.weight")),
    # emulator
    "punica_bgmv_shrink": launch("punica_bgmv_shrink", h_in=768, r=16, device=device()),
    "punica_bgmv_expand": launch("punica_bgmv_expand", r=16, h_out=768, device=device()),
    "punica_cutlass_expand": launch("punica_cutlass_expand", r=100, h_out=100, device=device()),
    "punica_sgmv_shrink": launch(
        "punica_sgmv_shrink", h_in=100, r=16, device=device(), release="1.1.0", opted_in=True
    ),
    "sglang_csgmv_shrink": launch(
        "sglang_csgmv_shrink", h_in=100, r=100, device=device(), max_lora_chunk_size=100
    ),
    "vllm_moe_shrink": launch(
        "vllm_moe_shrink", expert_ids=[[0], [1], [0], [-1], [1]], h_in=100, r=100, experts=100,
        max_loras=101, device=device(),
    ),
    "vllm_moe_expand": launch(
        "vllm_moe_expand", expert_ids=[[0], [1], [0], [-1], [1]], r=100, h_out=100, experts=100,
        max_loras=101, device=device(),
    ),
    "sglang_csgmv_expand": launch(
        "sglang_csgmv_expand", r=100, h_out=[100, 100], device=device(), max_lora_chunk_size=100
    ),
    "vllm_v1_shrink": launch("vllm_v1_shrink", h_in=100, r=100, device=device(), max_loras=101),
    "vllm_v1_expand": launch("vllm_v1_expand", r=100, h_out=100, device=device(), max_loras=101),
    "Device": plain(
        emulator.Device, name=const("toy"), sms=const(100), shared_memory_per_sm=const(100 * 1024),
        shared_memory_per_block=const(99 * 1024), blocks_per_sm=const(16),
        threads_per_sm=const(1536), bandwidth=const(10**11), fp16_peak=const(10**13),
    ),
    "Device.resident_blocks": method(
        device, "resident_blocks", threads=const(100), shared_memory=const(1024)
    ),
    "Device.roofline_s": method(device, "roofline_s", flops=const(100), moved=const(100)),
    "Launch.run": method(
        ran, "run", x=lambda: array(3, 768, dtype=np.float16),
        weights=lambda: {3: array(8, 768, dtype=np.float16)},
        y=lambda: array(3, 8, dtype=np.float16), scaling=const(2.0), order=const("random"),
        seed=const(100),
    ),
    "Launch.spread": method(
        ran, "spread", x=lambda: array(3, 768, dtype=np.float16),
        weights=lambda: {3: array(8, 768, dtype=np.float16)},
        y=lambda: array(3, 8, dtype=np.float16), scaling=const(2.0), seeds=const([1, 100]),
    ),
    "half_v_error": plain(
        emulator.half_v_error, v=lambda: array(N, R), B=lambda: array(H_OUT, R),
        dtype=const(np.float16),
    ),
    # popularity, models
    "popularity": plain(popularity.popularity, kind=const("skewed"), n=const(100), seed=const(100)),
    "popularity, distinct": plain(popularity.popularity, kind=const("distinct"), n=const(100)),
    "popularity, uniform": plain(popularity.popularity, kind=const("uniform"), n=const(100)),
    "popularity, identical": plain(popularity.popularity, kind=const("identical"), n=const(100)),
}  # fmt: skip
_stack = stack()


class Variant(NamedTuple):
    """One argument changed: which, how it is described, its value, whether it means the same."""

    argument: str
    told: str
    value: Any
    same: bool = False


NUMPY_INTEGERS = (
    *(np.int8, np.int16, np.int32, np.int64),
    *(np.uint8, np.uint16, np.uint32, np.uint64),
)
EDGES = (
    *(0, 1, -1, -2, 2**31 - 1, 2**31, 2**32, 2**63 - 2, 2**63 - 1, 2**63, 2**64, 2**127, 10**400),
    *(-(2**31), -(2**31) - 1, -(2**63), -(2**63) - 1, -(2**127)),
    *(float("nan"), float("inf"), -float("inf"), 0.5, -0.0, 3.0, 1e39, 1e308, 1j),
    *(np.float16("nan"), np.float32("inf"), np.float64("nan"), ml_dtypes.bfloat16(3)),
    *(np.int64(-(2**63)), np.uint64(2**64 - 1), np.int8(-128), np.longdouble(3)),
    *(True, False, np.True_, None, "", "a", "3", "\0", b"a", [], (), {}, object()),
    *(np.array(3), np.array(np.nan), np.array("a"), np.array(None)),
    *(np.datetime64(3, "s"), np.timedelta64(3, "s")),
)


def shown(value: Any) -> str:
    text = f"{type(value).__name__} {value!r}".replace("\n", " ")
    return text if len(text) < 60 else text[:57] + "..."


def scalars(value: Any) -> Iterator[tuple[Any, bool]]:
    """A number's place taken by another: (value, whether it is the same number)."""
    if isinstance(value, int) and not isinstance(value, bool):
        for kind in NUMPY_INTEGERS:
            if np.iinfo(kind).min <= value <= np.iinfo(kind).max:
                yield kind(value), True
        with np.errstate(over="ignore"):
            yield np.float16(value), False
    if isinstance(value, float):
        for kind in (np.float16, np.float32, np.float64, np.longdouble, ml_dtypes.bfloat16):
            with np.errstate(over="ignore"):
                if float(kind(value)) == value:
                    yield kind(value), True
        if value == int(value) and abs(value) < 100:
            yield int(value), True
            yield np.int8(value), True
    for edge in EDGES:
        yield edge, False


def arrays(value: np.ndarray) -> Iterator[tuple[str, Any, bool]]:
    """An array's place taken by others: elements, types, shapes, strides, rights."""
    if value.dtype.kind in "iu":
        elements: tuple[Any, ...] = (0, -1, -2, 2**31, 2**62, 2**63 - 1, -(2**63), 64)
        kinds: tuple[Any, ...] = (*NUMPY_INTEGERS, np.float16, np.float64, bool, object, "U3", "m8")
        kinds += (">i8",)
    else:
        elements = (np.nan, np.inf, -np.inf, 65504.0, 0.0)
        kinds = (np.float16, np.float64, ml_dtypes.bfloat16, int, bool, complex, object, ">f4")
        kinds += (np.longdouble, np.int16, np.uint16)
    for at in {0, value.size - 1} if value.size else ():
        for element in elements:
            if value.dtype.kind in "iu" and not np.can_cast(
                np.min_scalar_type(element), value.dtype
            ):
                continue
            other = value.copy()
            other.flat[at] = element
            yield f"element {at} = {element}", other, False
    for kind in kinds:
        with np.errstate(all="ignore"):
            yield f"as {kind}", value.astype(kind), False
    if value.dtype.kind in "iu":
        yield "a list", value.tolist(), False
        for element in (2**63, 2**64, 2**127, -(2**127), None, "a", 0.5, np.nan, True):
            other = value.astype(object)
            other.flat[-1:] = element
            yield f"objects, the last {element!r}", other, False
    wide = np.zeros((*value.shape[:-1], 2 * value.shape[-1]), value.dtype)
    wide[..., ::2] = value
    yield "strided", wide[..., ::2], True
    yield "backwards", np.ascontiguousarray(value[::-1])[::-1], True
    frozen = value.copy()
    frozen.flags.writeable = False
    yield "read-only", frozen, False
    yield "no rows", value[:0], False
    yield "one row fewer", value[:-1], False
    yield "one column fewer", value[..., :-1], False
    yield "one axis more", value[None], False
    if value.size:
        yield "one axis less", value[0], False
        yield "no axis", np.array(value.flat[0]), False
    yield "transposed", value.T, value.ndim == 1
    yield "broadcast", np.broadcast_to(value[:1], value.shape), False
    yield "masked", np.ma.masked_array(value), False
    yield "of many axes", value.reshape((1,) * 20 + value.shape), False
    yield "no columns", value[..., :0], False
    yield "a list of lists", value.tolist(), False


def variants(argument: str, value: Any) -> Iterator[Variant]:
    """The argument replaced, and each of its elements."""
    if isinstance(value, np.ndarray):
        for told, other, same in arrays(value):
            yield Variant(argument, told, other, same)
    if isinstance(value, (list, tuple)):
        for at in sorted({0, len(value) - 1}) if value else []:
            for inner in variants(argument, value[at]):
                other = [*value]
                other[at] = inner.value
                kept = tuple(other) if isinstance(value, tuple) else other
                yield Variant(argument, f"[{at}]: {inner.told}", kept, inner.same)
        yield Variant(argument, "one more", type(value)([*value, *value[-1:]]))
        yield Variant(argument, "one fewer", type(value)(value[:-1]))
        if all(isinstance(one, int) for one in value):
            for kind in (np.int8, np.uint8, np.uint64, np.float16, object):
                with np.errstate(all="ignore"):
                    whole = np.array(value).astype(kind)
                same = kind in (np.int8, object) and not isinstance(value, tuple)
                yield Variant(argument, f"an array of {kind}", whole, same)
    if isinstance(value, Mapping):
        for key in value:
            for inner in variants(argument, value[key]):
                told = f"[{key!r}]: {inner.told}"
                yield Variant(argument, told, {**value, key: inner.value}, inner.same)
        for key, same in scalars(next(iter(value), 0)):
            if key.__hash__ is not None:
                others = {key: next(iter(value.values()), 0), **dict(list(value.items())[1:])}
                yield Variant(argument, f"key {shown(key)}", others, same and len(value) > 0)
            if key.__hash__ is not None and not same:
                yield Variant(argument, f"one more key {shown(key)}", {**value, key: 0})
        yield Variant(argument, "nothing in it", {})
    for other, same in scalars(value):
        yield Variant(argument, shown(other), other, same)


def state(value: Any, depth: int = 0) -> Any:
    """What can be compared with itself after the call."""
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return [state(one, depth + 1) for one in value.ravel().tolist()], value.shape
        return value.dtype.str, value.shape, value.tobytes(), value.flags.writeable
    if isinstance(value, np.bool_ | np.integer | np.floating):
        return repr(value.item())
    if isinstance(value, np.generic):
        return type(value), value.tobytes()
    if isinstance(value, (list, tuple)) and depth < 5:
        return type(value), [state(one, depth + 1) for one in value]
    if isinstance(value, Mapping) and depth < 5:
        return [(state(k, depth + 1), state(v, depth + 1)) for k, v in value.items()]
    if isinstance(value, sgmv.AdapterStack):
        return [(i, state(value[i])) for i in value.ids], repr(value)
    if isinstance(value, experts.ExpertStack):
        return value.ids, [state(value.stack[i]) for i in value.stack.ids]
    if isinstance(value, AdapterSlots):
        return str(value), repr(value), value.active, value.loaded, value.pinned
    if isinstance(value, Scheduler):
        return repr(value), list(value.running), list(value.waiting)
    if isinstance(value, vllm.PunicaWrapper):
        return state(value.metadata), state(value.sampler_indices), value.is_prefill
    if isinstance(value, punica.LoraWeight):
        return state(value.wa), state(value.wb)
    if is_dataclass(value) and not isinstance(value, type) and depth < 5:
        return type(value), [state(getattr(value, f.name), depth + 1) for f in fields(value)]
    return repr(value) if isinstance(value, int | float) else value


def owner(call: Callable[..., Any]) -> Any:
    """The object whose method this is."""
    return getattr(call, "__self__", None)


def public() -> set[str]:
    """Every public name of MODULES, and every public method of the classes among them."""
    found: set[str] = set()
    for module in MODULES:
        for name in names_of(module):
            value = getattr(module, name)
            found.add(name)
            if isinstance(value, type):
                found |= {
                    f"{name}.{method}"
                    for method, of in methods_of(value)
                    if inspect.isfunction(of) or isinstance(of, classmethod)
                }
    return found


def names_of(module: ModuleType) -> list[str]:
    listed: list[str] = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    return listed
