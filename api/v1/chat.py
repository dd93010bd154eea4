"""Talking to base models and fine-tuned ones: chat completions, and plain completions."""

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
from api.openai_errors import on_openai_wire
from api.v1.chat_answers import ChatCompletion, ChatWriter, Completion, TextWriter
from api.v1.chat_requests import CreateChatCompletion, CreateCompletion
from api.v1.routes import JsonRoute, openai_errors
from qlora_service.actions.service import Service
from qlora_service.chat.reception import Reception
from qlora_service.chat.wire import AdapterRef, Answer
from qlora_service.domain.jobs import Job, JobStatus
from qlora_service.errors import InvalidModel, NotFound, QLoRAError
from qlora_service.specs import Quantization
from qlora_service.store.database import Database
from qlora_service.store.inference import LoadedBase

Writer = ChatWriter | TextWriter
Result = TypeVar("Result")
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}
_RESPONSES = {200: {"description": "The answer.", "content": _STREAM}} | openai_errors(404, 413, 415, 429)


class ModelNotFound(NotFound):
    code = "model_not_found"


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings = app.state.settings
    # With connections of its own: many may wait to chat.
    database = Database(settings.resolved_database_url)
    app.state.reception = Reception(database, preempts=settings.chat_preempts)
    try:
        yield
    finally:
        database.close()


router = APIRouter(tags=["chat"], route_class=JsonRoute, lifespan=_lifespan)


async def _reception(request: Request) -> Reception:
    reception: Reception = request.app.state.reception
    return reception


ReceptionOf = Annotated[Reception, Depends(_reception)]


@router.post("/chat/completions", summary="Chat with a model", response_model=ChatCompletion, responses=_RESPONSES)
async def create_chat_completion(
    request: Request, asked: CreateChatCompletion, service: ServiceOf, reception: ReceptionOf
) -> Response:
    """The model's answer to a conversation; with `stream`, as server-sent events while it is generated.

    The first request loads the base model, which takes a while; adapters are switched on it. Jobs come first: while
    one has the slot, the answer is 503 with Retry-After, unless the operator lets chats interrupt jobs.
    """
    return await _answer(request, asked, service, reception, ChatWriter(asked.model))


@router.post("/completions", summary="Continue a text", response_model=Completion, responses=_RESPONSES)
async def create_completion(
    request: Request, asked: CreateCompletion, service: ServiceOf, reception: ReceptionOf
) -> Response:
    """The model's continuation of plain text, without a chat template; otherwise as chat completions."""
    return await _answer(request, asked, service, reception, TextWriter(asked.model))


def find_model(service: Service, name: str) -> tuple[LoadedBase, AdapterRef | None]:
    """What to load for a model called so: a base model, a fine-tuned one, or a succeeded job by its id.

    Raises:
        ModelNotFound: the project has none of this name.
    """
    nowhere = ModelNotFound(f"there is no model {name[:200]!r}; GET /v1/models lists them", location="model")
    try:
        if name.startswith("job_"):
            return _tuned(service.jobs.get(name))
        if name.startswith("ft:"):
            return _tuned(service.tuned_models.get(name))
        return LoadedBase(service.models.get(name).name, Quantization().model_dump_json()), None
    except ModelNotFound:
        raise
    except (NotFound, InvalidModel):
        raise nowhere from None


def _tuned(job: Job) -> tuple[LoadedBase, AdapterRef]:
    if job.status is not JobStatus.SUCCEEDED or job.result is None:
        raise ModelNotFound(f"job {job.id} is {job.status}: it has a model once it has succeeded", location="model")
    if job.withdrawn_at is not None:
        raise ModelNotFound(f"the model of job {job.id} was deleted", location="model")
    if job.unreadable is not None:
        raise ModelNotFound(job.unreadable, location="model")
    base = LoadedBase(job.spec.base_model, job.spec.quantization.model_dump_json())
    return base, AdapterRef(job_id=job.id, attempt=job.result["attempt"])


async def _answer(
    request: Request,
    asked: CreateChatCompletion | CreateCompletion,
    service: Service,
    reception: Reception,
    writer: Writer,
) -> Response:
    base, adapter = await run_in_threadpool(find_model, service, asked.model)
    answers = reception.answer(base, asked.request(adapter), service.project)
    try:
        # What is wrong is told by the status, as long as nothing has been sent.
        first = await _while_connected(request, anext(answers))
        if not asked.stream:
            return await _while_connected(request, _whole(first, answers, writer))
    except BaseException:
        await answers.aclose()
        raise
    return StreamingResponse(
        _stream(first, answers, writer, asked.include_usage),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _whole(first: Answer, answers: AsyncIterator[Answer], writer: Writer) -> Response:
    pieces, finished = [first.text or ""], first.finished
    async for answer in answers:
        pieces.append(answer.text or "")
        finished = answer.finished
    assert finished is not None
    return JSONResponse(writer.whole(pieces, finished).model_dump(mode="json"))


async def _stream(
    first: Answer, answers: AsyncGenerator[Answer, None], writer: Writer, include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events, as OpenAI sends them."""
    async with aclosing(answers):
        try:
            for chunk in writer.opening():
                yield _event(chunk)
            finished = first.finished
            if first.text:
                yield _event(writer.piece(first.text))
            async for answer in answers:
                finished = answer.finished
                if answer.text:
                    yield _event(writer.piece(answer.text))
            assert finished is not None
            yield _event(writer.end(finished))
            if include_usage:
                yield _event(writer.usage(finished))
            yield "data: [DONE]\n\n"
        except QLoRAError as error:
            # The status is sent; a client of OpenAI's raises what stands in such an event.
            yield _event({"error": _on_wire(error)[0]})


async def _while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """What `work` returns; when the client goes away, it is broken off. Raises: ClientDisconnect."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _on_wire(error: QLoRAError) -> tuple[dict[str, Any], int, dict[str, str]]:
    return on_openai_wire(error.as_dict(), status_of(error))


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"
