"""Streamed answers of the SDK, from the inference server of `tests.chat_process`, which repeats each question."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from qlora_service.client import Client, ServiceError
from tests.chat_process import BROKEN_OFF, ENDLESS, EchoProcess
from tests.running_api import RunningApi


@pytest.fixture
def inference(api: RunningApi, tmp_path: Path) -> Iterator[EchoProcess]:
    with EchoProcess(f"sqlite:///{api.data_dir / 'state.db'}", tmp_path / "inference") as server:
        yield server


def user_message(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_answer_arrives_in_pieces(client: Client, inference: EchoProcess) -> None:
    assert list(client.chat("tiny", user_message("one two three"), temperature=0.0)) == ["one", " two", " three"]
    assert inference.received[-1].sampling.temperature == 0.0


def test_closing_the_iterator_stops_the_generation(client: Client, inference: EchoProcess) -> None:
    with closing(client.chat("tiny", user_message(ENDLESS))) as pieces:
        assert next(pieces) == "for"
    assert inference.client_gone.wait(10)


def test_refusal_has_code_and_location(client: Client) -> None:
    with pytest.raises(ServiceError) as refused:
        list(client.chat("unknown", user_message("hello")))
    assert (refused.value.status, refused.value.code, refused.value.location) == (404, "model_not_found", "model")


def test_interrupted_answer_is_an_error(client: Client, inference: EchoProcess) -> None:
    pieces = client.chat("tiny", user_message(BROKEN_OFF))
    assert next(pieces) == "and"
    with pytest.raises(ServiceError, match="has ended"):
        list(pieces)
