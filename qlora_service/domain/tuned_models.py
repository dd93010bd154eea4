"""Names of fine-tuned models, as OpenAI's wire has them: ft:<base>:<project>:<name>:<the job's own part of its id>."""

from __future__ import annotations

import re

from qlora_service.domain.jobs import Job, JobStatus

_NAME = re.compile(r"ft:[^:]+:[^:]+:[^:]*:([0-9a-f]{22})")


def tuned_model_name(job: Job) -> str | None:
    """What the job's model is called; None before it has succeeded."""
    if job.status is not JobStatus.SUCCEEDED:
        return None
    name = re.sub(r"[^a-z0-9]+", "-", (job.spec.name or "").lower()).strip("-")
    return f"ft:{job.spec.base_model}:{job.project}:{name}:{job.id.removeprefix('job_')}"


def job_id_in(name: str) -> str | None:
    """The id of the job that a fine-tuned model's name would be of; None if it is no such name."""
    match = _NAME.fullmatch(name)
    return match and f"job_{match[1]}"
