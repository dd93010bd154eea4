"""What the API does with a request to chat: find the process that has the base loaded, or wait for one; talk to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_service.chat.wire import BEAT_S, MAX_LINE_BYTES, Answer, GenerationRequest, Leaving, address, as_error
from qlora_service.domain.jobs import JobStatus
from qlora_service.errors import QuotaExceeded, Unavailable
from qlora_service.store import inference
from qlora_service.store.database import Database
from qlora_service.store.inference import Holder, LoadedBase

MAX_CHATS = 64
"""Requests that wait or are answered at a time"""
LOOK_S = 0.25
ASK_S = 2.0
"""How often who waits says so; less than `inference.WANTED_S`."""
# How long nobody may take a request up, by what stands in the way. A worker with a free slot needs half a second.
BEHIND_JOB_S = 2.0
BEHIND_PREEMPTED_JOB_S = 120.0
BEHIND_OTHER_BASE_S = 90.0
NO_WORKER_S = 10.0
SILENCE_S = 60 * BEAT_S
RETRY_S = 30
"""Where it is not known when a slot will be free"""
MAX_RETRY_S = 600


@dataclass(frozen=True)
class Situation:
    """Why there is no process that has the base loaded."""

    job: Holder | None
    other_base: bool


class _Ended(Unavailable):
    """The process has ended in the middle of the talk."""


class Reception:
    """Over one database and data directory; to be used in one event loop."""

    def __init__(self, database: Database, *, preempts: bool) -> None:
        """`preempts`: whether workers have jobs make way for chats."""
        self._database = database
        self._preempts = preempts
        self._chats = 0

    async def answer(self, base: LoadedBase, request: GenerationRequest, project: str) -> AsyncGenerator[Answer, None]:
        """The answer's lines with text as they come, and then the finished one.

        Closing the iterator ends the generation.

        Raises:
            Unavailable: nobody has the base loaded, for the reason given; or who had it has ended.
            QuotaExceeded: too many wait already.
            InvalidRequest: the model cannot take this; see `ContextTooLong`.
        """
        if self._chats >= MAX_CHATS:
            raise QuotaExceeded(f"{MAX_CHATS} chats wait already: send the request again in a moment")
        self._chats += 1
        is_begun = was_left = False
        try:
            while True:
                try:
                    async with self._connection(base, project) as reader_writer:
                        async for line in _talk(*reader_writer, request):
                            is_begun = True
                            yield line
                    return
                except Leaving:
                    pass  # a process that makes room says so before it has said anything else
                except _Ended:
                    # It may have been dying as it was asked. A second one may be dying of what it is asked.
                    if is_begun or was_left:
                        raise
                    was_left = True
                await asyncio.sleep(LOOK_S)
        finally:
            self._chats -= 1

    @asynccontextmanager
    async def _connection(
        self, base: LoadedBase, project: str
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection to the process that has the base, or will have. Raises: Unavailable."""
        began, asked_at = time.monotonic(), 0.0
        while (opened := await self._open(base)) is None:
            now = time.monotonic()
            if now - asked_at > ASK_S:
                asked_at = now
                await asyncio.to_thread(self._ask_for, base)
            situation = await asyncio.to_thread(self._situation, base)
            if now - began > self._patience_s(situation):
                raise refusal(base, situation, project)
            await asyncio.sleep(LOOK_S)
        _, writer = opened
        try:
            yield opened
        finally:
            writer.close()

    async def _open(self, base: LoadedBase) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        socket = await asyncio.to_thread(self._socket_of, base)
        if socket is None:
            return None
        try:
            with address(Path(socket)) as name:
                return await asyncio.open_unix_connection(name, limit=MAX_LINE_BYTES)
        except OSError:
            await asyncio.to_thread(self._forget, socket)
            return None

    def _patience_s(self, situation: Situation) -> float:
        if situation.job is not None:
            return BEHIND_PREEMPTED_JOB_S if self._preempts else BEHIND_JOB_S
        return BEHIND_OTHER_BASE_S if situation.other_base else NO_WORKER_S

    def _situation(self, base: LoadedBase) -> Situation:
        with self._database.read() as connection:
            return Situation(inference.job_ahead(connection), inference.another_is_loaded(connection, base))

    def _socket_of(self, base: LoadedBase) -> str | None:
        with self._database.read() as connection:
            return inference.socket_of(connection, base)

    def _ask_for(self, base: LoadedBase) -> None:
        with self._database.write() as connection:
            inference.ask_for(connection, base)

    def _forget(self, socket: str) -> None:
        with self._database.write() as connection:
            inference.forget(connection, socket)


def refusal(base: LoadedBase, situation: Situation, project: str) -> Unavailable:
    """Why nobody answers, and when to ask again; of another project's job nothing but that it is there."""
    job = situation.job
    if job is not None:
        is_mine = job.project == project
        which = f"job {job.id}" if is_mine else "a job of another project"
        known: dict[str, Any] = {"job_id": job.id} if is_mine else {}
        if job.status is JobStatus.QUEUED:
            message = f"{which} waits for the slot, and jobs come first: ask again"
            return Unavailable(message, retry_after_s=RETRY_S, **known)
        eta = "" if job.eta_s is None else f", which has some {job.eta_s:.0f} s to go"
        message = f"no slot is free to chat: {which} is running{eta}; ask again when it has ended"
        return Unavailable(message, retry_after_s=_retry_after_s(job.eta_s), eta_s=job.eta_s, **known)
    if situation.other_base:
        message = "another model is being chatted with, and there is no slot for one more: ask again"
    else:
        message = f"no worker loads {base.base_model}: see that one is running (`qlora serve`, or `python -m workers`)"
    return Unavailable(message, retry_after_s=RETRY_S)


def _retry_after_s(eta_s: float | None) -> int:
    return RETRY_S if eta_s is None else max(1, min(round(eta_s), MAX_RETRY_S))


async def _talk(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: GenerationRequest
) -> AsyncGenerator[Answer, None]:
    """The lines that hold something of the answer. Raises: as `Reception.answer`; Leaving, before the first of them."""
    try:
        writer.write(request.line())
        while True:
            # Not `wait_for`: up to Python 3.11 it swallows a cancellation that meets a line.
            async with asyncio.timeout(SILENCE_S):
                line = await reader.readline()
            if not line.endswith(b"\n"):
                break
            answer = Answer.model_validate_json(line)
            if answer.error is not None:
                raise as_error(answer.error)
            if answer.waiting is None:
                yield answer
            if answer.finished is not None:
                return
    except TimeoutError:
        raise Unavailable(
            "the process that has the model loaded stands still: ask again, and its supervisor will have ended it",
            retry_after_s=RETRY_S,
        ) from None
    except OSError:
        pass
    raise _Ended(
        "the process that had the model loaded has ended, to make room for a job or because it died (logs/inference-*"
        " of the worker says more): send the request again",
        retry_after_s=1,
    )
