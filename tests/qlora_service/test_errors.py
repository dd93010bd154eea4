import inspect
import json
import pickle

import pytest

from qlora_service import errors
from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import Finding, InvalidDataset, JobFailed, QLoRAError

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, QLoRAError)]


def test_docstring_tree_has_every_class_under_its_parent() -> None:
    stack: list[str] = []
    drawn = {}
    for line in (errors.__doc__ or "").splitlines():
        name = line.lstrip(" │├└─").split(" ")[0]
        if name in {kind.__name__ for kind in CLASSES}:
            depth = (len(line) - len(line.lstrip(" │├└─"))) // 4 - 1
            stack[depth:] = [name]
            drawn[name] = stack[depth - 1] if depth else "Exception"
    assert drawn == {kind.__name__: kind.__mro__[1].__name__ for kind in CLASSES}


def test_codes_are_distinct_except_those_of_quotas() -> None:
    quota_errors = {errors.ObjectLimitReached, errors.StorageFull}
    assert {kind.code for kind in quota_errors} == {errors.QuotaExceeded.code}
    others = [kind.code for kind in CLASSES if kind not in quota_errors]
    assert len(set(others)) == len(others)


@pytest.mark.parametrize("kind", CLASSES)
def test_error_survives_pickling(kind: type[QLoRAError]) -> None:
    error = kind("what happened", location="/a", findings=[Finding("bad", "/b", 3, 40)], needed_bytes=7)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == "what happened"
    assert copy.as_dict() == error.as_dict()
    assert copy.findings == error.findings


def test_as_dict_is_json_without_unknown_positions() -> None:
    error = InvalidDataset("no good", location="/dataset", findings=[Finding("bad", line=2)], limit=3)
    assert json.loads(json.dumps(error.as_dict())) == {
        "code": "invalid_dataset",
        "message": "no good",
        "location": "/dataset",
        "findings": [{"reason": "bad", "pointer": "", "line": 2}],
        "details": {"limit": 3},
    }


def test_failure_reason_is_a_string_in_json() -> None:
    error = JobFailed("it died", reason=FailureReason.TRAINER_DIED)
    assert json.loads(json.dumps(error.as_dict()))["details"] == {"reason": "trainer_died"}


@pytest.mark.parametrize(
    ("finding", "text"),
    [
        (Finding("bad"), "bad"),
        (Finding("bad", line=4), "line 4: bad"),
        (Finding("bad", "/a/b"), "/a/b: bad"),
        (Finding("bad", "/a/b", 4, 100), "line 4 at /a/b: bad"),
    ],
)
def test_text_of_a_finding_is_its_position_and_reason(finding: Finding, text: str) -> None:
    assert str(finding) == text
