"""A micro-batch: several examples packed into one row without padding, each isolated as a document of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

PER_DOCUMENT = "per_document"
"""Name of the attention implementation that `isolation` registers with transformers"""
DOCUMENT_LENGTHS = "document_lengths"
"""Keyword argument that carries `MicroBatch.lengths` through a model to its attention"""


@dataclass(frozen=True)
class TokenRow:
    """Token ids of an example, and which of them are trained."""

    line: int
    input_ids: Sequence[int]
    trained: Sequence[bool]

    @property
    def trained_tokens(self) -> int:
        """Number of tokens with a loss; the first token has no context, and no loss."""
        return sum(self.trained[1:])

    @property
    def documents(self) -> tuple[TokenRow, ...]:
        return (self,)


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to the same conversation: the chosen one is better than the rejected one."""

    chosen: TokenRow
    rejected: TokenRow

    @property
    def line(self) -> int:
        return self.chosen.line

    @property
    def documents(self) -> tuple[TokenRow, ...]:
        return (self.chosen, self.rejected)


@dataclass(frozen=True)
class LabeledRow:
    """An answer labeled desirable or undesirable."""

    answer: TokenRow
    desirable: bool

    @property
    def line(self) -> int:
        return self.answer.line

    @property
    def documents(self) -> tuple[TokenRow, ...]:
        return (self.answer,)


TrainingExample = TokenRow | PreferencePair | LabeledRow


@dataclass(frozen=True)
class MicroBatch:
    """T tokens of one or more documents packed into one row; N of them are trained."""

    input_ids: torch.Tensor
    """(1, T)"""
    position_ids: torch.Tensor
    """(1, T); restarts at 0 with every document"""
    lengths: tuple[int, ...]
    """tokens of each document; they sum to T"""
    predictors: torch.Tensor
    """(N,) positions whose next token is trained"""
    targets: torch.Tensor
    """(N,) those next tokens"""


def collate(rows: Sequence[TokenRow], device: torch.device) -> MicroBatch:
    """The rows, concatenated. A row's first token is never a target: no document predicts a token of the next one."""
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    for row in rows:
        start = len(ids)
        ids += row.input_ids
        positions += range(len(row.input_ids))
        for index in range(1, len(row.input_ids)):
            if row.trained[index]:
                predictors.append(start + index - 1)
                targets.append(row.input_ids[index])
    return MicroBatch(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        lengths=tuple(len(row.input_ids) for row in rows),
        predictors=torch.tensor(predictors, device=device),
        targets=torch.tensor(targets, device=device),
    )


def isolating_arguments(model: torch.nn.Module, batch: MicroBatch) -> dict[str, Any]:
    """Keyword arguments for a forward pass of the model, or of its decoder, that isolate the documents.

    `isolation.isolate_documents` has chosen the mechanism for this model: the documents' lengths, or transformers' own
    block mask. That mask exists only without an attention mask and without a cache (`find_packed_sequence_indices` in
    its masking_utils, 5.23): with either of them, documents leak into each other.
    """
    arguments: dict[str, Any] = {"position_ids": batch.position_ids, "attention_mask": None, "use_cache": False}
    if getattr(model.config, "_attn_implementation", None) == PER_DOCUMENT:
        arguments[DOCUMENT_LENGTHS] = batch.lengths
    return arguments


def forward(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Logits (N, vocabulary) at the positions whose next token is trained."""
    output = model(input_ids=batch.input_ids, logits_to_keep=batch.predictors, **isolating_arguments(model, batch))
    logits: torch.Tensor = output.logits[0]  # (N, vocabulary)
    # Some architectures ignore `logits_to_keep`; no document's last token is a predictor, so that N < T.
    return logits[batch.predictors] if len(logits) > len(batch.predictors) else logits
