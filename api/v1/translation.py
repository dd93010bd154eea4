"""Translation of a fine-tuning request to a `JobSpec`, and of spec errors to the fields of the request."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from api.errors import SPEC_LOCATIONS
from api.force import take_force
from api.v1.ids import dataset_of_file, file_not_found
from api.v1.requests import MAX_SEED, CreateFineTuningJob, DpoHyperparameters, Hyperparameters, UnsupportedMethod
from qlora_service.actions.service import Service
from qlora_service.errors import (
    Finding,
    InvalidRequest,
    InvalidSpec,
    NotFound,
    QLoRAError,
)
from qlora_service.specs import RECIPES, JobSpec, Training, parse_spec

# "auto" is three epochs, adjusted within 1 to 25 epochs to at least 100 and at most 25,000 examples in total, because
# a small file needs more passes and a large one must end in bounded time.
TARGET_EPOCHS, MAX_EPOCHS = 3, 25
MIN_EXAMPLES, MAX_EXAMPLES = 100, 25_000


class Setting(NamedTuple):
    """A value that a field of the request gives for a field of the spec."""

    pointer: str
    """JSON pointer of the field in the request."""
    path: tuple[str, ...]
    """Keys of the field in the spec."""
    value: Any


def to_spec(body: CreateFineTuningJob, service: Service) -> tuple[JobSpec, bool]:
    """The spec of the requested job, and the value of `qlora.force`: queue the job even if it should not fit.

    Resolves every "auto" that the defaults of the spec do not cover.

    Raises:
        UnsupportedMethod: reinforcement.
        InvalidRequest: two fields give the same setting.
        InvalidSpec: the spec is invalid; its locations are those in the request.
        NotFound: a file does not exist.
    """
    with in_request(body):
        spec, force = take_force(copy.deepcopy(body.qlora) if body.qlora else {})
    settings = _settings(body, spec)
    _refuse_duplicates(settings, spec)
    for _, path, value in settings:
        _set_default(spec, path, value)
    if "validation" not in spec:
        spec["validation"] = {"fraction": 0.0}
    _set_default(spec, ("training", "seed"), secrets.randbelow(MAX_SEED + 1))
    with in_request(body):
        has_length = any(_has(spec, ("training", field)) for field in ("epochs", "max_steps"))
        if not has_length and "epochs" not in _recipe_values(spec.get("recipe")):
            rows = service.datasets.get(spec["dataset"]["id"]).report.usable_rows
            _set_default(spec, ("training", "epochs"), auto_epochs(rows))
        return parse_spec(spec), force


def auto_epochs(rows: int) -> int:
    """The number of epochs for `n_epochs` "auto"."""
    if rows * TARGET_EPOCHS < MIN_EXAMPLES:
        return min(MAX_EPOCHS, MIN_EXAMPLES // rows)
    if rows * TARGET_EPOCHS > MAX_EXAMPLES:
        return max(1, MAX_EXAMPLES // rows)
    return TARGET_EPOCHS


def default_rate(recipe: Any) -> float:
    """The default learning rate under a recipe, which `learning_rate_multiplier` multiplies."""
    return float(_recipe_values(recipe).get("learning_rate", Training().learning_rate))


@contextmanager
def in_request(body: CreateFineTuningJob) -> Iterator[None]:
    """Replaces the spec locations of errors by the locations in the request."""
    try:
        yield
    except QLoRAError as error:
        # An error about the model or dataset as a whole has no location.
        default = next((pointer for kind, pointer in SPEC_LOCATIONS.items() if isinstance(error, kind)), None)
        pointers = {f"/{'/'.join(setting.path)}": setting.pointer for setting in _settings(body, {})}
        if (location := error.location or default) is not None and location.startswith("/"):
            error.location = _pointer_in_request(location, pointers)
        if isinstance(error, NotFound) and error.location in ("/training_file", "/validation_file"):
            raise file_not_found(getattr(body, error.location[1:]), error.location) from None
        if isinstance(error, InvalidSpec):
            error.findings = tuple(
                replace(finding, pointer=_pointer_in_request(finding.pointer, pointers)) for finding in error.findings
            )
        raise


def _pointer_in_request(spec_pointer: str, pointers: dict[str, str]) -> str:
    """The pointer in the request of the field that sets `spec_pointer`; `pointers` maps spec to request."""
    nearest = max((known for known in pointers if f"{spec_pointer}/".startswith(f"{known}/")), key=len, default=None)
    return pointers[nearest] if nearest is not None else f"/qlora{spec_pointer}"


def _settings(body: CreateFineTuningJob, spec: dict[str, Any]) -> list[Setting]:
    """The settings that the request gives outside `qlora`. Raises: UnsupportedMethod, InvalidRequest, NotFound."""
    settings = [
        Setting("/model", ("base_model",), body.model),
        Setting("/training_file", ("dataset",), _dataset(body, "training_file")),
    ]
    if body.validation_file is not None:
        dataset = _dataset(body, "validation_file")
        settings.append(Setting("/validation_file", ("validation", "dataset_id"), dataset["id"]))
    if body.suffix is not None:
        settings.append(Setting("/suffix", ("name",), body.suffix))
    if body.metadata is not None:
        settings.append(Setting("/metadata", ("metadata",), body.metadata))
    if body.seed is not None:
        settings.append(Setting("/seed", ("training", "seed"), body.seed))
    if body.method is not None:
        if body.method.type == "reinforcement":
            raise UnsupportedMethod(
                "reinforcement fine-tuning is not supported: use supervised, or dpo with preferred answers",
                location="method",
            )
        settings.append(Setting("/method/type", ("objective", "type"), body.method.type))
    pointer, hyperparameters = _hyperparameters(body)
    training = {"n_epochs": "epochs", "batch_size": "batch_size", "learning_rate_multiplier": "learning_rate"}
    for field in type(hyperparameters).model_fields:
        value = getattr(hyperparameters, field)
        if value == "auto":
            continue
        path = ("objective", "beta") if field == "beta" else ("training", training[field])
        if field == "learning_rate_multiplier":
            value *= default_rate(spec.get("recipe"))
        settings.append(Setting(f"{pointer}/{field}", path, value))
    return settings


def _dataset(body: CreateFineTuningJob, field: str) -> dict[str, str]:
    file_id = getattr(body, field)
    dataset_id = dataset_of_file(file_id)
    if dataset_id is None:
        raise file_not_found(file_id, location=f"/{field}")
    return {"id": dataset_id}


def _hyperparameters(body: CreateFineTuningJob) -> tuple[str, Hyperparameters]:
    """The pointer and the value of the hyperparameters. Raises: InvalidRequest, if several fields have them."""
    given: list[tuple[str, Hyperparameters]] = []
    if body.hyperparameters is not None:
        given.append(("/hyperparameters", body.hyperparameters))
    method = body.method
    for kind in ("supervised", "dpo"):
        part = None if method is None else getattr(method, kind)
        if part is not None and part.hyperparameters is not None:
            given.append((f"/method/{kind}/hyperparameters", part.hyperparameters))
            if method is not None and method.type != kind:
                raise InvalidRequest(
                    f"method.type is {method.type}, but method.{kind} has hyperparameters: leave them out, or change "
                    "the type",
                    location=f"/method/{kind}",
                )
    if len(given) > 1:
        raise InvalidRequest(
            f"both {_dotted(given[0][0])} and {_dotted(given[1][0])} are given: leave the first out",
            location=given[0][0],
        )
    return given[0] if given else ("/hyperparameters", DpoHyperparameters())


def _refuse_duplicates(settings: list[Setting], spec: dict[str, Any]) -> None:
    """Raises: InvalidRequest, with a finding for each setting that both `qlora` and another field give."""
    findings = []
    alternatives: dict[tuple[str, ...], tuple[str, ...]] = {
        ("training", "epochs"): ("training", "max_steps"),
        ("validation", "dataset_id"): ("validation", "fraction"),
    }
    for pointer, path, _ in settings:
        for other in (path, alternatives.get(path)):
            if other is not None and _has(spec, other):
                reason = f"{_dotted(pointer)} and qlora.{'.'.join(other)} give the same setting: leave one of them out"
                findings.append(Finding(reason, f"/qlora/{'/'.join(other)}"))
    if findings:
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise InvalidRequest(f"{findings[0].reason}{more}", location=findings[0].pointer, findings=findings)


def _recipe_values(recipe: Any) -> dict[str, Any]:
    """The training values of the recipe; empty if there is no such recipe."""
    known = RECIPES.get(recipe) if isinstance(recipe, str) else None  # type: ignore[call-overload]
    return known.values["training"] if known else {}


def _has(spec: dict[str, Any], path: tuple[str, ...]) -> bool:
    *groups, field = path
    for group in groups:
        inner = spec.get(group)
        if not isinstance(inner, dict):
            return False
        spec = inner
    return field in spec


def _set_default(spec: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Sets a field that is not set. Leaves a group that is not an object as it is: `parse_spec` reports it."""
    *groups, field = path
    for group in groups:
        inner = spec.setdefault(group, {})
        if not isinstance(inner, dict):
            return
        spec = inner
    spec.setdefault(field, value)


def _dotted(pointer: str) -> str:
    return pointer[1:].replace("/", ".")
