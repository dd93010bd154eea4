"""Commands about base models: list, import, remove."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qlora_service.cli.options import AsJson, DataDir, Url, connect, open_catalog, print_json, print_note, print_table

app = typer.Typer(help="List, import and remove the base models that jobs can train on.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The model's name in the catalog.")]


@app.command("list")
def list_models(url: Url = None, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """List base models: those of the data directory or, with --url, those of a running service."""
    if url is not None:
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
    """Import a base model into the data directory; no service need run.

    A GGUF file is dequantized once. Pickled weights, code in the model and quantized weights are refused.
    """
    model = open_catalog(data_dir).import_model(name, source)
    if as_json:
        print_json(model.as_dict())
    else:
        print_note(f"imported {model.name}: {model.architecture}, {_millions(model.parameters)} parameters")


@app.command("remove")
def remove_model(name: Name, data_dir: DataDir = None, as_json: AsJson = False) -> None:
    """Delete a base model from the data directory. Adapters trained on it are kept."""
    open_catalog(data_dir).remove(name)
    if as_json:
        print_json({"name": name, "removed": True})
    else:
        print_note(f"removed {name}")


def _print_table(models: list[dict[str, Any]]) -> None:
    rows = []
    for model in models:
        origin = f"{model['hub_id']}@{model['revision']}" if model["hub_id"] else model["source"]
        length = f"{model['max_positions']} tokens" if model["max_positions"] else ""
        rows.append((model["name"], model["architecture"], _millions(model["parameters"]), length, origin))
    print_table(("name", "architecture", "parameters", "longest row", "from"), rows)


def _millions(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
