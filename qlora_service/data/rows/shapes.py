"""Row shapes: detection of a row's shape, and the reader of each shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qlora_service.data.json.strict import RowProblem
from qlora_service.data.rows.cells import Notes
from qlora_service.data.rows.columns import MEANINGFUL_COLUMNS, unused_columns, warned_columns
from qlora_service.data.rows.examples import Example, Shape
from qlora_service.data.rows.preferences import as_label, read_labeled_answer, read_preference
from qlora_service.data.rows.supervised import (
    read_alpaca,
    read_dolly,
    read_messages,
    read_prompt_completion,
    read_sharegpt,
    read_text,
)

__all__ = ["COLUMNS", "REQUIRED", "RowProblem", "detect_shape", "objective_mismatch", "to_example"]

# The required columns of every form of a shape. Of two shapes that fit a row, the earlier, richer one is detected.
REQUIRED: dict[Shape, tuple[tuple[str, ...], ...]] = {
    "preference": (("chosen", "rejected"), ("input", "preferred_output", "non_preferred_output")),
    "kto": (("messages", "label"), ("prompt", "completion", "label")),
    "messages": (("messages",),),
    "sharegpt": (("conversations",),),
    "alpaca": (("instruction", "output"),),
    "dolly": (("instruction", "response"),),
    "prompt_completion": (("prompt", "completion"),),
    "text": (("text",),),
}
# Every column that at least one shape reads, or whose cells decide about a warning.
COLUMNS = MEANINGFUL_COLUMNS.union(*(columns for forms in REQUIRED.values() for columns in forms))
# A superset for those rows of a shape that are conversations.
_WARNED_COLUMNS = {shape: warned_columns(shape, is_chat=False) for shape in REQUIRED}
# The shape that an objective requires; every other objective trains on the answers, or the text, of any other shape.
_REQUIRED_SHAPES: dict[str, Shape] = {"dpo": "preference", "orpo": "preference", "kto": "kto"}
_READERS: dict[Shape, Callable[[dict[str, Any], Notes], Example]] = {
    "preference": read_preference,
    "kto": read_labeled_answer,
    "messages": read_messages,
    "sharegpt": read_sharegpt,
    "alpaca": read_alpaca,
    "dolly": read_dolly,
    "prompt_completion": read_prompt_completion,
    "text": read_text,
}


def detect_shape(value: dict[str, Any]) -> Shape | None:
    """The shape whose columns the row has, or None."""
    candidates = [shape for shape in REQUIRED if _has_columns(value, shape)]
    # A header alone has columns without cells: then the plainest candidate is enough.
    return next((shape for shape in candidates if _cells_fit(value, shape)), candidates[-1] if candidates else None)


def to_example(value: dict[str, Any], shape: Shape, notes: Notes | None = None) -> Example:
    """The training example of a row of the given shape; columns without a known meaning are ignored.

    `notes` is filled with what is not trained, or not as one would expect.

    Raises:
        RowProblem: the row has another shape, a wrong type, an empty answer, or nothing to train.
    """
    if not _has_columns(value, shape):
        raise RowProblem("", _shape_mismatch(value, shape))
    notes = [] if notes is None else notes
    example = _READERS[shape](value, notes)
    if not _WARNED_COLUMNS[shape].isdisjoint(value):
        notes += unused_columns(value, shape, example)
    return example


def objective_mismatch(objective_type: str, shape: Shape) -> str | None:
    """Why the objective (`specs.Objective`) cannot train on rows of the shape, and what to do; None if it can."""
    required = _REQUIRED_SHAPES.get(objective_type)
    if required == shape:
        return None
    if shape == "preference":
        return 'the rows are pairs of a chosen and a rejected answer: set objective.type to "dpo" or "orpo"'
    if shape == "kto":
        return (
            'the rows are answers labeled good or bad: set objective.type to "kto", '
            "or upload the dataset again and state the shape that its rows have without the label"
        )
    if required is None:
        return None
    forms = " or ".join(", ".join(columns) for columns in REQUIRED[required])
    return (
        f'the objective "{objective_type}" needs rows of the shape {required} ({forms}), '
        f"the dataset has the shape {shape}: "
        'set objective.type to "supervised", or use another dataset'
    )


def _has_columns(value: dict[str, Any], shape: Shape) -> bool:
    return any(value.keys() >= set(columns) for columns in REQUIRED[shape])


def _cells_fit(value: dict[str, Any], shape: Shape) -> bool:
    """Whether the cells fit the shape too, where rows of other shapes can have the same columns."""
    if shape == "kto":
        return as_label(value["label"]) is not None
    if shape == "preference" and "chosen" in value:
        return value["chosen"] is not None or value["rejected"] is not None
    return True


def _shape_mismatch(value: dict[str, Any], shape: Shape) -> str:
    actual = detect_shape(value)
    if actual is not None:
        return f"this row has the shape {actual}, the dataset has the shape {shape}: split them into two datasets"
    keys = ", ".join(repr(key[:40]) for key in list(value)[:10]) or "none"
    accepted = "; ".join(
        f"{name} ({' or '.join(', '.join(columns) for columns in forms)})" for name, forms in REQUIRED.items()
    )
    return f"the keys of this row fit no shape. Found: {keys}. Accepted: {accepted}"
