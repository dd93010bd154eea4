"""One step on tensors without values: a request as a line of JSON on stdin, the memory or a reason on stdout.

Run as `python -m qlora_service.planning.simulation_child` by `planning.simulation`, which sees to its end.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from qlora_service.models.adapters import attach
from qlora_service.planning.allocator import ROUNDING, rounded
from qlora_service.planning.largest_step import LargestStep, largest_step
from qlora_service.planning.memory import Category, Memory
from qlora_service.planning.simulated_base import simulated_base
from qlora_service.planning.simulated_device import CUBLAS_WORKSPACE_BYTES, simulated_device, workspaces
from qlora_service.planning.tracked_step import run_largest_step
from qlora_service.planning.tracker import Tracker
from qlora_service.specs import JobSpec
from qlora_service.training.attention import isolate_documents
from qlora_service.training.network import Network


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
    with simulated_device(cuda=cuda):
        base = simulated_base(config, spec.quantization, getattr(torch, compute_dtype))
        isolation = isolate_documents(base)
        network = Network(
            attach(base, spec.adapter, spec.training.seed),
            isolation,
            checkpointing=checkpointing,
            neftune_noise_alpha=spec.training.neftune_noise_alpha,
        )
        tracker = Tracker(
            rounding=ROUNDING if cuda else 1,
            vocabulary=base.config.get_text_config().vocab_size,
            workspaces=workspaces(cuda=cuda),
        )
        paged_bytes = run_largest_step(network, spec, step, tracker, cuda=cuda)
    categories = tracker.at_peak()
    trained = sum(p.numel() for p in network.model.parameters() if p.requires_grad)
    if not cuda:
        return Memory(categories, sum(categories.values()), 0, trained)
    categories[Category.WORKSPACE] += CUBLAS_WORKSPACE_BYTES
    return Memory(categories, tracker.reserved() + rounded(CUBLAS_WORKSPACE_BYTES, 2**21), paged_bytes, trained)


def main() -> None:
    request = json.loads(sys.stdin.readline())
    warnings.simplefilter("ignore")
    spec = JobSpec.model_validate(request.pop("spec"))
    lengths = largest_step(
        spec, micro_batch_tokens=request.pop("micro_batch_tokens"), longest_tokens=request.pop("longest_tokens")
    )
    try:
        answer = simulated_memory(request.pop("config"), spec, lengths, **request).as_dict()
    except Exception as error:  # noqa: BLE001 - every reason is told, none is this process's own
        answer = {"error": f"{type(error).__name__}: {error}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
