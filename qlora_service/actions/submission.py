"""Checks of a job before anything of it is stored, and the warnings for its submitter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qlora_service.data.rendering.report import VALIDATION_PREFIX, RenderReport, row_warnings
from qlora_service.data.rows.examples import Shape
from qlora_service.data.rows.shapes import objective_mismatch
from qlora_service.domain.datasets import DatasetReport
from qlora_service.errors import Finding, InvalidDataset, InvalidSpec
from qlora_service.models.catalog.catalog import BaseModel
from qlora_service.models.compatibility import Modules, incompatibilities, positions_taken
from qlora_service.planning.attachment import Attachment
from qlora_service.planning.plan import Plan
from qlora_service.specs import JobSpec, Training


@dataclass(frozen=True)
class CheckedRows:
    """The reports on a dataset's rows, as read and as rendered for a job."""

    read: DatasetReport
    rendered: RenderReport


def default_length(model: BaseModel) -> int:
    """max_seq_len_tokens of a job that does not set it."""
    return min(Training().max_seq_len_tokens, model.max_positions)


def fit_defaults(spec: JobSpec, model: BaseModel) -> JobSpec:
    """The spec with the defaults that depend on the model.

    A max_seq_len_tokens that it does not set is lowered to the positions that model and adapter leave; the prompt
    format auto is the one that it stands for.
    """
    training = spec.training
    defaults: dict[str, Any] = {}
    if "max_seq_len_tokens" not in training.model_fields_set:
        defaults["max_seq_len_tokens"] = default_length(model) - positions_taken(spec.adapter)
    if training.prompt_format == "auto":
        defaults["prompt_format"] = "chat" if model.chat_template else "plain"
    return spec.model_copy(update={"training": training.model_copy(update=defaults)})


def check_fit(spec: JobSpec, model: BaseModel, modules: Modules) -> None:
    """Raises: InvalidSpec, with a finding for everything in the spec that cannot work on the base model."""
    limit = spec.training.max_seq_len_tokens
    if limit > model.max_positions:
        raise InvalidSpec(
            f"max_seq_len_tokens is {limit}, but {model.name} handles {model.max_positions} tokens at most: "
            f"set it to {model.max_positions} or less",
            location="/training/max_seq_len_tokens",
        )
    if findings := incompatibilities(spec, model, modules):
        first = findings[0]
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise InvalidSpec(f"{first.pointer}: {first.reason}{more}", location=first.pointer, findings=findings)


def check_objective(spec: JobSpec, shape: Shape, place: str = "/objective/type") -> None:
    """Raises: InvalidSpec at `place`, when the objective cannot be trained on rows of the shape."""
    mismatch = objective_mismatch(spec.objective.type, shape)
    if mismatch is not None:
        raise InvalidSpec(mismatch, location=place)


def check_trainable(report: RenderReport, spec: JobSpec, model: BaseModel) -> None:
    """Raises: InvalidDataset, when the rendered rows cannot be trained on."""
    check_rows(report, spec, model, "/dataset")
    if spec.validation.held_out_fraction > 0 and report.usable_rows < 2 and report.complete:
        raise InvalidDataset(
            "the dataset has one usable row, too few to hold any out: add rows or set validation.fraction to 0",
            location="/dataset",
        )


def check_rows(report: RenderReport, spec: JobSpec, model: BaseModel, place: str) -> None:
    """Raises: InvalidDataset, when rows of the dataset that the spec names at `place` cannot be used."""
    limit = spec.training.max_seq_len_tokens
    findings = [Finding(**value) for value in report.findings]
    all_too_long = report.too_long_rows == report.rows
    if report.too_long_rows and (all_too_long or spec.training.too_long == "refuse"):
        share = "all" if all_too_long else f"{report.too_long_rows} of {report.rows}"
        longest = report.longest_tokens
        keep = f"raise it to {longest} to keep them whole, or " if longest <= model.max_positions else ""
        raise InvalidDataset(
            f"{share} rows of the dataset are longer than max_seq_len_tokens = {limit}, the longest has {longest} "
            f"tokens: {keep}set training.too_long to {'truncate' if all_too_long else 'truncate or drop'}",
            location=place,
            findings=findings,
        )
    if report.unknown_token_rows:
        # Training on the other rows only would not be what was asked for.
        raise InvalidDataset(
            f"{report.unknown_token_rows} of {report.rows} rows of the dataset have tokens that {model.name} has no "
            f"embedding for: {findings[0]}",
            location=place,
            findings=findings,
        )
    if report.usable_rows == 0:
        raise InvalidDataset(
            f"no row of the dataset can be trained on: {findings[0] if findings else 'it is empty'}",
            location=place,
            findings=findings,
        )


def submission_warnings(
    rows: CheckedRows,
    validation: CheckedRows | None = None,
    forecast: Plan | None = None,
    attachment: Attachment | None = None,
) -> list[str]:
    """Warnings about a job that is queued all the same; `rows` are its training rows."""
    warnings = _row_warnings(rows)
    if validation is not None:
        warnings += _row_warnings(validation, VALIDATION_PREFIX)
    if forecast is not None and forecast.verdict != "fits":
        warnings.append(f"it is not expected to fit: {forecast.reason}")
    if attachment is not None and attachment.warning is not None:
        warnings.append(attachment.warning)
    return warnings


def _row_warnings(rows: CheckedRows, prefix: str = "") -> list[str]:
    warnings = row_warnings(rows.read, rows.rendered, prefix)
    if not rows.rendered.complete:
        checked = f"only the first {rows.rendered.rows} rows were rendered; the trainer checks the rest"
        warnings.append(prefix + checked)
    return warnings
