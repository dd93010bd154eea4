"""From what OpenAI's wire asks to a `JobSpec`, and its errors back to the fields that were sent."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from api.force import take_force
from api.v1.ids import dataset_of_file, no_file
from api.v1.requests import MAX_SEED, CreateFineTuningJob, DpoHyperparameters, Hyperparameters, UnsupportedMethod
from qlora_service.actions.service import Service
from qlora_service.errors import (
    Finding,
    InvalidDataset,
    InvalidModel,
    InvalidRequest,
    InvalidSpec,
    NotFound,
    QLoRAError,
)
from qlora_service.specs import RECIPES, JobSpec, Training, parse_spec

# "auto" is three epochs, with at least 100 and at most 25,000 examples in all, where 1 to 25 epochs allow it: a small
# file is seen often enough, and a large one ends.
TARGET_EPOCHS, MAX_EPOCHS = 3, 25
MIN_EXAMPLES, MAX_EXAMPLES = 100, 25_000

_WHOLE: dict[type[QLoRAError], str] = {InvalidModel: "/base_model", InvalidDataset: "/dataset"}


class Said(NamedTuple):
    """A field of the request, as a JSON pointer, and what it means: a place in the spec, and its value."""

    where: str
    place: tuple[str, ...]
    value: Any


def to_spec(body: CreateFineTuningJob, service: Service) -> tuple[JobSpec, bool]:
    """The spec of the job that is asked for, with everything that was left to "auto" but what a spec's defaults say.

    And whether `qlora.force` says that it is to be queued also if it does not fit.

    Raises:
        UnsupportedMethod: reinforcement.
        InvalidRequest: two fields say the same.
        InvalidSpec: the spec cannot be; with the places in the request.
        NotFound: there is no such file.
    """
    with in_request(body):
        ours, force = take_force(copy.deepcopy(body.qlora) if body.qlora else {})
    said = _said(body, ours)
    _refuse_twice_said(said, ours)
    for _, place, value in said:
        _put(ours, place, value)
    if "validation" not in ours:
        ours["validation"] = {"fraction": 0.0}
    _put(ours, ("training", "seed"), secrets.randbelow(MAX_SEED + 1))
    with in_request(body):
        asked = any(_has(ours, ("training", field)) for field in ("epochs", "max_steps"))
        if not asked and "epochs" not in _recipe_values(ours.get("recipe")):
            rows = service.datasets.get(ours["dataset"]["id"]).report.usable_rows
            _put(ours, ("training", "epochs"), auto_epochs(rows))
        return parse_spec(ours), force


def auto_epochs(rows: int) -> int:
    """The n_epochs that "auto" stands for."""
    if rows * TARGET_EPOCHS < MIN_EXAMPLES:
        return min(MAX_EPOCHS, MIN_EXAMPLES // rows)
    if rows * TARGET_EPOCHS > MAX_EXAMPLES:
        return max(1, MAX_EXAMPLES // rows)
    return TARGET_EPOCHS


def default_rate(recipe: Any) -> float:
    """The learning rate of a job that names none, which learning_rate_multiplier is of."""
    return float(_recipe_values(recipe).get("learning_rate", Training().learning_rate))


@contextmanager
def in_request(body: CreateFineTuningJob) -> Iterator[None]:
    """Errors leave with their places in the request instead of those in the spec."""
    try:
        yield
    except QLoRAError as error:
        # What concerns model or dataset as a whole says no place.
        default = next((place for kind, place in _WHOLE.items() if isinstance(error, kind)), None)
        places = {f"/{'/'.join(one.place)}": one.where for one in _said(body, {})}
        if (location := error.location or default) is not None and location.startswith("/"):
            error.location = _sent(location, places)
        if isinstance(error, NotFound) and error.location in ("/training_file", "/validation_file"):
            raise no_file(getattr(body, error.location[1:]), error.location) from None
        if isinstance(error, InvalidSpec):
            error.findings = tuple(
                replace(finding, pointer=_sent(finding.pointer, places)) for finding in error.findings
            )
        raise


def _sent(pointer: str, places: dict[str, str]) -> str:
    """Where the request says what stands at `pointer` in the spec."""
    nearest = max((place for place in places if f"{pointer}/".startswith(f"{place}/")), key=len, default=None)
    return places[nearest] if nearest is not None else f"/qlora{pointer}"


def _said(body: CreateFineTuningJob, ours: dict[str, Any]) -> list[Said]:
    """What the request's own fields say. Raises: UnsupportedMethod, InvalidRequest, NotFound."""
    said = [
        Said("/model", ("base_model",), body.model),
        Said("/training_file", ("dataset",), _dataset(body, "training_file")),
    ]
    if body.validation_file is not None:
        dataset = _dataset(body, "validation_file")
        said.append(Said("/validation_file", ("validation", "dataset_id"), dataset["id"]))
    if body.suffix is not None:
        said.append(Said("/suffix", ("name",), body.suffix))
    if body.metadata is not None:
        said.append(Said("/metadata", ("metadata",), body.metadata))
    if body.seed is not None:
        said.append(Said("/seed", ("training", "seed"), body.seed))
    if body.method is not None:
        if body.method.type == "reinforcement":
            raise UnsupportedMethod(
                "reinforcement fine-tuning is not offered: use supervised, or dpo with preferred answers",
                location="method",
            )
        said.append(Said("/method/type", ("objective", "type"), body.method.type))
    where, given = _hyperparameters(body)
    training = {"n_epochs": "epochs", "batch_size": "batch_size", "learning_rate_multiplier": "learning_rate"}
    for field in type(given).model_fields:
        value = getattr(given, field)
        if value == "auto":
            continue
        place = ("objective", "beta") if field == "beta" else ("training", training[field])
        if field == "learning_rate_multiplier":
            value *= default_rate(ours.get("recipe"))
        said.append(Said(f"{where}/{field}", place, value))
    return said


def _dataset(body: CreateFineTuningJob, field: str) -> dict[str, str]:
    file_id = getattr(body, field)
    dataset_id = dataset_of_file(file_id)
    if dataset_id is None:
        raise no_file(file_id, location=f"/{field}")
    return {"id": dataset_id}


def _hyperparameters(body: CreateFineTuningJob) -> tuple[str, Hyperparameters]:
    """Where the hyperparameters stand, and what they are. Raises: InvalidRequest, if they stand in several places."""
    found: list[tuple[str, Hyperparameters]] = []
    if body.hyperparameters is not None:
        found.append(("/hyperparameters", body.hyperparameters))
    method = body.method
    for kind in ("supervised", "dpo"):
        part = None if method is None else getattr(method, kind)
        if part is not None and part.hyperparameters is not None:
            found.append((f"/method/{kind}/hyperparameters", part.hyperparameters))
            if method is not None and method.type != kind:
                raise InvalidRequest(
                    f"method.type is {method.type}, but method.{kind} has hyperparameters: leave those out, or change "
                    "the type",
                    location=f"/method/{kind}",
                )
    if len(found) > 1:
        raise InvalidRequest(
            f"hyperparameters stand in {_dotted(found[0][0])} and in {_dotted(found[1][0])}: leave the first out",
            location=found[0][0],
        )
    return found[0] if found else ("/hyperparameters", DpoHyperparameters())


def _refuse_twice_said(said: list[Said], ours: dict[str, Any]) -> None:
    """Raises: InvalidRequest, with everything that both `qlora` and another field say."""
    findings = []
    also: dict[tuple[str, ...], tuple[str, ...]] = {
        ("training", "epochs"): ("training", "max_steps"),
        ("validation", "dataset_id"): ("validation", "fraction"),
    }
    for where, place, _ in said:
        for other in (place, also.get(place)):
            if other is not None and _has(ours, other):
                twice = f"{_dotted(where)} and qlora.{'.'.join(other)} say the same: leave one of them out"
                findings.append(Finding(twice, f"/qlora/{'/'.join(other)}"))
    if findings:
        more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
        raise InvalidRequest(f"{findings[0].reason}{more}", location=findings[0].pointer, findings=findings)


def _recipe_values(recipe: Any) -> dict[str, Any]:
    """What the recipe says of the training; nothing, if there is no such recipe."""
    known = RECIPES.get(recipe) if isinstance(recipe, str) else None  # type: ignore[call-overload]
    return known.values["training"] if known else {}


def _has(spec: dict[str, Any], place: tuple[str, ...]) -> bool:
    *groups, field = place
    for group in groups:
        inner = spec.get(group)
        if not isinstance(inner, dict):
            return False
        spec = inner
    return field in spec


def _put(spec: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    """Set what is not set; where a group is no group, the spec's own check will say so."""
    *groups, field = place
    for group in groups:
        inner = spec.setdefault(group, {})
        if not isinstance(inner, dict):
            return
        spec = inner
    spec.setdefault(field, value)


def _dotted(pointer: str) -> str:
    return pointer[1:].replace("/", ".")
