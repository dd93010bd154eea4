from __future__ import annotations

import hashlib
import re

import pytest

from qlora_service.domain.keys import PREFIX, Scope, digest, new_secret, with_included


def test_keys_are_256_random_bits_that_need_no_quoting() -> None:
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    # 32 bytes are 43 characters of 6 bits.
    assert all(re.fullmatch(rf"{PREFIX}[A-Za-z0-9_-]{{43}}", secret) for secret in secrets)


def test_key_is_stored_as_its_sha256() -> None:
    assert digest("qk_a") == hashlib.sha256(b"qk_a").hexdigest()
    assert digest("qk_\udc80") != digest("qk_\udc81")


@pytest.mark.parametrize(
    ("scopes", "expected"),
    [
        ([], set()),
        ([Scope.READ], {Scope.READ}),
        ([Scope.SUBMIT], {Scope.READ, Scope.SUBMIT}),
        ([Scope.ADMIN], {Scope.READ, Scope.SUBMIT, Scope.ADMIN}),
        ([Scope.READ, Scope.SUBMIT], {Scope.READ, Scope.SUBMIT}),
    ],
)
def test_scope_includes_the_lower_scopes(scopes: list[Scope], expected: set[Scope]) -> None:
    assert with_included(scopes) == expected
