"""What cannot work, or what PEFT would silently ignore, of a job's spec on its base model; known without torch.

What contradicts itself on any base, the spec refuses (`specs.combinations`). What PEFT does with each combination was
found by running it (PEFT 0.21, transformers 5.23, bitsandbytes 0.50).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from qlora_service.errors import Finding
from qlora_service.models.catalog.catalog import BaseModel
from qlora_service.specs import (
    IA3,
    Adapter,
    JobSpec,
    LlamaAdapter,
    Lora,
    Oft,
    PromptMethod,
    TargetedAdapter,
)

Modules = Mapping[str, frozenset[tuple[int, int]]]
"""What `Catalog.module_shapes` knows of a base."""

TOKEN_EMBEDDINGS = {"embed_in", "embed_tokens", "embeddings", "tok_embeddings", "word_embeddings", "wte"}
EMBEDDINGS = TOKEN_EMBEDDINGS | {"embed_positions", "wpe"}
HEADS = {"embed_out", "lm_head", "output"}
# PEFT gives an embedding and the head that shares its weight one adapter under this name only.
TIED_EMBEDDING = "embed_tokens"
# tuners/adaption_prompt/config.py
LLAMA_ADAPTER_MODELS = ("llama", "mistral", "gpt2")
# Their linear layers are transformers' Conv1D as long as they are not quantized.
CONV1D_MODELS = {"gpt2", "openai-gpt"}


def misfits(spec: JobSpec, model: BaseModel, modules: Modules) -> list[Finding]:
    """Everything in `spec` that cannot work on `model`, each with its place and what to do; empty if all is well."""
    return [
        *_targets(spec.adapter, model, modules),
        *_method(spec, model, modules),
        *_tokens(spec.adapter, model),
        *_positions(spec, model),
    ]


def positions_taken(adapter: Adapter) -> int:
    """Positions before each document that the adapter's virtual tokens fill."""
    return adapter.num_virtual_tokens if isinstance(adapter, PromptMethod) else 0


def _targets(adapter: Adapter, model: BaseModel, modules: Modules) -> Iterator[Finding]:
    if not isinstance(adapter, TargetedAdapter):
        return
    place = "/adapter/target_modules"
    named = [] if isinstance(adapter.target_modules, str) else adapter.target_modules
    if missing := [name for name in named if name not in modules]:
        known = ", ".join(sorted(modules))
        shared = "; its output head is its embedding" if HEADS.intersection(missing) else ""
        yield Finding(f"{model.name} has no {', '.join(missing)}; its modules are {known}{shared}", place)
    embeddings = [name for name in named if name in modules and name in EMBEDDINGS]
    if embeddings and not isinstance(adapter, Lora):
        yield Finding(f"{adapter.method} has no form for an embedding: leave out {', '.join(embeddings)}", place)
    if isinstance(adapter, Lora):
        yield from _embedding_targets(adapter, embeddings, modules)
        heads = [name for name in named if name in modules and name in HEADS]
        if adapter.use_dora and (embeddings or heads):
            # A row of zeros, such as the padding token's, has no direction: 0 / 0.
            yield Finding(
                f"DoRA divides by the norm of each row, and rows of unused tokens are zero: leave out "
                f"{', '.join(embeddings + heads)}, or set use_dora to false",
                place,
            )
    if isinstance(adapter, IA3):
        yield from _feedforward_modules(adapter, model, modules)


def _embedding_targets(adapter: Lora, embeddings: list[str], modules: Modules) -> Iterator[Finding]:
    place = "/adapter/target_modules"
    if not embeddings:
        return
    if adapter.init_lora_weights == "olora":
        yield Finding(
            f"OLoRA is for linear layers: leave out {', '.join(embeddings)}, or set init_lora_weights to default", place
        )
    if adapter.trainable_token_indices is not None:
        yield Finding(
            f"{', '.join(embeddings)} cannot be a target and have trainable_token_indices: choose one of the two", place
        )
    untieable = [name for name in embeddings if name in TOKEN_EMBEDDINGS - {TIED_EMBEDDING}]
    if untieable and HEADS.isdisjoint(modules):
        yield Finding(
            f"{', '.join(untieable)} is the output head too, and PEFT adapts one of them only: leave it out, or use "
            "trainable_token_indices",
            place,
        )


def _feedforward_modules(adapter: IA3, model: BaseModel, modules: Modules) -> Iterator[Finding]:
    targets = set(_linear(modules)) if isinstance(adapter.target_modules, str) else set(adapter.target_modules)
    if strangers := [name for name in adapter.feedforward_modules if name not in targets]:
        yield Finding(
            f"{', '.join(strangers)} is not among the target modules {', '.join(sorted(targets))} of {model.name}: "
            "add it to target_modules, or leave it out",
            "/adapter/feedforward_modules",
        )


def _method(spec: JobSpec, model: BaseModel, modules: Modules) -> Iterator[Finding]:
    adapter = spec.adapter
    if isinstance(adapter, Lora) and adapter.init_lora_weights == "olora":
        yield from _olora(adapter, spec, modules)
    if isinstance(adapter, Oft):
        yield from _oft(adapter, spec.quantization.type, model, modules)
    if isinstance(adapter, LlamaAdapter):
        yield from _llama_adapter(adapter, model, modules)


def _llama_adapter(adapter: LlamaAdapter, model: BaseModel, modules: Modules) -> Iterator[Finding]:
    if model.model_type not in LLAMA_ADAPTER_MODELS:
        yield Finding(
            f"llama_adapter is for {', '.join(LLAMA_ADAPTER_MODELS)}, and {model.name} is of type {model.model_type}: "
            "choose another method, such as lora",
            "/adapter/method",
        )
    elif any(out != inside for out, inside in modules.get("q_proj", ())):
        yield Finding(
            f"llama_adapter needs as many query features as {model.name} has hidden ones: choose another method",
            "/adapter/method",
        )
    if adapter.adapter_layers is not None and adapter.adapter_layers > model.num_layers:
        yield Finding(
            f"{model.name} has {model.num_layers} layers: set adapter_layers to {model.num_layers} or less",
            "/adapter/adapter_layers",
        )


def _oft(adapter: Oft, quantization: str, model: BaseModel, modules: Modules) -> Iterator[Finding]:
    if quantization == "none" and model.model_type in CONV1D_MODELS:
        yield Finding(
            f"OFT does not know the layers of an unquantized {model.model_type}: set quantization.type to nf4",
            "/adapter/method",
        )
    # PEFT would take another block size for such a layer, and say so in a warning.
    size = adapter.oft_block_size
    inputs_at = 0 if model.model_type in CONV1D_MODELS else 1
    odd = {
        name: shape[inputs_at]
        for name in _adapted(adapter, modules)
        for shape in sorted(modules[name])
        if shape[inputs_at] % size
    }
    if odd:
        listed = ", ".join(f"{name} with {inputs}" for name, inputs in sorted(odd.items()))
        yield Finding(
            f"{size} does not divide the inputs of {listed}: choose a divisor, or leave these modules out",
            "/adapter/oft_block_size",
        )


def _olora(adapter: Lora, spec: JobSpec, modules: Modules) -> Iterator[Finding]:
    smallest = min((min(shape) for name in _adapted(adapter, modules) for shape in modules[name]), default=adapter.r)
    if adapter.r > smallest:
        yield Finding(
            f"OLoRA starts from at most as many directions as a target's weight has, here {smallest}: set r to "
            f"{smallest} or less",
            "/adapter/r",
        )
    if spec.training.weight_decay:
        yield Finding(
            "weight decay would also shrink the constant half of an OLoRA adapter: set it to 0, or init_lora_weights "
            "to default",
            "/training/weight_decay",
        )


def _tokens(adapter: Adapter, model: BaseModel) -> Iterator[Finding]:
    tokens = adapter.trainable_token_indices if isinstance(adapter, Lora) else None
    place = "/adapter/trainable_token_indices"
    if tokens is None:
        return
    if unknown := [str(token) for token in tokens if token >= model.vocab_size]:
        yield Finding(
            f"{model.name} has tokens 0 to {model.vocab_size - 1}, and no {', '.join(unknown[:5])}: choose among them",
            place,
        )


def _positions(spec: JobSpec, model: BaseModel) -> Iterator[Finding]:
    taken, limit = positions_taken(spec.adapter), spec.training.max_seq_len_tokens
    # Without virtual tokens, the length by itself is judged where it is resolved.
    if taken and limit + taken > model.max_positions:
        yield Finding(
            f"{taken} virtual tokens before {limit} of a row are more than the {model.max_positions} that {model.name} "
            f"handles: set max_seq_len_tokens to {max(0, model.max_positions - taken)} or less",
            "/training/max_seq_len_tokens" if taken < model.max_positions else "/adapter/num_virtual_tokens",
        )


def _linear(modules: Modules) -> list[str]:
    """What "all-linear" means."""
    return [name for name in modules if name not in EMBEDDINGS | HEADS]


def _adapted(adapter: TargetedAdapter, modules: Modules) -> list[str]:
    """The target modules that the base has."""
    targets = adapter.target_modules
    return _linear(modules) if isinstance(targets, str) else [name for name in targets if name in modules]
