"""A TCP proxy before a service that breaks connections, or answers in the service's place."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from types import TracebackType
from typing import Self

BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
CHUNK_BYTES = 8192


class BreakingProxy:
    """`cut_after` is how many bytes a connection brings to the client before it is reset.

    `stalls` keeps such a connection open, silent, instead. The next `refusals` connections are answered with a 503, as
    a load balancer does. `brought` counts what each connection brought.
    """

    def __init__(self, port: int) -> None:
        self._upstream = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut_after: int | None = None
        self.stalls = False
        self.refusals = 0
        self.brought: list[int] = []

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        # Closing alone would not wake the thread that accepts.
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        self.brought.append(0)
        number = len(self.brought) - 1
        with client:
            if self.refusals:
                self.refusals -= 1
                client.recv(CHUNK_BYTES)
                client.sendall(BUSY)
                return
            with socket.create_connection(self._upstream) as server, contextlib.suppress(OSError):
                self._relay(client, server, number)

    def _relay(self, client: socket.socket, server: socket.socket, number: int) -> None:
        """Returns when either end has closed, or the connection is to break."""
        other = {client: server, server: client}
        # One thread for both directions: a socket is only reset if nobody reads from it while it is closed.
        while not self._ended.is_set():
            for source in select.select([client, server], [], [], 0.1)[0]:
                chunk = source.recv(CHUNK_BYTES)
                if source is server and self.cut_after is not None:
                    left = self.cut_after - self.brought[number]
                    if left < len(chunk):
                        client.sendall(chunk[:left])
                        self.brought[number] += left
                        self._break(client)
                        return
                if not chunk:
                    return
                other[source].sendall(chunk)
                self.brought[number] += len(chunk) if source is server else 0

    def _break(self, client: socket.socket) -> None:
        if self.stalls:
            self._ended.wait(30)
        # Let what was sent arrive; then a reset, as from a router that lost its state.
        time.sleep(0.02)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
