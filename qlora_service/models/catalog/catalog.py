"""The catalog of base models: ordinary Hugging Face directories in one parent directory, each with a record.

    <models_dir>/<name, / written as -->/config.json, *.safetensors, tokenizer.json, …, qlora-model.json

A model is complete or absent. Imports neither torch nor transformers: conversions run in a child process.
"""

from __future__ import annotations

import builtins
import difflib
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import structlog

from qlora_service.data.rendering.tokenizer_settings import CHAT_TEMPLATE, TOOL_TEMPLATE, read_tokenizer_settings
from qlora_service.errors import Conflict, InvalidModel, Unavailable
from qlora_service.models.catalog import hub, staging
from qlora_service.models.catalog.inspection import (
    TOKENIZER_JSON,
    WEIGHTS,
    WEIGHTS_INDEX,
    ModelFacts,
    check_causality,
    inspect_model,
)
from qlora_service.models.catalog.safetensors_header import read_header

log = structlog.get_logger(__name__)

RECORD = "qlora-model.json"
Source = Literal["directory", "gguf", "hub"]
CONVERSION_S = 30 * 60.0
"""Time limit of a conversion: a GGUF file of 8B parameters takes minutes on a slow disk."""

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(rf"{_PART}(/{_PART})?(@{_PART})?")
_COPIED_SUFFIXES = {".json", ".jinja", ".model"}
_COPIED_NAMES = {"vocab.txt", "merges.txt"}
_COPIED_PREFIXES = ("LICENSE", "NOTICE", "README")
# Paths of the machine that saved the files, and switches that follow from them.
_ORIGIN_KEYS = {
    "config.json": {"_name_or_path", "_model_name_or_path"},
    "generation_config.json": {"_name_or_path"},
    "tokenizer_config.json": {
        "name_or_path", "is_local", "local_files_only", "tokenizer_file", "special_tokens_map_file",
    },
}  # fmt: skip


@dataclass(frozen=True)
class BaseModel:
    """One model of the catalog.

    `hub_id` and `revision` (a commit hash) are set for models from the hub. `weights_sha256` is one hash over
    the sorted lines "name sha256" of the *.safetensors files. `parameters` counts stored weights: tied weights
    count once.
    """

    name: str
    path: Path
    source: Source
    hub_id: str | None
    revision: str | None
    weights_sha256: str
    architecture: str
    model_type: str
    parameters: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    chat_template: bool
    imported_at: datetime

    @property
    def reference(self) -> str:
        """The base's name in adapter_config.json, never a path of this machine."""
        return self.hub_id or self.name

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON values, without `path`: a catalog may be moved, and clients do not need it."""
        fields = asdict(self)
        del fields["path"]
        return fields | {"imported_at": self.imported_at.isoformat()}


class Origin(NamedTuple):
    """The origin of a model; only models from the hub have `hub_id` and `revision`."""

    source: Source
    hub_id: str | None = None
    revision: str | None = None


class Catalog:
    """The base models in `models_dir`, which the first import creates."""

    def __init__(self, models_dir: Path) -> None:
        self.models_dir = models_dir

    def get(self, name: str) -> BaseModel:
        """The model of that name.

        Raises:
            InvalidModel: there is no such model, or its record cannot be read.
        """
        if not _is_valid_name(name) or not (path := self._path(name)).is_dir():
            raise self._not_found(name)
        return _read_record(path)

    def import_model(self, name: str, source: str | Path) -> BaseModel:
        """The new model `name` from a Hugging Face directory, a GGUF file or a hub id `org/name[@revision]`.

        Raises:
            InvalidModel: the name or the content of `source` is refused; every finding is listed.
            Conflict: the name is taken.
            Unavailable: the hub cannot be reached, or memory or disk space ran out.
        """
        _check_name(name)
        target = self._path(name)
        if target.exists():
            raise self._name_conflict(name)
        try:
            model = self._import(name, source, target)
        except OSError as error:
            raise Unavailable(
                f"{source} could not be imported ({error}): "
                f"check disk space and permissions of {self.models_dir}, then import it again"
            ) from error
        log.info("model_imported", model=name, source=model.source, parameters=model.parameters)
        return model

    def module_shapes(self, model: BaseModel) -> dict[str, frozenset[tuple[int, int]]]:
        """The modules that an adapter can target: last part of each name, such as q_proj, and its weight shapes.

        Modules with a weight matrix, in the stored order (out, in), or (in, out) for GPT-2's Conv1D.
        """
        shapes: dict[str, set[tuple[int, int]]] = {}
        for path in model.path.glob("*.safetensors"):
            for name, entry in read_header(path).items():
                if name.endswith(".weight") and len(entry.shape) == 2:
                    shapes.setdefault(name.split(".")[-2], set()).add((entry.shape[0], entry.shape[1]))
        return {name: frozenset(sizes) for name, sizes in shapes.items()}

    def remove(self, name: str) -> None:
        """Deletes the model, even if its record cannot be read.

        Raises:
            InvalidModel: there is no model of that name.
        """
        if not _is_valid_name(name) or not self._path(name).is_dir():
            raise self._not_found(name)
        staging.discard(self._path(name))
        log.info("model_removed", model=name)

    def list(self) -> builtins.list[BaseModel]:
        """All models by name; a model whose record cannot be read is logged and left out."""
        models = []
        for path in self._model_directories():
            try:
                models.append(_read_record(path))
            except InvalidModel as error:
                log.warning("model_record_unreadable", directory=path.name, error=error.message)
        return sorted(models, key=lambda model: model.name)

    def _import(self, name: str, source: str | Path, target: Path) -> BaseModel:
        staging.reap_stale(self.models_dir)
        with staging.staging_directory(self.models_dir) as staged:
            origin = _stage_files(staged, source)
            _remove_origin_keys(staged.path)
            # Inspect the staged files: the source may have changed, or a conversion may have gone wrong.
            facts = inspect_model(staged.path, str(source))
            model = _describe(name, target, staged.path, facts, origin)
            (staged.path / RECORD).write_text(json.dumps(model.as_dict(), indent=2) + "\n", encoding="utf-8")
            try:
                staged.publish(target)
            except FileExistsError:
                raise self._name_conflict(name) from None
        return model

    def _model_directories(self) -> builtins.list[Path]:
        if not self.models_dir.is_dir():
            return []
        return [path for path in self.models_dir.iterdir() if not path.name.startswith(".") and path.is_dir()]

    def _path(self, name: str) -> Path:
        return self.models_dir / name.replace("/", "--")

    def _not_found(self, name: str) -> InvalidModel:
        known = sorted(model.name for model in self.list())
        by_lower_case = {known_name.lower(): known_name for known_name in known}
        close = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.5)
        return InvalidModel(
            f"there is no base model {name!r}"
            + (f": did you mean {by_lower_case[close[0]]!r}?" if close else ".")
            + (f" Known: {', '.join(known)}." if known else " The catalog is empty.")
            + " Add one with: qlora models import NAME PATH",
            known=known,
        )

    def _name_conflict(self, name: str) -> Conflict:
        return Conflict(f"base model {name!r} exists already: choose another name, or remove it first", model=name)


def _is_valid_name(name: str) -> bool:
    # "--" replaces "/" in directory names, so no name may contain it.
    return len(name) <= 200 and "--" not in name and _NAME.fullmatch(name) is not None


def _check_name(name: str) -> None:
    if not _is_valid_name(name):
        raise InvalidModel(
            f"{name[:200]!r} cannot name a base model: use letters, digits, '.', '_' and '-' (never '--'), "
            "starting with a letter or digit, optionally as org/name and with @revision"
        )


def _stage_files(staged: staging.Staging, source: str | Path) -> Origin:
    """Puts the model's files into the staging directory, and returns their origin."""
    path = Path(source).expanduser()
    if path.is_file():
        _convert_gguf(path, staged)
        return Origin("gguf")
    if path.is_dir():
        _copy(path, staged, str(source))
        return Origin("directory")
    if hub_id := hub.parse_hub_id(str(source)):
        snapshot = hub.fetch_snapshot(*hub_id)
        _copy(snapshot, staged, str(source))
        return Origin("hub", hub_id[0], snapshot.name)
    raise InvalidModel(
        f"{source} does not exist: give a Hugging Face directory, a GGUF file or a hub id org/name[@revision]"
    )


def _convert_gguf(file: Path, staged: staging.Staging) -> None:
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise InvalidModel(
                f"{file} is not a GGUF file: give a GGUF file, or the directory of a Hugging Face model instead"
            )
    _run_conversion(["gguf", str(file.resolve()), str(staged.path)], staged, str(file))
    check_causality(staged.path, str(file))


def _copy(directory: Path, staged: staging.Staging, label: str) -> None:
    facts = inspect_model(directory, label)
    check_causality(directory, label)
    for path in directory.iterdir():
        is_copied = (
            path.suffix in _COPIED_SUFFIXES or path.name in _COPIED_NAMES or path.name.startswith(_COPIED_PREFIXES)
        )
        # transformers ignores an index beside model.safetensors, and its shards are not copied.
        is_unused = path.name == WEIGHTS_INDEX and facts.weight_files == (WEIGHTS,)
        if path.name in facts.weight_files or (is_copied and not is_unused and path.is_file()):
            shutil.copyfile(path, staged.path / path.name)
    if (directory / TOOL_TEMPLATE).is_file():
        (staged.path / CHAT_TEMPLATE).write_text(read_tokenizer_settings(directory).chat_template or "", "utf-8")
    if not (staged.path / TOKENIZER_JSON).exists():
        _run_conversion(["tokenizer", str(staged.path)], staged, label)


def _run_conversion(arguments: Sequence[str], staged: staging.Staging, label: str) -> None:
    """Runs `gguf_import` in a child process, which keeps the staging directory locked if this process dies."""
    try:
        result = subprocess.run(
            [sys.executable, "-m", "qlora_service.models.catalog.gguf_import", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(staged.lock_fd,),
            timeout=CONVERSION_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(
            f"{label} could not be converted within {CONVERSION_S / 60:g} minutes, and the conversion was stopped: "
            "import it again on an idle machine, or import the model as a Hugging Face directory"
        ) from None
    if result.returncode < 0:
        signal_name = signal.Signals(-result.returncode).name
        raise Unavailable(
            f"{label} could not be converted: the process was ended by {signal_name}, "
            "as when memory runs out; free some memory and import it again"
        )
    if result.returncode:
        lines = result.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {result.returncode}"]
        raise InvalidModel(f"{label} could not be converted: {lines[-1]}", stderr="\n".join(lines[-20:]))


def _remove_origin_keys(directory: Path) -> None:
    for name, keys in _ORIGIN_KEYS.items():
        path = directory / name
        if not path.exists():
            continue
        document = json.loads(path.read_bytes())
        if keys & document.keys():
            kept = {key: value for key, value in document.items() if key not in keys}
            path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _describe(name: str, target: Path, staged: Path, facts: ModelFacts, origin: Origin) -> BaseModel:
    fields = asdict(facts)
    return BaseModel(
        name=name,
        path=target,
        source=origin.source,
        hub_id=origin.hub_id,
        revision=origin.revision,
        weights_sha256=_weights_sha256(staged, fields.pop("weight_files")),
        imported_at=datetime.now(UTC),
        **fields,
    )


def _weights_sha256(directory: Path, names: Sequence[str]) -> str:
    total = hashlib.sha256()
    for name in sorted(names):
        with (directory / name).open("rb") as file:
            total.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _read_record(path: Path) -> BaseModel:
    try:
        fields = json.loads((path / RECORD).read_bytes())
        return BaseModel(path=path, **fields | {"imported_at": datetime.fromisoformat(fields["imported_at"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidModel(
            f"the catalog's record {path.name}/{RECORD} cannot be read ({error}): remove the model and import it again"
        ) from error
