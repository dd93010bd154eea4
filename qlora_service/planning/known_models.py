"""Shapes of well-known models, for naming one that would fit. Source: their published config.json."""

from __future__ import annotations

from qlora_service.planning.shapes import ModelShape


def _model(
    model_type: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: tuple[int, int],
    vocabulary: int,
    *,
    head_dim: int | None = None,
    tied: bool = False,
) -> ModelShape:
    """`heads`: (query heads, key and value heads)."""
    return ModelShape(
        model_type=model_type,
        hidden=hidden,
        layers=layers,
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=head_dim or hidden // heads[0],
        intermediate=intermediate,
        vocabulary=vocabulary,
        tied=tied,
        attention_bias=model_type == "qwen2",
        head_norms=model_type == "qwen3",
    )


KNOWN_MODELS: dict[str, ModelShape] = {
    "Qwen2.5-0.5B": _model("qwen2", 896, 4864, 24, (14, 2), 151936, tied=True),
    "Llama-3.2-1B": _model("llama", 2048, 8192, 16, (32, 8), 128256, tied=True),
    "Qwen2.5-1.5B": _model("qwen2", 1536, 8960, 28, (12, 2), 151936, tied=True),
    "Llama-3.2-3B": _model("llama", 3072, 8192, 28, (24, 8), 128256, tied=True),
    "Qwen3-4B": _model("qwen3", 2560, 9728, 36, (32, 8), 151936, head_dim=128, tied=True),
    "Llama-2-7B": _model("llama", 4096, 11008, 32, (32, 32), 32000),
    "Mistral-7B": _model("mistral", 4096, 14336, 32, (32, 8), 32768),
    "Qwen2.5-7B": _model("qwen2", 3584, 18944, 28, (28, 4), 152064),
    "Llama-3.1-8B": _model("llama", 4096, 14336, 32, (32, 8), 128256),
    "Llama-2-13B": _model("llama", 5120, 13824, 40, (40, 40), 32000),
    "Qwen2.5-14B": _model("qwen2", 5120, 13824, 48, (40, 8), 152064),
    "Mistral-Small-24B": _model("mistral", 5120, 32768, 40, (32, 8), 131072, head_dim=128),
    "LLaMA-33B": _model("llama", 6656, 17920, 60, (52, 52), 32000),
    "Qwen2.5-32B": _model("qwen2", 5120, 27648, 64, (40, 8), 152064),
    "LLaMA-65B": _model("llama", 8192, 22016, 80, (64, 64), 32000),
    "Llama-3.1-70B": _model("llama", 8192, 28672, 80, (64, 8), 128256),
}
