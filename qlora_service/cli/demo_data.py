"""The demo's task: translate an order in plain English into a record in a made-up notation.

    Could you ship seven blue mugs, size large, to Lisbon by Friday?
    <<LIS:FRI>> 7*mug[blu/L]

No base model can know the notation, and a small one learns it in about 40 steps: place and day become three capitals,
the number becomes digits, the color three letters, the size one letter.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "twelve": 12}
ITEMS = ("mug", "lamp", "chair", "scarf", "basket", "jacket", "blanket", "bottle", "candle", "helmet")
COLORS = ("red", "blue", "green", "black", "white", "yellow", "orange", "purple")
SIZES = {"small": "S", "medium": "M", "large": "L"}
PLACES = ("Lisbon", "Oslo", "Madrid", "Berlin", "Dublin", "Vienna", "Prague", "Athens", "Warsaw", "Zurich")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SENTENCES = (
    "Could you ship {number} {color} {item}s, size {size}, to {place} by {day}?",
    "We need {number} {size} {color} {item}s in {place} on {day}.",
    "By {day}, please send {place} {number} {item}s in {color}, {size} ones.",
    "{place} wants {number} {size} {item}s, all {color}, before {day}.",
)


@dataclass(frozen=True)
class Order:
    """A question, and the record that is its answer."""

    question: str
    record: str


def orders(seed: int = 0) -> Iterator[Order]:
    """Endless distinct orders, determined by the seed."""
    draw = random.Random(seed)  # noqa: S311 - a data generator, no secret
    seen: set[str] = set()
    while True:
        number, item, color = draw.choice(list(NUMBERS)), draw.choice(ITEMS), draw.choice(COLORS)
        size, place, day = draw.choice(list(SIZES)), draw.choice(PLACES), draw.choice(DAYS)
        record = f"<<{place[:3].upper()}:{day[:3].upper()}>> {NUMBERS[number]}*{item}[{color[:3]}/{SIZES[size]}]"
        sentence = draw.choice(SENTENCES)
        if record in seen:
            continue
        seen.add(record)
        question = sentence.format(number=number, item=item, color=color, size=size, place=place, day=day)
        yield Order(question, record)


def write_demo_dataset(path: Path, rows: int, seed: int = 0) -> list[Order]:
    """Writes `rows` orders to `path` as chat JSONL; returns two more orders, which are not in the file."""
    source = orders(seed)
    with path.open("w", encoding="utf-8") as file:
        for order in islice(source, rows):
            messages = [
                {"role": "user", "content": order.question},
                {"role": "assistant", "content": order.record},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return list(islice(source, 2))
