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
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Print the settings of this recipe.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the recipes that a job can start from, or print the settings of one as YAML.

    To use one: `qlora submit --set recipe=NAME`. Fields that you set take precedence over it.
    """
    from qlora_service.specs import RECIPES

    recipes = {str(key): recipe for key, recipe in RECIPES.items()}
    if name is None:
        if as_json:
            print_json([{"name": key, **asdict(recipe)} for key, recipe in recipes.items()])
        else:
            width = max(map(len, recipes))
            typer.echo("\n".join(f"{key:{width}}  {recipe.title}" for key, recipe in recipes.items()))
        return
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the recipes are {', '.join(recipes)}"
        raise NotFound(f"there is no recipe {name!r}: {hint}")
    recipe = recipes[name]
    if as_json:
        print_json({"name": name, **asdict(recipe)})
    else:
        settings = yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True)
        typer.echo(f"# {recipe.title}\n# Source: {recipe.source}\n{settings}", nl=False)
