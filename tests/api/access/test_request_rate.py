from __future__ import annotations

import pytest

from api.access.request_rate import RateLimiter
from qlora_service.errors import RateLimited


class Seconds:
    """A monotonic clock that the test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def accepted(limiter: RateLimiter, key_id: str | None, requests: int) -> int:
    """The number of accepted requests, of this many sent at once."""
    count = 0
    for _ in range(requests):
        try:
            limiter.take(key_id)
        except RateLimited:
            continue
        count += 1
    return count


def test_limiter_accepts_a_burst_of_one_minute_and_then_an_even_rate() -> None:
    clock = Seconds()
    limiter = RateLimiter(30, clock)
    assert accepted(limiter, "key_1", 100) == 30
    clock.now += 2
    assert accepted(limiter, "key_1", 100) == 1
    clock.now += 3600
    assert accepted(limiter, "key_1", 100) == 30


def test_request_is_accepted_after_the_named_wait() -> None:
    clock = Seconds()
    limiter = RateLimiter(7, clock)
    assert accepted(limiter, "key_1", 7) == 7
    clock.now += 1.5
    with pytest.raises(RateLimited, match=r"more than 7 requests per minute: retry in 8 s") as caught:
        limiter.take("key_1")
    clock.now += caught.value.details["retry_after_s"] - 1.5
    assert accepted(limiter, "key_1", 1) == 0
    clock.now += 1.5
    assert accepted(limiter, "key_1", 1) == 1


def test_refused_requests_take_no_token() -> None:
    clock = Seconds()
    limiter = RateLimiter(60, clock)
    assert accepted(limiter, "key_1", 1000) == 60
    clock.now += 1
    assert accepted(limiter, "key_1", 10) == 1


def test_each_key_has_its_own_bucket() -> None:
    limiter = RateLimiter(2, Seconds())
    assert [accepted(limiter, key_id, 5) for key_id in ("key_1", "key_2", None)] == [2, 2, 2]
