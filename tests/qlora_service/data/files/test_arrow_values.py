from __future__ import annotations

import io
import json
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_service.data.files.checks import check_dataset, read_examples
from qlora_service.data.files.formats import read_rows
from qlora_service.data.rows.examples import Example

CASE = Path(__file__).parents[5] / "shared" / "cases" / "parquet-null-arguments"


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def row(called: dict[str, Any], *tools: dict[str, Any], **last: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": "Wann fährt die Fähre?"},
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "c", "content": "9:40"},
            {"role": "assistant", "content": "Um 9:40 Uhr.", **last},
        ],
        "tools": list(tools),
    }


FERRY = tool("ferry", pier={"type": "string"}, at={"type": "object", "properties": {"hour": {"type": "integer"}}})
WEATHER = tool("weather", city={"type": "string", "enum": ["Rīga", "Köln"]})
ROWS = [
    row(call("ferry", {"pier": "Süd", "at": {"hour": 9}}), FERRY, WEATHER, thinking="Hm."),
    row(call("ferry", {}), FERRY, weight=0) | {"chat_template_kwargs": {"enable_thinking": True}},
    row(call("weather", {"city": "Rīga"}), WEATHER) | {"documents": [{"title": "a"}, {"text": "b"}]},
]
ROWS[1]["messages"][1].pop("content")


def examples(path: Path, rows: list[dict[str, Any]]) -> list[Example]:
    """The examples of the rows in JSONL."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return [row.example for row in read_examples(path, "jsonl", "messages")]


def from_table(path: Path, table: pa.Table) -> list[Example]:
    pq.write_table(table, path)
    return [row.example for row in read_examples(path, "parquet", "messages")]


@pytest.mark.parametrize("from_rows", [pa.Table.from_pylist, lambda rows: datasets.Dataset.from_list(rows).data.table])
def test_rows_in_parquet_are_the_rows_in_jsonl(tmp_path: Path, from_rows: Any) -> None:
    rows = [*ROWS[:1], row(call("ferry", {}), FERRY)] * 10
    assert from_table(tmp_path / "a", from_rows(rows)) == examples(tmp_path / "b", rows)
    full = [{"chat_template_kwargs": None, "documents": None} | row for row in ROWS]
    expected = examples(tmp_path / "b", ROWS)
    # A row without variables and a row with all of them null are the same struct.
    assert from_table(tmp_path / "a", from_rows(full)) == expected


def test_parquet_of_datasets_with_mixed_types_keeps_the_nulls_of_the_row(tmp_path: Path) -> None:
    rows = [row(call("f", {"x": x, "y": None})) for x in (1, "s", [1, None], {"k": None})]
    buffer = io.BytesIO()
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(buffer)
    table = pq.read_table(io.BytesIO(buffer.getvalue()))
    assert from_table(tmp_path / "a", table) == examples(tmp_path / "b", rows)


def test_map_is_an_object_with_its_nulls(tmp_path: Path) -> None:
    rows = [row(call("f", {"a": "1", "b": None})), row(call("f", {}))]
    text = pa.string()
    function_type = pa.struct([("name", text), ("arguments", pa.map_(text, text))])
    call_type = pa.struct([("id", text), ("type", text), ("function", function_type)])
    message_type = pa.struct(
        [("role", text), ("content", text), ("tool_call_id", text), ("tool_calls", pa.list_(call_type))]
    )
    messages = pa.array([row["messages"] for row in rows], pa.list_(message_type))
    assert from_table(tmp_path / "a", pa.table({"messages": messages})) == examples(tmp_path / "b", rows)


def test_values_that_json_has_no_type_for_are_text(tmp_path: Path) -> None:
    message = {"role": "assistant", "content": b"caf\xc3\xa9", "at": date(2024, 2, 29), "cost": Decimal("1.50")}
    table = pa.table({"messages": pa.array([[message | {"raw": b"\xff"}]]), "text": [b"na\xc3\xafve"]})
    pq.write_table(table, tmp_path / "a")
    (read,) = read_rows(tmp_path / "a", "parquet")
    expected = {"role": "assistant", "content": "café", "at": "2024-02-29", "cost": "1.50", "raw": None}
    assert read.value == {"messages": [expected], "text": "naïve"}


def test_dictionary_encoded_and_marked_json_text_is_read(tmp_path: Path) -> None:
    roles = pa.array([{"role": "user", "content": None}]).cast(
        pa.struct([("role", pa.dictionary(pa.int32(), pa.string())), ("content", pa.string())])
    )
    marked = pa.array(['{"a": null}', None], pa.string()).cast(pa.json_())
    pq.write_table(pa.table({"prompt": pa.concat_arrays([roles, roles]), "input": marked}), tmp_path / "a")
    values = [row.value for row in read_rows(tmp_path / "a", "parquet")]
    assert values == [
        {"prompt": {"role": "user"}, "input": {"a": None}},
        {"prompt": {"role": "user"}, "input": None},
    ]


@pytest.mark.skipif(not CASE.is_dir(), reason="no parquet-null-arguments in ../shared/cases")
def test_case_of_null_arguments_reads_the_same_from_both_files() -> None:
    both = []
    for path in (CASE / "tool-struct.jsonl", CASE / "tool-struct.parquet"):
        report = check_dataset(path)
        assert (report.usable_rows, report.warnings) == (4, ())
        both.append([row.example for row in read_examples(path, report.container, report.shape)])
    assert both[0] == both[1]
