"""HTTP transport of the SDK: error answers as exceptions, pages as one iterator, retries while a service restarts."""

from __future__ import annotations

import ssl
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeVar

import httpx2

from qlora_service.client.wire import ServiceError, Unreachable
from qlora_service.errors import Finding, InvalidRequest, QuotaExceeded
from qlora_service.process.loopback import is_loopback

EXAMPLE_URL = "http://127.0.0.1:8080"
READ_TIMEOUT_S = 60.0
"""Longest pause inside an answer; the keep-alives of an event stream come far more often."""
CONNECT_TIMEOUT_S = 10.0
REQUEST_PATIENCE_S = 60.0
"""Longest time for which one request is retried, because its caller is waiting."""
RETRYABLE_STATUSES = frozenset({502, 503, 504})
"""Answers of a service, or of a proxy in front of it, that is temporarily unavailable."""
TOO_MANY_REQUESTS = 429

OnDrop = Callable[[Exception, float], None]
"""Callback, once per outage: the first error, and the seconds for which the request is retried at most."""
Result = TypeVar("Result")


class Transport:
    """Requests to one service, retried while it is away. A service that has never answered is not retried.

    `patience_s` is how long `watch`, `wait` and `download` retry; every other request is retried for at most a minute.
    """

    def __init__(self, base_url: str, *, api_key: str | None, patience_s: float, on_drop: OnDrop | None) -> None:
        self.base_url = base_url.rstrip("/")
        self._patience_s = patience_s
        self._on_drop = on_drop
        self._has_answered = False
        url = _parse_url(base_url)
        is_local = is_loopback(url.host)
        self._http = httpx2.Client(
            base_url=self.base_url,
            headers={} if api_key is None else {"Authorization": f"Bearer {_checked_key(api_key)}"},
            timeout=httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            # A proxy elsewhere cannot reach this machine's loopback.
            trust_env=not is_local,
            # Plain http shows no certificate, and reading the certificate authorities takes longer than most requests.
            verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if is_local and url.scheme == "http" else True,
        )

    def close(self) -> None:
        self._http.close()

    def answers(self, path: str) -> bool:
        """Whether a GET succeeds, without retries."""
        try:
            return bool(self._http.get(path, timeout=2.0).is_success)
        except httpx2.TransportError:
            return False

    def get(self, path: str, params: Mapping[str, str] | None = None, *, backoff: Backoff | None = None) -> Any:
        """The answer's JSON."""

        def send() -> Any:
            return _json(self._send("GET", path, params=params))

        return self._retry(send, backoff or self._request_backoff())

    def post(
        self,
        path: str,
        *,
        read_s: float | None = READ_TIMEOUT_S,
        file: BinaryIO | None = None,
        idempotency_key: str | None = None,
        **request: Any,
    ) -> Any:
        """The answer's JSON; `read_s` is the read timeout, None for no limit.

        A retry sends the same idempotency key (`idempotency_key` or a random one) and `file` from its start, so that
        the request takes effect once.
        """
        headers = {"Idempotency-Key": idempotency_key or str(uuid.uuid4())}

        def send() -> Any:
            if file is not None:
                file.seek(0)
            return _json(self._send("POST", path, headers=headers, read_s=read_s, **request))

        return self._retry(send, self._request_backoff())

    def delete(self, path: str) -> None:
        """Returns when the object does not exist any more."""
        tries = 0

        def send() -> None:
            nonlocal tries
            tries += 1
            try:
                self._send("DELETE", path)
            except ServiceError as error:
                # 404 to a retry: the first request deleted the object, and its answer was lost.
                if error.status != httpx2.codes.NOT_FOUND or tries == 1:
                    raise

        self._retry(send, self._request_backoff())

    def pages(self, path: str, params: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
        """The entries of all pages."""
        page = self.get(path, params)
        yield from page["data"]
        while page.get("next"):
            page = self.get(path, {**(params or {}), "after": page["next"]})
            yield from page["data"]

    @contextmanager
    def stream(
        self, path: str, headers: Mapping[str, str], *, json: Any = None, read_s: float | None = READ_TIMEOUT_S
    ) -> Iterator[httpx2.Response]:
        """The answer to a GET, or to a POST of `json`, with its body unread; `read_s` is the read timeout."""
        method = "GET" if json is None else "POST"
        timeout = httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, read=read_s)
        request = self._http.stream(method, path, headers=headers, json=json, timeout=timeout)
        with self._as_unreachable(), request as response:
            self._has_answered = True
            if response.is_error:
                response.read()
                _raise_for_error(response)
            yield response

    def backoff(self, on_drop: OnDrop | None = None) -> Backoff:
        """The pauses for `watch`, `wait` and `download`; `on_drop` replaces the client's callback."""
        return Backoff(self._patience_s, on_drop or self._on_drop)

    def is_transient(self, error: Unreachable | ServiceError) -> bool:
        """Whether a retry may succeed soon. An exceeded quota is not transient: waiting alone frees nothing."""
        if isinstance(error, Unreachable):
            return self._has_answered
        is_rate_limited = error.status == TOO_MANY_REQUESTS and error.code != QuotaExceeded.code
        return error.status in RETRYABLE_STATUSES or is_rate_limited

    def _request_backoff(self) -> Backoff:
        return Backoff(min(self._patience_s, REQUEST_PATIENCE_S), self._on_drop)

    def _retry(self, send: Callable[[], Result], backoff: Backoff) -> Result:
        """The result of `send`, called again after transient errors."""
        while True:
            try:
                return send()
            except (Unreachable, ServiceError) as error:
                if not self.is_transient(error):
                    raise
                backoff.pause(error)

    def _send(
        self, method: str, path: str, *, read_s: float | None = READ_TIMEOUT_S, **request: Any
    ) -> httpx2.Response:
        timeout = httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, read=read_s)
        with self._as_unreachable():
            response = self._http.request(method, path, timeout=timeout, **request)
        self._has_answered = True
        _raise_for_error(response)
        return response

    @contextmanager
    def _as_unreachable(self) -> Iterator[None]:
        """Turns transport errors into `Unreachable` with a message that says what to do."""
        try:
            yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise Unreachable(
                f"no service answers at {self.base_url} ({error}): start one with `qlora serve`, or give the address "
                "of a running one with --url or QLORA_URL"
            ) from error
        except httpx2.TransportError as error:
            self._has_answered = True
            raise Unreachable(
                f"the connection to {self.base_url} broke ({error or type(error).__name__}): try again"
            ) from error


class Backoff:
    """Growing pauses between retries, for at most `patience_s` seconds."""

    def __init__(self, patience_s: float, on_drop: OnDrop | None = None) -> None:
        self._patience_s = patience_s
        self._on_drop = on_drop
        self.reset()

    def reset(self) -> None:
        """Starts over, after the service has answered."""
        self._deadline: float | None = None
        self._pause_s = 0.2

    def pause(self, error: Unreachable | ServiceError) -> None:
        """Sleeps before the next retry, or raises `error` when the time is over."""
        now = time.monotonic()
        is_first = self._deadline is None
        if self._deadline is None:
            self._deadline = now + self._patience_s
        if now >= self._deadline:
            raise error
        if is_first and self._on_drop is not None:
            self._on_drop(error, self._patience_s)
        retry_after_s = 0.0
        # Retry-After of a 503 is ignored: a restart is usually over sooner.
        if isinstance(error, ServiceError) and error.status == TOO_MANY_REQUESTS:
            retry_after_s = error.retry_after_s or 0.0
        time.sleep(min(max(self._pause_s, retry_after_s), self._deadline - now))
        self._pause_s = min(2 * self._pause_s, 5.0)


def unexpected_answer(response: httpx2.Response) -> ServiceError:
    """The error for an answer in a form that the service never sends, such as from a proxy or another server."""
    return ServiceError(
        response.status_code,
        "unexpected_answer",
        f"{response.request.method} {response.request.url} returned an answer that is not from qlora-service: "
        "check the address",
    )


def _parse_url(base_url: str) -> httpx2.URL:
    """Raises: InvalidRequest."""
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise InvalidRequest(f"{base_url!r} is not the address of a service: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidRequest(f"{base_url!r} is not the address of a service: give one such as {EXAMPLE_URL}")
    return url


def _raise_for_error(response: httpx2.Response) -> None:
    """Raises: ServiceError, for a status of 400 and above."""
    if not response.is_error:
        return
    try:
        error = response.json()["error"]
        findings = [Finding(**finding) for finding in error["findings"]]
        # OpenAI's wire format calls the location `param`.
        code, message, location = error["code"], error["message"], error.get("location", error.get("param"))
    except (ValueError, KeyError, TypeError):
        raise unexpected_answer(response) from None
    raise ServiceError(response.status_code, code, message, location, findings, _retry_after_s(response))


def _retry_after_s(response: httpx2.Response) -> float | None:
    """The header's seconds; None if the header is absent or holds a date."""
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else None


def _json(response: httpx2.Response) -> Any:
    """Raises: ServiceError."""
    try:
        return response.json()
    except ValueError:
        raise unexpected_answer(response) from None


def _checked_key(api_key: str) -> str:
    """`api_key`, checked to fit into a header. Raises: InvalidRequest, without showing the key."""
    if not api_key or not all("!" <= character <= "~" for character in api_key):
        raise InvalidRequest(
            "the API key is empty, or contains a space, a line break or another character that keys never have: "
            "copy it again"
        )
    return api_key
