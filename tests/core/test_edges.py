"""Numbers at every edge, in every argument of every public call: the library's error, or right."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sgmv
from sgmv.__main__ import make_parser
from sgmv.compat import vllm
from sgmv.console import joined
from tests.help import surface
from tests.help.surface import CALLS, RECORDS
from tests.stress import fuzz

pytestmark = [pytest.mark.once, pytest.mark.oracle]

# Methods of what calls return that show what is there.
SHOW = {
    "Outcome.tenants",
    "ReplicasOutcome.tenants",
    *("Launch.program", "Launch.indices", "Launch.segment_rows", "Launch.figures"),
    *("Launch.own_figures", "Model.layer"),
}
# What refusals name that is no argument of the call itself, but of what the call makes of them.
ALSO_NAMED = {
    *("adapter", "adapter_id", "adapter_ids", "h_in", "h_out", "A", "B"),
    *("lora_request", "lora_int_id", "trace", "scaling", "slots", "index_mapping", "directory"),
    *("expert_ids", "weights", "sorted_token_ids", "token_lora_mapping", "topk_weights"),
}


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """What asks for far more memory than there is gets none, instead of all of the machine's."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_every_public_call_is_in_the_table() -> None:
    listed = {name.split(",")[0] for name in CALLS}
    left = surface.public() - listed - RECORDS - SHOW
    assert {name for name in left if not name.endswith(".shown")} == set()


@pytest.mark.parametrize("name", CALLS)
def test_any_value_anywhere_is_refused_by_name_or_right(name: str) -> None:
    """Each argument, and each element of one, replaced by each hostile value.

    A value that means the same gives the same result; any other is taken without a word, or
    refused by the argument's name with nothing changed.
    """
    wrong: list[str] = []
    call, valid = CALLS[name]()
    named = {*valid, *inspect.signature(call).parameters, *ALSO_NAMED}
    for argument in valid:
        right = None if name.startswith(NEVER_THE_SAME) else repr(called(name, argument))
        for variant in surface.variants(argument, valid[argument]):
            call, arguments = CALLS[name]()
            arguments[argument] = variant.value
            before = repr((left(call, arguments), surface.state(variant.value)))
            what = f"{argument} = {variant.told}"
            try:
                result = call(**arguments)
            except sgmv.SgmvError as error:
                after = repr((left(call, arguments), surface.state(variant.value)))
                if before != after:
                    wrong.append(f"{what}: changed before {error}")
                root = re.split(r"[\[., (]", error.argument)[0]
                if root not in named and not re.search(rf"\b{argument}\b", str(error)):
                    wrong.append(f"{what}: {error.argument} is named: {error}")
                if not re.fullmatch(r"(?s).+: expected .+, got .*; .+", str(error)):
                    wrong.append(f"{what}: {error}")
                if variant.same and isinstance(variant.value, np.integer):
                    wrong.append(f"{what}: the same number is refused: {error}")
            except BaseException as error:
                wrong.append(f"{what}: {type(error).__name__}: {error}")
            else:
                got = repr((left(call, arguments, argument), surface.state(result)))
                if variant.same and right not in (None, got):
                    wrong.append(f"{what}: another result: {got} for {right}")
    assert not wrong, f"{len(wrong)} of {name}:\n" + "\n".join(wrong)


# Calls whose results differ from call to call: addresses, seconds, this machine.
NEVER_THE_SAME = ("info", "warm_up", "punica", "check, punica")


def called(name: str, argument: str) -> Any:
    """What the valid call returns, and leaves but in this argument."""
    call, arguments = CALLS[name]()
    result = call(**arguments)
    return left(call, arguments, argument), surface.state(result)


def left(call: Callable[..., Any], arguments: dict[str, Any], but: str = "") -> Any:
    """The arguments as they are now, but for one, and the call's owner."""
    others = {k: v for k, v in arguments.items() if k != but and not k.endswith("_ptr")}
    return surface.state(others), surface.state(surface.owner(call))


# Calls without checks of their own, and what the test says of them.
def breaks(n: int, rows: list[int]) -> int:
    return len(range(n)) + sum(rows)


def changes_first(n: int, rows: list[int]) -> int:
    rows.append(0)
    sgmv.segment(n)
    return 0


def names_nothing(n: int, rows: list[int]) -> int:
    if n != 100:
        raise sgmv.SgmvError("size", "another", "this", "pass it")
    return 0


def wraps(n: int, rows: list[int]) -> int:
    return int(np.asarray(n).astype(np.int8) * 2 if type(n) is not int else 2 * n)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (breaks, "OverflowError"),
        (changes_first, "changed before"),
        (names_nothing, "size is named"),
        (wraps, "another result"),
    ],
)
def test_a_call_that_breaks_is_seen(
    call: Callable[..., Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CALLS, "one", lambda: (call, {"n": 100, "rows": [1, 2]}))
    if call is changes_first:
        monkeypatch.setattr("tests.core.test_edges.NEVER_THE_SAME", ("one",))
    with pytest.raises(AssertionError, match=said):
        test_any_value_anywhere_is_refused_by_name_or_right("one")


def as_tensors(value: Any) -> Any:
    """The same with a torch tensor over each array's memory."""
    torch = pytest.importorskip("torch")
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, (list, tuple)):
        return type(value)(as_tensors(one) for one in value)
    return value


def strange(value: np.ndarray) -> Iterator[tuple[str, Any]]:
    """Tensors in an array's place that numpy has no like of, or that a call should not take."""
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(value)
    for name in ("bool", "uint8", "int32", "float16", "bfloat16", "float64", "complex64"):
        yield name, tensor.to(getattr(torch, name))
    yield "float8", tensor.float().to(torch.float8_e4m3fn)
    yield "on another device", tensor.to("meta")
    yield "sparse", tensor.to_sparse()
    yield "quantized", torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)
    yield "with a gradient", tensor.float().requires_grad_()
    yield "of a complex one", torch.complex(tensor.float(), tensor.float()).conj().imag
    yield "conjugated", tensor.to(torch.complex64).conj()
    yield "a scalar", torch.tensor(3)
    yield "nothing", torch.empty(0)
    yield "broadcast", tensor[:1].expand(tensor.shape)
    yield "backwards", tensor.flip(0)
    yield "of many axes", tensor.reshape((1,) * 20 + tuple(tensor.shape))
    yield "a parameter", torch.nn.Parameter(tensor.float(), requires_grad=False)
    yield "nested", torch.nested.nested_tensor([tensor.float(), tensor.float()])


def engines_arrays() -> Iterator[tuple[str, str]]:
    """Arguments of arrays that an engine passes as tensors: where a call takes them."""
    for name, make in CALLS.items():
        call, arguments = make()
        module = inspect.unwrap(getattr(call, "__func__", call)).__module__
        if module.startswith("sgmv.compat") and not isinstance(call, type):
            yield from (
                (name, argument)
                for argument, value in arguments.items()
                if isinstance(value, np.ndarray)
            )


@pytest.mark.parametrize("name", sorted({name for name, _ in engines_arrays()}))
def test_tensors_give_what_arrays_give(name: str) -> None:
    call, arguments = CALLS[name]()
    call(**arguments)
    again, others = CALLS[name]()
    tensors = {k: as_tensors(value) for k, value in others.items()}
    again(**tensors)
    for argument, value in others.items():
        assert argument.endswith("_ptr") or surface.state(value) == surface.state(
            arguments[argument]
        ), argument


@pytest.mark.filterwarnings("ignore:.*(nested|quantize|Sparse)")  # torch's, of what it has made
@pytest.mark.parametrize(("name", "argument"), list(engines_arrays()))
def test_any_tensor_is_refused_by_name_or_right(name: str, argument: str) -> None:
    wrong: list[str] = []
    _, valid = CALLS[name]()
    for told, tensor in strange(valid[argument]):
        call, arguments = CALLS[name]()
        tensors = {k: as_tensors(value) for k, value in arguments.items()} | {argument: tensor}
        before = repr(left(call, arguments, argument))
        try:
            call(**tensors)
        except sgmv.SgmvError as error:
            if repr(left(call, arguments, argument)) != before:
                wrong.append(f"{told}: changed before {error}")
        except BaseException as error:
            wrong.append(f"{told}: {type(error).__name__}: {error}")
    assert not wrong, f"{len(wrong)} of {name}, {argument}:\n" + "\n".join(wrong)


HUGE = 2**127 + 1  # an id made of a hash


def test_ids_of_any_size_in_slots_of_vllm() -> None:
    """vLLM makes lora_int_id of hashes: any is taken, whichever slot is asked for."""
    wrapper = vllm.PunicaWrapper(8, 8)
    for asked, index in ((7, 0), (HUGE, 1), (0, -1)):
        wrapper.update_metadata(vllm.LoRAMapping((asked,), (asked,)), [7, HUGE, None], 3)
        assert wrapper.token_lora_indices.tolist() == [index]
    with pytest.raises(sgmv.SgmvError, match=r"^index_mapping: .*0 or ids that have a slot"):
        wrapper.update_metadata(vllm.LoRAMapping((HUGE + 1,), ()), [7, HUGE], 2)


@pytest.mark.parametrize("call", ["vllm_v0", "vllm_v1", "flashinfer", "check"])
@pytest.mark.parametrize("slots", [{HUGE: 0, 3: 1}, {3: 1, 5: HUGE}])
def test_ids_beyond_int64_among_the_slots_of_layouts(call: str, slots: dict[int, int]) -> None:
    layout = sgmv.layouts.vllm_v0([3], {3: 1})
    arguments: dict[str, tuple[Any, ...]] = {"vllm_v1": ([3], 9), "check": (layout,)}
    with pytest.raises(sgmv.SgmvError, match=r"^slots: expected less than 2\*\*63"):
        getattr(sgmv.layouts, call)(*arguments.get(call, ([3],)), slots=slots)


NUMBERS = (
    *("0", "1", "-1", "-2", "2147483648", "9223372036854775807", "9223372036854775808"),
    *("18446744073709551616", str(HUGE), "9" * 400, "nan", "inf", "-inf", "1e308", "0.5", "1e400"),
    *("", "a", " 3", "3 ", "١", "0x3", "1_0", "True", "None", "3,", ",", "3,a", "1,,2", "--", "-"),
)
# Small work, so that each call takes little time.
COMMANDS = {
    "explain": ["explain", "--all", "--ids", "0,1", "--h-in", "64", "--h-out", "64"],
    "simulate": ["simulate", "--requests", "5", "--slots", "1"],
    "info": ["info"],
    "warm-up": ["warm-up"],
    "explorer": ["explorer", "--no-open"],
    "cache": ["cache"],
    "adapters": ["adapters", "no-such-place"],
}


def flags(command: str) -> list[str]:
    parser = make_parser([command])
    [commands] = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    found = [action.option_strings for action in commands[command]._actions]
    return [
        names[-1] for names in found if names and names[-1] not in ("--help", "--html", "--figure")
    ]


@pytest.mark.parametrize(
    ("command", "flag"), [(command, flag) for command in COMMANDS for flag in flags(command)]
)
def test_any_number_in_any_flag(
    command: str,
    flag: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # the explorer is written there
    monkeypatch.setattr("sgmv.cache.folder", lambda: tmp_path)
    wrong = []
    for text in NUMBERS:
        arguments = [*COMMANDS[command], flag, text]
        if flag in ("--n", "--seed", "--popularity", "--lengths"):  # not beside --ids
            arguments = ["explain", "--h-in", "64", "--h-out", "64", flag, text]
        if command == "simulate":
            arguments = [*COMMANDS[command], flag, text]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                parser = make_parser([command])
                given = parser.parse_args(joined(arguments))
                try:
                    given.run(given)
                except sgmv.SgmvError as error:
                    parser.refuse(error, given)
            except SystemExit as end:
                said = capsys.readouterr().err
                if end.code != 2 or not re.fullmatch(r"sgmv: error: .+\n|.+: error: .+\n", said):
                    wrong.append(f"{flag} {text!r}: status {end.code}: {said}")
            except BaseException as error:
                wrong.append(f"{flag} {text!r}: {type(error).__name__}: {str(error)[:200]}")
    assert not wrong, "\n".join(wrong)


def test_a_failing_sequence_is_shrunk_to_what_it_needs() -> None:
    tried = []

    def fails(steps: Sequence[int]) -> bool:
        tried.append(list(steps))
        return {2, 5} <= set(steps)

    assert fuzz.shrunk(range(9), fails) == [2, 5]
    assert len(tried) == 9
    assert fuzz.shrunk([4], lambda steps: True) == [4]
