"""Rows prepared: ours against transformers' `apply_chat_template` with an assistant mask by prefix, row by row."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qlora_service.cli.demo_data import orders
from qlora_service.data.examples import Chat, SourceRow
from qlora_service.data.rendering import Renderer, RenderRules
from tests.tiny_model import build_tiny_model

ROWS = 2_000
ROUNDS = 5


def figures() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        model = build_tiny_model(Path(scratch) / "model")
        conversations = [
            ({"role": "user", "content": order.question}, {"role": "assistant", "content": order.record})
            for order in islice(orders(), ROWS)
        ]
        ours, theirs = _alternate(_ours(model, conversations), _transformers(model, conversations))
    yield {
        "figure": "rows rendered over transformers' apply_chat_template",
        "value": round(theirs / ours, 2),
        "unit": "x",
        "must": None,
        "better": "higher",
    }


def _alternate(first: Callable[[], None], second: Callable[[], None]) -> tuple[float, float]:
    """Median seconds of each, after a warm-up, taken in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(ROUNDS + 1):
        for work, record in ((first, times[0]), (second, times[1]))[:: 1 if round_ % 2 else -1]:
            started = time.perf_counter()
            work()
            if round_:
                record.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def _ours(model: Path, conversations: list[Any]) -> Callable[[], None]:
    rows = [SourceRow(Chat(messages, (False, True)), line, None) for line, messages in enumerate(conversations)]

    def work() -> None:
        with Renderer(model, RenderRules(512), datetime.now(UTC)) as renderer:
            assert sum(1 for _ in renderer.render(rows)) == len(rows)

    return work


def _transformers(model: Path, conversations: list[Any]) -> Callable[[], None]:
    tokenizer = AutoTokenizer.from_pretrained(model)

    def work() -> None:
        for messages in conversations:
            prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)
            whole = tokenizer.apply_chat_template(messages, return_dict=True)
            assert len(whole["input_ids"]) > len(prompt["input_ids"])

    return work
