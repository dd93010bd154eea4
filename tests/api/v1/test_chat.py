"""Completion endpoints, with an echo server in place of a model. Real models are in `tests/integration`."""

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
from qlora_service.chat import dispatch
from qlora_service.chat.wire import AdapterRef, Sampling
from qlora_service.queue.claim import Progress
from qlora_service.queue.queue import Queue
from qlora_service.settings import Settings
from tests.api.conftest import URL, Server, spec_of
from tests.chat_process import BROKEN_OFF, ENDLESS, TOO_LONG, EchoProcess

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def echo_server(client: TestClient, settings: Settings, tmp_path: Path) -> Iterator[EchoProcess]:
    """An inference process that answers with the text of the request."""
    with EchoProcess(settings.resolved_database_url, tmp_path / "inference") as echo_server:
        yield echo_server


def chat_body(content: str = "Say it again.", **changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}]} | changes


def events(body: str) -> list[Any]:
    """The data of the events of a stream."""
    assert body.endswith("\n\n")
    return [
        line if line == "[DONE]" else json.loads(line)
        for line in (event.removeprefix("data: ") for event in body[:-2].split("\n\n"))
    ]


def test_response_is_a_chat_completion(client: TestClient, echo_server: EchoProcess) -> None:
    response = client.post(CHAT, json=chat_body())
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
def test_stream_contains_the_same_completion_in_chunks(
    client: TestClient, echo_server: EchoProcess, usage: bool
) -> None:
    response = client.post(CHAT, json=chat_body(stream=True, stream_options={"include_usage": usage}))
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response.text)
    assert last == "[DONE]"
    if usage:
        usage_chunk = chunks.pop()
        assert (usage_chunk["choices"], usage_chunk["usage"]["total_tokens"]) == ([], 10)
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


def test_completion_continues_plain_text(client: TestClient, echo_server: EchoProcess) -> None:
    answer = client.post(TEXT, json={"model": "tiny", "prompt": ["once more"]}).json()
    assert (answer["object"], answer["choices"][0]["text"]) == ("text_completion", "once more")
    assert echo_server.received[-1].messages is None
    assert echo_server.received[-1].sampling.max_tokens == 16
    body = client.post(TEXT, json={"model": "tiny", "prompt": "once more", "stream": True}).text
    *chunks, last = events(body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "once more"
    assert last == "[DONE]"


def test_request_parameters_reach_the_model(client: TestClient, echo_server: EchoProcess) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "it."}]},
    ]
    tool = {"type": "function", "function": {"name": "now", "parameters": {}}}
    settings = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": "x", "max_completion_tokens": 9}
    client.post(CHAT, json={"model": "tiny", "messages": messages, "tools": [tool], **settings})
    request = echo_server.received[-1]
    assert request.messages == [
        {"role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "Say it."},
    ]
    assert request.tools == [tool]
    assert request.sampling == Sampling(max_tokens=9, temperature=0.5, top_p=0.9, seed=3, stop=("x",))
    client.post(CHAT, json=chat_body(tools=[tool], tool_choice="none", max_tokens=4, stop=["a", "b"]))
    assert echo_server.received[-1].tools is None
    assert echo_server.received[-1].sampling == Sampling(max_tokens=4, stop=("a", "b"))


def test_neutral_parameters_are_accepted(client: TestClient, echo_server: EchoProcess) -> None:
    neutral = {
        "n": 1, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "user": "me",
        "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "response_format": {"type": "text"},
        "modalities": ["text"], "parallel_tool_calls": True, "tool_choice": "auto", "stream": False,
    }  # fmt: skip
    response = client.post(CHAT, json=chat_body(**neutral))
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
        ({"messages": [{"role": "unknown", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ],
)
def test_unsupported_parameters_are_refused(bare_client: TestClient, changes: dict[str, Any], param: str) -> None:
    response = bare_client.post(CHAT, json=chat_body(**changes))
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("prompt", [[], ["one", "two"], [1, 2], 3])
def test_prompt_other_than_one_text_is_refused(bare_client: TestClient, prompt: object) -> None:
    response = bare_client.post(TEXT, json={"model": "tiny", "prompt": prompt})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "prompt")
    assert "one text, or a list of one" in error["message"]


def test_unknown_model_is_not_found(bare_client: TestClient, client: TestClient, submit: Callable[..., str]) -> None:
    for name in ("unknown", "ft:tiny:local::0123456789abcdef012345", "job_0123456789abcdef012345", "../tiny", "-"):
        error = bare_client.post(CHAT, json=chat_body(model=name)).json()["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "model")
    queued = client.post(CHAT, json=chat_body(model=submit()))
    assert queued.status_code == 404
    assert "is queued" in queued.json()["error"]["message"]


def test_adapter_is_selected_by_model_name_or_job_id(
    client: TestClient, echo_server: EchoProcess, finished_job: str
) -> None:
    job = client.get(f"/v1/fine_tuning/jobs/{finished_job}").json()
    for name in (finished_job, job["fine_tuned_model"]):
        answer = client.post(CHAT, json=chat_body(model=name))
        assert answer.json()["model"] == name
        assert echo_server.received[-1].adapter == AdapterRef(job_id=finished_job, attempt=1)
    client.post(CHAT, json=chat_body())
    assert echo_server.received[-1].adapter is None


def test_deleted_adapter_is_not_found(client: TestClient, echo_server: EchoProcess, finished_job: str) -> None:
    name = client.get(f"/v1/fine_tuning/jobs/{finished_job}").json()["fine_tuned_model"]
    assert client.delete(f"/v1/models/{name}").status_code == 200
    for model in (name, finished_job):
        response = client.post(CHAT, json=chat_body(model=model))
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("stream", [True, False])
def test_too_long_prompt_is_refused_with_an_error_status(
    client: TestClient, echo_server: EchoProcess, stream: bool
) -> None:
    response = client.post(CHAT, json=chat_body(TOO_LONG, stream=stream))
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_chat_is_refused_with_the_eta_of_the_job_in_the_slot(
    client: TestClient, submit: Callable[..., str], queue: Queue
) -> None:
    job_id = submit()
    claimed = queue.claim("worker")
    assert claimed is not None
    queue.report(claimed[0], Progress(step=3, eta_s=42.4))
    response = client.post(CHAT, json=chat_body())
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "42"
    error = response.json()["error"]
    assert job_id in error["message"]
    assert (error["details"]["job_id"], error["details"]["eta_s"]) == (job_id, 42.4)


def test_chat_waits_for_the_preemption_of_a_job(
    settings: Settings, dataset_id: str, queue: Queue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "JOB_WAIT_S", 0.0)
    preempting = settings.model_copy(update={"chat_preempts": True})
    with TestClient(create_app(preempting), URL) as client, ThreadPoolExecutor(1) as pool:
        assert client.post("/jobs", json=spec_of(dataset_id)).status_code == 201
        assert queue.claim("worker") is not None
        response = pool.submit(client.post, CHAT, json=chat_body())
        time.sleep(1)
        with EchoProcess(settings.resolved_database_url, tmp_path / "inference"):
            assert response.result(30).status_code == 200


def test_interrupted_completion_ends_with_an_error(client: TestClient, echo_server: EchoProcess) -> None:
    response = client.post(CHAT, json=chat_body(BROKEN_OFF))
    assert response.status_code == 503
    assert "has ended" in response.json()["error"]["message"]
    *chunks, last = events(client.post(CHAT, json=chat_body(BROKEN_OFF, stream=True)).text)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == BROKEN_OFF
    assert last["error"]["code"] == "unavailable"


@pytest.mark.parametrize("stream", [True, False])
def test_client_disconnect_cancels_the_generation(
    settings: Settings, tmp_path: Path, start_server: Callable[..., Server], stream: bool
) -> None:
    server = start_server()
    with EchoProcess(settings.resolved_database_url, tmp_path / "inference") as echo_server:
        body = json.dumps(chat_body(ENDLESS, stream=stream)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            received, deadline = b"", time.monotonic() + 60
            while not echo_server.received or (stream and b"data:" not in received):
                assert time.monotonic() < deadline
                received += connection.recv(65536) if stream else b""
                time.sleep(0.02)
        assert echo_server.client_gone.wait(60)
