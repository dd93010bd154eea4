from __future__ import annotations

import gzip
import re
from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient

from qlora_service.settings import Settings
from tests.api.conftest import chat_rows, sha256

BAD_ROW = b'{"messages": [{"role": "user", "content": "no answer"}]}\n'


def test_raw_body_is_stored_as_a_dataset(client: TestClient, settings: Settings) -> None:
    content = chat_rows(3, answer="東京 😀") + BAD_ROW
    response = client.post("/datasets?filename=d%C3%A4ten.jsonl", content=content)
    assert response.status_code == 201
    dataset = response.json()
    assert dataset["object"] == "dataset"
    assert dataset["filename"] == "däten.jsonl"
    assert (dataset["container"], dataset["shape"], dataset["bytes"]) == ("jsonl", "messages", len(content))
    assert (dataset["rows"], dataset["usable_rows"], dataset["finding_count"]) == (4, 3, 1)
    assert dataset["findings"][0]["line"] == 4
    assert dataset["findings"][0]["byte_offset"] == len(content) - len(BAD_ROW)
    assert dataset["sha256"] == sha256(content)
    stored = settings.resolved_data_dir / "artifacts" / "datasets" / dataset["sha256"]
    assert stored.read_bytes() == content
    assert client.get(f"/datasets/{dataset['id']}").json() == dataset


def test_form_with_the_same_bytes_is_the_same_dataset(client: TestClient) -> None:
    form = client.post(
        "/datasets",
        files={"file": ("a.jsonl", chat_rows(3))},
        data={"container": "jsonl", "shape": "messages"},
    )
    assert form.status_code == 201
    assert form.json()["filename"] == "a.jsonl"
    assert client.post("/datasets?filename=b.jsonl", content=chat_rows(3)).json() == form.json()


def test_default_content_type_of_curl_is_accepted(client: TestClient) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    assert client.post("/datasets", content=chat_rows(2), headers=headers).status_code == 201


def test_datasets_are_listed_newest_first_in_pages(client: TestClient) -> None:
    ids = [client.post("/datasets", content=chat_rows(count)).json()["id"] for count in (1, 2, 3)]
    first = client.get("/datasets?limit=2").json()
    assert [dataset["id"] for dataset in first["data"]] == [ids[2], ids[1]]
    second = client.get("/datasets", params={"limit": 2, "after": first["next"]}).json()
    assert [dataset["id"] for dataset in second["data"]] == [ids[0]]
    assert second["next"] is None


def test_base_model_parameter_adds_the_histogram_of_lengths(client: TestClient, dataset_id: str) -> None:
    dataset = client.get(f"/datasets/{dataset_id}?base_model=tiny").json()
    lengths = dataset["lengths"]
    assert lengths["rows"] == lengths["usable_rows"] == sum(lengths["histogram"].values()) == 8
    assert 0 < lengths["trained_tokens"] < lengths["tokens"]
    short = client.get(f"/datasets/{dataset_id}?base_model=tiny&max_seq_len_tokens=8").json()["lengths"]
    assert short["too_long_rows"] == 8
    assert short["histogram"] == lengths["histogram"]


def test_preview_shows_text_tokens_and_trained_tokens(client: TestClient, dataset_id: str) -> None:
    response = client.get(f"/datasets/{dataset_id}/preview?base_model=tiny&skip=2&limit=1")
    (row,) = response.json()["data"]
    assert row["line"] == 3
    assert "Question 2: capital of France?" in row["text"]
    assert "".join(token["text"] for token in row["tokens"]) == row["text"]
    assert "".join(token["text"] for token in row["tokens"] if token["trained"]) == "Paris<|im_end|>"
    assert [row["text"][start:end] for start, end in row["trained_spans"]] == ["Paris<|im_end|>"]


def test_preview_shows_truncated_tokens_and_the_reason_a_row_is_left_out(client: TestClient, dataset_id: str) -> None:
    path = f"/datasets/{dataset_id}/preview?base_model=tiny&limit=1"
    (whole,) = client.get(path).json()["data"]
    limit = len(whole["tokens"]) - 3
    (cut,) = client.get(f"{path}&max_seq_len_tokens={limit}&too_long=truncate").json()["data"]
    assert (len(cut["tokens"]), cut["cut_tokens"]) == (limit, 3)
    assert cut["text"] == "".join(token["text"] for token in cut["tokens"]) < whole["text"]
    (refused,) = client.get(f"{path}&max_seq_len_tokens={limit}").json()["data"]
    assert refused == {"line": 1, "problem": f"{limit + 3} tokens long; max_seq_len_tokens is {limit}"}


@pytest.mark.parametrize(
    ("path", "status", "code", "location"),
    [
        ("/datasets/ds_none", 404, "not_found", "dataset_id"),
        ("/datasets/ds_none/preview?base_model=tiny", 404, "not_found", "dataset_id"),
        ("/datasets/{id}?base_model=tinny", 422, "invalid_model", "base_model"),
        ("/datasets/{id}/preview", 422, "invalid_request", "base_model"),
        ("/datasets/{id}/preview?base_model=../tiny", 422, "invalid_model", "base_model"),
        ("/datasets/{id}/preview?base_model=tiny&limit=999", 422, "invalid_request", "limit"),
        ("/datasets/{id}/preview?base_model=tiny&skip=99999999999999999999", 422, "invalid_request", "skip"),
    ],
)
def test_invalid_request_is_answered_with_its_location(
    client: TestClient, dataset_id: str, path: str, status: int, code: str, location: str
) -> None:
    response = client.get(path.replace("{id}", dataset_id))
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert response.json()["error"]["location"] == location


@pytest.mark.parametrize(
    ("query", "content", "reason"),
    [
        ("", b"", "empty"),
        ("?filename=a.jsonl", gzip.compress(chat_rows(1)), "gzip"),
        ("?filename=a.parquet", chat_rows(1), "parquet"),
        ("?filename=a.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(50), "PNG"),
        ("", BAD_ROW * 3, "usable"),
        ("?shape=alpaca", chat_rows(2), "usable"),
        ("?container=parquet", chat_rows(2), "parquet"),
    ],
)
def test_unusable_file_is_refused_and_not_stored(
    bare_client: TestClient, nothing_stored: Callable[[], None], query: str, content: bytes, reason: str
) -> None:
    response = bare_client.post(f"/datasets{query}", content=content)
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["code"] == "invalid_dataset"
    assert re.search(reason, error["message"], re.IGNORECASE), error
    nothing_stored()


def test_findings_of_a_refused_file_have_line_numbers(bare_client: TestClient) -> None:
    findings = bare_client.post("/datasets", content=BAD_ROW * 2).json()["error"]["findings"]
    assert [finding["line"] for finding in findings] == [1, 2]
    assert all(finding["reason"] for finding in findings)


@pytest.mark.parametrize(
    ("query", "parts", "location"),
    [
        ("?container=xml", {"file": ("a", b"x")}, "container"),
        ("", {"file": ("a", b"x"), "shape": (None, b"cube")}, "shape"),
        ("", {"fil": ("a", b"x")}, "fil"),
        ("", {"shape": (None, b"text")}, "file"),
    ],
)
def test_invalid_form_is_refused_with_its_location(
    bare_client: TestClient,
    nothing_stored: Callable[[], None],
    query: str,
    parts: dict[str, tuple[str | None, bytes]],
    location: str,
) -> None:
    response = bare_client.post(f"/datasets{query}", files=parts)
    assert response.status_code == 422
    assert response.json()["error"]["location"] == location
    nothing_stored()
