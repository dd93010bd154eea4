"""The adapter methods: one class each, with only the fields of that method.

Field names are PEFT's, so that they are the same in the published adapter_config.json.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StrictBool, StrictInt, StringConstraints, Tag, model_validator

from qlora_service.specs.part import SpecPart

ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=100)]
Rank = Annotated[StrictInt, Field(ge=1, le=512)]
LLAMA_ADAPTER_SKIPPED_LAYERS = 2
"""Layers at the bottom that LLaMA-Adapter leaves alone by default: the paper adapts the upper 30 of 32."""


class TargetedAdapter(SpecPart):
    """An adapter method that changes chosen layers."""

    target_modules: Literal["all-linear"] | list[ModuleName] = Field(
        "all-linear",
        description="Layers that get an adapter. all-linear: every linear layer except the output head (QLoRA, section "
        "4: needed to match full fine-tuning). Or a list of module names such as q_proj; embed_tokens and lm_head can "
        "be named if the method supports embeddings.",
    )

    @model_validator(mode="after")
    def _require_a_target(self) -> TargetedAdapter:
        if isinstance(self.target_modules, list) and not self.target_modules:
            raise ValueError('target_modules is empty: name at least one module or use "all-linear"')
        return self


class Lora(TargetedAdapter):
    """LoRA, h = W x + (lora_alpha / r) B A x (arXiv:2106.09685), and its variants."""

    method: Literal["lora"] = Field("lora", description="The adapter method: how the adapter changes the base.")
    r: Rank = Field(16, description="Rank. 16 with lora_alpha 32 is common practice; paper: 64 with lora_alpha 16.")
    lora_alpha: float = Field(
        32.0, gt=0.0, le=4096.0, description="Numerator of the scale: the update is multiplied by lora_alpha / r."
    )
    lora_dropout: float = Field(
        0.0, ge=0.0, lt=1.0, description="Dropout rate before A. Paper: 0.1 up to 13B, 0.05 above; 0 is fastest."
    )
    use_rslora: StrictBool = Field(
        False,
        description="Scale by lora_alpha / √r, so that large ranks are trained effectively too (arXiv:2312.03732).",
    )
    use_dora: StrictBool = Field(
        False,
        description="DoRA: train each weight's magnitude in addition to its direction (arXiv:2402.09353); slower.",
    )
    init_lora_weights: Literal["default", "gaussian", "olora"] = Field(
        "default",
        description="Initial value of A: Kaiming uniform (default) or Gaussian, with B zero. olora: A and B from the "
        "QR decomposition of the weight (arXiv:2406.01775), with their initial product subtracted from the weight.",
    )
    trainable_token_indices: list[Annotated[StrictInt, Field(ge=0)]] | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="Ids of tokens whose embedding is trained too, such as reserved tokens that the dataset uses; only "
        "these rows of the embedding are stored.",
    )

    @model_validator(mode="after")
    def _refuse_duplicate_tokens(self) -> Lora:
        tokens = self.trainable_token_indices or []
        if len(set(tokens)) < len(tokens):
            duplicate = next(token for token in tokens if tokens.count(token) > 1)
            raise ValueError(f"trainable_token_indices names token {duplicate} twice: name it once")
        return self


class AdaLora(TargetedAdapter):
    """AdaLoRA: a rank for each layer, determined while training (arXiv:2303.10512)."""

    method: Literal["adalora"]
    target_r: Rank = Field(8, description="Mean rank of all layers at the end.")
    init_r: Rank = Field(12, description="Rank of every layer at the start; must be above target_r.")
    lora_alpha: float = Field(32.0, gt=0.0, le=4096.0, description="Numerator of the scale.")
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout rate before A.")
    orth_reg_weight: float = Field(0.5, gt=0.0, le=100.0, description="Weight of the orthogonality loss (paper: 0.5).")

    @model_validator(mode="after")
    def _require_falling_rank(self) -> AdaLora:
        if self.init_r <= self.target_r:
            raise ValueError(
                f"init_r = {self.init_r} must be above target_r = {self.target_r}: the rank falls during training"
            )
        return self


class IA3(TargetedAdapter):
    """(IA)³: trained factors on activations (arXiv:2205.05638); the smallest adapter."""

    method: Literal["ia3"]
    feedforward_modules: list[ModuleName] = Field(
        [], description="Target modules whose input is scaled instead of their output, such as down_proj."
    )

    @model_validator(mode="after")
    def _require_feedforward_modules_among_targets(self) -> IA3:
        not_targets = set(self.feedforward_modules) - set(self.target_modules)
        if isinstance(self.target_modules, list) and not_targets:
            raise ValueError(
                f"feedforward_modules names {min(not_targets)}, which target_modules does not: add it there"
            )
        return self


class Vera(TargetedAdapter):
    """VeRA: trained vectors between and after shared random matrices (arXiv:2310.11454)."""

    method: Literal["vera"]
    r: StrictInt = Field(256, ge=1, le=4096, description="Rank of the shared random matrices (paper: 256).")
    vera_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout rate before the random matrices.")
    d_initial: float = Field(
        0.1, gt=0.0, le=10.0, description="Initial value of the vector between the matrices (paper: 0.1)."
    )
    projection_prng_key: StrictInt = Field(0, ge=0, le=2**31 - 1, description="Seed of the shared random matrices.")


class Oft(TargetedAdapter):
    """OFT: a trained block-diagonal rotation of each layer's input (arXiv:2306.07280)."""

    method: Literal["oft"]
    oft_block_size: StrictInt = Field(32, ge=2, le=1024, description="Side of a block; must divide every input size.")
    module_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Probability that a block is set to the identity.")


class PromptTuning(SpecPart):
    """Prompt tuning: trained embeddings before each document (arXiv:2104.08691)."""

    method: Literal["prompt_tuning"]
    num_virtual_tokens: StrictInt = Field(20, ge=1, le=1000, description="Virtual tokens before each document.")


class PrefixTuning(SpecPart):
    """Prefix tuning: trained keys and values before each document, in every layer (arXiv:2101.00190)."""

    method: Literal["prefix_tuning"]
    num_virtual_tokens: StrictInt = Field(20, ge=1, le=1000, description="Virtual positions before each document.")


class PTuning(SpecPart):
    """P-tuning: virtual tokens before each document, computed by a small trained network (arXiv:2103.10385)."""

    method: Literal["p_tuning"]
    num_virtual_tokens: StrictInt = Field(20, ge=1, le=1000, description="Virtual tokens before each document.")
    encoder_hidden_size: StrictInt = Field(
        128, ge=1, le=8192, description="Hidden size of the network that computes the virtual tokens."
    )


class LlamaAdapter(SpecPart):
    """LLaMA-Adapter: trained prompts with a zero-initialized gate in the upper layers (arXiv:2303.16199)."""

    method: Literal["llama_adapter"]
    adapter_len: StrictInt = Field(10, ge=1, le=1000, description="Virtual tokens of each adapted layer (paper: 10).")
    adapter_layers: StrictInt | None = Field(
        None, ge=1, le=1000, description="Number of adapted layers, from the top; default: all except the lowest two."
    )


def _method_of(value: Any) -> str:
    """The tag of the union: the method, lora if absent."""
    method = value.get("method", "lora") if isinstance(value, dict) else getattr(value, "method", "lora")
    return method if isinstance(method, str) else repr(method)


Adapter = Annotated[
    Annotated[Lora, Tag("lora")]
    | Annotated[AdaLora, Tag("adalora")]
    | Annotated[IA3, Tag("ia3")]
    | Annotated[Vera, Tag("vera")]
    | Annotated[Oft, Tag("oft")]
    | Annotated[PromptTuning, Tag("prompt_tuning")]
    | Annotated[PrefixTuning, Tag("prefix_tuning")]
    | Annotated[PTuning, Tag("p_tuning")]
    | Annotated[LlamaAdapter, Tag("llama_adapter")],
    Discriminator(_method_of),
]
PromptMethod = PromptTuning | PrefixTuning | PTuning
