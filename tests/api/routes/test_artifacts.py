from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient

from tests.api.conftest import FILES, call, sha256

WEIGHTS = FILES["adapter_model.safetensors"]
ETAG = f'"{sha256(WEIGHTS)}"'


@pytest.fixture
def url(finished_job: str) -> str:
    return f"/jobs/{finished_job}/artifacts/adapter_model.safetensors"


def test_every_listed_file_can_be_downloaded_and_verified(client: TestClient, finished_job: str) -> None:
    listed = client.get(f"/jobs/{finished_job}/artifacts").json()["data"]
    assert [file["name"] for file in listed] == [*FILES, "manifest.json"]
    for file in listed:
        response = client.get(file["url"])
        assert response.status_code == 200
        assert sha256(response.content) == file["sha256"]
        assert len(response.content) == file["bytes"] == int(response.headers["Content-Length"])
        assert response.headers["ETag"] == f'"{file["sha256"]}"'
        assert response.headers["Content-Disposition"] == f'attachment; filename="{file["name"]}"'
    assert json.loads(response.content)["job_id"] == finished_job


def test_current_copy_is_answered_304(client: TestClient, url: str) -> None:
    response = client.get(url, headers={"If-None-Match": ETAG})
    assert (response.status_code, response.content, response.headers["ETag"]) == (304, b"", ETAG)
    assert client.get(url, headers={"If-None-Match": '"other"'}).status_code == 200


def test_download_resumes_by_range(client: TestClient, url: str) -> None:
    response = client.get(url, headers={"Range": "bytes=1000-"})
    assert response.status_code == 206
    assert response.headers["Content-Range"] == f"bytes 1000-{len(WEIGHTS) - 1}/{len(WEIGHTS)}"
    assert response.content == WEIGHTS[1000:]
    assert client.get(url, headers={"Range": "bytes=5-9"}).content == WEIGHTS[5:10]


def test_range_of_another_version_gives_the_whole_file(client: TestClient, url: str) -> None:
    same = client.get(url, headers={"Range": "bytes=5-9", "If-Range": ETAG})
    assert same.status_code == 206
    other = client.get(url, headers={"Range": "bytes=5-9", "If-Range": '"other"'})
    assert (other.status_code, other.content) == (200, WEIGHTS)


def test_range_after_the_end_is_refused_with_the_size(client: TestClient, url: str) -> None:
    response = client.get(url, headers={"Range": f"bytes={len(WEIGHTS)}-"})
    assert response.status_code == 416
    assert response.headers["Content-Range"] == f"bytes */{len(WEIGHTS)}"
    assert response.json()["error"]["code"] == "range_not_satisfiable"


def test_head_request_returns_only_headers(client: TestClient, url: str) -> None:
    response = client.head(url)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["Content-Length"] == str(len(WEIGHTS))
    assert response.headers["ETag"] == ETAG
    assert client.head(f"{url}.txt").status_code == 404
    start, end = call(client.app, "HEAD", url, [{"type": "http.request"}])
    assert (start["status"], end["body"]) == (200, b"")  # the file is not read


def test_zip_contains_every_file_and_has_the_same_bytes_each_time(client: TestClient, finished_job: str) -> None:
    response = client.get(f"/jobs/{finished_job}/adapter.zip")
    assert response.headers["Content-Type"] == "application/zip"
    assert response.headers["Content-Disposition"] == f'attachment; filename="{finished_job}.zip"'
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        manifest = client.get(f"/jobs/{finished_job}/artifacts/manifest.json").content
        assert {name: archive.read(name) for name in archive.namelist()} == FILES | {"manifest.json": manifest}
    assert client.get(f"/jobs/{finished_job}/adapter.zip").content == response.content


def test_unknown_name_is_not_found_and_the_error_lists_the_published_names(
    client: TestClient, finished_job: str
) -> None:
    for name in ("adapter.bin", "..%2Fmanifest.json", "%00"):
        response = client.get(f"/jobs/{finished_job}/artifacts/{name}")
        assert response.status_code == 404, name
    response = client.get(f"/jobs/{finished_job}/artifacts/adapter.bin")
    assert "adapter_model.safetensors" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["artifacts", "artifacts/manifest.json", "adapter.zip"])
def test_unfinished_job_has_no_artifacts_yet(client: TestClient, submit: Callable[..., str], path: str) -> None:
    response = client.get(f"/jobs/{submit()}/{path}")
    assert response.status_code == 409
    assert "is queued" in response.json()["error"]["message"]
