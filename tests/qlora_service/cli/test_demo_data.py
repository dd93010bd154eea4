from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

from qlora_service.cli.demo_data import NUMBERS, orders, write_demo_dataset

RECORD = re.compile(r"<<([A-Z]{3}):([A-Z]{3})>> (\d+)\*([a-z]+)\[([a-z]{3})/([SML])\]")


def test_same_seed_gives_the_same_orders() -> None:
    assert list(islice(orders(3), 20)) == list(islice(orders(3), 20))
    assert list(islice(orders(3), 20)) != list(islice(orders(4), 20))


def test_record_matches_its_question() -> None:
    for order in islice(orders(0), 200):
        match = RECORD.fullmatch(order.record)
        assert match is not None, order.record
        place, day, number, item, color, size = match.groups()
        words = re.findall(r"[A-Za-z]+", order.question)
        assert any(word[:3].upper() == place and word[0].isupper() for word in words)
        assert any(word[:3].upper() == day and word.endswith("day") for word in words)
        assert f"{item}s" in words
        assert any(NUMBERS.get(word.lower()) == int(number) for word in words)
        assert any(word[:3] == color for word in words)
        assert any(word[0].upper() == size for word in words if word in ("small", "medium", "large"))


def test_returned_orders_are_not_in_the_dataset(tmp_path: Path) -> None:
    new_orders = write_demo_dataset(tmp_path / "rows.jsonl", rows=350)
    rows = [json.loads(line)["messages"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    answers = [messages[1]["content"] for messages in rows]
    assert len(set(answers)) == 350
    assert len(new_orders) == 2
    assert not {order.record for order in new_orders} & set(answers)
