from __future__ import annotations

import io
import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_service.data.files.checks import MAX_FINDINGS, check_dataset, check_rows, read_examples
from qlora_service.data.files.formats import read_rows
from qlora_service.data.files.splitting import MAX_ROW_BYTES
from qlora_service.data.rows.examples import Completion, Container, LabeledAnswer, Shape, SourceRow, Text
from qlora_service.data.rows.shapes import REQUIRED
from qlora_service.domain.datasets import DatasetReport
from qlora_service.errors import Finding, InvalidDataset
from tests.planted_errors import PLANTED, chat_line

ALPACA = {"instruction": "Translate: perro", "input": "", "output": "dog 🐕"}
TEXT = {"text": "Es war einmal"}
BROKEN = '{"text": '


def write(path: Path, *rows: Any) -> Path:
    """Writes a JSONL file of the rows; a string is written as a line unchanged."""
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    return tmp_path / "upload"


def test_report_counts_every_row_and_lists_findings(upload: Path) -> None:
    write(upload, ALPACA, BROKEN, "", TEXT, {**ALPACA, "output": " "}, ALPACA)
    second = len(json.dumps(ALPACA, ensure_ascii=False).encode()) + 1
    fourth = second + len(BROKEN) + 2
    fifth = fourth + len(json.dumps(TEXT)) + 1
    report = check_dataset(upload)
    assert report == DatasetReport(
        container="jsonl",
        shape="alpaca",
        bytes=upload.stat().st_size,
        rows=5,
        usable_rows=2,
        finding_count=3,
        findings=report.findings,
        finding_kinds=report.finding_kinds,
    )
    assert [(finding.line, finding.byte_offset, finding.pointer) for finding in report.findings] == [
        (2, second, ""),
        (4, fourth, ""),
        (5, fifth, "/output"),
    ]
    assert "not valid JSON" in report.findings[0].reason
    assert "has the shape text" in report.findings[1].reason


def test_examples_are_the_usable_rows_with_their_places(upload: Path) -> None:
    write(upload, {"text": "a"}, BROKEN, {"text": ""}, {"text": "ü"})
    assert list(read_examples(upload, "jsonl", "text")) == [
        SourceRow(Text("a"), 1, 0),
        SourceRow(Text("ü"), 4, 37),
    ]


def test_findings_are_limited_and_their_count_is_exact(upload: Path) -> None:
    report = check_dataset(write(upload, TEXT, *[BROKEN] * (MAX_FINDINGS + 50)))
    assert (report.rows, report.usable_rows, report.finding_count) == (MAX_FINDINGS + 51, 1, MAX_FINDINGS + 50)
    assert [finding.line for finding in report.findings] == list(range(2, MAX_FINDINGS + 2))


def test_every_reason_is_listed_also_beyond_the_first_findings(upload: Path) -> None:
    report = check_dataset(write(upload, TEXT, *[BROKEN] * (MAX_FINDINGS + 50), {"text": 5}, {"text": 6}))
    broken, number = report.finding_kinds
    assert (broken.rows, broken.lines) == (MAX_FINDINGS + 50, [2, 3, 4, 5, 6])
    assert (number.rows, number.lines, number.pointer) == (2, [MAX_FINDINGS + 52, MAX_FINDINGS + 53], "/text")
    assert number.reason == "must be a string, is a number"


def test_report_survives_json(upload: Path) -> None:
    report = check_dataset(write(upload, TEXT, BROKEN))
    assert DatasetReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report


def test_shape_is_the_most_frequent_of_the_first_readable_rows(upload: Path) -> None:
    write(upload, *[BROKEN] * 30, *[ALPACA] * 9, *[TEXT] * 11, *[ALPACA] * 50)
    report = check_dataset(upload)
    assert (report.shape, report.usable_rows, report.finding_count) == ("text", 11, 89)


def test_stated_shape_and_container_are_used(upload: Path) -> None:
    both = {**ALPACA, **TEXT}
    assert check_dataset(write(upload, both)).shape == "alpaca"
    assert check_dataset(write(upload, both), shape="text").shape == "text"
    report = check_dataset(write(upload, both, both), container="text")
    assert (report.container, report.shape, report.rows) == ("text", "text", 1)


def test_name_must_match_the_content(upload: Path) -> None:
    write(upload, TEXT)
    assert check_dataset(upload, filename="data.jsonl").container == "jsonl"
    with pytest.raises(InvalidDataset, match=r"'data.parquet' seems to be JSON Lines"):
        check_dataset(upload, filename="data.parquet")


@pytest.mark.parametrize(
    ("rows", "shape", "message", "reason"),
    [
        ([BROKEN] * 150, None, "none of its rows can be read", "not valid JSON"),
        ([{"question": "a"}] * 150, None, "fit no accepted shape", "'question'"),
        ([{"text": " "}] * 150, None, "none of its 150 rows is usable as text", "the text is empty"),
        ([TEXT] * 150, "dolly", "none of its 150 rows is usable as dolly", "has the shape text"),
    ],
)
def test_dataset_without_a_usable_row_is_refused_with_findings(
    upload: Path, rows: list[Any], shape: Shape | None, message: str, reason: str
) -> None:
    with pytest.raises(InvalidDataset, match=message) as caught:
        check_dataset(write(upload, *rows), filename="x.jsonl", shape=shape)
    findings = caught.value.findings
    assert 0 < len(findings) <= MAX_FINDINGS
    assert findings[0].line == 1
    assert reason in findings[0].reason
    assert pickle.loads(pickle.dumps(caught.value)).findings == findings


def test_file_with_a_header_and_no_rows_is_refused(upload: Path) -> None:
    upload.write_text("prompt,completion\n", encoding="utf-8")
    with pytest.raises(InvalidDataset, match="it has no rows"):
        check_dataset(upload)


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_same_rows_give_the_same_examples_from_every_container(upload: Path) -> None:
    rows = [{"messages": conversation('¿Qué, "hora"?\nDime', "お昼です"), "tools": None} for _ in range(3)]
    texts = [json.dumps(row["messages"], ensure_ascii=False).replace('"', '""') for row in rows]
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"messages": row["messages"]} for row in rows]), parquet)
    files: dict[Container, bytes] = {
        "jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "json": json.dumps(rows, indent=2).encode(),
        "csv": ("messages;tools\r\n" + "".join(f'"{text}";\r\n' for text in texts)).encode(),
        "parquet": parquet.getvalue(),
    }
    examples = []
    for container, data in files.items():
        upload.write_bytes(data)
        report = check_dataset(upload)
        assert (report.container, report.shape, report.usable_rows) == (container, "messages", 3)
        examples.append([row.example for row in read_examples(upload, container, "messages")])
    assert examples[0] == examples[1] == examples[2] == examples[3]


def test_labels_are_read_from_every_container(upload: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    files: dict[Container, bytes] = {
        "jsonl": "\n".join(map(json.dumps, rows)).encode(),
        "csv": b"prompt,completion,label\na,b,True\na,b,False\n",
        "parquet": parquet.getvalue(),
    }
    for container, data in files.items():
        upload.write_bytes(data)
        report = check_dataset(upload)
        assert (report.container, report.shape) == (container, "kto")
        examples = [row.example for row in read_examples(upload, container, "kto")]
        assert examples == [LabeledAnswer(Completion("a", "b"), True), LabeledAnswer(Completion("a", "b"), False)]


def test_pairs_are_read_from_csv_and_from_parquet(upload: Path) -> None:
    openai = {
        "input": {"messages": [{"role": "user", "content": "a"}]},
        "preferred_output": [{"role": "assistant", "content": "b"}],
        "non_preferred_output": [{"role": "assistant", "content": "c"}],
    }
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([openai]), parquet)
    for data in (b"prompt,chosen,rejected\na,b,c\n", parquet.getvalue()):
        upload.write_bytes(data)
        report = check_dataset(upload)
        assert (report.shape, report.usable_rows) == ("preference", 1)


def csv_cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return '"' + text.replace('"', '""') + '"'


QUESTION, ANSWER = conversation('¿Qué, "hora"?', "お昼です")
OTHER = {"role": "assistant", "content": "夜です"}


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        (
            "messages",
            {
                "messages": [QUESTION, ANSWER],
                "functions": [{"name": "now"}],
                "documents": [{"text": "a"}],
                "chat_template_kwargs": {"enable_thinking": False},
            },
        ),
        ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": []}),
        ("alpaca", {"instruction": "a", "output": "[b]", "history": [["c", "d"]]}),
        ("prompt_completion", {"prompt": [QUESTION], "completion": [ANSWER]}),
        ("prompt_completion", {"prompt": "[INST] a [/INST]", "completion": '{"hora": "12:00"}'}),
        ("preference", {"prompt": [QUESTION], "chosen": ANSWER, "rejected": OTHER}),
        ("preference", {"chosen": [QUESTION, ANSWER], "rejected": [QUESTION, OTHER]}),
        (
            "preference",
            {"input": {"messages": [QUESTION]}, "preferred_output": [ANSWER], "non_preferred_output": [OTHER]},
        ),
        ("kto", {"messages": [QUESTION, ANSWER], "label": True}),
    ],
)
def test_cells_of_json_text_are_read_as_what_they_hold(upload: Path, shape: Shape, row: dict[str, Any]) -> None:
    expected = [found.example for found in read_examples(write(upload, row), "jsonl", shape)]
    texts = {name: cell if isinstance(cell, str) else json.dumps(cell) for name, cell in row.items()}
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([texts]), parquet)
    files: dict[Container, bytes] = {
        "jsonl": json.dumps(texts).encode(),
        "csv": f"{','.join(row)}\n{','.join(map(csv_cell, row.values()))}\n".encode(),
        "parquet": parquet.getvalue(),
    }
    for container, data in files.items():
        upload.write_bytes(data)
        report = check_dataset(upload)
        assert (report.container, report.shape, report.usable_rows, report.warnings) == (container, shape, 1, ())
        assert [found.example for found in read_examples(upload, container, shape)] == expected


def test_csv_cell_that_is_not_json_is_a_finding(upload: Path) -> None:
    upload.write_text(f"messages,tools\n{csv_cell([QUESTION, ANSWER])},\n[{{],\nhola,\n", encoding="utf-8")
    report = check_dataset(upload)
    assert [(finding.line, finding.pointer) for finding in report.findings] == [(3, "/messages"), (4, "/messages")]
    assert "not valid JSON" in report.findings[0].reason
    assert "must be a list, is a string" in report.findings[1].reason


def test_rows_with_the_same_warning_are_one_warning_with_a_count(upload: Path) -> None:
    plain = {"messages": [QUESTION, ANSWER]}
    detail = {"messages": [QUESTION, {**ANSWER, "train_detail": [{"begin_offset": 0}]}], "system": "a"}
    rows = [plain, *[detail] * 12, BROKEN, plain, {"messages": [QUESTION, {**ANSWER, "images": ["a"]}]}]
    report = check_dataset(write(upload, *rows))
    assert (report.usable_rows, report.finding_count) == (15, 1)
    kinds = [(warning.pointer, warning.rows, warning.lines) for warning in report.warnings]
    first = [2, 3, 4, 5, 6]
    assert kinds == [("/messages/1/train_detail", 12, first), ("/system", 12, first), ("/messages/1/images", 1, [16])]
    found = {row.line: row.warnings for row in read_examples(upload, "jsonl", "messages")}
    assert [line for line, warnings in found.items() if not warnings] == [1, 15]
    offset = len(json.dumps(plain, ensure_ascii=False).encode()) + 1
    assert [(w.line, w.byte_offset, w.pointer) for w in found[2]] == [
        (2, offset, "/messages/1/train_detail"),
        (2, offset, "/system"),
    ]
    assert DatasetReport.from_dict(json.loads(json.dumps(report.as_dict()))) == report
    upload.write_text(json.dumps([row for row in rows if row != BROKEN]), encoding="utf-8")
    assert [warning.rows for warning in check_dataset(upload).warnings] == [12, 12, 1]


@pytest.mark.parametrize(
    ("container", "opening", "between", "closing"),
    [
        ("jsonl", b'{"text": "', b'"}\n{"text": "', b'"}\n'),
        ("json", b'[{"text": "', b'"}, {"text": "', b'"}]'),
        ("csv", b'text\n"', b'"\n"', b'"\n'),
        ("text", b"", b"\n\n", b"\n"),
    ],
)
def test_memory_grows_neither_with_the_file_nor_with_its_longest_row(
    upload: Path, container: Container, opening: bytes, between: bytes, closing: bytes
) -> None:
    line = b"x" * (2**20 - 1)
    with upload.open("wb") as file:
        file.write(opening)
        file.writelines([line, between] * 48)
        # One row of 48 MiB; only a text document may span several lines.
        file.writelines([line, b"\n" if container == "text" else b"x"] * 48)
        file.write(closing)
    tracemalloc.start()
    try:
        report = check_dataset(upload, container=container, shape="text")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (report.rows, report.usable_rows) == (49, 48)
    assert report.findings[0].reason.startswith("longer than 16 MiB")
    assert peak_bytes < 2.5 * MAX_ROW_BYTES


def test_every_planted_error_is_found_at_its_line_and_byte(upload: Path) -> None:
    good, blank, offsets = chat_line('Grüße? "👋"\n', "Ja"), b" \r\n", []
    with upload.open("wb") as file:
        for number, planted in enumerate(PLANTED):
            # One more blank line each time, so that the errors are at different places in the blocks of lines.
            file.writelines([good, b"\n", blank] * 200 + [blank] * number)
            offsets.append(file.tell())
            file.writelines([planted.line, b"\n"])
        file.write(good)
    data, results = upload.read_bytes(), list(check_rows(upload, "jsonl", "messages"))
    findings = [result for result in results if isinstance(result, Finding)]
    for planted, offset, finding in zip(PLANTED, offsets, findings, strict=True):
        assert planted.reason in finding.reason
        place = (finding.line, finding.byte_offset, finding.pointer)
        assert place == (data.count(b"\n", 0, offset) + 1, offset, planted.pointer)
    assert sum(result for result in results if isinstance(result, int)) == 200 * len(PLANTED) + 1


def test_rows_are_counted_together_only_up_to_the_next_finding(upload: Path) -> None:
    write(upload, *[TEXT] * 3, BROKEN, TEXT)
    results = list(check_rows(upload, "jsonl", "text"))
    at = next(index for index, result in enumerate(results) if isinstance(result, Finding))
    assert (results[:at], results[at + 1 :]) == ([1, 1, 1], [1])


ROW = st.sampled_from([ALPACA, TEXT, {"messages": conversation("a", "b")}, {"messages": []}, {"prompt": 1}]).map(
    lambda row: json.dumps(row).encode()
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ROW | st.binary(max_size=12), max_size=8), st.sampled_from([b"\n", b"\r\n", b","]))
def test_any_file_is_reported_on_or_refused(upload: Path, rows: list[bytes], separator: bytes) -> None:
    upload.write_bytes(separator.join(rows))
    try:
        report = check_dataset(upload)
    except InvalidDataset as error:
        json.dumps(error.as_dict(), ensure_ascii=False).encode()
        return
    json.dumps(report.as_dict(), ensure_ascii=False).encode()
    assert report.usable_rows == report.rows - report.finding_count > 0
    assert len(list(read_examples(upload, report.container, report.shape))) == report.usable_rows


PLANTED_LINE = st.sampled_from([planted.line for planted in PLANTED if len(planted.line) < 10_000])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(ROW | PLANTED_LINE | st.binary(max_size=9), max_size=8),
    st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n \r\n"]),
    st.sampled_from(sorted(REQUIRED)),
)
def test_counted_rows_are_the_examples_that_are_read(
    upload: Path, rows: list[bytes], separator: bytes, shape: Shape
) -> None:
    upload.write_bytes(separator.join(rows))
    results = list(check_rows(upload, "jsonl", shape))
    counted = sum(result for result in results if isinstance(result, int))
    refused = {result.line for result in results if isinstance(result, Finding)}
    examples = [row.line for row in read_examples(upload, "jsonl", shape)]
    assert len(examples) == counted
    assert refused == {row.line for row in read_rows(upload, "jsonl")} - set(examples)
