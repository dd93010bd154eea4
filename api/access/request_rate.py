"""Rate limit per key: token buckets in memory."""

from __future__ import annotations

import math
from collections.abc import Callable

from qlora_service.errors import RateLimited


class RateLimiter:
    """A token bucket per key: a burst of `per_minute` requests, refilled evenly at that rate."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._clock = clock
        # By key id: remaining tokens, and the time of that count in seconds. Bounded by the number of existing keys.
        self._buckets: dict[str | None, tuple[float, float]] = {}

    def take(self, key_id: str | None) -> None:
        """Takes a token from the key's bucket; requests without a key share the bucket of None.

        Raises:
            RateLimited: the bucket is empty; `details["retry_after_s"]` says when it has a token again.
        """
        now, per_s = self._clock(), self._per_minute / 60
        tokens, updated_at = self._buckets.get(key_id, (float(self._per_minute), now))
        tokens = min(self._per_minute, tokens + (now - updated_at) * per_s)
        if tokens < 1:
            wait_s = math.ceil((1 - tokens) / per_s)
            raise RateLimited(
                f"this key sent more than {self._per_minute} requests per minute: retry in {wait_s} s, or raise "
                "QLORA_MAX_REQUESTS_PER_MINUTE where the service runs",
                retry_after_s=wait_s,
                max_requests_per_minute=self._per_minute,
            )
        self._buckets[key_id] = tokens - 1, now
