"""What happens to jobs as it happens, as server-sent events."""

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

# Of the database's integers.
MAX_SEQ = 2**63 - 1

router = APIRouter(tags=["jobs"])


async def _feed(request: Request) -> EventFeed:
    feed: EventFeed = request.app.state.event_feed
    return feed


def _existing(job_id: JobId, service: ServiceOf) -> Job:
    """A job that exists: once the stream has begun, it is too late for a 404."""
    return service.jobs.get(job_id)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Errors are JSON here too: a `model` would be documented under the stream's media type."""
    responses = error_responses(*statuses)
    for response in responses.values():
        del response["model"]
    return responses


FeedOf = Annotated[EventFeed, Depends(_feed)]
EventType = Literal["status", "metrics", "evaluation", "log"]
Types = Annotated[
    list[EventType] | None,
    Query(description="Only events of these types; repeat it for several.", examples=[["metrics", "evaluation"]]),
]
LastEventId = Annotated[
    int | None, Header(ge=0, le=MAX_SEQ, description="As `after`, which it overrides; clients send it that reconnect.")
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
    follow: Annotated[bool, Query(description="Whether to wait for what is yet to happen.")] = True,
    last_event_id: LastEventId = None,
) -> AsyncIterator[ServerSentEvent]:
    """Every event since the job was queued, then each new one; the stream ends with the job.

    `event` is status, metrics, evaluation or log; `data` is JSON, with the `job_id` and, as `at`, the time; `id`
    grows. A client that lost the connection, also to a restart of the service, sends the last id it saw as
    `Last-Event-ID` and misses nothing. While nothing happens, a comment every 15 seconds keeps the connection open.
    """
    seq = after if last_event_id is None else last_event_id
    read = partial(service.jobs.events, job.id, limit=BATCH)
    goes_on = follow and not job.status.terminal
    events = feed.follow(("job", job.id), read, seq) if goes_on else feed.history(read, seq)
    async with aclosing(events):
        async for event in events:
            if types is None or event.type in types:
                yield _sent(event)
            if goes_on and _ends_job(event):
                return


@router.get("/events", summary="Follow all jobs", response_class=EventSourceResponse, responses=_errors(422))
async def stream_events(
    service: ServiceOf,
    feed: FeedOf,
    after: Annotated[
        int | None,
        Query(ge=0, le=MAX_SEQ, description="Only events after this id, 0 for all there are; default: from now on."),
    ] = None,
    types: Types = None,
    last_event_id: LastEventId = None,
) -> AsyncIterator[ServerSentEvent]:
    """Every new event of any of your jobs, as `GET /jobs/{job_id}/events` sends them; `data.job_id` says whose.

    The stream goes on until the client closes it or the service stops. Ids grow over all jobs: a client that lost the
    connection sends the last id it saw as `Last-Event-ID` and misses nothing.
    """
    wanted = None if types is None else frozenset(types)
    read = partial(service.jobs.project_events, types=wanted, limit=BATCH)
    seq = after if last_event_id is None else last_event_id
    async with aclosing(feed.follow(("project", service.project), read, seq)) as events:
        async for event in events:
            if wanted is None or event.type in wanted:
                yield _sent(event)


def _sent(event: JobEvent) -> ServerSentEvent:
    data = {"job_id": event.job_id, "at": event.at.isoformat(), **event.data}
    return ServerSentEvent(data=data, event=event.type, id=str(event.seq))


def _ends_job(event: JobEvent) -> bool:
    return event.type == "status" and JobStatus(event.data["status"]).terminal
