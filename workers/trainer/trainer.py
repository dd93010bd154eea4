"""The trainer: a child process that runs attempts, and answers chats between them (`python -m workers.trainer DEVICE`).

It alone imports torch, and may die of anything; the supervisor sees that and says so. It ends itself when its claim
is lost, or when the supervisor is gone (its stdin, a socket, closes). The claim is kept from the first moment on:
importing torch alone may take longer than a lease.

After an attempt or chats that left the base as it was loaded, it waits with it for what comes next (`supervisor_line`).
In any doubt it ends: what a new process does is what is right.
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
from workers.inference.server import Desk, serve
from workers.supervisor_channel import ChatTurn, SupervisorLine
from workers.trainer.heartbeat import ClaimKeeper
from workers.trainer.measurements import Measuring
from workers.trainer.reporter import JobReporter

if TYPE_CHECKING:
    from workers.warm_base import BaseHolder

log = structlog.get_logger()

LINGER_S = 0.5
"""How long a process whose base cannot be loaded stays to say so to those at its door"""


@dataclass(frozen=True)
class _Outcome:
    """How an attempt ended."""

    write: Callable[[], object]
    """Writes it under the claim. Raises: ClaimLost"""
    is_orderly: bool = False
    """The job ended, or made room for another one, which may follow in this process"""


class Trainer:
    """Runs one attempt or chat after the other, on the base that the first one loaded."""

    def __init__(self, device: str, settings: Settings, line: SupervisorLine) -> None:
        """`device` is cuda or cpu: what to train on."""
        self._device, self._settings, self._line = device, settings, line
        self._database = Database(settings.resolved_database_url)
        self._queue = Queue(self._database, lease_s=settings.lease_s)
        self._bases: BaseHolder | None = None

    def serve(self) -> None:
        """Do what the supervisor has for us, until there is a reason to end."""
        while True:
            assignment = self._line.next_assignment()
            print_to(assignment.log_path)
            base = self.chat(assignment) if isinstance(assignment, ChatTurn) else self.run(assignment.claim)
            if base is None:
                return
            print_to(Path(os.devnull))
            self._line.wait_with(base)

    def run(self, claim: Claim) -> NeededBase | None:
        """Run the attempt and write its outcome; the base that is loaded for the next one, or None: it is time to end.

        Exits when the claim is lost.
        """
        reserve = DiskReserve(self._settings.checkpoint_dir / claim.job_id / RESERVE_FILE)
        keeper = ClaimKeeper(
            self._queue,
            claim,
            interval_s=self._settings.heartbeat_s,
            lease_s=self._settings.lease_s,
            hang_s=self._settings.hang_s,
            make_room=reserve.release,
        )
        keeper.start()
        scratch = self._settings.tmp_dir / claim.name
        needed: list[NeededBase] = []
        try:
            # A context of its own: what the job sets there is gone with it.
            attempt = partial(copy_context().run, self._attempt, claim, keeper, reserve, scratch, needed.append)
            outcome = _outcome(self._queue, claim, reserve, attempt)
            with self._line.finishing():
                keeper.end()
                shutil.rmtree(scratch, ignore_errors=True)
                # A database that is locked or away is waited for, as long as the claim may last.
                persist(outcome.write, self._settings.lease_s)
        except ClaimLost:
            log.error("claim_lost", job=claim.job_id, token=claim.token)
            sys.exit(exit_codes.CLAIM_LOST)
        finally:
            reserve.release()
            keeper.close()
        # From here on nothing would be lost again.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        stays = outcome.is_orderly and self._settings.warm_s > 0 and not keeper.is_stopping
        return needed[0] if stays and self._settled() else None

    def chat(self, turn: ChatTurn) -> NeededBase | None:
        """Answer chats until the supervisor wants the slot; the base that is loaded then, as `run` has it."""
        quantization = Quantization.model_validate_json(turn.base.quantization)
        desk = Desk(turn.listener)
        desk.open()
        with self._line.leaving_by(desk.make_room):
            try:
                base = Catalog(self._settings.models_dir).get(turn.base.base_model)
                self._answer_chats(desk, base, quantization)
            except QLoRAError as error:
                log.error("base_not_loaded", base_model=turn.base.base_model, exc_info=error)
                desk.leave(error)
                time.sleep(LINGER_S)
                return None
        desk.close()
        stays = self._settings.warm_s > 0 and self._settled()
        return NeededBase(base.weights_sha256, quantization) if stays else None

    def _answer_chats(self, desk: Desk, base: BaseModel, quantization: Quantization) -> None:
        """Returns when it is time to leave. Raises: QLoRAError, when the base cannot be loaded."""
        began = time.monotonic()
        with importing_torch():
            from workers.inference.engine import Engine
            from workers.trainer.process_reset import clean_slate
            from workers.warm_base import BaseHolder
        self._bases = self._bases or BaseHolder()
        reap_stale(self._settings.tmp_dir)  # what a process left that was killed
        with clean_slate(), staging_directory(self._settings.tmp_dir) as scratch:
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
                    seconds=round(time.monotonic() - began, 2),
                )
                desk.loaded()
                serve(desk, engine.generate)

    def _settled(self) -> bool:
        """Whether nothing of the last job is left, and the base is the one that was loaded."""
        from workers.trainer.process_reset import release_all

        is_clean = self._bases is not None and self._bases.settle()
        release_all()
        return is_clean

    def _attempt(
        self,
        claim: Claim,
        keeper: ClaimKeeper,
        reserve: DiskReserve,
        scratch: Path,
        tell_base: Callable[[NeededBase], object],
    ) -> dict[str, Any]:
        """The job's result. Raises what `run_attempt` does."""
        started_at = time.monotonic()
        scratch.mkdir(parents=True, exist_ok=True)
        with self._database.read() as connection:
            job = get_job(connection, claim.job_id)
            history = measured_on(connection, job.base_weights_sha256)
            dataset = get_dataset(connection, job.dataset_id)
            judged = job.spec.validation.dataset_id
            validation = None if judged is None else get_dataset(connection, judged)
        with importing_torch():
            from workers.trainer.attempt import run_attempt
            from workers.trainer.context import AttemptContext, AttemptInputs
            from workers.trainer.process_reset import clean_slate
            from workers.warm_base import BaseHolder

        # Until here nothing would be lost, and a library that is being imported does not listen: SIGTERM ends the
        # process.
        signal.signal(signal.SIGTERM, lambda *_: keeper.stop())
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
        measuring = Measuring(claim.token, job.forecast, job.measured, started_at)
        reporter = JobReporter(self._queue, claim, keeper, metrics_file, self._settings.lease_s, measuring)
        tell_base(NeededBase.of(job.spec, job.base_weights_sha256))
        self._bases = self._bases or BaseHolder()
        with clean_slate(), closing(reporter):
            return run_attempt(AttemptContext(inputs, reporter, keeper.check, reserve, metrics_file, self._bases))


def _outcome(queue: Queue, claim: Claim, reserve: DiskReserve, attempt: Callable[[], dict[str, Any]]) -> _Outcome:
    """Run the attempt. Raises: ClaimLost."""
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
        why, hold = interruption.message, holds.get(interruption.details.get("hold"))
        return _Outcome(
            lambda: queue.release(claim, why) if hold is None else queue.pause(claim, hold),
            is_orderly=hold is None,  # who pauses a job wants the card
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
        reason = failure.details["reason"]
        log.error("attempt_failed", job=claim.job_id, token=claim.token, reason=reason, exc_info=error)
        return _Outcome(lambda: queue.fail(claim, failure.as_dict()))


def print_to(path: Path) -> None:
    """Have everything that this process prints, also from C, in the file from now on.

    By this file's name it can be seen from outside what the process works on.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    output = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)


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
