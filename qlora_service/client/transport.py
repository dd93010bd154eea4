"""HTTP as the SDK speaks it: errors as ours, pages as one stream, patience with a service that restarts."""

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
ANSWER_S = 60.0
"""Longest silence of an answer; an event stream's keep-alive comes far more often."""
CONNECT_S = 10.0
ASKED_PATIENCE_S = 60.0
"""Longest time that one request is sent again: somebody waits for its answer."""
TRY_AGAIN = frozenset({502, 503, 504})
"""Answers of a service, or of a proxy before it, that cannot take a request just now."""
TOO_MANY_REQUESTS = 429

Drop = Callable[[Exception, float], None]
"""Told once of every outage that is waited out: its first error, and for how many seconds at most."""
Result = TypeVar("Result")


class Transport:
    """Requests to one service, sent again while it is away: a service that never answered is given up at once.

    `patience_s` is how long what follows a job goes on trying; a single request is sent again for a minute at most.
    """

    def __init__(self, base_url: str, *, api_key: str | None, patience_s: float, on_drop: Drop | None) -> None:
        self.base_url = base_url.rstrip("/")
        self._patience_s = patience_s
        self._on_drop = on_drop
        self._reached = False
        url = _address(base_url)
        is_local = is_loopback(url.host)
        self._http = httpx2.Client(
            base_url=self.base_url,
            headers={} if api_key is None else {"Authorization": f"Bearer {_checked_key(api_key)}"},
            timeout=httpx2.Timeout(ANSWER_S, connect=CONNECT_S),
            # A proxy for the outside world cannot reach this machine's own loopback.
            trust_env=not is_local,
            # Over http:// nobody shows a certificate, and the authorities take longer to read than most requests.
            verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if is_local and url.scheme == "http" else True,
        )

    def close(self) -> None:
        self._http.close()

    def answers(self, path: str) -> bool:
        """Whether a GET succeeds, at once."""
        try:
            return bool(self._http.get(path, timeout=2.0).is_success)
        except httpx2.TransportError:
            return False

    def get(self, path: str, params: Mapping[str, str] | None = None, *, backoff: Backoff | None = None) -> Any:
        """The answer's JSON."""

        def send() -> Any:
            return _json(self._send("GET", path, params=params))

        return self._resend(send, backoff or self._short_backoff())

    def post(
        self, path: str, *, patient: bool = False, file: BinaryIO | None = None, key: str | None = None, **request: Any
    ) -> Any:
        """The answer's JSON; `patient` waits for it without limit.

        Sent again, it goes under the same idempotency key (`key`, or one of its own), with `file` from its start: it
        takes effect once.
        """
        headers = {"Idempotency-Key": key or str(uuid.uuid4())}
        read_s = None if patient else ANSWER_S

        def send() -> Any:
            if file is not None:
                file.seek(0)
            return _json(self._send("POST", path, headers=headers, read_s=read_s, **request))

        return self._resend(send, self._short_backoff())

    def delete(self, path: str) -> None:
        """Returns when there is nothing left."""
        tries = 0

        def send() -> None:
            nonlocal tries
            tries += 1
            try:
                self._send("DELETE", path)
            except ServiceError as error:
                # Not found by a later try: the one before has deleted it, and its answer was lost.
                if error.status != httpx2.codes.NOT_FOUND or tries == 1:
                    raise

        self._resend(send, self._short_backoff())

    def pages(self, path: str, params: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
        page = self.get(path, params)
        yield from page["data"]
        while page.get("next"):
            page = self.get(path, {**(params or {}), "after": page["next"]})
            yield from page["data"]

    @contextmanager
    def stream(
        self, path: str, headers: Mapping[str, str], *, json: Any = None, read_s: float | None = ANSWER_S
    ) -> Iterator[httpx2.Response]:
        """The answer to a GET, or to a POST of `json`, its body yet to come; `read_s` is its longest silence."""
        method = "GET" if json is None else "POST"
        timeout = httpx2.Timeout(ANSWER_S, connect=CONNECT_S, read=read_s)
        sent = self._http.stream(method, path, headers=headers, json=json, timeout=timeout)
        with self._translated(), sent as response:
            self._reached = True
            if response.is_error:
                response.read()
                _raise_for_error(response)
            yield response

    def backoff(self, on_drop: Drop | None = None) -> Backoff:
        """For what follows a job through outages; `on_drop` takes the place of the client's."""
        return Backoff(self._patience_s, on_drop or self._on_drop)

    def may_pass(self, error: Unreachable | ServiceError) -> bool:
        """Whether the same request may work soon: not when it is over a quota, which waiting alone does not lift."""
        if isinstance(error, Unreachable):
            return self._reached
        asked_too_often = error.status == TOO_MANY_REQUESTS and error.code != QuotaExceeded.code
        return error.status in TRY_AGAIN or asked_too_often

    def _short_backoff(self) -> Backoff:
        return Backoff(min(self._patience_s, ASKED_PATIENCE_S), self._on_drop)

    def _resend(self, send: Callable[[], Result], backoff: Backoff) -> Result:
        """What `send` returns, called again while the service is away."""
        while True:
            try:
                return send()
            except (Unreachable, ServiceError) as error:
                if not self.may_pass(error):
                    raise
                backoff.pause(error)

    def _send(self, method: str, path: str, *, read_s: float | None = ANSWER_S, **request: Any) -> httpx2.Response:
        timeout = httpx2.Timeout(ANSWER_S, connect=CONNECT_S, read=read_s)
        with self._translated():
            response = self._http.request(method, path, timeout=timeout, **request)
        self._reached = True
        _raise_for_error(response)
        return response

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Transport errors as `Unreachable` that says what to do."""
        try:
            yield
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise Unreachable(
                f"no service answers at {self.base_url} ({error}): start one with `qlora serve`, or give the address "
                "of a running one with --url or QLORA_URL"
            ) from error
        except httpx2.TransportError as error:
            self._reached = True
            raise Unreachable(
                f"the connection to {self.base_url} broke ({error or type(error).__name__}): try again"
            ) from error


class Backoff:
    """Growing pauses between attempts, until patience ends."""

    def __init__(self, patience_s: float, on_drop: Drop | None = None) -> None:
        self._patience_s = patience_s
        self._on_drop = on_drop
        self.reset()

    def reset(self) -> None:
        """Start over: the service has answered."""
        self._deadline: float | None = None
        self._pause_s = 0.2

    def pause(self, error: Unreachable | ServiceError) -> None:
        """Sleeps before the next attempt; raises `error` when this was the last one."""
        now = time.monotonic()
        begins = self._deadline is None
        if self._deadline is None:
            self._deadline = now + self._patience_s
        if now >= self._deadline:
            raise error
        if begins and self._on_drop is not None:
            self._on_drop(error, self._patience_s)
        asked_s = 0.0
        # The 503 of a service that restarts asks for seconds too, and is over sooner.
        if isinstance(error, ServiceError) and error.status == TOO_MANY_REQUESTS:
            asked_s = error.retry_after_s or 0.0
        time.sleep(min(max(self._pause_s, asked_s), self._deadline - now))
        self._pause_s = min(2 * self._pause_s, 5.0)


def _address(base_url: str) -> httpx2.URL:
    """Raises: InvalidRequest."""
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL as error:
        raise InvalidRequest(f"{base_url!r} is no address of a service: {error}") from None
    if url.scheme not in ("http", "https") or not url.host:
        raise InvalidRequest(f"{base_url!r} is no address of a service: give one such as {EXAMPLE_URL}")
    return url


def _raise_for_error(response: httpx2.Response) -> None:
    """Raises: ServiceError, for any answer of 400 and above."""
    if not response.is_error:
        return
    try:
        error = response.json()["error"]
        findings = [Finding(**finding) for finding in error["findings"]]
        # On OpenAI's wire a location is called `param`.
        code, message, location = error["code"], error["message"], error.get("location", error.get("param"))
    except (ValueError, KeyError, TypeError):
        raise stranger(response) from None
    raise ServiceError(response.status_code, code, message, location, findings, _retry_after_s(response))


def _retry_after_s(response: httpx2.Response) -> float | None:
    """The header's seconds; None where it is absent or names a date."""
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else None


def _json(response: httpx2.Response) -> Any:
    """Raises: ServiceError."""
    try:
        return response.json()
    except ValueError:
        raise stranger(response) from None


def stranger(response: httpx2.Response) -> ServiceError:
    """Something between us and the service, or another server, answered in a form that is not the service's."""
    return ServiceError(
        response.status_code,
        "unexpected_answer",
        f"{response.request.method} {response.request.url} gave an answer that is not the service's: check the address",
    )


def _checked_key(api_key: str) -> str:
    """`api_key`, which can stand in a header. Raises: InvalidRequest, without showing it."""
    if not api_key or not all("!" <= character <= "~" for character in api_key):
        raise InvalidRequest(
            "the API key holds a blank, a line break or another character that no key has: copy it again"
        )
    return api_key
