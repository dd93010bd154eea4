"""Quantized bases on the local disk: a base is quantized once, not before every job.

    <directory>/<key>.lock     shared while the entry is read, exclusive while it is made or removed
    <directory>/<key>/         an ordinary Hugging Face directory whose weights are quantized
        manifest.json          what it was made of; size and SHA-256 of every other file; its time is the last use

The key is a hash of everything that the bytes depend on. An entry is there whole or not at all, and is compared with
its manifest before every use. Neither torch nor transformers is imported.
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
LAYOUT = 1
"""Of what an entry holds; another one makes all entries before it unknown."""
PACKAGES = ("bitsandbytes", "transformers", "torch")
"""What decides which weights are quantized, and to which bytes."""
ROOM_LEFT = 2 * 2**30
"""Bytes that stay free on the disk: jobs need them for checkpoints, and would wait for them."""


@dataclass(frozen=True)
class Ingredients:
    """Everything that the bytes of a quantized base depend on.

    The weights are cast to the compute dtype before they are quantized; a GPU's kernels may round otherwise than a
    CPU's.
    """

    weights_sha256: str
    config_sha256: str
    quantization: str
    double_quant: bool
    compute_dtype: str
    device: str
    versions: dict[str, str]
    layout: int = LAYOUT

    @classmethod
    def of(cls, base: BaseModel, quantization: Quantization, compute_dtype: str, device: str) -> Ingredients:
        """Those of `base` as the catalog has it; `device` is a kind, cuda or cpu."""
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
            versions={name: version(name) for name in PACKAGES},
        )

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class StoredBase:
    """An entry as it lies on the disk; `made_of` is empty where its manifest cannot be read."""

    path: Path
    size_bytes: int
    last_used: datetime
    base_model: str
    made_of: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """As JSON values, without the path."""
        return {
            "key": self.path.name,
            "base_model": self.base_model,
            "bytes": self.size_bytes,
            "last_used": self.last_used.isoformat(),
            **{name: self.made_of.get(name) for name in ("quantization", "double_quant", "compute_dtype", "device")},
        }


class QuantizedCache:
    """The entries in `directory`, which together take at most `max_bytes`."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory, self.max_bytes = directory, max_bytes

    def open(self, wanted: Ingredients) -> LockedEntry:
        """The place of one base, locked: wait here while another process makes or removes it. Raises: OSError."""
        self.directory.mkdir(parents=True, exist_ok=True)
        return LockedEntry(self, wanted)

    def entries(self) -> list[StoredBase]:
        """What is there, the least recently used first."""
        if not self.directory.is_dir():
            return []
        found = []
        for path in self.directory.iterdir():
            if path.is_dir() and not path.name.startswith("."):
                with suppress(FileNotFoundError):  # removed by another process
                    found.append(_describe(path))
        return sorted(found, key=lambda entry: entry.last_used)

    def clear(self) -> list[StoredBase]:
        """Removes every entry that nobody is loading, and what crashes left; what was removed."""
        staging.reap_stale(self.directory)
        return [entry for entry in self.entries() if self._remove(entry.path)]

    def make_room(self, size_bytes: int, keep: str) -> None:
        """Removes entries, the least recently used first, until one of `size_bytes` fits; never the one named `keep`.

        Raises:
            ValueError: it does not fit; the text says why.
        """
        if size_bytes > self.max_bytes:
            raise ValueError(f"it takes {size_bytes} bytes, the whole cache may take {self.max_bytes}")
        entries = [entry for entry in self.entries() if entry.path.name != keep]
        total = sum(entry.size_bytes for entry in entries)
        for entry in entries:
            if total + size_bytes <= self.max_bytes and self._has_room(size_bytes):
                return
            if self._remove(entry.path):
                total -= entry.size_bytes
                log.info("quantized_base_evicted", entry=entry.path.name, base_model=entry.base_model)
        if total + size_bytes > self.max_bytes:
            raise ValueError(f"it takes {size_bytes} bytes, and others of the cache are being loaded")
        if not self._has_room(size_bytes):
            raise ValueError(f"it takes {size_bytes} bytes, and {ROOM_LEFT} are to stay free on the disk")

    def _has_room(self, size_bytes: int) -> bool:
        return shutil.disk_usage(self.directory).free >= size_bytes + ROOM_LEFT

    def _remove(self, path: Path) -> bool:
        """Whether the entry is gone; one that is being loaded stays.

        A process that has its files mapped into memory keeps them until it unmaps them. The lock file stays: whoever
        waits for it must not wait for another one than who comes next.
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
    """One base's place in the cache; a context manager. Many processes may read it, one alone may write."""

    def __init__(self, cache: QuantizedCache, wanted: Ingredients) -> None:
        self._cache, self._wanted = cache, wanted
        self._path = cache.directory / wanted.key
        self._descriptor = _open_lock(cache.directory, wanted.key)
        self._is_alone = False
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def lock_for_writing(self) -> None:
        """Waits until nobody else has it. Others may have written meanwhile: `find` again."""
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        self._is_alone = True

    def find(self) -> Path | None:
        """The directory, every byte compared with the manifest, now the last used; None if it is not there whole.

        A damaged one is removed, as soon as we are alone with it.
        """
        if not self._path.exists():
            return None
        try:
            _verify(self._path, self._wanted)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if self._is_alone:
                self.discard(str(error))
            return None
        with suppress(OSError):  # a disk that takes no writes may still be read
            os.utime(self._path / MANIFEST)
        return self._path

    def discard(self, why: str) -> None:
        """Removes what cannot be used; only when locked for writing."""
        log.warning("quantized_base_damaged", entry=self._path.name, error=why)
        with suppress(OSError):
            staging.discard(self._path)

    def store(self, base_model: str, size_bytes: int, write: Callable[[Path], object]) -> None:
        """Keeps what `write` puts into a directory, of about `size_bytes`; only when locked for writing.

        Whatever prevents that, a full disk for one, is logged: nothing is kept then.
        """
        if self._path.exists():
            return  # whole, though of no use to who asks: it would be written just so again
        try:
            staging.reap_stale(self._cache.directory)
            self._cache.make_room(size_bytes, keep=self._path.name)
            with staging.staging_directory(self._cache.directory) as staged:
                write(staged.path)
                manifest = {"base_model": base_model, "made_of": asdict(self._wanted), "files": _digests(staged.path)}
                (staged.path / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True), encoding="utf-8")
                staged.publish(self._path)
        except Exception as error:  # noqa: BLE001 - the base is loaded, and its job goes on without a cache
            reason = f"{type(error).__name__}: {error}"
            log.warning("quantized_base_not_cached", base_model=base_model, error=reason)


def _open_lock(directory: Path, key: str) -> int:
    return os.open(directory / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


def _verify(path: Path, wanted: Ingredients) -> None:
    """Raises ValueError, among others, if the entry is not exactly what its manifest says, or of something else."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    if manifest["made_of"] != asdict(wanted):
        raise ValueError("its manifest names other ingredients")
    if (found := _digests(path)) != (listed := manifest["files"]):
        wrong = sorted(name for name in found.keys() | listed.keys() if found.get(name) != listed.get(name))
        raise ValueError(f"not as its manifest says: {', '.join(wrong)}")


def _digests(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file but the manifest; several are read at a time."""
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
        base_model, made_of = str(document["base_model"]), dict(document["made_of"])
    except (OSError, ValueError, KeyError, TypeError):
        base_model, made_of = "", {}
    used = (manifest if manifest.exists() else path).stat().st_mtime
    size = sum(file.stat().st_size for file in path.iterdir())
    return StoredBase(path, size, datetime.fromtimestamp(used, UTC), base_model, made_of)
