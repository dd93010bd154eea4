"""Answers as the SDK streams them; the desk of `tests.speaking_desk` says what it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from qlora_service.client import Client, ServiceError
from tests.running_api import RunningApi
from tests.speaking_desk import BROKEN_OFF, ENDLESS, SpeakingDesk


@pytest.fixture
def desk(api: RunningApi, tmp_path: Path) -> Iterator[SpeakingDesk]:
    with SpeakingDesk(f"sqlite:///{api.data_dir / 'state.db'}", tmp_path / "inference") as desk:
        yield desk


def said(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def test_an_answer_comes_in_pieces(client: Client, desk: SpeakingDesk) -> None:
    assert list(client.chat("tiny", said("one two three"), temperature=0.0)) == ["one", " two", " three"]
    assert desk.asked[-1].sampling.temperature == 0.0


def test_closing_the_iterator_ends_the_answer(client: Client, desk: SpeakingDesk) -> None:
    with closing(client.chat("tiny", said(ENDLESS))) as pieces:
        assert next(pieces) == "for"
    assert desk.broken_off.wait(10)


def test_a_refusal_has_its_code_and_place(client: Client) -> None:
    with pytest.raises(ServiceError) as refused:
        list(client.chat("nobody", said("hello")))
    assert (refused.value.status, refused.value.code, refused.value.location) == (404, "model_not_found", "model")


def test_an_answer_that_is_broken_off_is_no_answer(client: Client, desk: SpeakingDesk) -> None:
    pieces = client.chat("tiny", said(BROKEN_OFF))
    assert next(pieces) == "and"
    with pytest.raises(ServiceError, match="has ended"):
        list(pieces)
