from __future__ import annotations

import pytest

from api.access.request_rate import RequestRate
from qlora_service.errors import RateLimited


class Seconds:
    """A monotonic clock that stands still until told otherwise."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def taken(rate: RequestRate, key_id: str | None, asked: int) -> int:
    """How many of so many requests at once were let in."""
    count = 0
    for _ in range(asked):
        try:
            rate.take(key_id)
        except RateLimited:
            continue
        count += 1
    return count


def test_a_minutes_requests_may_come_at_once_and_then_evenly() -> None:
    clock = Seconds()
    rate = RequestRate(30, clock)
    assert taken(rate, "key_1", 100) == 30
    clock.now += 2
    assert taken(rate, "key_1", 100) == 1
    clock.now += 3600
    assert taken(rate, "key_1", 100) == 30


def test_after_the_time_it_names_a_request_is_let_in() -> None:
    clock = Seconds()
    rate = RequestRate(7, clock)
    assert taken(rate, "key_1", 7) == 7
    clock.now += 1.5
    with pytest.raises(RateLimited, match=r"more than 7 requests a minute .* go on in 8 s") as caught:
        rate.take("key_1")
    clock.now += caught.value.details["retry_after_s"] - 1.5
    assert taken(rate, "key_1", 1) == 0
    clock.now += 1.5
    assert taken(rate, "key_1", 1) == 1


def test_refused_requests_cost_nothing() -> None:
    clock = Seconds()
    rate = RequestRate(60, clock)
    assert taken(rate, "key_1", 1000) == 60
    clock.now += 1
    assert taken(rate, "key_1", 10) == 1


def test_each_key_has_its_own_minute() -> None:
    rate = RequestRate(2, Seconds())
    assert [taken(rate, key_id, 5) for key_id in ("key_1", "key_2", None)] == [2, 2, 2]
