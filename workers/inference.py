"""The inference process: `python -m workers.inference BASE_MODEL QUANTIZATION DEVICE SOCKET`.

It imports torch, loads a base once and answers chats on the listening socket that it inherits (SOCKET is the file
descriptor), one at a time, until a line on its stdin asks it to leave. When stdin closes, its supervisor is gone, and
it ends at once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

# Before the libraries read them: no network, no progress bars, no forked tokenizer threads.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "true"

import structlog
from pydantic import ValidationError

from qlora_service.artifacts.store import ArtifactStore
from qlora_service.chat.wire import (
    BEAT_S,
    MAX_LINE_BYTES,
    STATUS,
    Answer,
    Finished,
    GenerationRequest,
    Leaving,
    Line,
    Place,
    Status,
)
from qlora_service.errors import QLoRAError, QuotaExceeded, Unavailable
from qlora_service.logs import configure_logging
from qlora_service.models.catalog import Catalog
from qlora_service.models.quantized_cache import QuantizedCache
from qlora_service.models.staging import reap_stale, staging_directory
from qlora_service.settings import Settings
from qlora_service.specs import Quantization
from qlora_service.torch_process import end_process, importing_torch
from workers.exit_codes import SUPERVISOR_GONE

if TYPE_CHECKING:
    from workers.inference_engine import Engine

MAX_IN_LINE = 16
LINGER_S = 0.5
"""How long a process whose base cannot be loaded stays to say so to those at its door."""
RECEIPT_S = 10.0
"""A request has arrived within this time: it comes from this machine."""
SEND_S = 30.0
"""Who takes nothing for so long is gone."""

Show = Callable[[str], None]
log = structlog.get_logger()


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Visitor:
    """A connection with a request; lines to it may be sent by several threads."""

    def __init__(self, connection: socket.socket, request: GenerationRequest) -> None:
        self.request = request
        self.begun = False
        self.ended = threading.Event()
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, line: Line) -> None:
        """Raises: ClientGone."""
        try:
            with self._sending:
                self._connection.sendall(line.line())
        except OSError:
            raise ClientGone from None

    def show(self, text: str) -> None:
        """Send a piece of the answer, if it is one. Raises: ClientGone, also when there is nothing to send."""
        if text:
            self.send(Answer(text=text))
        elif self.has_left():
            raise ClientGone

    def has_left(self) -> bool:
        """Whether the other side has closed the connection; it sends nothing after its request."""
        readable, _, _ = select.select([self._connection], [], [], 0)
        return bool(readable)

    def dismiss(self, error: QLoRAError) -> None:
        """Say why there is no answer, or no more of it, and end."""
        with contextlib.suppress(ClientGone):
            self.send(Answer(error=error.as_dict()))
        self.close()

    def close(self) -> None:
        self.ended.set()
        self._connection.close()


class Desk:
    """Takes requests from the socket, lets them wait in line, and gives them out one by one."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._line: queue.Queue[Visitor | None] = queue.Queue(MAX_IN_LINE)
        self._entering = threading.Lock()
        self._leaving: QLoRAError | None = None
        self._loading, self._busy, self._served = True, False, 0
        self._sign_at = time.monotonic()

    def open(self) -> None:
        """From now on connections are taken, and the supervisor is listened to."""
        threading.Thread(target=self._accept, name="accept", daemon=True).start()
        threading.Thread(target=self._obey_supervisor, name="supervisor", daemon=True).start()

    def loaded(self) -> None:
        """Requests can be answered now."""
        self._loading = False
        self.progressed()

    def progressed(self) -> None:
        """A sign of progress."""
        self._sign_at = time.monotonic()

    def next(self) -> Visitor | None:
        """Whose turn it is, waited for; None when it is time to leave."""
        self._busy = False
        self.progressed()
        visitor = self._line.get()
        if visitor is not None:
            self._busy, self._served = True, self._served + 1
            self.progressed()
            visitor.begun = True
        return visitor

    def leave(self, why: QLoRAError) -> None:
        """Begin nothing more: who waits or comes is told `why`, what has begun is finished."""
        with self._entering:
            self._leaving = why
            while True:
                try:
                    waiting = self._line.get_nowait()
                except queue.Empty:
                    break
                if waiting is not None:
                    waiting.dismiss(why)
            self._line.put(None)

    def _obey_supervisor(self) -> None:
        # It holds the other end: a byte asks us to leave; reading ends when it is gone, however it went.
        while os.read(0, 1):
            self.leave(Leaving("the process makes room: ask anew"))
            if self._loading:
                os._exit(0)
        os._exit(SUPERVISOR_GONE)

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._receive, args=(connection,), name="visitor", daemon=True).start()

    def _receive(self, connection: socket.socket) -> None:
        connection.settimeout(RECEIPT_S)
        try:
            with connection.makefile("rb") as incoming:
                line = incoming.readline(MAX_LINE_BYTES)
            connection.settimeout(SEND_S)
            if line == STATUS:
                connection.sendall(self._status().line())
                connection.close()
                return
            visitor = Visitor(connection, GenerationRequest.model_validate_json(line))
        except (OSError, ValidationError):
            connection.close()
            return
        self._wait_in_line(visitor)

    def _status(self) -> Status:
        return Status(
            loading=self._loading,
            busy=self._busy,
            in_line=self._line.qsize(),
            served=self._served,
            quiet_s=time.monotonic() - self._sign_at,
        )

    def _wait_in_line(self, visitor: Visitor) -> None:
        with self._entering:
            if self._leaving is not None:
                visitor.dismiss(self._leaving)
                return
            try:
                self._line.put_nowait(visitor)
            except queue.Full:
                busy = QuotaExceeded(f"{MAX_IN_LINE} chats wait already: send the request again in a moment")
                visitor.dismiss(busy)
                return
        with contextlib.suppress(ClientGone):
            while not visitor.ended.wait(BEAT_S):
                visitor.send(Answer(waiting=self._place_of(visitor)))

    def _place_of(self, visitor: Visitor) -> Place:
        if self._loading:
            return "loading"
        return "generating" if visitor.begun else "in line"


def serve(desk: Desk, generate: Callable[[GenerationRequest, Show], Finished]) -> None:
    """Answer requests until it is time to leave; a defect ends the process, which it may have left in any state."""
    while (visitor := desk.next()) is not None:
        try:
            if not visitor.has_left():
                visitor.send(Answer(finished=generate(visitor.request, partial(_show, desk, visitor))))
        except ClientGone:
            log.info("client_gone")
        except QLoRAError as error:
            visitor.dismiss(error)
        except Exception:
            visitor.dismiss(QLoRAError("the model failed at this; the log of the process that ran it has the details"))
            raise
        finally:
            visitor.close()


def _show(desk: Desk, visitor: Visitor, text: str) -> None:
    desk.progressed()
    visitor.show(text)


def load(base_model: str, quantization: str, device: str, scratch: Path, settings: Settings) -> Engine:
    """The base on the device. Raises: QLoRAError."""
    base = Catalog(settings.models_dir).get(base_model)  # before torch is imported, which takes seconds
    with importing_torch():
        from transformers.utils.logging import disable_progress_bar

        from qlora_service.training.device import is_out_of_memory
        from workers.inference_engine import Engine

    disable_progress_bar()  # a log is no terminal
    try:
        return Engine(
            base,
            Quantization.model_validate_json(quantization),
            ArtifactStore(settings.resolved_artifact_url),
            scratch,
            cache=QuantizedCache(settings.cache_dir, settings.cache_bytes),
            needs_gpu=device == "cuda",
        )
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise Unavailable(f"the device has not enough memory for {base_model}: use a smaller base model") from error


def main(base_model: str, quantization: str, device: str, listener: socket.socket, settings: Settings) -> None:
    """Load the base and answer until asked to leave."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    desk = Desk(listener)
    desk.open()
    began = time.monotonic()
    reap_stale(settings.tmp_dir)  # what a process left that was killed
    with staging_directory(settings.tmp_dir) as scratch:
        try:
            engine = load(base_model, quantization, device, scratch.path, settings)
        except QLoRAError as error:
            log.error("base_not_loaded", base_model=base_model, exc_info=error)
            desk.leave(error)
            time.sleep(LINGER_S)
            return
        with engine:
            log.info("base_loaded", base_model=base_model, seconds=round(time.monotonic() - began, 2))
            desk.loaded()
            serve(desk, engine.generate)


if __name__ == "__main__":
    _settings = Settings()
    configure_logging(_settings.log_level)
    main(sys.argv[1], sys.argv[2], sys.argv[3], socket.socket(fileno=int(sys.argv[4])), _settings)
    end_process(0)
