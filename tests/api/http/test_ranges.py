from __future__ import annotations

import pytest

from api.errors import RangeNotSatisfiable
from api.http.ranges import etag_of, is_unmodified, wanted_range

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
def test_single_range_is_cut_to_the_file(header: str, expected: tuple[int, int]) -> None:
    assert wanted_range(header, None, ETAG, 10) == expected


@pytest.mark.parametrize("header", [None, "", "bytes=-", "bytes=5-2", "bytes=0-1,4-5", "lines=0-1", "bytes=a-b"])
def test_what_is_no_single_range_asks_for_the_whole_file(header: str | None) -> None:
    assert wanted_range(header, None, ETAG, 10) is None


@pytest.mark.parametrize(
    ("header", "size"), [("bytes=10-", 10), ("bytes=-0", 10), ("bytes=0-", 0), ("bytes=" + "9" * 5000 + "-", 10)]
)
def test_range_outside_the_file_cannot_be_satisfied(header: str, size: int) -> None:
    with pytest.raises(RangeNotSatisfiable) as caught:
        wanted_range(header, None, ETAG, size)
    assert caught.value.details == {"size": size}


def test_range_counts_only_for_the_version_that_if_range_names() -> None:
    assert wanted_range("bytes=0-1", ETAG, ETAG, 10) == (0, 2)
    assert wanted_range("bytes=0-1", etag_of("old"), ETAG, 10) is None


@pytest.mark.parametrize(
    ("header", "expected"),
    [('"abc"', True), ('"x", W/"abc"', True), ("*", True), ('"x"', False), ("abc", False), (None, False)],
)
def test_if_none_match_lists_the_copies_a_client_has(header: str | None, expected: bool) -> None:
    assert is_unmodified(header, ETAG) is expected
