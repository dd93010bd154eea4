"""The command `submit`: a job from a file of rows, flags and a configuration file."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from qlora_service.cli.jobs import watch_to_end
from qlora_service.cli.options import AsJson, InvalidFile, Url, WrongUsage, connect, print_json, print_note
from qlora_service.errors import InvalidSpec

if TYPE_CHECKING:
    from qlora_service.client import Client
    from qlora_service.client.wire import Job
    from qlora_service.specs import JobSpec

Document = dict[str, Any]
TRAINING = "Training"


def submit(  # noqa: PLR0913 - an argument per option of the command
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="Rows to train on: JSONL, JSON, CSV, Parquet or text."),
    ] = None,
    dataset_id: Annotated[str | None, typer.Option(help="Id of a stored dataset, instead of FILE.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Base model, as in `qlora models list`.")] = None,
    config: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Job spec in YAML or JSON; flags override it.")
    ] = None,
    set_fields: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the spec, e.g. training.optim=adamw_torch."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the job.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps.", rich_help_panel=TRAINING)] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the rows.", rich_help_panel=TRAINING)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Such as 2e-4.", rich_help_panel=TRAINING)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step.", rich_help_panel=TRAINING)] = None,
    max_seq_len_tokens: Annotated[
        int | None, typer.Option(help="Longest allowed row, in tokens.", rich_help_panel=TRAINING)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of split, order, initialization and dropout.", rich_help_panel=TRAINING)
    ] = None,
    r: Annotated[int | None, typer.Option("--r", help="Rank of the adapter.", rich_help_panel=TRAINING)] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="The update is scaled by lora_alpha / r.", rich_help_panel=TRAINING)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Queue the job even if it is not predicted to fit.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job until it ends.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Queue a training job.

    A job that cannot succeed is refused at once, with the lines of your file. Prints the job's id.
    """
    flags = {
        "dataset.id": dataset_id,
        "base_model": base_model,
        "name": name,
        "training.max_steps": max_steps,
        "training.epochs": epochs,
        "training.learning_rate": learning_rate,
        "training.batch_size": batch_size,
        "training.max_seq_len_tokens": max_seq_len_tokens,
        "training.seed": seed,
        "adapter.r": r,
        "adapter.lora_alpha": lora_alpha,
    }
    document, spec = read_spec(config, _without_none(flags) | parse_assignments(set_fields or []))
    _check_one_dataset(file, document)
    with connect(url) as client:
        job = _submit(client, spec, file, force=force)
        _print_job(job, watch=watch, as_json=as_json)
        if watch:
            watch_to_end(client, job.id, as_json, job.warnings)


def read_spec(config: Path | None, overrides: Document) -> tuple[Document, JobSpec]:
    """The spec of the file with the `overrides`, unparsed and parsed.

    Raises:
        InvalidFile, InvalidSpec, WrongUsage: the findings have the lines of the file.
    """
    from qlora_service.specs import parse_spec

    document, lines = _read_config(config)
    if "training.epochs" in overrides:
        # max_steps takes precedence over epochs, and typed epochs take precedence over the file's max_steps.
        overrides = {"training.max_steps": None, **overrides}
    for field, value in overrides.items():
        _set_field(document, field, value)
        lines.pop(_pointer(field), None)
    if config is None and document.get("base_model") is None:
        raise WrongUsage("no base model: give --base-model; `qlora models list` shows the names")
    try:
        return document, parse_spec(document)
    except InvalidSpec as error:
        if config is None:
            raise
        findings = [replace(finding, line=lines.get(finding.pointer)) for finding in error.findings]
        raise InvalidFile(config, "the configuration is refused", findings) from None


def parse_assignments(pairs: list[str]) -> Document:
    """The fields and values of `--set`. Raises: WrongUsage."""
    values: Document = {}
    for pair in pairs:
        field, sign, text = pair.partition("=")
        if not sign or not field:
            raise WrongUsage(f"--set {pair}: write FIELD=VALUE, e.g. training.optim=adamw_torch")
        try:
            values[field] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise WrongUsage(f"--set {pair}: the value cannot be read: {error}") from None
    return values


def _without_none(flags: Document) -> Document:
    return {field: value for field, value in flags.items() if value is not None}


def _read_config(config: Path | None) -> tuple[Document, dict[str, int]]:
    from qlora_service.cli.spec_file import read_spec_file

    return ({}, {}) if config is None else read_spec_file(config)


def _set_field(document: Document, field: str, value: object) -> None:
    """Sets the dotted field. Raises: WrongUsage."""
    *groups, last = field.split(".")
    for group in groups:
        document = document.setdefault(group, {})
        if not isinstance(document, dict):
            raise WrongUsage(f"{field} cannot be set: {group} has no fields")
    document[last] = value


def _pointer(field: str) -> str:
    return "/" + field.replace(".", "/")


def _check_one_dataset(file: Path | None, document: Document) -> None:
    """Raises: WrongUsage."""
    dataset = document.get("dataset") or {}
    has_dataset = dataset.get("id") is not None or dataset.get("rows") is not None
    if file is None and not has_dataset:
        raise WrongUsage("no dataset: give a FILE of rows, or --dataset-id")
    if file is not None and has_dataset:
        raise WrongUsage(f"two datasets: {file} and the dataset of the spec; leave one of them out")
    if file is not None and not file.is_file():
        raise WrongUsage(f"{file} is not a file: give a file with rows to train on")


def _submit(client: Client, spec: JobSpec, file: Path | None, *, force: bool) -> Job:
    """The queued job. Raises: ServiceError, InvalidFile."""
    from qlora_service.client.wire import ServiceError

    try:
        return client.submit(spec, file, force=force)
    except ServiceError as error:
        if file is None or not any(finding.line for finding in error.findings):
            raise
        raise InvalidFile(file, error.message, error.findings) from None


def _print_job(job: Job, *, watch: bool, as_json: bool) -> None:
    for warning in job.warnings:
        print_note(f"warning: {warning}")
    if as_json and not watch:
        print_json(job.model_dump(mode="json"))
    elif sys.stdout.isatty():
        typer.echo(f"job {job.id} is {job.status}" + ("" if watch else f". Watch it: qlora watch {job.id}"))
    elif not as_json:
        typer.echo(job.id)
