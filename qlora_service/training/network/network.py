"""A model with its adapter as training sees it: documents in, the loss of each learned token out.

How that is computed depends on the model, and is measured on it rather than believed: each shortcut is taken only if
it gives the logits that the model's own forward pass gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from peft import PeftModel, PrefixTuningConfig
from peft.tuners.lora import LoraLayer

from qlora_service.errors import InvalidSpec
from qlora_service.models.adapters import adapter_off, checkpoint_activations, runs_alone
from qlora_service.training.device import free_memory_bytes
from qlora_service.training.network.cross_entropy import TokenLosses, chunked_losses, fused_losses, logit_losses
from qlora_service.training.network.fused_modules import fuse, unfuse
from qlora_service.training.network.isolation import Isolation, are_same, probe_documents, use_own_attention
from qlora_service.training.network.llama_layers import LlamaDecoder, llama_decoder
from qlora_service.training.network.micro_batch import MicroBatch, TokenRow, collate, forward, isolating_arguments

Layers = Literal["llama", "general"]
Head = Literal["fused", "chunked", "logits"]
MEASURED_TOKENS = 64
"""Tokens whose activations are measured; per token, longer documents keep as much."""
FREE_SHARE = 0.5
"""Share of the free memory that a micro-batch's activations may take; the rest is for everything else of a step."""


@dataclass(frozen=True)
class KernelPaths:
    """How a model's losses are computed: what was found to give its own logits."""

    isolation: Isolation
    fused: bool
    """modules have a forward that keeps less (`fused_modules`)"""
    layers: Layers
    head: Head


class Network:
    """Computes losses, the ways `paths` says."""

    def __init__(
        self,
        model: PeftModel,
        isolation: Isolation,
        *,
        fast: bool = True,
        paths: KernelPaths | None = None,
        checkpointing: bool = False,
        neftune_noise_alpha: float | None = None,
        activation_bytes_per_token: float | None = None,
    ) -> None:
        """`paths` and the activations' bytes are those of another network with the same base and kind of adapter;
        without them, they are found.

        `isolation` is what `isolate_documents` chose for the base; `fast` allows the fast path.

        Raises:
            InvalidSpec: noise is asked for, and the architecture takes none.
        """
        self.model = model
        self.device = next(model.parameters()).device
        self.checkpointing = False
        self.activation_bytes_per_token = activation_bytes_per_token
        self._base = model.get_base_model()
        self._noise = neftune_noise_alpha
        self._decoder: LlamaDecoder | None = None
        self._base_decoder: LlamaDecoder | None = None
        self._adapter_is_on, self._is_evaluating = True, False
        self._fused: list[torch.nn.Module] = []
        config = self._base.config.get_text_config()
        # Cohere's, Granite's and Gemma's names for what they do to logits.
        self._logit_scale = getattr(config, "logit_scale", None) or 1.0 / (
            getattr(config, "logits_scaling", None) or 1.0
        )
        self._logit_cap: float | None = getattr(config, "final_logit_softcapping", None)
        if runs_alone(model):
            use_own_attention(self._base)
            self.paths = KernelPaths("alone", fused=False, layers="general", head="logits")
        elif paths is None:
            self.paths = self._choose_paths(isolation, fast)
        else:
            if paths.fused:
                self._fused = fuse(model)
            if paths.layers == "llama":
                self._build_decoders()
            self.paths = paths
        if neftune_noise_alpha is not None and self.head == "logits":
            raise InvalidSpec(
                f"NEFTune's noise does not reach {type(self._base).__name__}: leave neftune_noise_alpha out",
                location="/training/neftune_noise_alpha",
            )
        if checkpointing:
            self.checkpoint()

    @property
    def isolation(self) -> Isolation:
        return self.paths.isolation

    @property
    def layers(self) -> Layers:
        return self.paths.layers

    @property
    def head(self) -> Head:
        return self.paths.head

    def losses(self, documents: Sequence[TokenRow], *, adapter: bool = True) -> TokenLosses:
        """Of every learned token of the documents, in their order; of the base, and without gradients, if asked for."""
        if not adapter:
            with torch.no_grad(), self.evaluating(), self._without_adapter():
                return self.losses(documents)
        if self.isolation == "alone" and len(documents) > 1:
            return TokenLosses.joined([self.losses([document]) for document in documents])
        batch = collate(documents, self.device)
        if self.head == "logits":
            return logit_losses(self._logits(batch), batch.targets)
        return self._head_losses(self.head, self._hidden(batch, self.layers), batch.targets)

    @torch.no_grad()
    def evaluate(self, documents: Sequence[TokenRow], *, adapter: bool = True) -> TokenLosses:
        """The same without dropout, noise or gradients, one document at a time, by PEFT's own layers.

        In bfloat16 a document's logits depend a little on the shape of the matrix products they come from, and on
        whether LoRA's are made in float32, as PEFT does: packed, the mean loss of 158 tokens moved by 3e-3, fused by
        5e-3 (SmolLM2-135M). This is what anyone gets who loads the published adapter and feeds it the same rows.
        """
        with self.evaluating(), self._unfused():
            return TokenLosses.joined([self.losses([document], adapter=adapter) for document in documents])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model has neither dropout nor noise.

        To say so to each module and back takes 23 ms (SmolLM2-135M with LoRA, 2,499 modules): around many evaluations
        it is said once.
        """
        if self._is_evaluating:
            yield
            return
        was_training = bool(self.model.training)  # mypy would take `eval()` for a promise about it
        self.model.eval()
        self._is_evaluating = True
        try:
            yield
        finally:
            self._is_evaluating = False
            self.model.train(was_training)

    def checkpoint(self) -> bool:
        """Recompute activations in the backward pass from now on; False where the architecture cannot."""
        self.checkpointing = checkpoint_activations(self.model)
        return self.checkpointing

    @contextmanager
    def before_each_layer(self, check: Callable[[], None]) -> Iterator[None]:
        """Inside, `check` is called before each of the decoder's layers, forward and backward."""

        def on_input(x: torch.Tensor) -> None:
            check()
            if x.requires_grad:
                x.register_hook(lambda _: check())

        def on_call(_: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and isinstance(inputs[0], torch.Tensor):
                on_input(inputs[0])

        decoder = self._base.get_decoder()
        layers = next((part for part in decoder.children() if isinstance(part, torch.nn.ModuleList)), ())
        hooks = [layer.register_forward_pre_hook(on_call) for layer in layers]
        fast = [one for one in (self._decoder, self._base_decoder) if one is not None]
        try:
            for one in fast:
                one.before_layer = on_input
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for one in fast:
                one.before_layer = None

    def fits(self, micro_batch_tokens: int) -> bool:
        """Whether the free memory holds the activations of so many tokens; measured on a few."""
        if self.activation_bytes_per_token is None:
            self.activation_bytes_per_token = self.activation_bytes(MEASURED_TOKENS) / MEASURED_TOKENS
        return self.activation_bytes_per_token * micro_batch_tokens <= FREE_SHARE * free_memory_bytes(self.device)

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

    @torch.no_grad()
    def _choose_paths(self, isolation: Isolation, fast: bool) -> KernelPaths:
        """Each shortcut that gives the model's own logits on a probe, taken."""
        with self.evaluating():
            batch = collate(probe_documents(self._base)[:1], self.device)
            expected = forward(self._base, batch)
            self._fused = fuse(self.model)
            if not are_same(forward(self._base, batch), expected, self._base.dtype):
                unfuse(self._fused)
                self._fused = []
            heads: tuple[Head, ...] = ("fused", "chunked")
            head: Head = next((one for one in heads if self._agrees(expected, one, "general", batch)), "logits")
            layers: Layers = "general"
            if fast and head != "logits" and isolation == "per_document":
                self._build_decoders()
                if self._decoder is not None and self._agrees(expected, head, "llama", batch):
                    layers = "llama"
        return KernelPaths(isolation, bool(self._fused), layers, head)

    def _build_decoders(self) -> None:
        self._decoder = llama_decoder(self._base)
        with adapter_off(self.model):
            self._base_decoder = llama_decoder(self._base)

    def _agrees(self, expected: torch.Tensor, head: Head, layers: Layers, batch: MicroBatch) -> bool:
        """Whether these ways give the model's own logits: losses would hide what small logits do not show."""
        if head == "fused" and not self._head_is_matrix():
            return False
        try:
            logits = self._head_logits(self._hidden(batch, layers))
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, TypeError, ValueError, KeyError, RuntimeError):
            return False  # the architecture has no such parts
        return are_same(logits, expected, self._base.dtype)

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
        output = self._base.get_decoder()(**inputs, **isolating_arguments(self._base, batch))
        hidden: torch.Tensor = output.last_hidden_state[0, batch.predictors]
        return hidden.to(self._base.dtype)  # Mamba keeps its residuals in float32

    def _embed(self, batch: MicroBatch) -> torch.Tensor:
        """(1, tokens, hidden), with NEFTune's noise while training: uniform, alpha / √(length · hidden) at most."""
        embedded: torch.Tensor = self._base.get_input_embeddings()(batch.input_ids)
        if not self._adds_noise():
            return embedded
        assert self._noise is not None
        lengths = torch.tensor(batch.lengths, device=self.device)
        of_token = lengths.repeat_interleave(lengths, output_size=sum(batch.lengths))[None, :, None]
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * (
            self._noise / (of_token * embedded.shape[-1]).sqrt()
        ).to(embedded.dtype)

    def _adds_noise(self) -> bool:
        return self._noise is not None and self.model.training and torch.is_grad_enabled()

    def _head_losses(self, head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> TokenLosses:
        if head == "fused":
            return fused_losses(hidden, self._base.get_output_embeddings().weight, targets)
        return chunked_losses(hidden, self._head_logits, targets)

    def _head_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, vocabulary) of hidden states: the head, and what some architectures do to its output."""
        logits: torch.Tensor = self._base.get_output_embeddings()(hidden) * self._logit_scale
        return logits if self._logit_cap is None else self._logit_cap * torch.tanh(logits / self._logit_cap)

    def _head_is_matrix(self) -> bool:
        """Whether the head is a frozen matrix and nothing more."""
        head: Any = self._base.get_output_embeddings()
        has_transform = self._logit_scale != 1.0 or self._logit_cap is not None
        other = head.__class__ is not torch.nn.Linear
        return not (other or has_transform or head.bias is not None or head.weight.requires_grad)

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        trained, self._decoder, self._adapter_is_on = self._decoder, self._base_decoder, False
        try:
            with adapter_off(self.model):
                yield
        finally:
            self._decoder, self._adapter_is_on = trained, True

    @contextmanager
    def _unfused(self) -> Iterator[None]:
        """The general path with PEFT's own LoRA layers; the other fused modules round as their own forward does."""
        paths, self.paths = self.paths, replace(self.paths, layers="general")
        layers = [module for module in self._fused if isinstance(module, LoraLayer)]
        forwards = [layer.__dict__.pop("forward") for layer in layers]
        try:
            yield
        finally:
            self.paths = paths
            for layer, fused in zip(layers, forwards, strict=True):
                layer.__dict__["forward"] = fused
