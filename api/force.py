"""`force`, a request field next to a job's spec: queue a job that is not expected to fit into memory."""

from __future__ import annotations

from typing import Any

from qlora_service.errors import Finding, InvalidSpec

NAME = "force"
SCHEMA = {
    "type": "boolean",
    "default": False,
    "description": "Queue the job, with a warning, even if it is not expected to fit into the device's memory.",
}


def take_force(document: Any) -> tuple[Any, bool]:
    """The document without `force`, and the value of `force`.

    Raises:
        InvalidSpec: `force` is neither true nor false.
    """
    if not isinstance(document, dict) or NAME not in document:
        return document, False
    spec = {name: value for name, value in document.items() if name != NAME}
    force = document[NAME]
    if not isinstance(force, bool):
        finding = Finding("this must be true or false", pointer=f"/{NAME}")
        raise InvalidSpec(str(finding), location=finding.pointer, findings=[finding])
    return spec, force
