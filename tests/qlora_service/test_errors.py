import inspect
import json
import pickle

import pytest

from qlora_service import errors
from qlora_service.domain.jobs import FailureReason
from qlora_service.errors import Finding, InvalidDataset, JobFailed, QLoRAError

CLASSES = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, QLoRAError)]


def test_every_class_is_drawn_in_the_tree_under_its_parent() -> None:
    stack: list[str] = []
    drawn = {}
    for line in (errors.__doc__ or "").splitlines():
        name = line.lstrip(" │├└─").split(" ")[0]
        if name in {kind.__name__ for kind in CLASSES}:
            depth = (len(line) - len(line.lstrip(" │├└─"))) // 4 - 1
            stack[depth:] = [name]
            drawn[name] = stack[depth - 1] if depth else "Exception"
    assert drawn == {kind.__name__: kind.__mro__[1].__name__ for kind in CLASSES}


def test_codes_are_distinct_but_for_kinds_of_a_quota() -> None:
    kinds_of_quota = {errors.NoRoom, errors.StorageFull}
    assert {kind.code for kind in kinds_of_quota} == {errors.QuotaExceeded.code}
    others = [kind.code for kind in CLASSES if kind not in kinds_of_quota]
    assert len(set(others)) == len(others)


@pytest.mark.parametrize("kind", CLASSES)
def test_error_survives_pickling_whole(kind: type[QLoRAError]) -> None:
    error = kind("what happened", location="/a", findings=[Finding("bad", "/b", 3, 40)], needed_bytes=7)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == "what happened"
    assert copy.as_dict() == error.as_dict()
    assert copy.findings == error.findings


def test_wire_shape_is_json_and_leaves_out_places_that_are_unknown() -> None:
    error = InvalidDataset("no good", location="/dataset", findings=[Finding("bad", line=2)], limit=3)
    assert json.loads(json.dumps(error.as_dict())) == {
        "code": "invalid_dataset",
        "message": "no good",
        "location": "/dataset",
        "findings": [{"reason": "bad", "pointer": "", "line": 2}],
        "details": {"limit": 3},
    }


def test_failure_reason_is_plain_text_on_the_wire() -> None:
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
def test_finding_reads_as_place_and_reason(finding: Finding, text: str) -> None:
    assert str(finding) == text
