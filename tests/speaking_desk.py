"""The desk where chats are answered, in this process: real sockets and lines, and a parrot in place of a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from qlora_service.chat.wire import ContextTooLong, Finished, GenerationRequest, Leaving, listen
from qlora_service.specs import Quantization
from qlora_service.store import inference
from qlora_service.store.database import Database
from qlora_service.store.inference import LoadedBase
from workers.inference.server import ClientGone, Desk, serve

TINY = LoadedBase("tiny", Quantization().model_dump_json())
TOO_LONG = "too long"
ENDLESS = "for ever"
BROKEN_OFF = "and then it"


class SpeakingDesk:
    """Answers for the base `tiny`: says what it is asked, word by word. A context manager."""

    def __init__(self, database_url: str, directory: Path, base: LoadedBase = TINY) -> None:
        self.asked: list[GenerationRequest] = []
        self.broken_off = threading.Event()
        self._database = Database(database_url)
        self._database.migrate()
        self._desk = Desk(listen(directory / "x.sock"))
        with self._database.write() as connection:
            inference.ask_for(connection, base)
            inference.take(connection, base, "here", str(directory / "x.sock"))

    def __enter__(self) -> Self:
        self._desk.loaded()
        self._desk.open()
        threading.Thread(target=serve, args=(self._desk, self._answer), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._database.write() as connection:
            inference.give_up(connection, "here")
        self._database.close()
        self._desk.leave(Leaving("the test is over"))
        self._desk.close()

    def _answer(self, request: GenerationRequest, show: Callable[[str], None]) -> Finished:
        self.asked.append(request)
        text = request.text if request.messages is None else str(request.messages[-1]["content"])
        if text == TOO_LONG:
            raise ContextTooLong("this model has room for 8 tokens", location="messages")
        words = text.split(" ")
        try:
            for number, word in enumerate(words):
                show(word if number == 0 else f" {word}")
            if text == BROKEN_OFF:
                raise ClientGone  # the connection is closed, as by the end of the process
            while text == ENDLESS:
                show(" and ever")
                self.broken_off.wait(0.01)
        except ClientGone:
            self.broken_off.set()
            raise
        return Finished(reason="stop", prompt_tokens=7, completion_tokens=len(words))
