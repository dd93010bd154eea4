"""Spec files: a job's spec in YAML or JSON, with the line of every field for error messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qlora_service.cli.options import InvalidFile, WrongUsage
from qlora_service.errors import Finding

Lines = dict[str, int]
"""The line of each field, by its JSON pointer."""


def read_spec_file(path: Path) -> tuple[dict[str, Any], Lines]:
    """The document at `path` and the line of each of its fields.

    Raises:
        InvalidFile: neither YAML nor JSON, a field set twice, no mapping, or nested too deeply.
        WrongUsage: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WrongUsage(f"{path} cannot be read: {error}") from None
    lines: Lines = {}
    try:
        # JSON is a subset of YAML, so one parser gives the lines of both.
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
        duplicates = _collect_lines(root, "", lines)
    except RecursionError:
        reason = "does an alias (*name) stand inside the node that it refers to?"
        raise InvalidFile(path, "the configuration is nested too deeply", [Finding(reason=reason)]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error)
        finding = Finding(reason=reason, line=None if mark is None else mark.line + 1)
        raise InvalidFile(path, "the configuration is neither YAML nor JSON", [finding]) from None
    if not isinstance(document, dict):
        reason = "expected fields such as `base_model: NAME`"
        raise InvalidFile(path, "the configuration has no fields", [Finding(reason=reason, line=1)])
    if duplicates:
        raise InvalidFile(path, "the configuration sets a field twice", duplicates)
    return document, lines


def _collect_lines(node: Any, pointer: str, lines: Lines) -> list[Finding]:
    """Adds the lines of the fields below `node` to `lines`; the findings are duplicate fields."""
    duplicates: list[Finding] = []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            field = f"{pointer}/{str(key.value).replace('~', '~0').replace('/', '~1')}"
            line = key.start_mark.line + 1
            if field in lines:
                duplicates.append(Finding(reason=f"already set in line {lines[field]}", pointer=field, line=line))
            lines[field] = line
            duplicates += _collect_lines(value, field, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[f"{pointer}/{index}"] = value.start_mark.line + 1
            duplicates += _collect_lines(value, f"{pointer}/{index}", lines)
    return duplicates
