"""uvicorn, configured for this service: deadlines for slow clients, and a bounded shutdown."""

from __future__ import annotations

import os
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from api.http.protocol import MAX_HEAD_BYTES, receipt_protocol
from qlora_service.process.signals import stop_signals

# Seconds for running requests to finish after the stop signal.
GRACE_S = 3
# Seconds after the stop signal at which the process exits even if threads still run: uncommitted work never happened,
# and the next start deletes scratch files.
HARD_EXIT_S = 4
# Seconds between two requests on a connection. httpx, and therefore OpenAI's client, does not reuse a connection that
# was idle for 5 s: with a longer timeout here, the server never closes one while a request is on its way.
KEEP_ALIVE_S = 15


class Server(uvicorn.Server):
    """Sets `app.state.draining` on the stop signal, so that event streams end and clients reconnect."""

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
        self._stop_signals = stop_signals()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig not in self._stop_signals:
            return
        if not self._app.state.draining:
            self._app.state.draining = True
            # A thread cannot be cancelled: one that checks a large file would keep the process alive for minutes.
            deadline = threading.Timer(HARD_EXIT_S, os._exit, (128 + sig,))
            deadline.daemon = True
            deadline.start()
        super().handle_exit(sig, frame)
