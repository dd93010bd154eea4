"""Checks of a job before anything of it is stored, and the warnings for its submitter."""

from __future__ import annotations

from typing import Any

from qlora_service.data.rendering.renderer import RenderReport
from qlora_service.data.rows.examples import Shape
from qlora_service.data.rows.shapes import objective_mismatch
from qlora_service.domain.datasets import Dataset
from qlora_service.errors import Finding, InvalidDataset, InvalidSpec
from qlora_service.models.catalog.catalog import BaseModel
from qlora_service.models.compatibility import Modules, incompatibilities, positions_taken
from qlora_service.planning.plan import Plan
from qlora_service.specs import JobSpec, Training

WARNED_FINDINGS = 5
"""Findings that a warning lists"""


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
    if report.usable_rows == 0:
        raise InvalidDataset(
            f"no row of the dataset can be trained on: {findings[0] if findings else 'it is empty'}",
            location=place,
            findings=findings,
        )


def submission_warnings(
    report: RenderReport, dataset: Dataset, spec: JobSpec, forecast: Plan | None = None
) -> tuple[str, ...]:
    """Warnings about a job that is queued all the same; `dataset` is the stored one."""
    warnings = []
    bad = dataset.report.finding_count
    if bad:
        listed = "; ".join(str(finding) for finding in dataset.report.findings[:WARNED_FINDINGS])
        warnings.append(f"{bad} rows of the upload are left out: {listed}. All of them: GET /datasets/{dataset.id}")
    if report.finding_count:
        first = Finding(**report.findings[0])
        warnings.append(f"{report.finding_count} rows are left out; the first: {first}")
    if report.cut_rows:
        warnings.append(f"{report.cut_rows} rows are truncated to {spec.training.max_seq_len_tokens} tokens")
    if not report.complete:
        warnings.append(f"only the first {report.rows} rows were checked; the trainer checks the rest")
    if forecast is not None and forecast.verdict != "fits":
        warnings.append(f"it is not expected to fit: {forecast.reason}")
    return tuple(warnings)
