"""Metrics of a job, from its events: the valid records, and their CSV table."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

from qlora_service.domain.jobs import JobEvent

METRICS = ("metrics", "evaluation")
"""Types of events that contain metrics"""
CSV_HEADER = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
"""Columns of the hosted API's result files; `train_accuracy` is not measured and stays empty"""


def finite_or_null(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with None for NaN and infinity, which JSON lacks and PostgreSQL refuses."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }


def valid_metrics(events: Iterable[JobEvent]) -> list[dict[str, Any]]:
    """The records of completed steps, by step.

    An attempt that resumes from a checkpoint invalidates the records of later steps until it repeats them.
    """
    records: dict[tuple[str, int], dict[str, Any]] = {}
    for event in events:
        if event.type in METRICS:
            key = (event.type, event.data["step"])
            records.pop(key, None)  # the newest record of a step is its last
            records[key] = event.data
        elif (resumed := event.data.get("resumed_from_step")) is not None:
            records = {key: record for key, record in records.items() if key[1] <= resumed}
    return sorted(records.values(), key=lambda record: int(record["step"]))


def metrics_csv(records: Iterable[dict[str, Any]], *, holds_out: bool) -> str:
    """CSV with one line per step of `valid_metrics` records; figures that were not measured are empty.

    Without held-out rows (`holds_out`) the evaluations are on training rows, and their columns stay empty.
    """
    steps: dict[int, dict[str, Any]] = {}
    for record in records:
        line = steps.setdefault(record["step"], {"step": record["step"]})
        if "loss" in record:
            line["train_loss"] = record["loss"]
        if "eval_loss" in record and holds_out:
            line |= {"valid_loss": record["eval_loss"], "valid_mean_token_accuracy": record["eval_accuracy"]}
    table = io.StringIO()
    writer = csv.DictWriter(table, CSV_HEADER, lineterminator="\n")
    writer.writeheader()
    writer.writerows(steps[step] for step in sorted(steps))
    return table.getvalue()
