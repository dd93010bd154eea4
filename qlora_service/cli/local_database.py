"""The service's own database, for commands that are run where the service runs. Needs the extra `server`."""

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


def has_begun(settings: Settings) -> bool:
    """Whether a service has run on the data directory; a database server is taken to know one."""
    url = make_url(settings.resolved_database_url)
    return url.get_backend_name() != "sqlite" or Path(url.database or "").is_file()


@contextmanager
def at_local_database(settings: Settings, opener: Callable[[str], Opened]) -> Iterator[Opened]:
    """What `opener` makes of the database's address, closed at the end. Raises: Unavailable."""
    try:
        with closing(opener(settings.resolved_database_url)) as opened:
            yield opened
    except (OSError, SQLAlchemyError) as error:
        raise Unavailable(
            f"the database of {settings.resolved_data_dir} cannot be used ({type(error).__name__}): see that the "
            "directory is the service's and yours to write, or set QLORA_DATA_DIR (QLORA_DATABASE_URL)"
        ) from error
