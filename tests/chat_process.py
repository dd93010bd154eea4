"""The chat server of a worker, in this process: a real socket and protocol, with an echo in place of a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from qlora_service.chat.wire import ContextTooLong, Finished, GenerationRequest, YieldingSlot, listen
from qlora_service.specs import Quantization
from qlora_service.store import inference
from qlora_service.store.database import Database
from qlora_service.store.inference import LoadedBase
from workers.inference.server import ClientGone, RequestQueue, serve

TINY = LoadedBase("tiny", Quantization().model_dump_json())
TOO_LONG = "too long"
"""A text that is refused"""
ENDLESS = "for ever"
"""A text whose answer ends only when the client goes"""
BROKEN_OFF = "and then it"
"""A text whose answer ends in a closed connection"""


class EchoProcess:
    """Answers for the base `tiny` with the text of the request, word by word. A context manager."""

    def __init__(self, database_url: str, directory: Path, base: LoadedBase = TINY) -> None:
        self.received: list[GenerationRequest] = []
        self.client_gone = threading.Event()
        self._database = Database(database_url)
        self._database.migrate()
        self.requests = RequestQueue(listen(directory / "x.sock"))
        with self._database.write() as connection:
            inference.request_base(connection, base)
            inference.assign_base(connection, base, "here", str(directory / "x.sock"))

    def __enter__(self) -> Self:
        self.requests.finish_loading()
        self.requests.open()
        threading.Thread(target=serve, args=(self.requests, self._answer), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._database.write() as connection:
            inference.release_base(connection, "here")
        self._database.close()
        self.requests.drain(YieldingSlot("the test is over"))
        self.requests.close()

    def _answer(self, request: GenerationRequest, emit: Callable[[str], None]) -> Finished:
        self.received.append(request)
        text = request.text if request.messages is None else str(request.messages[-1]["content"])
        if text == TOO_LONG:
            raise ContextTooLong("this model has room for 8 tokens", location="messages")
        words = text.split(" ")
        try:
            for number, word in enumerate(words):
                emit(word if number == 0 else f" {word}")
            if text == BROKEN_OFF:
                raise ClientGone  # closes the connection, as the death of the process does
            while text == ENDLESS:
                emit(" and ever")
                self.client_gone.wait(0.01)
        except ClientGone:
            self.client_gone.set()
            raise
        return Finished(reason="stop", prompt_tokens=7, completion_tokens=len(words))
