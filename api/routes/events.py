"""Live events of jobs, as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.requests import Request

from api.dependencies import JobId, ServiceOf
from api.errors import error_responses
from api.event_feed import BATCH, EventFeed
from qlora_service.domain.jobs import Job, JobEvent, JobStatus

# Largest integer of the database.
MAX_SEQ = 2**63 - 1

router = APIRouter(tags=["jobs"])


async def _feed(request: Request) -> EventFeed:
    feed: EventFeed = request.app.state.event_feed
    return feed


def _existing(job_id: JobId, service: ServiceOf) -> Job:
    """The job. Checked before the stream begins, because afterwards the status can no longer be 404."""
    return service.jobs.get(job_id)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Error responses as JSON: FastAPI would document a `model` under the media type of the stream."""
    responses = error_responses(*statuses)
    for response in responses.values():
        del response["model"]
    return responses


FeedOf = Annotated[EventFeed, Depends(_feed)]
EventType = Literal["status", "metrics", "evaluation", "log", "warning"]
Types = Annotated[
    list[EventType] | None,
    Query(description="Only events of these types; repeat it for several.", examples=[["metrics", "evaluation"]]),
]
LastEventId = Annotated[
    int | None, Header(ge=0, le=MAX_SEQ, description="Overrides `after`; clients that reconnect send it.")
]


@router.get(
    "/jobs/{job_id}/events", summary="Follow a job", response_class=EventSourceResponse, responses=_errors(404, 422)
)
async def stream_job_events(
    job: Annotated[Job, Depends(_existing)],
    service: ServiceOf,
    feed: FeedOf,
    after: Annotated[int, Query(ge=0, le=MAX_SEQ, description="Only events after this id.")] = 0,
    types: Types = None,
    follow: Annotated[bool, Query(description="Whether to wait for future events.")] = True,
    last_event_id: LastEventId = None,
) -> AsyncIterator[ServerSentEvent]:
    """Every event since the job was queued, then each new event; the stream ends with the job.

    `event` is status, metrics, evaluation, log or warning; `data` is JSON that includes `job_id` and the time, `at`;
    `id` increases. A client that lost the connection, for example because the service restarted, sends the last id it
    received as `Last-Event-ID`, and the stream resumes after it. A comment every 15 seconds keeps an idle connection
    open.
    """
    seq = after if last_event_id is None else last_event_id
    read_history = partial(service.jobs.events, job.id, limit=BATCH)
    is_live = follow and not job.status.terminal
    events = feed.follow(("job", job.id), read_history, seq) if is_live else feed.history(read_history, seq)
    async with aclosing(events):
        async for event in events:
            if types is None or event.type in types:
                yield _server_sent(event)
            if is_live and _ends_job(event):
                return


@router.get("/events", summary="Follow all jobs", response_class=EventSourceResponse, responses=_errors(422))
async def stream_events(
    service: ServiceOf,
    feed: FeedOf,
    after: Annotated[
        int | None,
        Query(ge=0, le=MAX_SEQ, description="Only events after this id; 0: all events; default: only new events."),
    ] = None,
    types: Types = None,
    last_event_id: LastEventId = None,
) -> AsyncIterator[ServerSentEvent]:
    """Every new event of all jobs of the project, in the format of `GET /jobs/{job_id}/events`.

    `data.job_id` names the job. The stream continues until the client closes it or the service stops. Ids increase
    over all jobs: a client that lost the connection sends the last id it received as `Last-Event-ID`, and the stream
    resumes after it.
    """
    selected = None if types is None else frozenset(types)
    read_history = partial(service.jobs.project_events, types=selected, limit=BATCH)
    seq = after if last_event_id is None else last_event_id
    async with aclosing(feed.follow(("project", service.project), read_history, seq)) as events:
        async for event in events:
            if selected is None or event.type in selected:
                yield _server_sent(event)


def _server_sent(event: JobEvent) -> ServerSentEvent:
    data = {"job_id": event.job_id, "at": event.at.isoformat(), **event.data}
    return ServerSentEvent(data=data, event=event.type, id=str(event.seq))


def _ends_job(event: JobEvent) -> bool:
    return event.type == "status" and JobStatus(event.data["status"]).terminal
