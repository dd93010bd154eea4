"""Deliveries that are due are sent, and sent again until the endpoint takes them, for about a day and a half.

What is to be told was written with what happened (`store.webhooks.tell_end`), so none is lost or made up. A delivery
is claimed before it is sent and noted after: a process that dies in between leaves a claim that runs out, and the next
one sends it again under the same `webhook-id`.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy.exc import SQLAlchemyError

from qlora_service.domain.clock import utc_now
from qlora_service.domain.webhooks import Delivery, Endpoint
from qlora_service.errors import InvalidRequest
from qlora_service.store.database import Database, persist
from qlora_service.store.webhooks import any_due, claim_due, disable_endpoint, note_attempt
from qlora_service.webhooks.sending import TIMEOUT_S, Sender
from qlora_service.webhooks.signing import signed_headers

POLL_S = 0.5
MOST_AT_ONCE = 8
CLAIM_S = 6 * TIMEOUT_S
"""Longer than resolving, sending and noting may take."""
NOTE_PATIENCE_S = 20.0
PAUSES = tuple(
    timedelta(**pause)
    for pause in (
        {"seconds": 5}, {"seconds": 30}, {"minutes": 2}, {"minutes": 10}, {"hours": 1}, {"hours": 6}, {"hours": 24},
    )
)  # fmt: skip
"""Between one attempt and the next; after the last there is no other."""
JITTER = 0.2
"""By this share pauses are longer or shorter, so that what failed together is not tried together."""
GONE = 410
MAX_ERROR_CHARS = 500

log = structlog.get_logger("webhooks")


class Deliverer:
    """A thread that looks for due deliveries, and one for each that is being sent."""

    def __init__(self, database: Database, sender: Sender, *, clock: Callable[[], datetime] = utc_now) -> None:
        self._database = database
        self._sender = sender
        self._clock = clock
        self._sending: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, patience_s: float = 2.0) -> None:
        """Begins nothing any more; what is being sent has a moment to end, and is sent again if it does not."""
        self._stopping.set()
        self._thread.join(patience_s)
        for thread in self._sending:
            thread.join(patience_s / MOST_AT_ONCE)

    def deliver_due(self) -> list[threading.Thread]:
        """The threads that send what is due, as far as there is room for more."""
        self._sending = [thread for thread in self._sending if thread.is_alive()]
        now, room = self._clock(), MOST_AT_ONCE - len(self._sending)
        with self._database.read() as connection:
            if room == 0 or not any_due(connection, now):
                return []
        with self._database.write() as connection:
            claimed = claim_due(connection, now, now + timedelta(seconds=CLAIM_S), room)
        # Daemons: a receiver that does not answer must not keep the process from ending.
        started = [threading.Thread(target=self._deliver, args=claim, daemon=True) for claim in claimed]
        for thread in started:
            thread.start()
        self._sending += started
        return started

    def _run(self) -> None:
        while not self._stopping.wait(POLL_S):
            try:
                self.deliver_due()
            except SQLAlchemyError as error:
                log.warning("webhooks_wait", error=type(error).__qualname__)
            except Exception:
                # Without this thread nobody would be told anything any more, and nothing would show it.
                log.exception("webhooks_failed")

    def _deliver(self, delivery: Delivery, endpoint: Endpoint) -> None:
        told: dict[str, Any] = {"last_status": None, "last_error": None}
        try:
            told["last_status"] = attempt(self._sender, delivery, endpoint, self._clock())
        except InvalidRequest as error:
            told["last_error"] = error.message[:MAX_ERROR_CHARS]
        except Exception as error:
            log.exception("webhook_failed", delivery=delivery.id)
            told["last_error"] = f"the service failed with {type(error).__qualname__}; its log says more"
        told |= self._outcome(delivery, told["last_status"])
        try:
            persist(lambda: self._note(delivery, told), NOTE_PATIENCE_S)
        except SQLAlchemyError as error:
            log.warning("webhook_not_noted", delivery=delivery.id, error=type(error).__qualname__)
        log.info("webhook_sent", delivery=delivery.id, attempt=delivery.attempts, status=told["last_status"])

    def _outcome(self, delivery: Delivery, status: int | None) -> dict[str, Any]:
        now = self._clock()
        if status is not None and 200 <= status < 300:
            return {"delivered_at": now, "due_at": None}
        if delivery.attempts > len(PAUSES):
            return {"due_at": None}
        return {"due_at": now + PAUSES[delivery.attempts - 1] * random.uniform(1 - JITTER, 1 + JITTER)}  # noqa: S311

    def _note(self, delivery: Delivery, told: dict[str, Any]) -> None:
        with self._database.write() as connection:
            note_attempt(connection, delivery, **told)
            if told["last_status"] == GONE:
                disable_endpoint(connection, delivery.endpoint_id, self._clock())


def attempt(sender: Sender, delivery: Delivery, endpoint: Endpoint, now: datetime) -> int:
    """The status with which the endpoint answered. Raises: InvalidRequest, when there is none."""
    body = json.dumps(delivery.body, separators=(",", ":")).encode()
    headers = signed_headers(endpoint.secrets_at(now), delivery.event_id, int(now.timestamp()), body)
    return sender.send(endpoint.url, headers, body)
