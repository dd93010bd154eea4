"""The adapter methods: one class each, with the fields that the method has and no others.

Names are PEFT's, so that what is asked for here is what stands in the published adapter_config.json.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StrictBool, StrictInt, StringConstraints, Tag, model_validator

from qlora_service.specs.part import SpecPart

ModuleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=100)]
Rank = Annotated[StrictInt, Field(ge=1, le=512)]
LLAMA_ADAPTER_BOTTOM = 2
"""Layers at the bottom that LLaMA-Adapter leaves alone by default: the paper adapts the upper 30 of 32."""


class TargetedAdapter(SpecPart):
    """A method that changes chosen layers."""

    target_modules: Literal["all-linear"] | list[ModuleName] = Field(
        "all-linear",
        description="Layers that get an adapter: every linear layer but the output head (QLoRA, section 4: needed to "
        "match full fine-tuning), or module names such as q_proj; embed_tokens and lm_head can be named where the "
        "method has embeddings.",
    )

    @model_validator(mode="after")
    def _some_target(self) -> TargetedAdapter:
        if isinstance(self.target_modules, list) and not self.target_modules:
            raise ValueError('target_modules is empty: name at least one module or use "all-linear"')
        return self


class Lora(TargetedAdapter):
    """LoRA, h = W x + (lora_alpha / r) B A x (arXiv:2106.09685), and its variants."""

    method: Literal["lora"] = Field("lora", description="How the adapter changes the base.")
    r: Rank = Field(16, description="Rank. 16 with alpha 32 is common practice; the paper used 64 with alpha 16.")
    lora_alpha: float = Field(
        32.0, gt=0.0, le=4096.0, description="Scale numerator; the update is scaled by lora_alpha / r."
    )
    lora_dropout: float = Field(
        0.0, ge=0.0, lt=1.0, description="Dropout before A. Paper: 0.1 up to 13B, 0.05 above; 0 is fastest."
    )
    use_rslora: StrictBool = Field(
        False, description="Scale by lora_alpha / √r, so that large ranks learn too (arXiv:2312.03732)."
    )
    use_dora: StrictBool = Field(
        False, description="DoRA: learn each weight's magnitude besides its direction (arXiv:2402.09353); slower."
    )
    init_lora_weights: Literal["default", "gaussian", "olora"] = Field(
        "default",
        description="Start of A: Kaiming uniform (default) or Gaussian, with B at zero; olora: both from the QR "
        "decomposition of the weight (arXiv:2406.01775), which changes the base while it trains.",
    )
    trainable_token_indices: list[Annotated[StrictInt, Field(ge=0)]] | None = Field(
        None,
        min_length=1,
        max_length=4096,
        description="Ids of tokens whose embedding is trained too, such as reserved tokens that the rows give a "
        "meaning; only these rows of the embedding are stored.",
    )

    @model_validator(mode="after")
    def _each_token_once(self) -> Lora:
        tokens = self.trainable_token_indices or []
        if len(set(tokens)) < len(tokens):
            twice = next(token for token in tokens if tokens.count(token) > 1)
            raise ValueError(f"trainable_token_indices names token {twice} twice: name it once")
        return self


class AdaLora(TargetedAdapter):
    """AdaLoRA: a rank per layer, found while training (arXiv:2303.10512)."""

    method: Literal["adalora"]
    target_r: Rank = Field(8, description="Mean rank at the end.")
    init_r: Rank = Field(12, description="Rank of every layer at the start; above target_r.")
    lora_alpha: float = Field(32.0, gt=0.0, le=4096.0, description="Scale numerator.")
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout before A.")
    orth_reg_weight: float = Field(0.5, gt=0.0, le=100.0, description="Weight of the orthogonality loss (paper: 0.5).")

    @model_validator(mode="after")
    def _falling_rank(self) -> AdaLora:
        if self.init_r <= self.target_r:
            raise ValueError(f"init_r = {self.init_r} must be above target_r = {self.target_r}: the rank falls")
        return self


class IA3(TargetedAdapter):
    """(IA)³: learned factors on activations (arXiv:2205.05638); the smallest adapter."""

    method: Literal["ia3"]
    feedforward_modules: list[ModuleName] = Field(
        [], description="Those target modules whose input is scaled instead of their output, such as down_proj."
    )

    @model_validator(mode="after")
    def _feedforward_modules_are_targets(self) -> IA3:
        others = set(self.feedforward_modules) - set(self.target_modules)
        if isinstance(self.target_modules, list) and others:
            raise ValueError(f"feedforward_modules names {min(others)}, which target_modules does not: add it there")
        return self


class Vera(TargetedAdapter):
    """VeRA: learned vectors around shared random matrices (arXiv:2310.11454)."""

    method: Literal["vera"]
    r: StrictInt = Field(256, ge=1, le=4096, description="Rank of the shared random matrices (paper: 256).")
    vera_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Dropout before the random matrices.")
    d_initial: float = Field(0.1, gt=0.0, le=10.0, description="Start of the vector between them (paper: 0.1).")
    projection_prng_key: StrictInt = Field(0, ge=0, le=2**31 - 1, description="Seed of the shared random matrices.")


class Oft(TargetedAdapter):
    """OFT: a learned block-diagonal rotation of each layer's input (arXiv:2306.07280)."""

    method: Literal["oft"]
    oft_block_size: StrictInt = Field(32, ge=2, le=1024, description="Side of a block; must divide each input's size.")
    module_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="Chance that a block is left at the identity.")


class PromptTuning(SpecPart):
    """Prompt tuning: learned embeddings before each document (arXiv:2104.08691)."""

    method: Literal["prompt_tuning"]
    num_virtual_tokens: StrictInt = Field(20, ge=1, le=1000, description="Learned tokens before each document.")


class PrefixTuning(SpecPart):
    """Prefix tuning: learned keys and values before each document, in every layer (arXiv:2101.00190)."""

    method: Literal["prefix_tuning"]
    num_virtual_tokens: StrictInt = Field(20, ge=1, le=1000, description="Learned positions before each document.")


class PTuning(SpecPart):
    """P-tuning: learned tokens before each document, made by a small network (arXiv:2103.10385)."""

    method: Literal["p_tuning"]
    num_virtual_tokens: StrictInt = Field(20, ge=1, le=1000, description="Learned tokens before each document.")
    encoder_hidden_size: StrictInt = Field(128, ge=1, le=8192, description="Width of the network that makes them.")


class LlamaAdapter(SpecPart):
    """LLaMA-Adapter: learned prompts with a zero-initialized gate in the upper layers (arXiv:2303.16199)."""

    method: Literal["llama_adapter"]
    adapter_len: StrictInt = Field(10, ge=1, le=1000, description="Learned tokens of each layer (paper: 10).")
    adapter_layers: StrictInt | None = Field(
        None, ge=1, le=1000, description="Layers that get them, from the top; default: all but the first two."
    )


def _method_of(value: Any) -> str:
    """What tells the methods apart; absent, it is LoRA."""
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
