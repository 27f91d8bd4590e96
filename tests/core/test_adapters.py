"""`sgmv adapters`: what adapters on disk are, what would be refused, what does not fit a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sgmv.__main__ import main
from sgmv.adapter import load_peft
from sgmv.adapters import describe
from tests.help.peft_files import FIXTURES, FORMS, copy_of, form, needs_torch

pytestmark = pytest.mark.once
LLAMA = FIXTURES / "llama"
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


def printed(capsys: Captured, *arguments: object) -> str:
    main(["adapters", *map(str, arguments)])
    return capsys.readouterr().out


def as_json(capsys: Captured, *arguments: object) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(printed(capsys, *arguments, "--json"))
    return found


PICKLES = [pytest.param(name, marks=needs_torch) for name in FORMS if name.startswith("pickle")]


@pytest.mark.parametrize("name", [*(n for n in FORMS if not n.startswith("pickle")), *PICKLES])
def test_figures_are_those_of_what_is_read(name: str) -> None:
    found, read = describe(str(form(name))), load_peft(form(name))
    assert found.refused == ""
    assert (found.layers, found.modules) == (len(read), sorted(read))
    assert found.ranks == sorted({adapter.r for adapter in read.values()})
    assert found.scalings == sorted({adapter.scaling for adapter in read.values()})
    assert set(found.embeddings) == read.embeddings
    assert set(found.saved) == read.saved.keys()
    if name not in ("float8",):  # stored in half the bytes
        arrays = [*read.saved.values()]
        arrays += [half for adapter in read.values() for half in (adapter.A, adapter.B)]
        assert found.bytes == sum(array.nbytes for array in arrays)


def test_alphas_and_types_are_the_configs() -> None:
    found = describe(str(LLAMA / "patterns-bf16"))
    assert (found.ranks, found.alphas, found.types) == ([3, 5, 16], [7, 12, 24], ["BF16"])
    assert describe(str(LLAMA / "rslora-f32")).alphas == [6]


def test_no_value_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgmv.peft_tensors.Tensors.value", None)
    assert describe(str(LLAMA / "attention-f32")).layers == 4


def test_a_directory_of_adapters_is_each_of_them(capsys: Captured) -> None:
    found = as_json(capsys, LLAMA, form("head"))
    names = sorted(path.name for path in LLAMA.iterdir())
    assert [Path(one["path"]).name for one in found] == [*names, "head"]
    assert {one["form"] for one in as_json(capsys, FIXTURES / "forms") if not one["refused"]} == {
        "PEFT",
        "MLX",
        "diffusers",
    }


def test_one_that_is_refused_does_not_hide_the_others(capsys: Captured) -> None:
    biased = FIXTURES / "refused" / "lora-bias"
    out = printed(capsys, "no-such-place", biased, form("head"), form("embedding-alone"))
    lines = " ".join(out.split())
    for part in (
        "no-such-place: refused: directory: expected a PEFT adapter directory",
        f"{biased}: refused: lora_bias in",
        "replaces in the model: score.weight",
        "embeddings among its layers: model.embed_tokens",
        "4 adapters, 2 refused",
    ):
        assert part in lines
    assert max(map(len, out.splitlines())) <= 300


def test_options_that_are_passed_over_are_named(tmp_path: Path, capsys: Captured) -> None:
    directory = copy_of("llama/attention-f32", tmp_path, lorap_lr_ratio=16)
    assert "passed over: lorap_lr_ratio=16" in " ".join(printed(capsys, directory).split())


def test_hundreds_of_adapters(tmp_path: Path, capsys: Captured) -> None:
    for i in range(200):
        (tmp_path / f"a{i}").symlink_to(LLAMA / "attention-f32")
    assert "200 adapters, 0 refused" in printed(capsys, tmp_path)


def write_model(to: Path, rank: int = 0, **changed: tuple[int, ...]) -> Path:
    """A model's files with the layers of tests/fixtures/peft/llama; some of another shape."""
    kinds = {"q": (48, 48), "k": (24, 48), "v": (24, 48), "o": (48, 48)}
    shapes = {f"self_attn.{kind}_proj": shape for kind, shape in kinds.items()}
    shapes |= {"mlp.gate_proj": (112, 48), "mlp.up_proj": (112, 48), "mlp.down_proj": (48, 112)}
    weights = {
        f"model.layers.{i}.{name}.weight": np.zeros(changed.get(name[-6:], shape), np.float32)
        for i in range(2)
        for name, shape in shapes.items()
    }
    weights["model.embed_tokens.weight"] = np.zeros((32, 48), np.float32)
    save_file(weights, to / "model.safetensors")
    (to / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    return to


def test_adapters_that_fit_a_model(tmp_path: Path, capsys: Captured) -> None:
    model = write_model(tmp_path)
    out = printed(capsys, LLAMA, form("embedding-alone"), "--against", model)
    assert f"6 adapters, 0 refused, 0 that do not fit {model}" in " ".join(out.split())


def test_layers_that_do_not_fit_are_named(tmp_path: Path, capsys: Captured) -> None:
    model = write_model(tmp_path, q_proj=(64, 48))
    found = as_json(capsys, LLAMA, form("head"), "--against", model)
    misfits = {Path(one["path"]).name: one["misfits"] for one in found}
    assert len(misfits.pop("attention-f32")) == 2
    assert misfits.pop("mlp-f16") == misfits.pop("mlp-bf16") == []
    expected = "is for a weight of shape (48, 48), and the model's has (64, 48)"
    assert all(expected in text for text in misfits.pop("patterns-bf16"))
    assert len(misfits.pop("rslora-f32")) == 2
    assert "the model has no 'score', which the adapter replaces" in misfits.pop("head")
    out = " ".join(printed(capsys, LLAMA, "--against", model).split())
    assert "does not fit: 'model.layers.0.self_attn.q_proj'" in out
    assert "3 that do not fit" in out


def test_a_layer_that_the_model_lacks_has_near_names(tmp_path: Path, capsys: Captured) -> None:
    model = write_model(tmp_path)
    [one] = as_json(capsys, FIXTURES / "gpt2" / "conv1d-f32", "--against", model)
    assert len(one["misfits"]) == 2
    assert "the model has no 'transformer.h.0.attn.c_attn'; " in one["misfits"][0]


def test_no_directory_is_refused(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["adapters"])
    assert "DIR: expected directories of adapters, got none" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["no-such-place", "", "-9"])
def test_no_model_is_refused(given: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["adapters", str(LLAMA), "--against", given])
    assert "--against: expected a directory of a model" in capsys.readouterr().err
