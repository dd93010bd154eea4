"""Readers of tool calls and tool schemas: OpenAI's, its older functions, and ShareGPT's, all read into OpenAI's."""

from __future__ import annotations

from typing import Any

from qlora_service.data.json.strict import RowProblem, parse_json
from qlora_service.data.rows.cells import Note, Notes, as_list, as_object, as_text, from_json_text, json_cell


def read_tools(value: dict[str, Any], notes: Notes, parent: str = "") -> tuple[dict[str, Any], ...] | None:
    """The schemas under the key `tools`, or under its older name `functions`; None without any.

    Schemas are a list or the JSON text of a list. `parent` is the pointer of `value`. Raises: RowProblem.
    """
    tools, functions = _schemas(value, "tools", parent), _schemas(value, "functions", parent)
    as_tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in functions]
    if tools and functions and tools != as_tools:
        notes.append(Note(f"{parent}/functions", "only the row's tools are used: functions is the older name of tools"))
    return tuple(tools or as_tools) or None


def read_tool_calls(turn: dict[str, Any], pointer: str, notes: Notes) -> list[dict[str, Any]]:
    """The message's `tool_calls`, or its older single `function_call` in that form. Raises: RowProblem."""
    calls_pointer, older_pointer = f"{pointer}/tool_calls", f"{pointer}/function_call"
    calls = json_cell(turn, "tool_calls", pointer)
    older = json_cell(turn, "function_call", pointer)
    read = [
        _tool_call(as_object(call, f"{calls_pointer}/{index}"), f"{calls_pointer}/{index}")
        for index, call in enumerate([] if calls is None else as_list(calls, calls_pointer))
    ]
    if older is None:
        return read
    from_older = _call_of(older, older_pointer)
    if read and [call["function"] for call in read] != [older]:
        notes.append(Note(older_pointer, "only the message's tool_calls are used: function_call is their older form"))
    return read or [from_older]


def sharegpt_calls(text: Any, pointer: str) -> list[dict[str, Any]]:
    """The calls of a ShareGPT `function_call` turn, whose value is the JSON text of one call or of a list of calls."""
    calls = parse_json(as_text(text, pointer), pointer)
    if calls == []:
        raise RowProblem(pointer, "contains no function call")
    return [_call_of(call, pointer) for call in (calls if isinstance(calls, list) else [calls])]


def _schemas(value: dict[str, Any], key: str, parent: str) -> list[dict[str, Any]]:
    pointer = f"{parent}/{key}"
    schemas = json_cell(value, key, parent)
    if schemas is None:
        return []
    return [
        _schema(as_object(schema, f"{pointer}/{index}"), f"{pointer}/{index}")
        for index, schema in enumerate(as_list(schemas, pointer))
    ]


def _schema(tool: dict[str, Any], pointer: str) -> dict[str, Any]:
    """The tool, its parameters read as what they hold where they are JSON text."""
    if isinstance(tool.get("function"), dict):
        return tool | {"function": _schema(tool["function"], f"{pointer}/function")}
    if isinstance(tool.get("parameters"), str):
        return tool | {"parameters": from_json_text(tool["parameters"], f"{pointer}/parameters")}
    return tool


def _tool_call(call: dict[str, Any], pointer: str) -> dict[str, Any]:
    """The call in OpenAI's form, also of a call without the object `function` around its name and arguments."""
    if call.get("function") is None and "name" in call:
        others = {key: value for key, value in call.items() if key not in ("name", "arguments", "function")}
        function = {key: call[key] for key in ("name", "arguments") if key in call}
        return {"type": "function"} | others | _call_of(function, pointer)
    return call | _function_of(call.get("function"), f"{pointer}/function")


def _call_of(function: Any, pointer: str) -> dict[str, Any]:
    return {"type": "function"} | _function_of(function, pointer)


def _function_of(function: Any, pointer: str) -> dict[str, Any]:
    """`{"function": …}` for `{"name", "arguments"}`; the arguments are an object or, as in OpenAI's API, JSON text."""
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowProblem(pointer, 'must be {"name": …, "arguments": …}')
    arguments, pointer = function.get("arguments"), f"{pointer}/arguments"
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = parse_json(arguments, pointer)
        except RowProblem as problem:
            reason = f"{problem.reason}: no program could read a call that is learned from it"
            raise RowProblem(problem.pointer, reason) from None
    if arguments not in (None, "") and not isinstance(arguments, dict):
        raise RowProblem(pointer, "must be a JSON object: a function is called with named arguments")
    return {"function": function}
