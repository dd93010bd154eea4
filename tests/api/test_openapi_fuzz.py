"""What the OpenAPI document promises, at a real API: no 5xx, no status and no shape that it does not name.

QLORA_TEST_WIRE_EXAMPLES is how many requests every operation gets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.wire import Stand, attack, operations, stand

EXAMPLES = int(os.environ.get("QLORA_TEST_WIRE_EXAMPLES", "50"))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Stand]:
    with stand(tmp_path_factory.mktemp("wire"), tiny_model) as target:
        yield target


@pytest.mark.parametrize("operation", operations())
def test_operation_keeps_what_the_document_promises(target: Stand, operation: str) -> None:
    attack(target, operation, EXAMPLES, same_every_time=True)
