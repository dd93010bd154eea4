"""The command `plan`: whether a job fits, computed by a service, or in this process for a model's config.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_service.cli.exit_codes import ExitCode
from qlora_service.cli.options import AsJson, Url, WrongUsage, connect, print_json
from qlora_service.cli.submission import parse_assignments, read_spec

if TYPE_CHECKING:
    from qlora_service.client.wire import Plan
    from qlora_service.specs import JobSpec

GIB = 2**30
_SOURCES = {
    "history": "earlier jobs of the same kind",
    "similar": "other jobs on this base",
    "probe": "a timed step",
}
"""Of a predicted time, by its `basis`."""


def plan(  # noqa: PLR0913 - an argument per option of the command
    spec_file: Annotated[
        Path | None,
        typer.Argument(metavar="SPEC_FILE", exists=True, dir_okay=False, help="Job spec in YAML or JSON."),
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Base model, as in `qlora models list`.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="A model's config.json, in place of a base model; needs no service."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help='A card such as "RTX 3090", or a size such as 24GB; default: the device of the service, or of this '
            "machine with --config."
        ),
    ] = None,
    dataset_id: Annotated[str | None, typer.Option(help="Stored dataset; the plan is for its longest row.")] = None,
    set_fields: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the spec, e.g. training.batch_size=1."),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Time a step when a slot is free, if no earlier job gives the duration.")
    ] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Predict whether a job fits into a GPU's memory, its execution settings, its sizes and its duration.

    Needs no weights and no GPU. The exit code is 0 if the job fits as it is, else 6.
    """
    if config is not None and (base_model or dataset_id):
        raise WrongUsage("--config is a model without weights and tokenizer: leave --base-model and --dataset-id out")
    if config is not None and probe:
        raise WrongUsage("--probe times a step of a job that can run: give --base-model and --dataset-id, not --config")
    flags = {"base_model": config.name if config else base_model, "dataset.id": dataset_id}
    overrides = {field: value for field, value in flags.items() if value is not None}
    _, spec = read_spec(spec_file, overrides | parse_assignments(set_fields or []))
    if config is not None:
        predicted = _plan_locally(spec, config, device)
    else:
        with connect(url) as client:
            predicted = client.plan(spec, device=device, probe=probe)
    if as_json:
        print_json(predicted.model_dump(mode="json"))
    else:
        typer.echo("\n".join(_plan_lines(predicted)))
    raise typer.Exit(ExitCode.DONE if predicted.verdict == "fits" else ExitCode.DOES_NOT_FIT)


def _plan_locally(spec: JobSpec, config: Path, device: str | None) -> Plan:
    """The plan, computed in this process. Raises: WrongUsage, InvalidModel, InvalidRequest."""
    from qlora_service.client.wire import Plan
    from qlora_service.planning.planner import Planner

    try:
        values = json.loads(config.read_bytes())
    except ValueError as error:
        raise WrongUsage(f"{config} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise WrongUsage(f"{config} is not a JSON object: give a model's config.json")
    planner = Planner()
    return Plan.model_validate(planner.plan(values, spec, planner.device(device)).as_dict())


def _plan_lines(plan: Plan) -> Iterator[str]:
    """The plan as text, its figures aligned."""
    memory, settings, storage = plan.memory, plan.settings, plan.storage
    activations = "recomputed" if settings["gradient_checkpointing"] else "kept"
    optimizer_state = "in host memory" if settings["optimizer"] == "paged" else "on the device"
    yield f"{plan.verdict.replace('_', ' ')}: {plan.reason}"
    yield from (f"note: {note}" for note in plan.notes)
    yield ""
    yield f"device    {plan.device['name']}, {_gib(plan.device['total_bytes']).strip()} GiB"
    yield (
        f"settings  {settings['micro_batch_tokens']} tokens per micro-batch, activations {activations}, "
        f"optimizer state {optimizer_state}"
    )
    yield f"rows      up to {plan.longest_tokens} tokens"
    yield f"source    {plan.source}"
    yield ""
    yield from _size_lines("memory, GiB", {name: size for name, size in memory["categories"].items() if size})
    yield from _size_lines("", {name: memory[name] for name in ("allocated", "reserved", "context")})
    yield from _size_lines("", {"optimizer state that can page": memory["optimizer_host"], "free": memory["free"]})
    yield ""
    other_sizes: dict[str, int] = {
        "adapter file": storage["adapter_bytes"],
        "disk": storage["disk_bytes"],
        "host memory": storage["host_bytes"],
        "the same as bf16 LoRA": plan.bf16_lora_bytes,
        "the same as full fine-tuning": plan.full_fine_tuning_bytes,
    }
    yield from _size_lines("other sizes, GiB", other_sizes)
    yield ""
    yield f"trained parameters  {plan.trained_parameters:,}"
    if plan.time is not None:
        yield _time_line(plan.time)


def _time_line(time: dict[str, Any]) -> str:
    if (seconds := time.get("seconds")) is None:
        return f"time                not known: {time['reason']}"
    source = _SOURCES[time["basis"]]
    return f"time                {_format_duration(seconds)} ± {time['error']:.0%} (from {source})"


def _format_duration(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"


def _size_lines(title: str, sizes: dict[str, int]) -> Iterator[str]:
    if title:
        yield title
    yield from (f"  {name:32}{_gib(size)}" for name, size in sizes.items())


def _gib(size: int) -> str:
    return f"{size / GIB:9.2f}"
