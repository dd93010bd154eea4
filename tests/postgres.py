"""PostgreSQL for the tests: the installed programs, one server per session, one new database per test."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from qlora_service.domain.ids import new_id
from qlora_service.store.database import Database

NOT_INSTALLED = "PostgreSQL is not installed: apt-get install postgresql"
FAST = ["-c", "fsync=off", "-c", "synchronous_commit=off", "-c", "full_page_writes=off"]
"""Options without crash safety, which a test's server does not need"""


class PostgresServer:
    """A server process and its databases."""

    def __init__(self, programs: Path, directory: Path, port: int, options: list[str]) -> None:
        self.port = port
        self._programs, self._data, self._options = programs, directory / "data", options
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._admin: Engine | None = None

    def start(self) -> None:
        """Starts the server and returns once it answers. It ends with the calling thread: call it on the main one."""
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*_run_as_postgres(), self._programs / "postgres", "-D", self._data, "-p", str(self.port),
                 "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self._directory}",
                 "-c", "max_connections=200", *self._options],
                cwd=self._directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        ready: list[str | Path] = [self._programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        deadline = time.monotonic() + 30
        while subprocess.run(ready, check=False).returncode != 0:
            assert self._process.poll() is None, (self._directory / "log").read_text()
            assert time.monotonic() < deadline, (self._directory / "log").read_text()
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends the server and every connection to it, as an administrator's restart does."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)  # a fast shutdown
        self._process.wait(timeout=30)

    def url(self, name: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def create(self, name: str, template: str = "template1") -> str:
        """The URL of a new database that is a copy of `template`."""
        self.admin(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY file_copy')  # the fastest strategy
        return self.url(name)

    def drop(self, name: str) -> None:
        self.admin(f'DROP DATABASE "{name}" WITH (FORCE)')

    def admin(self, statement: str) -> None:
        """Executes a statement as the superuser, outside a transaction."""
        if self._admin is None:
            url = self.url("postgres").replace("postgresql:", "postgresql+psycopg:")
            self._admin = sa.create_engine(url, isolation_level="AUTOCOMMIT", pool_pre_ping=True)
        with self._admin.connect() as connection:
            connection.exec_driver_sql(statement)

    def close(self) -> None:
        if self._admin is not None:
            self._admin.dispose()
        self.stop()


@contextmanager
def running_postgres(options: list[str], parent: Path | None = None) -> Iterator[PostgresServer]:
    """A server on a free port with an empty data directory under `parent`, deleted at the end."""
    programs = installed_programs()
    assert programs is not None, NOT_INSTALLED
    # Not pytest's directory: root starts the server as the user postgres, who cannot enter that one.
    directory = Path(tempfile.mkdtemp(prefix="qlora-postgres-", dir=parent))
    if os.geteuid() == 0:
        shutil.chown(directory, "postgres", "postgres")
    try:
        subprocess.run(
            [*_run_as_postgres(), programs / "initdb", "-D", directory / "data", "-U", "postgres", "-A", "trust",
             "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"],
            cwd=directory, check=True, capture_output=True,
        )  # fmt: skip
        server = PostgresServer(programs, directory, _free_port(), options)
        server.start()
        try:
            yield server
        finally:
            server.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A server with a migrated database named `migrated`; skips where PostgreSQL is not installed."""
    if installed_programs() is None:
        pytest.skip(NOT_INSTALLED)
    with running_postgres(FAST, _memory_directory()) as server:
        database = Database(server.create("migrated"))
        database.migrate()
        database.close()
        yield server


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> Iterator[str]:
    """The URL of a new, migrated database."""
    name = new_id("test")
    yield postgres.create(name, "migrated")
    postgres.drop(name)


def installed_programs() -> Path | None:
    """The directory of the newest initdb and postgres; None if PostgreSQL is not installed."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    initdb = debian[-1] if debian else Path(on_path).resolve() if on_path else None
    return initdb.parent if initdb else None


def _memory_directory() -> Path | None:
    """A file system in memory with at least 1 GiB free: some disks take 0.3 s to create a database's 300 files."""
    memory = Path("/dev/shm")
    has_room = os.access(memory, os.W_OK | os.X_OK) and shutil.disk_usage(memory).free > 2**30
    return memory if has_room else None


def _run_as_postgres() -> list[str]:
    """Command prefix: a user that may run PostgreSQL, which refuses root; the program ends with this thread."""
    user = ["--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    return ["setpriv", *user, "--pdeathsig=INT"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
