"""Atomic checkpoints on the local disk.

    <directory>/step-00000012.a3/      after 12 steps, by the attempt with the fencing token 3
        parameters.safetensors …       the training state (`state.to_files`)
        metrics.jsonl                  the metrics of those 12 steps
        environment.json               software and hardware that the steps ran on
        manifest.json                  size and SHA-256 of each file, written last

A checkpoint is written to a staging directory, every file is flushed, then the directory is renamed. A checkpoint that
differs from its manifest is set aside, and the previous one is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from peft import AdaLoraConfig

from qlora_service.process.fsync import flush
from qlora_service.specs import Training
from qlora_service.training.checkpoint.state import BEST, TrainingState, from_files, to_files
from qlora_service.training.network.network import Network
from qlora_service.training.optimizer import optimizer_state_bytes
from qlora_service.training.sizes import KEPT_CHECKPOINTS, ROW_BYTES, SMALL_FILES_BYTES, STEP_BYTES

METRICS, ENVIRONMENT, MANIFEST = "metrics.jsonl", "environment.json", "manifest.json"
# A replaced checkpoint has the suffix ".old" until it is removed.
_NAME = re.compile(r"step-(?P<step>\d{8,})\.a(?P<token>\d+)(?P<old>\.old)?")
_LEFTOVER = re.compile(r"(staging|removed|bad)-step-\d{8,}\.a(?P<token>\d+)(\.old)?")

log = structlog.get_logger()


@dataclass(frozen=True)
class _Entry:
    """Directory of a checkpoint."""

    path: Path
    step: int
    token: int
    is_replaced: bool

    @property
    def order(self) -> tuple[int, int, bool]:
        """Sort key: later steps and newer attempts are greater."""
        return self.step, self.token, not self.is_replaced


class Checkpoints:
    """Checkpoints of a job, for the attempt with `token`. One thread writes them in the background."""

    def __init__(self, directory: Path, token: int) -> None:
        self._directory, self._token = directory, token
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.durable_step: int | None = None
        """Completed steps in the newest checkpoint known to be on the disk; None without one"""

    def save(self, state: TrainingState, metrics: bytes, environment: dict[str, Any]) -> None:
        """Starts to write a checkpoint in the background, after the previous one is on the disk.

        Raises:
            OSError: the previous one could not be written (ENOSPC: the disk is full); older ones are intact.
        """
        self.flush()
        self._writing = self._writer.submit(self._write, state, metrics, environment)

    def flush(self) -> None:
        """Waits until the saved checkpoint is on the disk.

        Raises:
            OSError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def latest(self) -> tuple[TrainingState, bytes, dict[str, Any]] | None:
        """State, metrics and environment of the intact checkpoint with the most steps; None without one.

        Sizes and hashes of all files are compared with the manifest before any is parsed. Damaged checkpoints are set
        aside under names that begin with `bad-`, and deleted when the next one is written.
        """
        self.flush()
        for entry in self._entries():
            try:
                files = _verified_files(entry)
                checkpoint = from_files(files), files[METRICS], json.loads(files[ENVIRONMENT])
            except MemoryError:
                raise  # the checkpoint may be intact
            except Exception as error:  # noqa: BLE001 - whatever the damage, the previous checkpoint may be intact
                log.warning("checkpoint_damaged", checkpoint=str(entry.path), error=f"{type(error).__name__}: {error}")
                with suppress(OSError):
                    _set_aside(entry.path, "bad")
                continue
            self.durable_step = entry.step
            return checkpoint
        return None

    def bytes_on_disk(self) -> int:
        """Bytes of the checkpoints' files; a file that two checkpoints share counts once."""
        size_by_inode = {}
        for entry in self._entries():
            with suppress(OSError):
                for file in entry.path.iterdir():
                    status = file.stat()
                    size_by_inode[status.st_ino] = status.st_size
        return sum(size_by_inode.values())

    def _write(self, state: TrainingState, metrics: bytes, environment: dict[str, Any]) -> None:
        _make_directory(self._directory)
        final = self._directory / f"step-{state.step:08d}.a{self._token}"
        staging = final.with_name(f"staging-{final.name}")
        files = to_files(state) | {METRICS: metrics, ENVIRONMENT: json.dumps(environment).encode()}
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir()
            for name, data in files.items():
                if not (name == BEST and self._link_best(staging / BEST, digests[BEST], final)):
                    _write_file(staging / name, data)
            manifest_files = {name: {"bytes": len(data), "sha256": digests[name]} for name, data in files.items()}
            _write_file(staging / MANIFEST, _manifest(state.step, self._token, manifest_files))
            flush(staging)
            if final.exists():
                # The same step again, now with its evaluation: at every moment one of the two can be loaded.
                replaced = final.with_name(final.name + ".old")
                shutil.rmtree(replaced, ignore_errors=True)
                final.rename(replaced)
            staging.rename(final)
        finally:
            # It still exists if writing failed; on a full disk its bytes are needed.
            shutil.rmtree(staging, ignore_errors=True)
        flush(self._directory)
        self.durable_step = state.step
        self._prune(final)

    def _link_best(self, path: Path, digest: str, final: Path) -> bool:
        """Whether the best weights were hard-linked from an older checkpoint, so that they need not be written.

        Never from the checkpoint that is kept beside the new one: damage to a shared file would destroy both.
        """
        entries = self._entries()
        kept = next((entry for entry in entries if entry.path != final), None)
        for entry in entries:
            with suppress(OSError):
                if entry != kept and _digest(entry.path / BEST) == digest:
                    os.link(entry.path / BEST, path)
                    return True
        return False

    def _prune(self, newest: Path) -> None:
        """Deletes all but the last checkpoints, and leftovers of dead attempts; never files of a newer attempt."""
        entries = self._entries()
        current = [entry for entry in entries if not entry.is_replaced]
        for entry in entries:
            if entry not in current[:KEPT_CHECKPOINTS] and entry.path != newest and entry.token <= self._token:
                with suppress(OSError):
                    _set_aside(entry.path, "removed")
        for path in self._directory.iterdir():
            leftover = _LEFTOVER.fullmatch(path.name)
            if leftover and int(leftover["token"]) <= self._token:
                shutil.rmtree(path, ignore_errors=True)

    def _entries(self) -> list[_Entry]:
        """The checkpoints, most steps first."""
        with suppress(FileNotFoundError):
            return sorted(_checkpoints(self._directory), key=lambda entry: entry.order, reverse=True)
        return []


def expected_bytes(network: Network, training: Training, *, rows: int = 0, total_steps: int = 0) -> int:
    """Upper bound of the bytes of one checkpoint, for a job with `rows` training rows and `total_steps` steps."""
    adapter = sum(p.numel() * p.element_size() for p in network.model.parameters() if p.requires_grad)
    copies = 1 + training.load_best_model_at_end
    if isinstance(network.model.active_peft_config, AdaLoraConfig):
        copies += 3  # the importance of each weight, and its two running means
    tensors = sum(1 for p in network.model.parameters() if p.requires_grad)
    # A file header names every tensor: about ten per parameter, with AdaLoRA's and the optimizer's.
    headers = tensors * 10 * 256
    return (
        copies * adapter
        + optimizer_state_bytes(network.model, training)
        + headers
        + rows * ROW_BYTES
        + total_steps * STEP_BYTES
        + SMALL_FILES_BYTES
    )


def _checkpoints(directory: Path) -> Iterator[_Entry]:
    for path in directory.iterdir():
        if name := _NAME.fullmatch(path.name):
            yield _Entry(path, int(name["step"]), int(name["token"]), bool(name["old"]))


def _verified_files(entry: _Entry) -> dict[str, bytes]:
    """File contents by name. Raises: ValueError, OSError or another error, if they differ from the manifest."""
    manifest = (entry.path / MANIFEST).read_bytes()
    expected_files = json.loads(manifest)["files"]
    if manifest != _manifest(entry.step, entry.token, expected_files):
        raise ValueError("the manifest differs from what was written")
    files = {}
    for name, expected in expected_files.items():
        path = entry.path / name
        if path.stat().st_size != expected["bytes"]:
            raise ValueError(f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        files[name] = path.read_bytes()
        if hashlib.sha256(files[name]).hexdigest() != expected["sha256"]:
            raise ValueError(f"the SHA-256 of {name} differs from the manifest's")
    return files


def _manifest(step: int, token: int, files: dict[str, Any]) -> bytes:
    """Contents of the manifest; the same arguments always give the same bytes."""
    return json.dumps({"step": step, "token": token, "files": files}, indent=1, sort_keys=True).encode()


def _set_aside(path: Path, prefix: str) -> None:
    """Renames a checkpoint out of the list in one step, so that a half deleted directory is never taken as one."""
    target = path.with_name(f"{prefix}-{path.name}")
    shutil.rmtree(target, ignore_errors=True)
    path.rename(target)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_file(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _make_directory(directory: Path) -> None:
    """Creates a directory and its parents, and flushes their names to the disk."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        flush(path.parent)
