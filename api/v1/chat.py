"""Inference with base models and fine-tuned models: chat completions and plain completions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from api.dependencies import ServiceOf
from api.errors import status_of
from api.openai_errors import to_openai_error
from api.v1.chat_answers import ChatCompletion, ChatWriter, Completion, TextWriter
from api.v1.chat_requests import CreateChatCompletion, CreateCompletion
from api.v1.routes import JsonRoute, openai_errors
from qlora_service.actions.service import Service
from qlora_service.chat.dispatch import ChatDispatcher
from qlora_service.chat.wire import AdapterRef, Answer
from qlora_service.domain.jobs import Job, JobStatus
from qlora_service.errors import InvalidModel, NotFound, QLoRAError
from qlora_service.specs import Quantization
from qlora_service.store.database import Database
from qlora_service.store.inference import LoadedBase

Writer = ChatWriter | TextWriter
Result = TypeVar("Result")
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}
_RESPONSES = {
    200: {"description": "The completion; with `stream`, its chunks as server-sent events.", "content": _STREAM}
} | openai_errors(404, 413, 415, 429)


class ModelNotFound(NotFound):
    code = "model_not_found"


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings = app.state.settings
    # A connection pool separate from the service's, because many chat requests may wait at the same time.
    database = Database(settings.resolved_database_url)
    app.state.chat_dispatcher = ChatDispatcher(database, preempts=settings.chat_preempts)
    try:
        yield
    finally:
        database.close()


router = APIRouter(tags=["chat"], route_class=JsonRoute, lifespan=_lifespan)


async def _dispatcher(request: Request) -> ChatDispatcher:
    dispatcher: ChatDispatcher = request.app.state.chat_dispatcher
    return dispatcher


DispatcherOf = Annotated[ChatDispatcher, Depends(_dispatcher)]


@router.post("/chat/completions", summary="Chat with a model", response_model=ChatCompletion, responses=_RESPONSES)
async def create_chat_completion(
    request: Request, body: CreateChatCompletion, service: ServiceOf, dispatcher: DispatcherOf
) -> Response:
    """The model's reply to a conversation. With `stream`, the reply is sent as server-sent events during generation.

    The first request for a base model loads it, which takes a while; adapters are then switched on the loaded base.
    Jobs take precedence: while a job holds the slot, the response is 503 with Retry-After, unless the operator lets
    chat preempt jobs.
    """
    return await _respond(request, body, service, dispatcher, ChatWriter(body.model))


@router.post("/completions", summary="Continue a text", response_model=Completion, responses=_RESPONSES)
async def create_completion(
    request: Request, body: CreateCompletion, service: ServiceOf, dispatcher: DispatcherOf
) -> Response:
    """The model's continuation of plain text, without the chat template. Otherwise the same as chat completions."""
    return await _respond(request, body, service, dispatcher, TextWriter(body.model))


def find_model(service: Service, name: str) -> tuple[LoadedBase, AdapterRef | None]:
    """The base and the adapter of a model name: a base model, a fine-tuned model, or the id of a succeeded job.

    Raises:
        ModelNotFound: the project has no such model.
    """
    not_found = ModelNotFound(f"there is no model {name[:200]!r}; GET /v1/models lists them", location="model")
    try:
        if name.startswith("job_"):
            return _tuned_model(service.jobs.get(name))
        if name.startswith("ft:"):
            return _tuned_model(service.tuned_models.get(name))
        return LoadedBase(service.models.get(name).name, Quantization().model_dump_json()), None
    except ModelNotFound:
        raise
    except (NotFound, InvalidModel):
        raise not_found from None


def _tuned_model(job: Job) -> tuple[LoadedBase, AdapterRef]:
    if job.status is not JobStatus.SUCCEEDED or job.result is None:
        raise ModelNotFound(f"job {job.id} is {job.status}: it has a model once it has succeeded", location="model")
    if job.withdrawn_at is not None:
        raise ModelNotFound(f"the model of job {job.id} was deleted", location="model")
    if job.unreadable is not None:
        raise ModelNotFound(job.unreadable, location="model")
    base = LoadedBase(job.spec.base_model, job.spec.quantization.model_dump_json())
    return base, AdapterRef(job_id=job.id, attempt=job.result["attempt"])


async def _respond(
    request: Request,
    body: CreateChatCompletion | CreateCompletion,
    service: Service,
    dispatcher: ChatDispatcher,
    writer: Writer,
) -> Response:
    base, adapter = await run_in_threadpool(find_model, service, body.model)
    answers = dispatcher.answer(base, body.request(adapter), service.project)
    try:
        # Awaited before the response starts, so that an error up to here sets the HTTP status.
        first = await _while_connected(request, anext(answers))
        if not body.stream:
            return await _while_connected(request, _complete_response(first, answers, writer))
    except BaseException:
        await answers.aclose()
        raise
    return StreamingResponse(
        _event_stream(first, answers, writer, body.include_usage),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _complete_response(first: Answer, answers: AsyncIterator[Answer], writer: Writer) -> Response:
    pieces, finished = [first.text or ""], first.finished
    async for answer in answers:
        pieces.append(answer.text or "")
        finished = answer.finished
    assert finished is not None
    return JSONResponse(writer.complete(pieces, finished).model_dump(mode="json"))


async def _event_stream(
    first: Answer, answers: AsyncGenerator[Answer, None], writer: Writer, include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events in OpenAI's format."""
    async with aclosing(answers):
        try:
            for chunk in writer.opening_chunks():
                yield _event(chunk)
            finished = first.finished
            if first.text:
                yield _event(writer.text_chunk(first.text))
            async for answer in answers:
                finished = answer.finished
                if answer.text:
                    yield _event(writer.text_chunk(answer.text))
            assert finished is not None
            yield _event(writer.final_chunk(finished))
            if include_usage:
                yield _event(writer.usage_chunk(finished))
            yield "data: [DONE]\n\n"
        except QLoRAError as error:
            # The HTTP status is sent already; OpenAI's client raises the error of such an event.
            openai_error, _, _ = to_openai_error(error.as_dict(), status_of(error))
            yield _event({"error": openai_error})


async def _while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled when the client disconnects. Raises: ClientDisconnect."""
    working = asyncio.ensure_future(work)
    disconnecting = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, disconnecting}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, disconnecting):
            task.cancel()
        await asyncio.gather(working, disconnecting, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"
