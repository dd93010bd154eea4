from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.v1.files import MAX_DETAILS
from qlora_service.domain.jobs import JobStatus
from qlora_service.queue.claim import Progress
from qlora_service.queue.queue import Queue
from tests.api.conftest import chat_rows

BAD_ROW = b'{"x": 1}\n'


def upload(client: TestClient, content: bytes = chat_rows(4), name: str = "train.jsonl", **form: str) -> Any:
    data = {"purpose": "fine-tune", **form}
    return client.post("/v1/files", data=data, files={"file": (name, content)})


def succeed(queue: Queue) -> None:
    """Claims the next job, reports two steps and an evaluation, and marks it as succeeded."""
    claimed = queue.claim("worker")
    assert claimed is not None
    for step, loss in ((1, 2.5), (2, 1.5)):
        queue.report(claimed[0], Progress(step=step), ("metrics", {"step": step, "loss": loss}))
    queue.report(claimed[0], Progress(), ("evaluation", {"step": 2, "eval_loss": 1.25, "eval_accuracy": 0.5}))
    queue.succeed(claimed[0], {"attempt": claimed[0].token})


def file_ids(client: TestClient, **query: object) -> list[str]:
    answer = client.get("/v1/files", params=query)  # type: ignore[arg-type]
    assert answer.status_code == 200, answer.text
    return [file["id"] for file in answer.json()["data"]]


def test_upload_of_the_same_bytes_returns_the_same_dataset(client: TestClient, dataset_id: str) -> None:
    file = upload(client, chat_rows(8)).json()
    assert file["id"] == dataset_id.replace("ds_", "file-")
    assert (file["object"], file["purpose"], file["status"]) == ("file", "fine-tune", "processed")
    assert (file["filename"], file["bytes"], file["status_details"]) == ("train.jsonl", len(chat_rows(8)), None)
    assert client.get(f"/v1/files/{file['id']}").json() == file
    assert client.get(f"/v1/files/{file['id']}/content").content == chat_rows(8)


def test_status_details_report_rows_that_are_left_out(client: TestClient) -> None:
    details = upload(client, chat_rows(4) + BAD_ROW * 2).json()["status_details"]
    assert details.startswith("left out: 2 rows (line 5, 6): ")


def test_status_details_are_limited_and_count_the_kinds_beyond(client: TestClient) -> None:
    bad = b"".join(b'{"messages": %s}\n' % value for value in (b"1", b"true", b"null", b"[]", b'"a"', b"{}", b"[1]"))
    file = upload(client, chat_rows(4) + bad).json()
    *kinds, more = file["status_details"].split("; ")
    assert len(kinds) == MAX_DETAILS
    dataset_id = file["id"].replace("file-", "ds_")
    assert more == f"… and 2 more kinds: GET /datasets/{dataset_id}"


def test_file_without_a_usable_row_is_refused_with_its_findings(
    bare_client: TestClient, nothing_stored: Callable[[], None]
) -> None:
    answer = upload(bare_client, BAD_ROW)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_dataset", "file")
    assert error["findings"][0]["line"] == 1
    nothing_stored()


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"purpose": "batch"}, "purpose"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}, "expires_after"),
    ],
)
def test_unsupported_purpose_and_expiry_are_refused(
    bare_client: TestClient, nothing_stored: Callable[[], None], form: dict[str, str], param: str
) -> None:
    answer = upload(bare_client, **form)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    nothing_stored()


def test_form_without_a_file_or_a_purpose_is_refused(bare_client: TestClient) -> None:
    for form in ({"files": {"file": ("a", chat_rows(1))}}, {"files": {"purpose": (None, "fine-tune")}}):
        assert bare_client.post("/v1/files", **form).status_code == 400  # type: ignore[arg-type]


def test_succeeded_job_has_a_results_file(client: TestClient, queue: Queue, submit: Callable[..., str]) -> None:
    job_id = submit()
    file_id = job_id.replace("job_", "file-") + "-results"
    assert client.get(f"/v1/files/{file_id}").status_code == 404
    succeed(queue)
    file = client.get(f"/v1/files/{file_id}").json()
    content = base64.b64decode(client.get(f"/v1/files/{file_id}/content").content)
    assert (file["purpose"], file["bytes"]) == ("fine-tune-results", len(content))
    assert content.decode().splitlines()[1:] == ["1,2.5,,,", "2,1.5,,1.25,0.5"]
    assert client.get(f"/jobs/{job_id}/metrics.csv").content == content
    assert client.get(f"/v1/fine_tuning/jobs/{job_id}").json()["result_files"] == [file_id]
    refused = client.delete(f"/v1/files/{file_id}")
    assert (refused.status_code, refused.headers["x-should-retry"]) == (409, "false")


def test_pages_contain_every_file_once_in_either_order(
    client: TestClient, queue: Queue, submit: Callable[..., str]
) -> None:
    for number in range(2):
        upload(client, chat_rows(1, f"answer {number}"))
        submit()
        succeed(queue)
    newest_first = file_ids(client)
    assert len(newest_first) == 5
    assert file_ids(client, order="asc") == newest_first[::-1]
    for order, expected in (("desc", newest_first), ("asc", newest_first[::-1])):
        seen: list[str] = []
        more = True
        while more:
            page = client.get(
                "/v1/files", params={"order": order, "limit": 2, **({"after": seen[-1]} if seen else {})}
            ).json()
            seen += [file["id"] for file in page["data"]]
            assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], seen[-1])
            more = page["has_more"]
        assert seen == expected
    whole = client.get("/v1/files", params={"limit": 5}).json()
    assert (len(whole["data"]), whole["has_more"]) == (5, False)
    assert len(file_ids(client, purpose="fine-tune")) == 3
    assert len(file_ids(client, purpose="fine-tune-results")) == 2
    assert file_ids(client, purpose="batch") == []


@pytest.mark.parametrize("after", ["file-1", "ds_019a9c2f8d31c4e55f0a7b", "x y"])
def test_cursor_that_is_not_a_file_id_is_refused(bare_client: TestClient, after: str) -> None:
    answer = bare_client.get("/v1/files", params={"after": after})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "after")


@pytest.mark.parametrize(
    "file_id", ["file-none", "ds_019a9c2f8d31c4e55f0a7b", "file-" + "0" * 22, f"file-{22 * '0'}-results"]
)
def test_unknown_file_is_not_found(bare_client: TestClient, file_id: str) -> None:
    for answer in (
        bare_client.get(f"/v1/files/{file_id}"),
        bare_client.get(f"/v1/files/{file_id}/content"),
        bare_client.delete(f"/v1/files/{file_id}"),
    ):
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert error["param"] == "file_id"
        assert error["message"].startswith(f"there is no file '{file_id}'")


def test_deleted_file_is_gone_from_both_apis(client: TestClient, settings: Any) -> None:
    file_id = upload(client).json()["id"]
    assert client.delete(f"/v1/files/{file_id}").json() == {"id": file_id, "object": "file", "deleted": True}
    assert client.get(f"/v1/files/{file_id}").status_code == 404
    assert client.get("/datasets").json()["data"] == []
    again = upload(client).json()["id"]
    dataset_id = again.replace("file-", "ds_")
    assert client.delete(f"/datasets/{dataset_id}").json()["deleted"] is True
    assert file_ids(client) == []


def test_file_of_an_unfinished_job_is_not_deleted(
    client: TestClient, submit: Callable[..., str], dataset_id: str
) -> None:
    job_id = submit()
    file_id = dataset_id.replace("ds_", "file-")
    refused = client.delete(f"/v1/files/{file_id}")
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (409, "file_id")
    assert error["message"].startswith(f"file {file_id} is needed by job {job_id}")
    assert client.delete(f"/datasets/{dataset_id}").status_code == 409
    assert client.post(f"/jobs/{job_id}/cancel").json()["status"] == JobStatus.CANCELLED
    assert client.delete(f"/v1/files/{file_id}").status_code == 200
    assert client.get(f"/v1/fine_tuning/jobs/{job_id}").json()["training_file"] == file_id


def test_list_without_files_is_empty(bare_client: TestClient) -> None:
    page = json.loads(bare_client.get("/v1/files").content)
    assert page == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}
