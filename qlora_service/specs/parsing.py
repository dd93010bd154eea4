"""Parsing of a decoded document to a `JobSpec`, or to an error with every finding."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from qlora_service.errors import Finding, InvalidSpec
from qlora_service.specs.job import JobSpec

_TAGS = {"adapter": "method", "objective": "type"}
"""The tag field of each union, by the name of the spec's field that holds the union."""


def parse_spec(value: Any) -> JobSpec:
    """The spec that `value` (decoded JSON or YAML) describes.

    Raises:
        InvalidSpec: with every finding: its JSON pointer and, for a misspelled field, the closest known name.
    """
    try:
        return JobSpec.model_validate(value)
    except ValidationError as error:
        raise _invalid_spec(error, value) from None


def _invalid_spec(error: ValidationError, document: Any) -> InvalidSpec:
    """The pydantic error as `InvalidSpec`, with one finding per fault."""
    findings = []
    for fault in error.errors(include_url=False):
        path = _document_path(fault["loc"], document, ends_in_missing=fault["type"] == "missing")
        reason = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            reason = _unknown_name("field", str(path[-1]), _known_fields(fault["loc"]))
        elif fault["type"] == "missing":
            reason = "this field is required"
        elif fault["type"] == "model_type":
            reason = "this must be an object with fields"
        elif fault["type"] == "union_tag_invalid":
            path.append(_TAGS[str(path[-1])])
            tags = [tag.strip("'") for tag in fault["ctx"]["expected_tags"].split(", ")]
            reason = _unknown_name(str(path[-1]), str(fault["ctx"]["tag"]), tags)
        pointer = "".join(f"/{str(part).replace('~', '~0').replace('/', '~1')}" for part in path)
        findings.append(Finding(reason=reason, pointer=pointer or "/"))
    first = findings[0]
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    return InvalidSpec(f"{first.pointer}: {first.reason}{more}", location=first.pointer, findings=findings)


def _document_path(loc: Sequence[str | int], document: Any, *, ends_in_missing: bool) -> list[str | int]:
    """The parts of `loc` that exist in the document: pydantic inserts the union members that it tried."""
    path = []
    for part in loc:
        match document, part:
            case (dict(), _) if part in document:
                document = document[part]
            case list(), int():
                document = document[part]
            case _:
                continue
        path.append(part)
    return [*path, loc[-1]] if ends_in_missing else path


def _known_fields(loc: Sequence[str | int]) -> list[str]:
    """The known fields of the spec part that contains the last name of `loc`.

    In `loc`, pydantic puts the tag of the chosen member after the name of a union.
    """
    models: list[type[BaseModel]] = [JobSpec]
    for part in loc[:-1]:
        tagged = [model for model in models if part in _tags(model)]
        models = tagged or [
            inner
            for model in models
            if part in model.model_fields
            for inner in _spec_parts(model.model_fields[str(part)])
        ]
    return sorted({name for model in models for name in model.model_fields})


def _spec_parts(field: FieldInfo) -> list[type[BaseModel]]:
    """The spec parts that a field can hold."""
    models: list[type[BaseModel]] = []
    pending: list[Any] = [field.annotation]
    while pending:
        kind = pending.pop()
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            models.append(kind)
        else:
            pending += get_args(kind)
    return models


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    """The values of the model's tag field (`method` or `type`); empty if it has neither."""
    return tuple(
        tag for name in _TAGS.values() if (field := model.model_fields.get(name)) for tag in get_args(field.annotation)
    )


def _unknown_name(kind: str, name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known {kind}s: {', '.join(known)}"
    return f"unknown {kind} {name!r}: {hint}"
