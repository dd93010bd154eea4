"""Fast check of many rows at once: whether all of them are certainly usable.

The types here are narrower than the readers in `shapes`: the readers accept every row that fits them. A row that does
not fit may still be usable in another form of its shape; then its reader decides, and words the finding if it is not.
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

# `re` and `str.strip`, which the readers use, agree on what is white space.
_NOT_BLANK: Any = Annotated[str, Meta(pattern=r"\S")]
_OPTIONAL_TEXT: Any = str | None
_OPTIONAL_TOOLS: Any = list[dict[str, Any]] | None
_ABSENT: Any = None


class _Answer(Struct):
    """A turn that is trained."""


def _accept_all(_: Any) -> bool:
    return True


@dataclass(frozen=True)
class _Form:
    """One form of a shape: the type of its rows, and a check for the conditions that a type cannot express."""

    row: type[Struct]
    accepts: Callable[[Any], bool] = _accept_all


def count_if_all_usable(text: bytes, shape: Shape) -> int | None:
    """Number of rows on the lines of the text if all of them are certainly usable; None if a reader must decide."""
    values = parse_lines(text)
    if values is None or not any(_all_fit(values, form) for form in _FORMS[shape]):
        return None
    return len(values)


def _all_fit(values: list[dict[str, Any]], form: _Form) -> bool:
    try:
        return all(form.accepts(convert(value, form.row)) for value in values)
    except ValidationError:
        return False


def _struct(name: str, required: Mapping[str, Any], optional: Mapping[str, Any], **options: Any) -> type[Struct]:
    """An object with these keys. Other keys are allowed: its reader ignores them."""
    fields: list[str | tuple[str, Any] | tuple[str, Any, Any]] = [*required.items()]
    fields += ((key, type_, None) for key, type_ in optional.items())
    return defstruct(name, fields, kw_only=True, **options)


def _row(required: Mapping[str, Any], **optional: Any) -> type[Struct]:
    return _struct("Row", required, optional)


def _turns(dialect: Dialect) -> Any:
    """The type of a conversation of text turns without tool calls."""
    turns = (
        _turn(dialect, role, openai_role) for role, openai_role in dialect.roles.items() if role != "function_call"
    )
    return GenericAlias(list, reduce(operator.or_, turns))


def _turn(dialect: Dialect, role: str, openai_role: str) -> Any:
    is_answer = openai_role == "assistant"
    return _struct(
        role,
        {dialect.text_key: _NOT_BLANK if is_answer else str},
        {
            "weight": Literal[1] | None if is_answer else _ABSENT,
            **dict.fromkeys(("tool_calls", "function_call"), _ABSENT),
            **dict.fromkeys(("name", "tool_call_id", "reasoning_content"), _OPTIONAL_TEXT),
        },
        bases=(_Answer,) if is_answer else None,
        tag_field=dialect.role_key,
        tag=role,
    )


def _ends_with_answer(column: str) -> Callable[[Any], bool]:
    turns_of = operator.attrgetter(column)

    def accepts(row: Any) -> bool:
        turns = turns_of(row)
        return bool(turns) and isinstance(turns[-1], _Answer)

    return accepts


def _answers_differ(row: Any) -> bool:
    return bool(row.chosen != row.rejected)


_MESSAGES = {"messages": _turns(OPENAI)}
_CONVERSATIONS = {"conversations": _turns(SHAREGPT)}
_COMPLETION = {"prompt": str, "completion": _NOT_BLANK}
_ALPACA = {"instruction": _NOT_BLANK, "output": _NOT_BLANK}
_LABEL = {"label": bool}

_FORMS: dict[Shape, tuple[_Form, ...]] = {
    "messages": (_Form(_row(_MESSAGES, tools=_OPTIONAL_TOOLS), _ends_with_answer("messages")),),
    "sharegpt": (
        _Form(
            _row(_CONVERSATIONS, system=_OPTIONAL_TEXT, tools=_OPTIONAL_TOOLS, chosen=_ABSENT, rejected=_ABSENT),
            _ends_with_answer("conversations"),
        ),
    ),
    "alpaca": (_Form(_row(_ALPACA, input=_OPTIONAL_TEXT, system=_OPTIONAL_TEXT, history=_ABSENT)),),
    "dolly": (_Form(_row({"instruction": _NOT_BLANK, "response": _NOT_BLANK}, context=_OPTIONAL_TEXT)),),
    "prompt_completion": (_Form(_row(_COMPLETION)),),
    "text": (_Form(_row({"text": _NOT_BLANK})),),
    "preference": (_Form(_row({"prompt": str, "chosen": _NOT_BLANK, "rejected": _NOT_BLANK}), _answers_differ),),
    "kto": (
        _Form(_row(_COMPLETION | _LABEL, messages=_ABSENT)),
        _Form(_row(_MESSAGES | _LABEL, tools=_OPTIONAL_TOOLS), _ends_with_answer("messages")),
    ),
}
