"""First stage: render the rows to token ids, and split them into training and held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_service.artifacts.store import dataset_key
from qlora_service.data.batching import Split, sample_rows, split_rows, step_rows, total_steps
from qlora_service.data.files.checks import read_examples
from qlora_service.data.rendering.renderer import Renderer, RenderRules
from qlora_service.data.rendering.report import VALIDATION_PREFIX, RenderReport, row_warnings
from qlora_service.data.rendering.stop_tokens import StopTokens
from qlora_service.domain.datasets import Dataset
from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import Finding, JobFailed
from qlora_service.models.catalog.embeddings import embedding_rows
from qlora_service.planning.time.duration import FALLBACK_TRAINING_ROWS
from qlora_service.specs import Training
from qlora_service.training.evaluation.generation import question_ids
from qlora_service.training.network.micro_batch import TrainingExample
from qlora_service.training.rows import RenderedRows, store_rendered
from workers.trainer.context import AttemptContext, AttemptInputs

Rendered = TypeVar("Rendered")


@dataclass(frozen=True)
class PreparedRows:
    """The job's rows: which of them are trained on in which step, and which are held out."""

    rows: RenderedRows
    split: Split
    validation: RenderedRows | None
    """Rows of a validation dataset; `split.held_out` then selects among these"""
    report: RenderReport
    validation_report: RenderReport | None
    training: Training
    chat_template: str
    """The template of conversations, published with the adapter"""
    stop_tokens: StopTokens
    warnings: list[str]
    """Rows that are left out, and rows that are not trained as one would expect"""

    @cached_property
    def held_out(self) -> list[TrainingExample]:
        """The held-out rows; without any, the first training rows."""
        positions = self.split.held_out or self.split.train[:FALLBACK_TRAINING_ROWS]
        rows = self.rows if self.validation is None else self.validation
        return [rows[position] for position in positions]

    @property
    def question_template(self) -> str | None:
        """The chat template of the evaluation's questions; None where they are plain text, as the rows' prompts."""
        return None if self.report.plain_prompts else self.chat_template

    @property
    def total_steps(self) -> int:
        training = self.training
        return total_steps(len(self.split.train), training.batch_size, training.epochs, training.max_steps)

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest row as it is trained; of a pair, of the longer side."""
        return min(self.report.longest_tokens, self.training.max_seq_len_tokens)

    def rows_of_step(self, step: int) -> list[int]:
        """Positions in `rows` of the examples of step `step` (from 0)."""
        train, training = self.split.train, self.training
        size, seed = training.batch_size, training.seed
        return [train[i] for i in step_rows(step, len(train), size, training.epochs, training.max_steps, seed)]

    def examples_of_step(self, step: int) -> list[TrainingExample]:
        """The examples of step `step` (from 0)."""
        return [self.rows[row] for row in self.rows_of_step(step)]


def prepare(context: AttemptContext) -> PreparedRows:
    """The rendered and split rows.

    Raises:
        JobFailed: rows are too long, no row is usable, or there are too few to hold any out.
        QLoRAError: the chat template refuses one of the evaluation's questions.
    """
    context.reporter.enter_phase("rendering", None)
    prepared = prepare_rows(context.inputs, context.check)
    context.reporter.warn(prepared.warnings)
    if questions := context.spec.evaluation.questions:
        tokenizer = load_tokenizer(context.inputs.base.path, prepared.question_template)
        for question in questions:
            question_ids(tokenizer, question)  # raises now, not after the training
    return prepared


def prepare_rows(inputs: AttemptInputs, check: Callable[[], None]) -> PreparedRows:
    """The rendered and split rows; `check()` is called before each row. Raises: JobFailed."""
    training, validation = inputs.job.spec.training, inputs.job.spec.validation
    # The time of the job's creation, not the current time: every attempt renders the same text.
    rules, embeddings = RenderRules.of(training), embedding_rows(inputs.base)
    with Renderer(inputs.base.path, rules, inputs.job.created_at, embeddings=embeddings) as renderer:
        rows, report = _render(inputs, inputs.dataset, renderer, check)
        warnings = row_warnings(inputs.dataset.report, report)
        validation_rows, validation_report = None, None
        if inputs.validation is not None:
            validation_rows, validation_report = _render(inputs, inputs.validation, renderer, check)
            warnings += row_warnings(inputs.validation.report, validation_report, VALIDATION_PREFIX)
        chat_template, stop_tokens = renderer.chat_template, renderer.stop_tokens()
    try:
        split = split_rows(len(rows), validation.held_out_fraction, validation.max_rows, training.seed)
        if validation_rows is not None:
            split = replace(split, held_out=sample_rows(len(validation_rows), validation.max_rows, training.seed))
    except ValueError as error:
        findings = [Finding(**finding) for finding in report.findings]
        raise JobFailed(str(error), reason=FailureReason.INVALID_INPUT, findings=findings) from None
    return PreparedRows(
        rows, split, validation_rows, report, validation_report, training, chat_template, stop_tokens, warnings
    )


def load_tokenizer(model_dir: Path, chat_template: str | None) -> PreTrainedTokenizerBase:
    """The base's tokenizer with the given chat template, or without one."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    tokenizer.chat_template = chat_template
    return tokenizer


def _render(
    inputs: AttemptInputs, dataset: Dataset, renderer: Renderer, check: Callable[[], None]
) -> tuple[RenderedRows, RenderReport]:
    """A dataset's usable rows, and the report on all of them. Raises: JobFailed."""
    training, report = inputs.job.spec.training, dataset.report
    path = inputs.artifacts.local_copy(dataset_key(dataset.sha256), inputs.scratch)
    results = _checked(renderer.render(read_examples(path, report.container, report.shape)), check)
    rows, rendered = store_rendered(results, inputs.scratch / f"{dataset.id}.arrow")
    findings = [Finding(**finding) for finding in rendered.findings]
    if rendered.too_long_rows and training.too_long == "refuse":
        raise JobFailed(
            f"{rendered.too_long_rows} rows are longer than max_seq_len_tokens = {training.max_seq_len_tokens}; "
            f"the longest has {rendered.longest_tokens} tokens",
            reason=FailureReason.INVALID_INPUT,
            findings=findings,
        )
    if rendered.unknown_token_rows:
        raise JobFailed(
            f"{rendered.unknown_token_rows} rows have tokens that the base has no embedding for: {findings[0]}",
            reason=FailureReason.INVALID_INPUT,
            findings=findings,
        )
    return rows, rendered


def _checked(results: Iterable[Rendered], check: Callable[[], None]) -> Iterator[Rendered]:
    for result in results:
        check()
        yield result
