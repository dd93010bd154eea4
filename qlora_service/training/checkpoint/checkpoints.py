"""Checkpoints on the local disk: whole or not there at all.

    <directory>/step-00000012.a3/      after 12 steps, by the attempt whose token is 3
        parameters.safetensors …       the training's state (`state.to_files`)
        metrics.jsonl                  the metrics of those 12 steps
        environment.json               what they ran on
        manifest.json                  size and SHA-256 of each, written last

A checkpoint is written to a staging directory, every file flushed, then renamed. One that is not exactly what its
manifest says is set aside, and the one before it is taken.
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
# A replaced checkpoint has ".old" behind its name until it is removed.
_NAME = re.compile(r"step-(?P<step>\d{8,})\.a(?P<token>\d+)(?P<old>\.old)?")
_LEFTOVER = re.compile(r"(staging|removed|bad)-step-\d{8,}\.a(?P<token>\d+)(\.old)?")

log = structlog.get_logger()


@dataclass(frozen=True)
class _Entry:
    """A checkpoint's directory."""

    path: Path
    step: int
    token: int
    is_replaced: bool

    @property
    def order(self) -> tuple[int, int, bool]:
        return self.step, self.token, not self.is_replaced


class Checkpoints:
    """A job's checkpoints, as the attempt with `token` sees them."""

    def __init__(self, directory: Path, token: int) -> None:
        self._directory, self._token = directory, token
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.durable_step: int | None = None
        """Steps in the newest checkpoint that is known to be on the disk; None before there is one"""

    def save(self, state: TrainingState, metrics: bytes, environment: dict[str, Any]) -> None:
        """Start to write a checkpoint, once the one before is on the disk.

        Raises:
            OSError: the one before could not be written (ENOSPC: the disk is full). What was there is unharmed.
        """
        self.flush()
        self._writing = self._writer.submit(self._write, state, metrics, environment)

    def flush(self) -> None:
        """Wait until what was saved is on the disk.

        Raises:
            OSError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def latest(self) -> tuple[TrainingState, bytes, dict[str, Any]] | None:
        """State, metrics and environment of the checkpoint with the most steps that is whole; None without one.

        Sizes and hashes of all files are compared with the manifest before any is read. Damaged checkpoints are set
        aside under names that begin with `bad-`, until the next one is written.
        """
        self.flush()
        for entry in self._entries():
            try:
                files = _verified_files(entry)
                found = from_files(files), files[METRICS], json.loads(files[ENVIRONMENT])
            except MemoryError:
                raise  # it says nothing about the checkpoint
            except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the one before may be whole
                log.warning("checkpoint_damaged", checkpoint=str(entry.path), error=f"{type(error).__name__}: {error}")
                with suppress(OSError):
                    _set_aside(entry.path, "bad")
                continue
            self.durable_step = entry.step
            return found
        return None

    def bytes_on_disk(self) -> int:
        """What the checkpoints take, counting a file once that two of them share."""
        found = {}
        for entry in self._entries():
            with suppress(OSError):
                for file in entry.path.iterdir():
                    status = file.stat()
                    found[status.st_ino] = status.st_size
        return sum(found.values())

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
            listed = {name: {"bytes": len(data), "sha256": digests[name]} for name, data in files.items()}
            _write_file(staging / MANIFEST, _manifest(state.step, self._token, listed))
            flush(staging)
            if final.exists():
                # The same step once more, with its evaluation: at every moment one of the two can be loaded.
                replaced = final.with_name(final.name + ".old")
                shutil.rmtree(replaced, ignore_errors=True)
                final.rename(replaced)
            staging.rename(final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)  # there is one if it failed: on a full disk its bytes are needed
        flush(self._directory)
        self.durable_step = state.step
        self._prune(final)

    def _link_best(self, path: Path, digest: str, final: Path) -> bool:
        """Whether the best weights did not have to be written, because an older checkpoint holds them.

        Never the one that stays beside the new one: damage to a file that both share would take both.
        """
        entries = self._entries()
        stays = next((entry for entry in entries if entry.path != final), None)
        for entry in entries:
            with suppress(OSError):
                if entry != stays and _digest(entry.path / BEST) == digest:
                    os.link(entry.path / BEST, path)
                    return True
        return False

    def _prune(self, newest: Path) -> None:
        """Remove all but the last checkpoints, and what dead attempts left; nothing that a newer attempt wrote."""
        entries = self._entries()
        whole = [entry for entry in entries if not entry.is_replaced]
        for entry in entries:
            if entry not in whole[:KEPT_CHECKPOINTS] and entry.path != newest and entry.token <= self._token:
                with suppress(OSError):
                    _set_aside(entry.path, "removed")
        for path in self._directory.iterdir():
            leftover = _LEFTOVER.fullmatch(path.name)
            if leftover and int(leftover["token"]) <= self._token:
                shutil.rmtree(path, ignore_errors=True)

    def _entries(self) -> list[_Entry]:
        """The checkpoints, those with the most steps first."""
        with suppress(FileNotFoundError):
            return sorted(_checkpoints(self._directory), key=lambda entry: entry.order, reverse=True)
        return []


def expected_bytes(network: Network, training: Training, *, rows: int = 0, total_steps: int = 0) -> int:
    """What one checkpoint takes at most, for a job of so many training rows and steps."""
    adapter = sum(p.numel() * p.element_size() for p in network.model.parameters() if p.requires_grad)
    copies = 1 + training.load_best_model_at_end
    if isinstance(network.model.active_peft_config, AdaLoraConfig):
        copies += 3  # importance, and its two running means
    tensors = sum(1 for p in network.model.parameters() if p.requires_grad)
    # A header names every tensor; with AdaLoRA's and the optimizer's there are about ten for each parameter.
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
    """The files' contents by name. Raises: ValueError, OSError or another, if they are not what the manifest says."""
    text = (entry.path / MANIFEST).read_bytes()
    listed = json.loads(text)["files"]
    if text != _manifest(entry.step, entry.token, listed):
        raise ValueError("the manifest is not as it was written")
    files = {}
    for name, expected in listed.items():
        path = entry.path / name
        if path.stat().st_size != expected["bytes"]:
            raise ValueError(f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        files[name] = path.read_bytes()
        if hashlib.sha256(files[name]).hexdigest() != expected["sha256"]:
            raise ValueError(f"{name} has another SHA-256 than the manifest says")
    return files


def _manifest(step: int, token: int, files: dict[str, Any]) -> bytes:
    """The only bytes that a manifest of these files can be."""
    return json.dumps({"step": step, "token": token, "files": files}, indent=1, sort_keys=True).encode()


def _set_aside(path: Path, why: str) -> None:
    """Take a checkpoint out of sight, in one step: what is half removed is no checkpoint any more."""
    aside = path.with_name(f"{why}-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_file(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _make_directory(directory: Path) -> None:
    """Make a directory whose name is on the disk, as those of its parents."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        flush(path.parent)
