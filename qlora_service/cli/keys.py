"""Commands about keys: create, list, revoke. They work on the service's own database, as who owns the machine may."""

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
    from qlora_service.actions.keys import Access

app = typer.Typer(
    help="Make, list and revoke the keys under which the service is used, where it runs.", no_args_is_help=True
)


@app.command("create")
def create_key(
    project: Annotated[
        str, typer.Option(help="Whose jobs and datasets the key opens; one that is new begins with it.")
    ] = LOCAL_PROJECT,
    name: Annotated[str, typer.Option(help="For people: whose it is, or what for.")] = "unnamed",
    scopes: Annotated[
        list[Scope] | None,
        typer.Option(
            "--scope",
            help="read: look and download. submit (default): read, and everything that changes jobs and datasets. "
            "admin: submit, and the project's keys.",
        ),
    ] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, this once: the service keeps a hash of it.

    `export QLORA_API_KEY=$(qlora keys create --name laptop)`
    """
    with local_access(data_dir, may_begin=True) as access:
        key, secret = access.create_key(project, name, scopes or DEFAULT_SCOPES)
    if as_json:
        print_json(key.as_dict() | {"secret": secret})
    else:
        print_note(f"key {key.id} of project {project}, for {_scopes(key)}; it is shown this once:")
        typer.echo(secret)


@app.command("list")
def list_keys(
    project: Annotated[str | None, typer.Option(help="Only keys of this project.")] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """List keys, newest first, also those that were revoked. The keys themselves are stored nowhere."""
    with local_access(data_dir) as access:
        keys = access.list_keys(project)
    if as_json:
        print_json([key.as_dict() for key in keys])
    elif keys:
        rows = [
            (key.id, key.project, key.name, _scopes(key), f"{key.created_at:%Y-%m-%d}", _revoked(key)) for key in keys
        ]
        print_table(("id", "project", "name", "scopes", "made", "revoked"), rows)
    else:
        print_note("no keys yet: the first start of the service makes one, `qlora keys create` more")


@app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="KEY_ID", help="As printed by create and list; not the key itself.")],
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Revoke a key: a running service refuses it within a second. What was made with it stays."""
    if key_id.startswith(SECRET_PREFIX):
        raise WrongUsage("this is a key itself: revoke it by its id, which `qlora keys list` shows")
    with local_access(data_dir) as access:
        key = access.revoke_key(key_id)
    if as_json:
        print_json(key.as_dict())
    else:
        print_note(f"revoked {key.id}, {key.name!r} of project {key.project}")


@contextmanager
def local_access(data_dir: Path | None, *, may_begin: bool = False) -> Iterator[Access]:
    """The keys of the data directory's service; with `may_begin` also where none has run yet. Raises: Unavailable."""
    from qlora_service.settings import read_settings

    try:
        from qlora_service.actions.keys import open_access
        from qlora_service.cli.local_database import at_local_database, has_begun
    except ModuleNotFoundError as error:
        raise Unavailable(
            f"{error.name} is not installed: keys are made where the service runs, with "
            "pip install 'qlora-service[server]'; a remote admin uses POST /keys"
        ) from None
    settings = read_settings(data_dir=data_dir)
    if not may_begin and not has_begun(settings):
        raise Unavailable(
            f"{settings.resolved_data_dir} is not a service's data directory, or no service has run there yet: name "
            "the service's with --data-dir or QLORA_DATA_DIR"
        )
    with at_local_database(settings, open_access) as access:
        yield access


def _scopes(key: ApiKey) -> str:
    return ", ".join(key.as_dict()["scopes"])


def _revoked(key: ApiKey) -> str:
    return "" if key.revoked_at is None else f"{key.revoked_at:%Y-%m-%d}"
