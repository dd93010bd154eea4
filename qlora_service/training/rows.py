"""A job's rendered rows, memory-mapped: the data set may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import datasets
import pyarrow as pa

from qlora_service.data.rendering import RenderedRow, RenderReport, UnusableRow
from qlora_service.training.micro_batch import TokenRow

SCHEMA = pa.schema({"line": pa.int64(), "input_ids": pa.list_(pa.int32()), "trained": pa.list_(pa.bool_())})
WRITE_ROWS = 1000


class RenderedRows:
    """Rows by position, read from an Arrow file when asked for."""

    def __init__(self, table: datasets.Dataset) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, position: int) -> TokenRow:
        row = self._table[position]
        return TokenRow(row["line"], row["input_ids"], row["trained"])


def store_rendered(results: Iterable[RenderedRow | UnusableRow], path: Path) -> tuple[RenderedRows, RenderReport]:
    """Write the usable rows to the Arrow file `path`; the rows, and a report on all of them."""
    report = RenderReport()
    waiting: list[RenderedRow] = []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:

        def flush() -> None:
            if waiting:
                columns = {name: [getattr(row, name) for row in waiting] for name in SCHEMA.names}
                writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=SCHEMA))
                waiting.clear()

        for result in results:
            report.add(result)
            if isinstance(result, RenderedRow):
                waiting.append(result)
                if len(waiting) == WRITE_ROWS:
                    flush()
        flush()
    return RenderedRows(datasets.Dataset.from_file(str(path))), report
