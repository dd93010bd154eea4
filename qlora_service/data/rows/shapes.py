"""Row shapes: the forms in which the field writes training examples, each turned into an `Example`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qlora_service.data.json.strict import RowProblem
from qlora_service.data.rows.examples import Example, Shape
from qlora_service.data.rows.preferences import as_label, read_labelled, read_preference
from qlora_service.data.rows.supervised import (
    read_alpaca,
    read_dolly,
    read_messages,
    read_prompt_completion,
    read_sharegpt,
    read_text,
)

__all__ = ["COLUMNS", "JSON_COLUMNS", "REQUIRED", "RowProblem", "detect_shape", "objective_misfit", "to_example"]

# The columns that make a row one of a shape, in every form of it; where two shapes fit, the earlier, richer is meant.
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
# Columns whose cells hold JSON where the container has only strings (CSV).
JSON_COLUMNS = frozenset({"messages", "conversations", "tools", "history"})
# Every column that some shape reads.
COLUMNS = frozenset({"system", "history", "input", "context", "tools"}).union(
    *(columns for forms in REQUIRED.values() for columns in forms)
)
# What each objective learns from; all others learn from the answers, or the text, of any other shape.
_JUDGED: dict[str, Shape] = {"dpo": "preference", "orpo": "preference", "kto": "kto"}
_READERS: dict[Shape, Callable[[dict[str, Any]], Example]] = {
    "preference": read_preference,
    "kto": read_labelled,
    "messages": read_messages,
    "sharegpt": read_sharegpt,
    "alpaca": read_alpaca,
    "dolly": read_dolly,
    "prompt_completion": read_prompt_completion,
    "text": read_text,
}


def detect_shape(value: dict[str, Any]) -> Shape | None:
    """The shape whose columns the row has, or None."""
    fitting = [shape for shape in REQUIRED if _has_columns(value, shape)]
    # A header alone has columns and no cells: then the plainest shape that fits will do.
    return next((shape for shape in fitting if _is_meant(value, shape)), fitting[-1] if fitting else None)


def to_example(value: dict[str, Any], shape: Shape) -> Example:
    """The training example of a row of the given shape; columns the shape does not know are ignored.

    Raises:
        RowProblem: the row has another shape, a wrong type, an empty answer, or nothing to train.
    """
    if not _has_columns(value, shape):
        raise RowProblem("", _misfit(value, shape))
    return _READERS[shape](value)


def objective_misfit(objective_type: str, shape: Shape) -> str | None:
    """Why rows of the shape cannot serve the objective (`specs.Objective`), and what to do; None where they can."""
    needed = _JUDGED.get(objective_type)
    if needed == shape:
        return None
    if shape == "preference":
        return 'the rows are pairs of a chosen and a rejected answer: set objective.type to "dpo" or "orpo"'
    if shape == "kto":
        return (
            'the rows are answers labelled good or bad: set objective.type to "kto", '
            "or add the dataset again with the shape they have without their label"
        )
    if needed is None:
        return None
    forms = " or ".join(", ".join(columns) for columns in REQUIRED[needed])
    return (
        f'the objective "{objective_type}" needs rows of the shape {needed} ({forms}), '
        f"the dataset has the shape {shape}: "
        'set objective.type to "supervised", or use another dataset'
    )


def _has_columns(value: dict[str, Any], shape: Shape) -> bool:
    return any(value.keys() >= set(columns) for columns in REQUIRED[shape])


def _is_meant(value: dict[str, Any], shape: Shape) -> bool:
    """Whether the cells of columns that other shapes' rows may have too are those of this shape."""
    if shape == "kto":
        return as_label(value["label"]) is not None
    if shape == "preference" and "chosen" in value:
        return value["chosen"] is not None or value["rejected"] is not None
    return True


def _misfit(value: dict[str, Any], shape: Shape) -> str:
    actual = detect_shape(value)
    if actual is not None:
        return f"this row has the shape {actual}, the dataset has the shape {shape}: split them in two datasets"
    keys = ", ".join(repr(key[:40]) for key in list(value)[:10]) or "none"
    accepted = "; ".join(
        f"{name} ({' or '.join(', '.join(columns) for columns in forms)})" for name, forms in REQUIRED.items()
    )
    return f"the keys of this row fit no shape. Found: {keys}. Accepted: {accepted}"
