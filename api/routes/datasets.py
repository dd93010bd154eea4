"""Datasets: upload, list, inspect, preview, delete."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from fastapi import APIRouter, Query
from pydantic import TypeAdapter, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from api.dependencies import After, DatasetId, Limit, ServiceOf, UploadsOf
from api.errors import error_locations, error_responses
from api.http.idempotency import Idempotency, IdempotencyOf
from api.http.multipart import MEDIA_TYPE as MULTIPART
from api.http.multipart import Form, is_multipart
from api.http.uploads import display_name
from api.schemas import Dataset, DeletedDataset, Listing, Page, PreviewProblem, PreviewRow
from qlora_service.actions.service import Service
from qlora_service.actions.submission import default_length
from qlora_service.data.rendering.renderer import RenderRules
from qlora_service.data.rows.examples import Container, Shape
from qlora_service.domain.datasets import Dataset as DomainDataset
from qlora_service.errors import InvalidModel, InvalidRequest, NotFound, QLoRAError

router = APIRouter(prefix="/datasets", tags=["datasets"])

Choice = TypeVar("Choice")
_CONTAINER: TypeAdapter[Container] = TypeAdapter(Container)
_SHAPE: TypeAdapter[Shape] = TypeAdapter(Shape)

# Parameters of these routes that errors of these classes refer to.
_LOCATIONS: dict[type[QLoRAError], str] = {InvalidModel: "base_model", NotFound: "dataset_id"}

_FILE_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {
                "schema": {"type": "string", "format": "binary"},
                "example": '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}',
            },
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "container": {"type": "string", "enum": list(get_args(Container))},
                        "shape": {"type": "string", "enum": list(get_args(Shape))},
                    },
                }
            },
        },
    }
}

BaseModelName = Annotated[str, Query(min_length=1, max_length=200, description="A name from GET /models.")]
MaxSeqLen = Annotated[
    int | None,
    Query(ge=1, le=1_048_576, description="Maximum length of a row in tokens; default: as for a job without a value."),
]


@router.post(
    "",
    status_code=201,
    summary="Upload a dataset",
    responses=error_responses(409, 413, 422),
    openapi_extra=_FILE_BODY,
)
async def create_dataset(
    request: Request,
    service: ServiceOf,
    uploads: UploadsOf,
    idempotency: IdempotencyOf,
    filename: Annotated[str | None, Query(description="Name of the file.", examples=["train.jsonl"])] = None,
    container: Annotated[Container | None, Query(description="File format; default: detected.")] = None,
    shape: Annotated[Shape | None, Query(description="Shape of the rows; default: detected.")] = None,
) -> Dataset:
    """Check a file and store it under its SHA-256.

    Send the file as the body (`curl --data-binary @train.jsonl '…/datasets?filename=train.jsonl'`) or as the part
    `file` of a form. Unusable rows are left out and listed in `findings` with their lines, and by reason in
    `finding_kinds`; `warnings` has, by reason, usable rows that are not trained as one would expect. A file without a
    usable row is rejected, and nothing is stored.
    """
    if not is_multipart(request.headers.get("content-type", "")):
        async with uploads.receive_file(request) as path:
            return await run_in_threadpool(_add, service, idempotency, path, filename, container, shape)
    async with uploads.receive_form(request, files=["file"], fields=["container", "shape"]) as form:
        return await run_in_threadpool(_add_form, service, idempotency, form, filename, container, shape)


@router.get("", summary="List datasets", responses=error_responses(422))
def list_datasets(service: ServiceOf, after: After = None, limit: Limit = 20) -> Page[Dataset]:
    """Datasets, newest first."""
    datasets = service.datasets.list_datasets(before=after, limit=limit + 1)
    data = [Dataset.of(dataset) for dataset in datasets[:limit]]
    return Page(data=data, next=data[-1].id if len(datasets) > limit else None)


@router.get("/{dataset_id}", summary="Look at a dataset", responses=error_responses(404, 422))
def get_dataset(
    dataset_id: DatasetId,
    service: ServiceOf,
    base_model: BaseModelName | None = None,
    max_seq_len_tokens: MaxSeqLen = None,
) -> Dataset:
    """Counts, findings and warnings; with `base_model`, also those of rendering, and the rows' token lengths."""
    with error_locations(_LOCATIONS):
        dataset = service.datasets.get(dataset_id)
        if base_model is None:
            return Dataset.of(dataset)
        rules = RenderRules(max_seq_len_tokens or default_length(service.models.get(base_model)))
        return Dataset.of(dataset, service.datasets.lengths(dataset_id, base_model, rules))


@router.delete("/{dataset_id}", summary="Delete a dataset", responses=error_responses(404, 409, 422))
def delete_dataset(dataset_id: DatasetId, service: ServiceOf, idempotency: IdempotencyOf) -> DeletedDataset:
    """Delete the dataset, and its bytes unless another dataset has the same bytes.

    A conflict while a job that has not ended needs the dataset.
    """
    return _deleted(service.datasets.delete(dataset_id, once=idempotency.once(_deleted)))


@router.get("/{dataset_id}/preview", summary="Preview the rendered rows", responses=error_responses(404, 422))
def preview_dataset(  # noqa: PLR0913 - an argument per parameter of the request
    dataset_id: DatasetId,
    service: ServiceOf,
    base_model: BaseModelName,
    max_seq_len_tokens: MaxSeqLen = None,
    too_long: Annotated[
        Literal["refuse", "truncate", "drop"], Query(description="As `training.too_long` of a job.")
    ] = "refuse",
    train_on: Annotated[
        Literal["assistant", "all"], Query(description="As `training.train_on` of a job.")
    ] = "assistant",
    prompt_format: Annotated[
        Literal["auto", "chat", "plain"], Query(description="As `training.prompt_format` of a job.")
    ] = "auto",
    skip: Annotated[int, Query(ge=0, le=10**9, description="Number of usable rows to skip.")] = 0,
    limit: Annotated[int, Query(ge=1, le=50, description="Maximum number of rows.")] = 5,
) -> Listing[PreviewRow | PreviewProblem]:
    """Rendered rows: the text after the chat template, its tokens, and whether each token is trained."""
    with error_locations(_LOCATIONS):
        max_tokens = max_seq_len_tokens or default_length(service.models.get(base_model))
        rules = RenderRules(max_tokens, too_long, train_on, prompt_format)
        rows = service.datasets.preview(dataset_id, base_model, rules, skip=skip, limit=limit)
    return Listing.model_validate({"data": rows})


def _deleted(dataset: DomainDataset) -> DeletedDataset:
    return DeletedDataset(id=dataset.id)


def _add(
    service: Service,
    idempotency: Idempotency,
    path: Path,
    filename: str | None,
    container: Container | None,
    shape: Shape | None,
) -> Dataset:
    once = idempotency.once(Dataset.of, status=201, content=idempotency.file_content(path))
    name = display_name(filename)
    return Dataset.of(service.datasets.upload(path, filename=name, container=container, shape=shape, once=once))


def _add_form(
    service: Service,
    idempotency: Idempotency,
    form: Form,
    filename: str | None,
    container: Container | None,
    shape: Shape | None,
) -> Dataset:
    file = form.files.get("file")
    if file is None:
        raise InvalidRequest("the form has no part `file`: send the dataset in it", location="file")
    fields = {name: value.decode(errors="replace") for name, value in form.fields.items()}
    once = idempotency.once(Dataset.of, status=201, content=idempotency.form_content(form, fields))
    dataset = service.datasets.upload(
        file.path,
        filename=display_name(filename or file.filename),
        container=container or _choice(form, "container", _CONTAINER),
        shape=shape or _choice(form, "shape", _SHAPE),
        once=once,
    )
    return Dataset.of(dataset)


def _choice(form: Form, name: str, choices: TypeAdapter[Choice]) -> Choice | None:
    """The value of an optional form field; None if it is absent or empty. Raises: InvalidRequest."""
    value = form.fields.get(name)
    if not value:
        return None
    try:
        return choices.validate_python(value.decode(errors="replace"))
    except ValidationError as error:
        raise InvalidRequest(f"{name}: {error.errors()[0]['msg']}", location=name) from None
