"""Dispatch of chat requests to inference processes, and the errors when there is none."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from qlora_service.chat import dispatch
from qlora_service.chat.dispatch import (
    DEFAULT_RETRY_AFTER_S,
    MAX_RETRY_AFTER_S,
    ChatDispatcher,
    SlotUsage,
    refusal,
)
from qlora_service.chat.wire import (
    Answer,
    ContextTooLong,
    Finished,
    GenerationRequest,
    YieldingSlot,
    listen,
    rebuild_error,
)
from qlora_service.domain.jobs import JobStatus
from qlora_service.errors import NotFound, QLoRAError, QuotaExceeded, Unavailable
from qlora_service.store import inference
from qlora_service.store.database import Database
from qlora_service.store.inference import JobAhead
from tests.chat_process import ENDLESS, TINY, TOO_LONG, EchoProcess
from tests.control_plane import database

__all__ = ["database"]


def relayed(database: Database, text: str = "once more", preempts: bool = False) -> list[Answer]:
    """The lines that a new dispatcher relays."""

    async def collect() -> list[Answer]:
        dispatcher = ChatDispatcher(database, preempts=preempts)
        return [answer async for answer in dispatcher.answer(TINY, GenerationRequest(text=text), "local")]

    return asyncio.run(collect())


def test_lines_of_the_process_are_relayed(database: Database, tmp_path: Path) -> None:
    with EchoProcess(database.url, tmp_path / "inference"):
        lines = relayed(database)
    finished = Finished(reason="stop", prompt_tokens=7, completion_tokens=2)
    assert lines == [Answer(text="once"), Answer(text=" more"), Answer(finished=finished)]


def test_waiting_request_asks_for_its_base_and_is_answered_once_it_is_loaded(
    database: Database, tmp_path: Path
) -> None:
    async def load_late() -> list[Answer]:
        response = asyncio.create_task(asyncio.to_thread(relayed, database))
        while True:
            with database.read() as connection:
                requested = inference.requested_base(connection, "some worker")
            if requested is not None:
                break
            await asyncio.sleep(0.01)
        assert requested == TINY
        with EchoProcess(database.url, tmp_path / "inference"):
            return await response

    assert asyncio.run(load_late())[0] == Answer(text="once")


def test_socket_without_a_listener_is_removed(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "NO_WORKER_WAIT_S", 0.5)
    path = tmp_path / "inference" / "dead.sock"
    listen(path).close()
    with database.write() as connection:
        inference.request_base(connection, TINY)
        assert inference.assign_base(connection, TINY, "killed", str(path))
    with pytest.raises(Unavailable, match="no worker has loaded tiny"):
        relayed(database)
    with database.read() as connection:
        assert inference.socket_of(connection, TINY) is None


def test_process_that_is_leaving_gets_no_request(database: Database, tmp_path: Path) -> None:
    with ExitStack() as stack:
        leaving = stack.enter_context(EchoProcess(database.url, tmp_path / "first"))
        leaving.requests.drain(YieldingSlot("the slot is needed"))

        async def chat() -> list[Answer]:
            response = asyncio.create_task(asyncio.to_thread(relayed, database))
            await asyncio.sleep(0.5)
            stack.close()
            with EchoProcess(database.url, tmp_path / "second"):
                return await response

        assert asyncio.run(chat())[0] == Answer(text="once")
        assert leaving.received == []


def crashing_process(database: Database, path: Path, times: int) -> threading.Thread:
    """Accepts `times` requests for the base and closes each connection without an answer, as a killed process does."""
    listener = listen(path)
    with database.write() as connection:
        inference.request_base(connection, TINY)
        assert inference.assign_base(connection, TINY, "here", str(path))

    def close_connections() -> None:
        with listener:
            for _ in range(times):
                connection, _ = listener.accept()
                with connection:
                    assert connection.recv(1)

    thread = threading.Thread(target=close_connections)
    thread.start()
    return thread


def test_request_is_retried_after_a_process_dies_without_an_answer(database: Database, tmp_path: Path) -> None:
    dying = crashing_process(database, tmp_path / "first.sock", 1)

    async def chat() -> list[Answer]:
        response = asyncio.create_task(asyncio.to_thread(relayed, database))
        await asyncio.to_thread(dying.join)
        with EchoProcess(database.url, tmp_path / "second"):
            return await response

    assert asyncio.run(chat())[0] == Answer(text="once")


def test_request_that_two_processes_die_of_is_not_sent_to_a_third(database: Database, tmp_path: Path) -> None:
    dying = crashing_process(database, tmp_path / "x.sock", 2)
    with pytest.raises(Unavailable, match="has ended"):
        relayed(database)
    dying.join()


def test_chats_over_the_limit_are_refused(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MAX_CHATS", 0)
    with EchoProcess(database.url, tmp_path / "inference"), pytest.raises(QuotaExceeded):
        relayed(database)


def test_ended_chat_frees_its_place_whatever_its_outcome(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "MAX_CHATS", 1)

    async def chat() -> list[str | None]:
        dispatcher, texts = ChatDispatcher(database, preempts=False), []
        for text in (ENDLESS, TOO_LONG, "once"):
            answers = dispatcher.answer(TINY, GenerationRequest(text=text), "local")
            with suppress(ContextTooLong):
                texts.append((await anext(answers)).text)
                with pytest.raises(QuotaExceeded):
                    await anext(dispatcher.answer(TINY, GenerationRequest(text="meanwhile"), "local"))
            await answers.aclose()
        return texts

    with EchoProcess(database.url, tmp_path / "inference"):
        assert asyncio.run(chat()) == ["for", "once"]


@pytest.mark.parametrize("turns", range(4))
def test_cancellation_that_coincides_with_a_line_is_not_lost(turns: int) -> None:
    """Cancels `turns` turns of the event loop after the line arrives."""

    async def cancel() -> bool:
        client, server = socket.socketpair()
        with server:
            reader, writer = await asyncio.open_unix_connection(sock=client)

            async def read_lines() -> None:
                async for _ in dispatch._exchange(reader, writer, GenerationRequest(text=ENDLESS)):
                    pass

            reading = asyncio.create_task(read_lines())
            await asyncio.sleep(0.01)
            reader.feed_data(Answer(text="and").line())
            for _ in range(turns):
                await asyncio.sleep(0)
            reading.cancel()
            await asyncio.wait({reading}, timeout=2)
            writer.close()
            return reading.cancelled()

    assert asyncio.run(cancel())


def job_ahead(status: JobStatus = JobStatus.RUNNING, eta_s: float | None = 120.4, project: str = "local") -> JobAhead:
    return JobAhead("job_1", project, status, eta_s)


def test_refusal_names_the_job_and_its_eta() -> None:
    error = refusal(TINY, SlotUsage(job_ahead(), other_base=False), "local")
    assert "job job_1 is running" in error.message
    assert error.details == {"retry_after_s": 120, "eta_s": 120.4, "job_id": "job_1"}


def test_refusal_does_not_identify_a_job_of_another_project() -> None:
    error = refusal(TINY, SlotUsage(job_ahead(project="other"), other_base=False), "local")
    assert "job_1" not in str(error.as_dict())
    assert error.details["retry_after_s"] == 120


@pytest.mark.parametrize(
    ("eta_s", "retry_after_s"), [(None, DEFAULT_RETRY_AFTER_S), (0.0, 1), (1e9, MAX_RETRY_AFTER_S)]
)
def test_retry_after_is_capped(eta_s: float | None, retry_after_s: int) -> None:
    error = refusal(TINY, SlotUsage(job_ahead(eta_s=eta_s), other_base=False), "local")
    assert error.details["retry_after_s"] == retry_after_s


def test_refusal_names_a_queued_job_or_another_model() -> None:
    assert "is queued for the slot" in refusal(TINY, SlotUsage(job_ahead(JobStatus.QUEUED), False), "local").message
    assert "another model" in refusal(TINY, SlotUsage(None, other_base=True), "local").message


@pytest.mark.parametrize(
    "error", [ContextTooLong("long", location="prompt"), Unavailable("busy", retry_after_s=3), NotFound("gone")]
)
def test_rebuilt_error_equals_the_original(error: QLoRAError) -> None:
    rebuilt = rebuild_error(error.as_dict())
    assert type(rebuilt) is type(error)
    assert rebuilt.as_dict() == error.as_dict()
