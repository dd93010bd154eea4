"""`force`, which stands beside a job's spec and is none of it: queue the job although it should not fit."""

from __future__ import annotations

from typing import Any

from qlora_service.errors import Finding, InvalidSpec

NAME = "force"
SCHEMA = {
    "type": "boolean",
    "default": False,
    "description": "Queue the job also if it should not fit into the device's memory, with a warning.",
}


def take_force(document: Any) -> tuple[Any, bool]:
    """The document without `force`, and what that said.

    Raises:
        InvalidSpec: it is neither true nor false.
    """
    if not isinstance(document, dict) or NAME not in document:
        return document, False
    spec = {name: value for name, value in document.items() if name != NAME}
    force = document[NAME]
    if not isinstance(force, bool):
        finding = Finding("this must be true or false", pointer=f"/{NAME}")
        raise InvalidSpec(str(finding), location=finding.pointer, findings=[finding])
    return spec, force
