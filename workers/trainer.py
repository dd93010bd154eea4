"""The trainer: a child process that runs one attempt (`python -m workers.trainer JOB TOKEN DEVICE`).

It alone imports torch, and may die of anything; the supervisor sees that and says so. It ends itself when its claim
is lost, or when the supervisor is gone (its stdin closes). The claim is kept from the first moment on: importing torch
alone may take longer than a lease.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before the libraries read them: no network, no progress bars, no forked tokenizer threads.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "true"  # rendering comes before anything that could fork

import structlog

from qlora_service.artifacts.store import ArtifactStore
from qlora_service.errors import ClaimLost, Interrupted, JobCancelled, JobFailed, QLoRAError
from qlora_service.jobs import FailureReason, HoldReason
from qlora_service.logs import configure_logging
from qlora_service.models.catalog import Catalog
from qlora_service.models.quantized_cache import QuantizedCache
from qlora_service.queue import USER_HOLD, Claim, Queue
from qlora_service.settings import Settings
from qlora_service.store.database import Database, persist
from qlora_service.store.datasets import get_dataset
from qlora_service.store.jobs import get_job
from qlora_service.training.checkpoint_space import Ballast
from workers import exit_codes
from workers.claim_keeper import ClaimKeeper
from workers.disk_space import BALLAST, disk_full_hold, is_disk_full
from workers.reporter import JobReporter

log = structlog.get_logger()


def main(job_id: str, token: int, device: str, settings: Settings) -> None:
    """Run the attempt on `device` (cuda or cpu) and write its outcome under the claim."""
    claim = Claim(job_id, token)
    database = Database(settings.resolved_database_url)
    queue = Queue(database, lease_s=settings.lease_s)
    ballast = Ballast(settings.checkpoint_dir / job_id / BALLAST)
    keeper = ClaimKeeper(
        queue,
        claim,
        interval_s=settings.heartbeat_s,
        lease_s=settings.lease_s,
        hang_s=settings.hang_s,
        make_room=ballast.release,
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    keeper.start()
    scratch = settings.tmp_dir / claim.name
    try:
        write_outcome = _outcome(
            queue, claim, ballast, lambda: _run(database, queue, claim, keeper, ballast, device, scratch, settings)
        )
        keeper.end()
        shutil.rmtree(scratch, ignore_errors=True)
        # A database that is locked or away is waited for, as long as the claim may last.
        persist(write_outcome, settings.lease_s)
    except ClaimLost:
        log.error("claim_lost", job=job_id, token=token)
        sys.exit(exit_codes.CLAIM_LOST)
    finally:
        ballast.release()
        keeper.close()


def _run(
    database: Database,
    queue: Queue,
    claim: Claim,
    keeper: ClaimKeeper,
    ballast: Ballast,
    device: str,
    scratch: Path,
    settings: Settings,
) -> dict[str, Any]:
    """The job's result. Raises what `run_attempt` does."""
    scratch.mkdir(parents=True, exist_ok=True)
    with database.read() as connection:
        job = get_job(connection, claim.job_id)
        dataset = get_dataset(connection, job.dataset_id)
        judged = job.spec.validation.dataset_id
        validation = None if judged is None else get_dataset(connection, judged)
    from workers.attempt import AttemptInputs, run_attempt

    # Until here nothing would be lost, and a library that is being imported does not listen: SIGTERM ends the process.
    signal.signal(signal.SIGTERM, lambda *_: keeper.stop())
    inputs = AttemptInputs(
        job=job,
        token=claim.token,
        dataset=dataset,
        base=Catalog(settings.models_dir).get(job.spec.base_model),
        artifacts=ArtifactStore(settings.resolved_artifact_url),
        scratch=scratch,
        checkpoint_dir=settings.checkpoint_dir / claim.job_id,
        checkpoint_s=settings.checkpoint_s,
        needs_gpu=device == "cuda",
        validation=validation,
        cache=QuantizedCache(settings.cache_dir, settings.cache_bytes),
    )
    if inputs.base.weights_sha256 != job.base_weights_sha256:
        raise JobFailed(
            f"base model {inputs.base.name} has other weights than when the job was posted: post the job again",
            reason=FailureReason.INVALID_INPUT,
        )
    metrics_file = scratch / "metrics.jsonl"
    reporter = JobReporter(queue, claim, keeper, metrics_file, settings.lease_s)
    return run_attempt(inputs, reporter, keeper.check, ballast, metrics_file)


def _outcome(
    queue: Queue, claim: Claim, ballast: Ballast, attempt: Callable[[], dict[str, Any]]
) -> Callable[[], object]:
    """What writes the attempt's outcome, whichever it is. Raises: ClaimLost."""
    try:
        result = attempt()
        return lambda: queue.succeed(claim, result)
    except JobCancelled:
        return lambda: queue.cancelled(claim)
    except Interrupted as interruption:
        holds: dict[Any, dict[str, Any]] = {
            HoldReason.USER: USER_HOLD,
            HoldReason.DISK_FULL: disk_full_hold(ballast.wanted_bytes),
        }
        why, hold = interruption.message, holds.get(interruption.details.get("hold"))
        return lambda: queue.release(claim, why) if hold is None else queue.pause(claim, hold)
    except ClaimLost:
        raise
    except Exception as error:
        if is_disk_full(error):
            ballast.release()  # the database may be on the same disk
            log.error("disk_full", job=claim.job_id, token=claim.token, exc_info=error)
            hold = disk_full_hold(ballast.wanted_bytes)
            return lambda: queue.pause(claim, hold)
        failure = as_failure(error, f"logs/{claim.name}.log")
        reason = failure.details["reason"]
        log.error("attempt_failed", job=claim.job_id, token=claim.token, reason=reason, exc_info=error)
        return lambda: queue.fail(claim, failure.as_dict())


def as_failure(error: Exception, log_name: str) -> JobFailed:
    """Any exception as the job's failure, typed. An unforeseen one's text stays in the log: it may quote paths."""
    if isinstance(error, JobFailed):
        return error
    if isinstance(error, QLoRAError):
        return JobFailed(
            error.message,
            location=error.location,
            findings=error.findings,
            **{**error.details, "reason": FailureReason.INVALID_INPUT},
        )
    from qlora_service.training.device import is_out_of_memory

    if is_out_of_memory(error):
        return JobFailed(
            "the device ran out of memory: lower training.micro_batch_tokens or training.max_seq_len_tokens, or set "
            "training.gradient_checkpointing to true",
            reason=FailureReason.OUT_OF_MEMORY,
        )
    return JobFailed(
        f"the attempt ended with an unforeseen {type(error).__name__}; the worker's {log_name} has the details",
        reason=FailureReason.INTERNAL,
    )


if __name__ == "__main__":
    _settings = Settings()
    configure_logging(_settings.log_level)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], _settings)
