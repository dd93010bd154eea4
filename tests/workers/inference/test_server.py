"""The chat server over a real socket, with a function in place of a model."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_service.chat.wire import (
    STATUS,
    Answer,
    Finished,
    GenerationRequest,
    Status,
    YieldingSlot,
    address,
    listen,
    query_status,
)
from qlora_service.errors import InvalidRequest
from qlora_service.store.inference import LoadedBase
from tests.workspace import ROOT
from workers.inference.server import MAX_QUEUED, ClientGone, RequestQueue, serve
from workers.supervisor_channel import ChatTurn

FINISHED = Finished(reason="stop", prompt_tokens=1, completion_tokens=1)
Generate = Callable[[GenerationRequest, Callable[[str], None]], Finished]


class Client:
    """A connection to the server, with its request sent."""

    def __init__(self, path: Path, text: str = "hello") -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(10)
        with address(path) as name:
            self._socket.connect(name)
        self._socket.sendall(GenerationRequest(text=text).line())
        self._lines = self._socket.makefile("rb")

    def answers(self) -> list[Answer]:
        """The messages until the server closes the connection, without those that report waiting."""
        answers = [Answer.model_validate_json(line) for line in self._lines]
        return [answer for answer in answers if answer.waiting is None]

    def next(self) -> Answer:
        return Answer.model_validate_json(self._lines.readline())

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "inference" / "x.sock"


@pytest.fixture
def requests(path: Path) -> Iterator[RequestQueue]:
    requests = RequestQueue(listen(path))
    requests.open()
    yield requests
    requests.drain(YieldingSlot("the test is over"))
    requests.close()


@pytest.fixture
def start_serving(requests: RequestQueue) -> Callable[[Generate], threading.Thread]:
    """Starts a thread that answers the queue's requests with a function."""

    def start(generate: Generate) -> threading.Thread:
        requests.finish_loading()
        thread = threading.Thread(target=serve, args=(requests, generate), daemon=True)
        thread.start()
        return thread

    return start


def echo(request: GenerationRequest, emit: Callable[[str], None]) -> Finished:
    for word in request.text.split():
        emit(word)
    return FINISHED


def wait_until(path: Path, condition: Callable[[Status], bool]) -> Status:
    deadline = time.monotonic() + 10
    while True:
        status = query_status(path, 5)
        assert status is not None
        if condition(status):
            return status
        assert time.monotonic() < deadline, status
        time.sleep(0.01)


def test_each_client_receives_the_pieces_and_the_end_of_its_answer(
    path: Path, start_serving: Callable[[Generate], threading.Thread]
) -> None:
    start_serving(echo)
    clients = [Client(path, f"answer {number}") for number in range(5)]
    for number, client in enumerate(clients):
        assert client.answers() == [Answer(text="answer"), Answer(text=f"{number}"), Answer(finished=FINISHED)]
        client.close()


def test_waiting_clients_are_notified_of_what_they_wait_for(
    path: Path, start_serving: Callable[[Generate], threading.Thread]
) -> None:
    waiting, resume = Client(path), threading.Event()
    assert waiting.next() == Answer(waiting="loading")

    def slowly(request: GenerationRequest, emit: Callable[[str], None]) -> Finished:
        resume.wait(10)
        return echo(request, emit)

    start_serving(slowly)
    wait_until(path, lambda status: status.busy)
    second = Client(path)
    assert second.next() == Answer(waiting="in line")
    # It may receive another notice of waiting first.
    places = (answer.waiting for answer in iter(waiting.next, None))
    assert next(place for place in places if place not in {"loading", "in line"}) == "generating"
    resume.set()
    for client in (waiting, second):
        assert client.answers()[-1] == Answer(finished=FINISHED)
        client.close()
    status = wait_until(path, lambda status: not status.busy)
    assert (status.loading, status.in_line, status.served) == (False, 0, 2)


def test_a_client_that_disconnects_ends_the_generation(
    path: Path, start_serving: Callable[[Generate], threading.Thread]
) -> None:
    stopped = threading.Event()

    def endless(request: GenerationRequest, emit: Callable[[str], None]) -> Finished:
        if request.text != "for ever":
            return echo(request, emit)
        emit("begun")
        while True:
            time.sleep(0.01)
            try:
                emit("")  # as for a token that completes no character
            except ClientGone:
                stopped.set()
                raise

    start_serving(endless)
    gone, follower = Client(path, "for ever"), Client(path)
    assert gone.next() == Answer(text="begun")
    gone.close()
    assert stopped.wait(10)
    assert follower.answers()[-1] == Answer(finished=FINISHED)
    follower.close()


def test_a_queued_request_whose_client_disconnected_is_not_begun(
    path: Path, start_serving: Callable[[Generate], threading.Thread]
) -> None:
    gone = Client(path, "gone")
    wait_until(path, lambda status: status.in_line == 1)
    gone.close()
    begun = []

    def record(request: GenerationRequest, emit: Callable[[str], None]) -> Finished:
        begun.append(request.text)
        return echo(request, emit)

    start_serving(record)
    client = Client(path)
    client.answers()
    client.close()
    assert begun == ["hello"]


def test_a_request_to_a_full_queue_is_refused(path: Path, requests: RequestQueue) -> None:
    clients = []
    for number in range(MAX_QUEUED):
        clients.append(Client(path))
        wait_until(path, lambda status, number=number: status.in_line == number + 1)
    late = Client(path)
    (refused,) = late.answers()
    assert refused.error is not None
    assert refused.error["code"] == "quota_exceeded"
    for client in [*clients, late]:
        client.close()


def test_an_error_is_sent_and_the_next_request_is_answered(
    path: Path, start_serving: Callable[[Generate], threading.Thread]
) -> None:
    def choosy(request: GenerationRequest, emit: Callable[[str], None]) -> Finished:
        if request.text == "bad":
            raise InvalidRequest("not that", location="prompt")
        return echo(request, emit)

    start_serving(choosy)
    bad, good = Client(path, "bad"), Client(path)
    (refused,) = bad.answers()
    assert refused.error is not None
    assert (refused.error["code"], refused.error["location"]) == ("invalid_request", "prompt")
    assert good.answers()[-1] == Answer(finished=FINISHED)
    bad.close()
    good.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_unexpected_error_is_sent_without_its_text_and_ends_the_process(
    path: Path, start_serving: Callable[[Generate], threading.Thread]
) -> None:
    def broken(_: GenerationRequest, __: Callable[[str], None]) -> Finished:
        raise RuntimeError("the text of a conversation")

    thread = start_serving(broken)
    client = Client(path)
    (answer,) = client.answers()
    assert answer.error is not None
    assert answer.error["code"] == "internal_error"
    assert "conversation" not in answer.error["message"]
    thread.join(10)
    assert not thread.is_alive()
    client.close()


def test_draining_finishes_the_current_answer_and_refuses_the_others(
    path: Path, requests: RequestQueue, start_serving: Callable[[Generate], threading.Thread]
) -> None:
    resume = threading.Event()

    def slowly(request: GenerationRequest, emit: Callable[[str], None]) -> Finished:
        resume.wait(10)
        return echo(request, emit)

    thread = start_serving(slowly)
    begun = Client(path)
    wait_until(path, lambda status: status.busy)
    waiting = Client(path)
    wait_until(path, lambda status: status.in_line == 1)
    requests.drain(YieldingSlot("the slot is needed"))
    late = Client(path)
    for client in (waiting, late):
        (answer,) = client.answers()
        assert answer.error is not None
        assert answer.error["code"] == "leaving"
        client.close()
    resume.set()
    assert begun.answers()[-1] == Answer(finished=FINISHED)
    begun.close()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("sent", [b"no json\n", b'{"sampling": 3}\n', b""])
def test_an_invalid_request_closes_the_connection(path: Path, requests: RequestQueue, sent: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection, address(path) as name:
        connection.settimeout(10)
        connection.connect(name)
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""


def test_a_load_error_is_sent_to_waiting_clients_and_ends_the_process(path: Path, tmp_path: Path) -> None:
    parent_end, child_end = socket.socketpair()
    with parent_end, listen(path) as listener:
        waiting = Client(path)
        process = subprocess.Popen(
            [sys.executable, "-m", "workers.trainer", "cpu"],
            cwd=ROOT,
            env=os.environ | {"QLORA_DATA_DIR": str(tmp_path / "data")},
            stdin=child_end.fileno(),
            stderr=subprocess.DEVNULL,
        )
        child_end.close()
        ChatTurn(LoadedBase("unknown", "{}"), listener, tmp_path / "inference.log").send(parent_end)
        listener.close()
        (answer,) = waiting.answers()
        waiting.close()
        assert answer.error is not None
        assert answer.error["code"] == "invalid_model"
        assert process.wait(10) == 0
    assert "base_not_loaded" in (tmp_path / "inference.log").read_text()


def test_a_closing_server_answers_connections_already_made_and_refuses_new_ones(path: Path) -> None:
    requests = RequestQueue(listen(path))
    early = Client(path)
    requests.drain(YieldingSlot("the slot is needed"))
    requests.open()
    requests.close()
    (answer,) = early.answers()
    assert answer.error is not None
    assert answer.error["code"] == "leaving"
    early.close()
    with socket.socket(socket.AF_UNIX) as late, address(path) as name, pytest.raises(ConnectionRefusedError):
        late.connect(name)


def test_the_socket_belongs_to_its_owner_however_deep_its_directory(tmp_path: Path) -> None:
    path = tmp_path / ("deep" * 20) / ("deeper" * 20) / "x.sock"
    path.parent.parent.mkdir()
    with listen(path) as listener:
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        with socket.socket(socket.AF_UNIX) as connection, address(path) as name:
            connection.connect(name)
            connection.sendall(STATUS)
            accepted, _ = listener.accept()
            with accepted:
                assert accepted.recv(100) == STATUS
    assert query_status(path, 1) is None
