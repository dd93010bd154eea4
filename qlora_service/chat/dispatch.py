"""Dispatch of chat requests: find or await the process that has the base model loaded, and relay its answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_service.chat.wire import (
    KEEPALIVE_S,
    MAX_LINE_BYTES,
    Answer,
    GenerationRequest,
    YieldingSlot,
    address,
    rebuild_error,
)
from qlora_service.domain.jobs import JobStatus
from qlora_service.errors import QuotaExceeded, Unavailable
from qlora_service.store import inference
from qlora_service.store.database import Database
from qlora_service.store.inference import JobAhead, LoadedBase

MAX_CHATS = 64
"""Requests in progress at a time, waiting ones included"""
POLL_S = 0.25
REQUEST_REFRESH_S = 2.0
"""Interval at which a waiting request renews its entry in the database; less than `inference.REQUEST_LIFETIME_S`"""
# How long a request waits for a process, by what blocks it. A worker with a free slot takes half a second.
JOB_WAIT_S = 2.0
PREEMPTED_JOB_WAIT_S = 120.0
OTHER_BASE_WAIT_S = 90.0
NO_WORKER_WAIT_S = 10.0
SILENCE_TIMEOUT_S = 60 * KEEPALIVE_S
DEFAULT_RETRY_AFTER_S = 30
"""Retry-After when it is not known when a slot will be free"""
MAX_RETRY_AFTER_S = 600


@dataclass(frozen=True)
class SlotUsage:
    """Possible reasons why a base model cannot be loaded now."""

    job: JobAhead | None
    """The job that holds a slot or is queued for one"""
    other_base: bool
    """Whether a process has another base model loaded"""


class ChatDispatcher:
    """Relays chat requests to the inference processes of one database. Use it in one event loop."""

    def __init__(self, database: Database, *, preempts: bool) -> None:
        """`preempts`: whether workers preempt jobs for chat."""
        self._database = database
        self._preempts = preempts
        self._chats = 0

    async def answer(self, base: LoadedBase, request: GenerationRequest, project: str) -> AsyncGenerator[Answer, None]:
        """The lines of the answer as they are generated: text, and at last `finished`.

        Closing the generator cancels the generation.

        Raises:
            Unavailable: no process loads the base, with the reason; or the process ended during the answer.
            QuotaExceeded: too many requests are in progress.
            InvalidRequest: the model cannot process the request; see `ContextTooLong`.
        """
        if self._chats >= MAX_CHATS:
            raise QuotaExceeded(f"{MAX_CHATS} chat requests are in progress already: retry in a moment")
        self._chats += 1
        has_begun = has_retried = False
        try:
            while True:
                try:
                    async with self._connection(base, project) as (reader, writer):
                        async for line in _exchange(reader, writer, request):
                            has_begun = True
                            yield line
                    return
                except YieldingSlot:
                    pass  # sent only before the first line of an answer
                except _ProcessEnded:
                    # The process may have been ending already: retry once. Not twice, because the request itself may
                    # crash the process.
                    if has_begun or has_retried:
                        raise
                    has_retried = True
                await asyncio.sleep(POLL_S)
        finally:
            self._chats -= 1

    @asynccontextmanager
    async def _connection(
        self, base: LoadedBase, project: str
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection to the process that has the base loaded, once there is one. Raises: Unavailable."""
        started, requested_at = time.monotonic(), 0.0
        while (streams := await self._connect(base)) is None:
            now = time.monotonic()
            if now - requested_at > REQUEST_REFRESH_S:
                requested_at = now
                await asyncio.to_thread(self._request_base, base)
            usage = await asyncio.to_thread(self._slot_usage, base)
            if now - started > self._max_wait_s(usage):
                raise refusal(base, usage, project)
            await asyncio.sleep(POLL_S)
        _, writer = streams
        try:
            yield streams
        finally:
            writer.close()

    async def _connect(self, base: LoadedBase) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        socket = await asyncio.to_thread(self._socket_of, base)
        if socket is None:
            return None
        try:
            with address(Path(socket)) as name:
                return await asyncio.open_unix_connection(name, limit=MAX_LINE_BYTES)
        except OSError:
            await asyncio.to_thread(self._remove_socket, socket)
            return None

    def _max_wait_s(self, usage: SlotUsage) -> float:
        if usage.job is not None:
            return PREEMPTED_JOB_WAIT_S if self._preempts else JOB_WAIT_S
        return OTHER_BASE_WAIT_S if usage.other_base else NO_WORKER_WAIT_S

    def _slot_usage(self, base: LoadedBase) -> SlotUsage:
        with self._database.read() as connection:
            return SlotUsage(inference.job_ahead(connection), inference.another_is_loaded(connection, base))

    def _socket_of(self, base: LoadedBase) -> str | None:
        with self._database.read() as connection:
            return inference.socket_of(connection, base)

    def _request_base(self, base: LoadedBase) -> None:
        with self._database.write() as connection:
            inference.request_base(connection, base)

    def _remove_socket(self, socket: str) -> None:
        with self._database.write() as connection:
            inference.forget_socket(connection, socket)


def refusal(base: LoadedBase, usage: SlotUsage, project: str) -> Unavailable:
    """The error for a request that no process serves: the reason, and when to retry.

    It does not identify a job of another project.
    """
    job = usage.job
    if job is not None:
        is_own = job.project == project
        label = f"job {job.id}" if is_own else "a job of another project"
        details: dict[str, Any] = {"job_id": job.id} if is_own else {}
        if job.status is JobStatus.QUEUED:
            message = f"{label} is queued for the slot, and jobs take precedence over chat: retry later"
            return Unavailable(message, retry_after_s=DEFAULT_RETRY_AFTER_S, **details)
        eta = "" if job.eta_s is None else f", with about {job.eta_s:.0f} s left"
        message = f"no slot is free for chat: {label} is running{eta}; retry when it has ended"
        return Unavailable(message, retry_after_s=_retry_after_s(job.eta_s), eta_s=job.eta_s, **details)
    if usage.other_base:
        message = "another model is loaded for chat, and no slot is free for a second one: retry later"
    else:
        message = (
            f"no worker has loaded {base.base_model}: check that a worker is running (`qlora serve`, or "
            "`python -m workers`)"
        )
    return Unavailable(message, retry_after_s=DEFAULT_RETRY_AFTER_S)


class _ProcessEnded(Unavailable):
    """The inference process ended before it had finished an answer."""


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: GenerationRequest
) -> AsyncGenerator[Answer, None]:
    """The lines with text, then the finished line. Raises: as `answer`; YieldingSlot, before the first line."""
    try:
        writer.write(request.line())
        while True:
            # Not `wait_for`: up to Python 3.11 it swallows a cancellation that coincides with a line.
            async with asyncio.timeout(SILENCE_TIMEOUT_S):
                line = await reader.readline()
            if not line.endswith(b"\n"):
                break
            answer = Answer.model_validate_json(line)
            if answer.error is not None:
                raise rebuild_error(answer.error)
            if answer.waiting is None:
                yield answer
            if answer.finished is not None:
                return
    except TimeoutError:
        raise Unavailable(
            f"the inference process has sent nothing for {SILENCE_TIMEOUT_S:.0f} s: retry after its supervisor has "
            "ended it",
            retry_after_s=DEFAULT_RETRY_AFTER_S,
        ) from None
    except OSError:
        pass
    raise _ProcessEnded(
        "the inference process has ended, to free the slot for a job or after a crash (see logs/inference-* of the "
        "worker): send the request again",
        retry_after_s=1,
    )


def _retry_after_s(eta_s: float | None) -> int:
    return DEFAULT_RETRY_AFTER_S if eta_s is None else max(1, min(round(eta_s), MAX_RETRY_AFTER_S))
