"""Turns of a conversation, in OpenAI's or ShareGPT's dialect, read into OpenAI's messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_service.data.json.strict import RowProblem, parse_json

Turn = tuple[dict[str, Any], bool]
"""A message in OpenAI's form, and whether it is trained."""


@dataclass(frozen=True)
class Dialect:
    """How a turn of a conversation names its parts, and which of our roles each of its roles is."""

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


def read_turn(turn: Any, at: str, dialect: Dialect) -> Turn:
    """A message in OpenAI's form, and whether it is trained: an assistant's whose weight is 1 or absent.

    Raises:
        RowProblem: it is no message of the dialect, or a trained answer without words.
    """
    if not isinstance(turn, dict):
        raise RowProblem(at, f"must be an object, is {kind_of(turn)}")
    # Many datasets keep OpenAI's messages in a column called `conversations`.
    if dialect.role_key not in turn and OPENAI.role_key in turn:
        dialect = OPENAI
    source = turn.get(dialect.role_key)
    role = dialect.roles.get(source) if isinstance(source, str) else None
    if role is None:
        raise RowProblem(f"{at}/{dialect.role_key}", f"must be one of {', '.join(dialect.roles)}")
    trained = _weight(turn.get("weight"), role, at) == 1 and role == "assistant"
    message: dict[str, Any] = {"role": role}
    text_at = f"{at}/{dialect.text_key}"
    text = turn.get(dialect.text_key)
    if source == "function_call":
        calls: Any = [_bare_call(call, text_at) for call in _call_objects(text, text_at)]
        text = None
    else:
        calls = _tool_calls(turn, at)
    message["content"] = None if calls and text is None else _content(text, text_at)
    if trained and not calls:
        require_words(message["content"], text_at, "the answer")
    if calls:
        if role != "assistant":
            raise RowProblem(f"{at}/tool_calls", "only an assistant message calls tools")
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id", "reasoning_content"):
        if turn.get(key) is not None:
            message[key] = as_text(turn[key], f"{at}/{key}")
    return message, trained


def _weight(weight: Any, role: str, at: str) -> int:
    """1 or 0; Parquet fills an absent weight with null."""
    if weight is None:
        return 1
    if role != "assistant":
        raise RowProblem(f"{at}/weight", "only an assistant message has a weight")
    if type(weight) is not int or weight not in (0, 1):
        raise RowProblem(f"{at}/weight", "must be 0 or 1")
    return weight


def _content(content: Any, at: str) -> str:
    if not isinstance(content, list):
        return as_text(content, at)
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RowProblem(f"{at}/{index}", 'must be {"type": "text", "text": …}: only text is trained')
    return "".join(as_text(part.get("text"), f"{at}/{index}/text") for index, part in enumerate(content))


def _tool_calls(turn: dict[str, Any], at: str) -> list[dict[str, Any]] | None:
    """The message's `tool_calls`, or its older single `function_call` in that form."""
    if turn.get("function_call") is not None:
        return [_bare_call(turn["function_call"], f"{at}/function_call")]
    if turn.get("tool_calls") is None:
        return None
    at = f"{at}/tool_calls"
    calls = as_list(turn["tool_calls"], at)
    for index, call in enumerate(calls):
        if not isinstance(call, dict):
            raise RowProblem(f"{at}/{index}", f"must be an object, is {kind_of(call)}")
        _bare_call(call.get("function"), f"{at}/{index}/function")
    return calls


def _call_objects(text: Any, at: str) -> list[Any]:
    """The calls in the value of a ShareGPT `function_call` turn: JSON text of one call or of a list."""
    calls = parse_json(as_text(text, at), at)
    if calls == []:
        raise RowProblem(at, "names no function")
    return calls if isinstance(calls, list) else [calls]


def _bare_call(function: Any, at: str) -> dict[str, Any]:
    """A tool call of a bare `{"name", "arguments"}`; arguments are an object or, as OpenAI has it, its JSON."""
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowProblem(at, 'must be {"name": …, "arguments": …}')
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = parse_json(arguments, f"{at}/arguments")
    if arguments not in (None, "") and not isinstance(arguments, dict):
        raise RowProblem(f"{at}/arguments", "must be a JSON object")
    return {"type": "function", "function": function}


def read_tools(value: dict[str, Any], parent: str = "") -> tuple[dict[str, Any], ...] | None:
    """The tool schemas, given as a list or as the JSON text of one; None where there are none."""
    at = f"{parent}/tools"
    tools = value.get("tools")
    if isinstance(tools, str):
        tools = parse_json(tools, at) if tools.strip() else None
    if tools is None:
        return None
    for index, tool in enumerate(as_list(tools, at)):
        if not isinstance(tool, dict):
            raise RowProblem(f"{at}/{index}", f"must be an object, is {kind_of(tool)}")
    return tuple(tools) or None


def plain_turns(turns: Iterable[tuple[str, str]]) -> list[Turn]:
    """Turns of roles and texts; the assistant's are trained."""
    return [({"role": role, "content": text}, role == "assistant") for role, text in turns]


def optional_text(value: dict[str, Any], column: str) -> str:
    return "" if value.get(column) is None else as_text(value[column], f"/{column}")


def as_text(value: Any, at: str) -> str:
    if not isinstance(value, str):
        raise RowProblem(at, f"must be a string, is {kind_of(value)}")
    return value


def as_list(value: Any, at: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowProblem(at, f"must be a list, is {kind_of(value)}")
    return value


def require_words(text: str, at: str, what: str) -> None:
    if not text.strip():
        raise RowProblem(at, f"{what} is empty")


def kind_of(value: Any) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "null or missing"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")
