"""How the API finds who answers, and what it says when nobody does."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from qlora_service.chat import reception
from qlora_service.chat.reception import MAX_RETRY_S, RETRY_S, Reception, Situation, refusal
from qlora_service.chat.wire import Answer, ContextTooLong, Finished, GenerationRequest, Leaving, as_error, listen
from qlora_service.domain.jobs import JobStatus
from qlora_service.errors import NotFound, QLoRAError, QuotaExceeded, Unavailable
from qlora_service.store import inference
from qlora_service.store.database import Database
from qlora_service.store.inference import Holder
from tests.chat_process import ENDLESS, TINY, TOO_LONG, EchoProcess
from tests.control_plane import database

__all__ = ["database"]


def answers(database: Database, text: str = "once more", preempts: bool = False) -> list[Answer]:
    """What a new reception passes on."""

    async def collect() -> list[Answer]:
        desk = Reception(database, preempts=preempts)
        return [answer async for answer in desk.answer(TINY, GenerationRequest(text=text), "local")]

    return asyncio.run(collect())


def test_what_the_process_says_is_passed_on(database: Database, tmp_path: Path) -> None:
    with EchoProcess(database.url, tmp_path / "inference"):
        heard = answers(database)
    finished = Finished(reason="stop", prompt_tokens=7, completion_tokens=2)
    assert heard == [Answer(text="once"), Answer(text=" more"), Answer(finished=finished)]


def test_who_waits_for_a_base_asks_for_it_and_is_answered_when_it_comes(database: Database, tmp_path: Path) -> None:
    async def come_late() -> list[Answer]:
        asking = asyncio.create_task(asyncio.to_thread(answers, database))
        while True:
            with database.read() as connection:
                wanted = inference.wanted_base(connection, "some worker")
            if wanted is not None:
                break
            await asyncio.sleep(0.01)
        assert wanted == TINY
        with EchoProcess(database.url, tmp_path / "inference"):
            return await asking

    assert asyncio.run(come_late())[0] == Answer(text="once")


def test_a_socket_that_nobody_listens_on_is_forgotten(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "NO_WORKER_S", 0.5)
    path = tmp_path / "inference" / "dead.sock"
    listen(path).close()
    with database.write() as connection:
        inference.ask_for(connection, TINY)
        assert inference.take(connection, TINY, "killed", str(path))
    with pytest.raises(Unavailable, match="no worker loads tiny"):
        answers(database)
    with database.read() as connection:
        assert inference.socket_of(connection, TINY) is None


def test_a_process_that_makes_room_before_it_begins_is_asked_nothing_more(database: Database, tmp_path: Path) -> None:
    with ExitStack() as stack:
        leaving = stack.enter_context(EchoProcess(database.url, tmp_path / "first"))
        leaving.requests.drain(Leaving("room is made"))

        async def ask() -> list[Answer]:
            asking = asyncio.create_task(asyncio.to_thread(answers, database))
            await asyncio.sleep(0.5)
            stack.close()
            with EchoProcess(database.url, tmp_path / "second"):
                return await asking

        assert asyncio.run(ask())[0] == Answer(text="once")
        assert leaving.received == []


def hanging_up(database: Database, path: Path, times: int) -> threading.Thread:
    """Takes so many requests for the base, and ends each before it says anything, as a process does that is killed."""
    listener = listen(path)
    with database.write() as connection:
        inference.ask_for(connection, TINY)
        assert inference.take(connection, TINY, "here", str(path))

    def hang_up() -> None:
        with listener:
            for _ in range(times):
                asked, _ = listener.accept()
                with asked:
                    assert asked.recv(1)

    thread = threading.Thread(target=hang_up)
    thread.start()
    return thread


def test_a_process_that_dies_before_it_says_anything_is_followed_by_another(database: Database, tmp_path: Path) -> None:
    dying = hanging_up(database, tmp_path / "first.sock", 1)

    async def ask() -> list[Answer]:
        asking = asyncio.create_task(asyncio.to_thread(answers, database))
        await asyncio.to_thread(dying.join)
        with EchoProcess(database.url, tmp_path / "second"):
            return await asking

    assert asyncio.run(ask())[0] == Answer(text="once")


def test_a_request_of_which_two_processes_die_is_not_sent_to_a_third(database: Database, tmp_path: Path) -> None:
    dying = hanging_up(database, tmp_path / "x.sock", 2)
    with pytest.raises(Unavailable, match="has ended"):
        answers(database)
    dying.join()


def test_too_many_chats_at_a_time_are_refused(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "MAX_CHATS", 0)
    with EchoProcess(database.url, tmp_path / "inference"), pytest.raises(QuotaExceeded):
        answers(database)


def test_a_chat_that_ended_however_it_did_makes_room_for_the_next(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "MAX_CHATS", 1)

    async def chat() -> list[str | None]:
        desk, said = Reception(database, preempts=False), []
        for text in (ENDLESS, TOO_LONG, "once"):
            answers = desk.answer(TINY, GenerationRequest(text=text), "local")
            with suppress(ContextTooLong):
                said.append((await anext(answers)).text)
                with pytest.raises(QuotaExceeded):
                    await anext(desk.answer(TINY, GenerationRequest(text="meanwhile"), "local"))
            await answers.aclose()
        return said

    with EchoProcess(database.url, tmp_path / "inference"):
        assert asyncio.run(chat()) == ["for", "once"]


@pytest.mark.parametrize("turns", range(4))
def test_who_hangs_up_as_a_line_arrives_hears_no_more(turns: int) -> None:
    """`turns` of the event loop after it."""

    async def hang_up() -> bool:
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_unix_connection(sock=ours)

            async def hear() -> None:
                async for _ in reception._talk(reader, writer, GenerationRequest(text=ENDLESS)):
                    pass

            hearing = asyncio.create_task(hear())
            await asyncio.sleep(0.01)
            reader.feed_data(Answer(text="and").line())
            for _ in range(turns):
                await asyncio.sleep(0)
            hearing.cancel()
            await asyncio.wait({hearing}, timeout=2)
            writer.close()
            return hearing.cancelled()

    assert asyncio.run(hang_up())


def holder(status: JobStatus = JobStatus.RUNNING, eta_s: float | None = 120.4, project: str = "local") -> Holder:
    return Holder("job_1", project, status, eta_s)


def test_a_refusal_names_the_job_and_its_eta() -> None:
    error = refusal(TINY, Situation(holder(), other_base=False), "local")
    assert "job job_1 is running" in error.message
    assert error.details == {"retry_after_s": 120, "eta_s": 120.4, "job_id": "job_1"}


def test_a_refusal_says_of_another_projects_job_only_that_it_is_there() -> None:
    error = refusal(TINY, Situation(holder(project="other"), other_base=False), "local")
    assert "job_1" not in str(error.as_dict())
    assert error.details["retry_after_s"] == 120


@pytest.mark.parametrize(("eta_s", "retry_after_s"), [(None, RETRY_S), (0.0, 1), (1e9, MAX_RETRY_S)])
def test_the_time_to_ask_again_is_capped(eta_s: float | None, retry_after_s: int) -> None:
    error = refusal(TINY, Situation(holder(eta_s=eta_s), other_base=False), "local")
    assert error.details["retry_after_s"] == retry_after_s


def test_a_refusal_says_what_else_stands_in_the_way() -> None:
    assert "waits for the slot" in refusal(TINY, Situation(holder(JobStatus.QUEUED), False), "local").message
    assert "another model" in refusal(TINY, Situation(None, other_base=True), "local").message


@pytest.mark.parametrize(
    "error", [ContextTooLong("long", location="prompt"), Unavailable("busy", retry_after_s=3), NotFound("gone")]
)
def test_an_error_comes_through_the_wire_as_it_was(error: QLoRAError) -> None:
    told = as_error(error.as_dict())
    assert type(told) is type(error)
    assert told.as_dict() == error.as_dict()
