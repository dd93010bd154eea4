from __future__ import annotations

import json
from typing import Any

import pytest

from qlora_service.data.json.strict import RowProblem
from qlora_service.data.rows.cells import Notes
from qlora_service.data.rows.tools import read_tool_calls, read_tools

FUNCTION = {"name": "ferry", "description": "Next ferry", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"name": "ferry", "arguments": {"pier": "norte", "via": None}}


@pytest.mark.parametrize(
    "row",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"tools": [{"type": "function", "function": {**FUNCTION, "parameters": json.dumps(FUNCTION["parameters"])}}]},
        {"functions": [FUNCTION]},
        {"functions": json.dumps([FUNCTION]), "tools": ""},
        {"functions": [TOOL], "tools": None},
        {"functions": [FUNCTION], "tools": [TOOL]},
    ],
)
def test_tools_and_their_older_name_are_read_from_lists_and_json_text(row: dict[str, Any]) -> None:
    notes: Notes = []
    assert (read_tools(row, notes), notes) == ((TOOL,), [])


def test_tools_are_used_before_other_functions_with_a_note() -> None:
    notes: Notes = []
    assert read_tools({"tools": [TOOL], "functions": [{"name": "now"}]}, notes, "/input") == (TOOL,)
    assert [note.pointer for note in notes] == ["/input/functions"]


@pytest.mark.parametrize(
    ("row", "pointer", "reason"),
    [
        ({"functions": {}}, "/functions", "must be a list, is an object"),
        ({"functions": ["now"]}, "/functions/0", "must be an object"),
        ({"functions": "[{]"}, "/functions", "not valid JSON"),
        ({"tools": [{"parameters": "{"}]}, "/tools/0/parameters", "not valid JSON"),
    ],
)
def test_unreadable_tools_are_a_problem(row: dict[str, Any], pointer: str, reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        read_tools(row, [])
    assert (caught.value.pointer, reason in caught.value.reason) == (pointer, True)


@pytest.mark.parametrize(
    "turn",
    [
        {"tool_calls": [{"type": "function", "function": CALL}]},
        {"tool_calls": json.dumps([{"type": "function", "function": CALL}])},
        {"tool_calls": [json.dumps({"type": "function", "function": CALL})]},
        {"tool_calls": [CALL]},
        {"function_call": CALL},
        {"function_call": json.dumps(CALL), "tool_calls": []},
        {"function_call": CALL, "tool_calls": [CALL]},
    ],
)
def test_every_form_of_a_call_is_read(turn: dict[str, Any]) -> None:
    notes: Notes = []
    assert read_tool_calls(turn, "/messages/1", notes) == [{"type": "function", "function": CALL}]
    assert notes == []


def test_call_keeps_its_id_and_its_arguments_as_text() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"zone":"UTC"}'}}
    assert read_tool_calls({"tool_calls": [call]}, "", []) == [call]
    flat = {"id": "c1", "name": "now", "arguments": "{}"}
    assert read_tool_calls({"tool_calls": [flat]}, "", []) == [
        {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    ]


def test_older_call_beside_other_calls_is_noted() -> None:
    notes: Notes = []
    calls = read_tool_calls({"tool_calls": [CALL], "function_call": {"name": "now"}}, "/messages/1", notes)
    assert ([call["function"]["name"] for call in calls], len(notes)) == (["ferry"], 1)
    assert notes[0].pointer == "/messages/1/function_call"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [("{", "no program could read"), ("now", "no program could read"), ([1], "named arguments"), ("[1]", "named")],
)
def test_arguments_that_are_no_object_are_a_problem_that_says_why(arguments: Any, reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        read_tool_calls({"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}, "/messages/1", [])
    assert caught.value.pointer == "/messages/1/tool_calls/0/function/arguments"
    assert reason in caught.value.reason
