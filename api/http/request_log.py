"""A request id and one log line per request. Neither rows nor query strings are logged."""

from __future__ import annotations

import asyncio
import re
import time
import traceback

import anyio
import structlog
from sqlalchemy.exc import DBAPIError
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import internal_error, outage, refusal, stopping
from qlora_service.domain.ids import new_id
from qlora_service.errors import QLoRAError, Unavailable

HEADER = "X-Request-Id"
# As proxies log it: the client went away before the answer.
CLIENT_CLOSED_REQUEST = 499

_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

log = structlog.get_logger("api")


class RequestLog:
    """Outermost middleware: names the request, answers what nobody handled, and logs how it ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _ACCEPTED_ID.fullmatch(given) else new_id("req")
        state = scope.setdefault("state", {})
        started, status = time.perf_counter(), None

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_named)
            except ClientDisconnect:
                status = CLIENT_CLOSED_REQUEST
            except asyncio.CancelledError:
                # The server is being stopped and waits no longer; nobody above has use for the cancellation.
                state["error_code"] = Unavailable.code
                if status is None:
                    await stopping()(scope, receive, send_named)
            except Exception as error:  # noqa: BLE001  the one place where the unforeseen is answered and logged
                unavailable = outage(error)
                if status is not None and _is_hang_up(error):
                    status = CLIENT_CLOSED_REQUEST
                elif unavailable is None:
                    _log_defect(error)
                    answer = internal_error(request_id)
                    state["error_code"] = QLoRAError.code
                else:
                    log.warning("outage", error=type(error).__qualname__, reason=_reason(error) or unavailable.message)
                    answer = refusal(unavailable)
                    state["error_code"] = unavailable.code
                if status is None:
                    await answer(scope, receive, send_named)
            finally:
                # Those who follow a job read twice a second.
                polled = scope["method"] == "GET" and status is not None and status < 400
                (log.debug if polled else log.info)(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status or CLIENT_CLOSED_REQUEST,
                    code=state.get("error_code"),
                    duration_ms=round(1000 * (time.perf_counter() - started), 1),
                )


def _is_hang_up(error: Exception) -> bool:
    """Whether all that failed is to hand the next event of a stream to a response that is over."""
    return isinstance(error, ExceptionGroup) and error.split(anyio.BrokenResourceError)[1] is None


def _log_defect(error: Exception) -> None:
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    log.error("request_failed", error=type(error).__qualname__, reason=_reason(error), frames=frames)


def _reason(error: Exception) -> str | None:
    # An exception's own text may quote rows; only the system's and the driver's errors are known not to.
    if isinstance(error, DBAPIError):
        return str(error.orig)
    return str(error) if isinstance(error, OSError) else None
