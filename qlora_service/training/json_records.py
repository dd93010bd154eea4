"""Records of what was measured as JSON has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def finite_or_null(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with null for NaN and infinity, which JSON does not have: PostgreSQL refuses them."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
