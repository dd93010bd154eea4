"""A model with its adapter, as training uses it: documents in, the loss of each trained token out.

The kernel paths depend on the model and are measured on it: each shortcut is taken only if it gives the logits of the
model's own forward pass.
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
from qlora_service.models.adapters import adapter_disabled, checkpoint_activations, needs_own_row
from qlora_service.training.device import free_memory_bytes
from qlora_service.training.network.cross_entropy import TokenLosses, chunked_losses, fused_losses, logit_losses
from qlora_service.training.network.fused_modules import fuse, unfuse
from qlora_service.training.network.isolation import Isolation, logits_match, probe_documents, use_default_attention
from qlora_service.training.network.llama_layers import LlamaDecoder, llama_decoder
from qlora_service.training.network.micro_batch import MicroBatch, TokenRow, collate, forward, isolating_arguments

Layers = Literal["llama", "general"]
Head = Literal["fused", "chunked", "logits"]
MEASURED_TOKENS = 64
"""Tokens of the document whose activations are measured; longer documents keep as much per token."""
FREE_SHARE = 0.5
"""Share of the free memory for a micro-batch's activations; the rest of a step needs the other half."""


@dataclass(frozen=True)
class KernelPaths:
    """The kernels that compute a model's losses: shortcuts that were measured to give the model's own logits."""

    isolation: Isolation
    fused: bool
    """modules have a forward that keeps less for the backward pass (`fused_modules`)"""
    layers: Layers
    head: Head


class Network:
    """A model with its adapter that computes losses by the kernel paths `paths`."""

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
        """Chooses the kernel paths, unless `paths` gives them.

        `isolation` is the result of `isolate_documents` for the base; `fast` allows the fast path. `paths` and
        `activation_bytes_per_token` may come from another network with the same base and kind of adapter; otherwise
        they are measured.

        Raises:
            InvalidSpec: NEFTune noise is requested, and the architecture does not support it.
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
        # Scales and caps of logits, under the names of Cohere, Granite and Gemma.
        self._logit_scale = getattr(config, "logit_scale", None) or 1.0 / (
            getattr(config, "logits_scaling", None) or 1.0
        )
        self._logit_cap: float | None = getattr(config, "final_logit_softcapping", None)
        if needs_own_row(model):
            use_default_attention(self._base)
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
        """The losses of all trained tokens of the documents, in order.

        With `adapter=False` they are the base model's, without gradients.
        """
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
        """`losses` without dropout, noise or gradients, one document at a time, by PEFT's own layers.

        They equal the losses of the published adapter, loaded with PEFT and evaluated on the same rows. In bfloat16 a
        document's logits depend slightly on the shapes of its matrix products, and on the precision of LoRA's products,
        which PEFT computes in float32: packing moved the mean loss of 158 tokens by 3e-3, and fusing by 5e-3
        (SmolLM2-135M).
        """
        with self.evaluating(), self._unfused():
            return TokenLosses.joined([self.losses([document], adapter=adapter) for document in documents])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """A block in which the model has neither dropout nor noise.

        Switching all modules to evaluation mode and back takes 23 ms (SmolLM2-135M with LoRA, 2,499 modules): a block
        around many evaluations switches once.
        """
        if self._is_evaluating:
            yield
            return
        was_training = bool(self.model.training)  # without bool, mypy assumes False after `eval()`
        self.model.eval()
        self._is_evaluating = True
        try:
            yield
        finally:
            self._is_evaluating = False
            self.model.train(was_training)

    def checkpoint(self) -> bool:
        """Enables recomputation of activations in the backward pass; False if the architecture does not support it."""
        self.checkpointing = checkpoint_activations(self.model)
        return self.checkpointing

    @contextmanager
    def before_each_layer(self, check: Callable[[], None]) -> Iterator[None]:
        """A block in which `check` is called before each of the decoder's layers, forward and backward."""

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
        fast_decoders = [fast for fast in (self._decoder, self._base_decoder) if fast is not None]
        try:
            for fast in fast_decoders:
                fast.before_layer = on_input
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for fast in fast_decoders:
                fast.before_layer = None

    def fits(self, micro_batch_tokens: int) -> bool:
        """Whether a micro-batch's activations fit into `FREE_SHARE` of the free memory, measured on few tokens."""
        if self.activation_bytes_per_token is None:
            self.activation_bytes_per_token = self.activation_bytes(MEASURED_TOKENS) / MEASURED_TOKENS
        return self.activation_bytes_per_token * micro_batch_tokens <= FREE_SHARE * free_memory_bytes(self.device)

    def activation_bytes(self, tokens: int) -> int:
        """Bytes that a forward pass over one document of `tokens` tokens keeps for the backward pass."""
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
        """The kernel paths with every shortcut that gives the model's own logits on a probe document."""
        with self.evaluating():
            batch = collate(probe_documents(self._base)[:1], self.device)
            expected = forward(self._base, batch)  # (N, vocabulary)
            self._fused = fuse(self.model)
            if not logits_match(forward(self._base, batch), expected, self._base.dtype):
                unfuse(self._fused)
                self._fused = []
            heads: tuple[Head, ...] = ("fused", "chunked")
            head: Head = next((path for path in heads if self._matches(expected, path, "general", batch)), "logits")
            layers: Layers = "general"
            if fast and head != "logits" and isolation == "per_document":
                self._build_decoders()
                if self._decoder is not None and self._matches(expected, head, "llama", batch):
                    layers = "llama"
        return KernelPaths(isolation, bool(self._fused), layers, head)

    def _build_decoders(self) -> None:
        self._decoder = llama_decoder(self._base)
        with adapter_disabled(self.model):
            self._base_decoder = llama_decoder(self._base)

    def _matches(self, expected: torch.Tensor, head: Head, layers: Layers, batch: MicroBatch) -> bool:
        """Whether the paths `head` and `layers` give the model's own logits; losses would hide small differences."""
        if head == "fused" and not self._head_is_matrix():
            return False
        try:
            logits = self._head_logits(self._hidden(batch, layers))
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, TypeError, ValueError, KeyError, RuntimeError):
            return False  # the architecture lacks the parts of this path
        return logits_match(logits, expected, self._base.dtype)

    def _logits(self, batch: MicroBatch) -> torch.Tensor:
        """Logits (N, vocabulary) of the model's own forward, after the virtual tokens of a prompt method."""
        if not (needs_own_row(self.model) and self._adapter_is_on):
            return forward(self._base, batch)
        config = self.model.active_peft_config
        # A prefix exists in keys and values only; other prompts occupy positions of the row.
        virtual = 0 if isinstance(config, PrefixTuningConfig) else config.num_virtual_tokens
        output = self.model(input_ids=batch.input_ids, use_cache=False, logits_to_keep=batch.predictors + virtual)
        logits: torch.Tensor = output.logits  # (1, N, vocabulary)
        return logits[0]

    def _hidden(self, batch: MicroBatch, layers: Layers) -> torch.Tensor:
        """Hidden states (N, hidden) at the positions whose next token is trained."""
        if layers == "llama":
            assert self._decoder is not None
            embedded = self._embed(batch)[0]  # (tokens, hidden)
            checkpointing = self.checkpointing and torch.is_grad_enabled()
            return self._decoder(embedded, batch.position_ids, batch.lengths, batch.predictors, checkpointing)
        inputs = {"inputs_embeds": self._embed(batch)} if self._adds_noise() else {"input_ids": batch.input_ids}
        output = self._base.get_decoder()(**inputs, **isolating_arguments(self._base, batch))
        hidden: torch.Tensor = output.last_hidden_state[0, batch.predictors]  # (N, hidden)
        return hidden.to(self._base.dtype)  # Mamba keeps its residuals in float32

    def _embed(self, batch: MicroBatch) -> torch.Tensor:
        """Embeddings (1, tokens, hidden), while training with NEFTune noise: uniform in ±alpha / √(length · hidden)."""
        embedded: torch.Tensor = self._base.get_input_embeddings()(batch.input_ids)
        if not self._adds_noise():
            return embedded
        assert self._noise is not None
        lengths = torch.tensor(batch.lengths, device=self.device)  # (documents,)
        # (1, tokens, 1): the length of each token's document
        token_lengths = lengths.repeat_interleave(lengths, output_size=sum(batch.lengths))[None, :, None]
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * (
            self._noise / (token_lengths * embedded.shape[-1]).sqrt()
        ).to(embedded.dtype)

    def _adds_noise(self) -> bool:
        return self._noise is not None and self.model.training and torch.is_grad_enabled()

    def _head_losses(self, head: Head, hidden: torch.Tensor, targets: torch.Tensor) -> TokenLosses:
        if head == "fused":
            return fused_losses(hidden, self._base.get_output_embeddings().weight, targets)
        return chunked_losses(hidden, self._head_logits, targets)

    def _head_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (N, vocabulary) of hidden states (N, hidden): the head, then the architecture's scale and cap."""
        logits: torch.Tensor = self._base.get_output_embeddings()(hidden) * self._logit_scale
        return logits if self._logit_cap is None else self._logit_cap * torch.tanh(logits / self._logit_cap)

    def _head_is_matrix(self) -> bool:
        """Whether the head is a frozen matrix without bias, scale or cap."""
        head: Any = self._base.get_output_embeddings()
        has_transform = self._logit_scale != 1.0 or self._logit_cap is not None
        is_other = head.__class__ is not torch.nn.Linear
        return not (is_other or has_transform or head.bias is not None or head.weight.requires_grad)

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        """A block in which losses are the base model's."""
        trained, self._decoder, self._adapter_is_on = self._decoder, self._base_decoder, False
        try:
            with adapter_disabled(self.model):
                yield
        finally:
            self._decoder, self._adapter_is_on = trained, True

    @contextmanager
    def _unfused(self) -> Iterator[None]:
        """A block on the general path with PEFT's own LoRA layers.

        The other fused modules stay: they round in the same places as their class's forward.
        """
        paths, self.paths = self.paths, replace(self.paths, layers="general")
        layers = [module for module in self._fused if isinstance(module, LoraLayer)]
        forwards = [layer.__dict__.pop("forward") for layer in layers]
        try:
            yield
        finally:
            self.paths = paths
            for layer, fused in zip(layers, forwards, strict=True):
                layer.__dict__["forward"] = fused
