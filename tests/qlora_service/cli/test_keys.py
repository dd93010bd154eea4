"""`qlora keys` on a data directory without a service."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_service.actions.keys import KeyRegistry, open_key_registry
from qlora_service.cli import main
from qlora_service.domain.keys import Scope
from qlora_service.errors import Unauthenticated

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def keys(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs `qlora keys` on a temporary data directory; returns exit code, stdout, stderr."""
    monkeypatch.setenv("QLORA_DATA_DIR", str(tmp_path))

    def run_keys(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            main(["keys", *arguments])
        output = capsys.readouterr()
        assert isinstance(exited.value.code, int)
        return exited.value.code, output.out, output.err

    return run_keys


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[KeyRegistry]:
    """The keys as the service sees them."""
    registry = open_key_registry(f"sqlite:///{tmp_path / 'state.db'}")
    yield registry
    registry.close()


def test_create_prints_only_the_key_which_gives_access_to_the_project(keys: Run, registry: KeyRegistry) -> None:
    code, secret, note = keys(
        "create", "--project", "team-a", "--name", "laptop", "--scope", "read", "--scope", "admin"
    )
    assert code == 0
    caller = registry.authenticate(secret.rstrip("\n"))
    assert (caller.project, caller.scopes) == ("team-a", frozenset(Scope))
    assert f"key {caller.key_id} of project team-a, scope read, admin" in note
    assert secret.strip() not in note


def test_key_has_the_default_project_and_scope(keys: Run, registry: KeyRegistry) -> None:
    created = json.loads(keys("create", "--json")[1])
    assert (created["project"], created["scopes"]) == ("local", ["submit"])
    assert registry.authenticate(created["secret"]).key_id == created["id"]


def test_keys_are_listed_without_secrets(keys: Run, registry: KeyRegistry) -> None:
    assert registry.list_keys(None) == []
    assert "no keys yet" in keys("list")[2]
    created = [json.loads(keys("create", "--project", project, "--json")[1]) for project in ("team-a", "team-b")]
    secrets = [key.pop("secret") for key in created]
    code, listed, _ = keys("list", "--json")
    assert code == 0
    assert json.loads(listed) == created[::-1]
    assert json.loads(keys("list", "--project", "team-a", "--json")[1]) == created[:1]
    table = keys("list")[1]
    assert created[0]["id"] in table
    assert not any(secret in table for secret in secrets)


def test_key_is_revoked_by_its_id(keys: Run, registry: KeyRegistry) -> None:
    created = json.loads(keys("create", "--scope", "admin", "--json")[1])
    # The last admin key can be revoked too, because `qlora keys create` needs no key.
    code, _, note = keys("revoke", created["id"])
    assert (code, note.startswith(f"revoked {created['id']}")) == (0, True)
    with pytest.raises(Unauthenticated, match="revoked"):
        registry.authenticate(created["secret"])
    assert json.loads(keys("list", "--json")[1])[0]["revoked_at"] is not None


def test_key_given_in_place_of_its_id_is_not_printed(keys: Run, registry: KeyRegistry) -> None:
    secret = json.loads(keys("create", "--json")[1])["secret"]
    code, out, note = keys("revoke", secret)
    assert (code, out) == (2, "")
    assert "by its id" in note
    assert secret not in note
    assert registry.authenticate(secret).project == "local"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("revoke", "key_none"), "there is no key 'key_none'"),
        (("create", "--project", "Team A"), "'Team A' is not a valid project name"),
        (("create", "--name", ""), "a key's name has 1 to 64 printable characters"),
    ],
)
@pytest.mark.usefixtures("registry")
def test_refused_command_prints_one_line(keys: Run, arguments: tuple[str, ...], message: str) -> None:
    code, out, note = keys(*arguments)
    assert (code, out) == (1, "")
    assert note.startswith(f"error: {message}")
    assert len(note.splitlines()) == 1


@pytest.mark.parametrize("arguments", [("list",), ("revoke", "key_none")])
def test_mistyped_directory_is_an_error_and_not_created(keys: Run, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    mistyped = tmp_path / "dtaa"
    code, out, note = keys(*arguments, "--data-dir", str(mistyped))
    assert (code, out) == (1, "")
    assert note.startswith(f"error: {mistyped} is not a service's data directory")
    assert not mistyped.exists()
    assert keys("create", "--data-dir", str(mistyped))[0] == 0
    assert keys("list", "--data-dir", str(mistyped))[0] == 0


def test_unusable_database_is_one_message(keys: Run, tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"not a database, but long enough for SQLite to read a header")
    code, _, note = keys("list")
    assert code == 1
    assert f"error: the database of {tmp_path} cannot be used" in note
    assert "Traceback" not in note
