"""uvicorn as this service runs it: with deadlines for whoever sends slowly, and an end that does not wait for ever."""

from __future__ import annotations

import os
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from api.http.protocol import MAX_HEAD_BYTES, receipt_protocol

# Requests that are being answered have this long to end.
GRACE_S = 3
# Then the process ends whatever its threads do: what is not committed never happened, scratch is reaped at the start.
HARD_EXIT_S = 4
# Between two requests on a connection. httpx, and with it OpenAI's client, uses none that was idle for 5 s: whoever is
# the second to close never does so while a request is on its way.
KEEP_ALIVE_S = 15


class Server(uvicorn.Server):
    """Tells the application that it is being stopped, so that event streams end and clients reconnect."""

    def __init__(self, app: FastAPI, receipt_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=receipt_protocol(receipt_s),
                ws="none",
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._app.state.draining:
            self._app.state.draining = True
            # A thread cannot be cancelled: one that checks a large file would hold the process for minutes.
            deadline = threading.Timer(HARD_EXIT_S, os._exit, (128 + sig,))
            deadline.daemon = True
            deadline.start()
        super().handle_exit(sig, frame)
