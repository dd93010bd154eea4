"""Preparation of rows for training, this service against TRL; and the packing efficiency of micro-batches.

Both sides have the same rows, tokenizer and limits, and no caches. TRL gets the rows in its conversational
prompt-completion format and packs them; this service takes them from the parsed row through the Arrow file to the
micro-batches of every step. Reading tokenizer.json counts for neither side; starting the process that runs the chat
template counts for this service.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import islice, repeat
from operator import truediv
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from qlora_service.cli.demo_data import orders
from qlora_service.data.batching import pack, step_rows, total_steps
from qlora_service.data.rendering.renderer import Renderer, RenderRules
from qlora_service.data.rows.examples import SourceRow
from qlora_service.data.rows.shapes import to_example
from qlora_service.training.network.micro_batch import TokenRow, collate
from qlora_service.training.rows import RenderedRows, store_rendered
from tests.tiny_model import build_tiny_model

ROOT = Path(__file__).parent.parent.parent
ALPACA = ROOT.parent / "shared" / "data" / "alpaca_en_demo.json"
SMOLLM2 = ROOT / ".cache" / "tests" / "models" / "SmolLM2-135M-Instruct"
ROWS = 4_000
"""Upper bound of the rows in a round; a smaller dataset is repeated"""
ROUNDS = 7
MAX_TOKENS = 2048
BATCH_SIZE = 16
SEED = 0

Work = Callable[[], Any]


def figures() -> Iterator[dict[str, Any]]:
    # Tokenize on all cores; makes no difference for TRL, which tokenizes row by row.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    datasets.disable_caching()
    datasets.disable_progress_bars()
    # As in a trainer, for both sides: a garbage collection does not traverse the imports, which takes 0.3 s.
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        tiny = build_tiny_model(scratch / "tiny")
        tokenizer = SMOLLM2 if SMOLLM2.is_dir() else tiny
        values = _values()
        ours, packed, default = _in_turn(
            _ours(tokenizer, values, scratch),
            _trl(tiny, tokenizer, values, scratch, packing=True, packing_strategy="bfd", max_length=MAX_TOKENS),
            _trl(tiny, tokenizer, values, scratch),
        )
        yield _figure("rows/s prepared over TRL", _ratio(packed, ours), "x", must=3)
        yield _figure("rows/s prepared over TRL with its defaults, not packed", _ratio(default, ours), "x")
        yield _figure("rows/s prepared", len(values) / statistics.median(ours), "rows/s")
        yield from _packing_efficiency(_prepare(_renderer(tokenizer), values, scratch))


def _values() -> list[dict[str, Any]]:
    """Parsed rows in Alpaca's shape."""
    if ALPACA.is_file():
        values: list[dict[str, Any]] = json.loads(ALPACA.read_bytes())
        return values * (ROWS // len(values))
    return [{"instruction": order.question, "output": order.record} for order in islice(orders(), ROWS)]


def _in_turn(*sides: Iterator[Work]) -> list[list[float]]:
    """Seconds of each side's work by round, after a warm-up; the order is reversed in every second round."""
    times: list[list[float]] = [[] for _ in sides]
    for round_ in range(ROUNDS + 1):
        for side, side_times in list(zip(sides, times, strict=True))[:: 1 if round_ % 2 else -1]:
            work = next(side)
            started = time.perf_counter()
            work()
            if round_:
                side_times.append(time.perf_counter() - started)
    return times


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median of the rounds' ratios: the machine may be slower in one round than in another."""
    return statistics.median(map(truediv, theirs, ours))


def _ours(model: Path, values: Sequence[dict[str, Any]], scratch: Path) -> Iterator[Work]:
    """The work of every round, each with a new renderer."""

    def work(renderer: Renderer) -> None:
        for _ in _prepare(renderer, values, scratch):
            pass

    while True:
        yield partial(work, _renderer(model))


def _renderer(model: Path) -> Renderer:
    return Renderer(model, RenderRules(MAX_TOKENS, too_long="truncate"), datetime.now(UTC))


def _prepare(renderer: Renderer, values: Sequence[dict[str, Any]], scratch: Path) -> Iterator[list[list[TokenRow]]]:
    """The micro-batches of every step of an epoch."""
    source = (SourceRow(to_example(value, "alpaca"), line, None) for line, value in enumerate(values, start=1))
    with renderer:
        rows, report = store_rendered(renderer.render(source), scratch / "rows.arrow")
    assert report.usable_rows == len(values)
    return (_micro_batches(rows, step) for step in range(total_steps(len(rows), BATCH_SIZE, 1.0, None)))


def _micro_batches(rows: RenderedRows, step: int) -> list[list[TokenRow]]:
    examples = [rows[position] for position in step_rows(step, len(rows), BATCH_SIZE, 1.0, None, SEED)]
    rows_of_step = [row for example in examples for row in example.documents]
    bins = pack([len(row.input_ids) for row in rows_of_step], MAX_TOKENS)
    return [[rows_of_step[position] for position in positions] for positions in bins]


def _trl(
    model: Path, tokenizer: Path, values: Sequence[dict[str, Any]], scratch: Path, **settings: Any
) -> Iterator[Work]:
    """TRL's preparation only: its trainer is created before, with a tiny model and two of the rows."""
    rows = datasets.Dataset.from_list([_conversation(value) for value in values])
    config = SFTConfig(output_dir=str(scratch / "trl"), use_cpu=True, bf16=False, report_to="none", **settings)
    processing_class = AutoTokenizer.from_pretrained(tokenizer)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        config,
        train_dataset=rows.select(range(2)),
        processing_class=processing_class,
    )

    def work() -> None:
        assert len(trainer._prepare_dataset(rows, processing_class, config, config.packing, None, "train")) > 0

    return repeat(work)


def _conversation(value: dict[str, Any]) -> dict[str, Any]:
    question = "\n\n".join(filter(None, [value["instruction"], value.get("input")]))
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": value["output"]}],
    }


def _packing_efficiency(steps: Iterable[list[list[TokenRow]]]) -> Iterator[dict[str, Any]]:
    """Example tokens as a share of the computed token positions, and of the micro-batch budget."""
    micro_batches = [rows for step in steps for rows in step]
    tokens = sum(len(row.input_ids) for rows in micro_batches for row in rows)
    slots = sum(collate(rows, torch.device("cpu")).input_ids.numel() for rows in micro_batches)
    yield _figure("packing efficiency, tokens over computed slots, batch 16", tokens / slots, "", must=0.95)
    yield _figure("budget fill, tokens over micro-batches of 2048", tokens / (len(micro_batches) * MAX_TOKENS), "")


def _figure(name: str, value: float, unit: str, must: float | None = None) -> dict[str, Any]:
    return {"figure": name, "value": round(value, 3), "unit": unit, "must": must, "better": "higher"}
