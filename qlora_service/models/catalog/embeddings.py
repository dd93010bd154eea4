"""The number of token ids that a base model has an embedding for."""

from __future__ import annotations

from qlora_service.models.catalog.catalog import BaseModel
from qlora_service.models.catalog.safetensors_header import read_header

INPUT_EMBEDDINGS = {"embed_in", "embed_tokens", "embedding", "embeddings", "tok_embeddings", "word_embeddings", "wte"}
"""Module names of the token embedding in transformers' causal language models."""


def embedding_rows(model: BaseModel) -> int:
    """Token ids 0 to n - 1 have an embedding: rows of the stored input embedding, or else the config's vocab_size.

    The two differ where an embedding has rows for virtual tokens. A tokenizer may have more tokens than either.
    """
    rows = {
        entry.shape[0]
        for path in sorted(model.path.glob("*.safetensors"))
        for name, entry in read_header(path).items()
        if len(entry.shape) == 2 and name.removesuffix(".weight").rpartition(".")[2] in INPUT_EMBEDDINGS
    }
    return max(rows, default=model.vocab_size)
