"""The desk where chats are answered, over a real socket; what it has to say comes from a function here."""

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
    Leaving,
    Status,
    address,
    ask_status,
    listen,
)
from qlora_service.errors import InvalidRequest
from qlora_service.store.inference import LoadedBase
from tests.workspace import ROOT
from workers.inference.server import MAX_IN_LINE, ClientGone, Desk, serve
from workers.supervisor_channel import ChatTurn

FINISHED = Finished(reason="stop", prompt_tokens=1, completion_tokens=1)
Generate = Callable[[GenerationRequest, Callable[[str], None]], Finished]


class Visit:
    """A connection to the desk, with its request sent."""

    def __init__(self, path: Path, text: str = "hello") -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(10)
        with address(path) as name:
            self._socket.connect(name)
        self._socket.sendall(GenerationRequest(text=text).line())
        self._lines = self._socket.makefile("rb")

    def answers(self) -> list[Answer]:
        """What comes until the line ends, but for signs of life."""
        answers = [Answer.model_validate_json(line) for line in self._lines]
        return [answer for answer in answers if answer.waiting is None]

    def next(self) -> Answer:
        return Answer.model_validate_json(self._lines.readline())

    def leave(self) -> None:
        self._lines.close()
        self._socket.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "inference" / "x.sock"


@pytest.fixture
def desk(path: Path) -> Iterator[Desk]:
    desk = Desk(listen(path))
    desk.open()
    yield desk
    desk.leave(Leaving("the test is over"))
    desk.close()


@pytest.fixture
def working(desk: Desk) -> Callable[[Generate], threading.Thread]:
    """Has the desk's requests answered by a function, in a thread."""

    def start(generate: Generate) -> threading.Thread:
        desk.loaded()
        thread = threading.Thread(target=serve, args=(desk, generate), daemon=True)
        thread.start()
        return thread

    return start


def echo(request: GenerationRequest, show: Callable[[str], None]) -> Finished:
    for word in request.text.split():
        show(word)
    return FINISHED


def until(path: Path, condition: Callable[[Status], bool]) -> Status:
    deadline = time.monotonic() + 10
    while True:
        status = ask_status(path, 5)
        assert status is not None
        if condition(status):
            return status
        assert time.monotonic() < deadline, status
        time.sleep(0.01)


def test_pieces_and_an_end_are_sent_to_each_in_turn(
    path: Path, working: Callable[[Generate], threading.Thread]
) -> None:
    working(echo)
    visits = [Visit(path, f"answer {number}") for number in range(5)]
    for number, visit in enumerate(visits):
        assert visit.answers() == [Answer(text="answer"), Answer(text=f"{number}"), Answer(finished=FINISHED)]
        visit.leave()


def test_who_waits_is_told_for_what(path: Path, working: Callable[[Generate], threading.Thread]) -> None:
    waiting, go_on = Visit(path), threading.Event()
    assert waiting.next() == Answer(waiting="loading")

    def slowly(request: GenerationRequest, show: Callable[[str], None]) -> Finished:
        go_on.wait(10)
        return echo(request, show)

    working(slowly)
    until(path, lambda status: status.busy)
    second = Visit(path)
    assert second.next() == Answer(waiting="in line")
    # It may have been told once more that it waits, before.
    places = (answer.waiting for answer in iter(waiting.next, None))
    assert next(place for place in places if place not in {"loading", "in line"}) == "generating"
    go_on.set()
    for visit in (waiting, second):
        assert visit.answers()[-1] == Answer(finished=FINISHED)
        visit.leave()
    status = until(path, lambda status: not status.busy)
    assert (status.loading, status.in_line, status.served) == (False, 0, 2)


def test_who_goes_away_ends_the_generation(path: Path, working: Callable[[Generate], threading.Thread]) -> None:
    stopped = threading.Event()

    def endless(request: GenerationRequest, show: Callable[[str], None]) -> Finished:
        if request.text != "for ever":
            return echo(request, show)
        show("begun")
        while True:
            time.sleep(0.01)
            try:
                show("")  # as between the tokens of a character
            except ClientGone:
                stopped.set()
                raise

    working(endless)
    gone, follower = Visit(path, "for ever"), Visit(path)
    assert gone.next() == Answer(text="begun")
    gone.leave()
    assert stopped.wait(10)
    assert follower.answers()[-1] == Answer(finished=FINISHED)
    follower.leave()


def test_a_request_that_was_given_up_in_line_is_not_begun(
    path: Path, working: Callable[[Generate], threading.Thread]
) -> None:
    gone = Visit(path, "gone")
    until(path, lambda status: status.in_line == 1)
    gone.leave()
    begun = []

    def note(request: GenerationRequest, show: Callable[[str], None]) -> Finished:
        begun.append(request.text)
        return echo(request, show)

    working(note)
    visit = Visit(path)
    visit.answers()
    visit.leave()
    assert begun == ["hello"]


def test_a_line_that_is_full_is_said_to_be(path: Path, desk: Desk) -> None:
    visits = []
    for number in range(MAX_IN_LINE):
        visits.append(Visit(path))
        until(path, lambda status, number=number: status.in_line == number + 1)
    late = Visit(path)
    (refused,) = late.answers()
    assert refused.error is not None
    assert refused.error["code"] == "quota_exceeded"
    for visit in [*visits, late]:
        visit.leave()


def test_an_error_is_told_and_the_next_request_answered(
    path: Path, working: Callable[[Generate], threading.Thread]
) -> None:
    def choosy(request: GenerationRequest, show: Callable[[str], None]) -> Finished:
        if request.text == "bad":
            raise InvalidRequest("not that", location="prompt")
        return echo(request, show)

    working(choosy)
    bad, good = Visit(path, "bad"), Visit(path)
    (refused,) = bad.answers()
    assert refused.error is not None
    assert (refused.error["code"], refused.error["location"]) == ("invalid_request", "prompt")
    assert good.answers()[-1] == Answer(finished=FINISHED)
    bad.leave()
    good.leave()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_is_told_without_its_text_and_ends_the_process(
    path: Path, working: Callable[[Generate], threading.Thread]
) -> None:
    def broken(_: GenerationRequest, __: Callable[[str], None]) -> Finished:
        raise RuntimeError("the text of a conversation")

    thread = working(broken)
    visit = Visit(path)
    (told,) = visit.answers()
    assert told.error is not None
    assert told.error["code"] == "internal_error"
    assert "conversation" not in told.error["message"]
    thread.join(10)
    assert not thread.is_alive()
    visit.leave()


def test_leaving_lets_what_has_begun_end_and_sends_the_others_away(
    path: Path, desk: Desk, working: Callable[[Generate], threading.Thread]
) -> None:
    go_on = threading.Event()

    def slowly(request: GenerationRequest, show: Callable[[str], None]) -> Finished:
        go_on.wait(10)
        return echo(request, show)

    thread = working(slowly)
    begun = Visit(path)
    until(path, lambda status: status.busy)
    waiting = Visit(path)
    until(path, lambda status: status.in_line == 1)
    desk.leave(Leaving("room is made"))
    late = Visit(path)
    for visit in (waiting, late):
        (told,) = visit.answers()
        assert told.error is not None
        assert told.error["code"] == "leaving"
        visit.leave()
    go_on.set()
    assert begun.answers()[-1] == Answer(finished=FINISHED)
    begun.leave()
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("sent", [b"no json\n", b'{"sampling": 3}\n', b""])
def test_what_is_no_request_is_hung_up_on(path: Path, desk: Desk, sent: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection, address(path) as name:
        connection.settimeout(10)
        connection.connect(name)
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(100) == b""


def test_a_base_that_cannot_be_loaded_is_told_to_who_waits_and_ends_the_process(path: Path, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, listen(path) as listener:
        waiting = Visit(path)
        process = subprocess.Popen(
            [sys.executable, "-m", "workers.trainer", "cpu"],
            cwd=ROOT,
            env=os.environ | {"QLORA_DATA_DIR": str(tmp_path / "data")},
            stdin=theirs.fileno(),
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        ChatTurn(LoadedBase("nobody", "{}"), listener, tmp_path / "inference.log").send(ours)
        listener.close()
        (told,) = waiting.answers()
        waiting.leave()
        assert told.error is not None
        assert told.error["code"] == "invalid_model"
        assert process.wait(10) == 0
    assert "base_not_loaded" in (tmp_path / "inference.log").read_text()


def test_a_desk_that_closes_refuses_who_comes_and_tells_who_was_at_the_door(path: Path) -> None:
    desk = Desk(listen(path))
    at_the_door = Visit(path)
    desk.leave(Leaving("room is made"))
    desk.open()
    desk.close()
    (told,) = at_the_door.answers()
    assert told.error is not None
    assert told.error["code"] == "leaving"
    at_the_door.leave()
    with socket.socket(socket.AF_UNIX) as late, address(path) as name, pytest.raises(ConnectionRefusedError):
        late.connect(name)


def test_the_socket_is_its_owners_alone_however_deep_it_lies(tmp_path: Path) -> None:
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
    assert ask_status(path, 1) is None
