"""Linear layers of real models, by name.

The figures are those of each model's published `config.json` (hidden_size, intermediate_size,
num_attention_heads, num_key_value_heads, head_dim):

- Llama-2-7B: `meta-llama/Llama-2-7b-hf`
- Llama-3-8B: `meta-llama/Meta-Llama-3-8B`
- Qwen2.5-7B: `Qwen/Qwen2.5-7B`
- Mistral-7B: `mistralai/Mistral-7B-v0.1`
- Gemma-2-9B: `google/gemma-2-9b` (its heads are wider than hidden_size / heads)
"""

from __future__ import annotations

from dataclasses import dataclass

LAYERS = ("q", "kv", "gate/up", "down")


@dataclass(frozen=True)
class Model:
    """The widths of one decoder layer.

    >>> MODELS["Gemma-2-9B"].layer("q")
    (3584, 4096)
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    def layer(self, name: str) -> tuple[int, int]:
        """(h_in, h_out) of a layer; `kv` is one of the k and v projections, not both.

        Raises KeyError for a name that is not in LAYERS.
        """
        return {
            "q": (self.hidden, self.heads * self.head_dim),
            "kv": (self.hidden, self.kv_heads * self.head_dim),
            "gate/up": (self.hidden, self.intermediate),
            "down": (self.intermediate, self.hidden),
        }[name]


MODELS = {
    "Llama-2-7B": Model(4096, 11008, heads=32, kv_heads=32, head_dim=128),
    "Llama-3-8B": Model(4096, 14336, heads=32, kv_heads=8, head_dim=128),
    "Qwen2.5-7B": Model(3584, 18944, heads=28, kv_heads=4, head_dim=128),
    "Mistral-7B": Model(4096, 14336, heads=32, kv_heads=8, head_dim=128),
    "Gemma-2-9B": Model(3584, 14336, heads=16, kv_heads=8, head_dim=256),
}
