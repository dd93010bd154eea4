"""One step on tensors without values: a request as a line of JSON on stdin, the memory or a reason on stdout.

Run as `python -m qlora_service.planning.simulation_child` by `planning.simulation`, which sees to its end.
"""

from __future__ import annotations

import gc
import json
import resource
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel

from qlora_service.models.adapters import attach
from qlora_service.planning.allocator import LARGE_STEP, ROUNDING, rounded
from qlora_service.planning.largest_step import LargestStep, largest_step
from qlora_service.planning.memory import Category, Memory
from qlora_service.planning.simulated_base import META, shortened, simulated_base
from qlora_service.planning.simulated_device import CUBLAS_WORKSPACE_BYTES, simulated_device, workspaces
from qlora_service.planning.tracked_step import run_largest_step
from qlora_service.planning.tracker import Tracker
from qlora_service.specs import JobSpec
from qlora_service.training.attention import Isolation, isolate_documents
from qlora_service.training.micro_batch import PER_DOCUMENT
from qlora_service.training.network import Network

MEMORY_BYTES = 4 << 30
PROBED_LAYERS = 8
"""Hybrid architectures repeat after eight layers at most (Jamba)"""


def simulated_memory(
    config: Mapping[str, Any],
    spec: JobSpec,
    step: LargestStep,
    *,
    compute_dtype: str,
    checkpointing: bool,
    cuda: bool,
) -> Memory:
    """What the step takes. Raises: whatever transformers, peft or torch do where they cannot."""
    dtype: torch.dtype = getattr(torch, compute_dtype)
    with simulated_device(cuda=cuda) as answers:
        # Looked for on a few layers of each kind, which have all kinds' ways.
        ways = Network(*_adapted(shortened(config, PROBED_LAYERS), spec, dtype)).ways
        model, _ = _adapted(config, spec, dtype, isolation=ways.isolation)
        network = Network(
            model,
            ways.isolation,
            ways=ways,
            checkpointing=checkpointing,
            neftune_noise_alpha=spec.training.neftune_noise_alpha,
        )
        answers.truth = ways.isolation != "mask"
        tracker = Tracker(
            rounding=ROUNDING if cuda else 1,
            vocabulary=model.config.get_text_config().vocab_size,
            workspaces=workspaces(cuda=cuda),
        )
        paged_bytes = run_largest_step(network, spec, step, tracker, cuda=cuda)
    categories = tracker.at_peak()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not cuda:
        return Memory(categories, sum(categories.values()), 0, trained)
    categories[Category.WORKSPACE] += CUBLAS_WORKSPACE_BYTES
    return Memory(categories, tracker.reserved() + rounded(CUBLAS_WORKSPACE_BYTES, LARGE_STEP), paged_bytes, trained)


def _adapted(
    config: Mapping[str, Any], spec: JobSpec, dtype: torch.dtype, isolation: Isolation | None = None
) -> tuple[PeftModel, Isolation]:
    """The base with its adapter, and how it keeps documents apart: `isolation`, or what is found."""
    base = simulated_base(config, spec.quantization, dtype)
    if isolation is None:
        isolation = isolate_documents(base)
    elif isolation == "per_document":
        base.set_attn_implementation(PER_DOCUMENT)
    with META:
        return attach(base, spec.adapter, spec.training.seed), isolation


def main() -> None:
    # A config.json that somebody made up may ask for a billion layers.
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    request = json.loads(sys.stdin.readline())
    warnings.simplefilter("ignore")
    gc.freeze()  # what was imported need not be looked through again
    spec = JobSpec.model_validate(request.pop("spec"))
    step = largest_step(
        spec, micro_batch_tokens=request.pop("micro_batch_tokens"), longest_tokens=request.pop("longest_tokens")
    )
    try:
        answer = simulated_memory(request.pop("config"), spec, step, **request).as_dict()
    except Exception as error:  # noqa: BLE001 - every reason is told, none is this process's own
        answer = {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
