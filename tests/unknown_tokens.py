"""A tiny model whose tokenizer has two tokens more than its embedding: added, and the embedding not resized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_model import build_tiny_model

ADDED = ["<|ticket|>", "<|seat|>"]


def build_model_with_unknown_tokens(path: Path, **tokenizer_settings: Any) -> int:
    """Rows of the model's embedding; the added tokens have the ids from there on."""
    build_tiny_model(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(path)
    rows = len(tokenizer)
    tokenizer.add_tokens(ADDED, special_tokens=True)
    for name, value in tokenizer_settings.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(path)
    return rows
