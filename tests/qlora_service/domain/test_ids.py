import re
import time

from qlora_service.domain.ids import new_id


def test_id_names_its_kind_and_is_unique() -> None:
    ids = {new_id("job") for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch(r"job_[0-9a-f]{22}", id_) for id_ in ids)


def test_later_id_sorts_after_an_earlier_one() -> None:
    ids = []
    for _ in range(5):
        ids.append(new_id("job"))
        time.sleep(0.002)
    assert ids == sorted(ids)


def test_id_holds_the_milliseconds_since_1970() -> None:
    assert abs(int(new_id("ds")[3:15], 16) / 1000 - time.time()) < 5
