"""Rows, job requests and submissions for the tests of actions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qlora_service.actions.jobs import Submission
from qlora_service.actions.service import Service
from qlora_service.specs import parse_spec

ROWS = [{"prompt": f"What is {n} + {n}? ", "completion": f"It is {2 * n}."} for n in range(20)]
LONG = {"prompt": "once ", "completion": "upon a time " * 200}
PNG = b"\x89PNG\r\n\x1a\n" + bytes(64)


def jsonl(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def job_request(**groups: Any) -> dict[str, Any]:
    """A job's request that fits the tiny model."""
    training = {"max_seq_len_tokens": 128, **groups.pop("training", {})}
    return {"base_model": "tiny", "training": training, **groups}


def submit(service: Service, upload: Path | None = None, **groups: Any) -> Submission:
    return service.jobs.submit(parse_spec(job_request(**groups)), upload, upload.name if upload else None)
