"""Trainers that stay with their base, for jobs and for chats, under a real worker."""

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


def waiting(worker: subprocess.Popen[bytes]) -> int:
    """The trainer that waits, waited for."""
    assert until(lambda: bool(waiting_trainers_of(worker.pid)))
    (pid,) = waiting_trainers_of(worker.pid)
    return pid


def until(reached: Callable[[], bool], limit_s: float = 15.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not reached():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def base_of(workspace: Workspace, job_id: str) -> str:
    """Where the job's base came from."""
    job = workspace.wait_for_end(job_id)
    assert (job.status, job.attempt, job.deaths) == (JobStatus.SUCCEEDED, 1, [])
    assert job.result is not None
    return str(job.result["base"])


def test_next_job_on_the_base_has_the_same_process_and_one_on_another_does_not(workspace: Workspace) -> None:
    spec = job_spec(micro_batch_tokens=256, gradient_checkpointing=False)
    with workspace.worker() as worker:
        cold = workspace.submit_spec(spec)
        assert base_of(workspace, cold) == "quantized"
        pid = waiting(worker)
        warm = workspace.submit_spec(spec)
        assert base_of(workspace, warm) == "warm"
        assert waiting(worker) == pid
        assert workspace.adapter_sha256(warm) == workspace.adapter_sha256(cold)
        assert workspace.service.artifacts.manifest(warm).plan == workspace.service.artifacts.manifest(cold).plan
        other = workspace.submit_spec(spec | {"quantization": {"type": "none"}})
        assert base_of(workspace, other) == "unquantized"
        assert waiting(worker) != pid
        assert pid not in trainers()


def test_jobs_and_chats_share_the_base_that_is_loaded(workspace: Workspace) -> None:
    spec, data_dir = job_spec(), workspace.settings.data_dir
    question = [{"role": "user", "content": "Say 3"}]
    greedy = Sampling(max_tokens=16, temperature=0.0)
    with workspace.worker(QLORA_CHAT_IDLE_S="6") as worker:
        cold = workspace.submit_spec(spec)
        assert base_of(workspace, cold) == "quantized"
        pid = waiting(worker)
        tuned = GenerationRequest(adapter=AdapterRef(job_id=cold, attempt=1), messages=question, sampling=greedy)
        said = [chat(workspace, TINY, asked)[0] for asked in (tuned, tuned.model_copy(update={"adapter": None}), tuned)]
        assert said[0] == said[2] != said[1]
        assert chatting_on(data_dir) == [pid]
        warm = workspace.submit_spec(spec)
        assert base_of(workspace, warm) == "warm"
        assert waiting(worker) == pid
        assert workspace.adapter_sha256(warm) == workspace.adapter_sha256(cold)
        # A chat with another base has a process of its own, where the next job finds that base.
        other = LoadedBase("tiny", Quantization(type="none").model_dump_json())
        plain = GenerationRequest(text="once", sampling=Sampling(max_tokens=1))
        chat(workspace, other, plain)
        (second,) = chatting_on(data_dir)
        assert second != pid
        assert pid not in trainers()
        assert base_of(workspace, workspace.submit_spec(spec | {"quantization": {"type": "none"}})) == "warm"
        assert waiting(worker) == second
        # When nobody chats any more the card is given back.
        chat(workspace, other, plain)
        assert chatting_on(data_dir) == [second]
        assert until(lambda: not all_trainers_of(worker.pid))


def test_trainer_that_waits_may_die_and_goes_when_nobody_needs_it(workspace: Workspace) -> None:
    with workspace.worker(QLORA_WARM_S="6") as worker:
        base_of(workspace, workspace.submit())
        pid = waiting(worker)
        os.kill(pid, signal.SIGKILL)
        assert until(lambda: pid not in trainers())
        assert base_of(workspace, workspace.submit()) == "cached"
        waiting(worker)
        assert until(lambda: not all_trainers_of(worker.pid))
        assert worker.poll() is None


def test_a_paused_jobs_trainer_gives_the_card_back_and_a_cancelled_ones_stays(workspace: Workspace) -> None:
    job_id = workspace.submit(max_steps=10_000)
    with workspace.worker() as worker:
        workspace.wait(job_id, lambda job: job.step >= 1)
        workspace.service.jobs.pause(job_id)
        assert until(lambda: not all_trainers_of(worker.pid))
        workspace.service.jobs.resume(job_id)
        workspace.wait(job_id, lambda job: job.attempt == 2 and job.phase == "training")
        workspace.service.jobs.cancel(job_id)
        pid = waiting(worker)
        worker.kill()
        assert until(lambda: pid not in trainers())


def test_no_trainer_waits_where_that_is_switched_off(workspace: Workspace) -> None:
    with workspace.worker(QLORA_WARM_S="0") as worker:
        base_of(workspace, workspace.submit())
        assert until(lambda: not all_trainers_of(worker.pid))
        assert base_of(workspace, workspace.submit()) == "cached"
