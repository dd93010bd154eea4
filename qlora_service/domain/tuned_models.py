"""Names of fine-tuned models in OpenAI's API: ft:<base>:<project>:<name>:<job id without prefix>."""

from __future__ import annotations

import re

from qlora_service.domain.jobs import Job, JobStatus

_NAME = re.compile(r"ft:[^:]+:[^:]+:[^:]*:([0-9a-f]{22})")


def tuned_model_name(job: Job) -> str | None:
    """The name of the job's model; None before the job has succeeded."""
    if job.status is not JobStatus.SUCCEEDED:
        return None
    name = re.sub(r"[^a-z0-9]+", "-", (job.spec.name or "").lower()).strip("-")
    return f"ft:{job.spec.base_model}:{job.project}:{name}:{job.id.removeprefix('job_')}"


def job_id_in(name: str) -> str | None:
    """The job id in a fine-tuned model's name; None if `name` is not such a name."""
    match = _NAME.fullmatch(name)
    return match and f"job_{match[1]}"
