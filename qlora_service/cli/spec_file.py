"""A job's configuration as a file: YAML or JSON, with the line of every field for messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qlora_service.cli.options import FaultsInFile, WrongUsage
from qlora_service.errors import Finding

Lines = dict[str, int]
"""The line of each field by its JSON pointer."""


def read_spec_file(path: Path) -> tuple[dict[str, Any], Lines]:
    """The document at `path` and the line of each of its fields.

    Raises:
        FaultsInFile: it is neither YAML nor JSON, names a field twice, is no mapping, or has no end.
        WrongUsage: it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WrongUsage(f"{path} cannot be read: {error}") from None
    lines: Lines = {}
    try:
        # JSON is YAML too, so one reader gives the lines of both.
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
        twice = _walk(root, "", lines)
    except RecursionError:
        reason = "it is nested too deeply: does an alias (*name) stand inside what it is the name of?"
        raise FaultsInFile(path, "the configuration has no end", [Finding(reason=reason)]) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error)
        finding = Finding(reason=reason, line=None if mark is None else mark.line + 1)
        raise FaultsInFile(path, "the configuration is neither YAML nor JSON", [finding]) from None
    if not isinstance(document, dict):
        reason = "expected fields such as `base_model: NAME`"
        raise FaultsInFile(path, "the configuration holds no fields", [Finding(reason=reason, line=1)])
    if twice:
        raise FaultsInFile(path, "the configuration names a field twice", twice)
    return document, lines


def _walk(node: Any, pointer: str, lines: Lines) -> list[Finding]:
    """Fills in the lines below `node`; the fields that occur twice."""
    twice: list[Finding] = []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = f"{pointer}/{str(key.value).replace('~', '~0').replace('/', '~1')}"
            line = key.start_mark.line + 1
            if below in lines:
                twice.append(Finding(reason=f"named before in line {lines[below]}", pointer=below, line=line))
            lines[below] = line
            twice += _walk(value, below, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[f"{pointer}/{index}"] = value.start_mark.line + 1
            twice += _walk(value, f"{pointer}/{index}", lines)
    return twice
