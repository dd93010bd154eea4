from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.testclient import TestClient
from obstore.exceptions import GenericError
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from api.errors import error_locations, response_of, status_of
from api.http.request_log import RequestLog
from api.main import create_app
from qlora_service import errors
from qlora_service.errors import InvalidDataset, InvalidModel, QLoRAError
from qlora_service.settings import Settings
from qlora_service.store import database
from tests.api.conftest import URL, chat_rows

SHAPE = {"code", "message", "location", "findings", "details"}


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (errors.InvalidRequest, 422),
        (errors.InvalidSpec, 422),
        (errors.InvalidDataset, 422),
        (errors.InvalidModel, 422),
        (errors.NotFound, 404),
        (errors.Conflict, 409),
        (errors.TooLarge, 413),
        (errors.QuotaExceeded, 429),
        (errors.ObjectLimitReached, 429),
        (errors.Unavailable, 503),
        (errors.JobFailed, 500),
    ],
)
def test_every_domain_error_has_a_status(kind: type[QLoRAError], status: int) -> None:
    assert status_of(kind("…")) == status


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("DELETE", "/jobs", 405, "method_not_allowed"),
        ("GET", "/jobs?status=done", 422, "invalid_request"),
        ("GET", "/jobs?limit=0", 422, "invalid_request"),
        ("GET", "/jobs/job_none", 404, "not_found"),
        ("GET", "/jobs/%00%ff", 404, "not_found"),
    ],
)
def test_every_error_has_the_one_shape(bare_client: TestClient, method: str, path: str, status: int, code: str) -> None:
    response = bare_client.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == SHAPE
    assert error["code"] == code
    assert response.headers["X-Request-Id"]


def test_all_invalid_parameters_are_listed(bare_client: TestClient) -> None:
    error = bare_client.get("/jobs?status=done&limit=0").json()["error"]
    assert error["location"] == "status"
    assert [finding["reason"].partition(":")[0] for finding in error["findings"]] == ["status", "limit"]


@pytest.mark.parametrize(
    ("kind", "helps"),
    [
        (errors.Unavailable, True),
        (errors.QuotaExceeded, True),
        (errors.ObjectLimitReached, False),
        (errors.StorageFull, False),
    ],
)
def test_retry_after_is_sent_only_where_waiting_helps(kind: type[QLoRAError], helps: bool) -> None:
    assert ("Retry-After" in response_of(kind("…")).headers) is helps


def test_unavailable_response_has_a_retry_after(settings: Settings) -> None:
    app = create_app(settings)
    with TestClient(app, URL) as client:
        app.state.draining = True
        response = client.get("/readyz")
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "5"


def failing_client(error: Exception) -> TestClient:
    """A client of an application whose only route raises this error."""
    app = FastAPI()
    app.add_middleware(RequestLog)

    @app.get("/")
    def fail() -> None:
        raise error

    return TestClient(app)


def sqlite_error(statement: str, *, pragma: str = "") -> OperationalError:
    """The error of a real SQLite database on this statement."""
    engine = sa.create_engine("sqlite://")
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("CREATE TABLE t (a)")
            if pragma:
                connection.exec_driver_sql(pragma)
            connection.exec_driver_sql(statement)
    except OperationalError as error:
        return error
    finally:
        engine.dispose()
    raise AssertionError(f"SQLite does not refuse {statement}")


def full_disk() -> OSError:
    with pytest.raises(OSError, match="No space left") as caught, Path("/dev/full").open("wb", buffering=0) as file:
        file.write(b"x")
    return caught.value


def full_artifact_store() -> GenericError:
    return GenericError("Generic LocalFileSystem error: Unable to copy data to file: No space left (os error 28)")


@pytest.mark.parametrize(
    "error",
    [
        full_disk(),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        full_artifact_store(),
        sqlite_error("INSERT INTO t VALUES (zeroblob(1000000))", pragma="PRAGMA max_page_count = 3"),
    ],
    ids=["disk", "quota", "artifact store", "SQLite"],
)
def test_full_disk_is_answered_503(error: Exception) -> None:
    with capture_logs() as lines:
        response = failing_client(error).get("/")
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "5"
    assert response.json()["error"]["code"] == "unavailable"
    assert "no space left" in response.json()["error"]["message"]
    assert [(line["event"], line["log_level"]) for line in lines] == [("outage", "warning"), ("request", "info")]


def test_locked_database_is_answered_503(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 50)
    with TestClient(create_app(settings), URL) as client:
        lock = sqlite3.connect(settings.resolved_data_dir / "state.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        response = client.post("/datasets", content=chat_rows(2))
        lock.close()
        assert client.post("/datasets", content=chat_rows(2)).status_code == 201
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "5"
    assert "locked" in response.json()["error"]["message"]


def test_timeout_of_the_connection_pool_is_answered_503() -> None:
    engine = sa.create_engine("sqlite://", poolclass=sa.QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.01)
    with engine.connect(), pytest.raises(sa.exc.TimeoutError) as caught:
        engine.connect()
    engine.dispose()
    response = failing_client(caught.value).get("/")
    assert (response.status_code, response.headers["Retry-After"]) == (503, "5")


@pytest.mark.parametrize(
    "error", [PermissionError("no"), sqlite_error("SELECT nothing"), GenericError("(os error 13)")]
)
def test_defects_are_answered_500_and_not_503(error: Exception) -> None:
    assert failing_client(error).get("/").status_code == 500


def test_route_sets_the_location_of_an_error() -> None:
    with pytest.raises(InvalidModel) as caught, error_locations({InvalidModel: "/base_model"}):
        raise InvalidModel("unknown")
    assert caught.value.location == "/base_model"
    with pytest.raises(InvalidDataset) as other, error_locations({InvalidModel: "/base_model"}):
        raise InvalidDataset("empty", location="/dataset")
    assert other.value.location == "/dataset"
