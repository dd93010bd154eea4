"""Columns beside the required ones: those with a meaning, and warnings about those that a row's form does not use."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from qlora_service.data.rows.cells import Note, is_blank, json_cell
from qlora_service.data.rows.chat_options import OPTION_COLUMNS
from qlora_service.data.rows.examples import Chat, Example, Shape, documents

_MEDIA = dict.fromkeys(
    ("image", "images", "audio", "audios", "video", "videos"),
    "only text is trained: images, audio and video are not used",
)
# Columns that other tools read (LLaMA-Factory, ms-swift, TRL, OpenAI, Fireworks) and no form of a row uses here.
_UNUSED = {
    **dict.fromkeys(
        ("reasoning_content", "thinking", "reasoning"),
        "the thought is not used: give the answer as a message, with the thought as its reasoning_content",
    ),
    **dict.fromkeys(
        ("enable_thinking", "reasoning_effort"),
        "the chat template gets a variable only from the column chat_template_kwargs",
    ),
    **dict.fromkeys(("tool_choice", "function_call"), "a parameter of requests is not used in training"),
    "rejected_response": "the rejected answer is not used: for pairs, name the columns prompt, chosen and rejected",
    "weight": "rows are trained with equal weights: the weight of a row is not used",
    "kto_tag": "the label is not used: for labeled answers, name the column label",
}
_NEUTRAL = {("weight", "1"), ("weight", "1.0"), ("tool_choice", "auto"), ("function_call", "auto")}
# Columns that some forms of a row use, with the advice for the others.
_ADVICE = {
    "system": "the column is not used: write its text as the first message, with the role system",
    "history": "the column is not used: write its turns as messages",
    "input": "the column is not used: append its text to the instruction",
    "context": "the column is not used: append its text to the instruction",
    **dict.fromkeys(OPTION_COLUMNS, "only conversations use the column: give the prompt and the answer as messages"),
}
_UNUSED_BY_SHAPE: dict[Shape, frozenset[str]] = {
    "alpaca": frozenset({"context"}),
    "dolly": frozenset({"system", "history", "input"}),
    "sharegpt": frozenset({"history"}),
}
_UNUSED_BY_OTHERS = frozenset({"system", "history"})
MEANINGFUL_COLUMNS = frozenset({*_MEDIA, *_UNUSED, *_ADVICE})


@cache
def warned_columns(shape: Shape, is_chat: bool) -> frozenset[str]:
    """The columns with a meaning that examples of the shape do not contain."""
    if shape == "text":  # the whole example: a thought or a system prompt beside it is a part of it
        return frozenset({*_MEDIA, *OPTION_COLUMNS})
    options: frozenset[str] = frozenset() if is_chat else OPTION_COLUMNS
    return frozenset({*_MEDIA, *_UNUSED}) | _UNUSED_BY_SHAPE.get(shape, _UNUSED_BY_OTHERS) | options


def unused_columns(row: dict[str, Any], shape: Shape, example: Example) -> Iterator[Note]:
    """A note for every column with a meaning that the example of the row does not contain."""
    if shape == "preference" and row.get("prompt") is None:
        if json_cell(row, "conversations") is not None:
            shape = "sharegpt"
        elif row.get("instruction") is not None:
            shape = "alpaca"
    warned = warned_columns(shape, isinstance(documents(example)[0], Chat))
    for column, cell in row.items():
        if column in warned and not is_blank(cell) and (column, str(cell)) not in _NEUTRAL:
            yield Note(f"/{column}", _MEDIA.get(column) or _UNUSED.get(column) or _ADVICE[column])
