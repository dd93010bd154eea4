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
from qlora_service.data.rows.cells import is_blank, may_be_messages
from qlora_service.data.rows.columns import warned_columns
from qlora_service.data.rows.conversation import OPENAI, REASONING_KEYS, SHAREGPT, TRAINING_KEYS, UNUSED_KEYS, Dialect
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

    def fits(self, value: dict[str, Any]) -> bool:
        """Raises: ValidationError."""
        is_used = self.warned.isdisjoint(value) or all(is_blank(value[key]) for key in self.warned & value.keys())
        return is_used and self.accepts(convert(value, self.row))


def count_if_all_usable(text: bytes, shape: Shape) -> int | None:
    """Number of rows on the lines of the text if all are certainly usable and as expected; None if a reader decides."""
    values = parse_lines(text)
    if values is None or not any(_all_fit(values, form) for form in _FORMS[shape]):
        return None
    return len(values)


def _all_fit(values: list[dict[str, Any]], form: _Form) -> bool:
    try:
        return all(map(form.fits, values))
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
    row = _struct("Row", required, {**(_OPTIONS if is_chat else {}), **optional})
    return _Form(row, accepts, warned_columns(shape, is_chat))


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
            **dict.fromkeys((*_CALL_KEYS, *TRAINING_KEYS, *REASONING_KEYS), _ABSENT),
            **dict.fromkeys(UNUSED_KEYS, _EMPTY),
            "reasoning_content": _OPTIONAL_TEXT,
            **({"weight": Literal[1] | None} if is_answer else {}),
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


def _has_plain_texts(row: Any) -> bool:
    return not may_be_messages(row.prompt) and not may_be_messages(row.completion)


def _is_plain_pair(row: Any) -> bool:
    return row.chosen != row.rejected and not any(map(may_be_messages, (row.prompt, row.chosen, row.rejected)))


_CALL_KEYS = ("tool_calls", "function_call")
_FUNCTION = _struct("Function", {}, {"parameters": dict[str, Any] | None})
_TOOL = _struct("Tool", {}, {"function": _FUNCTION | None, "parameters": dict[str, Any] | None})
_OPTIONS = {
    "tools": GenericAlias(list, _TOOL) | None,
    **dict.fromkeys(("functions", "documents", "chat_template_kwargs"), _ABSENT),
}
_MESSAGES = {"messages": _turns(OPENAI)}
_CONVERSATIONS = {"conversations": _turns(SHAREGPT)}
_COMPLETION = {"prompt": str, "completion": _NOT_BLANK}
_PAIR = {"prompt": str, "chosen": _NOT_BLANK, "rejected": _NOT_BLANK}
_ALPACA = {"instruction": _NOT_BLANK, "output": _NOT_BLANK}
_DOLLY = {"instruction": _NOT_BLANK, "response": _NOT_BLANK}
_LABEL = {"label": bool}

_FORMS: dict[Shape, tuple[_Form, ...]] = {
    "messages": (_form("messages", _MESSAGES, _ends_with_answer("messages")),),
    "sharegpt": (
        _form(
            "sharegpt",
            _CONVERSATIONS,
            _ends_with_answer("conversations"),
            system=_OPTIONAL_TEXT,
            chosen=_ABSENT,
            rejected=_ABSENT,
        ),
    ),
    "alpaca": (_form("alpaca", _ALPACA, input=_OPTIONAL_TEXT, system=_OPTIONAL_TEXT, history=_ABSENT),),
    "dolly": (_form("dolly", _DOLLY, context=_OPTIONAL_TEXT),),
    "prompt_completion": (_form("prompt_completion", _COMPLETION, _has_plain_texts, is_chat=False),),
    "text": (_form("text", {"text": _NOT_BLANK}, is_chat=False),),
    "preference": (_form("preference", _PAIR, _is_plain_pair, is_chat=False),),
    "kto": (
        _form("kto", _COMPLETION | _LABEL, _has_plain_texts, is_chat=False, messages=_ABSENT),
        _form("kto", _MESSAGES | _LABEL, _ends_with_answer("messages")),
    ),
}
