"""Open-loop HTTP load that costs little beside the server: kept connections, prepared requests, no client library.

Requests arrive at a constant rate, however slow the answers are. A latency counts from the time at which its request
was due, so a pause of the server delays all requests of the pause.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

MAX_ANSWER_BYTES = 2**24


@dataclass(frozen=True)
class Server:
    """The API's port, and the headers of every request."""

    port: int
    headers: Mapping[str, str]

    def request(self, method: str, target: str, body: bytes = b"") -> bytes:
        """The bytes of an HTTP request."""
        lines = [f"{method} {target} HTTP/1.1", "Host: localhost"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if method == "POST":
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode() + body

    async def connect(self) -> Connection:
        return Connection(*await asyncio.open_connection("127.0.0.1", self.port, limit=MAX_ANSWER_BYTES))


@dataclass(frozen=True)
class Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, request: bytes) -> tuple[int, bytes]:
        """Status code and body of the answer."""
        self.writer.write(request)
        head = await self.reader.readuntil(b"\r\n\r\n")
        _, _, length = head.lower().partition(b"content-length:")
        return int(head[9:12]), await self.reader.readexactly(int(length.split(b"\r\n", 1)[0]))

    async def events(self, request: bytes) -> AsyncIterator[bytes]:
        """The events and comments of a server-sent event stream."""
        self.writer.write(request)
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert head[9:12] == b"200", head
        while True:
            yield await self.reader.readuntil(b"\n\n")


async def open_loop(server: Server, requests: Sequence[bytes], per_second: float, status: int) -> list[float]:
    """Seconds from the time at which each request was due to its answer.

    Raises:
        AssertionError: an answer had another status code.
    """
    # Used in turn: the server closes idle connections.
    idle = deque([await server.connect() for _ in range(4)])
    latencies: list[float] = []

    async def send(request: bytes, due: float) -> None:
        connection = idle.popleft() if idle else await server.connect()
        answer_status, body = await connection.send(request)
        latencies.append(time.perf_counter() - due)
        assert answer_status == status, (answer_status, body[:500])
        idle.append(connection)

    begin = time.perf_counter() + 0.1
    async with asyncio.TaskGroup() as tasks:
        for number, request in enumerate(requests):
            due = begin + number / per_second
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.create_task(send(request, due))
    for connection in idle:
        connection.writer.close()
    return latencies


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is at least as large as this share of the values."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]
