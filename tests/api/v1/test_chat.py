"""Chat on OpenAI's wire, answered by the echo of `tests.chat_process`; real models are in `tests/integration`."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.main import create_app
from qlora_service.chat import reception
from qlora_service.chat.wire import AdapterRef, Sampling
from qlora_service.queue.claim import Progress
from qlora_service.queue.queue import Queue
from qlora_service.settings import Settings
from tests.api.conftest import URL, Server, spec_of
from tests.chat_process import BROKEN_OFF, ENDLESS, TOO_LONG, EchoProcess

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def echo(client: TestClient, settings: Settings, tmp_path: Path) -> Iterator[EchoProcess]:
    with EchoProcess(settings.resolved_database_url, tmp_path / "inference") as echo:
        yield echo


def asked(content: str = "Say it again.", **changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}]} | changes


def events(body: str) -> list[Any]:
    """The data of a stream's events."""
    assert body.endswith("\n\n")
    return [
        line if line == "[DONE]" else json.loads(line)
        for line in (event.removeprefix("data: ") for event in body[:-2].split("\n\n"))
    ]


def test_an_answer_is_a_chat_completion(client: TestClient, echo: EchoProcess) -> None:
    response = client.post(CHAT, json=asked())
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Say it again.", "refusal": None}
    assert (choice["index"], choice["finish_reason"]) == (0, "stop")
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_is_the_same_answer_in_chunks(client: TestClient, echo: EchoProcess, usage: bool) -> None:
    response = client.post(CHAT, json=asked(stream=True, stream_options={"include_usage": usage}))
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response.text)
    assert last == "[DONE]"
    if usage:
        counted = chunks.pop()
        assert (counted["choices"], counted["usage"]["total_tokens"]) == ([], 10)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert [choice["delta"] for choice in choices[1:-1]] == [
        {"content": "Say"},
        {"content": " it"},
        {"content": " again."},
    ]
    assert choices[-1]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]


def test_a_text_is_continued(client: TestClient, echo: EchoProcess) -> None:
    answer = client.post(TEXT, json={"model": "tiny", "prompt": ["once more"]}).json()
    assert (answer["object"], answer["choices"][0]["text"]) == ("text_completion", "once more")
    assert echo.received[-1].messages is None
    assert echo.received[-1].sampling.max_tokens == 16
    body = client.post(TEXT, json={"model": "tiny", "prompt": "once more", "stream": True}).text
    *chunks, last = events(body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "once more"
    assert last == "[DONE]"


def test_what_is_asked_reaches_the_model(client: TestClient, echo: EchoProcess) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "it."}]},
    ]
    tool = {"type": "function", "function": {"name": "now", "parameters": {}}}
    settings = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": "x", "max_completion_tokens": 9}
    client.post(CHAT, json={"model": "tiny", "messages": messages, "tools": [tool], **settings})
    request = echo.received[-1]
    assert request.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Say it."},
    ]
    assert request.tools == [tool]
    assert request.sampling == Sampling(max_tokens=9, temperature=0.5, top_p=0.9, seed=3, stop=("x",))
    client.post(CHAT, json=asked(tools=[tool], tool_choice="none", max_tokens=4, stop=["a", "b"]))
    assert echo.received[-1].tools is None
    assert echo.received[-1].sampling == Sampling(max_tokens=4, stop=("a", "b"))


def test_what_changes_nothing_is_accepted(client: TestClient, echo: EchoProcess) -> None:
    neutral = {
        "n": 1, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me",
        "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "response_format": {"type": "text"},
        "modalities": ["text"], "parallel_tool_calls": True, "tool_choice": "auto", "stream": False,
    }  # fmt: skip
    response = client.post(CHAT, json=asked(**neutral))
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"50256": -100}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, "tool_choice"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"top_k": 40}, "top_k"),
        ({"temperature": 2.5}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ],
)
def test_what_would_change_the_answer_and_is_not_supported_is_refused(
    bare_client: TestClient, changes: dict[str, Any], param: str
) -> None:
    response = bare_client.post(CHAT, json=asked(**changes))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("prompt", [[], ["one", "two"], [1, 2], 3])
def test_what_is_not_one_text_to_continue_is_refused(bare_client: TestClient, prompt: object) -> None:
    response = bare_client.post(TEXT, json={"model": "tiny", "prompt": prompt})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "prompt")
    assert "one text, or a list of one" in error["message"]


def test_a_model_that_is_not_there_is_not_found(
    bare_client: TestClient, client: TestClient, submit: Callable[..., str]
) -> None:
    for name in ("nobody", "ft:tiny:local::0123456789abcdef012345", "job_0123456789abcdef012345", "../tiny", "-"):
        error = bare_client.post(CHAT, json=asked(model=name)).json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
    unfinished = client.post(CHAT, json=asked(model=submit()))
    assert unfinished.status_code == 404
    assert "is queued" in unfinished.json()["error"]["message"]


def test_an_adapter_is_asked_for_by_the_models_name_or_the_jobs_id(
    client: TestClient, echo: EchoProcess, finished_job: str
) -> None:
    job = client.get(f"/v1/fine_tuning/jobs/{finished_job}").json()
    for name in (finished_job, job["fine_tuned_model"]):
        answer = client.post(CHAT, json=asked(model=name))
        assert answer.json()["model"] == name
        assert echo.received[-1].adapter == AdapterRef(job_id=finished_job, attempt=1)
    client.post(CHAT, json=asked())
    assert echo.received[-1].adapter is None


def test_a_deleted_adapter_is_not_found(client: TestClient, echo: EchoProcess, finished_job: str) -> None:
    name = client.get(f"/v1/fine_tuning/jobs/{finished_job}").json()["fine_tuned_model"]
    assert client.delete(f"/v1/models/{name}").status_code == 200
    for model in (name, finished_job):
        response = client.post(CHAT, json=asked(model=model))
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("stream", [True, False])
def test_a_prompt_that_is_too_long_is_refused_by_the_status(
    client: TestClient, echo: EchoProcess, stream: bool
) -> None:
    response = client.post(CHAT, json=asked(TOO_LONG, stream=stream))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_while_a_job_has_the_slot_chats_are_refused_with_its_eta(
    client: TestClient, submit: Callable[..., str], queue: Queue
) -> None:
    job_id = submit()
    claimed = queue.claim("worker")
    assert claimed is not None
    queue.report(claimed[0], Progress(step=3, eta_s=42.4))
    response = client.post(CHAT, json=asked())
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "42"
    error = response.json()["error"]
    assert job_id in error["message"]
    assert (error["details"]["job_id"], error["details"]["eta_s"]) == (job_id, 42.4)


def test_where_jobs_make_way_a_chat_waits_for_that(
    settings: Settings, dataset_id: str, queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "BEHIND_JOB_S", 0.0)
    preempting = settings.model_copy(update={"chat_preempts": True})
    with TestClient(create_app(preempting), URL) as client, ThreadPoolExecutor(1) as pool:
        assert client.post("/jobs", json=spec_of(dataset_id)).status_code == 201
        assert queue.claim("worker") is not None
        asking = pool.submit(client.post, CHAT, json=asked())
        time.sleep(1)
        with EchoProcess(settings.resolved_database_url, tmp_path / "inference"):
            assert asking.result(30).status_code == 200


def test_an_answer_that_is_broken_off_ends_with_an_error(client: TestClient, echo: EchoProcess) -> None:
    response = client.post(CHAT, json=asked(BROKEN_OFF))
    assert response.status_code == 503
    assert "has ended" in response.json()["error"]["message"]
    *chunks, last = events(client.post(CHAT, json=asked(BROKEN_OFF, stream=True)).text)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == BROKEN_OFF
    assert last["error"]["code"] == "unavailable"


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_ends_the_generation(
    settings: Settings, tmp_path: Path, start_server: Callable[..., Server], stream: bool
) -> None:
    server = start_server()
    with EchoProcess(settings.resolved_database_url, tmp_path / "inference") as echo:
        body = json.dumps(asked(ENDLESS, stream=stream)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            received, deadline = b"", time.monotonic() + 60
            while not echo.received or (stream and b"data:" not in received):
                assert time.monotonic() < deadline
                received += connection.recv(65536) if stream else b""
                time.sleep(0.02)
        assert echo.client_gone.wait(60)
