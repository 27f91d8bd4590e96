"""What a directory or a file is, where an adapter that PEFT saved was expected.

Each answer is what was found, in words for a message, and what to do about it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from sgmv.files import TensorFile, shown

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MLX = "adapters.safetensors"
DIFFUSERS = "pytorch_lora_weights.safetensors"
COPY = "copy the whole directory that save_pretrained wrote"
CONVERT = (
    "have diffusers convert it: load it in its pipeline (load_lora_weights), and save it from "
    "there (save_lora_weights)"
)

_AGAIN = "download or copy the file again"
# Names of tensors, and the program that gives such.
_PROGRAMS = {
    r"\.(lokr|hada|oft)_": "LyCORIS's LoKr, LoHa or OFT",
    r"^lora_(unet|te\d?|transformer)_": "kohya's, which has no dots in the names of modules",
    r"^diffusion_model\.": "ComfyUI's",
}
_STARTS = (
    (
        b"version https://git-lfs.github.com/",
        "a Git LFS pointer: a line of text in place of the file",
        "run `git lfs pull` where it was cloned, or download the file itself",
    ),
    (
        b"/annex/objects/",
        "a git-annex pointer: a line of text in place of the file",
        "run `git annex get` where it was cloned, or download the file itself",
    ),
    (b"<", "a web page: what a browser shows in place of the file", _AGAIN),
    (
        b"PK\x03\x04",
        "a file of torch.save under this name: a pickle, which can run code",
        "load it with PEFT and save_pretrained(..., safe_serialization=True)",
    ),
    (b"GGUF", "a GGUF file under this name", "convert the adapter that PEFT saved instead"),
)


def of_start(start: bytes) -> tuple[str, str] | None:
    """A file of other content than its name says, by its first bytes; None for a damaged one."""
    if not start:
        return "damaged data (an empty file)", f"{_AGAIN}; a full disk leaves such files"
    if not start.strip(b"\0"):
        return "damaged data (zeros)", f"{_AGAIN}; a crash while it was written leaves zeros"
    for prefix, what, remedy in _STARTS:
        if start.lstrip().startswith(prefix):
            return what, remedy
    return None


def without_config(directory: Path) -> tuple[str, str]:
    """A directory that has no adapter_config.json."""
    place = shown(directory)
    if (directory / CONFIG_FILE).is_symlink():
        return _dangling(directory / CONFIG_FILE)
    snapshots = directory / "snapshots"
    if snapshots.is_dir():
        of_adapters = adapters_in(snapshots)
        if not of_adapters:
            return f"{place} (a Hub cache folder without an adapter)", "download the adapter first"
        chosen = _revision(directory)
        first = chosen if chosen in of_adapters else of_adapters[-1]
        return f"{place} (a Hub cache folder)", f"pass {shown(snapshots / first)}"
    names = adapters_in(directory)
    if names:
        checkpoints = [name for name in names if re.fullmatch(r"checkpoint-\d+", name)]
        kind = "checkpoints" if checkpoints == names else "named adapters"
        some = ", ".join(shown(name) for name in names[:5]) + (", ..." if names[5:] else "")
        remedy = f"pass one of them, as in {shown(directory / names[-1])}"
        return f"{place} (no such file; it holds {kind}: {some})", remedy
    if _has(directory, r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)"):
        return f"{place} (a whole model)", "pass the directory of an adapter, or use it as the base"
    if _has(directory, re.escape(WEIGHTS_FILE)):
        return f"{place} (no such file; the weights are there)", COPY
    return _other_programs(directory) or (f"{place} (no such file)", COPY)


def _other_programs(directory: Path) -> tuple[str, str] | None:
    """A directory that holds an adapter of another program than PEFT."""
    if _has(directory, r".*\.gguf"):
        return f"{shown(directory)} (a GGUF file)", "convert the adapter that PEFT saved instead"
    for name in _has(directory, r".*\.safetensors"):
        path = directory / name
        if not path.is_file():
            continue
        try:
            with path.open("rb", buffering=0) as file:
                names = TensorFile(file).entries
        except (OSError, ValueError):
            continue
        if program := program_of(names):
            return f"{shown(path)} ({program})", CONVERT
        if _is_lora(names):
            return f"{shown(path)} (a file of diffusers)", f"pass {shown(path)}, the file itself"
    return None


def _is_lora(names: Collection[str]) -> bool:
    return bool(names) and all(re.search(r"lora.*\.(weight|bias|alpha)$", name) for name in names)


def program_of(names: Collection[str]) -> str | None:
    """The program that gives tensors such names, if its files are not read here."""
    for pattern, program in _PROGRAMS.items():
        if any(re.search(pattern, name) for name in names):
            return program
    return None


def without_weights(directory: Path) -> tuple[str, str]:
    """A directory that has no adapter_model.safetensors."""
    path = directory / WEIGHTS_FILE
    if path.is_symlink():
        return _dangling(path)
    parts = _has(directory, r"adapter_model-\d+-of-\d+\.safetensors")
    if parts or _has(directory, rf"{re.escape(WEIGHTS_FILE)}\.index\.json"):
        return (
            f"{shown(directory)} (a sharded save, {len(parts)} parts)",
            "save it again in one file: with PEFT's save_pretrained, or a larger max_shard_size",
        )
    others = _has(directory, r".*\.(safetensors|bin|gguf|npz)")
    beside = f"; there is {', '.join(shown(name) for name in others[:3])}" if others else ""
    return f"{shown(path)} (no such file{beside})", COPY


def pickled(path: Path, why: str) -> tuple[str, str]:
    """An adapter_model.bin that cannot be read here."""
    return (
        f"{shown(path)} (a pickle, which can run code; {why})",
        "install torch 2.6 or later, which reads its tensors alone; or load it with PEFT and "
        "save_pretrained(..., safe_serialization=True)",
    )


def _dangling(path: Path) -> tuple[str, str]:
    return f"{shown(path)} (a link to {shown(os.readlink(path))}, which is not there)", _AGAIN


def adapters_in(directory: Path) -> list[str]:
    """Sub-directories that hold an adapter; checkpoint-1000 after checkpoint-500."""
    files, names = (CONFIG_FILE, DIFFUSERS), _names(directory)
    found = [n for n in names if any((directory / n / file).is_file() for file in files)]
    return sorted(
        found,
        key=lambda name: [
            int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)
        ],
    )


def _revision(cache: Path) -> str:
    try:
        return (cache / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def _has(directory: Path, pattern: str) -> list[str]:
    return sorted(name for name in _names(directory) if re.fullmatch(pattern, name))


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
