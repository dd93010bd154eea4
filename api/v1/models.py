"""Models on OpenAI's wire: the catalog's base models, and those that were fine-tuned here."""

from __future__ import annotations

from fastapi import APIRouter

from api.dependencies import ServiceOf
from api.http.idempotency import IdempotencyOf
from api.v1.rendering import seconds
from api.v1.routes import ModelId, openai_errors
from api.v1.schemas import DeletedModel, Model, ModelList
from qlora_service.actions.service import Service
from qlora_service.domain.jobs import Job
from qlora_service.domain.tuned_models import tuned_model_name
from qlora_service.errors import Conflict, InvalidModel
from qlora_service.models.catalog.catalog import BaseModel

router = APIRouter(prefix="/models", tags=["openai models"])

MAX_TUNED = 10_000
"""The client does not page through models."""


@router.get("", summary="List models", responses=openai_errors())
def list_models(service: ServiceOf) -> ModelList:
    """The base models, then the project's fine-tuned ones, the newest first, up to 10,000 of these."""
    base = [_base(model) for model in service.models.list()]
    return ModelList(data=[*base, *map(_tuned, service.tuned_models.list_models(limit=MAX_TUNED))])


@router.get("/{model:path}", summary="Look at a model", responses=openai_errors(404))
def get_model(model: ModelId, service: ServiceOf) -> Model:
    """A base model or a fine-tuned one."""
    base = _find_base(service, model)
    return _tuned(service.tuned_models.get(model)) if base is None else _base(base)


@router.delete("/{model:path}", summary="Delete a fine-tuned model", responses=openai_errors(404, 409))
def delete_model(model: ModelId, service: ServiceOf, idempotency: IdempotencyOf) -> DeletedModel:
    """The adapter's files are gone for good; the job and its metrics stay. Base models belong to the operator."""
    if _find_base(service, model) is not None:
        raise Conflict(
            f"{model} is a base model, which all projects start from: `qlora models remove {model}`, where the service "
            "runs, removes it",
            location="model",
        )
    return _deleted(service.tuned_models.delete(model, once=idempotency.once(_deleted)))


def _find_base(service: Service, name: str) -> BaseModel | None:
    try:
        return service.models.get(name)
    except InvalidModel:
        return None


def _base(model: BaseModel) -> Model:
    return Model(id=model.name, created=seconds(model.imported_at), owned_by="base")


def _tuned(job: Job) -> Model:
    assert job.finished_at is not None
    return Model(id=_name(job), created=seconds(job.finished_at), owned_by=job.project)


def _deleted(job: Job) -> DeletedModel:
    return DeletedModel(id=_name(job))


def _name(job: Job) -> str:
    name = tuned_model_name(job)
    assert name is not None, "only succeeded jobs are published"
    return name
