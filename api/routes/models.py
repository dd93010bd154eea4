"""Base models of the catalog."""

from __future__ import annotations

from fastapi import APIRouter

from api.dependencies import ServiceOf
from api.errors import error_responses
from api.schemas import Listing, Model

router = APIRouter(prefix="/models", tags=["models"])


@router.get("", summary="List base models", responses=error_responses(422))
def list_models(service: ServiceOf) -> Listing[Model]:
    """The base models that jobs can name, sorted by name. `qlora models import NAME PATH` adds one."""
    return Listing(data=[Model.of(model) for model in service.models.list()])
