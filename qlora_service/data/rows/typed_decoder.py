"""Rows that are usable beyond doubt, many of them judged at once.

The types here say less than the readers that `shapes` names: what fits them, those readers accept. What does not fit
may still be usable in another form of its shape; then the readers decide, and theirs are the words if it is not.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from types import GenericAlias
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, ValidationError, convert, defstruct

from qlora_service.data.json.fast import parse_lines
from qlora_service.data.rows.conversation import OPENAI, SHAREGPT, Dialect
from qlora_service.data.rows.examples import Shape

# What is blank to `re` is blank to `str.strip`, which the readers use.
_WORDS: Any = Annotated[str, Meta(pattern=r"\S")]
_MAYBE_TEXT: Any = str | None
_MAYBE_TOOLS: Any = list[dict[str, Any]] | None
_ABSENT: Any = None


class _Answer(Struct):
    """A turn that is trained."""


def _anything(_: Any) -> bool:
    return True


@dataclass(frozen=True)
class _Form:
    """One way to write the rows of a shape: their type, and what no type can say of a row."""

    row: type[Struct]
    holds: Callable[[Any], bool] = _anything


def count_plain(text: bytes, shape: Shape) -> int | None:
    """How many rows the lines of the text are, if all are usable beyond doubt; None if a reader has to decide."""
    values = parse_lines(text)
    if values is None or not any(_all_have(values, form) for form in _FORMS[shape]):
        return None
    return len(values)


def _all_have(values: list[dict[str, Any]], form: _Form) -> bool:
    try:
        return all(form.holds(convert(value, form.row)) for value in values)
    except ValidationError:
        return False


def _struct(name: str, required: Mapping[str, Any], optional: Mapping[str, Any], **options: Any) -> type[Struct]:
    """An object with these keys, and any others, at which its reader does not look."""
    fields: list[str | tuple[str, Any] | tuple[str, Any, Any]] = [*required.items()]
    fields += ((key, type_, None) for key, type_ in optional.items())
    return defstruct(name, fields, kw_only=True, **options)


def _row(required: Mapping[str, Any], **optional: Any) -> type[Struct]:
    return _struct("Row", required, optional)


def _turns(dialect: Dialect) -> Any:
    """Turns of a conversation that are words and call no tools."""
    turns = (_turn(dialect, role, ours) for role, ours in dialect.roles.items() if role != "function_call")
    return GenericAlias(list, reduce(operator.or_, turns))


def _turn(dialect: Dialect, role: str, ours: str) -> Any:
    is_answer = ours == "assistant"
    return _struct(
        role,
        {dialect.text_key: _WORDS if is_answer else str},
        {
            "weight": Literal[1] | None if is_answer else _ABSENT,
            **dict.fromkeys(("tool_calls", "function_call"), _ABSENT),
            **dict.fromkeys(("name", "tool_call_id", "reasoning_content"), _MAYBE_TEXT),
        },
        bases=(_Answer,) if is_answer else None,
        tag_field=dialect.role_key,
        tag=role,
    )


def _ends_with_answer(column: str) -> Callable[[Any], bool]:
    turns_of = operator.attrgetter(column)

    def holds(row: Any) -> bool:
        turns = turns_of(row)
        return bool(turns) and isinstance(turns[-1], _Answer)

    return holds


def _answers_differ(row: Any) -> bool:
    return bool(row.chosen != row.rejected)


_MESSAGES = {"messages": _turns(OPENAI)}
_CONVERSATIONS = {"conversations": _turns(SHAREGPT)}
_COMPLETION = {"prompt": str, "completion": _WORDS}
_ALPACA = {"instruction": _WORDS, "output": _WORDS}
_LABEL = {"label": bool}

_FORMS: dict[Shape, tuple[_Form, ...]] = {
    "messages": (_Form(_row(_MESSAGES, tools=_MAYBE_TOOLS), _ends_with_answer("messages")),),
    "sharegpt": (
        _Form(
            _row(_CONVERSATIONS, system=_MAYBE_TEXT, tools=_MAYBE_TOOLS, chosen=_ABSENT, rejected=_ABSENT),
            _ends_with_answer("conversations"),
        ),
    ),
    "alpaca": (_Form(_row(_ALPACA, input=_MAYBE_TEXT, system=_MAYBE_TEXT, history=_ABSENT)),),
    "dolly": (_Form(_row({"instruction": _WORDS, "response": _WORDS}, context=_MAYBE_TEXT)),),
    "prompt_completion": (_Form(_row(_COMPLETION)),),
    "text": (_Form(_row({"text": _WORDS})),),
    "preference": (_Form(_row({"prompt": str, "chosen": _WORDS, "rejected": _WORDS}), _answers_differ),),
    "kto": (
        _Form(_row(_COMPLETION | _LABEL, messages=_ABSENT)),
        _Form(_row(_MESSAGES | _LABEL, tools=_MAYBE_TOOLS), _ends_with_answer("messages")),
    ),
}
