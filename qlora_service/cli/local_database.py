"""The service's own database, for commands that run on the service's machine. Needs the extra `server`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from qlora_service.errors import Unavailable
from qlora_service.settings import Settings


class _Closable(Protocol):
    def close(self) -> None: ...


Opened = TypeVar("Opened", bound=_Closable)


def has_database(settings: Settings) -> bool:
    """Whether a service has created its SQLite database; always true for a database server."""
    url = make_url(settings.resolved_database_url)
    return url.get_backend_name() != "sqlite" or Path(url.database or "").is_file()


@contextmanager
def open_local_database(settings: Settings, opener: Callable[[str], Opened]) -> Iterator[Opened]:
    """The result of `opener` for the database's URL, closed at the end. Raises: Unavailable."""
    try:
        with closing(opener(settings.resolved_database_url)) as opened:
            yield opened
    except (OSError, SQLAlchemyError) as error:
        raise Unavailable(
            f"the database of {settings.resolved_data_dir} cannot be used ({type(error).__name__}): check that the "
            "directory is the service's and that you may write to it, or set QLORA_DATA_DIR (QLORA_DATABASE_URL)"
        ) from error
