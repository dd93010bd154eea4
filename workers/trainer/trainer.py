"""The trainer: a child process that runs attempts, and answers chats between them (`python -m workers.trainer DEVICE`).

The process imports torch, and may crash at any time: the supervisor sees and records that. It exits when its claim is
lost, or when the supervisor ends (its stdin, a socket, closes). The heartbeat starts before everything
else, because importing torch alone may take longer than a lease.

After an attempt or chats that left the base as it was loaded, the process keeps it and waits for the next assignment
(`supervisor_channel`). If any check fails it exits: a new process has a known state.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from qlora_service.artifacts.store import ArtifactStore
from qlora_service.domain.jobs import FailureReason, HoldReason
from qlora_service.errors import ClaimLost, Interrupted, JobCancelled, JobFailed, QLoRAError
from qlora_service.models.base.needed_base import NeededBase
from qlora_service.models.base.quantized_cache import QuantizedCache
from qlora_service.models.catalog.catalog import BaseModel, Catalog
from qlora_service.models.catalog.staging import reap_stale, staging_directory
from qlora_service.process.startup import importing_torch
from qlora_service.queue.claim import Claim
from qlora_service.queue.queue import Queue
from qlora_service.queue.transitions import USER_HOLD
from qlora_service.settings import Settings
from qlora_service.specs import Quantization
from qlora_service.store.database import Database, persist
from qlora_service.store.datasets import get_dataset
from qlora_service.store.history import measured_on
from qlora_service.store.jobs import get_job
from qlora_service.training.checkpoint.disk_reserve import RESERVE_FILE, DiskReserve
from workers import exit_codes
from workers.disk_space import disk_full_hold, is_disk_full
from workers.inference.server import RequestQueue, serve
from workers.supervisor_channel import ChatTurn, SupervisorChannel
from workers.trainer.heartbeat import Heartbeat
from workers.trainer.measurements import AttemptMeasurements
from workers.trainer.reporter import JobReporter

if TYPE_CHECKING:
    from workers.warm_base import BaseHolder

log = structlog.get_logger()

LOAD_ERROR_GRACE_S = 0.5
"""Grace period for reporting a load error to waiting clients"""


@dataclass(frozen=True)
class _Outcome:
    """The outcome of an attempt, before it is written."""

    write: Callable[[], object]
    """Writes it under the claim. Raises: ClaimLost"""
    is_orderly: bool = False
    """The job ended or was preempted, so that another one may follow in this process"""


class Trainer:
    """Runs attempts and chats one after the other, on the base that the first one loaded."""

    def __init__(self, device: str, settings: Settings, channel: SupervisorChannel) -> None:
        """`device` is the device to train on: cuda or cpu."""
        self._device, self._settings, self._channel = device, settings, channel
        self._database = Database(settings.resolved_database_url)
        self._queue = Queue(self._database, lease_s=settings.lease_s)
        self._bases: BaseHolder | None = None

    def serve(self) -> None:
        """Carries out the supervisor's assignments, until one leaves the process unfit for another."""
        while True:
            assignment = self._channel.next_assignment()
            redirect_output(assignment.log_path)
            base = self.chat(assignment) if isinstance(assignment, ChatTurn) else self.run(assignment.claim)
            if base is None:
                return
            redirect_output(Path(os.devnull))
            self._channel.report_idle(base)

    def run(self, claim: Claim) -> NeededBase | None:
        """Runs the attempt and writes its outcome; returns the loaded base, None if the process must end.

        Exits the process when the claim is lost.
        """
        reserve = DiskReserve(self._settings.checkpoint_dir / claim.job_id / RESERVE_FILE)
        heartbeat = Heartbeat(
            self._queue,
            claim,
            interval_s=self._settings.heartbeat_s,
            lease_s=self._settings.lease_s,
            hang_s=self._settings.hang_s,
            free_disk_space=reserve.release,
        )
        heartbeat.start()
        scratch = self._settings.tmp_dir / claim.name
        needed_bases: list[NeededBase] = []
        try:
            # In a context of its own: context variables that the job sets end with it.
            attempt = partial(
                copy_context().run, self._attempt, claim, heartbeat, reserve, scratch, needed_bases.append
            )
            outcome = _outcome(self._queue, claim, reserve, attempt)
            with self._channel.finishing():
                heartbeat.stop_renewing()
                shutil.rmtree(scratch, ignore_errors=True)
                # Retried while the database is locked or unavailable, for as long as the claim may last.
                persist(outcome.write, self._settings.lease_s)
        except ClaimLost:
            log.error("claim_lost", job=claim.job_id, token=claim.token)
            sys.exit(exit_codes.CLAIM_LOST)
        finally:
            reserve.release()
            heartbeat.close()
        # The outcome is written: SIGTERM may end the process again.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        may_continue = outcome.is_orderly and self._settings.warm_s > 0 and not heartbeat.is_stopping
        return needed_bases[0] if may_continue and self._restore_process() else None

    def chat(self, turn: ChatTurn) -> NeededBase | None:
        """Answers chats until the supervisor needs the slot; the base loaded for the next assignment, as in `run`."""
        quantization = Quantization.model_validate_json(turn.base.quantization)
        requests = RequestQueue(turn.listener)
        requests.open()
        with self._channel.on_yield_request(requests.yield_slot):
            try:
                base = Catalog(self._settings.models_dir).get(turn.base.base_model)
                self._answer_chats(requests, base, quantization)
            except QLoRAError as error:
                log.error("base_not_loaded", base_model=turn.base.base_model, exc_info=error)
                requests.drain(error)
                time.sleep(LOAD_ERROR_GRACE_S)
                return None
        requests.close()
        may_continue = self._settings.warm_s > 0 and self._restore_process()
        return NeededBase(base.weights_sha256, quantization) if may_continue else None

    def _answer_chats(self, requests: RequestQueue, base: BaseModel, quantization: Quantization) -> None:
        """Returns when the supervisor needs the slot. Raises: QLoRAError, when the base cannot be loaded."""
        started_at = time.monotonic()
        with importing_torch():
            from workers.inference.engine import Engine
            from workers.trainer.process_reset import reset_process_state
            from workers.warm_base import BaseHolder
        self._bases = self._bases or BaseHolder()
        reap_stale(self._settings.tmp_dir)  # leftovers of killed processes
        with reset_process_state(), staging_directory(self._settings.tmp_dir) as scratch:
            engine = Engine(
                base,
                quantization,
                ArtifactStore(self._settings.resolved_artifact_url),
                scratch.path,
                self._bases,
                cache=QuantizedCache(self._settings.cache_dir, self._settings.cache_bytes),
                needs_gpu=self._device == "cuda",
            )
            with engine:
                log.info(
                    "ready_to_chat",
                    base_model=base.name,
                    base=engine.base_source,
                    seconds=round(time.monotonic() - started_at, 2),
                )
                requests.finish_loading()
                serve(requests, engine.generate)

    def _restore_process(self) -> bool:
        """Whether another assignment may follow: the base is restored, and the job's memory is released."""
        from workers.trainer.process_reset import release_freed_memory

        is_restored = self._bases is not None and self._bases.restore()
        release_freed_memory()
        return is_restored

    def _attempt(
        self,
        claim: Claim,
        heartbeat: Heartbeat,
        reserve: DiskReserve,
        scratch: Path,
        report_base: Callable[[NeededBase], object],
    ) -> dict[str, Any]:
        """The job's result; `report_base` receives the base that it needs. Raises what `run_attempt` does."""
        started_at = time.monotonic()
        scratch.mkdir(parents=True, exist_ok=True)
        with self._database.read() as connection:
            job = get_job(connection, claim.job_id)
            history = measured_on(connection, job.base_weights_sha256)
            dataset = get_dataset(connection, job.dataset_id)
            validation_id = job.spec.validation.dataset_id
            validation = None if validation_id is None else get_dataset(connection, validation_id)
        with importing_torch():
            from workers.trainer.attempt import run_attempt
            from workers.trainer.context import AttemptContext, AttemptInputs
            from workers.trainer.process_reset import reset_process_state
            from workers.warm_base import BaseHolder

        # Only now: until here no work would be lost, and a library's import cannot be interrupted, so SIGTERM ends
        # the process.
        signal.signal(signal.SIGTERM, lambda *_: heartbeat.request_stop())
        inputs = AttemptInputs(
            job=job,
            token=claim.token,
            dataset=dataset,
            base=Catalog(self._settings.models_dir).get(job.spec.base_model),
            artifacts=ArtifactStore(self._settings.resolved_artifact_url),
            scratch=scratch,
            checkpoint_dir=self._settings.checkpoint_dir / claim.job_id,
            checkpoint_s=self._settings.checkpoint_s,
            needs_gpu=self._device == "cuda",
            validation=validation,
            cache=QuantizedCache(self._settings.cache_dir, self._settings.cache_bytes),
            plan_cache=self._settings.plan_cache_dir,
            history=history,
        )
        if inputs.base.weights_sha256 != job.base_weights_sha256:
            raise JobFailed(
                f"base model {inputs.base.name} has other weights than when the job was posted: post the job again",
                reason=FailureReason.INVALID_INPUT,
            )
        metrics_file = scratch / "metrics.jsonl"
        measurements = AttemptMeasurements(claim.token, job.forecast, job.measured, started_at)
        reporter = JobReporter(self._queue, claim, heartbeat, metrics_file, self._settings.lease_s, measurements)
        report_base(NeededBase.of(job.spec, job.base_weights_sha256))
        self._bases = self._bases or BaseHolder()
        with reset_process_state(), closing(reporter):
            return run_attempt(AttemptContext(inputs, reporter, heartbeat.check, reserve, metrics_file, self._bases))


def redirect_output(path: Path) -> None:
    """Redirects stdout and stderr to the file, for Python and C code.

    The file's name shows other processes which assignment this process works on (`/proc/PID/fd/1`).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    output = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)


def as_failure(error: Exception, log_name: str) -> JobFailed:
    """The job's failure for any exception. The text of an unexpected one stays in the log: it may quote paths."""
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
        f"the attempt failed with an unexpected {type(error).__name__}; the worker's {log_name} has the details",
        reason=FailureReason.INTERNAL,
    )


def _outcome(queue: Queue, claim: Claim, reserve: DiskReserve, attempt: Callable[[], dict[str, Any]]) -> _Outcome:
    """The outcome of the attempt, which this runs. Raises: ClaimLost."""
    try:
        result = attempt()
        return _Outcome(lambda: queue.succeed(claim, result), is_orderly=True)
    except JobCancelled:
        return _Outcome(lambda: queue.cancelled(claim), is_orderly=True)
    except Interrupted as interruption:
        holds: dict[Any, dict[str, Any]] = {
            HoldReason.USER: USER_HOLD,
            HoldReason.DISK_FULL: disk_full_hold(reserve.wanted_bytes),
        }
        reason, hold = interruption.message, holds.get(interruption.details.get("hold"))
        return _Outcome(
            lambda: queue.release(claim, reason) if hold is None else queue.pause(claim, hold),
            is_orderly=hold is None,  # a user who pauses a job wants its GPU memory back
        )
    except ClaimLost:
        raise
    except Exception as error:
        if is_disk_full(error):
            reserve.release()  # the database may be on the same disk
            log.error("disk_full", job=claim.job_id, token=claim.token, exc_info=error)
            hold = disk_full_hold(reserve.wanted_bytes)
            return _Outcome(lambda: queue.pause(claim, hold))
        failure = as_failure(error, f"logs/{claim.name}.log")
        log.error(
            "attempt_failed", job=claim.job_id, token=claim.token, reason=failure.details["reason"], exc_info=error
        )
        return _Outcome(lambda: queue.fail(claim, failure.as_dict()))
