"""Calls that fail leave nothing: no hook of PEFT's, no method of ours."""

from __future__ import annotations

import _thread
import sys
import threading
from collections.abc import Callable
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.studies import peft as benchmark
from sgmv.compat import peft as compat
from sgmv.compat import peft_batches, peft_hooks, peft_layers
from sgmv.compat.peft import accelerate
from sgmv.errors import ValueRangeError
from tests.help.peft_models import (
    ALL_ROWS,
    NAMES,
    adapted,
    check,
    in_place,
    lora,
    needs_peft,
    net,
)

pytestmark = [
    pytest.mark.once,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT's use of transformers
]


def hooks(model: Any) -> list[Any]:
    """PEFT's hooks on the model's modules, which it removes after a call that went well."""
    found = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [hook for hook in found if isinstance(hook, partial)]


def raiser(error: type[BaseException]) -> Callable[..., None]:
    def fail(*_args: object) -> None:
        raise error("planted")

    return fail


@needs_peft
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("where", ["", "gate", "up.base_layer", "down"])
def test_a_failed_batch_leaves_nothing(
    where: str, error: type[BaseException], model: Any, x: Any
) -> None:
    """A plain call of as many samples would use the failed batch's adapters, and say nothing."""
    plain = model(x)
    with accelerate(model):
        module = model.base_model.model.get_submodule(where)
        for plant in (module.register_forward_pre_hook, module.register_forward_hook):
            handle = plant(raiser(error))
            with pytest.raises(error, match="planted"):
                model(x, adapter_names=NAMES)
            handle.remove()
            assert hooks(model) == []
            assert model(x).equal(plain)
            check(model, x)
    assert model(x).equal(plain)


@needs_peft
def test_peft_alone_leaves_its_hooks(model: Any, x: Any) -> None:
    """The test above can fail; and what PEFT left before is gone on entry."""
    plain = model(x)
    handle = model.base_model.model.down.register_forward_hook(raiser(RuntimeError))
    with pytest.raises(RuntimeError, match="planted"):
        model(x, adapter_names=NAMES)
    handle.remove()
    assert len(hooks(model)) == 3
    assert not model(x).equal(plain)
    with accelerate(model):
        assert hooks(model) == []
        assert model(x).equal(plain)


@needs_peft
def test_a_failed_batch_within_a_batch_leaves_the_outer_ones_hooks(model: Any, x: Any) -> None:
    with accelerate(model):
        expected = model(x, adapter_names=NAMES)
    failing = model.base_model.model.down.register_forward_hook(raiser(RuntimeError))

    def call_again(*_args: object) -> None:
        outer.remove()
        with pytest.raises(RuntimeError, match="planted"):
            model(x, adapter_names=["en"] * len(NAMES))
        failing.remove()

    with accelerate(model):
        outer = model.base_model.model.up.base_layer.register_forward_pre_hook(call_again)
        assert model(x, adapter_names=NAMES).equal(expected)
        assert hooks(model) == []


@needs_peft
def test_a_call_that_peft_refuses_half_way_leaves_nothing(lib: SimpleNamespace, llama: Any) -> None:
    """PEFT has given each layer its hook for aLoRA's offsets when it refuses beams, or a name."""
    tokens = lib.torch.ones(2, 3, dtype=lib.torch.long)
    plain = llama(tokens).logits
    offsets = {"alora_offsets": [1, 2]}
    with accelerate(llama):
        with pytest.raises(ValueError, match="Beam search"):
            llama.base_model._enable_peft_forward_hooks(num_beams=2, **offsets).__enter__()
        assert hooks(llama) == []
        with pytest.raises(ValueError, match="non-existing"):
            llama(tokens, adapter_names=["nobody", "de"], **offsets)
        assert hooks(llama) == []
        assert llama(tokens).logits.equal(plain)


@needs_peft
@pytest.mark.parametrize("beams", [1, 2])
def test_a_failed_generate_leaves_nothing(beams: int, lib: SimpleNamespace, llama: Any) -> None:
    tokens = lib.torch.ones(3, 3, dtype=lib.torch.long)
    plain = llama(tokens).logits
    generate = partial(llama.generate, input_ids=tokens, max_new_tokens=3, num_beams=beams)
    with accelerate(llama):
        theirs = generate(do_sample=False)
        for error in (RuntimeError, KeyboardInterrupt):
            with pytest.raises(error, match="planted"):
                generate(adapter_names=["en", "__base__", "de"], logits_processor=[raiser(error)])
            assert hooks(llama) == []
            assert llama(tokens).logits.equal(plain)
        assert generate(do_sample=False).equal(theirs)


@needs_peft
def test_a_failed_batch_of_an_encoder_and_beams_leaves_nothing(lib: SimpleNamespace) -> None:
    """PEFT gives an encoder's layers a second hook."""
    lib.torch.manual_seed(5)
    config = lib.transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    base = lib.transformers.T5ForConditionalGeneration(config)
    configs = {name: lora(lib, "q", "v", r=2, task_type="SEQ_2_SEQ_LM") for name in ("de", "en")}
    model = adapted(lib, base, configs)
    tokens = lib.torch.ones(2, 3, dtype=lib.torch.long)
    with accelerate(model), pytest.raises(KeyboardInterrupt):
        model.generate(
            input_ids=tokens, adapter_names=["en", "de"], num_beams=2, max_new_tokens=2,
            logits_processor=[raiser(KeyboardInterrupt)],
        )  # fmt: skip
    assert hooks(model) == []


@needs_peft
def test_an_interrupt_at_any_line_leaves_nothing(model: Any, x: Any) -> None:
    """Of ours and of PEFT's: hooks half made, half removed, layers half taken over."""
    modules = [model.base_model, *model.base_model.model.children()]
    before = [dict(vars(module)) for module in modules]
    plain = model(x)
    theirs = sys.modules[type(model.base_model).__module__]
    files = [module.__file__ for module in (compat, peft_batches, peft_hooks, peft_layers, theirs)]

    def call(interrupt: int, entered: bool) -> int:
        """Lines passed; the interrupt comes as Ctrl-C's does, after the line of this number."""
        lines = 0

        def trace(frame: Any, event: str, _arg: object) -> Any:
            nonlocal lines
            if frame.f_code.co_filename not in files:
                return None
            if event == "line":
                lines += 1
                if lines == interrupt:
                    _thread.interrupt_main()
            return trace

        sys.settrace(trace)
        try:
            if entered:
                model(x, adapter_names=NAMES)
            else:
                with accelerate(model):
                    model(x, adapter_names=NAMES)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        return lines

    for number in count(1):
        with accelerate(model):
            passed = call(number, entered=True)
            assert model(x).equal(plain), number
            assert hooks(model) == [], number
        if passed < number:
            break
    assert number > 30
    for number in count(1):
        passed = call(number, entered=False)
        assert [dict(vars(module)) for module in modules] == before, number
        if passed < number:
            break
    assert number > 100


@needs_peft
def test_a_model_that_cannot_be_taken_over_is_as_it_was(lib: SimpleNamespace, x: Any) -> None:
    model = adapted(lib, net(lib.torch), {"de": lora(lib, "gate", "down")})
    with accelerate(model):
        model.add_adapter("en", lora(lib, "up", "down"))
        model.base_model.model.up.out_features = 0
        with pytest.raises(ValueRangeError, match="h_out"):
            model(x, adapter_names=["en"] * len(x))
    for module in (model.base_model, *model.base_model.model.children()):
        assert not {compat.HOOKS, peft_layers.MIXED} & vars(module).keys()


@needs_peft
def test_one_threads_failed_batch_is_not_anothers(model: Any, x: Any) -> None:
    """Both name the same adapters, as PEFT demands: hooks, and who has looked for changes."""
    down = model.base_model.model.down
    errors: list[BaseException] = []
    second_is_in, first_has_failed = threading.Event(), threading.Event()

    def meet(*_args: object) -> None:
        if threading.current_thread() is first:
            assert second_is_in.wait(60)
            raise RuntimeError("planted")
        second_is_in.set()
        assert first_has_failed.wait(60)

    def fail() -> None:
        with lib_no_grad(), pytest.raises(RuntimeError, match="planted"):
            model(x, adapter_names=NAMES)
        first_has_failed.set()

    def succeed() -> None:
        with lib_no_grad():
            try:
                assert model(x, adapter_names=NAMES).equal(expected)
            except BaseException as error:
                errors.append(error)

    lib_no_grad = sys.modules["torch"].no_grad
    with accelerate(model):
        expected = model(x, adapter_names=NAMES)
        handle = model.base_model.model.gate.base_layer.register_forward_pre_hook(meet)
        first, second = threading.Thread(target=fail), threading.Thread(target=succeed)
        first.start()
        second.start()
        first.join()
        second.join()
        handle.remove()
        assert errors == hooks(model) == []
        model.base_model.model.down.lora_A["en"].weight.data.mul_(2)
        h = x.repeat(1, 1, 2)[..., :33]
        benchmark.check(down, partial(down, h, adapter_names=NAMES), NAMES, "down", most=ALL_ROWS)


@needs_peft
def test_threads_see_a_change_at_once(lib: SimpleNamespace, model: Any, x: Any) -> None:
    errors: list[BaseException] = []

    def call(barrier: threading.Barrier) -> None:
        try:
            with lib.torch.no_grad():
                barrier.wait(60)
                model(x, adapter_names=NAMES)
        except BaseException as error:
            errors.append(error)

    with accelerate(model):
        for i in range(20):
            in_place(lib, model)
            model.add_adapter(f"n{i}", lora(lib, "gate", "up", "down", r=i + 1))
            model.requires_grad_(False).eval()
            barrier = threading.Barrier(4)
            threads = [threading.Thread(target=call, args=(barrier,)) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert errors == []
            check(model, x)
            model.delete_adapter(f"n{i}")
