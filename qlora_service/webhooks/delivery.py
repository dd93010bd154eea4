"""Delivery of webhook messages: due deliveries are sent, and retried for about a day and a half until they succeed.

A delivery is stored in the transaction that ends the job (`store.webhooks.insert_end_deliveries`), so that none is
lost, and none is sent for an end that was rolled back. It is claimed before it is sent, and its outcome is recorded
after. If the process dies in between, the claim expires, and another process sends the delivery again under the same
`webhook-id`.
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
from qlora_service.store.webhooks import any_due, claim_due, disable_endpoint, record_attempt
from qlora_service.webhooks.sending import TIMEOUT_S, Sender
from qlora_service.webhooks.signing import signed_headers

POLL_S = 0.5
MAX_CONCURRENT = 8
CLAIM_LEASE_S = 6 * TIMEOUT_S
"""Longer than resolving, sending and recording the outcome can take"""
RECORD_TIMEOUT_S = 20.0
RETRY_DELAYS = tuple(
    timedelta(**delay)
    for delay in (
        {"seconds": 5}, {"seconds": 30}, {"minutes": 2}, {"minutes": 10}, {"hours": 1}, {"hours": 6}, {"hours": 24},
    )
)  # fmt: skip
"""Delays between attempts; the attempt after the last delay is the last one."""
JITTER = 0.2
"""Random variation of the delays, as a fraction, so that deliveries that failed together are not retried together"""
GONE = 410
MAX_ERROR_CHARS = 500

log = structlog.get_logger("webhooks")


class Deliverer:
    """A thread that polls for due deliveries, and one thread per delivery that is being sent."""

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
        """Starts no more deliveries, and waits briefly for those in progress.

        A delivery that does not finish is sent again after its claim has expired.
        """
        self._stopping.set()
        self._thread.join(patience_s)
        for thread in self._sending:
            thread.join(patience_s / MAX_CONCURRENT)

    def deliver_due(self) -> list[threading.Thread]:
        """Starts and returns threads for due deliveries, up to MAX_CONCURRENT in total."""
        self._sending = [thread for thread in self._sending if thread.is_alive()]
        now, free = self._clock(), MAX_CONCURRENT - len(self._sending)
        with self._database.read() as connection:
            if free == 0 or not any_due(connection, now):
                return []
        with self._database.write() as connection:
            claimed = claim_due(connection, now, now + timedelta(seconds=CLAIM_LEASE_S), free)
        # Daemon threads, because a receiver that does not respond must not block the exit of the process.
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
                log.warning("webhook_database_error", error=type(error).__qualname__)
            except Exception:
                # If this thread ended, deliveries would stop without any sign of it.
                log.exception("webhook_poll_failed")

    def _deliver(self, delivery: Delivery, endpoint: Endpoint) -> None:
        outcome: dict[str, Any] = {"last_status": None, "last_error": None}
        try:
            outcome["last_status"] = send_delivery(self._sender, delivery, endpoint, self._clock())
        except InvalidRequest as error:
            outcome["last_error"] = error.message[:MAX_ERROR_CHARS]
        except Exception as error:
            log.exception("webhook_failed", delivery=delivery.id)
            outcome["last_error"] = f"the service failed with {type(error).__qualname__}; see its log"
        outcome |= self._next_state(delivery, outcome["last_status"])
        try:
            persist(lambda: self._record(delivery, outcome), RECORD_TIMEOUT_S)
        except SQLAlchemyError as error:
            log.warning("webhook_outcome_not_recorded", delivery=delivery.id, error=type(error).__qualname__)
        log.info("webhook_sent", delivery=delivery.id, attempt=delivery.attempts, status=outcome["last_status"])

    def _next_state(self, delivery: Delivery, status: int | None) -> dict[str, Any]:
        """The columns that mark the delivery as delivered, due for a retry, or failed."""
        now = self._clock()
        if status is not None and 200 <= status < 300:
            return {"delivered_at": now, "due_at": None}
        if delivery.attempts > len(RETRY_DELAYS):
            return {"due_at": None}
        return {"due_at": now + RETRY_DELAYS[delivery.attempts - 1] * random.uniform(1 - JITTER, 1 + JITTER)}  # noqa: S311

    def _record(self, delivery: Delivery, outcome: dict[str, Any]) -> None:
        with self._database.write() as connection:
            record_attempt(connection, delivery, **outcome)
            if outcome["last_status"] == GONE:
                disable_endpoint(connection, delivery.endpoint_id, self._clock())


def send_delivery(sender: Sender, delivery: Delivery, endpoint: Endpoint, now: datetime) -> int:
    """The HTTP status of the endpoint's response to one attempt. Raises: InvalidRequest, without a response."""
    body = json.dumps(delivery.body, separators=(",", ":")).encode()
    headers = signed_headers(endpoint.secrets_at(now), delivery.event_id, int(now.timestamp()), body)
    return sender.send(endpoint.url, headers, body)
