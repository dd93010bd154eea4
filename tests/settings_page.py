"""docs/settings.md, generated from the settings' declarations: `python -m tests.settings_page`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from qlora_service.settings import Settings

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
HEADER = """# Settings

Environment variables of the service, the workers and the command line, read once at start. An invalid value ends the
program with exit code 2 and one line that names it.

This page is generated from `qlora_service/settings.py` (`make docs`).

| variable | type | default | meaning |
|---|---|---|---|
"""


def settings_page() -> str:
    """The page's Markdown."""
    rows = [_row(f"QLORA_{name.upper()}", field) for name, field in Settings.model_fields.items()]
    return HEADER + "".join(rows)


def _row(name: str, field: FieldInfo) -> str:
    default = "" if field.default in (None, "") else f"`{_value(field.default)}`"
    return f"| `{name}` | {_type(field.annotation)} | {default} | {field.description} |\n"


def _value(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    names = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path", SecretStr: "text"}
    alternatives = [names[kind] for kind in get_args(annotation) or (annotation,) if kind is not type(None)]
    return " or ".join(alternatives)


if __name__ == "__main__":
    PAGE.write_text(settings_page(), encoding="utf-8")
