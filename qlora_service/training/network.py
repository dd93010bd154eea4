"""A model with its adapter as training sees it: documents in, the loss of each learned token out.

How that is computed depends on the model, and is measured on it rather than believed: each shortcut is taken only if
it gives the losses that the model's own forward pass gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import PeftModel, PrefixTuningConfig

from qlora_service.models.adapters import checkpoint_activations, runs_alone
from qlora_service.training.attention import (
    LOW_PRECISION_TOLERANCE,
    TOLERANCE,
    Isolation,
    probe_documents,
    use_own_attention,
)
from qlora_service.training.device import free_memory_bytes
from qlora_service.training.fused_modules import fuse, unfuse
from qlora_service.training.head import TokenLosses, chunked_losses, fused_losses, logit_losses
from qlora_service.training.llama_layers import LlamaDecoder, llama_decoder
from qlora_service.training.micro_batch import (
    DOCUMENT_LENGTHS,
    PER_DOCUMENT,
    MicroBatch,
    TokenRow,
    collate,
    forward,
)

Layers = Literal["llama", "general"]
Head = Literal["fused", "chunked", "logits"]
MEASURED_TOKENS = 64
"""Tokens whose activations are measured; per token, longer documents keep as much."""
FREE_SHARE = 0.5
"""Share of the free memory that a micro-batch's activations may take; the rest is for everything else of a step."""


class Network:
    """Computes losses; `layers`, `head` and `checkpointing` say how."""

    def __init__(
        self,
        model: PeftModel,
        isolation: Isolation,
        *,
        fast: bool = True,
        checkpointing: bool = False,
        neftune_noise_alpha: float | None = None,
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.isolation: Isolation = "alone" if runs_alone(model) else isolation
        self.layers: Layers = "general"
        self.head: Head = "logits"
        self.checkpointing = False
        self._base = model.get_base_model()
        self._noise = neftune_noise_alpha
        self._decoder: LlamaDecoder | None = None
        self._base_decoder: LlamaDecoder | None = None
        self._adapter_is_on = True
        if runs_alone(model):
            use_own_attention(self._base)
        else:
            self._choose(fast)
        if checkpointing:
            self.checkpoint()

    def losses(self, documents: Sequence[TokenRow], *, adapter: bool = True) -> TokenLosses:
        """Of every learned token of the documents, in their order; of the base, and without gradients, if asked for."""
        if not adapter:
            with torch.no_grad(), self._evaluating(), self._without_adapter():
                return self.losses(documents)
        if self.isolation == "alone" and len(documents) > 1:
            return TokenLosses.joined([self.losses([document]) for document in documents])
        batch = collate(documents, self.device)
        if self.head == "logits":
            return logit_losses(self._logits(batch), batch.targets)
        return self._head_losses(self.head, self._hidden(batch, self.layers), batch.targets)

    @torch.no_grad()
    def evaluate(self, documents: Sequence[TokenRow], *, adapter: bool = True) -> TokenLosses:
        """The same without dropout, noise or gradients, one document at a time.

        In bfloat16 a document's logits depend a little on the shape of the matrix products they come from: packed, the
        mean loss of 158 tokens moved by 3e-3 (SmolLM2-135M, AVX512-BF16). Alone, it is what anyone gets who loads the
        published adapter and feeds it the same rows.
        """
        with self._evaluating():
            return TokenLosses.joined([self.losses([document], adapter=adapter) for document in documents])

    def checkpoint(self) -> bool:
        """Recompute activations in the backward pass from now on; False where the architecture cannot."""
        self.checkpointing = checkpoint_activations(self.model)
        return self.checkpointing

    def fits(self, micro_batch_tokens: int) -> bool:
        """Whether the free memory holds the activations of so many tokens; measured on a few."""
        needed = self.activation_bytes(MEASURED_TOKENS) / MEASURED_TOKENS * micro_batch_tokens
        return needed <= FREE_SHARE * free_memory_bytes(self.device)

    def activation_bytes(self, tokens: int) -> int:
        """What a forward pass over one document of so many tokens keeps for the backward pass."""
        frozen = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in frozen:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        document = TokenRow(0, probe_documents(self._base, tokens)[0].input_ids, [True] * tokens)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = self.losses([document])
        del losses
        return sum(kept.values())

    def _choose(self, fast: bool) -> None:
        """Take each shortcut that gives the model's own losses on a probe."""
        # An adapter that starts at zero changes nothing, so the probe runs with whatever it has.
        with torch.no_grad(), self._evaluating():
            batch = collate(probe_documents(self._base)[:1], self.device)
            expected = logit_losses(forward(self._base, batch), batch.targets).nll
            fused = fuse(self.model)
            if not _close(logit_losses(forward(self._base, batch), batch.targets).nll, expected, self._base.dtype):
                unfuse(fused)
            heads: tuple[Head, ...] = ("fused", "chunked")
            for head in heads:
                if self._agrees(expected, head, "general", batch):
                    self.head = head
                    break
            if not fast or self.head == "logits" or self.isolation != "per_document":
                return
            self._decoder = llama_decoder(self._base)
            if self._decoder is None or not self._agrees(expected, self.head, "llama", batch):
                self._decoder = None
                return
            self.layers = "llama"
            with self.model.disable_adapter():
                self._base_decoder = llama_decoder(self._base)

    def _agrees(self, expected: torch.Tensor, head: Head, layers: Layers, batch: MicroBatch) -> bool:
        if head == "fused" and not _is_frozen_matrix(self._base.get_output_embeddings()):
            return False
        try:
            losses = self._head_losses(head, self._hidden(batch, layers), batch.targets).nll
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, TypeError, ValueError, KeyError, RuntimeError):
            return False  # the architecture has no such parts
        return _close(losses, expected, self._base.dtype)

    def _logits(self, batch: MicroBatch) -> torch.Tensor:
        """(N, vocabulary) by the model's own forward, behind the virtual tokens of a prompt method."""
        if not (runs_alone(self.model) and self._adapter_is_on):
            return forward(self._base, batch)
        config = self.model.active_peft_config
        # A prefix lies in the keys and values; other prompts are positions like any other.
        virtual = 0 if isinstance(config, PrefixTuningConfig) else config.num_virtual_tokens
        output = self.model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=batch.predictors + virtual)
        logits: torch.Tensor = output.logits
        return logits[0]

    def _hidden(self, batch: MicroBatch, layers: Layers) -> torch.Tensor:
        """(N, hidden) at the positions whose next token is learned."""
        if layers == "llama":
            assert self._decoder is not None
            embedded = self._embed(batch)[0]
            checkpointing = self.checkpointing and torch.is_grad_enabled()
            return self._decoder(embedded, batch.position_ids, batch.lengths, batch.predictors, checkpointing)
        inputs = {"inputs_embeds": self._embed(batch)} if self._adds_noise() else {"input_ids": batch.input_ids}
        per_document = self._base.config._attn_implementation == PER_DOCUMENT
        lengths = {DOCUMENT_LENGTHS: batch.lengths} if per_document else {}
        output = self._base.get_decoder()(
            **inputs, position_ids=batch.position_ids, attention_mask=None, use_cache=False, **lengths
        )
        hidden: torch.Tensor = output.last_hidden_state[0, batch.predictors]
        return hidden

    def _embed(self, batch: MicroBatch) -> torch.Tensor:
        """(1, tokens, hidden), with NEFTune's noise while training: uniform, alpha / √(length · hidden) at most."""
        embedded: torch.Tensor = self._base.get_input_embeddings()(batch.input_ids)
        if not self._adds_noise():
            return embedded
        assert self._noise is not None
        lengths = torch.tensor(batch.lengths, device=self.device)
        of_token = lengths.repeat_interleave(lengths)[None, :, None]
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * (
            self._noise / (of_token * embedded.shape[-1]).sqrt()
        ).to(embedded.dtype)

    def _adds_noise(self) -> bool:
        return self._noise is not None and self.model.training and torch.is_grad_enabled()

    def _head_losses(self, head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> TokenLosses:
        module: Any = self._base.get_output_embeddings()
        if head == "fused":
            return fused_losses(hidden, module.weight, targets)
        config = self._base.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)

        def logits(states: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = module(states) * scale
            return result if cap is None else cap * torch.tanh(result / cap)

        return chunked_losses(hidden, logits, targets)

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        trained, self._decoder, self._adapter_is_on = self._decoder, self._base_decoder, False
        try:
            with self.model.disable_adapter():
                yield
        finally:
            self._decoder, self._adapter_is_on = trained, True

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = bool(self.model.training)  # mypy would take `eval()` for a promise about it
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)


def _is_frozen_matrix(head: Any) -> bool:
    if type(head) is not torch.nn.Linear or head.weight.requires_grad:
        return False
    return getattr(head, "bias", None) is None


def _close(losses: torch.Tensor, expected: torch.Tensor, compute_dtype: torch.dtype) -> bool:
    tolerance = TOLERANCE.get(compute_dtype, LOW_PRECISION_TOLERANCE)
    return bool((losses - expected).abs().max() <= tolerance * expected.abs().max())
