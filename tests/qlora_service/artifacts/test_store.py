import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_service.artifacts.store import READ_CHUNK_BYTES, ArtifactStore, dataset_key, job_key
from qlora_service.errors import Conflict, NotFound

# Two full chunks and a partial one.
CONTENT = random.Random(0).randbytes(2 * READ_CHUNK_BYTES + 12_345)


@pytest.fixture(params=["directory", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    """A local directory, and a store without one (as with S3)."""
    return ArtifactStore((tmp_path / "store").as_uri() if request.param == "directory" else "memory:///")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "a b%20ü"


@pytest.fixture
def local(root: Path) -> ArtifactStore:
    return ArtifactStore(root.as_uri())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(CONTENT)
    return path


def content(chunks: Iterator[bytes]) -> bytes:
    return b"".join(chunks)


def test_stored_file_is_read_back_whole(store: ArtifactStore, source: Path, tmp_path: Path) -> None:
    store.put_file("jobs/a/1/adapter", source)
    assert store.size("jobs/a/1/adapter") == len(CONTENT)
    assert content(store.read("jobs/a/1/adapter")) == CONTENT
    store.fetch("jobs/a/1/adapter", tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == CONTENT
    assert store.local_copy("jobs/a/1/adapter", tmp_path).read_bytes() == CONTENT


def test_empty_file_is_read_back_empty(store: ArtifactStore, source: Path, tmp_path: Path) -> None:
    source.write_bytes(b"")
    store.put_file("empty", source)
    assert store.size("empty") == 0
    assert content(store.read("empty")) == b""
    assert store.local_copy("empty", tmp_path).read_bytes() == b""


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0, None),
        (0, 1),
        (5, 5),
        (7, 1000),
        (READ_CHUNK_BYTES - 1, READ_CHUNK_BYTES + 1),
        (READ_CHUNK_BYTES, 2 * READ_CHUNK_BYTES),
        (3, 2 * READ_CHUNK_BYTES + 3),
        (len(CONTENT) - 1, len(CONTENT)),
        (len(CONTENT) - 10, len(CONTENT) + 10),
        (len(CONTENT) - 10, len(CONTENT) + 3 * READ_CHUNK_BYTES),
        (len(CONTENT), None),
    ],
)
def test_range_excludes_its_end(store: ArtifactStore, source: Path, start: int, end: int | None) -> None:
    store.put_file("a", source)
    chunks = list(store.read("a", start, end))
    assert b"".join(chunks) == CONTENT[start:end]
    assert all(len(chunk) <= READ_CHUNK_BYTES for chunk in chunks)


def test_created_object_is_never_replaced(store: ArtifactStore) -> None:
    store.create("jobs/a/1/manifest.json", b"first")
    with pytest.raises(Conflict, match=r"jobs/a/1/manifest\.json"):
        store.create("jobs/a/1/manifest.json", b"second")
    assert content(store.read("jobs/a/1/manifest.json")) == b"first"


def test_one_of_many_creators_wins(store: ArtifactStore) -> None:
    start = threading.Barrier(8)
    winners: list[bytes] = []

    def create(name: bytes) -> None:
        start.wait()
        try:
            store.create("a", name)
        except Conflict:
            return
        winners.append(name)

    threads = [threading.Thread(target=create, args=(b"%d" % number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert content(store.read("a")) == winners[0]


def test_missing_object_is_not_found_before_the_first_byte(store: ArtifactStore, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nothing"):
        store.size("nothing")
    with pytest.raises(NotFound, match="nothing"):
        store.read("nothing")
    with pytest.raises(NotFound, match="nothing"):
        store.fetch("nothing", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    with pytest.raises(NotFound, match="nothing"):
        store.local_copy("nothing", tmp_path)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("key", ["../secret", "jobs/../../secret", "..", "./secret", "jobs//secret"])
def test_key_outside_the_store_is_refused(local: ArtifactStore, root: Path, key: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    with pytest.raises(ValueError, match="parse path"):
        local.create(key, b"mine")
    with pytest.raises(ValueError, match="parse path"):
        local.read(key)
    with pytest.raises(ValueError, match="parse path"):
        local.local_copy(key, tmp_path)
    assert (tmp_path / "secret").read_bytes() == b"secret"
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("verb", ["put_file", "create"])
def test_object_and_its_directories_are_flushed_after_the_rename(
    local: ArtifactStore, root: Path, source: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[Path] = []
    flush = os.fsync

    def record_flush(descriptor: int) -> None:
        flush(descriptor)
        assert (root / "jobs/a/1/weights").stat().st_size
        flushed.append(Path(f"/proc/self/fd/{descriptor}").resolve())

    monkeypatch.setattr(os, "fsync", record_flush)
    if verb == "put_file":
        local.put_file("jobs/a/1/weights", source)
    else:
        local.create("jobs/a/1/weights", b"content")
    assert flushed == [root / name for name in ("jobs/a/1/weights", "jobs/a/1", "jobs/a", "jobs", "")]


def test_local_copy_in_a_directory_is_the_object(local: ArtifactStore, root: Path, tmp_path: Path) -> None:
    local.create("datasets/1", b"rows")
    assert local.local_copy("datasets/1", tmp_path / "scratch") == root / "datasets/1"
    assert not (tmp_path / "scratch").exists()


def test_put_leaves_no_other_file(local: ArtifactStore, root: Path, source: Path) -> None:
    local.put_file("datasets/1", source)
    local.put_file("datasets/1", source)
    assert [path for path in root.rglob("*") if path.is_file()] == [root / "datasets/1"]


def test_attempts_of_a_job_share_no_key() -> None:
    keys = {job_key(job, token, "a") for job in ("job_1", "job_2") for token in (1, 2, 12)}
    assert len(keys) == 6
    assert dataset_key("f" * 64) == "datasets/" + "f" * 64


def test_only_old_unfinished_files_are_removed(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path.as_uri())
    (tmp_path / "datasets").mkdir()
    old, new, whole = (tmp_path / "datasets" / name for name in ("abc#1", "def#1", "abc"))
    for path in (old, new, whole):
        path.write_text("bytes")
    for path in (old, whole):
        os.utime(path, (0, 0))
    store.remove_unfinished(3600)
    assert [path.exists() for path in (old, new, whole)] == [False, True, True]


def test_datasets_are_listed_by_storage_time(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path.as_uri())
    assert store.datasets_since(0, 0) == []
    (tmp_path / "datasets").mkdir()
    for name, stored_at in (("before", 99), ("a", 100), ("unfinished#1", 100), ("b", 200)):
        (tmp_path / "datasets" / name).write_bytes(b"rows")
        os.utime(tmp_path / "datasets" / name, (stored_at, stored_at))
    store.create("datasets/new", b"rows")
    assert sorted(store.datasets_since(100, 3600)) == ["a", "b"]


def test_remove_attempts_keeps_one_attempt_without_its_unfinished_files(tmp_path: Path) -> None:
    store = ArtifactStore((tmp_path / "store").as_uri())
    (tmp_path / "file").write_text("bytes")
    for token in (1, 2):
        store.put_file(job_key("job_1", token, "README.md"), tmp_path / "file")
    store.put_file(job_key("job_2", 1, "README.md"), tmp_path / "file")
    unfinished = tmp_path / "store" / "jobs" / "job_1" / "2" / "manifest.json#1"
    unfinished.write_text("half")
    store.remove_attempts("job_1", keep=2)
    remaining = sorted(str(path.relative_to(tmp_path / "store")) for path in tmp_path.glob("store/**/*.*"))
    assert remaining == ["jobs/job_1/2/README.md", "jobs/job_2/1/README.md"]
