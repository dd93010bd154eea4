"""Pages of rows by id. Ids are sortable by age (`domain.ids`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa


@dataclass(frozen=True)
class PageRequest:
    """Which rows of a list are wanted: up to `limit` with ids between `after` and `before`, both exclusive."""

    limit: int
    before: str | None = None
    after: str | None = None
    oldest_first: bool = False

    def of(self, query: sa.Select[Any], ids: sa.Column[str]) -> sa.Select[Any]:
        """The query's rows on this page, in order."""
        query = query.order_by(ids if self.oldest_first else ids.desc()).limit(self.limit)
        if self.before is not None:
            query = query.where(ids < self.before)
        if self.after is not None:
            query = query.where(ids > self.after)
        return query
