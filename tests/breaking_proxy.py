"""A TCP proxy in front of a service, which resets or stalls connections or answers 503 itself."""

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
    """A proxy to a local port that breaks connections as its attributes say."""

    def __init__(self, port: int) -> None:
        self._upstream = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.cut_after: int | None = None
        """Bytes to the client after which a connection is reset"""
        self.stalls = False
        """Keep the connection open and silent after `cut_after` instead"""
        self.refusals = 0
        """Number of next connections to answer with 503, as a load balancer does"""
        self.brought: list[int] = []
        """Bytes to the client of each connection so far"""

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        # Closing alone would not wake the accepting thread.
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
        """Returns when either end has closed the connection, or after breaking it."""
        other = {client: server, server: client}
        # One thread for both directions: closing resets a connection only if no thread is reading from the socket.
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
        # First let the sent bytes arrive; then a reset, as from a router that lost its state.
        time.sleep(0.02)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
