"""Fast check of many rows at once: whether all of them are certainly usable, without a warning.

The types here are narrower than the readers in `shapes`: the readers accept every row that fits them, and have nothing
to note. A row that does not fit may still be usable in another form of its shape; then its reader decides, and words
the finding if it is not.
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
from qlora_service.data.rows.cells import is_blank
from qlora_service.data.rows.chat_options import OPTION_COLUMNS
from qlora_service.data.rows.columns import warned_columns
from qlora_service.data.rows.conversation import (
    MESSAGES_START,
    OPENAI,
    REASONING_KEYS,
    SHAREGPT,
    TRAINING_KEYS,
    UNUSED_KEYS,
    Dialect,
    messages_or_text,
)
from qlora_service.data.rows.examples import Shape

# `re` and `str.strip`, which the readers use, agree on what is white space.
_NOT_BLANK: Any = Annotated[str, Meta(pattern=r"\S")]
_OPTIONAL_TEXT: Any = str | None
_ABSENT: Any = None
_EMPTY: Any = Annotated[str, Meta(max_length=0)] | Annotated[list[Any], Meta(max_length=0)] | None


class _Answer(Struct):
    """A turn that is trained."""


def _accept_all(_: Any) -> bool:
    return True


@dataclass(frozen=True)
class _Form:
    """One form of a shape: the type of its rows, and checks for the conditions that a type cannot express."""

    row: type[Struct]
    accepts: Callable[[Any], bool] = _accept_all
    warned: frozenset[str] = frozenset()
    """Columns that its reader warns about unless they are blank"""


def count_if_all_usable(text: bytes, shape: Shape) -> int | None:
    """Number of rows on the lines of the text if all are certainly usable and as expected; None if a reader decides."""
    values = parse_lines(text)
    if values is None or not any(_all_fit(values, form) for form in _FORMS[shape]):
        return None
    return len(values)


def _all_fit(values: list[dict[str, Any]], form: _Form) -> bool:
    columns = form.warned.intersection(set().union(*values))
    if any(not is_blank(value.get(column)) for column in columns for value in values):
        return False
    row_type, accepts = form.row, form.accepts
    try:
        return all(accepts(convert(value, row_type)) for value in values)
    except ValidationError:
        return False


def _struct(name: str, required: Mapping[str, Any], optional: Mapping[str, Any], **options: Any) -> type[Struct]:
    """An object with these keys. Other keys are allowed: they have no meaning for its reader."""
    fields: list[str | tuple[str, Any] | tuple[str, Any, Any]] = [*required.items()]
    fields += ((key, type_, None) for key, type_ in optional.items())
    return defstruct(name, fields, kw_only=True, **options)


def _form(
    shape: Shape,
    required: Mapping[str, Any],
    accepts: Callable[[Any], bool] = _accept_all,
    is_chat: bool = True,
    **optional: Any,
) -> _Form:
    if is_chat:
        optional |= dict.fromkeys(OPTION_COLUMNS, _ABSENT) | {"tools": GenericAlias(list, _TOOL) | None}
    return _Form(_struct("Row", required, optional), accepts, warned_columns(shape, is_chat))


def _conversation_forms(
    shape: Shape, dialect: Dialect, column: str, required: Mapping[str, Any] | None = None, **optional: Any
) -> tuple[_Form, ...]:
    """The form of conversations whose turns have only the usual keys, which takes less time, and of all others."""
    accepts = _ends_with_answer(column)
    return tuple(
        _form(shape, {column: _turns(dialect, only_usual_keys), **(required or {})}, accepts, **optional)
        for only_usual_keys in (True, False)
    )


def _turns(dialect: Dialect, only_usual_keys: bool) -> Any:
    """The type of a conversation of text turns without tool calls."""
    turns = (
        _turn(dialect, role, openai_role == "assistant", only_usual_keys)
        for role, openai_role in dialect.roles.items()
        if role != "function_call"
    )
    return GenericAlias(list, reduce(operator.or_, turns))


def _turn(dialect: Dialect, role: str, is_answer: bool, only_usual_keys: bool) -> Any:
    unusual = {
        **dict.fromkeys((*TRAINING_KEYS, *REASONING_KEYS, "tool_calls", "function_call"), _ABSENT),
        **dict.fromkeys(UNUSED_KEYS, _EMPTY),
    }
    usual = {"reasoning_content": _OPTIONAL_TEXT, "weight": Literal[1] | None if is_answer else _ABSENT}
    return _struct(
        role,
        {dialect.text_key: _NOT_BLANK if is_answer else str},
        usual | dict.fromkeys(("name", "tool_call_id"), Any) if only_usual_keys else unusual | usual,
        bases=(_Answer,) if is_answer else None,
        tag_field=dialect.role_key,
        tag=role,
        forbid_unknown_fields=only_usual_keys,
    )


def _ends_with_answer(column: str) -> Callable[[Any], bool]:
    turns_of = operator.attrgetter(column)

    def accepts(row: Any) -> bool:
        turns = turns_of(row)
        return bool(turns) and isinstance(turns[-1], _Answer)

    return accepts


def _are_texts(row: Any) -> bool:
    return _is_text(row.prompt) and _is_text(row.completion)


def _is_pair_of_texts(row: Any) -> bool:
    return row.chosen != row.rejected and _is_text(row.prompt) and _is_text(row.chosen) and _is_text(row.rejected)


def _is_text(text: str) -> bool:
    """Whether the text is not the JSON text of messages."""
    return text[:1] not in MESSAGES_START or messages_or_text(text) is text


_FUNCTION = _struct("Function", {}, {"parameters": dict[str, Any] | None})
_TOOL = _struct("Tool", {}, {"function": _FUNCTION | None, "parameters": dict[str, Any] | None})
_COMPLETION = {"prompt": str, "completion": _NOT_BLANK}
_PAIR = {"prompt": str, "chosen": _NOT_BLANK, "rejected": _NOT_BLANK}
_ALPACA = {"instruction": _NOT_BLANK, "output": _NOT_BLANK}
_DOLLY = {"instruction": _NOT_BLANK, "response": _NOT_BLANK}
_LABEL = {"label": bool}

_FORMS: dict[Shape, tuple[_Form, ...]] = {
    "messages": _conversation_forms("messages", OPENAI, "messages"),
    "sharegpt": _conversation_forms(
        "sharegpt", SHAREGPT, "conversations", system=_OPTIONAL_TEXT, chosen=_ABSENT, rejected=_ABSENT
    ),
    "alpaca": (_form("alpaca", _ALPACA, input=_OPTIONAL_TEXT, system=_OPTIONAL_TEXT, history=_ABSENT),),
    "dolly": (_form("dolly", _DOLLY, context=_OPTIONAL_TEXT),),
    "prompt_completion": (_form("prompt_completion", _COMPLETION, _are_texts, is_chat=False),),
    "text": (_form("text", {"text": _NOT_BLANK}, is_chat=False),),
    "preference": (_form("preference", _PAIR, _is_pair_of_texts, is_chat=False),),
    "kto": (
        _form("kto", _COMPLETION | _LABEL, _are_texts, is_chat=False, messages=_ABSENT),
        *_conversation_forms("kto", OPENAI, "messages", required=_LABEL),
    ),
}
