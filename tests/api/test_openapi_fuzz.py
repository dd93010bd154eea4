"""Fuzzing of a real API against its OpenAPI document: no 5xx, no undocumented status, no undocumented shape.

QLORA_TEST_WIRE_EXAMPLES sets the number of requests per operation.
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
def test_operation_conforms_to_the_document(target: Stand, operation: str) -> None:
    attack(target, operation, EXAMPLES, same_every_time=True)
