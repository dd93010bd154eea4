"""Model endpoints in OpenAI's format: base models of the catalog, and fine-tuned models."""

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
"""Most fine-tuned models of a list: OpenAI's client does not page through models."""


@router.get("", summary="List models", responses=openai_errors())
def list_models(service: ServiceOf) -> ModelList:
    """All base models, then up to 10,000 fine-tuned models of the project, newest first."""
    base_models = [_base_model(model) for model in service.models.list()]
    return ModelList(data=[*base_models, *map(_tuned_model, service.tuned_models.list_models(limit=MAX_TUNED))])


@router.get("/{model:path}", summary="Look at a model", responses=openai_errors(404))
def get_model(model: ModelId, service: ServiceOf) -> Model:
    """The base model or fine-tuned model of this name."""
    base = _find_base(service, model)
    return _tuned_model(service.tuned_models.get(model)) if base is None else _base_model(base)


@router.delete("/{model:path}", summary="Delete a fine-tuned model", responses=openai_errors(404, 409))
def delete_model(model: ModelId, service: ServiceOf, idempotency: IdempotencyOf) -> DeletedModel:
    """Delete the adapter's files permanently. The job and its metrics stay. Base models belong to the operator."""
    if _find_base(service, model) is not None:
        raise Conflict(
            f"{model} is a base model, which all projects share: to remove it, run `qlora models remove {model}` on "
            "the machine of the service",
            location="model",
        )
    return _deleted(service.tuned_models.delete(model, once=idempotency.once(_deleted)))


def _find_base(service: Service, name: str) -> BaseModel | None:
    try:
        return service.models.get(name)
    except InvalidModel:
        return None


def _base_model(model: BaseModel) -> Model:
    return Model(id=model.name, created=seconds(model.imported_at), owned_by="base")


def _tuned_model(job: Job) -> Model:
    assert job.finished_at is not None
    return Model(id=_name(job), created=seconds(job.finished_at), owned_by=job.project)


def _deleted(job: Job) -> DeletedModel:
    return DeletedModel(id=_name(job))


def _name(job: Job) -> str:
    name = tuned_model_name(job)
    assert name is not None, "only succeeded jobs are published"
    return name
