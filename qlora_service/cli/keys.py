"""Commands for API keys: create, list, revoke. They use the service's own database, on its machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_service.cli.options import AsJson, DataDir, WrongUsage, print_json, print_note, print_table
from qlora_service.domain.keys import DEFAULT_SCOPES, LOCAL_PROJECT, ApiKey, Scope
from qlora_service.domain.keys import PREFIX as SECRET_PREFIX
from qlora_service.errors import Unavailable

if TYPE_CHECKING:
    from qlora_service.actions.keys import KeyRegistry

app = typer.Typer(
    help="Create, list and revoke keys for the service. Run these commands on its machine.", no_args_is_help=True
)


@app.command("create")
def create_key(
    project: Annotated[
        str, typer.Option(help="Project whose jobs and datasets the key gives access to; created if new.")
    ] = LOCAL_PROJECT,
    name: Annotated[str, typer.Option(help="Label for people: the key's owner or purpose.")] = "unnamed",
    scopes: Annotated[
        list[Scope] | None,
        typer.Option(
            "--scope",
            help="read: look and download. submit (default): also change jobs and datasets. "
            "admin: also create and revoke the project's keys.",
        ),
    ] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Create a key and print it. It is shown only once: the service stores a hash of it.

    `export QLORA_API_KEY=$(qlora keys create --name laptop)`
    """
    with open_local_keys(data_dir, create=True) as registry:
        key, secret = registry.create_key(project, name, scopes or DEFAULT_SCOPES)
    if as_json:
        print_json(key.as_dict() | {"secret": secret})
    else:
        print_note(f"key {key.id} of project {project}, scope {_scopes(key)}; it is shown only once:")
        typer.echo(secret)


@app.command("list")
def list_keys(
    project: Annotated[str | None, typer.Option(help="Only keys of this project.")] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List keys, newest first, including revoked ones. The secrets are not stored and not shown."""
    with open_local_keys(data_dir) as registry:
        keys = registry.list_keys(project)
    if as_json:
        print_json([key.as_dict() for key in keys])
    elif keys:
        rows = [
            (key.id, key.project, key.name, _scopes(key), f"{key.created_at:%Y-%m-%d}", _revoked(key)) for key in keys
        ]
        print_table(("id", "project", "name", "scopes", "created", "revoked"), rows)
    else:
        print_note("no keys yet: the first start of the service creates one, `qlora keys create` more")


@app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="KEY_ID", help="As printed by create and list; not the key itself.")],
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Revoke a key: a running service refuses it within a second. Jobs and datasets created with it are kept."""
    if key_id.startswith(SECRET_PREFIX):
        raise WrongUsage("this is the key itself: revoke it by its id, which `qlora keys list` shows")
    with open_local_keys(data_dir) as registry:
        key = registry.revoke_key(key_id)
    if as_json:
        print_json(key.as_dict())
    else:
        print_note(f"revoked {key.id}, {key.name!r} of project {key.project}")


@contextmanager
def open_local_keys(data_dir: Path | None, *, create: bool = False) -> Iterator[KeyRegistry]:
    """The keys of the service with this data directory; `create` creates a missing database.

    Raises:
        Unavailable: the server's packages are not installed, or there is no database.
    """
    from qlora_service.settings import read_settings

    try:
        from qlora_service.actions.keys import open_key_registry
        from qlora_service.cli.local_database import has_database, open_local_database
    except ModuleNotFoundError as error:
        raise Unavailable(
            f"{error.name} is not installed: keys are created on the service's machine, with "
            "pip install 'qlora-service[server]'; a remote admin uses POST /keys"
        ) from None
    settings = read_settings(data_dir=data_dir)
    if not create and not has_database(settings):
        raise Unavailable(
            f"{settings.resolved_data_dir} is not a service's data directory, or no service has run there yet: give "
            "the service's data directory with --data-dir or QLORA_DATA_DIR"
        )
    with open_local_database(settings, open_key_registry) as registry:
        yield registry


def _scopes(key: ApiKey) -> str:
    return ", ".join(key.as_dict()["scopes"])


def _revoked(key: ApiKey) -> str:
    return "" if key.revoked_at is None else f"{key.revoked_at:%Y-%m-%d}"
