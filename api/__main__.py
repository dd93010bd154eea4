"""`python -m api`: serves HTTP until SIGTERM or SIGINT."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import sys
import threading
from types import FrameType

import structlog
import uvicorn
from fastapi import FastAPI

from api.main import create_app
from api.protocol import MAX_HEAD_BYTES, receipt_protocol
from qlora_service.logs import configure_logging
from qlora_service.settings import read_settings

# Requests that are being answered have this long to end.
GRACE_S = 3
# Then the process ends whatever its threads do: what is not committed never happened, scratch is reaped at the start.
HARD_EXIT_S = 4
# Between two requests on a connection. httpx, and with it OpenAI's client, uses none that was idle for 5 s: whoever is
# the second to close never does so while a request is on its way.
KEEP_ALIVE_S = 15

log = structlog.get_logger("api")


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


def main() -> int:
    """The process's exit code."""
    settings = read_settings()
    configure_logging(settings.log_level)
    try:
        settings.tmp_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _refuse(f"cannot write in {settings.resolved_data_dir}: {error.strerror}. Set QLORA_DATA_DIR")
    try:
        listener = _listen(settings.host, settings.port)
    except OSError as error:
        # Of a failed bind, `strerror` repeats the address; of an unknown host, errno is not the system's.
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        place = f"{settings.host}:{settings.port}"
        return _refuse(f"cannot listen on {place}: {reason}. Stop what uses it, or set QLORA_PORT (QLORA_HOST)")
    host, port = listener.getsockname()[:2]
    log.info("api_listening", host=host, port=port)
    server = Server(create_app(settings), settings.receipt_s)
    # Modules, routes and schemas stay until the end: a full collection that walked them all would stop every request.
    gc.collect()
    gc.freeze()
    # uvicorn raises the signal that stopped it once more; Ctrl-C is no defect.
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    # Inherited by its connections; asyncio sets it on sockets of its own making only. An answer's head and body are
    # two packets, and without this the second waits 40 ms for the client's delayed acknowledgement of the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _refuse(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
