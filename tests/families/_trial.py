"""One family from import to certificate, in this process, as the service and its trainer do it."""

from __future__ import annotations

import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qlora_service.errors import QLoRAError
from qlora_service.models.base.quantized_cache import QuantizedCache
from tests.families.tiny import FAMILIES, build
from tests.workers.trainer._attempts import make_inputs, run
from tests.workspace import ROWS, Workspace
from workers.trainer.trainer import as_failure

STEPS = 3
CACHE_BYTES = 1 << 30
Result = Literal["certified", "refused at import", "refused at POST", "failed in the worker", "not built", "crashed"]


@dataclass(frozen=True)
class Outcome:
    """The end of one family's trial."""

    model_type: str
    architecture: str
    result: Result
    reason: str = ""
    """Why it was refused, failed, or could not be built"""
    held_out: tuple[float, float] | None = None
    """Losses before and after the training, of a certified adapter"""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def try_family(model_type: str, directory: Path) -> Outcome:
    """The outcome of building, importing, posting, training for `STEPS` steps in NF4 and certifying."""
    architecture = FAMILIES[model_type]
    try:
        model = build(model_type, directory / "model")
    except Exception as error:  # transformers raises anything
        return Outcome(model_type, architecture, "not built", " ".join(f"{type(error).__name__}: {error}".split()))
    try:
        workspace = Workspace(directory / "data", model)
    except QLoRAError as error:
        return Outcome(model_type, architecture, "refused at import", _words(error))
    try:
        job_id = workspace.submit_spec(job_spec())
    except QLoRAError as error:
        return Outcome(model_type, architecture, "refused at POST", _words(error))
    inputs = replace(make_inputs(workspace, job_id), cache=QuantizedCache(directory / "cache", CACHE_BYTES))
    try:
        result = run(inputs)
    except Exception as error:
        traceback.print_exc()
        return Outcome(model_type, architecture, "failed in the worker", as_failure(error, "log").message)
    losses = (result["held_out"]["before"]["loss"], result["held_out"]["after"]["loss"])
    return Outcome(model_type, architecture, "certified", "; ".join(result["warnings"]), losses)


def job_spec() -> dict[str, Any]:
    """A default job of a few steps."""
    return {"base_model": "tiny", "dataset": {"rows": ROWS}, "training": {"max_steps": STEPS}}


def _words(error: QLoRAError) -> str:
    """What the user reads, on one line."""
    return " ".join("; ".join(map(str, error.findings or [error.message])).split())
