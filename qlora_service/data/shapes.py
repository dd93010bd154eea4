"""Row shapes: the forms in which the field writes training examples, each turned into an `Example`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_service.data.examples import Chat, Completion, Example, Shape, Text
from qlora_service.data.strict_json import RowProblem, parse_json

__all__ = ["COLUMNS", "JSON_COLUMNS", "REQUIRED", "RowProblem", "detect_shape", "to_example"]

# The columns that make a row one of a shape; where two fit, the earlier, richer shape is meant.
REQUIRED: dict[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "dolly": ("instruction", "response"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
# Columns whose cells hold JSON where the container has only strings (CSV).
JSON_COLUMNS = frozenset({"messages", "conversations", "tools", "history"})
# Every column that some shape reads.
COLUMNS = frozenset({"system", "history", "input", "context", "tools"}.union(*REQUIRED.values()))


@dataclass(frozen=True)
class _Dialect:
    """How a turn of a conversation names its parts, and which of our roles each of its roles is."""

    role_key: str
    text_key: str
    roles: Mapping[str, str]


_OPENAI = _Dialect(
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
_SHAREGPT = _Dialect(
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


def detect_shape(value: dict[str, Any]) -> Shape | None:
    """The shape whose columns the row has, or None."""
    return next((shape for shape, columns in REQUIRED.items() if value.keys() >= set(columns)), None)


def to_example(value: dict[str, Any], shape: Shape) -> Example:
    """The training example of a row of the given shape; columns the shape does not know are ignored.

    Raises:
        RowProblem: the row has another shape, a wrong type, an empty answer, or nothing to train.
    """
    if not value.keys() >= set(REQUIRED[shape]):
        raise RowProblem("", _misfit(value, shape))
    return _READERS[shape](value)


def _misfit(value: dict[str, Any], shape: Shape) -> str:
    actual = detect_shape(value)
    if actual is not None:
        return f"this row has the shape {actual}, the dataset has the shape {shape}: split them in two datasets"
    keys = ", ".join(repr(key[:40]) for key in list(value)[:10]) or "none"
    accepted = "; ".join(f"{name} ({', '.join(columns)})" for name, columns in REQUIRED.items())
    return f"the keys of this row fit no shape. Found: {keys}. Accepted: {accepted}"


def _messages(value: dict[str, Any]) -> Chat:
    return _chat(value["messages"], "/messages", _OPENAI, _tools(value))


def _sharegpt(value: dict[str, Any]) -> Chat:
    if value.get("chosen") is not None and value.get("rejected") is not None:
        # Its conversation is only the context of two answers: training on it would teach neither.
        raise RowProblem("/chosen", "a preference pair: put the chosen answer at the end of the conversation")
    system = _optional_text(value, "system")
    return _chat(value["conversations"], "/conversations", _SHAREGPT, _tools(value), system)


def _alpaca(value: dict[str, Any]) -> Chat:
    turns = [("user", _instruction(value, "input")), ("assistant", _answer(value, "output"))]
    history = value.get("history")
    if history is None:
        history = []
    for index, pair in enumerate(_list(history, "/history")):
        at = f"/history/{index}"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowProblem(at, "must be a pair [user, assistant]")
        asked, answered = (_text(part, f"{at}/{side}") for side, part in enumerate(pair))
        _require_words(answered, f"{at}/1", "the answer")
        turns[-2:-2] = [("user", asked), ("assistant", answered)]
    return _plain_chat(turns, _optional_text(value, "system"))


def _dolly(value: dict[str, Any]) -> Chat:
    return _plain_chat([("user", _instruction(value, "context")), ("assistant", _answer(value, "response"))])


def _prompt_completion(value: dict[str, Any]) -> Completion | Chat:
    if not isinstance(value["prompt"], list) and not isinstance(value["completion"], list):
        return Completion(_text(value["prompt"], "/prompt"), _answer(value, "completion"))
    prompt = _turns(_list(value["prompt"], "/prompt"), "/prompt", _OPENAI)
    completion = _turns(_list(value["completion"], "/completion"), "/completion", _OPENAI)
    if not any(trained for _, trained in completion):
        raise RowProblem("/completion", "no assistant message to train")
    return Chat(
        messages=tuple(message for message, _ in prompt + completion),
        trained=(False,) * len(prompt) + tuple(trained for _, trained in completion),
        tools=_tools(value),
    )


def _text_row(value: dict[str, Any]) -> Text:
    text = _text(value["text"], "/text")
    _require_words(text, "/text", "the text")
    return Text(text)


_READERS: dict[Shape, Callable[[dict[str, Any]], Example]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "dolly": _dolly,
    "prompt_completion": _prompt_completion,
    "text": _text_row,
}


def _chat(
    turns: Any, pointer: str, dialect: _Dialect, tools: tuple[dict[str, Any], ...] | None, system: str = ""
) -> Chat:
    read = _turns(_list(turns, pointer), pointer, dialect)
    if not any(trained for _, trained in read):
        raise RowProblem(pointer, "no assistant message to train")
    if system:
        read.insert(0, ({"role": "system", "content": system}, False))
    return Chat(tuple(message for message, _ in read), tuple(trained for _, trained in read), tools)


def _plain_chat(turns: list[tuple[str, str]], system: str = "") -> Chat:
    if system:
        turns = [("system", system), *turns]
    return Chat(
        messages=tuple({"role": role, "content": text} for role, text in turns),
        trained=tuple(role == "assistant" for role, _ in turns),
    )


def _turns(turns: list[Any], pointer: str, dialect: _Dialect) -> list[tuple[dict[str, Any], bool]]:
    return [_turn(turn, f"{pointer}/{index}", dialect) for index, turn in enumerate(turns)]


def _turn(turn: Any, at: str, dialect: _Dialect) -> tuple[dict[str, Any], bool]:
    """A message in OpenAI's form, and whether it is trained."""
    if not isinstance(turn, dict):
        raise RowProblem(at, f"must be an object, is {_kind(turn)}")
    # Many datasets keep OpenAI's messages in a column called `conversations`.
    if dialect.role_key not in turn and _OPENAI.role_key in turn:
        dialect = _OPENAI
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
        _require_words(message["content"], text_at, "the answer")
    if calls:
        if role != "assistant":
            raise RowProblem(f"{at}/tool_calls", "only an assistant message calls tools")
        message["tool_calls"] = calls
    for key in ("name", "tool_call_id", "reasoning_content"):
        if turn.get(key) is not None:
            message[key] = _text(turn[key], f"{at}/{key}")
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
        return _text(content, at)
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RowProblem(f"{at}/{index}", 'must be {"type": "text", "text": …}: only text is trained')
    return "".join(_text(part.get("text"), f"{at}/{index}/text") for index, part in enumerate(content))


def _tool_calls(turn: dict[str, Any], at: str) -> list[dict[str, Any]] | None:
    """The message's `tool_calls`, or its older single `function_call` in that form."""
    if turn.get("function_call") is not None:
        return [_bare_call(turn["function_call"], f"{at}/function_call")]
    if turn.get("tool_calls") is None:
        return None
    at = f"{at}/tool_calls"
    calls = _list(turn["tool_calls"], at)
    for index, call in enumerate(calls):
        if not isinstance(call, dict):
            raise RowProblem(f"{at}/{index}", f"must be an object, is {_kind(call)}")
        _bare_call(call.get("function"), f"{at}/{index}/function")
    return calls


def _call_objects(text: Any, at: str) -> list[Any]:
    """The calls in the value of a ShareGPT `function_call` turn: JSON text of one call or of a list."""
    calls = parse_json(_text(text, at), at)
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


def _tools(value: dict[str, Any]) -> tuple[dict[str, Any], ...] | None:
    """The tool schemas, given as a list or as the JSON text of one; None where there are none."""
    tools = value.get("tools")
    if isinstance(tools, str):
        tools = parse_json(tools, "/tools") if tools.strip() else None
    if tools is None:
        return None
    for index, tool in enumerate(_list(tools, "/tools")):
        if not isinstance(tool, dict):
            raise RowProblem(f"/tools/{index}", f"must be an object, is {_kind(tool)}")
    return tuple(tools) or None


def _instruction(value: dict[str, Any], extra: str) -> str:
    """The instruction and, after a blank line, the column that goes with it."""
    parts = [_text(value["instruction"], "/instruction"), _optional_text(value, extra)]
    question = "\n\n".join(part for part in parts if part.strip())
    _require_words(question, "/instruction", "the instruction")
    return question


def _answer(value: dict[str, Any], column: str) -> str:
    text = _text(value[column], f"/{column}")
    _require_words(text, f"/{column}", "the answer")
    return text


def _optional_text(value: dict[str, Any], column: str) -> str:
    return "" if value.get(column) is None else _text(value[column], f"/{column}")


def _text(value: Any, at: str) -> str:
    if not isinstance(value, str):
        raise RowProblem(at, f"must be a string, is {_kind(value)}")
    return value


def _list(value: Any, at: str) -> list[Any]:
    if not isinstance(value, list):
        raise RowProblem(at, f"must be a list, is {_kind(value)}")
    return value


def _require_words(text: str, at: str, what: str) -> None:
    if not text.strip():
        raise RowProblem(at, f"{what} is empty")


def _kind(value: Any) -> str:
    """The JSON name of a value's type."""
    if value is None:
        return "null or missing"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")
