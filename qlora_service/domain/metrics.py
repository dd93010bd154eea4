"""A job's metrics out of its events: the records that stand, and the table of them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

from qlora_service.domain.jobs import JobEvent

METRICS = ("metrics", "evaluation")
"""Types of the events that hold a job's metrics."""
CSV_HEADER = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
"""The columns of the hosted API's result files. No accuracy is measured while training: that column stays empty."""


def finite_or_null(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with null for NaN and infinity, which JSON does not have: PostgreSQL refuses them."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }


def standing_metrics(events: Iterable[JobEvent]) -> list[dict[str, Any]]:
    """The records of the steps that the job has done, by step.

    An attempt that resumes from a checkpoint takes back the steps after it, until it has done them again.
    """
    records: dict[tuple[str, int], dict[str, Any]] = {}
    for event in events:
        if event.type in METRICS:
            key = (event.type, event.data["step"])
            records.pop(key, None)  # so that the newest is the last of its step
            records[key] = event.data
        elif (resumed := event.data.get("resumed_from_step")) is not None:
            records = {key: record for key, record in records.items() if key[1] <= resumed}
    return sorted(records.values(), key=lambda record: int(record["step"]))


def metrics_csv(records: Iterable[dict[str, Any]], *, holds_out: bool) -> str:
    """One line per step of a job's standing records, below CSV_HEADER; what was not measured is empty.

    A job that `holds_out` no rows is judged with rows that it trains on, which is no validation.
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
