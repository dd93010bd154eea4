"""Commands for base models: list, import, remove, cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_service.cli.options import AsJson, DataDir, connect, open_catalog, print_json, print_note, print_table
from qlora_service.errors import Conflict

if TYPE_CHECKING:
    from qlora_service.models.base.quantized_cache import QuantizedCache

app = typer.Typer(help="List, import and remove the base models that jobs can train on.", no_args_is_help=True)
cache = typer.Typer(help="Cached quantized base models, with which a job starts faster.", no_args_is_help=True)
app.add_typer(cache, name="cache")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The model's name in the catalog.")]
ServiceUrl = Annotated[
    str | None,
    typer.Option("--url", help="Address of the service; default: $QLORA_URL, else the data directory is read."),
]


@app.command("list")
def list_models(url: ServiceUrl = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List base models: of the service that --url or $QLORA_URL names, else of the data directory.

    With --data-dir, $QLORA_URL is ignored.
    """
    if url is not None or (data_dir is None and _url_is_set()):
        with connect(url) as client:
            models = [model.model_dump(mode="json") for model in client.models()]
    else:
        models = [model.as_dict() for model in open_catalog(data_dir).list()]
    if as_json:
        print_json(models)
    elif models:
        _print_table(models)
    else:
        print_note("no base models yet. Add one: qlora models import NAME PATH")


@app.command("import")
def import_model(
    name: Name,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A Hugging Face directory (safetensors), a GGUF file, or a hub id such as org/name@revision.",
        ),
    ],
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Import a base model into the data directory. Needs no service.

    A GGUF file is dequantized once. Models with pickled weights, code or quantized weights are refused.
    """
    model = open_catalog(data_dir).import_model(name, source)
    if as_json:
        print_json(model.as_dict())
    else:
        print_note(f"imported {model.name}: {model.architecture}, {_format_count(model.parameters)} parameters")


@app.command("remove")
def remove_model(
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Also if jobs still need it; these jobs will fail.")] = False,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Delete a base model from the data directory, unless a job still needs it. Adapters trained on it are kept."""
    catalog = open_catalog(data_dir)
    job_ids = [] if force else _unfinished_jobs(name, data_dir)
    if job_ids:
        others = f" and {len(job_ids) - 1} more" * (len(job_ids) > 1)
        raise Conflict(
            f"{name} is still needed by {job_ids[0]}{others}: let the jobs end or cancel them first, or remove the "
            "model with --force, and they fail"
        )
    catalog.remove(name)
    if as_json:
        print_json({"name": name, "removed": True})
    else:
        print_note(f"removed {name}")


@cache.command("list")
def list_cache(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List the cached quantized base models of the data directory, least recently used first."""
    entries = [entry.as_dict() for entry in _open_cache(data_dir).entries()]
    if as_json:
        print_json(entries)
    elif entries:
        keys = ("base_model", "quantization", "compute_dtype", "device", "last_used")
        rows = [(*(str(entry[key] or "?") for key in keys), f"{entry['bytes'] / 1e9:.2f} GB") for entry in entries]
        print_table(("name", "quantization", "compute dtype", "device", "last used", "size"), rows)
    else:
        print_note("nothing is cached: the first job on a base model quantizes it")


@cache.command("clear")
def clear_cache(data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Delete the cached quantized base models that no job is loading; the next jobs quantize them again."""
    removed = _open_cache(data_dir).clear()
    freed_bytes = sum(entry.size_bytes for entry in removed)
    if as_json:
        print_json({"removed": len(removed), "bytes": freed_bytes})
    else:
        print_note(f"removed {len(removed)} quantized base models, {freed_bytes / 1e9:.2f} GB")


def _unfinished_jobs(name: str, data_dir: Path | None) -> list[str]:
    """Ids of the local service's jobs that still need the model; none without the server's packages or a database."""
    from qlora_service.settings import read_settings

    try:
        from qlora_service.cli.local_database import has_database, open_local_database
        from qlora_service.store.database import Database
        from qlora_service.store.jobs import unfinished_on_base
    except ModuleNotFoundError:
        return []
    settings = read_settings(data_dir=data_dir)
    if not has_database(settings):
        return []
    with open_local_database(settings, Database) as database, database.read() as connection:
        return unfinished_on_base(connection, name)


def _url_is_set() -> bool:
    from qlora_service.settings import read_settings

    return read_settings().url is not None


def _open_cache(data_dir: Path | None) -> QuantizedCache:
    from qlora_service.models.base.quantized_cache import QuantizedCache
    from qlora_service.process.logging import configure_logging
    from qlora_service.settings import read_settings

    configure_logging("WARNING")
    settings = read_settings(data_dir=data_dir)
    return QuantizedCache(settings.cache_dir, settings.cache_bytes)


def _print_table(models: list[dict[str, Any]]) -> None:
    rows = []
    for model in models:
        origin = f"{model['hub_id']}@{model['revision']}" if model["hub_id"] else model["source"]
        length = f"{model['max_positions']} tokens" if model["max_positions"] else ""
        rows.append((model["name"], model["architecture"], _format_count(model["parameters"]), length, origin))
    print_table(("name", "architecture", "parameters", "longest row", "source"), rows)


def _format_count(parameters: int) -> str:
    """Such as 134.5 M, 7.2 B."""
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
