"""Reader of conversation turns: OpenAI's and ShareGPT's dialects, both read into OpenAI's messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_service.data.json.strict import RowProblem, parse_json

Turn = tuple[dict[str, Any], bool]
"""A message in OpenAI's form, and whether it is trained."""


@dataclass(frozen=True)
class Dialect:
    """Keys of a turn's role and text, and the OpenAI role for each role name of the dialect."""

    role_key: str
    text_key: str
    roles: Mapping[str, str]


OPENAI = Dialect(
    "role",
    "content",
    {
        "system": "system",
        "developer": "system",
        "user": "user",
        "assistant": "assistant",
        "tool": "tool",
        "function": "tool",
    },
)
# The role names of ShareGPT's exports and of the loaders that read them (FastChat, LLaMA-Factory, axolotl).
SHAREGPT = Dialect(
    "from",
    "value",
    {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "assistant": "assistant",
        "model": "assistant",
        "function_call": "assistant",
        "tool": "tool",
        "observation": "tool",
        "function_response": "tool",
    },
)


def read_turns(turns: Any, pointer: str, dialect: Dialect) -> list[Turn]:
    """The turns of the list at `pointer`. Raises: RowProblem."""
    return [read_turn(turn, f"{pointer}/{index}", dialect) for index, turn in enumerate(as_list(turns, pointer))]


def read_turn(turn: Any, pointer: str, dialect: Dialect) -> Turn:
    """The turn at `pointer`. An assistant message with weight 1 or without a weight is trained.

    Raises:
        RowProblem: not a message of the dialect, or a trained answer that is blank.
    """
    if not isinstance(turn, dict):
        raise RowProblem(pointer, f"must be an object, is {json_type_name(turn)}")
    # Many datasets have OpenAI's messages in a column named `conversations`.
    if dialect.role_key not in turn and OPENAI.role_key in turn:
        dialect = OPENAI
    dialect_role = turn.get(dialect.role_key)
    role = dialect.roles.get(dialect_role) if isinstance(dialect_role, str) else None
    if role is None:
        raise RowProblem(f"{pointer}/{dialect.role_key}", f"must be one of {', '.join(dialect.roles)}")
    trained = _weight(turn.get("weight"), role, pointer) == 1 and role == "assistant"
    message: dict[str, Any] = {"role": role}
    text_pointer = f"{pointer}/{dialect.text_key}"
    text = turn.get(dialect.text_key)
    if dialect_role == "function_call":
        calls: Any = [_tool_call(call, text_pointer) for call in _sharegpt_calls(text, text_pointer)]
        text = None
    else:
        calls = _tool_calls(turn, pointer)
    message["content"] = None if calls and text is None else _content(text, text_pointer)
    if trained and not calls:
        require_not_blank(message["content"], text_pointer, "the answer")
    if calls:
        if role != "assistant":
            raise RowProblem(f"{pointer}/tool_calls", "only an assistant message can call tools")
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id", "reasoning_content"):
        if turn.get(key) is not None:
            message[key] = as_text(turn[key], f"{pointer}/{key}")
    return message, trained


def read_tools(value: dict[str, Any], parent: str = "") -> tuple[dict[str, Any], ...] | None:
    """The schemas under the key `tools`, a list or the JSON text of a list; None without any. `parent` is a pointer."""
    pointer = f"{parent}/tools"
    tools = value.get("tools")
    if isinstance(tools, str):
        tools = parse_json(tools, pointer) if tools.strip() else None
    if tools is None:
        return None
    for index, tool in enumerate(as_list(tools, pointer)):
        if not isinstance(tool, dict):
            raise RowProblem(f"{pointer}/{index}", f"must be an object, is {json_type_name(tool)}")
    return tuple(tools) or None


def plain_turns(turns: Iterable[tuple[str, str]]) -> list[Turn]:
    """The turns of (role, text) pairs; assistant turns are trained."""
    return [({"role": role, "content": text}, role == "assistant") for role, text in turns]


def optional_text(value: dict[str, Any], column: str) -> str:
    """The text of the column, empty for an absent or null column."""
    return "" if value.get(column) is None else as_text(value[column], f"/{column}")


def as_text(value: Any, pointer: str) -> str:
    if not isinstance(value, str):
        raise RowProblem(pointer, f"must be a string, is {json_type_name(value)}")
    return value


def as_list(value: Any, pointer: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowProblem(pointer, f"must be a list, is {json_type_name(value)}")
    return value


def require_not_blank(text: str, pointer: str, name: str) -> None:
    if not text.strip():
        raise RowProblem(pointer, f"{name} is empty")


def json_type_name(value: Any) -> str:
    """The JSON name of a value's type, with its article."""
    if value is None:
        return "null or missing"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")


def _weight(weight: Any, role: str, pointer: str) -> int:
    """1 or 0. An absent weight is 1, and so is null, which Parquet stores for an absent weight."""
    if weight is None:
        return 1
    if role != "assistant":
        raise RowProblem(f"{pointer}/weight", "only an assistant message can have a weight")
    if type(weight) is not int or weight not in (0, 1):
        raise RowProblem(f"{pointer}/weight", "must be 0 or 1")
    return weight


def _content(content: Any, pointer: str) -> str:
    """The text of a message: a string, or a list of text parts."""
    if not isinstance(content, list):
        return as_text(content, pointer)
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RowProblem(f"{pointer}/{index}", 'must be {"type": "text", "text": …}: only text is trained')
    return "".join(as_text(part.get("text"), f"{pointer}/{index}/text") for index, part in enumerate(content))


def _tool_calls(turn: dict[str, Any], pointer: str) -> list[dict[str, Any]] | None:
    """The message's `tool_calls`, or its older single `function_call` in that form."""
    if turn.get("function_call") is not None:
        return [_tool_call(turn["function_call"], f"{pointer}/function_call")]
    if turn.get("tool_calls") is None:
        return None
    pointer = f"{pointer}/tool_calls"
    calls = as_list(turn["tool_calls"], pointer)
    for index, call in enumerate(calls):
        if not isinstance(call, dict):
            raise RowProblem(f"{pointer}/{index}", f"must be an object, is {json_type_name(call)}")
        _tool_call(call.get("function"), f"{pointer}/{index}/function")
    return calls


def _sharegpt_calls(text: Any, pointer: str) -> list[Any]:
    """The calls of a ShareGPT `function_call` turn, whose value is the JSON text of one call or of a list of calls."""
    calls = parse_json(as_text(text, pointer), pointer)
    if calls == []:
        raise RowProblem(pointer, "contains no function call")
    return calls if isinstance(calls, list) else [calls]


def _tool_call(function: Any, pointer: str) -> dict[str, Any]:
    """The tool call for `{"name", "arguments"}`; the arguments are an object or, as in OpenAI's API, its JSON text."""
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowProblem(pointer, 'must be {"name": …, "arguments": …}')
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = parse_json(arguments, f"{pointer}/arguments")
    if arguments not in (None, "") and not isinstance(arguments, dict):
        raise RowProblem(f"{pointer}/arguments", "must be a JSON object")
    return {"type": "function", "function": function}
