"""`qlora keys` on a data directory without a service."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlora_service.actions.keys import Access, open_access
from qlora_service.cli import main
from qlora_service.domain.keys import Scope
from qlora_service.errors import Unauthenticated

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def keys(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs `qlora keys`; exit code, stdout, stderr."""
    monkeypatch.setenv("QLORA_DATA_DIR", str(tmp_path))

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["keys", *arguments])
        printed = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, printed.out, printed.err

    return call


@pytest.fixture
def access(tmp_path: Path) -> Iterator[Access]:
    """As the service sees the keys."""
    access = open_access(f"sqlite:///{tmp_path / 'state.db'}")
    yield access
    access.close()


def test_made_key_is_all_of_stdout_and_opens_the_project(keys: Run, access: Access) -> None:
    code, secret, note = keys(
        "create", "--project", "team-a", "--name", "laptop", "--scope", "read", "--scope", "admin"
    )
    assert code == 0
    caller = access.authenticate(secret.rstrip("\n"))
    assert (caller.project, caller.scopes) == ("team-a", frozenset(Scope))
    assert f"key {caller.key_id} of project team-a, for read, admin" in note
    assert secret.strip() not in note


def test_key_submits_to_the_default_project_unless_told_otherwise(keys: Run, access: Access) -> None:
    made = json.loads(keys("create", "--json")[1])
    assert (made["project"], made["scopes"]) == ("local", ["submit"])
    assert access.authenticate(made["secret"]).key_id == made["id"]


def test_keys_are_listed_without_secrets(keys: Run, access: Access) -> None:
    assert access.list_keys(None) == []
    assert "no keys yet" in keys("list")[2]
    made = [json.loads(keys("create", "--project", project, "--json")[1]) for project in ("team-a", "team-b")]
    secrets = [key.pop("secret") for key in made]
    code, listed, _ = keys("list", "--json")
    assert code == 0
    assert json.loads(listed) == made[::-1]
    assert json.loads(keys("list", "--project", "team-a", "--json")[1]) == made[:1]
    table = keys("list")[1]
    assert made[0]["id"] in table
    assert not any(secret in table for secret in secrets)


def test_key_is_revoked_by_its_id(keys: Run, access: Access) -> None:
    made = json.loads(keys("create", "--scope", "admin", "--json")[1])
    # Also the last admin key: who can run this can make another.
    code, _, note = keys("revoke", made["id"])
    assert (code, note.startswith(f"revoked {made['id']}")) == (0, True)
    with pytest.raises(Unauthenticated, match="revoked"):
        access.authenticate(made["secret"])
    assert json.loads(keys("list", "--json")[1])[0]["revoked_at"] is not None


def test_key_given_in_place_of_its_id_is_not_shown(keys: Run, access: Access) -> None:
    secret = json.loads(keys("create", "--json")[1])["secret"]
    code, out, note = keys("revoke", secret)
    assert (code, out) == (2, "")
    assert "by its id" in note
    assert secret not in note
    assert access.authenticate(secret).project == "local"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("revoke", "key_none"), "there is no key 'key_none'"),
        (("create", "--project", "Team A"), "'Team A' is not a valid project name"),
        (("create", "--name", ""), "a key's name has 1 to 64 printable characters"),
    ],
)
@pytest.mark.usefixtures("access")
def test_what_cannot_be_done_is_one_clear_line(keys: Run, arguments: tuple[str, ...], message: str) -> None:
    code, out, note = keys(*arguments)
    assert (code, out) == (1, "")
    assert note.startswith(f"error: {message}")
    assert len(note.splitlines()) == 1


@pytest.mark.parametrize("arguments", [("list",), ("revoke", "key_none")])
def test_a_mistyped_directory_is_told_and_not_made(keys: Run, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    mistyped = tmp_path / "dtaa"
    code, out, note = keys(*arguments, "--data-dir", str(mistyped))
    assert (code, out) == (1, "")
    assert note.startswith(f"error: {mistyped} is not a service's data directory")
    assert not mistyped.exists()
    assert keys("create", "--data-dir", str(mistyped))[0] == 0
    assert keys("list", "--data-dir", str(mistyped))[0] == 0


def test_database_that_cannot_be_used_is_one_clear_line(keys: Run, tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"no database at all, but long enough to be taken for one")
    code, _, note = keys("list")
    assert code == 1
    assert f"error: the database of {tmp_path} cannot be used" in note
    assert "Traceback" not in note
