"""Plans: whether a job fits, how it would run, and how long it takes; and how accurate earlier plans were."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_service.actions.dataset_storage import DatasetStorage
from qlora_service.actions.rendering import Rendering
from qlora_service.actions.submission import check_fit, check_objective, check_trainable, fit_defaults
from qlora_service.data.batching import total_steps
from qlora_service.data.rendering.renderer import RenderRules
from qlora_service.data.rendering.report import RenderReport
from qlora_service.domain.clock import Clock
from qlora_service.domain.datasets import Dataset
from qlora_service.errors import InvalidModel, InvalidRequest, InvalidSpec
from qlora_service.models.catalog.catalog import BaseModel, Catalog
from qlora_service.planning.accuracy import Accuracy, accuracies, learned_margin
from qlora_service.planning.attachment import Attachment
from qlora_service.planning.plan import Plan
from qlora_service.planning.planner import FoundDevice, Planner
from qlora_service.planning.time.duration import Work
from qlora_service.planning.time.job_times import TimeQuestion, job_time, request_probe, wants_probe
from qlora_service.specs import JobSpec
from qlora_service.store.database import Database
from qlora_service.store.history import measured_anywhere

MARGIN_JOBS = 300
"""The newest jobs with measurements; a device's margin is learned from those among them that ran on it."""
UNNAMED_MODEL = "config.json"
"""The base model of a spec whose model is given as a config"""

_REFUSAL = ("verdict", "device", "settings", "memory", "alternatives", "largest", "source", "notes")
"""Fields of the plan that the refusal of a job includes, beside the reason"""


class Plans:
    """Plans for the jobs of one project."""

    def __init__(
        self,
        database: Database,
        catalog: Catalog,
        planner: Planner,
        storage: DatasetStorage,
        rendering: Rendering,
        clock: Clock,
    ) -> None:
        self._database = database
        self._catalog = catalog
        self._planner = planner
        self._storage = storage
        self._rendering = rendering
        self._clock = clock

    def plan(
        self,
        spec: JobSpec,
        *,
        config: Mapping[str, Any] | None = None,
        device: str | None = None,
        free_bytes: int | None = None,
        probe: bool = False,
    ) -> Plan:
        """Whether the job fits on the named device, or on this service's own, and how it would run.

        The model is a base of the catalog, or just a `config`. With a stored dataset the plan is for its longest row,
        and the duration is estimated from finished jobs. With `probe`, a step is timed when a slot is free, unless
        finished jobs already give the duration.

        Raises:
            InvalidSpec, InvalidModel, InvalidDataset, InvalidRequest, NotFound: as for a job that is posted.
        """
        found = self._planner.device(device, free_bytes)
        _check_request(spec, config=config, device=device, probe=probe)
        if config is not None:
            return self._planner.plan(config, spec, found, factor=self._margin(found.device.name))
        model = self._catalog.get(spec.base_model)
        spec = fit_defaults(spec, model)
        check_fit(spec, model, self._catalog.module_shapes(model))
        rows = self._stored_rows(spec, model)
        if rows is None:
            return self._plan_of(spec, model, None, found)
        dataset, report = rows
        plan = self._plan_of(spec, model, report, found)
        return self._timed(plan, spec, model, Work.of(spec, report, dataset_rows=dataset.report.usable_rows), probe)

    def attachment(self, spec: JobSpec, model: BaseModel) -> Attachment | None:
        """What the job's adapter changes in the base; None where every linear layer can be adapted, or if unknown.

        Raises:
            InvalidSpec: the adapter cannot be attached to the base.
        """
        return self._planner.attachment(read_config(model.path), spec)

    def forecast(
        self, spec: JobSpec, model: BaseModel, report: RenderReport, work: Work, *, force: bool
    ) -> Plan | None:
        """The plan of a job that is posted; None when the device or the architecture is unknown to the planner.

        Raises:
            InvalidSpec: the job does not fit, and `force` is false.
        """
        found = self._planner.machine()
        if found is None:
            return None
        try:
            plan = self._plan_of(spec, model, report, found, simulates=found.device.cuda)
        except InvalidModel:
            return None  # not a Llama-like architecture: the trainer measures
        if plan.verdict != "fits" and not force:
            first = next(iter(plan.alternatives[0]), "") if plan.alternatives else "base_model"
            raise InvalidSpec(
                f"{plan.reason}. Or send force: true to queue it anyway",
                location="/" + first.replace(".", "/"),
                **{key: value for key, value in plan.as_dict().items() if key in _REFUSAL},
            )
        return self._timed(plan, spec, model, work)

    def accuracy(self) -> list[Accuracy]:
        """Observed over predicted memory and time by device, from the jobs of every project."""
        with self._database.read() as connection:
            return accuracies(measured_anywhere(connection))

    def _stored_rows(self, spec: JobSpec, model: BaseModel) -> tuple[Dataset, RenderReport] | None:
        """The dataset that the spec names, and its render report; None when it names none."""
        if spec.dataset.id is None:
            return None
        with self._database.read() as connection:
            dataset = self._storage.find(connection, spec.dataset.id, "/dataset/id")
        check_objective(spec, dataset.report.shape)
        report = self._rendering.stored_report(dataset, model, RenderRules.of(spec.training))
        check_trainable(report, spec, model)
        return dataset, report

    def _plan_of(
        self,
        spec: JobSpec,
        model: BaseModel,
        report: RenderReport | None,
        found: FoundDevice,
        *,
        simulates: bool = True,
    ) -> Plan:
        config, factor = read_config(model.path), self._margin(found.device.name)
        if report is None:
            return self._planner.plan(config, spec, found, factor=factor, simulates=simulates)
        training = spec.training
        longest = min(report.longest_tokens, training.max_seq_len_tokens) if report.complete else None
        rows = report.usable_rows
        return self._planner.plan(
            config,
            spec,
            found,
            longest_tokens=longest or None,
            factor=factor,
            rows=rows,
            total_steps=total_steps(rows, training.batch_size, training.epochs, training.max_steps),
            simulates=simulates,
        )

    def _timed(self, plan: Plan, spec: JobSpec, model: BaseModel, work: Work, probe: bool = False) -> Plan:
        """The plan with the job's duration; with `probe`, a timed step is requested when the duration is unknown."""
        question = TimeQuestion(
            spec=spec,
            base_weights_sha256=model.weights_sha256,
            work=work,
            micro_batch_tokens=plan.settings.micro_batch_tokens,
            checkpointing=plan.settings.gradient_checkpointing,
            longest_tokens=plan.longest_tokens,
            device=plan.device.name,
            cuda=plan.device.cuda,
        )
        with self._database.read() as connection:
            time = job_time(connection, question)
        if probe and wants_probe(time):
            with self._database.write() as connection:
                request_probe(connection, question, self._clock())
                time = job_time(connection, question)
        return replace(plan, time=time)

    def _margin(self, device: str) -> float:
        """The factor on predicted bytes for the device."""
        with self._database.read() as connection:
            return learned_margin(device, measured_anywhere(connection, MARGIN_JOBS))


def read_config(directory: Path) -> dict[str, Any]:
    """The model's config.json."""
    config: dict[str, Any] = json.loads((directory / "config.json").read_bytes())
    return config


def _check_request(spec: JobSpec, *, config: Mapping[str, Any] | None, device: str | None, probe: bool) -> None:
    """Raises: InvalidRequest, InvalidSpec, when parts of the request exclude each other."""
    if probe and (device is not None or config is not None or spec.dataset.id is None):
        raise InvalidRequest(
            "a probe times a step of a job that could run here: give base_model and dataset.id, and neither device "
            "nor config, or leave probe out",
            location="/probe",
        )
    if spec.dataset.rows is not None:
        raise InvalidSpec(
            "a plan looks at stored rows: upload them (POST /datasets) and give dataset.id, or leave them out",
            location="/dataset/rows",
        )
    if config is not None and spec.dataset.id is not None:
        raise InvalidSpec(
            "rows have no length in tokens without a tokenizer: leave dataset out, or name a base_model",
            location="/dataset/id",
        )
