"""Compatibility of a job's spec with its base model, checked without torch.

Covers combinations that cannot work or that PEFT would silently ignore, found by running each one (PEFT 0.21,
transformers 5.23, bitsandbytes 0.50). Contradictions on any base are refused by the spec (`specs.combinations`).
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
"""Weight shapes by module name, as `Catalog.module_shapes` returns them."""

TOKEN_EMBEDDINGS = {"embed_in", "embed_tokens", "embeddings", "tok_embeddings", "word_embeddings", "wte"}
EMBEDDINGS = TOKEN_EMBEDDINGS | {"embed_positions", "wpe"}
OUTPUT_HEADS = {"embed_out", "lm_head", "output"}
TIEABLE_EMBEDDING = "embed_tokens"
"""The only name of an embedding that PEFT gives one adapter together with the head that shares its weight."""
LLAMA_ADAPTER_MODELS = ("llama", "mistral", "gpt2")
"""Source: PEFT, tuners/adaption_prompt/config.py."""
CONV1D_MODELS = {"gpt2", "openai-gpt"}
"""Model types whose linear layers are transformers' Conv1D unless they are quantized."""


def incompatibilities(spec: JobSpec, model: BaseModel, modules: Modules) -> list[Finding]:
    """Everything in `spec` that cannot work on `model`, each finding with its location and what to do."""
    return [
        *_target_findings(spec.adapter, model, modules),
        *_method_findings(spec, model, modules),
        *_token_findings(spec.adapter, model),
        *_position_findings(spec, model),
    ]


def positions_taken(adapter: Adapter) -> int:
    """Positions before each document that the adapter's virtual tokens fill."""
    return adapter.num_virtual_tokens if isinstance(adapter, PromptMethod) else 0


def _target_findings(adapter: Adapter, model: BaseModel, modules: Modules) -> Iterator[Finding]:
    if not isinstance(adapter, TargetedAdapter):
        return
    pointer = "/adapter/target_modules"
    named = [] if isinstance(adapter.target_modules, str) else adapter.target_modules
    if missing := [name for name in named if name not in modules]:
        known = ", ".join(sorted(modules))
        tied_hint = "; its output head is its embedding" if OUTPUT_HEADS.intersection(missing) else ""
        yield Finding(f"{model.name} has no {', '.join(missing)}; its modules are {known}{tied_hint}", pointer)
    embeddings = [name for name in named if name in modules and name in EMBEDDINGS]
    if embeddings and not isinstance(adapter, Lora):
        yield Finding(f"{adapter.method} cannot adapt an embedding: leave out {', '.join(embeddings)}", pointer)
    if isinstance(adapter, Lora):
        yield from _embedding_findings(adapter, embeddings, modules)
        heads = [name for name in named if name in modules and name in OUTPUT_HEADS]
        if adapter.use_dora and (embeddings or heads):
            # A row of zeros, such as the padding token's, has no direction: 0 / 0.
            yield Finding(
                f"DoRA divides by the norm of each row, and rows of unused tokens are zero: leave out "
                f"{', '.join(embeddings + heads)}, or set use_dora to false",
                pointer,
            )
    if isinstance(adapter, IA3):
        yield from _feedforward_findings(adapter, model, modules)


def _embedding_findings(adapter: Lora, embeddings: list[str], modules: Modules) -> Iterator[Finding]:
    pointer = "/adapter/target_modules"
    if not embeddings:
        return
    if adapter.init_lora_weights == "olora":
        yield Finding(
            f"OLoRA is for linear layers: leave out {', '.join(embeddings)}, or set init_lora_weights to default",
            pointer,
        )
    if adapter.trainable_token_indices is not None:
        yield Finding(
            f"{', '.join(embeddings)} cannot be a target and have trainable_token_indices: choose one of the two",
            pointer,
        )
    not_tieable = [name for name in embeddings if name in TOKEN_EMBEDDINGS - {TIEABLE_EMBEDDING}]
    if not_tieable and OUTPUT_HEADS.isdisjoint(modules):
        yield Finding(
            f"{', '.join(not_tieable)} is the output head too, and PEFT adapts only one of the two: leave it out, or "
            "use trainable_token_indices",
            pointer,
        )


def _feedforward_findings(adapter: IA3, model: BaseModel, modules: Modules) -> Iterator[Finding]:
    targets = set(_linear_modules(modules)) if isinstance(adapter.target_modules, str) else set(adapter.target_modules)
    if not_targets := [name for name in adapter.feedforward_modules if name not in targets]:
        yield Finding(
            f"{', '.join(not_targets)} is not among the target modules {', '.join(sorted(targets))} of {model.name}: "
            "add it to target_modules, or leave it out",
            "/adapter/feedforward_modules",
        )


def _method_findings(spec: JobSpec, model: BaseModel, modules: Modules) -> Iterator[Finding]:
    adapter = spec.adapter
    if isinstance(adapter, Lora) and adapter.init_lora_weights == "olora":
        yield from _olora_findings(adapter, spec, modules)
    if isinstance(adapter, Oft):
        yield from _oft_findings(adapter, spec.quantization.type, model, modules)
    if isinstance(adapter, LlamaAdapter):
        yield from _llama_adapter_findings(adapter, model, modules)


def _llama_adapter_findings(adapter: LlamaAdapter, model: BaseModel, modules: Modules) -> Iterator[Finding]:
    if model.model_type not in LLAMA_ADAPTER_MODELS:
        yield Finding(
            f"llama_adapter is for {', '.join(LLAMA_ADAPTER_MODELS)}, and {model.name} is of type {model.model_type}: "
            "choose another method, such as lora",
            "/adapter/method",
        )
    elif any(outputs != inputs for outputs, inputs in modules.get("q_proj", ())):
        yield Finding(
            f"llama_adapter needs as many query features as hidden features, which {model.name} does not have: "
            "choose another method",
            "/adapter/method",
        )
    if adapter.adapter_layers is not None and adapter.adapter_layers > model.num_layers:
        yield Finding(
            f"{model.name} has {model.num_layers} layers: set adapter_layers to {model.num_layers} or less",
            "/adapter/adapter_layers",
        )


def _oft_findings(adapter: Oft, quantization: str, model: BaseModel, modules: Modules) -> Iterator[Finding]:
    if quantization == "none" and model.model_type in CONV1D_MODELS:
        yield Finding(
            f"OFT does not support the layers of an unquantized {model.model_type}: set quantization.type to nf4",
            "/adapter/method",
        )
    # PEFT would choose another block size for an indivisible layer, with a warning only.
    size = adapter.oft_block_size
    input_axis = 0 if model.model_type in CONV1D_MODELS else 1
    indivisible = {
        name: shape[input_axis]
        for name in _adapted_modules(adapter, modules)
        for shape in sorted(modules[name])
        if shape[input_axis] % size
    }
    if indivisible:
        listed = ", ".join(f"{name} with {inputs}" for name, inputs in sorted(indivisible.items()))
        yield Finding(
            f"{size} does not divide the inputs of {listed}: choose a divisor, or leave these modules out",
            "/adapter/oft_block_size",
        )


def _olora_findings(adapter: Lora, spec: JobSpec, modules: Modules) -> Iterator[Finding]:
    sides = (min(shape) for name in _adapted_modules(adapter, modules) for shape in modules[name])
    largest_rank = min(sides, default=adapter.r)
    if adapter.r > largest_rank:
        yield Finding(
            f"OLoRA's rank is at most the smaller side of each target's weight, here {largest_rank}: set r to "
            f"{largest_rank} or less",
            "/adapter/r",
        )
    if spec.training.weight_decay:
        yield Finding(
            "weight decay would also shrink the constant half of an OLoRA adapter: set it to 0, or init_lora_weights "
            "to default",
            "/training/weight_decay",
        )


def _token_findings(adapter: Adapter, model: BaseModel) -> Iterator[Finding]:
    tokens = adapter.trainable_token_indices if isinstance(adapter, Lora) else None
    if tokens is None:
        return
    if unknown := [str(token) for token in tokens if token >= model.vocab_size]:
        yield Finding(
            f"{model.name} has tokens 0 to {model.vocab_size - 1}, and no {', '.join(unknown[:5])}: choose among them",
            "/adapter/trainable_token_indices",
        )


def _position_findings(spec: JobSpec, model: BaseModel) -> Iterator[Finding]:
    virtual, row = positions_taken(spec.adapter), spec.training.max_seq_len_tokens
    # Without virtual tokens, the row length is checked where it is resolved.
    if virtual and row + virtual > model.max_positions:
        yield Finding(
            f"{virtual} virtual tokens before a row of {row} are more than the {model.max_positions} that {model.name} "
            f"handles: set max_seq_len_tokens to {max(0, model.max_positions - virtual)} or less",
            "/training/max_seq_len_tokens" if virtual < model.max_positions else "/adapter/num_virtual_tokens",
        )


def _linear_modules(modules: Modules) -> list[str]:
    """The modules that "all-linear" selects."""
    return [name for name in modules if name not in EMBEDDINGS | OUTPUT_HEADS]


def _adapted_modules(adapter: TargetedAdapter, modules: Modules) -> list[str]:
    """The target modules that the base has."""
    targets = adapter.target_modules
    return _linear_modules(modules) if isinstance(targets, str) else [name for name in targets if name in modules]
