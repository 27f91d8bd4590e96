"""Steps: what they refuse, and requests whose adapter fails beside others that run."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sgmv
from reference import compare
from reference.bounds import add_lora_bound
from sgmv import serving
from sgmv.errors import (
    DtypeError,
    MemoryLayoutError,
    PeftError,
    ServingError,
    SgmvError,
    ShapeError,
    StaleStepError,
)
from sgmv.serving import AdapterSlots, LoRAMixture, LoRARequest, Scheduler, make_step, next_step
from tests.help.peft_files import form
from tests.help.served import BAD, FIXTURES, layers_of, lora, make_slots, read
from tests.help.serving_model import LAYERS


@pytest.mark.once
def test_a_step_refuses_as_add_lora_does() -> None:
    slots = make_slots(modules=LAYERS)
    step = serving.make_step(slots, {"r0": lora(1)})
    y, x = np.zeros((1, 4), "f"), np.ones((1, 3), "f")
    with pytest.raises(ServingError, match=r"'up_proj'; there are 'q', 'up'"):
        step.add_lora("up_proj", y, x)
    with pytest.raises(ShapeError, match="x: expected"):
        step.add_lora("q", y, np.ones((2, 3), "f"))
    y.flags.writeable = False
    with pytest.raises(MemoryLayoutError, match="y: expected"):
        step.add_lora("q", y, x)
    with pytest.raises(SgmvError, match="tokens"):
        serving.make_step(slots, {"r0": None}, {"r0": -1})


def raising(error: Exception) -> Any:
    raise error


# What the reader does for a path, and what comes of it.
FAILING: dict[str, tuple[Any, type[Exception], str]] = {
    **{
        case: (lambda layers=layers: layers_of(layers), error, part)
        for case, (layers, error, part) in BAD.items()
    },
    "no directory": (lambda: sgmv.load_peft("no-such-place"), PeftError, "no-such-place"),
    "a reader that fails": (lambda: raising(OSError("disk on fire")), OSError, "disk on fire"),
    "a reader that gives nothing": (lambda: None, DtypeError, "NoneType for LoRARequest"),
    "a reader of raw arrays": (lambda: {"q": np.ones(3)}, DtypeError, "ndarray for 'q' of LoRAReq"),
    "the second layer of two": (
        lambda: layers_of({"q": ((1, 3), (4, 1)), "up": ((1, 9), (5, 1))}), ShapeError, "'up'",
    ),
}  # fmt: skip


def rows_alone(request_ids: list[str], loras: dict[str, LoRARequest | None]) -> Any:
    """What these requests' rows are, one each, on slots that have seen nothing else."""
    slots = make_slots(3, 4, modules=LAYERS)
    step = serving.make_step(slots, {i: loras[i] for i in request_ids})
    return answers(step)


def answers(step: Any) -> dict[str, np.ndarray]:
    return {
        name: step.add_lora(name, np.zeros((step.n, h_out), "f"), np.ones((step.n, h_in), "f"))
        for name, (h_in, h_out) in LAYERS.items()
    }


@pytest.mark.once
@pytest.mark.parametrize("case", FAILING)
def test_an_adapter_that_cannot_be_loaded_stops_no_other(case: str) -> None:
    """Its requests are dropped and listed with the reason; the others get what they get alone."""
    reads, error, part = FAILING[case]
    slots = make_slots(3, 4, modules=LAYERS, read=lambda p: reads() if p == "bad" else read(p))
    scheduler = Scheduler[str](3)
    loras = {"good": lora(1), "bad": lora(2, "bad"), "base": None, "too": lora(2, "bad"),
             "other": lora(3)}  # fmt: skip
    for request_id, lora_request in loras.items():
        scheduler.add(request_id, lora_request)
    step = serving.next_step(scheduler, slots)
    assert list(step.rows) == list(scheduler.running) == ["good", "base", "other"]
    assert [(i, one) for i, one, _ in step.failed] == [("bad", loras["bad"]), ("too", loras["bad"])]
    for *_, caught in step.failed:
        assert type(caught) is error
        assert part in str(caught)
        assert error is OSError or "a2" in str(caught)
    assert slots.active == [1, 3, None]
    assert slots.loaded == [1, 3]
    assert slots.counters.slot_misses == slots.counters.host_misses == 2
    for name, y in rows_alone(["good", "base", "other"], loras).items():
        np.testing.assert_array_equal(answers(step)[name], y)
    again = serving.next_step(scheduler, slots)
    assert list(again.rows) == ["good", "base", "other"]
    assert again.failed == ()


@pytest.mark.once
def test_all_of_a_steps_adapters_may_fail() -> None:
    slots, scheduler = make_slots(read=lambda path: {}), Scheduler[int](2)
    for number in range(4):
        scheduler.add(number, lora(1 + number))
    for first in (0, 2):  # two slots
        step = serving.next_step(scheduler, slots)
        assert (step.n, step.rows) == (0, {})
        assert [i for i, *_ in step.failed] == [first, first + 1]
    assert not scheduler.running
    assert not scheduler.waiting


@pytest.mark.once
def test_a_directory_that_is_removed_while_its_requests_wait(tmp_path: Path) -> None:
    """Requests that run keep their weights; those that come to run without them are dropped."""
    for name in ("attention-f32", "mlp-f16"):
        shutil.copytree(FIXTURES / "llama" / name, tmp_path / name)
    kept, gone = (lora(i, str(tmp_path / name)) for i, name in enumerate(os.listdir(tmp_path), 1))
    slots, scheduler = AdapterSlots(1, 1, 32), Scheduler[str](1, max_overtakes=0)
    scheduler.add("runs", gone)
    assert list(serving.next_step(scheduler, slots).rows) == ["runs"]
    for request_id, lora_request in (("kept", kept), ("waits", gone)):
        scheduler.add(request_id, lora_request)
    shutil.rmtree(gone.lora_path)
    assert list(serving.next_step(scheduler, slots).rows) == ["runs"]
    scheduler.finish("runs")
    step = serving.next_step(scheduler, slots)
    assert (list(step.rows), step.failed) == (["kept"], ())
    scheduler.finish("kept")
    step = serving.next_step(scheduler, slots)
    ((request_id, lora_request, error),) = step.failed
    assert (request_id, lora_request, type(error)) == ("waits", gone, PeftError)
    assert "no such directory" in str(error)
    assert slots.loaded == [kept.lora_int_id]


@pytest.mark.once
@pytest.mark.parametrize("fatal", [1, 2, 3, 4])
def test_an_adapter_that_fails_in_one_layer_of_many_leaves_nothing_of_it(
    fatal: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, scheduler = make_slots(2, 2, modules=LAYERS), Scheduler[str](2)
    load, calls = sgmv.AdapterStack.load, Counter[str]()

    def fails(self: sgmv.AdapterStack, *arguments: Any) -> None:
        calls["load"] += 1
        if calls["load"] == fatal:
            raise MemoryError
        load(self, *arguments)

    scheduler.add("a", lora(1))
    scheduler.add("b", lora(2))
    with monkeypatch.context() as patch:
        patch.setattr(sgmv.AdapterStack, "load", fails)
        step = serving.next_step(scheduler, slots)
    bad, good = ("a", "b") if fatal <= 2 else ("b", "a")
    assert list(step.rows) == [good]
    assert [(i, type(error)) for i, _, error in step.failed] == [(bad, MemoryError)]
    assert all(len(slots.stack(module)) == 1 for module in LAYERS)
    for name, y in rows_alone([good], {"a": lora(1), "b": lora(2)}).items():
        np.testing.assert_array_equal(answers(step)[name], y)


@pytest.mark.once
def test_another_version_of_a_pinned_adapter_stops_no_other() -> None:
    slots, scheduler = make_slots(modules=LAYERS), Scheduler[str](2)
    slots.load(lora(1))
    slots.pin(1)
    scheduler.add("new version", lora(1, "1/1"))
    scheduler.add("good", lora(2))
    step = serving.next_step(scheduler, slots)
    assert list(step.rows) == ["good"]
    assert [(i, "unpin it first" in str(error)) for i, _, error in step.failed] == [
        ("new version", True)
    ]
    assert slots.active == [1, 2]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_reach_their_own_rows_alone(value: float) -> None:
    """They load, as a model's own weights would: only the adapter's owner sees them."""

    def reads(path: str) -> dict[str, sgmv.Adapter]:
        found = layers_of({"q": ((2, 3), (4, 2)), "up": ((1, 2), (5, 1))})
        if path == "spoilt":
            for adapter in found.values():
                adapter.A[0, 1] = value
        return found

    slots, scheduler = make_slots(modules=LAYERS, read=reads), Scheduler[str](2)
    for request_id, one in (("a", lora(1)), ("spoilt", lora(2, "spoilt")), ("base", None)):
        scheduler.add(request_id, one)
    step = serving.next_step(scheduler, slots)
    assert step.failed == ()
    for y in answers(step).values():
        assert not np.isfinite(y[step.rows["spoilt"]]).any()
        assert (y[step.rows["a"]] > 0).all()
        assert (y[step.rows["base"]] == 0).all()


@pytest.mark.once
@pytest.mark.parametrize(
    ("names", "tokens", "part"),
    [
        (["r0", "r1"], {"r1": 2, "r11": 3}, r"tokens: .* got \['r11'\]; .*\(did you mean 'r1'\?\)"),
        (["r0", "r1"], {"zz": 3}, r"tokens: .* got \['zz'\]; .*\(there are 'r0', 'r1'\)"),
        ([0, 1], {7: 3}, r"tokens: .* got \[7\]; leave out .*\(there are \[0, 1\]\)"),
        (["r0", "r1"], {"r0": -1}, r"tokens\['r0'\]: expected at least 0, got -1"),
        (["r0", "r1"], {"r0": 1.5}, r"tokens\['r0'\]: expected an integer"),
    ],
)
def test_tokens_that_cannot_be_are_refused_before_anything_changes(
    names: list[Any], tokens: dict[Any, Any], part: str
) -> None:
    slots, scheduler = make_slots(), Scheduler[Any](1)
    for number, name in enumerate(names):
        scheduler.add(name, lora(1 + number))  # the second one waits in any case
    for _ in range(2):  # before the first step, and beside a running request
        before = list(scheduler.running), list(scheduler.waiting), str(slots), slots.counters
        with pytest.raises(SgmvError, match=part):
            serving.next_step(scheduler, slots, tokens)
        assert before == (
            list(scheduler.running), list(scheduler.waiting), str(slots), slots.counters
        )  # fmt: skip
        serving.next_step(scheduler, slots, {names[1]: 3})  # names of those that wait are right
    with pytest.raises(SgmvError, match=part):
        serving.make_step(slots, dict.fromkeys(names), tokens)


@pytest.mark.once
def test_an_embedding_of_pefts_is_served_to_its_own_rows() -> None:
    """One that PEFT wrote: tokens of the first request, and of the base model's."""
    adapter, name = sgmv.load_peft(form("embedding-alone"))["model.embed_tokens"], "a7"
    slots = serving.AdapterSlots(1, 1, 8)
    one = LoRARequest(name, 7, str(form("embedding-alone")))
    step = serving.make_step(slots, {"r0": one, "r1": None}, {"r0": 3, "r1": 2})
    tokens, y = np.array([5, 31, 0, 4, 99]), np.ones((5, 48), "f")
    assert step.add_lora_embedding("model.embed_tokens", y, tokens) is y
    assert (y[3:] == 1).all()
    looked_up = adapter.A.T[tokens[:3]].astype("d")
    expected = 1 + adapter.scaling * (looked_up @ adapter.B.T.astype("d"))
    x = np.eye(32, dtype="f")[tokens[:3]]
    bound = add_lora_bound(np.ones((3, 48), "f"), x, [adapter], [0] * 3, expected=expected)
    compare.check(y[:3], expected, bound)
    slots.unload(7)
    with pytest.raises(StaleStepError, match="a7"):
        step.add_lora_embedding("model.embed_tokens", y, tokens)


@pytest.mark.once
def test_a_scheduler_for_more_slots_than_there_are() -> None:
    scheduler: Scheduler[str] = Scheduler(3)
    scheduler.add("a", lora(1))
    with pytest.raises(ServingError, match="scheduler: expected max_loras of at most 2"):
        serving.next_step(scheduler, make_slots(2))
    assert list(scheduler.waiting) == ["a"]


@pytest.mark.once
def test_a_step_in_vllms_metadata() -> None:
    from sgmv import layouts

    slots = make_slots(3)
    step = serving.make_step(slots, {"a": lora(5), "b": None, "c": lora(2), "d": lora(5)})
    meta = layouts.vllm_v1(step.slots, slots.max_loras)
    assert meta.token_lora_mapping.tolist() == step.slots.tolist() == [1, -1, 0, 1]
    assert slots.active == [2, 5, None]
    assert layouts.check(meta) == []


def test_a_plain_request_has_its_bits_beside_a_mixture() -> None:
    """And a mixture's rows are those of `sgmv.add_lora` with its weights."""
    slots = make_slots(3, 4)
    mixture = LoRAMixture([(lora(2), 0.5), (lora(1), -2.0)])
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4, 3)).astype("f")
    before = rng.standard_normal((4, 4)).astype("f")
    step = make_step(slots, {"a": lora(1), "b": mixture, "c": None}, {"b": 2})
    y = step.add_lora("q", before.copy(), x)
    alone = make_step(slots, {"a": lora(1)}).add_lora("q", before[:1].copy(), x[:1])
    assert y[:1].tobytes() == alone.tobytes()
    assert y[3:].tobytes() == before[3:].tobytes()
    assert step.slots.tolist() == [[0, -1], [1, 0], [1, 0], [-1, -1]]
    stack = sgmv.AdapterStack.from_adapters({i: read(f"{i}/0").get("q") for i in (1, 2)})
    expected = sgmv.add_lora(
        before[1:3].copy(), x[1:3], stack, [[2, 1]] * 2, weights=[[0.5, -2.0]] * 2
    )
    np.testing.assert_allclose(y[1:3], expected, rtol=1e-6)


def test_a_mixture_of_which_one_adapter_fails_is_dropped_alone() -> None:
    def failing(path: str) -> dict[str, sgmv.Adapter]:
        if path == "missing":
            raise FileNotFoundError(path)
        return read(path)

    slots, scheduler = make_slots(3, 4, read=failing), Scheduler[str](3)
    scheduler.add("mixed", LoRAMixture([(lora(1), 1.0), (lora(2, "missing"), 1.0)]))
    scheduler.add("plain", lora(1))
    step = next_step(scheduler, slots)
    assert list(step.rows) == ["plain"]
    [(request_id, failed, error)] = step.failed
    assert (request_id, failed.lora_int_id, type(error)) == ("mixed", 2, FileNotFoundError)
    assert list(scheduler.running) == ["plain"]


# what an adapter replaces in the model

HEAD = "score.weight"


def with_head(number: int, labels: int = 2) -> sgmv.PeftAdapter:
    """A head of its own beside a layer, as load_peft returns it."""
    rng = np.random.default_rng(number)
    weight = rng.standard_normal((labels, 4)).astype("f")
    return sgmv.PeftAdapter(read(f"{number}/0"), saved={HEAD: weight} if number != 3 else None)


def heads(**given: Any) -> AdapterSlots:
    return make_slots(
        read=lambda path: with_head(int(path.partition("/")[0])), saved=[HEAD], **given
    )


@pytest.mark.once
def test_rows_have_the_heads_of_their_adapters() -> None:
    slots = heads(max_loras=3)
    requests = {"r0": lora(2), "r1": None, "r2": lora(1), "r3": lora(3), "r4": lora(2)}
    step = make_step(slots, requests, {"r0": 2, "r4": 3})
    found = {tuple(rows.tolist()): weight for rows, weight in step.saved(HEAD)}
    assert sorted(found) == [(0, 1, 5, 6, 7), (3,)]
    np.testing.assert_array_equal(found[0, 1, 5, 6, 7], with_head(2).saved[HEAD])
    np.testing.assert_array_equal(found[3,], with_head(1).saved[HEAD])
    plain = make_slots(read=lambda path: dict(with_head(int(path.partition("/")[0]))))
    plain.load(lora(1))
    assert slots._weights.hosted[1].nbytes == plain._weights.hosted[1].nbytes + 2 * 4 * 4


@pytest.mark.once
def test_a_head_that_peft_wrote_runs() -> None:
    slots = AdapterSlots(1, 1, 64, read=lambda path: sgmv.load_peft(form("head")), saved=[HEAD])
    step = make_step(slots, {"r0": lora(7), "r1": None})
    [(rows, weight)] = step.saved(HEAD)
    assert rows.tolist() == [0]
    np.testing.assert_array_equal(weight, sgmv.load_peft(form("head")).saved[HEAD])


@pytest.mark.once
def test_heads_of_an_old_step_are_not_given() -> None:
    """Evicted, or replaced under the same id."""
    slots = heads(max_loras=1)
    step = make_step(slots, {"r0": lora(1)})
    make_step(slots, {"r0": lora(2)})
    with pytest.raises(StaleStepError, match=r"\[a1\] evicted or replaced"):
        step.saved(HEAD)
    step = make_step(slots, {"r0": lora(2)})
    slots.load(LoRARequest("another", 2, "5/0"))
    with pytest.raises(StaleStepError):
        step.saved(HEAD)


@pytest.mark.once
def test_heads_have_names_and_rows_of_their_own() -> None:
    slots = heads(max_loras=2)
    step = make_step(slots, {"r0": None})
    with pytest.raises(ServingError, match=r"'score.bias'; name it in AdapterSlots\(saved=...\)"):
        step.saved("score.bias")
    mixture = LoRAMixture(((lora(1), 0.5), (lora(3), 0.5)))
    with pytest.raises(ServingError, match="without parameters in the place of the model's"):
        make_step(slots, {"r0": mixture})
    scheduler: Scheduler[str] = Scheduler(max_loras=2)
    scheduler.add("r0", mixture)
    scheduler.add("r1", lora(3))
    step = next_step(scheduler, slots)
    assert list(step.rows) == ["r1"]
    [(request, its, _error)] = step.failed
    assert (request, its) == ("r0", lora(1))
    for saved, part in (("score.weight", "names of parameters"), ([1], "names of parameters")):
        with pytest.raises(DtypeError, match=part):
            make_slots(saved=saved)
