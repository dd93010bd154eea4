"""A request id and one log line per request. Rows and query strings are never logged."""

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

from api.errors import as_unavailable, internal_error_response, response_of, stopping_response
from qlora_service.domain.ids import new_id
from qlora_service.errors import QLoRAError, Unavailable

HEADER = "X-Request-Id"
# The status that proxies log when the client disconnects before the response.
CLIENT_CLOSED_REQUEST = 499

_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

log = structlog.get_logger("api")


class RequestLog:
    """Outermost middleware: assigns the request id, responds to unhandled exceptions, and logs the result."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent_id = Headers(scope=scope).get(HEADER, "")
        request_id = sent_id if _ACCEPTED_ID.fullmatch(sent_id) else new_id("req")
        state = scope.setdefault("state", {})
        started, status = time.perf_counter(), None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            try:
                await self._app(scope, receive, send_with_id)
            except ClientDisconnect:
                status = CLIENT_CLOSED_REQUEST
            except asyncio.CancelledError:
                # The server has stopped waiting for its requests; no caller of this middleware needs the cancellation.
                state["error_code"] = Unavailable.code
                if status is None:
                    await stopping_response()(scope, receive, send_with_id)
            except Exception as error:  # noqa: BLE001  the one place that answers and logs unexpected exceptions
                unavailable = as_unavailable(error)
                if status is not None and _is_disconnect(error):
                    status = CLIENT_CLOSED_REQUEST
                elif unavailable is None:
                    _log_defect(error)
                    response = internal_error_response(request_id)
                    state["error_code"] = QLoRAError.code
                else:
                    log.warning("outage", error=type(error).__qualname__, reason=_reason(error) or unavailable.message)
                    response = response_of(unavailable)
                    state["error_code"] = unavailable.code
                if status is None:
                    await response(scope, receive, send_with_id)
            finally:
                # Clients that follow a job poll twice a second.
                is_poll = scope["method"] == "GET" and status is not None and status < 400
                (log.debug if is_poll else log.info)(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status or CLIENT_CLOSED_REQUEST,
                    code=state.get("error_code"),
                    duration_ms=round(1000 * (time.perf_counter() - started), 1),
                )


def _is_disconnect(error: Exception) -> bool:
    """Whether the only failure is the next event of a stream after its response has ended."""
    return isinstance(error, ExceptionGroup) and error.split(anyio.BrokenResourceError)[1] is None


def _log_defect(error: Exception) -> None:
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    log.error("request_failed", error=type(error).__qualname__, reason=_reason(error), frames=frames)


def _reason(error: Exception) -> str | None:
    # The text of an exception may quote rows; only errors of the system and of the database driver never do.
    if isinstance(error, DBAPIError):
        return str(error.orig)
    return str(error) if isinstance(error, OSError) else None
