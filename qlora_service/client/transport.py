"""HTTP as the SDK speaks it: errors as ours, pages as one stream, patience with a service that restarts."""

from __future__ import annotations

import ipaddress
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeVar

import httpx2

from qlora_service.client.wire import ServiceError
from qlora_service.errors import Finding, InvalidRequest, Unavailable

EXAMPLE_URL = "http://127.0.0.1:8080"
ANSWER_S = 60.0
"""Longest silence of an answer; an event stream's keep-alive comes far more often."""
CONNECT_S = 10.0
POST_PATIENCE_S = 60.0
"""Longest time that a POST is sent again: somebody waits for its answer."""
TRY_AGAIN = frozenset({502, 503, 504})
"""Answers of a service, or of a proxy before it, that cannot take a request just now."""

Drop = Callable[[Exception], None]
"""Told of each error that is waited out."""
Result = TypeVar("Result")


class Transport:
    """Requests to one service. `patience_s` is how long they are sent again when the service went away."""

    def __init__(self, base_url: str, patience_s: float) -> None:
        self.base_url = base_url.rstrip("/")
        self.patience_s = patience_s
        self._reached = False
        self._http = httpx2.Client(
            base_url=self.base_url,
            timeout=httpx2.Timeout(ANSWER_S, connect=CONNECT_S),
            # A proxy for the outside world cannot reach this machine's own loopback.
            trust_env=not _is_loopback(_host(base_url)),
        )

    def close(self) -> None:
        self._http.close()

    def answers(self, path: str) -> bool:
        """Whether a GET succeeds, at once."""
        try:
            return bool(self._http.get(path, timeout=2.0).is_success)
        except httpx2.TransportError:
            return False

    def get(self, path: str, params: Mapping[str, str] | None = None) -> Any:
        """The answer's JSON."""
        return self._send("GET", path, params=params)

    def post(self, path: str, *, patient: bool = False, file: BinaryIO | None = None, **request: Any) -> Any:
        """The answer's JSON; `patient` waits for it without limit.

        When the connection breaks or the service is not available, the request is sent again under the same
        idempotency key, with `file` from its start: it takes effect once. Only a service that never answered before
        is given up at once.
        """
        headers = {"Idempotency-Key": str(uuid.uuid4())}
        read_s = None if patient else ANSWER_S
        backoff = Backoff(min(self.patience_s, POST_PATIENCE_S))
        while True:
            try:
                if file is not None:
                    file.seek(0)
                return self._send("POST", path, headers=headers, read_s=read_s, **request)
            except Unavailable as error:
                if not self._reached:
                    raise
                backoff.pause(error)
            except ServiceError as error:
                if error.status not in TRY_AGAIN:
                    raise
                backoff.pause(error)

    def _send(self, method: str, path: str, *, read_s: float | None = ANSWER_S, **request: Any) -> Any:
        timeout = httpx2.Timeout(ANSWER_S, connect=CONNECT_S, read=read_s)
        with self._translated():
            response = self._http.request(method, path, timeout=timeout, **request)
        self._reached = True
        _raise_for_error(response)
        try:
            return response.json()
        except ValueError:
            raise _stranger(response) from None

    def pages(self, path: str, params: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
        page = self.get(path, params)
        yield from page["data"]
        while page.get("next"):
            page = self.get(path, {**(params or {}), "after": page["next"]})
            yield from page["data"]

    @contextmanager
    def stream(self, path: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        with self._translated(), self._http.stream("GET", path, headers=headers) as response:
            if response.is_error:
                response.read()
                _raise_for_error(response)
            yield response

    def persist(self, call: Callable[[], Result], on_drop: Drop | None = None) -> Result:
        """What `call` returns, called again while the service cannot be reached."""
        backoff = Backoff(self.patience_s)
        while True:
            try:
                return call()
            except (Unavailable, ServiceError) as error:
                if not transient(error):
                    raise
                if on_drop is not None:
                    on_drop(error)
                backoff.pause(error)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Transport errors as `Unavailable` that says what to do."""
        try:
            yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise Unavailable(
                f"no service answers at {self.base_url} ({error}): start one with `qlora serve`, or give the address "
                "of a running one with --url or QLORA_URL"
            ) from error
        except httpx2.TransportError as error:
            self._reached = True
            raise Unavailable(
                f"the connection to {self.base_url} broke ({error or type(error).__name__}): try again"
            ) from error


class Backoff:
    """Growing pauses between attempts, until patience ends."""

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self.reset()

    def reset(self) -> None:
        self._deadline: float | None = None
        self._pause_s = 0.2

    def pause(self, error: Exception) -> None:
        """Sleeps before the next attempt; raises `error` when this was the last one."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self._patience_s
        if now >= self._deadline:
            raise error
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, 5.0)


def _host(base_url: str) -> str:
    """Raises: InvalidRequest."""
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise InvalidRequest(f"{base_url!r} is no address of a service: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidRequest(f"{base_url!r} is no address of a service: give one such as {EXAMPLE_URL}")
    return url.host


def _raise_for_error(response: httpx2.Response) -> None:
    """Raises: ServiceError, for any answer of 400 and above."""
    if not response.is_error:
        return
    try:
        error = response.json()["error"]
        findings = [Finding(**finding) for finding in error["findings"]]
        raise ServiceError(response.status_code, error["code"], error["message"], error["location"], findings)
    except (ValueError, KeyError, TypeError):
        raise _stranger(response) from None


def _stranger(response: httpx2.Response) -> ServiceError:
    """Something between us and the service, or another server, answered in a form that is not the service's."""
    return ServiceError(
        response.status_code,
        "unexpected_answer",
        f"{response.request.method} {response.request.url} gave an answer that is not the service's: check the address",
    )


def transient(error: Unavailable | ServiceError) -> bool:
    """Whether the same request may work later."""
    return isinstance(error, Unavailable) or error.status >= 500


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
