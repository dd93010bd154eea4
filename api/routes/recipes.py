"""Recipes: named sets of values for a job's spec."""

from __future__ import annotations

from fastapi import APIRouter

from api.errors import error_responses
from api.schemas import Listing
from qlora_service.specs import RECIPES
from qlora_service.wire import Recipe

router = APIRouter(prefix="/recipes", tags=["recipes"])


@router.get("", summary="List recipes", responses=error_responses(422))
async def list_recipes() -> Listing[Recipe]:
    """The recipes that a spec's `recipe` can name. Values in the spec override the values of its recipe."""
    return Listing(
        data=[
            Recipe(name=name, title=recipe.title, source=recipe.source, values=recipe.values)
            for name, recipe in RECIPES.items()
        ]
    )
