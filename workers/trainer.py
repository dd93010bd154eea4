"""The trainer: a child process that runs one attempt (`python -m workers.trainer JOB TOKEN DEVICE`).

It alone imports torch, and may die of anything; the supervisor sees that and says so. It ends itself when its claim
is lost, or when the supervisor is gone (its stdin closes). The claim is kept from the first moment on: importing torch
alone may take longer than a lease.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before the libraries read them: no network, no progress bars, no forked tokenizer threads.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "true"  # rendering comes before anything that could fork

import structlog

from qlora_service.artifacts.store import ArtifactStore
from qlora_service.errors import ClaimLost, JobCancelled, JobFailed, QLoRAError
from qlora_service.jobs import FailureReason
from qlora_service.logs import configure_logging
from qlora_service.models.catalog import Catalog
from qlora_service.queue import Claim, Progress, Queue
from qlora_service.settings import Settings
from qlora_service.store.database import Database, persist
from qlora_service.store.datasets import get_dataset
from qlora_service.store.jobs import get_job

if TYPE_CHECKING:
    from qlora_service.training.loop import EvaluationMetrics, StepMetrics

EXIT_CLAIM_LOST = 75
EXIT_SUPERVISOR_GONE = 76
ETA_STEPS = 20
"""The ETA follows the mean of so many steps."""
OUT_OF_MEMORY_SIGNS = ("out of memory", "can't allocate memory", "alloc_failed")

log = structlog.get_logger()


class StopRequested(Exception):
    """The worker is shutting down; the job goes back to the queue."""


class ClaimKeeper:
    """Renews the claim in the background and knows whether the attempt should stop."""

    def __init__(self, queue: Queue, claim: Claim, interval_s: float) -> None:
        self._queue, self._claim, self._interval_s = queue, claim, interval_s
        self._cancelled = threading.Event()
        self._stopping = threading.Event()
        self._ended = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._renew, name="claim", daemon=True).start()
        threading.Thread(target=self._watch_supervisor, name="supervisor", daemon=True).start()

    def stop(self) -> None:
        """Ask for a stop at the next step boundary; safe in a signal handler."""
        self._stopping.set()

    def end(self) -> None:
        """The attempt's outcome is about to be written: renew no more."""
        self._ended.set()

    def check(self, cancel: bool = False) -> None:
        """Raises: JobCancelled, StopRequested."""
        if cancel or self._cancelled.is_set():
            raise JobCancelled("the job was cancelled")
        if self._stopping.is_set():
            raise StopRequested

    def _renew(self) -> None:
        while not self._ended.wait(self._interval_s):
            try:
                if self._queue.renew(self._claim):
                    self._cancelled.set()
            except ClaimLost:
                if not self._ended.is_set():
                    log.error("claim_lost", job=self._claim.job_id, token=self._claim.token)
                    os._exit(EXIT_CLAIM_LOST)
            except Exception as error:  # noqa: BLE001 - a locked database passes; a lost claim is told above
                log.warning("renew_failed", job=self._claim.job_id, error=str(error))

    def _watch_supervisor(self) -> None:
        # The supervisor holds the other end and never writes: reading ends when it is gone, however it went.
        while os.read(0, 1):
            pass
        if not self._ended.is_set():
            os._exit(EXIT_SUPERVISOR_GONE)


class AttemptReporter:
    """Writes progress and metrics under the claim, and to the metrics file that is published."""

    def __init__(self, queue: Queue, claim: Claim, keeper: ClaimKeeper, metrics_file: Path, patience_s: float) -> None:
        self._patience_s = patience_s
        self._queue, self._claim, self._keeper = queue, claim, keeper
        self._file = metrics_file.open("w", encoding="utf-8")
        self._total_steps = 0
        self._ends: deque[float] = deque(maxlen=ETA_STEPS + 1)
        self._latest: dict[str, Any] = {}

    def enter_phase(self, phase: str, total_steps: int | None) -> None:
        self._total_steps = total_steps or 0
        progress = Progress(phase=phase, total_steps=total_steps)
        self._tell(progress, ("log", {"message": phase, "attempt": self._claim.token}))
        self._ends.append(time.monotonic())

    def on_step(self, metrics: StepMetrics) -> None:
        self._ends.append(time.monotonic())
        per_step = (self._ends[-1] - self._ends[0]) / max(1, len(self._ends) - 1)
        eta = per_step * (self._total_steps - metrics.step)
        self._record("metrics", asdict(metrics), Progress(step=metrics.step, eta_s=round(eta, 1)))

    def on_evaluation(self, metrics: EvaluationMetrics) -> None:
        self._record("evaluation", asdict(metrics), Progress())
        if metrics.step == 0:
            self._ends.clear()
            self._ends.append(time.monotonic())

    def _record(self, kind: str, values: dict[str, Any], progress: Progress) -> None:
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        self._latest |= values
        self._tell(replace(progress, metrics=dict(self._latest)), (kind, {**values, "attempt": self._claim.token}))

    def _tell(self, progress: Progress, event: tuple[str, dict[str, Any]]) -> None:
        cancel = persist(lambda: self._queue.report(self._claim, progress, event), self._patience_s)
        self._keeper.check(cancel)


def main(job_id: str, token: int, device: str, settings: Settings) -> None:
    """Run the attempt on `device` (cuda or cpu) and write its outcome under the claim."""
    claim = Claim(job_id, token)
    database = Database(settings.resolved_database_url)
    queue = Queue(database, lease_s=settings.lease_s)
    keeper = ClaimKeeper(queue, claim, settings.heartbeat_s)
    signal.signal(signal.SIGTERM, lambda *_: keeper.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor decides
    keeper.start()
    scratch = settings.tmp_dir / claim.name
    # A database that is locked or away is waited for, as long as the claim may last.
    patience_s = settings.lease_s
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        with database.read() as connection:
            job = get_job(connection, job_id)
            dataset = get_dataset(connection, job.dataset_id)
        from workers.attempt import AttemptInputs, run_attempt

        inputs = AttemptInputs(
            job=job,
            token=token,
            dataset=dataset,
            base=Catalog(settings.models_dir).get(job.spec.base_model),
            artifacts=ArtifactStore(settings.resolved_artifact_url),
            scratch=scratch,
            needs_gpu=device == "cuda",
        )
        if inputs.base.weights_sha256 != job.base_weights_sha256:
            raise JobFailed(
                f"base model {inputs.base.name} has other weights than when the job was posted: post the job again",
                reason=FailureReason.INVALID_INPUT,
            )
        metrics_file = scratch / "metrics.jsonl"
        reporter = AttemptReporter(queue, claim, keeper, metrics_file, patience_s)
        result = run_attempt(inputs, reporter, reporter.enter_phase, metrics_file)
        keeper.end()
        persist(lambda: queue.succeed(claim, result), patience_s)
    except JobCancelled:
        keeper.end()
        persist(lambda: queue.cancelled(claim), patience_s)
    except StopRequested:
        keeper.end()
        persist(lambda: queue.release(claim, "the worker was stopped"), patience_s)
    except ClaimLost:
        log.error("claim_lost", job=job_id, token=token)
        sys.exit(EXIT_CLAIM_LOST)
    except Exception as error:
        keeper.end()
        failure = as_failure(error, f"logs/{claim.name}.log")
        log.error("attempt_failed", job=job_id, token=token, reason=failure.details["reason"], exc_info=error)
        persist(lambda: queue.fail(claim, failure.as_dict()), patience_s)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
    # torch.OutOfMemoryError, cuBLAS, bitsandbytes' managed memory, and torch's allocator on a CPU, by what they say.
    if isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in OUT_OF_MEMORY_SIGNS):
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
