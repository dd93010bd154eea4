"""The command `recipes`: named settings that a job can start from."""

from __future__ import annotations

import difflib
from dataclasses import asdict
from typing import Annotated

import typer
import yaml

from qlora_service.cli.options import AsJson, print_json
from qlora_service.errors import NotFound


def show_recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Print this one's settings.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the recipes that a job can start from, or print one's settings as YAML.

    To use one: `qlora submit --set recipe=NAME`. What you set yourself wins over it.
    """
    from qlora_service.specs import RECIPES

    known = {str(key): recipe for key, recipe in RECIPES.items()}
    if name is None:
        if as_json:
            print_json([{"name": key, **asdict(recipe)} for key, recipe in known.items()])
        else:
            width = max(map(len, known))
            typer.echo("\n".join(f"{key:{width}}  {recipe.title}" for key, recipe in known.items()))
        return
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
        raise NotFound(f"no recipe is called {name!r}: {hint}")
    recipe = known[name]
    if as_json:
        print_json({"name": name, **asdict(recipe)})
    else:
        settings = yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True)
        typer.echo(f"# {recipe.title}\n# Source: {recipe.source}\n{settings}", nl=False)
