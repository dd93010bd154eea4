"""The command `submit`: a job from a file of rows, flags and a configuration file."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from qlora_service.cli.jobs import watch_to_end
from qlora_service.cli.options import AsJson, FaultsInFile, Url, WrongUsage, connect, print_json, print_note
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
    dataset_id: Annotated[str | None, typer.Option(help="A dataset the service has already, instead of FILE.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Base model, as in `qlora models list`.")] = None,
    config: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Job spec in YAML or JSON; flags override it.")
    ] = None,
    set_fields: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the spec, e.g. training.optim=adamw_torch."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="A name for the job.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps.", rich_help_panel=TRAINING)] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the rows.", rich_help_panel=TRAINING)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Such as 2e-4.", rich_help_panel=TRAINING)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per step.", rich_help_panel=TRAINING)] = None,
    max_seq_len_tokens: Annotated[
        int | None, typer.Option(help="Longest row, in tokens.", rich_help_panel=TRAINING)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Decides split, order, start and dropout.", rich_help_panel=TRAINING)
    ] = None,
    r: Annotated[int | None, typer.Option("--r", help="Rank of the adapter.", rich_help_panel=TRAINING)] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help="The update is scaled by lora_alpha / r.", rich_help_panel=TRAINING)
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Queue it also if it should not fit into the device's memory.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job until it ends.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Queue a training job.

    Everything that can be known to fail is refused at once, with the lines of your file. Prints the job's id.
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
    document, spec = read_spec(config, _without_none(flags) | assignments(set_fields or []))
    _check_one_dataset(file, document)
    with connect(url) as client:
        job = _send(client, spec, file, force=force)
        _print_job(job, watch=watch, as_json=as_json)
        if watch:
            watch_to_end(client, job.id, as_json)


def read_spec(config: Path | None, given: Document) -> tuple[Document, JobSpec]:
    """The spec that the file and the `given` fields over it describe, as they say it and checked.

    Raises:
        FaultsInFile, InvalidSpec, WrongUsage: with the lines of the file.
    """
    from qlora_service.specs import parse_spec

    document, lines = _read_config(config)
    if "training.epochs" in given:
        # Of the two, max_steps would win: what is typed wins over what is in the file.
        given = {"training.max_steps": None, **given}
    for field, value in given.items():
        _set(document, field, value)
        lines.pop(_pointer(field), None)
    if config is None and document.get("base_model") is None:
        raise WrongUsage("no base model: give --base-model; `qlora models list` shows which there are")
    try:
        return document, parse_spec(document)
    except InvalidSpec as error:
        if config is None:
            raise
        findings = [replace(finding, line=lines.get(finding.pointer)) for finding in error.findings]
        raise FaultsInFile(config, "the configuration is refused", findings) from None


def _without_none(flags: Document) -> Document:
    return {field: value for field, value in flags.items() if value is not None}


def _send(client: Client, spec: JobSpec, file: Path | None, *, force: bool) -> Job:
    """The queued job. Raises: ServiceError, FaultsInFile."""
    from qlora_service.client.wire import ServiceError

    try:
        return client.submit(spec, file, force=force)
    except ServiceError as error:
        if file is None or not any(finding.line for finding in error.findings):
            raise
        raise FaultsInFile(file, error.message, error.findings) from None


def _print_job(job: Job, *, watch: bool, as_json: bool) -> None:
    for warning in job.warnings:
        print_note(f"warning: {warning}")
    if as_json and not watch:
        print_json(job.model_dump(mode="json"))
    elif sys.stdout.isatty():
        typer.echo(f"job {job.id} is {job.status}" + ("" if watch else f". Watch it: qlora watch {job.id}"))
    elif not as_json:
        typer.echo(job.id)


def _read_config(config: Path | None) -> tuple[Document, dict[str, int]]:
    from qlora_service.cli.spec_file import read_spec_file

    return ({}, {}) if config is None else read_spec_file(config)


def _check_one_dataset(file: Path | None, document: Document) -> None:
    """Raises: WrongUsage."""
    dataset = document.get("dataset") or {}
    named = dataset.get("id") is not None or dataset.get("rows") is not None
    if file is None and not named:
        raise WrongUsage("no dataset: give a FILE of rows, or --dataset-id")
    if file is not None and named:
        raise WrongUsage(f"two datasets: {file} and the one that the spec names; leave one of them out")
    if file is not None and not file.is_file():
        raise WrongUsage(f"{file} is no file: give one with rows to train on")


def assignments(pairs: list[str]) -> Document:
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


def _set(document: Document, field: str, value: object) -> None:
    """Puts the value at the dotted field. Raises: WrongUsage."""
    *groups, last = field.split(".")
    for group in groups:
        document = document.setdefault(group, {})
        if not isinstance(document, dict):
            raise WrongUsage(f"{field} cannot be set: {group} holds no fields")
    document[last] = value


def _pointer(field: str) -> str:
    return "/" + field.replace(".", "/")
