"""Streamed answers in the SDK, from the echo of `tests.chat_process`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from qlora_service.client import Client, ServiceError
from tests.chat_process import BROKEN_OFF, ENDLESS, EchoProcess
from tests.running_api import RunningApi


@pytest.fixture
def echo(api: RunningApi, tmp_path: Path) -> Iterator[EchoProcess]:
    with EchoProcess(f"sqlite:///{api.data_dir / 'state.db'}", tmp_path / "inference") as echo:
        yield echo


def said(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_an_answer_comes_in_pieces(client: Client, echo: EchoProcess) -> None:
    assert list(client.chat("tiny", said("one two three"), temperature=0.0)) == ["one", " two", " three"]
    assert echo.received[-1].sampling.temperature == 0.0


def test_closing_the_iterator_ends_the_answer(client: Client, echo: EchoProcess) -> None:
    with closing(client.chat("tiny", said(ENDLESS))) as pieces:
        assert next(pieces) == "for"
    assert echo.client_gone.wait(10)


def test_a_refusal_has_its_code_and_place(client: Client) -> None:
    with pytest.raises(ServiceError) as refused:
        list(client.chat("nobody", said("hello")))
    assert (refused.value.status, refused.value.code, refused.value.location) == (404, "model_not_found", "model")


def test_an_answer_that_is_broken_off_is_no_answer(client: Client, echo: EchoProcess) -> None:
    pieces = client.chat("tiny", said(BROKEN_OFF))
    assert next(pieces) == "and"
    with pytest.raises(ServiceError, match="has ended"):
        list(pieces)
