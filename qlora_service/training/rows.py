"""Rendered rows of a job in a memory-mapped Arrow file, because a dataset may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qlora_service.data.rendering.renderer import RenderedRow, UnusableRow
from qlora_service.data.rendering.report import RenderReport
from qlora_service.training.network.micro_batch import LabeledRow, PreferencePair, TokenRow, TrainingExample

IDS, FLAGS = pa.list_(pa.int32()), pa.list_(pa.bool_())
SCHEMA = pa.schema(
    {
        "line": pa.int64(),
        "input_ids": IDS,
        "trained": FLAGS,
        # The rejected answer of a preference pair; the label of a labeled answer. Null in rows of other kinds.
        "rejected_input_ids": IDS,
        "rejected_trained": FLAGS,
        "desirable": pa.bool_(),
    }
)
BATCH_ROWS = 1000
"""Rows in every record batch but the last"""


class RenderedRows:
    """Rows by position, read from the Arrow file on access."""

    def __init__(self, path: Path) -> None:
        batches = list(pa.ipc.open_stream(pa.memory_map(str(path))))
        self._rows = sum(batch.num_rows for batch in batches)
        self._columns = [batch.columns for batch in batches]

    def __len__(self) -> int:
        return self._rows

    def tokens(self) -> list[int]:
        """Tokens of each row; of a preference pair, both answers with their prompts."""
        tokens: list[int] = []
        for columns in self._columns:
            for own, rejected in zip(
                _lengths(columns, "input_ids"), _lengths(columns, "rejected_input_ids"), strict=True
            ):
                tokens.append(own + rejected)
        return tokens

    def __getitem__(self, position: int) -> TrainingExample:
        if not 0 <= position < self._rows:
            raise IndexError(f"row {position} of {self._rows}")
        batch, offset = divmod(position, BATCH_ROWS)
        cells = [column[offset] for column in self._columns[batch]]
        line, input_ids, trained, rejected_input_ids, rejected_trained, desirable = cells
        row = TokenRow(line.as_py(), _values(input_ids), _values(trained))
        if desirable.is_valid:
            return LabeledRow(row, desirable.as_py())
        if rejected_input_ids.is_valid:
            return PreferencePair(row, TokenRow(row.line, _values(rejected_input_ids), _values(rejected_trained)))
        return row


def store_rendered(results: Iterable[RenderedRow | UnusableRow], path: Path) -> tuple[RenderedRows, RenderReport]:
    """The usable rows, written to the Arrow file `path`, and a report on all rows."""
    report = RenderReport()
    pending: list[RenderedRow] = []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for result in results:
            report.add(result)
            if isinstance(result, RenderedRow):
                pending.append(result)
                if len(pending) == BATCH_ROWS:
                    writer.write_batch(_record_batch(pending))
                    pending.clear()
        if pending:
            writer.write_batch(_record_batch(pending))
    report.finish()
    return RenderedRows(path), report


def _record_batch(rows: list[RenderedRow]) -> Any:
    rejected = [row.rejected for row in rows]
    columns = {
        "line": [row.line for row in rows],
        "input_ids": [row.input_ids for row in rows],
        "trained": [row.trained for row in rows],
        "rejected_input_ids": [side and side.input_ids for side in rejected],
        "rejected_trained": [side and side.trained for side in rejected],
        "desirable": [row.desirable for row in rows],
    }
    return pa.RecordBatch.from_pydict(columns, schema=SCHEMA)


def _lengths(columns: list[Any], name: str) -> list[int]:
    """Number of values in each cell of the column; 0 for a null."""
    lengths = pc.list_value_length(columns[SCHEMA.get_field_index(name)])
    return [length or 0 for length in lengths.to_pylist()]


def _values(cell: Any) -> Any:
    """The Python list of a list cell; through numpy, which is ten times as fast as value by value."""
    return cell.values.to_numpy(zero_copy_only=False).tolist()
