"""Optimization of the adapter, and its evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, StringConstraints, model_validator

from qlora_service.specs.part import SpecPart

Question = Annotated[str, StringConstraints(min_length=1, max_length=10_000)]
DEFAULT_MICRO_BATCH_TOKENS = 2048
"""The value of "auto" on a CPU, and where the device's memory was not measured."""


class Training(SpecPart):
    """The optimization. A step is an optimizer step; its loss is a mean over the step, for any micro-batch size."""

    batch_size: StrictInt = Field(16, ge=1, le=4096, description="Examples per optimizer step (paper: 16).")
    epochs: float = Field(1.0, gt=0.0, le=1000.0, description="Passes over the training rows; ignored with max_steps.")
    max_steps: StrictInt | None = Field(
        None, ge=1, le=10_000_000, description="Number of optimizer steps; overrides epochs."
    )
    learning_rate: float = Field(
        2e-4, gt=0.0, le=1.0, description="Peak learning rate. Paper, table 9: 2e-4; 1e-4 from 33B."
    )
    loraplus_lr_ratio: float | None = Field(
        None,
        ge=1.0,
        le=1024.0,
        description="LoRA+: the learning rate of B divided by that of A (arXiv:2402.12354 suggests 16); only for the "
        "method lora.",
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Learning rate schedule after the warm-up (paper: constant)."
    )
    warmup_ratio: float = Field(
        0.03,
        ge=0.0,
        lt=1.0,
        description="Share of the steps in the warm-up, in which the learning rate rises (paper's scripts: 0.03).",
    )
    warmup_steps: StrictInt | None = Field(
        None, ge=0, le=10_000_000, description="Number of warm-up steps; overrides warmup_ratio."
    )
    weight_decay: float = Field(0.0, ge=0.0, le=10.0, description="Decoupled weight decay of the adapter's matrices.")
    max_grad_norm: float = Field(
        0.3,
        gt=0.0,
        le=1000.0,
        description="Gradient norm above which gradients are scaled down (paper, appendix B: 0.3).",
    )
    optim: Literal[
        "paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit", "adamw_torch", "paged_lion_32bit", "paged_lion_8bit"
    ] = Field(
        "paged_adamw_32bit",
        description="Optimizer: AdamW or Lion of bitsandbytes with state in 32 or 8 bits (paged: moved to host memory "
        "when GPU memory runs short; paper: paged AdamW, 32 bits), or torch's AdamW. Lion needs learning rates 3 to 10 "
        "times lower (arXiv:2302.06675).",
    )
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0, description="Decay rate of the first moment.")
    adam_beta2: float = Field(
        0.999,
        ge=0.0,
        lt=1.0,
        description="Decay rate of AdamW's second moment (paper, appendix B: 0.999), or of Lion's momentum (0.99 in "
        "arXiv:2302.06675).",
    )
    max_seq_len_tokens: StrictInt = Field(
        1024,
        ge=8,
        le=1_048_576,
        description="Maximum length of a row, in tokens. The default is lowered to the base model's limit if needed, "
        "and by the adapter's virtual tokens.",
    )
    too_long: Literal["refuse", "truncate", "drop"] = Field(
        "refuse",
        description="Treatment of rows over max_seq_len_tokens. refuse: refuse the job and list their lines; truncate: "
        "cut off the end of the row; drop: leave the row out.",
    )
    train_on: Literal["assistant", "all"] = Field(
        "assistant",
        description="Trained tokens. assistant: the answers only; all: every token. Preference objectives support "
        "assistant only.",
    )
    prompt_format: Literal["auto", "chat", "plain"] = Field(
        "auto",
        description="Rendering of text prompts with text answers. chat: a user turn and the assistant's turn, by the "
        "chat template; plain: the answer right after the prompt; auto: chat if the base model has a chat template, "
        "else plain. The spec of a queued job says which.",
    )
    micro_batch_tokens: Annotated[StrictInt, Field(ge=1, le=1_048_576)] | Literal["auto"] = Field(
        "auto",
        description="Tokens computed at a time; a longer row is computed by itself. Changes speed and memory, never "
        "the mathematics of a step. auto: as many as fit on the GPU, up to 8192; on a CPU 2048.",
    )
    gradient_checkpointing: StrictBool | Literal["auto"] = Field(
        "auto",
        description="Recompute activations instead of storing them: less memory, about a third more computation. auto: "
        "only when the job would not fit otherwise, or when the activations of a micro-batch take more than half of "
        "the free memory.",
    )
    neftune_noise_alpha: float | None = Field(
        None,
        gt=0.0,
        le=100.0,
        description="NEFTune: scale of the noise on the embeddings while training (arXiv:2310.05914 uses 5).",
    )
    early_stopping_patience: StrictInt | None = Field(
        None,
        ge=1,
        le=1000,
        description="Number of evaluations in a row without a lower held-out loss after which training stops.",
    )
    load_best_model_at_end: StrictBool = Field(
        False,
        description="Publish the adapter of the evaluation with the lowest held-out loss instead of the last one.",
    )
    seed: StrictInt = Field(
        0,
        ge=0,
        le=2**31 - 1,
        description="Seed of the held-out split, the row order, the adapter's initial weights and dropout.",
    )

    @property
    def resolved_micro_batch_tokens(self) -> int:
        """`micro_batch_tokens`, with "auto" as on a CPU."""
        return DEFAULT_MICRO_BATCH_TOKENS if self.micro_batch_tokens == "auto" else self.micro_batch_tokens

    @model_validator(mode="after")
    def _require_end_of_warmup(self) -> Training:
        if self.warmup_steps is not None and self.max_steps is not None and self.warmup_steps >= self.max_steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} leaves none of max_steps = {self.max_steps} at the full rate: "
                "lower warmup_steps, or give warmup_ratio instead"
            )
        return self


class Evaluation(SpecPart):
    """Evaluation on held-out rows, and generated answers.

    Held-out loss and accuracy (for supervised, perplexity too) are always measured before the first step and after
    the last.
    """

    every_steps: StrictInt | None = Field(
        None, ge=1, description="Steps between further evaluations; default: about ten evaluations per job."
    )
    generate_rows: StrictInt = Field(
        0,
        ge=0,
        le=256,
        description="Number of held-out rows that base and adapter answer at the end, scored by exact match, BLEU and "
        "ROUGE in generation.json.",
    )
    questions: list[Question] = Field(
        [],
        max_length=16,
        description="Questions that base and adapter answer at the end, side by side in generation.json.",
    )
    max_new_tokens: StrictInt = Field(256, ge=1, le=4096, description="Maximum length of an answer, in tokens.")
