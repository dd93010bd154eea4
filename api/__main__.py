"""`python -m api`: the HTTP server, until SIGTERM or SIGINT."""

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
    """The exit code of the process."""
    settings = read_settings()
    configure_logging(settings.log_level)
    try:
        settings.tmp_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _fail(f"cannot write in {settings.resolved_data_dir}: {error.strerror}. Set QLORA_DATA_DIR")
    # Modules, routes and schemas live as long as the process: a full garbage collection that traverses them would
    # pause every request.
    with freezing_objects():
        from api.http.server import Server
        from api.main import create_app

        server = Server(create_app(settings), settings.receipt_s)
    try:
        listener = _listen(settings.host, settings.port)
    except OSError as error:
        # `strerror` of a failed bind repeats the address; `errno` of an unknown host is not an errno of the system.
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        address = f"{settings.host}:{settings.port}"
        return _fail(
            f"cannot listen on {address}: {reason}. Stop the process that uses the port, or set QLORA_PORT (QLORA_HOST)"
        )
    host, port = listener.getsockname()[:2]
    log.info("api_listening", host=host, port=port)
    # uvicorn raises the signal that stopped it once more; Ctrl-C is not an error.
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    # Accepted connections inherit the option; asyncio sets it only on sockets that it creates itself. The head and the
    # body of a response are two packets: without the option, the second packet waits 40 ms for the client's delayed
    # acknowledgement of the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _fail(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
