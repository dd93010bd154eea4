"""How often a key may ask: a token bucket for each, in memory."""

from __future__ import annotations

import math
from collections.abc import Callable

from qlora_service.errors import RateLimited


class RequestRate:
    """`per_minute` requests may come at once; then as many a minute, evenly."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_minute = per_minute
        self._clock = clock
        # Requests left, and when that was so; one entry for each key that exists, at most.
        self._left: dict[str | None, tuple[float, float]] = {}

    def take(self, key_id: str | None) -> None:
        """Returns when one more may come; None stands for all who ask without a key.

        Raises:
            RateLimited: says in how many seconds.
        """
        now, per_s = self._clock(), self._per_minute / 60
        left, at = self._left.get(key_id, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - at) * per_s)
        if left < 1:
            wait_s = math.ceil((1 - left) / per_s)
            raise RateLimited(
                f"more than {self._per_minute} requests a minute came under one key: go on in {wait_s} s, or have "
                "QLORA_MAX_REQUESTS_PER_MINUTE raised",
                retry_after_s=wait_s,
                max_requests_per_minute=self._per_minute,
            )
        self._left[key_id] = left - 1, now
