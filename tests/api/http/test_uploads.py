from __future__ import annotations

from collections.abc import Callable, Iterator

import anyio
import pytest
from fastapi.testclient import TestClient
from starlette.requests import Request
from starlette.types import Message

from api.http.uploads import MAX_FILENAME_CHARS, display_name, receive_bytes
from qlora_service.errors import TooLarge
from qlora_service.settings import Settings
from tests.api.conftest import MAX_UPLOAD_BYTES, chat_rows, scratch_files

TOO_MUCH = b"x" * (MAX_UPLOAD_BYTES + 1)


def test_body_over_the_limit_is_refused(bare_client: TestClient, nothing_stored: Callable[[], None]) -> None:
    response = bare_client.post("/datasets", content=TOO_MUCH)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "too_large"
    assert response.json()["error"]["details"] == {"max_bytes": MAX_UPLOAD_BYTES}
    nothing_stored()


def test_body_with_a_content_length_over_the_limit_is_not_read() -> None:
    async def receive() -> Message:
        raise AssertionError("the body was read")

    request = Request({"type": "http", "headers": [(b"content-length", b"11")]}, receive)
    with pytest.raises(TooLarge):
        anyio.run(receive_bytes, request, 10)


def test_body_of_unknown_length_is_refused_at_the_limit(
    bare_client: TestClient, nothing_stored: Callable[[], None]
) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(1 + MAX_UPLOAD_BYTES // 2**16):
            yield b"x" * 2**16

    assert bare_client.post("/datasets", content=pieces()).status_code == 413
    nothing_stored()


def test_form_over_the_limit_is_refused(bare_client: TestClient, nothing_stored: Callable[[], None]) -> None:
    assert bare_client.post("/datasets", files={"file": ("a.jsonl", TOO_MUCH)}).status_code == 413
    nothing_stored()


def test_json_body_over_its_own_limit_is_refused(bare_client: TestClient, nothing_stored: Callable[[], None]) -> None:
    body = b'{"name": "' + b"x" * 32 * 2**20 + b'"}'
    response = bare_client.post("/jobs", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    nothing_stored()


def test_scratch_directory_is_empty_after_a_request(client: TestClient, settings: Settings) -> None:
    assert client.post("/datasets", content=chat_rows(20_000)).status_code == 201  # written in several chunks
    assert client.post("/datasets", files={"file": ("b.jsonl", chat_rows(3))}).status_code == 201
    assert scratch_files(settings) == []


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("train.jsonl", "train.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("C:\\data\\train.jsonl", "train.jsonl"),
        ("a\x00b\nc", "abc"),
        ("dir/", None),
        (None, None),
        ("x" * 300 + ".jsonl", "x" * (MAX_FILENAME_CHARS - 6) + ".jsonl"),
    ],
)
def test_filename_is_a_short_label_without_a_path(sent: str | None, shown: str | None) -> None:
    assert display_name(sent) == shown
