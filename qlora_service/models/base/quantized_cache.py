"""Cache of quantized bases on the local disk: a base is quantized once, not before every job.

    <directory>/<key>.lock     shared while the entry is read, exclusive while it is written or removed
    <directory>/<key>/         an ordinary Hugging Face directory whose weights are quantized
        manifest.json          the base's identity; size and SHA-256 of every other file; its mtime is the last use

The key is a hash of everything that the bytes depend on. An entry is complete or absent, and is compared with its
manifest before every use. Imports neither torch nor transformers.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import structlog

from qlora_service.models.catalog import staging
from qlora_service.models.catalog.catalog import BaseModel
from qlora_service.specs import Quantization

log = structlog.get_logger(__name__)

MANIFEST = "manifest.json"
LAYOUT_VERSION = 1
"""Version of an entry's layout; a change invalidates all earlier entries."""
VERSIONED_PACKAGES = ("bitsandbytes", "transformers", "torch")
"""The packages that decide which weights are quantized, and to which bytes."""
MIN_FREE_DISK_BYTES = 2 * 2**30
"""Bytes that stay free on the disk: jobs need them for checkpoints, and would wait for them."""


@dataclass(frozen=True)
class BaseIdentity:
    """Everything that the bytes of a quantized base depend on.

    The weights are cast to the compute dtype before they are quantized. The device counts, because the kernels of a
    GPU may round differently from those of a CPU.
    """

    weights_sha256: str
    config_sha256: str
    quantization: str
    double_quant: bool
    compute_dtype: str
    device: str
    versions: dict[str, str]
    layout: int = LAYOUT_VERSION

    @classmethod
    def of(cls, base: BaseModel, quantization: Quantization, compute_dtype: str, device: str) -> BaseIdentity:
        """The identity of the catalog's `base`; `device` is a kind, cuda or cpu."""
        config = hashlib.sha256()
        for name in ("config.json", "generation_config.json"):
            path = base.path / name
            config.update(hashlib.sha256(path.read_bytes() if path.exists() else b"").digest())
        return cls(
            weights_sha256=base.weights_sha256,
            config_sha256=config.hexdigest(),
            quantization=quantization.type,
            double_quant=quantization.double_quant,
            compute_dtype=compute_dtype,
            device=device,
            versions={name: version(name) for name in VERSIONED_PACKAGES},
        )

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class StoredBase:
    """An entry on the disk; `identity` is empty if its manifest cannot be read."""

    path: Path
    size_bytes: int
    last_used: datetime
    base_model: str
    identity: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The entry as JSON values, without its path."""
        return {
            "key": self.path.name,
            "base_model": self.base_model,
            "bytes": self.size_bytes,
            "last_used": self.last_used.isoformat(),
            **{name: self.identity.get(name) for name in ("quantization", "double_quant", "compute_dtype", "device")},
        }


class QuantizedCache:
    """The entries in `directory`, limited to `max_bytes` in total."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory, self.max_bytes = directory, max_bytes

    def open(self, identity: BaseIdentity) -> LockedEntry:
        """The entry of one base, locked for reading; waits while another process writes or removes it.

        Raises:
            OSError: the directory or the lock file cannot be written.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        return LockedEntry(self, identity)

    def entries(self) -> list[StoredBase]:
        """All entries, the least recently used first."""
        if not self.directory.is_dir():
            return []
        entries = []
        for path in self.directory.iterdir():
            if path.is_dir() and not path.name.startswith("."):
                with suppress(FileNotFoundError):  # removed by another process
                    entries.append(_describe(path))
        return sorted(entries, key=lambda entry: entry.last_used)

    def clear(self) -> list[StoredBase]:
        """Removes the leftovers of crashes and every entry that no process is loading; returns the removed entries."""
        staging.reap_stale(self.directory)
        return [entry for entry in self.entries() if self._remove(entry.path)]

    def evict_for(self, size_bytes: int, keep: str) -> None:
        """Removes the least recently used entries, except the one named `keep`, until `size_bytes` more fit.

        Raises:
            ValueError: they do not fit; the text says why.
        """
        if size_bytes > self.max_bytes:
            raise ValueError(f"the entry takes {size_bytes} bytes, the whole cache is limited to {self.max_bytes}")
        entries = [entry for entry in self.entries() if entry.path.name != keep]
        total_bytes = sum(entry.size_bytes for entry in entries)
        for entry in entries:
            if total_bytes + size_bytes <= self.max_bytes and self._fits_on_disk(size_bytes):
                return
            if self._remove(entry.path):
                total_bytes -= entry.size_bytes
                log.info("quantized_base_evicted", entry=entry.path.name, base_model=entry.base_model)
        if total_bytes + size_bytes > self.max_bytes:
            raise ValueError(f"the entry takes {size_bytes} bytes, and other entries are being loaded")
        if not self._fits_on_disk(size_bytes):
            raise ValueError(
                f"the entry takes {size_bytes} bytes, and {MIN_FREE_DISK_BYTES} must stay free on the disk"
            )

    def _fits_on_disk(self, size_bytes: int) -> bool:
        return shutil.disk_usage(self.directory).free >= size_bytes + MIN_FREE_DISK_BYTES

    def _remove(self, path: Path) -> bool:
        """Whether the entry is gone; an entry that a process is loading stays.

        A process that has the entry's files mapped into memory keeps them until it unmaps them. The lock file stays:
        all processes that open this entry must use the same lock file, including those that already wait for it.
        """
        descriptor = _open_lock(self.directory, path.name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            staging.discard(path)
        except BlockingIOError:
            return False
        except FileNotFoundError:
            pass  # removed by another process
        finally:
            os.close(descriptor)
        return True


class LockedEntry:
    """One base's cache entry, locked; a context manager. Many processes may read it, only one may write it."""

    def __init__(self, cache: QuantizedCache, identity: BaseIdentity) -> None:
        self._cache, self._identity = cache, identity
        self._path = cache.directory / identity.key
        self._descriptor = _open_lock(cache.directory, identity.key)
        self._is_exclusive = False
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def lock_for_writing(self) -> None:
        """Waits for the exclusive lock. Another process may have written meanwhile: call `find` again."""
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self._is_exclusive = True

    def find(self) -> Path | None:
        """The entry's directory, with every byte checked against the manifest; None if it is absent or damaged.

        Marks the entry as the most recently used. Removes a damaged entry if the lock is exclusive.
        """
        if not self._path.exists():
            return None
        try:
            _verify(self._path, self._identity)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if self._is_exclusive:
                self.discard(str(error))
            return None
        with suppress(OSError):  # a read-only disk can still be read
            os.utime(self._path / MANIFEST)
        return self._path

    def discard(self, reason: str) -> None:
        """Removes a damaged entry; requires the exclusive lock."""
        log.warning("quantized_base_damaged", entry=self._path.name, error=reason)
        with suppress(OSError):
            staging.discard(self._path)

    def store(self, base_model: str, size_bytes: int, write: Callable[[Path], object]) -> None:
        """Stores the files that `write` puts into a directory, about `size_bytes`; requires the exclusive lock.

        Any failure, such as a full disk, is logged, and nothing is stored.
        """
        if self._path.exists():
            return  # undamaged, but this base cannot be loaded from it: writing it again would give the same bytes
        try:
            staging.reap_stale(self._cache.directory)
            self._cache.evict_for(size_bytes, keep=self._path.name)
            with staging.staging_directory(self._cache.directory) as staged:
                write(staged.path)
                identity = asdict(self._identity)
                manifest = {"base_model": base_model, "made_of": identity, "files": _digests(staged.path)}
                (staged.path / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
                staged.publish(self._path)
        except Exception as error:  # noqa: BLE001 - the base is loaded, and its job continues without a cache
            reason = f"{type(error).__name__}: {error}"
            log.warning("quantized_base_not_cached", base_model=base_model, error=reason)


def _open_lock(directory: Path, key: str) -> int:
    return os.open(directory / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _verify(path: Path, identity: BaseIdentity) -> None:
    """Compares the entry with its manifest, and the manifest with `identity`.

    Raises:
        ValueError: they differ. A malformed manifest raises other errors too.
    """
    manifest = json.loads((path / MANIFEST).read_bytes())
    if manifest["made_of"] != asdict(identity):
        raise ValueError("the manifest describes another base")
    if (actual := _digests(path)) != (listed := manifest["files"]):
        wrong = sorted(name for name in actual.keys() | listed.keys() if actual.get(name) != listed.get(name))
        raise ValueError(f"files differ from the manifest: {', '.join(wrong)}")


def _digests(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file except the manifest; reads several files at a time."""
    paths = sorted(path for path in directory.iterdir() if path.name != MANIFEST)
    with ThreadPoolExecutor() as pool:
        return dict(zip((path.name for path in paths), pool.map(_digest, paths), strict=True))


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": file.tell()}


def _describe(path: Path) -> StoredBase:
    manifest = path / MANIFEST
    try:
        document = json.loads(manifest.read_bytes())
        base_model, identity = str(document["base_model"]), dict(document["made_of"])
    except (OSError, ValueError, KeyError, TypeError):
        base_model, identity = "", {}
    last_used = (manifest if manifest.exists() else path).stat().st_mtime
    size_bytes = sum(file.stat().st_size for file in path.iterdir())
    return StoredBase(path, size_bytes, datetime.fromtimestamp(last_used, UTC), base_model, identity)
