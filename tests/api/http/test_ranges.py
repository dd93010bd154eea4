from __future__ import annotations

import pytest

from api.errors import RangeNotSatisfiable
from api.http.ranges import etag_of, is_unmodified, requested_range

ETAG = etag_of("abc")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=2-5", (2, 6)),
        ("bytes=7-", (7, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-30", (0, 10)),
        ("bytes=4-99", (4, 10)),
        ("BYTES=4-5", (4, 6)),
        ("bytes=4-" + "9" * 5000, (4, 10)),
        ("bytes=-" + "9" * 5000, (0, 10)),
    ],
)
def test_single_range_is_clipped_to_the_file(header: str, expected: tuple[int, int]) -> None:
    assert requested_range(header, None, ETAG, 10) == expected


@pytest.mark.parametrize("header", [None, "", "bytes=-", "bytes=5-2", "bytes=0-1,4-5", "lines=0-1", "bytes=a-b"])
def test_header_without_a_single_range_gives_the_whole_file(header: str | None) -> None:
    assert requested_range(header, None, ETAG, 10) is None


@pytest.mark.parametrize(
    ("header", "size"), [("bytes=10-", 10), ("bytes=-0", 10), ("bytes=0-", 0), ("bytes=" + "9" * 5000 + "-", 10)]
)
def test_range_outside_the_file_is_not_satisfiable(header: str, size: int) -> None:
    with pytest.raises(RangeNotSatisfiable) as caught:
        requested_range(header, None, ETAG, size)
    assert caught.value.details == {"size": size}


def test_range_applies_only_to_the_version_in_if_range() -> None:
    assert requested_range("bytes=0-1", ETAG, ETAG, 10) == (0, 2)
    assert requested_range("bytes=0-1", etag_of("old"), ETAG, 10) is None


@pytest.mark.parametrize(
    ("header", "expected"),
    [('"abc"', True), ('"x", W/"abc"', True), ("*", True), ('"x"', False), ("abc", False), (None, False)],
)
def test_file_is_unmodified_if_if_none_match_lists_its_etag(header: str | None, expected: bool) -> None:
    assert is_unmodified(header, ETAG) is expected
