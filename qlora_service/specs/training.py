"""How the adapter is optimized, and when it is measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, StringConstraints, model_validator

from qlora_service.specs.part import SpecPart

Question = Annotated[str, StringConstraints(min_length=1, max_length=10_000)]
PLAIN_MICRO_BATCH_TOKENS = 2048
"""What "auto" comes to on a CPU, and where nobody has looked at the device's memory"""


class Training(SpecPart):
    """The optimization. A step is an optimizer step; its loss is a mean over the whole step, however it is cut."""

    batch_size: StrictInt = Field(16, ge=1, le=4096, description="Examples per optimizer step (paper: 16).")
    epochs: float = Field(1.0, gt=0.0, le=1000.0, description="Passes over the training rows; ignored with max_steps.")
    max_steps: StrictInt | None = Field(None, ge=1, le=10_000_000, description="Optimizer steps; overrides epochs.")
    learning_rate: float = Field(2e-4, gt=0.0, le=1.0, description="Paper, table 9: 2e-4; 1e-4 from 33B.")
    loraplus_lr_ratio: float | None = Field(
        None,
        ge=1.0,
        le=1024.0,
        description="LoRA+: the learning rate of B over that of A (arXiv:2402.12354 suggests 16); for the method lora.",
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field("constant", description="Paper: constant.")
    warmup_ratio: float = Field(
        0.03, ge=0.0, lt=1.0, description="Share of the steps with a rising rate (0.03 in the paper's scripts)."
    )
    warmup_steps: StrictInt | None = Field(
        None, ge=0, le=10_000_000, description="Steps with a rising rate; overrides warmup_ratio."
    )
    weight_decay: float = Field(0.0, ge=0.0, le=10.0, description="Decoupled weight decay of the adapter's matrices.")
    max_grad_norm: float = Field(0.3, gt=0.0, le=1000.0, description="Paper, appendix B: 0.3.")
    optim: Literal[
        "paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "adamw_torch", "paged_lion_32bit", "paged_lion_8bit"
    ] = Field(
        "paged_adamw_32bit",
        description="bitsandbytes' AdamW or Lion with state in 32 or 8 bits, paged to host memory where CUDA's runs "
        "short (paper: paged AdamW, 32 bits); or torch's AdamW. Lion: 3 to 10 times lower rates (arXiv:2302.06675).",
    )
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0, description="Decay of the first moment.")
    adam_beta2: float = Field(
        0.999,
        ge=0.0,
        lt=1.0,
        description="Decay of AdamW's second moment (paper, appendix B: 0.999), or of Lion's momentum (0.99 there).",
    )
    max_seq_len_tokens: StrictInt = Field(
        1024,
        ge=8,
        le=1_048_576,
        description="Longest row, in tokens. Not given, it is also at most what the base model handles.",
    )
    too_long: Literal["refuse", "truncate", "drop"] = Field(
        "refuse",
        description="What happens to rows over max_seq_len_tokens: refuse the job with their lines, cut the "
        "row's end off, or leave the row out.",
    )
    train_on: Literal["assistant", "all"] = Field(
        "assistant",
        description="Tokens that are learned: the answers only, or every token; preferences have the answers only.",
    )
    micro_batch_tokens: Annotated[StrictInt, Field(ge=1, le=1_048_576)] | Literal["auto"] = Field(
        "auto",
        description="Tokens computed at a time; a longer row is computed by itself. Changes speed and memory, never "
        "the maths of a step. auto: as many as fit on the GPU, up to 8192; on a CPU 2048.",
    )
    gradient_checkpointing: StrictBool | Literal["auto"] = Field(
        "auto",
        description="Recompute activations instead of storing them: less memory, about a third more work. auto: only "
        "when it would not fit otherwise, or a micro-batch's activations take more than half of the free memory.",
    )
    neftune_noise_alpha: float | None = Field(
        None,
        gt=0.0,
        le=100.0,
        description="NEFTune: noise on the embeddings while training (arXiv:2310.05914; 5 there).",
    )
    early_stopping_patience: StrictInt | None = Field(
        None, ge=1, le=1000, description="Stop after so many evaluations in a row without a lower held-out loss."
    )
    load_best_model_at_end: StrictBool = Field(
        False, description="Publish the adapter of the evaluation with the lowest held-out loss, not the last one."
    )
    seed: StrictInt = Field(0, ge=0, le=2**31 - 1, description="Decides split, order, the adapter's start and dropout.")

    @property
    def resolved_micro_batch_tokens(self) -> int:
        """`micro_batch_tokens`; of "auto", what it comes to on a CPU."""
        return PLAIN_MICRO_BATCH_TOKENS if self.micro_batch_tokens == "auto" else self.micro_batch_tokens

    @model_validator(mode="after")
    def _warmup_ends(self) -> Training:
        if self.warmup_steps is not None and self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} leaves none of max_steps = {self.max_steps} at the full rate: "
                "lower warmup_steps, or give warmup_ratio instead"
            )
        return self


class Evaluation(SpecPart):
    """Held-out loss and accuracy (if supervised, perplexity too) are always measured before the first step and last."""

    every_steps: StrictInt | None = Field(
        None, ge=1, description="Also every so many steps; default: about ten times a job."
    )
    generate_rows: StrictInt = Field(
        0,
        ge=0,
        le=256,
        description="Held-out rows that base and adapter answer at the end, compared by exact match, BLEU and ROUGE in "
        "generation.json.",
    )
    questions: list[Question] = Field(
        [],
        max_length=16,
        description="Questions that base and adapter answer at the end, side by side in generation.json.",
    )
    max_new_tokens: StrictInt = Field(256, ge=1, le=4096, description="Longest answer.")
