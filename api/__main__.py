"""`python -m api`: serves HTTP until SIGTERM or SIGINT."""

from __future__ import annotations

import contextlib
import os
import socket
import sys

import structlog

from qlora_service.process.logging import configure_logging
from qlora_service.process.startup import freezing_objects
from qlora_service.settings import read_settings

log = structlog.get_logger("api")


def main() -> int:
    """The process's exit code."""
    settings = read_settings()
    configure_logging(settings.log_level)
    try:
        settings.tmp_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _refuse(f"cannot write in {settings.resolved_data_dir}: {error.strerror}. Set QLORA_DATA_DIR")
    # Modules, routes and schemas stay until the end: a full collection that walked them all would stop every request.
    with freezing_objects():
        from api.http.server import Server
        from api.main import create_app

        server = Server(create_app(settings), settings.receipt_s)
    try:
        listener = _listen(settings.host, settings.port)
    except OSError as error:
        # Of a failed bind, `strerror` repeats the address; of an unknown host, errno is not the system's.
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        place = f"{settings.host}:{settings.port}"
        return _refuse(f"cannot listen on {place}: {reason}. Stop what uses it, or set QLORA_PORT (QLORA_HOST)")
    host, port = listener.getsockname()[:2]
    log.info("api_listening", host=host, port=port)
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
