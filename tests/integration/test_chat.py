"""Chats end to end: OpenAI's client, a real API and worker, real models and jobs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from qlora_service.chat.wire import GenerationRequest, Sampling
from qlora_service.domain.jobs import JobStatus
from tests.chat_process import TINY
from tests.published import peft_answer
from tests.running_api import RunningApi
from tests.workspace import Workspace, chat, chatting_on, trainer_pids

QUESTION = [{"role": "user", "content": "Say 3"}]
TOKENS = 24


@pytest.fixture(scope="module")
def workspace(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("chat") / "data", tiny_model)


@pytest.fixture(scope="module")
def client(workspace: Workspace) -> Iterator[openai.OpenAI]:
    """OpenAI's client of a running API; a worker runs too."""
    with (
        RunningApi(workspace.settings.data_dir) as api,
        workspace.worker(),
        openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def tuned(workspace: Workspace, client: openai.OpenAI) -> str:
    """The id of a short job that has succeeded."""
    job_id = workspace.submit(max_steps=8, learning_rate=0.05)
    assert workspace.wait_for_end(job_id).status is JobStatus.SUCCEEDED
    return job_id


def answer(client: openai.OpenAI, model: str, max_tokens: int = TOKENS) -> str:
    """The greedy answer, not streamed."""
    completion = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=max_tokens, temperature=0)
    return completion.choices[0].message.content or ""


def inference_processes(workspace: Workspace) -> list[int]:
    return chatting_on(workspace.settings.data_dir)


def test_base_and_tuned_model_answer_as_in_peft(
    workspace: Workspace, client: openai.OpenAI, tuned: str, tmp_path: Path
) -> None:
    for artifact in workspace.service.artifacts.list_files(tuned):
        (tmp_path / artifact.file.name).write_bytes(workspace.artifact(tuned, artifact.file.name))
    base_path = workspace.catalog.get("tiny").path
    name = client.fine_tuning.jobs.retrieve(tuned).fine_tuned_model
    assert name is not None
    base, adapted = answer(client, "tiny"), answer(client, name)
    assert base == peft_answer(base_path, None, QUESTION, TOKENS)
    assert adapted == peft_answer(base_path, tmp_path, QUESTION, TOKENS)
    assert base != adapted
    assert answer(client, tuned) == adapted
    # All answers come from one process with one loaded base.
    assert len(inference_processes(workspace)) == 1


def test_pieces_of_a_stream_are_the_whole_answer(client: openai.OpenAI, tuned: str) -> None:
    chunks = list(
        client.chat.completions.create(
            model=tuned,
            messages=QUESTION,
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer(client, tuned)
    assert chunks[-2].choices[0].finish_reason in {"stop", "length"}
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens <= TOKENS


def test_refusals_are_errors_of_the_openai_client(client: openai.OpenAI, tuned: str) -> None:
    with pytest.raises(openai.NotFoundError) as not_found:
        answer(client, "unknown")
    assert not_found.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        answer(client, tuned, max_tokens=10_000)
    assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "messages")


def test_job_takes_the_slot_from_an_idle_chat_and_chats_are_refused_meanwhile(
    workspace: Workspace, client: openai.OpenAI, tuned: str
) -> None:
    answer(client, tuned)
    assert inference_processes(workspace)
    job_id = workspace.submit(max_steps=100_000)
    submitted_at = time.monotonic()
    workspace.wait(job_id, lambda job: job.status is JobStatus.RUNNING, limit_s=10)
    assert time.monotonic() - submitted_at < 8
    workspace.wait(job_id, lambda job: job.phase != "starting")
    assert inference_processes(workspace) == []
    with pytest.raises(openai.InternalServerError) as refused:
        answer(client, tuned)
    assert refused.value.status_code == 503
    assert int(refused.value.response.headers["Retry-After"]) >= 1
    assert job_id in refused.value.message
    workspace.service.jobs.cancel(job_id)
    workspace.wait_for_end(job_id)


def test_chat_preempts_a_job_if_configured_and_the_job_resumes(tiny_model: Path, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "data", tiny_model)
    job_id = workspace.submit(max_steps=100_000)
    with workspace.worker(QLORA_CHAT_PREEMPTS="true", QLORA_CHECKPOINT_S="0"):
        workspace.wait(job_id, lambda job: job.step >= 2)
        (trainer,) = trainer_pids(job_id)
        request = GenerationRequest(messages=QUESTION, sampling=Sampling(max_tokens=5, temperature=0.0))
        _, finished = chat(workspace, TINY, request)
        assert finished.completion_tokens == 5
        before = workspace.service.jobs.get(job_id)
        assert before.checkpoint_step >= 2
        job = workspace.wait(job_id, lambda job: job.status is JobStatus.RUNNING and job.step > before.checkpoint_step)
        assert (job.attempt, job.deaths) == (2, [])
        assert trainer_pids(job_id) == [trainer]  # the same process, with the base still loaded
        workspace.service.jobs.cancel(job_id)
        workspace.wait_for_end(job_id)


def test_killed_inference_process_is_reported_and_replaced(
    workspace: Workspace, client: openai.OpenAI, tuned: str
) -> None:
    for _ in range(10):  # an answer may be complete before the signal arrives
        chunks = client.chat.completions.create(
            model="tiny", messages=QUESTION, max_tokens=450, temperature=0, stream=True
        )
        assert next(chunk for chunk in chunks if chunk.choices[0].delta.content)
        (pid,) = inference_processes(workspace)
        os.kill(pid, signal.SIGKILL)
        try:
            list(chunks)
        except openai.APIError as error:
            assert "has ended" in str(error)  # noqa: PT017 - a complete answer is no failure
            break
    else:
        pytest.fail("no answer was interrupted")
    assert answer(client, "tiny")
    assert inference_processes(workspace) != [pid]
