"""Token ids that a base model has no embedding for: its tokenizer has more tokens than its embedding has rows."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer


def unknown_token(ids: Sequence[int], tokenizer: Tokenizer, embeddings: int | None) -> str | None:
    """The problem with token ids of which one has no embedding; None if all have one."""
    if embeddings is None or not ids or max(ids) < embeddings:
        return None
    token = next(token for token in ids if token >= embeddings)
    return (
        f"it has token {token} ({tokenizer.id_to_token(token)}), and the base has embeddings for {embeddings} tokens "
        f"(0 to {embeddings - 1}): resize the base's embeddings to its tokenizer (model.resize_token_embeddings), save "
        "it and import it again, or leave the token out"
    )
