"""A job's events as they happen, as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, Header, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from api.dependencies import JobId, ServiceOf
from api.errors import error_responses
from qlora_service.jobs import JobEvent
from qlora_service.service import Service

POLL_S = 0.3
# One reading of the database; a long job's history is sent in several.
BATCH = 500
# Of the database's integers.
MAX_SEQ = 2**63 - 1

# Errors are JSON here too: a `model` would be documented under the stream's media type.
_ERRORS = error_responses(404, 422)
for _response in _ERRORS.values():
    del _response["model"]

router = APIRouter(prefix="/jobs", tags=["jobs"])


def _existing(job_id: JobId, service: ServiceOf) -> str:
    """The id of a job that exists: once the stream has begun, it is too late for a 404."""
    return service.get_job(job_id).id


@router.get(
    "/{job_id}/events",
    summary="Follow a job",
    response_class=EventSourceResponse,
    responses=_ERRORS,
)
async def stream_events(
    request: Request,
    job_id: Annotated[str, Depends(_existing)],
    service: ServiceOf,
    after: Annotated[int, Query(ge=0, le=MAX_SEQ, description="Only events after this id.")] = 0,
    last_event_id: Annotated[
        int | None, Header(ge=0, le=MAX_SEQ, description="The same, as clients send it that reconnect.")
    ] = None,
) -> AsyncIterator[ServerSentEvent]:
    """Every event since the job was queued, then each new one; the stream ends with the job.

    `event` is status, metrics, evaluation or log; `data` is JSON; `id` grows. A client that lost the connection,
    also to a restart of the service, sends the last id it saw and misses nothing.
    """
    seq = after if last_event_id is None else last_event_id
    while not request.app.state.draining:
        events, ended = await run_in_threadpool(_next_events, service, job_id, seq)
        for event in events:
            seq = event.seq
            yield ServerSentEvent(data=event.data, event=event.type, id=str(seq))
        if ended:
            return
        if not events:
            await anyio.sleep(POLL_S)


def _next_events(service: Service, job_id: str, seq: int) -> tuple[list[JobEvent], bool]:
    """Events after `seq`, and whether no more will come."""
    # The status is read first: what ended the job was written with it, so the events read after hold it.
    ended = service.get_job(job_id).status.terminal
    events = service.job_events(job_id, seq, limit=BATCH)
    return events, ended and len(events) < BATCH
