from __future__ import annotations

from typing import Any

import pytest

from qlora_service.data.rows.cells import Notes
from qlora_service.data.rows.examples import Shape
from qlora_service.data.rows.shapes import to_example

USER, ANSWER = {"role": "user", "content": "Wer?"}, {"role": "assistant", "content": "Anna"}
MESSAGES = {"messages": [USER, ANSWER]}
PAIR = {"chosen": "Anna", "rejected": "Otto"}


def noted(row: dict[str, Any], shape: Shape) -> list[str]:
    notes: Notes = []
    to_example(row, shape, notes)
    return [note.pointer for note in notes]


@pytest.mark.parametrize(
    ("shape", "row", "column", "cell"),
    [
        ("messages", MESSAGES, "system", "Kurz."),
        ("messages", MESSAGES, "images", ["a.png"]),
        ("messages", MESSAGES, "rejected_response", "Otto"),
        ("messages", MESSAGES, "kto_tag", False),
        ("messages", MESSAGES, "enable_thinking", False),
        ("messages", MESSAGES, "tool_choice", "required"),
        ("messages", MESSAGES, "weight", 2.0),
        ("messages", MESSAGES, "weight", 0),
        ("alpaca", {"instruction": "a", "output": "b"}, "context", "c"),
        ("alpaca", {"instruction": "a", "output": "b"}, "thinking", "c"),
        ("dolly", {"instruction": "a", "response": "b"}, "input", "c"),
        ("prompt_completion", {"prompt": "a", "completion": "b"}, "tools", [{"name": "f"}]),
        ("prompt_completion", {"prompt": "a", "completion": "b"}, "system", "c"),
        ("text", {"text": "a"}, "functions", [{"name": "f"}]),
        ("preference", {"prompt": "a", **PAIR}, "system", "c"),
        ("preference", {"prompt": "a", **PAIR}, "chat_template_kwargs", {"a": 1}),
        ("kto", {"prompt": "a", "completion": "b", "label": True}, "documents", [{"text": "c"}]),
        ("sharegpt", {"conversations": [USER, ANSWER]}, "history", [["a", "b"]]),
    ],
)
def test_column_that_the_form_of_a_row_does_not_use_is_noted(
    shape: Shape, row: dict[str, Any], column: str, cell: Any
) -> None:
    assert noted(row, shape) == []
    assert noted(row | {column: cell}, shape) == [f"/{column}"]
    assert [noted(row | {column: blank}, shape) for blank in (None, "")] == [[], []]


@pytest.mark.parametrize(
    ("shape", "row"),
    [
        ("messages", MESSAGES | {"id": 7, "source": "web", "prompt": "Wer?", "parallel_tool_calls": False}),
        ("messages", MESSAGES | {"weight": 1.0, "tool_choice": "auto", "function_call": "auto"}),
        ("sharegpt", {"conversations": [USER, ANSWER], "system": "Kurz."}),
        ("alpaca", {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": [["e", "f"]]}),
        ("dolly", {"instruction": "a", "context": "b", "response": "c", "category": "d"}),
        ("preference", {"instruction": "a", "input": "b", "system": "c", "history": [["d", "e"]], **PAIR}),
        ("preference", {"conversations": [USER], "system": "c", **PAIR}),
        ("text", {"text": "a", "system": "b", "instruction": "c", "input": "d"}),
    ],
)
def test_columns_that_are_used_or_have_no_meaning_are_not_noted(shape: Shape, row: dict[str, Any]) -> None:
    assert noted(row, shape) == []
