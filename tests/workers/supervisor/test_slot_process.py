"""Trainers that keep their base loaded, for jobs and chats, under a real worker."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable

from qlora_service.chat.wire import AdapterRef, GenerationRequest, Sampling
from qlora_service.domain.jobs import JobStatus
from qlora_service.specs import Quantization
from qlora_service.store.inference import LoadedBase
from tests.chat_process import TINY
from tests.workspace import (
    Workspace,
    all_trainers_of,
    chat,
    chatting_on,
    job_spec,
    trainers,
    waiting_trainers_of,
)


def idle_trainer(worker: subprocess.Popen[bytes]) -> int:
    """The pid of the worker's idle trainer, once there is one."""
    assert becomes_true(lambda: bool(waiting_trainers_of(worker.pid)))
    (pid,) = waiting_trainers_of(worker.pid)
    return pid


def becomes_true(condition: Callable[[], bool], limit_s: float = 15.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def base_source(workspace: Workspace, job_id: str) -> str:
    """The source of the job's base, once the job has succeeded in its first attempt."""
    job = workspace.wait_for_end(job_id)
    assert (job.status, job.attempt, job.deaths) == (JobStatus.SUCCEEDED, 1, [])
    assert job.result is not None
    return str(job.result["base"])


def test_next_job_on_the_base_runs_in_the_same_process_and_one_on_another_base_does_not(workspace: Workspace) -> None:
    spec = job_spec(micro_batch_tokens=256, gradient_checkpointing=False)
    with workspace.worker() as worker:
        cold = workspace.submit_spec(spec)
        assert base_source(workspace, cold) == "quantized"
        pid = idle_trainer(worker)
        warm = workspace.submit_spec(spec)
        assert base_source(workspace, warm) == "warm"
        assert idle_trainer(worker) == pid
        assert workspace.adapter_sha256(warm) == workspace.adapter_sha256(cold)
        assert workspace.service.artifacts.manifest(warm).plan == workspace.service.artifacts.manifest(cold).plan
        other = workspace.submit_spec(spec | {"quantization": {"type": "none"}})
        assert base_source(workspace, other) == "unquantized"
        assert idle_trainer(worker) != pid
        assert pid not in trainers()


def test_jobs_and_chats_share_the_loaded_base(workspace: Workspace) -> None:
    spec, data_dir = job_spec(), workspace.settings.data_dir
    question = [{"role": "user", "content": "Say 3"}]
    greedy = Sampling(max_tokens=16, temperature=0.0)
    with workspace.worker(QLORA_CHAT_IDLE_S="6") as worker:
        cold = workspace.submit_spec(spec)
        assert base_source(workspace, cold) == "quantized"
        pid = idle_trainer(worker)
        tuned = GenerationRequest(adapter=AdapterRef(job_id=cold, attempt=1), messages=question, sampling=greedy)
        plain = tuned.model_copy(update={"adapter": None})
        answers = [chat(workspace, TINY, request)[0] for request in (tuned, plain, tuned)]
        assert answers[0] == answers[2] != answers[1]
        assert chatting_on(data_dir) == [pid]
        warm = workspace.submit_spec(spec)
        assert base_source(workspace, warm) == "warm"
        assert idle_trainer(worker) == pid
        assert workspace.adapter_sha256(warm) == workspace.adapter_sha256(cold)
        # A chat with another base starts a new process, in which the next job finds that base.
        other = LoadedBase("tiny", Quantization(type="none").model_dump_json())
        short = GenerationRequest(text="once", sampling=Sampling(max_tokens=1))
        chat(workspace, other, short)
        (second,) = chatting_on(data_dir)
        assert second != pid
        assert pid not in trainers()
        assert base_source(workspace, workspace.submit_spec(spec | {"quantization": {"type": "none"}})) == "warm"
        assert idle_trainer(worker) == second
        # Without further chats the GPU is released.
        chat(workspace, other, short)
        assert chatting_on(data_dir) == [second]
        assert becomes_true(lambda: not all_trainers_of(worker.pid))


def test_idle_trainer_may_die_and_ends_after_the_warm_time(workspace: Workspace) -> None:
    with workspace.worker(QLORA_WARM_S="6") as worker:
        base_source(workspace, workspace.submit())
        pid = idle_trainer(worker)
        os.kill(pid, signal.SIGKILL)
        assert becomes_true(lambda: pid not in trainers())
        assert base_source(workspace, workspace.submit()) == "cached"
        idle_trainer(worker)
        assert becomes_true(lambda: not all_trainers_of(worker.pid))
        assert worker.poll() is None


def test_trainer_of_a_paused_job_ends_and_that_of_a_cancelled_job_stays(workspace: Workspace) -> None:
    job_id = workspace.submit(max_steps=10_000)
    with workspace.worker() as worker:
        workspace.wait(job_id, lambda job: job.step >= 1)
        workspace.service.jobs.pause(job_id)
        assert becomes_true(lambda: not all_trainers_of(worker.pid))
        workspace.service.jobs.resume(job_id)
        workspace.wait(job_id, lambda job: job.attempt == 2 and job.phase == "training")
        workspace.service.jobs.cancel(job_id)
        pid = idle_trainer(worker)
        worker.kill()
        assert becomes_true(lambda: pid not in trainers())


def test_no_trainer_stays_with_a_warm_time_of_zero(workspace: Workspace) -> None:
    with workspace.worker(QLORA_WARM_S="0") as worker:
        base_source(workspace, workspace.submit())
        assert becomes_true(lambda: not all_trainers_of(worker.pid))
        assert base_source(workspace, workspace.submit()) == "cached"
