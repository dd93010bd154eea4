"""Reader of conversation turns: OpenAI's and ShareGPT's dialects, both read into OpenAI's messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from qlora_service.data.json.strict import RowProblem, parse_json
from qlora_service.data.rows.cells import Note, Notes, as_list, as_object, as_text, is_blank, json_type_name
from qlora_service.data.rows.tools import read_tool_calls, sharegpt_calls


class Turn(NamedTuple):
    """A message in OpenAI's form, whether it is trained, and the JSON pointer of its text in the row."""

    message: dict[str, Any]
    trained: bool
    text_pointer: str


@dataclass(frozen=True)
class Dialect:
    """Keys of a turn's role and text, and the role that a chat template gets for each role name of the dialect."""

    role_key: str
    text_key: str
    roles: Mapping[str, str]


# Messages keep their roles. ipython, observation and environment are the names that the templates of Llama 3, GLM 4 and
# OLMo 3 have for tool.
TOOL_ROLES = frozenset({"tool", "function", "ipython", "observation", "environment"})
OPENAI = Dialect(
    "role", "content", {role: role for role in ("system", "developer", "user", "assistant", *sorted(TOOL_ROLES))}
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
MESSAGES_START = frozenset("[{ \t\r\n")
"""The first character of the JSON text of messages"""
# Other tools' names of OpenAI's roles. An answer under such a name would not be trained.
_FOREIGN_ROLES = {
    **SHAREGPT.roles,
    **dict.fromkeys(("bot", "ai"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant, and the call as its tool_calls"),
    "prompter": "user",
    "tool_response": "tool",
}

# The names of a thought, in the order in which transformers takes them (`chat_template_utils._REASONING_FIELDS`).
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# Keys that say whether a message is trained: OpenAI's, Mistral's and Together's weight, LLaMA-Factory's loss_weight,
# ms-swift's loss or loss_scale, axolotl's train or training, torchtune's masked.
_WEIGHT_KEYS = {"weight": (int,), "loss_weight": (int, float), "loss_scale": (int, float)}
_SWITCH_KEYS = {"train": True, "training": True, "loss": True, "masked": False}
TRAINING_KEYS = (*_WEIGHT_KEYS, *_SWITCH_KEYS)
_TEXT_ONLY = "only text is trained: images, audio and video are not used"
# Keys with a meaning in other tools that is not honoured: axolotl's, OpenAI's; media.
UNUSED_KEYS = {
    "train_detail": "parts of a message cannot be left out of the training: train_detail is not used",
    "training_detail": "parts of a message cannot be left out of the training: training_detail is not used",
    "refusal": "a refusal is trained only as the message's content: refusal is not used",
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _TEXT_ONLY),
}
_MEANINGS = frozenset({*TRAINING_KEYS, *REASONING_KEYS, *UNUSED_KEYS})
# Keys of a turn that are not copied to the message: they are read here.
_READ_KEYS = frozenset({"role", "content", "from", "value", "tool_calls", "function_call", *TRAINING_KEYS})
_SAID_KEYS = ("role", "content", "tool_calls", "name", "tool_call_id", *REASONING_KEYS)


def read_turns(turns: Any, pointer: str, dialect: Dialect, notes: Notes) -> list[Turn]:
    """The turns of the list at `pointer`. Raises: RowProblem."""
    return [read_turn(turn, f"{pointer}/{index}", dialect, notes) for index, turn in enumerate(as_list(turns, pointer))]


def read_turn(turn: Any, pointer: str, dialect: Dialect, notes: Notes) -> Turn:
    """The turn at `pointer`. An assistant message is trained unless its weight, or another tool's name of it, is 0.

    Raises:
        RowProblem: not a message of the dialect, or a trained answer that is blank.
    """
    turn = as_object(turn, pointer)
    # Many datasets have OpenAI's messages in a column named `conversations`.
    if dialect.role_key not in turn and OPENAI.role_key in turn:
        dialect = OPENAI
    dialect_role = turn.get(dialect.role_key)
    role = _role(dialect_role, f"{pointer}/{dialect.role_key}", dialect, notes)
    message: dict[str, Any] = {"role": role}
    trained = role == "assistant"
    calls: list[dict[str, Any]] = []
    text_pointer = f"{pointer}/{dialect.text_key}"
    text = turn.get(dialect.text_key)
    if dialect_role == "function_call":
        calls, text = sharegpt_calls(text, text_pointer), None
    if text is not None:
        message["content"] = _content(text, text_pointer)
    if len(turn) > 2 or text is None:  # more than a role and a text
        calls = calls or read_tool_calls(turn, pointer, notes)
        if not _MEANINGS.isdisjoint(turn):
            trained = _is_trained(turn, role, pointer, notes)
            _check_meanings(turn, pointer, notes)
        message |= {key: value for key, value in turn.items() if value is not None and key not in _READ_KEYS}
    if trained and text is not None and not calls and not message["content"].strip():
        raise RowProblem(text_pointer, "the answer is empty: write it, or exclude the message with weight 0")
    if text is None and not calls and (trained or role in ("system", "developer", "user")):
        raise _without_content(text_pointer, role)
    if calls:
        if role != "assistant":
            raise RowProblem(f"{pointer}/tool_calls", "only an assistant message can call tools, and is trained to")
        message["tool_calls"] = calls
    return Turn(message, trained, text_pointer)


def messages_or_text(cell: Any) -> Any:
    """The messages of a cell that takes text too: only the JSON text of messages is read as what it holds."""
    if not isinstance(cell, str) or cell[:1] not in MESSAGES_START or "{" not in cell:
        return cell
    try:
        value = parse_json(cell)
    except RowProblem:
        return cell
    turns = value if isinstance(value, list) else [value]
    return value if turns and all(map(_is_message, turns)) else cell


def plain_turn(role: str, text: str, pointer: str) -> Turn:
    """The turn of a text at `pointer`; an assistant's is trained."""
    return Turn({"role": role, "content": text}, role == "assistant", pointer)


def said(message: dict[str, Any]) -> dict[str, Any]:
    """The message without keys whose meaning is unknown, such as an id or a rating."""
    return {key: message[key] for key in _SAID_KEYS if key in message}


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and any(
        isinstance(value.get(dialect.role_key), str)
        and value[dialect.role_key] in dialect.roles
        and (dialect.text_key in value or "tool_calls" in value)
        for dialect in (OPENAI, SHAREGPT)
    )


def _role(name: Any, pointer: str, dialect: Dialect, notes: Notes) -> str:
    """The role under the dialect's name. A template decides about a role that is in no dialect."""
    role = dialect.roles.get(name) if isinstance(name, str) else None
    if role is not None:
        return role
    reason = f"must be one of {', '.join(dialect.roles)}"
    if not isinstance(name, str) or not name or dialect is not OPENAI:
        raise RowProblem(pointer, reason)
    meant = name.lower() if name.lower() in OPENAI.roles else _FOREIGN_ROLES.get(name.lower())
    if meant is not None:
        raise RowProblem(pointer, f"{reason}, is {name}: write {meant}")
    notes.append(
        Note(pointer, f"the chat template gets the role {name[:40]!r} unchanged; its messages are not trained")
    )
    return name


def _is_trained(turn: dict[str, Any], role: str, pointer: str, notes: Notes) -> bool:
    """Whether the message is trained. A null, which Parquet stores for an absent key, says nothing.

    Raises:
        RowProblem: a value of another type, or two keys that contradict each other.
    """
    said_by = {key: _says_train(key, turn[key], pointer) for key in TRAINING_KEYS if turn.get(key) is not None}
    if len({*said_by.values()}) > 1:
        keys = " and ".join(said_by)
        raise RowProblem(f"{pointer}/{list(said_by)[-1]}", f"{keys} contradict each other: keep one of them")
    if role == "assistant":
        return all(said_by.values())
    for key, says_train in said_by.items():
        if says_train:
            notes.append(Note(f"{pointer}/{key}", f"only assistant messages are trained: the {role} message is not"))
    return False


def _says_train(key: str, value: Any, pointer: str) -> bool:
    if key in _SWITCH_KEYS:
        if not isinstance(value, bool):
            raise RowProblem(f"{pointer}/{key}", "must be true or false")
        return value is _SWITCH_KEYS[key]
    if type(value) not in _WEIGHT_KEYS[key] or value not in (0, 1):
        raise RowProblem(f"{pointer}/{key}", "must be 0 or 1: a message is trained, or not")
    return bool(value)


def _check_meanings(turn: dict[str, Any], pointer: str, notes: Notes) -> None:
    """Notes what of the turn is not used. Raises: RowProblem, a thought that is not text."""
    thoughts = [key for key in REASONING_KEYS if turn.get(key) is not None]
    for key in thoughts:
        if as_text(turn[key], f"{pointer}/{key}") != turn[thoughts[0]]:
            reason = f"differs from {thoughts[0]}, which chat templates get in its place"
            notes.append(Note(f"{pointer}/{key}", reason))
    notes += [Note(f"{pointer}/{key}", reason) for key, reason in UNUSED_KEYS.items() if not is_blank(turn.get(key))]


def _content(content: Any, pointer: str) -> str:
    """The text of a message: a string, or a list of text parts.

    transformers gives a list to the template as it is. Templates for text models would write it in Python's notation;
    those that read lists write their texts one after another, as here.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowProblem(
            pointer,
            f"must be a string, is {json_type_name(content)}: "
            "chat templates leave other values out, or write them in Python's notation",
        )
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RowProblem(f"{pointer}/{index}", 'must be {"type": "text", "text": …}: only text is trained')
    return "".join(as_text(part.get("text"), f"{pointer}/{index}/text") for index, part in enumerate(content))


def _without_content(pointer: str, role: str) -> RowProblem:
    why = "there is no answer to train" if role == "assistant" else f"the {role} would say nothing"
    return RowProblem(pointer, f"must be a string, is null or missing: {why}")
