"""Layers of real models by their shapes; the models themselves are in sgmv/models.py."""

from __future__ import annotations

from sgmv.models import LAYERS, MODELS, Model

__all__ = ["LAYERS", "MODELS", "Model", "shapes"]


def shapes(models: list[str], layers: list[str]) -> dict[tuple[int, int], list[str]]:
    """{(h_in, h_out): ["model layer", ...]}: layers of one shape share one entry.

    >>> shapes(["Llama-3-8B", "Mistral-7B"], ["down"])
    {(14336, 4096): ['Llama-3-8B down', 'Mistral-7B down']}
    """
    found: dict[tuple[int, int], list[str]] = {}
    for model in models:
        for layer in layers:
            found.setdefault(MODELS[model].layer(layer), []).append(f"{model} {layer}")
    return found
