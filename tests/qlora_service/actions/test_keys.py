from __future__ import annotations

from pathlib import Path

import pytest

from qlora_service.actions.keys import KeyRegistry, open_key_registry
from qlora_service.domain.keys import LOCAL_PROJECT, Caller, Scope
from qlora_service.errors import Conflict, InvalidRequest, NotFound, Unauthenticated
from qlora_service.store.database import Database
from tests.control_plane import START, SteppedClock, clock, each_database, run_in_processes

__all__ = ["clock", "each_database"]


@pytest.fixture
def registry(database: Database, clock: SteppedClock) -> KeyRegistry:
    return KeyRegistry(database, clock)


def test_key_gives_access_to_its_project_with_its_scopes(registry: KeyRegistry) -> None:
    key, secret = registry.create_key("team-a", "laptop", [Scope.SUBMIT])
    assert registry.authenticate(secret) == Caller("team-a", frozenset({Scope.READ, Scope.SUBMIT}), key.id)
    assert (key.name, key.created_at, key.revoked_at) == ("laptop", START, None)


@pytest.mark.parametrize("secret", ["", "qk_", "sk-1", "qk_" + 43 * "0", "qk_\udc80", "qk_" + 10_000 * "x"])
def test_unknown_key_is_refused(registry: KeyRegistry, secret: str) -> None:
    registry.create_key("team-a", "laptop")
    with pytest.raises(Unauthenticated, match="not known: `qlora keys create`") as caught:
        registry.authenticate(secret)
    assert not secret or secret not in caught.value.message


def test_id_of_a_key_is_no_key(registry: KeyRegistry) -> None:
    key, _ = registry.create_key("team-a", "laptop")
    for guess in (key.id, f"qk_{key.id}"):
        with pytest.raises(Unauthenticated):
            registry.authenticate(guess)


def test_revoked_key_is_refused_and_keeps_its_revocation_time(registry: KeyRegistry, clock: SteppedClock) -> None:
    key, secret = registry.create_key("team-a", "laptop")
    _, other = registry.create_key("team-a", "server")
    clock.advance(60)
    revoked = registry.revoke_key(key.id)
    assert revoked.revoked_at == clock.now
    with pytest.raises(Unauthenticated, match="revoked"):
        registry.authenticate(secret)
    assert registry.authenticate(other).project == "team-a"
    clock.advance(60)
    assert registry.revoke_key(key.id) == revoked


def test_keys_of_another_project_are_not_found(registry: KeyRegistry) -> None:
    own, _ = registry.create_key("team-a", "own")
    foreign, secret = registry.create_key("team-b", "foreign")
    assert registry.list_keys("team-a") == [own]
    assert {key.id for key in registry.list_keys()} == {own.id, foreign.id}
    with pytest.raises(NotFound, match=foreign.id):
        registry.revoke_key(foreign.id, "team-a")
    assert registry.authenticate(secret).project == "team-b"


def test_last_admin_key_of_a_project_is_not_revoked_with_keep_admin(registry: KeyRegistry) -> None:
    registry.create_key("team-b", "admin", [Scope.ADMIN])
    registry.create_key("team-a", "reader", [Scope.READ])
    first, _ = registry.create_key("team-a", "first", [Scope.ADMIN])
    second, _ = registry.create_key("team-a", "second", [Scope.ADMIN])
    registry.revoke_key(first.id, keep_admin=True)
    with pytest.raises(Conflict, match="last admin key of project team-a"):
        registry.revoke_key(second.id, keep_admin=True)
    assert registry.list_keys("team-a")[0].revoked_at is None
    assert registry.revoke_key(first.id, keep_admin=True).revoked_at is not None
    assert registry.revoke_key(second.id).revoked_at is not None


@pytest.mark.parametrize(
    ("project", "name", "scopes", "location"),
    [
        ("", "name", [Scope.READ], "project"),
        ("Team A", "name", [Scope.READ], "project"),
        ("a" * 41, "name", [Scope.READ], "project"),
        ("team/../a", "name", [Scope.READ], "project"),
        ("team-a", " ", [Scope.READ], "name"),
        ("team-a", "n" * 65, [Scope.READ], "name"),
        ("team-a", "two\nlines", [Scope.READ], "name"),
        ("team-a", "name", [], "scopes"),
    ],
)
def test_invalid_project_name_or_scopes_are_refused(
    registry: KeyRegistry, project: str, name: str, scopes: list[Scope], location: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        registry.create_key(project, name, scopes)
    assert caught.value.location == location
    assert registry.list_keys() == []


def test_first_key_is_created_only_if_no_key_ever_existed(registry: KeyRegistry) -> None:
    created = registry.create_first_key()
    assert created is not None
    key, secret = created
    assert registry.authenticate(secret) == Caller(LOCAL_PROJECT, frozenset(Scope), key.id)
    assert registry.create_first_key() is None
    # After all keys are revoked, a restart gives no access: a new key is created on the machine.
    registry.revoke_key(key.id)
    assert registry.create_first_key() is None


_FIRST_KEY = """
from qlora_service.actions.keys import KeyRegistry
from qlora_service.store.database import Database
def work(url):
    registry = KeyRegistry(Database(url))
    created = registry.create_first_key()
    registry.close()
    return created and created[1]
"""


@pytest.mark.slow
def test_one_of_several_starting_processes_creates_the_first_key(database: Database, registry: KeyRegistry) -> None:
    secrets = run_in_processes(_FIRST_KEY, database.url, processes=4)
    (secret,) = [secret for secret in secrets if secret]
    assert registry.authenticate(secret).project == LOCAL_PROJECT
    assert len(registry.list_keys()) == 1


def test_no_file_contains_a_secret(tmp_path: Path) -> None:
    registry = open_key_registry(f"sqlite:///{tmp_path / 'state.db'}")
    key, secret = registry.create_key("team-a", "laptop")
    registry.authenticate(secret)
    # Also while the database is open: the latest writes are in its WAL.
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    registry.close()
    files += [path.read_bytes() for path in tmp_path.iterdir()]
    assert len(files) >= 3
    assert any(key.id.encode() in content for content in files)
    for text in (secret, secret.removeprefix("qk_")):
        assert not any(text.encode() in content for content in files)
