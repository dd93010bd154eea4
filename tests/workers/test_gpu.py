from __future__ import annotations

import pytest

from workers.gpu import choose_visible

CARDS: list[str | None] = ["GPU-aaa", None, "GPU-ccc", "GPU-cdd"]


@pytest.mark.parametrize(
    ("visible", "chosen"),
    [
        (None, ["GPU-aaa", "GPU-ccc", "GPU-cdd"]),
        ("", []),
        ("0", ["GPU-aaa"]),
        ("2, 0", ["GPU-ccc", "GPU-aaa"]),
        ("GPU-cc", ["GPU-ccc"]),
        ("1", []),
        ("0,9,2", ["GPU-aaa"]),
        ("-1", []),
    ],
)
def test_what_the_operator_hid_stays_hidden(visible: str | None, chosen: list[str]) -> None:
    assert choose_visible(CARDS, visible) == chosen
