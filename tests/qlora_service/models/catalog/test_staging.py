"""Staging directories of processes that live, fail and die."""

import subprocess
import sys
from pathlib import Path

import pytest

from qlora_service.models.catalog.staging import discard, reap_stale, staging_directory

WRITER = """
import sys
from pathlib import Path
from qlora_service.models.catalog.staging import staging_directory
with staging_directory(Path(sys.argv[1])) as staged:
    (staged.path / "half").write_text("written")
    print(flush=True)
    sys.stdin.read()
"""


def test_published_directory_is_complete_and_leaves_no_staging(tmp_path: Path) -> None:
    with staging_directory(tmp_path / "models") as staged:
        (staged.path / "file").write_text("x")
        staged.publish(tmp_path / "models/name")
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["name"]
    assert (tmp_path / "models/name/file").read_text() == "x"


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staging_directory(tmp_path) as staged:
        (staged.path / "no-such-folder/file").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_second_publisher_of_a_name_fails_and_changes_nothing(tmp_path: Path) -> None:
    with staging_directory(tmp_path) as first, staging_directory(tmp_path) as second:
        (first.path / "file").write_text("first")
        (second.path / "file").write_text("second")
        first.publish(tmp_path / "name")
        with pytest.raises(FileExistsError):
            second.publish(tmp_path / "name")
    assert (tmp_path / "name/file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_only_the_staging_of_a_dead_writer_is_deleted(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        reap_stale(tmp_path)
        assert len(list(tmp_path.glob(".staging-*/half"))) == 1
        writer.kill()
        writer.wait()
    assert len(list(tmp_path.glob(".staging-*/half"))) == 1
    reap_stale(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_staging_is_kept_while_a_child_with_the_inherited_lock_lives(tmp_path: Path) -> None:
    with staging_directory(tmp_path) as staged:
        child = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, pass_fds=(staged.lock_fd,))
        staged.path.rename(tmp_path / ".staging-orphan")  # so that the context does not delete it at its end
    with child:
        reap_stale(tmp_path)
        assert (tmp_path / ".staging-orphan").is_dir()
        child.communicate()
    reap_stale(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_discarded_directory_is_gone(tmp_path: Path) -> None:
    (tmp_path / "name").mkdir()
    (tmp_path / "name/file").write_text("x")
    discard(tmp_path / "name")
    assert list(tmp_path.iterdir()) == []
