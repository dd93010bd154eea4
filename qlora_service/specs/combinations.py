"""Contradictions between parts of a spec: settings that another setting would make ineffective or impossible."""

from __future__ import annotations

from collections.abc import Iterator

from qlora_service.specs.adapter import Adapter, Lora, PrefixTuning, PromptMethod
from qlora_service.specs.objective import Kto, Objective, Supervised
from qlora_service.specs.training import Evaluation, Training

Contradiction = tuple[tuple[str, str], str]
"""The group and field to change, and the reason."""


def contradictions(
    *,
    quantization: str,
    adapter: Adapter,
    objective: Objective,
    training: Training,
    evaluation: Evaluation,
    holds_out: bool,
) -> Iterator[Contradiction]:
    """All contradictions. Defaults never contradict, so a stored spec, which contains all defaults, stays valid."""
    yield from _adapter_contradictions(adapter, training, quantization)
    if not isinstance(objective, Supervised):
        yield from _preference_contradictions(objective, training, evaluation)
    if not holds_out:
        yield from _held_out_contradictions(training, evaluation)


def _adapter_contradictions(adapter: Adapter, training: Training, quantization: str) -> Iterator[Contradiction]:
    if training.loraplus_lr_ratio is not None and not isinstance(adapter, Lora):
        yield (
            ("training", "loraplus_lr_ratio"),
            f"{adapter.method} has no B matrix: leave loraplus_lr_ratio out, or use the method lora",
        )
    if training.neftune_noise_alpha is not None and isinstance(adapter, PromptMethod):
        yield (
            ("training", "neftune_noise_alpha"),
            f"NEFTune's noise does not reach the input that {adapter.method} builds: leave neftune_noise_alpha out",
        )
    if training.gradient_checkpointing is True and isinstance(adapter, PrefixTuning):
        yield (
            ("training", "gradient_checkpointing"),
            "prefix_tuning passes its keys and values in a cache, which recomputation would drop: use false or auto",
        )
    if isinstance(adapter, Lora) and adapter.use_dora and quantization == "int8":
        yield ("adapter", "use_dora"), "DoRA does not run on an int8 base: use nf4, fp4 or none"


def _preference_contradictions(
    objective: Objective, training: Training, evaluation: Evaluation
) -> Iterator[Contradiction]:
    if training.train_on == "all":
        yield (
            ("training", "train_on"),
            f'{objective.type} compares answers, not questions: leave train_on at "assistant"',
        )
    if isinstance(objective, Kto) and training.batch_size == 1:
        yield ("training", "batch_size"), "kto computes its baseline from the other rows of the step: use 2 or more"
    if evaluation.generate_rows:
        yield (
            ("evaluation", "generate_rows"),
            f"{objective.type} rows have no single right answer to score against: set evaluation.questions instead",
        )


def _held_out_contradictions(training: Training, evaluation: Evaluation) -> Iterator[Contradiction]:
    reason = "no rows are held out: set validation.fraction above 0, or validation.dataset_id"
    if training.early_stopping_patience is not None:
        yield ("training", "early_stopping_patience"), reason
    if training.load_best_model_at_end:
        yield ("training", "load_best_model_at_end"), reason
    if evaluation.generate_rows:
        yield ("evaluation", "generate_rows"), reason
